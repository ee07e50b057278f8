"""What reads models that others wrote: weights, adapters, tokenizers, configurations."""

import json
import pathlib
import shutil

import numpy as np
import packages
import parity
from reader import Reader

from unime_jax import tiny
from unime_jax.data import processor_files, smol_student, tokenizer, torch_file
from unime_jax.data.prompts import Segment


def _write_model(directory: pathlib.Path, name: str = "llava16") -> None:
    shutil.copytree(tiny.backbone(name), directory, dirs_exist_ok=True)


def _read_model(directory: pathlib.Path):
    from unime_jax import models, weights

    found = weights.find(directory)
    models.load(found.directory, fill=found.fill)
    _read_tokenizer(directory)


def _read_tokenizer(directory: pathlib.Path):
    found = tokenizer.Tokenizer(directory, image_token=260)
    segments = [Segment("prompt", "<s> [INST] "), Segment("image"), Segment("text", "a </s> cat")]
    ids, start, stop = found.encode(segments, -1)
    [found.text_of(id) for id in ids if id >= 0]


def _write_shards(directory: pathlib.Path) -> None:
    import safetensors.numpy

    _write_model(directory, "nv_embed")
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = {key: f"part-{i % 2}.safetensors" for i, key in enumerate(sorted(tensors))}
    for name in set(names.values()):
        part = {key: tensors[key] for key in tensors if names[key] == name}
        safetensors.numpy.save_file(part, directory / name)
    index = {"metadata": {}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_adapter(directory: pathlib.Path) -> None:
    import safetensors.numpy

    rng = np.random.default_rng(0)
    base = tiny.backbone("nv_embed")
    prefix = "base_model.model.embedding_model.layers.{}.self_attn.q_proj"
    tensors = {}
    for layer in range(2):
        name = prefix.format(layer)
        tensors[f"{name}.lora_A.weight"] = rng.normal(size=(3 + layer, 64)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.normal(size=(64, 3 + layer)).astype(np.float32)
        tensors[f"{name}.lora_magnitude_vector"] = np.ones(64, np.float32)
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": 3,
        "lora_alpha": 6,
        "lora_dropout": 0.1,
        "use_dora": True,
        "use_rslora": False,
        "bias": "none",
        "target_modules": ["q_proj"],
        "modules_to_save": None,
        "rank_pattern": {r"layers\.1.self_attn.q_proj": 4},
        "alpha_pattern": {"layers.0.*q_proj": 7.5},
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


def _read_adapter(directory: pathlib.Path):
    from unime_jax import weights

    source = weights.find(directory).source
    for key in sorted(source.keys()):
        source.slice(key)[...]


def _write_run(directory: pathlib.Path) -> None:
    import fabricated

    base = tiny.backbone("llava16")
    fabricated.write_run(directory, base, tiny.CONFIGS["llava16"], rank=2)


def _write_own_model(directory: pathlib.Path) -> None:
    from unime_jax import convert

    convert.main(["convert", "import", "--model", str(tiny.backbone("nv_embed")),
                  "--output", str(directory / "m")])  # fmt: skip


def _read_own_model(directory: pathlib.Path):
    _read_adapter(directory / "m")


def _write_gguf(directory: pathlib.Path) -> None:
    packages.gguf_file(directory / "x.gguf")


def _read_gguf(directory: pathlib.Path):
    model = smol_student.LanguageModel(directory / "x.gguf")
    model.config(2)
    model.tensors(2)
    model.tokenizer()


def _write_pth(directory: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": rng.normal(size=(4, 3)).astype(np.float32),
        "b": np.array(3),
        "c": rng.normal(size=5).astype(np.float16),
    }
    (directory / "x.pth").write_bytes(packages.legacy_pth(tensors))


def _read_pth(directory: pathlib.Path):
    torch_file.read_state_dict((directory / "x.pth").read_bytes(), "x.pth")


def _write_processor(directory: pathlib.Path) -> None:
    settings = {
        "num_crops": 4,
        "num_img_tokens": 4,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "do_normalize": True,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))


def _read_processor(directory: pathlib.Path):
    from unime_jax.types import ImageSpec

    processor_files.make_transform(ImageSpec("phi_hd", 56, 4), directory).layout(300, 200)


_SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 30, "layer_norm_eps": 1e-12,
}  # fmt: skip
_CONFIGS = {
    **tiny.CONFIGS,
    "llama": {**parity.TEXT, "tie_word_embeddings": False, "attention_bias": True},
    "phi3": {**parity.TEXT, "model_type": "phi3"},
    "mistral": {**parity.TEXT, "model_type": "mistral", "head_dim": 12, "sliding_window": 99},
    "smol": parity.SMOL,
    "bert": {**_SIZES, "model_type": "bert", "type_vocab_size": 2, "hidden_act": "gelu"},
}


def _config(name: str) -> Reader:
    def write(directory: pathlib.Path) -> None:
        (directory / "config.json").write_text(json.dumps(_CONFIGS[name]))

    def read(directory: pathlib.Path):
        from unime_jax import models

        config = models.read_config(directory)
        models.rules(config)
        models.abstract(config)

    return Reader(write, ("config.json",), read)


MODEL = ("model.safetensors", "config.json", "tokenizer.json")
READERS: dict[str, Reader] = {
    "model": Reader(_write_model, MODEL, _read_model),
    "model, Phi": Reader(lambda d: _write_model(d, "phi35v"), MODEL, _read_model),
    "model, shards": Reader(
        _write_shards,
        ("model.safetensors.index.json", "part-0.safetensors", "config.json"),
        _read_model,
    ),
    "tokenizer": Reader(_write_model, ("tokenizer.json",), _read_tokenizer),
    "adapter": Reader(
        _write_adapter, ("adapter_model.safetensors", "adapter_config.json"), _read_adapter
    ),
    **{f"config, {name}": _config(name) for name in _CONFIGS},
    "run": Reader(_write_run, ("run.json",), _read_adapter),
    "own model": Reader(_write_own_model, ("m/config.json", "m/model.json"), _read_own_model),
    "GGUF": Reader(_write_gguf, ("x.gguf",), _read_gguf),
    "state dict": Reader(_write_pth, ("x.pth",), _read_pth),
    "image processor": Reader(_write_processor, ("preprocessor_config.json",), _read_processor),
}
