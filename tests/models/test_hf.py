"""Reading and writing checkpoint directories: completeness, shards, dtypes, damage."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import safetensors.numpy
from flax import nnx

from unime_jax import models
from unime_jax.models import hf, hf_read, hf_write
from unime_jax.models.hf import KeyMap, Rule
from unime_jax.types import UserError, flatten

MAP = KeyMap(
    (
        Rule("layer.{L}.weight", "layers/kernel", "linear"),
        Rule("head.weight", "head/kernel", "linear"),
        Rule("conv.weight", "conv/kernel", "conv"),
        Rule("norm.weight", "norm/scale"),
    ),
    ignored=(r"old\..*",),
    renamed=((r"^wrapped\.", ""),),
)
CONFIG = {"model_type": "toy"}


def toy_params():
    rng = np.random.default_rng(0)
    shapes = {"layers": (3, 4, 6), "head": (4, 5), "conv": (3, 3, 1, 7)}
    params = {
        name: {"kernel": rng.standard_normal(shape).astype(np.float32)}
        for name, shape in shapes.items()
    }
    return {**params, "norm": {"scale": rng.standard_normal(4).astype(np.float32)}}


def abstract(params, dtype=jnp.float32, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding), params)


def tensors(directory):
    return safetensors.numpy.load_file(directory / "model.safetensors")


@pytest.fixture
def directory(tmp_path):
    hf_write.save(tmp_path, toy_params(), MAP, CONFIG)
    return tmp_path


def rewrite(directory, change):
    """Changes the tensors of a checkpoint."""
    content = tensors(directory)
    change(content)
    safetensors.numpy.save_file(content, directory / "model.safetensors")


def assert_equal(actual, expected):
    actual, expected = flatten(actual), flatten(expected)
    assert set(actual) == set(expected)
    for path, value in expected.items():
        np.testing.assert_array_equal(actual[path], value, err_msg=path)


def test_files_hold_pytorchs_layout(directory):
    content, params = tensors(directory), toy_params()
    assert content["layer.1.weight"].shape == (6, 4)
    np.testing.assert_array_equal(content["layer.1.weight"], params["layers"]["kernel"][1].T)
    np.testing.assert_array_equal(
        content["conv.weight"], params["conv"]["kernel"].transpose(3, 2, 0, 1)
    )
    assert json.loads((directory / "config.json").read_text())["model_type"] == "toy"


def test_round_trip(directory):
    assert_equal(hf_read.load(directory, MAP, abstract(toy_params())), toy_params())


def test_round_trip_over_several_files(tmp_path):
    hf_write.save(tmp_path, toy_params(), MAP, CONFIG, shard_bytes=150)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0].startswith("model-00001-of-0000")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    total = sum(x.nbytes for x in jax.tree.leaves(toy_params()))
    assert index["metadata"]["total_size"] == total
    assert_equal(hf_read.load(tmp_path, MAP, abstract(toy_params())), toy_params())


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_values_are_converted_to_the_wanted_dtype(tmp_path, stored):
    hf_write.save(tmp_path, toy_params(), MAP, CONFIG, stored)
    assert tensors(tmp_path)["norm.weight"].dtype == jnp.dtype(stored)
    loaded = hf_read.load(tmp_path, MAP, abstract(toy_params(), jnp.bfloat16))
    expected = jax.tree.map(
        lambda x: x.astype(jnp.dtype(stored)).astype(jnp.bfloat16), toy_params()
    )
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype("bfloat16")}
    assert_equal(loaded, expected)


def test_parameters_land_on_their_shardings(directory):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    spec = jax.sharding.PartitionSpec

    def place(path, x):
        axes = {"layers/kernel": spec(None, "x"), "conv/kernel": spec()}.get(path, spec("x"))
        return jax.ShapeDtypeStruct(
            x.shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, axes)
        )

    placed = hf.unflatten({p: place(p, x) for p, x in flatten(toy_params()).items()})
    loaded = hf_read.load(directory, MAP, placed)
    assert_equal(loaded, toy_params())
    kernel = loaded["layers"]["kernel"]
    assert kernel.sharding.spec == spec(None, "x")
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 2, 6)}


def test_ignored_and_renamed_keys(directory):
    def change(content):
        content["old.counter"] = np.zeros(3, np.int64)
        content["wrapped.norm.weight"] = content.pop("norm.weight")

    rewrite(directory, change)
    assert_equal(hf_read.load(directory, MAP, abstract(toy_params())), toy_params())


def test_all_problems_are_told_at_once(directory):
    def change(content):
        del content["layer.2.weight"]
        content["layer.3.weight"] = np.zeros((6, 4), np.float32)
        content["norm.weight"] = np.zeros(9, np.float32)
        content["head.weight"] = np.zeros((5, 4), np.int8)

    rewrite(directory, change)
    with pytest.raises(UserError) as error:
        hf_read.load(directory, MAP, abstract(toy_params()))
    message = str(error.value)
    assert "\n" not in message and str(directory) in message
    assert "1 missing: layer.2.weight" in message
    assert "1 unknown: layer.3.weight" in message
    assert "norm.weight is (9,) instead of (4,)" in message
    assert "head.weight is stored as I8" in message


def test_long_lists_of_problems_are_cut(directory):
    rewrite(directory, lambda content: content.update({f"x{n}": np.zeros(1) for n in range(30)}))
    with pytest.raises(UserError, match="30 unknown: x0, .* and 22 more$"):
        hf_read.load(directory, MAP, abstract(toy_params()))


def test_a_key_under_two_names_is_refused(directory):
    rewrite(
        directory, lambda content: content.update({"wrapped.norm.weight": content["norm.weight"]})
    )
    with pytest.raises(UserError, match="are both norm.weight"):
        hf_read.load(directory, MAP, abstract(toy_params()))


def test_a_table_that_does_not_fit_the_model_is_our_bug(directory):
    params = {**toy_params(), "extra": {"kernel": np.zeros(2)}}
    with pytest.raises(ValueError, match="extra/kernel"):
        hf_read.load(directory, MAP, abstract(params))


@pytest.mark.parametrize("damage", [lambda raw: raw[:-10], lambda raw: b"\xff" * 9 + raw[9:]])
def test_damaged_files_are_named(directory, damage):
    path = directory / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"model\.safetensors is corrupt or cut short"):
        hf_read.load(directory, MAP, abstract(toy_params()))


def sharded(tmp_path):
    """A checkpoint of several files, and their paths."""
    hf_write.save(tmp_path, toy_params(), MAP, CONFIG, shard_bytes=150)
    return sorted(tmp_path.glob("*.safetensors"))


def test_all_damaged_and_incomplete_files_are_named_at_once(tmp_path):
    first, second, *_, last = sharded(tmp_path)
    last.unlink()
    first.write_bytes(first.read_bytes()[:-1])
    safetensors.numpy.save_file({"other": np.zeros(1, np.float32)}, second)
    with pytest.raises(UserError) as error:
        hf_read.load(tmp_path, MAP, abstract(toy_params()))
    message = str(error.value)
    assert f"{first.name} is corrupt or cut short" in message
    assert f"lacks {last.name}, which model.safetensors.index.json names" in message
    assert f"{second.name} lacks what model.safetensors.index.json names: 1 keys: " in message


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -np.nan])
def test_values_that_are_no_numbers_are_warned_of(tmp_path, value, stored):
    params = toy_params()
    params["layers"]["kernel"][1, 2, 3] = value
    params["norm"]["scale"][0] = -60000.0  # large, and fine
    hf_write.save(tmp_path, params, MAP, CONFIG, stored)
    with pytest.warns(UserWarning, match="NaN or infinite values in 1 tensors: layer.1.weight$"):
        loaded = hf_read.load(tmp_path, MAP, abstract(toy_params()))
    assert not np.isfinite(loaded["layers"]["kernel"][1, 2, 3])


def test_arrays_are_filled_in_place_and_files_are_closed(tmp_path, monkeypatch):
    """No second copy of a parameter: XLA takes over the buffer that was read into."""
    made = []
    empty = hf.aligned_empty
    monkeypatch.setattr(hf, "aligned_empty", lambda *a: made.append(empty(*a)) or made[-1])
    monkeypatch.setattr(hf_read, "_MAPPED_BYTES", 0)
    sharded(tmp_path)
    loaded = hf_read.load(tmp_path, MAP, abstract(toy_params()))
    own = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(loaded)}
    assert own == {array.ctypes.data for array in made}
    assert not any(leaf.committed for leaf in jax.tree.leaves(loaded))
    assert_equal(loaded, toy_params())


def test_missing_files_are_named(directory, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    (empty / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        UserError, match="neither model.safetensors.*pytorch_model.bin .* convert it"
    ):
        hf_read.load(empty, MAP, abstract(toy_params()))
    with pytest.raises(UserError, match="config.json is missing"):
        hf.read_config(empty)
    (directory / "model.safetensors").rename(directory / "moved")
    index = {"weight_map": {"norm.weight": "model-1.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="lacks model-1.safetensors, which"):
        hf_read.load(directory, MAP, abstract(toy_params()))
    index["weight_map"]["bias"] = 1
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="weight_map names no files for 1 keys: bias"):
        hf_read.load(directory, MAP, abstract(toy_params()))


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "cannot be read as JSON"), ("[]", "no JSON object"), ("{}", "has no model_type")],
)
def test_bad_configs_are_refused(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=words):
        hf.read_config(tmp_path)


def test_adapters_are_not_exported_by_mistake(tmp_path):
    params = {**toy_params(), "head": {"kernel": np.ones((4, 5)), "lora_A": np.ones((4, 2))}}
    with pytest.raises(UserError, match="merge adapters first: head/lora_A"):
        hf_write.save(tmp_path, params, MAP, CONFIG)


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/below cannot be written"):
        hf_write.save(tmp_path / "file" / "below", toy_params(), MAP, CONFIG)


def test_a_torn_write_leaves_no_weights(tmp_path):
    params = toy_params()
    params["norm"] = {"scale": None}
    with pytest.raises(Exception):  # noqa: B017
        hf_write.save(tmp_path, params, MAP, CONFIG, shard_bytes=100)
    assert not (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    "config",
    [
        parity.TEXT,
        {**parity.TEXT, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
        {**parity.TEXT, "model_type": "phi3"},
        {**parity.TEXT, "model_type": "mistral", "head_dim": 12},
        parity.SMOL,
        {**parity.SMOL, "projector": {"hidden": 8, "norm": False}},
    ],
    ids=["llama", "llama-untied-bias", "phi3", "mistral", "smol", "smol-no-norm"],
)
def test_every_model_round_trips(config, tmp_path):
    _, params = parity.split(parity.build(config))
    models.save(tmp_path, params, config)
    _, again = parity.split(models.load(tmp_path))
    assert_equal(again, params)


def test_sharding_of_reaches_every_parameter(tmp_path):
    _, params = parity.split(parity.build(parity.TEXT))
    models.save(tmp_path, params, parity.TEXT)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    asked = {}

    def sharding_of(path, shape):
        asked[path] = shape
        spec = jax.sharding.PartitionSpec(*[None] * (len(shape) - 1), "x")
        return jax.sharding.NamedSharding(mesh, spec if shape[-1] % 2 == 0 else spec[:0])

    _, loaded = parity.split(models.load(tmp_path, sharding_of=sharding_of))
    assert asked == {path: x.shape for path, x in flatten(params).items()}
    assert_equal(loaded, params)
    assert all(x.sharding.spec[-1] == "x" for x in flatten(loaded).values())


def test_every_class_offers_what_reports_and_callers_ask_for():
    for name, cls in models.CLASSES.items():
        for offer in ("embed", "image_spec", "embedding_width", "pooling", "parse", "key_map"):
            assert hasattr(cls, offer), f"{name} lacks {offer}"


@pytest.mark.parametrize("call", [models.rules, lambda c: models.build(c, rngs=nnx.Rngs(0))])
def test_unknown_model_types_are_refused_with_the_known_ones(call):
    with pytest.raises(UserError, match="'gpt9' is unknown; known: bert, llama, .*unime_smol"):
        call({"model_type": "gpt9"})
