"""What the language-model head predicts where the embedding is read, and how it is shown."""

import json

import fabricated
import miniature
import numpy as np
import packages
import pytest
import torch
import transformers
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file
from tolerances import EMBEDDING, assert_near

import unime_jax
from unime_jax import inspect, predictions, report, tiny
from unime_jax.data.prompts import Segment
from unime_jax.data.stream import Item
from unime_jax.data.tokenizer import Tokenizer
from unime_jax.types import UserError

TEXTS = ["a red cat", "dog"]
DECODER = {**miniature.STUDENT["text_config"], "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspect")
    one_layer = {**miniature.STUDENT, "text_config": DECODER}
    miniature.write_model(root / "student", one_layer, seed=0)
    fabricated.write_run(root / "run", root / "student", one_layer)
    (root / "cat.png").write_bytes(packages.png((200, 30, 30), (40, 30)))
    rows = [{"id": "first", "text": TEXTS[0]}, {"image": "cat.png"}, {"image": "none.png"}]
    rows += [{"text": ""}, {"image": "cat.png", "text": "a cat"}]
    (root / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def most_probable(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    logits = logits.astype(np.float64)
    chances = np.exp(logits - logits.max())
    chances /= chances.sum()
    order = np.argsort(-chances, kind="stable")[:k]
    return order, chances[order]


def assert_predicts(found: list[predictions.Prediction], logits: np.ndarray) -> None:
    tokens, chances = most_probable(logits, len(found))
    assert [p.token for p in found] == tokens.tolist()
    assert_near([p.probability for p in found], chances, EMBEDDING)


def ask(model, items, **options):
    def bad(key, reason):
        raise AssertionError(f"{key}: {reason}")

    return dict(predictions.predict(model, items, k=options.pop("k", 5), bad=bad, **options))


@pytest.mark.parametrize("tied", (True, False))
def test_probabilities_are_those_of_pytorch(tmp_path, tied):
    config = {**DECODER, "tie_word_embeddings": tied}
    miniature.write_model(tmp_path / "model", config, seed=3)
    model = unime_jax.load(tmp_path / "model", dtype="float32")
    reference = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32
    ).eval()
    found = ask(model, [Item(i, text) for i, text in enumerate(TEXTS)], instruction="Name it.")
    for i, text in enumerate(TEXTS):
        ids = model.preprocessor.tokenize(text, False, "Name it.").ids
        with torch.no_grad():
            logits = reference(torch.tensor([ids])).logits[0, -1].numpy()
        assert_predicts(found[i], logits)
    assert predictions.vocabulary_of(model) == config["vocab_size"]


@pytest.mark.parametrize("name", ("phi35v", "llava16"))
def test_pictures_are_read_by_the_head_of_the_file(name):
    directory = tiny.backbone(name)
    model = unime_jax.load(directory, dtype="float32")
    image = Image.new("RGB", (60, 50), (10, 200, 90))
    (found,) = ask(model, [Item("row", "a cat", image)], k=264).values()
    (inputs,) = model.preprocess(texts=["a cat"], images=[image])
    hidden = np.asarray(nnx.merge(model.graphdef, model.params).hidden(inputs))
    weights = {}
    for path in directory.glob("*.safetensors"):
        weights |= load_file(path)
    (head,) = (value for key, value in weights.items() if key.endswith("lm_head.weight"))
    assert_predicts(found, head @ hidden[0, int(inputs.lengths[0]) - 1])


def test_models_stand_side_by_side_and_bad_rows_are_named(root, tmp_path, capsys):
    arguments = ["inspect", "--model", str(root / "student"), "--model", str(root / "run")]
    arguments += ["--input", str(root / "items.jsonl"), "-k", "3", "--show", "2"]
    inspect.main([*arguments, "--output", str(tmp_path)])
    out, err = capsys.readouterr()
    faults = [line for line in err.splitlines() if line.startswith("row")]
    assert len(faults) == 2
    assert faults[0].startswith("row 2 (student, run): ") and "none.png" in faults[0]
    assert faults[1].startswith("row 3: ")
    content = json.loads((tmp_path / "inspect.json").read_text())
    assert [row["row"] for row in content["rows"]] == [0, 1, 4]
    assert content["rows"][0]["id"] == "first" and content["rows"][1]["image"] == "cat.png"
    assert content["models"]["run"]["path"] == str(root / "run")
    first = content["rows"][0]["predictions"]
    assert first["student"] != first["run"]
    model = unime_jax.load(root / "run", dtype="float32")
    expected = ask(model, [Item(0, TEXTS[0])], k=3)[0]
    assert [p["token"] for p in first["run"]] == [p.token for p in expected]
    assert_near([p["probability"] for p in first["run"]], [p.probability for p in expected], 1e-6)
    shown = report.visible(first["run"][0]["text"])
    assert shown in out and "and 1 more in" in out and "row 4" not in out
    with Image.open(tmp_path / "inspect.png") as image:
        assert image.width > 800 and image.height > 400


def test_nothing_to_show_is_an_error(root, tmp_path):
    (tmp_path / "items.jsonl").write_text('{"text": ""}\n{"image": "none.png"}\n')
    model = ["inspect", "--model", str(root / "student")]
    rest = ["--input", str(tmp_path / "items.jsonl"), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="none of its 2 rows"):
        inspect.main([*model, *rest])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="is no directory; give another path"):
        inspect.main([*model, *rest[:2], "--output", rest[1]])
    with pytest.raises(UserError, match="has 512 tokens"):
        inspect.main([*model, "-k", "513", "--input", str(root / "items.jsonl"), *rest[2:]])
    with pytest.raises(UserError, match="same directory twice"):
        inspect.main([*model, *model[1:], *rest])
    with pytest.raises(UserError, match="no language-model head"):
        path = str(tiny.backbone("nv_embed"))
        inspect.main(["inspect", "--model", path, "--input", str(root / "items.jsonl"), *rest[2:]])


def test_a_sum_of_two_vectors_has_no_head(root, tmp_path, capsys):
    model = ["inspect", "--model", str(root / "student"), "--fusion", "sum", "-k", "1"]
    inspect.main([*model, "--input", str(root / "items.jsonl"), "--output", str(tmp_path)])
    assert "row 4 (student): this model embeds image and text as a sum" in capsys.readouterr().err


def test_tokens_keep_their_blank_and_their_bytes(tmp_path):
    tokenizer = Tokenizer(tiny.backbone("llava16"))  # a token a byte
    words = [tokenizer.encode([Segment("text", text)], -1)[0] for text in (" ", "ä")]
    assert [tokenizer.text_of(id) for id in words[0][-1:] + words[1][-2:]] == [
        " ",
        "<0xC3>",
        "<0xA4>",
    ]
    assert tokenizer.text_of(99999) == "<99999>"
    pieces = {"<unk>": 0, "\u2581dog": 1, "dog": 2, "\u2581": 3, "<0x0A>": 4}
    content = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"},
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {"type": "BPE", "vocab": pieces, "merges": [], "unk_token": "<unk>"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    sentencepiece = Tokenizer(tmp_path)
    assert [sentencepiece.text_of(id) for id in range(1, 5)] == [" dog", "dog", " ", "\n"]
    assert report.visible(" do\ng") == "␣do\\ng"


def test_letters_without_a_glyph_leave_no_warning(tmp_path, recwarn):
    rows = [("她在北京", None), ("a $cat$", np.zeros((20, 30, 3), np.uint8))]
    columns = {"a model with a long name": [[("书", 0.7), (" $x_", 0.2)], None]}
    path = report.plot_token_bars(rows, columns, tmp_path / "bars.png")
    assert path.is_file() and not [w for w in recwarn if "Glyph" in str(w.message)]
