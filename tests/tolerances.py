"""How near two float32 computations of the same thing must be; never loosened to pass.

A layer norm with another eps or a tanh GELU moves embeddings by 1e-5 or more: they would pass 1e-4
and fail here.
"""

import numpy as np

MODULE = 1e-5  # outputs of one module, absolute
HIDDEN = 1e-4  # hidden states of a whole tiny model, absolute
EMBEDDING = 2e-6  # unit-norm embeddings, absolute
GRADIENT = 2e-5  # |a - b| / |b| of one gradient array


def relative(actual, expected) -> float:
    """Returns |actual - expected| / |expected|, l2 norms."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30))


def assert_near(actual, expected, atol: float) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=atol)


def assert_gradients_near(actual: dict, expected: dict, tolerance: float = GRADIENT) -> None:
    """Compares two dicts of gradients, key by key; all must be there and none zero."""
    assert set(actual) == set(expected), sorted(set(actual) ^ set(expected))
    for name, value in expected.items():
        assert np.abs(np.asarray(value)).max() > 0, f"{name}: a zero gradient tests nothing"
        error = relative(actual[name], value)
        assert error < tolerance, f"{name}: relative error {error:.2g}"
