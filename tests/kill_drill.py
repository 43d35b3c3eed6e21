"""Trains in another process and kills it, at a moment of one's choice, as often as one likes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from conftest import ROOT, environment
from tiny_configs import CONFIGS

import moejax
from moejax.run_checkpoints.stored import StoredState, saved_steps
from moejax.training.sinks import read_records

# 6 experts of width 19, 6 heads on 1 key/value head, an odd vocabulary: no mesh divides them.
RAW = CONFIGS["qwen3_yarn"] | {"num_hidden_layers": 1, "mlp_only_layers": [], "vocab_size": 4099}
RECIPE = """
steps = 200
dtype = "float32"
[model]
config = "{root}/model/config.json"
[data]
batch = 8
length = 16
mixture = [{{ path = "{root}/text.txt" }}]
[optimizer]
lr = 1e-2
warmup = 4
[losses]
z_weight = 1e-3
[checkpoint]
every = {every}
keep_last = 4
[metrics]
tensorboard = false
"""
WORDS = "the king said that his house stood by the sea and all the people came to see it".split()
UNFINISHED = "orbax-checkpoint-tmp"
MESH = "ep=4,tp=2"
Moment = Callable[[], bool]


class Kill(NamedTuple):
    """Whether a run was killed, and not at its end before, and whether it was saving then."""

    done: bool
    in_save: bool


class Drill:
    """A recipe, and runs of it below `root`."""

    def __init__(self, root: Path, every: int):
        self.root, self.every, self.log = root, every, root / "log.txt"
        rng = np.random.default_rng(0)
        model = root / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps(RAW))
        (model / "tokenizer.json").write_bytes((Path(moejax.__file__).parent / "demo" / "tokenizer.json").read_bytes())
        texts = (" ".join(rng.choice(WORDS, 30)) for _ in range(60))
        (root / "text.txt").write_text("".join(f"{text}\n<|endoftext|>\n" for text in texts))
        (root / "recipe.toml").write_text(RECIPE.format(root=root, every=every))
        # Each process finds the programs of the one before it, which makes the drill several times as fast.
        cached = {"JAX_ENABLE_COMPILATION_CACHE": "true", "XDG_CACHE_HOME": str(root / "cache")}
        self.environment = environment(cached)

    def start(self, run: str, steps: int, mesh: str) -> subprocess.Popen[str]:
        arguments = ["--run", str(self.root / run), "--steps", str(steps), "--mesh", mesh, "--resume"]
        command = [sys.executable, "-m", "moejax.train", "--config", str(self.root / "recipe.toml"), *arguments]
        with self.log.open("w") as log:
            return subprocess.Popen(command, env=self.environment, cwd=ROOT, stdout=log, stderr=log, text=True)

    def finish(self, run: str, steps: int, mesh: str = MESH) -> None:
        """Begins or continues a run, up to and with a step."""
        process = self.start(run, steps, mesh)
        try:
            assert process.wait(timeout=600) == 0, self.log.read_text()
        finally:
            process.kill()

    def kill(self, run: str, steps: int, moment: Moment) -> Kill:
        """Begins or continues a run and kills it when `moment` has come.

        Also checks that it continued from the newest save, and that what it leaves is sound.
        """
        before, older = self.saved(run), self.unfinished(run)
        process = self.start(run, steps, MESH)
        deadline = time.monotonic() + 600
        while process.poll() is None and not moment():
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        process.kill()
        code = process.wait()
        log = self.log.read_text()
        assert code in (0, -signal.SIGKILL), log
        if "resuming" in log:
            assert (f"after step {before[-1]}" if before else "has no save yet") in log
        done = max([record["step"] for record in self.records(run)], default=0)
        newest = max(self.saved(run), default=0)
        # A save begins after the record of its step, and waits for the one before it.
        assert newest >= ((done - 1) // self.every - 1) * self.every
        assert newest >= max(before, default=0)
        if newest:
            self.state(run, newest)
        return Kill(code != 0, bool(self.unfinished(run) - older))

    def saved(self, run: str) -> list[int]:
        return saved_steps(self.root / run / "checkpoints")

    def unfinished(self, run: str) -> set[tuple[str, int]]:
        """Name and inode of what saves have written that are not finished."""
        folder = self.root / run / "checkpoints"
        entries = os.scandir(folder) if folder.is_dir() else ()
        return {(entry.name, entry.inode()) for entry in entries if UNFINISHED in entry.name}

    def after_start(self, seconds: float) -> Moment:
        """So long after now, or with the first step."""
        end = time.monotonic() + seconds
        return lambda: time.monotonic() > end

    def in_step(self, run: str, count: int, delay: float) -> Moment:
        """A time after so many more steps."""
        first = len(self.records(run))
        return _delayed(lambda: len(self.records(run)) >= first + count, delay)

    def in_save(self, run: str, count: int, delay: float) -> Moment:
        """A time after so many more saves have begun."""
        before, seen = self.unfinished(run), set()

        def begun() -> bool:
            seen.update(self.unfinished(run) - before)
            return len(seen) >= count

        return _delayed(begun, delay)

    def records(self, run: str) -> list[dict]:
        file = self.root / run / "metrics.jsonl"
        return read_records(file) if file.exists() else []

    def state(self, run: str, step: int) -> dict[str, np.ndarray]:
        """Every array of a checkpoint."""
        stored = StoredState.open(self.root / run / "checkpoints" / str(step))
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device) for name, leaf in stored.arrays.items()
        }
        return {name: np.asarray(array) for name, array in stored.read(wanted).items()}


def _delayed(event: Moment, delay: float) -> Moment:
    """True from `delay` seconds after the event on."""
    seen: list[float] = []

    def due() -> bool:
        if not seen and event():
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() >= seen[0] + delay

    return due
