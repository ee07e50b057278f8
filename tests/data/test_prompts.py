"""Prompts to the character."""

import dataclasses

import pytest

from unime_jax.data import prompts
from unime_jax.types import UserError


def flat(name, text, has_image, instruction=None):
    segments = prompts.render(name, text, has_image, instruction)
    return "".join("<IMG>" if s.role == "image" else s.value for s in segments)


@pytest.mark.parametrize(
    ("name", "text", "has_image", "expected"),
    [
        ("none", "A cat.", False, "A cat."),
        ("smol", "A cat.", False, "A cat.\nSummary above sentence in one word:"),
        ("smol", None, True, "<IMG>\nSummary above image in one word:"),
        ("smol", "x", True, "<IMG>\nx\nSummary above image and sentence in one word:"),
        (
            "phi35v",
            "A cat.",
            False,
            "<|user|>\nA cat.\nSummary above sentence in one word: <|end|>\n<|assistant|>\n",
        ),
        (
            "phi35v",
            "",
            True,
            "<|user|>\n<IMG>\nSummary above image in one word: <|end|>\n<|assistant|>\n",
        ),
        (
            "phi35v_eval",
            "A cat.",
            False,
            "<|user|>\nA cat.\nSummary above sentence in one word:<|end|>\n<|assistant|>\n",
        ),
        ("nv_embed", "A cat.", False, "A cat.</s>"),
        ("llava16", "A cat.", False, "[INST] A cat.\nSummary above sentence in one word: [/INST]"),
        ("llava16", None, True, "[INST] <IMG>\nSummary above image in one word: [/INST]"),
        (
            "phi35v_stage1",
            "A cat.",
            False,
            "<|user|>\nA cat.\nSummary above sentences in one word:\n<|end|>\n<|assistant|>\n",
        ),
        (
            "llava16_stage1",
            "A cat.",
            False,
            "[INST] A cat.\nSummary above sentences in one word:\n [/INST]",
        ),
        ("mmeb", " Is it? \n", False, " Is it? \n"),
        ("mmeb", prompts.Slotted("", "\nIs it?\n"), True, "<IMG>\nIs it?\n"),
        ("mmeb", prompts.Slotted("a ", " b"), True, "a <IMG> b"),
        ("mmeb", "Is it?", True, "<IMG>\nIs it?"),
        ("mmeb", None, True, "<IMG>"),
        (
            "phi35v_eval",
            " A cat.\n",
            True,
            "<|user|>\n<IMG>\nA cat.\nSummary above image and sentence in one word:"
            "<|end|>\n<|assistant|>\n",
        ),
    ],
)
def test_published_wording(name, text, has_image, expected):
    assert flat(name, text, has_image) == expected


def test_a_text_that_looks_like_a_place_stays_text():
    text = "{text} <image> {image} <|image_1|>"
    segments = prompts.render("smol", text, True)
    assert [s.value for s in segments if s.role == "text"] == [text]
    assert sum(s.role == "image" for s in segments) == 1


def test_the_instruction_stands_before_the_text_and_is_never_cut():
    segments = prompts.render("smol", "A cat.", False, "Find the animal.")
    assert [(s.role, s.value) for s in segments[:2]] == [
        ("prompt", "Find the animal.\n"),
        ("text", "A cat."),
    ]
    assert flat("nv_embed", "a", False, "Find it") == "Instruct: Find it\nQuery: a</s>"
    assert flat("smol", None, True, "Look.").startswith("<IMG>\nLook.\nSummary")


def test_a_data_sets_slot_is_read_on_request_alone():
    text = "<|image_1|>\nRepresent the given image."
    assert prompts.slotted(text) == prompts.Slotted("", "\nRepresent the given image.")
    assert prompts.slotted("no slot") == "no slot"
    assert prompts.slotted("a <image> b", "<image>") == prompts.Slotted("a ", " b")
    assert flat("mmeb", text, False) == text
    with pytest.raises(UserError, match="more than one <|image_1|>"):
        prompts.slotted(text + text)


def test_another_wording_is_another_prompt(monkeypatch):
    before = prompts.digest("smol")
    template = dataclasses.replace(prompts.TEMPLATES["smol"], image="{image}\nIn one word:")
    monkeypatch.setitem(prompts.TEMPLATES, "smol", template)
    assert prompts.digest("smol") != before and len(before) == 8


@pytest.mark.parametrize(
    ("name", "text", "has_image", "message"),
    [
        ("smoll", "x", False, "unknown prompt 'smoll'"),
        ("smol", "", False, "empty text"),
        ("smol", "  \n", False, "empty text"),
        ("smol", None, False, "empty text"),
        ("none", "x", True, "takes no image"),
        ("phi35v_stage1", "x", True, "no form for an image with a text: embed with fusion='sum'"),
        ("mmeb", prompts.Slotted("a", "b"), False, "prompts.Slotted is for rows with an image"),
        ("mmeb", " ", False, "empty text"),
        ("llava16", prompts.Slotted("a", "b"), True, "has its own place for the image"),
    ],
)
def test_impossible_rows(name, text, has_image, message):
    with pytest.raises(UserError, match=message):
        prompts.render(name, text, has_image)


def test_every_model_type_has_one_default():
    kinds = [kind for t in prompts.TEMPLATES.values() for kind in t.model_types]
    assert len(kinds) == len(set(kinds))
    assert prompts.name_for("unime_smol") == "smol"
    assert prompts.name_for("bert") == "none"
    with pytest.raises(UserError, match="no prompt for model_type 'gpt9'; known: bert"):
        prompts.name_for("gpt9")
