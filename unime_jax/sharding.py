"""Meshes, and one table of regex rules that places every parameter on them."""

import math
import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unime_jax.types import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# (regex on the parameter's path, spec of its last axes). The first match counts; axes in front
# (the layer axis of stacked layers) stay whole. Kernels are [inputs, outputs]; scales of quantised
# ones [inputs / 64, outputs].
RULES: tuple[tuple[str, P], ...] = (
    (r"(q|k|v|qkv|gate|up|gate_up)_proj/kernel(_codes|_scales)?$", P("fsdp", "tensor")),
    (r"(o_proj|down_proj)/kernel(_codes|_scales)?$", P("tensor", "fsdp")),
    (r"embed_tokens/embedding$", P()),
    (r"lm_head/kernel$", P("fsdp", "tensor")),
    (r"latent_attention_model/(to_q|to_kv|ff_in)/kernel$", P("fsdp", "tensor")),
    (r"latent_attention_model/(to_out|ff_out)/kernel$", P("tensor", "fsdp")),
    (r"(fc1|multi_modal_projector/linear_1)/kernel$", P("fsdp", "tensor")),
    (r"(out_proj|fc2|multi_modal_projector/linear_2)/kernel$", P("tensor", "fsdp")),
    (r".*", P()),  # norms, biases, adapters, separators and small towers are replicated
)


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, *, devices=None) -> Mesh:
    """Arranges the devices; one axis may be -1 and takes what the others leave.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    known = math.prod(size for size in sizes if size != -1)
    text = ", ".join(f"config.mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"{text}: sizes are positive and at most one is -1")
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise UserError(f"{text}: does not fit the {len(devices)} device(s) of this machine")
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh, rules=RULES) -> P:
    """Returns the spec of one parameter.

    Raises:
      UserError: an axis of the parameter does not divide over its mesh axis.
    """
    spec = next(spec for pattern, spec in rules if re.search(pattern, path))
    spec = P(*([None] * (len(shape) - len(spec)) + list(spec)))
    for size, axis in zip(shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(
                f"parameter {path} {shape}: {size} does not divide over mesh axis "
                f"{axis}={mesh.shape[axis]}; choose another config.mesh"
            )
    return spec


def sharding_of(mesh: Mesh, rules=RULES):
    """Returns `(path, shape) -> NamedSharding` for loaders."""
    return lambda path, shape: NamedSharding(mesh, spec_of(path, shape, mesh, rules))


def state_shardings(tree, mesh: Mesh):
    """Returns the sharding of every leaf of a training state.

    The key of a leaf's innermost dict is its parameter's path, so that moments lie where their
    parameters do; leaves outside any dict, such as counts, are replicated.
    """

    def one(path, leaf):
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        axes = list(spec_of(keys[-1], leaf.shape, mesh)) if keys else []
        while axes and axes[-1] is None:  # as XLA writes the specs of a step's results
            axes.pop()
        return NamedSharding(mesh, P(*axes))

    return jax.tree_util.tree_map_with_path(one, tree)


def gathered(path: str, x, mesh: Mesh, rules=RULES):
    """Gathers a parameter over fsdp, as the layer that uses it needs it; tensor stays split."""
    spec = spec_of(path, x.shape, mesh, rules)
    spec = P(*(None if axis == "fsdp" else axis for axis in spec))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def shard_batch(tree, mesh: Mesh):
    """Puts host arrays on the mesh, first axis split over data x fsdp where it divides.

    Small odd-sized arrays (row orders, a group's remainder) are replicated.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]

    def put(x):
        spec = BATCH if x.ndim and x.shape[0] % devices == 0 else P()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)
