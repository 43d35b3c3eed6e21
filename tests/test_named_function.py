"""Functions by name: found, or refused in one line that says what to do."""

import re

import pytest

from moejax import MoejaxError
from moejax.named_function import named_function

SOURCE = """
def balanced(views):
    return 7

def rebalanced(views): ...

_hidden = balanced
NUMBER = 3
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `theirs` with a module of functions, and one that wants what is not there."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "losses.py").write_text(SOURCE)
    (folder / "broken.py").write_text("import not_installed_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_it_is_found(package):
    assert named_function("theirs.losses:balanced", "balance")([]) == 7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("theirs.losses:balance", "has no balance; did you mean balanced?"),
        ("theirs.losses:xyz", "theirs.losses has no xyz"),
        ("theirs.losses:NUMBER", "balance='theirs.losses:NUMBER' is of type int, and no function"),
        ("theirs.loss:balanced", "there is no module 'theirs.loss'; add the folder it is in to PYTHONPATH"),
        ("nobodys.losses:balanced", "there is no module 'nobodys'; add the folder it is in to PYTHONPATH"),
        ("theirs.losses", "balance='theirs.losses' names no function; write package.module:function"),
        (".losses:balanced", "names no function"),
        ("theirs.losses:a.b", "names no function"),
        ("theirs losses:balanced", "names no function"),
    ],
)
def test_what_is_not_there_is_refused(package, name, message):
    with pytest.raises(MoejaxError, match=re.escape(message)) as caught:
        named_function(name, "balance")
    assert "\n" not in str(caught.value)


def test_a_module_s_own_mistake_keeps_its_traceback(package):
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        named_function("theirs.broken:balanced", "balance")
