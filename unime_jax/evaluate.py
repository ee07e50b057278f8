"""Measures a model on a benchmark: tables, plots, JSON, beside the published numbers.

    python -m unime_jax.evaluate --config configs/eval_mmeb.py --config.model.path=DIR \\
        --config.data.path=MMEB-eval/ --config.images=eval_images/
    python -m unime_jax.evaluate --config configs/eval_retrieval.py --config.model.path=DIR \\
        --config.data.path=RETRIEVAL/
    python -m unime_jax.evaluate --config configs/eval_smol.py
    python -m unime_jax.evaluate compare RUN_A RUN_B ... [--output DIR]

Writes report.md, report.json and the plots to config.output and prints the tables. Every config has
a miniature, `configs/eval_mmeb.py:smoke`. --sets A,B and --limit N, for config.sets and
config.limit, take a part. Vectors are kept on disk (config.cache): a second run, after a kill or on
another benchmark, embeds only what is new. `compare` puts outputs side by side, the first as
"before" and the last as "after" of its plots.
"""

from collections.abc import Sequence

from unime_jax import runtime
from unime_jax.config import check_choice, parse
from unime_jax.evaluation import compare, mmeb, retrieval, smol_report
from unime_jax.types import UserError

BENCHMARKS = {"mmeb": mmeb, "retrieval": retrieval, "smol": smol_report}
_SHORT = {"--sets": "A,B", "--limit": "100"}


def main(argv: list[str]) -> None:
    if argv[1:2] == ["compare"]:
        compare.main(argv[2:])
        return
    config = parse(_expanded(argv), __doc__)
    if "benchmark" not in config:
        raise UserError("this config is not of an evaluation: take one of configs/eval_*.py")
    check_choice(config, "benchmark", tuple(BENCHMARKS))
    benchmark = BENCHMARKS[config.benchmark]
    benchmark.validate(config)
    runtime.start()
    benchmark.run(config)


def _expanded(argv: Sequence[str]) -> list[str]:
    """Spells --sets A,B and --limit N as the keys of the config that they stand for.

    Raises:
      UserError: no value follows.
    """
    found, rest = [], iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in _SHORT:
            if not equals and (value := next(rest, "")) == "":
                raise UserError(f"{name} needs a value, as in {name} {_SHORT[name]}")
            found.append(f"--config.{name.removeprefix('--')}={value}")
        else:
            found.append(word)
    return found


if __name__ == "__main__":
    runtime.run_entry(main)
