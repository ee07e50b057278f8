"""Models by their name on the Hugging Face hub."""

import pathlib
import re

from unime_jax.types import UserError

# Weights in other formats stay where they are.
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*"]
_UNWANTED = ["consolidated*", "onnx/*", "openvino/*", "original/*"]


def is_name(name: str) -> bool:
    """Tells whether this may be a hub id: "organisation/model"."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def fetch(name: str) -> pathlib.Path:
    """Returns the local copy of a model on the hub, downloaded where it is not there yet.

    Raises:
      UserError: there is no such model, or the hub cannot be reached.
    """
    import huggingface_hub

    try:
        path = huggingface_hub.snapshot_download(
            name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except Exception as error:  # of the network, of the hub, of the cache: each its own kind
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{name}: no such directory, and nothing of that name came from the Hugging Face hub "
            f"({reason}); check the name or give the directory of a copy"
        ) from None
    return pathlib.Path(path)
