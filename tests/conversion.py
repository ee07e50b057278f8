"""What the tests of `convert` share: its command line, and the tensors of a directory compared."""

import safetensors.numpy

from unime_jax import convert


def run(*arguments):
    convert.main(["convert", *map(str, arguments)])


def tensors(directory):
    found = {}
    for path in sorted(directory.glob("model*.safetensors")):
        found |= safetensors.numpy.load_file(path)
    return found


def assert_identical(actual, expected):
    actual = tensors(actual)
    expected = expected if isinstance(expected, dict) else tensors(expected)
    assert set(actual) == set(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype and actual[key].shape == value.shape, key
        assert actual[key].tobytes() == value.tobytes(), key
