"""Speed, memory and start-up of unime_jax beside PyTorch: `python tests/bench/run.py`.

    python tests/bench/run.py                              # all of it on CPU, some 17 minutes
    python tests/bench/run.py --only stage2_llava embed    # a part
    python tests/bench/run.py --quick                      # fewer rounds, to see that it runs
    python tests/bench/run.py --device gpu                 # full-size models on an H100 or H200,
                                                           # an hour; not yet run anywhere
    python tests/bench/run.py --device gpu --tiny          # the same code on tiny shapes, on CPU

On a GPU each of PyTorch's ways is tried alone; then both sides take turns in shares of the card by
what they held, or one acts after the other where it does not hold both. How to run it on a machine
that is lent by the minute, with minutes as they are expected, of an H100 (a command that is cut
short has printed the figures of the part it was in; weights, 24 GB, and programs stay in DIR, and
the next command finds them; results are those of one command, so give each its `--output`):

    run.py --device gpu --scratch DIR --quick --only gpu_llava_pairs               # 9, writes 15 GB
    run.py --device gpu --scratch DIR --repeats 1 --only gpu_phi                   # 6
    run.py --device gpu --scratch DIR --repeats 1 --only gpu_llava                 # 8, two steps
    run.py --device gpu --scratch DIR --quick --only gpu_llava_embed attention     # 5

`--quick` is without torch.compile, which takes PyTorch minutes at these shapes, each time it
starts; with it, gpu_llava_pairs and gpu_llava_stage1 take some 30 minutes each.

Both sides compute the same thing: same weights, rows, padding and dtype, and the losses and
gradient norms of their first steps agree to 1e-4, in bfloat16 (all that is timed on a GPU) to 2e-2.
Where they do not, or PyTorch's side fails, the row says FAILED and why, with ours alone. PyTorch's
side is transformers and peft with its fastest of eager and torch.compile (of a training step on a
GPU with gradient checkpointing and without). On CPU each side has two threads; each is a process of
its own, and they take turns. Written to --output: results.json (machine, versions, every sample),
results.md and results.png. Needs torch, transformers and peft (the extra `dev`).

The part on a GPU needs no installation, only these to import: jax with its CUDA plugin, flax,
optax, jaxtyping, ml_collections, numpy, Pillow, safetensors, matplotlib, torch, transformers, peft.
What of it is pure Python and missing (ml_collections, say) may be unpacked from its wheel into a
directory on PYTHONPATH.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import gpu_cases
import measure
import parts
import workers
from bench import Bench, Missing
from measure import Result
from training import training

TRAINING = ("stage2_llava", "stage2_smol", "stage1_smol")
MORE = ("stage2_llava_whole", "startup_stage1")  # only where they are named
OTHERS: dict[str, Callable[[Bench], list[Result]]] = {
    "embed": parts.embed,
    "pipeline": parts.pipeline,
    "load": parts.load,
    "save": parts.save,
    "startup": parts.startup,
    "attention": parts.attention,
    "startup_stage1": lambda bench: parts.startup(bench, stage1=True),
}
TINY = ("tiny", "tiny_stage1")
GPU = gpu_cases.NAMES


def names_of(args: argparse.Namespace) -> tuple[str, ...]:
    """Returns the tests that `--only` may name, in the order in which they run."""
    if args.device == "gpu":
        names = tuple(f"{name}_tiny" for name in GPU) if args.tiny else GPU
        return (*names, "attention")
    others = tuple(name for name in OTHERS if name not in ("attention", *MORE))
    more = tuple(name for name in MORE if name in (args.only or ()))
    return TINY + others if args.tiny else (*TRAINING, *others, *more)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="; ".join((*TRAINING, *OTHERS, *MORE[:1]))
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each test")
    parser.add_argument(
        "--compile-limit",
        type=float,
        metavar="SECONDS",
        help="until torch.compile's first step is done, else it is left out (CPU 400, GPU 600)",
    )
    parser.add_argument("--quick", action="store_true", help="one round, PyTorch without compile")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: does the bench run?")
    parser.add_argument(
        "--scratch", type=pathlib.Path, help="keeps models and compiled programs for the next run"
    )
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/bench"))
    args = parser.parse_args(argv)
    if args.quick:
        args.repeats = 1
    unknown = sorted(set(args.only or ()) - set(names_of(args)))
    if unknown or args.repeats < 1:
        parser.error(f"--only {' '.join(unknown)}: there are {', '.join(names_of(args))}")
    return args


def run_part(name: str, bench: Bench) -> tuple[list[Result], bool]:
    """Runs one part, and says whether all went well.

    One that fails becomes a row that says why, so that the others count.
    """
    start = time.perf_counter()
    print(f"{name} ...", flush=True)
    try:
        found = OTHERS[name](bench) if name in OTHERS else training(name, bench)
    except Missing as missing:
        print(f"  left out, needs {missing}")
        return [], True
    except (Exception, SystemExit) as error:
        print(f"  failed: {error}", flush=True)
        why = {measure.FAILED: f"{type(error).__name__}: {workers.last_line(error)}"}
        return [Result(name, f"{name}: FAILED", "-", {}, why)], False
    finally:
        bench.end_workers()
    print(measure.table(found), f"({time.perf_counter() - start:.0f} s)", flush=True)
    return found, not any(measure.FAILED in result.notes for result in found)


def write(output: pathlib.Path, results: list[Result], where: dict[str, Any]) -> None:
    """Writes results.json, results.md and, if there is something to draw, results.png."""
    measure.write_json(output / "results.json", where, results)
    text = f"{measure.table(results)}\n\n{measure.notes(results)}\n"
    (output / "results.md").write_text(text)
    (output / "results.png").unlink(missing_ok=True)  # of an earlier run
    measure.plot(output / "results.png", results, where)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    # Where it is not installed, for this process and its children.
    sys.path.insert(0, str(workers.ROOT))
    os.environ["PYTHONPATH"] = workers.environment()["PYTHONPATH"]
    results: list[Result] = []
    failed: list[str] = []
    where = measure.machine()
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unime_bench_") as fresh:
        bench = Bench(args, pathlib.Path(fresh), args.scratch and args.scratch.resolve())
        for name in names_of(args):
            if args.only and name not in args.only:
                continue
            found, fine = run_part(name, bench)
            results += found
            failed += [] if fine else [name]
            write(args.output, results, where)  # what follows may be cut short
    print(f"\n{measure.table(results)}\n\n{measure.notes(results)}\n")
    names = [path.name for path in sorted(args.output.glob("results.*"))]
    print(f"written to {args.output}: {', '.join(names)}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
