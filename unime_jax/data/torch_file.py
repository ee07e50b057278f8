"""Reads the tensors of a PyTorch checkpoint of the legacy format, without PyTorch.

Such a file is a row of pickles followed by raw storages. A pickle is a program; this module runs
none. It knows the few instructions that a state dict is written with, as data: names become words
of a fixed list or are refused, and nothing is imported or called.
"""

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from unime_jax.types import UserError

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_DTYPES = {"FloatStorage": np.float32, "LongStorage": np.int64, "HalfStorage": np.float16}
_DICT, _TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"


class _Storage:
    def __init__(self, dtype, size):
        self.dtype, self.size, self.array = np.dtype(dtype), size, None


class _Tensor:
    """Where a tensor lies in its storage; resolved once the storages are read."""

    def __init__(self, storage, offset, size, stride, *_):
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    def array(self) -> np.ndarray:
        item = self.storage.dtype.itemsize
        last = self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))
        if self.offset < 0 or min(self.stride, default=0) < 0 or last >= self.storage.size:
            raise ValueError("a tensor reaches outside of its storage")
        if min(self.size, default=0) < 0 or math.prod(self.size) > self.storage.size:
            raise ValueError("a tensor is larger than its storage")
        strides = [stride * item for stride in self.stride]
        view = np.lib.stride_tricks.as_strided(
            self.storage.array[self.offset :], self.size, strides
        )
        return np.ascontiguousarray(view)


class _Reader:
    """Reads the values of a file one after the other.

    Args:
      content: of the file.
    """

    def __init__(self, content: bytes):
        self._content, self._at = content, 0
        self.storages: dict[str, _Storage] = {}
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def take(self, count: int) -> bytes:
        if not 0 <= count <= len(self._content) - self._at:
            raise ValueError("the file is cut short")
        self._at += count
        return self._content[self._at - count : self._at]

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        end = self._content.find(b"\n", self._at)
        return self.take((end if end >= 0 else len(self._content)) - self._at + 1)[:-1].decode()

    def value(self) -> Any:
        """Reads a value.

        Raises:
          ValueError: the file is cut short, or says what no state dict says.
        """
        self._stack, self._marks, self._memo = [], [], {}
        while (code := self.take(1)) != b".":
            if code not in _INSTRUCTIONS:
                raise ValueError(f"instruction {code!r} has no place in a state dict")
            _INSTRUCTIONS[code](self)
        (found,) = self._stack
        return found

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        return self._stack.pop()

    def since_mark(self) -> list:
        start = self._marks.pop()
        found = self._stack[start:]
        del self._stack[start:]
        return found

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def tuple_of(self, count: int) -> None:
        found = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(found)))

    def long(self) -> None:
        self.push(int.from_bytes(self.take(self.number("<B")), "little", signed=True))

    def text(self) -> None:
        self.push(self.take(self.number("<I")).decode())

    def put(self, form: str) -> None:
        self._memo[self.number(form)] = self._stack[-1]

    def get(self, form: str) -> None:
        self.push(self._memo[self.number(form)])

    def name(self) -> None:
        found = f"{self._line()} {self._line()}"
        module, _, word = found.partition(" ")
        if found not in (_DICT, _TENSOR) and (module != "torch" or word not in _DTYPES):
            raise ValueError(f"{module}.{word} has no place in a state dict")
        self.push(found)

    def made(self) -> None:
        """Makes what a name stands for: an empty dict, or a tensor."""
        arguments, name = self.pop(), self.pop()
        if name == _DICT and arguments == ():
            self.push({})
        elif name == _TENSOR:
            self.push(_Tensor(*arguments))
        else:
            raise ValueError(f"{name} of {len(arguments)} arguments has no place in a state dict")

    def storage(self) -> None:
        kind, name, key, _, size, view = self.pop()
        if kind != "storage" or view is not None:
            raise ValueError("unknown kind of storage")
        self.push(self.storages.setdefault(key, _Storage(_DTYPES[name.partition(" ")[2]], size)))

    def extend(self, values: list) -> None:
        self._stack[-1].extend(values)

    def set_items(self, pairs: list) -> None:
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            self._stack[-1][key] = value


# Written by `torch.save` for dicts of tensors, lists of names and numbers (pickle protocol 2).
_INSTRUCTIONS: dict[bytes, Callable[[_Reader], None]] = {
    b"\x80": lambda reader: reader.take(1),
    b"(": _Reader.mark,
    b")": lambda reader: reader.push(()),
    b"]": lambda reader: reader.push([]),
    b"}": lambda reader: reader.push({}),
    b"N": lambda reader: reader.push(None),
    b"\x88": lambda reader: reader.push(True),
    b"\x89": lambda reader: reader.push(False),
    b"K": lambda reader: reader.push(reader.number("<B")),
    b"M": lambda reader: reader.push(reader.number("<H")),
    b"J": lambda reader: reader.push(reader.number("<i")),
    b"\x8a": _Reader.long,
    b"X": _Reader.text,
    b"\x85": lambda reader: reader.tuple_of(1),
    b"\x86": lambda reader: reader.tuple_of(2),
    b"\x87": lambda reader: reader.tuple_of(3),
    b"t": lambda reader: reader.push(tuple(reader.since_mark())),
    b"q": lambda reader: reader.put("<B"),
    b"r": lambda reader: reader.put("<I"),
    b"h": lambda reader: reader.get("<B"),
    b"j": lambda reader: reader.get("<I"),
    b"c": _Reader.name,
    b"R": _Reader.made,
    b"Q": _Reader.storage,
    b"e": lambda reader: reader.extend(reader.since_mark()),
    b"a": lambda reader: reader.extend([reader.pop()]),
    b"u": lambda reader: reader.set_items(reader.since_mark()),
    b"s": lambda reader: reader.set_items([reader.pop(), reader.pop()][::-1]),
    b"b": lambda reader: reader.pop(),  # attributes of a dict: versions of modules
}


def read_state_dict(content: bytes, name: str) -> dict[str, np.ndarray]:
    """Reads a state dict saved by `torch.save`; `name` stands in error messages.

    Raises:
      UserError: the file is another one, damaged, or holds something else than tensors.
    """
    reader = _Reader(content)
    try:
        for expected in (_MAGIC, _PROTOCOL):
            if reader.value() != expected:
                raise ValueError("not a legacy PyTorch file")
        reader.value()  # byte order and sizes of the machine that saved
        tensors = reader.value()
        for key in reader.value():
            storage = reader.storages[key]
            (size,) = struct.unpack("<q", reader.take(8))
            if size != storage.size:
                raise ValueError("a storage of another size than announced")
            raw = reader.take(size * storage.dtype.itemsize)
            storage.array = np.frombuffer(raw, storage.dtype.newbyteorder("<"))
        return {key: tensor.array() for key, tensor in tensors.items()}
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError, struct.error) as e:
        raise UserError(f"{name} is no readable PyTorch state dict: {e}") from None
