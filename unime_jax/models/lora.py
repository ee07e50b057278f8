"""Low-rank adapters (LoRA): attach them to chosen linear layers, merge them into the weights.

An adapter adds `scale * (x @ lora_A) @ lora_B` to a linear layer (Hu et al. 2021). lora_B starts
at zero, so attaching changes nothing. Parameters are f32 whatever the base's dtype.
"""

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from unime_jax.models.layers import Linear
from unime_jax.types import Params, UserError, flatten


def linears(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """Yields every linear layer with its path."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Linear):
            yield "/".join(map(str, path)), module


def attach(
    model: nnx.Module,
    *,
    rank: int,
    alpha: int | float,
    dropout: int | float,
    targets: str,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """Adds an adapter to every linear layer whose path matches; changes the model in place.

    Args:
      rank: R.
      alpha: the adapter's output is scaled by alpha / R.
      dropout: rate on the adapter's input when the model is called with a key.
      targets: regex, searched in paths such as "language_model/model/layers/self_attn/q_proj".
      rngs: lora_A is drawn uniformly from +-1 / sqrt(inputs), as PEFT does.

    Raises:
      UserError: nothing matches, a matching layer has an adapter already, or rank < 1.
    """
    if rank < 1:
        raise UserError(f"adapter rank is {rank}; it must be at least 1")
    known = dict(linears(model))
    chosen = {path: linear for path, linear in known.items() if re.search(targets, path)}
    if not chosen:
        some = ", ".join(sorted(known)[:3])
        raise UserError(f"adapter targets {targets!r} match no linear layer; paths are like {some}")
    for path, linear in chosen.items():
        if linear.lora_A is not None:
            raise UserError(f"{path} has an adapter already; merge it before attaching another")
        *layers, inputs, outputs = linear.shape
        bound = inputs**-0.5
        init = jax.random.uniform(
            rngs.params(), (*layers, inputs, rank), jnp.float32, -bound, bound
        )
        linear.lora_A = nnx.data(nnx.Param(init))
        linear.lora_B = nnx.data(nnx.Param(jnp.zeros((*layers, rank, outputs), jnp.float32)))
        linear.lora_scale = alpha / rank
        linear.lora_dropout = dropout
    return model


def merge(model: nnx.Module) -> nnx.Module:
    """Adds every adapter to its weight, in f32, and removes it; changes the model in place.

    Raises:
      UserError: a weight is quantised: adapters belong into the original ones.
    """
    for path, linear in linears(model):
        if linear.lora_A is None:
            continue
        if linear.kernel is None:
            raise UserError(f"{path} is quantized: load the run, which merges into its base")
        change = jnp.einsum(
            "...ir,...ro->...io",
            linear.lora_A[...].astype(jnp.float32),
            linear.lora_B[...].astype(jnp.float32),
            precision="highest",
        )
        kernel = linear.kernel[...]
        merged = kernel.astype(jnp.float32) + change * linear.lora_scale
        linear.kernel = nnx.Param(merged.astype(kernel.dtype))
        linear.lora_A = nnx.data(None)
        linear.lora_B = nnx.data(None)
        linear.lora_scale = 0.0
        linear.lora_dropout = 0.0
    return model


def adapter_paths(params: Params) -> list[str]:
    """Returns the paths of all adapter parameters."""
    return sorted(path for path in flatten(params) if re.search(r"(^|/)lora_[AB]$", path))
