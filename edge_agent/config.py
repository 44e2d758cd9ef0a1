"""Every setting of the edge agent, with its default, its unit and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from picospec.config import read_arguments, setting
from picospec.errors import ConfigError
from picospec.protocol.messages import AssistPolicy, VerificationMode

ENV_PREFIX = "PICOSPEC_EDGE_"
PROGRAM = "picospec-edge"

_ADDRESS = re.compile(r"[^\s/]+:\d{1,5}")


def _seconds(value: float) -> bool:
    return 0 < value <= 86_400


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The OpenAI API."""

    host: str = setting("127.0.0.1", "interface the HTTP server listens on", check=bool)
    port: int = setting(
        8080, "TCP port; 0 takes a free one", check=lambda v: 0 <= v <= 65535, allowed="0..65535"
    )
    max_concurrent_requests: int = setting(
        64,
        "requests answered at once; further ones get 503",
        check=lambda v: 1 <= v <= 4096,
        allowed="1..4096",
    )
    max_body_bytes: int = setting(
        4 << 20,
        "largest request body",
        check=lambda v: 1024 <= v <= 1 << 28,
        allowed="1024..268435456",
    )
    request_timeout_s: float = setting(
        600.0, "longest a request may take, streaming included", check=_seconds, allowed="0..86400"
    )
    shutdown_grace_s: float = setting(
        20.0,
        "how long running answers may go on after SIGTERM",
        check=lambda v: 0 <= v <= 3600,
        allowed="0..3600",
    )
    api_key: str = setting("", "bearer token that /v1 asks for; empty asks for none", secret=True)


@dataclass(frozen=True, slots=True)
class CloudConfig:
    """The cloud server that verifies."""

    address: str = setting(
        "127.0.0.1:50051",
        "host:port of the cloud server",
        check=lambda v: _ADDRESS.fullmatch(v) is not None,
        allowed="host:port",
    )
    token: str = setting("", "token the cloud server asks for; empty sends none", secret=True)
    tls_ca: str = setting(
        "", "PEM file of the authority that signed the cloud's certificate; empty uses no TLS"
    )
    connect_timeout_s: float = setting(
        5.0, "longest wait for a connection", check=_seconds, allowed="0..86400"
    )
    resume_attempts: int = setting(
        5,
        "times a generation is taken up again after the link broke",
        check=lambda v: 0 <= v <= 100,
        allowed="0..100",
    )
    resume_timeout_s: float = setting(
        30.0, "longest a generation waits for a broken link", check=_seconds, allowed="0..86400"
    )
    poll_interval_s: float = setting(
        5.0,
        "how often the cloud is asked which model it serves",
        check=lambda v: 0.1 <= v <= 3600,
        allowed="0.1..3600",
    )


@dataclass(frozen=True, slots=True)
class DrafterConfig:
    """The small model at the edge."""

    backend: Literal["onnx", "torch", "ngram"] = setting("onnx", "what runs the draft model")
    model: str = setting("", "folder of the draft model (ngram needs none)")
    tokenizer: str = setting("", "folder of the tokenizer; empty: the draft model's folder")
    threads: int = setting(
        1, "CPU threads of the drafter", check=lambda v: 1 <= v <= 256, allowed="1..256"
    )
    cpu: int | None = setting(
        None, "core to pin the drafter to", check=lambda v: 0 <= v < 4096, allowed="0..4095 or none"
    )
    max_contexts: int = setting(
        64,
        "generations the drafter holds at once; each has its KV cache",
        check=lambda v: 1 <= v <= 4096,
        allowed="1..4096",
    )
    turn_timeout_s: float = setting(
        60.0,
        "a drafter that finishes no turn for so long is killed and replaced",
        check=lambda v: 1 <= v <= 3600,
        allowed="1..3600",
    )


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """How drafts are made and judged (docs/protocol.md)."""

    mode: VerificationMode = setting(VerificationMode.SPLIT, "how the cloud judges drafts")
    draft_length: int = setting(
        4, "drafts of one round", check=lambda v: 1 <= v <= 64, allowed="1..64"
    )
    window: int = setting(
        32, "most unverified tokens in flight", check=lambda v: 1 <= v <= 1024, allowed="1..1024"
    )
    control: Literal["fixed", "adaptive"] = setting(
        "fixed",
        "adaptive: draft_length and window follow what is measured, from the values given here",
    )
    parallel_draft: bool = setting(True, "draft on while verdicts are under way")
    fast_verify: bool = setting(True, "send each draft at once instead of whole rounds")
    round_timeout_s: float = setting(
        0.0,
        "fast_verify off: longest wait for a round to fill before it goes out short; 0: no limit",
        check=lambda v: 0 <= v <= 60,
        allowed="0..60",
    )
    confidence_stop: float = setting(
        0.0,
        "the drafter pauses after a draft it gave a probability below this; 0: never",
        check=lambda v: 0 <= v < 1,
        allowed="0..1, 1 excluded",
    )
    split_rejection: bool = setting(
        True, "split: send the sparse Top-K with a rejection; off: the whole distribution travels"
    )
    exact: bool = setting(True, "split: keep the target's law for any sparse_k")
    sparse_k: int = setting(
        64,
        "split: most (id, probability) pairs of a rejection",
        check=lambda v: 1 <= v <= 65536,
        allowed="1..65536",
    )
    assist: AssistPolicy = setting(
        AssistPolicy.NEVER, "coupled: whether the cloud decodes by itself while it has no drafts"
    )


@dataclass(frozen=True, slots=True)
class LogConfig:
    level: Literal["debug", "info", "warning", "error"] = setting("info", "least severe level")
    format: Literal["text", "json"] = setting("text", "how a record is written")


@dataclass(frozen=True, slots=True)
class EdgeConfig:
    """`[section]` of the TOML file = field of this class."""

    server: ServerConfig
    cloud: CloudConfig
    drafter: DrafterConfig
    speculation: SpeculationConfig
    log: LogConfig

    @property
    def tokenizer_folder(self) -> Path:
        return Path(self.drafter.tokenizer or self.drafter.model)


def read(argv: Sequence[str], environ: Mapping[str, str]) -> EdgeConfig:
    """The checked configuration. Raises ConfigError, SystemExit(0) after `--help`."""
    config = read_arguments(
        EdgeConfig, argv=argv, environ=environ, env_prefix=ENV_PREFIX, program=PROGRAM
    )
    check_combination(config)
    return config


def check_combination(config: EdgeConfig) -> None:
    """What no single key can tell. Raises ConfigError."""
    drafter, speculation = config.drafter, config.speculation
    if drafter.backend != "ngram" and not drafter.model:
        raise ConfigError(
            f"drafter.model = '' is not allowed: it must be the folder of a draft model for the "
            f"{drafter.backend} backend (`picospec prepare` makes one)"
        )
    if drafter.backend == "ngram" and not (drafter.tokenizer or drafter.model):
        raise ConfigError(
            "drafter.tokenizer = '' is not allowed: it must be the folder of the target's "
            "tokenizer for the ngram backend"
        )
    if speculation.window < speculation.draft_length:
        raise ConfigError(
            f"speculation.window = {speculation.window} is not allowed: it must be at least "
            f"speculation.draft_length ({speculation.draft_length})"
        )
    if (
        speculation.assist is not AssistPolicy.NEVER
        and speculation.mode is not VerificationMode.COUPLED
    ):
        raise ConfigError(
            f"speculation.assist = {speculation.assist.value!r} is not allowed: it must be "
            "'never' unless speculation.mode is 'coupled'"
        )
