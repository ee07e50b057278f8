"""What a run's rows are, in a few digits: data changed under the same path are noticed."""

import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from unime_jax.data import batch_info
from unime_jax.data.sources import ImageRef, Source

_ROWS = 2048  # looked at in each source, from the first to the last in equal steps


def fingerprint(
    data: Sequence[Source], start: pathlib.Path | None = None
) -> dict[str, dict[str, Any]]:
    """Returns the number of rows of every data set and a digest of their texts and image names.

    Small sets are read as a whole, of large ones 2048 rows. Images are not read.

    Args:
      data: the rows.
      start: None: an image is called what its row calls it, wherever it lies. Else as earlier
        versions did: by its path from this directory.
    """

    def name_image(image: ImageRef) -> str:
        own = image.path or image.name
        return str(start / own) if start and image.path else own

    found: dict[str, dict[str, Any]] = {}
    digests: dict[str, Any] = {}
    for source in data:
        counted = found.setdefault(source.name, {"rows": 0})
        digest = digests.setdefault(source.name, hashlib.blake2b(digest_size=6))
        counted["rows"] += len(source)
        count = min(len(source), _ROWS)
        for place in range(count):
            row = batch_info.name_row(source, place * len(source) // count, name_image)
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=True).encode())
    return {name: {**found[name], "digest": digests[name].hexdigest()} for name in found}
