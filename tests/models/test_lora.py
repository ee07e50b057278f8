"""Adapters: what attaching and merging must and must not change, and PEFT's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tolerances
from flax import nnx

from unime_jax import models
from unime_jax.models import lora
from unime_jax.types import UserError, flatten, unflatten

ALL = r"language_model/.*_proj$"
SOME = r"self_attn/(q|v)_proj$"


def tiny(**changes):
    return parity.build(parity.SMOL, **changes)


def attach(model, **changes):
    options = {"rank": 3, "alpha": 6, "dropout": 0.0, "targets": ALL, "rngs": nnx.Rngs(1)}
    return lora.attach(model, **{**options, **changes})


def filled(model, seed=0):
    """The model with random numbers in every lora_B."""
    graphdef, params = parity.split(model)
    rng = np.random.default_rng(seed)
    flat = {
        path: jnp.asarray(rng.standard_normal(x.shape) * 0.1, x.dtype) if "lora_B" in path else x
        for path, x in flatten(params).items()
    }
    return nnx.merge(graphdef, unflatten(flat))


def test_fresh_adapter_changes_nothing_at_all():
    inputs = parity.text_inputs()
    # Operation by operation: compiled as wholes, two programs may fuse, and so round, differently.
    with jax.disable_jit():
        base, fresh, other = (
            np.asarray(model.embed(inputs))
            for model in (tiny(), attach(tiny()), filled(attach(tiny())))
        )
    np.testing.assert_array_equal(fresh, base)
    assert np.abs(other - base).max() > 1e-3


def test_merged_equals_unmerged():
    inputs = parity.text_inputs()
    model = filled(attach(tiny()))
    with_adapters = parity.embed(model, inputs)
    base = flatten(parity.split(tiny())[1])
    lora.merge(model)
    merged = flatten(parity.split(model)[1])
    assert set(merged) == set(base)
    tolerances.assert_near(parity.embed(model, inputs), with_adapters, tolerances.EMBEDDING)
    assert np.abs(parity.embed(tiny(), inputs) - with_adapters).max() > 1e-2
    changed = {path for path in base if not np.array_equal(base[path], merged[path])}
    assert changed == {p for p in base if "_proj/kernel" in p and "language_model" in p}


def test_merging_a_bf16_base_rounds_once():
    model = attach(tiny(dtype="bfloat16"))
    linear = filled(model).language_model.model.layers.mlp.up_proj
    wide = linear.kernel[...].astype(jnp.float32)
    change = jnp.einsum("lir,lro->lio", linear.lora_A[...], linear.lora_B[...]) * 2.0
    lora.merge(linear)
    assert linear.kernel[...].dtype == jnp.bfloat16
    np.testing.assert_array_equal(linear.kernel[...], (wide + change).astype(jnp.bfloat16))


def test_adapters_are_f32_stacked_and_start_as_pefts():
    flat = flatten(parity.split(attach(tiny(dtype="bfloat16"), targets=SOME))[1])
    paths = lora.adapter_paths(unflatten(flat))
    prefix = "language_model/model/layers/self_attn"
    assert paths == [f"{prefix}/{n}_proj/lora_{m}" for n in "qv" for m in "AB"]
    a, b = flat[f"{prefix}/v_proj/lora_A"], flat[f"{prefix}/v_proj/lora_B"]
    assert a.shape == (3, 32, 3) and b.shape == (3, 3, 16)
    assert a.dtype == b.dtype == jnp.float32
    assert not np.any(b)
    assert 0.9 / 32**0.5 < np.abs(a).max() <= 1 / 32**0.5
    assert not np.array_equal(a[0], a[1])


def test_attaching_works_on_an_abstract_model():
    abstract = nnx.eval_shape(lambda: attach(tiny()))
    real = flatten(parity.split(attach(tiny()))[1])
    shapes = {path: x.shape for path, x in flatten(parity.split(abstract)[1]).items()}
    assert shapes == {path: x.shape for path, x in real.items()}


def test_only_differentiated_leaves_get_gradients():
    """With a frozen base no product has the shape of a base weight's gradient."""
    graphdef, params = parity.split(attach(tiny()))
    flat = flatten(params)
    trainable = {path: flat[path] for path in lora.adapter_paths(params)}
    inputs = parity.text_inputs()

    def loss(trainable):
        model = nnx.merge(graphdef, unflatten({**flat, **trainable}))
        return model.embed(inputs).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(trainable))
    assert "f32[32,3]" in text  # an adapter's gradient, so the pattern is right
    assert "f32[32,56] = dot_general" not in text and "f32[56,32] = dot_general" not in text


def test_dropout_acts_on_the_adapter_alone_and_only_with_a_key():
    inputs = parity.text_inputs()
    fresh = attach(tiny(), dropout=0.5)
    base = parity.embed(tiny(), inputs)
    graphdef, params = parity.split(fresh)
    run = jax.jit(lambda params, key: nnx.merge(graphdef, params).embed(inputs, key=key))
    tolerances.assert_near(run(params, jax.random.key(0)), base, tolerances.EMBEDDING)
    model = filled(fresh)
    params = parity.split(model)[1]
    a, again, b = (run(params, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, again)
    assert np.abs(a - b).max() > 1e-3
    assert np.abs(a - parity.embed(model, inputs)).max() > 1e-3


def test_dropout_keeps_the_mean():
    linear = attach(models.layers.Linear(64, 8, rngs=nnx.Rngs(0)), targets="", dropout=0.25)
    linear.lora_B[...] = jnp.ones((3, 8))
    x = jnp.ones((20000, 64))
    dropped, plain = linear(x, jax.random.key(0)), linear(x[:1])
    assert tolerances.relative(dropped.mean(0), plain[0]) < 0.02
    assert float(dropped.std(0).min()) > 0.01


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": "k_prj$"}, "'k_prj\\$' match no linear layer; paths are like language_model"),
        ({"rank": 0}, "rank is 0"),
    ],
)
def test_bad_adapters_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        attach(tiny(), **changes)


def test_attaching_twice_is_refused():
    with pytest.raises(UserError, match="has an adapter already; merge it"):
        attach(attach(tiny()))


def test_peft_gives_the_same_outputs_and_gradients(tmp_path):
    peft = pytest.importorskip("peft")
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {k: v for k, v in parity.TEXT.items() if k != "model_type"}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    base.save_pretrained(tmp_path)
    names = ["q_proj", "v_proj", "down_proj"]
    reference = peft.get_peft_model(
        base, peft.LoraConfig(r=3, lora_alpha=12, lora_dropout=0.0, target_modules=names)
    )
    adapters = {n: p for n, p in reference.named_parameters() if "lora_" in n}
    for parameter in adapters.values():
        torch.nn.init.normal_(parameter, std=0.1)

    model = attach(models.load(tmp_path), alpha=12, targets=f"({'|'.join(names)})$")
    graphdef, params = parity.split(model)
    flat = flatten(params)

    def theirs(path, layer):
        name = path.replace("language_model/", "").replace("layers/", f"layers.{layer}.")
        return "base_model.model." + name.replace("/", ".") + ".default.weight"

    own = {
        path: jnp.stack(
            [jnp.asarray(adapters[theirs(path, layer)].detach().numpy().T) for layer in range(3)]
        )
        for path in lora.adapter_paths(params)
    }
    assert 3 * len(own) == len(adapters)
    inputs = parity.text_inputs()
    direction = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)

    out = reference(
        torch.tensor(inputs.tokens).long(),
        attention_mask=torch.tensor(parity.mask(inputs)),
        output_hidden_states=True,
    ).hidden_states[-1]
    last = out[torch.arange(4), torch.tensor(inputs.lengths).long() - 1]
    expected = torch.nn.functional.normalize(last, dim=-1)
    (expected * torch.tensor(direction)).sum().backward()

    def loss(own):
        vectors = nnx.merge(graphdef, unflatten({**flat, **own})).embed(inputs)
        return jnp.sum(vectors * direction), vectors

    (_, vectors), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(own)
    tolerances.assert_near(vectors, expected.detach(), tolerances.EMBEDDING)
    for path, gradient in gradients.items():
        for layer in range(3):
            error = tolerances.relative(gradient[layer].T, adapters[theirs(path, layer)].grad)
            assert error < tolerances.GRADIENT, (path, layer, error)
