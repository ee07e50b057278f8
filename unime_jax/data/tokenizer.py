"""Reads a checkpoint's tokenizer and encodes prompts with it."""

import contextlib
import functools
import itertools
import json
import pathlib
import re
import threading
from collections.abc import Sequence

from unime_jax.data.prompts import Segment
from unime_jax.types import UserError, reason

MAX_LETTERS = 1 << 21  # of a text; some take a second for every 250,000 and .5 KB a letter
_CONTROL = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_MANY = 1 << 17  # letters of a text that is encoded when no other such is
_ALONE = threading.Lock()


class Tokenizer:
    """A fast tokenizer of a checkpoint directory.

    The template's special tokens are special; the same characters in a user's text are text. Apart
    from that the ids are those of the whole string in the tokenizers library.

    Args:
      directory: holds tokenizer.json.
      image_token: id of the added token that marks an image inside a string (its lstrip and rstrip
        count), or None.
      apart: the strings around an image are encoded one by one, each with the tokenizer's own
        start and end tokens.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        *,
        image_token: int | None = None,
        apart: bool = False,
    ):
        path, content = _read(pathlib.Path(directory).expanduser())
        _mark_control_tokens(content)
        self._first = _build(path, content)
        # A Metaspace tokenizer may put its "_" before the string's first piece alone.
        changed = _never_prepend(content.get("pre_tokenizer"))
        self._later = _build(path, content) if changed else self._first
        self._apart = apart
        added = self._first.get_added_tokens_decoder()
        self._image = added.get(image_token)
        self._special = {t.content: (id, t) for id, t in added.items() if t.special}
        longest = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest)) or r"(?!)")
        self._prefix, self._suffix = _ends(path, self._first)
        self._first.encode_special_tokens = True
        self._later.encode_special_tokens = True

    def count(self, text: str) -> int:
        """Counts the tokens of a text alone, without start and end tokens."""
        return len(self._first.encode(text, add_special_tokens=False).ids)

    def text_of(self, id: int) -> str:
        """Returns what a token stands for in a text, the blank in front of a word included.

        A piece of a character is written as its bytes, <0xE4><0xBD>, and an id that the tokenizer
        does not have (models have more than it) as <32050>.
        """
        piece = self._first.id_to_token(id)
        if piece is None:
            return f"<{id}>"
        text = self._first.decode([id], skip_special_tokens=False)
        if "\ufffd" in text and piece != "\ufffd":
            alphabet = _byte_alphabet()
            known = all(letter in alphabet for letter in piece)
            return "".join(f"<0x{alphabet[x]:02X}>" for x in piece) if known else piece
        # Decoders of the sentencepiece kind drop the blank at the start of what they decode.
        return f" {text}" if piece.startswith("\u2581") and not text.startswith(" ") else text

    def encode(self, segments: Sequence[Segment], image_slot: int) -> tuple[list[int], int, int]:
        """Encodes a rendered prompt, the tokenizer's own start and end tokens included.

        Returns:
          Token ids, and where the user's text (the last one of several) starts and stops among
          them. A token that spans the border belongs to the prompt.

        Raises:
          UserError: a text that is no Unicode, or too long for any model.
        """
        letters = sum(len(segment.value) for segment in segments)
        if letters > MAX_LETTERS:
            raise UserError(f"a text of {letters} letters; {MAX_LETTERS} are the most: cut it")
        try:
            for segment in segments:
                segment.value.encode()
        except UnicodeEncodeError:
            raise UserError("half a surrogate pair in a text, which is no character") from None
        with _ALONE if letters > _MANY else contextlib.nullcontext():
            return self._encode(segments, image_slot)

    def _encode(self, segments: Sequence[Segment], image_slot: int) -> tuple[list[int], int, int]:
        ids: list[int] = []
        span = None
        for number, string in enumerate(_split(segments) if self._apart else [segments]):
            if number:
                ids.append(image_slot)
            ids += self._prefix
            found, inside = self._encode_string(string, image_slot)
            if inside is not None:
                span = len(ids) + inside[0], len(ids) + inside[1]
            ids += found + self._suffix
        start, stop = span or (len(ids), len(ids))
        return ids, start, stop

    def _encode_string(
        self, segments: Sequence[Segment], image_slot: int
    ) -> tuple[list[int], tuple[int, int] | None]:
        """Encodes a string between its special tokens."""
        text = "".join(segment.value for segment in segments)
        wanted = None  # the user's text among the characters
        at = 0
        for segment in segments:
            if segment.role == "text":
                wanted = at, at + len(segment.value)
            at += len(segment.value)
        ids: list[int] = []
        inside: list[int] = []
        rest, tokenizer = 0, self._first
        for start, stop, id in [*self._cuts(segments, text, image_slot), (len(text), None, None)]:
            if rest < start:
                encoding = tokenizer.encode(text[rest:start], add_special_tokens=False)
                for place, (first, last) in enumerate(encoding.offsets):
                    first, last = first + rest, last + rest
                    if wanted and wanted[0] <= first < wanted[1] and last <= wanted[1]:
                        inside.append(len(ids) + place)
                ids += encoding.ids
            if id is not None:
                ids.append(id)
                rest, tokenizer = stop, self._later
        return ids, (inside[0], inside[-1] + 1) if inside else None

    def _cuts(self, segments: Sequence[Segment], text: str, image_slot: int):
        """Yields (start, stop, id) of the special tokens, with the blanks that they swallow."""
        at = previous = 0
        for segment in segments:
            found = []
            if segment.role == "image":
                found = [(at, at, image_slot, self._image)]
            elif segment.role == "prompt":
                for match in self._pattern.finditer(segment.value):
                    found.append((at + match.start(), at + match.end(), *self._special[match[0]]))
            at += len(segment.value)
            for start, stop, id, token in found:
                if token is not None:
                    if token.single_word and _touches_a_word(text, start, stop):
                        continue
                    if token.lstrip:
                        start = max(previous, len(text[:start].rstrip()))
                    if token.rstrip:
                        stop += len(text[stop:]) - len(text[stop:].lstrip())
                yield start, stop, id
                previous = stop


def _ends(path: pathlib.Path, tokenizer) -> tuple[list[int], list[int]]:
    """Returns the tokens that stand before and behind every string.

    Llama's classes in transformers follow tokenizer_config.json, all others the tokenizer's own
    template.
    """
    settings = _read_json(path.with_name("tokenizer_config.json"))
    kind = str(settings.get("tokenizer_class", ""))
    if kind.startswith("Llama") and "add_bos_token" in settings:
        names = [
            settings.get(name) if settings.get(f"add_{name}") else None
            for name in ("bos_token", "eos_token")
        ]
        names = [name.get("content") if isinstance(name, dict) else name for name in names]
        ids = [None if name is None else tokenizer.token_to_id(name) for name in names]
        return tuple([] if id is None else [id] for id in ids)
    probe = tokenizer.encode("a", add_special_tokens=True)
    real = [place for place, special in enumerate(probe.special_tokens_mask) if not special]
    if not real:
        raise UserError(f"{path}: this tokenizer makes no token of a text")
    return probe.ids[: real[0]], probe.ids[real[-1] + 1 :]


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Returns the letters that byte-level tokenizers write for the 256 bytes, as GPT-2 did."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): x for i, x in enumerate(others)}


def _touches_a_word(text: str, start: int, stop: int) -> bool:
    return bool(re.match(r"\w", text[stop:]) or re.search(r"\w\Z", text[:start]))


def _split(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Splits a prompt at its images."""
    strings: list[list[Segment]] = [[]]
    for is_image, run in itertools.groupby(segments, lambda segment: segment.role == "image"):
        if is_image:
            strings += [[] for _ in run]
        else:
            strings[-1] += run
    return strings


def _mark_control_tokens(content: dict) -> None:
    """Makes every added token that looks like a control token a special one.

    Phi's tokenizer.json has a "</s>" that is not; in a user's text it would end the row.
    """
    for token in content.get("added_tokens") or ():
        if isinstance(token, dict) and _CONTROL.fullmatch(str(token.get("content", ""))):
            token["special"] = True


def _never_prepend(pre_tokenizer: dict | None) -> bool:
    """Switches "before the first piece alone" to "never"; returns whether it was there."""
    parts, changed = [pre_tokenizer or {}], False
    while parts:
        part = parts.pop()
        parts += part.get("pretokenizers", [])
        if part.get("prepend_scheme") == "first":
            part["prepend_scheme"], changed = "never", True
    return changed


def _read(directory: pathlib.Path) -> tuple[pathlib.Path, dict]:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{directory} holds no tokenizer.json; save it with transformers' fast class"
        )
    return path, _read_json(path)


def _read_json(path: pathlib.Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a tokenizer's settings")
    return content


def _build(path: pathlib.Path, content: dict):
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    # tokenizers raises bare Exception for whatever it does not understand, and what its Rust code
    # panics with is none of these.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{path} is not a readable tokenizer: {reason(error)}") from None
    # A tokenizer.json may carry the cutting and padding of whoever saved it.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
