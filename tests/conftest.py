"""Eight virtual CPU devices, exact matmuls and quick compiles for every test."""

import contextlib
import importlib.metadata
import itertools
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads would wait for one another
FLAGS = {"xla_force_host_platform_device_count": "8"}
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Most of the suite's time is compiling programs that run once: a training step compiles in 4 s
    # of CPU time with these flags and in 13 s without. The mathematics are the same.
    FLAGS["xla_backend_optimization_level"] = "0"
    FLAGS["xla_llvm_disable_expensive_passes"] = "true"
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # unknown flags abort
        FLAGS["xla_cpu_use_fusion_emitters"] = "false"
        FLAGS["xla_cpu_parallel_codegen_split_count"] = "1"  # parts cost more than they save
given = os.environ.get("XLA_FLAGS", "")
added = [f"--{name}={value}" for name, value in FLAGS.items() if name not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()
# The same programs are built by many tests, by every process, and by the next run of the suite.
ROOT = pathlib.Path(__file__).parents[1]
COMPILED = ROOT / ".pytest_cache" / "compiled"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

import jax  # noqa: E402
import pytest  # noqa: E402

from unime_jax import runtime  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")

# The long files start first, so that at the end no process works alone.
LONG = """test_train test_stage1 test_stage2 test_decoder test_convert test_phi35v test_faults
test_lora test_stage2_parity test_smol_model test_llava16 test_inspect test_mmeb_batches
test_embedder_images test_processes test_readers test_resume test_embedder test_checkpoint
test_smol_report test_embed test_efficientnet""".split()


def pytest_configure(config):
    """Forgets old programs. JAX's own limit stops all saving once a writer has been killed."""
    if hasattr(config, "workerinput"):
        return
    with contextlib.suppress(FileNotFoundError):  # another run forgets them too
        programs = sorted(COMPILED.glob("*"), key=lambda path: -path.stat().st_mtime)
        sizes = itertools.accumulate(path.stat().st_size for path in programs)
        for path, size in zip(programs, list(sizes), strict=True):
            if size > 1 << 29:
                path.unlink()


def pytest_collection_modifyitems(items):
    place = {stem: number for number, stem in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def assets():
    """The fetched small models and data, or a skip that says how to get them."""
    directory = runtime.cache_directory() / "smol"
    if not (directory / "student" / "config.json").is_file():
        pytest.skip("needs the small assets: python -m unime_jax.prepare smol")
    return directory
