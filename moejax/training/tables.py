"""Frozen dataclasses from TOML tables and back: every value checked, every mistake named with its full name."""

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from moejax.errors import MoejaxError

T = TypeVar("T")
_KINDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def read(kind: type[T], table: Mapping[str, Any], prefix: str = "") -> T:
    """The dataclass `kind` from a table. Its fields are of str, int, float, bool, dataclasses, and tuples of them.

    A field of such a type or None is None where it is left out.

    Raises:
      MoejaxError: a name that is no field, a value of the wrong kind, or what the dataclasses themselves refuse.
    """
    hints = field_types(kind)
    for name in table:
        if name not in hints:
            raise MoejaxError(unknown(f"{prefix}{name}", list(full_names(kind, prefix))))
    values = {name: _value(hints[name], value, f"{prefix}{name}") for name, value in table.items()}
    missing = [f.name for f in dataclasses.fields(kind) if f.name not in values and _required(f)]  # type: ignore[arg-type]
    if missing:
        raise MoejaxError(f"{prefix}{missing[0]} is missing; set it")
    return kind(**values)


def write(record: Any) -> str:
    """TOML that `read` makes the same record of: plain values first, then a table for each dataclass in it."""
    return "\n".join(_lines(record, ""))


def field_types(kind: type) -> dict[str, Any]:
    """Field -> type, without its `| None`."""
    hints = get_type_hints(kind)
    return {f.name: _some(hints[f.name]) for f in dataclasses.fields(kind)}


def full_names(kind: type, prefix: str = "") -> Iterator[str]:
    """Every field that holds a value, such as "optimizer.lr"; of lists, those of the first entry too."""
    for name, field_type in field_types(kind).items():
        if dataclasses.is_dataclass(field_type):
            yield from full_names(field_type, f"{prefix}{name}.")  # type: ignore[arg-type]
            continue
        yield f"{prefix}{name}"
        if get_origin(field_type) is tuple and dataclasses.is_dataclass(entry := get_args(field_type)[0]):
            yield from full_names(entry, f"{prefix}{name}.0.")  # type: ignore[arg-type]


def unknown(name: str, names: list[str]) -> str:
    """What is wrong with a name that is none of `names`, with the nearest of them."""

    def likeness(other: str) -> float:
        whole = difflib.SequenceMatcher(None, name, other).ratio()
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2], other.rpartition(".")[2]).ratio()
        return whole + last

    nearest = max(names, key=likeness)
    table = nearest.rpartition(".")[0]
    others = ", ".join(other for other in names if other.rpartition(".")[0] == table)
    return f"there is no field {name}; did you mean {nearest}? (there are {others})"


def _some(kind: Any) -> Any:
    return (
        next(one for one in get_args(kind) if one is not types.NoneType)
        if get_origin(kind) is types.UnionType
        else kind
    )


def _required(field: Any) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(kind: Any, value: Any, name: str) -> Any:
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise MoejaxError(f"{name}={shown(value)} must be a list")
        return tuple(_value(get_args(kind)[0], item, f"{name}.{index}") for index, item in enumerate(value))
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise MoejaxError(f"{name}={shown(value)} must be a table of fields")
        return read(kind, value, f"{name}.")  # type: ignore[arg-type]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise MoejaxError(f"{name}={shown(value)} must be {_KINDS[kind]}")
    if kind is float and not math.isfinite(value):
        raise MoejaxError(f"{name}={value} must be finite")
    return value


def shown(value: Any) -> str:
    """A value as TOML writes it, as well as one line can."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float, list, tuple)):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return "[" + ", ".join(map(shown, value)) + "]" if isinstance(value, (list, tuple)) else repr(value)


def _lines(record: Any, prefix: str) -> Iterator[str]:
    nested = []
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if dataclasses.is_dataclass(value):
            nested.append((f"[{prefix}{field.name}]", value, f"{prefix}{field.name}."))
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            nested += [(f"[[{prefix}{field.name}]]", item, f"{prefix}{field.name}.") for item in value]
        elif value is not None:
            yield f"{field.name} = {shown(value)}"
    for title, value, inner in nested:
        yield ""
        yield title
        yield from _lines(value, inner)
