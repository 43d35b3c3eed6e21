"""`moejax upcycle`: a dense checkpoint becomes a mixture of experts."""

import argparse
import json
from pathlib import Path
from typing import Any

from moejax import distributed
from moejax.checkpoint.source import resolve
from moejax.commands.common import DTYPES, base_parser, run
from moejax.commands.session import LoadingBar, log
from moejax.start_report import human_bytes
from moejax.upcycling.copying import Upcycled, upcycle


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run(_upcycle, _parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = base_parser(
        "moejax upcycle",
        "Turn a dense Llama, Mistral or Qwen3 checkpoint into a mixture of experts (Mixtral, Qwen3-MoE) whose\n"
        "experts all start as its MLP, for moejax train --model. Without noise the mixture computes what the dense\n"
        "model does, because the weights of a token's experts sum to 1. For the same reason its routers learn\n"
        "nothing from the loss until the experts have drifted apart by seeing different tokens. With --noise 0.1\n"
        "experts differ, and routers learn, from the first step.",
        "moejax upcycle Qwen/Qwen3-0.6B /tmp/qwen3-8x0.6b --experts 8 --top-k 2 --noise 0.1",
    )
    parser.add_argument("source", metavar="SRC", help='a folder or a hub id "org/name[@revision]"')
    parser.add_argument("out", metavar="DST", help="a new or empty folder")
    parser.add_argument("--experts", type=int, default=8, metavar="E", help="experts in each layer (default 8)")
    parser.add_argument("--top-k", type=int, default=2, metavar="K", help="experts a token (default 2)")
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        metavar="X",
        help="normal noise on each expert's matrices, in standard deviations of the matrix copied (default 0)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise and the routers (default 0)")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the weights (default: the checkpoint's)")
    return parser


def _upcycle(args: argparse.Namespace) -> int:
    if not distributed.is_main():
        return 0
    with LoadingBar(f"writing {args.out}") as progress:
        written = upcycle(
            resolve(args.source),
            Path(args.out),
            experts=args.experts,
            top_k=args.top_k,
            noise=args.noise,
            seed=args.seed,
            dtype=args.dtype,
            progress=progress,
        )
    for name, reason in written.dropped.items():
        log(f"dropped   {name}: {reason}")
    if args.json:
        print(json.dumps(_as_json(written)))
    else:
        log(f"{written.config.model_type}, {written.parameters:,} parameters, {human_bytes(written.bytes)}")
        print(written.folder)
    return 0


def _as_json(written: Upcycled) -> dict[str, Any]:
    return {
        "folder": str(written.folder),
        "model_type": written.config.model_type,
        "parameters": written.parameters,
        "bytes": written.bytes,
        "dropped": dict(written.dropped),
    }
