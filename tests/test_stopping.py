"""Stopping: a signal is noted while the main thread computes, and a second one ends the process at once."""

import signal
import subprocess
import sys
import threading

import pytest

from moejax.training.stopping import CommonStop, StopRequest

CHILD = """
import hashlib, sys
from moejax.training.stopping import StopRequest
with StopRequest() as request:
    print("ready", flush=True)
    # Without the interpreter's lock, as compiled steps run; no Python handler would be called in it.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 30_000_000)
    print("noted", request.noted, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_a_second_one_ends_the_process_in_the_middle_of_a_computation(number):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        assert child.stderr.readline().startswith(f"{number.name}: saving at the end of this step")
        child.send_signal(number)
        out, err = child.communicate(timeout=20)
    finally:
        child.kill()
    assert (child.returncode, out, err) == (128 + number, "", "")


def test_the_loop_sees_it_before_the_next_step_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as request:
        stop = CommonStop(request)
        assert stop.after(1) is None
        signal.raise_signal(signal.SIGTERM)
        for _ in range(1000):
            if request.noted:
                break
            threading.Event().wait(0.01)
        assert stop.after(2) == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_of_the_main_thread_no_handler_is_set():
    seen = []

    def enter():
        with StopRequest() as request:
            seen.append((request.noted, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def test_several_processes_stop_after_the_same_step(monkeypatch):
    """Two processes, at most one step apart; the one that is asked names a step that neither has begun."""
    from moejax import distributed

    said: dict[str, str] = {}
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "announce", lambda what, value: said.setdefault(what, value))
    monkeypatch.setattr(distributed, "announced", said.get)
    asked, other = StopRequest(), StopRequest()
    stops = {"asked": CommonStop(asked), "other": CommonStop(other)}
    asked._noted = signal.SIGTERM
    assert stops["other"].after(12) is None
    assert stops["asked"].after(11) is None
    assert [stops["other"].after(step) for step in (13, 14)] == [None, signal.SIGTERM]
    assert [stops["asked"].after(step) for step in (12, 13, 14)] == [None, None, signal.SIGTERM]
