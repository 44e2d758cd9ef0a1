from __future__ import annotations

import pytest

from edge_agent.config import ENV_PREFIX, EdgeConfig, check_combination, read
from picospec.config import redacted
from picospec.errors import ConfigError
from picospec.protocol.messages import AssistPolicy

MODEL = ["--drafter.model", "draft"]


def test_defaults() -> None:
    config = read(MODEL, {})
    assert (config.server.host, config.server.port) == ("127.0.0.1", 8080)
    assert config.cloud.address == "127.0.0.1:50051"
    assert config.drafter.backend == "onnx"
    assert config.speculation.mode == "auto"
    assert config.speculation.assist is AssistPolicy.AUTO
    assert config.tokenizer_folder.name == "draft"


def test_flags_go_before_the_environment_and_that_before_the_file(tmp_path) -> None:
    file = tmp_path / "edge.toml"
    file.write_text(
        '[server]\nport = 1\nhost = "a"\nmax_concurrent_requests = 3\n[drafter]\nmodel = "file"\n'
        '[speculation]\nmode = "coupled"\nassist = "idle"\n'
    )
    config = read(
        ["--config", str(file), "--server.port", "2"],
        {f"{ENV_PREFIX}SERVER_PORT": "3", f"{ENV_PREFIX}SERVER_HOST": "b"},
    )
    assert (config.server.port, config.server.host) == (2, "b")
    assert config.server.max_concurrent_requests == 3
    assert config.speculation.assist is AssistPolicy.IDLE


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--server.port", "70000"], ["server.port", "70000", "0..65535"]),
        (["--server.request_timeout_s", "nan"], ["server.request_timeout_s"]),
        (["--server.max_concurrent_requests", "0"], ["server.max_concurrent_requests"]),
        (["--cloud.address", "nowhere"], ["cloud.address", "nowhere", "host:port"]),
        (["--drafter.backend", "gguf"], ["drafter.backend", "gguf", "onnx"]),
        (["--speculation.mode", "fast"], ["speculation.mode", "fast", "split"]),
        (["--speculation.window", "0"], ["speculation.window"]),
        (["--log.level", "loud"], ["log.level", "loud", "info"]),
        (["--server.prot", "1"], ["server.prot", "server.port"]),
        (["--drafter.model", ""], ["drafter.model", "folder"]),
        (["--drafter.backend", "ngram", "--drafter.model", ""], ["drafter.tokenizer"]),
        (
            ["--speculation.window", "2", "--speculation.draft_length", "4"],
            ["speculation.window", "draft_length"],
        ),
        (["--speculation.assist", "always"], ["speculation.assist", "speculation.mode"]),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_allowed(
    flags: list[str], named: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        read([*MODEL, *flags], {})
    for word in named:
        assert word in str(caught.value)


def test_secrets_are_not_printed() -> None:
    environ = {f"{ENV_PREFIX}CLOUD_TOKEN": "hush", f"{ENV_PREFIX}SERVER_API_KEY": "sesame"}
    config = read(MODEL, environ)
    assert (config.cloud.token, config.server.api_key) == ("hush", "sesame")
    shown = str(redacted(config))
    assert "hush" not in shown
    assert "sesame" not in shown


def test_every_default_is_allowed() -> None:
    config = read(MODEL, {})
    assert isinstance(config, EdgeConfig)
    check_combination(config)
