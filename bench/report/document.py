"""The report of a suite's run, in Markdown.

Every figure comes from the result; the paper's are data in paper.py and are marked as its own.
"""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path

from bench.report import paper, plots, tables
from bench.report.prediction import predictors
from bench.report.tables import Cell, Column, Predictors, Setting
from bench.results import Result, model_costs
from bench.scenarios import ABLATION_TEMPERATURE, SWEEP_RTT_MS, Condition

LINE_LENGTH = 120


def write(result: Result, folder: Path) -> Path:
    """The report's file; its plots and the costs lie beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = plots.draw(result, folder)
    path = folder / f"{result.suite}.md"
    predict = None
    if result.costs.verify_ms:
        predict = predictors(result)
        costs = json.dumps(model_costs(result), indent=1)
        (folder / f"{result.suite}-costs.json").write_text(f"{costs}\n")
    path.write_text(render(result, pictures, predict))
    return path


def render(result: Result, pictures: dict[str, str], predict: Predictors | None = None) -> str:
    """Markdown. `pictures` gives a plot's file by its name (plots.py)."""
    parts = [f"# The WAN benchmark, suite `{result.suite}`", _preamble(result), *_lossless(result)]
    for title, text, picture, body in _sections(result, predict):
        if body:
            shown = f"![{title}]({pictures[picture]})" if picture in pictures else ""
            parts += [f"## {title}", text, shown, body]
    if result.not_run:
        parts += ["## Not run", "\n".join(f"- {each}" for each in result.not_run)]
    lines = "\n\n".join(part for part in parts if part).splitlines()
    return "\n".join(map(_wrapped, lines)) + "\n"


def _wrapped(line: str) -> str:
    """Prose at the repository's width; a table's row is one line."""
    if line.startswith(("|", "#", "<", "!")):
        return line
    return textwrap.fill(
        line, LINE_LENGTH, subsequent_indent="  " if line.startswith("- ") else "",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _sections(result: Result, predict: Predictors | None) -> Iterator[tuple[str, str, str, str]]:
    """Title, text, plot, table."""
    cell = (
        "A cell: **speed-up** over stock vLLM on the same prompt and link (median, quartiles), "
        "then tokens/s."
    )
    yield (
        "Speed-up over the cloud alone, by round trip",
        f"Greedy, bandwidth unlimited, settings as they come. {cell}",
        "speedup",
        tables.by_rtt(result),
    )
    yield "Time to the first token", "The prompt is in no cache.", "", tables.first_tokens(result)
    yield (
        "Adaptive draft length beside fixed ones",
        "Greedy. A fixed n is the most drafts of one forward; the window is the default.",
        "",
        tables.control(result),
    )
    yield (
        "Adaptive draft length as a share of the best fixed one",
        "Medians over the prompts. The fixed length that was fastest in hindsight owes something "
        "to luck; the one that was fastest on the other prompts does not.",
        "",
        tables.control_shares(result),
    )
    yield (
        "Draft length",
        f"Beside the paper's sweep (Qwen, GSM8K; {paper.SOURCE}).",
        "lengths",
        tables.draft_lengths(result),
    )
    ablation = tables.ablation(result)
    yield (
        "What each part is worth",
        'Temperature 0.7 unless the group says otherwise. "Of full" is the speed relative to the '
        "whole system with the same draft; restart is what passes at the edge from a rejection's "
        "arrival to the recovered token's departure; the last columns are the paper's same ratios.",
        "ablation",
        ablation,
    )
    yield "The paper's ablation", paper.SOURCE, "", tables.paper_ablation() if ablation else ""
    yield (
        "Bytes",
        "At RTT 20 ms. A round is n drafts (4); payload is gRPC messages, the wire has HTTP/2 "
        "framing as well and the prompt, all divided by output tokens.",
        "",
        tables.traffic(result),
    )
    warm: set[Setting] = {
        (SWEEP_RTT_MS, kbit_s, ABLATION_TEMPERATURE) for kbit_s in (None, 1000.0, 50.0)
    }
    yield "Bandwidth", cell, "", _if_several(result, _bandwidth, warm)
    heats: set[Setting] = {(SWEEP_RTT_MS, None, heat) for heat in (0.0, ABLATION_TEMPERATURE, 1.0)}
    yield (
        "Temperature",
        f"{cell} α: accepted drafts among those looked at.",
        "",
        _if_several(result, _temperature, heats, tables.acceptance_cell),
    )
    yield (
        "Costs of the parts",
        f"Stock vLLM: {result.costs.baseline_ms:.1f} ms per token. Drafts, ms per token: "
        + ", ".join(f"{draft} {ms:.1f}" for draft, ms in result.costs.draft_ms.items())
        + ".",
        "",
        "\n\n".join(filter(None, (tables.costs(result), tables.slowness(result)))),
    )
    if predict is not None:
        yield (
            "Predicted and measured",
            "The event simulation (`picospec/performance/simulation/`). *Replay*: fed by each "
            "generation's own times of drafting, verifying and prefilling, and the outcome of its "
            "drafts, one by one. *Costs before*: the same, but verification as it was measured "
            "when the group began. *Rate*: as that, but chance decides, at the generation's rate "
            "of acceptance. Nothing is fitted to the speed.",
            "",
            tables.predictions(result, predict),
        )


def _if_several(
    result: Result, column: Column, links: set[Setting], cell: Cell = tables.speedup_cell
) -> str:
    """One column compares nothing."""
    measured = {group.conditions[0].condition.link for group in result.groups} & links
    return tables.links(result, column, links, cell) if len(measured) > 1 else ""


def _bandwidth(condition: Condition) -> str:
    return "unlimited" if condition.kbit_s is None else f"{condition.kbit_s:g} kbit/s"


def _temperature(condition: Condition) -> str:
    return f"T = {condition.temperature:g}"


def _preamble(result: Result) -> str:
    machine, both = result.machine, result.settings.get("both", {})
    generations = sum(len(each.records) for group in result.groups for each in group.conditions)
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    load, cores = machine["load_average"], machine["cores"]
    lines = [
        f"Measured {result.date} at commit `{result.commit}`: {generations} generations in "
        f"{result.wall_s / 60:.0f} min.",
        f"{machine['processor']} ({', '.join(machine['vector_extensions']) or 'no AVX2'}), "
        f"{machine['cores']} cores, {machine['memory_gib']} GiB; the "
        "cloud computes on one core, the edge (drafter, pipeline, link) on another. "
        f"Load average at the start: {load:.1f}."
        + (" **Other work shared the machine: take no figure from here.**" if load > cores else ""),
        f"Python {machine['python']}, kernel {machine['kernel']}, {versions}.",
        "Both engines: " + ", ".join(f"{key} = {value}" for key, value in both.items()) + ". "
        "Stock vLLM's own: "
        + ", ".join(f"{key} = {value}" for key, value in result.settings.get("stock", {}).items())
        + ".",
        "Tokens per second count from the first commit on. Each prompt goes through all conditions "
        "of a group, in alternating order, the baseline first and last.",
    ]
    return "\n".join(lines)


def _lossless(result: Result) -> Iterator[str]:
    texts = result.compared
    if not texts:
        return
    equal = sum(record.first_difference is None for _, record in texts)
    yield (f"**Greedy texts equal to stock vLLM's, token for token: {equal} of {len(texts)}.**")
    differing = [
        f"- {tables.label(each.condition)}, RTT {each.condition.rtt_ms:g} ms, prompt "
        f"{record.prompt_id}: from token {record.first_difference} on"
        for each, record in texts
        if record.first_difference is not None
    ]
    if differing:
        yield "\n".join(differing)
