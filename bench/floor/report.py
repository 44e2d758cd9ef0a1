"""The floor's files: every trial as JSON, the medians as tables."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.floor import plots
from bench.floor.grid import FLOOR_MIN, Kind
from bench.floor.results import Cell, best_fixed
from picospec_cli.pairs import DEFAULT, Pair

TITLES = {
    Kind.SINGLE: "One chat: tokens/s after the first",
    Kind.CHATS: "Many chats on one edge: tokens/s of all",
    Kind.FLEET: "Many edges of one chat each: tokens/s of all",
    Kind.TURNS: "Turns of a chat, with a prefix cache on both sides",
    Kind.CHANGE: "Tokens/s from 5 s after a change",
}


@dataclass(frozen=True, slots=True)
class About:
    """Where and how it was measured."""

    date: str
    commit: str
    machine: dict[str, Any]
    read_bandwidth_gb_s: float  # of one core
    settings: dict[str, Any]
    wall_s: float


def write(cells: Sequence[Cell], about: About, folder: Path, pair: Pair = DEFAULT) -> Path:
    """floor.json and floor.md, or a pair's, and the plot of all; returns the second."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"name": cell.name, "ratio": cell.ratio, "wanted": cell.wanted, **asdict(cell)}
        for cell in cells
    ]
    data = {"about": asdict(about), "cells": rows}
    path = plots.results_of(pair, folder)
    path.write_text(json.dumps(data, indent=1, default=_plain) + "\n")
    path = path.with_name(f"{path.stem}.md")
    path.write_text(document(cells, about, pair))
    plots.draw(folder)
    return path


def document(cells: Sequence[Cell], about: About, pair: Pair = DEFAULT) -> str:
    machine = about.machine
    lines = [
        "# The floor: the default settings beside stock vLLM",
        "",
        f"{pair.title}.",
        f"{about.date}, commit {about.commit}, {about.wall_s / 60:.0f} minutes.",
        f"Machine: {machine['processor']}, {machine['cores']} cores; one core reads",
        f"{about.read_bandwidth_gb_s:.1f} GB/s from memory.",
        "",
        "A ratio is tokens per second over those of stock vLLM, in the same repetition, on the",
        "same core, through the same relay; figures are medians. An edge has one chat that nobody",
        "counts to get to know a new link by; what it has learnt stays with it for the whole run.",
        f"Bold: below what is wanted. The run fails below {FLOOR_MIN:g}, and where a greedy text",
        "leaves that of stock vLLM. Contenders with no settings beside them have the default ones.",
        "",
        "Costs are per committed token. Engine ms are what verdicts tell of steps: a step that",
        "serves several chats counts for each. CPU ms are the processes' own, at the edge the",
        "drafter's and the pipeline's.",
    ]
    for kind in Kind:
        of_kind = [cell for cell in cells if cell.load.kind is kind]
        if of_kind:
            lines += ["", f"## {TITLES[kind]}", "", *table(kind, of_kind)]
    rounded = sorted(
        {
            str(each)
            for cell in cells
            for trial in cell.trials
            for each in trial.differences
            if each.is_rounding
        }
    )
    if rounded:
        lines += ["", "## Greedy texts that leave stock vLLM's within bf16's rounding", ""]
        lines += [f"- {each}" for each in rounded]
    problems = [problem for cell in cells for problem in cell.problems]
    lines += ["", "## What fails", "", *([f"- {each}" for each in problems] or ["Nothing."])]
    return "\n".join(lines) + "\n"


HEAD = ("load", "contender", "n", "stock tokens/s", "tokens/s", "ratio", "of best fixed")
LATENCIES = ("TTFT ms", "stock", "2nd token ms", "stock", "longest gap ms", "stock")
EVENNESS = ("slowest/mean", "stock")
COSTS = (
    *("accepted", "forwards", "engine ms", "cloud CPU ms", "stock's CPU ms"),
    *("drafted", "edge CPU ms"),
)


def table(kind: Kind, cells: Sequence[Cell]) -> list[str]:
    special: tuple[str, ...] = LATENCIES if kind is Kind.TURNS else ()
    if kind in (Kind.CHATS, Kind.FLEET):
        special = EVENNESS
    head = (*HEAD, *special, *COSTS)
    rows = [head, ("---", "---", *["--:"] * (len(head) - 2))]
    rows += [(*_speed(cell, cells), *_special(cell), *_costs(cell)) for cell in cells]
    return ["| " + " | ".join(row) + " |" for row in rows]


def _speed(cell: Cell, cells: Sequence[Cell]) -> tuple[str, ...]:
    short = cell.contender.is_default and cell.ratio < cell.wanted
    fixed = best_fixed(cell, cells) if cell.contender.is_default else 0.0
    return (
        f"{cell.load.name} {cell.part}".strip(),
        cell.contender.name,
        f"{len(cell.trials)}",
        f"{cell.stock(lambda sample: sample.tokens_per_s):.1f}",
        f"{cell.ours(lambda sample: sample.tokens_per_s):.1f}",
        f"**{cell.ratio:.2f}**" if short else f"{cell.ratio:.2f}",
        f"{cell.ratio / fixed:.2f}" if fixed else "",
    )


def _special(cell: Cell) -> tuple[str, ...]:
    if cell.load.kind is Kind.TURNS:
        return tuple(
            f"{1e3 * seconds:.0f}"
            for seconds in (
                cell.ours(lambda sample: sample.ttft_s),
                cell.stock(lambda sample: sample.ttft_s),
                cell.ours(lambda sample: sample.second_s),
                cell.stock(lambda sample: sample.second_s),
                cell.ours(lambda sample: sample.longest_s),
                cell.stock(lambda sample: sample.longest_s),
            )
        )
    if cell.load.kind in (Kind.CHATS, Kind.FLEET):
        return (
            f"{cell.ours(lambda sample: sample.evenness):.2f}",
            f"{cell.stock(lambda sample: sample.evenness):.2f}",
        )
    return ()


def _costs(cell: Cell) -> tuple[str, ...]:
    stock_ms = sum(trial.stock_cpu_ms for trial in cell.trials) / len(cell.trials)
    judged = cell.per_token(lambda spent: spent.judged)
    accepted = cell.per_token(lambda spent: spent.accepted)
    return (
        f"{accepted / judged:.2f}" if judged else "",
        f"{cell.per_token(lambda spent: spent.forwards):.2f}",
        f"{cell.per_token(lambda spent: 1e3 * spent.engine_s):.1f}",
        f"{cell.per_token(lambda spent: 1e3 * spent.cloud_cpu_s):.1f}",
        f"{stock_ms:.1f}",
        f"{cell.per_token(lambda spent: spent.drafted):.2f}",
        f"{cell.per_token(lambda spent: 1e3 * spent.edge_cpu_s):.1f}",
    )


def _plain(value: Any) -> Any:
    return value.value  # of an enum
