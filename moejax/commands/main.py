"""`moejax X ...`, the same as `python -m moejax.X ...`."""

import argparse
import difflib
import importlib
import sys

import moejax
from moejax.commands.common import INTERRUPTED, leave

COMMANDS = {
    "generate": "continue prompts with a mixture-of-experts model",
    "train": "train a model on a mesh, from random weights or from a checkpoint's",
    "verify": "prove that meshes and strategies compute what one device computes",
    "bench": "measure generation, one block, collectives and loading, against transformers and the machine",
    "upcycle": "turn a dense checkpoint into a mixture of experts",
    "eval": "loss, bits per byte and experts' load of a model on files",
    "report": "write one HTML page about training runs, or compare them on it",
    "convert": "write a run's weights as a Hugging Face folder, or a folder's as a run",
    "tokenizer": "learn a byte-level BPE tokenizer from text",
    "twin": "write a tiny random checkpoint with every special path of a model's config",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command that the first argument names and returns its exit code."""
    if argv is None:
        code = main(sys.argv[1:])
        return leave(code) if code == INTERRUPTED else code
    if argv and argv[0] in COMMANDS:
        return importlib.import_module(f"moejax.commands.{argv[0]}").main(argv[1:])
    if argv and argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    if argv and argv[0] == "--version":
        print(f"moejax {moejax.__version__}")
        return 0
    print(f"error: {_mistake(argv)}", file=sys.stderr)
    return 2


def _help() -> str:
    parser = argparse.ArgumentParser(
        prog="moejax",
        usage="moejax COMMAND ... (moejax COMMAND --help says more)",
        description="Mixture-of-experts language models on an (ep, tp) mesh of any devices.",
        epilog="commands:\n"
        + "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items())
        + '\n\nexample:\n  moejax generate --mesh ep=4,tp=2 --platform cpu --prompt "Once upon a time"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    return parser.format_help().rstrip()


def _mistake(argv: list[str]) -> str:
    if not argv:
        return f"which command? one of {', '.join(COMMANDS)} (see moejax --help)"
    near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
    kind = "option" if argv[0].startswith("-") else "command"
    return f"unknown {kind} '{argv[0]}'; {hint} (see moejax --help)"
