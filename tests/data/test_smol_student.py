"""The student's and the teacher's checkpoint directories."""

import json

import numpy as np
import packages
import pytest

from unime_jax.data import smol_student
from unime_jax.types import UserError


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    path = tmp_path_factory.mktemp("lm") / "x.gguf"
    published = packages.gguf_file(path)
    return smol_student.LanguageModel(path), published


def test_weights_are_those_published(language):
    model, published = language
    found = model.tensors(3)
    assert set(found) == set(published)
    for key, array in published.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)
        assert found[key].dtype == np.float32


def test_only_the_first_layers_are_kept(language):
    model, published = language
    found = model.tensors(2)
    assert set(found) == {key for key in published if ".2." not in key}
    assert model.config(2)["num_hidden_layers"] == 2


def test_the_config_is_transformers(language):
    transformers = pytest.importorskip("transformers")
    import torch

    model, published = language
    config = model.config(3)
    assert config["rms_norm_eps"] == 1e-5
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    state = {key: torch.from_numpy(array) for key, array in published.items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert unexpected == [] and missing == ["lm_head.weight"]  # tied


def test_the_tokenizer_directory_loads_in_transformers(byte_level):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(byte_level)
    assert theirs("12<|im_end|>").input_ids[-1] == 2 == theirs.eos_token_id == theirs.pad_token_id
    assert (theirs.bos_token_id, theirs.unk_token) == (1, "<|endoftext|>")
    assert len(theirs(" 12").input_ids) == 3  # every digit alone
    assert theirs.decode(theirs(" cat at 12").input_ids) == " cat at 12"


def test_the_projector_is_drawn_from_its_seed():
    one, same, other = (smol_student.projector_tensors(16, 32, seed=s) for s in (1, 1, 2))
    for key, array in one.items():
        np.testing.assert_array_equal(array, same[key])
    assert (one["linear_1.weight"] != other["linear_1.weight"]).any()
    assert one["linear_2.weight"].shape == (16, 32)
    assert abs(one["linear_1.weight"]).max() <= 1280**-0.5


def test_the_student_is_assembled(language, tmp_path):
    from safetensors.numpy import load_file

    model, published = language
    config, tensors = smol_student.assemble(model, {"_fc.bias": np.ones(2, np.float32)}, layers=1)
    assert config["model_type"] == "unime_smol"
    assert config["text_config"]["num_hidden_layers"] == 1
    smol_student.save(tmp_path, config, tensors, {"tokenizer.json": "é"})
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == set(tensors)
    heads = {key.split(".")[0] for key in found}
    assert heads == {"language_model", "vision_tower", "multi_modal_projector"}
    np.testing.assert_array_equal(
        found["language_model.model.layers.0.self_attn.k_proj.weight"],
        published["model.layers.0.self_attn.k_proj.weight"],
    )
    assert json.loads((tmp_path / "config.json").read_text()) == config
    for layers in (0, 4):
        with pytest.raises(UserError, match=f"--layers is {layers}: give 1 to 3"):
            smol_student.assemble(model, {}, layers=layers)


def test_counters_of_training_are_dropped():
    content = packages.legacy_pth(
        {"_bn0.weight": np.ones(2, np.float32), "_bn0.num_batches_tracked": np.array(3)}
    )
    assert list(smol_student.vision_tensors(content, "x")) == ["_bn0.weight"]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\1" * 100])
def test_a_damaged_model_file_is_named(tmp_path, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match="x.gguf is not a readable GGUF file"):
        smol_student.LanguageModel(path)


def test_a_cut_model_file_is_named(tmp_path):
    path = tmp_path / "x.gguf"
    packages.gguf_file(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="x.gguf is not a readable GGUF file"):
        smol_student.LanguageModel(path)


def test_real_tokens(assets):
    """Ids that the published SmolLM2 tokenizer gives."""
    from unime_jax.data.prompts import Segment
    from unime_jax.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(assets / "student")
    ids, _, _ = tokenizer.encode([Segment("prompt", "<|im_start|>Hello 123 world")], -1)
    assert ids == [1, 19556, 216, 33, 34, 35, 905]
