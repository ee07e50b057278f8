"""The evaluation entry, with embedders whose answers are known."""

import json
import pathlib
import types

import numpy as np
import pytest

from unime_jax.benchmarks import smol
from unime_jax.data import sources
from unime_jax.data.rows import Row
from unime_jax.evaluation import smol as evaluation
from unime_jax.evaluation import smol_report as evaluate
from unime_jax.types import ImageSpec, UserError

ROOT = pathlib.Path(__file__).parents[2]
SIZE, WIDTH = 4, 24
TRAINED = [5, 5, 9, *range(15, -1, -1), 5]  # numbers of the training pairs


def png(number: int) -> bytes:
    """A picture whose colour is its number."""
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (6, 3), (number + 1, 0, 0)).save(file, "PNG")
    return file.getvalue()


class FakePreprocessor:
    def tokenize(self, text, has_image, instruction=None):
        ids = (1, *(2 + int(word) for word in text.split() if word.isdigit()), 0)
        return Row(ids, 1, len(ids) - 1)

    def image(self, content):
        if content == b"broken":
            raise UserError("not a readable image")
        from unime_jax.data import pictures

        tiles = np.asarray(pictures.load_rgb(content).resize((SIZE, SIZE)))[None]
        return types.SimpleNamespace(tiles=tiles)


class FakeEmbedder:
    """Puts every number in its own direction: text "word 7", a picture of colour 7.

    "raw" puts everything in one place, "teacher" and "bert" read no images.
    """

    directions = np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)))[0]
    preprocessor = FakePreprocessor()

    def __init__(self, path):
        self.kind = pathlib.Path(path).name
        self.image_spec = None if self.kind in ("teacher", "bert") else ImageSpec("grid", SIZE, 2)
        self.params = {"language_model": {"embed_tokens": {"embedding": np.eye(WIDTH + 2)}}}

    def embed(self, texts=None, images=None, progress=lambda count: None):
        if texts is not None:
            numbers = [int(text.split()[-1]) for text in texts]
        else:
            assert self.image_spec is not None
            numbers = [
                int(self.preprocessor.image(image).tiles[0, 0, 0, 0]) - 1 for image in images
            ]
        progress(len(numbers))
        vectors = self.directions[numbers].astype(np.float32)
        return np.ones_like(vectors) / WIDTH**0.5 if self.kind == "raw" else vectors

    def featurise(self, tiles, progress):
        progress(len(tiles))
        hot = np.eye(WIDTH, dtype=np.float32)[tiles[:, 0, 0, 0].astype(int) - 1]
        return np.stack([hot, hot * 3], axis=1)  # the mean over positions is 2 * hot


@pytest.fixture
def world(monkeypatch, tmp_path):
    """Tiny data in memory and fake models; notes which splits were read."""
    read = []

    def split(path, name):
        read.append(name)
        numbers = {"test": range(8), "validation": range(8, 14), "train": TRAINED}[name]
        rows = [  # the test pairs 6 and 7 count as the same
            sources.PairRow(f"word {n}", f"key {6 if n == 7 else n}", "here", seen=n % 4 == 0)
            for n in numbers
        ]
        images = [png(n) for n in numbers]
        if name == "train":
            images[2] = b"broken"
        return sources.Pairs(rows, lambda i: images[i], name=name)

    def sentences(path, name):
        if name == "heldout":
            return [{"text": f"word {n % 3}"} for n in range(7)]
        return [{"text": f"meaning {n}", "second": f"use {n}"} for n in range(5)]

    monkeypatch.setattr(sources, "pairs", split)
    monkeypatch.setattr(sources, "split_sentences", sentences)
    monkeypatch.setattr(sources, "sentences", lambda path: ["word 1", "word 2"])
    monkeypatch.setattr(evaluation.embedder, "load", lambda path, dtype: FakeEmbedder(path))
    for name in ("raw", "stage2", "bert", "teacher", "data"):
        (tmp_path / name).mkdir()
    return read


@pytest.fixture
def config(tmp_path):
    import importlib.util

    spec = importlib.util.spec_from_file_location("eval_smol", ROOT / "configs" / "eval_smol.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config("smoke")
    for name in c.models:
        c.models[name] = ""
    for name in c.runs:
        c.runs[name] = ""
    c.models.raw, c.models.stage2 = str(tmp_path / "raw"), str(tmp_path / "stage2")
    c.teacher.path, c.data.path = str(tmp_path / "teacher"), str(tmp_path / "data")
    c.data.features = ""
    c.output = str(tmp_path / "out")
    return c


def column(result, table, name):
    return {row["row"]: row[name] for row in result["tables"][table]}


def test_tables_hold_what_the_models_can_do(world, config):
    result = evaluate.run(config)
    assert list(column(result, "Sentences", "R@1")) == [
        "chance", evaluation.IDF, "raw model", "after stage 2", "teacher"
    ]  # fmt: skip
    assert column(result, "Sentences", "R@1")["raw model"] == 0
    assert column(result, "Sentences", "R@1")["after stage 2"] == 100
    assert column(result, "Sentences", "Spearman")["after stage 2"] == pytest.approx(1)
    assert column(result, "Sentences", "Spearman")["raw model"] is None
    pictures = column(result, "Pictures", "i2t R@1")
    assert pictures["chance"] == pytest.approx(100 * (6 * 1 + 2 * 2) / 64)
    assert pictures["raw model"] == 0 and pictures["after stage 2"] == 100
    assert pictures["ridge regression"] == 100
    assert list(pictures) == ["chance", "ridge regression", "raw model", "after stage 2"]
    for word, chance in (("seen", 1 / 8), ("unseen", (4 * 1 + 2 * 2) / 48)):
        found = column(result, f"Pictures, {word} words", "t2i R@1")
        assert found["after stage 2"] == 100
        assert found["chance"] == pytest.approx(100 * chance)


def test_report_and_plots_are_written(world, config, tmp_path, capsys):
    run_directory = tmp_path / "run"
    run_directory.mkdir()
    (run_directory / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    config.runs.stage1 = str(run_directory)
    result = evaluate.run(config)
    out = pathlib.Path(config.output)
    stored = json.loads((out / "report.json").read_text())
    assert stored["tables"]["Pictures"] == result["tables"]["Pictures"]
    assert stored["split"] == "test" and stored["ridge_strength"] > 0 and stored["seconds"] >= 0
    text, printed = (out / "report.md").read_text(), capsys.readouterr().out
    for name in ("recall", "cosine", "retrieval", "losses"):
        assert (out / f"{name}.png").stat().st_size > 3000
        assert f"({name}.png)" in text and f"{name}.png" in printed
    assert "| after stage 2 | **1.000** |" in text and "| teacher | 1.000 |" in text
    assert "## Nearest captions, after stage 2" in text
    assert "R@k, %, among all 8 test pairs" in printed
    assert f"unime_jax.load('{config.models.stage2}')" in printed


def test_choosing_on_validation_never_reads_the_test_pairs(world, config):
    config.data.split = "validation"
    result = evaluate.run(config)
    assert "test" not in world and "validation" in world
    assert "among all 6 validation pairs" in (pathlib.Path(config.output) / "report.md").read_text()
    assert column(result, "Pictures", "i2t R@1")["chance"] == pytest.approx(100 / 6)


def test_a_text_model_has_no_row_among_pictures(world, config, tmp_path):
    config.models.stage1 = str(tmp_path / "bert")
    result = evaluate.run(config)
    assert "after stage 1" in column(result, "Sentences", "R@1")
    assert "after stage 1" not in column(result, "Pictures", "i2t R@1")
    config.models.raw = config.models.stage2 = ""
    assert list(evaluate.run(config)["tables"]) == ["Sentences"]


def test_without_a_teacher_there_is_no_spearman_and_no_ridge(world, config):
    config.teacher.path = ""
    result = evaluate.run(config)
    assert set(column(result, "Sentences", "Spearman").values()) == {0.0, None}
    assert "ridge regression" not in column(result, "Pictures", "i2t R@1")
    assert result["ridge_strength"] is None and "train" not in world


def test_data_without_wordnet_has_no_definitions(world, config, monkeypatch):
    def sentences(path, name):
        if name == "heldout":
            return [{"text": f"word {n}"} for n in range(4)]
        raise UserError("data/smol_sentences has no split 'gloss_to_example'; it has heldout")

    monkeypatch.setattr(sources, "split_sentences", sentences)
    result = evaluate.run(config)
    assert list(result["tables"]["Sentences"][0]) == ["row", "Spearman"]
    assert column(result, "Sentences", "Spearman")["after stage 2"] == pytest.approx(1)


def test_damaged_sentences_are_no_missing_ones(world, config, monkeypatch):
    def sentences(path, name):
        if name == "heldout":
            return []
        raise UserError("data/smol_sentences is damaged")

    monkeypatch.setattr(sources, "split_sentences", sentences)
    with pytest.raises(UserError, match="is damaged"):
        evaluate.run(config)


@pytest.fixture
def fitted(monkeypatch):
    """Notes the rows that ridge regression is fitted on, as numbers of features and targets."""
    rows = []
    fit = smol.fit_ridge

    def spy(features, targets, quality):
        captions = (targets @ FakeEmbedder.directions.T).argmax(axis=1)
        rows.append((features.argmax(axis=1).tolist(), captions.tolist()))
        return fit(features, targets, quality)

    monkeypatch.setattr(smol, "fit_ridge", spy)
    return rows


def test_ridge_is_fitted_on_the_readable_training_pairs(world, config, fitted):
    evaluate.run(config)
    readable = TRAINED[:2] + TRAINED[3:]
    assert fitted == [(readable, readable)]


def test_limit_takes_fewer_rows(world, config, fitted, monkeypatch):
    config.limit = 1
    config.data.features = "somewhere"  # features of all images are more than is asked for
    monkeypatch.setattr(evaluation.train_data, "cache_features", None)
    result = evaluate.run(config)
    assert column(result, "Pictures", "i2t R@1")["chance"] == 100
    assert column(result, "Sentences", "R@1")["chance"] == 100
    assert "Pictures, unseen words" not in result["tables"]  # the one pair left is of seen words
    ((features, captions),) = fitted
    assert features == captions and len(features) == 9  # ten, one of them unreadable


def test_validation_recall_has_names_that_plots_know(world, tmp_path):
    pairs = evaluation.read_pairs(tmp_path / "data", "validation")
    model = FakeEmbedder(tmp_path / "stage2")
    assert world == ["validation"]
    assert evaluation.validation_recall(model, pairs) == {
        "validation/image_to_text_recall_at_1": 1.0,
        "validation/image_to_text_recall_at_10": 1.0,
        "validation/text_to_image_recall_at_1": 1.0,
        "validation/text_to_image_recall_at_10": 1.0,
    }


def test_matrices_show_the_models_alone(world, config, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        evaluate.report, "plot_cosine_matrices", lambda matrices, path: drawn.extend(matrices)
    )
    evaluate.run(config)
    assert [title for title, _ in drawn] == ["raw model", "after stage 2"]
    np.testing.assert_allclose(drawn[1][1], np.eye(8), atol=1e-6)


def test_ridge_reads_the_features_that_training_kept(world, config, monkeypatch):
    asked = []

    def cached(pairs, model, directory, *, variants):
        asked.append((len(pairs), model.kind, str(directory), variants))
        views = np.eye(WIDTH, dtype=np.float16)[TRAINED][:, None, None]
        return np.concatenate([views, np.zeros_like(views)], axis=1).repeat(2, axis=2)

    monkeypatch.setattr(evaluation.train_data, "cache_features", cached)
    config.data.features, config.data.variants = "somewhere", 2
    result = evaluate.run(config)
    assert asked == [(len(TRAINED), "raw", "somewhere", 2)]
    assert column(result, "Pictures", "i2t R@1")["ridge regression"] == 100


def test_unreadable_pictures_of_training_are_left_out(world, config, tmp_path):
    encoder = evaluation._Encoder(str(tmp_path / "stage2"), title="x", dtype="float32")
    pooled = encoder.pooled([png(4), b"broken", png(0)])
    assert pooled.any(axis=1).tolist() == [True, False, True]
    np.testing.assert_allclose(pooled[0], 2 * np.eye(WIDTH)[4])


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("output", "", "config.output is empty"),
        ("limit", -1, "config.limit=-1: must not be negative"),
        ("dtype", "int8", "config.dtype='int8': choose one of float32, bfloat16"),
        ("data.split", "train", "config.data.split='train': choose one of test, validation"),
        ("data.path", "/nowhere", "config.data.path=/nowhere: no such file or directory"),
        ("models.stage2", "/nowhere", "config.models.stage2=/nowhere: no such file"),
        ("teacher.path", "/nowhere", "config.teacher.path=/nowhere: no such file"),
        ("models.stage2", None, 'config.models.stage2=None: give "" to leave it out'),
        ("runs.align", "/nowhere", "config.runs.align=/nowhere: no such run directory"),
    ],
)
def test_impossible_values_are_refused_by_key(world, config, key, value, message):
    evaluate.validate(config)
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[last] = value
    with pytest.raises(UserError, match="^" + message.replace(".", r"\.")):
        evaluate.validate(config)


def test_a_model_must_be_named(world, config):
    config.models.raw = config.models.stage2 = ""
    with pytest.raises(UserError, match="config.models is all empty"):
        evaluate.validate(config)


def test_stages_stand_in_the_order_they_run():
    from ml_collections import ConfigDict

    models = ConfigDict({"align": "c", "mine": "e", "raw": "a", "stage2": "", "stage1": "b"})
    assert list(evaluation.in_order(models)) == ["raw", "stage1", "align", "mine"]


def test_heldout_sentences_measure_agreement_and_definitions(monkeypatch):
    meanings = ["n1 gloss", "n2 gloss", "n1 example", "n3 gloss", " gloss", "n3 example"]
    rows = [
        {"text": f"word {i}", "synset": row.split(" ")[0], "kind": row.split(" ")[1]}
        for i, row in enumerate(meanings)
    ]
    rng = np.random.default_rng(1)
    teacher, other = (smol.unit(x) for x in rng.normal(size=(2, 6, 4)).astype(np.float32))
    other[[0, 3]] = other[[2, 5]]  # definitions stand where their examples do
    fake = types.SimpleNamespace(embed=lambda texts, instruction=None: teacher)
    monkeypatch.setattr(sources, "split_sentences", lambda path, name: rows)
    with pytest.raises(UserError, match="teacher: no such directory"):
        evaluation.read_heldout("data", teacher="teacher")  # before a step is taken
    monkeypatch.setattr(evaluation.weights, "find", lambda path: path)
    loaded = []
    monkeypatch.setattr(
        evaluation.embedder, "load_weights", lambda found, dtype: loaded.append(found) or fake
    )
    heldout = evaluation.read_heldout("data", teacher="teacher")
    assert not loaded and (heldout.teacher == heldout.teacher).all() and loaded == ["teacher"]
    assert heldout.texts == [row["text"] for row in rows]
    assert heldout.couples.tolist() == [[0, 2], [3, 5]]
    monkeypatch.setattr(evaluation.metrics, "recall_at_k", _recall_at_1)
    same = evaluation.validation_sentences(fake, heldout)
    assert same["validation/spearman"] == pytest.approx(1)
    model = types.SimpleNamespace(embed=lambda texts: other)
    found = evaluation.validation_sentences(model, heldout)
    assert found["validation/definition_recall_at_10"] == 1
    assert abs(found["validation/spearman"]) < 0.9
    swapped = types.SimpleNamespace(embed=lambda texts: other[[3, 1, 2, 0, 4, 5]])
    found = evaluation.validation_sentences(swapped, heldout)
    assert found["validation/definition_recall_at_10"] == 0


def _recall_at_1(similarity, relevant, ks):
    """Stands for recall at 10, which two candidates always reach."""
    return {k: float(np.mean(similarity.argmax(1) == relevant)) for k in ks}
