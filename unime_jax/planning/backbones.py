"""Which model a configuration trains: its config.json, or the published facts where there is none.

Sizes are those of the config.json files on the hub; values that change no shape and no operation
(RoPE's factors) are placeholders.
"""

import dataclasses
import pathlib
import re
from typing import Any

from unime_jax import models, weights
from unime_jax.types import UserError

_TOWER = "openai/clip-vit-large-patch14-336"
LLAVA16 = {
    "model_type": "llava_next",
    "text_config": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "vocab_size": 32064,
        "max_position_embeddings": 32768,
        "sliding_window": None,
    },
    "image_token_index": 32000,
}
PHI35V = {
    "model_type": "phi3_v",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 32064,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48},
    "sliding_window": 262144,
    "embd_layer": {
        "embedding_cls": "image",
        "hd_transform_order": "sub_glb",
        "projection_cls": "mlp",
        "use_hd_transform": True,
        "with_learnable_separator": True,
    },
    "img_processor": {
        "name": "clip_vision_model",
        "model_name": _TOWER,
        "image_dim_out": 1024,
        "num_img_tokens": 144,
    },
}
SMOL = {
    "model_type": "unime_smol",
    "text_config": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e5,
        "tie_word_embeddings": True,
    },
    "vision_config": {"model_type": "efficientnet-lite0", "image_size": 224, "grid": 4},
    "projector": {"hidden": 1152},
}
# Pattern in the path of a model, in the prompt or in the name of a configuration -> what it is.
PUBLISHED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (r"phi-?_?3(\.?5)?-?_?v", "Phi-3.5-vision (4.15 B)", PHI35V),
    (r"llava", "LLaVA-1.6 with Mistral-7B (7.57 B)", LLAVA16),
    (r"smol", "the newcomer's student (SmolLM2's first 6 layers)", SMOL),
)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The model of a run, without weights.

    Attributes:
      title: for reports.
      config: content of config.json.
      directory: of config.json and the tokenizer; None where the model is not at hand.
    """

    title: str
    config: dict[str, Any]
    directory: pathlib.Path | None


def find(settings: dict[str, Any], hint: str) -> Backbone:
    """Finds the model of a configuration.

    Args:
      settings: the resolved configuration.
      hint: name of its file.

    Raises:
      UserError: it is not there, and no published model is recognised.
    """
    named = settings["model"]["path"]
    path = pathlib.Path(named).expanduser()
    if named and path.exists():
        directory = weights.config_directory(path)
        return Backbone(str(directory), models.read_config(directory), directory)
    for text in (named, settings["data"]["prompt"], settings["output"], pathlib.Path(hint).name):
        for pattern, title, config in PUBLISHED:
            if re.search(pattern, text, re.IGNORECASE):
                return Backbone(title, config, None)
    raise UserError(
        f"config.model.path={named!r} is not there, and neither it nor {hint} names a model whose "
        "sizes are known here (Phi-3.5-V, LLaVA-1.6, smol); give a directory with its config.json"
    )
