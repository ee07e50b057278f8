"""Meshes, and one table of regex rules that places every parameter on them."""

import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from unime_jax.types import Array, UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
_AUTO = (AxisType.Auto,) * len(AXES)  # JAX is about to make Explicit the default of every mesh

# (regex on the parameter's path, spec of its last axes). Every parameter matches exactly one. Axes
# in front (the layer axis of stacked layers) stay whole. Kernels are [inputs, outputs]; scales of
# quantised ones [inputs / 64, outputs].
RULES: tuple[tuple[str, P], ...] = (
    (r"/(q|k|v|qkv|gate|up|gate_up)_proj/kernel(_codes|_scales)?$", P("fsdp", "tensor")),
    (r"/(o|down)_proj/kernel(_codes|_scales)?$", P("tensor", "fsdp")),
    (r"/lm_head/kernel$", P("fsdp", "tensor")),
    (r"^latent_attention_model/(to_q|to_kv|ff_in)/kernel$", P("fsdp", "tensor")),
    (r"^latent_attention_model/(to_out|ff_out)/kernel$", P("tensor", "fsdp")),
    (r"/fc1/kernel$|^multi_modal_projector/linear_1/kernel$", P("fsdp", "tensor")),
    (r"/(out_proj|fc2)/kernel$|^multi_modal_projector/linear_2/kernel$", P("tensor", "fsdp")),
    # Whole on every device: what is small, and tables that are read by index.
    (r"/(scale|bias|mean|var)$", P()),
    (r"/lora_[AB]$", P()),
    (r"(^|/)embedding$", P()),
    (r"(^|/)(class_embedding|latents|image_newline|sub_GN|glb_GN)$", P()),
    (r"/(patch_embedding|\w+_conv|conv_\w+|fc)/kernel$", P()),
    (r"^layers/(query|key|value|attention_output|intermediate|output)/kernel$", P()),  # BERT
)


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, *, devices=None) -> Mesh:
    """Arranges the devices; one axis may be -1 and takes what the others leave.

    Neighbours along `tensor`, then along `fsdp`, are near each other: on one host, or linked.

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
        asked = f"{known} devices" if -1 not in sizes else f"a multiple of {known} devices"
        hosts = len({device.process_index for device in devices})
        where = "this machine has" if hosts == 1 else f"{hosts} processes have"
        raise UserError(
            f"{text}: asks for {asked}, {where} {len(devices)} ({devices[0].platform}); change "
            "config.mesh, or check that JAX sees all devices: python -c 'import jax; "
            "print(jax.devices())'"
        )
    if devices[0].platform == "tpu":
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        placed = np.asarray(devices).reshape(sizes)
    return Mesh(placed, AXES, axis_types=_AUTO)


def abstract_mesh(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    """Returns a mesh of so many devices that nobody has."""
    return AbstractMesh((data, fsdp, tensor), AXES, axis_types=_AUTO)


def checked(mesh: Mesh) -> Mesh:
    """Returns a mesh that a caller made, with the axes that are worked with here.

    Raises:
      UserError: its axes have other names.
    """
    if set(mesh.axis_names) != set(AXES):
        raise UserError(f"mesh has axes {mesh.axis_names}; make it with sharding.make_mesh")
    return Mesh(mesh.devices, mesh.axis_names, axis_types=_AUTO)


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules=None) -> P:
    """Returns the spec of one parameter; `rules` are RULES unless others are given.

    Raises:
      UserError: an axis of the parameter does not divide over its mesh axis.
      ValueError: no rule matches, or several do.
    """
    rules = RULES if rules is None else rules
    found = [(pattern, spec) for pattern, spec in rules if re.search(pattern, path)]
    if len(found) != 1:
        names = " and ".join(pattern for pattern, _ in found) or "none"
        raise ValueError(
            f"parameter {path} {shape} needs exactly one rule of sharding.RULES; {names} match"
        )
    spec = found[0][1]
    spec = P(*([None] * (len(shape) - len(spec)) + list(spec)))
    for size, axis in zip(shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            scales = path.endswith("kernel_scales")
            blocks = " (a scale for 64 inputs; or unset config.train.quantize)" if scales else ""
            raise UserError(
                f"parameter {path} {shape}: {size} does not divide over mesh axis "
                f"{axis}={mesh.shape[axis]}; choose another config.mesh{blocks}"
            )
    return spec


def sharding_of(mesh: Mesh | AbstractMesh, rules=None):
    """Returns `(path, shape) -> NamedSharding` for loaders."""
    return lambda path, shape: NamedSharding(mesh, spec_of(path, shape, mesh, rules))


def state_shardings(tree, mesh: Mesh | AbstractMesh):
    """Returns the sharding of every leaf of a training state.

    The key of a leaf's innermost dict is its parameter's path, so that moments lie where their
    parameters do; leaves outside any dict and single numbers, such as counts, are replicated.
    """

    def one(path, leaf):
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        axes = list(spec_of(keys[-1], leaf.shape, mesh)) if keys and leaf.shape else []
        while axes and axes[-1] is None:  # as XLA writes the specs of a step's results
            axes.pop()
        return NamedSharding(mesh, P(*axes))

    return jax.tree_util.tree_map_with_path(one, tree)


def gathered(path: str, x, mesh: Mesh | AbstractMesh, rules=None):
    """Gathers a parameter over fsdp, as the layer that uses it needs it; tensor stays split."""
    spec = spec_of(path, x.shape, mesh, rules)
    spec = P(*(None if axis == "fsdp" else axis for axis in spec))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def shard_batch(tree, mesh: Mesh):
    """Puts host arrays on the mesh, first axis split over data x fsdp where it divides.

    Small odd-sized arrays (row orders, a group's remainder) are replicated.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]

    def one(x):
        spec = BATCH if x.ndim and x.shape[0] % devices == 0 else P()
        return put(x, NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)


def processes(mesh: Mesh) -> int:
    """Counts the processes whose devices are in a mesh."""
    return len({device.process_index for device in mesh.devices.flat})


def own_rows(rows: int, mesh: Mesh) -> np.ndarray:
    """Returns bool[rows]: those of a group that this process's devices hold.

    Where the rows do not divide, copies of the last one fill up (see `steps.place_batch`).
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    padded = -(-rows // devices) * devices
    held = NamedSharding(mesh, BATCH).addressable_devices_indices_map((padded,))
    found = np.zeros(rows, bool)
    for (part,) in held.values():
        found[np.minimum(np.arange(padded)[part], rows - 1)] = True
    return found


def put_own(x: np.ndarray, rows: int, mesh: Mesh) -> jax.Array:
    """Makes a group's array of the rows that each process has of it, those of `own_rows`."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    padded = -(-rows // devices) * devices
    place = np.cumsum(own_rows(rows, mesh)) - 1  # of a row of the group among those that are here

    def read(index):
        return x[place[np.minimum(np.arange(padded)[index[0]], rows - 1)]][:, *index[1:]]

    where = NamedSharding(mesh, BATCH)
    return jax.make_array_from_callback((padded, *x.shape[1:]), where, read)


def put(tree, sharding: NamedSharding):
    """Puts arrays that every process has alike on devices; each process feeds its own."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def one(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x if x.sharding == sharding else jax.jit(lambda x: x, out_shardings=sharding)(x)
        # Not jax.device_put: it would first send all of x round to compare it.
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree)


def per_device(run, mesh: Mesh):
    """Returns a kernel (q, k, v, ...) -> rows, each device running it on its rows and heads.

    Arguments of four axes are [rows, tokens, heads, width], of one [rows]. What does not divide
    stays whole.
    """

    def divided(*args):
        devices = mesh.shape["data"] * mesh.shape["fsdp"]
        rows = BATCH[0] if args[0].shape[0] % devices == 0 else None
        heads = [x.shape[2] for x in args if x.ndim == 4]
        split = "tensor" if all(n % mesh.shape["tensor"] == 0 for n in heads) else None
        specs = tuple(P(rows, None, split, None) if x.ndim == 4 else P(rows) for x in args)
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(
            *args
        )

    return divided


def batch_devices(mesh) -> int:
    """Counts the devices that the rows of a batch are spread over."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def constrain_rows(x: Array, mesh, axis: int | None) -> Array:
    """Splits an axis over data x fsdp; None: the whole array goes to every device."""
    if batch_devices(mesh) == 1:
        return x
    spec = [] if axis is None else [None] * axis + list(BATCH)
    spec = jax.sharding.PartitionSpec(*spec)
    return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, spec))
