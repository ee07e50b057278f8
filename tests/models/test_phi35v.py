"""Phi-3.5-vision against golden files of the published code."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pictures
import pytest
import safetensors.numpy
import tolerances
import torch
from flax import nnx

from unime_jax import models, sharding
from unime_jax.models import hf, phi35v
from unime_jax.models.phi35v import Phi35VConfig
from unime_jax.models.su_rope import SuRope
from unime_jax.types import ImageSpec, Inputs, UserError, flatten

TINY = pictures.GOLDEN / "phi3v_tiny"
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


@pytest.fixture(scope="module")
def results(model, golden, groups):
    """The loss, per group (input vectors, hidden states, embeddings), gradients: one program."""
    graphdef, params = parity.split(model)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params, groups, direction):  # given: XLA would fold pictures that it knows
        model, out = nnx.merge(graphdef, params), []
        for inputs in groups:
            embeds = model.inputs_embeds(inputs)
            hidden = model.language_model(embeds, inputs.lengths)
            out.append((embeds, hidden, model.embed(inputs)))
        vectors = jnp.concatenate([embedding for _, _, embedding in out])
        return (vectors @ direction).mean(), out

    inputs = [group for group, _ in groups]
    (value, out), gradients = jax.jit(loss)(params, inputs, golden["grad.direction"])
    return value, out, gradients


def test_input_vectors_hidden_states_and_embeddings_match(results, golden, groups):
    for (inputs, numbers), (embeds, hidden, embedding) in zip(groups, results[1], strict=True):
        for place, number in enumerate(numbers):
            real = slice(0, inputs.lengths[place])
            norms = np.linalg.norm(embeds[place, real], axis=-1)
            for name, ours, tolerance in (
                ("inputs_embeds_norms", norms, tolerances.MODULE),
                ("last_hidden_state", hidden[place, real], tolerances.HIDDEN),
                ("embedding", embedding[place], tolerances.EMBEDDING),
            ):
                tolerances.assert_near(ours, golden[f"row_{number}.{name}"], tolerance)


def test_loss_and_gradients_match(results, golden):
    value, _, gradients = results
    tolerances.assert_near(value, golden["grad.loss"][0], tolerances.EMBEDDING)
    expected = {
        name.removeprefix("grad."): x for name, x in golden.items() if name.startswith("grad.model")
    }
    assert len(expected) == 7
    actual = dict(hf.exported(gradients, models.rules(CONFIG), np.float32))
    tolerances.assert_gradients_near({name: actual[name] for name in expected}, expected)


def test_padding_and_batch_mates_change_nothing(model, rows, groups):
    """Among them a long row beside short ones: RoPE factors are a row's own."""
    (together, numbers), _ = groups
    vectors = parity.embed(model, together)
    for number in (2, 3):
        alone = parity.embed(model, pictures.pack([rows[number]], size=SIZE))
        tolerances.assert_near(alone[0], vectors[numbers.index(number)], tolerances.EMBEDDING)
    noise = np.random.default_rng(3)
    tiles, tokens = np.array(together.tiles), np.array(together.tokens)
    for place, number in enumerate(numbers):
        ids, _, own, _ = rows[number]
        tiles[place, len(own) :] = noise.integers(0, 256, tiles[place, len(own) :].shape)
        tokens[place, len(ids) :] = noise.integers(0, 256, tokens[place, len(ids) :].shape)
    noisy = Inputs(tokens, together.lengths, together.image_index, tiles, grid=together.grid)
    np.testing.assert_array_equal(parity.embed(model, noisy), vectors)


@pytest.fixture(scope="module")
def single(golden):
    """A row with an image of one tile, in a group with C = 1 and no grid."""
    index = pictures.phi_index((1, 1))
    assert len(index) == 313
    places = np.array([-1, *index, *[-1] * 6])
    row = (np.arange(len(places)) % 256, places, golden["image_1"][None], (1, 1))
    group = pictures.pack([row], size=SIZE)
    return Inputs(group.tokens, group.lengths, group.image_index, group.tiles)


def test_a_single_tile_is_its_own_thumbnail(model, single):
    """The tower runs once; the same row in a wider group, and from features, is the same vector."""
    expected = parity.embed(model, single)
    parts = single.tokens, single.lengths, single.image_index
    wide = Inputs(*parts, np.pad(single.tiles, [(0, 0), (0, 1)] + [(0, 0)] * 3), grid=ONE)
    tolerances.assert_near(parity.embed(model, wide), expected, tolerances.EMBEDDING)
    graphdef, params = parity.split(model)
    run = jax.jit(lambda params, tiles: nnx.merge(graphdef, params).featurise(tiles))
    features = np.asarray(run(params, single.tiles[0]))
    assert features.shape == (1, 144, 128)
    given = Inputs(*parts, np.zeros((1, 1, 0, 0, 3), np.uint8), features=features[None])
    tolerances.assert_near(parity.embed(model, given), expected, tolerances.EMBEDDING)


ONE = np.ones((1, 2), np.int32)
GRIDS = [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (2, 3), (3, 2), (4, 4), (1, 16), (16, 1)]


def test_thumbnails_match_pytorchs_bicubic():
    """All grids at once, in one program, with padded tiles full of noise."""
    size, tiles = 12, 16
    noise = np.random.default_rng(0).integers(0, 256, (len(GRIDS), tiles, size, size, 3))
    noise = noise.astype(np.uint8)
    ours = jax.jit(phi35v.thumbnail)(noise, np.array(GRIDS))
    for (h, w), row, small in zip(GRIDS, noise, ours, strict=True):
        image = row[: h * w].reshape(h, w, size, size, 3).swapaxes(1, 2)
        image = torch.tensor(image.reshape(h * size, w * size, 3)).permute(2, 0, 1)[None]
        expected = torch.nn.functional.interpolate(
            image.double(), size=(size, size), mode="bicubic", align_corners=False
        )
        expected = expected[0].permute(1, 2, 0)
        np.testing.assert_allclose(small, expected, rtol=0, atol=1e-4, err_msg=f"{h} x {w}")


def test_su_rope_follows_each_rows_own_length():
    rope = SuRope.from_hf(CONFIG, 16)
    lengths = jnp.array([512, 513, 4])
    cos, sin = rope.tables(600, lengths)
    assert cos.shape == (3, 600, 1, 8)
    magnitude = np.sqrt(1 + np.log(4096 / 512) / np.log(512))
    short, long = (np.array(CONFIG["rope_scaling"][f"{name}_factor"]) for name in ("short", "long"))
    for row, factor in enumerate((short, long, short)):
        angle = np.arange(600)[:, None] / (factor * 1e4 ** (np.arange(8) / 8))
        tolerances.assert_near(cos[row, :, 0], np.cos(angle) * magnitude, 1e-4)
        tolerances.assert_near(sin[row, :, 0], np.sin(angle) * magnitude, 1e-4)
    plain = SuRope.from_hf({**CONFIG, "max_position_embeddings": 512}, 16)
    assert plain.magnitude == 1.0 and rope.magnitude == pytest.approx(magnitude)


def test_round_trip_is_bit_identical(model, tmp_path):
    models.save(tmp_path, parity.split(model)[1], CONFIG)
    expected = safetensors.numpy.load_file(TINY / "model.safetensors")
    written = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert set(written) == set(expected)
    for name, value in expected.items():
        assert written[name].dtype == value.dtype
        np.testing.assert_array_equal(written[name], value, err_msg=name)


WTE = "model.vision_embed_tokens.wte.weight"


def test_old_buffers_and_a_missing_copy_of_the_embedding_are_fine(model, tmp_path):
    content = safetensors.numpy.load_file(TINY / "model.safetensors")
    tower = "model.vision_embed_tokens.img_processor.vision_model."
    content[f"{tower}embeddings.position_ids"] = np.arange(577)[None]
    content["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    del content[WTE]
    safetensors.numpy.save_file(content, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    loaded = flatten(parity.split(models.load(tmp_path))[1])
    for path, value in flatten(parity.split(model)[1]).items():
        np.testing.assert_array_equal(loaded[path], value, err_msg=path)
    content["model.embed_tokens.weight"][0, 0] = np.nan
    content[WTE] = content["model.embed_tokens.weight"]
    safetensors.numpy.save_file(content, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="NaN or infinite values in 1 tensors: model.embed"):
        models.load(tmp_path)
    content[WTE] = content["model.embed_tokens.weight"] + 1
    safetensors.numpy.save_file(content, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="wte.weight differs from model.embed_tokens.weight"):
        models.load(tmp_path)


def published() -> dict:
    """config.json as published: true sizes, no vision_config."""
    config = {k: v for k, v in CONFIG.items() if k != "vision_config"}
    factors = {f"{name}_factor": [1.0] * 48 for name in ("short", "long")}
    return {
        **config,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "su", **factors},
        "img_processor": {**config["img_processor"], "image_dim_out": 1024},
    }


def test_every_key_of_the_published_files():
    expected = json.loads((pictures.GOLDEN / "phi35v_keys.json").read_text())
    assert len(expected) == 593
    pictures.assert_keys_are(published(), expected)
    model = nnx.eval_shape(lambda: models.build(published(), rngs=nnx.Rngs(0)))
    assert model.image_spec == ImageSpec("phi_hd", 336, 144, crops=16)
    assert model.embedding_width == 3072
    sizes = [x.size for x in flatten(nnx.to_pure_dict(nnx.state(model))).values()]
    assert sum(sizes) == 4_146_621_440


def nested(name: str, **changes) -> dict:
    return {name: {**CONFIG[name], **changes}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (nested("embd_layer", hd_transform_order="glb_sub"), "hd_transform_order = 'glb_sub'"),
        (nested("embd_layer", use_hd_transform=False), "use_hd_transform = False"),
        (nested("embd_layer", with_learnable_separator=False), "with_learnable_separator = False"),
        (nested("embd_layer", projection_cls="linear"), "projection_cls = 'linear'"),
        ({"embd_layer": None}, "lacks embd_layer"),
        (nested("img_processor", layer_idx=-1), "layer_idx = -1"),
        (nested("img_processor", type_feature="cls_patch"), "type_feature = 'cls_patch'"),
        (nested("img_processor", image_dim_out=64), "image_dim_out = 64"),
        ({"vision_config": None, **nested("img_processor", model_name="x/y")}, "'x/y' is unknown"),
        (nested("vision_config", hidden_act="gelu"), "vision_config.hidden_act = 'gelu'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (nested("rope_scaling", type="yarn"), "rope_scaling.type = 'yarn'"),
        (nested("rope_scaling", factor=2.0), "unknown keys factor"),
        (nested("rope_scaling", long_factor=[1.0] * 7), "long_factor must hold 8 positive numbers"),
        ({"original_max_position_embeddings": None}, "original_max_position_embeddings = None"),
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
        ({"rope_scaling": "su"}, "rope_scaling = 'su' must be an object"),
        ({"rope_theta": "10000"}, "rope_theta = '10000' must be a positive number"),
        ({"rope_parameters": {"rope_theta": 500.0}}, "rope_parameters"),
        ({"vision_config": "clip"}, "vision_config = 'clip' must be an object"),
        (nested("vision_config", patch_size=0), "vision_config.patch_size = 0 must be a positive"),
        (
            nested("vision_config", num_attention_heads=5),
            "hidden_size 32 one of num_attention_heads 5",
        ),
    ],
)
def test_configs_that_would_compute_something_else_are_refused(changes, words):
    config = {k: v for k, v in {**CONFIG, **changes}.items() if v is not None}
    with pytest.raises(UserError, match=words):
        Phi35VConfig.from_hf(config)


def test_fewer_key_value_heads_are_followed_and_a_sliding_window_in_use_is_refused():
    config = {**CONFIG, "num_key_value_heads": 2, "sliding_window": 9}
    model = parity.build(config)
    qkv = parity.split(model)[1]["language_model"]["model"]["layers"]["self_attn"]["qkv_proj"]
    assert qkv["kernel"].shape == (2, 64, 64 + 2 * 32)
    assert np.isfinite(parity.embed(model, parity.text_inputs((9,)))).all()
    with pytest.raises(UserError, match="10 tokens exceed the model's sliding_window of 9"):
        model.embed(parity.text_inputs((10,)))


def test_bf16_is_near_f32(model, single, groups):
    """Computed in bf16 and in f32 from the same bf16 weights."""
    half = models.load(TINY, dtype="bfloat16")
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), parity.split(half)[1])
    exact = nnx.merge(parity.split(model)[0], wide)
    for inputs in (single, groups[1][0]):
        ours, expected = parity.embed(half, inputs), parity.embed(exact, inputs)
        assert ours.dtype == np.float32
        assert np.linalg.norm(ours - expected, axis=-1).max() < 1e-2


def test_eight_devices_compute_what_one_does(golden, rows):
    """Parameters sharded over fsdp, rows over the devices."""
    mesh = sharding.make_mesh(fsdp=8)
    inputs = pictures.pack([rows[3]] * 8, size=SIZE)
    model = models.load(TINY, sharding_of=sharding.sharding_of(mesh))
    flat = flatten(parity.split(model)[1])
    for path in (
        "vision_tower/encoder/layers/mlp/fc1/kernel",
        "vision_tower/encoder/layers/self_attn/out_proj/kernel",
        "multi_modal_projector/linear_1/kernel",
        "language_model/model/layers/self_attn/qkv_proj/kernel",
    ):
        assert flat[path].addressable_shards[0].data.size == flat[path].size // 8, path
    ours = parity.embed(model, sharding.shard_batch(inputs, mesh))
    expected = np.tile(golden["row_3.embedding"], (8, 1))
    tolerances.assert_near(ours, expected, tolerances.EMBEDDING)
