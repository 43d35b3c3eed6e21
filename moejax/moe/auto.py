"""Which strategy runs, from static shapes alone, and why."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from moejax.errors import MoejaxError

Strategy: TypeAlias = Literal["auto", "all_to_all", "all_reduce"]
STRATEGIES: tuple[Strategy, ...] = ("auto", "all_to_all", "all_reduce")


@dataclass(frozen=True, slots=True)
class Choice:
    """A strategy and the reason for it, for people."""

    strategy: Literal["all_to_all", "all_reduce"]
    reason: str


def check_strategy(strategy: str) -> None:
    """Raises MoejaxError for a name that is no strategy."""
    if strategy not in STRATEGIES:
        raise MoejaxError(f"strategy {strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}")


def choose(strategy: str, rows: int, ep_size: int) -> Choice:
    """Picks the strategy for a block whose leading axis (batch, or tokens) has `rows` entries a data-parallel group.

    Tokens cut over the expert axis must travel to their experts; tokens that every device holds already need no
    exchange, only the sum at the end.

    Raises:
      MoejaxError: the name is no strategy.
    """
    check_strategy(strategy)
    if strategy != "auto":
        return Choice(strategy, "asked for")  # type: ignore[arg-type]
    if ep_size == 1:
        return Choice("all_reduce", "one device along ep holds all experts")
    if rows % ep_size:
        count = "a single row" if rows == 1 else f"{rows} rows"
        return Choice("all_reduce", f"ep={ep_size} does not divide {count}, so every device holds all tokens")
    return Choice("all_to_all", f"{rows} rows are cut over ep={ep_size}, so tokens travel to their experts")
