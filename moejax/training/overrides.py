"""`--set optimizer.lr=3e-4`: changes of single fields of a recipe."""

import copy
import dataclasses
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_origin

from moejax.errors import MoejaxError
from moejax.training import tables
from moejax.training.recipe import Recipe


def overridden(raw: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """A recipe's tables with fields replaced; the last setting of a field counts.

    Args:
      raw: as from `read_recipe`.
      settings: "name=value", the name of any field with its tables, an entry of a list by its number from 0
        (`data.mixture.0.weight=2`). The value is TOML; a string needs no quotes.

    Raises:
      MoejaxError: no such field, with the nearest there is; a value that is no TOML. Whether it is of the right kind
        is found when the recipe is made.
    """
    changed = copy.deepcopy(dict(raw))
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise MoejaxError(f"--set {setting}: write it as NAME=VALUE, such as --set optimizer.lr=3e-4")
        _assign(changed, name.strip(), text.strip())
    return changed


def _assign(raw: dict[str, Any], name: str, text: str) -> None:
    place: Any = raw
    kind: Any = Recipe
    *tables_on_the_way, last = name.split(".")
    for part in tables_on_the_way:
        kind = _kind_of(kind, part, name)
        place = _entry(place, part, name) if isinstance(place, list) else place.setdefault(part, _empty(kind))
        if not isinstance(place, (dict, list)):
            raise _unknown(name)
    kind = _kind_of(kind, last, name)
    value = _parse(text, kind, name)
    if isinstance(place, list):
        _entry(place, last, name)
        place[int(last)] = value
    else:
        place[last] = value


def _kind_of(kind: Any, part: str, name: str) -> Any:
    if get_origin(kind) is tuple and part.isascii() and part.isdigit():
        return get_args(kind)[0]
    fields = tables.field_types(kind) if dataclasses.is_dataclass(kind) else {}
    if part not in fields:
        raise _unknown(name)
    return fields[part]


def _empty(kind: Any) -> dict[str, Any] | list[Any]:
    return [] if get_origin(kind) is tuple else {}


def _entry(entries: list[Any], part: str, name: str) -> Any:
    if int(part) >= len(entries):
        raise MoejaxError(f"--set {name}: there are {len(entries)} entries, numbered from 0")
    return entries[int(part)]


def _unknown(name: str) -> MoejaxError:
    return MoejaxError(f"--set {name}: {tables.unknown(name, list(tables.full_names(Recipe)))}")


def _parse(text: str, kind: Any, name: str) -> Any:
    if kind is str and not text.startswith(('"', "'")):
        return text
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    if parsed.keys() != {"value"}:
        raise MoejaxError(f"--set {name}={text}: the value is no TOML; write 3, 0.5, true, text or [1, 2]")
    return parsed["value"]
