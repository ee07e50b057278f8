"""Meshes, the rule table, and placement on virtual devices."""

import jax
import miniature
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from unime_jax import models, sharding, tiny
from unime_jax.types import UserError, flatten


def test_minus_one_takes_what_is_left():
    mesh = sharding.make_mesh(data=2, fsdp=-1, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}


def test_programs_are_traced_for_devices_that_nobody_has():
    mesh = sharding.abstract_mesh(2, 16, 2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 16, "tensor": 2}

    def program(kernel, rows):
        return sharding.gathered("layers/q_proj/kernel", kernel, mesh), sharding.constrain_rows(
            rows, mesh, 0
        )

    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in [(3, 32, 4), (64, 5)]]
    assert [x.shape for x in jax.eval_shape(program, *shapes)] == [(3, 32, 4), (64, 5)]


@pytest.mark.parametrize("sizes", [(3, -1, 1), (2, 2, 1), (-1, -1, 1), (0, -1, 1)])
def test_sizes_that_do_not_fit_are_named(sizes):
    with pytest.raises(UserError, match="config.mesh.data"):
        sharding.make_mesh(*sizes)


def test_devices_that_are_not_there_are_counted():
    with pytest.raises(UserError, match="asks for 16 devices, this machine has 8 .cpu."):
        sharding.make_mesh(2, 8, 1)
    with pytest.raises(UserError, match="asks for a multiple of 3 devices"):
        sharding.make_mesh(3, -1, 1)


@pytest.mark.parametrize(
    "path, shape, spec",
    [
        ("language_model/layers/self_attn/q_proj/kernel", (6, 8, 16), P(None, "fsdp", "tensor")),
        ("language_model/layers/mlp/down_proj/kernel", (6, 16, 8), P(None, "tensor", "fsdp")),
        ("language_model/layers/self_attn/q_proj/lora_A", (6, 8, 2), P(None, None, None)),
        ("language_model/embed_tokens/embedding", (64, 8), P(None, None)),
    ],
)
def test_rules(path, shape, spec):
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    assert sharding.spec_of(path, shape, mesh) == spec


def test_indivisible_parameter_is_named():
    mesh = sharding.make_mesh(data=1, fsdp=8, tensor=1)
    with pytest.raises(UserError, match="q_proj.*fsdp=8"):
        sharding.spec_of("x/q_proj/kernel", (12, 16), mesh)


def text(**changes):
    return {**tiny.CONFIGS["llava16"]["text_config"], **changes}


BERT = {
    "model_type": "bert",
    "vocab_size": 8,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 8,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}


@pytest.mark.parametrize(
    "config, quantize",
    [
        (tiny.CONFIGS["phi35v"], "nf4"),
        (tiny.CONFIGS["llava16"], "int8"),
        (tiny.CONFIGS["nv_embed"], None),
        (text(model_type="llama", attention_bias=True, mlp_bias=True), None),
        (miniature.STUDENT, None),
        (BERT, None),
    ],
    ids=["phi35v", "llava16", "nv_embed", "llama", "smol", "bert"],
)
def test_every_parameter_has_exactly_one_rule(config, quantize):
    mesh = sharding.make_mesh(fsdp=1, tensor=1, devices=jax.devices()[:1])
    _, params = models.abstract(config, quantize=quantize)
    for path, leaf in flatten(params).items():
        sharding.spec_of(path, leaf.shape, mesh)


@pytest.mark.parametrize("path, found", [("x/kernel", "none"), ("vision/fc1/bias/fc/kernel", "fc")])
def test_a_parameter_without_its_one_rule_is_named(path, found):
    mesh = sharding.make_mesh(fsdp=8)
    twice = (*sharding.RULES, (r"/fc/", P()))
    with pytest.raises(ValueError, match=f"parameter {path} .* exactly one .*{found}"):
        sharding.spec_of(path, (8, 8), mesh, twice)


def test_moments_lie_where_their_parameters_do():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    kernel = {"layers/mlp/down_proj/kernel": np.ones((8, 8)), "x/lora_A": np.ones((8, 8))}
    placed = sharding.state_shardings({"count": np.zeros(()), "mu": (kernel, {})}, mesh)
    assert placed["count"].spec == P()
    assert [x.spec for x in jax.tree.leaves(placed["mu"])] == [P("tensor", "fsdp"), P()]


def test_batch_rows_are_spread_and_odd_arrays_replicated():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    put = sharding.shard_batch({"rows": np.ones((16, 3)), "odd": np.ones(5)}, mesh)
    assert put["rows"].addressable_shards[0].data.shape == (2, 3)
    assert put["odd"].sharding.is_fully_replicated
    assert len(jax.devices()) == 8
