"""MMEB's training sets: from published files to rows."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest

from unime_jax import prepare, runtime
from unime_jax.data import image_files, mmeb, mmeb_prepare, mmeb_sets, mmeb_synthetic
from unime_jax.data.prompts import Slotted
from unime_jax.types import UserError

ROWS = 16
LENIENT = mmeb_prepare.Settings(max_bad_share=0.5)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("mmeb")
    mmeb_synthetic.write(root, rows=ROWS, oddities=tuple(mmeb_synthetic.ODDITIES.values()))
    return root


def run(root, output, *more):
    source, images = root / "MMEB-train", root / "images"
    prepare.main(
        ["prepare", "mmeb", f"--source={source}", f"--images={images}", f"--output={output}", *more]
    )


@pytest.fixture(scope="module")
def prepared(root):
    run(root, root / "out", "--max-bad-share=0.5")
    return root / "out"


def one(root, output, name="CIRR", settings=LENIENT, **kwargs):
    return mmeb_prepare.prepare(
        name, root / "MMEB-train", root / "images", output, settings, **kwargs
    )


def published(root, name):
    import pyarrow.parquet

    (path,) = (root / "MMEB-train" / name).iterdir()
    return pyarrow.parquet.read_table(path).to_pylist()


def test_all_sets_with_their_sides(prepared):
    sets = mmeb.open_sets(prepared)
    assert [s.name for s in sets] == list(mmeb_sets.NAMES)
    expected = {"query": (True, False), "target": (False, True), "both": (True, True)}
    assert [s.has_image for s in sets] == [expected[s.sides] for s in mmeb_sets.SETS]
    assert sum(s.used for s in mmeb_sets.SETS) == pytest.approx(662_000, rel=1e-3)


@pytest.mark.parametrize("name", ["CIRR", "WebQA", "ImageNet_1K"])
def test_rows_come_back_as_published(root, prepared, name):
    rows = published(root, name)
    (found,) = mmeb.open_sets(prepared, [name])
    bad = [i for i, odd in mmeb_synthetic.ODDITIES.items() if odd.split()[0] not in
           ("image", "diverse")]  # fmt: skip
    good = [row for i, row in enumerate(rows) if i not in bad]
    assert len(found) == len(good) == ROWS - 4
    for example, row in zip(found.__getitems__(range(len(good))), good, strict=True):
        for text, image, key, path in (
            (example.query_text, example.query_image, "qry", "qry_image_path"),
            (example.target_text, example.target_image, "pos_text", "pos_image_path"),
        ):
            if row[path]:
                assert text == Slotted("", row[key].removeprefix("<|image_1|>"))
                assert image.load() == (root / "images" / row[path]).read_bytes()
            else:
                assert (text, image) == (row[key], None)
        assert example.set == name


def test_equal_targets_have_equal_keys(root, prepared):
    (memes,) = mmeb.open_sets(prepared, ["HatefulMemes"])
    examples = [memes[i] for i in range(len(memes))]
    assert len({e.target_text for e in examples}) == len({e.target_id for e in examples}) == 2
    # Row 11 shows the images of row 0; the target's text is the same for all rows.
    (cirr,) = mmeb.open_sets(prepared, ["CIRR"])
    ids = [cirr[i].target_id for i in range(len(cirr))]
    rows = [e for e in range(ROWS) if mmeb_synthetic.ODDITIES.get(e, "image").split()[0] in
            ("image", "diverse")]  # fmt: skip
    assert ids[rows.index(11)] == ids[0] and len(set(ids)) == len(ids) - 1


def test_what_is_left_out_is_counted_and_listed(prepared):
    summary = json.loads((prepared / "NIGHTS" / mmeb_prepare.SUMMARY).read_text())["summary"]
    assert summary == {
        "rows": ROWS, "pairs": ROWS - 4, "images": 2 * (ROWS - 5), "missing_images": 1,
        "unreadable_images": 1, "empty_pairs": 1, "refused_paths": 1, "repeated_images": 2,
    }  # fmt: skip
    lines = (prepared / "NIGHTS" / mmeb_prepare.SKIPPED).read_text().splitlines()
    found = {line["row"]: line["problem"] for line in map(json.loads, lines)}
    assert list(found) == [3, 5, 7, 9]
    assert "neither text nor image" in found[3] and "no such image" in found[5]
    assert "not a readable image" in found[7] and "leaves the image root" in found[9]


def test_a_path_out_of_the_root_is_never_read(root, tmp_path):
    source, images = mmeb_synthetic.write(tmp_path / "a" / "b", rows=2)
    (tmp_path / "a" / "images").mkdir()
    (tmp_path / "a" / "images" / "x.jpg").write_bytes(
        mmeb_synthetic.picture(np.random.default_rng(0), (8, 8))
    )
    for path in ("../../images/x.jpg", str(tmp_path / "a" / "images" / "x.jpg"), "..\\..\\x.jpg"):
        reader = mmeb_prepare._Reader(iter(()), image_files.Folder(images), LENIENT, None)
        assert "leaves the image root" in str(reader._load(path))


def test_images_may_be_links_below_a_wider_root(root, tmp_path):
    (tmp_path / "images").mkdir()
    for folder in (root / "images").iterdir():
        os.symlink(folder, tmp_path / "images" / folder.name)
    how = ["--sets=CIRR", "--max-bad-share=0.5"]
    source, output = f"--source={root / 'MMEB-train'}", f"--output={tmp_path / 'out'}"
    command = ["prepare", "mmeb", source, f"--images={tmp_path / 'images'}", output, *how]
    with pytest.raises(UserError, match="rows cannot be used, .*, the first: .* by a link to /"):
        prepare.main(command)
    (listed,) = (tmp_path / "out").glob("CIRR*.jsonl")
    assert "--image-root chooses another root" in listed.read_text()
    prepare.main([*command, f"--image-root={tmp_path.parent.parent}"])
    (found,) = mmeb.open_sets(tmp_path / "out", ["CIRR"])
    assert len(found) >= ROWS - 4


def test_too_many_bad_rows_stop_a_set(root, tmp_path):
    settings = mmeb_prepare.Settings(max_bad_share=0.2)
    with pytest.raises(UserError, match="CIRR: 4 of 16 rows cannot be used.*listed in (.*jsonl)"):
        one(root, tmp_path, settings=settings)
    assert [path.name for path in tmp_path.iterdir()] == ["CIRR.skipped.jsonl"]
    assert len((tmp_path / "CIRR.skipped.jsonl").read_text().splitlines()) == 4
    one(root, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["CIRR"]


def test_preparing_goes_on_where_it_stopped(root, tmp_path):
    output = tmp_path / "out"
    one(root, output, "NIGHTS")
    kept = (output / "NIGHTS" / mmeb_prepare.SUMMARY).stat().st_mtime_ns

    def stop(rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one(root, output, "CIRR", progress=stop)
    assert not mmeb_prepare._read_summary(output / "CIRR", {})
    assert [s.name for s in mmeb.open_sets(output)] == ["NIGHTS"]
    run(root, output, "--sets=CIRR,NIGHTS", "--max-bad-share=0.5")
    assert (output / "NIGHTS" / mmeb_prepare.SUMMARY).stat().st_mtime_ns == kept
    assert sorted(path.name for path in output.iterdir()) == ["CIRR", "NIGHTS"]
    one(root, output, "NIGHTS", mmeb_prepare.Settings(rows_per_set=3, max_bad_share=0.5))
    assert len(mmeb.open_sets(output, ["NIGHTS"])[0]) == 3


def test_a_set_stays_as_it_is_until_it_is_prepared_again(root, tmp_path, capsys):
    images, output = shutil.copytree(root / "images", tmp_path / "images"), tmp_path / "out"

    def run(*more):
        prepare.main(
            ["prepare", "mmeb", f"--source={root / 'MMEB-train'}", f"--images={images}",
             f"--output={output}", "--sets=NIGHTS", "--max-bad-share=0.6", *more]
        )  # fmt: skip
        (found,) = mmeb.open_sets(output, ["NIGHTS"])
        return len(found), found.fingerprint, capsys.readouterr().out

    rows, mark, said = run()
    assert rows == ROWS - 4 and "now:" not in said
    first, fifth, seventh, tenth = (published(root, "NIGHTS")[row] for row in (0, 5, 7, 10))
    for side in ("qry_image_path", "pos_image_path"):  # missing, and damaged
        for row in (fifth, seventh):
            shutil.copy(images / first[side], images / row[side])
    os.remove(images / tenth["pos_image_path"])
    rows, same, said = run()
    assert (rows, same) == (ROWS - 4, mark)
    assert "NIGHTS: images missing or damaged then that can be read now: 2; --sets NIGHTS" in said
    rows, other, said = run("--again")
    assert rows == ROWS - 3 and other != mark and "now:" not in said
    with pytest.raises(UserError, match=r"rows_per_set 50000 there, 3 now\): --again replaces it"):
        run("--rows-per-set=3")
    assert run()[:2] == (rows, other)
    with open(output / "NIGHTS" / mmeb_prepare.SKIPPED, "a") as file:
        file.write('3\n"x"\n{broken\n')
    assert run()[0] == ROWS - 3


def test_sets_of_other_rows_have_other_fingerprints(root, tmp_path):
    """Though there are as many of everything."""
    images, found = shutil.copytree(root / "images", tmp_path / "images"), []
    first, second = (images / published(root, "NIGHTS")[row]["qry_image_path"] for row in (0, 1))
    for output in ("a", "b", "again"):
        mmeb_prepare.prepare("NIGHTS", root / "MMEB-train", images, tmp_path / output, LENIENT)
        found += mmeb.open_sets(tmp_path / output, ["NIGHTS"])
        one, other = first.read_bytes(), second.read_bytes()
        first.write_bytes(other), second.write_bytes(one)
    a, b, again = (one.fingerprint for one in found)
    assert a == again != b


def test_rows_with_other_sides_are_a_part_of_their_own(root, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = published(root, "CIRR")[:3]
    rows[1]["qry"], rows[1]["qry_image_path"] = "words alone", ""
    (tmp_path / "s" / "CIRR").mkdir(parents=True)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / "s" / "CIRR" / "original.parquet"
    )
    mmeb_prepare.prepare("CIRR", tmp_path / "s", root / "images", tmp_path / "out", LENIENT)
    text, image = mmeb.open_sets(tmp_path / "out")
    assert (len(text), len(image)) == (1, 2)
    assert text[0].query_text == "words alone" and text[0].query_image is None
    assert [image[i].query_image is not None for i in (0, 1)] == [True, True]
    assert len(mmeb.open_sets(tmp_path / "out", rows_per_set=2)[1]) == 1


def test_files_not_as_published_are_named(root, prepared, tmp_path, capsys):
    def fails(*more, source=root / "MMEB-train"):
        with pytest.raises(SystemExit) as caught:
            runtime.run_entry(
                prepare.main,
                ["prepare", "mmeb", f"--source={source}", f"--images={root / 'images'}",
                 f"--output={tmp_path / 'out'}", *more],
            )  # fmt: skip
        assert caught.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "--sets 'Place365': choose among" in fails("--sets=CIRR,Place365")
    assert "--split 'test'" in fails("--split=test")
    assert "holds no diverse_instruction-*.parquet" in fails("--split=diverse_instruction")
    assert "no such directory" in fails(source=tmp_path / "none")
    copy = shutil.copytree(root / "MMEB-train" / "CIRR", tmp_path / "copy" / "CIRR")
    (file,) = copy.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-50])
    assert f"{file}: not a readable parquet file" in fails("--sets=CIRR", source=copy.parent)
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(root / "MMEB-train" / "CIRR" / file.name)
    pyarrow.parquet.write_table(table.drop_columns(["pos_text"]), file)
    assert "no column pos_text" in fails("--sets=CIRR", source=copy.parent)
    with pytest.raises(UserError, match="no set 'SUN'"):
        mmeb.open_sets(prepared, ["SUN"])


def test_sets_travel_to_other_processes(prepared):
    (found,) = mmeb.open_sets(prepared, ["NIGHTS"])
    before = found[1].query_image.load()
    copy = pickle.loads(pickle.dumps(found))
    assert copy[1].query_image.load() == before and len(pickle.dumps(found)) < 2000


def test_a_damaged_set_is_named(prepared, tmp_path):
    copy = shutil.copytree(prepared / "CIRR", tmp_path / "CIRR")
    (path,) = (copy / "pairs").rglob("*array_record*")
    path.write_bytes(path.read_bytes()[:100])
    (found,) = mmeb.open_sets(tmp_path)
    with pytest.raises(UserError, match="CIRR is damaged"):
        found[0]
