"""Other runtimes' spellings of a layout, translated into `--mesh`.

TensorRT-LLM: `--tp_size` counts all devices of a model (without pipeline stages), and inside a mixture of experts
moe_tp_size * moe_ep_size = tp_size; when one of the two is missing it is the quotient, when both are, experts are split
by tensor parallelism alone. Its `trtllm-serve` and SGLang say `--tp_size N --ep_size E` (SGLang with hyphens) for the
same: ep = E, and each expert is cut into N / E.
Sources: TensorRT-LLM "Expert Parallelism" and "Parallelism in TensorRT LLM"; SGLang "Expert Parallelism".
"""

import argparse
import sys

from moejax.errors import MoejaxError
from moejax.mesh import MeshShape, parse_mesh

_HELP = {
    "--tp-size": "all devices (TensorRT-LLM, SGLang)",
    "--ep-size": "expert-parallel devices out of --tp-size (TensorRT-LLM, SGLang)",
    "--moe-ep-size": "expert-parallel devices (TensorRT-LLM)",
    "--moe-tp-size": "tensor-parallel devices of one expert (TensorRT-LLM)",
}


def add_compat_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the four sizes, with hyphens and with underscores."""
    group = parser.add_argument_group("other runtimes' spellings of --mesh")
    for flag, text in _HELP.items():
        group.add_argument(flag, "--" + flag[2:].replace("-", "_"), type=_size, metavar="N", help=text)


def translate(args: argparse.Namespace) -> str | None:
    """The mesh that `--mesh` and the other runtimes' flags ask for together; None when nothing was given.

    Prints one line on stderr when it translated something.

    Raises:
        MoejaxError: sizes that contradict one another or `--mesh`, or do not divide.
    """
    given = [f"{flag} {value}" for flag in _HELP if (value := _value(args, flag)) is not None]
    if not given:
        return args.mesh
    flags, shape = " ".join(given), _shape(args)
    if args.mesh is not None and parse_mesh(args.mesh) != shape:
        raise MoejaxError(f"{flags} means --mesh {shape}, which contradicts --mesh {args.mesh}; give only one of them")
    print(f"{flags} means --mesh {shape}", file=sys.stderr)
    return str(shape)


def _shape(args: argparse.Namespace) -> MeshShape:
    total, tp = args.tp_size, args.moe_tp_size
    if None not in (args.ep_size, args.moe_ep_size) and args.ep_size != args.moe_ep_size:
        raise MoejaxError(
            f"--ep-size {args.ep_size} contradicts --moe-ep-size {args.moe_ep_size}; give only one of them"
        )
    ep = args.moe_ep_size if args.ep_size is None else args.ep_size
    if total is None:
        if args.ep_size is not None and tp is None:
            raise MoejaxError(f"--ep-size {ep} needs --tp-size, the number of all devices; or write --mesh ep={ep}")
        return MeshShape(ep or 1, tp or 1)
    if ep is not None and tp is not None and ep * tp != total:
        raise MoejaxError(
            f"expert-parallel size {ep} times --moe-tp-size {tp} is {ep * tp}, but --tp-size, all devices, is {total}"
        )
    part = ep or tp or 1
    if total % part:
        name = "the expert-parallel size" if ep else "--moe-tp-size"
        raise MoejaxError(f"--tp-size {total}, all devices, is not a multiple of {name} {part}")
    return MeshShape(total // tp, tp) if tp else MeshShape(part, total // part)


def _value(args: argparse.Namespace, flag: str) -> int | None:
    return getattr(args, flag[2:].replace("-", "_"))


def _size(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1")
    return int(text)
