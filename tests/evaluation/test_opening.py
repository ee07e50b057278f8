"""How a model is prompted on a benchmark, from its config, its training and the published way."""

import dataclasses

import pytest
from test_mmeb_run import config_of

from unime_jax import file_hashes, tiny, weights
from unime_jax.evaluation import opening
from unime_jax.types import UserError


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return weights.find(tiny.backbone("phi35v", tmp_path_factory.mktemp("models") / "phi"))


STAGE1 = {"prompt": "phi35v_stage1", "image_size": 0, "image_crops": 0, "fusion": "sum"}
STAGE2 = {"prompt": "mmeb", "image_size": 336, "image_crops": 1, "fusion": "together"}


@pytest.mark.parametrize(
    "kind, trained, benchmark, expected",
    [
        # Published checkpoints: as the published evaluation.
        ("phi3_v", {}, "mmeb", ("mmeb", "together", 0, 4)),
        ("phi3_v", {}, "retrieval", ("phi35v_eval", "together", 0, 4)),
        ("llava_next", {}, "mmeb", ("mmeb", "together", 336, 0)),
        ("llava_next", {}, "retrieval", ("llava16", "together", 336, 0)),
        # Runs of ours: as they were trained; a model of stage 1 reads image and text apart.
        ("phi3_v", STAGE1, "mmeb", ("phi35v_stage1", "sum", 0, 0)),
        ("phi3_v", STAGE1, "retrieval", ("phi35v_stage1", "sum", 0, 0)),
        ("phi3_v", STAGE2, "mmeb", ("mmeb", "together", 336, 1)),
        ("phi3_v", STAGE2, "retrieval", ("phi35v_eval", "together", 336, 1)),
        ("unime_smol", {}, "retrieval", ("plain", "together", 0, 0)),
    ],
)
def test_what_the_config_leaves_open(found, kind, trained, benchmark, expected, tmp_path):
    model = dataclasses.replace(
        found, config={**found.config, "model_type": kind}, preparation=trained
    )
    made = opening.settings_of(model, config_of("data", "images", tmp_path), benchmark=benchmark)
    prepared = made.preparation
    if kind == "unime_smol":
        expected = (opening.prompts.name_for(kind), *expected[1:])
    assert tuple(prepared[key] for key in ("prompt", "fusion", "image_size", "image_crops")) == (
        expected
    )
    assert made.wording.raw == (prepared["prompt"] == "mmeb")
    assert made.wording.sum == (prepared["fusion"] == "sum")


def test_vectors_of_another_wording_are_others(found, tmp_path, monkeypatch):
    config = config_of("data", "images", tmp_path, cache=str(tmp_path / "cache"))
    settings = opening.settings_of(found, config, benchmark="retrieval")

    def directory():
        return opening.open_encoder(config, found, [], settings)._store.directory

    before = directory()
    assert directory() == before
    name = settings.preparation["prompt"]
    words = dataclasses.replace(opening.prompts.TEMPLATES[name], text="{text}: in one word?")
    monkeypatch.setitem(opening.prompts.TEMPLATES, name, words)
    assert directory() != before


def test_the_config_goes_first(found, tmp_path):
    config = config_of("data", "images", tmp_path)
    config.data.image_size, config.data.image_crops = 0, 16
    config.data.prompt, config.data.fusion = "phi35v", "sum"
    made = opening.settings_of(
        dataclasses.replace(found, preparation=STAGE2), config, benchmark="mmeb"
    )
    assert made.preparation == {
        "prompt": "phi35v", "fusion": "sum", "image_size": 0, "image_crops": 16,
    }  # fmt: skip
    config.data.prompt = "phi36v"
    with pytest.raises(UserError, match="config.data.prompt=phi36v: choose one of"):
        opening.settings_of(found, config, benchmark="mmeb")


def test_models_have_one_memory_of_hashes_and_images_another(found, tmp_path, monkeypatch):
    """Else weights of many gigabytes are hashed twice, or a million images read for each model."""
    places = []

    class Hashes(file_hashes.FileHashes):
        def __init__(self, directory, memory=file_hashes.IMAGES):
            places.append((directory, memory))
            super().__init__(directory, memory)

    monkeypatch.setattr(file_hashes, "FileHashes", Hashes)
    config = config_of("data", "images", tmp_path, cache=str(tmp_path / "cache"))
    settings = opening.settings_of(found, config, benchmark="mmeb")
    opening.open_encoder(config, dataclasses.replace(found), [], settings)
    assert sorted(memory for _, memory in places) == [file_hashes.IMAGES, file_hashes.MODELS]
