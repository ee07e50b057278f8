"""Evaluation of the newcomer's run: every stage beside chance, baselines and teacher.

python -m unime_jax.evaluate --config configs/eval_smol.py          # after launch/smol.sh
python -m unime_jax.evaluate --config configs/eval_smol.py:smoke    # after launch/smol.sh smoke
python -m unime_jax.evaluate --config configs/eval_smol.py --config.models.stage2=DIR
"""

from ml_collections import ConfigDict

from unime_jax.runtime import cache_directory


def get_config(arg: str = ""):
    """Returns the configuration; `arg` is "" or "smoke"."""
    smoke = arg == "smoke"
    assets = cache_directory() / ("smol-smoke" if smoke else "smol")
    runs = "runs/smol-smoke" if smoke else "runs/smol"
    c = ConfigDict()
    c.benchmark = "smol"
    c.output = f"{runs}/report"  # directory of report.md, report.json and the plots
    c.dtype = "float32"  # of the models: float32 or bfloat16
    c.limit = 0  # so many sentences, the first, and pairs, evenly spread; 0: all

    # Row of the tables -> HF directory or run directory, in the order of the rows; "": left out.
    c.models = ConfigDict()
    c.models.raw = str(assets / "student")
    c.models.stage1 = f"{runs}/stage1"
    c.models.align = f"{runs}/align"
    c.models.stage2 = f"{runs}/stage2"

    c.teacher = ConfigDict()
    c.teacher.path = str(assets / "teacher")  # HF directory of the text teacher; "": none, no ridge

    c.data = ConfigDict()
    c.data.path = str(assets / "data")  # directory written by `prepare`
    c.data.split = "test"  # pairs: test, or validation to choose between runs
    # As in training, so that the ridge baseline finds the features of the training images there.
    c.data.features = str(assets / "features")  # "": computed anew
    c.data.variants = 1 if smoke else 3

    # Run directories whose losses are drawn; "": left out.
    c.runs = ConfigDict()
    c.runs.stage1 = f"{runs}/stage1"
    c.runs.align = f"{runs}/align"
    c.runs.stage2 = f"{runs}/stage2"
    return c
