"""MMEB from the published files to the report, with models whose answers are known."""

import importlib.util
import json
import pathlib

import fake_models
import numpy as np
import pytest

from unime_jax.benchmarks import mmeb
from unime_jax.data import eval_synthetic
from unime_jax.evaluation import mmeb as mmeb_run
from unime_jax.evaluation import opening, page, store
from unime_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[2]
ODD = eval_synthetic.Oddities(empty_text=True, repeated=True, nulls=True)
SETTINGS = opening.Settings("phi3_v", "float32", {"prompt": "mmeb", "fusion": "together"})


def config_of(source, images, output, **changes):
    spec = importlib.util.spec_from_file_location("eval_mmeb", ROOT / "configs/eval_mmeb.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.model.path, config.data.path, config.images = "model", str(source), str(images)
    config.output = str(output)
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """All 36 sets with what is odd in them, and which item each query should find."""
    directory = tmp_path_factory.mktemp("mmeb_eval")
    candidates = {each.name: each.candidates for each in mmeb.SETS}
    source, images = eval_synthetic.write_mmeb(
        directory, candidates, queries=3, most_candidates=6, oddities=ODD
    )
    items, sets, problems = mmeb_run._read(config_of(source, images, directory))
    assert not problems and len(sets) == 36
    return source, images, items, sets


@pytest.fixture
def no_plots(monkeypatch):
    """Draws nothing: a second of every test."""
    for name in ("plot_groups", "plot_dumbbells", "plot_sheet", "plot_cosine_matrices"):
        monkeypatch.setattr(page.report, name, lambda *args, **kwargs: None)


def run(world, tmp_path, model, cache=None, **changes):
    source, images, _, _ = world
    config = config_of(source, images, tmp_path / "out", **changes)
    items, sets, problems = mmeb_run._read(config)
    encoder = fake_models.encoder_of(items, model, cache or tmp_path / "cache")
    found = mmeb_run.measure(config, encoder, items, sets, problems, SETTINGS)
    return found, encoder


def rights(world):
    _, _, items, sets = world
    pairs = [
        (int(query), int(found[0]))
        for rows in sets.values()
        for query, found in zip(rows.queries, rows.candidates, strict=True)
    ]
    return fake_models.oracle(items, pairs)


def test_an_oracle_scores_100_and_every_row_is_embedded_once(world, tmp_path, capsys):
    model = fake_models.FakeModel(rights(world))
    found, encoder = run(world, tmp_path, model)
    results = found["results"]
    assert {s["precision"] for s in results["sets"].values()} == {1.0}
    assert {m["precision"] for m in results["means"].values()} == {1.0}
    assert all(m["measured"] == m["sets"] for m in results["means"].values())
    assert not results["problems"]
    # One embedding per distinct item of the whole benchmark, and not one more.
    items = world[2]
    distinct = {
        fake_models.content_of(text, None if image is None else image.load())
        for item in items
        for text, image in [fake_models.RAW.rows(item)[0]]
    }
    assert len(model.seen) == len(set(model.seen)) == len(distinct) == encoder.embedded
    printed = capsys.readouterr().out
    assert "mean of 36" in printed and "UniME (Phi-3.5-V)" in printed
    for name in ("report.md", "tasks.png", "sets.png", "cosine.png", "sheet.png"):
        assert (tmp_path / "out" / name).is_file(), name
    lines = (tmp_path / "out/answers/CIRR.jsonl").read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[0])["hit"]


def test_a_constant_embedding_scores_0_and_its_ties_are_counted(world, tmp_path, no_plots):
    found, _ = run(world, tmp_path, fake_models.FakeModel(constant=True))
    sets = found["results"]["sets"]
    assert {s["precision"] for s in sets.values()} == {0.0}
    assert all(s["ties"] == s["scored"] == 3 for s in sets.values())


def test_a_run_that_was_cut_short_pays_for_the_rest_alone(world, tmp_path, no_plots, monkeypatch):
    monkeypatch.setattr(store, "FLUSH_ROWS", 16)
    whole = fake_models.FakeModel(rights(world))
    cut = fake_models.FakeModel(rights(world), stop_after=5)
    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path, cut, cache)
    assert len(cut.seen) == 80
    found, encoder = run(world, tmp_path, whole, cache)
    assert len(whole.seen) == encoder.rows - 80 and not set(whole.seen) & set(cut.seen)
    assert found["results"]["means"]["mean_of_36"]["precision"] == 1.0
    # And a third run, of a part, for nothing: the model is not even opened.
    found, encoder = run(world, tmp_path, None, cache, sets="grounding,N24News", limit=2)
    assert encoder.embedded == 0 and len(found["results"]["sets"]) == 5
    assert found["results"]["sets"]["N24News"]["scored"] == 2
    assert found["results"]["means"]["grounding"] == {"precision": 1.0, "measured": 4, "sets": 4}
    assert found["results"]["means"]["ind"]["measured"] == 2


def test_what_is_missing_is_told_and_the_rest_goes_on(tmp_path, no_plots):
    names = {"N24News": 24, "CIRR": 8, "MSCOCO_i2t": 8, "EDIS": 8, "GQA": 8}
    source, images = eval_synthetic.write_mmeb(
        tmp_path,
        names,
        queries=4,
        most_candidates=6,
        oddities=eval_synthetic.Oddities(missing_image=True, damaged_image=True),
    )
    (source / "EDIS" / "test-00000-of-00001.parquet").write_bytes(b"PAR1 broken")
    config = config_of(source, images, tmp_path / "out")
    items, sets, problems = mmeb_run._read(config)
    assert "EDIS" in problems and "not a readable parquet" in problems["EDIS"]
    assert "not in" in problems["OVEN"] and len(problems) == 32
    encoder = fake_models.encoder_of(items, fake_models.FakeModel(), tmp_path / "cache")
    found = mmeb_run.measure(config, encoder, items, sets, problems, SETTINGS)["results"]
    # Queries 1 and 2 of sets with images on the query's side have none.
    assert found["sets"]["N24News"]["left_out"] == 2 and found["sets"]["N24News"]["scored"] == 2
    assert found["sets"]["CIRR"]["dropped_candidates"] > 0
    first = found["sets"]["MSCOCO_i2t"]["first_problems"]
    assert any("no such image" in reason for reason in first.values())
    assert any("not a readable image" in reason for reason in first.values())
    text = (tmp_path / "out/report.md").read_text()
    assert "What is missing" in text and "OVEN" in text and "sets measured" in text


def test_a_mean_of_which_something_is_missing_has_no_difference(world, tmp_path, no_plots):
    def gaps(oracle):
        found, _ = run(world, tmp_path, oracle, cache=tmp_path / str(len(list(tmp_path.iterdir()))))
        rows = found["tables"]["MMEB"]
        return next(row for row in rows if "difference" in row["row"])

    whole, item = fake_models.FakeModel(rights(world)), world[2][int(world[3]["GQA"].queries[0])]
    assert "-" not in gaps(whole).values()
    ((text, image),) = fake_models.RAW.rows(item)
    said, direction = fake_models.content_of(text, image.load()), whole.direction
    whole.direction = lambda words: direction(words) * (np.nan if words == said else 1)
    found = gaps(whole)
    absent = {name for name, value in found.items() if value == "-"}
    assert absent == {"VQA", "OOD", "mean of 4", "mean of 36"}
    assert "no vector: GQA." in (tmp_path / "out/report.md").read_text()


def test_no_image_at_all_is_told_with_where_they_are_looked_for(tmp_path):
    source, _ = eval_synthetic.write_mmeb(tmp_path, {"NIGHTS": 8}, queries=2, most_candidates=4)
    config = config_of(source, tmp_path / "elsewhere", tmp_path / "out", sets="NIGHTS")
    items, sets, problems = mmeb_run._read(config)
    encoder = fake_models.encoder_of(items, fake_models.FakeModel(), tmp_path / "cache")
    found = mmeb_run.measure(config, encoder, items, sets, problems, SETTINGS)
    assert "elsewhere" in found["results"]["problems"]["NIGHTS"]
    assert np.isnan(found["results"]["sets"]["NIGHTS"]["precision"] or np.nan)


def test_a_directory_without_sets_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="config.data.path=.*no set of MMEB-eval in it"):
        mmeb_run._read(config_of(tmp_path, tmp_path / "images", tmp_path / "out"))
