"""Processes of peers: asked, answering, failing, ended."""

import os
import sys
import time

import pytest

from moejax.benchmarks import peers
from moejax.benchmarks.peers import Child, check_installed, transformers_child
from moejax.errors import MoejaxError

ECHO = """
import json, os, sys
for line in sys.stdin:
    name, arguments = json.loads(line)
    if name == "die":
        sys.exit("it was too much")
    answer = {"error": "ValueError: no"} if name == "fail" else {"name": name, **arguments, "pid": os.getpid()}
    print(json.dumps(answer | {"threads": os.environ["OMP_NUM_THREADS"]}), flush=True)
"""


def test_a_child_answers_until_it_is_left():
    with Child(["-c", ECHO], threads=3) as child:
        answer = child.ask("hello", size=2)
        assert (answer["name"], answer["size"], answer["threads"]) == ("hello", 2, "3")
        with pytest.raises(MoejaxError, match="failed at fail: ValueError: no"):
            child.ask("fail")
        assert child.ask("again")["pid"] == answer["pid"]
        if sys.platform == "linux":
            assert 1e6 < child.memory("VmRSS") <= child.memory("VmHWM") < 1e9
    with pytest.raises(ProcessLookupError):
        os.kill(answer["pid"], 0)


def test_a_child_that_dies_leaves_its_last_words():
    with Child(["-c", ECHO], threads=1) as child:
        for _ in range(2):
            with pytest.raises(MoejaxError, match="failed at die: it ended: it was too much"):
                child.ask("die")


def test_a_child_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(peers, "_GRACE_S", 0.2)
    began = time.perf_counter()
    with Child(["-c", "import time; time.sleep(60)"], threads=1):
        pass
    assert time.perf_counter() - began < 30


def test_what_is_missing_is_one_line(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MoejaxError, match=r'--vs transformers needs torch and transformers; pip install "moejax\[par'):
        transformers_child()
    with pytest.raises(MoejaxError, match="needs torch and transformers and accelerate"):
        check_installed(processes=4)
