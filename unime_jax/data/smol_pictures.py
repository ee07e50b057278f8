"""Reads picture-and-caption pairs out of the small image packages.

Each reader turns (name, content) pairs of one package into `RawPair`s; nothing is decoded yet.
"""

import collections.abc
import dataclasses
import pathlib
import re
import xml.etree.ElementTree

from unime_jax.data import clipart_titles
from unime_jax.types import UserError

Files = collections.abc.Iterable[tuple[str, bytes]]


@dataclasses.dataclass(frozen=True)
class RawPair:
    """One picture, not yet decoded, and what is said of it.

    Attributes:
      source: "tuxpaint", "art4apps", "emoji", "openclipart" or "pairs".
      category: folder of the picture inside its package ("animals/birds"), "" if none.
      name: the file's name without ending, or the emoji.
      caption: the text that goes with the picture.
      keywords: more texts that fit it, from the package itself.
      content: the encoded image; an emoji's characters; a file's path.
      kind: "image", "svg", "emoji" or "file": what `content` is.
    """

    source: str
    category: str
    name: str
    caption: str
    keywords: tuple[str, ...]
    content: bytes
    kind: str = "image"

    @property
    def label(self) -> str:
        """Names the pair in messages."""
        return f"{self.source} {self.category}/{self.name}".replace(" /", " ")


_STAMPS = "usr/share/tuxpaint/stamps/"


def wanted_stamp(name: str) -> bool:
    """Selects Tux Paint's pictures and captions, without letters, coins and numbers."""
    return (
        name.startswith(_STAMPS)
        and name.endswith((".png", ".svg", ".txt"))
        and not name.startswith(_STAMPS + "symbols/")
        and not name.endswith(("_mirror.png", "_flip.png"))
    )


def tux_paint(files: Files) -> list[RawPair]:
    """Reads stamps: the first line of NAME.txt describes NAME.png (or NAME.svg)."""
    found = {name.removeprefix(_STAMPS): content for name, content in files}
    pairs = []
    for name in sorted(found):
        if not name.endswith(".txt"):
            continue
        stem = name.removesuffix(".txt")
        content, kind = found.get(stem + ".png"), "image"
        if content is None:
            content, kind = found.get(stem + ".svg"), "svg"
        lines = found[name].decode("utf-8", errors="replace").splitlines()
        caption = lines[0].strip() if lines else ""
        if content is None or not caption:
            continue
        category, _, short = stem.rpartition("/")
        folders = [part for part in category.split("/") if part not in ("cartoon", "toys")]
        pairs.append(RawPair("tuxpaint", category, short, caption, _spaced(folders), content, kind))
    return pairs


def _spaced(names) -> tuple[str, ...]:
    return tuple(name.replace("_", " ") for name in names if name)


_DRAWINGS = "usr/share/games/pysiogame/res/images/art4apps/"
_DRAWN_TOPICS = {
    "clothes_n_accessories": ("clothes",),
    "construction": ("building",),
    "fruit_n_veg": ("fruit or vegetable", "food"),
    "jobs": ("job", "person"),
    "actions": ("action",),
    "body": ("part of the body",),
}


def wanted_drawing(name: str) -> bool:
    return name.startswith(_DRAWINGS) and name.endswith(".jpg")


def art4apps(files: Files) -> list[RawPair]:
    """Reads drawings named by one or two words ("animals/baby_rabbit.jpg")."""
    pairs = []
    for path, content in sorted(files):
        category, _, stem = path.removeprefix(_DRAWINGS).removesuffix(".jpg").rpartition("/")
        keywords = _DRAWN_TOPICS.get(category, (category,))
        caption = stem.replace("_", " ")
        pairs.append(RawPair("art4apps", category, stem, caption, keywords, content))
    return pairs


_CLDR = "usr/share/unicode/cldr/common/"
EMOJI_FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"


def wanted_annotation(name: str) -> bool:
    return name in (_CLDR + "annotations/en.xml", _CLDR + "annotationsDerived/en.xml")


def emoji(files: Files) -> list[RawPair]:
    """Reads emoji's English names and keywords, without skin-tone variants."""
    names, keywords = {}, {}
    for path, content in sorted(files):
        try:
            root = xml.etree.ElementTree.fromstring(content)
        except xml.etree.ElementTree.ParseError as error:
            raise UserError(f"{path} of unicode-cldr-core is not valid XML: {error}") from None
        for note in root.iter("annotation"):
            if note.get("type") == "tts":
                names[note.get("cp")] = note.text
            else:
                keywords[note.get("cp")] = [word.strip() for word in note.text.split("|")]
    pairs = []
    for characters, name in names.items():
        if "skin tone" in name:
            continue
        caption = re.sub(r"^flag: ", "flag of ", name)
        words = tuple(word for word in keywords.get(characters, ()) if word not in (name, caption))
        content = characters.encode()
        pairs.append(RawPair("emoji", "", characters, caption, words, content, "emoji"))
    return pairs


_CLIPART = "usr/share/openclipart/png/"
# Folders of widgets, patterns, signs without a subject, and flags (the emoji have those).
_CLIPART_OUT = re.compile(
    r"(^|/)(shapes|special|logos|buttons|decorations|icons|diagrams|cards|flags|led|map_symbols"
    r"|stickmen|smilies|pantyhose|duplicates)/"
)


def wanted_clipart(name: str) -> bool:
    """Selects Open Clip Art's pictures of things."""
    return (
        name.startswith(_CLIPART)
        and name.endswith(".png")
        and not _CLIPART_OUT.search(name.removeprefix(_CLIPART))
    )


def open_clip_art(files: Files, titles: clipart_titles.Titles) -> list[RawPair]:
    """Reads clip art whose file name holds an English title; the same file only once."""
    pairs, seen = [], set()
    for path, content in sorted(files):
        path = pathlib.PurePosixPath(path.removeprefix(_CLIPART).removesuffix(".png"))
        title = titles.read(path.name)
        if title is None or content in seen:
            continue
        seen.add(content)
        keywords = _spaced(part for part in path.parent.parts if part != "unsorted")
        category = str(path.parent)
        pairs.append(RawPair("openclipart", category, path.name, title, keywords, content))
    return pairs
