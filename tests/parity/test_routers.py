"""The router table against the router modules of the transformers that is installed. Run with `-m parity`."""

import importlib
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from router_rows import EXPERTS, ROWS

from moejax.moe.router import router_for

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:::torch|transformers")]

WIDTH, TOKENS = 32, 64  # DeepseekV2Config wants a multiple of its 32 heads
LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": 4}
TOTAL = {"num_experts": EXPERTS, "num_experts_per_tok": 4}
ROUTED = {"n_routed_experts": EXPERTS, "num_experts_per_tok": 4}
GREEDY = {"topk_method": "greedy", "routed_scaling_factor": 1.5}
GROUPED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5}
MODULES = {
    # row of the table: (folder of transformers, config class, router class, what the config says)
    "mixtral": ("mixtral", "MixtralConfig", "MixtralTopKRouter", LOCAL | {"num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", "Qwen2MoeConfig", "Qwen2MoeTopKRouter", TOTAL | {"norm_topk_prob": False}),
    "qwen3_next": ("qwen3_next", "Qwen3NextConfig", "Qwen3NextTopKRouter", TOTAL | {"norm_topk_prob": True}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", "HunYuanMoEV1Config", "HunYuanMoEV1Gate", TOTAL | {"moe_topk": 4}),
    "gpt_oss": ("gpt_oss", "GptOssConfig", "GptOssTopKRouter", LOCAL),
    "granitemoe": ("granitemoe", "GraniteMoeConfig", "GraniteMoeTopKRouter", LOCAL),
    "deepseek_v2": ("deepseek_v2", "DeepseekV2Config", "DeepseekV2TopkRouter", ROUTED | GREEDY),
    "deepseek_v2 in groups": ("deepseek_v2", "DeepseekV2Config", "DeepseekV2TopkRouter", ROUTED | GROUPED),
    "deepseek_v3": (
        "deepseek_v3",
        "DeepseekV3Config",
        "DeepseekV3TopkRouter",
        ROUTED | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
    ),
    "glm4_moe": (
        "glm4_moe",
        "Glm4MoeConfig",
        "Glm4MoeTopkRouter",
        ROUTED | {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True},
    ),
    "dots1": (
        "dots1",
        "Dots1Config",
        "Dots1TopkRouter",
        ROUTED | {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 0.5, "norm_topk_prob": False},
    ),
    "minimax_m2": ("minimax_m2", "MiniMaxM2Config", "MiniMaxM2TopKRouter", LOCAL),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeTopKRouter",
        {"moe_num_experts": EXPERTS, "moe_k": 4, "moe_norm_min": 0.25},
    ),
    "llama4": ("llama4", "Llama4TextConfig", "Llama4Router", LOCAL | {"num_experts_per_tok": 2}),
    "gemma4": ("gemma4", "Gemma4TextConfig", "Gemma4TextRouter", {"num_experts": EXPERTS, "top_k_experts": 4}),
    "phimoe": ("phimoe", "PhimoeConfig", "PhimoeTopKRouter", LOCAL | {"num_experts_per_tok": 2}),
}


def theirs(name):
    """The logits, the weights `[T, E]` (0 where not chosen), and the learned parts by moejax's names."""
    folder, config_class, router_class, said = MODULES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = importlib.import_module("torch")
        modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        configuration = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
        config = getattr(configuration, config_class)(hidden_size=WIDTH, **said)
    rng = np.random.default_rng(0)
    router = getattr(modeling, router_class)(config).eval()
    with torch.no_grad():
        for tensor in [*router.parameters(), *router.buffers()]:
            tensor.copy_(torch.tensor(rng.standard_normal(tuple(tensor.shape)) * 0.3))
        correction = torch.tensor(rng.standard_normal(EXPERTS) * 0.3, dtype=torch.float32)
        x = torch.tensor(rng.standard_normal((TOKENS, WIDTH)), dtype=torch.float32)
        if name == "minimax_m2":
            logits, weights, experts = router(x, correction)
        elif name == "llama4":
            scores, logits = router(x)
            weights, experts = scores.topk(2)
        elif name == "gemma4":
            logits = router.proj(router.norm(x) * router.scale * router.scalar_root_size)
            _, weights, experts = router(x)
        else:
            logits, weights, experts = router(x)
        dense = torch.zeros(TOKENS, EXPERTS).scatter_(1, experts, weights)
    named = {part.split(".")[-1]: a for part, a in router.state_dict().items()}
    learned = {
        "correction": correction if name == "minimax_m2" else named.get("e_score_correction_bias"),
        "expert_scale": named.get("per_expert_scale"),
    }
    return logits.numpy(), dense.numpy(), {k: v.reshape(-1).numpy() for k, v in learned.items() if v is not None}


@pytest.mark.parametrize("name", ROWS)
def test_routers_agree_with_transformers(name):
    logits, want, learned = theirs(name)
    got = router_for(ROWS[name].config)(jnp.asarray(logits), **{k: jnp.asarray(v) for k, v in learned.items()})
    dense = np.zeros_like(want)
    np.put_along_axis(dense, np.asarray(got.experts), np.asarray(got.weights), 1)
    np.testing.assert_array_equal(dense != 0, want != 0)
    np.testing.assert_allclose(dense, want, rtol=1e-5, atol=1e-7)
