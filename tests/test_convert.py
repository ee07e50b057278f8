"""Weights in and out: bit-identical round trips, runs, adapters, bad input."""

import json
import os
import pathlib
import shutil

import fabricated
import jax
import miniature
import numpy as np
import pytest
import safetensors.numpy
from conversion import assert_identical, run, tensors

import unime_jax
from unime_jax import checkpoint, embedder, sharding, weights
from unime_jax.types import UserError, flatten

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("convert")
    miniature.write_model(root / "student", miniature.STUDENT, seed=0)
    fabricated.write_run(root / "first", root / "student", miniature.STUDENT, seed=1)
    fabricated.write_run(
        root / "second",
        root / "first",
        miniature.STUDENT,
        rank=2,
        targets=r"language_model/.*(q_proj|up_proj)$",
        trainable="^multi_modal_projector/linear_1/",
        seed=2,
    )
    run("import", "--model", root / "student", "--output", root / "ours")
    return root


def parameters(directory, **options):
    return flatten(unime_jax.load(directory, **{"dtype": "float32", **options}).params)


def assert_same(actual, expected, atol=0.0):
    assert set(actual) == set(expected)
    for path, value in expected.items():
        assert actual[path].dtype == value.dtype
        np.testing.assert_allclose(actual[path], value, rtol=0, atol=atol, err_msg=path)


@pytest.fixture(scope="module")
def trained(root):
    """The parameters of the second run."""
    return parameters(root / "second")


def test_in_and_out_again_is_bit_identical(root, tmp_path):
    run("export", "--model", root / "ours", "--output", tmp_path / "out")
    assert_identical(tmp_path / "out", root / "student")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (root / "student" / name).read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "README.md"
    }  # fmt: skip


def test_a_golden_phi_is_bit_identical_with_and_without_its_copy(tmp_path):
    run("import", "--model", GOLDEN / "phi3v_tiny", "--output", tmp_path / "ours")
    run("export", "--model", tmp_path / "ours", "--output", tmp_path / "out")
    assert_identical(tmp_path / "out", GOLDEN / "phi3v_tiny")
    copy = "model.vision_embed_tokens.wte.weight"
    content = tensors(GOLDEN / "phi3v_tiny")
    original = content["model.embed_tokens.weight"]
    content = {k: v for k, v in content.items() if k != copy}
    content |= {} if copy in tensors(GOLDEN / "phi3v_tiny") else {copy: original}
    other = shutil.copytree(GOLDEN / "phi3v_tiny", tmp_path / "other")
    safetensors.numpy.save_file(content, other / "model.safetensors", metadata={"format": "pt"})
    run("import", "--model", other, "--output", tmp_path / "ours2")
    run("export", "--model", tmp_path / "ours2", "--output", tmp_path / "out2")
    assert_identical(tmp_path / "out2", other)
    assert (tmp_path / "out2" / "preprocessor_config.json").is_file()
    # A copy follows its original.
    base = other if copy in tensors(other) else GOLDEN / "phi3v_tiny"
    config = json.loads((base / "config.json").read_text())
    fabricated.write_run(tmp_path / "run", base, config, rank=0, trainable="embed_tokens/")
    run("export", "--model", tmp_path / "run", "--output", tmp_path / "trained")
    trained = tensors(tmp_path / "trained")
    np.testing.assert_array_equal(trained[copy], trained["model.embed_tokens.weight"])
    assert not np.array_equal(trained[copy], original)


def test_mixed_dtypes_and_unused_tensors_survive(root, tmp_path):
    mixed = shutil.copytree(root / "student", tmp_path / "mixed")
    content = tensors(mixed)
    key = "language_model.model.layers.1.mlp.up_proj.weight"
    content[key] = content[key].astype(np.float16)
    norm = "language_model.model.norm.weight"
    content[norm] = content[norm].astype(jax.numpy.bfloat16)
    content["language_model.lm_head.weight"] = content["language_model.model.embed_tokens.weight"]
    counter = "vision_tower._bn0.num_batches_tracked"
    content[counter] = np.array(7, np.int64)
    safetensors.numpy.save_file(content, mixed / "model.safetensors", metadata={"format": "pt"})
    run("import", "--model", mixed, "--output", tmp_path / "ours")
    run("export", "--model", tmp_path / "ours", "--output", tmp_path / "out")
    assert_identical(tmp_path / "out", mixed)


def test_ours_loads_sharded_on_any_mesh_and_in_any_dtype(root):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    spread = parameters(root / "ours", dtype="bfloat16", mesh=mesh)
    assert_same(spread, parameters(root / "student", dtype="bfloat16"))
    kernel = spread["language_model/model/layers/mlp/up_proj/kernel"]
    assert len(kernel.addressable_shards) == 8 and not kernel.sharding.is_fully_replicated


def test_a_chain_of_runs_is_exported_merged(root, trained, tmp_path):
    run("export", "--model", root / "second", "--output", tmp_path / "out")
    assert_same(parameters(tmp_path / "out"), trained)
    before, after = tensors(root / "student"), tensors(tmp_path / "out")
    assert set(before) == set(after)
    moved = {key for key in before if not np.array_equal(before[key], after[key])}
    assert len(moved) == 2 * 7 + 2 and "multi_modal_projector.linear_1.bias" in moved
    key = "language_model.model.layers.1.mlp.gate_proj.weight"  # of the first run alone
    adapter = checkpoint.read_trainable(root / "first")
    a, b = (adapter[f"language_model/model/layers/mlp/gate_proj/lora_{x}"][1] for x in "AB")
    np.testing.assert_allclose(after[key], before[key] + 2 * (a @ b).T, rtol=0, atol=1e-6)


def test_an_exported_run_embeds_as_before(root, tmp_path):
    run("export", "--model", root / "first", "--output", tmp_path / "out")
    base, run_, out = (
        unime_jax.load(path, dtype="float32").embed(texts=["a red cat"])
        for path in (root / "student", root / "first", tmp_path / "out")
    )
    np.testing.assert_allclose(out, run_, rtol=0, atol=1e-6)
    assert np.abs(base - run_).max() > 1e-2


def test_how_rows_were_prepared_goes_with_the_weights(root, tmp_path):
    for command in ("import", "export", "adapters"):
        run(command, "--model", root / "first", "--output", tmp_path / command)
        assert weights.find(tmp_path / command).preparation == {"image_size": 224}
    assert weights.find(root / "first").preparation == {"image_size": 224}
    run("import", "--model", root / "student", "--output", tmp_path / "plain")
    assert not (tmp_path / "plain" / "preparation.json").exists()
    (tmp_path / "export" / "preparation.json").write_text('{"image_sise": 224}')
    with pytest.raises(UserError, match="preparation.json: unknown image_sise"):
        weights.find(tmp_path / "export")


def test_runs_on_top_of_ours(root, trained, tmp_path):
    fabricated.write_run(tmp_path / "first", root / "ours", miniature.STUDENT, seed=1)
    assert_same(parameters(tmp_path / "first"), parameters(root / "first"))
    run("import", "--model", root / "second", "--output", tmp_path / "ours")
    assert_same(parameters(tmp_path / "ours"), trained)
    # What a run of ours is based on, for peft: only what was imported as it was has another name.
    fabricated.write_run(tmp_path / "third", tmp_path / "ours", miniature.STUDENT, seed=3)
    assert weights.find(tmp_path / "first").base_name == str(root / "student")
    assert weights.find(tmp_path / "third").base_name == str(tmp_path / "ours")


def test_a_chain_of_runs_is_one_adapter(root, trained, tmp_path):
    run("adapters", "--model", root / "second", "--output", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(root / "student")
    assert config["modules_to_save"] == ["multi_modal_projector.linear_1"]
    assert_same(parameters(tmp_path / "adapter"), trained, 1e-5)
    assert_same(parameters(root / "ours", adapter=tmp_path / "adapter"), trained, 1e-5)
    run("merge", "--model", root / "student", "--adapter", tmp_path / "adapter",
        "--output", tmp_path / "merged")  # fmt: skip
    assert_same(parameters(tmp_path / "merged"), trained, 1e-5)


def test_the_base_of_an_adapter_is_found_beside_it(root, tmp_path):
    run("adapters", "--model", root / "first", "--output", tmp_path / "adapter",
        "--base", "student")  # fmt: skip
    with pytest.raises(UserError, match="names the base student, which is not there"):
        weights.find(tmp_path / "adapter")
    shutil.copytree(root / "student", tmp_path / "student")
    assert_same(parameters(tmp_path / "adapter"), parameters(root / "first"), 1e-6)


def test_another_dtype_on_request(root, tmp_path):
    run("export", "--model", root / "first", "--output", tmp_path / "out", "--dtype", "bfloat16")
    assert {value.dtype.name for value in tensors(tmp_path / "out").values()} == {"bfloat16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    run("import", "--model", root / "first", "--output", tmp_path / "in", "--dtype", "bfloat16")
    assert_same(parameters(tmp_path / "in"), parameters(tmp_path / "out"))


def test_big_models_are_spread_over_files(root, tmp_path):
    run("export", "--model", root / "student", "--output", tmp_path / "out", "--shard-gb", 4e-5)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert_identical(tmp_path / "out", root / "student")
    assert_same(parameters(tmp_path / "out"), parameters(root / "student"))


@pytest.mark.parametrize("size", ["0", "-1", "nan", "big"])
def test_sizes_of_files_are_positive(root, tmp_path, size):
    with pytest.raises(UserError, match="argument --shard-gb: .*convert export --help` lists"):
        run("export", "--model", root / "student", "--output", tmp_path / "out", "--shard-gb", size)


def test_a_base_is_not_taken_for_itself(root, tmp_path):
    # Beside a run named as its base, which is gone, stands the run.
    text = json.loads((root / "first" / "run.json").read_text())
    text["model"]["path"] = str(tmp_path / "gone" / "student")
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "run.json").write_text(json.dumps(text))
    with pytest.raises(UserError, match="trained from student, which is neither where it was nor"):
        weights.find(tmp_path / "student")
    itself = tmp_path / "student" / "checkpoints" / "1"
    itself.mkdir(parents=True)
    text["model"]["path"] = str(itself)
    (tmp_path / "student" / "run.json").write_text(json.dumps(text))
    with pytest.raises(UserError, match="trained from student/checkpoints/1, which is neither"):
        weights.find(tmp_path / "student")


def test_an_output_that_is_there_is_kept(root, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(UserError, match="out is there already"):
        run("export", "--model", root / "ours", "--output", tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_a_torn_conversion_leaves_nothing(root, tmp_path, monkeypatch):
    def tear(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", tear)
    with pytest.raises(OSError):
        run("export", "--model", root / "ours", "--output", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_not_there(root, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cases = {
        "nobody/nothing-at-all": "no such directory, and nothing of that name came from the",
        tmp_path / "absent": "no such directory; give a Hugging Face directory",
        root / "student" / "config.json": "is a file; give the directory",
        tmp_path: "config.json is missing",
    }
    for model, words in cases.items():
        with pytest.raises(UserError, match=words):
            run("export", "--model", model, "--output", tmp_path / "x" / "out")


@pytest.mark.parametrize("command", ["import", "export"])
def test_bad_files_are_named(root, tmp_path, command):
    bad = shutil.copytree(root / "student", tmp_path / "bad")
    config = (bad / "config.json").read_text()

    def refused(words):
        with pytest.raises(UserError, match=words):
            run(command, "--model", bad, "--output", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    (bad / "config.json").write_text(config.replace("unime_smol", "gpt9"))
    refused("model_type 'gpt9' is unknown")
    (bad / "config.json").write_text(config)
    content = (bad / "model.safetensors").read_bytes()
    (bad / "model.safetensors").write_bytes(content[:-100])
    refused("model.safetensors is corrupt or cut short")
    (bad / "model.safetensors").unlink()
    refused("holds neither")
    header = {"vision_tower._bn0.num_batches_tracked": {
        "dtype": "F8_E5M2", "shape": [1], "data_offsets": [0, 1]}}  # fmt: skip
    text = json.dumps(header).encode()
    odd = len(text).to_bytes(8, "little") + text + b"0"
    (bad / "model-00001-of-00002.safetensors").write_bytes(odd)
    (bad / "model-00002-of-00002.safetensors").write_bytes(content)
    names = {**dict.fromkeys(header, "model-00001-of-00002.safetensors"),
             "vision_tower._conv_stem.weight": "model-00002-of-00002.safetensors"}  # fmt: skip
    (bad / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    refused("cannot hold 1 tensors: .*num_batches_tracked as F8_E5M2")
    for path in bad.glob("model-*"):
        path.unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (bad / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("lacks model-00001-of-00002.safetensors")


def test_damaged_directories_of_ours_are_named(root, tmp_path):
    bad = shutil.copytree(root / "ours", tmp_path / "bad")
    notes = json.loads((bad / "model.json").read_text())
    (bad / "model.json").write_text(json.dumps({**notes, "format": 99}))
    with pytest.raises(UserError, match="format 99 is not 1; import the model again"):
        unime_jax.load(bad)
    (bad / "model.json").write_text(json.dumps(notes))
    chunks = [path for path in (bad / "params").rglob("[0-9]*") if path.is_file()]
    content = chunks[0].read_bytes()
    chunks[0].unlink()
    with pytest.raises(UserError, match="bad is incomplete: its files are not those"):
        unime_jax.load(bad)
    chunks[0].write_bytes(content)
    for path in chunks:
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match="params is damaged"):
        unime_jax.load(bad)
    config = json.loads((root / "ours" / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 64
    (bad / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"up_proj/kernel is \(2, 32, 48\), not \(2, 32, 64\)"):
        unime_jax.load(bad)


def test_what_has_no_adapters(root, tmp_path):
    with pytest.raises(UserError, match="is no training run; it has no adapters"):
        run("adapters", "--model", root / "ours", "--output", tmp_path / "out")
    only = fabricated.write_run(tmp_path / "run", root / "student", miniature.STUDENT, rank=0,
                                trainable="^multi_modal_projector/")  # fmt: skip
    with pytest.raises(UserError, match="trained no adapters; export the model"):
        run("adapters", "--model", only, "--output", tmp_path / "out")
    with pytest.raises(UserError, match="neither the output directory of a training run nor a"):
        embedder.load(root / "student", adapter=root / "ours")


def test_a_run_of_another_base_is_refused(root, tmp_path):
    text = {**miniature.STUDENT["text_config"], "hidden_size": 16}
    miniature.write_model(tmp_path / "other", text, seed=1)
    with pytest.raises(UserError, match="parameters unknown to its base model"):
        embedder.load(tmp_path / "other", adapter=root / "second")
    narrow = {**miniature.STUDENT, "text_config": text}
    miniature.write_model(tmp_path / "narrow", narrow, seed=1)
    with pytest.raises(UserError, match="first is no adapter of .*narrow: .* 14 unfit"):
        embedder.load(tmp_path / "narrow", adapter=root / "first")
