"""What `convert` writes, in transformers and peft."""

import json

import fabricated
import miniature
import numpy as np
import peft as reference_peft
import pytest
import tiny_llava
import torch
import transformers
from conversion import assert_identical, run, tensors

import unime_jax
from unime_jax import embedder, models
from unime_jax.models import hf


def test_the_text_side_in_transformers(tmp_path):
    """A run over a Llama: strict keys, sharded files, the same embedding."""
    base = tmp_path / "base"
    miniature.write_model(base, miniature.STUDENT["text_config"], seed=3)
    fabricated.write_run(tmp_path / "run", base, miniature.STUDENT["text_config"], seed=4)
    run("export", "--model", tmp_path / "run", "--output", tmp_path / "out")
    model, said = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert type(model) is transformers.LlamaForCausalLM and not any(said.values()), said
    ids = [[5, 9, 77, 3]]
    with torch.no_grad():
        hidden = model.eval().model(torch.tensor(ids)).last_hidden_state[0, -1]
    expected = torch.nn.functional.normalize(hidden, dim=-1)
    actual = unime_jax.load(tmp_path / "run", dtype="float32").embed_tokens(ids)[0]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A tiny LLaVA of transformers and a run over it, projector and all."""
    root = tmp_path_factory.mktemp("llava")
    tiny_llava.write(root / "base")
    fabricated.write_run(
        root / "run",
        root / "base",
        tiny_llava.CONFIG,
        targets=fabricated.ALL + r"|vision_tower/.*(layers|last_layer)/self_attn/v_proj$",
        trainable=r"^multi_modal_projector/.*/(kernel|bias)$",
        scale=0.1,
    )
    return root


@pytest.fixture(scope="module")
def llava_rows(llava):
    """What the run makes of a text and of a picture."""
    model, _ = embedder.load_model(llava / "run", dtype="float32")
    vectors = tiny_llava.ours(model, tiny_llava.read(llava / "base"))
    assert np.abs(vectors - tiny_llava.embed(tiny_llava.read(llava / "base"))).max() > 1e-2
    return vectors


def test_an_exported_run_in_transformers(llava, llava_rows, tmp_path):
    run("export", "--model", llava / "run", "--output", tmp_path / "out")
    vectors = tiny_llava.embed(tiny_llava.read(tmp_path / "out"))  # keys are checked strictly
    np.testing.assert_allclose(vectors, llava_rows, rtol=0, atol=1e-5)


def test_llava_is_bit_identical_and_gets_the_hubs_names(llava, tmp_path):
    run("import", "--model", llava / "base", "--output", tmp_path / "ours")
    run("export", "--model", tmp_path / "ours", "--output", tmp_path / "out")
    key_map = models.rules(tiny_llava.CONFIG)
    expected = {hf.renamed(key, key_map): x for key, x in tensors(llava / "base").items()}
    assert "vision_tower.vision_model.embeddings.class_embedding" in expected
    assert_identical(tmp_path / "out", expected)


def test_an_exported_adapter_in_peft(llava, llava_rows, tmp_path):
    run("adapters", "--model", llava / "run", "--output", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 3 and config["lora_alpha"] == 6 and config["lora_dropout"] == 0.25
    base = tiny_llava.read(config["base_model_name_or_path"])
    model = reference_peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    adapted = {name for name, x in model.named_modules() if hasattr(x, "lora_A")}
    assert len(adapted) == 2 * 7 + 3  # nothing but what was trained
    np.testing.assert_allclose(tiny_llava.embed(model), llava_rows, rtol=0, atol=1e-5)
