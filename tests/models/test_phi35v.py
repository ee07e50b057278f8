"""Phi-3.5-vision against golden files of the published code."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pictures
import pytest
import safetensors.numpy
import tolerances
from flax import nnx

from unime_jax import models
from unime_jax.models import hf

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TINY = GOLDEN / "phi3v_tiny"
SIZE = 336
CONFIG = json.loads((TINY / "config.json").read_text())


@pytest.fixture(scope="module")
def golden():
    return safetensors.numpy.load_file(TINY / "golden.safetensors")


@pytest.fixture(scope="module")
def model():
    return models.load(TINY)


@pytest.fixture(scope="module")
def rows(golden):
    """(token ids, image index, tiles, grid) of every row of the golden file."""
    out = []
    for number in range(7):
        ids = golden[f"row_{number}.input_ids"]
        image = int(golden[f"row_{number}.image"][0])
        index = np.full(len(ids), -1)
        tiles = grid = None
        if image >= 0:
            tiles, grid = pictures.hd_transform(golden[f"image_{image}"], crops=4)
            places = np.flatnonzero(ids < 0)
            assert len(places) == golden[f"image_{image}.num_img_tokens"][0]
            index[places] = pictures.phi_index(grid)
        out.append((np.maximum(ids, 0), index, tiles, grid))
    return out


@pytest.fixture(scope="module")
def groups(rows):
    """All rows in two groups, with the numbers of their rows."""
    images = [i for i, row in enumerate(rows) if row[2] is not None]
    texts = [i for i, row in enumerate(rows) if row[2] is None]
    return [(pictures.pack([rows[i] for i in part], size=SIZE), part) for part in (images, texts)]


def test_input_vectors_and_hidden_states_match(model, golden, groups):
    for inputs, numbers in groups:
        embeds, hidden = parity.inputs_embeds(model, inputs), parity.hidden(model, inputs)
        for place, number in enumerate(numbers):
            real = slice(0, inputs.lengths[place])
            norms = np.linalg.norm(embeds[place, real], axis=-1)
            tolerances.assert_near(
                norms, golden[f"row_{number}.inputs_embeds_norms"], tolerances.MODULE
            )
            expected = golden[f"row_{number}.last_hidden_state"]
            tolerances.assert_near(hidden[place, real], expected, tolerances.HIDDEN)


def test_embeddings_and_gradients_match(model, golden, groups):
    graphdef, params = parity.split(model)
    direction = golden["grad.direction"]

    def loss(params):
        model = nnx.merge(graphdef, params)
        out = [model.embed(inputs) for inputs, _ in groups]
        return jnp.concatenate([x @ direction for x in out]).mean(), out

    (value, ours), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    for (_, numbers), vectors in zip(groups, ours, strict=True):
        for number, vector in zip(numbers, vectors, strict=True):
            tolerances.assert_near(vector, golden[f"row_{number}.embedding"], tolerances.EMBEDDING)
    tolerances.assert_near(value, golden["grad.loss"][0], tolerances.EMBEDDING)
    expected = {
        name.removeprefix("grad."): x for name, x in golden.items() if name.startswith("grad.model")
    }
    assert len(expected) == 7
    actual = dict(hf.exported(gradients, models.rules(CONFIG), np.float32))
    tolerances.assert_gradients_near({name: actual[name] for name in expected}, expected)
