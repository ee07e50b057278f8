"""Exact large batches: chunks, devices, dropout, an explicit gradient cache, collectives."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import llava_step
import miniature
import numpy as np
import pytest
import tolerances
import toy
from flax import nnx

from unime_jax import config, embedder, losses, models, optim, sharding, steps
from unime_jax.types import Batch, flatten, unflatten

CONTRAST = steps.make_objective("contrast", temperature=0.1, k=4, set_names=("a", "b", "c"))


def toy_batch(rows=24):
    """Groups of 11 and 13 rows, which divide over nothing."""
    return dataclasses.replace(toy.batch(rows), sets=(np.arange(rows) % 3).astype(np.int32))


def toy_parts():
    graphdef, state = nnx.split(toy.ToyModel(rngs=nnx.Rngs(0)))
    return graphdef, *optim.split_trainable(flatten(nnx.to_pure_dict(state)), ["kernel"])


def gradients(batch, *, objective=CONTRAST, mesh=None, **options):
    """Returns loss, metrics and gradients of the toy's kernel."""
    graphdef, trainable, frozen = toy_parts()
    batch = batch if mesh is None else steps.place_batch(batch, mesh)
    run = jax.jit(steps.loss_and_gradients(graphdef, objective, mesh=mesh, **options))
    (loss, metrics), grads = run(trainable, frozen, batch, jax.random.key(3))
    return float(loss), jax.device_get(metrics), jax.device_get(grads)


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    for name, value in expected[1].items():
        assert found[1][name] == pytest.approx(value, abs=1e-5), name
    tolerances.assert_gradients_near(found[2], expected[2])


def test_chunks_and_devices_change_nothing():
    """A row loses the same inputs to dropout in any chunk and on any device."""
    batch = toy_batch()
    whole = gradients(batch, dropout=True)
    assert whole[0] != gradients(batch)[0] and whole[2]["kernel"].any()
    for chunk in (1, 4):
        assert_same(gradients(batch, dropout=True, chunk=chunk), whole)
    mesh = sharding.make_mesh(data=2, fsdp=4)
    for chunk in (0, 9):
        assert_same(gradients(batch, dropout=True, chunk=chunk, mesh=mesh), whole)


def test_gradients_are_those_of_an_explicit_gradient_cache():
    """Pass one: embeddings, and the loss's gradients of them. Pass two: pulled back by group."""
    batch = toy_batch()
    graphdef, trainable, frozen = toy_parts()

    def embed(trainable, group, key):
        keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.arange(group.rows))
        return nnx.merge(graphdef, unflatten({**frozen, **trainable})).embed(group, key=keys)

    def objective(query, target):
        return losses.hard_negative_info_nce(
            query, target, temperature=0.1, k=4, margin=0.1, target_ids=batch.target_ids
        )[0]

    key = jax.random.split(jax.random.key(3))[0]
    sides = [(group, 0) for group in batch.query] + [(group, 1) for group in batch.target]
    parts = [
        (group, jax.random.fold_in(key, number), side) for number, (group, side) in enumerate(sides)
    ]  # all of them have shapes of their own
    orders = batch.query_order, batch.target_order

    @jax.jit
    def total_gradient(trainable):
        rows = [embed(trainable, group, key) for group, key, _ in parts]
        sides = [
            jnp.concatenate([row for row, part in zip(rows, parts, strict=True) if part[2] == side])
            for side in (0, 1)
        ]
        cached = jax.grad(objective, (0, 1))(*[x[o] for x, o in zip(sides, orders, strict=True)])
        cached = [jnp.zeros_like(g).at[o].set(g) for g, o in zip(cached, orders, strict=True)]
        total, start = jax.tree.map(jnp.zeros_like, trainable), [0, 0]
        for group, key, side in parts:
            grads = cached[side][start[side] : start[side] + group.rows]
            start[side] += group.rows
            _, pull = jax.vjp(lambda t, group=group, key=key: embed(t, group, key), trainable)
            total = jax.tree.map(jnp.add, total, pull(grads)[0])
        return total

    found = gradients(batch, dropout=True, chunk=4)
    tolerances.assert_gradients_near(found[2], jax.device_get(total_gradient(trainable)))


def test_judged_negatives_reach_their_own_query():
    batch = toy_batch()
    rng = np.random.default_rng(0)
    more = (toy.inputs(30, 5, seed=7), toy.inputs(42, 3, seed=8))
    batch = dataclasses.replace(
        batch,
        negative=more,
        negative_order=rng.permutation(72).astype(np.int32),
        scores=rng.uniform(0, 1, (24, 4)).astype(np.float32),
    )
    graphdef, trainable, frozen = toy_parts()
    model = nnx.merge(graphdef, unflatten({**frozen, **trainable}))

    @jax.jit
    def plain(batch):
        def side(groups, order):
            return jnp.concatenate([model.embed(group) for group in groups])[order]

        own = side(batch.negative, batch.negative_order).reshape(24, 3, -1)
        query, target = side(batch.query, batch.query_order), side(batch.target, batch.target_order)
        return losses.judged_kl(query, target, own, batch.scores, temperature=0.1)[0]

    expected = plain(batch)
    objective = steps.make_objective("judge", temperature=0.1)
    whole = gradients(batch, objective=objective)
    assert whole[0] == pytest.approx(float(expected), abs=1e-6)
    assert_same(gradients(batch, objective=objective, chunk=4), whole)


def test_equal_targets_may_be_negatives_as_in_the_paper():
    batch = dataclasses.replace(toy_batch(), target_ids=np.zeros(24, np.int32))
    masked = gradients(batch)[0]
    assert masked == pytest.approx(0, abs=1e-6)  # one target for all: no negative is left
    paper = steps.make_objective("contrast", temperature=0.1, k=4, mask_equal_targets=False)
    plain = dataclasses.replace(batch, target_ids=np.arange(24, dtype=np.int32))
    assert gradients(batch, objective=paper)[0] == gradients(plain)[0] > 0.1


def collectives(text: str) -> list[tuple[str, str]]:
    """Lists (kind, result type) of the collectives that move data in a compiled program."""
    pattern = r"= (\S+) (all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    return [(kind, shape) for shape, kind in re.findall(pattern, text)]


def test_embeddings_are_gathered_once_and_activations_stay():
    mesh = sharding.make_mesh(fsdp=8)
    state, frozen, step = llava_step.parts(mesh=mesh, chunk=8)
    batch = steps.place_batch(llava_step.small_batch(), mesh)
    found = collectives(step.lower(state, frozen, batch).compile().as_text())
    width = llava_step.WIDTH
    embeddings = [shape for _, shape in found if re.match(rf"f32\[8,\d+,{width}\]", shape)]
    assert len(embeddings) == 1, found
    assert {kind for kind, _ in found} == {"all-gather"}, found
    weights = {tuple(x.shape[-2:]) for x in frozen.values() if x.ndim > 1}
    for _, shape in found:
        sizes = tuple(map(int, re.match(r"\w+\[([\d,]*)\]", shape).group(1).split(",")))
        assert shape in embeddings or sizes[-2:] in weights, f"{shape} is no weight"


def compiled_decoder(remat: str = "none", mesh=None):
    """Compiles loss and gradients of 4 layers with adapters; returns the program's text and the
    shapes of a layer's kernels."""
    graphdef, abstract = models.abstract(
        {**llava_step.CONFIG["text_config"], "num_hidden_layers": 4}, remat=remat
    )
    zeros = jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), abstract)
    model = nnx.merge(graphdef, zeros)
    embedder.attach_adapters(model, {**llava_step.ADAPTERS, "dropout": 0.0}, seed=0)
    graphdef, state = nnx.split(model)
    parts = optim.split_trainable(flatten(nnx.to_pure_dict(state)), [optim.ADAPTER_PATTERN])
    place = (lambda path, shape: None) if mesh is None else sharding.sharding_of(mesh)
    trainable, frozen = (
        {
            p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(p, x.shape))
            for p, x in t.items()
        }
        for t in parts
    )
    group, order = llava_step.group(8, 6, image=False, seed=0), np.arange(8, dtype=np.int32)
    batch = Batch((group,), (), order, None, vectors=np.eye(8, 64))
    batch = batch if mesh is None else steps.place_batch(batch, mesh)
    objective = steps.make_objective("align", temperature=0.1)
    run = jax.jit(steps.loss_and_gradients(graphdef, objective, mesh=mesh))
    text = run.lower(trainable, frozen, batch, jax.random.key(0)).compile().as_text()
    kernels = [x.shape[1:] for p, x in frozen.items() if p.endswith("kernel") and "/layers/" in p]
    assert len(kernels) == 7
    return text, kernels


@pytest.mark.parametrize("remat", ["none", "full"])
def test_frozen_layers_but_the_last_are_run_without_a_copy_of_them(remat):
    text, kernels = compiled_decoder(remat)
    for inputs, outputs in kernels:
        assert f"f32[4,{inputs},{outputs}]" in text
        assert f"f32[3,{inputs},{outputs}]" not in text, "a copy of all but the last"


def test_a_layer_is_gathered_at_a_time_in_the_loops_over_layers():
    """FSDP. The last layer, which is computed for the last token alone, stands behind the loops."""
    text, kernels = compiled_decoder(mesh=sharding.make_mesh(fsdp=8))
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    inside, outside = 0, 0
    for computation in text.split("\n\n"):
        name = re.match(r"\s*%?([\w.\-]+)", computation)
        for kind, shape in collectives(computation):
            *front, inputs, outputs = map(int, re.search(r"\[([\d,]+)\]", shape)[1].split(","))
            if (inputs, outputs) in kernels:
                assert kind == "all-gather" and np.prod(front) == 1, f"{kind} of {shape}"
                inside += name[1] in bodies
                outside += name[1] not in bodies
    assert not re.search(r"infeed|outfeed|callback|\b(send|recv)\(", text), "the host is asked"
    # On the way out and once more on the way back; the last layer once.
    assert (inside, outside) == (2 * 7, 7)
    for inputs, outputs in kernels:
        assert f"f32[3,{inputs},{outputs}]" not in text, "gathered weights of all layers are kept"


def tower_runs(vision: bool, chunk: int) -> int:
    """Counts how often a step's program runs the tower's layers (their MLP is 48 wide)."""
    graphdef, trainable, frozen = llava_step.model(vision)
    run = steps.loss_and_gradients(graphdef, CONTRAST, chunk=chunk)
    batch = dataclasses.replace(llava_step.small_batch(), sets=np.zeros(16, np.int32))
    program = jax.make_jaxpr(run)(trainable, frozen, batch, jax.random.key(0))
    return len(re.findall(r":f32\[[\d,]*\b48\] = logistic ", str(program)))


def test_a_frozen_tower_runs_once_a_step():
    assert tower_runs(vision=False, chunk=4) == 1
    assert tower_runs(vision=True, chunk=4) == 2  # once more on the way back
    trainable = llava_step.model(True)[1]
    tower = [path for path in trainable if path.startswith("vision_tower/")]
    assert len(tower) == 2 * 6 and all("/encoder/layers/" in path for path in tower)


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("phi35v_stage2", 1e-4),
        ("llava16_stage2", 2e-5),
        ("llava16_vlm2vec", 2e-5),
        ("llava16_judged", 2e-5),
    ],
)
def test_configs_hold_the_recipe(name, rate):
    c = config.parse(["train", f"--config={miniature.ROOT}/configs/{name}.py"], "doc")
    assert (c.train.steps, c.train.batch_size, c.optim.warmup_steps) == (1000, 1024, 100)
    adapters = c.train.adapters
    assert (adapters.rank, adapters.alpha, adapters.dropout) == (16, 64.0, 0.1)
    assert (c.optim.learning_rate, c.optim.schedule, c.loss.temperature) == (rate, "linear", 0.02)
    assert (c.data.prompt, c.data.image_size) == ("mmeb", 336)
    assert c.data.image_crops == (1 if name.startswith("phi") else 0)
    assert (c.loss.k, c.loss.margin) == (0 if name.endswith("vlm2vec") else 8, 0.1)
