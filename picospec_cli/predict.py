"""`picospec predict`: how fast speculation would be, before it is run.

The costs come from a JSON file that the benchmark writes, an object with
    verify_ms         {"0": ms, "1": ms, ...}: an engine step by number of drafts judged
    draft_ms, alpha   a drafted token; the acceptance rate, or a list of it by place in the chain;
                      or, for several drafters, drafts: {NAME: {"draft_ms": ms, "alpha": rate}, ...}
and, where they were measured, step_overhead_ms, row_judge_ms, recover_ms (all 0 if absent) and
plain_ms, a token of cloud-only decoding (verify_ms at 0 if absent). Other keys are ignored.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picospec.errors import ConfigError
from picospec.performance.costs import (
    Acceptance,
    Costs,
    Network,
    Scheme,
    check_acceptance,
    costs_from_json,
    dense_rejection_bytes,
)
from picospec.performance.prediction import (
    DRAFT_LENGTH_MAX,
    RTT_MS_MAX,
    break_even_rtt_ms,
    cloud_only,
    predicted_goodput,
)
from picospec.performance.simulation import simulate
from picospec.protocol.messages import VerificationMode

RTTS_MS = (0.0, 10.0, 20.0, 50.0, 100.0, 200.0)
SEED = 1

# SmolLM2-135M, a core for each side, the engine compiled, temperature 1.
DEFAULT_COSTS: dict[str, Any] = {
    "verify_ms": {"0": 40.0, "1": 49.0, "2": 53.0, "4": 63.5, "8": 77.5, "15": 108.0},
    "drafts": {
        "int4": {"draft_ms": 7.5, "alpha": 0.69},
        "int8": {"draft_ms": 13.2, "alpha": 0.965},
    },
}


@dataclass(frozen=True, slots=True)
class Case:
    """A drafter, and how often it is right."""

    name: str
    costs: Costs
    alpha: Acceptance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--costs", type=Path, metavar="FILE", help="measured costs, as JSON")
    add("--draft-ms", type=float, metavar="MS", help="per drafted token; without --costs")
    add("--alpha", type=float, nargs="+", metavar="RATE", help="acceptance rates; else of --costs")
    add("--rtt", type=float, nargs="+", default=RTTS_MS, metavar="MS", help="round trips")
    add("--mode", choices=[mode.value for mode in VerificationMode], default="split")
    add("--draft-length-max", type=int, default=DRAFT_LENGTH_MAX, help="default %(default)s")
    add("--window", type=int, default=64, help="unverified tokens; default %(default)s")
    add("--bandwidth-mbps", type=float, help="each way; default unlimited")
    add("--dense-width", type=int, metavar="LOGITS", help="rejections carry the whole distribution")
    for switch in ("parallel-draft", "fast-verify", "kept-rows"):
        add(f"--no-{switch}", action="store_true", help="switch it off")
    add("--simulate", type=int, metavar="TOKENS", help="by event simulation of so many tokens")
    add("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    scheme = Scheme(
        window=arguments.window,
        parallel_draft=not arguments.no_parallel_draft,
        fast_verify=not arguments.no_fast_verify,
        mode=VerificationMode(arguments.mode),
        kept_rows=not (arguments.no_kept_rows or arguments.no_fast_verify),
    )
    if arguments.draft_length_max < 1:
        raise ConfigError("--draft-length-max must be 1 or more")
    reports = [
        report(case, scheme, _link(arguments), arguments) for case in cases(_document(arguments))
    ]
    if arguments.json:
        print(json.dumps({"mode": scheme.mode.value, "window": scheme.window, "cases": reports}))
    else:
        print("\n\n".join(text(case) for case in reports))
    return 0


def cases(document: dict[str, Any]) -> Iterator[Case]:
    """One for each drafter and acceptance. Raises ConfigError for what a file lacks."""
    drafts = document.get("drafts", {"draft": document})
    if not isinstance(drafts, dict) or not all(
        isinstance(draft, dict) for draft in drafts.values()
    ):
        raise ConfigError("drafts must be an object of objects")
    for name, draft in drafts.items():
        costs = costs_from_json(document | draft)
        alphas = document.get("alphas", [draft.get("alpha")])
        for alpha in alphas:
            if not isinstance(alpha, (int, float, list)):
                raise ConfigError(f"alpha of {name!r} is missing; give it with --alpha")
            try:
                check_acceptance(alpha)
            except (TypeError, ValueError):
                raise ConfigError(f"alpha of {name!r} must be a number or numbers") from None
            yield Case(name, costs, alpha)


def report(
    case: Case, scheme: Scheme, link: Network, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Goodput by RTT and draft length; `break_even_rtt_ms` is null where speculation is slower at
    any RTT, and RTT_MS_MAX where it is not slower up to that."""
    baseline = cloud_only(case.costs)
    rows = []
    for rtt_ms in arguments.rtt:
        goodputs = {
            length: _goodput(
                case, scheme, length, dataclasses.replace(link, rtt_ms=rtt_ms), arguments
            )
            for length in range(1, arguments.draft_length_max + 1)
        }
        best = max(goodputs, key=lambda length: goodputs[length])
        rows.append(
            {
                "rtt_ms": rtt_ms,
                "tokens_per_s": goodputs,
                "best_draft_length": best,
                "best_tokens_per_s": goodputs[best],
                "speedup": goodputs[best] / baseline,
            }
        )
    even_ms = break_even_rtt_ms(case.costs, scheme, case.alpha, link, arguments.draft_length_max)
    return {
        "draft": case.name,
        "draft_ms": case.costs.draft_ms,
        "alpha": case.alpha,
        "cloud_only_tokens_per_s": baseline,
        "break_even_rtt_ms": RTT_MS_MAX if even_ms == math.inf else even_ms,
        "rows": rows,
    }


def text(case: dict[str, Any]) -> str:
    """A case as a table for people."""
    rows = case["rows"]
    lengths = list(rows[0]["tokens_per_s"])
    even_ms = case["break_even_rtt_ms"]
    even = {
        None: "none: slower than cloud-only decoding at any RTT",
        RTT_MS_MAX: f"none below {RTT_MS_MAX:.0f} ms",
    }.get(even_ms, f"{even_ms or 0.0:.0f} ms")
    lines = [
        f"{case['draft']}: {case['draft_ms']:g} ms per draft, acceptance {case['alpha']}; "
        f"cloud-only decoding {case['cloud_only_tokens_per_s']:.1f} tokens/s",
        "tokens/s" + "".join(f"{f'n={length}':>8}" for length in lengths) + "    best  speed-up",
    ]
    for row in rows:
        goodputs = "".join(f"{goodput:8.1f}" for goodput in row["tokens_per_s"].values())
        best = f"n={row['best_draft_length']}"
        lines.append(f"{row['rtt_ms']:5g} ms{goodputs}{best:>8}{row['speedup']:9.2f}x")
    lines.append(f"break-even RTT with the best n: {even}")
    return "\n".join(lines)


def _goodput(
    case: Case, scheme: Scheme, length: int, link: Network, arguments: argparse.Namespace
) -> float:
    scheme = dataclasses.replace(scheme, draft_length=length)
    if arguments.simulate is None:
        return predicted_goodput(case.costs, scheme, link, case.alpha)
    num_tokens = max(1, arguments.simulate)
    return simulate(case.costs, scheme, link, case.alpha, num_tokens, SEED).tokens_per_s


def _link(arguments: argparse.Namespace) -> Network:
    bandwidth = arguments.bandwidth_mbps
    link = Network(bandwidth_bps=None if bandwidth is None else bandwidth * 1e6)
    if arguments.dense_width is None:
        return link
    return dataclasses.replace(link, rejection_bytes=dense_rejection_bytes(arguments.dense_width))


def _document(arguments: argparse.Namespace) -> dict[str, Any]:
    """The costs file, or the defaults, with what the command line says instead."""
    loaded: Any = DEFAULT_COSTS
    if arguments.costs is not None:
        try:
            loaded = json.loads(arguments.costs.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{arguments.costs} is not JSON: {error}") from None
    if not isinstance(loaded, dict):
        raise ConfigError("costs must be a JSON object")
    document: dict[str, Any] = dict(loaded)
    if arguments.draft_ms is not None:
        document |= {"draft_ms": arguments.draft_ms}
        document |= {"drafts": {"draft": {"alpha": document.get("alpha")}}}
    if arguments.alpha is not None:
        document["alphas"] = arguments.alpha
    return document
