"""Configuration from a TOML file, the environment and flags; a later source wins.

A configuration is a `Settings` with one field per section, a section a `Settings` with one pydantic
`Field` per key, described by the text below it:

    class ServerConfig(Settings):
        port: int = Field(8080, ge=0, le=65535)
        '''TCP port'''

    class EdgeConfig(Settings):
        server: ServerConfig = ServerConfig()

The port is then `[server] port` in the file, `{prefix}SERVER_PORT` in the environment and
`--server.port` among the flags. pydantic knows types and bounds; reading the sources is done here,
because pydantic-settings merges them before it checks: a wrong value that a later source overrides
would pass, as would an unknown variable, and an error could not tell where a value came from.

A `dict` is a free-form table: sources are merged key by key; it is a JSON object in the environment
and `--section.table.key VALUE` among the flags.
"""

import difflib
import enum
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from picospec.errors import ConfigError

T = TypeVar("T", bound="Settings")

REDACTED = "***"
MAX_FILE_BYTES = 1 << 20

_SECRET_NAME = re.compile(r"token$|secret|password|api_?key|credential", re.IGNORECASE)
_NOUNS = {str: "a string", int: "an integer", float: "a finite number", bool: "true or false"}


class Settings(BaseModel):
    """A configuration, or a section of one. Frozen; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


def secret(default: Any, *, description: str | None = None) -> Any:
    """A `Field` that is never printed, not even in an error."""
    return Field(default, description=description, repr=False, json_schema_extra={"secret": True})


class LogConfig(Settings):
    """What both daemons log, and how it looks."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """least severe level"""
    format: Literal["text", "json"] = "text"
    """plain text, or one JSON object per line"""


class _Key(NamedTuple):
    """One key of a configuration."""

    section: str
    name: str
    field: FieldInfo

    def __str__(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types that its value may have, None among them where it is optional."""
        hint = self.field.annotation
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            return typing.get_args(hint)
        return (hint,)

    @property
    def is_optional(self) -> bool:
        return type(None) in self.kinds

    @property
    def origin(self) -> Any:
        return typing.get_origin(self.kinds[0]) or self.kinds[0]

    @property
    def is_secret(self) -> bool:
        return "secret" in self._extra

    @property
    def _extra(self) -> dict[str, Any]:
        extra = self.field.json_schema_extra
        return extra if isinstance(extra, dict) else {}

    @property
    def allowed(self) -> str:
        """What it takes, in words."""
        words = str(self._extra.get("allowed") or self._bounds() or self._kind())
        return words + (" or none" if self.is_optional else "")

    def _bounds(self) -> str:
        bounds: dict[str, Any] = {}
        for item in self.field.metadata:
            for name in ("ge", "gt", "le", "lt"):
                if (value := getattr(item, name, None)) is not None:
                    bounds[name] = value
        if bounds.keys() == {"ge", "le"}:
            return f"{bounds['ge']}..{bounds['le']}"
        words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
        return ", ".join(f"{words[name]} {value}" for name, value in bounds.items())

    def _kind(self) -> str:
        kind = self.kinds[0]
        if self.origin is typing.Literal:
            return "one of " + ", ".join(map(str, typing.get_args(kind)))
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            return "one of " + ", ".join(str(member.value) for member in kind)
        return {dict: "a table", tuple: "a list of strings"}.get(self.origin) or _NOUNS[kind]

    def parsed(self, text: str) -> Any:
        """What a variable or a flag says, for pydantic to check."""
        if self.is_optional and text.strip().lower() in ("", "none"):
            return None
        if self.origin is tuple and not text.lstrip().startswith("["):
            return [part.strip() for part in text.split(",") if part.strip()]
        return _json(text) if self.origin in (dict, tuple) else text


def load(
    cls: type[T],
    *,
    toml_text: str | None,
    environ: Mapping[str, str],
    argv: Sequence[str],
    env_prefix: str,
) -> T:
    """The configuration from all three sources. Raises ConfigError; does no I/O."""
    keys = {str(key): key for key in _keys(cls)}
    file = _from_toml(toml_text or "")
    checked = (
        _checked(cls, keys, file, "the configuration file", strict=True),
        _checked(cls, keys, _from_environ(keys, environ, env_prefix), "the environment"),
        _checked(cls, keys, _from_flags(keys, argv), "the flags"),
    )
    values: dict[str, Any] = {}
    for source in checked:
        _merge(values, source.model_dump(exclude_unset=True))
    return cls.model_validate(values)


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


def redacted(config: Settings) -> dict[str, Any]:
    """The configuration as a nested dict of JSON values, secrets replaced by `***`."""
    shown = config.model_dump(mode="json")
    for key in _keys(type(config)):
        value = shown[key.section][key.name]
        if key.is_secret and value:
            shown[key.section][key.name] = REDACTED
        elif key.origin is dict:  # its names are not ours, so they tell its secrets
            for name in filter(_SECRET_NAME.search, value):
                value[name] = REDACTED
    return shown


def help_text(cls: type[Settings], *, program: str, env_prefix: str) -> str:
    """What `--help` prints: every flag, what it means, what is allowed and its default."""
    lines = [
        f"usage: {program} [--config FILE.toml] [--SECTION.KEY VALUE ...]",
        "",
        "Each key may also be in the file ([SECTION] KEY = VALUE) or in the environment "
        f"({env_prefix}SECTION_KEY).",
        "A flag overrides the environment, and the environment overrides the file.",
    ]
    section = ""
    for key in _keys(cls):
        if key.section != section:
            section = key.section
            lines += ["", f"[{section}]"]
        default = key.field.get_default(call_default_factory=True)
        default = json.dumps(default.value if isinstance(default, enum.Enum) else default)
        lines.append(f"  --{key}  (default {default}; {key.allowed})")
        lines.append(f"      {key.field.description}")
    return "\n".join(lines)


def _keys(cls: type[Settings]) -> Iterator[_Key]:
    for section, field in cls.model_fields.items():
        kind: Any = field.annotation  # a Settings, too
        for name, inner in kind.model_fields.items():
            yield _Key(section, name, inner)


def _from_toml(text: str) -> dict[str, Any]:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the configuration file is not valid TOML: {error}") from None
    for section, table in document.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{section} in the configuration file must be in a [section]")
    return document


def _from_environ(
    keys: Mapping[str, _Key], environ: Mapping[str, str], prefix: str
) -> dict[str, Any]:
    names = {f"{prefix}{key.section}_{key.name}".upper(): key for key in keys.values()}
    values: dict[str, Any] = {}
    for name, text in environ.items():
        if not name.startswith(prefix) or name == f"{prefix}CONFIG":
            continue
        if name not in names:
            raise ConfigError(f"unknown environment variable {name}{_hint(name, names)}")
        key = names[name]
        values.setdefault(key.section, {})[key.name] = key.parsed(text)
    return values


def _from_flags(keys: Mapping[str, _Key], argv: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    rest = list(argv)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"unexpected argument {flag!r}; flags are --SECTION.KEY VALUE")
        spelled, has_value, text = flag[2:].partition("=")
        section, _, name = spelled.partition(".")
        name, _, entry = name.partition(".")
        if (key := keys.get(f"{section}.{name}")) is None:
            raise ConfigError(f"unknown setting {spelled}{_hint(spelled, keys)}")
        if entry and key.origin is not dict:
            raise ConfigError(f"unknown setting --{spelled}")
        if not has_value:
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif key.origin is bool or entry:
                text = "true"
            else:
                raise ConfigError(f"--{spelled} needs a value: {key.allowed}")
        value = {entry: _json(text)} if entry else key.parsed(text)
        _merge(values, {section: {name: value}})
    return values


def _merge(values: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Put `more` over `values`, tables within tables key by key."""
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            _merge(values[name], value)
        else:
            values[name] = value


def _checked(
    cls: type[T], keys: Mapping[str, _Key], values: dict[str, Any], where: str, strict: bool = False
) -> T:
    """One source's values. `strict`: a number is no string; elsewhere all comes as strings."""
    try:
        if strict:  # as JSON, in which a list may become a tuple and a string an Enum
            return cls.model_validate_json(json.dumps(values, default=str), strict=True)
        return cls.model_validate(values)
    except ValidationError as error:
        raise _refusal(keys, error, where) from None


def _refusal(keys: Mapping[str, _Key], error: ValidationError, where: str) -> ConfigError:
    """The first complaint in our words, which a user can act on."""
    details = error.errors(include_url=False)[0]
    location = ".".join(map(str, details["loc"][:2]))
    key = keys.get(location)
    if key is None:
        return ConfigError(f"unknown setting {location}{_hint(location, keys)}")
    shown = REDACTED if key.is_secret else repr(details["input"])
    return ConfigError(f"{key} = {shown} is not allowed: it must be {key.allowed} (in {where})")


def _hint(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(known))}"


def _json(text: str) -> Any:
    """JSON where it is JSON (numbers, true, lists), else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


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


def _read_file(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"the file {path} is larger than {MAX_FILE_BYTES} bytes")
        return path.read_text(encoding="utf-8-sig")  # some editors begin with a byte-order mark
    except OSError as error:
        raise ConfigError(f"cannot read the file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the file {path} is not UTF-8 text") from None
