"""Eight virtual CPU devices and exact matmuls for every test."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

from unime_jax import runtime  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def assets():
    """The fetched small models and data, or a skip that says how to get them."""
    directory = runtime.cache_directory() / "smol"
    if not (directory / "student" / "config.json").is_file():
        pytest.skip("needs the small assets: python -m unime_jax.prepare smol")
    return directory
