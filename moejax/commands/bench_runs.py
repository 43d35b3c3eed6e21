"""What each benchmark of `moejax bench` sets up, measures and returns as one JSON object."""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import moejax
from moejax.benchmarks import training
from moejax.benchmarks.collectives import time_collectives
from moejax.benchmarks.generation import OWN, Batch, Run, experts_hit, measure, own_contender, peer_contender
from moejax.benchmarks.layer import Case, block_of, layer_flops, time_layers
from moejax.benchmarks.loading import Target, measure_loading
from moejax.benchmarks.peers import Child, check_installed, cpus, load_average, transformers_child
from moejax.benchmarks.probes import chips, matrix_peak, read_bandwidth
from moejax.benchmarks.random_weights import write_random_checkpoint
from moejax.benchmarks.report import Limits, batch_result, timed, train_result
from moejax.benchmarks.work import Work
from moejax.checkpoint.source import read_json
from moejax.commands.session import LoadingBar, agree_on, console, load_model, log, mesh_for
from moejax.errors import MoejaxError
from moejax.families import read_config
from moejax.loading import dtype_of
from moejax.mesh import describe, make_mesh, parse_mesh
from moejax.process_memory import peak_rss
from moejax.start_report import report_lines

EXPERTS = ("eager", "grouped_mm", "batched_mm")
"""transformers' implementations of experts that need nothing but torch."""
TRAINED_EXPERTS = ("eager", "grouped_mm")
"""Those that take part in training: batched_mm gathers weights for every pair of token and expert."""

# batched_mm gathers a copy of the weights for every pair of token and expert.
_MOST_GATHERED = 1 << 31


def run_generation(args: argparse.Namespace) -> dict[str, Any]:
    """Latency and throughput: every batch size on its own, with all contenders in turn."""
    for name in ("input_len", "output_len", "batch_size"):
        _at_least(name, getattr(args, name), 2 if name == "output_len" else 1)
    if args.vs:
        # JAX would take most of a GPU's memory for itself when it starts.
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_weights(args))
        mesh = mesh_for(args, folder)
        _check_versus(args, mesh)
        model, _ = load_model(args, folder, mesh, strategy=args.strategy)
        _check_context(args, model.config.context)
        for line in report_lines(model, args.batch_size[0]):
            log(line)
        dtype = next(iter(model.parameters().values())).dtype.name
        peer = stack.enter_context(transformers_child(mesh.size, _torch_device(mesh))) if args.vs else None
        versions = _load_peer(peer, folder, dtype) if peer else {}
        work = Work.of(model.config, args.dtype)
        # Several processes of a peer would share the machine in a probe of their own.
        probe = partial(_limits, dtype, mesh, peer if mesh.size == 1 else None)
        batches = []
        for size in args.batch_size:
            batch = Batch.random(model.config.vocab_size, size, args.input_len, args.output_len)
            contenders = {OWN: own_contender(model, batch)} | _peers(peer, batch, work)
            with _rounds(f"{size} x {args.input_len} + {args.output_len} tokens", args.rounds) as tick:
                figures, probes = measure(contenders, batch, args.rounds, tick, probe)
            limits = Limits.median(probes)
            log(f"limits    {limits}")
            batches.append(batch_result(figures, work, experts_hit(model, work, figures[OWN]), limits))
    lengths = {"input_len": args.input_len, "output_len": args.output_len}
    return _setting(args, mesh, dtype) | versions | lengths | {"batches": batches}


def run_layer(args: argparse.Namespace) -> dict[str, Any]:
    """One block: every mesh with every strategy and number of tokens."""
    _at_least("tokens", args.tokens, 1)
    config = read_config(_raw_config(args))
    moe, dtype = block_of(config), dtype_of(args.dtype, config).dtype.name
    meshes = [make_mesh(text, platform=args.platform) for text in _largest_first(args.meshes)]
    cases = [Case(mesh, strategy, tokens) for tokens in args.tokens for mesh in meshes for strategy in args.strategies]
    with _rounds("layer", args.rounds) as tick:
        spreads = time_layers(moe, cases, dtype, args.rounds, tick)
    with console.status("probing this machine's limits"):
        peak = matrix_peak(dtype)
    rows = []
    for case in cases:
        rate = layer_flops(moe, case.tokens) / spreads[case.name].median
        facts = {"mesh": _axes(case.mesh), "strategy": case.strategy, "tokens": case.tokens}
        rows.append(
            timed(spreads[case.name], **facts, flops_per_s=rate, peak_share=rate / peak.rate / chips(case.mesh))
        )
    limits = {"matrix_flops_per_s_of_a_chip": peak.rate, "matrix_by": peak.by}
    return _setting(args, meshes[0], dtype) | {"limits": limits, "rows": rows}


def run_collectives(args: argparse.Namespace) -> dict[str, Any]:
    """all_to_all and psum over the axes of the mesh."""
    _at_least("sizes", args.sizes, 1)
    mesh = make_mesh(args.mesh, platform=args.platform)
    with _rounds("collectives", args.rounds) as tick:
        spreads = time_collectives(mesh, args.sizes, args.rounds, tick)
    rows = [
        timed(spread, collective=kind, axes=axes, bytes=size, bytes_per_s=size / spread.median)
        for (kind, axes, size), spread in spreads.items()
    ]
    return _setting(args, mesh, "float32") | {"rows": rows}


def run_train(args: argparse.Namespace) -> dict[str, Any]:
    """Training steps on one batch."""
    for name in ("batch_size", "seq_len"):
        _at_least(name, getattr(args, name), 2 if name == "seq_len" else 1)
    if importlib.util.find_spec("optax") is None:
        raise MoejaxError('bench train needs optax; pip install "moejax[train]"')
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_weights(args))
        mesh = mesh_for(args, folder)
        _check_versus(args, mesh, ("cpu",))
        if args.vs and mesh.size > 1:
            raise MoejaxError(f"train --vs transformers compares single devices, not {mesh.size}; use --mesh ep=1,tp=1")
        dtype = dtype_of(args.dtype, read_config(read_json(folder, "config.json"))).dtype.name
        args.dtype = "float32"  # of the master weights
        peer = stack.enter_context(transformers_child()) if args.vs else None
        versions = _load_peer(peer, folder, "float32") if peer else {}
        model, _ = load_model(args, folder, mesh, strategy=args.strategy)
        work = Work.of(model.config, dtype)
        rows = training.random_rows(model.config.vocab_size, args.batch_size, args.seq_len)
        contenders = {OWN: training.own_contender(model, rows, dtype)}
        if peer:
            for experts in TRAINED_EXPERTS:
                contenders[f"transformers {experts}"] = training.peer_contender(peer, experts, rows, dtype)
        with _rounds(f"{args.batch_size} x {args.seq_len} tokens", args.rounds) as tick:
            figures = training.measure(contenders, args.rounds, tick)
        held = peer.memory("VmHWM") if peer else 0
        peaks = {name: peak_rss() if name == OWN else held for name in figures}
        with console.status("probing this machine's limits"):
            peak = matrix_peak(dtype, peer).times(chips(mesh))
    flops = training.step_flops(work, args.batch_size, args.seq_len)
    shape = {"batch_size": args.batch_size, "seq_len": args.seq_len, "step_flops": flops}
    limit = {"limits": {"matrix_flops_per_s": peak.rate, "matrix_by": peak.by}}
    result = train_result(figures, args.batch_size * args.seq_len, flops / peak.rate, peaks)
    return _setting(args, mesh, dtype) | versions | shape | limit | result


def run_load(args: argparse.Namespace) -> dict[str, Any]:
    """Loading in fresh processes."""
    if args.platform not in (None, "cpu"):
        raise MoejaxError(f"load measures the CPU's memory; leave out --platform {args.platform}")
    if args.vs:
        check_installed()
    with _weights(args) as folder:
        config = read_config(read_json(folder, "config.json"))
        dtype = dtype_of(args.dtype, config).dtype.name
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        with _rounds("loading", args.rounds) as tick:
            own = Target(args.mesh or "ep=1,tp=1", packed=not args.dequantise)
            figures = measure_loading(folder, dtype, own, bool(args.vs), args.rounds, tick)
    rows = [timed(f.seconds, contender=name, peak_bytes=f.peak, added_ratio=f.ratio) for name, f in figures.items()]
    own, peer = figures[OWN], figures.get("transformers")
    against = peer and {"time_ratio": peer.seconds.median / own.seconds.median, "peak_ratio": own.peak / peer.peak}
    return {"model": args.model, "dtype": dtype, "bytes": size, "rows": rows, "against": against}


@contextlib.contextmanager
def _weights(args: argparse.Namespace) -> Iterator[Path]:
    """The folder of the model, or one of random weights that lasts as long as the benchmark."""
    if args.config is None:
        yield agree_on(args)
        return
    raw = _raw_config(args)
    with tempfile.TemporaryDirectory(prefix="moejax-bench-") as folder:
        with LoadingBar(f"writing random weights of {args.config}") as progress:
            write_random_checkpoint(Path(folder), raw, args.dtype, progress)
        yield Path(folder)


def _raw_config(args: argparse.Namespace) -> dict[str, Any]:
    if args.config is None:
        return read_json(agree_on(args), "config.json")
    if args.model != "demo":
        raise MoejaxError(f"--model {args.model} and --config {args.config} were given together; use one of them")
    args.model = args.config
    path = Path(args.config).expanduser()
    return read_json(path, "config.json") if path.is_dir() else read_json(path.parent, path.name)


def _check_versus(args: argparse.Namespace, mesh: Mesh, devices: tuple[str, ...] = ("cpu", "cuda")) -> None:
    """Before anything takes long."""
    if not args.vs:
        return
    device = _torch_device(mesh)
    if device not in devices:
        raise MoejaxError(f"--vs transformers does not compare this on {device}; add --platform cpu")
    if device == "cuda" and mesh.size > 1:
        raise MoejaxError(
            f"--vs transformers compares one GPU, not {mesh.size}; use --mesh ep=1,tp=1 or --platform cpu"
        )
    check_installed(mesh.size)


def _torch_device(mesh: Mesh) -> str:
    """The mesh's kind of device as torch calls it."""
    platform = mesh.devices.flat[0].platform
    return "cuda" if platform == "gpu" else platform


def _check_context(args: argparse.Namespace, context: int) -> None:
    """A row that meets the end of the context would stop early."""
    if args.input_len + args.output_len > context:
        raise MoejaxError(
            f"--input-len {args.input_len} and --output-len {args.output_len} are over the model's context of {context}"
        )


def _load_peer(peer: Child, folder: Path, dtype: str) -> dict[str, Any]:
    with console.status("transformers loads the same weights"):
        versions = peer.ask("hello")
        peer.ask("load", folder=str(folder.resolve()), dtype=dtype)
    return {"peer": versions}


def _peers(peer: Child | None, batch: Batch, work: Work) -> dict[str, Callable[[], Run]]:
    """One contender for each implementation of the experts that can run this batch."""
    if peer is None:
        return {}
    chosen = max((layer.moe.num_experts_per_tok for layer in work.config.layers if layer.moe), default=0)
    gathered = batch.size * batch.prompt_tokens * chosen * max(work.expert_bytes, default=0)
    contenders = {}
    for experts in EXPERTS:
        if experts == "batched_mm" and gathered > _MOST_GATHERED:
            log(f"left out  transformers {experts}: it would gather {gathered / 1e9:.0f} GB of weights in prefill")
            continue
        trial = peer_contender(peer, experts, Batch([row[:4] for row in batch.prompts[:1]], 2))
        try:
            trial()
        except MoejaxError as error:
            log(f"left out  transformers {experts}: {error}")
            continue
        contenders[f"transformers {experts}"] = peer_contender(peer, experts, batch)
    return contenders


def _limits(dtype: str, mesh: Mesh, peer: Child | None) -> Limits:
    count = chips(mesh)
    return Limits(matrix_peak(dtype, peer).times(count), read_bandwidth(peer).times(count))


@contextlib.contextmanager
def _rounds(title: str, rounds: int) -> Iterator[Callable[[str, int], None]]:
    """A status line that says who runs in which round."""
    with console.status(title) as status:
        yield lambda name, number: status.update(
            f"{title}: {f'round {number} of {rounds}' if number else 'warm-up'}, {name}"
        )


def _setting(args: argparse.Namespace, mesh: Mesh, dtype: str) -> dict[str, Any]:
    """What a figure means nothing without."""
    return {
        **{name: getattr(args, name) for name in ("model", "strategy") if name in args},
        "mesh": _axes(mesh),
        "devices": describe(mesh),
        "dtype": dtype,
        "rounds": args.rounds,
        "cpus": cpus(),
        "load_average": load_average(),
        "versions": {"moejax": moejax.__version__, "jax": jax.__version__, "flax": importlib.metadata.version("flax")},
    }


def _axes(mesh: Mesh) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())


def _largest_first(meshes: list[str] | None) -> list[str | None]:
    """So that there are virtual devices for all."""
    return [None] if meshes is None else [*sorted(meshes, key=lambda text: -parse_mesh(text).size)]


def _at_least(name: str, value: int | list[int], least: int) -> None:
    for number in value if isinstance(value, list) else [value]:
        if number < least:
            raise MoejaxError(f"--{name.replace('_', '-')} {number} must be at least {least}")
