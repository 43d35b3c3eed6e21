"""Joining, agreeing, sharing and ending: the refusals in this process, the rest between two processes."""

import json
import os
import socket
import threading
import time

import jax
import numpy as np
import pytest

from moejax import distributed
from moejax.errors import MoejaxError

FLAGS = "--coordinator HOST:PORT, --num-processes N and --process-id I"
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch):
    for name in os.environ:
        if name.startswith(("SLURM", "OMPI", "KUBERNETES", "TORCHELASTIC", "RANK", "WORLD_SIZE")):
            monkeypatch.delenv(name)


@pytest.fixture
def port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a:1", 2, None), f"--process-id missing: several processes need all of {FLAGS}"),
        ((None, None, 0), f"--coordinator and --num-processes missing: several processes need all of {FLAGS}"),
        (("host", 2, 0), '--coordinator "host" is not HOST:PORT with a port from 1 to 65535, such as 10.0.0.1:4321'),
        (
            ("a:70000", 2, 0),
            '--coordinator "a:70000" is not HOST:PORT with a port from 1 to 65535, such as 10.0.0.1:4321',
        ),
        ((":80", 2, 0), '--coordinator ":80" is not HOST:PORT with a port from 1 to 65535, such as 10.0.0.1:4321'),
        (("a:1", 0, 0), "--num-processes 0 must be at least 1"),
        (("a:1", 2, 2), "--process-id 2 must be from 0 to 1 (--num-processes 2)"),
        (("a:1", 2, -1), "--process-id -1 must be from 0 to 1 (--num-processes 2)"),
    ],
)
def test_bad_arguments(arguments: tuple[str | None, int | None, int | None], message: str):
    with pytest.raises(MoejaxError) as caught:
        distributed.start(*arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize("env", [{"TORCHELASTIC_RUN_ID": "1"}, TORCHRUN])
def test_torchrun_is_refused(env: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MoejaxError) as caught:
        distributed.start()
    assert str(caught.value) == (
        "started under torchrun, which runs one process for each GPU, but one moejax process drives all GPUs of a host:"
        f" start it plainly on one host, and on several hosts once on each with {FLAGS}"
    )


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, False),
        (SLURM, True),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, False),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    ],
)
def test_jax_looks_for_the_processes_of_a_launcher(
    env: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    calls: list[dict[str, int]] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    distributed.start()
    assert [set(call) for call in calls] == expected * [
        {"initialization_timeout", "heartbeat_timeout_seconds", "shutdown_timeout_seconds"}
    ]


def test_a_launcher_that_jax_cannot_ask_is_named(monkeypatch: pytest.MonkeyPatch):
    def initialize(**_: int) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(MoejaxError) as caught:
        distributed.start()
    assert str(caught.value) == (
        "cannot join the processes that Open MPI started (coordinator_address should be defined.); "
        f"give {FLAGS}, before anything else uses JAX"
    )


def test_one_process_needs_no_launch(port: int):
    distributed.start()
    distributed.start(f"localhost:{port}", 1, 0)
    assert (distributed.process_count(), distributed.process_index(), distributed.is_main()) == (1, 0, True)
    distributed.agree({"mesh": "ep=1,tp=1"})
    distributed.barrier()
    assert distributed.share(b"prompt") == b"prompt"
    distributed.finish()
    distributed.fail(2, "nobody to tell")
    np.testing.assert_array_equal(distributed.replicated_to_host(jax.numpy.arange(3)), [0, 1, 2])


def test_a_taken_port_is_refused():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(MoejaxError) as caught:
            distributed.start(f"localhost:{port}", 2, 0)
    assert str(caught.value) == (
        f"process 0 cannot listen on port {port} (Address already in use); choose another port in "
        "--coordinator, and start only one process with --process-id 0"
    )


def test_a_missing_peer_is_named(port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "JOIN_SECONDS", 0.2)
    with pytest.raises(MoejaxError) as caught:
        distributed.start(f"localhost:{port}", 3, 0)
    assert str(caught.value) == (
        "only 1 of 3 processes came in 0.2 s (missing: 1, 2); start one for each --process-id with the same "
        "--coordinator"
    )


def test_an_absent_coordinator_is_named(port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "JOIN_SECONDS", 0.3)
    with pytest.raises(MoejaxError) as caught:
        distributed.start(f"127.0.0.1:{port}", 2, 1)
    assert str(caught.value) == (
        f"process 1 cannot reach process 0 at 127.0.0.1:{port} within 0.3 s (Connection refused); "
        "start a process with --process-id 0 on that host with the same --coordinator"
    )


@pytest.mark.parametrize(
    ("processes", "peers", "message"),
    [
        (2, [(3, 1)], "process 1 was started with --num-processes 3, process 0 with 2"),
        (3, [(3, 1), (3, 1)], "two processes were started with --process-id 1; give each its own"),
    ],
)
def test_peers_that_contradict_stop_everyone(
    processes: int, peers: list[tuple[int, int]], message: str, port: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(distributed, "JOIN_SECONDS", 5)
    problems: list[str] = []

    def join(num_processes: int, process_id: int) -> None:
        try:
            distributed.start(f"127.0.0.1:{port}", num_processes, process_id)
        except MoejaxError as error:
            problems.append(str(error))

    threads = [threading.Thread(target=join, args=peer) for peer in peers]
    for thread in threads:
        thread.start()
    join(processes, 0)
    for thread in threads:
        thread.join()
    assert problems == [message] * (1 + len(peers))


def test_the_code_hash_is_stable_and_short():
    assert distributed.code_hash() == distributed.code_hash()
    assert len(bytes.fromhex(distributed.code_hash())) == 8


PROGRAM = """
import json, sys, time
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from moejax import distributed
from moejax.commands.common import add_mesh, base_parser, run
from moejax.errors import MoejaxError
from moejax.mesh import describe, make_mesh

def main(args):
    process = distributed.process_index()
    distributed.agree({"code": distributed.code_hash(), "mesh": str(args.mesh)})
    if args.fault == "share" and process == 0:
        raise MoejaxError("no such prompt file: x.txt")
    text = distributed.share(b"once" if process == 0 else None)
    mesh = make_mesh(args.mesh)
    if args.fault == "one" and process == 1:
        raise RuntimeError("a bug on one process")
    place = NamedSharding(mesh, P(("ep", "tp")))
    x = jax.make_array_from_callback((8,), place, lambda index: np.arange(8, dtype=np.float32)[index])
    add = jax.shard_map(lambda x: jax.lax.psum(x, ("ep", "tp")), mesh=mesh, in_specs=P(("ep", "tp")), out_specs=P())
    distributed.barrier()
    total = jax.jit(add)(x)
    print(json.dumps({
        "text": text.decode(), "mesh": describe(mesh), "local": jax.local_device_count(),
        "sum": distributed.replicated_to_host(total).tolist(), "x": distributed.replicated_to_host(x).tolist(),
    }))
    return 0

parser = base_parser("program", "", "")
parser.add_argument("--fault")
add_mesh(parser)
sys.exit(run(main, parser, None))
"""


@pytest.mark.multihost
def test_two_processes_of_four_devices(run_processes):
    main, other = run_processes(2, ["-c", PROGRAM, "--mesh", "ep=4,tp=2"])
    assert (main.returncode, other.returncode) == (0, 0), main.stderr + other.stderr
    assert json.loads(main.stdout) == {
        "text": "once",
        "mesh": "ep=4,tp=2 on 8 virtual cpu devices of 2 processes",
        "local": 4,
        "sum": [28.0],
        "x": list(range(8)),
    }
    assert other.stdout == ""


@pytest.mark.multihost
@pytest.mark.parametrize(
    ("each", "message"),
    [
        (
            {0: ["--mesh", "ep=4,tp=2"], 1: ["--mesh", "ep=2,tp=4"]},
            "the processes disagree on mesh: process 0 has ep=4,tp=2, process 1 has ep=2,tp=4; "
            "start all of them with the same mesh",
        ),
        (
            {0: ["--mesh", "ep=3"], 1: ["--mesh", "ep=3"]},
            "mesh ep=3,tp=1 has 3 devices, which 2 processes cannot share equally; make ep x tp a multiple of 2 or "
            "start fewer processes",
        ),
    ],
)
def test_a_mistake_all_processes_see_ends_all_with_the_same_line(
    each: dict[int, list[str]], message: str, run_processes
):
    for done in run_processes(2, ["-c", PROGRAM], each=each):
        assert (done.returncode, done.stdout) == (2, "")
        assert f"error: {message}" in done.stderr.splitlines()
        assert "Traceback" not in done.stderr
        assert "Check failure" not in done.stderr


@pytest.mark.multihost
def test_a_mistake_that_one_process_sees_stops_those_that_wait_for_it(run_processes):
    main, other = run_processes(2, ["-c", PROGRAM, "--mesh", "ep=4,tp=2", "--fault", "share"])
    assert (main.returncode, other.returncode) == (2, 2)
    assert "error: no such prompt file: x.txt" in main.stderr.splitlines()
    assert "error: process 0 stopped: no such prompt file: x.txt" in other.stderr.splitlines()


@pytest.mark.multihost
def test_a_bug_on_one_process_ends_the_other_soon(run_processes):
    started = time.monotonic()
    main, other = run_processes(2, ["-c", PROGRAM, "--mesh", "ep=4,tp=2", "--fault", "one"])
    assert time.monotonic() - started < 60
    assert other.returncode == 1
    assert "RuntimeError: a bug on one process" in other.stderr
    assert (main.returncode, main.stdout) == (2, "")
    assert "error: process 1 stopped: RuntimeError: a bug on one process" in main.stderr.splitlines()
