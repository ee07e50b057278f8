"""Tells models apart by their contents."""

import hashlib
import json
from typing import Any

import unime_jax
from unime_jax import weights

# Raise it when the same weights begin to embed differently: stored vectors are then left alone.
FORMAT = 3


def of_model(found: weights.Weights, settings: dict[str, Any]) -> str:
    """Returns 20 hex digits that are equal for models that embed equally.

    Args:
      found: the model; see `weights.Weights.fingerprint`.
      settings: what else decides its vectors: dtype, prompt, sizes of images.
    """
    about = [FORMAT, unime_jax.__version__, found.fingerprint, settings]
    text = json.dumps(about, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()
