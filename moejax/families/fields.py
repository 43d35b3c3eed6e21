"""Typed reading of the fields of a config.json, with one clear line for a value of the wrong kind."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moejax.errors import MoejaxError


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object whose values are checked as they are read.

    An absent field takes the default. A null is an error unless the method's name says `optional`: in a config null and
    absent differ (an `eos_token_id` of null means none, an absent one the family's).
    """

    raw: Mapping[str, Any]
    prefix: str = ""

    def integer(self, name: str, default: int, minimum: int = 1) -> int:
        value = self.raw.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(name, f"must be a whole number of at least {minimum}")
        return value

    def optional_integer(self, name: str, default: int | None = None, minimum: int = 1) -> int | None:
        if self.raw.get(name, default) is None:
            return None
        return self.integer(name, default or 0, minimum)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0; with no default the field is required."""
        value = self.raw.get(name, default)
        if name not in self.raw and default is None:
            raise MoejaxError(f"config field {self.prefix}{name} is missing and has no default")
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
            raise self.error(name, "must be a number above 0")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return None if self.raw.get(name) is None else self.number(name)

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers; null and absent are empty."""
        value = self.raw.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or any(isinstance(v, bool) or not isinstance(v, int) for v in value):
            raise self.error(name, "must be a list of whole numbers or null")
        return tuple(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite numbers above 0; required."""
        value = self.raw.get(name)
        if not isinstance(value, list):
            raise self.error(name, "must be a list of numbers")
        return tuple(Fields({name: item}, self.prefix).number(name) for item in value)

    def error(self, name: str, complaint: str) -> MoejaxError:
        """The error for a field's value; `complaint` follows `config field name=value `."""
        return MoejaxError(f"config field {self.prefix}{name}={_show(self.raw.get(name))} {complaint}")


def _show(value: Any) -> str:
    """`value` as JSON on one line, cut where it would fill the screen."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 100 else text[:97] + "..."
