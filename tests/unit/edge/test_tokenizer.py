from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from edge_agent.chat_template import ChatTemplate
from edge_agent.detokenizer import Detokenizer, StopScanner
from edge_agent.tokenizer import Tokenizer
from picospec.errors import ConfigError, ModelMismatch, RequestError
from tests.support.builders import SPLIT, make_card_for
from tests.support.tiny_tokenizer import BOS, TEMPLATE, tiny_tokenizer, tokenizer_json

TINY = tiny_tokenizer()


card_of = functools.partial(
    make_card_for, model_id="target", padding=10, max_model_len=128, modes=(SPLIT,)
)


def detokenized(detokenizer: Detokenizer, ids: list[int]) -> str:
    return "".join([*map(detokenizer.push, ids), detokenizer.finish()])


# Any ids at all: stray bytes, special tokens, ids beyond the vocabulary.
@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, TINY.size + 5), max_size=120))
def test_deltas_join_to_the_text_of_all_tokens(ids: list[int]) -> None:
    assert detokenized(TINY.detokenizer(), ids) == TINY.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1, max_size=60), st.text(max_size=20))
def test_no_delta_holds_half_a_character(text: str, prompt: str) -> None:
    detokenizer = TINY.detokenizer(TINY.encode(prompt).tolist())
    ids = TINY.encode(text).tolist()
    deltas = [detokenizer.push(token_id) for token_id in ids]
    assert "".join(deltas) + detokenizer.finish() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in delta for delta in deltas)


def test_a_character_of_several_tokens_comes_whole() -> None:
    ids = TINY.encode("a🙂b").tolist()
    detokenizer = TINY.detokenizer()
    assert len(ids) == 6
    assert [detokenizer.push(token_id) for token_id in ids] == ["a", "", "", "", "🙂", "b"]


def test_detokenizing_stays_linear_on_garbage() -> None:
    stray = TINY.encode("é").tolist()[-1]  # a continuation byte that nothing begins
    widths: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        widths.append(len(ids))
        return TINY.decode(ids)

    assert detokenized(Detokenizer(decode), [stray] * 2000) == "\ufffd" * 2000
    assert max(widths) < 64


def sentencepiece() -> tokenizers.Tokenizer:
    """Llama 2's kind: spaces as ▁, unknown characters as byte tokens, a leading space dropped."""
    vocab = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁the", "▁cat", "s", "▁"]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab={token: id for id, token in enumerate(vocab)}, merges=[])
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def test_sentencepiece_keeps_the_space_after_a_prompt() -> None:
    tokenizer = sentencepiece()
    assert detokenized(Detokenizer(tokenizer.decode, prompt_tail=[256]), [257, 258]) == " cats"
    assert detokenized(Detokenizer(tokenizer.decode), [257, 258]) == "cats"


def test_sentencepiece_byte_tokens_join_over_many_characters() -> None:
    text = "€uro 🙂 " * 20
    ids = list(text.encode())
    assert detokenized(Detokenizer(sentencepiece().decode), ids) == text


def one_shot(text: str, stops: list[str]) -> str:
    """Cut at the first character that completes a stop, where the longest such stop begins."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - max(map(len, done))]
    return text


SHORT = st.text(alphabet="ab", min_size=1, max_size=6)


@settings(max_examples=400, deadline=None)
@given(st.lists(SHORT | st.just(""), max_size=12), st.lists(SHORT, max_size=4))
def test_stops_do_not_depend_on_token_boundaries(deltas: list[str], stops: list[str]) -> None:
    scanner = StopScanner(stops)
    shown = ""
    for delta in deltas:
        shown += scanner.feed(delta)
        assert one_shot("".join(deltas), stops).startswith(shown)  # nothing to take back
    assert shown + scanner.finish() == one_shot("".join(deltas), stops)
    assert scanner.stopped == any(stop in "".join(deltas) for stop in stops)


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    scanner = StopScanner(["END", "\n\n"])
    assert [scanner.feed(delta) for delta in ["the E", "N", "T", "\n", "E", "ND", "x"]] == [
        "the ", "", "ENT", "", "\n", "", "",
    ]  # fmt: skip
    assert scanner.stopped


def test_encode_adds_bos_once() -> None:
    tokenizer = tiny_tokenizer(with_bos=True)
    assert tokenizer.encode("hello").tolist()[0] == 0
    assert tokenizer.encode("hello").tolist() == tokenizer.encode(BOS + "hello").tolist()
    chat = tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    assert 0 not in chat.tolist()  # the template decides


def test_chat_template_renders_as_transformers_does(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE + "{{ {'<': 1} | tojson }}\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"})
    )
    messages = [{"role": "system", "content": "be <b>rief</b>"}, {"role": "user", "content": "hé"}]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert Tokenizer.load(tmp_path).encode_chat(messages).tolist() == expected


def test_a_template_may_refuse() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        template.render([{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"


def test_a_template_cannot_reach_python() -> None:
    template = ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}", {})
    with pytest.raises(RequestError):
        template.render([])


def test_generation_blocks_and_named_tokens() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% if loop.first %}{% break %}{% endif %}{% endfor %}",
        {"bos_token": "<s>"},
    )
    assert template.render([{"content": "a"}, {"content": "b"}]) == "<s>a"


def test_no_template_is_a_request_error() -> None:
    with pytest.raises(RequestError, match="/v1/completions"):
        tiny_tokenizer(template=None).encode_chat([{"role": "user", "content": "x"}])


def test_load_reads_named_templates_and_eos_ids(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": named, "bos_token": {"content": BOS}})
    )
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos_token_ids == (7,)
    assert loaded.decode(loaded.encode_chat([]).tolist()) == "yes"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert Tokenizer.load(tmp_path).eos_token_ids == (2, 7)


def test_load_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"drafter\.tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)


def test_a_right_pair_passes() -> None:
    TINY.check_pair(card_of(TINY))


@pytest.mark.parametrize(
    ("change", "said", "unsaid"),
    [
        ({"tokenizer_fingerprint": "ab" * 32}, "tokenizer.json", "chat_template.jinja"),
        ({"chat_template_fingerprint": ""}, "chat_template.jinja", "tokenizer.json"),
        ({"logits_width": 100}, "logits", "chat_template.jinja"),
    ],
)
def test_a_wrong_pair_is_refused_by_file(change: dict[str, Any], said: str, unsaid: str) -> None:
    with pytest.raises(ModelMismatch) as caught:
        TINY.check_pair(replace(card_of(TINY), **change))
    assert said in str(caught.value)
    assert unsaid not in str(caught.value)


async def test_long_texts_leave_the_event_loop_free() -> None:
    text = "the quick brown fox " * 50_000
    encoding = asyncio.ensure_future(TINY.encode_async(text))
    ticks = 0
    while not encoding.done():
        await asyncio.sleep(0.001)
        ticks += 1
    assert len(await encoding) > 100_000
    assert ticks > 20
