"""Phi-3.5-vision at full size with random weights: write it, load it, embed with it.

    python tests/bench/full_size.py --directory DIR [--through convert]

Writes 8.5 GB (kept; a second run uses them), loads them in a fresh process in bf16 and embeds one
row of text and one of image and text. Reports seconds and the process's peak memory.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import safetensors.numpy

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SHARD_BYTES = 2 * 10**9
IMAGE = (336, 336)
INDEX = "model.safetensors.index.json"


def config() -> dict:
    tiny = json.loads((GOLDEN / "phi3v_tiny" / "config.json").read_text())
    del tiny["vision_config"]
    factors = {f"{name}_factor": list(np.linspace(1.0, top, 48)) for name, top in RANGES.items()}
    return {
        **tiny,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "su", **factors},
        "img_processor": {**tiny["img_processor"], "image_dim_out": 1024},
        "torch_dtype": "bfloat16",
    }


RANGES = {"short": 3.0, "long": 64.0}


def draw(rng: np.random.Generator, name: str, shape: list[int]) -> np.ndarray:
    if len(shape) == 1:
        value = np.ones(shape) if "norm" in name and name.endswith("weight") else np.zeros(shape)
    else:
        fan_in = np.prod(shape[1:]) if "embed" not in name else 1
        # One block, repeated: drawing four billion numbers takes minutes and tells nothing more.
        block = rng.standard_normal(2**20, np.float32) * fan_in**-0.5
        value = np.resize(block, shape)
    return value.astype(ml_dtypes.bfloat16)


def write(directory: pathlib.Path) -> None:
    """Writes the shards, one at a time, and their index."""
    directory.mkdir(parents=True, exist_ok=True)
    shapes = json.loads((GOLDEN / "phi35v_keys.json").read_text())
    shapes = {name: shape for name, shape in shapes.items() if not name.endswith("wte.weight")}
    rng, weight_map, part, size, number = np.random.default_rng(0), {}, {}, 0, 1

    def flush():
        nonlocal part, size, number
        name = f"model-{number:05}.safetensors"
        safetensors.numpy.save_file(part, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
        part, size, number = {}, 0, number + 1

    for name, shape in shapes.items():
        part[name] = draw(rng, name, shape)
        size += part[name].nbytes
        if size > SHARD_BYTES:
            flush()
    if part:
        flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))


def write_configs(directory: pathlib.Path) -> None:
    (directory / "config.json").write_text(json.dumps(config()))
    # num_crops 4: five passes through the tower and 757 positions for a square image.
    preprocessor = (GOLDEN / "phi3v_tiny" / "preprocessor_config.json").read_text()
    (directory / "preprocessor_config.json").write_text(preprocessor)


def memory() -> dict[str, float]:
    """Now and at its peak, and how much of it is mapped files, in GB (Linux)."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    values = {
        line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("Vm", "Rs"))
    }
    names = {"VmRSS": "now", "VmHWM": "peak", "RssFile": "mapped files"}
    return {text: round(int(values[name]) / 1e6, 2) for name, text in names.items()}


def report(what: str, start: float) -> None:
    print(f"{what}: {time.perf_counter() - start:.1f} s, GB {memory()}", flush=True)


def embed(directory: pathlib.Path) -> None:
    import jax
    from PIL import Image

    import unime_jax

    start = time.perf_counter()
    embedder = unime_jax.load(directory)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(embedder.params))
    report(f"loaded {size / 1e9:.2f} GB of weights", start)
    image = np.random.default_rng(1).integers(0, 256, (*IMAGE, 3)).astype(np.uint8)
    text = [1, 32010, 29871, 13, 6154, 3034, 32007, 32001]
    for what, tokens, images in (
        ("text row", text, [None]),
        ("image row", [1, embedder.image_token_id, *text[1:]], [Image.fromarray(image)]),
    ):
        start = time.perf_counter()
        vectors = embedder.embed_tokens([tokens], images=images)
        assert vectors.shape == (1, 3072) and abs(np.linalg.norm(vectors) - 1) < 1e-5
        report(f"embedded one {what}", start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=pathlib.Path, required=True)
    parser.add_argument("--through", choices=["load", "convert"], default="load")
    parser.add_argument("--embed", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.embed:
        return embed(args.directory)
    if not (args.directory / INDEX).exists():
        start = time.perf_counter()
        write(args.directory)
        report("written", start)
    write_configs(args.directory)
    source = args.directory
    if args.through == "convert":
        source = args.directory.with_name(args.directory.name + "-imported")
        start = time.perf_counter()
        command = ["-m", "unime_jax.convert", "import", "--model", str(args.directory)]
        subprocess.run([sys.executable, *command, "--output", str(source)], check=True)
        print(f"imported: {time.perf_counter() - start:.1f} s", flush=True)
    command = [sys.executable, __file__, "--directory", str(source), "--embed"]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
