"""The language model of a multimodal one, as a model of its own.

What is left is a Llama, Mistral or Phi-3, which transformers, sentence-transformers and vLLM know;
it embeds texts as the whole model does.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from unime_jax.data import prompts
from unime_jax.models import hf_write
from unime_jax.types import UserError
from unime_jax.weights import Weights

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
_PHI_VISION = ("embd_layer", "img_processor", "vision_config", "auto_map")
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")


def of(
    found: Weights, tensors: Sequence[hf_write.Pending]
) -> tuple[Weights, list[hf_write.Pending]]:
    """Returns the description and the tensors of a model's language model.

    Raises:
      UserError: the model has none apart from the rest.
    """
    kind = found.config["model_type"]
    if kind == "phi3_v":
        config = {key: value for key, value in found.config.items() if key not in _PHI_VISION}
        config["model_type"], prefix = "phi3", ""
        if scaling := config.get("rope_scaling"):
            config["rope_scaling"] = {**scaling, "type": "longrope"}  # transformers' name for "su"
    elif kind in ("llava_next", "unime_smol"):
        config, prefix = dict(found.config["text_config"]), "language_model."
    else:
        raise UserError(
            f"{found.name} is a {kind} model, which has no language model beside other parts; "
            "export it without --text-only"
        )
    if config.get("model_type") not in _CLASSES:
        raise UserError(f"{found.name}: no class for a {config.get('model_type')} model alone")
    config["architectures"] = [_CLASSES[config["model_type"]]]
    for key in ("dtype", "torch_dtype"):
        if key in found.config:
            config.setdefault(key, found.config[key])
    kept = [
        dataclasses.replace(tensor, key=tensor.key.removeprefix(prefix))
        for tensor in tensors
        if tensor.key.startswith(prefix) and ".vision_embed_tokens." not in tensor.key
    ]
    name = found.preparation.get("prompt") or prompts.name_for(kind)
    return dataclasses.replace(found, config=config, preparation={"prompt": name}), kept


def write_files(directory: pathlib.Path, config: dict[str, Any]) -> None:
    """Puts the files of a whole model right, and adds those of sentence-transformers."""
    for name in _IMAGE_FILES:
        (directory / name).unlink(missing_ok=True)
    for path in directory.glob("*.py"):
        path.unlink()
    written = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    # The dtype may be another one than the whole model's.
    dtypes = {key: written[key] for key in ("dtype", "torch_dtype") if key in written}
    _write(directory / "config.json", config | dtypes)
    settings = directory / "tokenizer_config.json"
    content = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if not content.get("pad_token") and (token := _special_token(directory, content)):
        # Rows of a batch are padded; what stands there is read by nobody.
        _write(settings, content | {"pad_token": token})
    module = "sentence_transformers.models."
    names = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": module + name}
        for i, (path, name) in enumerate(names)
    ]
    pooling = {
        "word_embedding_dimension": config["hidden_size"],
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_lasttoken": True,
        "include_prompt": True,
    }
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "2_Normalize").mkdir(exist_ok=True)
    _write(directory / "1_Pooling" / "config.json", pooling)
    _write(directory / "modules.json", modules)


def _special_token(directory: pathlib.Path, settings: dict[str, Any]) -> Any:
    """Returns the end of a text, or any special token where that has no name; None without."""
    if settings.get("eos_token"):
        return settings["eos_token"]
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens") or []
    return next((token["content"] for token in added if token.get("special")), None)


def _write(path: pathlib.Path, content) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
