"""Compiling and caching the native kernel. A stand-in for the compiler copies the library that the real one made."""

import stat
from pathlib import Path

import pytest

from moejax.kernels.native import available, build, library
from moejax.user_cache import user_cache


@pytest.fixture(scope="module")
def compiled() -> Path:
    """The real library in the user's cache."""
    assert available()
    return user_cache() / f"native-{build._key(build._compiler())}.so"


@pytest.fixture
def compiler(compiled, tmp_path, monkeypatch) -> Path:
    """CXX is a script that counts what it compiles, in an empty cache; the file of its counts."""
    calls, script = tmp_path / "calls", tmp_path / "compiler"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo stand-in && exit\n'
        f'echo x >> {calls}\nfor last; do :; done\nsleep 0.3\ncp {compiled} "$last"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls.touch()
    return calls


def count(calls: Path) -> int:
    return len(calls.read_text().splitlines())


def cached(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "moejax").iterdir())


def test_the_second_load_compiles_nothing(compiler, tmp_path):
    for _ in range(2):
        assert build.load().moejax_products
    assert count(compiler) == 1
    assert [path.suffix for path in cached(tmp_path)] == [".so"], "what was written aside is gone"


@pytest.mark.parametrize("left", [0, 31, 5000, -1])
def test_a_truncated_library_is_compiled_again(compiler, tmp_path, left):
    build.load()
    (path,) = cached(tmp_path)
    content = path.read_bytes()
    path.unlink()  # this process has it mapped
    path.write_bytes(content[:left])
    assert build.load().moejax_products
    assert count(compiler) == 2


def test_another_source_compiler_or_jaxlib_is_another_file(compiler, monkeypatch):
    command = build._compiler()
    keys = {build._key(command)}
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O2"))
    keys.add(build._key(command))
    monkeypatch.setattr(build.jaxlib, "__version__", "0")
    keys.add(build._key(command))
    monkeypatch.delenv("CXX")
    keys.add(build._key(build._compiler()))
    assert len(keys) == 4


def test_a_cache_that_cannot_be_written_is_done_without(compiler, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build.load().moejax_products


def test_processes_that_start_at_once_share_one_cache(compiler, tmp_path, run_python):
    code = """
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
import sys
from moejax.kernels.native import build
def works(_):
    return bool(build.load().moejax_products)
if __name__ == "__main__":
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        print(list(pool.map(works, range(2))))
"""
    result = run_python([code])
    assert result.stdout.strip() == "[True, True]", result.stderr
    assert [path.suffix for path in cached(tmp_path)] == [".so"]


def why_unavailable(capsys) -> str:
    """The one line that says why a process has no handlers."""
    assert library._set_up.__wrapped__() == ()
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_kernel_can_be_switched_off(monkeypatch, capsys):
    monkeypatch.setenv("MOEJAX_NATIVE", "0")
    assert "MOEJAX_NATIVE=0" in why_unavailable(capsys)


def test_without_a_compiler_one_line_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C++ compiler" in why_unavailable(capsys)
    monkeypatch.setenv("CXX", "nowhere-c++ -m64")
    assert "CXX=nowhere-c++ is not there" in why_unavailable(capsys)


def test_a_compiler_that_fails_is_quoted(compiler, monkeypatch, capsys):
    script = Path(build._compiler()[0])
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\necho "x.cc:1: error: no such thing" >&2\nexit 3\n')
    line = why_unavailable(capsys)
    assert "status 3" in line and "no such thing" in line


def test_compiling_for_long_is_announced(compiler, monkeypatch, capsys):
    monkeypatch.setattr(build, "PATIENCE", 0.05)
    build.load()
    assert "compiling the CPU kernel (once)" in capsys.readouterr().err


def test_a_library_that_does_not_load_is_no_crash(compiler, monkeypatch, capsys):
    script = Path(build._compiler()[0])
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\nfor last; do :; done\necho text > "$last"\n')
    assert "does not load" in why_unavailable(capsys)


def test_a_product_says_once_why_it_is_slow(run_python):
    """`available` is asked for each product; the line comes once."""
    code = "from moejax.kernels import native\nprint(native.available(), native.available())"
    result = run_python([code], env={"MOEJAX_NATIVE": "0"})
    assert result.stdout.strip() == "False False"
    assert result.stderr.count("MOEJAX_NATIVE=0") == 1
