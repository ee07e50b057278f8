"""EfficientNet-Lite0 against a small PyTorch version of itself, random and real weights."""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tolerances
import torch
import torch.nn.functional as F  # noqa: N812
from flax import nnx
from torch_smol import torch_grid

from unime_jax import models
from unime_jax.models import efficientnet, hf, hf_read
from unime_jax.models.efficientnet import EfficientNet, EfficientNetConfig
from unime_jax.types import UserError, unflatten

CONFIG = EfficientNetConfig.from_hf(parity.VISION)


def torch_logits(state, tiles, config):
    return F.linear(
        torch_grid(state, tiles, config.stages).mean((2, 3)), state["_fc.weight"], state["_fc.bias"]
    )


def random_state(config, seed=0):
    """Weights under their published names; activations that neither vanish nor always clip."""
    model = nnx.eval_shape(lambda: EfficientNet(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    shapes = unflatten(dict(jax.tree.map(lambda x: x, hf.flatten(parity.split(model)[1]))))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    state = {}
    for key, x in hf.exported(zeros, efficientnet.key_map(config, hf="", ours=""), np.float32):
        if "var" in key:
            state[key] = rng.uniform(0.5, 1.5, x.shape)
        elif "_bn" in key and key.endswith("weight"):
            state[key] = rng.uniform(0.8, 1.6, x.shape)
        else:
            fan_in = max(np.prod(x.shape[1:]), 1) if x.ndim > 1 else 16
            state[key] = rng.standard_normal(x.shape) * (2 / fan_in) ** 0.5
    return {key: torch.tensor(x, dtype=torch.float32) for key, x in state.items()}


def ours_with(state, config, tmp_path):
    import safetensors.torch

    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    graphdef, abstract = parity.split(
        nnx.eval_shape(lambda: EfficientNet(config, rngs=nnx.Rngs(0)))
    )
    key_map = efficientnet.key_map(config, hf="", ours="")
    return nnx.merge(graphdef, hf_read.load(tmp_path, key_map, abstract))


def tiles_of(count, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def apply(model, tiles, method="__call__"):
    graphdef, params = parity.split(model)
    return np.asarray(
        jax.jit(lambda p, x: getattr(nnx.merge(graphdef, p), method)(x))(params, tiles)
    )


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    state = random_state(CONFIG)
    return state, ours_with(state, CONFIG, tmp_path_factory.mktemp("tower"))


@pytest.mark.parametrize("count", [1, 6])  # 6 is no multiple of the chunk of 4
def test_features_match(tower, count):
    state, model = tower
    tiles = tiles_of(count, 64)
    grid = torch_grid(state, tiles, CONFIG.stages)
    expected = grid.permute(0, 2, 3, 1).reshape(count, 4, 24)
    assert (
        0.05 < float((expected > 0).float().mean()) and float((expected < 6).float().mean()) > 0.5
    )
    ours = apply(model, tiles)
    assert ours.dtype == np.float32
    tolerances.assert_near(ours, expected, tolerances.HIDDEN)


def test_logits_match(tower):
    state, model = tower
    tiles = tiles_of(2, 64)
    expected = torch_logits(state, tiles, CONFIG)
    tolerances.assert_near(apply(model, tiles, "classify"), expected, tolerances.HIDDEN)


@pytest.mark.parametrize(("size", "stride", "side"), [(3, 1, 7), (3, 2, 8), (5, 1, 8), (5, 2, 7)])
def test_depthwise_convolution_matches_xlas_with_gradients(size, stride, side):
    conv = efficientnet.Conv(
        size, 6, 6, stride=stride, depthwise=True, rngs=nnx.Rngs(0), dtype=jnp.float32
    )
    graphdef, state = nnx.split(conv)
    x = jax.random.normal(jax.random.key(1), (2, side, side, 6))
    factor = jnp.arange(1.0, 7.0)

    def ours(x, state):
        return nnx.merge(graphdef, state)(x, factor)

    def xla(x, state):
        return jax.lax.conv_general_dilated(
            x,
            state["kernel"][...] * factor,
            (stride, stride),
            "SAME",
            feature_group_count=6,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def with_gradients(function):
        def loss(x, state):
            out = function(x, state)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, state)

    ((_, a), da), ((_, b), db) = with_gradients(ours), with_gradients(xla)
    tolerances.assert_near(a, b, tolerances.MODULE)
    for u, v in zip(jax.tree.leaves(da), jax.tree.leaves(db), strict=True):
        assert tolerances.relative(u, v) < tolerances.GRADIENT


def test_smaller_grids_are_means_over_areas(tower):
    state, model = tower
    tiles = tiles_of(2, 64)
    model_1 = nnx.merge(nnx.split(model)[0], parity.split(model)[1])
    model_1.config = EfficientNetConfig.from_hf({**parity.VISION, "grid": 1})
    expected = apply(model, tiles).mean(1, keepdims=True)
    tolerances.assert_near(apply(model_1, tiles), expected, tolerances.MODULE)


@pytest.mark.parametrize(("inputs", "outputs"), [(7, 7), (7, 3), (6, 2), (5, 4), (7, 1)])
def test_area_weights(inputs, outputs):
    weights = efficientnet.area_weights(inputs, outputs)
    tolerances.assert_near(weights.sum(1), 1, 1e-6)
    tolerances.assert_near(weights.sum(0), outputs / inputs, 1e-6)
    if inputs % outputs == 0:
        expected = F.adaptive_avg_pool1d(torch.eye(inputs)[None], outputs)[0].T
        tolerances.assert_near(weights, expected, 1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "vit"}, "'vit' is unknown"),
        ({"image_size": 100}, "image_size = 100 is no multiple of 32"),
        ({"image_size": "64"}, "image_size = '64' must be a positive whole number"),
        ({"grid": 3}, "grid = 3 is not between 1 and 2"),
        ({"width": 3}, "unknown keys width"),
    ],
)
def test_bad_configs_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        EfficientNetConfig.from_hf({**parity.VISION, **changes})


@pytest.mark.assets
def test_the_real_tower_matches(assets):
    import safetensors.torch

    tensors = safetensors.torch.load_file(assets / "student" / "model.safetensors")
    prefix = "vision_tower."
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    tower = models.load(assets / "student").vision_tower
    y, x = np.mgrid[:224, :224]
    smooth = np.stack([y, x, 255 - (x + y) // 2], -1).astype(np.uint8)
    tiles = np.stack([smooth, tiles_of(1, 224)[0]])
    expected = torch_logits(state, tiles, EfficientNetConfig())
    ours = apply(tower, tiles, "classify")
    tolerances.assert_near(ours, expected, tolerances.HIDDEN)
    assert ours.std() > 0.3
