"""The paper's claims in miniature: which stages, which negatives, which margin and k.

    python -m unime_jax.ablate --config configs/smol_ablation.py          # 3 seeds x 3 splits
    python -m unime_jax.ablate --config configs/smol_ablation.py:quick    # fewer steps, 3 seeds
    python -m unime_jax.ablate --config configs/smol_ablation.py:smoke    # a few steps of a few

A variant is one more stage on top of its base. Variants of the same stage have the same number of
learning rates to choose from, which they do on the validation data of the first split and seed.
"""

import pathlib

from ml_collections import ConfigDict

from unime_jax.runtime import cache_directory

SMOKE = ("distilled", "none", "stage 1", "stage 2", "both", "random negatives")
# What "both" is among the variants, by the config of stage 2.
REFERENCE = (
    ("negatives", "hard negatives (both)"),
    ("margin", "margin 0.1 (both)"),
    ("k", "k 8 (both)"),
)


def variants(margins, ks):
    """Returns name, family of tables and plots, base, stage, what it changes.

    The base of the first is the raw student. "both" stands in every family: it is what the others
    are compared with.
    """
    return (
        ("distilled", "", "", "stage1", {}),
        ("none", "stages", "", "align", {}),
        ("stage 1", "stages", "distilled", "align", {}),
        ("stage 2", "stages", "none", "stage2", {}),
        ("both", "reference", "stage 1", "stage2", {}),
        ("random negatives", "negatives", "stage 1", "stage2", {"loss.negatives": "random"}),
        ("easy negatives", "negatives", "stage 1", "stage2", {"loss.negatives": "easy"}),
        *(
            (f"margin {margin:g}", "margin", "stage 1", "stage2", {"loss.margin": margin})
            for margin in margins
        ),
        *((f"k {k}", "k", "stage 1", "stage2", {"loss.k": k}) for k in ks),
    )


def get_config(arg: str = ""):
    """Returns the configuration; `arg` is "", "quick" or "smoke"."""
    smoke, quick = arg == "smoke", arg == "quick"
    c = ConfigDict()
    c.output = "runs/smol-ablation" + ("-quick" if quick else "-smoke" if smoke else "")
    c.assets = str(cache_directory())  # where `prepare` put, or is to put, models and data
    c.configs = str(pathlib.Path(__file__).parent)  # of the stages
    c.smoke = smoke  # few pairs, few steps
    c.seeds = (0,) if smoke else (0, 1, 2)  # order of the data, adapters' initial values
    c.splits = (1,) if quick or smoke else (1, 2, 3)  # which pictures and sentences are held out
    # Times the learning rate of the stage's config; each variant tries all of its stage's.
    c.rates = ConfigDict()
    c.rates.stage1 = c.rates.align = c.rates.stage2 = (1.0,) if smoke else (1 / 3, 1.0, 3.0)
    # What is other than in the stages' configs, for all variants.
    c.changes = ConfigDict()
    c.changes.stage1 = c.changes.align = c.changes.stage2 = (("train.steps", 2),) if smoke else ()
    # A margin of 2 filters nothing, for cosines differ by no more; the last k takes all.
    rows = variants(margins=(0.0, 0.2, 2.0), ks=(1, 2, 32, 127))
    if quick:
        rows = variants(margins=(2.0,), ks=(63,))
        c.rates.stage1, c.rates.align, c.rates.stage2 = (1.0,), (1.0,), (1.0, 8.0)
        batch = ("train.batch_size", 64)
        c.changes.stage1 = (batch, ("train.steps", 50), ("data.length_bins", 2))
        c.changes.align = (batch, ("train.steps", 60), ("data.extra_texts", 0.0))
        c.changes.stage2 = (batch, ("train.steps", 16), ("train.chunk", 0))
    c.variants = tuple(
        (name, family, base, stage, tuple(changes.items()))
        for name, family, base, stage, changes in rows
        if name in SMOKE or not smoke
    )
    c.reference = REFERENCE
    return c
