"""What a step's time goes to on a GPU, by kind of kernel, from a trace of JAX's profiler."""

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator

# The first that is found in a kernel's name counts. Names are XLA's own (of fusions), cuBLAS's and
# cuDNN's.
KINDS = (
    ("attention", r"fmha|flash|sdpa|dot_product_attention"),
    ("products", r"gemm|nvjet|cutlass|cublas|xmma|splitk|\bdot|_dot_"),
    ("collectives", r"nccl|all_?gather|all_?reduce|reduce_?scatter|all_?to_?all|permute"),
    ("to and from the host", r"memcpy\s*(h2d|d2h|htod|dtoh)"),
    ("copies", r"copy|transpose|memcpy|memset|slice|concatenate|\bpad|_pad"),
    ("sums", r"reduce|softmax|norm"),
)
OTHERS = "elementwise"
IDLE = "idle"
_DEVICE = "/device:GPU"


def kind(name: str) -> str:
    """Returns the kind of a kernel."""
    name = name.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), OTHERS)


def shares(kernels: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Returns the share of each kind in the time from the first start to the last end.

    Args:
      kernels: (name, start, end), in any unit of time. What runs beside others counts whole.
    """
    kernels = sorted(kernels, key=lambda kernel: kernel[1])
    if not kernels:
        return {}
    begun, until, busy = kernels[0][1], kernels[0][1], 0.0
    found: collections.Counter[str] = collections.Counter()
    for name, start, end in kernels:
        found[kind(name)] += end - start
        busy += max(0.0, end - max(until, start))
        until = max(until, end)
    span = until - begun
    found[IDLE] = span - busy
    return {name: taken / span for name, taken in found.most_common()}


def largest(kernels: Iterable[tuple[str, float, float]], count: int) -> dict[str, float]:
    """Returns the share of the largest kernels that are no products, by name."""
    kernels = list(kernels)
    total = sum(end - start for _, start, end in kernels)
    found: collections.Counter[str] = collections.Counter()
    for name, start, end in kernels:
        if kind(name) not in ("products", "attention"):
            found[name[:48]] += end - start
    return {name: taken / total for name, taken in found.most_common(count)}


def trace(act: Callable[[], object]) -> dict[str, dict[str, float]]:
    """Does a thing under the profiler; returns shares of its time on the first GPU."""
    import jax

    with tempfile.TemporaryDirectory(prefix="unime_trace_") as folder:
        with jax.profiler.trace(folder):
            act()
        paths = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
        found = list(_kernels(paths[0])) if paths else []
    return {"shares of a step": shares(found), "largest but products": largest(found, 8)}


def _kernels(path: pathlib.Path) -> Iterator[tuple[str, float, float]]:
    import jax

    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    plane = next((one for one in planes if one.name.startswith(_DEVICE)), None)
    for line in plane.lines if plane else ():
        if line.name.startswith("Stream"):  # other lines name the same time by operations
            for event in line.events:
                yield event.name, event.start_ns, event.start_ns + event.duration_ns
