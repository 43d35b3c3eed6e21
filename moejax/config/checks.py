"""Checks that configs share."""

from moejax.errors import MoejaxError


def positive(name: str, value: int) -> None:
    if value < 1:
        raise MoejaxError(f"{name}={value} must be at least 1")
