"""The handlers in this process: loaded and registered with XLA once, or found to be unavailable, said once."""

import ctypes
import os
import sys
import threading
from functools import cache

import jax

from moejax.kernels.native import build

HANDLERS = (
    "moejax_products",
    "moejax_packed_products",
    "moejax_gated_products",
    "moejax_weight_gradient",
    "moejax_attend",
    "moejax_attend_gradient",
    "moejax_take",
    "moejax_put",
)
_LOCK = threading.Lock()


def available() -> bool:
    """Whether the handlers are registered in this process; compiles and loads them on the first call.

    False where MOEJAX_NATIVE=0 is set, no C++ compiler works, or the library does not load: one line on stderr says so,
    once.
    """
    return bool(instruction_sets())


def instruction_sets() -> tuple[str, ...]:
    """The names of the instruction sets that the handlers can use here, the best last; empty without handlers."""
    with _LOCK:  # of two threads that trace at once, one compiles and registers
        return _set_up()


@cache
def _set_up() -> tuple[str, ...]:
    if os.environ.get("MOEJAX_NATIVE") == "0":
        _say("off, since MOEJAX_NATIVE=0 is set; products go through XLA alone, which is slower")
        return ()
    try:
        library = build.load()
    except build.BuildError as error:
        _say(f"unavailable: {error}; products go through XLA alone, which is slower")
        return ()
    names, refused = _checked_sets(library)
    if refused:
        _say(f"{refused} failed the check at loading and stays unused")
    for handler in HANDLERS:
        jax.ffi.register_ffi_target(handler, jax.ffi.pycapsule(getattr(library, handler)), platform="cpu")
    return names


def _checked_sets(library: ctypes.CDLL) -> tuple[tuple[str, ...], str]:
    """The names of the usable instruction sets, and of those whose results differ from portable code's."""
    text = ctypes.create_string_buffer(256)
    library.moejax_instruction_sets(text, ctypes.c_int64(len(text)))
    usable, _, refused = text.value.decode().partition(";")
    return tuple(usable.split(",")), refused


def _say(message: str) -> None:
    print(f"moejax: the native CPU kernel is {message}", file=sys.stderr, flush=True)
