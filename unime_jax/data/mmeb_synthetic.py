"""Writes a directory like MMEB-train, small and made up: for tests, smoke runs and measurements.

Sets, columns, wording, lengths and the sides of images are MMEB's; pictures are of one colour with
a shape on it. What real files have wrong is there as well, if wanted: see `ODDITIES`.
"""

import dataclasses
import io
import pathlib

import numpy as np
from jaxtyping import Int32

from unime_jax.data import mmeb_sets

_SLOT = "<|image_1|>\n"
WORDS = (
    "a the of in on with two red blue old small large man woman child dog horse street train "
    "table water field building players game standing sitting holding near front city officials "
    "report market president team year percent chart table number total revenue growth photo of "
    "view mountain beach kitchen plate food white black green wooden next under over behind people"
).split()
_PLACE = "Represent the given image."


@dataclasses.dataclass(frozen=True)
class Wording:
    """How the rows of a set read.

    Attributes:
      query: what the query says, {} standing for free words.
      query_words: of the free words: median and longest.
      target: likewise; "" for an image alone.
      target_words: likewise.
      targets: how many different targets there are; 0: any number.
    """

    query: str
    query_words: tuple[int, int] = (0, 0)
    target: str = "{}"
    target_words: tuple[int, int] = (1, 3)
    targets: int = 0


# Instructions as VLM2Vec words them; the numbers of words are typical ones.
_QUESTION = "Represent the given image with the following question: {}\n"
_WORDINGS = {
    "ImageNet_1K": Wording("Represent the given image for classification\n", targets=1000),
    "N24News": Wording(
        "Represent the given news image with the following caption for domain classification: {}\n",
        (20, 60),
        target_words=(1, 2),
        targets=24,
    ),
    "HatefulMemes": Wording(
        "Represent the given image for binary classification to determine whether it constitutes "
        "hateful speech or not\n",
        target_words=(1, 1),
        targets=2,
    ),
    "VOC2007": Wording("Identify the object shown in the image.\n", targets=20),
    "SUN397": Wording("Identify the scene shown in the image\n", targets=397),
    "OK-VQA": Wording(_QUESTION, (8, 20), target_words=(1, 4)),
    "A-OKVQA": Wording(_QUESTION, (9, 25), target_words=(1, 4)),
    "DocVQA": Wording(_QUESTION, (9, 30), target_words=(2, 20)),
    "InfographicsVQA": Wording(_QUESTION, (12, 35), target_words=(1, 10)),
    "ChartQA": Wording(_QUESTION, (11, 30), target_words=(1, 3)),
    "Visual7W": Wording(_QUESTION, (7, 20), target_words=(2, 10)),
    "VisDial": Wording(
        "Represent the given dialogue about an image, which is used for image retrieval: {}\n",
        (90, 160),
        target_words=(11, 25),
    ),
    "CIRR": Wording(
        "Given an image, find a similar everyday image with the described changes: {}\n",
        (12, 40),
        target=f"{_PLACE}\n",
        target_words=(0, 0),
    ),
    "VisualNews_t2i": Wording(
        "Retrieve an image of this news caption. {}\n",
        (19, 55),
        target=f"{_PLACE}\n",
        target_words=(0, 0),
    ),
    "VisualNews_i2t": Wording(
        "Find a caption for the news in the given photo.\n", target_words=(19, 55)
    ),
    "MSCOCO_t2i": Wording(
        "Find me an everyday image that matches the given caption: {}\n",
        (10, 30),
        target=f"{_PLACE}\n",
        target_words=(0, 0),
    ),
    "MSCOCO_i2t": Wording(
        "Find an image caption describing the given everyday image.\n", target_words=(10, 30)
    ),
    "NIGHTS": Wording(
        "Find a day-to-day image that looks similar to the provided image.\n",
        target=f"{_PLACE}\n",
        target_words=(0, 0),
    ),
    "WebQA": Wording(
        "Find a Wikipedia image that answers this question: {}\n",
        (18, 50),
        target="Represent the given Wikipedia image with related text information: {}\n",
        target_words=(10, 40),
    ),
    "MSCOCO": Wording(
        "Select the portion of the image that isolates the object labeled as {}\n",
        (2, 4),
        target="Represent the given cropped image of the object\n",
        target_words=(0, 0),
    ),
}
# Number of a row -> what is wrong with it.
ODDITIES = {
    3: "empty target",
    5: "missing image",
    7: "damaged image",
    9: "path that leaves the root",
    11: "image of another row",
    13: "diverse shape",
}


def write(
    directory: pathlib.Path,
    *,
    rows: int | dict[str, int] = 16,
    split: str = "original",
    oddities: tuple[str, ...] = (),
    seed: int = 0,
    pictures: bool = True,
) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes all 20 sets.

    Args:
      directory: gets `MMEB-train` (parquet) and `images`.
      rows: of each set, or of each by name.
      split: name of the parquet files.
      oddities: values of `ODDITIES` to put into each set.
      seed: of texts and colours.
      pictures: whether to write image files.

    Returns:
      The source directory and the image root.
    """
    import pyarrow
    import pyarrow.parquet

    source, images = directory / "MMEB-train", directory / "images"
    for number, found in enumerate(mmeb_sets.SETS):
        rng = np.random.default_rng((seed, number))
        count = rows if isinstance(rows, int) else rows[found.name]
        table = {column: [] for column in mmeb_sets.COLUMNS}
        for i in range(count):
            odd = ODDITIES.get(i)
            row = _row(found, rng, i, images if pictures else None, odd if odd in oddities else "")
            for column in mmeb_sets.COLUMNS:
                table[column].append(row[column])
        (source / found.name).mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(
            pyarrow.table(table), source / found.name / f"{split}-00000-of-00001.parquet"
        )
    return source, images


def _row(
    found: mmeb_sets.TrainSet,
    rng: np.random.Generator,
    number: int,
    root: pathlib.Path | None,
    odd: str,
) -> dict[str, str]:
    wording = _WORDINGS[found.name]
    row = dict.fromkeys(mmeb_sets.COLUMNS, "")
    row["qry"] = wording.query.format(_text(rng, wording.query_words))
    if wording.targets:
        label = int(rng.integers(wording.targets))
        row["pos_text"] = _text(np.random.default_rng(label), wording.target_words) + f" {label}"
    else:
        row["pos_text"] = wording.target.format(_text(rng, wording.target_words))
    for side, text, path in (
        ("query", "qry", "qry_image_path"),
        ("target", "pos_text", "pos_image_path"),
    ):
        if found.sides not in (side, "both"):
            continue
        row[text] = _SLOT + row[text]
        source = 0 if odd == "image of another row" else number
        row[path] = f"images/{found.name}/Train/{side}_{source}.jpg"
        if root is not None and source == number:
            size = (700, 40) if odd == "diverse shape" else draw_size(rng)
            content = picture(rng, size)
            if odd == "damaged image":
                content = content[: len(content) // 2]
            if odd != "missing image":
                (root / row[path]).parent.mkdir(parents=True, exist_ok=True)
                (root / row[path]).write_bytes(content)
    if odd == "empty target":
        row["pos_text"] = row["pos_image_path"] = ""
    if odd == "path that leaves the root":
        column = "qry_image_path" if row["qry_image_path"] else "pos_image_path"
        row[column] = "../" * 9 + "etc/hostname"
    return row


def word_counts(name: str, rows: int, rng: np.random.Generator) -> Int32[np.ndarray, "N 2"]:
    """Draws how many words the queries and targets of a set have, instructions included."""
    wording = _WORDINGS[name]
    sides = (wording.query, wording.query_words), (wording.target, wording.target_words)
    return np.stack(
        [len(stated.format("").split()) + draw_counts(rng, words, rows) for stated, words in sides],
        axis=1,
    ).astype(np.int32)


def draw_counts(rng: np.random.Generator, words: tuple[int, int], rows: int) -> np.ndarray:
    """Draws numbers of words, log-normal about the median and at most the longest."""
    median, longest = words
    if not longest:
        return np.zeros(rows, int)
    drawn = np.rint(median * np.exp(0.45 * rng.standard_normal(rows)))
    return np.clip(drawn, 1, longest).astype(int)


def _text(rng: np.random.Generator, words: tuple[int, int]) -> str:
    """Draws words; their number is log-normal about the median and at most the longest."""
    if not words[1]:
        return ""
    count = int(draw_counts(rng, words, 1)[0])
    return " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=count))


def draw_size(rng: np.random.Generator) -> tuple[int, int]:
    return tuple(int(side) for side in rng.integers(24, 96, size=2))


def picture(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    """Draws a JPEG: a rectangle of one colour on another."""
    from PIL import Image, ImageDraw

    ground, ink = (tuple(int(c) for c in rng.integers(256, size=3)) for _ in range(2))
    image = Image.new("RGB", size, ground)
    left, top = (int(rng.integers(side)) for side in size)
    box = (left, top, min(left + size[0] // 2, size[0]), min(top + size[1] // 2, size[1]))
    ImageDraw.Draw(image).rectangle(box, ink)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return stream.getvalue()
