"""Rows a second that one worker turns from files into a batch: `pipeline_side.py SIDE FOLDER`.

A row is a JPEG of 640 x 480 that is resized to 336 pixels square and cut as LLaVA-1.6 does it, with
a question, and a short text as its target; the tokenizer makes a token of each letter on both
sides. PyTorch's way is LlavaNextProcessor on batches, as VLM2Vec's collator calls it; without
torchvision it works with PIL and numpy, and it gives floats where we give bytes. SIDE "files"
writes what both read.
"""

import json
import pathlib
import sys

import numpy as np
import workers

ROWS, BATCH, SIZE = 64, 32, 336
GRIDS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
IMAGE_TOKEN = 260


def files(folder: pathlib.Path) -> None:
    import host

    from unime_jax import tiny

    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(ROWS):
        (folder / f"{number}.jpg").write_bytes(host.jpeg(640, 480, number))
        query = f"<|image_1|>\nWhat does picture {number:5} show? {'a word ' * 4}"
        target = f"{number:5} {'b word ' * 2}"
        row = {"query_text": query, "query_image": f"{number}.jpg", "target_text": target}
        lines.append(json.dumps(row))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    (folder / "tokenizer").symlink_to(tiny.backbone("llava16"))


def ours(folder: pathlib.Path):
    from unime_jax.data import pipeline, preprocess, task_pairs
    from unime_jax.types import ImageSpec

    model = preprocess.Preprocessor(
        folder / "tokenizer",
        ImageSpec("llava_anyres", SIZE, (SIZE // 14) ** 2, grids=GRIDS),
        prompt="mmeb",
        max_tokens=8192,
        image_token_id=IMAGE_TOKEN,
        image_size=SIZE,
    )
    rows = task_pairs.read(folder / "pairs.jsonl")
    made = pipeline.Batches(rows, model, batch_size=BATCH, max_tokens=256)
    step = 0

    def act():
        nonlocal step
        batch = made[step]
        step += 1
        return {"rows": BATCH, "tokens": int(batch.query[0].tokens.shape[1])}

    return {"first": act()}, act


def torch(folder: pathlib.Path):
    import torch
    import transformers
    from PIL import Image

    torch.set_num_threads(1)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer" / "tokenizer.json"), pad_token="</s>"
    )
    images = transformers.AutoImageProcessor.from_pretrained(_settings(folder))
    processor = transformers.LlavaNextProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    order = np.random.default_rng(0)

    def act():
        chosen = [rows[i] for i in order.choice(len(rows), BATCH, replace=False)]
        pictures = [
            Image.open(folder / row["query_image"]).convert("RGB").resize((SIZE, SIZE))
            for row in chosen
        ]
        texts = [row["query_text"].replace("<|image_1|>", "<image>") for row in chosen]
        query = processor(text=texts, images=pictures, return_tensors="pt", padding=True)
        tokenizer([row["target_text"] for row in chosen], return_tensors="pt", padding=True)
        return {"rows": BATCH, "tokens": int(query["input_ids"].shape[1])}

    return {"first": act(), "processor": type(images).__name__}, act


def _settings(folder: pathlib.Path) -> pathlib.Path:
    directory = folder / "processor"
    directory.mkdir(exist_ok=True)
    settings = {
        "image_processor_type": "LlavaNextImageProcessor",
        "image_grid_pinpoints": GRIDS,
        "size": {"shortest_edge": SIZE},
        "crop_size": {"height": SIZE, "width": SIZE},
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    return directory


if __name__ == "__main__":
    side, path = sys.argv[1], pathlib.Path(sys.argv[2])
    if side == "files":
        files(path)
    else:
        workers.keep_to_two_cores()
        workers.serve(lambda: {"ours": ours, "torch": torch}[side](path))
