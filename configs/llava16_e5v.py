"""E5-V on LLaVA-1.6, the baseline of stage 1: InfoNCE on NLI with its contradictions as negatives.

python -m unime_jax.train --config configs/llava16_e5v.py \\
    --config.model.path=llava-v1.6-mistral-7b-hf/ --config.data.path=nli_for_simcse.csv
python -m unime_jax.train --config configs/llava16_e5v.py:smoke    # 3 steps, tiny random model

sent0 is the query, sent1 its target; every hard_neg of the batch is one more negative of every
query (E5-V, arXiv 2407.12580). Only the language model is loaded and trained.
"""

from unime_jax import tiny
from unime_jax.config import base_config


def get_config(arg: str = ""):
    """Returns the configuration; `arg` is "" or "smoke"."""
    c = base_config()
    c.stage = "contrast"
    c.output = "runs/llava16/e5v"
    c.model.dtype = "bfloat16"
    c.data.path = "nli_for_simcse.csv"
    c.data.max_tokens = 56  # E5-V cuts the sentence at 32 tokens; the prompt takes about 20 more
    c.data.length_bins = 5
    c.loss.temperature = 0.05
    c.loss.k = 0  # every target of the batch
    c.train.epochs = 2.0
    c.train.batch_size = 768  # rows of three
    c.train.chunk = 192  # rows encoded at a time: 18 GiB of one GPU; 12 with 96, a tenth slower
    c.model.remat = "full"
    c.train.quantize = "nf4"
    c.train.adapters.rank = 64
    c.train.adapters.alpha = 16.0
    c.train.adapters.dropout = 0.05
    c.optim.learning_rate = 4e-4
    c.optim.warmup_share = 0.03
    if arg == "smoke":
        _shrink(c)
    return c


def _shrink(c) -> None:
    c.output = "runs/smoke/llava16_e5v"
    c.model.path = str(tiny.backbone("llava16"))
    c.model.dtype = "float32"
    c.data.path = str(tiny.nli())
    c.data.max_tokens = 192  # a token a letter
    c.data.length_bins = 1
    c.train.epochs = 0.0
    c.train.steps = 3
    c.train.batch_size = 24
    c.train.chunk = 4
    c.model.remat = "none"  # compiles faster
    c.mesh.data = -1
    c.mesh.fsdp = 1
