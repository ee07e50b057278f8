"""Reads WordNet 3.0's database files: synsets, glosses, example sentences."""

import dataclasses
import re

from unime_jax.types import UserError

PARTS = ("noun", "verb", "adj", "adv")
FILES = [f"data.{part}" for part in PARTS] + ["index.noun"]
# Lexicographer files of nouns one can see: animal, artifact, body, food, location, object,
# person, phenomenon, plant, shape.
VISIBLE = frozenset([5, 6, 8, 13, 15, 17, 18, 19, 20, 25])
PERSON = 18


@dataclasses.dataclass(frozen=True)
class Synset:
    """One meaning.

    Attributes:
      name: part of speech and offset, unique ("n02129604").
      lexfile: number of the lexicographer's file it stands in, its broad topic.
      lemmas: its words, spaces for underscores, case kept.
      gloss: the definition; examples: sentences that use one of the words.
      hypernyms: names of the synsets directly above it.
    """

    name: str
    lexfile: int
    lemmas: tuple[str, ...]
    gloss: str
    examples: tuple[str, ...]
    hypernyms: tuple[str, ...]


class WordNet:
    """All synsets, and nouns' senses from most to least frequent."""

    def __init__(self, files: dict[str, str]):
        self.synsets: dict[str, Synset] = {}
        for part in PARTS:
            for number, line in enumerate(_content(files, f"data.{part}"), 1):
                try:
                    synset = _parse(line, part)
                except (ValueError, IndexError):
                    raise UserError(f"WordNet's data.{part}: line {number} is malformed") from None
                self.synsets[synset.name] = synset
        self._nouns = {}
        for number, line in enumerate(_content(files, "index.noun"), 1):
            try:
                fields = line.split()
                names = [f"n{offset}" for offset in fields[-int(fields[2]) :]]
            except (ValueError, IndexError):
                raise UserError(f"WordNet's index.noun: line {number} is malformed") from None
            self._nouns[fields[0].replace("_", " ")] = names

    def noun_senses(self, lemma: str) -> list[Synset]:
        """Lists a noun's meanings, most frequent first; [] for what is no noun."""
        return [self.synsets[name] for name in self._nouns.get(lemma.lower(), [])]

    def sense(self, phrase: str, lexfiles: frozenset[int] = VISIBLE) -> Synset | None:
        """Picks the meaning of a noun within a topic: its most frequent sense of those files."""
        return next((s for s in self.noun_senses(phrase) if s.lexfile in lexfiles), None)

    def vocabulary(self) -> frozenset[str]:
        """Is every single word of any part of speech that is written in lower case."""
        return frozenset(
            lemma
            for synset in self.synsets.values()
            for lemma in synset.lemmas
            if lemma.islower() and lemma.isalpha()
        )


def _content(files: dict[str, str], name: str) -> list[str]:
    if name not in files:
        raise UserError(f"the WordNet package holds no {name}")
    return [line for line in files[name].splitlines() if line and not line.startswith("  ")]


def _parse(line: str, part: str) -> Synset:
    head, _, text = line.partition("|")
    fields = head.split()
    count = int(fields[3], 16)
    lemmas = [re.sub(r"\(\w+\)$", "", word) for word in fields[4 : 4 + 2 * count : 2]]
    pointers = fields[5 + 2 * count :]
    above = [
        pointers[i + 2] + pointers[i + 1]
        for i in range(0, 4 * int(fields[4 + 2 * count]), 4)
        if pointers[i] in ("@", "@i")
    ]
    gloss, examples = split_gloss(text)
    letter = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}[part]
    return Synset(
        name=letter + fields[0],
        lexfile=int(fields[1]),
        lemmas=tuple(word.replace("_", " ") for word in lemmas),
        gloss=gloss,
        examples=tuple(examples),
        hypernyms=tuple(above),
    )


def split_gloss(text: str) -> tuple[str, list[str]]:
    """Separates the definition from the quoted example sentences behind it."""
    examples = [found.strip() for found in re.findall(r'"([^"]+)"', text)]
    definition = re.split(r'[;:,]?\s*"', text, maxsplit=1)[0]
    return definition.strip().strip(";").strip(), [e for e in examples if len(e.split()) > 1]
