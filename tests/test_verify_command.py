"""The verify command: what it prints, its exit codes, and which meshes it takes. What it measures is elsewhere."""

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from tiny import CONFIGS, write_checkpoint

from moejax.commands import verify
from moejax.errors import MoejaxError
from moejax.language_model import LanguageModel
from moejax.verification.compare import Row

KEYS = ["mesh", "strategy", "max_rel_err", "greedy_match", "dropped", "ties", "min_margin", "first_bad_layer", "ok"]
GOOD = Row("ep=4,tp=2", "all_to_all", 6.6e-7, True, 0, 2, 5e-5, None, True)
BAD = Row("ep=16,tp=8", "all_reduce", float("inf"), False, 12345, 4, None, "embedding", False)
NARROW = Row("ep=16,tp=8", "all_to_all", 1.2e-2, True, 0, 0, 3e-4, None, True, argmax_agreement=0.987, kl=1.1e-4)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, str]]]:
    """Replaces the work: each mesh and strategy gets the next of the rows given; returns what was asked for."""

    def install(*rows: Row) -> list[tuple[str, str]]:
        asked: list[tuple[str, str]] = []

        class Verifier:
            prompts = ((1,),)

            def __init__(self, folder: Path, dtype: str):
                assert (folder / "config.json").is_file()
                assert dtype in ("float32", "bfloat16")

            def check(self, model: LanguageModel) -> Row:
                asked.append((f"ep={model.mesh.shape['ep']},tp={model.mesh.shape['tp']}", model.options.strategy))
                return rows[(len(asked) - 1) % len(rows)]

        monkeypatch.setattr(verify, "Verifier", Verifier)
        return asked

    return install


def test_the_json_has_the_contracts_keys_and_nothing_else_is_on_stdout(answers, capsys: pytest.CaptureFixture[str]):
    answers(GOOD)
    assert verify.main(["--json", "--meshes", "ep=4,tp=2", "--strategies", "all_to_all"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert out.count("\n") == 1
    assert list(result) == ["rows", "ok"]
    assert [list(row) for row in result["rows"]] == [KEYS]
    assert result["ok"] is True
    first, *report, last = err.splitlines()
    assert first.startswith("oracle ")
    assert [line.split()[0] for line in report] == ["mesh", "strategy", "attention", "memory"]
    assert last.split(" (")[0] == "ok   ep=4,tp=2 all_to_all"


def test_a_bad_row_makes_the_exit_code_1_and_stays_json(answers, capsys: pytest.CaptureFixture[str]):
    answers(GOOD, BAD)
    assert verify.main(["--json", "--meshes", "ep=2", "--strategies", "all_to_all", "all_reduce"]) == 1
    result = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert result["ok"] is False
    assert [row["ok"] for row in result["rows"]] == [True, False]
    assert result["rows"][1]["max_rel_err"] is None
    assert result["rows"][1]["first_bad_layer"] == "embedding"


def test_a_16_bit_dtype_adds_its_two_figures(answers, capsys: pytest.CaptureFixture[str]):
    answers(NARROW)
    assert verify.main(["--json", "--meshes", "ep=2", "--strategies", "auto", "--dtype", "bfloat16"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert list(row) == [*KEYS, "argmax_agreement", "kl"]


def test_each_mesh_is_verified_with_each_strategy_in_the_order_given(answers):
    asked = answers(GOOD)
    assert verify.main(["--meshes", "ep=2", "tp=2,ep=4", "ep=1", "--platform", "cpu"]) == 0
    assert asked == [
        (mesh, strategy)
        for mesh in ("ep=2,tp=1", "ep=4,tp=2", "ep=1,tp=1")
        for strategy in ("all_to_all", "all_reduce")
    ]


def test_by_default_the_meshes_that_fit_are_verified(
    answers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    asked = answers(GOOD)
    monkeypatch.setattr(verify, "DEFAULT_MESHES", ("ep=1,tp=1", "ep=16,tp=1"))
    assert verify.main(["--strategies", "all_reduce"]) == 0
    assert asked == [("ep=1,tp=1", "all_reduce")]
    assert "left out  ep=16,tp=1: mesh ep=16,tp=1 needs 16 devices, but " in capsys.readouterr().err
    monkeypatch.setattr(verify, "DEFAULT_MESHES", ("ep=16,tp=1",))
    with pytest.raises(MoejaxError, match=r"^none of the default meshes fits these devices; name one with --meshes$"):
        verify._meshes(argparse.Namespace(meshes=None, platform=None))


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("rows", [[GOOD, BAD], [NARROW]], ids=["float32", "16 bits"])
def test_the_table_fits_a_terminal(rows: list[Row], width: int):
    text = io.StringIO()
    Console(file=text, width=width).print(verify._table(rows))
    header, _, *body = [line for line in text.getvalue().splitlines() if line.strip()]
    assert len(header.rstrip()) <= 80
    assert "…" not in text.getvalue()
    assert header.split()[:3] == ["mesh", "strategy", "error"]
    assert [line.split()[0] for line in body] == [row.mesh for row in rows]
    assert [line.split()[-1] for line in body] == ["yes" if row.ok else "NO" for row in rows]


def test_the_example_in_the_help_is_understood(capsys: pytest.CaptureFixture[str]):
    assert verify.main(["--help"]) == 0
    words = capsys.readouterr().out.splitlines()[-1].split()
    assert words[:2] == ["moejax", "verify"]
    args = verify._parser().parse_args(words[2:])
    assert (args.model, args.meshes, args.platform) == ("demo", ["ep=1,tp=1", "ep=4,tp=2"], "cpu")


@pytest.mark.slow
def test_a_whole_run_on_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    raw = CONFIGS["mixtral_llama3"] | {"num_hidden_layers": 1}
    folder = write_checkpoint(tmp_path, raw)
    argv = ["--model", str(folder), "--meshes", "ep=1,tp=2", "--strategies", "auto", "--dtype", "auto"]
    assert verify.main(argv) == 0
    out, err = capsys.readouterr()
    assert out.split("\n")[2].split()[:2] == ["ep=1,tp=2", "auto"]
    assert err.startswith("oracle    one device, a layer at a time; 4 prompts of random ids")
