"""The generate command: its flags, what it prints where, and its JSON. What it computes is elsewhere."""

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from tiny import CONFIGS, write_checkpoint

import moejax
from moejax.commands import generate
from moejax.errors import MoejaxError
from moejax.inference.generate import Generation, Timing
from moejax.language_model import LanguageModel

Output = pytest.CaptureFixture[str]

KEYS = {
    "outputs": list,
    "usage": dict,
    "mesh": dict,
    "strategy": str,
    "dtype": str,
    "load_s": float,
    "compile_s": float,
    "ttft_s": float,
    "tpot_s": float,
    "prefill_tok_s": float,
    "decode_tok_s": float,
    "peak_rss_bytes": int,
    "peak_device_bytes": type(None),  # the CPU does not count
    "dropped": int,
}
DEMO = Path(moejax.__file__).parent / "demo"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, and the demo's tokenizer with a chat template."""
    raw = CONFIGS["mixtral_plain"] | {"vocab_size": 4096, "num_hidden_layers": 1}
    folder = write_checkpoint(tmp_path_factory.mktemp("text"), raw)
    (folder / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    (folder / "chat_template.jinja").write_text("{% for m in messages %}Q: {{ m.content }} A:{% endfor %}")
    return folder


@pytest.fixture(scope="module")
def models() -> dict[tuple[Any, ...], LanguageModel]:
    return {}


@pytest.fixture
def run(folder: Path, models: dict, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command on the tiny model; the same model, and what it compiled, serves the same options again."""
    load = generate.load_model

    def load_once(args: argparse.Namespace, folder: Path, mesh: jax.sharding.Mesh, **options: Any):
        key = (args.model, args.dtype, mesh, *sorted(options.items()))
        if key not in models:
            models[key], _ = load(args, folder, mesh, **options)
        return models[key], 0.5

    monkeypatch.setattr(generate, "load_model", load_once)
    return lambda *argv: generate.main(["--model", str(folder), "--mesh", "ep=1,tp=1", "--max-new-tokens", "4", *argv])


def stdin(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_the_json_has_the_contracts_keys_and_types(run: Callable[..., int], capsys: Output):
    assert run("--json", "--prompt", "Once upon a time", "--mesh", "ep=1") == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    result = json.loads(out)
    assert {name: type(value) for name, value in result.items()} == KEYS
    (output,) = result["outputs"]
    assert list(output) == ["prompt", "text", "tokens", "finish_reason"]
    assert (output["prompt"], output["finish_reason"], len(output["tokens"])) == ("Once upon a time", "length", 4)
    assert list(result["usage"]) == ["prompt_tokens", "completion_tokens"]
    assert result["usage"]["completion_tokens"] == 4
    assert (result["mesh"], result["strategy"], result["dtype"]) == ({"ep": 1, "tp": 1}, "all_reduce", "float32")
    assert result["dropped"] == 0
    assert min(result[name] for name in KEYS if name.endswith("_s")) > 0
    assert result["prefill_tok_s"] == pytest.approx(result["usage"]["prompt_tokens"] / result["ttft_s"])
    assert result["decode_tok_s"] == pytest.approx(1 / result["tpot_s"])
    assert [line.split()[0] for line in err.splitlines()] == ["mesh", "strategy", "attention", "memory"]


def test_logprobs_stand_in_the_json_where_asked_for(run: Callable[..., int], capsys: Output):
    assert run("--json", "--prompt", "Once", "--logprobs") == 0
    (output,) = json.loads(capsys.readouterr().out)["outputs"]
    assert len(output["logprobs"]) == 4
    assert all(value <= 0 for value in output["logprobs"])


def test_one_prompt_is_printed_with_its_continuation_and_a_report_on_stderr(run: Callable[..., int], capsys: Output):
    assert run("--json", "--prompt", "Once upon a time") == 0
    text = json.loads(capsys.readouterr().out)["outputs"][0]["text"]
    assert run("--prompt", "Once upon a time") == 0
    out, err = capsys.readouterr()
    assert out == f"Once upon a time{text}\n"
    *report, summary = err.splitlines()
    assert [line[:10].rstrip() for line in report] == ["mesh", "strategy", "attention", "memory"]
    assert report[1] == (
        "strategy  all_reduce for prefill and decode of 1 sequence: one device along ep holds all experts"
    )
    assert " prompt and 4 new tokens; loaded in 0.5 s, compiled in " in summary


def test_several_prompts_are_numbered_in_their_order(run: Callable[..., int], capsys: Output):
    argv = ["--prompt", "One", "--prompt", "Another one"]
    assert run("--json", *argv) == 0
    outputs = json.loads(capsys.readouterr().out)["outputs"]
    assert [output["prompt"] for output in outputs] == ["One", "Another one"]
    assert run(*argv) == 0
    out, err = capsys.readouterr()
    assert out == f"[0] One{outputs[0]['text']}\n[1] Another one{outputs[1]['text']}\n"
    assert "for prefill and decode of 2 sequences: " in err


def test_ids_a_file_and_standard_input_give_the_same(
    run: Callable[..., int], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
):
    from moejax.inference.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    text = "Once upon a time"
    (tmp_path / "prompt.txt").write_text(text + "\n", encoding="utf-8")
    stdin(text + "\n", monkeypatch)
    ids = ",".join(map(str, tokenizer.encode(text)))
    outputs = []
    for argv in (["--prompt", text], ["--prompt-ids", ids], ["--prompt-file", str(tmp_path / "prompt.txt")], []):
        assert run("--json", *argv) == 0
        outputs += json.loads(capsys.readouterr().out)["outputs"]
    assert [output["prompt"] for output in outputs] == [text, tokenizer.encode(text), text, text]
    assert len({tuple(output["tokens"]) for output in outputs}) == 1
    # Ids are no text to be printed before their continuation.
    assert run("--prompt-ids", ids) == 0
    assert capsys.readouterr().out == f"{outputs[0]['text']}\n"


def test_without_any_prompt_the_default_is_continued_and_this_is_said(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Output
):
    stdin("\n", monkeypatch)
    assert run() == 0
    out, err = capsys.readouterr()
    assert out.startswith("Once upon a time")
    assert err.splitlines()[0] == (
        'no prompt was given, so this continues "Once upon a time" (--prompt TEXT, or standard input)'
    )


def test_chat_wraps_the_prompt_and_answers_on_a_line_of_its_own(run: Callable[..., int], capsys: Output):
    assert run("--json", "--prompt", "Q: time A:") == 0
    plain = json.loads(capsys.readouterr().out)
    assert run("--chat", "--prompt", "time") == 0
    assert capsys.readouterr().out == f"time\n{plain['outputs'][0]['text']}\n"


CONVERSATION = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two", "reasoning_content": "why"},
    {"role": "user", "content": "three"},
]


def test_a_file_or_standard_input_may_hold_a_conversation(
    run: Callable[..., int],
    calls: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Output,
):
    text = json.dumps(CONVERSATION)
    (tmp_path / "chat.json").write_text(text)
    assert run("--chat", "--json", "--prompt-file", str(tmp_path / "chat.json")) == 0
    assert json.loads(capsys.readouterr().out)["outputs"][0]["prompt"] == CONVERSATION
    stdin(text + "\n", monkeypatch)
    assert run("--chat") == 0
    assert capsys.readouterr().out == "\n"  # an answer alone, and this stand-in writes none
    # Without --chat, and where it is no list of messages, it is a text.
    assert run("--prompt-file", str(tmp_path / "chat.json")) == 0
    stdin("[1, 2]", monkeypatch)
    assert run("--chat") == 0
    assert [call["prompts"] for call in calls] == [[CONVERSATION], [CONVERSATION], [text], ["[1, 2]"]]
    assert [call["chat"] for call in calls] == [True, True, False, True]


def reasoned(*_: Any, on_text: Callable[[int, str], None], on_reasoning: Callable[[int, str], None], **options: Any):
    """In the place of `generate`: one row whose reasoning and answer come in two pieces each."""
    options["timing"].first_s = 0.1
    for piece in ("let me [red]", " see"):
        on_reasoning(0, piece)
    for piece in ("It", " is"):
        on_text(0, piece)
    return [Generation("It is", [1], "stop", None, 1, "let me [red] see")]


def test_reasoning_goes_to_stderr_and_the_answer_to_stdout(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Output
):
    monkeypatch.setattr(generate, "generate", reasoned)
    assert run("--chat", "--prompt", "Is it?") == 0
    out, err = capsys.readouterr()
    assert out == "Is it?\nIt is\n"
    assert err.splitlines()[4] == "let me [red] see"
    assert run("--chat", "--prompt", "Is it?", "--json") == 0
    out, err = capsys.readouterr()
    (output,) = json.loads(out)["outputs"]
    assert (output["text"], output["reasoning"]) == ("It is", "let me [red] see")
    assert "let me" not in err


def test_the_reasoning_of_several_answers_is_numbered(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Output
):
    def several(_: Any, prompts: list[str], **options: Any) -> list[Generation]:
        options["timing"].first_s = 0.1
        return [Generation("yes", [1], "stop", None, 1, "why"), Generation("no", [1], "stop", None, 1, "")]

    monkeypatch.setattr(generate, "generate", several)
    assert run("--chat", "--prompt", "One", "--prompt", "Two") == 0
    out, err = capsys.readouterr()
    assert out == "[0] One\nyes\n[1] Two\nno\n"
    assert err.splitlines()[4:-1] == ["[0] why"]


def test_stop_ends_the_text(run: Callable[..., int], capsys: Output):
    assert run("--json", "--prompt", "Once upon a time") == 0
    text = json.loads(capsys.readouterr().out)["outputs"][0]["text"]
    stop = text[len(text) // 2]
    assert run("--json", "--prompt", "Once upon a time", "--stop", stop, "--stop", "never seen") == 0
    (output,) = json.loads(capsys.readouterr().out)["outputs"]
    assert (output["text"], output["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_a_model_without_a_tokenizer_prints_ids(run: Callable[..., int], tmp_path: Path, capsys: Output):
    folder = write_checkpoint(tmp_path, CONFIGS["mixtral_plain"] | {"num_hidden_layers": 1})
    argv = ["--model", str(folder), "--prompt-ids", "5,6,7", "--prompt-ids", "8"]
    assert run("--json", *argv) == 0
    outputs = json.loads(capsys.readouterr().out)["outputs"]
    assert [output["text"] for output in outputs] == ["", ""]
    assert run(*argv) == 0
    shown = [" ".join(map(str, output["tokens"])) for output in outputs]
    assert capsys.readouterr().out == f"[0] {shown[0]}\n[1] {shown[1]}\n"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replaces the work by one token a prompt; collects how it was asked for."""
    seen: list[dict[str, Any]] = []

    def fake(model: LanguageModel, prompts: list[list[int]], *, timing: Timing, **options: Any) -> list[Generation]:
        seen.append({"model": model, "prompts": prompts, **options})
        timing.first_s = 0.1
        return [Generation("x", [1], "length", None, len(prompt)) for prompt in prompts]

    monkeypatch.setattr(generate, "generate", fake)
    return seen


def test_every_sampling_flag_arrives(run: Callable[..., int], calls: list[dict[str, Any]]):
    flags = "--temperature 0.7 --top-k 5 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.2 --seed 3 --stop a --stop b"
    assert run("--prompt", "Once", *flags.split(), "--max-model-len", "64", "--logprobs", "--json") == 0
    (call,) = calls
    wanted = {
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "seed": 3,
        "stop": ["a", "b"],
        "max_new_tokens": 4,
        "max_model_len": 64,
        "logprobs": True,
    }
    assert {name: call[name] for name in wanted} == wanted


def test_flags_that_are_not_given_are_left_to_the_checkpoint(run: Callable[..., int], calls: list[dict[str, Any]]):
    assert generate.main(["--model", "demo", "--mesh", "ep=1", "--prompt", "Once"]) == 0
    assert {calls[0][name] for name in ("temperature", "top_k", "top_p", "min_p", "seed", "max_new_tokens")} == {None}


def test_the_mesh_the_strategy_and_the_dtype_arrive(
    run: Callable[..., int], calls: list[dict[str, Any]], capsys: Output
):
    argv = ["--moe-ep-size", "4", "--moe-tp-size", "2", "--mesh", "tp=2,ep=4", "--dtype", "bfloat16"]
    argv += ["--strategy", "all_to_all", "--capacity-factor", "1.5", "--chunks", "2", "--prompt", "Once", "--json"]
    assert run(*argv) == 0
    model = calls[0]["model"]
    assert dict(model.mesh.shape) == {"ep": 4, "tp": 2}
    assert (model.options.strategy, model.options.capacity_factor, model.options.chunks) == ("all_to_all", 1.5, 2)
    out, err = capsys.readouterr()
    assert err.splitlines()[0] == "--moe-ep-size 4 --moe-tp-size 2 means --mesh ep=4,tp=2"
    result = json.loads(out)
    assert (result["mesh"], result["strategy"], result["dtype"]) == ({"ep": 4, "tp": 2}, "all_to_all", "bfloat16")
    assert (result["tpot_s"], result["decode_tok_s"]) == (None, None)  # one token each: nothing was decoded


def test_explain_counts_the_real_prompts_with_their_padding(
    run: Callable[..., int], calls: list[dict[str, Any]], capsys: Output
):
    assert run("--explain", "--prompt-ids", ",".join(["9"] * 17), "--prompt-ids", "9") == 0
    explained = [line for line in capsys.readouterr().err.splitlines() if line.startswith("explain ")]
    assert [line.split(", a layer: ")[0] for line in explained] == [
        "explain   prefill of 2 x 32 tokens",
        "explain   decode of 2 x 1 tokens",
    ]


def test_prompts_that_run_in_turns_are_reported_as_they_run(
    run: Callable[..., int], calls: list[dict[str, Any]], capsys: Output
):
    # 65 rows would not be cut over ep=2; the 64 that run together are.
    argv = [word for _ in range(65) for word in ("--prompt-ids", "1")]
    assert run("--mesh", "ep=2", "--json", *argv) == 0
    out, err = capsys.readouterr()
    assert "strategy  all_to_all for prefill and decode of 64 sequences: " in err
    assert json.loads(out)["strategy"] == "all_to_all"
    assert len(calls[0]["prompts"]) == 65


def test_what_generation_config_asks_for_in_vain_is_warned_of(
    run: Callable[..., int], folder: Path, calls: list[dict[str, Any]], tmp_path: Path, capsys: Output
):
    copy = write_checkpoint(tmp_path, CONFIGS["mixtral_plain"] | {"num_hidden_layers": 1, "surprise": 1})
    (copy / "generation_config.json").write_text('{"num_beams": 4}')
    assert run("--model", str(copy), "--prompt-ids", "1", "--json") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warnings == [
        "warning: config.json has fields that moejax does not know and ignores: surprise",
        "warning: generation_config.json asks for num_beams=4, which moejax does not do; it is ignored",
    ]


def interrupted_after(text: str) -> Callable[..., list[Generation]]:
    def fake(*_: Any, on_text: Callable[[int, str], None], **__: Any) -> list[Generation]:
        if text:
            on_text(0, text)
        raise KeyboardInterrupt

    return fake


@pytest.mark.parametrize(("text", "shown"), [("", ""), (" upon", "Once upon\n")])
def test_ctrl_c_ends_the_line_and_leaves_no_traceback(
    text: str, shown: str, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Output
):
    monkeypatch.setattr(generate, "generate", interrupted_after(text))
    assert run("--prompt", "Once") == 130
    out, err = capsys.readouterr()
    assert out == shown
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err


def test_a_mistake_found_late_prints_nothing_on_stdout(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Output
):
    def refuse(*_: Any, **__: Any) -> list[Generation]:
        raise MoejaxError("no")

    monkeypatch.setattr(generate, "generate", refuse)
    assert run("--prompt", "Once") == 2
    assert capsys.readouterr().out == ""


def test_the_example_in_the_help_is_understood(capsys: Output):
    assert generate.main(["--help"]) == 0
    line = capsys.readouterr().out.splitlines()[-1].strip()
    assert line == 'moejax generate --mesh ep=4,tp=2 --platform cpu --prompt "Once upon a time" --max-new-tokens 40'
    args = generate._parser().parse_args(
        [*line.split(" --prompt ")[0].split()[2:], "--prompt", "Once upon a time", "--max-new-tokens", "40"]
    )
    assert (args.mesh, args.platform, args.prompt, args.max_new_tokens) == (
        "ep=4,tp=2",
        "cpu",
        ["Once upon a time"],
        40,
    )


@pytest.mark.slow
def test_the_example_runs_and_a_reader_may_go_away(run_cli: Callable[..., Any], run_python: Callable[..., Any]):
    argv = ["generate", "--mesh", "ep=4,tp=2", "--platform", "cpu", "--prompt", "Once upon a time"]
    done = run_cli(["moejax", *argv, "--max-new-tokens", "40"], timeout=300)
    assert (done.returncode, done.stdout[:16]) == (0, "Once upon a time")
    code = """
import subprocess, sys
command = [sys.executable, "-m", "moejax", *sys.argv[1:]]
process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
process.stdout.read(1)
process.stdout.close()
print(process.wait(), "Traceback" in process.stderr.read())
"""
    done = run_python([code, *argv, "--max-new-tokens", "400"], timeout=300)
    assert done.stdout == "141 False\n", done.stderr


@pytest.mark.slow
def test_ctrl_c_while_something_is_compiled(run_python: Callable[..., Any]):
    code = """
import signal, subprocess, sys, time
command = [sys.executable, "-m", "moejax", "generate", "--mesh", "ep=2", "--platform", "cpu", "--prompt", "Once"]
process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
while not process.stderr.readline().startswith("memory"):
    pass
time.sleep(2)
process.send_signal(signal.SIGINT)
print(process.communicate(), process.returncode)
"""
    assert run_python([code], timeout=300).stdout == "('', 'interrupted\\n') 130\n"
