"""Stage 1's texts of prepared data, two a row."""

import os
from collections.abc import Sequence

from unime_jax.data import sources
from unime_jax.data.sources import Example
from unime_jax.data.teacher_vectors import sentences_hash


class Couples:
    """Rows of two texts, both items of a stage-1 batch."""

    def __init__(self, rows: Sequence[tuple[str, str]], name: str):
        self.name = name
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        """See `text_sources.Texts.fingerprint`."""
        return f"couples {sentences_hash([text for row in self._rows for text in row])}"

    def __getitem__(self, index: int) -> Example:
        query, target = self._rows[index]
        return Example(query_text=query, target_text=target, target_id=target, set=self.name)


def read(path: str | os.PathLike) -> tuple[list[Couples], list[str]]:
    """Reads stage 1's rows from a directory written by `prepare`, and every text once.

    A meaning's definition and its example sentence are one row, so that they meet in a batch, as
    the sentences of an NLI row do: a text without any relative there teaches little (recall@10 of a
    definition's example .58 after 50 steps, .46 drawn one by one). The other definitions and the
    captions are coupled in their (random) order.
    """
    sentences, captions = sources.stage1_rows(path)
    by_meaning: dict[str, list[str]] = {}
    for row in sentences:
        by_meaning.setdefault(row["synset"], []).append(row["text"])
    found = {
        "meanings": [tuple(texts[:2]) for texts in by_meaning.values() if len(texts) > 1],
        "definitions": _by_two([texts[0] for texts in by_meaning.values() if len(texts) == 1]),
        "captions": _by_two([row["text"] for row in captions]),
    }
    rows = [Couples(rows, name) for name, rows in found.items() if rows]
    return rows, sources.distinct_texts(sentences, captions)


def _by_two(texts: list[str]) -> list[tuple[str, str]]:
    even = texts + texts[:1] * (len(texts) % 2)
    return list(zip(even[::2], even[1::2], strict=True))
