"""Where a verification step and a drafted token spend their time: `python -m bench.step_profile`.

    step    the engine's, decoding alone and with four drafts, compiled as in the benchmark: vLLM's
            own torch profiler says which kernels ran, the engine's counters what was beside them
    token   the drafter's, in this process: the forward, the copy of its logits, the law, the draw

The cloud computes on the first core, the drafter on the last, one after the other. A profiler
slows small operations: shares are to be compared, totals are told without it.
"""

import argparse
import asyncio
import cProfile
import heapq
import json
import pstats
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import openings
from bench.bed import drafter_spec
from bench.machine import description, edge_core, pinned
from bench.overhead.cloud import DRAFTS, PROMPT, decode, medians, running_engine
from bench.stock.server import EQUAL_SETTINGS
from edge_agent.drafting import drafter
from edge_agent.drafting.messages import DraftEvent, OpenContext
from edge_agent.drafting.worker import DraftWorker
from picospec.protocol.drafting import Drafted

STEP_TOKENS = 65  # so that rounds of four and a bonus token come out even
TOKENS = 200
Result = dict[str, Any]
Event = dict[str, Any]

# Kinds of kernels, by what their names contain; the first that fits.
KINDS = {
    "attention": ("attention",),
    "matrix products": ("onednn", "linear", "mm", "gemm", "matmul"),
    "fused norms, rotations, activations": ("cpp_fused", "compiled", "graph_", "triton"),
    "choosing tokens": ("argmax", "softmax", "max", "sort", "topk"),
}
OTHER = "everything else"
# What a drafted token is spent on, by the file ("~": compiled code) and name of the function.
PARTS = {
    ("~", "append_tokens"): "forward",
    ("~", "get_logits"): "copy of the logits",
    ("distribution.py", "process"): "law",
    ("distribution.py", "draw"): "draw",
}


async def profile_steps(repeats: int) -> dict[str, Result]:
    """By drafts per step: milliseconds of each kind, profiled, and of the whole step, not."""
    with tempfile.TemporaryDirectory() as folder:
        profiler = {
            "profiler": "torch",
            "torch_profiler_dir": folder,
            "torch_profiler_with_stack": False,
            "torch_profiler_use_gzip": False,
            "ignore_frontend": True,
        }
        async with running_engine({**EQUAL_SETTINGS, "profiler_config": profiler}) as engine:
            return {
                name: await _profile_step(engine, drafts, repeats, Path(folder))
                for name, drafts in (("0", False), (str(DRAFTS), True))
            }


async def _profile_step(engine: Any, with_drafts: bool, repeats: int, folder: Path) -> Result:
    _, text = await decode(engine, STEP_TOKENS, [])
    drafts = text if with_drafts else []
    totals = medians([(await decode(engine, STEP_TOKENS, drafts))[0] for _ in range(repeats)])
    before = _traces(folder)
    await engine.profile(start=True)
    profiled, _ = await decode(engine, STEP_TOKENS, drafts)
    await engine.profile(start=False)
    [trace] = _traces(folder) - before
    document = await asyncio.to_thread(lambda: json.loads(trace.read_text()))
    times_us = self_times_us(document["traceEvents"])
    kinds: defaultdict[str, float] = defaultdict(float)
    for name, spent_us in times_us.items():
        kinds[kind_of(name)] += spent_us / 1e3 / profiled["steps"]
    top = {
        name: times_us[name] / 1e3 / profiled["steps"]
        for name in heapq.nlargest(8, times_us, key=lambda name: times_us[name])
    }
    return {"ms": totals, "profiled_ms": dict(kinds), "top": top}


def _traces(folder: Path) -> set[Path]:
    return set(folder.rglob("*.json"))


def kind_of(name: str) -> str:
    """
    >>> kind_of("_C::onednn_mm"), kind_of("aten::copy_")
    ('matrix products', 'everything else')
    """
    lower = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(p in lower for p in parts)), OTHER)


def self_times_us(events: Iterable[Event]) -> dict[str, float]:
    """By name, what operations took without those inside them: a Chrome trace's, in microseconds.

    >>> self_times_us([
    ...     {"ph": "X", "cat": "cpu_op", "name": "outer", "tid": 1, "ts": 0, "dur": 10},
    ...     {"ph": "X", "cat": "cpu_op", "name": "inner", "tid": 1, "ts": 2, "dur": 3},
    ... ])
    {'outer': 7.0, 'inner': 3.0}
    """
    spent: defaultdict[str, float] = defaultdict(float)
    open_ops: dict[Any, list[tuple[float, str]]] = defaultdict(list)  # (end, name), by thread
    ops = (each for each in events if each.get("ph") == "X" and each.get("cat") == "cpu_op")
    for each in sorted(ops, key=lambda each: (float(each["ts"]), -float(each["dur"]))):
        stack, begin, took = open_ops[each["tid"]], float(each["ts"]), float(each["dur"])
        while stack and stack[-1][0] <= begin:
            stack.pop()
        if stack:
            spent[stack[-1][1]] -= took
        spent[each["name"]] += took
        stack.append((begin + took, each["name"]))
    return dict(spent)


def profile_token(draft: str, temperature: float) -> Result:
    """Milliseconds per drafted token, split mode: the whole, and under the profiler its parts."""
    drafted: list[Drafted] = []

    def emit(context_id: int, event: DraftEvent) -> None:
        if isinstance(event, Drafted):
            drafted.append(event)

    loaded: Any = drafter.load(drafter_spec(draft))
    worker = DraftWorker(loaded, emit)
    spec = openings.context(PROMPT, 2 * TOKENS + 16, mode=openings.SPLIT, temperature=temperature)
    worker.handle(0, OpenContext(spec, -1, limit=spec.max_length))
    while len(drafted) < 8:
        worker.step()
    started_s = time.perf_counter()
    for _ in range(TOKENS):
        worker.step()
    spent_s = defaultdict(float, whole=time.perf_counter() - started_s)
    with cProfile.Profile() as profile:
        for _ in range(TOKENS):
            worker.step()
    stats: Any = pstats.Stats(profile)
    for (file, _, function), (_, _, _, cumulative_s, _) in stats.stats.items():
        for (home, name), part in PARTS.items():
            if Path(file).name == home and name in function:
                spent_s[part] += cumulative_s
    return {name: 1e3 * seconds / TOKENS for name, seconds in spent_s.items()}


def _print(result: Result) -> None:
    for drafts, step in result["steps"].items():
        print(f"\na step with {drafts} drafts, ms")
        for name, ms in step["ms"].items():
            print(f"  {ms:8.2f}  {name}")
        print("  profiled")
        for name, ms in sorted(step["profiled_ms"].items(), key=lambda item: -item[1]):
            print(f"  {ms:8.2f}  {name}")
        print("  of that")
        for name, ms in step["top"].items():
            print(f"  {ms:8.2f}  {name}")
    for name, token in result["tokens"].items():
        print(f"\na drafted token, {name}, ms")
        for what, ms in token.items():
            print(f"  {ms:8.3f}  {what}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    result: Result = {"machine": description()}
    result["steps"] = asyncio.run(profile_steps(arguments.repeats))
    with pinned(edge_core()):
        result["tokens"] = {
            f"{draft}, T = {temperature:g}": profile_token(draft, temperature)
            for draft in ("int4", "int8")
            for temperature in (0.0, 0.7)
        }
    _print(result)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
