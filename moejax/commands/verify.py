"""`moejax verify`: prove that meshes and strategies compute what one device computes."""

import argparse
import json
import time

import jax
from jax.sharding import Mesh
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moejax import distributed
from moejax.commands.common import DTYPES, add_dequantise, base_parser, run
from moejax.commands.session import agree_on, console, log, say_left_out
from moejax.errors import MoejaxError
from moejax.loading import load
from moejax.mesh import MeshShape, make_mesh, parse_mesh
from moejax.start_report import report_lines
from moejax.verification.compare import Row
from moejax.verification.run import Verifier

DEFAULT_MESHES = ("ep=1,tp=1", "ep=4,tp=1", "ep=1,tp=4", "ep=4,tp=2", "ep=2,tp=4")
STRATEGIES = ("all_to_all", "all_reduce")


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code: 1 when a row is outside the numerics contract."""
    return run(_verify, _parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = base_parser(
        "moejax verify",
        "Compare logits, routing, hidden states, every expert and greedy tokens with one device's, for each mesh and\n"
        "strategy. The oracle is streamed a layer at a time, so the model may be larger than one device.\n\n"
        "error   of the logits, over the largest of them\n"
        "greedy  whether the generated tokens are the oracle's, up to a sequence's first tie\n"
        "drops   pairs of token and expert that were dropped\n"
        "ties    sequences in which the oracle itself is undecided somewhere; compared up to there\n"
        "margin  how narrowly the narrowest choice among those compared was made",
        "moejax verify --model demo --meshes ep=1,tp=1 ep=4,tp=2 --platform cpu",
    )
    parser.add_argument(
        "--model", default="demo", metavar="M", help='a folder, a hub id "org/name[@revision]" or "demo" (default)'
    )
    parser.add_argument("--meshes", nargs="+", metavar="ep=A,tp=B", help=f"default: {' '.join(DEFAULT_MESHES)}")
    parser.add_argument(
        "--strategies", nargs="+", choices=("auto", *STRATEGIES), default=STRATEGIES, help="default: both strategies"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=DTYPES,
        help="default float32, compared to 1e-5 (1e-4 where layers are recurrent); 16-bit dtypes by agreement of the "
        "best token and KL divergence",
    )
    add_dequantise(parser)
    return parser


def _verify(args: argparse.Namespace) -> int:
    folder = agree_on(args)
    meshes = _meshes(args)
    verifier = Verifier(folder, args.dtype)
    log(f"oracle    one device, a layer at a time; {len(verifier.prompts)} prompts of random ids, greedy continuations")
    rows = []
    began = time.perf_counter()
    with console.status("") as status:
        jobs = [(mesh, strategy) for mesh in meshes for strategy in args.strategies]
        for number, (mesh, strategy) in enumerate(jobs, 1):
            shape = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
            status.update(f"{number} of {len(jobs)}: {shape} {strategy}")
            model = load(folder, mesh=mesh, dtype=args.dtype, strategy=strategy, packed=not args.dequantise)
            if number == 1:
                say_left_out(model)
            for line in report_lines(model, len(verifier.prompts)):
                log(line)
            rows.append(verifier.check(model))
            # Each row has programs of its own. Kept, those of some fifty rows use up the system's memory maps.
            jax.clear_caches()
            log(f"{'ok  ' if rows[-1].ok else 'BAD '} {shape} {strategy} ({time.perf_counter() - began:.0f} s)")
    ok = all(row.ok for row in rows)
    if args.json:
        print(json.dumps({"rows": [row.as_json() for row in rows], "ok": ok}, allow_nan=False))
    elif distributed.is_main():
        Console().print(_table(rows))
    return 0 if ok else 1


def _meshes(args: argparse.Namespace) -> list[Mesh]:
    """The meshes, the largest made first so that there are virtual devices for all."""
    texts = args.meshes or DEFAULT_MESHES
    shapes = [parse_mesh(text) for text in texts]
    made: dict[MeshShape, Mesh] = {}
    for shape in sorted(set(shapes), key=lambda shape: -shape.size):
        try:
            made[shape] = make_mesh(str(shape), platform=args.platform)
        except MoejaxError as error:
            if args.meshes:
                raise
            log(f"left out  {shape}: {error}")
    if not made:
        raise MoejaxError("none of the default meshes fits these devices; name one with --meshes")
    return [made[shape] for shape in shapes if shape in made]


def _table(rows: list[Row]) -> Table:
    """The rows in 80 columns. A 16-bit dtype is judged by other figures, which take the place of those of float32."""
    figures = _narrow_figures if rows[0].kl is not None else _figures
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("mesh", "strategy", *figures(rows[0]), "bad layer", "ok"):
        table.add_column(title, no_wrap=True)
    for row in rows:
        bad = "-" if row.first_bad_layer is None else str(row.first_bad_layer)
        table.add_row(row.mesh, row.strategy, *figures(row).values(), bad, "yes" if row.ok else "NO")
    return table


def _figures(row: Row) -> dict[str, str]:
    return {
        "error": f"{row.max_rel_err:.1e}",
        "greedy": "same" if row.greedy_match else "DIFFERS",
        "drops": str(row.dropped),
        "ties": str(row.ties),
        "margin": "-" if row.min_margin is None else f"{row.min_margin:.1e}",
    }


def _narrow_figures(row: Row) -> dict[str, str]:
    return {
        "error": f"{row.max_rel_err:.1e}",
        "same best": f"{row.argmax_agreement:.1%}",
        "KL": f"{row.kl:.1e}",
        "drops": str(row.dropped),
    }
