"""Configurations, rows, images and checkpoint keys drawn by hypothesis: one line, or success."""

import io
import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from unime_jax import config as configuration
from unime_jax.data import items, json_files, pictures, preprocess, sources, task_pairs
from unime_jax.models import hf
from unime_jax.models.hf import KeyMap, Rule
from unime_jax.types import ImageSpec, UserError

QUIET = dict(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def keys_of(config, prefix=""):
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from keys_of(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


KEYS = dict(keys_of(configuration.base_config()))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["(", "[a", "none", "hard", "cosine", "10-2", "\ud800", "\0"]),
)  # fmt: skip
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=5)


def like(value):
    """Values that a ConfigDict takes in place of this one."""
    kinds = {bool: st.booleans(), int: st.integers(), float: st.floats(), str: st.text(max_size=9)}
    return st.one_of(kinds.get(type(value), VALUES), st.just(value))


CHANGES = st.lists(st.sampled_from(sorted(KEYS)), min_size=1, max_size=4, unique=True).flatmap(
    lambda keys: st.fixed_dictionaries({key: like(KEYS[key]) for key in keys})
)


def configs(examples: int) -> dict[str, int]:
    counts = {"refused": 0, "accepted": 0}

    @settings(max_examples=examples, **QUIET)
    @given(CHANGES)
    def check(changes):
        config = configuration.base_config()
        config.output = "x"
        for key, value in changes.items():
            *path, name = key.split(".")
            section = configuration.lookup(config, ".".join(path)) if path else config
            try:
                section[name] = value
            except (TypeError, ValueError):  # ml_collections refuses the kind
                return
        try:
            configuration.validate_values(config)
        except UserError as error:
            counts["refused"] += 1
            assert "config." in str(error) or "nothing to train" in str(error)
            return
        counts["accepted"] += 1
        configuration.describe(config)
        numbers = [value for _, value in keys_of(config) if isinstance(value, float)]
        assert not any(map(math.isnan, numbers))

    check()
    return counts


def command_lines(examples: int, path) -> dict[str, int]:
    counts = {"refused": 0, "accepted": 0}
    path.write_text(
        "from unime_jax.config import base_config\n"
        "def get_config():\n"
        "    c = base_config()\n"
        "    c.output = 'x'\n"
        "    return c\n"
    )
    name = st.one_of(st.sampled_from(sorted(KEYS)), st.text("abc._", max_size=9))
    letters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
    value = st.one_of(SCALARS.map(str), st.text(letters, max_size=12))

    @settings(max_examples=examples, **QUIET)
    @given(st.lists(st.tuples(name, value), max_size=3))
    def check(pairs):
        argv = ["train", f"--config={path}", *(f"--config.{key}={v}" for key, v in pairs)]
        try:
            config = configuration.parse(argv, "help")
            configuration.validate_values(config)
            counts["accepted"] += 1
        except UserError as error:
            counts["refused"] += 1
            assert "\n" not in str(error)

    check()
    return counts


ROWS = st.dictionaries(
    st.sampled_from(["id", "text", "image", "query_text", "query_image", "target_text",
                     "target_image", "hard_negatives", "hard_negatives_scores",
                     "query_pos_scores", "set", "target_id"]),
    st.recursive(
        st.one_of(SCALARS, st.sampled_from(["a.png", "../x", "/etc/passwd", "<|image_1|>"])),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
        max_leaves=6,
    ),
    max_size=6,
)  # fmt: skip


def rows(examples: int, folder, model) -> dict[str, int]:
    counts = {"refused": 0, "accepted": 0}
    Image.new("RGB", (3, 4)).save(folder / "a.png")

    @settings(max_examples=examples, **QUIET)
    @given(st.lists(ROWS, min_size=1, max_size=3), st.sampled_from([0, 2]))
    @example([{"text": "a cat", "image": "a.png"}], 0)  # of 50 that are drawn none may be good
    def check(given_rows, judged):
        path = folder / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, given_rows)))
        for entry in items.Input(str(path)):
            assert entry.digest and entry.row >= 0
            if entry.fault:
                counts["refused"] += 1
                continue
            try:
                layout = None
                if entry.image is not None:
                    layout = model.layout(*pictures.size_of(entry.image))
                model.tokenize(entry.text, layout is not None, layout=layout)
                counts["accepted"] += 1
            except UserError:
                counts["refused"] += 1
        for read in (
            lambda: task_pairs.read(path, judged=judged, faults=[]),
            lambda: [sources.pairs(path, faults=[])],
        ):
            try:
                for part in read():
                    for number in range(len(part)):
                        assert part[number].set is not None
                counts["accepted"] += 1
            except UserError:
                counts["refused"] += 1

    check()
    return counts


def images(examples: int, models) -> dict[str, int]:
    counts = {"refused": 0, "accepted": 0}
    modes = st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16",
                             "HSV", "LAB", "PA"])  # fmt: skip
    side = st.one_of(st.integers(1, 80), st.sampled_from([1, 2, 56, 57, 112, 3000]))

    @settings(max_examples=examples, **QUIET)
    @given(modes, side, side, st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", ""]),
           st.integers(0, 9), st.integers(0, 2**32), st.sampled_from(sorted(models)))  # fmt: skip
    def check(mode, width, height, kind, orientation, seed, name):
        image = Image.new("L", (width, height), seed % 256)
        try:
            image = image.convert(mode)
            exif = Image.Exif()
            exif[0x0112] = orientation
            if kind:
                file = io.BytesIO()
                image.save(file, kind, exif=exif)
                image = file.getvalue()
        except (OSError, ValueError, KeyError, TypeError):  # Pillow has no such combination
            return
        try:
            size = pictures.size_of(image)
            picture = models[name].image(image)
            assert picture.layout == models[name].layout(*size)
            assert len(picture.tiles) == picture.layout.tiles
            counts["accepted"] += 1
        except UserError:
            counts["refused"] += 1

    check()
    return counts


class _Tensors:
    name = "x"

    def __init__(self, tensors):
        self.tensors = tensors

    def keys(self):
        return set(self.tensors)

    def slice(self, key):
        return self.tensors[key]


class _Tensor:
    def __init__(self, shape, dtype):
        self._shape, self._dtype = shape, dtype

    def get_shape(self):
        return list(self._shape)

    def get_dtype(self):
        return self._dtype

    def __getitem__(self, index):
        return np.zeros(self._shape, np.float32)[index]


MAP = KeyMap(
    (
        Rule("model.layers.{L}.w.weight", "layers/w/kernel", "linear"),
        Rule("model.norm.weight", "norm/scale"),
        Rule("head.weight", "head/kernel", "linear"),
    ),
    ignored=(r"model\.layers\.\d+\.freq",),
    renamed=((r"^base\.", "model."),),
    copies=(("head.weight", "model.norm.weight"),),
)


def checkpoint_keys(examples: int) -> dict[str, int]:
    import jax

    MAP_PLAIN = KeyMap(MAP.rules, MAP.ignored, MAP.renamed)
    good = {
        "model.layers.0.w.weight": ((3, 2), "F32"),
        "model.layers.1.w.weight": ((3, 2), "BF16"),
        "model.norm.weight": ((4,), "F16"),
        "head.weight": ((5, 4), "F32"),
    }
    shapes = {"layers/w/kernel": (2, 2, 3), "norm/scale": (4,), "head/kernel": (4, 5)}
    flat = {path: jax.ShapeDtypeStruct(s, np.dtype("float32")) for path, s in shapes.items()}
    names = st.one_of(
        st.sampled_from([*good, "model.layers.2.w.weight", "model.layers.0.freq", "x", ""]),
        st.text(max_size=6),
    )
    entries = st.tuples(
        st.lists(st.integers(0, 9), max_size=3).map(tuple),
        st.sampled_from(["F32", "BF16", "F16", "F64", "I64", "F8_E4M3", "U8", "?"]),
    )
    counts = {"refused": 0, "accepted": 0}

    @settings(max_examples=examples, **QUIET)
    @given(st.sets(st.sampled_from(sorted(good)), max_size=2),
           st.dictionaries(names, entries, max_size=2))  # fmt: skip
    def check(missing, added):
        found = {key: value for key, value in good.items() if key not in missing} | added
        source = _Tensors({key: _Tensor(*value) for key, value in found.items()})
        floats = {"F32", "BF16", "F16", "F64"}
        right = all(
            key in found and found[key][0] == shape and found[key][1] in floats
            for key, (shape, _) in good.items()
        ) and not set(found) - set(good) - {"model.layers.0.freq"}
        try:
            hf.check(source, MAP_PLAIN, flat)
            assert right
            counts["accepted"] += 1
        except UserError as error:
            assert not right and "do not fit" in str(error)
            counts["refused"] += 1

    check()
    return counts


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from unime_jax import tiny

    made = {}
    for name, spec in (
        ("smol", ImageSpec("grid", 16, 4)),
        ("phi35v", ImageSpec("phi_hd", 56, 4, crops=4)),
        ("llava16", ImageSpec("llava_anyres", 56, 16, grids=((56, 112), (112, 56), (112, 112)))),
    ):
        directory = tiny.backbone("llava16" if name == "llava16" else "phi35v")
        made[name] = preprocess.Preprocessor(directory, spec, prompt=name, max_tokens=4096)
    return made


def everything(count: int, tmp_path, models) -> dict[str, dict[str, int]]:
    return {
        "configurations": configs(4 * count),
        "command lines": command_lines(count, tmp_path / "config.py"),
        "rows": rows(2 * count, tmp_path, models["smol"]),
        "images": images(3 * count, models),
        "checkpoint keys": checkpoint_keys(2 * count),
    }


def test_a_few_of_everything(tmp_path, models):
    found = everything(25, tmp_path, models)
    assert all(counts["refused"] and counts["accepted"] for counts in found.values()), found


@pytest.mark.slow
def test_many_of_everything(tmp_path, models, capsys):
    found = everything(500, tmp_path, models)
    with capsys.disabled():
        print()
        for name, counts in found.items():
            print(f"  {name}: {sum(counts.values())} tried, {counts['refused']} refused")
    assert all(counts["refused"] and counts["accepted"] for counts in found.values()), found


@given(st.text(), st.booleans())
@settings(max_examples=50, **QUIET)
def test_json_is_parsed_or_refused(text, escaped):
    line = json.dumps({"a": text}, ensure_ascii=escaped)
    try:
        assert json_files.parse(line, "x") == {"a": text}
    except UserError as error:
        assert "surrogate" in str(error) or "JSON" in str(error)
