"""A whole pipeline in miniature: student, teacher and pairs that train in seconds."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import packages
from flax import nnx

from unime_jax import config as config_lib
from unime_jax import models
from unime_jax.data import smol_student
from unime_jax.types import flatten, unflatten

ROOT = pathlib.Path(__file__).parents[1]
STUDENT = {
    "model_type": "unime_smol",
    "text_config": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "model_type": "efficientnet-lite0",
        "image_size": 32,
        "stem": 8,
        "head": 16,
        "stages": [[3, 1, 1, 8, 1], [3, 2, 3, 8, 1], *[[3, 2, 2, 8, 1]] * 2, [3, 2, 2, 16, 1]],
        "num_classes": 4,
    },
    "projector": {"hidden": 24},
}  # fmt: skip
NAMES = "cat dog fox owl bee cow pig rat hen ant bat elk emu yak ape eel cod jay kid ram".split()


def write_model(directory: pathlib.Path, config: dict, *, seed: int) -> pathlib.Path:
    """Writes a random model in HF layout with a byte-level tokenizer."""
    directory.mkdir(parents=True)
    _, state = nnx.split(nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):  # by numpy: drawing by jax would compile every shape
        noise = rng.standard_normal(leaf.shape)
        if path.endswith("kernel"):
            noise /= np.sqrt(leaf.shape[-2] * (leaf.shape[0] ** 2 if leaf.ndim == 4 else 1))
            return noise.astype(np.float32)
        centre = path.endswith(("scale", "var"))
        return (abs(centre + 0.1 * noise) if centre else 0.1 * noise).astype(np.float32)

    flat = flatten(nnx.to_pure_dict(state))
    params = unflatten({path: jnp.asarray(draw(path, leaf)) for path, leaf in flat.items()})
    models.save(directory, params, config)
    packages.gguf_file(directory / "tokenizer.gguf")
    text, settings = smol_student.LanguageModel(directory / "tokenizer.gguf").tokenizer()
    (directory / "tokenizer.json").write_text(text)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def write_pairs(directory: pathlib.Path, *, broken: int = 0) -> pathlib.Path:
    """Writes 60 pictures of one colour each and pairs.jsonl; some can be cut short."""
    directory.mkdir(parents=True)
    lines = []
    for number in range(60):
        name = f"{packages.COLOURS[number % 3]} {NAMES[number // 3]}"
        content = packages.png(packages.shade(number), (40, 30))
        (directory / f"{number}.png").write_bytes(content[:60] if number < broken else content)
        lines.append(json.dumps({"image": f"{number}.png", "text": f"a {name}"}))
    (directory / "pairs.jsonl").write_text("\n".join(lines))
    return directory / "pairs.jsonl"


def write_all(root: pathlib.Path) -> pathlib.Path:
    """Writes a student of one layer, which compiles in half the time, its teacher and pairs."""
    text = {**STUDENT["text_config"], "num_hidden_layers": 1}
    write_model(root / "student", {**STUDENT, "text_config": text}, seed=0)
    write_model(root / "teacher", {**text, "hidden_size": 16}, seed=1)
    write_pairs(root / "pairs")
    return root


def overrides(root: pathlib.Path, **changes) -> list[str]:
    """The flags that turn a smol config into one of the miniature."""
    values = {
        "model.path": root / "student",
        "teacher.path": root / "teacher",
        "teacher.vectors": root / "vectors",
        "data.path": root / "pairs" / "pairs.jsonl",
        "data.max_tokens": 64,  # a token a letter
        "train.batch_size": 12,
        "train.steps": 4,
        "loss.k": 4,
        "eval.every_steps": 0,  # a pairs.jsonl holds nothing out
        **changes,
    }
    return [f"--config.{key}={value}" for key, value in values.items()]


def config(name: str, root: pathlib.Path, **changes):
    file = ROOT / "configs" / f"{name}.py"
    return config_lib.parse(["train", f"--config={file}:smoke", *overrides(root, **changes)], "doc")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
