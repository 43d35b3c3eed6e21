"""Loading a checkpoint, each time in a fresh process: seconds, and the most memory over the bytes of the weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moejax.benchmarks.interleave import Spread, interleave
from moejax.benchmarks.peers import Child, cpus, transformers_child

OWN, PEER = "moejax", "transformers"


@dataclass(frozen=True, slots=True)
class Target:
    """Where moejax loads to: the mesh, such as "ep=1,tp=1", and whether MXFP4 experts stay packed."""

    mesh: str
    packed: bool


@dataclass(frozen=True, slots=True)
class Loaded:
    """One load: seconds without imports, bytes of the most memory, and of it what was there before the load."""

    seconds: float
    peak: int
    before: int


@dataclass(frozen=True, slots=True)
class LoadFigures:
    """One contender over the rounds; memory is of the worst round.

    Attributes:
      peak: bytes, interpreter and libraries included.
      ratio: what loading added at its peak, over the bytes of the weights files.
    """

    seconds: Spread
    peak: int
    ratio: float


def measure_loading(
    folder: Path, dtype: str, target: Target, versus: bool, rounds: int, tick: Callable[[str, int], None]
) -> dict[str, LoadFigures]:
    """moejax on a CPU mesh, and transformers on one process, in turn. The first, unmeasured round leaves the files in
    the system's page cache, so that every measured load reads memory and none the disk.

    Args:
      folder: of the checkpoint.
      dtype: of the parameters, as torch and JAX spell it.
      target: of moejax.
      versus: whether transformers takes part.
      rounds: see `interleave`.
      tick: see `interleave`.

    Raises:
      MoejaxError: a child failed, or memory cannot be read here.
    """
    contenders: dict[str, Callable[[], Loaded]] = {OWN: lambda: _own(folder, dtype, target)}
    if versus:
        contenders[PEER] = lambda: _peer(folder, dtype)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {
        name: LoadFigures(
            Spread.of([load.seconds for load in loads]),
            max(load.peak for load in loads),
            max(load.peak - load.before for load in loads) / weights,
        )
        for name, loads in interleave(contenders, rounds, tick).items()
    }


def _own(folder: Path, dtype: str, target: Target) -> Loaded:
    command = ["-m", "moejax.benchmarks.loading_child", target.mesh, "packed" if target.packed else "plain"]
    return _load(Child(command, cpus()), folder, dtype)


def _peer(folder: Path, dtype: str) -> Loaded:
    return _load(transformers_child(), folder, dtype)


def _load(child: Child, folder: Path, dtype: str) -> Loaded:
    with child:
        child.ask("hello")
        before = child.memory("VmRSS")
        seconds = child.ask("load", folder=str(folder.resolve()), dtype=dtype)["load_s"]
        return Loaded(seconds, child.memory("VmHWM"), before)
