"""How much memory a process holds."""

import resource
import sys
from pathlib import Path

from moejax.errors import MoejaxError


def stated_memory(field: str, process: int | str = "self") -> int:
    """Bytes that Linux states of a process: "VmRSS", or "VmHWM", its peak. Both count mapped files.

    Raises:
      MoejaxError: the system does not state it, or not of this process.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError as error:
        raise MoejaxError("the memory of a process is read from /proc, which this system has not") from error
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise MoejaxError(f"this system states no {field} of a process")


def peak_rss() -> int:
    """The most bytes of memory that this process has held.

    getrusage's count is the second choice: it begins with what the parent held when it started this process.
    """
    try:
        return stated_memory("VmHWM")
    except MoejaxError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
