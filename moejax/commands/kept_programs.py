"""Compiled programs kept in the user's cache, so that a command starts fast the second time.

JAX finds a program again by its own text, the compiler's version and flags, and the devices, among them the kind of
processor. Only command lines use this: importing moejax changes no setting of JAX.
"""

import os

import jax

from moejax.user_cache import user_cache

WORTH_KEEPING_S = 0.2
"""Programs that compile faster than this are compiled anew each time."""


def keep_programs() -> None:
    """Points JAX's persistent compilation cache at the user's folder.

    Nothing changes where JAX_COMPILATION_CACHE_DIR names a folder, JAX_ENABLE_COMPILATION_CACHE=false is set, or the
    user's folder cannot be written.
    """
    given, enabled = (
        getattr(jax.config, f"jax_{name}") for name in ("compilation_cache_dir", "enable_compilation_cache")
    )
    if given is not None or not enabled:
        return
    folder = user_cache() / "programs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING_S)
