"""What PicoSpec costs beside the models' own forwards: `python -m bench.overhead`.

    engine    a step of the engine outside forward and sampling
    delivery  from a Draft's arrival in the gRPC process to the step that takes it
    codec     frames to bytes and back, against the same with lists in between
    pipeline  the edge's own time for each drafted token over the bare drafter's
    bytes     on the wire for each output token, HTTP/2 framing included

The cloud computes on the first core, the edge on the last. Real target, eager; real int4 draft.
What is compared alternates, and medians are given.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.accepting_link import AcceptingLink
from bench.machine import cloud_core, description, edge_core, pinned
from bench.wan import Link as WanLink
from bench.wan import WanRelay
from edge_agent.drafting.messages import DrafterSpec
from edge_agent.drafting.process import DraftingProcess
from edge_agent.generation import GenerationRequest, Generator
from edge_agent.link import CloudLink, Link
from edge_agent.pipeline import SpeculationPolicy, SpeculativeGenerator
from picospec.errors import CloudUnavailable
from picospec.messages import (
    EMPTY_TOKENS,
    AssistPolicy,
    Draft,
    ModelCard,
    Open,
    SamplingParams,
    Verdict,
    VerificationMode,
)
from picospec_cli.model_folder import model_home
from picospec_cli.processes import Daemon, stop

PROMPT = [1, 4093, 198, 4093, 314, 260, 6376, 4461, 47, 2, 198, 1, 520, 9531, 198]
SPLIT, COUPLED = VerificationMode.SPLIT, VerificationMode.COUPLED
GREEDY = SamplingParams(temperature=0.0)
DRAFT_LENGTHS = (1, 4, 8)
Result = dict[str, Any]


# -- the engine ------------------------------------------------------------------------------------


async def measure_engine(repeats: int, num_tokens: int) -> Result:
    """Milliseconds a step spends outside forward and sampling, decoding alone (k = 0) and with
    four correct drafts a step (k = 4); `loop` includes vLLM's loop around the step."""
    from cloud_server.config import EngineConfig
    from cloud_server.engine.client import VLLMEngine

    engine = VLLMEngine(
        EngineConfig(
            model=str(model_home() / "target"),
            max_draft_tokens=4,
            args={"enforce_eager": True, "max_model_len": 1024},
        )
    )
    with pinned(cloud_core()):
        await engine.start()
    rows: dict[str, list[dict[str, float]]] = {"k=0": [], "k=4": []}
    try:
        text: list[int] = []
        for _ in range(repeats):
            row, text = await _decode(engine, num_tokens, [])
            rows["k=0"].append(row)
            row, same = await _decode(engine, num_tokens, text)
            assert same == text, "the drafts changed the text"
            rows["k=4"].append(row)
    finally:
        await engine.shutdown()
    return {
        name: {key: statistics.median(row[key] for row in group) for key in group[0]}
        for name, group in rows.items()
    }


async def _decode(
    engine: Any, num_tokens: int, drafts: list[int]
) -> tuple[dict[str, float], list[int]]:
    """One generation, by the engine alone or over `drafts`, all of which are delivered at once."""
    events: asyncio.Queue[Any] = asyncio.Queue()
    key = f"bench-{time.monotonic_ns()}"
    request = Open(
        session_id=key,
        prompt_token_ids=np.array(PROMPT, np.int32),
        output_token_ids=EMPTY_TOKENS,
        sampling=GREEDY,
        mode=COUPLED,
        max_tokens=num_tokens,
        assist=AssistPolicy.NEVER if drafts else AssistPolicy.ALWAYS,
    )
    await engine.open(key, request, events.put_nowait)
    if drafts:
        await engine.deliver(key, Draft(0, len(PROMPT), tuple(drafts)), time.monotonic())
    text: list[int] = []
    started_s, before = 0.0, engine.stats()
    while True:
        event = await events.get()
        if isinstance(event, Exception):
            raise event
        if not isinstance(event, Verdict):
            continue
        if not text:  # the prompt is in: what follows is decoding
            started_s, before = time.perf_counter(), engine.stats()
        text += (drafts[len(text) :][: event.num_accepted]) + list(event.token_ids)
        if event.finish_reason is not None:
            break
    wall_s, after = time.perf_counter() - started_s, engine.stats()
    steps = after.steps - before.steps
    model_s = (after.forward_s - before.forward_s) + (after.sampling_s - before.sampling_s)
    return {
        "steps": steps,
        "forward_ms": (after.forward_s - before.forward_s) / steps * 1e3,
        "sampling_ms": (after.sampling_s - before.sampling_s) / steps * 1e3,
        "step_outside_ms": (after.step_s - before.step_s - model_s) / steps * 1e3,
        "loop_outside_ms": (wall_s - model_s) / steps * 1e3,
    }, text


# -- delivery --------------------------------------------------------------------------------------


async def measure_delivery(link: CloudLink, num_drafts: int) -> Result:
    """Milliseconds from a Draft's arrival to the start of the step that judges it, engine idle.

    Wrong drafts one at a time in coupled mode: each is answered before the next is sent.
    """
    stream = link.open_stream("bench-delivery")
    stream.send(
        Open(
            session_id="bench-delivery",
            prompt_token_ids=np.array(PROMPT, np.int32),
            output_token_ids=EMPTY_TOKENS,
            sampling=GREEDY,
            mode=COUPLED,
            max_tokens=2 * num_drafts + 8,
        )
    )
    queued_ms: list[float] = []
    position, epoch = len(PROMPT), 0
    while len(queued_ms) < num_drafts:
        frame = await stream.receive()
        assert frame is not None
        if not isinstance(frame, Verdict):
            continue
        if frame.num_draft_tokens:
            queued_ms.append(frame.queue_us / 1e3)
        position += frame.num_accepted + len(frame.token_ids)
        stream.send(Draft(epoch, position, (7,), end_of_round=True))
        epoch += 1
    await stream.aclose()
    return _spread(queued_ms)


# -- the edge's pipeline ---------------------------------------------------------------------------

_BARE = """
import json, os, sys, time
import numpy as np, onnxruntime_genai as genai
folder, count, core = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.sched_setaffinity(0, {core})
config = genai.Config(folder)
options = {"session_options": {"intra_op_num_threads": 1, "inter_op_num_threads": 1}}
config.overlay(json.dumps({"model": {"decoder": options}}))
params = genai.GeneratorParams(model := genai.Model(config))
params.set_search_options(max_length=2048)
for _ in sys.stdin:
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array(json.loads(sys.argv[4]), np.int32))
    token = int(generator.get_logits()[0, -1].argmax())
    started = time.perf_counter()
    for _ in range(count):
        generator.append_tokens(np.array([token], np.int32))
        token = int(generator.get_logits()[0, -1].argmax())
    print((time.perf_counter() - started) / count * 1e3, flush=True)
"""


async def measure_pipeline(repeats: int, num_tokens: int) -> Result:
    """Milliseconds a drafted token: the bare runtime's greedy loop, and drafter process, pipe,
    session and codec together against a cloud that accepts all; on one core, alternating."""
    folder = model_home() / "draft-int4"
    arguments = (str(folder), str(num_tokens), str(edge_core()), json.dumps(PROMPT))
    bare = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _BARE, *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert bare.stdin is not None
    assert bare.stdout is not None
    drafting = DraftingProcess(DrafterSpec("onnx", str(folder), threads=1, cpu=edge_core()), 2)
    await drafting.start()
    rows: dict[str, list[float]] = {"bare": [], "split": [], "coupled": [], "greedy": []}
    try:
        with pinned(edge_core()):
            for _ in range(repeats):
                bare.stdin.write(b"go\n")
                rows["bare"].append(float(await bare.stdout.readline()))
                for name, mode, temperature in (
                    ("split", SPLIT, 1.0),
                    ("coupled", COUPLED, 1.0),
                    ("greedy", SPLIT, 0.0),
                ):
                    sampling = SamplingParams(temperature=temperature, seed=1)
                    link = AcceptingLink(mode)
                    spent_s = await _draft_freely(link, drafting, mode, sampling, num_tokens)
                    rows[name].append(spent_s / num_tokens * 1e3)
    finally:
        bare.kill()
        await bare.wait()
        await drafting.stop()
    medians = {name: statistics.median(values) for name, values in rows.items()}
    ratios = {f"{name}_over_bare": medians[name] / medians["bare"] for name in rows}
    return {"ms_per_token": medians, "ratio": ratios}


async def _draft_freely(
    link: AcceptingLink,
    drafting: DraftingProcess,
    mode: VerificationMode,
    sampling: SamplingParams,
    num_tokens: int,
) -> float:
    """Seconds from the first drafted token to the last of `num_tokens` more."""
    policy = SpeculationPolicy(mode=mode, draft_length=4, window=16)
    generator = SpeculativeGenerator(link, drafting, lambda: link.card, policy)
    generation = generator.generate(_request(sampling, num_tokens + 8))
    started_s, seen = 0.0, 0
    async for chunk in generation:
        seen += len(chunk.token_ids)
        if not started_s and seen >= 8:
            started_s, seen = time.perf_counter(), 0
        elif started_s and seen >= num_tokens:
            break
    spent_s = time.perf_counter() - started_s
    await generation.aclose()
    return spent_s * num_tokens / max(1, seen)


# -- bytes -----------------------------------------------------------------------------------------


async def measure_bytes(address: str, num_tokens: int) -> list[Result]:
    """Bytes for each output token each way: gRPC payloads, and all that crosses TCP."""
    host, port = address.rsplit(":", 1)
    folder = model_home() / "draft-int4"
    drafting = DraftingProcess(DrafterSpec("onnx", str(folder), threads=1, cpu=edge_core()), 2)
    async with WanRelay(host, int(port), WanLink(), WanLink()) as relay:
        link = CloudLink(f"127.0.0.1:{relay.port}")
        try:
            await drafting.start()
            return await _count_each(relay, link, drafting, num_tokens)
        finally:
            await drafting.stop()
            await link.close()


async def _count_each(
    relay: WanRelay, link: CloudLink, drafting: DraftingProcess, num_tokens: int
) -> list[Result]:
    """A row for each mode, form of verification and draft length."""
    card = await link.get_model()
    return [
        await _count(
            relay,
            link,
            drafting,
            card,
            SpeculationPolicy(mode=mode, draft_length=draft_length, fast_verify=fast_verify),
            num_tokens,
        )
        for mode in (SPLIT, COUPLED)
        for fast_verify in (True, False)
        for draft_length in DRAFT_LENGTHS
    ]


async def _count(
    relay: WanRelay,
    link: Link,
    drafting: DraftingProcess,
    card: ModelCard,
    policy: SpeculationPolicy,
    num_tokens: int,
) -> Result:
    generator: Generator = SpeculativeGenerator(link, drafting, lambda: card, policy)
    before = relay.bytes_up, relay.bytes_down
    generation = generator.generate(_request(SamplingParams(temperature=0.7, seed=3), num_tokens))
    async for _ in generation:
        pass
    await generation.aclose()
    await asyncio.sleep(0.1)  # the last frames of the stream are still on their way
    stats = generation.stats
    tokens = max(1, stats.output_tokens)
    return {
        "mode": policy.mode.value,
        "fast_verify": policy.fast_verify,
        "draft_length": policy.draft_length,
        "payload_up": stats.bytes_up / tokens,
        "payload_down": stats.bytes_down / tokens,
        "wire_up": (relay.bytes_up - before[0]) / tokens,
        "wire_down": (relay.bytes_down - before[1]) / tokens,
        "acceptance": stats.accepted_tokens / max(1, stats.drafted_tokens),
    }


# -- together --------------------------------------------------------------------------------------


def _request(sampling: SamplingParams, max_tokens: int) -> GenerationRequest:
    return GenerationRequest(
        request_id=f"bench-{time.monotonic_ns()}",
        prompt_token_ids=np.array(PROMPT, np.int32),
        sampling=sampling,
        max_tokens=max_tokens,
        stop_token_ids=(),
    )


def _spread(values: list[float]) -> Result:
    cuts = statistics.quantiles(values, n=20)
    return {"p5": cuts[0], "p50": statistics.median(values), "p95": cuts[-1], "n": len(values)}


async def _with_cloud(quick: bool) -> tuple[Result, list[Result]]:
    """What needs the cloud's daemon, on a core of its own."""
    port = 50951
    flags = ["--server.port", str(port), "--metrics.enabled", "false", "--server.grace_s", "1"]
    flags += ["--engine.args.enforce_eager", "true", "--engine.args.max_model_len", "1024"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "cloud.log"
        daemon = Daemon("cloud_server", flags, log, {cloud_core()})
        link = CloudLink(f"127.0.0.1:{port}")
        try:
            while True:
                daemon.check_alive()
                try:
                    await link.get_model()
                    break
                except CloudUnavailable:
                    await asyncio.sleep(0.5)
            with pinned(edge_core()):
                delivery = await measure_delivery(link, 40 if quick else 200)
                sizes = await measure_bytes(f"127.0.0.1:{port}", 24 if quick else 64)
        finally:
            await link.close()
            await asyncio.to_thread(stop, [daemon])
    return delivery, sizes


def _print(result: Result) -> None:
    print("\nengine, ms a step                    forward  sampling  outside: step    loop")
    for name, row in result["engine"].items():
        print(
            f"  {name:<34}{row['forward_ms']:9.2f}{row['sampling_ms']:10.2f}"
            f"{row['step_outside_ms']:15.2f}{row['loop_outside_ms']:8.2f}"
        )
    delivery = result["delivery_ms"]
    print("\nDraft's arrival to the engine's step, ms (idle engine, n = {n})".format(**delivery))
    print("  p5 {p5:.2f}   p50 {p50:.2f}   p95 {p95:.2f}".format(**delivery))
    print("\ndrafted token, ms (one core)")
    pipeline = result["pipeline"]
    for name, value in pipeline["ms_per_token"].items():
        print(f"  {name:<10}{value:8.2f}   {pipeline['ratio'][name + '_over_bare']:.3f} of bare")
    print("\nbytes an output token          payload up  down   on the wire up    down  acceptance")
    for row in result["bytes"]:
        verify = "fast" if row["fast_verify"] else "round"
        print(
            f"  {row['mode']:<8} {verify:<6} n = {row['draft_length']}   "
            f"{row['payload_up']:14.1f}{row['payload_down']:7.1f}"
            f"{row['wire_up']:15.1f}{row['wire_down']:8.1f}{row['acceptance']:10.2f}"
        )


async def _run(quick: bool) -> Result:
    result: Result = {"machine": description()}
    result["engine"] = await measure_engine(1 if quick else 5, 65)
    result["pipeline"] = await measure_pipeline(1 if quick else 5, 100 if quick else 200)
    result["delivery_ms"], result["bytes"] = await _with_cloud(quick)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    arguments = parser.parse_args()
    result = asyncio.run(_run(arguments.quick))
    _print(result)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
