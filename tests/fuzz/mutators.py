"""Damages files at random, the same way for the same number."""

import random
import re

_EDGES = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
_JSON = re.compile(rb'-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|"(?:[^"\\]|\\.)*"|true|false|null')
_VALUES = (
    b"null", b"true", b"0", b"-1", b"1", b"3.5", b"1e400", b"NaN", b"99999999999999999999",
    b"9" * 400, b"[]", b"{}", b'""', b'"x"', b'"../../etc/passwd"', b'"\\ud800"', b'"\\u0000"',
    b"[[1]]", b'{"a": 1}', b"2147483648", b"-2147483649", b'"(a+)+$"', b'"["', b"1e-300",
    b'"F8_E4M3"', b'"I64"',
)  # fmt: skip


def mutated(content: bytes, seed: int) -> bytes:
    """Returns a damaged copy; text that looks like JSON often has a value changed instead."""
    rng = random.Random(seed)
    values = list(_JSON.finditer(content[: 1 << 16])) if _is_text(content) else []
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if values and rng.random() < 0.7:
            return _other_value(content, values, rng)
        rng.choice(_DAMAGES)(found, rng)
    return bytes(found)


def _is_text(content: bytes) -> bool:
    return content[:1] in (b"{", b"[") or b'{"' in content[8:16]


def _other_value(content: bytes, values: list[re.Match], rng: random.Random) -> bytes:
    """Changes one value of JSON, for one of another kind or for one that stands elsewhere."""
    old = rng.choice(values)
    new = rng.choice(_VALUES) if rng.random() < 0.7 else rng.choice(values)[0]
    changed = content[: old.start()] + new + content[old.end() :]
    if content[:1] in (b"{", b"["):
        return changed
    # The header of a safetensors file: its length stands before it.
    length = int.from_bytes(content[:8], "little") + len(new) - (old.end() - old.start())
    return max(length, 0).to_bytes(8, "little") + changed[8:]


def _place(found: bytearray, rng: random.Random) -> int:
    """Picks a place; headers, where most can go wrong, more often than the rest."""
    limit = len(found) if rng.random() < 0.5 else min(len(found), 512)
    return rng.randrange(limit) if limit else 0


def _flip(found: bytearray, rng: random.Random) -> None:
    if found:
        found[_place(found, rng)] ^= 1 << rng.randrange(8)


def _overwrite(found: bytearray, rng: random.Random) -> None:
    at, size = _place(found, rng), rng.choice((1, 2, 4, 8))
    number = rng.choice(_EDGES) & ((1 << 8 * size) - 1)
    found[at : at + size] = number.to_bytes(size, rng.choice(("little", "big")))


def _delete(found: bytearray, rng: random.Random) -> None:
    at = _place(found, rng)
    del found[at : at + rng.choice((1, 4, 64, 1024))]


def _insert(found: bytearray, rng: random.Random) -> None:
    at = _place(found, rng)
    found[at:at] = rng.choice((b"\0" * 8, rng.randbytes(rng.randrange(1, 40)), b"[" * 3000))


def _repeat(found: bytearray, rng: random.Random) -> None:
    at = _place(found, rng)
    found[at:at] = found[at : at + rng.choice((1, 16, 256))] * rng.choice((1, 2, 50))


def _cut(found: bytearray, rng: random.Random) -> None:
    del found[rng.randrange(len(found) + 1) :]


def _move(found: bytearray, rng: random.Random) -> None:
    at, to, size = _place(found, rng), _place(found, rng), rng.choice((4, 16, 128))
    found[to : to + size] = found[at : at + size]


_DAMAGES = (_flip, _flip, _overwrite, _overwrite, _delete, _insert, _repeat, _cut, _move)
