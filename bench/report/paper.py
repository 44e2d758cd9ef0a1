"""The paper's own figures (arXiv 2603.19133), as data: shown beside ours, never mixed with them."""

from dataclasses import dataclass

SOURCE = "PicoSpec, arXiv 2603.19133: Jetson AGX at the edge, one A100 in the cloud"


@dataclass(frozen=True, slots=True)
class AblationRow:
    """Tokens per second; ms per round, of verification and of drafting."""

    tokens_per_s: float
    round_ms: float
    verify_ms: float
    draft_ms: float


# By workload, then by system (the values of scenarios.System).
ABLATION: dict[str, dict[str, AblationRow]] = {
    "Qwen, GSM8K": {
        "picospec": AblationRow(20.19, 148.8, 87.4, 97.5),
        "without_parallel_drafting": AblationRow(11.92, 251.8, 119.8, 123.9),
        "without_fast_verification": AblationRow(17.87, 166.6, 106.6, 97.3),
        "without_split_rejection": AblationRow(12.62, 233.3, 167.0, 101.0),
    },
    "Qwen, HumanEval": {
        "picospec": AblationRow(16.04, 160.9, 78.0, 97.2),
        "without_parallel_drafting": AblationRow(10.25, 252.9, 119.0, 124.1),
        "without_fast_verification": AblationRow(13.86, 187.1, 109.1, 97.2),
        "without_split_rejection": AblationRow(10.23, 251.7, 168.3, 100.0),
    },
    "Llama, GSM8K": {
        "picospec": AblationRow(17.22, 272.9, 166.5, 171.1),
        "without_parallel_drafting": AblationRow(12.51, 390.4, 194.7, 190.6),
        "without_fast_verification": AblationRow(16.64, 287.7, 189.3, 170.9),
        "without_split_rejection": AblationRow(12.12, 389.8, 283.8, 173.7),
    },
    "Llama, HumanEval": {
        "picospec": AblationRow(19.88, 272.9, 183.0, 172.4),
        "without_parallel_drafting": AblationRow(13.60, 380.9, 186.6, 189.7),
        "without_fast_verification": AblationRow(19.67, 263.9, 182.3, 171.6),
        "without_split_rejection": AblationRow(14.29, 366.9, 281.8, 173.6),
    },
}

# Tokens per second of each workload: cloud alone, vanilla edge-cloud speculation.
CLOUD_ONLY = {
    "Qwen, GSM8K": 13.89,
    "Qwen, HumanEval": 14.18,
    "Llama, GSM8K": 6.87,
    "Llama, HumanEval": 6.86,
}
VANILLA = {
    "Qwen, GSM8K": 8.04,
    "Qwen, HumanEval": 6.24,
    "Llama, GSM8K": 9.27,
    "Llama, HumanEval": 9.95,
}

# Qwen, GSM8K: tokens per second by draft length.
DRAFT_LENGTH = {3: 19.06, 4: 20.19, 5: 18.12, 6: 17.12}
DRAFT_LENGTH_ACCEPTED = {3: 2.03, 4: 2.50, 5: 2.84, 6: 3.10}

# "Under": what a round's drafts and a rejection take, in bytes.
ROUND_UP_BYTES_MAX = 50
REJECTION_DOWN_BYTES_MAX = 100
