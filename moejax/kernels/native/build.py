"""Compiles the handlers into the user's cache, once for each source, jaxlib, compiler and kind of processor.

A compiled file ends in the digest of what precedes it, so that a truncated one is seen before the loader maps it (which
would end the process). Files are written aside and renamed: of several processes that compile at once the last wins.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jaxlib

from moejax.user_cache import user_cache

SOURCES = Path(__file__).parent / "src"
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
COMPILERS = ("c++", "g++", "clang++")
PATIENCE = 2.0
"""Seconds of compiling before a line says what is going on."""


class BuildError(Exception):
    """The handlers cannot be compiled or loaded here; the message says why."""


def load() -> ctypes.CDLL:
    """The compiled handlers, from the cache where they are in it.

    Raises:
      BuildError: there is no compiler, or it fails.
    """
    compiler = _compiler()
    name = f"native-{_key(compiler)}.so"
    try:
        folder = user_cache()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        if not _whole(path):
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except OSError:
        # Nothing can be kept: the folder is read-only or full, or programs must not be loaded from it.
        with tempfile.TemporaryDirectory(prefix="moejax-") as folder:
            _compile(compiler, Path(folder) / name)
            return _load(Path(folder) / name)


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the compiled library does not load: {error}") from error


def _compiler() -> list[str]:
    """The C++ compiler as the first words of a command."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise BuildError(f"the compiler CXX={named[0]} is not there")
        return named
    for name in COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise BuildError(f"no C++ compiler (tried {', '.join(COMPILERS)}; set CXX to another)")


def _key(compiler: list[str]) -> str:
    """What a compiled file depends on, as a name."""
    version = _run([*compiler, "--version"]).stdout
    digest = hashlib.sha256()
    for part in (jaxlib.__version__, version, platform.system(), platform.machine(), *compiler, *FLAGS):
        digest.update(part.encode() + b"\0")
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def _whole(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return content[-32:] == hashlib.sha256(content[:-32]).digest()


def _compile(compiler: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as folder, _progress():
        built = Path(folder) / path.name
        include = jax.ffi.include_dir()
        _run([*compiler, *FLAGS, f"-I{include}", str(SOURCES / "handlers.cc"), "-o", str(built)])
        with built.open("ab") as file:
            file.write(hashlib.sha256(built.read_bytes()).digest())
        os.replace(built, path)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise BuildError(f"{command[0]} does not start: {error}") from error
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        raise BuildError(f"{command[0]} failed with status {result.returncode}: {lines[0] if lines else 'no message'}")
    return result


@contextmanager
def _progress() -> Iterator[None]:
    """Says that a compiler is running once it has been for a while."""
    line = "moejax: compiling the CPU kernel (once), about ten seconds"
    timer = threading.Timer(PATIENCE, print, [line], {"file": sys.stderr, "flush": True})
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
