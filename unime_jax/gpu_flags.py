"""What XLA is told about GPUs."""

import mmap
import os
import pathlib

# Collectives run beside products, also those of the next layer of a loop.
_FLAGS = (
    "xla_gpu_enable_latency_hiding_scheduler",
    "xla_gpu_enable_highest_priority_async_stream",
    "xla_gpu_enable_pipelined_all_gather",
    "xla_gpu_enable_pipelined_all_reduce",
    "xla_gpu_enable_pipelined_reduce_scatter",
)


def add() -> None:
    """Adds to XLA_FLAGS, where there are GPUs, what the user has not set there."""
    if not os.path.exists("/dev/nvidiactl") or os.environ.get("JAX_PLATFORMS", "cuda") == "cpu":
        return
    import jaxlib

    given = os.environ.get("XLA_FLAGS", "")
    library = max(
        pathlib.Path(jaxlib.__file__).parent.glob("**/*.so"), key=lambda file: file.stat().st_size
    )
    # A flag that a version of XLA does not know ends the process.
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
        known = [flag for flag in _FLAGS if code.find(flag.encode()) >= 0]
    more = [f"--{flag}=true" for flag in known if flag not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *more]).strip()
