"""Writes the model card that goes with exported weights."""

import dataclasses
import json
import pathlib
from typing import Any

from unime_jax import checkpoint, report, weights
from unime_jax.data import prompts
from unime_jax.report import Table

_TEXT_ALONE = ("llama", "mistral", "phi3")
_STAGES = {
    "distill": "1, distillation of a text teacher",
    "align": "alignment of the projector",
    "contrast": "2, contrastive with hard negatives",
    "judge": "2, contrastive with judged negatives",
}
_PYTORCH = """```python
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModel.from_pretrained(".").eval()
{prompt}
inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
with torch.no_grad():
    hidden = model(**inputs).last_hidden_state
last = inputs["attention_mask"].sum(1) - 1
vectors = torch.nn.functional.normalize(hidden[torch.arange(len(last)), last], dim=-1)
```"""
_LLAVA = """```python
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

processor = AutoProcessor.from_pretrained(".")
model = LlavaNextForConditionalGeneration.from_pretrained(".").eval()
prompt = {image!r}
image = Image.open("cat.png").convert("RGB"){resize}
inputs = processor(images=[image], text=[prompt], return_tensors="pt")
with torch.no_grad():
    hidden = model.model(**inputs).last_hidden_state
vectors = torch.nn.functional.normalize(hidden[:, -1], dim=-1)
```"""


_SENTENCES = """```python
from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer(".").encode([{text!r}])
```
"""


def write(directory: pathlib.Path, found: weights.Weights, *, pooling: str, width: int) -> None:
    """Writes README.md: what the model is, how it was trained, and how to load it.

    Args:
      directory: of the exported files.
      found: what was exported.
      pooling, width: of its embeddings.
    """
    text = card(found, pooling=pooling, width=width)
    if (directory / "modules.json").is_file():
        words = _template(found).text.replace("{text}", "a puppy")
        text += "\nWith sentence-transformers:\n\n" + _SENTENCES.format(text=words)
    (directory / "README.md").write_text(text, encoding="utf-8")


def card(found: weights.Weights, *, pooling: str, width: int) -> str:
    """Returns the card in Markdown, with the front matter of the Hugging Face hub."""
    kind = found.config["model_type"]
    template = _template(found)
    runs = [pathlib.Path(change.name) for change in found.changes]
    base, named = found.base_name, ""
    if pathlib.Path(base).is_dir():
        base = pathlib.Path(base).name
    else:
        named = f"base_model: {json.dumps(base)}\n"  # the hub follows it
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: feature-extraction\n"
        f"{named}tags: [embeddings, unime, unime_jax]\n---",
        f"# Embeddings from {base}",
        f"Turns texts{', images, and both together' if template.image else ''} into vectors of "
        f"{width} numbers and length 1 ({kind}). Made with unime_jax, which implements UniME "
        "([arXiv 2504.17432](https://arxiv.org/abs/2504.17432)).",
        "## Training",
    ]
    stages = [_stage(run) for run in runs if checkpoint.is_run(run)]
    others = [run.name for run in runs if not checkpoint.is_run(run)]
    parts.append(f"Base: {base}." + "".join(f" Adapter merged in: {name}." for name in others))
    if stages:
        header = ("stage", "data", "steps", "batch", "temperature", "trained")
        parts.append(Table(header, stages).markdown())
    elif not others:
        parts.append("The weights are those of the base: nothing was trained.")
    if metrics := _metrics(runs):
        parts += ["## Metrics", "Validation at the end of each stage.", metrics.markdown()]
    parts += ["## Prompts and pooling", _prompts(found, template, pooling)]
    parts += ["## How to load", _loading(found, template)]
    return "\n\n".join(parts) + "\n"


def _template(found: weights.Weights) -> prompts.Template:
    kind = found.config["model_type"]
    template = prompts.TEMPLATES[found.preparation.get("prompt") or prompts.name_for(kind)]
    if kind in _TEXT_ALONE:
        return dataclasses.replace(template, image="", both="")
    if template.raw:  # what `embed` makes of rows that do not say where their image stands
        return dataclasses.replace(template, image="{image}", both="{image}\n{text}")
    return template


def _stage(run: pathlib.Path) -> tuple:
    config = checkpoint.read_run(run)
    train, loss = config["train"], config.get("loss", {})
    rank = train["adapters"]["rank"]
    trained = [f"LoRA of rank {rank}"] if rank else []
    trained += [f"`{rule}`" for rule in train.get("trainable") or []]
    temperature = loss.get("temperature")
    data = "/".join(pathlib.Path(str(config["data"].get("path") or "")).parts[-2:])
    stage = config.get("stage", "")
    return (
        _STAGES.get(stage, stage),
        data,
        train.get("steps"),
        train.get("batch_size"),
        temperature,
        ", ".join(trained),
    )


def _metrics(runs: list[pathlib.Path]) -> Table | None:
    """Returns the last validation of each run."""
    rows = {}
    for run in runs:
        last: dict[str, Any] = {}
        for line in report.read_metrics(run):
            last |= {k.split("/", 1)[1]: v for k, v in line.items() if k.startswith("validation/")}
        if last:
            rows[run.name] = last
    if not rows:
        return None
    names = sorted({name for row in rows.values() for name in row})
    header = ("run", *(name.replace("_", " ") for name in names))
    lines = [(run, *(row.get(name) for name in names)) for run, row in rows.items()]
    return Table(header, lines, ("", *[".3f"] * len(names)))


def _prompts(found: weights.Weights, template: prompts.Template, pooling: str) -> str:
    lines = [
        f"Pooling: {pooling}, scaled to length 1. A row is embedded inside its prompt, to the "
        "character (Python strings):",
        "```python",
        f"text  = {template.text!r}",
    ]
    lines += [f"image = {template.image!r}"] if template.image else []
    lines += [f"both  = {template.both!r}"] if template.both else []
    lines.append("```")
    if template.image:
        lines.append("`{image}` is the place of the image's tokens.")
    if found.preparation.get("fusion") == "sum":
        lines.append("An image with a text is the sum of the two vectors, scaled to length 1.")
    if size := found.preparation.get("image_size"):
        lines.append(f"Images are resized to {size} x {size} pixels first.")
    return "\n".join(lines)


def _loading(found: weights.Weights, template: prompts.Template) -> str:
    kind = found.config["model_type"]
    second = ', None], images=[None, "cat.png"]' if template.image else ', "a young dog"]'
    parts = [
        '```python\nimport unime_jax\n\nembedder = unime_jax.load(".")\n'
        f'vectors = embedder.embed(texts=["a puppy"{second})\n```'
    ]
    if kind in _TEXT_ALONE:
        words = f"texts = [{template.text!r}.format(text=text) for text in ('a puppy', 'a car')]"
        parts += ["With transformers:", _PYTORCH.format(prompt=words)]
    elif kind == "llava_next":
        image = template.image.replace("{image}", "<image>")
        size = found.preparation.get("image_size")
        resize = f".resize(({size}, {size}))" if size else ""
        parts += ["With transformers:", _LLAVA.format(image=image, resize=resize)]
    elif kind == "unime_smol":
        parts.append(
            "transformers does not know this type of model; `python -m unime_jax.convert export "
            "--text-only` writes its language model as a Llama."
        )
    elif kind == "phi3_v":
        parts.append(
            "With transformers, the model's own code (the .py files of the base) is needed: "
            "`AutoModelForCausalLM.from_pretrained('.', trust_remote_code=True)`; the embedding is "
            "the last hidden state of the last token, scaled to length 1."
        )
    if kind in ("llava_next", *_TEXT_ALONE):
        parts.append(
            "With vLLM: `vllm serve . --runner pooling --convert embed`, pooling the last token "
            "and normalising; requests carry the prompt above."
        )
    return "\n\n".join(parts)
