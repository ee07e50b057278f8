"""What reads rows that others wrote: of training and evaluation, with pictures, and vectors."""

import contextlib
import json
import pathlib
import shutil

import numpy as np
import packages
from reader import Reader

from unime_jax import tiny
from unime_jax.data import (
    caption_sets,
    items,
    mmeb_eval,
    nli,
    pictures,
    sources,
    task_pairs,
    teacher_vectors,
    vector_files,
)
from unime_jax.data.eval_items import ImageFolder, Items

_loaded = 0  # pictures that rows have named


def _write_pictures(directory: pathlib.Path) -> None:
    for number in range(2):
        (directory / f"{number}.png").write_bytes(packages.png(size=(5 + number, 4)))


def _write_lines(directory: pathlib.Path) -> None:
    _write_pictures(directory)
    rows = [{"id": i, "text": f"tëxt {i}", "image": f"{i % 2}.png"} for i in range(4)]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (directory / "rows.jsonl").write_text(text, encoding="utf-8")


def _read_lines(directory: pathlib.Path):
    source = items.Input(str(directory / "rows.jsonl"))
    assert source.count() is not None
    for entry in source:
        assert entry.digest
        if entry.image is not None and not entry.fault:
            _look(lambda image=entry.image: image)
    faults: list[str] = []
    found = sources.pairs(directory / "rows.jsonl", faults=faults)
    _load_all(found[i].query_image for i in range(len(found)))


def _load_all(images):
    for image in images:
        if image is not None:
            _look(image.load)


def _look(load):
    from unime_jax.types import UserError

    global _loaded
    with contextlib.suppress(UserError):
        pictures.size_of(load())
        _loaded += 1


def pictures_loaded(directory: pathlib.Path, reader: Reader) -> int:
    """Reads a directory; returns how many pictures its rows named and had."""
    before = _loaded
    reader.read(directory)
    return _loaded - before


def _task_rows() -> list[dict]:
    return [
        {
            "query_text": f"<|image_1|> what {i}?",
            "query_image": f"{i % 2}.png",
            "target_text": f"answer {i}",
            "target_image": None,
            "set": "a",
            "hard_negatives": [["no", ""], ["", "1.png"]],
            "hard_negatives_scores": [0.5, 0.25],
            "query_pos_scores": 0.75,
        }
        for i in range(4)
    ]


def _write_tasks(directory: pathlib.Path) -> None:
    import pyarrow
    import pyarrow.parquet

    _write_pictures(directory)
    rows = _task_rows()
    (directory / "rows.json").write_text(json.dumps(rows))
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), directory / "rows.parquet")


def _read_tasks(directory: pathlib.Path):
    from unime_jax.types import UserError

    for name in ("rows.json", "rows.jsonl", "rows.parquet"):
        for judged in (0, 3):
            try:
                found = task_pairs.read(directory / name, judged=judged, faults=[])
            except UserError:
                continue
            for part in found:
                rows = [part[i] for i in range(len(part))]
                _load_all(row.query_image for row in rows)


def _write_csv(directory: pathlib.Path) -> None:
    shutil.copy(tiny.nli() / "nli.csv" if tiny.nli().is_dir() else tiny.nli(), directory)


def _read_csv(directory: pathlib.Path):
    found = nli.read(directory / "nli.csv", faults=[])
    [found.sentences[int(i)] for i in found.rows[0]]


def _write_parquet(directory: pathlib.Path) -> None:
    import pyarrow
    import pyarrow.parquet

    images = [{"bytes": packages.png(), "path": f"{i}.png"} for i in range(6)]
    table = pyarrow.table({"id": range(6), "text": [f"tëxt {i}" for i in range(6)],
                           "image": images})  # fmt: skip
    pyarrow.parquet.write_table(table, directory / "rows.parquet", row_group_size=3)


def _read_parquet(directory: pathlib.Path):
    for entry in items.Input(str(directory / "rows.parquet")):
        assert entry.digest


def _read_captions(directory: pathlib.Path):
    numbered = Items()
    caption_sets.read_parquet(directory, numbered)
    _load_all(item.image for item in numbered)


def _write_mmeb(directory: pathlib.Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {
            "qry_text": f"q {i}",
            "qry_img_path": f"{i}.png" if i % 2 else "",
            "tgt_text": ["a", f"b {i}"],
            "tgt_img_path": ["", ""],
        }
        for i in range(5)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), directory / "test.parquet")


def _read_mmeb(directory: pathlib.Path):
    numbered = Items()
    mmeb_eval.read([directory / "test.parquet"], numbered, ImageFolder(directory))
    _load_all(item.image for item in numbered)


# ---------------------------------------------------------------- vectors


class _Rows:
    rows = np.array([0, 2, 3])
    width, dtype = 4, np.dtype("float32")

    def vectors(self):
        yield np.eye(4, dtype=np.float32)[:3]

    def strings(self, name):
        yield [f"{name} ä {i}" for i in range(3)]


def _vectors(suffix: str, *others: str) -> Reader:
    def write(directory: pathlib.Path) -> None:
        vector_files.write(directory / f"v{suffix}", _Rows(), {"model": "x", "rows": 4})

    def read(directory: pathlib.Path):
        vector_files.read_about(directory / f"v{suffix}")
        found = vector_files.read(directory / f"v{suffix}")
        assert len(found.vectors) == len(found.rows) == len(found.ids)

    return Reader(write, (f"v{suffix}", *others), read)


def _write_teacher(directory: pathlib.Path) -> None:
    shutil.copytree(tiny.vectors(), directory, dirs_exist_ok=True)


def _read_teacher(directory: pathlib.Path):
    found, _ = teacher_vectors.read(directory)
    found[np.arange(min(3, len(found)))]


READERS: dict[str, Reader] = {
    "JSON lines": Reader(_write_lines, ("rows.jsonl",), _read_lines),
    "task pairs": Reader(_write_tasks, ("rows.json", "rows.jsonl", "rows.parquet"), _read_tasks),
    "csv": Reader(_write_csv, ("nli.csv",), _read_csv),
    "Parquet": Reader(_write_parquet, ("rows.parquet",), _read_parquet),
    "Parquet, captions": Reader(_write_parquet, ("rows.parquet",), _read_captions),
    "Parquet, MMEB": Reader(_write_mmeb, ("test.parquet",), _read_mmeb),
    "vectors, npz": _vectors(".npz"),
    "vectors, npy": _vectors(".npy", "v.npy.items.jsonl"),
    "vectors, Parquet": _vectors(".parquet"),
    "vectors, safetensors": _vectors(".safetensors"),
    "teacher's vectors": Reader(
        _write_teacher, ("manifest.json", "vectors-00000.npy"), _read_teacher
    ),
}
