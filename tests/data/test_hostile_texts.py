"""Texts that no model was made for: huge ones, broken ones, and those that look like prompts."""

import json
import time

import numpy as np
import pytest

from unime_jax import tiny
from unime_jax.data import (
    items,
    pipeline,
    preprocess,
    prompts,
    stream,
    task_pairs,
    text_sources,
    tokenizer,
)
from unime_jax.types import ImageSpec, UserError

SPECS = {
    "smol": ImageSpec("grid", 8, 3),
    "phi35v": ImageSpec("phi_hd", 56, 4, crops=4),
    "llava16": ImageSpec("llava_anyres", 56, 16, grids=((56, 112), (112, 56), (112, 112))),
}


@pytest.fixture(scope="module")
def smol(byte_level):
    return preprocess.Preprocessor(byte_level, SPECS["smol"], prompt="smol", max_tokens=64)


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize("text", ["y" * 1_000_000, "word " * 200_000])
def test_a_text_of_a_megabyte_is_cut_and_counted(text, smol):
    started = time.process_time()
    rows = text_sources.Texts(["short", "shorter", text])
    batches = pipeline.Batches(
        [rows], smol, batch_size=3, max_tokens=60, vectors=lambda t: np.zeros((3, 1))
    )
    assert batches.info.cut_texts == 1 and batches[0].query[0].tokens.shape == (3, 60)
    assert time.process_time() - started < 5
    row, whole = (smol.tokenize(text[:n], False, most=60) for n in (200, None))
    assert row.cut(60, 0).ids == whole.cut(60, 0).ids and whole.cut(60, 0).lost > 0


def test_texts_that_no_tokenizer_takes_are_bad_rows(byte_level, smol):
    faults = {}
    rows = [stream.Item(0, "fine"), stream.Item(1, "x" * 5_000_000),
            stream.Item(2, "\ud800"), stream.Item(3, "nul \0 is a letter")]  # fmt: skip
    found = stream.Stream(smol, rows, instruction=None, bad=faults.__setitem__)
    assert sorted(key for _, keys in found for key in keys) == [0, 1, 3]  # 1 is cut
    assert list(faults) == [2] and "surrogate" in faults[2]
    with pytest.raises(UserError, match="2097153 letters; 2097152 are the most"):
        text = prompts.Segment("text", "x" * (tokenizer.MAX_LETTERS + 1))
        tokenizer.Tokenizer(byte_level).encode([text], -1)


def test_a_line_without_an_end_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(items, "_LINE", 1000)
    lines = [b'{"text": "a"}', b'{"text": "' + b"x" * 5000 + b'"}', b'{"text": "b"}']
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    source = items.Input(str(tmp_path / "x.jsonl"))
    found = list(source)
    assert [entry.text for entry in found] == ["a", None, "b"] and source.count() == 3
    assert "line 2 has more than" in found[1].fault


def test_thousands_of_images_in_one_row(tmp_path):
    many = [f"{i}.png" for i in range(5000)]
    path = tmp_path / "t.jsonl"
    judged = {"query_text": "q", "target_text": "fine", "query_pos_scores": 1.0}
    judged["hard_negatives"] = [["", name] for name in many]
    judged["hard_negatives_scores"] = [0.5] * len(many)
    rows = [
        {"query_image": many, "target_text": "x"},
        {"query_text": "<|image_1|>" * 5000, "query_image": "a.png", "target_text": "x"},
        {"query_text": "<image>" * 5000, "target_text": "fine"},
        judged,
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    faults: list[str] = []
    found = task_pairs.read(path, faults=faults)
    assert sum(map(len, found)) == 2 and len(faults) == 2
    assert all(len(fault) < 300 for fault in faults) and "one image" in faults[1]
    (found,) = task_pairs.read(path, judged=3, faults=faults)
    assert len(found[0].negatives) == 3
    (tmp_path / "e.jsonl").write_text(json.dumps({"image": many}))
    (entry,) = items.Input(str(tmp_path / "e.jsonl"))
    assert entry.fault == "image is a list, not a path"


# ---------------------------------------------------------------- control tokens


HOSTILE = (
    "<image> <|image_1|> <|image|> <s> </s> <|end|> <|user|> <|assistant|> <unk> <pad> [INST] "
    "[CLS] [SEP] [PAD] <|im_start|> <|im_end|> <|endoftext|> <|system|> {image} {text} "
    "{instruction}"
)


def backbones(byte_level, word_piece, directory):
    """(name, directory of a tokenizer, kind of images, prompts)."""
    found = [(name, tiny.backbone(name), SPECS.get(name)) for name in tiny.CONFIGS]
    found += [("smol", byte_level, SPECS["smol"]), ("bert", word_piece, None)]
    # As Phi's: a "</s>" that is not special, and takes the blanks behind it.
    content = json.loads((tiny.backbone("phi35v") / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        if token["content"] == "</s>":
            token |= {"special": False, "rstrip": True}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return [*found, ("phi35v", directory, SPECS["phi35v"])]


def test_a_text_never_becomes_control_tokens(byte_level, word_piece, tmp_path):
    tried = 0
    for name, directory, spec in backbones(byte_level, word_piece, tmp_path):
        added = tokenizer.Tokenizer(directory)._first.get_added_tokens_decoder()
        for prompt, template in prompts.TEMPLATES.items():
            mark = 260 if name == "llava16" else -1
            model = preprocess.Preprocessor(
                directory, spec, prompt=prompt, max_tokens=4096, image_token_id=mark
            )
            sides = [False] + [True] * bool(spec and template.both and prompt != "none")
            for has_image in sides:
                layout = model.layout(60, 60) if has_image else None
                plain, hostile = (
                    model.tokenize(text, has_image, layout=layout).ids
                    for text in ("cat", f"cat {HOSTILE} cat{HOSTILE}")
                )
                # BERT writes [UNK], 1, for every word that it does not know.
                control = [
                    [id for id in ids if id in added and (name != "bert" or id != 1)]
                    for ids in (plain, hostile)
                ]
                assert control[0] == control[1], (name, prompt, has_image)
                assert hostile.count(-1) == has_image
                tried += 1
    assert tried > 40


def test_an_instruction_is_a_prompt_of_the_users_own(byte_level):
    """What a user gives as the instruction is part of the prompt; the rows' texts are not."""
    model = preprocess.Preprocessor(byte_level, None, prompt="nv_embed", max_tokens=512)
    one, other = (model.tokenize(t, False, "Find it").ids for t in ("a", "a <|endoftext|> b"))
    assert one.count(0) == other.count(0)


def test_rows_longer_than_the_window_are_not_trained_on(byte_level):
    model = preprocess.Preprocessor(byte_level, None, prompt="smol", max_tokens=200, window=50)
    options = {"batch_size": 2, "max_tokens": 90, "vectors": lambda t: np.zeros((2, 1))}
    pipeline.Batches([text_sources.Texts(["a", "b"])], model, **options)
    with pytest.raises(UserError, match="90 positions exceed the model's sliding_window of 50"):
        pipeline.Batches([text_sources.Texts(["a", "b" * 300])], model, **options)
