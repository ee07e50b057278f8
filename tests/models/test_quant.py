"""Weights in 4 and 8 bits: the codes, the product, whole models, devices, and loading."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tolerances
from flax import nnx

from unime_jax import models, sharding
from unime_jax.models import hf, lora, quant
from unime_jax.types import UserError, flatten, unflatten

CONFIG = {**parity.TEXT, "hidden_size": 128, "intermediate_size": 128}
CONFIG |= {"num_hidden_layers": 2, "vocab_size": 96}


def weight(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---- codes


@pytest.mark.parametrize("kind", quant.KINDS)
def test_every_weight_gets_the_nearest_code_of_its_block(kind):
    w = weight(2, 192, 5)
    w[0, :64, 0] = 0  # a block of zeros
    codes, scales = quant.quantize(jnp.asarray(w), kind)
    assert codes.dtype == {"nf4": jnp.uint4, "int8": jnp.int8}[kind] and codes.shape == w.shape
    assert scales.dtype == jnp.bfloat16 and scales.shape == (2, 3, 5)
    table = np.array(quant.NF4) if kind == "nf4" else np.arange(-127, 128)
    largest = np.abs(w.reshape(2, 3, 64, 5)).max(2)
    tolerances.assert_near(
        np.asarray(scales, np.float32), largest / table.max(), largest.max() / table.max() / 256
    )
    scale = np.repeat(np.asarray(scales, np.float64), 64, axis=1)
    nearest = np.abs(w[..., None] - table * scale[..., None]).min(-1)
    back = np.asarray(quant.dequantize(codes, scales, jnp.float32))
    tolerances.assert_near(np.abs(back - w), nearest, 1e-6)
    assert not back[0, :64, 0].any()


def test_nf4_is_that_of_bitsandbytes():
    """Quantiles of a normal distribution: 8 below zero, 7 above, 0 and both ends."""
    import scipy.stats

    offset = (1 - 1 / 30 + 1 - 1 / 32) / 2
    above = scipy.stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -scipy.stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort([*above, *below, 0.0]) / above.max()
    tolerances.assert_near(np.array(quant.NF4), values, 1e-4)


def test_what_does_not_divide_is_named():
    with pytest.raises(UserError, match=r"parameter a/b \(3, 96, 8\).*96 inputs are no multiple"):
        quant.shapes((3, 96, 8), "nf4", "parameter a/b")
    with pytest.raises(UserError, match="'fp4' is unknown; use one of nf4, int8"):
        quant.shapes((64, 8), "fp4")


@pytest.mark.parametrize("kind", quant.KINDS)
def test_product_and_gradient_are_those_of_the_floats(kind):
    codes, scales = quant.quantize(jnp.asarray(weight(128, 24)), kind)
    floats = quant.dequantize(codes, scales, jnp.float32)
    x, g = jnp.asarray(weight(3, 5, 128, seed=1)), jnp.asarray(weight(3, 5, 24, seed=2))
    y, back = jax.vjp(lambda x: quant.matmul(x, codes, scales), x)
    tolerances.assert_near(y, x @ floats, tolerances.MODULE)
    tolerances.assert_near(back(g)[0], g @ floats.T, tolerances.MODULE)
    assert quant.matmul(x.astype(jnp.bfloat16), codes, scales).dtype == jnp.bfloat16


# ---- models


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    _, params = parity.split(parity.build(CONFIG))
    models.save(directory, params, CONFIG)
    return directory


def dequantized(model):
    """The model with the floats that its codes stand for."""
    for _, linear in lora.linears(model):
        if linear.kernel is None:
            floats = quant.dequantize(
                linear.kernel_codes[...], linear.kernel_scales[...], jnp.float32
            )
            linear.kernel = nnx.data(nnx.Param(floats))
            linear.kernel_codes = linear.kernel_scales = nnx.data(None)
    return model


def with_adapters(model):
    """Attaches adapters with numbers of numpy's: jax would compile a draw for every shape."""
    rng = np.random.default_rng(3)
    for path, linear in lora.linears(model):
        if path.endswith("_proj"):
            layers, inputs, outputs = linear.shape
            for name, shape in (("lora_A", (layers, inputs, 4)), ("lora_B", (layers, 4, outputs))):
                value = 0.1 * rng.standard_normal(shape).astype(np.float32)
                setattr(linear, name, nnx.data(nnx.Param(jnp.asarray(value))))
            linear.lora_scale = 2.0
    return model


@functools.partial(jax.jit, static_argnums=0)
def _gradients(graphdef, trainable, frozen, inputs, direction):
    def loss(trainable):
        model = nnx.merge(graphdef, unflatten({**frozen, **trainable}))
        return jnp.sum(model.embed(inputs) * direction)

    return jax.value_and_grad(loss)(trainable)


def gradients(model, inputs=None):
    inputs = parity.text_inputs(vocabulary=96) if inputs is None else inputs
    graphdef, params = parity.split(model)
    flat = flatten(params)
    trainable = {path: flat[path] for path in lora.adapter_paths(params)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trainable}
    return _gradients(graphdef, trainable, frozen, inputs, weight(inputs.rows, 128, seed=9))


@pytest.mark.parametrize("kind", quant.KINDS)
def test_only_the_decoders_linear_layers_are_quantized(directory, kind):
    flat = flatten(parity.split(models.load(directory, quantize=kind))[1])
    codes = [path for path in flat if path.endswith("kernel_codes")]
    assert len(codes) == 7 and all("_proj/" in path for path in codes)
    assert not any(path.endswith("_proj/kernel") for path in flat)
    others = flatten(parity.split(models.load(directory))[1])
    for path, leaf in flat.items():
        if "_proj/kernel" not in path:
            np.testing.assert_array_equal(leaf, others[path])
    kernel = others[codes[0].replace("_codes", "")]
    wanted, scales = quant.quantize(kernel, kind)
    np.testing.assert_array_equal(flat[codes[0]], wanted)
    np.testing.assert_array_equal(flat[codes[0].replace("_codes", "_scales")], scales)


@pytest.fixture(scope="module")
def reference(directory):
    model = with_adapters(dequantized(models.load(directory, quantize="nf4")))
    return gradients(model)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_in_f32_are_those_of_the_dequantized_weights(directory, reference, remat):
    loss, grads = gradients(with_adapters(models.load(directory, quantize="nf4", remat=remat)))
    tolerances.assert_near(loss, reference[0], tolerances.MODULE)
    assert len(grads) == 14
    tolerances.assert_gradients_near(grads, reference[1])


def test_gradients_in_bf16_are_those_of_the_same_computation_on_f32_weights(directory):
    quantized = with_adapters(models.load(directory, quantize="nf4", dtype="bfloat16"))
    _, grads = gradients(quantized)
    assert all(grad.dtype == jnp.float32 for grad in grads.values())
    _, wanted = gradients(dequantized(quantized))  # still computed in bf16
    tolerances.assert_gradients_near(grads, wanted, 1e-2)


def test_eight_devices_equal_one(directory, reference):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    model = models.load(directory, quantize="nf4", sharding_of=sharding.sharding_of(mesh))
    flat = flatten(nnx.to_pure_dict(nnx.state(model)))
    path = "language_model/model/layers/mlp/down_proj/kernel"
    assert flat[f"{path}_codes"].sharding.shard_shape((2, 128, 128)) == (2, 64, 64)
    assert flat[f"{path}_scales"].sharding.shard_shape((2, 2, 128)) == (2, 1, 64)
    loss, grads = gradients(
        with_adapters(model), sharding.shard_batch(parity.text_inputs(vocabulary=96), mesh)
    )
    tolerances.assert_near(loss, reference[0], tolerances.MODULE)
    tolerances.assert_gradients_near(grads, reference[1])
    with pytest.raises(
        UserError, match=r"kernel_scales \(2, 2, \d+\): 2 does not divide over mesh axis fsdp=8"
    ):
        models.load(
            directory, quantize="nf4", sharding_of=sharding.sharding_of(sharding.make_mesh(fsdp=8))
        )


def test_floats_are_freed_before_the_next_parameter_is_read(directory, monkeypatch):
    read, alive = [], []
    original = hf._read

    def watched(*args):
        alive.append(sum(not leaf.is_deleted() for leaf in read))
        read.append(original(*args))
        return read[-1]

    monkeypatch.setattr(hf, "_read", watched)
    models.load(directory, quantize="int8")
    kept = [not leaf.is_deleted() for leaf in read]
    assert len(kept) - sum(kept) == 7
    assert alive == [sum(kept[:i]) for i in range(len(kept))]


def test_quantized_weights_take_no_merge(directory):
    model = with_adapters(models.load(directory, quantize="nf4"))
    with pytest.raises(UserError, match="quantized: load the run"):
        lora.merge(model)


def test_a_model_without_a_decoder_is_refused(tmp_path):
    config = {
        "model_type": "bert", "vocab_size": 30, "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 8,
        "type_vocab_size": 2, "layer_norm_eps": 1e-12,
    }  # fmt: skip
    _, params = parity.split(parity.build(config))
    models.save(tmp_path, params, config)
    with pytest.raises(UserError, match="no decoder to quantize"):
        models.load(tmp_path, quantize="nf4")
    with pytest.raises(UserError, match="no language model"):
        models.load(tmp_path, part="language")
