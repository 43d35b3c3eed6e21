"""The oracle's Gated DeltaNet: one device, one token after the other, nothing shared with the layer but the rule."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moejax.config import DeltaNetConfig, NormConfig
from moejax.moe.activations import named_activation
from moejax.nn.delta_rule import recurrent
from moejax.nn.norm import rms_norm
from moejax.precision import precision_of


def delta_net_reference(
    params: Mapping[str, jax.Array],
    config: DeltaNetConfig,
    norm: NormConfig,
    x: Float[Array, "B S D"],
    segments: Int[Array, "B S"],
) -> Float[Array, "B S D"]:
    """What `DeltaNet` gives for whole sequences, `params` its parameters as one device holds them."""
    precision = precision_of(x.dtype)
    x = jnp.where(segments[..., None] > 0, x, jnp.zeros((), x.dtype))
    heads = {name: jnp.einsum("bsd,dnh->bsnh", x, params[name], precision=precision) for name in "qkvz"}
    b, a = (jnp.einsum("bsd,dn->bsn", x, params[name], precision=precision).astype(jnp.float32) for name in "ba")
    beta = jax.nn.sigmoid(b).astype(x.dtype)
    speed, bias = (params[name].astype(jnp.float32) for name in ("A_log", "dt_bias"))
    log_decay = -jnp.exp(speed) * jax.nn.softplus(a + bias)
    weights = {name: params[f"conv_{name}"].astype(jnp.float32) for name in "qkv"}

    def step(carry: tuple, token: tuple) -> tuple[tuple, jax.Array]:
        current, windows, state = carry
        segment, inputs, g, beta = token
        new = (segment > 0) & (segment != current)
        state = jnp.where(new[:, None, None, None], 0.0, state)
        after, mixed = {}, {}
        for name, window in windows.items():
            window = jnp.where(new[:, None, None, None], jnp.zeros((), x.dtype), window)
            after[name] = jnp.concatenate([window[..., 1:], inputs[name][..., None]], -1)
            y = (after[name].astype(jnp.float32) * weights[name]).sum(-1).astype(x.dtype)
            mixed[name] = named_activation(y, config.activation)[:, None]
        out, state = recurrent(mixed["q"], mixed["k"], mixed["v"], g[:, None], beta[:, None], state=state)
        return (jnp.where(segment > 0, segment, current), after, state), out[:, 0]

    rows = x.shape[0]
    windows = {name: jnp.zeros((rows, *weights[name].shape), x.dtype) for name in "qkv"}
    state = jnp.zeros((rows, config.num_value_heads, config.key_dim, config.value_dim), jnp.float32)
    tokens = (segments, {name: heads[name] for name in "qkv"}, log_decay, beta)
    carry = (jnp.zeros(rows, segments.dtype), windows, state)
    _, out = lax.scan(step, carry, jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), tokens))
    out = rms_norm(jnp.swapaxes(out, 0, 1).astype(x.dtype), params["norm"], norm.eps)
    out = (out.astype(jnp.float32) * jax.nn.silu(heads["z"].astype(jnp.float32))).astype(x.dtype)
    return jnp.einsum("bsnh,nhd->bsd", out, params["o"], precision=precision)
