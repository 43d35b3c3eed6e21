"""What a run shows while it goes on: a line that changes on a terminal, else a line every few seconds."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from moejax import distributed
from moejax.training.metrics import Record, worst_load

EVERY = 5.0
"""Seconds between two lines where stderr is no terminal."""

_RECENT = 0.1  # weight of the newest step in the speed that is shown


class LiveProgress:
    """Watches a loop, on process 0's stderr.

    Attributes:
      seconds, targets: sums over the steps watched, but for the first, which compiles.
    """

    def __init__(self, console: Console, first: int, until: int) -> None:
        """Of steps `first` to `until`."""
        self.seconds, self.targets = 0.0, 0
        self._until, self._tokens, self._step_seconds = until, 0, 0.0
        self._shown = 0.0
        self._console = console
        self._live = console.is_terminal and distributed.is_main()
        columns = (
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(20),
            TextColumn("{task.description}"),
        )
        self._bar = Progress(*columns, console=console, disable=not self._live)
        self._task = self._bar.add_task("compiling the step", total=until, completed=first - 1)

    def __enter__(self) -> "LiveProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.stop()

    def record(self, record: Record) -> None:
        """Shows a step."""
        seconds, before = record["seconds"], self._tokens
        self._tokens = record["tokens"]
        if self._step_seconds:
            self.seconds += seconds
            self.targets += self._tokens - before
            seconds = (1 - _RECENT) * self._step_seconds + _RECENT * seconds if self.seconds > seconds else seconds
        self._step_seconds = seconds
        left = (self._until - record["step"]) * seconds if self.seconds else None
        text = _figures(record, left)
        self._bar.update(self._task, completed=record["step"], description=text)
        due = time.monotonic() - self._shown >= EVERY or record["step"] == self._until
        if not self._live and due:
            self.say(f"step {record['step']}/{self._until} {text}")
            self._shown = time.monotonic()
        if losses := [
            f"{name.removeprefix('eval/loss/')} {x:.4f}" for name, x in record.items() if "eval/loss/" in name
        ]:
            self.say(f"step {record['step']}: loss on {', '.join(losses)}")

    def warn(self, text: str) -> None:
        """A line that stays."""
        self.say(f"warning: {text}")

    def say(self, text: str) -> None:
        """A line that stays."""
        if distributed.is_main():
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _figures(record: Record, left: float | None) -> str:
    parts = [f"loss {record['loss']:.4f}", f"{_short(record['tokens_per_s'])} tokens/s"]
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.1%}")
    if load := worst_load(record):
        parts.append(f"load {load:.2f}")
    parts.append(f"dropped {record['dropped']}")
    if record["skipped"]:
        parts.append(f"skipped {record['skipped']}")
    if left is not None:
        parts.append(f"{_clock(left)} left")
    return "  ".join(parts)


def _short(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 10_000 else f"{value:.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
