"""The three sources of configuration, their precedence, and what is refused and how."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from picospec import config
from picospec.config import Settings, secret
from picospec.errors import ConfigError


class Mode(enum.Enum):
    FAST = "fast"
    SAFE = "safe"


class ServerSection(Settings):
    host: str = Field("127.0.0.1", description="address")
    port: int = Field(8080, ge=0, le=65535, description="TCP port")
    token: str | None = secret(None, description="bearer token")
    verbose: bool = Field(False, description="say more")


class EngineSection(Settings):
    mode: Mode = Field(Mode.FAST, description="how")
    level: Literal["low", "high"] = Field("low", description="how much")
    timeout_s: float = Field(1.0, gt=0, description="wait")
    names: tuple[str, ...] = Field((), description="names")
    args: dict[str, Any] = Field({}, description="free-form")


class Config(Settings):
    server: ServerSection = ServerSection()
    engine: EngineSection = EngineSection()


def load(
    toml: str | None = None, environ: dict[str, str] | None = None, argv: tuple[str, ...] = ()
) -> Config:
    return config.load(
        Config, toml_text=toml, environ=environ or {}, argv=argv, env_prefix="PICOSPEC_T_"
    )


def test_defaults() -> None:
    assert load() == Config(server=ServerSection(), engine=EngineSection())


def test_flags_override_environment_overrides_file() -> None:
    toml = "[server]\nport = 1\nhost = 'a'\nverbose = true"
    environ = {"PICOSPEC_T_SERVER_PORT": "2", "PICOSPEC_T_SERVER_HOST": "b", "OTHER": "x"}
    loaded = load(toml, environ, ("--server.port", "3"))
    assert loaded.server == ServerSection(host="b", port=3, verbose=True)


def test_every_type_from_every_source() -> None:
    expected = EngineSection(
        mode=Mode.SAFE, level="high", timeout_s=2.0, names=("a", "b"), args={"n": 1}
    )
    toml = (
        "[engine]\nmode='safe'\nlevel='high'\ntimeout_s=2\nnames=['a','b']\n[engine.args]\nn = 1\n"
    )
    environ = {
        "PICOSPEC_T_ENGINE_MODE": "safe",
        "PICOSPEC_T_ENGINE_LEVEL": "high",
        "PICOSPEC_T_ENGINE_TIMEOUT_S": "2",
        "PICOSPEC_T_ENGINE_NAMES": "a, b",
        "PICOSPEC_T_ENGINE_ARGS": '{"n": 1}',
    }
    flags = (
        "--engine.mode=safe",
        "--engine.level",
        "high",
        "--engine.timeout_s=2",
        "--engine.names",
        '["a", "b"]',
        "--engine.args.n=1",
    )
    assert load(toml).engine == expected
    assert load(environ=environ).engine == expected
    assert load(argv=flags).engine == expected


def test_free_form_tables_are_merged_key_by_key() -> None:
    loaded = load(
        "[engine.args]\na = 1\nb = 2",
        {"PICOSPEC_T_ENGINE_ARGS": '{"b": 3}'},
        ("--engine.args.c", "auto", "--engine.args.flag", "--server.verbose"),
    )
    assert loaded.engine.args == {"a": 1, "b": 3, "c": "auto", "flag": True}
    assert loaded.server.verbose is True


@pytest.mark.parametrize(
    ("toml", "environ", "argv", "said"),
    [
        ("[server]\nport = 70000", {}, (), ("server.port", "70000", "0..65535")),
        ("[server]\nport = true", {}, (), ("server.port", "True")),
        ("[server]\nport = '1'", {}, (), ("server.port", "'1'")),
        ("[server]\nprt = 1", {}, (), ("server.prt", "did you mean server.port")),
        ("port = 1", {}, (), ("port", "section")),
        ("[server", {}, (), ("not valid TOML",)),
        ("[engine]\ntimeout_s = nan", {}, (), ("engine.timeout_s", "nan", "above 0")),
        ("[engine]\nnames = 'a'", {}, (), ("engine.names", "list of strings")),
        (None, {"PICOSPEC_T_SERVER_PORT": "x"}, (), ("server.port", "'x'", "0..65535")),
        (None, {"PICOSPEC_T_SERVER_PROT": "1"}, (), ("PICOSPEC_T_SERVER_PROT", "did you mean")),
        (None, {"PICOSPEC_T_ENGINE_ARGS": "[1]"}, (), ("engine.args", "a table")),
        (None, {}, ("--engine.mode", "slow"), ("engine.mode", "'slow'", "fast, safe")),
        (None, {}, ("--engine.level", "mid"), ("engine.level", "low, high")),
        (None, {}, ("--server.verbose", "maybe"), ("server.verbose", "true or false")),
        (None, {}, ("--server.port",), ("server.port", "needs a value")),
        (None, {}, ("--server.port.x", "1"), ("server.port.x",)),
        (None, {}, ("serve",), ("unexpected argument", "serve")),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_allowed(
    toml: str | None, environ: dict[str, str], argv: tuple[str, ...], said: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(toml, environ, argv)
    for words in said:
        assert words in str(caught.value)


def test_an_overridden_wrong_value_is_still_refused() -> None:
    with pytest.raises(ConfigError, match="70000"):
        load("[server]\nport = 70000", argv=("--server.port", "1"))


def test_secrets_are_never_shown() -> None:
    loaded = load(
        environ={"PICOSPEC_T_SERVER_TOKEN": "s3cret"},
        argv=("--engine.args.hf_token", "s3cret", "--engine.args.max_num_batched_tokens", "64"),
    )
    shown = config.redacted(loaded)
    assert loaded.server.token == "s3cret"
    assert "s3cret" not in str(shown)
    assert shown["server"]["token"] == "***"
    assert shown["engine"]["args"] == {"hf_token": "***", "max_num_batched_tokens": 64}
    assert config.redacted(load())["server"]["token"] is None
    with pytest.raises(ConfigError) as caught:
        load("[server]\ntoken = 12345")
    assert "12345" not in str(caught.value)


def test_none_for_optional_settings() -> None:
    environ = {"PICOSPEC_T_SERVER_TOKEN": "x"}
    assert load(environ=environ, argv=("--server.token", "none")).server.token is None


def test_read_arguments_reads_the_file(tmp_path: Path) -> None:
    path = tmp_path / "edge.toml"
    path.write_text("[server]\nport = 9\n")

    def read(argv: list[str], environ: dict[str, str]) -> Config:
        return config.read_arguments(
            Config, argv=argv, environ=environ, env_prefix="PICOSPEC_T_", program="t"
        )

    assert read(["--config", str(path)], {}).server.port == 9
    assert read([f"--config={path}", "--server.port=4"], {}).server.port == 4
    assert read([], {"PICOSPEC_T_CONFIG": str(path)}).server.port == 9
    with pytest.raises(ConfigError, match="cannot read"):
        read(["--config", str(tmp_path / "absent.toml")], {})
    with pytest.raises(ConfigError, match="needs the path"):
        read(["--config"], {})


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        config.read_arguments(
            Config, argv=["--help"], environ={}, env_prefix="PICOSPEC_T_", program="t"
        )
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for key in ("server.port", "server.token", "engine.mode", "engine.args", "PICOSPEC_T_"):
        assert key in printed


def test_a_credential_of_the_service_manager_stands_for_a_variable(tmp_path: Path) -> None:
    def token(environ: dict[str, str]) -> str | None:
        return config.read_arguments(
            Config,
            argv=(),
            environ={"CREDENTIALS_DIRECTORY": str(tmp_path)} | environ,
            env_prefix="PICOSPEC_T_",
            program="t",
        ).server.token

    (tmp_path / "PICOSPEC_T_SERVER_TOKEN").write_text("from a file\n")
    (tmp_path / "OTHER_TOKEN").write_text("not ours")
    assert token({}) == "from a file"
    assert token({"PICOSPEC_T_SERVER_TOKEN": "from a variable"}) == "from a variable"
