"""Collectives read from the text of compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from unime_jax import sharding
from unime_jax.planning import collectives

# As XLA writes for GPUs: asynchronous pairs, a noted trip count, a collective in a called
# computation, a TPU kernel whose settings take lines of their own, one that nobody calls.
PROGRAM = """HloModule jit_step

%wrapped (a: bf16[64]) -> bf16[512] {
  %a = bf16[64]{0} parameter(0)
  ROOT %x = bf16[512]{0} all-to-all(%a), replica_groups=mesh['a'=2,'b'=8] {'a', 'b':(1)4}, x={}
}

%forgotten (a: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} all-reduce(%a), replica_groups={{0,1}}, to_apply=%add
}

%body (p: (s32[], u4[32,8])) -> (s32[], u4[32,8]) {
  %g = (u4[4,8]{1,0:E(4)}, u4[32,8]{1,0:E(4)}) all-gather-start(%w), replica_groups=[1,8]<=[8]
  %d = u4[32,8]{1,0:E(4)} all-gather-done(%g)
  %k = bf16[2,8]{1,0} custom-call(%d), frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 384}"
}}, metadata={op_name="splash"}
  %s = f32[4,8]{1,0} reduce-scatter(%y), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %c = bf16[512]{0} async-start(%a), calls=%wrapped
}

%condition (p: (s32[], u4[32,8])) -> pred[] {
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%outer (p: (s32[])) -> (s32[]) {
  %w = (s32[], u4[32,8]) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}

ENTRY %main (p: f32[]) -> f32[] {
  %w = (s32[]) while(%t), condition=%condition, body=%outer
  %p = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%z), source_target_pairs={{0,1},{1,0}}
  ROOT %r = (f32[4]{0}, f32[2]{0}) all-reduce(%a, %b), replica_groups=[2,4]<=[8], to_apply=%add
}
"""  # noqa: E501


def test_loops_and_calls_are_multiplied():
    found, known = collectives.read(PROGRAM)
    listed = {one.kind: (one.calls, one.bytes, one.group) for one in found}
    assert known and len(found) == 5
    assert listed["all-gather"] == (15, 15 * 32 * 8 / 2, 8)
    assert listed["reduce-scatter"] == (15, 15 * 4 * (4 * 8 * 4), 4)
    assert listed["all-to-all"] == (15, 15 * 512 * 2, 8)
    assert listed["collective-permute"] == (1, 64, 2)
    assert listed["all-reduce"] == (1, 24, 4)
    sent = {one.kind: one.sent for one in found}
    assert sent["all-reduce"] == 2 * 24 * 3 / 4 and sent["all-gather"] == 15 * 128 * 7 / 8
    assert sent["collective-permute"] == 64


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}, x", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}, x", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,3},{3,0}}, x", [[0, 3], [3, 0]]),
    ],
)
def test_who_takes_part(text, groups):
    assert collectives._groups(text) == groups


def test_hosts_that_a_collective_spans():
    """Four devices a host: the all-to-all takes every other one of sixteen."""
    found, _ = collectives.read(PROGRAM, devices_of_host=4)
    hosts = {one.kind: one.hosts for one in found}
    assert hosts == {
        "all-gather": 2, "reduce-scatter": 1, "all-to-all": 4, "collective-permute": 1,
        "all-reduce": 1,
    }  # fmt: skip
    assert {one.hosts for one in collectives.read(PROGRAM)[0]} == {1}


def test_an_unknown_trip_count_is_admitted():
    text = PROGRAM.replace("constant(5)", "parameter(0)")
    found, known = collectives.read(text)
    assert not known and {one.calls for one in found} == {3, 1}


def test_a_compiled_loop():
    """A matrix split over eight devices is gathered in each of six iterations."""
    mesh = sharding.make_mesh()
    split, whole = NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P())

    def program(weights, x):
        def layer(x, w):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole)), None

        return jax.lax.scan(layer, x, weights)[0]

    weights = jax.ShapeDtypeStruct((6, 64, 64), jnp.float32, sharding=split)
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, sharding.BATCH))
    text = jax.jit(program).lower(weights, x).compile().as_text()
    found, known = collectives.read(text)
    assert known and {one.kind for one in found} == {"all-gather"}
    assert sum(one.bytes for one in found) == pytest.approx(6 * 64 * 64 * 4)
    assert all(one.group == 8 for one in found)
