"""The C library's allocator: how many arenas it is told, and whose word counts."""

import ctypes
import types

import pytest

from unime_jax import allocator


@pytest.mark.parametrize(
    "variables, cores, told",
    [
        ({}, 2, [(-8, 2)]),
        ({}, None, [(-8, 2)]),
        ({}, 64, [(-8, 16)]),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=3"}, 2, [(-8, 2)]),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=3:glibc.malloc.arena_max=9"}, 2, []),
        ({"MALLOC_ARENA_MAX": "9"}, 2, []),
    ],
)
def test_arenas_are_bounded_unless_the_user_has(variables, cores, told, monkeypatch):
    for name in ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = []
    library = types.SimpleNamespace(mallopt=lambda *options: found.append(options))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(allocator.os, "cpu_count", lambda: cores)
    allocator.bound_arenas()
    assert found == told


def test_without_glibc_nothing_is_done(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace())
    allocator.bound_arenas()
    allocator.give_back()
