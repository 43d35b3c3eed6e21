"""Multi-head latent attention on one device, keys and values of every head written out: what the sharded layer must
equal."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.config import LatentAttentionConfig, NormConfig
from moejax.kernels.attention.reference import attend, causal
from moejax.nn.norm import rms_norm
from moejax.nn.places import Places
from moejax.nn.rope import apply_rope
from moejax.precision import precision_of


def latent_attention_reference(
    params: dict[str, jax.Array],
    config: LatentAttentionConfig,
    norm: NormConfig,
    x: Float[Array, "B S D"],
    places: Places,
    segments: Int[Array, "B S"],
) -> Float[Array, "B S D"]:
    """Attention of whole sequences over themselves.

    Args:
      params: as `LatentAttention` names them, with the checkpoint's number of heads.
      norm: the decoder's; the latents have an epsilon of their own.
      x, places, segments: as `LatentAttention` takes them.

    Source: DeepSeek-AI 2024, "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
    sections 2.1.2 and 2.1.3.
    """
    exact, eps = precision_of(x.dtype), config.latent_norm_eps
    cos, sin = places.table(config.rope)

    def bias(name: str) -> jax.Array:
        return params[name] if config.bias else jnp.zeros((), x.dtype)

    if config.query_rank is None:
        q = jnp.einsum("bsd,dnh->bsnh", x, params["q"], precision=exact)
    else:
        latent = jnp.einsum("bsd,dl->bsl", x, params["q_a"], precision=exact) + bias("q_a_bias")
        latent = rms_norm(latent, params["q_a_norm"], eps)
        q = jnp.einsum("bsl,lnh->bsnh", latent, params["q_b"], precision=exact)
    q_nope, q_rope = jnp.split(q, [config.nope_dim], -1)

    latent = jnp.einsum("bsd,dl->bsl", x, params["kv_a"], precision=exact) + bias("kv_a_bias")
    latent, k_rope = jnp.split(latent, [config.kv_rank], -1)
    latent = rms_norm(latent, params["kv_a_norm"], eps)
    kv = jnp.einsum("bsl,lnh->bsnh", latent, params["kv_b"], precision=exact)
    k_nope, v = jnp.split(kv, [config.nope_dim], -1)

    turned_q = apply_rope(q_rope, cos, sin, config.rope.interleaved)
    turned_k = apply_rope(k_rope[:, :, None], cos, sin, config.rope.interleaved)
    q = jnp.concatenate([q_nope, turned_q], -1)
    k = jnp.concatenate([k_nope, jnp.broadcast_to(turned_k, turned_q.shape)], -1)
    out = attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), causal(segments), scale=config.scale)
    return jnp.einsum("bsnv,nvd->bsd", out, params["o"], precision=exact) + bias("o_bias")
