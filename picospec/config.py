"""Configuration as frozen dataclasses: TOML file, environment and flags, upward in that order.

A configuration class has one field per section, a section one `setting` per key:

    @dataclass(frozen=True, slots=True)
    class ServerConfig:
        port: int = setting(8080, "TCP port", check=lambda v: 0 <= v <= 65535, allowed="0..65535")

    @dataclass(frozen=True, slots=True)
    class EdgeConfig:
        server: ServerConfig

The port is then `[server] port` in the file, `{prefix}SERVER_PORT` in the environment and
`--server.port` among the flags. Every value of every source is checked, also one that a later
source overrides; what is refused is a ConfigError that names key, value and what is allowed.

Types: str, int, float (finite), bool, an Enum or Literal of str, tuple[str, ...] (comma-separated
or a JSON array in text), dict[str, Any] (a free-form table; sources are merged key by key,
a JSON object in the environment, `--section.table.key VALUE` as a flag), and any of them `| None`.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from picospec.errors import ConfigError

T = TypeVar("T")

REDACTED = "***"
MAX_FILE_BYTES = 1 << 20

_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})
_SECRET_NAME = re.compile(r"token$|secret|password|api_?key|credential", re.IGNORECASE)


def setting(
    default: Any,
    help: str,
    *,
    check: Callable[[Any], bool] | None = None,
    allowed: str = "",
    secret: bool = False,
) -> Any:
    """A dataclass field for one key. `check` sees values of the right type; `allowed` says in
    words what it lets through; a secret is never printed, not even in an error."""
    metadata = {"help": help, "check": check, "allowed": allowed, "secret": secret}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class _Setting:
    section: str
    name: str
    type: Any  # without `| None`
    optional: bool
    default: Any
    help: str
    check: Callable[[Any], bool] | None
    allowed: str
    secret: bool

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def is_table(self) -> bool:
        return typing.get_origin(self.type) is dict or self.type is dict

    def choices(self) -> tuple[str, ...]:
        if typing.get_origin(self.type) is typing.Literal:
            return tuple(str(value) for value in typing.get_args(self.type))
        if isinstance(self.type, type) and issubclass(self.type, enum.Enum):
            return tuple(str(member.value) for member in self.type)
        return ()

    def what_is_allowed(self) -> str:
        if self.allowed:
            return self.allowed
        if choices := self.choices():
            words = "one of " + ", ".join(choices)
        elif self.is_table:
            words = "a table"
        elif typing.get_origin(self.type) is tuple:
            words = "a list of strings"
        else:
            names = {str: "a string", int: "an integer", float: "a finite number"}
            words = names.get(self.type, "true or false")
        return words + (" or none" if self.optional else "")

    def refuse(self, value: Any) -> ConfigError:
        shown = REDACTED if self.secret else repr(value)
        return ConfigError(
            f"{self.key} = {shown} is not allowed: it must be {self.what_is_allowed()}"
        )


def load(
    cls: type[T],
    *,
    toml_text: str | None,
    environ: Mapping[str, str],
    argv: Sequence[str],
    env_prefix: str,
) -> T:
    """The configuration from all three sources. Raises ConfigError; does no I/O."""
    settings = {item.key: item for item in _settings(cls)}
    values: dict[str, Any] = {}
    for source in (
        _from_toml(settings, toml_text or ""),
        _from_environ(settings, environ, env_prefix),
        _from_flags(settings, argv),
    ):
        for key, value in source:
            if settings[key].is_table and value is not None:
                value = (values.get(key) or {}) | value
            values[key] = value
    sections: dict[str, dict[str, Any]] = {name: {} for name in _section_types(cls)}
    for key, value in values.items():
        section, name = key.split(".")
        sections[section][name] = value
    return cls(**{name: made(**sections[name]) for name, made in _section_types(cls).items()})


def read_arguments(
    cls: type[T], *, argv: Sequence[str], environ: Mapping[str, str], env_prefix: str, program: str
) -> T:
    """`load` for a daemon's main: reads the file named by `--config PATH` or `{env_prefix}CONFIG`.

    `--help` prints every key with its default and exits 0. Raises ConfigError.
    """
    flags = list(argv)
    if "--help" in flags or "-h" in flags:
        print(help_text(cls, program=program, env_prefix=env_prefix))
        raise SystemExit(0)
    path = environ.get(f"{env_prefix}CONFIG") or None
    for index, flag in enumerate(flags):
        if flag == "--config" or flag.startswith("--config="):
            taken = 1 if "=" in flag else 2
            path = flag.partition("=")[2] if taken == 1 else "".join(flags[index + 1 : index + 2])
            del flags[index : index + taken]
            if not path:
                raise ConfigError("--config needs the path of a TOML file")
            break
    text = _read_file(Path(path)) if path else None
    environ = _credentials(environ, env_prefix) | dict(environ)
    return load(cls, toml_text=text, environ=environ, argv=flags, env_prefix=env_prefix)


def _credentials(environ: Mapping[str, str], prefix: str) -> dict[str, str]:
    """systemd's LoadCredential=: files whose names and texts stand for environment variables."""
    folder = environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        return {}
    return {
        path.name: _read_file(path).strip()
        for path in sorted(Path(folder).iterdir())
        if path.name.startswith(prefix)
    }


def redacted(config: Any) -> dict[str, Any]:
    """The configuration as a nested dict of JSON values, secrets replaced by `***`."""
    shown: dict[str, Any] = {}
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        shown[section.name] = {
            item.name: REDACTED
            if item.metadata.get("secret") and getattr(values, item.name)
            else _plain(getattr(values, item.name))
            for item in dataclasses.fields(values)
        }
    return shown


def help_text(cls: type[Any], *, program: str, env_prefix: str) -> str:
    """What `--help` prints: every flag, what it means, what is allowed and its default."""
    lines = [
        f"usage: {program} [--config FILE.toml] [--SECTION.KEY VALUE ...]",
        "",
        f"Every key can also stand in the file ([SECTION] KEY = VALUE) or in the environment "
        f"({env_prefix}SECTION_KEY).",
        "A flag overrides the environment, and that the file.",
    ]
    section = ""
    for item in _settings(cls):
        if item.section != section:
            section = item.section
            lines += ["", f"[{section}]"]
        default = REDACTED if item.secret and item.default else json.dumps(_plain(item.default))
        lines.append(f"  --{item.key}  (default {default}; {item.what_is_allowed()})")
        lines.append(f"      {item.help}")
    return "\n".join(lines)


def _section_types(cls: type[Any]) -> dict[str, type[Any]]:
    hints = typing.get_type_hints(cls)
    return {item.name: hints[item.name] for item in dataclasses.fields(cls)}


def _settings(cls: type[Any]) -> Iterator[_Setting]:
    for section, section_type in _section_types(cls).items():
        hints = typing.get_type_hints(section_type)
        for item in dataclasses.fields(section_type):
            kind, optional = _without_none(hints[item.name])
            made = item.default_factory
            default = item.default if made is dataclasses.MISSING else made()
            yield _Setting(
                section, item.name, kind, optional, default,
                item.metadata.get("help", ""), item.metadata.get("check"),
                item.metadata.get("allowed", ""), item.metadata.get("secret", False),
            )  # fmt: skip


def _without_none(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        if len(kinds) != 1:
            raise TypeError(f"a setting cannot be of type {hint}")
        return kinds[0], True
    return hint, False


def _from_toml(settings: Mapping[str, _Setting], text: str) -> Iterator[tuple[str, Any]]:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the configuration file is not valid TOML: {error}") from None
    for section, table in document.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{section} in the configuration file must stand in a [section]")
        for name, value in table.items():
            item = _find(settings, f"{section}.{name}")
            yield item.key, _checked(item, value)


def _from_environ(
    settings: Mapping[str, _Setting], environ: Mapping[str, str], prefix: str
) -> Iterator[tuple[str, Any]]:
    names = {f"{prefix}{item.section}_{item.name}".upper(): item for item in settings.values()}
    for name, text in environ.items():
        if not name.startswith(prefix) or name == f"{prefix}CONFIG":
            continue
        if name not in names:
            raise ConfigError(f"unknown environment variable {name}{_hint(name, names)}")
        yield names[name].key, _parsed(names[name], text)


def _from_flags(settings: Mapping[str, _Setting], argv: Sequence[str]) -> Iterator[tuple[str, Any]]:
    rest = list(argv)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"unexpected argument {flag!r}; flags are --SECTION.KEY VALUE")
        key, has_value, text = flag[2:].partition("=")
        section, _, name = key.partition(".")
        name, _, entry = name.partition(".")
        item = _find(settings, f"{section}.{name}")
        if entry and not item.is_table:
            raise ConfigError(f"unknown setting --{key}")
        if not has_value:
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif item.type is bool or entry:
                text = "true"
            else:
                raise ConfigError(f"--{key} needs a value: {item.what_is_allowed()}")
        yield item.key, _checked(item, {entry: _free(text)}) if entry else _parsed(item, text)


def _find(settings: Mapping[str, _Setting], key: str) -> _Setting:
    if key not in settings:
        raise ConfigError(f"unknown setting {key}{_hint(key, settings)}")
    return settings[key]


def _hint(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(known))}"


def _parsed(item: _Setting, text: str) -> Any:
    """A value given as text (environment or flag), checked."""
    if item.optional and text.strip().lower() in ("", "none"):
        return None
    value: Any = text
    try:
        if item.type is bool:
            lowered = text.strip().lower()
            value = lowered in _TRUE if lowered in _TRUE | _FALSE else text
        elif item.type is int:
            value = int(text)
        elif item.type is float:
            value = float(text)
        elif item.is_table:
            value = json.loads(text)
        elif typing.get_origin(item.type) is tuple:
            words = text.strip()
            value = json.loads(words) if words.startswith("[") else _split(words)
    except ValueError:
        raise item.refuse(text) from None
    return _checked(item, value)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _free(text: str) -> Any:
    """A value of a free-form table: JSON where it is JSON (numbers, true, lists), else a string."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _checked(item: _Setting, value: Any) -> Any:
    if value is None and item.optional:
        return None
    converted = _converted(item, value)
    if converted is None or (item.check is not None and not item.check(converted)):
        raise item.refuse(value)
    return converted


def _converted(item: _Setting, value: Any) -> Any:
    """`value` as the setting's type, or None if it is of another."""
    kind = item.type
    if item.is_table:
        return value if isinstance(value, dict) else None
    if typing.get_origin(kind) is tuple:
        fits = isinstance(value, list) and all(isinstance(part, str) for part in value)
        return tuple(value) if fits else None
    if choices := item.choices():
        if not isinstance(value, str) or value not in choices:
            return None
        return kind(value) if isinstance(kind, type) else value
    if kind is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if fits and math.isfinite(value) else None
    if kind is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else None
    return value if isinstance(value, kind) else None


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        # A free-form table's names are not ours, so its secrets are told by their names.
        return {
            key: REDACTED if _SECRET_NAME.search(str(key)) else _plain(entry)
            for key, entry in value.items()
        }
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return value


def _read_file(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(
                f"the configuration file {path} is larger than {MAX_FILE_BYTES} bytes"
            )
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the configuration file {path} is not UTF-8 text") from None
