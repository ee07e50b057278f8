"""A user's own training pairs, with an instruction, hard negatives and judge scores if wanted.

A .jsonl (a JSON object a line), .json (a list of objects) or .parquet (a column a key) has

    query_text, query_image      one of them or both; images are paths
    target_text, target_image    likewise (also as pos_text, pos_image)
    target_id                    optional: equal for equal targets
    set                          optional: name of the data set that the row belongs to
    hard_negatives               optional: a list of [text, image] or {"text": ..., "image": ...}
    hard_negatives_scores        optional: a judge's score of each hard negative
    query_pos_scores             the judge's score of the target (also as target_score)

which covers the published files of UniME-V2. A text may mark its image's place by <|image_1|>.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from unime_jax.data import image_files, json_files, parquet_rows, prompts
from unime_jax.data.sources import Example, ImageRef, Item
from unime_jax.types import UserError, reason

_ALIASES = {"pos_text": "target_text", "pos_image": "target_image", "target_score": "target_score",
            "query_pos_scores": "target_score"}  # fmt: skip
_TEXTS = ("query_text", "query_image", "target_text", "target_image", "target_id", "set")
_READ = {*_TEXTS, *_ALIASES, "hard_negatives", "hard_negatives_scores"}
_SIGNS = {"query_text", "query_image"}
_LOOKED_AT = 100  # lines, to see what a file is


@dataclasses.dataclass(frozen=True)
class _Row:
    """One row as given; "" stands for what is absent."""

    query: tuple[str, str]
    target: tuple[str, str]
    negatives: tuple[tuple[str, str], ...] = ()
    scores: tuple[float, ...] = ()
    target_id: str = ""


class TaskPairs:
    """Rows of one set, all with images on the same sides.

    Attributes:
      name: of the set.
      direction: what its sides are, for reports.
    """

    def __init__(self, name: str, rows: Sequence[_Row], folder: image_files.Folder):
        self.name = name
        self._rows = rows
        self._folder = folder
        sides = ("image" if image else "text" for _, image in (rows[0].query, rows[0].target))
        self.direction = " to ".join(sides)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[index]
        query, target = self._item(row.query), self._item(row.target)
        return Example(
            query_text=query.text,
            query_image=query.image,
            target_text=target.text,
            target_image=target.image,
            target_id=row.target_id,
            set=self.name,
            negatives=tuple(map(self._item, row.negatives)),
            scores=row.scores,
        )

    def _item(self, side: tuple[str, str]) -> Item:
        text, image = side
        if not image:
            return Item(text, None)
        name = str(self._folder.start / image)
        load = functools.partial(self._folder.read, image)
        return Item(prompts.slotted(text) if text else None, ImageRef(-1, name, load, image))


def reads(path: pathlib.Path) -> bool:
    """Says whether a file is one of this module's, by its ending or its first line's keys."""
    if path.suffix in (".json", ".parquet"):
        return True
    if path.suffix != ".jsonl":
        return False
    try:
        for place, (where, line) in enumerate(json_files.lines(path)):
            if place == _LOOKED_AT:
                break
            with contextlib.suppress(UserError):  # the first lines may be bad ones
                first = json_files.parse(line, where)
                if isinstance(first, dict):
                    return bool(_SIGNS & set(first))
    except UserError:
        pass
    return False


def read(
    path: pathlib.Path,
    *,
    folder: image_files.Folder | None = None,
    judged: int = 0,
    rows_per_set: int = 0,
    faults: list[str] | None = None,
) -> list[TaskPairs]:
    """Reads all rows, and sorts them by set and by the sides of their images.

    Args:
      path: the file.
      folder: of the images; None: the file's own.
      judged: hard negatives of each row to keep, with their scores, which every row must then
        have; 0: none. Where a row has fewer its target takes the empty places, at score -inf.
      rows_per_set: the first so many rows of each set; 0: all.
      faults: gets what is wrong with malformed rows, which are left out; None: the first one stops.

    Raises:
      UserError: an unreadable file, no usable row, a malformed one; rows are named by number.
    """
    folder = folder or image_files.Folder(path.parent)
    found: dict[tuple, list[_Row]] = {}
    counts: dict[str, int] = collections.Counter()
    for where, given in _objects(path, faults):
        try:
            name, row = _parse(where, given, judged)
        except UserError as error:
            json_files.keep(faults, error)
            continue
        if rows_per_set and counts[name] >= rows_per_set:
            continue
        counts[name] += 1
        sides = (row.query, row.target, *row.negatives)
        found.setdefault((name, *(bool(image) for _, image in sides)), []).append(row)
    if not found:
        raise UserError(f"{path}: no rows in it" + (f"; {faults[0]}" if faults else ""))
    return [TaskPairs(key[0], rows, folder) for key, rows in sorted(found.items())]


def _objects(path: pathlib.Path, faults: list[str] | None) -> Iterator[tuple[str, Any]]:
    """Yields each row with the words that name it."""
    if path.suffix == ".parquet":
        yield from _table(path, faults)
    elif path.suffix == ".json":
        yield from json_files.rows(path, faults)
    else:
        for where, line in json_files.lines(path):
            try:
                yield where, json_files.parse(line, where)
            except UserError as error:
                json_files.keep(faults, error)


def _table(path: pathlib.Path, faults: list[str] | None) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        there = file.schema_arrow.names
        columns = [name for name in there if name in _READ]  # others may be anything
        if not columns:
            raise UserError(f"{path}: no column of pairs in it, but {', '.join(there)}")
        batches = file.iter_batches(1024, columns=columns)
        for number, row in enumerate(r for batch in batches for r in parquet_rows.dicts(batch)):
            where = f"{path} row {number}"
            if broken := parquet_rows.broken(row):
                json_files.keep(faults, UserError(f"{where}: {broken} is not UTF-8"))
            else:
                yield where, row
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a readable parquet file ({reason(error)})") from None


def _parse(where: str, given: Any, judged: int) -> tuple[str, _Row]:
    if not isinstance(given, dict):
        raise UserError(f"{where}: a row is a JSON object")
    row = {_ALIASES.get(key, key): value for key, value in given.items()}
    for key in _TEXTS:
        value = row.get(key)
        if value is not None and not isinstance(value, str):
            raise UserError(f'{where}: "{key}" is {json_files.short(value)}; give a string')
        row[key] = value or ""
    sides = [(row[f"{side}_text"], row[f"{side}_image"]) for side in ("query", "target")]
    for name, (text, image) in zip(("query", "target"), sides, strict=True):
        if not text.strip() and not image:
            raise UserError(f'{where}: give "{name}_text", "{name}_image" or both')
        _check_side(where, name, text, image)
    listed = row.get("hard_negatives") or ()
    if not isinstance(listed, (list, tuple)):
        raise UserError(f'{where}: "hard_negatives" is {json_files.short(listed)}; give a list')
    # Of thousands no more are held than are used.
    negatives = tuple(_negative(where, item) for item in listed[: judged or None])
    scores = _scores(where, row, len(listed))
    if judged and not (negatives and scores):
        raise UserError(
            f'{where}: config.stage="judge" needs "hard_negatives", "hard_negatives_scores" and '
            f'"query_pos_scores" in every row'
        )
    missing = max(0, judged - len(negatives))
    negatives = negatives[:judged] + (sides[1],) * missing  # () where none are judged
    scores = scores[: judged + 1] + (-math.inf,) * missing if judged else ()
    target_id = f"id {row['target_id']}" if row["target_id"] else ""
    return row["set"] or "pairs", _Row(*sides, negatives, scores, target_id)


def _check_side(where: str, name: str, text: str, image: str) -> None:
    if "\0" in image:
        raise UserError(f'{where}: "{name}_image" has a NUL character')
    if image and text:
        try:
            prompts.slotted(text)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def _negative(where: str, item: Any) -> tuple[str, str]:
    if isinstance(item, dict):
        item = [item.get("text"), item.get("image")]
    good = isinstance(item, (list, tuple)) and len(item) == 2
    good = good and all(part is None or isinstance(part, str) for part in item)
    if not good or not any(item):
        raise UserError(f"{where}: hard negative {json_files.short(item)} is no [text, image]")
    side = item[0] or "", item[1] or ""
    _check_side(where, "hard_negatives", *side)
    return side


def _scores(where: str, row: dict[str, Any], negatives: int) -> tuple[float, ...]:
    """Returns the scores of the target and of every negative; () without."""
    own, others = row.get("target_score"), row.get("hard_negatives_scores")
    if others is not None and not isinstance(others, (list, tuple)):
        others = [others]
    own = own[0] if isinstance(own, list) and len(own) == 1 else own
    if own is None and not others:
        return ()
    numbers = [own, *(others or ())]
    if len(numbers) != 1 + negatives or not all(
        isinstance(x, (int, float)) and _is_finite(x) for x in numbers
    ):
        raise UserError(
            f"{where}: {negatives} hard negatives need as many finite hard_negatives_scores, and "
            f"one query_pos_scores for the target"
        )
    return tuple(map(float, numbers))


def _is_finite(number: int | float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer that no float reaches
        return False
