"""MMEB: Precision@1 on 36 sets, the paper's Table 1.

python -m unime_jax.evaluate --config configs/eval_mmeb.py \\
    --config.model.path=UniME-Phi3.5-V-4.2B/ --config.data.path=MMEB-eval/ \\
    --config.images=eval_images/
python -m unime_jax.evaluate --config configs/eval_mmeb.py:smoke    # a tiny model, made-up sets

Add --sets classification,MSCOCO_t2i or --limit 100 for a part. MMEB-eval/ and the images are those
of TIGER-Lab/MMEB-eval on Hugging Face: MMEB-eval/SET/test-*.parquet, and images.zip unpacked.
"""

from unime_jax import tiny
from unime_jax.config import evaluation_config


def get_config(arg: str = ""):
    """Returns the configuration; `arg` is "" or "smoke"."""
    c = evaluation_config()
    c.benchmark = "mmeb"
    c.output = "runs/eval_mmeb"  # directory of report.md, report.json, plots and answers
    c.sets = ""  # names, meta-tasks, ind or ood, separated by commas; "": all 36
    c.limit = 0  # queries of each set, evenly spread; 0: all
    c.images = "eval_images"  # directory that the sets' image paths start from
    c.before = ""  # output of an earlier evaluation, drawn as "before"; "": chance
    c.data.path = "MMEB-eval"  # directory of the sets
    if arg == "smoke":
        _shrink(c)
    return c


def _shrink(c) -> None:
    c.output = "runs/smoke/eval_mmeb"
    c.model.path = str(tiny.backbone("phi35v"))
    c.model.dtype = "float32"
    c.data.image_size = 56
    c.data.image_crops = 1
    source, images = tiny.mmeb_eval()
    c.data.path, c.images = str(source), str(images)
