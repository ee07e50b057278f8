"""Writes directories like the published evaluation sets, small and made up.

For tests, smoke runs and measurements: files, column types, the number of candidates (scaled down)
and what is odd in the published files are as there; pictures are of one colour with a shape on it.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import numpy as np

from unime_jax.data import mmeb_synthetic

_SLOT = "<|image_1|>\n"
_GIVEN = "Represent the given image."
_CLASSIFY = "Represent the given image for classification\n"
_QUESTION = "Represent the given image with the following question: {}\n"
CAPTION_SETS = ("flickr30k", "coco", "sharegpt4v", "urban1k", "sugarcrepe")
SUGARCREPE = (
    "add_obj", "add_att", "replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    """How the rows of a set read, {} standing for free words.

    Attributes:
      query, target: texts.
      query_image, target_image: whether that side has an image.
      shared: whether all queries have the same candidates, in another order.
    """

    query: str
    query_image: bool = True
    target: str = "{}"
    target_image: bool = False
    shared: bool = False


def _shapes() -> dict[str, Shape]:
    classes = {
        name: Shape(_CLASSIFY, shared=True)
        for name in (
            "ImageNet-1K", "HatefulMemes", "VOC2007", "SUN397", "Place365", "ImageNet-A",
            "ImageNet-R", "ObjectNet", "Country211",
        )
    }  # fmt: skip
    news = Shape(
        "Represent the given news image with the following caption for domain classification: {}\n",
        shared=True,
    )
    questions = {
        name: Shape(_QUESTION)
        for name in (
            "OK-VQA", "A-OKVQA", "DocVQA", "InfographicsVQA", "ChartQA", "Visual7W", "ScienceQA",
            "VizWiz", "GQA", "TextVQA",
        )
    }  # fmt: skip
    picture = {"target": f"{_GIVEN}\n", "target_image": True}
    crop = {"target": "Represent the given cropped image of the object\n", "target_image": True}
    wiki = "Represent the given Wikipedia image with related text information: {}\n"
    return {
        **classes,
        "N24News": news,
        **questions,
        "VisDial": Shape("Represent the given dialogue about an image: {}\n", False, **picture),
        "CIRR": Shape("Given an image, find a similar everyday image with: {}\n", **picture),
        "VisualNews_t2i": Shape("Retrieve an image of this news caption. {}\n", False, **picture),
        "VisualNews_i2t": Shape("Find a caption for the news in the given photo.\n"),
        "MSCOCO_t2i": Shape("Find me an everyday image that matches: {}\n", False, **picture),
        "MSCOCO_i2t": Shape("Find an image caption describing the given everyday image.\n"),
        "NIGHTS": Shape("Find a day-to-day image that looks similar.\n", **picture),
        "WebQA": Shape("Find a Wikipedia image that answers: {}\n", False, wiki, True),
        "FashionIQ": Shape("Find an image to match the fashion image and style: {}\n", **picture),
        "Wiki-SS-NQ": Shape("Find the document image that answers: {}\n", False, **picture),
        "OVEN": Shape("Retrieve a Wikipedia image-description pair: {}\n", True, wiki, True),
        "EDIS": Shape("Find a news image that matches the caption: {}\n", False, wiki, True),
        "MSCOCO": Shape("Select the portion of the image that isolates the {}\n", **crop),
        "RefCOCO": Shape("Select the portion of the image that follows: {}\n", **crop),
        "RefCOCO-Matching": Shape(
            "Select the portion of the image that follows: {}\n", True,
            "Select the portion of the image that follows: {}\n", True,
        ),
        "Visual7W-Pointing": Shape("Select the portion that answers: {}\n", **crop),
    }  # fmt: skip


SHAPES: Mapping[str, Shape] = _shapes()


@dataclasses.dataclass(frozen=True)
class Oddities:
    """What is odd in each set that can have it, in its first rows.

    Attributes:
      empty_text: images stand without any text; where all do, `tgt_text` is one empty string.
      repeated: the right candidate stands twice in a list, a wrong one as well.
      nulls: absent cells are null and not "".
      missing_image: the right candidate of the second query, or the query, has no file.
      damaged_image: a file of the third query is cut in the middle.
    """

    empty_text: bool = False
    repeated: bool = False
    nulls: bool = False
    missing_image: bool = False
    damaged_image: bool = False


def write_mmeb(
    directory: pathlib.Path,
    candidates: Mapping[str, int],
    *,
    queries: int = 4,
    most_candidates: int = 8,
    oddities: Oddities = Oddities(),
    seed: int = 0,
) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes MMEB-eval.

    Args:
      directory: gets `MMEB-eval` and `eval_images`.
      candidates: of each set, as published; the sets that are written.
      queries: of each set.
      most_candidates: of a query.
      oddities: see `Oddities`.
      seed: of texts and colours.

    Returns:
      The source directory and the image root.
    """
    import pyarrow
    import pyarrow.parquet

    source, images = directory / "MMEB-eval", directory / "eval_images"
    for name, count in candidates.items():
        rng = np.random.default_rng([seed, *name.encode()])
        maker = _Maker(name, SHAPES[name], rng, images, oddities)
        rows = maker.rows(queries, min(count, most_candidates))
        (source / name).mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(
            pyarrow.table(rows), source / name / "test-00000-of-00001.parquet"
        )
    return source, images


class _Maker:
    """Makes the rows of one set."""

    def __init__(self, name, shape: Shape, rng, images: pathlib.Path, oddities: Oddities):
        self._name, self._shape, self._rng = name, shape, rng
        self._images, self._oddities = images, oddities

    def rows(self, queries: int, candidates: int) -> dict[str, list]:
        shape, odd = self._shape, self._oddities
        pool = [self._target(i) for i in range(candidates + (0 if shape.shared else queries - 1))]
        rows = {name: [] for name in ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")}
        for i in range(queries):
            text = shape.query.format(self._words(8) + f" {self._name} {i}")
            rows["qry_text"].append((_SLOT if shape.query_image else "") + text)
            path = self._picture("query", i) if shape.query_image else ""
            rows["qry_img_path"].append(path or (None if odd.nulls else ""))
            right = i % candidates if shape.shared else i
            others = [place for place in range(len(pool)) if place != right]
            chosen = [right, *self._rng.permutation(others)[: candidates - 1]]
            if odd.repeated and i == 0:
                chosen += [chosen[0], chosen[-1]]
            rows["tgt_text"].append([pool[place][0] for place in chosen])
            paths = [pool[place][1] for place in chosen]
            rows["tgt_img_path"].append([path or (None if odd.nulls else "") for path in paths])
        if odd.empty_text and not any(text for texts in rows["tgt_text"] for text in texts):
            rows["tgt_text"] = [""] * queries
        return rows

    def _target(self, number: int) -> tuple[str, str]:
        shape, odd = self._shape, self._oddities
        words = self._words(4) + f" {number}"
        text = (_SLOT if shape.target_image else "") + shape.target.format(words)
        if odd.empty_text and shape.target_image and "{}" not in shape.target:
            text = ""
        return text, self._picture("target", number) if shape.target_image else ""

    def _words(self, count: int) -> str:
        return " ".join(self._rng.choice(mmeb_synthetic.WORDS, count))

    def _picture(self, side: str, number: int) -> str:
        path = f"{self._name}/{side}_{number}.jpg"
        content = mmeb_synthetic.picture(self._rng, mmeb_synthetic.draw_size(self._rng))
        if self._oddities.damaged_image and number == 2:
            content = content[: len(content) // 2]
        if not (self._oddities.missing_image and number == 1):
            (self._images / path).parent.mkdir(parents=True, exist_ok=True)
            (self._images / path).write_bytes(content)
        return path


# ---------------------------------------------------------------- captions


def write_captions(directory: pathlib.Path, *, images: int = 6, seed: int = 0) -> pathlib.Path:
    """Writes the sets of zero-shot retrieval, all in `directory`, and returns it.

    Flickr30K and COCO have the image's bytes in parquet, in small row groups; some images of COCO
    have more captions than count.
    """
    rng = np.random.default_rng(seed)
    for name in ("flickr30k_test", "coco_test"):
        _write_parquet(directory / name, rng, images, extra=2 if name == "coco_test" else 0)
    _write_sharegpt4v(directory / "ShareGPT4V", rng, images)
    for part in ("image", "caption"):
        (directory / "Urban1k" / part).mkdir(parents=True, exist_ok=True)
    for number in range(images):
        base = directory / "Urban1k"
        (base / "image" / f"{number + 1}.jpg").write_bytes(_picture(rng))
        caption = f"{_sentence(rng, 40)} in street {number}.\nA second line.\n"
        (base / "caption" / f"{number + 1}.txt").write_text(caption)
    _write_sugarcrepe(directory, rng, images)
    return directory


def _write_parquet(folder: pathlib.Path, rng, images: int, *, extra: int) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {
            "image": {"bytes": _picture(rng), "path": f"{number}.jpg"},
            "text": [f"{_sentence(rng, 9)} {number} {k}." for k in range(5 + extra * (number % 2))],
        }
        for number in range(images)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), folder / "test-00000-of-00001.parquet", row_group_size=4
    )


def _write_sharegpt4v(folder: pathlib.Path, rng, images: int) -> None:
    entries = []
    for number in range(images):
        path = f"sam/images/sa_{number}.jpg"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(_picture(rng))
        caption = f"{_sentence(rng, 30)}.\n{_sentence(rng, 20)} {number}."
        entries.append(
            {
                "id": f"sa_{number}",
                "image": path,
                "conversations": [
                    {"from": "human", "value": "<image>\nDescribe it."},
                    {"from": "gpt", "value": caption},
                ],
            }
        )
    name = "share-captioner_coco_lcs_sam_1246k_1107.json"
    (folder / name).write_text(json.dumps(entries))


def _write_sugarcrepe(directory: pathlib.Path, rng, images: int) -> None:
    for folder in ("sugar_crepe", "val2017"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    for number in range(images):
        (directory / "val2017" / f"{number:012d}.jpg").write_bytes(_picture(rng))
    for name in SUGARCREPE:
        rows = {
            str(row): {
                "filename": f"{row % images:012d}.jpg",
                "caption": f"{_sentence(rng, 8)} {name} {row}",
                "negative_caption": f"{_sentence(rng, 8)} not {name} {row}",
            }
            for row in range(images)
        }
        (directory / "sugar_crepe" / f"{name}.json").write_text(json.dumps(rows))


def _sentence(rng, count: int) -> str:
    return " ".join(rng.choice(mmeb_synthetic.WORDS, count))


def _picture(rng) -> bytes:
    return mmeb_synthetic.picture(rng, mmeb_synthetic.draw_size(rng))
