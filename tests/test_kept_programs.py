"""Command lines keep what they compiled, where the user lets them."""

import os
from pathlib import Path

import jax
import pytest

from moejax.commands.kept_programs import keep_programs


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """JAX's own settings as a fresh process has them, and an empty user's cache."""
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_enable_compilation_cache")}
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def test_programs_are_kept_in_the_users_cache(settings, tmp_path: Path):
    keep_programs()
    assert settings.jax_compilation_cache_dir == str(tmp_path / "moejax" / "programs")
    assert (tmp_path / "moejax" / "programs").is_dir()


def test_a_folder_that_jax_was_given_stays(settings, tmp_path: Path):
    settings.update("jax_compilation_cache_dir", str(tmp_path / "given"))
    keep_programs()
    assert settings.jax_compilation_cache_dir == str(tmp_path / "given")


def test_nothing_is_kept_where_it_is_switched_off_or_cannot_be(settings, tmp_path: Path, monkeypatch):
    settings.update("jax_enable_compilation_cache", False)
    keep_programs()
    settings.update("jax_enable_compilation_cache", True)
    (tmp_path / "moejax").write_text("a file in the way")
    keep_programs()
    (tmp_path / "moejax").unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    keep_programs()
    assert settings.jax_compilation_cache_dir is None


@pytest.mark.slow
def test_a_second_run_finds_all_programs_of_the_first(run_cli, tmp_path: Path):
    """Also where it orders sets otherwise; and it says nothing on stderr that the first did not."""
    environment = {"JAX_ENABLE_COMPILATION_CACHE": "true", "XDG_CACHE_HOME": str(tmp_path)}
    command = ["moejax.generate", "--mesh", "ep=4,tp=2", "--prompt", "Once upon a time", "--max-new-tokens", "4"]
    kept, errors, outputs = [], [], []
    for seed in ("1", "2"):
        result = run_cli(command, env=environment | {"PYTHONHASHSEED": seed})
        assert result.returncode == 0, result.stderr
        kept.append({path.name for path in (tmp_path / "moejax" / "programs").iterdir() if "-cache" in path.name})
        errors.append([line.split()[0] for line in result.stderr.splitlines() if "CPU kernel" not in line])
        outputs.append(result.stdout)
    assert len(kept[0]) == 2 and kept[1] == kept[0]
    assert errors[0] == errors[1] and outputs[0] == outputs[1]
