"""`moejax convert`: weights between a run's checkpoints and Hugging Face folders."""

import argparse
import json
import time
from pathlib import Path

from moejax import distributed
from moejax.checkpoint.source import resolve
from moejax.commands.common import DTYPES, base_parser, run
from moejax.commands.session import LoadingBar, log
from moejax.errors import MoejaxError
from moejax.mesh import make_mesh
from moejax.process_memory import peak_rss
from moejax.run_checkpoints.conversion import Converted, to_huggingface, to_run
from moejax.run_checkpoints.stored import saved_steps
from moejax.start_report import human_bytes

LAYOUTS = ("hf", "orbax")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run(_convert, _parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = base_parser(
        "moejax convert",
        "Write the weights of a run as a Hugging Face folder, or those of a Hugging Face folder as a run's: DST/model\n"
        "and checkpoint 0 in DST/checkpoints, as orbax writes it. A few hundred megabytes are in memory at a time, or\n"
        "the experts of one layer where they are more.",
        "moejax convert demo /tmp/converted --to orbax",
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a run's folder (its newest checkpoint is taken), one checkpoint RUN/checkpoints/STEP, or a Hugging Face "
        'folder, a hub id "org/name[@revision]" or "demo"',
    )
    parser.add_argument("target", metavar="DST", help="a new or empty folder")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="the layout to write")
    parser.add_argument(
        "--dtype",
        choices=DTYPES[1:],
        help="of the weights, with --to hf (default: the config's for a run's; converted ones keep their own)",
    )
    return parser


def _convert(args: argparse.Namespace) -> int:
    if distributed.process_count() > 1:
        raise MoejaxError("convert runs in one process; start it by itself")
    began = time.perf_counter()
    checkpoint = _checkpoint(Path(args.source).expanduser())
    target = Path(args.target).expanduser()
    mesh = make_mesh("ep=1,tp=1", platform=args.platform or "cpu")
    with LoadingBar(f"converting {args.source}") as progress:
        if args.to == "hf":
            if checkpoint is None:
                raise MoejaxError(
                    f"{args.source} is no run and no checkpoint of one; convert it --to orbax, or name one"
                )
            dtype = args.dtype
            written = to_huggingface(checkpoint, checkpoint.parents[1] / "model", target, mesh, dtype, progress)
        else:
            if checkpoint is not None:
                raise MoejaxError(f"{args.source} is a run's already; convert it --to hf, or name a Hugging Face model")
            if args.dtype:
                raise MoejaxError("--dtype goes with --to hf; a run's layout keeps the weights as they are")
            written = to_run(resolve(args.source), target, mesh, progress)
    _tell(args, checkpoint, target, written, time.perf_counter() - began)
    return 0


def _checkpoint(source: Path) -> Path | None:
    """The checkpoint that a run's folder or a checkpoint's own stands for; None where it is neither."""
    if (source / "checkpoints").is_dir():
        steps = saved_steps(source / "checkpoints")
        if not steps:
            raise MoejaxError(f"{source} has no checkpoint yet; wait for its first save")
        return source.absolute() / "checkpoints" / str(steps[-1])
    return source.absolute() if source.name.isdigit() and source.parent.name == "checkpoints" else None


def _tell(args: argparse.Namespace, checkpoint: Path | None, target: Path, written: Converted, seconds: float) -> None:
    if not args.json:
        size = human_bytes(written.bytes)
        log(f"{written.parameters:,} parameters, {size} in {written.dtype}, in {seconds:.1f} s")
        print(target)
        return
    result = {
        "folder": str(target),
        "layout": args.to,
        "step": int(checkpoint.name) if checkpoint else 0,
        "parameters": written.parameters,
        "bytes": written.bytes,
        "dtype": written.dtype,
        "seconds": seconds,
        "peak_rss_bytes": peak_rss(),
    }
    print(json.dumps(result))
