"""Eight virtual CPU devices and exact matmuls for every test."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

from unime_jax import runtime  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]
jax.config.update("jax_default_matmul_precision", "highest")
# The same programs are built by many tests, by every worker, and by the next run of the suite.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "compiled"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_compilation_cache_max_size", 1 << 29)  # bytes; the oldest go


@pytest.fixture(scope="session")
def assets():
    """The fetched small models and data, or a skip that says how to get them."""
    directory = runtime.cache_directory() / "smol"
    if not (directory / "student" / "config.json").is_file():
        pytest.skip("needs the small assets: python -m unime_jax.prepare smol")
    return directory
