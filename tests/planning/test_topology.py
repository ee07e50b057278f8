"""Names of hardware, meshes over it, and what is said of wrong ones."""

import types

import jax
import pytest
from jax.experimental import topologies

from unime_jax.planning import topology
from unime_jax.types import UserError


@pytest.mark.parametrize(
    ("name", "devices", "hosts"),
    [
        ("v5e:4x4", 16, 4),
        ("v5e:1x1", 1, 1),
        ("v6e:2x4", 8, 1),
        ("v5p:2x2x2", 8, 2),
        ("v4:2x2x4", 16, 4),
        ("v5p:4x4x8", 128, 32),
        ("v5e:8x16", 128, 32),
        ("tpu7x:2x2x1", 8, 1),
        ("a100-80g:8", 8, 1),
        ("A100-40G:2x8", 16, 2),
        ("h100:8", 8, 1),
        ("h200:1", 1, 1),
    ],
)
def test_names(name, devices, hosts):
    found = topology.parse(name)
    assert (found.devices, found.hosts) == (devices, hosts)
    assert found.chip.title in found.describe()


@pytest.mark.parametrize(
    "name",
    ["v5e", "v5e:", "v5e-16", "v5e:3x4", "v5e:2x2x2", "v5e:32x32", "v5p:4x4", "v5p:2x2x0", "x100:8",
     "a100:8", "h100:0", "h100:16", "h100:2x2x2", "v5e:0x0", "v5e:0x4", "v5p:0x2x2", "v5p:0x4x4",
     "v5e:6x6", "v5e:2x16", "v5e:4x2", "v4:4x4x3", "v4:4x8x4", "v5p:4x4x6", "v5p:16x16x28", ""],
)  # fmt: skip
def test_other_names_are_refused_with_what_is_accepted(name):
    with pytest.raises(UserError, match="--topology=.*(a100-80g:8|4x4|HOSTSxN)") as error:
        topology.parse(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["v5e:4x4", "v4:2x2x1", "a100-80g:8"])
def test_what_a_compiler_does_not_know_is_named(name, monkeypatch):
    def refuse(*args, **options):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no such\n  topology")

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    monkeypatch.setattr(topology, "_installed", lambda module: True)
    with pytest.raises(UserError, match=f"--topology={name}: .*no such topology.*--compile"):
        topology.compile_devices(topology.parse(name))


@pytest.mark.parametrize("cuda", ["12", "13"])
def test_the_compiler_for_gpus_comes_with_either_cuda(cuda, monkeypatch):
    asked = types.SimpleNamespace(devices=["a device"])
    monkeypatch.setattr(topologies, "get_topology_desc", lambda *args, **options: asked)
    monkeypatch.setattr(topology, "_installed", lambda module: module.endswith(f"cuda{cuda}"))
    assert topology.compile_devices(topology.parse("h100:1")) == ["a device"]
    with pytest.raises(UserError, match="plan-tpu"):
        topology.compile_devices(topology.parse("v5e:4x4"))


def test_cudnn_is_asked_for_where_its_attention_is_compiled(monkeypatch):
    monkeypatch.setattr(topology, "_installed", lambda module: "xla_cuda12" in module)
    monkeypatch.setattr(topology.ctypes.util, "find_library", lambda name: None)
    hardware = topology.parse("h100:1")
    topology.check_compiler(hardware)
    with pytest.raises(UserError, match="cuDNN.*plan-gpu.*attention=xla"):
        topology.check_compiler(hardware, kernel=True)
    monkeypatch.setattr(topology.ctypes.util, "find_library", lambda name: "libcudnn.so.9")
    topology.check_compiler(hardware, kernel=True)


def test_attention_of_other_hardware_is_refused():
    check, tpu, gpu = topology.check_attention, topology.parse("v5e:4x4"), topology.parse("h100:8")
    for hardware, attention, dtype in (
        (tpu, "cudnn", "bfloat16"),
        (gpu, "cudnn", "float32"),
        (gpu, "splash", "bfloat16"),
    ):
        with pytest.raises(UserError, match=f"config.model.attention={attention}.*auto or xla"):
            check(hardware, attention, dtype)
    for hardware, attention in ((tpu, "splash"), (gpu, "cudnn"), (tpu, "auto"), (gpu, "xla")):
        check(hardware, attention, "bfloat16")


def test_meshes_over_a_topology():
    hardware = topology.parse("v5e:4x4")
    assert topology.mesh_shape(hardware, 1, -1, 2) == (1, 8, 2)
    assert topology.mesh_shape(hardware, 4, 4, 1) == (4, 4, 1)
    for sizes in ((3, -1, 1), (-1, -1, 1), (1, 8, 1), (0, -1, 1), (-4, -4, 1)):
        with pytest.raises(UserError, match="config.mesh.data=.*16 devices of v5e:4x4"):
            topology.mesh_shape(hardware, *sizes)
