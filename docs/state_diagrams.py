"""Writes the state diagrams of docs/protocol.md from the transition tables: make diagrams.

With --check nothing is written, and the exit status says whether the page is up to date.
"""

from __future__ import annotations

import enum
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from picospec.protocol import cloud_session, edge_machine

PAGE = Path(__file__).with_name("protocol.md")
State = TypeVar("State", bound=enum.Enum)
Event = TypeVar("Event", bound=enum.Enum)


def diagram(transitions: Mapping[tuple[State, Event], State], final: State) -> str:
    """A Mermaid diagram; events between the same two states share an arrow.

    What every state does alike is left out: nothing moves `final`, and CANCEL leads there.
    """
    arrows: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (state, event), target in transitions.items():
        if state is not final and event.name != "CANCEL":
            arrows[state.name, target.name].append(event.value)
    first = next(iter(type(final)))
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {first.name}"]
    for (source, target), events in arrows.items():
        lines.append(f"    {source} --> {target}: {wrapped(events)}")
    return "\n".join([*lines, f"    {final.name} --> [*]", "```"])


def wrapped(events: list[str]) -> str:
    """At most two events per line of a label.

    >>> wrapped(["a", "b", "c"])
    'a, b<br/>c'
    """
    pairs = [", ".join(events[index : index + 2]) for index in range(0, len(events), 2)]
    return "<br/>".join(pairs)


DIAGRAMS = {
    "edge": diagram(edge_machine.TRANSITIONS, edge_machine.EdgeState.FINISHED),
    "cloud": diagram(cloud_session.TRANSITIONS, cloud_session.CloudState.FINISHED),
}


def with_diagrams(page: str) -> str:
    """`page` with the diagrams between their markers. Raises ValueError if a marker is missing."""
    for name, text in DIAGRAMS.items():
        begin, end = f"<!-- begin: {name} states -->", f"<!-- end: {name} states -->"
        before, rest = page.split(begin, 1)
        _, after = rest.split(end, 1)
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    fresh = with_diagrams(page)
    if "--check" in sys.argv:
        return int(page != fresh)
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
