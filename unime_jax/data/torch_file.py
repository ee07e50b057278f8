"""Reads the tensors of a PyTorch checkpoint of the legacy format, without PyTorch.

Such a file is a row of pickles followed by raw storages. Unpickling can run code, so only the
few names that a state dict is made of are allowed.
"""

import collections
import io
import pickle

import numpy as np

from unime_jax.types import UserError

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_DTYPES = {"FloatStorage": np.float32, "LongStorage": np.int64, "HalfStorage": np.float16}


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
        strides = [stride * item for stride in self.stride]
        view = np.lib.stride_tricks.as_strided(
            self.storage.array[self.offset :], self.size, strides
        )
        return np.ascontiguousarray(view)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, storages):
        super().__init__(file, encoding="utf-8")
        self._storages = storages

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a state dict")

    def persistent_load(self, saved):
        kind, dtype, key, _, size, view = saved
        if kind != "storage" or view is not None:
            raise pickle.UnpicklingError("unknown kind of storage")
        return self._storages.setdefault(key, _Storage(dtype, size))


def read_state_dict(content: bytes, name: str) -> dict[str, np.ndarray]:
    """Reads a state dict saved by `torch.save`; `name` stands in error messages."""
    file, storages = io.BytesIO(content), {}
    try:
        for expected in (_MAGIC, _PROTOCOL):
            if _Unpickler(file, storages).load() != expected:
                raise pickle.UnpicklingError("not a legacy PyTorch file")
        _Unpickler(file, storages).load()  # byte order and sizes of the machine that saved
        tensors = _Unpickler(file, storages).load()
        for key in _Unpickler(file, storages).load():
            storage = storages[key]
            (size,) = np.frombuffer(file.read(8), "<i8")
            raw = file.read(storage.size * storage.dtype.itemsize)
            if size != storage.size or len(raw) != storage.size * storage.dtype.itemsize:
                raise pickle.UnpicklingError("the file is cut short")
            storage.array = np.frombuffer(raw, storage.dtype.newbyteorder("<"))
        return {key: tensor.array() for key, tensor in tensors.items()}
    except (pickle.UnpicklingError, ValueError, KeyError, EOFError, AttributeError, TypeError) as e:
        raise UserError(f"{name} is no readable PyTorch state dict: {e}") from None
