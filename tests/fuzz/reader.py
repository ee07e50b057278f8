"""What one way into the package is, to the fuzzer."""

import dataclasses
import pathlib
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Reader:
    """A way into the package.

    Attributes:
      write: fills a directory with good files.
      damaged: names of those that are damaged, one at a time.
      read: reads the directory.
    """

    write: Callable[[pathlib.Path], None]
    damaged: tuple[str, ...]
    read: Callable[[pathlib.Path], object]
