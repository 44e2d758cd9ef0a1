"""A byte-level BPE tokenizer small enough to train in a test, with a ChatML template."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from edge_agent.tokenizer import Tokenizer

BOS, IM_START, IM_END = "<|bos|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_CORPUS = ["the quick brown fox jumps over the lazy dog and says hello to the world"] * 4


def tokenizer_json(*, with_bos: bool = False) -> bytes:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[BOS, IM_START, IM_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, 0)]
        )
    return tokenizer.to_str().encode()


def tiny_tokenizer(*, with_bos: bool = False, template: str | None = TEMPLATE) -> Tokenizer:
    """Ids 0..2 are special; the end of sequence is IM_END (2)."""
    return Tokenizer(
        tokenizer_json(with_bos=with_bos),
        chat_template=template,
        special_tokens={"bos_token": BOS, "eos_token": IM_END},
        eos_token_ids=(2,),
    )
