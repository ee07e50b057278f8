"""Splits the small data: what is tested on, and what may then be trained on.

The rule: no picture of training is one of those held out, and no text of training equals the
caption of a test or validation pair, in whatever spelling, article or number, in any source; of
WordNet, no meaning of a noun that stands in such a caption is used. Sharing a word is allowed ("a
red hat" is trained on, "a hat" is tested).
"""

import collections
import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator

import numpy as np

from unime_jax.data import pictures, text_keys, wordnet
from unime_jax.data.smol_pictures import RawPair
from unime_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A readable pair: its JPEG bytes and the picture's `pictures.fingerprint`."""

    raw: RawPair
    image: bytes
    fingerprint: np.ndarray


@dataclasses.dataclass(frozen=True)
class Pair:
    """One row of the pairs data set.

    Attributes:
      raw: where it came from.
      image: JPEG bytes.
      key: the normalised caption.
      keywords: more short texts that fit the picture; () outside of training.
      gloss: the dictionary's definition of what is shown, "" where none was found.
      seen: every content word of the caption occurs in some caption of training.
    """

    raw: RawPair
    image: bytes
    key: str
    keywords: tuple[str, ...] = ()
    gloss: str = ""
    seen: bool = True


@dataclasses.dataclass(frozen=True)
class Sentence:
    """One row of the sentences data set.

    Attributes:
      text: the sentence.
      kind: "gloss" or "example" of a synset, or "caption", "keyword" or "definition" of a
        training pair.
      synset: its name, "" for texts of pairs.
      second: the text to be found from `text`, "" where there is none.
    """

    text: str
    kind: str
    synset: str = ""
    second: str = ""


class Guard:
    """Knows the held-out captions and says what may be trained on."""

    def __init__(self, held_out: Iterable[str]):
        captions = list(held_out)
        self._keys = {text_keys.compact_key(caption) for caption in captions}
        self._nouns = {
            "".join(run)
            for caption in captions
            for run in _runs(text_keys.content_words(caption), longest=3)
        }

    def allows_text(self, text: str) -> bool:
        return text_keys.compact_key(text) not in self._keys

    def allows_pair(self, raw: RawPair) -> bool:
        """Checks caption and file name ("flower10" counts as "flower")."""
        name = re.sub(r"\d+", " ", raw.name)
        return self.allows_text(raw.caption) and self.allows_text(name)

    def allows_synset(self, synset: wordnet.Synset) -> bool:
        keys = {text_keys.compact_key(lemma) for lemma in synset.lemmas}
        return not keys & self._keys and not (synset.name[0] == "n" and keys & self._nouns)


def _runs(words: list[str], longest: int) -> Iterator[list[str]]:
    for start in range(len(words)):
        for stop in range(start + 1, min(start + longest, len(words)) + 1):
            yield words[start:stop]


def _draw(text: str, number: int) -> str:
    """Gives a text its place in a lottery: the same on every machine, whatever else is there."""
    return hashlib.sha256((f"unime smol split {number} " + text).encode()).hexdigest()


_TOPICS = {
    "animals": {5},
    "food": {13, 20},
    "fruit_n_veg": {13, 20},
    "plants": {20},
    "jobs": {18},
    "people": {18, 8},
    "body": {8},
    "nature": {17, 15},
    "actions": set(),
    "sport": set(),
    "clothes": {6},
    "clothes_n_accessories": {6},
    "household": {6},
    "vehicles": {6},
    "transport": {6},
    "transportation": {6},
    "tools": {6},
    "town": {6},
    "construction": {6},
    "buildings": {6},
    "military": {6},
    "hobbies": {6},
    "sports": {6},
    "computer": {6},
    "electronics": {6},
    "office": {6},
    "containers": {6},
    "education": {6},
    "medical": {6, 8},
    "space": {17, 6},
}
_LONGEST_NAME = 4


def meaning(raw: RawPair, words: wordnet.WordNet) -> wordnet.Synset | None:
    """Finds what a short caption names, within the topic its folder gives."""
    topic = frozenset(_TOPICS.get(raw.category.split("/")[0], wordnet.VISIBLE))
    spoken = re.findall(r"[\w'’-]+", raw.caption.lower())
    if len(text_keys.content_words(raw.caption)) > _LONGEST_NAME or not spoken:
        return None
    # An emoji's last word is often not its subject ("tiger face").
    shortest = len(spoken) if raw.source == "emoji" else 1
    for count in range(min(3, len(spoken)), shortest - 1, -1):
        tail = spoken[-count:]
        for last in (tail[-1], text_keys.singular(tail[-1])):
            synset = words.sense(" ".join([*tail[:-1], last]), topic)
            if synset is not None:
                return synset
    return None


def split_pairs(
    decoded: list[Decoded],
    words: wordnet.WordNet | None,
    *,
    held_source: str = "tuxpaint",
    test: int,
    validation: int,
    number: int = 1,
) -> tuple[dict[str, list[Pair]], Guard, collections.Counter]:
    """Splits decoded pairs; returns the splits, the guard and what was dropped, by source.

    Test and validation come from one source, each caption with one picture only, so that every
    image has exactly one right text; captions of several pictures stay in training. Nor is a
    picture trained on that is held out under another caption (Tux Paint and Open Clip Art share
    drawings).

    Args:
      decoded: readable pairs.
      words: for definitions; None does without.
      held_source: the source that test and validation come from.
      test, validation: pairs to hold out.
      number: of the split; another number holds out others.

    Raises:
      UserError: too few captions to hold any out.
    """
    keys = collections.Counter(
        text_keys.compact_key(found.raw.caption)
        for found in decoded
        if found.raw.source == held_source
    )
    candidates = [
        found
        for found in decoded
        if found.raw.source == held_source and keys[text_keys.compact_key(found.raw.caption)] == 1
    ]
    if not test or not validation or len(candidates) < test + validation:
        raise UserError(
            f"{held_source}: {len(candidates)} pictures with a caption of their own are too few to "
            f"hold out {test} for test and {validation} for validation"
        )
    candidates.sort(key=lambda found: _draw(text_keys.compact_key(found.raw.caption), number))
    held = {"test": candidates[:test], "validation": candidates[test : test + validation]}
    held_out = [*held["test"], *held["validation"]]
    guard = Guard(found.raw.caption for found in held_out)
    pictures_held = np.stack([found.fingerprint for found in held_out])
    numbers = {id(found) for found in held_out}
    dropped, train = collections.Counter(), []
    for found in decoded:
        if id(found) in numbers:
            continue
        distance = np.abs(pictures_held - found.fingerprint).mean(1).min()
        if guard.allows_pair(found.raw) and distance >= pictures.SAME_PICTURE:
            train.append(_training_pair(found, words, guard))
        else:
            dropped[found.raw.source] += 1
    known = {word for pair in train for word in text_keys.content_words(pair.raw.caption)}
    splits = {"train": train}
    for name, rows in held.items():
        splits[name] = [_held_out_pair(found, known) for found in rows]
    return splits, guard, dropped


def _held_out_pair(found: Decoded, known: set[str]) -> Pair:
    caption = found.raw.caption
    seen = set(text_keys.content_words(caption)) <= known
    return Pair(found.raw, found.image, text_keys.caption_key(caption), seen=seen)


def _training_pair(found: Decoded, words: wordnet.WordNet | None, guard: Guard) -> Pair:
    raw = found.raw
    key = text_keys.caption_key(raw.caption)
    synset = None if words is None else meaning(raw, words)
    texts, gloss = list(raw.keywords), ""
    if synset is not None and guard.allows_synset(synset):
        gloss = synset.gloss if guard.allows_text(synset.gloss) else ""
        above = [words.synsets[name].lemmas[0] for name in synset.hypernyms]
        texts += [lemma for lemma in (*synset.lemmas, *above)]
    unique = {text_keys.compact_key(text): text for text in reversed(texts) if text}
    unique.pop(key.replace(" ", ""), None)
    kept = tuple(text for text in reversed(unique.values()) if guard.allows_text(text))
    return Pair(raw, found.image, key, kept, gloss)


def split_sentences(
    words: wordnet.WordNet | None,
    pairs: dict[str, list[Pair]],
    guard: Guard,
    *,
    train: int,
    held_out: int,
    number: int = 1,
) -> dict[str, list[Sentence]]:
    """Draws sentences of WordNet for stage 1; held-out ones share no synset with training.

    Two thirds are a meaning's definition with an example sentence of it (the teacher puts
    them near each other), one third definitions of things one can see. Without WordNet the
    training captions are all there is, and held-out captions stand for held-out sentences.
    """
    captions = _caption_rows(pairs["train"])
    if words is None:
        rows = [Sentence(p.raw.caption, "caption") for p in pairs["test"] + pairs["validation"]]
        return {"train": captions[:train], "heldout": rows[:held_out], "captions": captions}
    used = {pair.gloss for pair in pairs["train"] if pair.gloss}
    allowed = [synset for synset in words.synsets.values() if guard.allows_synset(synset)]
    allowed.sort(key=lambda synset: _draw(synset.name, number))
    with_example = [s for s in allowed if _usable(s.gloss) and any(map(_usable, s.examples))]
    visible = [
        s for s in allowed if s.name[0] == "n" and s.lexfile in wordnet.VISIBLE and not s.examples
    ]
    visible = [s for s in visible if _usable(s.gloss) and s.lemmas[0].islower()]
    fresh = [s for s in with_example if s.gloss not in used]
    evaluated, spare = fresh[:held_out], fresh[held_out : held_out + held_out // 3]
    things = [s for s in visible if s.gloss not in used][: held_out - 2 * len(spare)]
    taken = {s.name for s in evaluated + spare + things}
    taken_texts = {t for s in evaluated + spare + things for t in (s.gloss, *s.examples)}
    rows = {
        "heldout": [*_both(spare), *_glosses(things)][:held_out],
        "gloss_to_example": [
            Sentence(s.gloss, "gloss", s.name, _first_example(s)) for s in evaluated
        ],
    }
    trained = _both([s for s in with_example if s.name not in taken])[: 2 * train // 3 // 2 * 2]
    trained += _glosses([s for s in visible if s.name not in taken])[: train - len(trained)]
    rows["train"] = [
        row for row in trained if guard.allows_text(row.text) and row.text not in taken_texts
    ]
    rows["captions"] = captions
    return {name: sorted(r, key=lambda row: _draw(row.text, number)) for name, r in rows.items()}


def _caption_rows(pairs: list[Pair]) -> list[Sentence]:
    """Lists every text of the training pairs once; what is a caption somewhere is a caption."""
    texts = [Sentence(pair.raw.caption, "caption") for pair in pairs]
    texts += [Sentence(text, "keyword") for pair in pairs for text in pair.keywords]
    texts += [Sentence(pair.gloss, "definition") for pair in pairs if pair.gloss]
    unique = {text_keys.compact_key(row.text): row for row in reversed(texts)}
    return list(unique.values())


def _usable(text: str) -> bool:
    return 4 <= len(text.split()) <= 40


def _first_example(synset: wordnet.Synset) -> str:
    return next(filter(_usable, synset.examples))


def _both(synsets: list[wordnet.Synset]) -> list[Sentence]:
    return [
        row
        for s in synsets
        for row in (
            Sentence(s.gloss, "gloss", s.name),
            Sentence(_first_example(s), "example", s.name),
        )
    ]


def _glosses(synsets: list[wordnet.Synset]) -> list[Sentence]:
    return [Sentence(s.gloss, "gloss", s.name) for s in synsets]
