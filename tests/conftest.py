"""Eight virtual CPU devices (or `where`) and strict dtype promotion for all tests, fixtures that start processes."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest
from where import PLATFORM, fits

# LLVM at its lowest level compiles a third faster, and tests mostly compile. What XLA itself does stays the same.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if PLATFORM == "cpu":  # an accelerator's programs are the ones that users run
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILE}"

jax.config.update("jax_platforms", "cpu" if PLATFORM == "cpu" else f"{PLATFORM},cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Commands that run in this process would keep their programs in the user's cache, and find there those of before.
jax.config.update("jax_enable_compilation_cache", False)

# A shell starts what it puts in the background with Ctrl-C ignored, and every child of the tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
Result = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Drops a module's compiled programs at its end; those of all modules together use up the system's memory maps."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def mesh() -> Callable[[str], jax.sharding.Mesh]:
    """Makes the mesh of a spec such as "ep=4,tp=2"; skips the test where accelerators are too few for it."""
    from moejax.mesh import make_mesh

    def make(spec: str) -> jax.sharding.Mesh:
        if not fits(spec):
            pytest.skip(f"{spec} needs more than {len(jax.devices())} {PLATFORM} devices")
        return make_mesh(spec)

    return make


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., Result]:
    """Runs `python -m ARGS...`: run_cli(["moejax.generate", "--json"], env={...}, timeout=120, input="text")."""
    return lambda args, **options: _run_python(["-m", *args], **options)


@pytest.fixture(scope="session")
def run_python() -> Callable[..., Result]:
    """Runs code in a fresh interpreter: run_python([CODE, "argument"], env={...})."""
    return lambda args, **options: _run_python(["-c", *args], **options)


@pytest.fixture(scope="session")
def run_processes() -> Callable[..., list[Result]]:
    """Runs one program in n processes and returns their results by process id.

    run_processes(2, ["-m", "moejax.generate", "--json"]): the arguments are the interpreter's, and the three options of
    several processes come last. `each` gives one process more arguments: {1: ["--seed", "2"]}.
    """

    def run(
        n: int,
        args: Sequence[str],
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
        each: Mapping[int, Sequence[str]] | None = None,
    ) -> list[Result]:
        launch = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", str(n), "--process-id"]
        commands = [[sys.executable, *args, *(each or {}).get(i, ()), *launch, str(i)] for i in range(n)]
        pipe = subprocess.PIPE
        processes = [
            subprocess.Popen(
                command, env=environment(env), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
            )
            for command in commands
        ]
        try:
            with ThreadPoolExecutor(n) as pool:
                outputs = list(pool.map(lambda process: process.communicate(timeout=timeout), processes))
        finally:
            for process in processes:
                process.kill()
        return [
            Result(process.args, process.returncode, *output)
            for process, output in zip(processes, outputs, strict=True)
        ]

    return run


def _run_python(
    args: Sequence[str], env: Mapping[str, str] | None = None, timeout: float = 120, input: str = ""
) -> Result:
    command = [sys.executable, *args]
    return subprocess.run(
        command, env=environment(env), timeout=timeout, input=input, text=True, capture_output=True, cwd=ROOT
    )


def free_port() -> int:
    """A TCP port that nothing listens on right now."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    """This process' environment, in which moejax is importable and no flag makes virtual devices."""
    inherited = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    inherited["XLA_FLAGS"] = FAST_COMPILE
    path = os.pathsep.join(filter(None, (str(ROOT), inherited.get("PYTHONPATH"))))
    own = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "PYTHONPATH": path}
    return inherited | own | dict(extra or {})
