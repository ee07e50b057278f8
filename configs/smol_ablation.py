"""The paper's claims in miniature: which stages, which negatives, which margin and k.

    python -m unime_jax.ablate --config configs/smol_ablation.py          # 3 seeds x 3 splits
    python -m unime_jax.ablate --config configs/smol_ablation.py:quick    # 1 seed, 1 split
    python -m unime_jax.ablate --config configs/smol_ablation.py:smoke    # a few steps of a few

A variant is one more stage on top of its base. All have the same number of learning rates to choose
from, which they do on the validation data of the first split and seed.
"""

import pathlib

from ml_collections import ConfigDict

from unime_jax.runtime import cache_directory

# Name, family of tables and plots, base, stage, what it changes. The base of the first is the raw
# student. "both" stands in every family: it is what the others are compared with.
VARIANTS = (
    ("distilled", "", "", "stage1", {}),
    ("none", "stages", "", "align", {}),
    ("stage 1", "stages", "distilled", "align", {}),
    ("stage 2", "stages", "none", "stage2", {}),
    ("both", "reference", "stage 1", "stage2", {}),
    ("random negatives", "negatives", "stage 1", "stage2", {"loss.negatives": "random"}),
    ("easy negatives", "negatives", "stage 1", "stage2", {"loss.negatives": "easy"}),
    *(
        (f"margin {margin:g}", "margin", "stage 1", "stage2", {"loss.margin": margin})
        for margin in (0.0, 0.2, 2.0)  # 2 filters nothing: cosines differ by no more
    ),
    *((f"k {k}", "k", "stage 1", "stage2", {"loss.k": k}) for k in (1, 2, 32, 127)),
)
# What "both" is among them, by the config of stage 2.
REFERENCE = (
    ("negatives", "hard negatives (both)"),
    ("margin", "margin 0.1 (both)"),
    ("k", "k 8 (both)"),
)
SMOKE = ("distilled", "none", "stage 1", "stage 2", "both", "random negatives")


def get_config(arg: str = ""):
    """Returns the configuration; `arg` is "", "quick" or "smoke"."""
    smoke = arg == "smoke"
    c = ConfigDict()
    c.output = "runs/smol-ablation-smoke" if smoke else "runs/smol-ablation"
    c.assets = str(cache_directory())  # where `prepare` put, or is to put, models and data
    c.configs = str(pathlib.Path(__file__).parent)  # of the stages
    c.smoke = smoke  # few pairs, few steps
    c.seeds = (0, 1, 2) if not arg else (0,)  # order of the data, adapters' initial values
    c.splits = (1, 2, 3) if not arg else (1,)  # which pictures and sentences are held out
    # Times the learning rate of the stage's config; each variant tries all of them.
    c.rates = (1.0,) if smoke else (1 / 3, 1.0, 3.0)
    wanted = SMOKE if smoke else tuple(name for name, *_ in VARIANTS)
    c.variants = tuple(
        (name, family, base, stage, tuple(changes.items()))
        for name, family, base, stage, changes in VARIANTS
        if name in wanted
    )
    c.reference = REFERENCE
    c.steps = 2 if smoke else 0  # of every stage; 0: as its config says
    return c
