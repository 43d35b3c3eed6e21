"""Tiny models of the families that came after those of `tiny_configs`: one module each, found by itself.

A module has CONFIGS, a dict of raw configs, and may say how its family's code in transformers differs from the others':

- SKIPPED_MASKS: a variant of `golden.make.mask_variants` -> why transformers has no answer for it to compare with.
- ROUTER_GIVES: "probabilities" where what transformers records as router logits is their softmax.
"""

import importlib
import pkgutil
from typing import Any

_MODULES = {name: importlib.import_module(f"tiny_families.{name}") for _, name, _ in pkgutil.iter_modules(__path__)}
_OF = {config: module for module in _MODULES.values() for config in module.CONFIGS}

CONFIGS: dict[str, dict[str, Any]] = {name: _OF[name].CONFIGS[name] for name in sorted(_OF)}

FIRST: tuple[str, ...] = tuple(next(iter(module.CONFIGS)) for module in _MODULES.values())
"""Of each family the config with the most special paths."""


def skipped_masks(name: str) -> dict[str, str]:
    """Variants of masks that a config's family does not honour in transformers, and why."""
    return getattr(_OF[name], "SKIPPED_MASKS", {})


def gives_probabilities(name: str) -> bool:
    """Whether transformers records probabilities as a config's router logits."""
    return getattr(_OF[name], "ROUTER_GIVES", "logits") == "probabilities"
