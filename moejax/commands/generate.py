"""`moejax generate`: continue prompts and say how long it took."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax

from moejax import distributed
from moejax.commands.common import add_mesh, add_model, add_strategy, base_parser, run
from moejax.commands.session import agree_on, load_model, log, mesh_for
from moejax.commands.transcript import Transcript, think
from moejax.errors import MoejaxError
from moejax.inference.engine import chunk_size
from moejax.inference.generate import BATCH, Generation, Prompt, Timing, encode_prompts, generate, settle
from moejax.language_model import LanguageModel
from moejax.model import lay
from moejax.process_memory import peak_rss
from moejax.start_report import explain_lines, report_lines

DEFAULT_PROMPT = "Once upon a time"
SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run(_generate, _parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = base_parser(
        "moejax generate",
        "Continue prompts with a mixture-of-experts model on an (ep, tp) mesh.",
        'moejax generate --mesh ep=4,tp=2 --platform cpu --prompt "Once upon a time" --max-new-tokens 40',
    )
    add_model(parser)
    add_mesh(parser)
    add_strategy(parser)
    parser.add_argument("--capacity-factor", type=_factor, metavar="F", help="drop pairs over F times the even share")
    parser.add_argument("--chunks", type=int, default=1, metavar="N", help="slices of the all_to_all exchange")
    parser.add_argument("--explain", action="store_true", help="say why the strategy was chosen and what it sends")
    prompts = parser.add_argument_group("prompts (default: standard input)")
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; repeat for several")
    prompts.add_argument("--prompt-ids", action="append", metavar="1,2,3", help="a prompt as token ids; repeatable")
    prompts.add_argument("--prompt-file", metavar="F", help="a file that holds one prompt")
    prompts.add_argument(
        "--chat",
        action="store_true",
        help="wrap prompts in the checkpoint's chat template; files and stdin may hold a JSON list of messages",
    )
    sampling = parser.add_argument_group("sampling (default: generation_config.json, else greedy)")
    sampling.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens to add (default 32)")
    sampling.add_argument("--max-model-len", type=int, metavar="N", help="a context shorter than the model's")
    sampling.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    sampling.add_argument("--top-k", type=int, metavar="K", help="sample among the K best; 0 is off")
    sampling.add_argument("--top-p", type=float, metavar="P", help="among the best that reach probability P")
    sampling.add_argument("--min-p", type=float, metavar="P", help="among those of at least P times the best's")
    sampling.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1 avoids repetition")
    sampling.add_argument("--seed", type=int, metavar="S", help="of the random numbers (default 0)")
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="end at this text; repeat for several")
    sampling.add_argument("--logprobs", action="store_true", help="log-probability of each new token (in the JSON)")
    return parser


def _factor(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return value


def _generate(args: argparse.Namespace) -> int:
    # Prompts travel from process 0; everything else must be the same everywhere.
    folder = agree_on(args, alone=("prompt", "prompt_ids", "prompt_file"))
    prompts = _shared_prompts(args)
    mesh = mesh_for(args, folder)
    model, load_s = load_model(
        args,
        folder,
        mesh,
        strategy=args.strategy,
        capacity_factor=args.capacity_factor,
        chunks=args.chunks,
    )
    ids, ignored = encode_prompts(model, prompts, args.chat), settle(model, **_sampling(args)).ignored
    for field in ignored:
        log(f"warning: generation_config.json asks for {field}, which moejax does not do; it is ignored")
    together = min(len(prompts), BATCH)
    for line in report_lines(model, together):
        log(line)
    if args.explain:
        chunk = chunk_size(
            max(map(len, ids[:together])), lay(together, mesh, model.options).rows, mesh.devices.flat[0].platform
        )
        for line in explain_lines(model, together, chunk):
            log(line)
    timing = Timing()
    outputs = _run(model, prompts, args, timing)
    result = _result(model, prompts, outputs, timing, load_s)
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        _summarise(result)
    return 0


def _run(model: LanguageModel, prompts: list[Prompt], args: argparse.Namespace, timing: Timing) -> list[Generation]:
    """Generates; a single prompt's text appears as it is made, several are printed at the end."""
    streaming = len(prompts) == 1 and not args.json and model.tokenizer is not None
    leads = [_lead(prompt, args.chat) for prompt in prompts]
    with Transcript(leads[0] if streaming else None) as transcript:
        outputs = generate(
            model,
            prompts,
            **_sampling(args),
            logprobs=args.logprobs,
            max_model_len=args.max_model_len,
            chat=args.chat,
            on_text=transcript.answer,
            on_reasoning=transcript.reason,
            timing=timing,
        )
    if args.json or streaming:
        return outputs
    for number, (lead, output) in enumerate(zip(leads, outputs, strict=True)):
        label = f"[{number}] " if len(outputs) > 1 else ""
        if output.reasoning:
            think(f"{label}{output.reasoning}\n")
        print(label + (lead + output.text if model.tokenizer else " ".join(map(str, output.tokens))), flush=True)
    return outputs


def _lead(prompt: Prompt, chat: bool) -> str:
    """What stands before a continuation: the prompt it continues; an answer in a chat stands on its own line."""
    if not isinstance(prompt, str):
        return ""
    return f"{prompt}\n" if chat else prompt


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SAMPLING}


def _shared_prompts(args: argparse.Namespace) -> list[Prompt]:
    """The prompts, read by process 0 alone. What it cannot read is an error everywhere."""
    if not distributed.is_main():
        answer = json.loads(distributed.share(None))
    else:
        try:
            answer: dict[str, Any] = {"prompts": _read_prompts(args)}
        except MoejaxError as error:
            answer = {"error": str(error)}
        distributed.share(json.dumps(answer).encode())
    if "error" in answer:
        raise MoejaxError(answer["error"])
    return answer["prompts"]


def _read_prompts(args: argparse.Namespace) -> list[Prompt]:
    given = [name for name in ("prompt", "prompt_ids", "prompt_file") if getattr(args, name) is not None]
    if len(given) > 1:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise MoejaxError(f"{flags} were given together; use one of them")
    if args.prompt_ids is not None:
        return [_parse_ids(text) for text in args.prompt_ids]
    if args.prompt is not None:
        return list(args.prompt)
    if args.prompt_file is not None:
        text = _read_file(Path(args.prompt_file))
        return [_conversation(text) or text if args.chat else text]
    text = _read_stdin().rstrip("\n")
    if args.chat and (messages := _conversation(text)):
        return [messages]
    if not text:
        log(f'no prompt was given, so this continues "{DEFAULT_PROMPT}" (--prompt TEXT, or standard input)')
    return [text or DEFAULT_PROMPT]


def _conversation(text: str) -> list[dict[str, Any]] | None:
    """The messages that a text holds as JSON; None for a text that is one message itself."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    messages = isinstance(value, list) and all(isinstance(item, dict) and "role" in item for item in value)
    return value if messages else None


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise MoejaxError(f'--prompt-ids "{text}" is not a list of whole numbers such as 1,2,3') from error


def _read_stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise MoejaxError(f"standard input is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").rstrip("\n")
    except OSError as error:
        raise MoejaxError(f"cannot read the prompt file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise MoejaxError(f"the prompt file {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _result(
    model: LanguageModel, prompts: list[Prompt], outputs: list[Generation], timing: Timing, load_s: float
) -> dict[str, Any]:
    """The command's JSON; times leave compilation out and count the host's work in."""
    prompt_tokens = sum(output.prompt_tokens for output in outputs)
    items = []
    for prompt, output in zip(prompts, outputs, strict=True):
        item = {
            "prompt": prompt,
            "text": output.text,
            "tokens": output.tokens,
            "finish_reason": output.finish_reason,
        }
        asked = {"reasoning": output.reasoning, "logprobs": output.logprobs}
        items.append(item | {name: value for name, value in asked.items() if value is not None})
    peaks = [stats["peak_bytes_in_use"] for d in jax.local_devices() if (stats := d.memory_stats())]
    return {
        "outputs": items,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": sum(len(output.tokens) for output in outputs),
        },
        "mesh": {axis: model.mesh.shape[axis] for axis in ("ep", "tp")},
        "strategy": lay(min(len(prompts), BATCH), model.mesh, model.options).choice.strategy,
        "dtype": next(iter(model.parameters().values())).dtype.name,
        "load_s": load_s,
        "compile_s": timing.compile_s,
        "ttft_s": timing.first_s,
        "tpot_s": timing.later_s / timing.steps if timing.steps else None,
        "prefill_tok_s": prompt_tokens / timing.first_s,
        "decode_tok_s": timing.later_tokens / timing.later_s if timing.later_tokens else None,
        "peak_rss_bytes": peak_rss(),
        "peak_device_bytes": max(peaks, default=None),
        "dropped": timing.dropped,
    }


def _summarise(result: dict[str, Any]) -> None:
    usage, rate = result["usage"], result["decode_tok_s"]
    decode = f", decode {rate:.0f} tokens/s" if rate else ""
    dropped = f"; {result['dropped']} pairs dropped" if result["dropped"] else ""
    log(
        f"{usage['prompt_tokens']} prompt and {usage['completion_tokens']} new tokens; loaded in "
        f"{result['load_s']:.1f} s, compiled in {result['compile_s']:.1f} s; "
        f"prefill {result['prefill_tok_s']:.0f} tokens/s{decode}{dropped}"
    )
