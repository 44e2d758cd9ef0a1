"""The report's plots, each as PNG and SVG. Needs matplotlib; without it there are none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report import paper, tables
from bench.results import Result
from bench.scenarios import DRAFTS, System

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = (System.PICOSPEC, System.NEVER_WAITING, System.VANILLA)
COLOURS = {"int4": "#1f6f8b", "int8": "#c8553d"}
PAPER_COLOUR = "#8a8a8a"
STYLES = {System.PICOSPEC: "-", System.NEVER_WAITING: "--", System.VANILLA: ":"}
DPI = 150


def draw(result: Result, folder: Path) -> dict[str, str]:
    """The plots that the result has data for: name to file, relative to `folder`."""
    pictures = {}
    for name, plot in (("speedup", _speedup), ("lengths", _lengths), ("ablation", _ablation)):
        stem = f"{result.suite}-{name}"
        if save(partial(plot, result=result), folder / stem, salt=result.suite):
            pictures[name] = f"{stem}.png"
    return pictures


def save(plot: Callable[[Axes], bool], path: Path, *, salt: str) -> bool:
    """Write what `plot` draws to `path`, as .png and .svg; whether it had anything to draw.

    Without matplotlib it has not. The same figure and `salt` give the same SVG.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = salt
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    has_drawn = plot(axes)
    if has_drawn:
        for kind, metadata in (("png", None), ("svg", {"Date": None})):
            figure.savefig(path.with_name(f"{path.name}.{kind}"), dpi=DPI, metadata=metadata)
    plt.close(figure)
    return has_drawn


def _speedup(axes: Axes, result: Result) -> bool:
    """Speed-up over RTT, and where speculation no longer pays."""
    drawn = False
    for draft in DRAFTS:
        for system in SHOWN:
            points = sorted(
                (each.condition.rtt_ms, group.speedup(each))
                for group, each in result.find(
                    lambda each, draft=draft, system=system: (  # type: ignore[misc]
                        (each.draft, each.system) == (draft, system)
                        and not each.overrides
                        and each.temperature == 0.0
                        and each.kbit_s is None
                    )
                )
            )
            if not points:
                continue
            drawn = True
            medians = [ratio.median for _, ratio in points]
            reach = [
                [ratio.median - ratio.low for _, ratio in points],
                [ratio.high - ratio.median for _, ratio in points],
            ]
            axes.errorbar(
                [rtt_ms for rtt_ms, _ in points], medians, yerr=reach, color=COLOURS[draft],
                linestyle=STYLES[system], marker="o", capsize=3,
                label=f"{tables.NAMES[system]}, {draft}",
            )  # fmt: skip
    axes.axhline(1.0, color="black", linewidth=1)
    axes.annotate("the cloud alone", (0.99, 1.0), xycoords=("axes fraction", "data"),
                  ha="right", va="bottom", fontsize="small")  # fmt: skip
    axes.set(xlabel="round trip, ms", ylabel="speed-up over stock vLLM", ylim=(0, None))
    axes.grid(alpha=0.3)
    if drawn:
        axes.legend(fontsize="small")
    return drawn


def _lengths(axes: Axes, result: Result) -> bool:
    """Speed by draft length, each curve relative to its own at n = 4, as the paper's is."""
    found = tables.sweep(result)
    curves: dict[str, dict[int, float]] = {}
    for _, each in found:
        length = int(dict(each.condition.overrides)["draft_length"])
        rate = each.spread(lambda record: record.tokens_per_s).median
        curves.setdefault(str(each.condition.draft), {})[length] = rate
    if not curves:
        return False
    lines: list[tuple[str, dict[int, float], dict[str, Any]]] = [
        (draft, rates, {"color": COLOURS.get(draft)}) for draft, rates in curves.items()
    ]
    lines.append(("the paper's", paper.DRAFT_LENGTH, {"color": PAPER_COLOUR, "linestyle": "--"}))
    for name, rates, style in lines:
        if 4 not in rates:
            continue
        lengths = sorted(rates)
        relative = [rates[length] / rates[4] for length in lengths]
        axes.plot(lengths, relative, marker="o", label=name, **style)
    rtt_ms = found[0][1].condition.rtt_ms
    axes.set(xlabel="draft length n", ylabel="tokens/s, relative to n = 4", ylim=(0, None))
    axes.set_title(f"RTT {rtt_ms:g} ms, greedy", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return True


def _ablation(axes: Axes, result: Result) -> bool:
    """Speed without each part, relative to the whole."""
    ours: dict[str, dict[str, float]] = {}
    for _, each, relative in tables.ablated(result):
        ours.setdefault(str(each.condition.draft), {})[each.condition.system.value] = relative
    measured_names = {name for rates in ours.values() for name in rates}
    switches = [name for name in paper.ABLATION["Qwen, GSM8K"] if name != "picospec"]
    systems = [name for name in switches if name in measured_names]
    if not systems:
        return False
    bars = {
        **{draft: (rates, COLOURS.get(draft, "")) for draft, rates in ours.items()},
        **{
            f"the paper's, {load}": (
                {name: row.tokens_per_s / whole.tokens_per_s for name, row in rows.items()},
                PAPER_COLOUR,
            )
            for load, rows in paper.ABLATION.items()
            for whole in (rows["picospec"],)
        },
    }  # fmt: skip
    width = 0.8 / len(bars)
    for index, (name, (rates, colour)) in enumerate(bars.items()):
        measured = [(place, rates[each]) for place, each in enumerate(systems) if each in rates]
        axes.bar(
            [place - 0.4 + (index + 0.5) * width for place, _ in measured],
            [share for _, share in measured],
            width, label=name, color=colour, edgecolor="white",
            alpha=1.0 if name in DRAFTS else 0.45 + 0.15 * (index % 4),
        )  # fmt: skip
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_xticks(range(len(systems)), [tables.NAMES[System(name)] for name in systems])
    axes.set(ylabel="tokens/s, relative to everything on", ylim=(0, 1.5))
    axes.legend(fontsize="x-small", ncols=3, loc="upper center")
    return True
