"""How fast speculation is, before it is run: the paper's model and ours.

- `performance_costs`: what the models are fed, in milliseconds and bytes;
- `performance_prediction`: closed forms, fast enough for the edge's draft-length control;
- `performance_simulation`: an event simulation of the same system, with counts and bytes.
"""

from __future__ import annotations

from picospec.performance_costs import (
    Acceptance,
    Costs,
    Link,
    Scheme,
    Text,
    VerifyCost,
    costs_from_json,
    dense_rejection_bytes,
)
from picospec.performance_prediction import (
    PaperPrediction,
    best_draft_length,
    break_even_rtt_ms,
    cloud_only,
    paper_model,
    predicted_goodput,
)

__all__ = [
    "Acceptance",
    "Costs",
    "Link",
    "PaperPrediction",
    "Scheme",
    "Text",
    "VerifyCost",
    "best_draft_length",
    "break_even_rtt_ms",
    "cloud_only",
    "costs_from_json",
    "dense_rejection_bytes",
    "paper_model",
    "predicted_goodput",
]
