"""Phi-3.5-V and LLaVA-1.6 through `load`, with images of any mixture of sizes."""

import json
import pathlib
import shutil

import jax
import miniature
import numpy as np
import pytest
import tolerances
from PIL import Image
from safetensors.numpy import load_file

import unime_jax
from unime_jax import config, embedder, train_data
from unime_jax.data import prompts
from unime_jax.types import UserError

GOLDEN = pathlib.Path(__file__).parent / "golden" / "phi3v_tiny"
BATCH = 1e-5  # a row alone and among others
IMAGE_TOKEN = 500
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 32,
}
LLAVA = {
    "model_type": "llava_next",
    "image_token_index": IMAGE_TOKEN,
    "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
    "text_config": {**miniature.STUDENT["text_config"], "model_type": "mistral"}
    | {"tie_word_embeddings": False, "max_position_embeddings": 512, "sliding_window": None},
    "vision_config": VISION,
    "tie_word_embeddings": False,
}  # fmt: skip


def picture(width, height):
    rng = np.random.default_rng((width, height))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


ROWS = [
    ("a red cat", None),
    (None, picture(50, 49)),
    ("what?", picture(300, 30)),
    (None, picture(30, 66)),
    ("a blue dog", None),
    (None, picture(77, 76)),
]


@pytest.fixture(scope="module", params=["phi", "llava"])
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / request.param
    described = LLAVA
    if request.param == "phi":
        described = json.loads((GOLDEN / "config.json").read_text())
        described |= {"vision_config": VISION, "vocab_size": 512}
    miniature.write_model(directory, described, seed=3)
    if request.param == "phi":
        settings = json.loads((GOLDEN / "preprocessor_config.json").read_text())
        settings["num_img_tokens"] = 4
        (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    return unime_jax.load(directory, dtype="float32")


@pytest.fixture(scope="module")
def together(model):
    """Embeddings of all rows in one call."""
    texts, images = zip(*ROWS, strict=True)
    return model.embed(texts=texts, images=images)


def test_rows_alone_are_rows_among_others(model, together):
    assert together.shape == (6, model.params["language_model"]["model"]["norm"]["scale"].size)
    for row in (1, 2):
        text, image = ROWS[row]
        alone = model.embed(texts=[text], images=[image])[0]
        tolerances.assert_near(together[row], alone, BATCH)
    distance = np.linalg.norm(together[:, None] - together[None], axis=-1)
    assert distance[~np.eye(6, dtype=bool)].min() > 1e-3


def test_the_function_takes_what_preprocess_makes(model, together):
    texts, images = zip(*ROWS, strict=True)
    inputs = model.preprocess(texts=texts, images=images)
    assert len({group.tiles.shape[1] for group in inputs}) >= 3
    assert len({group.tokens.shape[1] for group in inputs}) > 1
    if "llava" in str(model.directory):
        return  # one compile is enough
    apply, params = model.function()
    inputs = model.preprocess(images=[ROWS[1][1], ROWS[3][1]])
    assert [group.index.tolist() for group in inputs] == [[1], [0]]
    tolerances.assert_near(jax.jit(apply)(params, inputs), together[[1, 3]], BATCH)


def test_token_rows_padded_on_either_side(model, together):
    slot = model.image_token_id
    assert slot == (-1 if "phi" in str(model.directory) else IMAGE_TOKEN)
    rows = []
    for text, image in ROWS:
        row = model.preprocessor.tokenize(text, image is not None)
        rows.append([slot if id == -1 else id for id in row.ids])
    images = [image for _, image in ROWS]
    tolerances.assert_near(model.embed_tokens(rows, images), together, BATCH)
    width = max(map(len, rows)) + 3
    for side in ("left", "right"):
        ids = np.full((len(rows), width), 7)
        mask = np.zeros((len(rows), width), int)
        for i, row in enumerate(rows):
            place = slice(width - len(row), None) if side == "left" else slice(len(row))
            ids[i, place], mask[i, place] = row, 1
        found = model.embed_tokens(ids, images, attention_mask=mask)
        tolerances.assert_near(found, together, BATCH)
    mask[1, 1] = 0
    with pytest.raises(UserError, match="row 1: attention_mask has a gap"):
        model.embed_tokens(ids, images, attention_mask=mask)
    with pytest.raises(UserError, match="attention_mask has shape"):
        model.embed_tokens(ids, images, attention_mask=mask[:, 1:])
    with pytest.raises(UserError, match="attention_mask: it and token_rows have one length"):
        model.embed_tokens([[1, 2], [3]], attention_mask=mask)


def test_bad_token_rows_are_named(model):
    slot, image = model.image_token_id, picture(9, 9)
    for rows, images, message in (
        ([[1], [slot, slot, 5]], [None, image], f"row 1: .* one {slot} stands for the whole image"),
        ([[1, 5]], [image], "row 0: 2 tokens with 0 image slots"),
        ([[1, slot]], None, "row 0: 2 tokens with 1 image slots"),
        ([[1, 512]], None, "row 0: token id 512 is not one of the model's 512"),
        ([[1, -7]], None, "row 0: token id -7"),
        ([[]], None, "row 0: 0 tokens"),
        ([[1]], [None, None], "1 token rows but 2 images"),
    ):
        with pytest.raises(UserError, match=message):
            model.embed_tokens(rows, images)


def test_no_image_position_is_ever_cut(model):
    limit = model.preprocessor.max_tokens
    assert limit == (4096 if "phi" in str(model.directory) else 512)
    (group,) = model.preprocess(texts=["x" * 5000], images=[picture(70, 60)])
    assert group.lengths[0] == group.tokens.shape[1] == limit
    whole = model.preprocessor.layout(70, 60).index
    np.testing.assert_array_equal(group.image_index[group.image_index >= 0], whole)
    message = f"row 0: a row of .*, {len(whole)} of them its image's, does not fit into {limit}"
    with pytest.raises(UserError, match=message):  # an instruction is not cut either
        model.preprocess(images=[picture(70, 60)], instruction="y" * limit)


def test_a_damaged_image_is_named(model, tmp_path):
    picture(40, 40).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="row 1: .*cut.png: not a readable image"):
        model.embed(images=[picture(40, 40), tmp_path / "cut.png"])


def test_every_image_at_one_size(model):
    phi = "phi" in str(model.directory)
    fixed = embedder.Embedder(
        embedder.load_model(model.directory, dtype="float32")[0],
        directory=model.directory,
        prompt="mmeb",
        image_size=56,
        image_crops=int(phi),
    )
    images = [image for _, image in ROWS if image]
    texts = [prompts.slotted("<|image_1|>\nIs it?")] * len(images)
    (group,) = fixed.preprocess(texts=texts, images=images)
    assert group.tiles.shape[1] == (1 if phi else 3)
    assert len(set(group.lengths.tolist())) == 1
    assert (group.image_index[:, 0] >= 0).all()  # the text alone says where the image stands
    (plain,) = fixed.preprocess(texts=["Is it?"] * len(images), images=images)
    np.testing.assert_array_equal(plain.tokens, group.tokens)  # a plain text stands behind it


def test_features_of_tiles_are_not_cached(model, tmp_path):
    settings = config.base_config().to_dict()
    settings["data"] |= {"features": str(tmp_path / "features"), "image_size": 56}
    settings["data"]["path"] = str(miniature.write_pairs(tmp_path / "pairs"))
    with pytest.raises(UserError, match="config.data.features: .* leave it empty"):
        train_data.open_data(settings, model)


def test_golden_rows_in_one_call(tmp_path):
    """Tokens and pictures in, the published code's embeddings out; no tokenizer files."""
    shutil.copytree(GOLDEN, tmp_path / "phi")
    model = unime_jax.load(tmp_path / "phi", dtype="float32")
    golden = load_file(GOLDEN / "golden.safetensors")
    rows, images, expected = [], [], []
    for number in (2, 3, 6):
        ids = golden[f"row_{number}.input_ids"]
        repeated = (ids == -1) & (np.roll(ids, 1) == -1)
        rows.append(ids[~repeated])
        image = int(golden[f"row_{number}.image"][0])
        images.append(None if image < 0 else Image.fromarray(golden[f"image_{image}"]))
        expected.append(golden[f"row_{number}.embedding"])
    found = model.embed_tokens(rows, images)
    tolerances.assert_near(found, np.stack(expected), tolerances.EMBEDDING)
    with pytest.raises(UserError, match="holds no tokenizer.json"):
        model.embed(texts=["a"])
