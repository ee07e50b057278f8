"""Names of hardware, meshes over it, and what is said of wrong ones."""

import pytest

from unime_jax.planning import topology
from unime_jax.types import UserError


@pytest.mark.parametrize(
    ("name", "devices", "hosts"),
    [
        ("v5e:4x4", 16, 4),
        ("v5e:1x1", 1, 1),
        ("v6e:2x4", 8, 2),
        ("v5p:2x2x2", 8, 2),
        ("v4:2x2x4", 16, 4),
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
     "a100:8", "h100:0", "h100:16", "h100:2x2x2", "v5e:0x0", ""],
)  # fmt: skip
def test_other_names_are_refused_with_what_is_accepted(name):
    with pytest.raises(UserError, match="--topology=.*(a100-80g:8|[A-Z]x[A-Z]|HOSTSxN)") as error:
        topology.parse(name)
    assert "\n" not in str(error.value)


def test_meshes_over_a_topology():
    hardware = topology.parse("v5e:4x4")
    assert topology.mesh_shape(hardware, 1, -1, 2) == (1, 8, 2)
    assert topology.mesh_shape(hardware, 4, 4, 1) == (4, 4, 1)
    for sizes in ((3, -1, 1), (-1, -1, 1), (1, 8, 1), (0, -1, 1), (-4, -4, 1)):
        with pytest.raises(UserError, match="config.mesh.data=.*16 devices of v5e:4x4"):
            topology.mesh_shape(hardware, *sizes)
