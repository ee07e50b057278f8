"""Exported models as PyTorch users hold them: README's examples, the text side, the model card."""

import dataclasses
import json

import fabricated
import miniature
import numpy as np
import pytest
import tolerances
import torch
import transformers

import unime_jax
from unime_jax import convert, model_card, models, runtime, tiny, weights
from unime_jax.types import UserError

TEXTS = ["a red cat", "a much longer sentence about a green fox"]
SAME = 1e-5  # embeddings of the exported model and ours


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """JAX is at work already, with the compile cache of the tests."""
    monkeypatch.setattr(runtime, "start", lambda: None)


def export(model, output, *flags):
    convert.main(["convert", "export", "--model", str(model), "--output", str(output), *flags])
    return output


def run_over(base, root):
    """A run over a tiny backbone of the cache."""
    return fabricated.write_run(root / "run", base, models.read_config(base), seed=1, scale=0.1)


@pytest.mark.parametrize("kind", ["smol", "llava16", "phi35v"])
def test_the_text_side_in_transformers(tmp_path, kind):
    if kind == "smol":
        base = miniature.write_model(tmp_path / "base", miniature.STUDENT, seed=0)
    else:
        base = tiny.backbone(kind)
    run = run_over(base, tmp_path)
    out = export(run, tmp_path / "out", "--text-only")
    config = json.loads((out / "config.json").read_text())
    if kind == "phi35v":  # the default of transformers is a token that the tiny model lacks
        (out / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    model, said = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(said.values()), said
    embedder = unime_jax.load(run, dtype="float32")
    expected = embedder.embed(texts=TEXTS)
    for text, vector in zip(TEXTS, expected, strict=True):
        ids = torch.tensor([embedder.preprocessor.tokenize(text, False).ids])
        with torch.no_grad():
            hidden = model.eval().model(ids).last_hidden_state[0, -1]
        tolerances.assert_near(torch.nn.functional.normalize(hidden, dim=-1), vector, SAME)
    # Ours reads it back, with the prompt of the whole model.
    tolerances.assert_near(unime_jax.load(out, dtype="float32").embed(texts=TEXTS), expected, SAME)
    assert not (out / "preprocessor_config.json").exists()


def test_what_has_no_text_side(tmp_path):
    base = miniature.write_model(tmp_path / "base", miniature.STUDENT["text_config"], seed=0)
    with pytest.raises(UserError, match="is a llama model, which has no language model beside"):
        export(base, tmp_path / "out", "--text-only")


@pytest.mark.slow
def test_the_text_side_in_sentence_transformers(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    run = run_over(tiny.backbone("llava16"), tmp_path)
    out = export(run, tmp_path / "out", "--text-only")
    model = sentence_transformers.SentenceTransformer(str(out), device="cpu")
    prompt = "[INST] {}\nSummary above sentence in one word: [/INST]"
    vectors = model.encode([prompt.format(text) for text in TEXTS])
    expected = unime_jax.load(run, dtype="float32").embed(texts=TEXTS)
    tolerances.assert_near(vectors, expected, SAME)


def test_the_model_card(tmp_path):
    base = miniature.write_model(tmp_path / "base", miniature.STUDENT, seed=0)
    run = run_over(base, tmp_path)
    settings = json.loads((run / "run.json").read_text())
    settings |= {"stage": "contrast", "loss": {"temperature": 0.02}}
    settings["data"] |= {"path": "/data/pairs.jsonl"}
    settings["train"] |= {"steps": 7, "batch_size": 12}
    (run / "run.json").write_text(json.dumps(settings))
    lines = [{"step": 1, "validation/spearman": 0.1}, {"step": 7, "validation/spearman": 0.5}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    card = (export(run, tmp_path / "out") / "README.md").read_text()
    for words in (
        "Base: base.",
        "vectors of 32 numbers and length 1 (unime_smol)",
        "| 2, contrastive with hard negatives | data/pairs.jsonl | 7 | 12 | 0.02 | LoRA ",
        "| run | 0.500 |",
        r"text  = '{text}\nSummary above sentence in one word:'",
        "Pooling: last token",
        'embedder = unime_jax.load(".")',
        "resized to 224 x 224",
    ):
        assert words in card, words
    assert "base_model" not in card  # a directory of this machine
    # A prompt without a wording: images stand before their text.
    found = dataclasses.replace(weights.find(run), preparation={"prompt": "mmeb"})
    card = model_card.card(found, pooling="last token", width=32)
    for words in ("Turns texts, images, and both together", "image = '{image}'",
                  r"both  = '{image}\n{text}'", 'images=[None, "cat.png"]'):  # fmt: skip
        assert words in card, words
    found = dataclasses.replace(found, config={"model_type": "llava_next"})
    assert "prompt = '<image>'" in model_card.card(found, pooling="last token", width=32)
    text = (export(run, tmp_path / "text", "--text-only") / "README.md").read_text()
    assert "SentenceTransformer" in text and "AutoModel" in text and "image" not in text
    # An export of an export says what that was.
    again = (export(tmp_path / "out", tmp_path / "again") / "README.md").read_text()
    assert "nothing was trained" in again and np.all([w in again for w in ("## How to load",)])
