"""Runs in a process of its own: reads damaged files, and says of each what came of it.

    python tests/fuzz/worker.py COUNT FIRST [READER ...]

Prints a JSON line for each reader: inputs, refused (UserError), accepted, and what else happened.
The number of an input stands in the last line of stderr if the process does not survive it.
"""

import faulthandler
import importlib.util
import json
import os
import pathlib
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings

SECONDS = 10  # for one input
MEMORY = 3 << 30  # bytes above what the process has when it starts


def peak_kib() -> int:
    """Returns the most memory of this process; `ru_maxrss` begins at that of its parent."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def main(count: int, first: int, names: list[str]) -> None:
    import mutators
    import readers

    from unime_jax.types import UserError

    warnings.simplefilter("ignore")
    if importlib.util.find_spec("torch"):  # its CUDA build maps more than any file may take
        import torch  # noqa: F401
    _limit_memory()
    signal.signal(signal.SIGALRM, _late)
    for name in names or list(readers.READERS):
        reader = readers.READERS[name]
        counts = {"reader": name, "inputs": 0, "refused": 0, "accepted": 0, "other": {}}
        started, slowest = time.perf_counter(), 0.0
        with tempfile.TemporaryDirectory() as scratch:
            # Named relatively, as users name files: absolute paths hide what is joined twice.
            os.chdir(pathlib.Path(scratch).parent)
            directory = pathlib.Path(pathlib.Path(scratch).name)
            reader.write(directory)
            reader.read(directory)  # good files are read
            for number in range(first, first + count):
                path = directory / reader.damaged[number % len(reader.damaged)]
                good = path.read_bytes()
                path.write_bytes(mutators.mutated(good, number))
                print(f"{name} {number}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback_later(2 * SECONDS, exit=True)
                signal.alarm(SECONDS)
                began = time.perf_counter()
                counts["inputs"] += 1
                try:
                    reader.read(directory)
                    counts["accepted"] += 1
                except UserError as error:
                    counts["refused"] += 1
                    if "\n" in str(error) and len(str(error).splitlines()) > 3:
                        _note(counts, f"long message: {str(error)[:100]!r}", number, path.name)
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    place = traceback.extract_tb(error.__traceback__)
                    ours = [x for x in place if "unime_jax" in x.filename] or place
                    where = f"{pathlib.Path(ours[-1].filename).name}:{ours[-1].lineno}"
                    kind = f"{type(error).__name__} at {where}: {str(error)[:100]}"
                    _note(counts, kind, number, path.name)
                finally:
                    signal.alarm(0)
                    faulthandler.cancel_dump_traceback_later()
                slowest = max(slowest, time.perf_counter() - began)
                path.write_bytes(good)
        counts["slowest"] = round(slowest, 2)
        counts["seconds"] = round(time.perf_counter() - started, 1)
        counts["memory_mib"] = peak_kib() >> 10
        print(json.dumps(counts), flush=True)


class _TooLate(BaseException):
    pass


def _late(*_) -> None:
    raise _TooLate(f"more than {SECONDS} s")


def _note(counts: dict, kind: str, number: int, name: str) -> None:
    counts["other"].setdefault(kind, []).append(f"{number} ({name})")


def _limit_memory() -> None:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
