"""Makes batches ahead of their reader, in threads or processes."""

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


def ahead_of_time(
    make: Callable[[int], Any],
    first: int,
    steps: int,
    *,
    threads: int = 2,
    workers: int = 0,
    ahead: int = 4,
) -> Iterator[Any]:
    """Yields make(first) to make(steps - 1), in order.

    Args:
      make: called from threads; with workers it is pickled, and so is what it returns.
      first: step of the first batch.
      steps: behind the last one.
      threads: that make batches, in each worker.
      workers: processes; 0: the threads run in this one. They change no batch.
      ahead: batches that each worker, or this process, makes ahead of the reader.
    """
    import grain

    if first >= steps:
        return
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    dataset = grain.MapDataset.range(steps).map(make)[first:].to_iter_dataset(options)
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # grain asks a flag of its own
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1),
            worker_init_fn=functools.partial(_end_with, os.getpid()),
        )
    found = iter(dataset)
    try:
        yield from found
    finally:
        if hasattr(found, "close"):
            found.close()


def _end_with(parent: int, index: int, count: int) -> None:
    """Ends a reading process soon after the training process: killed, that one cannot do it."""
    del index, count  # grain's

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
