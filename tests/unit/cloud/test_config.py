"""The cloud server's settings: sources, bounds, what spans several of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud_server.__main__ import EXIT_CONFIG, main
from cloud_server.config import ENV_PREFIX, RESERVED_ENGINE_ARGS, CloudConfig, completed
from picospec.config import load, redacted
from picospec.errors import ConfigError


def loaded(toml: str = "", environ: dict[str, str] | None = None, *argv: str) -> CloudConfig:
    return load(
        CloudConfig, toml_text=toml, environ=environ or {}, argv=argv, env_prefix=ENV_PREFIX
    )


def test_defaults_are_complete_and_local() -> None:
    config = completed(loaded(), {"PICOSPEC_HOME": "/srv/picospec"})
    assert config.engine.model == str(Path("/srv/picospec/models/target"))
    assert (config.server.host, config.server.port) == ("127.0.0.1", 50051)
    assert (config.metrics.host, config.metrics.port) == ("127.0.0.1", 9400)


def test_engine_arguments_pass_through_from_every_source() -> None:
    config = loaded(
        "[engine]\nmodel = 'm'\n[engine.args]\nmax_model_len = 2048\ndtype = 'bfloat16'\n",
        {"PICOSPEC_CLOUD_ENGINE_ARGS": '{"tensor_parallel_size": 2}'},
        "--engine.args.enforce_eager",
        "--engine.args.dtype=float32",
    )
    assert completed(config, {}).engine.args == {
        "max_model_len": 2048,
        "dtype": "float32",
        "tensor_parallel_size": 2,
        "enforce_eager": True,
    }


def test_the_token_is_not_printed() -> None:
    config = loaded("", {"PICOSPEC_CLOUD_SERVER_AUTH_TOKEN": "hush"})
    assert config.server.auth_token == "hush"
    assert "hush" not in str(redacted(config))


@pytest.mark.parametrize(
    ("toml", "names"),
    [
        ("[server]\nport = 65536", "server.port"),
        ("[server]\nmax_sessions = 0", "server.max_sessions"),
        ("[server]\nsession_idle_timeout_s = 0", "server.session_idle_timeout_s"),
        ("[server]\ngrace_s = -1", "server.grace_s"),
        ("[server]\ntls_cert = 'cert.pem'", "server.tls_key"),
        ("[server]\ntls_key = 'key.pem'", "server.tls_cert"),
        ("[engine]\nmax_draft_tokens = 0", "engine.max_draft_tokens"),
        ("[engine]\nmax_draft_tokens = 65\nmax_window = 64", "engine.max_window"),
        ("[log]\nlevel = 'loud'", "log.level"),
        *((f"[engine.args]\n{name} = 'x'", f"engine.args.{name}") for name in RESERVED_ENGINE_ARGS),
    ],
)
def test_a_wrong_value_is_refused_by_key(toml: str, names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        completed(loaded(toml), {})


def test_main_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "--server.session_idle_timeout_s" in capsys.readouterr().out
    assert main(["--server.port", "many"]) == EXIT_CONFIG
    assert "server.port" in capsys.readouterr().err
