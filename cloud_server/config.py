"""The cloud server's settings: every bound, wait and address, with its unit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from picospec.config import LogConfig, Settings, secret
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


class ServerConfig(Settings):
    """The gRPC server and what it grants one session."""

    host: str = "127.0.0.1"
    """address that the gRPC server listens on"""
    port: int = Field(50051, ge=0, le=65535)
    """its port; 0 takes a free one"""
    auth_token: str = secret("")
    """bearer token that edges must present; empty asks for none"""
    tls_cert: str = ""
    """PEM file of the certificate chain; empty: no TLS"""
    tls_key: str = ""
    """PEM file of the certificate's private key"""
    max_sessions: int = Field(64, ge=1)
    """generations served at once, those that wait for room included"""
    output_share: float = Field(0.5, ge=0, le=1)
    """share of max_tokens that a generation reserves in the KV cache, beside its prompt"""
    output_reserve_max: int = Field(1024, ge=1)
    """most output tokens that a generation reserves"""
    queue_max: int = Field(64, ge=0)
    """generations that wait for room in the KV cache; further ones are refused"""
    queue_timeout_s: float = Field(30.0, gt=0)
    """longest wait for room in the KV cache, in seconds"""
    session_idle_timeout_s: float = Field(60.0, gt=0)
    """silence after which a session is ended, in seconds"""
    outbound_frames_max: int = Field(256, ge=1)
    """frames kept for an edge that reads slowly"""
    max_message_bytes: int = Field(4 * 2**20, gt=0)
    """largest gRPC message accepted, in bytes"""
    keepalive_time_s: float = Field(20.0, gt=0)
    """quiet time before a connection is probed, in seconds"""
    keepalive_timeout_s: float = Field(10.0, gt=0)
    """wait for the probe's answer, in seconds"""
    grace_s: float = Field(30.0, ge=0)
    """wait for running generations at shutdown, in seconds"""
    health_interval_s: float = Field(1.0, gt=0)
    """how often the engine is looked at, in seconds"""


class EngineConfig(Settings):
    """The target model and the vLLM engine that verifies with it."""

    model: str = ""
    """target: folder or repository id; empty: $PICOSPEC_HOME/models/target"""
    model_id: str = ""
    """name shown to edges; empty: the model's own"""
    max_draft_tokens: int = Field(16, ge=1, le=256)
    """most drafts verified per session in one step"""
    max_window: int = Field(64, ge=1, le=4096)
    """most unverified tokens in flight"""
    max_sparse_k: int = Field(1024, ge=1, le=1 << 24)
    """most pairs in a Rejection"""
    min_step_tokens: int = Field(0, ge=0, le=16)
    """fewest tokens per forward, the rest is padding; 0: measured at start-up (CPU)"""
    step_timeout_s: float = Field(300.0, ge=1, le=86_400)
    """an engine that finishes no step for so long is given up, and the server ends, in seconds"""
    args: dict[str, Any] = Field({})
    """further vLLM engine arguments by their own names, e.g. max_model_len"""


class MetricsConfig(Settings):
    """Where Prometheus scrapes."""

    enabled: bool = True
    """serve Prometheus metrics"""
    host: str = "127.0.0.1"
    """address of the metrics server"""
    port: int = Field(9400, ge=0, le=65535)
    """its port; 0 takes a free one"""


class CloudConfig(Settings):
    """All settings of the cloud server."""

    server: ServerConfig = ServerConfig()
    engine: EngineConfig = EngineConfig()
    metrics: MetricsConfig = MetricsConfig()
    log: LogConfig = LogConfig()


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
    engine = engine.model_copy(update={"model": str(home / "models" / "target")})
    return config.model_copy(update={"engine": engine})
