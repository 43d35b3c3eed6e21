"""Which files are read, and how often each."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from moejax.errors import MoejaxError

_STORED = re.compile(r"(?<=.)(\.(train|valid|txt|jsonl|xz|gz))+$")


@dataclass(frozen=True, slots=True)
class Source:
    """A file of documents (see `read_documents`) and its share of a mixture.

    Attributes:
      path: of the file.
      weight: the share of rows that come from it is this over the sum of all weights, which grain rounds down to
        hundredths of the smallest.
      name: what tables and curves call it.

    Raises:
      MoejaxError: the weight is not a positive number.
    """

    path: str
    weight: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise MoejaxError(f"{self.path}: weight {self.weight} must be above 0; leave the file out instead")
        if not self.name:
            object.__setattr__(self, "name", short_name(self.path))


def short_name(path: str | Path) -> str:
    """The file's name without what says how it is stored: "chat" of data/chat.train.txt.xz."""
    return _STORED.sub("", Path(path).name)
