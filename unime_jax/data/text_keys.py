"""When two captions count as the same: the rule the train/test split rests on."""

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Sequence

import numpy as np

# Words that carry no meaning of their own in a caption.
STOP_WORDS = frozenset(
    "a an the some of in on at to for from by with without and or its it is are be was this that "
    "these those your our my his her their you we they he she as into up out off no not do does "
    "has have had can will so if then than too very just who which what where when how".split()
)
_LEADING = frozenset(["a", "an", "the", "some"])
_IRREGULAR = dict(
    pair.split("=")
    for pair in """
    feet=foot teeth=tooth geese=goose mice=mouse men=man women=woman children=child people=person
    oxen=ox wolves=wolf leaves=leaf knives=knife wives=wife lives=life loaves=loaf shelves=shelf
    scarves=scarf calves=calf halves=half hooves=hoof thieves=thief elves=elf dice=die
    cacti=cactus fungi=fungus lens=lens lenses=lens gases=gas irises=iris atlases=atlas
    canvas=canvas canvases=canvas fuses=fuse muses=muse uses=use axes=axe woodlice=woodlouse
    """.split()
)
# Singulars whose plural looks like that of a word without their last e (shoes, heroes).
_WITH_E = frozenset(
    """shoe toe hoe foe canoe doe roe oboe aloe horseshoe ache headache moustache mustache quiche
    niche avalanche brioche porsche pie tie lie die cookie movie zombie genie selfie smoothie
    brownie cutie hoodie birdie collie goalie hippie magpie necktie bowtie rookie calorie prairie
    pixie""".split()
)


def singular(word: str) -> str:
    """Strips a plural ending; "bus" and "glass" stay, a word that is no plural may lose its s."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) > 5 and word.endswith("men"):  # firemen, snowmen
        return word[:-2] + "an"
    if len(word) <= 3 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word[:-1] in _WITH_E:
        return word[:-1]
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes", "zzes", "tzes", "oes")):
        return word[:-2]
    if word.endswith("uses") and not word.endswith(("ouses", "auses")):  # buses, walruses
        return word[:-2]
    return word[:-1]


def words(text: str) -> list[str]:
    """Splits into lower-case words without punctuation, accents or possessives, singular."""
    text = unicodedata.normalize("NFKD", text.casefold().replace("_", " "))
    text = "".join(char for char in text if not unicodedata.combining(char))
    text = re.sub(r"['’‘]s\b", "", text)
    text = re.sub(r"['’‘`]", "", text)
    return [singular(word) for word in re.findall(r"\w+", text)]


def caption_key(text: str) -> str:
    """Normalises a caption: "A tiger.", "tigers" and "Tiger!" give "tiger"."""
    found = words(text)
    while len(found) > 1 and found[0] in _LEADING:
        found = found[1:]
    return " ".join(found)


def compact_key(text: str) -> str:
    """Is `caption_key` without spaces, so that "t-shirt", "T shirt" and "tshirt" are equal."""
    return caption_key(text).replace(" ", "")


def content_words(text: str) -> list[str]:
    """Is the caption's words that carry meaning."""
    return [word for word in words(text) if word not in STOP_WORDS]


def content_id(text: object, image: bytes) -> str:
    """Returns an identity of a text and an encoded image: equal for equal content."""
    return hashlib.blake2b(f"{text}\0".encode() + image, digest_size=8).hexdigest()


def numbers(names: Sequence[str]) -> np.ndarray:
    """Returns int32 numbers, equal for equal names."""
    return np.array([zlib.crc32(name.encode()) & 0x7FFFFFFF for name in names], np.int32)
