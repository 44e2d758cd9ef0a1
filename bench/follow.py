"""How an edge follows a link that changes meanwhile: `python -m bench.follow`.

One long greedy text a draft model, over a relay whose round trip steps up and down again, then the
same with the default fixed lengths. Told: every plan, and the tokens committed in each second.
The layout of processes and cores is the benchmark's (bed.py).
"""

import argparse
import asyncio
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import openings
from bench.bed import Bed, laid_out
from bench.machine import description
from bench.prompts import own_prompts
from bench.scenarios import DRAFTS, Condition, System
from bench.systems import configured, prompt_tokens, speculator
from edge_agent.observer import NullObserver

RTTS_MS = (20.0, 200.0, 20.0)
STAY_S = 6.0  # with each
MAX_TOKENS = 900
Result = dict[str, Any]


@dataclass
class Timeline(NullObserver):
    """Plans and tokens, by seconds since the first token."""

    plans: list[tuple[float, int, int]] = field(default_factory=list)  # (s, length, window)
    commits: list[tuple[float, int]] = field(default_factory=list)  # (s, tokens)
    began_s: float | None = None

    def now(self) -> float:
        if self.began_s is None:
            self.began_s = time.perf_counter()
        return time.perf_counter() - self.began_s

    def planned(self, draft_length: int, window: int) -> None:
        self.plans.append((round(self.now(), 2), draft_length, window))

    def tokens_by_second(self) -> list[int]:
        counts = [0] * (1 + int(self.commits[-1][0]))
        for at_s, num_tokens in self.commits:
            counts[int(at_s)] += num_tokens
        return counts


async def follow(bed: Bed, draft: str, system: System) -> Result:
    await bed.set_link(RTTS_MS[0], None)
    config = configured(Condition(system, draft, RTTS_MS[0]))
    line = Timeline()
    generator = speculator(config, bed.link, bed.drafting[draft], card=bed.card, observer=line)
    request = openings.request(prompt_tokens(bed, own_prompts()[0].prompt), MAX_TOKENS)
    changes = asyncio.create_task(_change(bed))
    generation = generator.generate(request)
    try:
        async for chunk in generation:
            line.commits.append((line.now(), len(chunk.token_ids)))
            if changes.done():
                break
    finally:
        changes.cancel()
        await generation.aclose()
    return {"plans": line.plans, "tokens_by_second": line.tokens_by_second()}


async def _change(bed: Bed) -> None:
    for rtt_ms in RTTS_MS[1:]:
        await asyncio.sleep(STAY_S)
        await bed.cloud_relay.set(rtt_ms, None)
    await asyncio.sleep(STAY_S)


async def _run() -> Result:
    result: Result = {"machine": description(), "rtts_ms": RTTS_MS, "stay_s": STAY_S}
    with tempfile.TemporaryDirectory(prefix="picospec-follow-") as logs:
        async with laid_out(DRAFTS, Path(logs), eager=False) as bed:
            for draft in DRAFTS:
                for system in (System.AUTO, System.PICOSPEC):
                    result[f"{draft}, {system.value}"] = await follow(bed, draft, system)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    result = asyncio.run(_run())
    print(f"round trips of {RTTS_MS} ms, {STAY_S:g} s each")
    for name, row in result.items():
        if isinstance(row, dict) and "plans" in row:
            print(f"{name}\n  tokens in each second: {row['tokens_by_second']}")
            print("  plans (s, draft length, window): " + ", ".join(map(str, row["plans"])))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
