"""Reads a checkpoint's tokenizer and encodes prompts with it."""

import json
import pathlib
import re
from collections.abc import Sequence

from unime_jax.data.prompts import Segment
from unime_jax.types import UserError


class Tokenizer:
    """A fast tokenizer of a checkpoint directory.

    The template's special tokens are special; the same characters in a user's text are text.
    """

    def __init__(self, directory: str | pathlib.Path):
        self._tokenizer = _read(pathlib.Path(directory).expanduser())
        # A tokenizer.json may carry the cutting and padding of whoever saved it.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder().values()
        special = sorted((t.content for t in added if t.special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        probe = self._tokenizer.encode("a", add_special_tokens=True).special_tokens_mask
        ids = self._tokenizer.encode("a", add_special_tokens=True).ids
        first = probe.index(0)
        last = len(probe) - probe[::-1].index(0)
        self._prefix, self._suffix = ids[:first], ids[last:]
        self._tokenizer.encode_special_tokens = True

    def count(self, text: str) -> int:
        """Counts the tokens of a text alone, without start and end tokens."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(self, segments: Sequence[Segment], image_slot: int) -> tuple[list[int], int, int]:
        """Encodes a rendered prompt, the tokenizer's own start and end tokens included.

        Neighbouring segments are encoded together, so that tokens at their borders are those
        of the whole string.

        Returns:
          Token ids, and where the user's text starts and stops among them. A token that spans
          the border belongs to the prompt.
        """
        ids = list(self._prefix)
        start = stop = None
        run: list[Segment] = []

        def flush():
            nonlocal start, stop
            if run:
                pieces, first, last = self._encode_run(run)
                if first is not None:
                    start, stop = len(ids) + first, len(ids) + last
                ids.extend(pieces)
                run.clear()

        for segment in segments:
            if segment.role == "image":
                flush()
                ids.append(image_slot)
            elif segment.role == "text":
                run.append(segment)
            else:
                rest = 0
                for found in self._special.finditer(segment.value):
                    run.append(Segment("prompt", segment.value[rest : found.start()]))
                    flush()
                    ids.append(self._tokenizer.token_to_id(found.group()))
                    rest = found.end()
                run.append(Segment("prompt", segment.value[rest:]))
        flush()
        ids.extend(self._suffix)
        if start is None:
            start = stop = len(ids)
        return ids, start, stop

    def _encode_run(self, run: list[Segment]) -> tuple[list[int], int | None, int | None]:
        text = "".join(segment.value for segment in run)
        if not text:
            return [], None, None
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        at, span = 0, None
        for segment in run:
            if segment.role == "text":
                span = (at, at + len(segment.value))
            at += len(segment.value)
        if span is None:
            return encoding.ids, None, None
        inside = [
            i
            for i, (first, last) in enumerate(encoding.offsets)
            if span[0] <= first and last <= span[1] and first < span[1]
        ]
        if not inside:
            return encoding.ids, None, None
        return encoding.ids, inside[0], inside[-1] + 1


def _read(directory: pathlib.Path):
    import tokenizers

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{directory} holds no tokenizer.json; save it with transformers' fast class"
        )
    try:
        json.loads(path.read_text(encoding="utf-8"))
        return tokenizers.Tokenizer.from_file(str(path))
    # tokenizers raises bare Exception for whatever it does not understand.
    except Exception as error:
        raise UserError(f"{path} is not a readable tokenizer: {error}") from None
