"""Settings: validated, frozen values, the types of their fields, and the one exception for bad input.

Each part of the package declares its settings beside its code, in its `registry.py` or `settings.py`; `experiment.py`
composes them. Nothing here imports torch or ray, so a typing mistake is reported at once.
"""

from __future__ import annotations

import json
import os
import stat
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_after_validator_function

MAX_JSON_BYTES = 64 << 20
"""Limit of one file. The largest is a checkpoint's `state.json`, with a row for each epoch: 100,000 epochs fit."""


def printable(text: object, limit: int | None = None) -> str:
    """Text that a terminal shows as it is, on one line.

    Line breaks, escape sequences, characters that change the direction of writing and bytes that are not UTF-8 become
    escapes such as `\\x1b`. Text from a store, a file or a command line passes through this function before it is
    printed.

    Args:
        text: to be shown.
        limit: characters to show; a longer text ends in `...`.
    """
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
    return shown if limit is None or len(shown) <= limit else shown[: limit - 3] + "..."


def printable_lines(text: object) -> str:
    """As `printable`, for text of several lines."""
    return "\n".join(map(printable, str(text).split("\n")))


def one_line(error: BaseException, limit: int = 200) -> str:
    """The text of an exception on one printable line; its class name if it has no text."""
    return printable(" ".join(str(error).split()) or type(error).__name__, limit)


class InvalidInput(ValueError):
    """A value that cannot be used. Its text is one line: the field, the value, and what is allowed."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown fields, no type conversions, no NaN."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


# --------------------------------------------------------------------------------------- field types


def as_tuple(value: Any) -> Any:
    """Accept a single number, or numbers separated by commas (`0.1,0.2`), as a tuple."""
    if isinstance(value, str):
        try:
            return tuple(json.loads(part) for part in value.split(","))
        except (json.JSONDecodeError, RecursionError):
            return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (value,)
    return value


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
CountOrNone = Annotated[int, Field(ge=0, le=1_000)]
Rate = Annotated[float, Field(gt=0, le=100)]
Decay = Annotated[float, Field(ge=0, le=1)]
Pixels = Annotated[float, Field(gt=0, le=1)]
Strengths = Annotated[tuple[Pixels, ...], BeforeValidator(as_tuple), Field(min_length=1)]
Counts = Annotated[tuple[Count, ...], BeforeValidator(as_tuple), Field(min_length=1)]
PerChannel = Annotated[tuple[float, ...], BeforeValidator(as_tuple), Field(min_length=1)]
Spreads = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(as_tuple), Field(min_length=1)]


@dataclass(frozen=True)
class OneOf:
    """Annotation of a field that holds a name of a registry; `--help-fields` lists the names.

    Attributes:
        names: returns the allowed names. A function, because a registry may be declared after the field.
    """

    names: Callable[[], Iterable[str]]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def _check(self, name: str) -> str:
        if name not in (allowed := list(self.names())):
            raise ValueError(f"allowed are {', '.join(allowed)}")
        return name


# --------------------------------------------------------------------------------------------- text and JSON


def to_text(value: Any) -> str:
    """A field's value as text, as in an assignment `FIELD=VALUE`."""
    if isinstance(value, list | tuple):
        values = [item.model_dump(mode="json") if isinstance(item, Settings) else item for item in value]
        return json.dumps(values) if any(isinstance(item, Mapping) for item in values) else ",".join(map(str, values))
    return value if isinstance(value, str) else json.dumps(value)


def flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names."""
    flattened: dict[str, Any] = {}
    for name, value in fields.items():
        flattened |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flattened


def first_error(error: ValidationError) -> str:
    """The first error of a validation as one line: field, value, and what is allowed."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "experiment"
    if first["type"] == "extra_forbidden":
        return f"{field}: no such field; --help-fields lists them all"
    allowed = first["msg"].removeprefix("Value error, ").replace("\n", " ")
    if isinstance(first["input"], dict):
        return f"{field}: {allowed}"
    value = repr(first["input"])
    return f"{field}: {value if len(value) <= 80 else value[:77] + '...'} cannot be used: {allowed}"


def regular_file(path: str, field: str) -> os.stat_result:
    """The status of a file that can be read to its end; pipes and devices have none.

    Args:
        path: of the file.
        field: that names it, for the message.

    Raises:
        InvalidInput: if there is no such file, or it is not a regular one.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte, or characters that no path can have
        raise InvalidInput(f"{field}: {path!r} cannot be read: {getattr(error, 'strerror', error)}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe, a socket or a device"
        raise InvalidInput(f"{field}: {path!r} cannot be read: it is {kind}; allowed is a regular file")
    return status


# ---------------------------------------------------------------------------------------------- --help-fields


@dataclass(frozen=True)
class FieldDescription:
    """One field: its dotted name, its type in words, its default (the paper's), its meaning; `entries`: the fields of
    each entry, if it is a list of settings."""

    name: str
    type: str
    default: str
    meaning: str
    entries: tuple[FieldDescription, ...] = ()


def describe(part: type[BaseModel], prefix: str = "") -> Iterator[FieldDescription]:
    """Every field of settings and of the settings below them, in order."""
    for name, info in part.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from describe(info.annotation, f"{prefix}{name}.")
        else:
            text = "required" if info.is_required() else _default_in_words(info.default)
            meaning = " ".join((info.description or "").split())
            # pydantic takes the outermost Annotated apart.
            annotation = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
            (first, *_) = get_args(info.annotation) or (None,)
            entries = tuple(describe(first)) if isinstance(first, type) and issubclass(first, BaseModel) else ()
            yield FieldDescription(prefix + name, _type_in_words(annotation), text, meaning, entries)


def _default_in_words(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in default)
    return f"{default:.4g}" if isinstance(default, float) else json.dumps(default)


def _type_in_words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        choices = next((item for item in arguments[1:] if isinstance(item, OneOf)), None)
        return "|".join(choices.names()) if choices else _type_in_words(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _type_in_words(a) for a in arguments)
    if origin is tuple:
        return f"{_type_in_words(arguments[0])},..."
    if origin is Literal:
        return "|".join(map(str, arguments))
    if issubclass(annotation, BaseModel):
        return "{" + ",".join(annotation.model_fields) + "}"
    return {"int": "integer", "float": "number", "bool": "true|false", "str": "text"}[annotation.__name__]
