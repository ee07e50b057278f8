"""The embedder: order, batch-mates, the pure function, faults."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import miniature
import numpy as np
import pytest
from PIL import Image

import unime_jax
from unime_jax import embedder as embedder_lib
from unime_jax import sharding
from unime_jax.runner import Runner
from unime_jax.types import UserError, flatten

HALF = 2e-3  # cosine distance of a row's vectors in bfloat16
TEXTS = ["a red cat", "dog", "a much longer sentence about a green fox and a blue owl", "cat " * 40]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return miniature.write_all(tmp_path_factory.mktemp("miniature"))


@pytest.fixture(scope="module")
def embedder(root):
    return unime_jax.load(root / "student", dtype="float32")


def test_rows_come_back_in_order_whatever_stands_beside_them(embedder):
    image = Image.new("RGB", (30, 20), "red")
    together = embedder.embed(texts=[*TEXTS, None, "with"], images=[None] * 4 + [image, image])
    assert together.shape == (6, 32) and together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)
    for row, text in enumerate(TEXTS):
        alone = embedder.embed(texts=[text])[0]
        np.testing.assert_allclose(together[row], alone, atol=1e-5)
    np.testing.assert_allclose(together[4], embedder.embed(images=[image])[0], atol=1e-5)
    assert np.abs(together[4] - together[5]).max() > 1e-4


def test_threads_may_embed_at_once(embedder):
    calls = [[f"{'word ' * (n % 9)}{n}" for n in range(start, start + 5)] for start in range(12)]
    wanted = [embedder.embed(texts=texts) for texts in calls]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda texts: embedder.embed(texts=texts), calls * 3))
    np.testing.assert_allclose(found, wanted * 3, atol=1e-5)


def test_the_function_is_pure_and_differentiable(embedder):
    apply, params = embedder.function()
    inputs = embedder.preprocess(texts=TEXTS)
    vectors = jax.jit(apply)(params, inputs)
    np.testing.assert_allclose(vectors, embedder.embed(texts=TEXTS), atol=1e-5)
    gradient = jax.jit(jax.grad(lambda p, x: jnp.sum(apply(p, x)[:, 0])))
    grads = gradient(params, inputs[:1])
    norms = [jnp.abs(x).max() for x in jax.tree.leaves(grads["language_model"])]
    assert max(norms) > 0 and all(np.isfinite(norms))


def test_parameters_that_are_set_are_those_that_embed(embedder):
    inputs, texts = embedder.params, ["a red cat", "two dogs"]
    tiles = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    before = embedder.embed(texts=texts), embedder.featurise(tiles)
    try:
        embedder.params = jax.tree.map(lambda x: x * 1.1, inputs)
        after = embedder.embed(texts=texts), embedder.featurise(tiles)
    finally:
        embedder.params = inputs
    assert all(np.abs(x - y).max() > 1e-3 for x, y in zip(before, after, strict=True))


def test_groups_for_programs_of_others_depend_on_their_rows_alone(embedder):
    """`embed` takes what it has compiled, here a program for either row; `preprocess` does not."""
    texts = ["a", "b" * 30]
    for text in texts:
        embedder.embed(texts=[text])
    (group,) = embedder.preprocess(texts=texts)
    assert group.rows == 2


def test_programs_are_dearer_for_smaller_models(root, embedder):
    """A job of a small model takes few shapes; padding a large one costs more than a program."""
    small, large = (Runner(embedder.graphdef, size=size).limits for size in (10**5, 10**9))
    assert small.program == pytest.approx(10**4 * large.program, rel=0.01) and large.program >= 1
    size = sum(leaf.size for leaf in flatten(embedder.params).values())
    assert embedder.preprocessor.limits == Runner(embedder.graphdef, size=size).limits
    groups = embedder.preprocess(texts=["a" * count for count in range(1, 200, 3)])
    assert len({(group.rows, group.tokens.shape[1]) for group in groups}) <= 4


def test_token_rows(embedder):
    row = embedder.preprocessor.tokenize("a red cat", False)
    np.testing.assert_allclose(
        embedder.embed_tokens([list(row.ids)]), embedder.embed(texts=["a red cat"]), atol=1e-6
    )
    image = Image.new("RGB", (30, 20), "blue")
    row = embedder.preprocessor.tokenize(None, True)
    assert list(row.ids).count(embedder.image_token_id) == 1
    np.testing.assert_allclose(
        embedder.embed_tokens([list(row.ids)], [image]), embedder.embed(images=[image]), atol=1e-6
    )


def test_parameters_and_rows_spread_over_a_mesh(root, embedder):
    mesh = jax.make_mesh((2, 2, 2), sharding.AXES)  # as JAX makes it
    spread = embedder_lib.load(root / "student", dtype="float32", mesh=mesh)
    kernel = spread.params["language_model"]["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert len(kernel.addressable_shards) == 8 and not kernel.sharding.is_fully_replicated
    np.testing.assert_allclose(spread.embed(texts=TEXTS), embedder.embed(texts=TEXTS), atol=1e-5)


def test_a_mesh_of_other_axes_is_refused(root):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    with pytest.raises(UserError, match=r"mesh has axes \('x',\); make it with sharding.make_mesh"):
        embedder_lib.load(root / "student", mesh=mesh)


def test_bfloat16_is_close(root, embedder):
    """To float32, alone and among others, on one device and on eight."""
    image = Image.new("RGB", (30, 20), "red")
    rows = {"texts": [*TEXTS, None, "with"], "images": [*[None] * 4, image, image]}
    half = unime_jax.load(root / "student")
    assert half.params["language_model"]["model"]["norm"]["scale"].dtype == jnp.bfloat16
    together = half.embed(**rows)
    pairs = zip(rows["texts"], rows["images"], strict=True)
    alone = np.concatenate([half.embed(texts=[text], images=[image]) for text, image in pairs])
    mesh = sharding.make_mesh(data=8)
    spread = embedder_lib.load(root / "student", mesh=mesh).embed(**rows)
    for other in (embedder.embed(**rows), alone, spread):
        assert (1 - (together * other).sum(1)).max() < HALF


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({}, "texts, images or both"),
        ({"texts": ["a"], "images": [None, None]}, "1 texts but 2 images"),
        ({"texts": ["a", None], "images": [None, None]}, "row 1"),
        ({"texts": ["a", " "]}, "row 1"),
        ({"texts": "a cat"}, "texts is one str; give a list"),
        ({"images": b"x"}, "images is one bytes; give a list"),
        ({"texts": "a", "images": [b"x"], "fusion": "sum"}, "texts is one str; give a list"),
        ({"images": ["/no/such.png"]}, "/no/such.png"),
        ({"images": [b"not an image"]}, "row 0"),
    ],
)
def test_bad_rows_are_named(embedder, arguments, named):
    with pytest.raises(UserError, match=named):
        embedder.embed(**arguments)


def test_texts_that_are_no_strings_are_named(embedder):
    # Below `embed`, whose annotations are checked here and not where it is used.
    with pytest.raises(UserError, match="row 1: a text is a string, not int"):
        embedder._bucket(["a", 5], None, None)


@pytest.mark.parametrize("fusion", embedder_lib.FUSIONS)
def test_rows_may_come_from_generators(embedder, fusion):
    expected = embedder.embed(["a red cat"])
    for images in (None, iter([None])):
        found = embedder.embed(iter(["a red cat"]), images, fusion=fusion)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_no_rows_are_an_array_of_no_rows(embedder):
    assert embedder.embed(texts=[]).shape == (0, embedder.embed(texts=["a"]).shape[1])


def test_bad_dtypes_are_named(root):
    with pytest.raises(UserError, match="dtype bf16 is not built; give one of bfloat16, float32"):
        unime_jax.load(root / "student", dtype="bf16")


def test_bad_directories_are_named(tmp_path):
    with pytest.raises(UserError, match="absent"):
        unime_jax.load(tmp_path / "absent")
    with pytest.raises(UserError, match="config.json"):
        unime_jax.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match=f"{tmp_path}: config.json: .*gpt2"):
        unime_jax.load(tmp_path)
