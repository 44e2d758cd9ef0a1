"""OpenAI's request bodies: JSON to checked values. Nothing that was asked for is ignored.

A field is either honoured (declared below), harmless and accepted (HARMLESS), accepted at the
value that asks for nothing (UNSUPPORTED), or refused: a misspelt field is an error, as it is with
OpenAI, where vLLM would ignore it. null means absent. Types are strict: "0.7" is no number,
true no integer. What depends on the served model is checked in `preparation`.
"""

import secrets
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
import pydantic_core
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from picospec.errors import RequestError

T = TypeVar("T", bound="CompletionBody")

MAX_STOP_STRINGS = 4
MAX_STOP_CHARACTERS = 1024

HARMLESS = frozenset(
    {
        "user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "parallel_tool_calls",
    }
)  # fmt: skip

# Field -> values that ask for nothing; any other value is refused.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "prompt_logprobs": (),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "guided_json": (),
    "structured_outputs": (),
}


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: entry for key, entry in value.items() if entry is not None}
        return value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_float32(value: float) -> float:
    # The cloud computes with float32: check and use the value that it will see.
    with np.errstate(over="ignore"):  # an infinity is refused by the field's bound
        return float(np.float32(value))


Real = Annotated[float, AfterValidator(_as_float32)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
StopStrings = Annotated[
    list[StopString], BeforeValidator(_as_list), Field(max_length=MAX_STOP_STRINGS)
]


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False  # accepted; there is nothing to obfuscate


class CompletionBody(_Body):
    """What chat and text completions have in common."""

    model: Annotated[str, Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=1)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Real, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[Real, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    min_p: Annotated[Real, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[Real, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[Real, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[Real, Field(gt=0, le=10)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] = Field(
        default_factory=lambda: secrets.randbits(64)
    )
    logit_bias: dict[str, Annotated[Real, Field(ge=-100, le=100)]] = {}
    stop: StopStrings = []
    # vLLM's extensions: further token ids that end the text, and end of sequence ignored.
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=2**31)]] = []
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {}
        for name, entry in value.items():
            if name in UNSUPPORTED and entry is not None:
                neutral = UNSUPPORTED[name]
                if not any(type(entry) is type(known) and entry == known for known in neutral):
                    raise RequestError(
                        f"Unsupported parameter: {name!r} is not supported here.",
                        name,
                        "unsupported_parameter",
                    )
            elif name not in HARMLESS:
                kept[name] = entry
        return kept

    @model_validator(mode="after")
    def _options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestError(
                "'stream_options' is only allowed when 'stream' is true.",
                "stream_options",
                "invalid_value",
            )
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The limit's name and value; None if the client set none."""
        return "max_tokens", self.max_tokens


class TextPart(_Body):
    type: Literal["text"]
    text: str


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(_Body):
    """One turn. Null `refusal`, `tool_calls` ... of an answer passed back are absent."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_as_parts), Field(min_length=1)]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As templates want it; parts are joined by line ends, as in vLLM."""
        message = {
            # OpenAI's newer word for the same thing, unknown to most templates.
            "role": "system" if self.role == "developer" else self.role,
            "content": "\n".join(part.text for part in self.content),
        }
        return message | ({"name": self.name} if self.name else {})


class ChatBody(CompletionBody):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one_token_limit(self) -> Self:
        if (
            None not in (both := (self.max_tokens, self.max_completion_tokens))
            and len(set(both)) > 1
        ):
            raise RequestError(
                "'max_tokens' and 'max_completion_tokens' differ; set one of them.",
                "max_tokens",
                "invalid_value",
            )
        return self

    @property
    def token_limit(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens


class TextBody(CompletionBody):
    """POST /v1/completions"""

    max_tokens: Annotated[int, Field(ge=1)] | None = 16  # OpenAI's default
    prompt: str | list[int]

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
            value = value[0]  # a batch of one
        if value in ("", []):
            raise RequestError("The prompt is empty.", "prompt", "empty_prompt")
        if isinstance(value, list) and isinstance(value[0], str | list):
            raise RequestError(
                "Only one prompt per request is supported.", "prompt", "unsupported_value"
            )
        is_tokens = isinstance(value, list) and all(type(entry) is int for entry in value)
        if not isinstance(value, str) and not is_tokens:
            raise RequestError(
                "Invalid type for 'prompt': expected a string or an array of token ids.",
                "prompt",
                "invalid_type",
            )
        return value


def parse(body_type: type[T], body: bytes) -> T:
    """A checked request body. Raises RequestError naming the parameter at fault."""
    try:
        value = pydantic_core.from_json(body)  # lets NaN through, so that its field is named
    except ValueError as error:
        raise RequestError(f"The body is not valid JSON: {error}", code="invalid_json") from None
    try:
        return body_type.model_validate(value)
    except ValidationError as error:
        raise _refusal(error) from None


# pydantic's kind of error -> OpenAI's code; every `*_type` is an invalid_type.
_CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "too_short": "empty_array",
    "too_long": "array_above_max_length",
    "string_too_short": "empty_string",
    "string_too_long": "string_above_max_length",
    "greater_than": "below_min_value",
    "greater_than_equal": "below_min_value",
    "less_than": "above_max_value",
    "less_than_equal": "above_max_value",
}


def _refusal(error: ValidationError) -> RequestError:
    """The first error in OpenAI's words."""
    first = error.errors(include_url=False, include_context=False)[0]
    kind, param = first["type"], _param(first["loc"])
    if kind == "missing":
        message = f"Missing required parameter: '{param}'."
    elif kind == "extra_forbidden":
        message = f"Unknown parameter: '{param}'."
    elif kind == "model_type" and not param:
        message = "The body must be a JSON object."
    else:
        message = f"Invalid value for '{param}': {first['msg']}."
    code = "invalid_type" if kind.endswith("_type") else _CODES.get(kind, "invalid_value")
    return RequestError(message, param or None, code)


def _param(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") -> "messages[0].role" """
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in location)
    return text.removeprefix(".")[:200]
