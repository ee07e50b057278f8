"""State dicts of the legacy PyTorch format, read without PyTorch."""

import io
import os
import pickle

import numpy as np
import packages
import pytest

from unime_jax.data import torch_file
from unime_jax.types import UserError


def test_tensors_come_back_bit_for_bit():
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.normal(size=(3, 4, 5)).astype(np.float32),
        "transposed": rng.normal(size=(6, 2)).astype(np.float32).T,
        "counter": np.array(7),
        "half": rng.normal(size=3).astype(np.float16),
    }
    found = torch_file.read_state_dict(packages.legacy_pth(tensors), "x.pth")
    assert list(found) == list(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_tensors_that_share_a_storage():
    import torch

    whole = torch.arange(12.0).reshape(3, 4)
    file = io.BytesIO()
    torch.save({"row": whole[1], "column": whole[:, 2]}, file, _use_new_zipfile_serialization=False)
    found = torch_file.read_state_dict(file.getvalue(), "x.pth")
    np.testing.assert_array_equal(found["row"], [4, 5, 6, 7])
    np.testing.assert_array_equal(found["column"], [2, 6, 10])


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was-here"),)

    content = b"".join(
        pickle.dumps(part, protocol=2)
        for part in (torch_file._MAGIC, torch_file._PROTOCOL, {}, {"a": Evil()}, [])
    )
    with pytest.raises(UserError, match="x.pth.*mkdir has no place in a state dict"):
        torch_file.read_state_dict(content, "x.pth")
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize("keep", [0, 10, 200, -5, -8])
def test_a_cut_file_is_named(keep):
    content = packages.legacy_pth({"a": np.ones((50, 50), np.float32)})[:keep]
    with pytest.raises(UserError, match="x.pth is no readable PyTorch state dict"):
        torch_file.read_state_dict(content, "x.pth")


def test_a_tensor_that_reaches_outside_of_its_storage_is_refused():
    storage = torch_file._Storage(np.float32, 4)
    storage.array = np.zeros(4, np.float32)
    for offset, size, stride in (
        (0, (5,), (1,)),
        (3, (2,), (1,)),
        (0, (2,), (-1,)),
        (-1, (1,), (1,)),
    ):
        with pytest.raises(ValueError, match="outside"):
            torch_file._Tensor(storage, offset, size, stride).array()
