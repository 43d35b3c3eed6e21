"""The transformers that is installed, in processes of its own: started, asked, ended."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from moejax.errors import MoejaxError
from moejax.process_memory import stated_memory

_SCRIPT = Path(__file__).with_name("transformers_child.py")
_NEEDS = ("torch", "transformers")
_GRACE_S = 5.0


def cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> float:
    """Processes that wanted a core, on average over the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def check_installed(processes: int = 1) -> None:
    """Raises MoejaxError where what a comparison needs is not installed."""
    # transformers splits a model over processes only where accelerate is there.
    needs = (*_NEEDS, "accelerate") if processes > 1 else _NEEDS
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        raise MoejaxError(f'--vs transformers needs {" and ".join(missing)}; pip install "moejax[parity]"')


class Child:
    """A process that answers one JSON line to each, ended with the `with` block however that is left."""

    def __init__(self, command: list[str], threads: int):
        self._log = tempfile.TemporaryFile("w+")
        # A session of its own, so that Ctrl-C reaches this process alone, and all that it started can be ended at once.
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        # torchrun ends its processes when it is terminated, and cannot when it is killed.
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                self._process.wait(_GRACE_S)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                os.killpg(self._process.pid, sign)
        self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def ask(self, name: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
          MoejaxError: the child could not do it, or has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([name, arguments]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": f"it ended: {self._last_words()}"}
        if "error" in answer:
            raise MoejaxError(f"the other process failed at {name}: {answer['error']}")
        return answer

    def memory(self, field: str) -> int:
        """See `stated_memory`."""
        return stated_memory(field, self._process.pid)

    def _last_words(self) -> str:
        self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1] if lines else f"exit code {self._process.returncode}"


def transformers_child(processes: int = 1, device: str = "cpu") -> Child:
    """transformers in one process with all cores, on "cpu" or "cuda", or under torchrun in several on CPU (gloo).

    Raises:
      MoejaxError: it is not installed.
    """
    check_installed(processes)
    threads = max(1, cpus() // processes)
    if processes == 1:
        return Child([str(_SCRIPT), device], threads)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return Child([*launch, str(_SCRIPT), device], threads)
