"""Mixture-of-experts language models in JAX on an ("ep", "tp") mesh."""

from moejax.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig, RouterConfig
from moejax.errors import MoejaxError
from moejax.inference.generate import Generation, generate
from moejax.language_model import LanguageModel
from moejax.loading import load, save_pretrained
from moejax.mesh import make_mesh
from moejax.model import Forward
from moejax.moe.block import moe
from moejax.moe.dispatch import DispatchPlan, make_plan
from moejax.moe.layer import MoE, MoEDetails
from moejax.moe.params import ExpertParams
from moejax.moe.reference import dense_moe
from moejax.moe.router import Router, Routing, softmax_router
from moejax.moe.strategies.local import Accounting

__version__ = "0.1.0"

__all__ = [
    "Accounting",
    "AttentionConfig",
    "DispatchPlan",
    "ExpertParams",
    "Forward",
    "Generation",
    "LanguageModel",
    "MoE",
    "MoEConfig",
    "MoEDetails",
    "ModelConfig",
    "MoejaxError",
    "RopeConfig",
    "Router",
    "RouterConfig",
    "Routing",
    "dense_moe",
    "generate",
    "load",
    "make_mesh",
    "make_plan",
    "moe",
    "save_pretrained",
    "softmax_router",
]
