"""`moejax train`: train a model on a mesh, from random weights or a checkpoint's, and continue where a run stopped."""

import argparse
import importlib.util

from moejax.commands.common import add_mesh, base_parser, run
from moejax.errors import MoejaxError
from moejax.training.recipe import DTYPES

_EXTRA = ("optax", "orbax", "grain", "tensorboardX")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    That is 1 when the loss stayed non-finite, and 130 or 143 when a signal ended the run, which is saved then.
    """
    return run(_train, _parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = base_parser(
        "moejax train",
        "Train a model as a recipe says: from the random weights of a config, or from the weights of a Hugging Face\n"
        "folder, router and experts included. Every mesh computes the same steps.\n\n"
        "Ctrl-C and SIGTERM save at the end of the running step and end the run (exit code 130 or 143); a second\n"
        "one ends it at once. A run that was stopped or killed goes on from its last save with --resume, on any mesh.",
        "moejax train --config configs/train/smoke.toml --data README.md --run /tmp/run --mesh ep=4,tp=2",
    )
    parser.add_argument("--config", metavar="RECIPE", help="a TOML file, such as configs/train/demo.toml")
    parser.add_argument("--run", required=True, metavar="DIR", help="the run's folder: checkpoints, metrics, model")
    add_mesh(parser)
    parser.add_argument(
        "--steps", type=_count, metavar="N", help="stop after step N; the schedule is still that of the recipe's steps"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last save in DIR, or begin if there is none"
    )
    parser.add_argument("--data", nargs="+", metavar="PATH", help="train on these files instead of the recipe's data")
    parser.add_argument(
        "--model", metavar="M", help="train this model from its weights, with its tokenizer: a folder, hub id, demo"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the forward and backward pass, over float32 weights")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a field of the recipe, such as optimizer.lr=3e-4; repeatable",
    )
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1")
    return int(text)


def _train(args: argparse.Namespace) -> int:
    if missing := [name for name in _EXTRA if importlib.util.find_spec(name) is None]:
        raise MoejaxError(f'train needs {", ".join(missing)}; pip install "moejax[train]"')
    from moejax.commands.train_run import train

    return train(args)
