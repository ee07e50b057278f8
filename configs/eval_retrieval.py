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

from ml_collections import ConfigDict, config_dict

from unime_jax import tiny


def get_config(arg: str = ""):
    """Returns the configuration; `arg` is "" or "smoke"."""
    c = ConfigDict()
    c.benchmark = "retrieval"
    c.output = "runs/eval_retrieval"  # directory of report.md, report.json and plots
    c.sets = ""  # flickr30k, coco, sharegpt4v, urban1k, sugarcrepe, separated by commas; "": all
    c.limit = 0  # first images of each set (rows of SugarCrepe's files); 0: all
    c.images = ""  # root of ShareGPT4V's and SugarCrepe's images; "": beside the sets
    c.cache = ""  # vectors of all models and benchmarks; "": ~/.cache/unime_jax/vectors

    c.model = ConfigDict()
    c.model.path = ""  # Hugging Face directory or hub id, run, PEFT adapter
    c.model.dtype = "bfloat16"  # of parameters and computation: float32 or bfloat16

    c.data = ConfigDict()
    c.data.path = "retrieval"  # directory of the sets' directories
    # How rows become inputs; left open, as the model was trained, else as the published evaluation.
    c.data.prompt = ""  # key of data/prompts.py: TEMPLATES; "": the published evaluation's
    c.data.fusion = ""  # no row here has an image with a text
    c.data.image_size = config_dict.placeholder(int)  # side of a square; 0: images as they are
    c.data.image_crops = config_dict.placeholder(int)  # most crops (Phi-3.5-V); 0: the checkpoint's

    # Every process loads the model on its own devices. Whole copies need no gathers; where a device
    # is too small for one: --config.mesh.data=1 --config.mesh.fsdp=-1.
    c.mesh = ConfigDict()
    c.mesh.data = -1
    c.mesh.fsdp = 1
    c.mesh.tensor = 1
    if arg == "smoke":
        _shrink(c)
    return c


def _shrink(c) -> None:
    c.output = "runs/smoke/eval_retrieval"
    c.model.path = str(tiny.backbone("llava16"))
    c.model.dtype = "float32"
    c.data.image_size = 56
    c.data.path = str(tiny.captions())
