"""What a process says it holds."""

import subprocess
import sys

from moejax.process_memory import peak_rss

MEGABYTE = 2**20


def test_the_peak_is_that_of_the_process_alone():
    """A process that is started by a large one begins small."""
    before = peak_rss()
    held = b"\1" * (before + 800 * MEGABYTE)
    assert peak_rss() > before + 700 * MEGABYTE
    program = "from moejax.process_memory import peak_rss; print(peak_rss())"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 10 * MEGABYTE < int(child.stdout) < len(held) - 100 * MEGABYTE
