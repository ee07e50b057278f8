"""NV-Embed against outputs of the published code on a tiny random model."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import parity
import pytest
import safetensors.numpy
import tolerances
from flax import nnx

from unime_jax import models, sharding
from unime_jax.types import Inputs, UserError, flatten

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "nvembed_tiny"
CONFIG = json.loads((GOLDEN / "config.json").read_text())


@pytest.fixture(scope="module")
def golden():
    return safetensors.numpy.load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="module")
def model():
    return models.load(GOLDEN)


@pytest.fixture(scope="module")
def inputs(golden):
    tokens, lengths = golden["input_ids"], golden["attention_mask"].sum(1).astype(np.int32)
    index = np.full(tokens.shape, -1, np.int32)
    return Inputs(tokens, lengths, index, np.zeros((len(tokens), 0, 0, 0, 3), np.uint8))


def masked(inputs, golden):
    skip = np.full(inputs.rows, golden["num_instruction_tokens"], np.int32)
    return dataclasses.replace(inputs, skip=skip)


def test_hidden_states_are_those_of_the_published_code(model, inputs, golden):
    real = golden["attention_mask"][..., None]
    assert 0 < real.sum() < real.size
    found = parity.hidden(model, inputs) * real
    tolerances.assert_near(found, golden["last_hidden_state"], tolerances.HIDDEN)


def test_embeddings_are_those_of_the_published_code(model, inputs, golden):
    tolerances.assert_near(parity.embed(model, inputs), golden["embedding"], tolerances.EMBEDDING)


def test_the_instruction_is_left_out_of_the_mean(model, inputs, golden):
    wanted = golden["embedding_masked_instruction"]
    assert np.abs(wanted - golden["embedding"]).max() > 0.01
    found = parity.embed(model, masked(inputs, golden))
    tolerances.assert_near(found, wanted, tolerances.EMBEDDING)


def test_without_is_mask_instruction_it_is_part_of_the_mean(inputs, golden):
    config = {**CONFIG, "is_mask_instruction": False}
    model = parity.build(config)
    found = parity.embed(model, masked(inputs, golden))
    np.testing.assert_array_equal(found, parity.embed(model, inputs))


def test_neither_padding_nor_batch_mates_count(model, inputs, golden):
    alone = jax.tree.map(lambda x: x[3:4], masked(inputs, golden))
    length = int(alone.lengths[0])
    tokens = np.pad(alone.tokens[:, :length], ((0, 0), (0, 9)), constant_values=7)
    longer = dataclasses.replace(alone, tokens=tokens, image_index=np.full(tokens.shape, -1))
    together = parity.embed(model, masked(inputs, golden))[3:4]
    tolerances.assert_near(parity.embed(model, longer), together, tolerances.EMBEDDING)


def test_files_are_read_and_written_bit_by_bit(model, tmp_path):
    _, params = parity.split(model)
    models.save(tmp_path, params, CONFIG)
    ours = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    theirs = safetensors.numpy.load_file(GOLDEN / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)


def test_eight_devices_equal_one(inputs, golden):
    mesh = sharding.make_mesh(data=2, fsdp=4)
    model = models.load(GOLDEN, sharding_of=sharding.sharding_of(mesh))
    flat = flatten(nnx.to_pure_dict(nnx.state(model)))
    split = [path for path, leaf in flat.items() if not leaf.sharding.is_fully_replicated]
    assert sum("latent_attention_model" in path for path in split) == 5
    eight = jax.tree.map(lambda x: np.concatenate([x, x[:2]]), inputs)
    found = parity.embed(model, sharding.shard_batch(eight, mesh))
    tolerances.assert_near(found[:6], golden["embedding"], tolerances.EMBEDDING)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mask_type": "c"}, "mask_type"),
        ({"padding_side": "left"}, "padding_side"),
        ({"text_config": None}, "text_config"),
        (
            {"latent_attention_config": {**CONFIG["latent_attention_config"], "latent_dim": 24}},
            "latent_dim",
        ),
        ({"latent_attention_config": {"latent_dim": 48}}, "num_latents_value"),
        ({"text_config": {**CONFIG["text_config"], "hidden_act": "gelu"}}, "hidden_act"),
    ],
)
def test_what_is_not_built_is_refused(change, named):
    with pytest.raises(UserError, match=named):
        models.rules({**CONFIG, **change})


def test_there_is_no_head(model):
    with pytest.raises(UserError, match="head"):
        model.embedding_model.logits(jax.numpy.zeros((1, 48)))
