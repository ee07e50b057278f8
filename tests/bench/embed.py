"""`unime_jax.embed` beside the published way in PyTorch, on the same rows and weights.

    PYTHONPATH=. python tests/bench/embed.py [--rows 2000] [--repeats 3] [--model DIR ...]

The published way: transformers, batches in the order of the rows, each left-padded to its longest,
images one at a time through processor and tower. Both sides get two threads, f32, and the same
prompts; every measurement is a process of its own, whose start and load count, and the two take
turns. Ours has compiled everything before, in a run whose time is told apart. Peak memory is that
of the process. The models are a tiny one of random weights and the newcomer's
(`python -m unime_jax.prepare smol`), unless others are named. 10 minutes on two cores.
"""

import argparse
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

HERE = pathlib.Path(__file__).resolve()
BATCH = 32
WORDS = "the a red small old house cat tree river photo of and in with under quick market".split()


def write_rows(folder: pathlib.Path, count: int) -> pathlib.Path:
    """Writes rows of a text, a picture, or both; lengths and sizes as they come in the wild."""
    from PIL import Image

    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        row = {"id": str(number)}
        if number % 3 != 1:  # captions, and now and then a paragraph
            words = int(np.clip(rng.lognormal(2.4, 0.8), 2, 200))
            row["text"] = " ".join(rng.choice(WORDS, words))
        if number % 3 != 0:
            width, height = ((640, 480), (480, 640), (500, 375))[rng.integers(3)]
            small = rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
            row["image"] = f"{number}.jpg"
            image = Image.fromarray(small).resize((width, height))
            image.save(folder / row["image"], quality=90)
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


def torch_side(model: str, rows: pathlib.Path, output: pathlib.Path) -> None:
    """Embeds the rows with PyTorch: a Llama of transformers, and the tower and projector beside."""
    import torch
    import transformers
    from PIL import Image, ImageOps

    sys.path.insert(0, str(HERE.parents[1] / "models"))
    import torch_smol

    torch.set_num_threads(2)
    tower, language, settings = torch_smol.load(model)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{model}/tokenizer.json")
    entries = [json.loads(line) for line in rows.read_text().split("\n")]
    table = language.get_input_embeddings()
    vectors, real, positions = [], 0, 0
    torch.set_grad_enabled(False)
    for start in range(0, len(entries), BATCH):
        embeds = []
        for entry in entries[start : start + BATCH]:
            text, image = entry.get("text"), entry.get("image")
            name = " and ".join(["image"] * bool(image) + ["sentence"] * bool(text))
            before = f"{text}\n" if text else ""
            after = f"\n{before}" if image else before
            ids = tokenizer(f"{after}Summary above {name} in one word:").input_ids
            row = table(torch.tensor(ids))
            if image:
                picture = Image.open(rows.parent / image).convert("RGB")
                size = settings["image_size"]
                picture = ImageOps.pad(
                    picture, (size, size), Image.Resampling.BICUBIC, color="white"
                )
                row = torch.cat([tower(np.asarray(picture)[None])[0], row])
            embeds.append(row)
        longest = max(map(len, embeds))
        real, positions = real + sum(map(len, embeds)), positions + longest * len(embeds)
        padded = torch.zeros(len(embeds), longest, table.embedding_dim)
        mask = torch.zeros(len(embeds), longest, dtype=torch.long)
        for i, row in enumerate(embeds):
            padded[i, longest - len(row) :] = row
            mask[i, longest - len(row) :] = 1
        places = (mask.cumsum(1) - 1).clamp(min=0)
        hidden = language.model(
            inputs_embeds=padded, attention_mask=mask, position_ids=places
        ).last_hidden_state
        vectors.append(torch.nn.functional.normalize(hidden[:, -1], dim=-1).numpy())
    np.savez(output, vectors=np.concatenate(vectors))
    print(f"{1 - real / positions:.1%} of the positions were padding")


def our_side(model: str, rows: pathlib.Path, output: pathlib.Path) -> None:
    from unime_jax import embed

    embed.main(
        ["embed", "--model", model, "--input", str(rows), "--output", str(output)]
        + ["--compute-dtype", "float32"]
    )


def measure(side: str, model: str, rows: pathlib.Path, output: pathlib.Path, cache: str) -> dict:
    """Runs one side as a process of its own; returns wall and processor seconds, peak memory."""
    output.unlink(missing_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "2", "UNIME_JAX_CACHE": cache, "JAX_PLATFORMS": "cpu"}
    code = [sys.executable, str(HERE), "--side", side, "--model", model, "--input", str(rows)]
    start = time.perf_counter()
    with subprocess.Popen([*code, "--output", str(output)], env=env, stderr=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as process:  # fmt: skip
        out, err = process.communicate()
        if process.returncode:
            raise SystemExit(err)
    found = json.loads(out.strip().splitlines()[-1])
    padding = re.search(r"([\d.]+)% of the positions", out)[1]
    return {"wall": time.perf_counter() - start, "padding": float(padding), **found}


def compare(model: str, rows: pathlib.Path, repeats: int, scratch: pathlib.Path) -> None:
    """Prints both sides' times, memory and padding, and how far apart their vectors are."""
    count = len(rows.read_text().split("\n"))
    cache = str(scratch / "cache")
    results: dict[str, list[dict]] = {"ours": [], "torch": []}
    cold = measure("ours", model, rows, scratch / "ours.npz", cache)
    for _ in range(repeats):
        for side, found in results.items():
            found.append(measure(side, model, rows, scratch / f"{side}.npz", cache))
    a, b = (np.load(scratch / f"{side}.npz")["vectors"] for side in results)
    distance = float(np.abs(1 - (a * b).sum(axis=1)).max())
    print(f"{model}, {count} rows; largest cosine distance of the two: {distance:.1e}")
    print(f"  ours, nothing compiled yet: {cold['wall']:.1f} s, {cold['peak']:.2f} GB")
    for side, found in results.items():
        walls, cpus, peaks = ([x[name] for x in found] for name in ("wall", "cpu", "peak"))
        print(
            f"  {side:5}  {_spread(walls, '.1f')} s, {count / np.median(walls):.1f} rows/s; "
            f"{_spread(cpus, '.1f')} processor s; {_spread(peaks, '.2f')} GB; "
            f"{found[0]['padding']:.1f} % padding"
        )
    pairs = list(zip(results["ours"], results["torch"], strict=True))
    speed = _spread([other["wall"] / own["wall"] for own, other in pairs], ".2f")
    memory = _spread([own["peak"] / other["peak"] for own, other in pairs], ".2f")
    print(f"  ours has {speed} times the throughput and {memory} times the memory", flush=True)


def _spread(values: list[float], form: str) -> str:
    """Returns the median, and the least and the most of several."""
    low, median, high = (format(f(values), form) for f in (min, np.median, max))
    return f"{median} ({low} to {high})" if len(values) > 1 else median


def tiny_model(scratch: pathlib.Path) -> pathlib.Path:
    """Writes a tiny model of random weights."""
    sys.path.insert(0, str(HERE.parents[1]))
    import miniature

    return miniature.write_model(scratch / "tiny", miniature.STUDENT, seed=0)


def default_models(scratch: pathlib.Path) -> list[str]:
    """Returns a tiny model and the newcomer's, if that is there."""
    from unime_jax import runtime

    tiny = str(tiny_model(scratch))
    smol = runtime.cache_directory() / "smol" / "student"
    if not smol.is_dir():
        print(f"{smol} is not there: run `python -m unime_jax.prepare smol`")
    return [tiny, *[str(smol)] * smol.is_dir()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", action="append", help="directories of unime_smol models")
    parser.add_argument("--side", choices=("ours", "torch"), help="run one side alone")
    parser.add_argument("--input", type=pathlib.Path)
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    if args.side:
        {"ours": our_side, "torch": torch_side}[args.side](args.model[0], args.input, args.output)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cpu = usage.ru_utime + usage.ru_stime
        print(json.dumps({"cpu": cpu, "peak": usage.ru_maxrss / 1e6}))
        return
    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        rows = write_rows(scratch, args.rows)
        for model in args.model or default_models(scratch):
            compare(model, rows, args.repeats, scratch)


if __name__ == "__main__":
    main()
