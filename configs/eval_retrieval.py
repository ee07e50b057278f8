"""Zero-shot retrieval: Flickr30K, COCO, ShareGPT4V, Urban1K and SugarCrepe, the paper's Table 2.

python -m unime_jax.evaluate --config configs/eval_retrieval.py \\
    --config.model.path=UniME-Phi3.5-V-4.2B/ --config.data.path=RETRIEVAL/
python -m unime_jax.evaluate --config configs/eval_retrieval.py:smoke    # tiny model, made-up sets

RETRIEVAL/ holds what is there of
    flickr30k_test/*.parquet, coco_test/*.parquet    royokong/flickr30k_test, royokong/coco_test
    ShareGPT4V/share-captioner_coco_lcs_sam_1246k_1107.json, and its images below the same directory
    Urban1k/image/*.jpg, Urban1k/caption/*.txt
    sugar_crepe/*.json, and COCO's val2017/*.jpg beside it
Add --sets flickr30k,sugarcrepe or --limit 100 for a part.
"""

from unime_jax import tiny
from unime_jax.config import evaluation_config


def get_config(arg: str = ""):
    """Returns the configuration; `arg` is "" or "smoke"."""
    c = evaluation_config()
    c.benchmark = "retrieval"
    c.output = "runs/eval_retrieval"  # directory of report.md, report.json and plots
    c.sets = ""  # flickr30k, coco, sharegpt4v, urban1k, sugarcrepe, separated by commas; "": all
    c.limit = 0  # first images of each set (rows of SugarCrepe's files); 0: all
    c.images = ""  # root of ShareGPT4V's and SugarCrepe's images; "": beside the sets
    c.data.path = "retrieval"  # directory of the sets' directories
    if arg == "smoke":
        _shrink(c)
    return c


def _shrink(c) -> None:
    c.output = "runs/smoke/eval_retrieval"
    c.model.path = str(tiny.backbone("llava16"))
    c.model.dtype = "float32"
    c.data.image_size = 56
    c.data.path = str(tiny.captions())
