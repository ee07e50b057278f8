"""Which settings a search compares."""

import types

import pytest

from unime_jax.planning import estimate, memory, topology
from unime_jax.planning.composition import Composition


@pytest.mark.parametrize(
    ("devices", "batch", "configured", "chunks"),
    [
        (16, 1024, 0, [16, 32, 64, 128, 256, 512, 0]),
        (6, 1024, 0, [8, 16, 32, 64, 128, 256, 512, 0]),
        (3, 256, 8, [4, 8, 16, 32, 64, 128, 0]),
        (16, 1000, 20, [20, 25, 40, 50, 100, 125, 200, 250, 500, 0]),
        (8, 24, 6, [6, 12, 0]),  # 8 would give a device no fewer rows than 12
        (8, 7, 0, [1, 0]),
        (4, 1, 1, [1, 0]),
    ],
)
def test_chunks_divide_the_batch_and_the_configured_one_is_among_them(
    devices, batch, configured, chunks
):
    made = Composition(((batch, 32, 0),), ((batch, 8, 0),), (), batch, 10, ("a",), 0.0)
    settings = {"train": {"batch_size": batch, "chunk": configured}}
    mesh = types.SimpleNamespace(shape={"data": 1, "fsdp": devices, "tensor": 1})
    hardware, arguments = topology.parse("v5e:4x4"), memory.Arguments(1.0, 0.0, 0.0, 0.0)
    estimator = estimate.Estimator(
        settings, {}, made, arguments, 1.0, topology=hardware, mesh=mesh, mfu=0.5, flash=True
    )
    assert estimator.chunks() == chunks
