"""Tiny random backbones in Hugging Face layout, made on the fly for the `:smoke` configs.

They have every part of the real ones, a few thousand parameters, and a tokenizer with a token a
byte, so that any text can be read. Directories are kept in the cache, one for each content.
"""

import csv
import hashlib
import json
import os
import pathlib
import shutil

import jax
import numpy as np

from unime_jax import models
from unime_jax.benchmarks import mmeb as mmeb_benchmark
from unime_jax.data import (
    eval_synthetic,
    mmeb_prepare,
    mmeb_sets,
    mmeb_synthetic,
    sources,
    teacher_vectors,
)
from unime_jax.runtime import cache_directory
from unime_jax.types import flatten, unflatten

_TEXT = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
CONFIGS = {
    "phi35v": {
        **_TEXT,
        "model_type": "phi3_v",
        "num_key_value_heads": 4,
        "original_max_position_embeddings": 512,
        "rope_scaling": {
            "type": "su",
            "short_factor": [1 + 0.05 * i for i in range(8)],
            "long_factor": [1 + 2.5 * i for i in range(8)],
        },
        "embd_layer": {
            "embedding_cls": "image",
            "hd_transform_order": "sub_glb",
            "projection_cls": "mlp",
            "use_hd_transform": True,
            "with_learnable_separator": True,
        },
        "img_processor": {"image_dim_out": 32, "name": "clip_vision_model"},
        "vision_config": _VISION,
    },
    "llava16": {
        "model_type": "llava_next",
        "text_config": {**_TEXT, "model_type": "mistral", "head_dim": 16, "sliding_window": None},
        "vision_config": _VISION,
        "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]],
        "image_token_index": 260,
    },
    "nv_embed": {
        "model_type": "nvembed",
        "text_config": {**_TEXT, "model_type": "bidir_mistral", "head_dim": 16},
        "latent_attention_config": {
            "num_latents_value": 16,
            "num_cross_heads": 2,
            "cross_dim_head": 32,
        },
    },
}
SPECIAL = ("<s>", "</s>", "<|end|>", "<|user|>", "<image>", "<|assistant|>")


def backbone(name: str, directory: pathlib.Path | None = None) -> pathlib.Path:
    """Returns the directory of a tiny model, which is written if it is not there.

    Args:
      name: key of CONFIGS.
      directory: where it goes; None: the cache.
    """
    return _kept(name, CONFIGS[name], directory, _write_backbone)


def nli(directory: pathlib.Path | None = None) -> pathlib.Path:
    """Returns a csv of 96 rows in the form of nli_for_simcse.csv."""
    subjects = "cat dog fox owl bee cow pig hen".split()
    verbs = "runs sleeps eats swims".split()
    rows = [
        (f"A {subject} {verb} {place}.", f"An animal {verb}.", f"No {subject} {verb}.")
        for subject in subjects
        for verb in verbs
        for place in ("here", "outside", "in the old town")
    ]
    return _kept("nli", rows, directory, _write_nli) / "nli.csv"


def vectors(directory: pathlib.Path | None = None, width: int = 48) -> pathlib.Path:
    """Returns random unit vectors of the sentences of `nli`, in the form `teach` writes."""
    texts = sources.sentences(nli())
    return _kept("vectors", [width, *texts], directory, _write_vectors)


def mmeb(directory: pathlib.Path | None = None) -> pathlib.Path:
    """Returns all 20 sets of MMEB, made up, as `prepare mmeb` writes them."""
    return _kept("mmeb", [mmeb_prepare.FORMAT, 16], directory, _write_mmeb) / "prepared"


def judged(directory: pathlib.Path | None = None) -> pathlib.Path:
    """Returns a file of 64 rows with judged hard negatives, in UniME-V2's form."""
    return _kept("judged", [64, 4], directory, _write_judged) / "judged.json"


def mmeb_eval(directory: pathlib.Path | None = None) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns MMEB's 36 evaluation sets, made up and as odd as the real ones, and their images."""
    kept = _kept("mmeb_eval", [1, 4, 8], directory, _write_mmeb_eval)
    return kept / "MMEB-eval", kept / "eval_images"


def captions(directory: pathlib.Path | None = None) -> pathlib.Path:
    """Returns the sets of zero-shot retrieval, made up."""
    return _kept("captions", [1, 8], directory, _write_captions)


def _kept(name: str, content, directory: pathlib.Path | None, write) -> pathlib.Path:
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:10]
    path = directory or cache_directory() / "tiny" / f"{name}-{digest}"
    if not path.is_dir():
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.mkdir(parents=True)
        write(part, content)
        try:
            os.replace(part, path)
        except OSError:  # another process was faster
            shutil.rmtree(part)
    return path


def _write_backbone(directory: pathlib.Path, config: dict) -> None:
    _, abstract = models.abstract(config)
    rng = np.random.default_rng(0)

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape, np.float32)
        name = path.rpartition("/")[2]
        if name == "kernel":
            return noise / np.sqrt(np.prod(leaf.shape[:-1][-3 if leaf.ndim == 4 else -1 :]))
        return 0.1 * noise + float(name == "scale")

    flat = {path: draw(path, leaf).astype(np.float32) for path, leaf in flatten(abstract).items()}
    models.save(directory, unflatten(flat), config)
    (directory / "tokenizer.json").write_text(json.dumps(_tokenizer()), encoding="utf-8")
    if config["model_type"] == "phi3_v":
        side = config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]
        settings = {"num_crops": 4, "num_img_tokens": (side // 2) ** 2}
        (directory / "preprocessor_config.json").write_text(json.dumps(settings))


def _tokenizer() -> dict:
    """Returns tokenizer.json of a byte-level BPE without merges, rows starting with <s>."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(others))]
    special = [
        {
            "id": 256 + i,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, content in enumerate(SPECIAL)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": {**level, "use_regex": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}},
        },
        "decoder": {**level, "use_regex": False},
        "model": {
            "type": "BPE",
            "vocab": {letter: i for i, letter in enumerate(letters)},
            "merges": [],
        },
    }


def _write_nli(directory: pathlib.Path, rows: list[tuple[str, str, str]]) -> None:
    with open(directory / "nli.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("sent0", "sent1", "hard_neg"), *rows])


def _write_vectors(directory: pathlib.Path, content: list) -> None:
    width, *texts = content
    found = np.random.default_rng(0).standard_normal((len(texts), width), np.float32)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    np.save(directory / "vectors-00000.npy", found)
    manifest = {
        "teacher": "random",
        "width": width,
        "count": len(texts),
        "shard_rows": len(texts),
        "sentences_sha256": teacher_vectors.sentences_hash(texts),
    }
    (directory / teacher_vectors.MANIFEST).write_text(json.dumps(manifest))


def _write_mmeb(directory: pathlib.Path, content: list) -> None:
    source, images = mmeb_synthetic.write(directory, rows=content[1])
    for name in mmeb_sets.NAMES:
        settings = mmeb_prepare.Settings()
        mmeb_prepare.prepare(name, source, images, directory / "prepared", settings)


def _write_mmeb_eval(directory: pathlib.Path, content: list) -> None:
    _, queries, candidates = content
    eval_synthetic.write_mmeb(
        directory,
        {each.name: each.candidates for each in mmeb_benchmark.SETS},
        queries=queries,
        most_candidates=candidates,
        oddities=eval_synthetic.Oddities(empty_text=True, repeated=True, nulls=True),
    )


def _write_captions(directory: pathlib.Path, content: list) -> None:
    eval_synthetic.write_captions(directory, images=content[1])


def _write_judged(directory: pathlib.Path, content: list) -> None:
    count, negatives = content
    rng = np.random.default_rng(0)
    colours = "red blue grey pink green brown black white".split()
    things = "cat dog fox owl bee cow pig hen".split()
    names = [f"a {colour} {thing}" for colour in colours for thing in things][:count]
    rows = []
    for number, name in enumerate(names):
        (directory / f"{number}.jpg").write_bytes(mmeb_synthetic.picture(rng, (40, 50)))
        others = rng.choice([other for other in names if other != name], negatives, replace=False)
        rows.append(
            {
                "query_text": "<|image_1|>\nName the animal.\n",
                "query_image": f"{number}.jpg",
                "pos_text": name,
                "pos_image": "",
                "query_pos_scores": round(float(rng.uniform(0.6, 1)), 3),
                "hard_negatives": [[other, ""] for other in others],
                "hard_negatives_scores": np.round(rng.uniform(0, 0.7, negatives), 3).tolist(),
            }
        )
    (directory / "judged.json").write_text(json.dumps(rows))
