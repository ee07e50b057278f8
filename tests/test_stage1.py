"""Stage 1 of the real backbones in miniature: the language model alone, quantised, and after."""

import jax
import miniature
import numpy as np
import optax
import pytest
import tolerances
from flax import nnx
from PIL import Image

import unime_jax
from unime_jax import checkpoint, embedder, optim, sharding, steps, train, train_data
from unime_jax import config as config_lib
from unime_jax.models import hf
from unime_jax.types import UserError, flatten


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIME_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def config(name, **changes):
    file = miniature.ROOT / "configs" / f"{name}.py"
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    parsed = config_lib.parse(["train", f"--config={file}:smoke", *flags], "doc")
    config_lib.validate_train(parsed)
    return parsed


# A program of one chunk compiles in half the time; chunks have their own tests.
WHOLE = {"train.chunk": 0, "model.remat": "none"}


@pytest.fixture(scope="module", params=["phi35v_stage1", "llava16_e5v"])
def run(request, tmp_path_factory):
    """Three steps on a quantised language model: config, directory, metrics, parameters read."""
    output, read, original = tmp_path_factory.mktemp("run"), [], hf._read

    def watched(source, rule, *rest):
        read.append(rule.ours)
        return original(source, rule, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "_read", watched)
        # Dropout takes half of the time to compile; one run with it is enough.
        more = {"train.adapters.dropout": 0.0} if request.param == "llava16_e5v" else {}
        c = config(request.param, output=output, **WHOLE, **more)
        return c, output, train.run(c), read


def test_three_steps_train_the_language_model_alone(run):
    c, output, metrics, read = run
    assert np.isfinite(metrics["loss"]) and metrics["gradient_norm"] > 0
    assert ("hard_negative_cosine" in metrics) == (c.stage == "contrast")
    assert read and all(path.startswith("language_model/model/") for path in read)
    assert checkpoint.read_run(output)["data"]["fusion"] == "sum"


def params_of(path):
    return flatten(unime_jax.load(path, dtype="float32").params)


def test_adapters_go_into_the_original_weights_and_vision_is_untouched(run):
    c, output, *_ = run
    base, after = params_of(c.model.path), params_of(output)
    trained = checkpoint.read_trainable(output)
    assert base.keys() == after.keys() and len(trained) in (8, 14)
    scale = c.train.adapters.alpha / c.train.adapters.rank
    changed = set()
    for path, before in base.items():
        module = path.removesuffix("/kernel")
        if f"{module}/lora_A" not in trained:
            np.testing.assert_array_equal(after[path], before, err_msg=path)
            continue
        a, b = trained[f"{module}/lora_A"], trained[f"{module}/lora_B"]
        change = scale * np.einsum("lir,lro->lio", a, b)
        assert np.abs(change).max() > 0
        tolerances.assert_near(after[path], before + change, 1e-6)
        changed.add(path)
    assert len(changed) == len(trained) / 2
    assert sum(path.startswith(("vision_tower", "multi_modal")) for path in base) > 10


@pytest.mark.parametrize("run", ["phi35v_stage1"], indirect=True)
def test_afterwards_an_image_with_a_text_is_the_sum_of_both(run):
    model = unime_jax.load(run[1], dtype="float32")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8))
    texts, images = ["a cat", "a dog", None], [image, None, image]
    counted = []
    found = model.embed(texts=texts, images=images, progress=counted.append)
    assert sum(counted) == 3
    text, other = model.embed(texts=["a cat", "a dog"])
    alone = model.embed(images=[image])[0]
    both = (text + alone) / np.linalg.norm(text + alone)
    tolerances.assert_near(found, np.stack([both, other, alone]), tolerances.EMBEDDING)
    assert np.abs(text - alone).max() > 0.01
    with pytest.raises(UserError, match="fusion 'mean'; choose one of together, sum"):
        model.embed(texts=texts, images=images, fusion="mean")
    with pytest.raises(UserError, match="3 texts but 1 images"):
        model.embed(texts=texts, images=[image])
    apart = model.embed(texts=texts, images=images, fusion="sum")
    tolerances.assert_near(apart, found, 0)
    plain = embedder.Embedder(
        nnx.merge(model.graphdef, model.params), directory=model.directory, fusion="together"
    )
    together = plain.embed(texts=texts[:1], images=images[:1])
    assert np.abs(together - both).max() > 1e-3


# ---- devices and chunks


def gradient_of_a_step(name, mesh, chunk):
    """Loss, and gradients as the change of one step of plain gradient descent."""
    c = config(name, **{"train.adapters.dropout": 0.0, "model.remat": "none"})
    settings = c.to_dict()
    model, directory = embedder.load_model(
        c.model.path, dtype="float32", mesh=mesh, part="language", quantize=None
    )
    base = embedder.Embedder(model, directory=directory, mesh=mesh, prompt=c.data.prompt)
    data = train_data.open_data(settings, base)
    embedder.attach_adapters(model, settings["train"]["adapters"], seed=0)
    graphdef, state = nnx.split(model)
    flat = flatten(nnx.to_pure_dict(state))
    rng = np.random.default_rng(0)
    for path in sorted(flat):
        if path.endswith("lora_B"):  # zeros give lora_A no gradient
            value = 0.1 * rng.standard_normal(flat[path].shape, np.float32)
            flat[path] = jax.device_put(value, flat[path].sharding)
    trainable, frozen = optim.split_trainable(flat, [optim.ADAPTER_PATTERN])
    before = jax.tree.map(np.asarray, trainable)
    step = steps.make_train_step(
        graphdef,
        steps.make_objective(c.stage, **settings["loss"]),
        optax.sgd(1.0),
        schedule=optax.constant_schedule(1.0),
        seed=0,
        chunk=chunk,
        mesh=mesh,
    )
    batch = next(data.batches(0))
    batch = batch if mesh is None else sharding.shard_batch(batch, mesh)
    state = steps.create_state(trainable, optax.sgd(1.0), mesh=mesh)
    state, metrics = step(state, frozen, batch)
    after = jax.tree.map(np.asarray, state.trainable)
    return float(metrics["loss"]), {path: before[path] - after[path] for path in after}, batch


def test_eight_devices_and_chunks_equal_one():
    loss, grads, batch = gradient_of_a_step("llava16_stage1", None, 0)
    assert sum(g.rows for g in (*batch.query, *batch.target, *batch.negative)) == 24
    assert batch.vectors.shape == (24, 48)
    mesh = sharding.make_mesh(data=2, fsdp=4)
    other, others, _ = gradient_of_a_step("llava16_stage1", mesh, 4)
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    tolerances.assert_gradients_near(others, grads, 1e-5)


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llava16_stage1", {"train.batch_size": 20}, "batch_size=20: stage 1 counts sentences"),
        ("llava16_e5v", {"loss.k": 4}, "loss.k=4: rows of .* bring their own negatives"),
        ("llava16_e5v", {"stage": "align"}, "alignment needs pairs of image and text"),
        ("llava16_stage1", {"train.quantize": "fp4"}, "train.quantize='fp4': choose one of nf4"),
        ("llava16_stage1", {"data.fusion": "mean"}, "data.fusion='mean': choose one of"),
        ("llava16_e5v", {"train.trainable": "('_proj/',)"}, "is quantized and cannot be trained"),
        ("phi35v_stage1", {"mesh.fsdp": 8, "mesh.data": 1}, "_scales .* does not divide over mesh"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(name, changes, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        train.run(config(name, output=tmp_path, **{"train.chunk": 0, **changes}))
    assert "\n" not in str(caught.value)
