"""What a run names is looked at before its model is loaded: nothing is read, nothing written."""

import json
import re

import miniature
import packages
import pytest

from unime_jax import config as config_lib
from unime_jax import runtime, train, train_checks
from unime_jax.types import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A file or directory of each kind of data, as far as they are looked at."""
    root = tmp_path_factory.mktemp("checks")
    packages.jsonl(root, 2)
    files = ("tasks.json", "nli.csv", "x.tsv", "mmeb/CIRR/prepared.json",
             "mmeb/NIGHTS/prepared.json", "smol/smol_pairs/1.0.0/dataset_info.json",
             "adapter/adapter_config.json", "run/run.json")  # fmt: skip
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
    (root / "tasks.jsonl").write_text(json.dumps({"query_text": "a", "target_text": "b"}))
    (root / "base").mkdir()
    return root


def settings(root, **changes):
    c = config_lib.base_config()
    c.output, c.model.path, c.teacher.vectors = str(root / "out"), str(root), str(root)
    for key, value in changes.items():
        section, _, leaf = key.rpartition("__")
        (c[section] if section else c)[leaf] = value
    config_lib.validate_train(c)
    return c.to_dict()


KINDS = {
    "pairs.jsonl": "pairs", "tasks.jsonl": "tasks", "tasks.json": "tasks", "nli.csv": "nli",
    "smol": "smol", "mmeb": "mmeb",
}  # fmt: skip


def test_every_kind_of_data_goes_with_its_stages(root):
    expected = {
        "distill": {"pairs", "nli", "smol"},
        "align": {"pairs", "smol"},
        "contrast": set(KINDS.values()),
        "judge": {"tasks"},
    }
    for stage, good in expected.items():
        for name, kind in KINDS.items():
            k = 8 * (stage == "judge")
            found = settings(root, stage=stage, data__path=str(root / name), loss__k=k)
            if kind in good:
                assert train_checks.check_data(found) == kind
            else:
                with pytest.raises(UserError, match=f"config.data.path=.*{name}: .*(need|read)s "):
                    train_checks.check_data(found)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("x.tsv", {}, r"x.tsv: no training data; give .*\.parquet\), nli_for.*prepare smol"),
        ("base", {}, "base: no training data; give "),
        ("mmeb", {"data.sets": "CIRR,ChartQA"}, "no set 'ChartQA', only CIRR, NIGHTS; prepare"),
        ("pairs.jsonl", {"data.sets": "CIRR"}, "data.sets=CIRR: .*jsonl holds no sets of MMEB"),
        ("nli.csv", {}, "loss.k=8: rows of .*nli.csv bring their own negatives"),
        ("mmeb", {"data.features": "f"}, "cached features need plain image-caption pairs"),
        ("pairs.jsonl", {"eval.every_steps": 2}, "no held-out part; set .*=0, or .*smol --pairs"),
        ("mmeb", {"eval.every_steps": 2}, "every_steps=2: .*mmeb has no held-out part; set .*=0$"),
        ("smol", {"data.images": "/nope"}, "config.data.images=/nope: no such directory"),
        ("smol", {"data.image_root": "/nope"}, "config.data.image_root=/nope: no such directory"),
        ("smol", {"init_from": "/nope"}, "config.init_from=/nope: no such file or directory"),
        ("smol", {"init_from": "base"}, "init_from=base: neither a training run nor a PEFT adap"),
        ("smol", {"init_from": "run"}, "init_from=run: no checkpoint there yet"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_made(
    root, name, changes, message, monkeypatch, capsys
):
    monkeypatch.chdir(root)
    monkeypatch.setattr(runtime, "start", None)
    values = {"output": "out", "model.path": "base", "data.path": name, "data.features": "",
              "eval.every_steps": 0, **changes}  # fmt: skip
    file = miniature.ROOT / "configs" / "smol_stage2.py"
    flags = [f"--config.{key}={value}" for key, value in values.items()]
    with pytest.raises(SystemExit) as caught:
        runtime.run_entry(train.main, ["train", f"--config={file}", *flags])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(message, said.strip()), said
    assert not (root / "out").exists()


def test_what_fits_passes(root):
    for changes in (
        {"data__path": str(root / "smol"), "eval__every_steps": 2},
        {"data__path": str(root / "mmeb"), "data__sets": ("CIRR,NIGHTS",)},
        {
            "data__path": str(root / "pairs.jsonl"),
            "data__directions": ("image_to_text,text_to_image",),
        },
        {"data__path": str(root / "smol"), "init_from": str(root / "adapter")},
    ):
        train_checks.check_run(settings(root, **changes))


def test_a_run_that_has_begun_needs_no_longer_what_it_began_from(root, tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "run.json").write_text("{}")
    begun = settings(root, data__path=str(root / "smol"), output=str(tmp_path), init_from="/gone")
    train_checks.check_run(begun)
