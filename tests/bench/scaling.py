"""How the cost of a stage-2 step grows: `python tests/bench/scaling.py [--output DIR] [--quick]`.

Seconds on two CPU threads against rows, text length and tiles, beside the operations that
`planning.flops` counts in the same program, scaled to the last point; bytes that devices send each
other against their number (8 virtual CPU devices, from the compiled program); and what `plan`
estimates for pods. One plot each, all numbers in scaling.json.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import cases
import measure
import numpy as np
import workers

SHALLOW = cases.llava(256, 768, 2, (4, 2), (128, 4, 2), 112, 4096)
WAYS = {
    "rows": ("pairs of a batch, chunks of 4", (8, 16, 32, 64)),
    "tokens": ("positions of a row of text, 8 pairs", (32, 128, 512, 1024)),
    "tiles": ("tiles of an image, 8 pairs", (2, 3, 5, 10)),
}
CANVASES = {2: (1, 1), 3: (1, 2), 5: (2, 2), 10: (3, 3)}  # the whole image is a tile besides
DEVICES = (1, 2, 4, 8)
# Chips of a pod: copies of the model, each over at most 64 (scales of 4-bit weights: 64 rows).
PODS = {"v5e:4x4": 1, "v5e:4x8": 1, "v5e:8x8": 1, "v5e:8x16": 2, "v5e:16x16": 4}


def batch(rows: int = 8, tokens: int = 32, tiles: int = 3) -> cases.Case:
    """A case: queries of an image and a text, targets of a text."""
    config = dict(SHALLOW)
    config["image_grid_pinpoints"] = [[112 * side for side in CANVASES[tiles]]]
    mixture = cases.Mixture(((rows, 24, True),), ((rows, tokens, False),))
    return cases.Case("", "contrast", config, mixture, 112, {"train.chunk": 4})


def point(way: str, value: int, repeats: int) -> dict[str, float]:
    """Seconds and operations of one step."""
    import jax
    import jax_side
    from flax import nnx

    from unime_jax import embedder, models, optim, steps
    from unime_jax.planning import flops
    from unime_jax.types import flatten

    case = batch(**{way: value})
    settings = cases.resolved(case, pathlib.Path())
    graphdef, abstract = models.abstract(case.config, matmul="merged")
    noise = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: 0.02 * noise.standard_normal(x.shape, np.float32), abstract)
    model = nnx.merge(graphdef, drawn)
    embedder.attach_adapters(model, settings["train"]["adapters"], seed=0)
    graphdef, state = nnx.split(model)
    flat = flatten(nnx.to_pure_dict(state))
    trainable, frozen = optim.split_by_settings(flat, settings["train"])
    optimizer, step = steps.from_settings(settings, graphdef, steps=1000)
    rows = jax_side.as_batch(cases.draw_rows(case, np.random.default_rng(0)))
    state = steps.create_state(trainable, optimizer)
    jaxpr, _ = flops.trace(step, state, frozen, rows, whole=False)
    counted = flops.count_jaxpr(jaxpr).total
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        state, _ = step(state, frozen, rows)
        jax.block_until_ready(state)
        times.append(time.perf_counter() - start)
    return {"seconds": measure.median(times[1:]), "best": min(times[1:]), "flops": counted}


def devices(count: int) -> dict[str, float]:
    """Bytes that a device sends in a step, by kind, and operations, with `count` devices."""
    import jax
    import jax_side
    from flax import nnx

    from unime_jax import embedder, models, optim, sharding, steps
    from unime_jax.planning import collectives
    from unime_jax.types import flatten

    mesh = sharding.make_mesh(fsdp=count, devices=jax.devices()[:count])
    case = batch(rows=64)
    settings = cases.resolved(case, pathlib.Path())
    settings["train"]["chunk"] = 0
    graphdef, abstract = models.abstract(case.config)
    model = nnx.merge(graphdef, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract))
    embedder.attach_adapters(model, settings["train"]["adapters"], seed=0)
    graphdef, state = nnx.split(model)
    place = sharding.sharding_of(mesh)
    flat = flatten(nnx.to_pure_dict(state))
    flat = {path: jax.device_put(x, place(path, x.shape)) for path, x in flat.items()}
    trainable, frozen = optim.split_by_settings(flat, settings["train"])
    optimizer, step = steps.from_settings(settings, graphdef, steps=1000, mesh=mesh)
    rows = jax_side.as_batch(cases.draw_rows(case, np.random.default_rng(0)))
    state = steps.create_state(trainable, optimizer, mesh=mesh)
    program = step.lower(state, frozen, steps.place_batch(rows, mesh)).compile()
    found, _ = collectives.read(program.as_text())
    kinds: dict[str, float] = {}
    for one in found:
        kinds[one.kind] = kinds.get(one.kind, 0.0) + one.sent
    weights = sum(x.nbytes for path, x in frozen.items() if "/layers/" in path)
    return {"sent": kinds, "weights": weights, "embeddings": 2 * 64 * 256 * 4}


def pods(config: str) -> list[dict[str, float]]:
    """What `plan` estimates for slices of more and more chips."""
    found = []
    for name, copies in PODS.items():
        command = [sys.executable, "-m", "unime_jax.plan", "--config", config, "--topology", name]
        command.append(f"--config.mesh.data={copies}")
        done = subprocess.run(
            [*command, "--json"], capture_output=True, text=True, env=workers.environment(),
            cwd=workers.ROOT,
        )  # fmt: skip
        if done.returncode:
            print(f"  plan, {name}: {done.stderr.strip()[-200:]}")
            continue
        plan = json.loads(done.stdout)
        found.append(
            {
                "chips": plan["topology"]["chips"],
                "seconds": plan["estimate"]["seconds"],
                "peak": plan["estimate"]["peak"],
                "fits": plan["estimate"]["fits"],
            }
        )
    return found


def slope(x, y) -> float:
    """Of a straight line through the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def draw(output: pathlib.Path, found: dict) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    def axes(title, xlabel, ylabel):
        figure, ax = pyplot.subplots(figsize=(6, 4.2), layout="constrained")
        ax.set(xscale="log", yscale="log", title=title, xlabel=xlabel, ylabel=ylabel)
        ax.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        ax.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        for set_formatter in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
            set_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:.3g}"))
        ax.spines[["top", "right"]].set_visible(False)
        return figure, ax

    def finish(figure, ax, name, values):
        ax.set_xticks(values, [str(value) for value in values])
        ax.legend(frameon=False, fontsize=9)
        figure.savefig(output / f"scaling_{name}.png", dpi=130)
        pyplot.close(figure)

    for way, (label, _) in WAYS.items():
        points = found[way]
        x = [int(value) for value in points]
        seconds = [one["seconds"] for one in points.values()]
        counted = np.array([one["flops"] for one in points.values()])
        figure, ax = axes(f"Stage-2 step against {way}", label, "seconds a step")
        expected = counted * seconds[-1] / counted[-1]
        ax.plot(x, expected, "--", color="grey",
                label=f"operations of the program (slope {slope(x, expected):.2f})")  # fmt: skip
        ax.plot(
            x, seconds, "o-", color="#2a6f97", label=f"measured (slope {slope(x, seconds):.2f})"
        )
        finish(figure, ax, way, x)
    points = found["devices"]
    x = [int(value) for value in points]
    kinds = sorted({kind for one in points.values() for kind in one["sent"]})
    title = "Bytes that a device sends in a step, fsdp"
    figure, ax = axes(title, "devices", "MiB")
    for kind in kinds:
        y = [one["sent"].get(kind, np.nan) / 2**20 for one in points.values()]
        ax.plot(x, y, "o-", label=kind)
    most = max(points.values(), key=lambda one: sum(one["sent"].values()))
    share = np.where(np.array(x) > 1, 1 - 1 / np.array(x), np.nan)
    expected = 2 * most["weights"] * share / 2**20
    label = "expected of all-gather: layers' weights,\nthere and back, (n - 1) / n"
    ax.plot(x, expected, "--", color="grey", label=label)
    finish(figure, ax, "devices", x)
    if found.get("pods"):
        figure, ax = axes("LLaVA-1.6, stage 2, 1024 pairs on TPU v5e (plan)", "chips", "s a step")
        x = [one["chips"] for one in found["pods"]]
        y = [one["seconds"] for one in found["pods"]]
        ax.plot(x, y[0] * x[0] / np.array(x), "--", color="grey", label="slope -1")
        ax.plot(x, y, "o-", color="#2a6f97", label=f"estimated (slope {slope(x, y):.2f})")
        finish(figure, ax, "pods", x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/bench"))
    parser.add_argument("--quick", action="store_true", help="two points a plot, no pods")
    parser.add_argument(
        "--repeats", type=int, default=5, help="steps of each point, the best counts"
    )
    parser.add_argument("--points", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.points:
        way, *values = args.points
        for value in map(int, values):
            one = devices(value) if way == "devices" else point(way, value, args.repeats)
            print(json.dumps(one), flush=True)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    ways = {way: values for way, (_, values) in WAYS.items()} | {"devices": DEVICES}
    found: dict = {"machine": measure.machine()}
    for way, values in ways.items():
        chosen = (values[0], values[-1]) if args.quick else values
        found[way] = _in_process(way, chosen)
    if not args.quick:
        found["pods"] = pods("configs/llava16_stage2.py")
        print(f"pods: {found['pods']}")
    (args.output / "scaling.json").write_text(json.dumps(found, indent=1))
    draw(args.output, found)
    print(f"written: {args.output}/scaling.json and scaling_*.png")


def _in_process(way: str, values) -> dict:
    env = {"JAX_PLATFORMS": "cpu"}
    if way == "devices":
        env["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
        )
    command = [sys.executable, __file__, "--points", way, *map(str, values)]
    done = subprocess.run(command, capture_output=True, text=True, env=workers.environment(env))
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = dict(zip(values, map(json.loads, lines), strict=True))
    for value, one in found.items():
        print(f"{way} {value}: {one}", flush=True)
    return found


if __name__ == "__main__":
    main()
