"""Stage 1's texts of prepared data, two a row."""

import os
from collections.abc import Sequence

from unime_jax.data import sources
from unime_jax.data.sources import Example


class Couples:
    """Rows of two texts, both items of a stage-1 batch."""

    def __init__(self, rows: Sequence[tuple[str, str]], name: str):
        self.name = name
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        query, target = self._rows[index]
        return Example(query_text=query, target_text=target, target_id=target, set=self.name)


def read(path: str | os.PathLike) -> list[Couples]:
    """Reads the texts of stage 1 from a directory written by `prepare`, two a row.

    A meaning's definition and its example sentence are one row, so that they meet in a batch, as
    the sentences of an NLI row do: a text without any relative there teaches little (recall@10 of a
    definition's example .58 after 50 steps, .46 drawn one by one). The other definitions and the
    captions are coupled in their (random) order.
    """
    by_meaning: dict[str, list[str]] = {}
    for row in sources.split_sentences(path, "train"):
        by_meaning.setdefault(row["synset"], []).append(row["text"])
    meanings = [tuple(texts[:2]) for texts in by_meaning.values() if len(texts) > 1]
    alone = [texts[0] for texts in by_meaning.values() if len(texts) == 1]
    captions = [
        r["text"] for r in sources.split_sentences(path, "captions") if r["kind"] == "caption"
    ]
    found = {"meanings": meanings, "definitions": _by_two(alone), "captions": _by_two(captions)}
    return [Couples(rows, name) for name, rows in found.items() if rows]


def _by_two(texts: list[str]) -> list[tuple[str, str]]:
    even = texts + texts[:1] * (len(texts) % 2)
    return list(zip(even[::2], even[1::2], strict=True))
