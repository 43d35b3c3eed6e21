"""Several processes running one program: start, agreement before the first collective, and a clean end.

All that one process tells another before a JAX backend runs goes through the key-value store of JAX's coordination
service. JAX has no public name for its client, so this file, and no other, reaches into `jax._src`.
"""

import functools
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from jax._src.distributed import global_state
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Shaped

from moejax import rendezvous
from moejax.errors import MoejaxError

JOIN_SECONDS = 60
# A peer that is killed is noticed after this long (JAX: 100); compiling does not delay heartbeats, they have a thread.
HEARTBEAT_SECONDS = 30
# How long a process that failed waits for the others to fail too (a mistake in the shared arguments fails everywhere).
FAREWELL_SECONDS = 10
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
_SLURM_VARIABLES = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_FLAGS = "--coordinator HOST:PORT, --num-processes N and --process-id I"
_calls: dict[str, int] = {}


def process_count() -> int:
    """Processes of this launch; unlike `jax.process_count` it starts no backend."""
    return global_state.num_processes if global_state.client else 1


def process_index() -> int:
    """This process' number, from 0; unlike `jax.process_index` it starts no backend."""
    return global_state.process_id if global_state.client else 0


def is_main() -> bool:
    """Whether this is process 0, the only one that prints results."""
    return process_index() == 0


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes of this launch; must come before anything starts a JAX backend.

    The arguments are those of the command line, all three or none. Without them JAX finds the processes that SLURM,
    Open MPI or an indexed Kubernetes job started; where there are none of those this does nothing.

    Raises:
        MoejaxError: arguments missing or out of range, torchrun, or processes that do not come together.
    """
    given = (coordinator, num_processes, process_id)
    _refuse_torchrun(explicit=None not in given)
    if given == (None, None, None):
        if launcher := _launcher():
            _initialize(f"the processes that {launcher} started", initialization_timeout=300)
        return
    if coordinator is None or num_processes is None or process_id is None:
        pairs = zip(("--coordinator", "--num-processes", "--process-id"), given, strict=True)
        missing = " and ".join(name for name, value in pairs if value is None)
        raise MoejaxError(f"{missing} missing: several processes need all of {_FLAGS}")
    host, port = rendezvous.host_port(coordinator)
    if num_processes < 1:
        raise MoejaxError(f"--num-processes {num_processes} must be at least 1")
    if not 0 <= process_id < num_processes:
        raise MoejaxError(
            f"--process-id {process_id} must be from 0 to {num_processes - 1} (--num-processes {num_processes})"
        )
    if num_processes == 1:
        return
    if process_id == 0:
        rendezvous.await_peers(port, num_processes, JOIN_SECONDS)
    else:
        rendezvous.meet_main(host, port, num_processes, process_id, JOIN_SECONDS)
    _initialize(
        f"the {num_processes} processes at {coordinator}",
        coordinator_address=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        cluster_detection_method="deactivate",
        initialization_timeout=JOIN_SECONDS,
    )


def agree(fields: Mapping[str, str]) -> None:
    """Compares `fields` (say code, config and mesh) between all processes; call it before the first collective.

    Raises:
        MoejaxError: on every process alike, naming the field, the processes and their values.
    """
    everyone: list[dict[str, str]] = [json.loads(text) for text in _gather("agree", json.dumps(dict(fields)))]
    for name in sorted(set().union(*everyone)):
        values = [theirs.get(name, "nothing") for theirs in everyone]
        other = next((process for process, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise MoejaxError(
                f"the processes disagree on {name}: process 0 has {values[0]}, process {other} has {values[other]}; "
                f"start all of them with the same {name}"
            )


def share(value: bytes | None) -> bytes:
    """Process 0's bytes on every process; the others pass None."""
    if process_count() == 1:
        assert value is not None
        return value
    key = _key("share")
    if is_main():
        assert value is not None
        _client().key_value_set_bytes(key, value)
        return value
    return _wait_for(key)


def barrier() -> None:
    """Waits until every process is here. Starts no backend."""
    _gather("barrier", "")


def announce(what: str, value: str) -> None:
    """Tells all processes once and for all; of several announcements of the same the first one counts."""
    try:
        _client().key_value_set(f"moejax/announced/{what}/value", value)
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise


def announced(what: str) -> str | None:
    """What was announced, or None if nothing was so far; does not wait."""
    found = _client().key_value_dir_get(f"moejax/announced/{what}")
    return found[0][1] if found else None


def code_hash() -> str:
    """16 hex digits over the names and contents of the package's Python files."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def quiet_stdout() -> TextIO:
    """Points file descriptor 1 at stderr and returns a stream on the real stdout.

    Gloo, in C++, prints a line on descriptor 1 of every process, which would spoil a result such as JSON. Call it
    before a backend starts; `sys.stdout` itself then leads to stderr.
    """
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(real, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)


def replicated_to_host(x: jax.Array) -> Shaped[np.ndarray, "..."]:
    """The whole array on this host, also when other processes hold parts of it; then all must call this together."""
    if x.is_fully_addressable:
        return np.asarray(x)
    if not x.is_fully_replicated:
        assert isinstance(x.sharding, NamedSharding)
        x = _replicate(NamedSharding(x.sharding.mesh, PartitionSpec()))(x)
    return np.asarray(x.addressable_data(0))


def finish() -> None:
    """Leaves the launch at its normal end: waits for the others, then disconnects."""
    if process_count() > 1:
        jax.distributed.shutdown()


def fail(code: int, reason: str) -> None:
    """Leaves the launch after an error that was already printed.

    A mistake in what all processes share stops all of them within moments: they wait for one another and this returns.
    When the others carry on, this process ends here with exit code `code`, without the exit handlers that would
    wait for them, and the lost connection stops them.
    """
    if process_count() == 1:
        return
    client = _client()
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        client.key_value_set(f"moejax/failed/{process_index()}", reason)
        client.wait_at_barrier("moejax/failed", FAREWELL_SECONDS * 1000)
        jax.distributed.shutdown()
    except jax.errors.JaxRuntimeError:
        os._exit(code)


def _refuse_torchrun(explicit: bool) -> None:
    ranks = all(name in os.environ for name in _RANK_VARIABLES)
    if "TORCHELASTIC_RUN_ID" in os.environ or (ranks and not explicit):
        raise MoejaxError(
            "started under torchrun, which runs one process for each GPU, but one moejax process drives all GPUs of a "
            f"host: start it plainly on one host, and on several hosts once on each with {_FLAGS}"
        )


def _launcher() -> str | None:
    """The launcher that started more than one process, among those that JAX can ask for the others."""
    env = os.environ
    tasks = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))
    if all(name in env for name in _SLURM_VARIABLES) and int(tasks) > 1:
        return "SLURM"
    if int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    # Every pod has the service's address; only those of an indexed job have peers. JAX asks the API server for them.
    pod = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env
    return "Kubernetes" if pod and importlib.util.find_spec("kubernetes") else None


def _initialize(whom: str, **arguments: Any) -> None:
    # The service catches SIGTERM to announce it to a training loop; without one the process would just not end.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=JOIN_SECONDS, **arguments
        )
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise MoejaxError(f"cannot join {whom} ({reason}); give {_FLAGS}, before anything else uses JAX") from error


def _client() -> Any:
    """The client of the coordination service; only asked for when there are several processes."""
    return global_state.client


def _gather(what: str, value: str) -> list[str]:
    """Every process' value, by process number."""
    if process_count() == 1:
        return [value]
    key = _key(what)
    _client().key_value_set_bytes(f"{key}/{process_index()}", value.encode())
    return [_wait_for(f"{key}/{process}").decode() for process in range(process_count())]


def _key(what: str) -> str:
    """A fresh key; the same on all processes because they run one program."""
    _calls[what] = _calls.get(what, 0) + 1
    return f"moejax/{what}/{_calls[what]}"


def _wait_for(key: str) -> bytes:
    """Waits, without a limit, until a process sets `key`; ends early when one says that it failed.

    A process that is gone needs no limit either: JAX's service stops the others. Slices of a second keep Ctrl-C alive.
    """
    client = _client()
    while True:
        try:
            return client.blocking_key_value_get_bytes(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        for path, reason in client.key_value_dir_get("moejax/failed"):
            raise MoejaxError(f"process {path.rpartition('/')[2]} stopped: {reason}")


@functools.cache
def _replicate(sharding: NamedSharding) -> Any:
    return jax.jit(lambda x: x, out_shardings=sharding)
