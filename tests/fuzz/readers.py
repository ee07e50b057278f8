"""What reads files that others wrote, each called as the package calls it."""

import contextlib
import dataclasses
import io
import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import packages
import parity
from PIL import Image

from unime_jax import tiny
from unime_jax.data import (
    assets,
    caption_sets,
    items,
    mmeb_eval,
    nli,
    pictures,
    processor_files,
    smol_student,
    sources,
    task_pairs,
    teacher_vectors,
    tokenizer,
    torch_file,
    vector_files,
)
from unime_jax.data.eval_items import ImageFolder, Items
from unime_jax.data.prompts import Segment


@dataclasses.dataclass(frozen=True)
class Reader:
    """A way into the package.

    Attributes:
      write: fills a directory with good files.
      damaged: names of those that are damaged, one at a time.
      read: reads the directory.
    """

    write: Callable[[pathlib.Path], None]
    damaged: tuple[str, ...]
    read: Callable[[pathlib.Path], object]


_loaded = 0  # pictures that rows have named


# ---------------------------------------------------------------- models


def _write_model(directory: pathlib.Path, name: str = "llava16") -> None:
    shutil.copytree(tiny.backbone(name), directory, dirs_exist_ok=True)


def _read_model(directory: pathlib.Path):
    from unime_jax import models, weights

    found = weights.find(directory)
    models.load(found.directory, fill=found.fill)
    _read_tokenizer(directory)


def _read_tokenizer(directory: pathlib.Path):
    found = tokenizer.Tokenizer(directory, image_token=260)
    segments = [Segment("prompt", "<s> [INST] "), Segment("image"), Segment("text", "a </s> cat")]
    ids, start, stop = found.encode(segments, -1)
    [found.text_of(id) for id in ids if id >= 0]


def _write_shards(directory: pathlib.Path) -> None:
    import safetensors.numpy

    _write_model(directory, "nv_embed")
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = {key: f"part-{i % 2}.safetensors" for i, key in enumerate(sorted(tensors))}
    for name in set(names.values()):
        part = {key: tensors[key] for key in tensors if names[key] == name}
        safetensors.numpy.save_file(part, directory / name)
    index = {"metadata": {}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_adapter(directory: pathlib.Path) -> None:
    import safetensors.numpy

    rng = np.random.default_rng(0)
    base = tiny.backbone("nv_embed")
    prefix = "base_model.model.embedding_model.layers.{}.self_attn.q_proj"
    tensors = {}
    for layer in range(2):
        name = prefix.format(layer)
        tensors[f"{name}.lora_A.weight"] = rng.normal(size=(3 + layer, 64)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.normal(size=(64, 3 + layer)).astype(np.float32)
        tensors[f"{name}.lora_magnitude_vector"] = np.ones(64, np.float32)
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": 3,
        "lora_alpha": 6,
        "lora_dropout": 0.1,
        "use_dora": True,
        "use_rslora": False,
        "bias": "none",
        "target_modules": ["q_proj"],
        "modules_to_save": None,
        "rank_pattern": {r"layers\.1.self_attn.q_proj": 4},
        "alpha_pattern": {"layers.0.*q_proj": 7.5},
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


def _read_adapter(directory: pathlib.Path):
    from unime_jax import weights

    source = weights.find(directory).source
    for key in sorted(source.keys()):
        source.slice(key)[...]


def _write_run(directory: pathlib.Path) -> None:
    import fabricated

    base = tiny.backbone("llava16")
    fabricated.write_run(directory, base, tiny.CONFIGS["llava16"], rank=2)


def _write_own_model(directory: pathlib.Path) -> None:
    from unime_jax import convert

    convert.main(["convert", "import", "--model", str(tiny.backbone("nv_embed")),
                  "--output", str(directory / "m")])  # fmt: skip


def _read_own_model(directory: pathlib.Path):
    _read_adapter(directory / "m")


def _write_gguf(directory: pathlib.Path) -> None:
    packages.gguf_file(directory / "x.gguf")


def _read_gguf(directory: pathlib.Path):
    model = smol_student.LanguageModel(directory / "x.gguf")
    model.config(2)
    model.tensors(2)
    model.tokenizer()


def _write_pth(directory: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": rng.normal(size=(4, 3)).astype(np.float32),
        "b": np.array(3),
        "c": rng.normal(size=5).astype(np.float16),
    }
    (directory / "x.pth").write_bytes(packages.legacy_pth(tensors))


def _read_pth(directory: pathlib.Path):
    torch_file.read_state_dict((directory / "x.pth").read_bytes(), "x.pth")


def _write_processor(directory: pathlib.Path) -> None:
    settings = {
        "num_crops": 4,
        "num_img_tokens": 4,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "do_normalize": True,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))


def _read_processor(directory: pathlib.Path):
    from unime_jax.types import ImageSpec

    processor_files.make_transform(ImageSpec("phi_hd", 56, 4), directory).layout(300, 200)


# ---------------------------------------------------------------- rows


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


# ---------------------------------------------------------------- pictures, packages


def _pictures(kind: str, mode: str = "RGB", **options) -> Reader:
    def write(directory: pathlib.Path) -> None:
        rng = np.random.default_rng(0)
        image = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).convert(mode)
        file = io.BytesIO()
        image.save(file, kind, **options)
        (directory / "x.png").write_bytes(file.getvalue())

    def read(directory: pathlib.Path):
        pictures.size_of(directory / "x.png")
        pictures.load_rgb((directory / "x.png").read_bytes(), at_least=4)

    return Reader(write, ("x.png",), read)


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


def _write_packages(directory: pathlib.Path) -> None:
    packages.wheel(directory / "x.whl", {"a/x.txt": b"hello " * 50, "b/y": b"y"})


def _read_packages(directory: pathlib.Path):
    assets.read_wheel(directory / "x.whl", "x.txt")


def _write_deb(directory: pathlib.Path) -> None:
    packages.deb(directory / "x.deb", "x", {"usr/a.png": packages.png(), "usr/b.txt": b"b"})


def _read_deb(directory: pathlib.Path):
    list(assets.read_deb(directory / "x.deb", lambda name: True))


_SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 30, "layer_norm_eps": 1e-12,
}  # fmt: skip
_CONFIGS = {
    **tiny.CONFIGS,
    "llama": {**parity.TEXT, "tie_word_embeddings": False, "attention_bias": True},
    "phi3": {**parity.TEXT, "model_type": "phi3"},
    "mistral": {**parity.TEXT, "model_type": "mistral", "head_dim": 12, "sliding_window": 99},
    "smol": parity.SMOL,
    "bert": {**_SIZES, "model_type": "bert", "type_vocab_size": 2, "hidden_act": "gelu"},
}


def _config(name: str) -> Reader:
    def write(directory: pathlib.Path) -> None:
        (directory / "config.json").write_text(json.dumps(_CONFIGS[name]))

    def read(directory: pathlib.Path):
        from unime_jax import models

        config = models.read_config(directory)
        models.rules(config)
        models.abstract(config)

    return Reader(write, ("config.json",), read)


MODEL = ("model.safetensors", "config.json", "tokenizer.json")
READERS: dict[str, Reader] = {
    "model": Reader(_write_model, MODEL, _read_model),
    "model, Phi": Reader(lambda d: _write_model(d, "phi35v"), MODEL, _read_model),
    "model, shards": Reader(
        _write_shards,
        ("model.safetensors.index.json", "part-0.safetensors", "config.json"),
        _read_model,
    ),
    "tokenizer": Reader(_write_model, ("tokenizer.json",), _read_tokenizer),
    "adapter": Reader(
        _write_adapter, ("adapter_model.safetensors", "adapter_config.json"), _read_adapter
    ),
    **{f"config, {name}": _config(name) for name in _CONFIGS},
    "run": Reader(_write_run, ("run.json",), _read_adapter),
    "own model": Reader(_write_own_model, ("m/config.json", "m/model.json"), _read_own_model),
    "GGUF": Reader(_write_gguf, ("x.gguf",), _read_gguf),
    "state dict": Reader(_write_pth, ("x.pth",), _read_pth),
    "image processor": Reader(_write_processor, ("preprocessor_config.json",), _read_processor),
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
    "teacher's vectors": Reader(_write_teacher, ("manifest.json", "vectors-00000.npy"),
                                _read_teacher),
    "JPEG": _pictures("JPEG", exif=_exif()),
    "PNG": _pictures("PNG", "RGBA", exif=_exif()),
    "GIF": _pictures("GIF", "P"),
    "TIFF": _pictures("TIFF", compression="tiff_lzw"),
    "TIFF, floats": _pictures("TIFF", "F"),
    "WebP": _pictures("WEBP"),
    "BMP": _pictures("BMP"),
    "wheel": Reader(_write_packages, ("x.whl",), _read_packages),
    "deb": Reader(_write_deb, ("x.deb",), _read_deb),
}  # fmt: skip
