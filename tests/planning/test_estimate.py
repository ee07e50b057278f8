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
    assert estimator(made, batch, configured, devices).chunks() == chunks


@pytest.mark.parametrize(
    ("chunk", "tokens"),
    [
        (4, 200),  # a row of 200, or two of 100, at a time
        (8, 400),
        (20, 5 * 200 + 4 * 8),  # all of 200 and all of 8, held together; 10 of 100 are fewer
        (0, 25 * 100 + 5 * 200 + 4 * 8),
    ],
)
def test_groups_encoded_at_once_are_held_together(chunk, tokens):
    """On 4 devices: 25 rows of 100 positions a device, 5 of 200 and 4 of 8."""
    made = Composition(((100, 100, 0), (20, 200, 0)), ((16, 8, 0),), (), 120, 10, ("a",), 0.0)
    assert estimator(made, 120, 4, 4).rows_alive(chunk) == tokens / 200


def estimator(made: Composition, batch: int, chunk: int, devices: int) -> estimate.Estimator:
    settings = {"train": {"batch_size": batch, "chunk": chunk}}
    mesh = types.SimpleNamespace(shape={"data": 1, "fsdp": devices, "tensor": 1})
    hardware, arguments = topology.parse("v5e:4x4"), memory.Arguments(1.0, 0.0, 0.0, 0.0)
    return estimate.Estimator(
        settings, {}, made, arguments, 1.0, topology=hardware, mesh=mesh, mfu=0.5, flash=True
    )
