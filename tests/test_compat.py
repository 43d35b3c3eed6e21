"""TensorRT-LLM's and SGLang's flags against the mesh they mean."""

import argparse

import pytest

from moejax.compat import add_compat_flags, translate
from moejax.errors import MoejaxError


def parse(line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--mesh")
    add_compat_flags(parser)
    return parser.parse_args(line.split())


@pytest.mark.parametrize(
    ("line", "mesh"),
    [
        ("--moe-ep-size 4 --moe-tp-size 2", "ep=4,tp=2"),
        ("--moe_ep_size 4 --moe_tp_size 2", "ep=4,tp=2"),
        ("--tp-size 8 --ep-size 4", "ep=4,tp=2"),
        ("--tp_size 8 --ep_size 8", "ep=8,tp=1"),
        ("--tp-size 8", "ep=1,tp=8"),
        ("--tp-size 8 --moe-ep-size 2", "ep=2,tp=4"),
        ("--tp-size 8 --moe-tp-size 2", "ep=4,tp=2"),
        ("--tp-size 8 --moe-ep-size 4 --moe-tp-size 2 --ep-size 4", "ep=4,tp=2"),
        ("--moe-ep-size 4", "ep=4,tp=1"),
        ("--moe-tp-size 2", "ep=1,tp=2"),
        ("--tp-size 8 --ep-size 4 --mesh tp=2,ep=4", "ep=4,tp=2"),
    ],
)
def test_translation(line: str, mesh: str, capsys: pytest.CaptureFixture[str]):
    assert translate(parse(line)) == mesh
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(f" means --mesh {mesh}\n")
    assert err.count("\n") == 1


def test_the_line_names_the_flags(capsys: pytest.CaptureFixture[str]):
    translate(parse("--ep-size 4 --tp-size 8"))
    assert capsys.readouterr().err == "--tp-size 8 --ep-size 4 means --mesh ep=4,tp=2\n"


@pytest.mark.parametrize(("line", "mesh"), [("", None), ("--mesh tp=2", "tp=2")])
def test_nothing_to_translate(line: str, mesh: str | None, capsys: pytest.CaptureFixture[str]):
    assert translate(parse(line)) == mesh
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--tp-size 8 --ep-size 3", "--tp-size 8, all devices, is not a multiple of the expert-parallel size 3"),
        ("--tp-size 4 --ep-size 8", "--tp-size 4, all devices, is not a multiple of the expert-parallel size 8"),
        ("--tp-size 8 --moe-tp-size 3", "--tp-size 8, all devices, is not a multiple of --moe-tp-size 3"),
        (
            "--tp-size 8 --moe-ep-size 4 --moe-tp-size 4",
            "expert-parallel size 4 times --moe-tp-size 4 is 16, but --tp-size, all devices, is 8",
        ),
        ("--ep-size 4 --moe-ep-size 2", "--ep-size 4 contradicts --moe-ep-size 2; give only one of them"),
        ("--ep-size 4", "--ep-size 4 needs --tp-size, the number of all devices; or write --mesh ep=4"),
        (
            "--tp-size 8 --ep-size 4 --mesh ep=8",
            "--tp-size 8 --ep-size 4 means --mesh ep=4,tp=2, which contradicts --mesh ep=8; give only one of them",
        ),
    ],
)
def test_contradictions(line: str, message: str):
    with pytest.raises(MoejaxError) as caught:
        translate(parse(line))
    assert str(caught.value) == message


@pytest.mark.parametrize("size", ["0", "-1", "two", "1.5"])
def test_a_size_is_a_whole_number_from_1(size: str):
    with pytest.raises(argparse.ArgumentError, match=f"'{size}' is not a whole number from 1"):
        parse(f"--tp-size={size}")
