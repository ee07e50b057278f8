"""The published scores that measured ones are set beside.

Of MMEB these are means alone: the paper's tables have no scores of single sets.
"""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any


@functools.cache
def _content() -> dict[str, Any]:
    return json.loads((pathlib.Path(__file__).parent / "published.json").read_text())


def source() -> str:
    """Says where the numbers are from."""
    return _content()["source"]


def rows(benchmark: str, model_type: str = "") -> list[Mapping[str, Any]]:
    """Returns the published rows of "mmeb", "retrieval" or "ablation", in percent.

    Args:
      benchmark: key of published.json.
      model_type: of the measured model. Rows of the same backbone; all where there are none.
    """
    found = _content()[benchmark]
    same = [row for row in found if row["model_type"] == model_type]
    return same or found


def rival(benchmark: str, model_type: str) -> Mapping[str, Any] | None:
    """Returns the row that a model of this backbone is measured against, if there is one."""
    same = [row for row in _content()[benchmark] if row["model_type"] == model_type]
    return same[-1] if same else None
