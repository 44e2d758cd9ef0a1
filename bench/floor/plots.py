"""README's plot: the speed-up of the default settings by round trip, of every pair measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.floor.grid import Kind
from bench.report.plots import save
from picospec_cli.pairs import DEFAULT, PAIRS, Pair

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "floor-speedup"


def results_of(pair: Pair, folder: Path) -> Path:
    """The pair's JSON file in `folder`."""
    return folder / f"{'floor' if pair is DEFAULT else pair.name}.json"


def draw(folder: Path) -> None:
    """From the JSON files in `folder`. Without matplotlib there is no plot."""
    save(lambda axes: _speedup(axes, folder), folder / NAME, salt=NAME)


def _speedup(axes: Axes, folder: Path) -> bool:
    for pair in PAIRS.values():
        path = results_of(pair, folder)
        if not path.exists():
            continue
        cells = json.loads(path.read_text())["cells"]
        for draft in dict.fromkeys(cell["contender"]["drafter"] for cell in cells):
            points = sorted(_points(cells, draft))
            if points and draft in pair.precisions:
                axes.plot(
                    [rtt_ms for rtt_ms, _ in points],
                    [ratio for _, ratio in points],
                    marker="o",
                    label=f"{pair.name}, {draft} draft",
                )
    axes.axhline(1.0, color="#8a8a8a", linestyle="--", label="the cloud alone (stock vLLM)")
    axes.set_xscale("symlog", linthresh=20)
    ticks = [0, 20, 50, 100, 200, 500]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("round trip, ms")
    axes.set_ylabel("speed-up over stock vLLM, greedy")
    axes.set_ylim(bottom=0.0)
    axes.grid(alpha=0.3)
    axes.legend()
    return True


def _points(cells: list[dict[str, Any]], draft: str) -> list[tuple[float, float]]:
    """Round trip and ratio of one chat with the default settings, greedy."""
    return [
        (cell["load"]["rtt_ms"], cell["ratio"])
        for cell in cells
        if cell["load"]["kind"] == Kind.SINGLE.value
        and cell["load"]["temperature"] == 0.0
        and cell["contender"]["drafter"] == draft
        and not cell["contender"]["settings"]
    ]
