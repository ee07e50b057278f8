"""Operations counted from jaxprs: by hand on small programs, by XLA on an unrolled model."""

import functools
import types

import jax
import jax.numpy as jnp
import llava_step
import pytest
from flax import nnx

from unime_jax.models import attention, layers, quant
from unime_jax.planning import abstract, estimate, flops, memory, topology
from unime_jax.planning.composition import Composition

ROWS, WIDTH, DEPTH = 5, 128, 3
SETTINGS = {
    "stage": "contrast",
    "seed": 0,
    "data": {"path": ""},
    "model": {"dtype": "float32", "remat": "full"},
    "loss": {"temperature": 0.1, "k": 2},
    "optim": {
        "learning_rate": 1e-3, "schedule": "constant", "warmup_share": 0.0, "warmup_steps": 0,
        "b1": 0.9, "b2": 0.999, "weight_decay": 0.0, "clip_norm": 1.0, "multipliers": (),
        "spike_factor": 0.0, "spike_window": 32,
    },
    "train": {
        "chunk": 2, "trainable": (), "quantize": None, "feature_dropout": 0.0,
        "adapters": {**llava_step.ADAPTERS, "dropout": 0.0},
    },
}  # fmt: skip


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def test_loops_recomputation_and_names_by_hand():
    """Three layers of one product, in a loop of two chunks that are computed again."""

    def loss(weights, rows):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        @jax.checkpoint
        def encode(x):
            with jax.named_scope("decoder"):
                return jax.lax.scan(jax.checkpoint(layer), x, weights)[0]

        x = jax.lax.map(encode, rows).reshape(-1, WIDTH)
        with jax.named_scope("loss"):
            return jnp.sum(jnp.tanh(x @ x.T))

    found = flops.count(jax.value_and_grad(loss), shape(DEPTH, WIDTH, WIDTH), shape(2, ROWS, WIDTH))
    layer = 2 * 2 * ROWS * WIDTH * WIDTH
    assert found.parts["decoder"] == DEPTH * layer * 3  # forward, and two products back
    assert found.again["decoder"] == DEPTH * layer * 2  # for the chunk, then for the layer
    assert found.parts["loss"] == 3 * 2 * (2 * ROWS) ** 2 * WIDTH and found.again["loss"] == 0
    assert found.total == sum(found.parts.values()) + found.again["decoder"]


def test_convolutions_branches_and_what_nobody_uses():
    def program(image, kernel, x):
        x @ x  # unused
        y = jax.lax.cond(jnp.sum(x) > 0, lambda: x @ x, lambda: x)
        return jax.lax.conv(image, kernel, (1, 1), "VALID"), y

    found = flops.count(program, shape(2, 3, 8, 8), shape(4, 3, 3, 3), shape(16, 16))
    assert found.total == 2 * (2 * 4 * 6 * 6) * (3 * 3 * 3) + 2 * 16**3


def test_products_in_a_while_loop_are_refused():
    def program(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 0, lambda x: x @ x, x)

    with pytest.raises(NotImplementedError, match="while"):
        flops.count(program, shape(4, 4))


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_remat_dots_keeps_products_with_weights(kind):
    """Policies of `jax.checkpoint` must see the products inside the layers' custom derivatives."""

    def make(rngs):
        linear = layers.Linear(WIDTH, WIDTH, rngs=rngs)
        linear.lora_A = nnx.data(nnx.Param(jnp.zeros((WIDTH, 4))))
        linear.lora_B = nnx.data(nnx.Param(jnp.zeros((4, WIDTH))))
        if kind:
            codes, scales = quant.shapes((WIDTH, WIDTH), kind)
            linear.kernel = nnx.data(None)
            linear.kernel_codes = nnx.data(nnx.Param(jnp.zeros(codes.shape, codes.dtype)))
            linear.kernel_scales = nnx.data(nnx.Param(jnp.zeros(scales.shape, scales.dtype)))
        return linear

    stacked = nnx.eval_shape(lambda: layers.stack(make, DEPTH, nnx.Rngs(0)))
    graphdef, state = nnx.split(stacked)
    flat = nnx.to_pure_dict(state)
    adapters = {name: flat.pop(name) for name in ("lora_A", "lora_B")}

    def loss(adapters, frozen, x, remat):
        stack = nnx.merge(graphdef, {**frozen, **adapters})
        apply = lambda layer, x, key: jnp.tanh(layer(x))  # noqa: E731
        return jnp.sum(layers.scan_layers(stack, x, apply, remat=remat))

    arguments = adapters, flat, shape(ROWS, WIDTH)

    def count(remat):
        return flops.count(jax.grad(functools.partial(loss, remat=remat)), *arguments)

    assert sum(count("dots").again.values()) == 0 < sum(count("full").again.values())
    assert count("dots").model == count("full").model == count("none").total
    # A layer's input, and the sum of its product and its adapter's: not either by itself.
    jaxpr, _ = flops.trace(jax.grad(functools.partial(loss, remat="dots")), *arguments)
    there = next(equation for equation in jaxpr.eqns if equation.primitive.name == "scan")
    kept = [var.aval.shape for var in there.outvars if var.aval.ndim == 3]
    assert sorted(kept) == [(DEPTH, ROWS, 4), (DEPTH, ROWS, WIDTH), (DEPTH, ROWS, WIDTH)]


def test_floats_of_quantised_weights_stay_in_their_layer():
    """Else all layers' are held at once: the loop over chunks does not change them."""
    text = {**llava_step.CONFIG["text_config"], "hidden_size": 128, "intermediate_size": 256}
    settings = {
        **SETTINGS,
        "model": {"dtype": "bfloat16", "remat": "none"},
        "train": {**SETTINGS["train"], "quantize": "nf4", "adapters": llava_step.ADAPTERS},
    }
    composition = Composition(((4, 12, 0),), ((4, 8, 0),), (), 4, 10, ("a",), 0.0)
    run = abstract.run(settings, {**llava_step.CONFIG, "text_config": text}, composition)

    def results(jaxpr):
        for equation in jaxpr.eqns:
            yield from (var.aval for var in equation.outvars if hasattr(var.aval, "shape"))
            for body, _ in flops.bodies(equation):
                yield from results(body)

    jaxpr, _ = flops.trace(run.step, *run.arguments)
    codes = run.frozen["language_model/model/layers/mlp/up_proj/kernel_codes"]
    made = [x.dtype for x in results(jaxpr) if x.ndim == 3 and x.shape[1:] == codes.shape[1:]]
    assert made  # the codes themselves
    assert not [dtype for dtype in made if jnp.issubdtype(dtype, jnp.floating)]


def test_xla_counts_the_same_on_an_unrolled_model(monkeypatch):
    """A step of LLaVA, adapters, chunks and all, without a loop in its program."""
    text = {**llava_step.CONFIG["text_config"], "hidden_size": 512, "intermediate_size": 1024}
    vision = {**llava_step.CONFIG["vision_config"], "hidden_size": 256, "intermediate_size": 512}
    config = {**llava_step.CONFIG, "text_config": text, "vision_config": vision}
    composition = Composition(((4, 24, 3),), ((4, 8, 0),), (), 4, 10, ("a",), 0.0)
    run = abstract.run(SETTINGS, config, composition)
    counted = flops.count(run.step, *run.arguments)
    scan = jax.lax.scan
    monkeypatch.setattr(jax.lax, "scan", functools.partial(scan, unroll=True))
    monkeypatch.setattr(
        jax.lax, "map", lambda f, xs: scan(lambda _, x: (None, f(x)), None, xs, unroll=True)[1]
    )
    run = abstract.run(SETTINGS, config, composition)
    by_xla = run.step.lower(*run.arguments).cost_analysis()["flops"]
    assert counted.total == pytest.approx(by_xla, rel=0.01)
    assert counted.again["decoder"] > counted.parts["decoder"] / 3


def estimator(settings, made, config=llava_step.CONFIG):
    return estimate.Estimator(
        settings,
        config,
        made,
        memory.Arguments(1.0, 0.0, 0.0, 0.0),
        1.0,
        topology=topology.parse("v5e:1x1"),
        mesh=types.SimpleNamespace(shape={"data": 1, "fsdp": 1, "tensor": 1}),
        mfu=0.5,
        flash=True,
    )


def test_scores_that_a_kernel_never_holds_are_not_counted(monkeypatch):
    """XLA's attention takes blocks of queries, whose scores are no square."""
    made = Composition(((2, 400, 0),), ((2, 8, 0),), (), 2, 10, ("a",), 0.0)
    settings = {**SETTINGS, "model": {"dtype": "float32", "remat": "none"}}
    found = estimator(settings, made).probe("none", False).row
    monkeypatch.setattr(attention, "_BLOCKS", 1)
    assert found == estimator(settings, made).probe("none", False).row > 0


def test_few_rows_take_a_layers_floats_and_many_their_activations():
    text = {**llava_step.CONFIG["text_config"], "hidden_size": 512, "intermediate_size": 1024}
    settings = {
        **SETTINGS,
        "model": {"dtype": "bfloat16", "remat": "full"},
        "train": {**SETTINGS["train"], "quantize": "nf4", "adapters": llava_step.ADAPTERS},
    }
    made = Composition(((900, 16, 0),), ((900, 8, 0),), (), 900, 10, ("a",), 0.0)
    found = estimator(settings, made, {**llava_step.CONFIG, "text_config": text})
    probe = found.probe("full", False)
    for rows in (1, 900):
        known, _ = found._trace("full", rows, False)
        assert probe.temporaries(rows) == pytest.approx(known, rel=0.05)
    assert known > 4 * probe.least
