"""The real runtimes with the prepared models: what onnx.py and torch.py lean on, and the laws
that every context keeps over them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
import pytest
from tokenizers import Tokenizer

from edge_agent.drafting import drafter, onnx
from edge_agent.drafting.drafter import Drafter, DrafterContext
from edge_agent.drafting.messages import ContextSpec, DrafterSpec, DraftEvent, OpenContext
from edge_agent.drafting.process import DraftingProcess
from edge_agent.drafting.worker import DraftWorker
from picospec.errors import DrafterFailed
from picospec.protocol.drafting import Allow, Drafted
from picospec.protocol.messages import SamplingParams, VerificationMode
from picospec.sampling.distribution import Distribution
from picospec_cli.model_folder import model_home
from tests.support.builders import SPLIT, make_context_spec

ROOT = Path(__file__).parents[2]
QUESTION = "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"
WIDTH = 49152
# The runtimes' kernels differ between one token and many: int4 and int8 quantize activations.
TOLERANCES = {"draft-int4": 0.15, "draft-int8": 0.15, "target": 1e-4}  # of a probability


def folder(name: str) -> str:
    path = model_home(os.environ) / name
    if not path.is_dir():
        pytest.fail(f"no model in {path}: run `picospec prepare`")
    return str(path)


@pytest.fixture(scope="module", params=["draft-int4", "draft-int8", "target"])
def loaded(request: pytest.FixtureRequest) -> tuple[str, Drafter]:
    name: str = request.param
    backend = "torch" if name == "target" else "onnx"
    return name, drafter.load(DrafterSpec(backend, folder(name)))


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    tokenizer = Tokenizer.from_file(folder("target") + "/tokenizer.json")
    token_ids: list[int] = tokenizer.encode(QUESTION).ids
    return token_ids


def context_spec(
    token_ids: Sequence[int],
    *,
    mode: VerificationMode = SPLIT,
    temperature: float = 1.0,
    max_length: int = 0,
    logits_width: int = 0,
) -> ContextSpec:
    return make_context_spec(
        token_ids=token_ids,
        sampling=SamplingParams(temperature=temperature, seed=1),
        mode=mode,
        max_length=max_length,
        logits_width=logits_width,
    )


def proposed(context: DrafterContext) -> Distribution:
    law = context.propose()
    assert law is not None
    return law


def first_token(law: Distribution) -> int:
    assert law.token_ids is not None
    return int(law.token_ids[0])


def test_law_after_any_appends_and_rollbacks_is_a_fresh_context_s(
    loaded: tuple[str, Drafter], prompt: list[int]
) -> None:
    name, model = loaded
    assert model.logits_width == WIDTH
    rng = random.Random(0)
    # All but the first token may be taken back: into the prompt, too.
    context, text = model.open(context_spec(prompt), num_committed=1), list(prompt)
    assert isinstance(context, drafter.ModelContext)
    context.propose()
    for _ in range(8):
        length = rng.randint(1, len(text))
        context.rollback(length)
        text = text[:length]
        context.cache.num_committed = 1
        for _ in range(rng.randint(0, 6)):
            text.append(rng.randrange(WIDTH))
            context.append(text[-1])
            if rng.random() < 0.5:
                context.propose()
        law, fresh = proposed(context), proposed(model.open(context_spec(text)))
        assert np.abs(law.probs - fresh.probs).max() < TOLERANCES[name]
        again = proposed(context)
        assert np.abs(law.probs - again.probs).max() < TOLERANCES[name]
    context.close()


def test_greedy_drafts_agree_with_the_target(prompt: list[int]) -> None:
    def greedy(name: str, backend: str) -> list[int]:
        context = drafter.load(DrafterSpec(backend, folder(name))).open(
            context_spec(prompt, temperature=0.0)
        )
        drafts: list[int] = []
        for _ in range(24):
            drafts.append(first_token(proposed(context)))
            context.append(drafts[-1])
        return drafts

    target = greedy("target", "torch")
    assert greedy("draft-int8", "onnx")[:12] == target[:12]
    assert greedy("draft-int4", "onnx")[0] == target[0]


def test_long_contexts_end_at_their_bound(prompt: list[int]) -> None:
    model = drafter.load(DrafterSpec("onnx", folder("draft-int4")))
    context = model.open(context_spec(prompt, max_length=len(prompt) + 20, temperature=0.0))
    drafted: list[int] = []
    while (law := context.propose()) is not None:
        drafted.append(first_token(law))
        context.append(drafted[-1])
    assert len(drafted) == 21


@pytest.mark.parametrize("name", ["draft-int4", "draft-int8"])
def test_our_cache_computes_what_onnxruntime_genais_does(name: str) -> None:
    """Bit for bit, over pieces, single tokens and truncation. Its generators stop at a piece that
    ends with an end-of-sequence token, so there is none in the text."""
    config = genai.Config(folder(name))
    session = {"intra_op_num_threads": 1, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = genai.Model(config)
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=256)
    theirs = genai.Generator(model, params)
    ours = onnx.OnnxModel(Path(folder(name)), threads=1).open()
    text = np.random.default_rng(1).integers(100, 40_000, 64).astype(np.int32)
    for start, end in ((0, 32), (32, 40), (40, 41), (41, 42)):
        theirs.append_tokens(text[start:end])
        assert np.array_equal(ours.forward(text[start:end]), theirs.get_logits()[0, -1])
    theirs.rewind_to(35)
    ours.truncate(35)
    theirs.append_tokens(text[50:53])
    assert np.array_equal(ours.forward(text[50:53]), theirs.get_logits()[0, -1])


def test_a_cache_takes_the_memory_of_what_it_holds(prompt: list[int]) -> None:
    """In a process of its own, whose memory is looked at."""
    command = """
import sys
from pathlib import Path
import numpy as np
from edge_agent.drafting.onnx import OnnxModel
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
model = OnnxModel(Path(sys.argv[1]), threads=1)
text = np.arange(32, dtype=np.int32)
first = model.open()
first.forward(text)
before = resident()
caches = [model.open() for _ in range(20)]
for cache in caches:
    for _ in range(4):
        cache.forward(text)
print(resident() - before, sum(cache.num_bytes for cache in caches))
"""
    done = subprocess.run(
        [sys.executable, "-c", command, folder("draft-int4")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    taken, told = map(int, done.stdout.split())
    assert 0.8 * told < taken < 1.3 * told


def test_ids_outside_the_vocabulary_do_no_harm(loaded: tuple[str, Drafter]) -> None:
    _, model = loaded
    context = model.open(context_spec([1, WIDTH, WIDTH + 40], logits_width=WIDTH + 64))
    law = proposed(context)
    assert len(law.probs) == WIDTH + 64
    assert not law.probs[WIDTH:].any()


def test_a_long_prompt_does_not_starve_others(prompt: list[int]) -> None:
    model = drafter.load(DrafterSpec("onnx", folder("draft-int4")))
    events: list[tuple[int, object]] = []
    worker = DraftWorker(model, lambda context_id, event: events.append((context_id, event)))
    rng = np.random.default_rng(0)
    long = context_spec(rng.integers(10, WIDTH, 640).tolist())
    worker.handle(0, OpenContext(long, 640, limit=650))
    worker.handle(1, OpenContext(context_spec(prompt), len(prompt), limit=len(prompt) + 50))
    while all(context_id != 0 for context_id, _ in events):
        worker.step()
    assert len(events) >= 10


def plain(event: Drafted) -> tuple[object, ...]:
    """`event`, to be compared: laws hold arrays."""
    laws = [(str(law.token_ids), law.probs.tobytes()) for law in event.laws]
    return event.branch, event.position, event.token_ids, laws


@pytest.mark.parametrize("mode", VerificationMode)
async def test_killed_worker_goes_on_with_the_real_model(
    prompt: list[int], mode: VerificationMode
) -> None:
    async def draft(spec: ContextSpec, count: int, kill_after: int = 0) -> list[Drafted]:
        drafting = DraftingProcess(DrafterSpec("onnx", folder("draft-int8")))
        await drafting.start()
        events: list[Drafted] = []
        done = asyncio.Event()

        def on_event(event: DraftEvent) -> None:
            assert isinstance(event, Drafted)
            events.append(event)
            if len(events) == kill_after:
                assert drafting.pid is not None
                os.kill(drafting.pid, signal.SIGKILL)
            if len(events) == count:
                done.set()

        context = drafting.open(spec, on_event)
        context.send(Allow(len(spec.token_ids) + count))
        await asyncio.wait_for(done.wait(), 60)
        assert drafting.restarts == (kill_after > 0)
        await drafting.stop()
        return events

    spec = context_spec(prompt, mode=mode, temperature=0.3)
    undisturbed, killed = await draft(spec, 24), await draft(spec, 24, kill_after=9)
    assert [*map(plain, killed[:9])] == [*map(plain, undisturbed[:9])]
    assert [event.position for event in killed] == [event.position for event in undisturbed]
    # The new worker has forwarded the chain in one batch, which rounds differently. So it goes on
    # as one that was given the chain as a text: after 9 drafts, or those that were on their way.
    for kept in range(9, 13):
        chain = [token_id for event in killed[:kept] for token_id in event.token_ids]
        text = np.array([*prompt, *chain], np.int32)
        fresh = await draft(dataclasses.replace(spec, token_ids=text), 24 - kept)
        tokens = [event.token_ids for event in killed[kept:]]
        if [event.token_ids for event in fresh] == tokens:
            return
    raise AssertionError("the new worker goes on with another text than the lost one's")


def test_onnx_drafter_loads_neither_torch_nor_transformers() -> None:
    program = (
        "import sys; from edge_agent.drafting import drafter, worker_main;"
        "from edge_agent.drafting.messages import DrafterSpec;"
        f"drafter.load(DrafterSpec('onnx', {folder('draft-int4')!r}));"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=60)


def test_a_broken_model_is_told(tmp_path: Path) -> None:
    source = Path(folder("draft-int4"))
    (tmp_path / "genai_config.json").write_bytes((source / "genai_config.json").read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(DrafterFailed, match="cannot load onnx drafter"):
        drafter.load(DrafterSpec("onnx", str(tmp_path)))
    (tmp_path / "genai_config.json").write_text("{")
    with pytest.raises(DrafterFailed, match="cannot load onnx drafter"):
        drafter.load(DrafterSpec("onnx", str(tmp_path)))
    with pytest.raises(DrafterFailed):
        drafter.load(DrafterSpec("torch", str(tmp_path)))
