"""Plans a training run for hardware that is not there: memory, operations, time.

    python -m unime_jax.plan --config configs/llava16_stage2.py --topology v5e:4x4
    python -m unime_jax.plan --config configs/phi35v_stage2.py --topology a100-80g:8 --search

  --topology NAME  TPU slices as v5e:4x4, v6e:2x4, v5p:2x2x2; GPUs as a100-80g:8, a100-40g:8,
                   h100:8, h200:1, and a100-80g:2x8 for two hosts of eight
  --compile        compiles the real step for it (no such hardware is needed; extras plan-tpu and
                   plan-gpu): temporaries, peak, whether it fits, every collective. Groups of rows
                   are compiled one by one, one for all that differ in length alone; what was
                   compiled before is not again
  --compile=pieces  every group; --compile=whole  all in one program, as training does. Longer
  --search         compares values of train.chunk and model.remat, recommends the fastest that
                   fits; on estimates, or with --compile on compiled programs
  --mfu SHARE      of the peak rate that products run at, recomputed ones counted (0.45)
  --json           prints the plan for machines

Weights and data need not be there: sizes of the published models are known, and lengths typical of
the data sets stand for data that is missing. Any key can be overridden with --config.key=value.
"""

import json

from unime_jax import arguments, runtime
from unime_jax import config as config_lib
from unime_jax.planning import topology
from unime_jax.types import UserError

COMPILES = ("kinds", "pieces", "whole")


def main(argv: list[str]) -> None:
    options, rest = _options(argv)
    if options is None:
        print(__doc__.strip())
        return
    hardware = topology.parse(options.topology)
    config = config_lib.parse([argv[0], *rest], __doc__)
    config_lib.validate_values(config)
    topology.use_no_accelerator()
    from unime_jax.planning import planner  # after the platform is chosen

    settings = config.to_dict()
    name = next((a.removeprefix("--config=") for a in rest if ".py" in a), "")
    found = planner.make(
        settings,
        name,
        hardware,
        mfu=options.mfu,
        compiles=options.compile,
        searches=options.search,
        tell=_quiet if options.json else _say,
    )
    if options.json:
        print(json.dumps(found, indent=1))


def _say(text: str) -> None:
    print(text, flush=True)


def _quiet(text: str) -> None:
    del text


def _options(argv: list[str]):
    parser = arguments.Parser(prog="python -m unime_jax.plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--topology")
    parser.add_argument("--mfu", type=float, default=0.45)
    parser.add_argument("--compile", nargs="?", const="kinds", choices=COMPILES)
    for flag in ("--search", "--json"):
        parser.add_argument(flag, action="store_true")
    if len(argv) < 2 or any(a in ("-h", "--help", "-help") for a in argv[1:]):
        return None, []
    options, rest = parser.parse_known_args(argv[1:])
    if options.topology is None:
        raise UserError(f"--topology is missing; give {topology.accepted()}")
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu={options.mfu}: a share of the peak rate, above 0 and at most 1")
    return options, rest


if __name__ == "__main__":
    runtime.run_entry(main)
