"""The report's tables, each a function of a Result. A cell that was not measured stays empty."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from statistics import geometric_mean

from bench.report import paper
from bench.results import ConditionResult, GroupResult, Record, Result
from bench.scenarios import (
    ADAPTIVE,
    DRAFTS,
    TOP_10,
    TRUNCATED_10,
    Condition,
    Overrides,
    System,
    fixed,
)
from bench.spreads import mean_absolute_error, spread

Predict = Callable[[ConditionResult], float | None]  # tokens per second; None: not modelled
Predictors = Mapping[str, Predict]  # by what they start from
Column = Callable[[Condition], str]  # what a column is called
Cell = Callable[[GroupResult, ConditionResult], str]
Setting = tuple[float, float | None, float]  # Condition.link
Row = Sequence[str]

ROUND = 4  # drafts: the default draft length, which the ablation keeps
LENGTHS = tuple(map(fixed, range(1, 9)))  # the fixed ones that may have been measured

NAMES = {
    System.CLOUD_ONLY: "stock vLLM",
    System.ENGINE_PLAIN: "our cloud, no drafts",
    System.EDGE_ONLY: "the drafter alone",
    System.VANILLA: "vanilla speculation",
    System.PICOSPEC: "PicoSpec",
    System.NO_PARALLEL_DRAFTING: "without parallel drafting",
    System.NO_FAST_VERIFICATION: "without fast verification",
    System.NO_SPLIT_REJECTION: "without split rejection",
    System.NEVER_WAITING: "never waiting (coupled)",
}


def table(head: Row, rows: Iterable[Row]) -> str:
    """Markdown; "" without rows."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    if not lines:
        return ""
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines])


def label(condition: Condition) -> str:
    """
    >>> label(Condition(System.PICOSPEC, "int4", 0.0, overrides=fixed(2)))
    'PicoSpec, int4, n = 2'
    """
    words = [NAMES[condition.system], *([condition.draft] if condition.draft else [])]
    if condition.overrides == ADAPTIVE:
        words.append("adaptive")
    elif "draft_length" in dict(condition.overrides):
        words.append(f"n = {dict(condition.overrides)['draft_length']}")
    elif "sparse_k" in dict(condition.overrides):
        words.append(f"K = {dict(condition.overrides)['sparse_k']}")
        words += ["truncated"] if condition.overrides == TRUNCATED_10 else []
    return ", ".join(words)


def speedup_cell(group: GroupResult, result: ConditionResult) -> str:
    """Median and quartiles of the ratios to stock vLLM, then the median of tokens per second."""
    ratio = group.speedup(result)
    rate = result.spread(lambda record: record.tokens_per_s).median
    return f"**{ratio.median:.2f}** ({ratio.low:.2f}–{ratio.high:.2f}), {rate:.1f}"


def acceptance_cell(group: GroupResult, result: ConditionResult) -> str:
    """The same, and the share of drafts that were right among those that were looked at."""
    cell = speedup_cell(group, result)
    if result.condition.draft is None:
        return cell
    return f"{cell}, α {_median(result, lambda record: record.acceptance):.2f}"


def grid(corner: str, cells: Iterable[tuple[str, str, str]]) -> str:
    """From (row, column, cell): rows and columns in the order in which they first come."""
    rows: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for row, column, cell in cells:
        rows[row][column] = cell
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    return table(
        [corner, *columns],
        ([name, *(row.get(column, "") for column in columns)] for name, row in rows.items()),
    )


def rtt(condition: Condition) -> str:
    return f"RTT {condition.rtt_ms:g} ms"


def by_rtt(result: Result) -> str:
    """Greedy, unlimited bandwidth, settings as they come: a row per system, a column per RTT."""
    return _speedups_by_rtt(result, {()})


def control(result: Result) -> str:
    """Adaptive draft length beside fixed ones, at every RTT."""
    return _speedups_by_rtt(result, {ADAPTIVE, *LENGTHS})


def _speedups_by_rtt(result: Result, overrides: Collection[Overrides]) -> str:
    return grid(
        "",
        (
            (label(each.condition), rtt(each.condition), speedup_cell(group, each))
            for group, each in _greedy_unlimited(result)
            if each.condition.overrides in overrides
        ),
    )


def _greedy_unlimited(result: Result) -> Iterable[tuple[GroupResult, ConditionResult]]:
    return result.find(lambda each: each.temperature == 0.0 and each.kbit_s is None)


def first_tokens(result: Result) -> str:
    """Time to first token, ms, by RTT."""
    return grid(
        "TTFT, ms",
        (
            (
                label(each.condition),
                rtt(each.condition),
                f"{_median(each, lambda record: record.ttft_s * 1e3):.0f}",
            )
            for _, each in _greedy_unlimited(result)
            if not each.condition.overrides
        ),
    )


def control_shares(result: Result) -> str:
    """The adaptive length's speed as a share of the best fixed one's, on the same prompts."""
    return grid("", _control_shares(result))


def _control_shares(result: Result) -> Iterator[tuple[str, str, str]]:
    for group in result.groups:
        column = rtt(group.baseline.condition)
        for draft in DRAFTS:
            speeds = {
                each.condition.overrides: each.speeds()
                for each in group.conditions
                if each.condition.draft == draft and each.complete
            }
            adaptive = speeds.get(ADAPTIVE, {})
            lengths = {length: speeds[length] for length in LENGTHS if length in speeds}
            prompts = set(adaptive).intersection(*lengths.values())
            if len(prompts) < 2 or not lengths:
                continue
            best = best_length(lengths, prompts)
            share = spread([adaptive[key] / lengths[best][key] for key in prompts]).median
            in_hindsight = f"{share:.0%} of n = {dict(best)['draft_length']}"
            yield f"{draft}, best in hindsight", column, in_hindsight
            shares = [
                adaptive[key] / lengths[best_length(lengths, prompts - {key})][key]
                for key in prompts
            ]
            yield f"{draft}, best on the other prompts", column, f"{spread(shares).median:.0%}"


def best_length(speeds: Mapping[Overrides, Mapping[str, float]], prompts: set[str]) -> Overrides:
    """The fixed length that is fastest on `prompts`: by the geometric mean, so that no prompt
    counts for more than another.

    >>> best_length({fixed(1): {"a": 10, "b": 40}, fixed(2): {"a": 20, "b": 25}}, {"a", "b"})
    (('draft_length', 2),)
    """
    return max(speeds, key=lambda length: geometric_mean(speeds[length][key] for key in prompts))


def draft_lengths(result: Result) -> str:
    """The sweep of n beside the paper's."""
    rows = []
    for length in range(1, 9):
        found = {
            each.condition.draft: (speedup_cell(group, each), f"{_accepted(each):.2f}")
            for group, each in sweep(result)
            if each.condition.overrides == fixed(length)
        }
        if found:
            ours = [cell for draft in DRAFTS for cell in found.get(draft, ("", ""))]
            theirs = [
                f"{values[length]:.2f}" if length in values else ""
                for values in (paper.DRAFT_LENGTH, paper.DRAFT_LENGTH_ACCEPTED)
            ]
            rows.append([str(length), *ours, *theirs])
    head = ["n", *(f"{draft}{what}" for draft in DRAFTS for what in ("", ", accepted per verdict"))]
    return table([*head, "paper, tokens/s", "paper, accepted per round"], rows)


def sweep(result: Result) -> list[tuple[GroupResult, ConditionResult]]:
    """Fixed draft lengths at the RTT where most of them were measured."""
    found = [
        (group, each)
        for group, each in _greedy_unlimited(result)
        if each.condition.overrides in LENGTHS
    ]
    rtts_ms = [each.condition.rtt_ms for _, each in found]
    return [pair for pair in found if pair[1].condition.rtt_ms == max(rtts_ms, key=rtts_ms.count)]


def _accepted(result: ConditionResult) -> float:
    return result.spread(lambda record: record.accepted / max(1, record.verdicts)).median


def ablation(result: Result) -> str:
    """Each switch off, beside what the same switch cost in the paper."""
    rows = []
    for group, each, relative in ablated(result):
        system = each.condition.system.value
        rows.append(
            [
                label(each.condition),
                speedup_cell(group, each),
                f"{relative:.2f}",
                f"{_median(each, lambda record: record.acceptance):.2f}",
                f"{_median(each, lambda record: 1e3 * record.seconds / record.verdicts):.1f}",
                f"{_median(each, lambda record: record.compute_us / 1e3):.1f}",
                f"{_median(each, lambda record: ROUND * record.draft_ms):.1f}",
                f"{_median(each, lambda record: record.queue_us / 1e3):.1f}",
                f"{_restart_ms(each):.1f}",
                *(
                    f"{theirs[system].tokens_per_s / theirs['picospec'].tokens_per_s:.2f}"
                    if system in theirs
                    else ""
                    for theirs in paper.ABLATION.values()
                ),
            ]
        )
    head = ["", "speed-up, tokens/s", "of full", "acceptance"]
    head += ["ms per round", "T_verify, ms", f"T_draft ({ROUND} drafts), ms", "queue, ms"]
    head += ["restart, ms"]
    return table([*head, *(f"paper, {load}" for load in paper.ABLATION)], rows)


def paper_ablation() -> str:
    """The paper's table."""
    rows = [
        [load, NAMES[System(system)], f"{row.tokens_per_s:.2f}"]
        + [f"{value:.1f}" for value in (row.round_ms, row.verify_ms, row.draft_ms)]
        for load, systems in paper.ABLATION.items()
        for system, row in systems.items()
    ]
    return table(["paper", "", "tokens/s", "ms per round", "T_verify, ms", "T_draft, ms"], rows)


def ablated(result: Result) -> list[tuple[GroupResult, ConditionResult, float]]:
    """The conditions of the group called "ablation", and their speed as a share of the whole
    system's with the same draft: the median of the ratios on the same prompt."""
    found = []
    for group in result.groups:
        if group.name != "ablation":
            continue
        whole = {
            each.condition.draft: each.speeds()
            for each in group.conditions
            if each.condition.system is System.PICOSPEC and not each.condition.overrides
        }
        for each in group.conditions:
            reference, speeds = whole.get(each.condition.draft), each.speeds()
            if not reference or not speeds:
                continue
            ratios = [speeds[key] / reference[key] for key in speeds if reference.get(key)]
            found.append((group, each, spread(ratios).median))
    return found


def traffic(result: Result) -> str:
    """Bytes: a round up, a rejection down, and all that crosses the line."""
    rows = [
        [
            f"{label(each.condition)} ({group.name})",
            f"{ROUND * _share(each, 'draft_bytes', 'drafts_sent'):.0f}",
            f"{_share(each, 'rejection_bytes', 'rejections'):.0f}",
            *(
                f"{_per_token(each, name):.0f}"
                for name in ("payload_up", "payload_down", "wire_up", "wire_down")
            ),
        ]
        for group, each in result.find(lambda each: each.draft is not None and each.rtt_ms == 20.0)
        if each.condition.system is not System.EDGE_ONLY
        and each.condition.overrides in ((), fixed(ROUND), TOP_10)
    ]
    if not rows:
        return ""
    theirs = [f"under {paper.ROUND_UP_BYTES_MAX}", f"under {paper.REJECTION_DOWN_BYTES_MAX}"]
    head = ["", "a round up", "a rejection down", "payload per token up", "down"]
    head += ["on the wire per token up", "down"]
    return table(head, [*rows, ["the paper", *theirs, *[""] * 4]])


def links(result: Result, column: Column, settings: set[Setting], cell: Cell) -> str:
    """A row for each system as it comes; used for bandwidths and for temperatures."""
    return grid(
        "",
        (
            (label(each.condition), column(each.condition), cell(group, each))
            for group, each in result.find(lambda each: not each.overrides)
            if each.condition.link in settings
        ),
    )


def costs(result: Result) -> str:
    """What one verification takes, by mode and number of drafts."""
    costs = result.costs
    named = {f"verification, {mode}": times for mode, times in costs.verify_ms.items()}
    counts = sorted({count for times in named.values() for count in times})
    rows = [
        [name, *(f"{times[n]:.1f}" if n in times else "" for n in counts)]
        for name, times in named.items()
    ]
    return table(["ms, by drafts", *map(str, counts)], rows)


def slowness(result: Result) -> str:
    """How verification's costs changed with time, and beside a drafter that computes."""
    head = ["verification, over its cost", *(group.name for group in result.groups)]
    names = {"alone": "alone", **{draft: f"while {draft} drafts" for draft in DRAFTS}}
    return table(
        head,
        [
            [shown, *(f"{group.slowness[name]:.2f}" for group in result.groups)]
            for name, shown in names.items()
            if all(name in group.slowness for group in result.groups)
        ],
    )


def predictions(result: Result, predictors: Predictors) -> str:
    """Tokens per second as predicted (prediction.py) and as measured, and the mean errors."""
    rows: list[list[str]] = []
    values: list[float] = []
    guesses: dict[str, list[float]] = {name: [] for name in predictors}
    for group, each in result.find(lambda each: each.draft is not None):
        found = {name: predict(each) for name, predict in predictors.items()}
        if None in found.values():
            continue
        value = each.spread(lambda record: record.tokens_per_s).median
        values.append(value)
        row = [group.name, label(each.condition), f"{value:.1f}"]
        for name, guess in found.items():
            assert guess is not None
            guesses[name].append(guess)
            row += [f"{guess:.1f}", f"{guess / value - 1:+.0%}"]
        rows.append(row)
    if not rows:
        return ""
    errors = ", ".join(
        f"{name} **{mean_absolute_error(guesses[name], values):.1%}**" for name in guesses
    )
    head = ["group", "", "measured, tokens/s"]
    head += [cell for name in guesses for cell in (name, "off by")]
    return f"Mean absolute error over {len(rows)} conditions: {errors}.\n\n{table(head, rows)}"


def _restart_ms(result: ConditionResult) -> float:
    """From a rejection to the recovered token, in texts that had one."""
    return spread([each.restart_ms for each in result.complete if each.rejections]).median


def _median(result: ConditionResult, value: Callable[[Record], float]) -> float:
    return result.spread(value).median


def _share(result: ConditionResult, part: str, whole: str) -> float:
    """Over all generations; 0 if there was nothing."""
    total = sum(getattr(record, whole) for record in result.complete)
    return sum(getattr(record, part) for record in result.complete) / total if total else 0.0


def _per_token(result: ConditionResult, name: str) -> float:
    return _median(result, lambda record: getattr(record, name) / max(1, len(record.token_ids)))
