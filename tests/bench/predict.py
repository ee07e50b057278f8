"""Predicts where the time of a training step goes on a GPU that is not there.

    PYTHONPATH=. python tests/bench/predict.py --config configs/llava16_stage2.py --topology h200:1

  --topology NAME  GPUs, as `python -m unime_jax.plan` takes them; most is said of one GPU
  --mfu SHARE      of the peak rate that products and attention run at (0.7)
  --pieces         compiles every group of rows; else one for all that differ in length alone, and
                   the others are taken to cost as much an operation
  --top N          how many instructions that are no products are listed (15)
  --hlo DIR        keeps the compiled programs there, as text, and does not compile them again
  --json           prints all of it for machines

The step is compiled piece by piece, as `plan --compile` does it, and every instruction of the
optimised programs is taken to last as long as the longest of its operations at the given rate, its
bytes at 85 % of the memory's bandwidth and its integer operations, of which an SM does 64 a clock.
The bytes of each instruction go through memory, though some stay in the cache. Nothing is tuned for
hardware that is not there: products are Triton's, where a real GPU may prefer cuBLAS. Needs the
extra plan-gpu. Any key can be overridden with --config.key=value.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import math
import pathlib
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import hlo

from unime_jax import arguments, runtime
from unime_jax import config as config_lib
from unime_jax.planning import topology as topologies
from unime_jax.types import UserError

_BANDWIDTH = 0.85  # share that kernels reach
_INTEGER_LANES = 64  # of an SM, on Ampere and Hopper
_SHOWN = 0.0005  # share of a step below which a kind is left out of the table
_CLOSE = 0.01  # of products found in a program and counted by the plan


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What the pieces of one kind take in a step, on one GPU.

    Attributes:
      piece: the one that was compiled.
      groups: how many groups of rows it stands for.
      costs: of its instructions, for all of these.
      planned: operations of products that the plan counts in the piece alone.
      found: and those that its program has.
      seconds: that compiling took.
    """

    piece: str
    groups: int
    costs: list[hlo.Cost]
    planned: float
    found: float
    seconds: float


def main(argv: list[str]) -> None:
    options, rest = _options(argv)
    if options is None:
        print(__doc__.strip())
        return
    hardware = topologies.parse(options.topology)
    if hardware.chip.platform != "gpu":
        raise UserError(
            f"--topology={options.topology}: kernels of GPUs alone are known, as h200:1"
        )
    config = config_lib.parse([argv[0], *rest], __doc__)
    config_lib.validate_values(config)
    topologies.use_no_accelerator()
    name = next((a.removeprefix("--config=") for a in rest if ".py" in a), "")
    steps = Steps(config.to_dict(), name, hardware, options)
    say = _quiet if options.json else _say
    say(f"{name} on {hardware.describe()}: chunk {steps.chunk}, remat {steps.remat}")
    predicted = [steps.predict(kind, say) for kind in steps.kinds()]
    summary = summarise(predicted, options.top)
    summary["pairs"] = steps.pairs
    print(json.dumps(summary, indent=1) if options.json else page(summary))


def rates(chip: topologies.Chip, mfu: float) -> hlo.Rates:
    """Returns what a kernel is expected to reach."""
    clocks = chip.target["cores"] * chip.target["clock"] * 1e9
    return hlo.Rates(
        products=mfu * chip.flops,
        single=mfu * 2 * chip.target["fpus"] * clocks,
        memory=_BANDWIDTH * chip.bandwidth,
        integers=_INTEGER_LANES * clocks,
        link=chip.link,
    )


def check_compiler(hardware: topologies.Topology, kernel: bool) -> None:
    """Refuses to go on without the compiler and, if asked, attention's kernel."""
    try:
        topologies.check_compiler(hardware, kernel=kernel)
    except UserError:
        raise UserError(
            f"the compiler for {hardware.chip.title} and cuDNN are not installed: "
            "pip install -e '.[plan-gpu]' (no such hardware is needed)"
        ) from None


class Steps:
    """Makes and compiles the pieces of a configuration's step."""

    def __init__(self, settings: dict[str, Any], name: str, hardware, options):
        import jax

        from unime_jax.planning import abstract, compiled, pieces, planner

        with compiled.quiet():
            jax.devices()  # it reports what is not there
        plan = planner._Planner(settings, name, hardware, options.mfu)
        check_compiler(hardware, plan._flash())
        self.options, self.hardware = options, hardware
        self.chunk, self.remat = plan.setting
        self.pairs = settings["train"]["batch_size"]
        self.devices = plan.mesh.shape["data"] * plan.mesh.shape["fsdp"]
        self.job = pieces.Job(
            settings,
            plan.backbone.config,
            plan.composition,
            hardware,
            tuple(plan.mesh.shape.values()),
            abstract.model(settings, plan.backbone.config, "xla").embedding_width,
            plan._flash(),
        )

    def kinds(self) -> list[list]:
        """Lists the pieces by kind, the one to compile first."""
        from unime_jax.planning import alike, pieces

        found = pieces.divide(self.job.composition, self.chunk, self.devices)
        if self.options.pieces:
            return [[piece] for piece in found]
        return alike.kinds(found, self.devices)

    def predict(self, kind: list, say: Callable[[str], None]) -> Predicted:
        """Compiles the first piece of a kind and scales what it takes to all of them."""
        first, *rest = kind
        started = time.perf_counter()
        run = self._run(first)
        work = _products(run)
        # Devices share the rows of a group, and every one computes the whole loss.
        planned = work / (math.prod(self.job.mesh) if first.group else 1)
        program = hlo.Program(self._compile(run, first))
        costs = program.costs(rates(self.hardware.chip, self.options.mfu))
        found = sum(cost.operations for cost in costs if cost.kind == hlo.PRODUCTS)
        seconds = time.perf_counter() - started
        factor = 1 + sum(_products(self._run(one)) / work for one in rest)
        say(f"  compiled {first.describe()} in {seconds:.0f} s; like it: {len(rest)}")
        if abs(found - planned) > _CLOSE * planned:
            say(
                f"  WARNING: its products have {found / 1e12:.4g} TFLOP, and the plan counts "
                f"{planned / 1e12:.4g}"
            )
        again = sum(cost.seconds for cost in costs if ".remat" in cost.name)
        if again:
            say(f"  WARNING: for lack of memory XLA computes again what takes {again:.3f} s of it")
        if program.unknown_loops:
            say(f"  WARNING: {program.unknown_loops} loops of unknown length are taken to run once")
        return Predicted(
            first.describe(),
            len(kind),
            [cost.scaled(factor) for cost in costs],
            planned,
            found,
            seconds,
        )

    def _run(self, piece):
        from unime_jax import sharding
        from unime_jax.planning import abstract, compiled, pieces

        with compiled.quiet():
            devices = topologies.compile_devices(self.hardware)
            mesh = sharding.make_mesh(*self.job.mesh, devices=devices)
            settings, made = pieces.alone(
                piece, self.job.settings, self.job.composition, self.job.width
            )
            if piece.group is None:
                return abstract.loss(settings, made, self.job.width, mesh=mesh)
            model = settings["model"]
            kernel = runtime.resolve_attention(model["attention"], model["dtype"], mesh)
            return abstract.run(settings, self.job.config, made, mesh=mesh, attention=kernel)

    def _compile(self, run, piece) -> str:
        """Returns the text of the optimised program."""
        import jax

        from unime_jax.planning import compiled

        kept = None
        try:
            with compiled.quiet():
                lowered = compiled._lower(run)
            if self.options.hlo:
                said = f"{lowered.as_text()}{self.hardware}{compiled._compilers()}"
                words = re.sub(r"\W+", "_", piece.describe()).strip("_")
                name = f"{words}_{hashlib.sha256(said.encode()).hexdigest()[:12]}.txt"
                kept = pathlib.Path(self.options.hlo) / name
                if kept.exists():
                    return kept.read_text()
            text = compiled._compile(lowered, "gpu").as_text()
        except jax.errors.JaxRuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{piece.describe()}: the compiler fails ({reason}); if memory lacks, give a "
                "smaller --config.train.chunk"
            ) from None
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(text)
        return text


def _products(run) -> float:
    """Counts the operations of a piece as the plan does, but for those of attention kernels."""
    from unime_jax.planning import flops

    jaxpr, _ = flops.trace(run.step, *run.arguments, whole=False)
    return flops.count_jaxpr(jaxpr).total


def summarise(predicted: list[Predicted], top: int) -> dict[str, Any]:
    """Adds instructions up by kind, and finds the costliest that are no products."""
    kinds: dict[str, list[float]] = collections.defaultdict(lambda: [0.0] * 3)
    for one in predicted:
        for cost in one.costs:
            for place, value in enumerate((cost.seconds, cost.bytes, cost.operations)):
                kinds[cost.kind][place] += value
    total = sum(seconds for seconds, _, _ in kinds.values())
    others = [
        (cost, one.piece) for one in predicted for cost in one.costs if cost.kind != hlo.PRODUCTS
    ]
    others.sort(key=lambda pair: -pair[0].seconds)
    return {
        "seconds": total,
        "products_seconds": kinds[hlo.PRODUCTS][0],
        "operations_seconds": sum(
            cost.busy for one in predicted for cost in one.costs if cost.kind == hlo.PRODUCTS
        ),
        "kinds": [
            {
                "kind": kind,
                "seconds": seconds,
                "share": seconds / total,
                "bytes": moved,
                "operations": operations,
            }
            for kind, (seconds, moved, operations) in sorted(
                kinds.items(), key=lambda item: -item[1][0]
            )
        ],
        "instructions": [{**dataclasses.asdict(cost), "piece": p} for cost, p in others[:top]],
        "pieces": [
            {
                "piece": one.piece,
                "groups": one.groups,
                "seconds": sum(cost.seconds for cost in one.costs),
                "planned": one.planned,
                "found": one.found,
                "compile_seconds": one.seconds,
            }
            for one in predicted
        ],
    }


def page(summary: dict[str, Any]) -> str:
    """Prints a summary for people."""
    total = summary["seconds"]
    unit, scale = ("seconds", 1.0) if total >= 1 else ("ms", 1e3)

    def length(seconds: float) -> str:
        return f"{scale * seconds:.3f}"

    rows = [["", unit, "share", "GB", "TFLOP"]]
    for one in summary["kinds"]:
        if one["share"] >= _SHOWN:
            work = f"{one['operations'] / 1e12:,.1f}" if one["operations"] else ""
            size = f"{one['bytes'] / 1e9:,.1f}"
            rows.append([one["kind"], length(one["seconds"]), _share(one["share"]), size, work])
    rows.append(["the step", length(total), "", "", ""])
    lines = ["\nWhere the time of a GPU goes in a step", _table(rows)]
    ratio = total / (summary["products_seconds"] or total)
    lines.append(
        f"  {summary['pairs'] / total:,.1f} pairs/s; the step is {ratio:.2f} times its products, "
        f"whose operations alone take {length(summary['operations_seconds'])} {unit}"
    )
    rows = [["", unit, "share", "times", "MB each", "shape", "of"]]
    for one in summary["instructions"]:
        rows.append(
            [
                f"{one['kind']}: {one['name']}",
                length(one["seconds"]),
                _share(one["seconds"] / total),
                f"{one['times']:,.0f}",
                f"{one['bytes'] / one['times'] / 1e6:,.1f}",
                _cut(one["shape"], 44),
                shorten(one["op_name"]),
            ]
        )
    if summary["instructions"]:
        lines += ["\nCostliest instructions that are no products", _table(rows, left=2)]
    return "\n".join(lines)


_MACHINERY = {"while", "body", "closed_call", "checkpoint", "cond", "branch_0_fun", "branch_1_fun"}


def shorten(op_name: str) -> str:
    """Leaves out of an op_name what JAX's transformations put into it."""
    name = re.sub(r"^jit\(\w*step\w*\)/", "", op_name)
    name = re.sub(r"\btranspose\(jvp\((\w*)\)\)", r"back/\1", name)
    name = re.sub(r"\bjvp\((\w*)\)", r"forth/\1", name)
    name = name.replace("rematted_computation", "again")
    parts = [part for part in name.split("/") if part and part not in _MACHINERY]
    return "/".join(part for n, part in enumerate(parts) if n == 0 or part != parts[n - 1])


def _share(share: float) -> str:
    return f"{100 * share:.1f} %"


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 3] + "..."


def _table(rows: list[list[str]], left: int = 0) -> str:
    """Lines columns up: the first and as many of the last to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        for place in (0, *range(len(row) - left, len(row))):
            cells[place] = row[place].ljust(widths[place])
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, flush=True)


def _quiet(text: str) -> None:
    if "WARNING" in text:
        print(text.strip(), file=sys.stderr)


def _options(argv: list[str]) -> tuple[argparse.Namespace | None, list[str]]:
    parser = arguments.Parser(
        prog="python tests/bench/predict.py", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--topology")
    parser.add_argument("--mfu", type=float, default=0.7)
    parser.add_argument("--top", type=int, default=15)
    parser.add_argument("--hlo")
    for flag in ("--pieces", "--json"):
        parser.add_argument(flag, action="store_true")
    if len(argv) < 2 or any(a in ("-h", "--help", "-help") for a in argv[1:]):
        return None, []
    options, rest = parser.parse_known_args(argv[1:])
    if options.topology is None:
        raise UserError("--topology is missing; give a GPU, as h200:1")
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu={options.mfu}: a share of the peak rate, above 0 and at most 1")
    if options.top < 0:
        raise UserError(f"--top={options.top}: a number of instructions, 0 or more")
    return options, rest


if __name__ == "__main__":
    runtime.run_entry(main)
