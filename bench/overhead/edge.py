"""The edge's overheads: a drafted token, and bytes on the wire."""

import asyncio
import json
import statistics
import sys
import time
from typing import Any

from bench import openings
from bench.bed import drafter
from bench.machine import edge_core, pinned
from bench.openings import COUPLED, SPLIT
from bench.overhead.accepting_link import AcceptingLink
from bench.overhead.cloud import PROMPT
from bench.wan import LineConditions, WanRelay
from edge_agent.drafting.process import DraftingProcess
from edge_agent.generation import Generator
from edge_agent.link import CloudLink
from edge_agent.pipeline import SpeculationPolicy, SpeculativeGenerator
from picospec.protocol.messages import VerificationMode
from picospec_cli.model_folder import model_home
from picospec_cli.processes import HOST

DRAFT_LENGTHS = (1, 4, 8)
Result = dict[str, Any]

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
    """Milliseconds per drafted token: the bare runtime's greedy loop, and drafter process, pipe,
    session and codec together against a cloud that accepts all; on one core, alternating."""
    folder = model_home() / "draft-int4"
    arguments = (str(folder), str(num_tokens), str(edge_core()), json.dumps(PROMPT.tolist()))
    bare = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _BARE, *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert bare.stdin is not None
    assert bare.stdout is not None
    rows: dict[str, list[float]] = {"bare": [], "split": [], "coupled": [], "greedy": []}
    try:
        async with drafter("int4") as drafting:
            with pinned(edge_core()):
                for _ in range(repeats):
                    bare.stdin.write(b"go\n")
                    rows["bare"].append(float(await bare.stdout.readline()))
                    for name, mode, temperature in (
                        ("split", SPLIT, 1.0),
                        ("coupled", COUPLED, 1.0),
                        ("greedy", SPLIT, 0.0),
                    ):
                        spent_s = await _draft_freely(drafting, mode, temperature, num_tokens)
                        rows[name].append(spent_s / num_tokens * 1e3)
    finally:
        bare.kill()
        await bare.wait()
    medians = {name: statistics.median(values) for name, values in rows.items()}
    ratios = {f"{name}_over_bare": medians[name] / medians["bare"] for name in rows}
    return {"ms_per_token": medians, "ratio": ratios}


async def _draft_freely(
    drafting: DraftingProcess, mode: VerificationMode, temperature: float, num_tokens: int
) -> float:
    """Seconds from the first drafted token to the last of `num_tokens` more."""
    link = AcceptingLink(mode)
    policy = SpeculationPolicy(mode=mode, draft_length=4, window=16)
    generator = SpeculativeGenerator(link, drafting, lambda: link.card, policy)
    generation = generator.generate(
        openings.request(PROMPT, num_tokens + 8, temperature=temperature)
    )
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


async def measure_bytes(port: int, num_tokens: int) -> list[Result]:
    """Bytes for each output token each way: gRPC payloads, and all that crosses TCP.

    A row for each mode, form of verification and draft length.
    """
    async with (
        WanRelay(HOST, port, LineConditions(), LineConditions()) as relay,
        drafter("int4") as drafting,
    ):
        link = CloudLink(f"{HOST}:{relay.port}")
        try:
            card = await link.get_model()
            policies = [
                SpeculationPolicy(mode=mode, draft_length=draft_length, fast_verify=fast_verify)
                for mode in (SPLIT, COUPLED)
                for fast_verify in (True, False)
                for draft_length in DRAFT_LENGTHS
            ]
            return [
                await _count(
                    relay,
                    SpeculativeGenerator(link, drafting, lambda: card, policy),
                    policy,
                    num_tokens,
                )
                for policy in policies
            ]
        finally:
            await link.close()


async def _count(
    relay: WanRelay, generator: Generator, policy: SpeculationPolicy, num_tokens: int
) -> Result:
    before = relay.bytes_up, relay.bytes_down
    generation = generator.generate(openings.request(PROMPT, num_tokens, temperature=0.7, seed=3))
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
