"""Quantises the frozen linear layers of a decoder, as a model is read or afterwards."""

import re
from collections.abc import Callable

import jax
from flax import nnx

from unime_jax.models import lora, quant
from unime_jax.types import Array, UserError

# The decoder's linear layers; embeddings, head, norms, projector and tower stay as they are.
TARGETS = r"language_model/.*(q|k|v|o|qkv|gate|up|gate_up|down)_proj$"


def prepare(model: nnx.Module, kind: str) -> list[str]:
    """Gives the targets of an abstract model codes and scales in place of a kernel.

    Args:
      model: of ShapeDtypeStructs; changed in place.
      kind: one of `quant.KINDS`.

    Returns:
      The paths of the layers.

    Raises:
      UserError: there is no such layer, or one that does not divide into blocks.
    """
    paths = []
    for path, linear in lora.linears(model):
        if not re.search(TARGETS, path):
            continue
        codes, scales = quant.shapes(linear.shape, kind, f"parameter {path}/kernel")
        linear.kernel = nnx.data(None)
        linear.kernel_codes = nnx.data(nnx.Param(codes))
        linear.kernel_scales = nnx.data(nnx.Param(scales))
        paths.append(path)
    if not paths:
        raise UserError("config.train.quantize: the model has no decoder to quantize")
    return paths


def finisher(
    paths: list[str],
    kind: str,
    sharding_of: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None,
) -> Callable[[str, Array], dict[str, Array]]:
    """Returns what `hf.fill` calls with every parameter that was read: (path, array) -> parameters.

    The floats of a parameter are freed before the next one is read.
    """
    targets = {f"{path}/kernel" for path in paths}

    def finish(path: str, value: Array) -> dict[str, Array]:
        if path not in targets:
            return {path: value}
        names = (f"{path}_codes", f"{path}_scales")
        shardings = None
        if sharding_of is not None:
            shapes = quant.shapes(value.shape, kind, path)
            shardings = tuple(sharding_of(n, s.shape) for n, s in zip(names, shapes, strict=True))
        found = quant.quantize_placed(value, kind=kind, shardings=shardings)
        jax.block_until_ready(found)
        value.delete()
        return dict(zip(names, found, strict=True))

    return finish
