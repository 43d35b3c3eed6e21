"""Where the tests run: on eight virtual CPU devices, or on the accelerators that MOEJAX_TEST_PLATFORM names."""

import os

import jax

PLATFORM = os.environ.get("MOEJAX_TEST_PLATFORM", "cpu")
"""Such as "cuda". Not the whole suite makes sense there: see `test_on_gpu`."""


def fits(spec: str) -> bool:
    """Whether a mesh has its devices here."""
    from moejax.mesh import parse_mesh  # not before jaxtyping watches over what is imported

    return PLATFORM == "cpu" or parse_mesh(spec).size <= len(jax.devices())


def fitting(spec: str) -> str:
    """The spec of a mesh, or of one device where it does not fit."""
    return spec if fits(spec) else "ep=1,tp=1"
