"""Steps of published models compiled for 8 H100s that are not there, and what their programs may do."""

import functools
import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from moejax.families import read_config
from moejax.model import Options
from moejax.planning import programs
from moejax.planning.collectives import collectives
from moejax.planning.hlo import Program
from moejax.planning.topologies import h100_mesh

MODELS = Path(__file__).parents[1] / "configs" / "models"
EP, TP, WIDTH = 4, 2, 2  # the mesh, and bytes of a bfloat16


@dataclass(frozen=True)
class Case:
    """The last layers of a model; `chunk` tokens of each prompt in prefill, or one token to decode."""

    model: str
    batch: int = 8
    chunk: int = 512
    room: int = 8192
    slices: int = 1

    @property
    def name(self):
        return f"{self.model}, {self.batch} x {self.chunk}, {self.slices} slices"

    @functools.cached_property
    def config(self):
        config = read_config(json.loads((MODELS / self.model / "config.json").read_text()))
        return replace(config, layers=config.layers[-1:])

    @property
    def moe(self):
        return self.config.layers[0].moe

    @property
    def cut(self):
        """Whether rows are cut over ep, and travel."""
        return self.batch % EP == 0

    @property
    def rows(self):
        """Of the batch on one device."""
        return self.batch // EP if self.cut else self.batch

    @property
    def tokens(self):
        return self.rows * self.chunk

    @property
    def exchanged(self):
        """Rows of one slice of the exchange, P C; without an exchange all pairs."""
        pairs = self.tokens * self.moe.num_experts_per_tok
        return EP * max(1, min(pairs, math.ceil(1.5 * pairs / (EP * self.slices)))) if self.cut else pairs

    @property
    def hidden(self):
        """F on one device."""
        return self.moe.intermediate_size // TP

    @property
    def vocabulary(self):
        """Of one tensor-parallel rank."""
        return math.ceil(self.config.vocab_size / TP)


@dataclass(frozen=True)
class Compiled:
    """A case's program, compiled and read."""

    case: Case
    executable: object
    program: Program
    moved: tuple


@functools.cache
def compiled(case):
    mesh, options = h100_mesh(f"ep={EP},tp={TP}"), Options(chunks=case.slices)
    arguments = {"batch": case.batch, "max_len": case.room, "options": options}
    if case.chunk > 1:
        run = programs.compile_prefill(case.config, mesh, chunk=case.chunk, **arguments)
    else:
        run = programs.compile_decode(case.config, mesh, **arguments)
    text = run.as_text()
    return Compiled(case, run, Program.parse(text), tuple(collectives(text, mesh)))


def documented_bytes(case):
    """Of the collectives' operands on one device, by kind, axes and dtype: the strategies' formulas, attention's sum,
    the embedding's, and what drawing a token takes. Second waves, which are rare, are in the program once more."""
    width, stream = case.config.hidden_size, case.tokens * case.config.hidden_size * WIDTH
    every = "+".join(["ep", "tp"])
    logits, drawn = 4 * case.rows * case.vocabulary, 4 * case.rows
    found = Counter()
    found["all-reduce", "tp", "bf16"] += stream  # of the embedding
    if case.cut:
        exchange = WIDTH * case.slices * case.exchanged * width  # n P C D w
        found["all-reduce", "tp", "bf16"] += stream  # of attention
        found["all-to-all", "ep", "bf16"] += 2 * (2 * exchange // TP)
        found["all-gather", "ep", "s32"] += 4 * case.moe.num_experts
        found["all-gather", "tp", "bf16"] += 2 * (exchange // TP) + stream // TP
        found["reduce-scatter", "tp", "bf16"] += 2 * exchange + (stream if case.moe.shared_intermediate_size else 0)
        found["all-gather", "tp", "f32"] += logits
        found["all-gather", "ep", "s32"] += drawn
    else:
        found["all-reduce", every, "bf16"] += 2 * stream  # of attention, and of the experts
        found["all-gather", every, "f32"] += logits // EP
    if case.chunk == 1:  # hosts agree on the steps to take, and devices on whether any row goes on
        found["all-gather", every, "s32"] += 4
        if case.cut:
            found["all-reduce", "ep", "pred"] += 1
    return found


def moved_bytes(moved):
    found = Counter()
    for collective in moved:
        found[collective.kind, "+".join(collective.axes), collective.dtype] += collective.bytes
    return found
