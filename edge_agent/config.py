"""Every setting of the edge agent, with its default, its unit and what is allowed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from picospec.config import LogConfig, Settings, read_arguments, secret
from picospec.errors import ConfigError
from picospec.protocol.messages import AssistPolicy

ENV_PREFIX = "PICOSPEC_EDGE_"
PROGRAM = "picospec-edge"

DAY_S = 86_400.0


class ServerConfig(Settings):
    """The OpenAI API."""

    host: str = Field("127.0.0.1", min_length=1)
    """address that the HTTP server listens on"""
    port: int = Field(8080, ge=0, le=65535)
    """TCP port; 0 takes a free one"""
    max_concurrent_requests: int = Field(64, ge=1, le=4096)
    """requests answered at once; further ones get 503"""
    max_body_bytes: int = Field(4 << 20, ge=1024, le=1 << 28)
    """largest request body, in bytes"""
    request_timeout_s: float = Field(600.0, gt=0, le=DAY_S)
    """longest time for a request, streaming included, in seconds"""
    shutdown_grace_s: float = Field(20.0, ge=0, le=3600)
    """how long running answers may go on after SIGTERM, in seconds"""
    api_key: str = secret("")
    """bearer token that /v1 asks for; empty asks for none"""


class CloudConfig(Settings):
    """The cloud server that verifies."""

    address: str = Field(
        "127.0.0.1:50051", pattern=r"^[^\s/]+:\d{1,5}$", json_schema_extra={"allowed": "host:port"}
    )
    """host:port of the cloud server"""
    token: str = secret("")
    """token that the cloud server asks for; empty sends none"""
    tls_ca: str = ""
    """PEM file of the authority that signed the cloud's certificate; empty: no TLS"""
    connect_timeout_s: float = Field(5.0, gt=0, le=DAY_S)
    """longest wait for a connection, in seconds"""
    resume_attempts: int = Field(5, ge=0, le=100)
    """attempts to resume a generation after its link broke"""
    resume_timeout_s: float = Field(30.0, gt=0, le=DAY_S)
    """longest time to resume a generation, in seconds"""
    poll_interval_s: float = Field(5.0, ge=0.1, le=3600)
    """how often the cloud is asked which model it serves, in seconds"""


class DrafterConfig(Settings):
    """The small model at the edge."""

    backend: Literal["onnx", "torch", "ngram"] = "onnx"
    """what runs the draft model"""
    model: str = ""
    """folder of the draft model; ngram needs none"""
    tokenizer: str = ""
    """folder of the tokenizer; empty: the draft model's folder"""
    threads: int = Field(1, ge=1, le=256)
    """CPU threads of the drafter"""
    cpu: int | None = Field(None, ge=0, le=4095)
    """core to pin the drafter to"""
    max_contexts: int = Field(64, ge=1, le=4096)
    """generations the drafter holds at once, each with a KV cache"""
    cache_bytes: int = Field(0, ge=0)
    """most memory for KV caches, those of past chats included, in bytes; 0: an eighth of all"""
    turn_timeout_s: float = Field(15.0, ge=1, le=3600)
    """a drafter that finishes no turn for so long is replaced, in seconds"""


class SpeculationConfig(Settings):
    """How drafts are made and judged (docs/protocol.md)."""

    mode: Literal["auto", "split", "coupled"] = "auto"
    """how the cloud judges drafts; auto: chosen per generation, and lengths while it runs"""
    estimates_file: str = Field(
        "auto", min_length=1, json_schema_extra={"allowed": "auto, off or a path"}
    )
    """what keeps estimates over a restart; auto: in $STATE_DIRECTORY, else in $PICOSPEC_HOME"""
    draft_length: int = Field(4, ge=1, le=64)
    """split, coupled: drafts per round"""
    window: int = Field(32, ge=1, le=1024)
    """split, coupled: most unverified tokens in flight"""
    parallel_draft: bool = True
    """continue to draft while verdicts are under way"""
    fast_verify: bool = True
    """send each draft at once instead of whole rounds"""
    round_timeout_s: float = Field(0.0, ge=0, le=60)
    """fast_verify off: a round not full after so long is sent short, in seconds; 0: no limit"""
    confidence_stop: float = Field(0.0, ge=0, lt=1)
    """the drafter pauses after a draft less probable than this; 0: never"""
    split_rejection: bool = True
    """split: a rejection carries the sparse Top-K; off: the whole distribution"""
    exact: bool = True
    """split: keep the target's law for any sparse_k"""
    sparse_k: int = Field(64, ge=1, le=65536)
    """split: most (id, probability) pairs per rejection"""
    assist: AssistPolicy = AssistPolicy.AUTO
    """when the cloud decodes without drafts; auto: unless waiting for them is faster"""


class EdgeConfig(Settings):
    """`[section]` of the TOML file = field of this class."""

    server: ServerConfig = ServerConfig()
    cloud: CloudConfig = CloudConfig()
    drafter: DrafterConfig = DrafterConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    log: LogConfig = LogConfig()

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
        not speculation.fast_verify
        and speculation.mode != "coupled"
        and speculation.assist is not AssistPolicy.NEVER
    ):
        raise ConfigError(
            "speculation.fast_verify = false is not allowed: it must be true in split mode while "
            f"speculation.assist is {speculation.assist.value!r}: when a whole round comes tells "
            "what is in it, so the cloud may not take over"
        )
    if speculation.mode == "auto" and speculation.assist is not AssistPolicy.AUTO:
        raise ConfigError(
            f"speculation.assist = {speculation.assist.value!r} is not allowed: it must be 'auto' "
            "while speculation.mode is 'auto'"
        )
