"""The cloud server's settings: every bound, wait and address, with its unit.

Values come from a TOML file, the environment (`PICOSPEC_CLOUD_SERVER_PORT`) and flags
(`--server.port`), later ones winning; `picospec.config.load` reads and checks them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from picospec.config import setting
from picospec.errors import ConfigError

ENV_PREFIX = "PICOSPEC_CLOUD_"

# Engine arguments that this server decides itself: passing them through would break it.
RESERVED_ENGINE_ARGS = frozenset(
    {
        "model",
        "served_model_name",
        "speculative_config",
        "scheduler_cls",
        "worker_cls",
        "async_scheduling",
    }
)


def _positive(value: float) -> bool:
    return value > 0


def _not_negative(value: float) -> bool:
    return value >= 0


def _port(value: int) -> bool:
    return 0 <= value <= 65535


def _within(low: int, high: int) -> Any:
    return lambda value: low <= value <= high


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The gRPC server and what it grants one session."""

    host: str = setting("127.0.0.1", "address the gRPC server listens on")
    port: int = setting(50051, "its port; 0 picks a free one", check=_port, allowed="0..65535")
    auth_token: str = setting("", "bearer token that edges must present; empty = none", secret=True)
    tls_cert: str = setting("", "PEM file of the certificate chain; empty = no TLS")
    tls_key: str = setting("", "PEM file of the certificate's private key")
    max_sessions: int = setting(
        64, "generations served at once", check=_positive, allowed="at least 1"
    )
    session_idle_timeout_s: float = setting(
        60.0, "silence after which a session is ended", check=_positive, allowed="above 0"
    )
    outbound_frames_max: int = setting(
        256, "frames kept for an edge that reads slowly", check=_positive, allowed="at least 1"
    )
    max_message_bytes: int = setting(
        4 * 2**20, "largest gRPC message accepted", check=_positive, allowed="above 0"
    )
    keepalive_time_s: float = setting(
        20.0, "quiet time before a connection is probed", check=_positive, allowed="above 0"
    )
    keepalive_timeout_s: float = setting(
        10.0, "wait for the probe's answer", check=_positive, allowed="above 0"
    )
    grace_s: float = setting(
        30.0, "wait for running generations at shutdown", check=_not_negative, allowed="0 or more"
    )
    health_interval_s: float = setting(
        1.0, "how often the engine is looked at", check=_positive, allowed="above 0"
    )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The target model and the vLLM engine that verifies with it."""

    model: str = setting(
        "", "target: folder or repository id; empty = $PICOSPEC_HOME/models/target"
    )
    model_id: str = setting("", "name shown to edges; empty = the model's own")
    max_draft_tokens: int = setting(
        16, "most drafts verified in one step", check=_within(1, 256), allowed="1..256"
    )
    max_window: int = setting(
        64, "most unverified tokens in flight", check=_within(1, 4096), allowed="1..4096"
    )
    max_sparse_k: int = setting(
        1024, "most pairs in a Rejection", check=_within(1, 1 << 24), allowed="1..16777216"
    )
    min_step_tokens: int = setting(
        0,
        "fewest tokens of a forward, filled up with padding; 0: as measured at the start (CPU)",
        check=_within(0, 16),
        allowed="0..16",
    )
    step_timeout_s: float = setting(
        300.0,
        "an engine that finishes no step for so long is given up, and the server ends",
        check=_within(1, 86400),
        allowed="1..86400",
    )
    args: dict[str, Any] = setting(
        {}, "further vLLM engine arguments by their own names, e.g. max_model_len"
    )


@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """Where Prometheus scrapes."""

    enabled: bool = setting(True, "serve Prometheus metrics")
    host: str = setting("127.0.0.1", "address of the metrics server")
    port: int = setting(9400, "its port; 0 picks a free one", check=_port, allowed="0..65535")


@dataclass(frozen=True, slots=True)
class LogConfig:
    """What is logged, and how it looks."""

    level: Literal["debug", "info", "warning", "error"] = setting("info", "least severe level")
    format: Literal["json", "text"] = setting("text", "one JSON object a line, or plain text")


@dataclass(frozen=True, slots=True)
class CloudConfig:
    """All settings of the cloud server."""

    server: ServerConfig = field(default_factory=ServerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    log: LogConfig = field(default_factory=LogConfig)


def completed(config: CloudConfig, environ: Mapping[str, str]) -> CloudConfig:
    """`config` with its default model filled in; checks what spans several settings.

    Raises ConfigError.
    """
    server, engine = config.server, config.engine
    if bool(server.tls_cert) != bool(server.tls_key):
        missing = "server.tls_key" if server.tls_cert else "server.tls_cert"
        raise ConfigError(f"{missing} = '': a certificate and its key go together")
    if engine.max_window < engine.max_draft_tokens:
        raise ConfigError(
            f"engine.max_window = {engine.max_window}: at least engine.max_draft_tokens "
            f"({engine.max_draft_tokens})"
        )
    for name in sorted(RESERVED_ENGINE_ARGS & engine.args.keys()):
        raise ConfigError(f"engine.args.{name}: set by the server itself")
    if engine.model:
        return config
    home = Path(environ.get("PICOSPEC_HOME") or Path.home() / ".cache" / "picospec")
    return replace(config, engine=replace(engine, model=str(home / "models" / "target")))
