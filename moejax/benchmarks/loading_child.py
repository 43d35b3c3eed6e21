"""A process that loads one checkpoint with moejax when told to: `moejax.benchmarks.loading` starts it."""

import json
import os
import sys
import time

import jax

from moejax.loading import load
from moejax.mesh import make_mesh


def main(mesh_spec: str, experts: str) -> None:
    """Starts JAX, then answers "hello", and "load" with its seconds: JSON lines on standard input and output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    mesh = make_mesh(mesh_spec, platform="cpu")
    model = None
    for line in sys.stdin:
        name, arguments = json.loads(line)
        answer = {}
        if name == "load":
            began = time.perf_counter()
            model = load(arguments["folder"], mesh=mesh, dtype=arguments["dtype"], packed=experts == "packed")
            jax.block_until_ready(list(model.parameters().values()))
            answer = {"load_s": time.perf_counter() - began}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
