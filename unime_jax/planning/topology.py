"""Accelerators by name: their numbers, and devices to compile for that are not there."""

import ctypes.util
import dataclasses
import importlib.util
import math
import os
import re

from unime_jax.types import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator; rates and memory are those of a JAX device.

    Attributes:
      title: its name in a report.
      platform: "tpu" or "gpu".
      flops: dense bf16 products, FLOP/s.
      memory: bytes that a program may use, as the compiler or the driver reports them.
      bandwidth: bytes/s of its memory.
      link: bytes/s that a device sends to its neighbours (NVLink, ICI), one direction.
      source: where the rates are from.
      shape: numbers in the name of a topology: 2 or 3 sides of a TPU slice, 0 for GPUs.
      devices: JAX devices of a chip.
      network: bytes/s that a GPU sends to other hosts; 0 for TPUs, where links join all of a slice.
      target: of a GPU, what XLA must know of it (`_target`).
    """

    title: str
    platform: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    source: str
    shape: int = 0
    devices: int = 1
    network: float = 0.0
    target: dict | None = None

    def rate(self, dtype: str) -> float:
        """Returns the peak FLOP/s of a device.

        JAX multiplies f32 in one bf16 pass on TPUs, in TF32 on GPUs unless it is told otherwise.
        """
        half = self.platform == "gpu" and dtype == "float32"
        return self.flops / 2 if half else self.flops


_CLOUD = "cloud.google.com/tpu/docs, page of the generation"
_A100 = {
    "capability": 8, "cores": 108, "fpus": 64, "shared": 167936, "optin": 166912,
    "cache": 41943040, "clock": 1.41,
}  # fmt: skip
_H100 = {
    "capability": 9, "cores": 132, "fpus": 128, "shared": 233472, "optin": 232448,
    "cache": 52428800, "clock": 1.98,
}  # fmt: skip
_A100_SHEET = "NVIDIA A100 data sheet (SXM, dense)"
_H100_SHEET = "NVIDIA {} data sheet (SXM, dense)"
# Network of GPUs: one InfiniBand card each, as in NVIDIA's DGX A100 (200 Gbit/s) and H100 (400).
# HBM of TPUs: what libtpu 0.0.42 lets a program have; of GPUs: what the driver reports.
CHIPS: dict[str, Chip] = {
    "v4": Chip("TPU v4", "tpu", 275e12, 30.75 * GIB, 1228e9, 150e9, _CLOUD, 3),
    "v5e": Chip("TPU v5e", "tpu", 197e12, 15.75 * GIB, 819e9, 200e9, _CLOUD, 2),
    "v5p": Chip("TPU v5p", "tpu", 459e12, 95.74 * GIB, 2765e9, 600e9, _CLOUD, 3),
    "v6e": Chip("TPU v6e", "tpu", 918e12, 31.25 * GIB, 1640e9, 400e9, _CLOUD, 2),
    # Two devices a chip, each with half of its rates.
    "tpu7x": Chip("TPU7x", "tpu", 1153e12, 94.75 * GIB, 3690e9, 300e9, _CLOUD, 3, 2),
    "a100-40g": Chip(
        "NVIDIA A100-SXM4-40GB", "gpu", 312e12, 39.39 * GIB, 1555e9, 300e9,
        _A100_SHEET, network=25e9, target=_A100,
    ),
    "a100-80g": Chip(
        "NVIDIA A100-SXM4-80GB", "gpu", 312e12, 79.14 * GIB, 2039e9, 300e9,
        _A100_SHEET, network=25e9, target=_A100,
    ),
    "h100": Chip(
        "NVIDIA H100 80GB HBM3", "gpu", 989e12, 79.11 * GIB, 3350e9, 450e9,
        _H100_SHEET.format("H100"), network=50e9, target=_H100,
    ),
    "h200": Chip(
        "NVIDIA H200", "gpu", 989e12, 139.7 * GIB, 4800e9, 450e9,
        _H100_SHEET.format("H200"), network=50e9, target=_H100,
    ),
}  # fmt: skip
# Slices that there are, in chips: listed up to 4 a side; larger sides in 3-D are multiples of 4.
_SLICES = {
    2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4)),
}
_LARGEST = {"v4": 4096, "v5p": 6144, "tpu7x": 9216}  # chips of a slice


# What JAX calls the kinds of TPU devices; GPUs are called by their titles.
_DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def of_device(kind: str) -> Chip | None:
    """Returns the chip of a `jax.Device.device_kind`, or None where it is not known."""
    titles = {chip.title: chip for chip in CHIPS.values() if chip.platform == "gpu"}
    return CHIPS[_DEVICE_KINDS[kind]] if kind in _DEVICE_KINDS else titles.get(kind)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind, as `--topology` names them.

    Attributes:
      name: as it was given.
      kind: key of CHIPS.
      shape: sides of a TPU slice in chips, or (hosts, GPUs of a host).
    """

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        """Processes of a run: TPU hosts have four chips each, or in a 2x4 slice all eight."""
        if self.chip.platform == "gpu":
            return self.shape[0]
        return 1 if self.shape == (2, 4) else max(1, self.chips // 4)

    @property
    def linked(self) -> int:
        """Devices that `Chip.link` joins: a host of GPUs, a whole TPU slice."""
        return self.shape[1] if self.chip.platform == "gpu" else self.devices

    def describe(self) -> str:
        """Returns "16 x TPU v5e on 4 hosts"."""
        hosts = f" on {self.hosts} hosts" if self.hosts > 1 else ""
        cores = f" ({self.devices} devices)" if self.devices != self.chips else ""
        return f"{self.chips} x {self.chip.title}{cores}{hosts}"


def accepted() -> str:
    """Returns what `parse` takes, in one line."""
    kinds = {
        shape: ", ".join(k for k, chip in CHIPS.items() if chip.shape == shape)
        for shape in (2, 3, 0)
    }
    return (
        f"TPU slices KIND:AxB ({kinds[2]}) and KIND:AxBxC ({kinds[3]}), as v5e:4x4 or v5p:2x2x2, "
        f"or GPUs KIND:N on one host and KIND:HOSTSxN ({kinds[0]}), as a100-80g:8 or a100-80g:2x8"
    )


def parse(name: str) -> Topology:
    """Reads the name of a topology.

    Raises:
      UserError: it is none; the message lists what is accepted.
    """
    found = re.fullmatch(r"([\w-]+):(\d+(?:x\d+){0,2})", name.strip().lower())
    chip = CHIPS.get(found[1]) if found else None
    if chip is None:
        raise UserError(f"--topology={name}: no hardware of that name; give {accepted()}")
    shape = tuple(map(int, found[2].split("x")))
    if chip.platform == "gpu":
        if len(shape) > 2 or not all(1 <= n <= limit for n, limit in zip(shape[::-1], (8, 512))):  # noqa: B905
            raise UserError(
                f"--topology={name}: GPUs are {found[1]}:N with 1 to 8 of a host, or "
                f"{found[1]}:HOSTSxN"
            )
        return Topology(name, found[1], shape if len(shape) == 2 else (1, *shape))
    if not _is_slice(found[1], shape):
        raise UserError(
            f"--topology={name}: there is no such slice of {chip.title}; in chips there are "
            + _slices(found[1])
        )
    return Topology(name, found[1], shape)


def _is_slice(kind: str, shape: tuple[int, ...]) -> bool:
    listed = _SLICES[CHIPS[kind].shape]
    cubes = len(shape) == 3 and sorted(shape) == list(shape) and shape[0] > 0
    cubes = cubes and not any(side % 4 for side in shape)
    return shape in listed or (cubes and math.prod(shape) <= _LARGEST.get(kind, 0))


def _slices(kind: str) -> str:
    names = ", ".join("x".join(map(str, shape)) for shape in _SLICES[CHIPS[kind].shape])
    if CHIPS[kind].shape == 2:
        return names
    return (
        f"{names} and AxBxC of multiples of 4, A <= B <= C, at most {_LARGEST[kind]} chips, as "
        f"{kind}:4x4x8"
    )


def check_attention(topology: Topology, attention: str, dtype: str) -> None:
    """Refuses an attention kernel that the hardware cannot run.

    Raises:
      UserError: it is of another platform or dtype.
    """
    chip = topology.chip
    if attention == "cudnn" and (chip.platform != "gpu" or dtype != "bfloat16"):
        raise UserError(
            f"config.model.attention=cudnn: needs GPUs and bfloat16, not {chip.title} and {dtype}; "
            "use auto or xla"
        )
    if attention == "splash" and chip.platform != "tpu":
        raise UserError(
            f"config.model.attention=splash: is for TPUs, not {chip.title}; use auto or xla"
        )


def use_no_accelerator() -> None:
    """Keeps JAX on the CPU; call before it makes a device.

    Programs are compiled for hardware that is elsewhere; what is here stays free.
    """
    os.environ.update(
        JAX_PLATFORMS="cpu",
        CUDA_VISIBLE_DEVICES="-1",
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # libtpu and XLA report what is not there
    import jax

    jax.config.update("jax_platforms", "cpu")


def check_compiler(topology: Topology, *, kernel: bool = False) -> None:
    """Checks that there is a compiler for the hardware and, if asked, for its attention kernel.

    Raises:
      UserError: there is none; the message names the extra that has it.
    """
    chip = topology.chip
    modules, extra = (
        (("libtpu",), "plan-tpu")
        if chip.platform == "tpu"
        else (("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"), "plan-gpu")
    )
    if not any(map(_installed, modules)):
        raise UserError(
            f"--compile for {chip.title} needs its compiler: pip install -e '.[{extra}]' (no "
            "such hardware is needed), or plan without --compile"
        )
    if kernel and chip.platform == "gpu" and not _finds_cudnn():
        raise UserError(
            "--compile with cuDNN's attention needs cuDNN: pip install -e '.[plan-gpu]', or "
            "--config.model.attention=xla"
        )


def compile_devices(topology: Topology) -> list:
    """Returns devices to compile for.

    Raises:
      UserError: the compiler of this platform is not installed, or does not know the hardware.
    """
    from jax.experimental import topologies

    check_compiler(topology)
    chip = topology.chip
    if chip.platform == "gpu":
        hosts, count = topology.shape
        name, platform = f"1x{hosts}x{count}", "cuda"
        options = {"target_config": _target(chip)}
    else:
        name, platform = f"{topology.kind}:{'x'.join(map(str, topology.shape))}", "tpu"
        options = {}
        if topology.chips == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        if topology.kind == "v4":  # one device a chip, as on v5p
            options["chip_config_name"] = "megacore"
    try:
        if platform == "cuda":
            return topologies.get_topology_desc(platform=platform, topology=name, **options).devices
        return topologies.get_topology_desc(name, platform, **options).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--topology={topology.name}: the installed compiler for {chip.title} refuses it "
            f"({reason}); take another topology, or plan without --compile"
        ) from None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of its parent
        return False


def _finds_cudnn() -> bool:
    return _installed("nvidia.cudnn") or ctypes.util.find_library("cudnn") is not None


def _target(chip: Chip) -> str:
    """Returns XLA's description of a GPU, a GpuTargetConfig in text."""
    gpu = chip.target
    return f"""gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_core: {gpu["shared"]}
      shared_memory_per_block_optin: {gpu["optin"]} core_count: {gpu["cores"]}
      fpus_per_core: {gpu["fpus"]} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
      block_dim_limit_z: 65535 memory_bandwidth: {chip.bandwidth:.0f}
      l2_cache_size: {gpu["cache"]} clock_rate_ghz: {gpu["clock"]}
      device_memory_size: {chip.memory:.0f} registers_per_core_limit: 65536
      registers_per_block_limit: 65536
      cuda_compute_capability {{ major: {gpu["capability"]} minor: 0 }} }}
      platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }}
      runtime_version {{ major: 12 minor: 9 patch: 0 }}
      device_description_str: "{chip.title}" """


def mesh_shape(topology: Topology, data: int, fsdp: int, tensor: int) -> tuple[int, int, int]:
    """Returns the sides of a mesh over the devices of a topology; -1 takes what is left.

    Raises:
      UserError: they do not multiply to the number of devices.
    """
    sizes, count = [data, fsdp, tensor], topology.devices
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0 and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if math.prod(sizes) != count or min(sizes) < 1:
        raise UserError(
            f"config.mesh.data={data}, config.mesh.fsdp={fsdp}, config.mesh.tensor={tensor}: does "
            f"not fit the {count} devices of {topology.name}; sizes are positive, at most one is -1"
        )
    return tuple(sizes)
