"""Zero-shot retrieval and `compare`, with models whose answers are known."""

import importlib.util
import json
import pathlib

import fake_models
import pytest
from ml_collections import ConfigDict

from unime_jax import evaluate
from unime_jax.benchmarks import mmeb
from unime_jax.config import evaluation_config
from unime_jax.data import eval_synthetic
from unime_jax.evaluation import compare, opening, page, published, retrieval
from unime_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = opening.Settings("phi3_v", "float32", {"prompt": "phi35v_eval", "fusion": "together"})
PLAIN = fake_models.Wording(raw=False)


def config_of(path, output, **changes):
    spec = importlib.util.spec_from_file_location("eval_ret", ROOT / "configs/eval_retrieval.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.model.path, config.data.path, config.output = "model", str(path), str(output)
    config.update(changes)
    return config


def run(path, tmp_path, *, constant=False, **changes):
    config = config_of(path, tmp_path / "out", **changes)
    items, sets, problems = retrieval.read(config)
    pairs = []
    for data in sets.values():
        if isinstance(data, dict):
            pairs += [p for t in data.values() for p in zip(t.captions, t.images, strict=True)]
        else:
            pairs += zip(data.captions, data.images[data.owner], strict=True)
    readable = [
        (c, i) for c, i in pairs if items[i].image.file is None or items[i].image.file.is_file()
    ]
    model = fake_models.FakeModel(fake_models.oracle(items, readable, PLAIN), constant=constant)
    encoder = fake_models.encoder_of(items, model, tmp_path / "cache", PLAIN)
    found = retrieval.measure(config, encoder, items, sets, problems, SETTINGS)
    return found["results"], encoder, model


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    return eval_synthetic.write_captions(tmp_path_factory.mktemp("captions"), images=5)


def test_an_oracle_finds_all_and_embeds_every_row_once(captions, tmp_path):
    found, encoder, model = run(captions, tmp_path)
    assert list(found["sets"]) == ["flickr30k", "coco", "sharegpt4v", "urban1k"]
    for name, each in found["sets"].items():
        for way in ("text_to_image", "image_to_text"):
            assert set(each[way]["recall"].values()) == {1.0}, (name, way)
    assert found["sets"]["coco"]["text_to_image"]["scored"] == 25
    assert found["sets"]["coco"]["image_to_text"]["candidates"] == 25
    assert set(found["sugarcrepe"]["means"].values()) == {1.0}
    assert found["means"] == {"short": 1.0, "long": 1.0, "compositional": 1.0}
    assert len(model.seen) == len(set(model.seen)) == encoder.rows
    for name in ("retrieval.png", "cosine.png", "sheet.png", "report.md"):
        assert (tmp_path / "out" / name).is_file(), name
    text = (tmp_path / "out/report.md").read_text()
    assert "difference" in text and "both stages (Phi-3.5-V)" in text
    path = compare.compare([str(tmp_path / "out"), f"again={tmp_path / 'out'}"], tmp_path / "both")
    rows = json.loads(path.with_suffix(".json").read_text())["tables"]["Retrieval"]
    assert [row["score"] for row in rows][:2] == ["Flickr30K t2i", "Flickr30K i2t"]
    assert len(rows) == 11 and {row["again minus out"] for row in rows} == {"+0.0"}
    assert rows[-1]["UniME (Phi-3.5-V)"] == 93.3


def test_a_constant_embedding_finds_nothing(captions, tmp_path, monkeypatch):
    for name in ("plot_groups", "plot_sheet", "plot_cosine_matrices"):
        monkeypatch.setattr(page.report, name, lambda *args, **kwargs: None)
    found, _, _ = run(captions, tmp_path, constant=True)
    for each in found["sets"].values():
        # With 5 images the right one is always among the first 5 places but for ties.
        assert each["text_to_image"]["recall"]["1"] == each["image_to_text"]["recall"]["1"] == 0
        assert each["text_to_image"]["ties"] == each["text_to_image"]["scored"]
    assert set(found["sugarcrepe"]["means"].values()) == {0.0}


def test_missing_sets_files_and_images_are_told(tmp_path, monkeypatch):
    for name in ("plot_groups", "plot_sheet", "plot_cosine_matrices"):
        monkeypatch.setattr(page.report, name, lambda *args, **kwargs: None)
    path = eval_synthetic.write_captions(tmp_path / "data", images=4)
    (path / "flickr30k_test" / "test-00000-of-00001.parquet").unlink()
    (path / "Urban1k" / "image" / "2.jpg").unlink()
    (path / "sugar_crepe" / "swap_att.json").unlink()
    (path / "val2017" / "000000000001.jpg").unlink()
    found, _, _ = run(path, tmp_path)
    assert "no parquet files" in found["problems"]["flickr30k"]
    assert "no such file" in found["problems"]["sugarcrepe swap_att"]
    urban = found["sets"]["urban1k"]
    assert [urban[way]["left_out"] for way in ("text_to_image", "image_to_text")] == [1, 1]
    assert urban["text_to_image"]["recall"]["1"] == 1.0
    assert found["sugarcrepe"]["files"]["add_obj"]["left_out"] == 1
    assert set(found["sugarcrepe"]["means"]) == {"replace", "add"}
    assert set(found["means"]) == {"long"}
    text = (tmp_path / "out/report.md").read_text()
    assert "urban1k: 1 items without a vector" in text
    rows = json.loads((tmp_path / "out/report.json").read_text())["tables"]["Captions and images"]
    gaps = {row["set"]: row["difference"] for row in rows}
    assert gaps["Urban1K"] == "-" != gaps["COCO"]
    assert "Not comparable, for some of their items have no vector: Urban1K." in text
    means = text.partition("## Means")[2].partition("\n## ")[0]
    assert "Not comparable, for some of their items have no vector: long." in means
    with pytest.raises(UserError, match="none of the sets is there"):
        retrieval.read(config_of(tmp_path / "out", tmp_path))


def test_the_directory_of_one_set_may_be_given(captions, tmp_path, monkeypatch):
    listing = pathlib.Path.iterdir

    def iterdir(path):
        if path == captions:
            raise PermissionError(13, "Permission denied")
        return listing(path)

    monkeypatch.setattr(pathlib.Path, "iterdir", iterdir)
    _, sets, _ = retrieval.read(config_of(captions / "coco_test", tmp_path))
    assert list(sets) == ["coco"]
    with pytest.raises(UserError, match="cannot be listed .Permission denied"):
        retrieval.read(config_of(captions, tmp_path))


def mmeb_report(directory, value: float, sets, **changes):
    directory.mkdir(parents=True)
    records = {name: {"precision": value} for name in sets}
    means = mmeb.means({name: value for name in sets})
    content = {
        "model": str(directory),
        "limit": 0,
        "settings": {"model_type": "phi3_v"},
        "results": {
            "benchmark": "mmeb",
            "sets": records,
            "means": {
                name: {"precision": m.value if m.measured else None, "measured": m.measured,
                       "sets": m.sets}
                for name, m in means.items()
            },
            "pairs": {"MSCOCO_i2t": [[value, 0.0], [0.0, value]]},
        },
        **changes,
    }  # fmt: skip
    (directory / "report.json").write_text(json.dumps(content))
    return str(directory)


def test_runs_are_compared_side_by_side_with_the_published_rows(tmp_path, capsys):
    names = [each.name for each in mmeb.SETS]
    before = mmeb_report(tmp_path / "a/eval", 0.25, names)
    after = mmeb_report(tmp_path / "b/eval", 0.5, names[:20])
    evaluate.main(["x", "compare", before, f"tuned={after}", "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    lines = {line.split("  ")[0].strip() or line.strip() for line in printed.splitlines()}
    assert {"eval", "tuned", "UniME (Phi-3.5-V)"} <= lines
    summary = json.loads((tmp_path / "out/report.json").read_text())["tables"]
    gap = next(row for row in summary["MMEB"] if row["row"].strip() == "tuned minus eval")
    assert gap["mean of 36"] == "+25.0" and gap["Grd"] == "-"  # of the sets that both have
    assert summary["Sets"][0]["difference"] == "+25.0"
    for name in ("tasks.png", "sets.png", "cosine.png"):
        assert (tmp_path / "out" / name).is_file()


def test_what_was_scored_on_other_items_has_no_difference(tmp_path, captions, monkeypatch):
    for name in ("plot_groups", "plot_dumbbells", "plot_sheet", "plot_cosine_matrices"):
        monkeypatch.setattr(page.report, name, lambda *args, **kwargs: None)
    whole = mmeb_report(tmp_path / "a", 0.5, ["GQA", "CIRR"])
    part = mmeb_report(tmp_path / "lr=1e-4", 0.75, ["GQA", "CIRR"])
    file = tmp_path / "lr=1e-4" / "report.json"
    content = json.loads(file.read_text())
    content["results"]["sets"]["GQA"] |= {"precision": 1.0, "left_out": 3}
    file.write_text(json.dumps(content))
    path = compare.compare([whole, part], tmp_path / "out")
    tables = json.loads(path.with_suffix(".json").read_text())["tables"]
    assert {row["set"]: row["difference"] for row in tables["Sets"]} == {
        "GQA": "-",
        "CIRR": "+25.0",
    }
    gap = next(row for row in tables["MMEB"] if "lr=1e-4 minus" in row["row"])
    assert gap["mean of 36"] == "+25.0" and "no vector: GQA." in path.read_text()
    run(captions, tmp_path / "b")
    (tmp_path / "c").mkdir()
    content = json.loads((tmp_path / "b/out/report.json").read_text())
    content["results"]["sets"]["coco"]["image_to_text"]["dropped_candidates"] = 1
    (tmp_path / "c/report.json").write_text(json.dumps(content))
    path = compare.compare([f"b={tmp_path / 'b/out'}", f"c={tmp_path / 'c'}"], tmp_path / "both")
    rows = json.loads(path.with_suffix(".json").read_text())["tables"]["Retrieval"]
    gaps = {row["score"]: row["c minus b"] for row in rows}
    assert gaps["COCO i2t"] == "-" and gaps["COCO t2i"] == gaps["SugarCrepe add"] == "+0.0"


def test_runs_that_cannot_be_compared_are_named(tmp_path):
    run_a = mmeb_report(tmp_path / "a", 0.5, ["GQA"])
    other = mmeb_report(tmp_path / "b", 0.5, ["GQA"])
    content = json.loads((tmp_path / "b/report.json").read_text())
    content["results"] |= {"benchmark": "retrieval", "sugarcrepe": {"means": {}, "files": {}}}
    (tmp_path / "b/report.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="runs of mmeb and retrieval"):
        compare.compare([run_a, other], tmp_path / "out")
    with pytest.raises(UserError, match="no report.json there"):
        compare.compare([str(tmp_path)], tmp_path / "out")
    with pytest.raises(UserError, match="^--output=.*report.json is no directory"):
        compare.compare([run_a], tmp_path / "a" / "report.json")
    with pytest.raises(UserError, match="two runs are called x"):
        compare.compare([f"x={run_a}", f"x={other}"], tmp_path / "out")
    with pytest.raises(UserError, match="RUN; `python -m unime_jax.evaluate compare --help`"):
        evaluate.main(["x", "compare"])
    del content["results"]["means"]
    content["results"]["benchmark"] = "mmeb"
    (tmp_path / "b/report.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="b/report.json: not the report .*lacks means"):
        compare.compare([run_a, other], tmp_path / "out")
    for named in ({"results": {"benchmark": "smol"}}, {"title": "smol"}):
        (tmp_path / "b/report.json").write_text(json.dumps(named))
        with pytest.raises(UserError, match="the report of 'smol', not of MMEB or of retrieval$"):
            compare.compare([run_a, other], tmp_path / "out")


def test_runs_without_any_score_are_compared(tmp_path, capsys):
    runs = [mmeb_report(tmp_path / name, 0.0, []) for name in "ab"]
    compare.compare(runs, tmp_path / "out")
    assert "0/36" in capsys.readouterr().out
    compare.compare([runs[0], mmeb_report(tmp_path / "c", 0.5, ["GQA"]), runs[1]], tmp_path / "out")
    assert "50.0" in capsys.readouterr().out and not (tmp_path / "out" / "sets.png").exists()


def test_a_comparison_replaces_no_evaluation(tmp_path):
    runs = [mmeb_report(tmp_path / name, 0.5, ["GQA"]) for name in "ab"]
    for output in (runs[1], mmeb_report(tmp_path / "c", 0.5, [])):
        before = (pathlib.Path(output) / "report.json").read_text()
        with pytest.raises(UserError, match="report.json is no comparison's; name another dir"):
            compare.compare(runs, output)
        assert (pathlib.Path(output) / "report.json").read_text() == before
    (tmp_path / "smol").mkdir()
    for content in ('{"title": "UniME", "models": {}, "split": "test", "tables": {}}', "5", "null",
                    "{", "[]"):  # fmt: skip
        (tmp_path / "smol" / "report.json").write_text(content)
        with pytest.raises(UserError, match="--output=.*smol: its report.json is no comparison's"):
            compare.compare(runs, tmp_path / "smol")
        assert (tmp_path / "smol" / "report.json").read_text() == content
    for _ in range(2):  # a comparison is replaced
        compare.compare(runs, tmp_path / "out")


def test_directories_are_looked_for_before_any_work(captions, tmp_path):
    (tmp_path / "file").touch()
    assert evaluation_config().image_root == ""  # of configurations from before there was the key
    for key in ("image_root", "images", "data.path", "output", "cache"):
        config = config_of(captions, tmp_path / "out")
        config.update_from_flattened_dict({key: str(tmp_path / "file")})
        with pytest.raises(UserError, match=f"^config.{key}=.*directory"):
            retrieval.validate(config)


def test_keys_that_are_missing_new_or_none_are_named(captions, tmp_path):
    config = config_of(captions, tmp_path / "out")
    for changes, said in (
        (
            {"data": {"path": str(captions)}},
            r"config\.data lacks fusion, .*, prompt: set keys one by",
        ),
        ({"mesh": {"data": 1}}, r"config\.mesh lacks fsdp, tensor: set keys one by one"),
        ({"lmit": 3}, r"config\.lmit: no such key; did you mean config\.limit\?$"),
        ({"limit": None}, r"config\.limit=None: give an integer$"),
        ({"sets": None}, r"config\.sets=None: give a string$"),
    ):
        with pytest.raises(UserError, match=f"^{said}"):
            retrieval.validate(ConfigDict({**config.to_dict(), **changes}))
    with pytest.raises(UserError, match="^config lacks before, cache"):
        retrieval.validate(ConfigDict({"benchmark": "retrieval"}))


def test_commas_alone_name_no_sets(captions, tmp_path):
    with pytest.raises(UserError, match="^config.sets=', ': names no set"):
        retrieval.validate(config_of(captions, tmp_path / "out", sets=", "))
    with pytest.raises(UserError, match="^config.before=x: is for MMEB"):
        retrieval.validate(config_of(captions, tmp_path / "out", before="x"))


def test_published_rows_are_the_papers():
    """Their means agree with the numbers that they are means of, to rounding."""
    for row in published.rows("mmeb"):
        tasks = [row[task] for task in mmeb.TASKS]
        assert sum(tasks) / 4 == pytest.approx(row["mean_of_4"], abs=0.1), row["name"]
        by_size = (10 * tasks[0] + 10 * tasks[1] + 12 * tasks[2] + 4 * tasks[3]) / 36
        assert by_size == pytest.approx(row["mean_of_36"], abs=0.3), row["name"]
        by_source = (20 * row["ind"] + 16 * row["ood"]) / 36
        assert by_source == pytest.approx(row["mean_of_36"], abs=0.3), row["name"]
    both = published.rows("ablation")[-1]
    row = published.rows("retrieval", "phi3_v")[0]
    short = [row[name][way] for name in ("flickr30k", "coco") for way in row["coco"]]
    assert sum(short) / 4 == pytest.approx(both["short"], abs=0.06)
    assert sum(row["sugarcrepe"].values()) / 3 == pytest.approx(both["compositional"], abs=0.06)
    assert published.rival("mmeb", "unime_smol") is None
    assert len(published.rows("mmeb", "unime_smol")) == 7


def test_short_flags_stand_for_keys_of_the_config():
    argv = evaluate._expanded(["x", "--sets", "A,B", "--limit=5", "--config", "c.py"])
    assert argv == ["x", "--config.sets=A,B", "--config.limit=5", "--config", "c.py"]
    with pytest.raises(UserError, match="--limit needs a value"):
        evaluate._expanded(["x", "--limit"])
