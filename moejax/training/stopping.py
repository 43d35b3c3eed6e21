"""Ending a run when it is asked to, at the end of the running step and on every process at the same one."""

import contextlib
import os
import signal
import socket
import sys
import threading
from types import TracebackType

from moejax import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """SIGTERM or Ctrl-C, noted while the context is entered. A second one ends the process at once.

    A thread of its own notes them: Python's handlers would wait for the compiled step that the main thread is in, and
    of two signals in that time would see one.
    """

    def __init__(self) -> None:
        self._noted: int | None = None
        self._left = contextlib.ExitStack()

    @property
    def noted(self) -> int | None:
        """The signal's number once there was one."""
        return self._noted

    def __enter__(self) -> "StopRequest":
        # Python lets no other thread have handlers.
        if threading.current_thread() is threading.main_thread():
            inner, outer = socket.socketpair()
            listener = threading.Thread(target=self._listen, args=(inner,), daemon=True)
            listener.start()
            self._left.callback(listener.join)
            self._left.callback(outer.close)
            outer.setblocking(False)
            self._left.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(outer.fileno(), warn_on_full_buffer=False))
            for number in SIGNALS:
                self._left.callback(signal.signal, number, signal.signal(number, lambda *_: None))
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._left.close()

    def _listen(self, inner: socket.socket) -> None:
        with inner:
            while received := inner.recv(1):
                number = received[0]
                if number not in SIGNALS:
                    continue
                if self._noted is not None:
                    os._exit(128 + number)
                self._noted = number
                name = signal.Signals(number).name
                print(f"{name}: saving at the end of this step; once more ends at once", file=sys.stderr, flush=True)


class CommonStop:
    """The step after which all processes of a launch stop, once one of them was asked to.

    A process that is asked says so where the others look before each step, naming a step that none of them has begun:
    processes wait for one another in every step, and none begins a step before it has read the results of the last but
    one.
    """

    AHEAD = 3

    def __init__(self, request: StopRequest) -> None:
        self._request = request
        self._said = False

    def after(self, step: int) -> int | None:
        """Called before each step by every process: the signal for which to stop instead of taking `step`, or None."""
        if distributed.process_count() == 1:
            return self._request.noted
        if self._request.noted is not None and not self._said:
            self._said = True
            distributed.announce("stop", f"{step + self.AHEAD} {self._request.noted}")
        if (said := distributed.announced("stop")) is None:
            return None
        last, number = map(int, said.split())
        return number if step >= last else None
