"""Training steps of both sides, in turns; first they show that they compute the same."""

import dataclasses
from typing import Any

import bench as shared
import measure
import numpy as np
import workers
from bench import Bench
from measure import Result
from workers import Worker, WorkerError

PARITY = 1e-4  # see _parity
HALF_PARITY = 2e-2  # the same in bfloat16
TRACED = 60.0  # seconds of the longest step that is traced: smaller ones have the same kernels
TOGETHER = (measure.SIDES,)
APART = tuple((side,) for side in measure.SIDES)


@dataclasses.dataclass
class Ways:
    """PyTorch's ways of taking a step, each in a process that was alone.

    Attributes:
      best: the fastest; "": none.
      tried: way -> what its process said, and `seconds` of a step.
      left_out: way -> why it did not run.
      failed: why nothing is compared, where something but memory is to blame; "": nothing is.
    """

    best: str = ""
    tried: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    failed: str = ""

    @property
    def notes(self) -> dict[str, Any]:
        found = {measure.FAILED: self.failed, measure.LEFT_OUT: self.left_out}
        return {key: value for key, value in found.items() if value}


@dataclasses.dataclass
class Timed:
    """The steps that count.

    Attributes:
      found: side -> what each step said.
      said: side -> what its process said else, its peak memory too.
      notes: what a traced step's time went to; how both sides shared the card.
    """

    found: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    said: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, float]:
        return {side: measure.median([x["seconds"] for x in found])
                for side, found in self.found.items()}  # fmt: skip


def training(name: str, bench: Bench) -> list[Result]:
    """Times a training step; both sides first show that they compute the same."""
    folder = bench.scratch / name
    bench.prepare(name, folder)
    settings = workers.read_json(folder / "case.json")
    case = settings["case"]
    bench.share = shared.ALONE
    ways = _ways(name, case, bench) if case["torch"] else Ways()
    if not ways.best:
        return _alone(name, case, ways, bench)
    worker = bench.side(name)
    first = worker.ready | worker.close()
    limit = PARITY if settings["model"]["dtype"] == "float32" else HALF_PARITY
    said = first["first"], ways.tried[ways.best]["first"]
    if not _parity(*said) <= limit:  # so that NaN does not pass
        ways.failed = f"the sides differ by {_parity(*said):.1e}, more than {limit:.0e}"
        print(f"  {ways.failed}: ours {said[0]}, PyTorch's {said[1]}"[:500], flush=True)
        return _alone(name, case, ways, bench)
    timed = _timed(name, first, ways, bench)
    notes = {
        "PyTorch's fastest": ways.best,
        **ways.notes,
        "seconds a step": timed.seconds,
        "first step differs by": _parity(*said),
        **_last(timed, bench),
        **_starts(first, timed.said, ways),
        **_notes(timed),
    }
    return _results(name, case, timed, notes)


def _alone(name: str, case: dict[str, Any], ways: Ways, bench: Bench) -> list[Result]:
    """Times a step that PyTorch's side does not have, or fails at, after the one that compiled."""
    timed = _steps(name, (("ours",),), "", bench, warm=0)
    said = timed.said["ours"]
    notes = {
        **ways.notes,
        "seconds a step": timed.seconds["ours"],
        f"first call{said['known']}, s": said["first_seconds"],
        **_notes(timed),
    }
    return _results(name, case, timed, notes)


def _results(name: str, case: dict[str, Any], timed: Timed, notes: dict[str, Any]) -> list[Result]:
    """Returns a row of the speed and one of the memory, of the sides that were timed."""
    speeds = {side: [case["rows"] / x["seconds"] for x in found]
              for side, found in timed.found.items()}  # fmt: skip
    memory = {side: [timed.said[side]["peak_gib"]] for side in timed.found}
    title = case["title"] + (": FAILED" if measure.FAILED in notes else "")
    return [
        Result(name, title, case["unit"], speeds, notes),
        Result(f"{name}_memory", "  its peak memory", "GiB", memory),
    ]


def _ways(name: str, case: dict[str, Any], bench: Bench) -> Ways:
    """Tries PyTorch's ways, one after the other: together they would not fit a card."""
    ways = Ways()
    for variant in bench.variants(case):
        limit = bench.compile_limit if variant.endswith("compile") else workers.LIMIT
        try:
            worker = bench.side(name, variant, limit=limit)
            seconds = worker.step()["seconds"]
            ways.tried[variant] = {**worker.ready, "seconds": seconds, **worker.close()}
        except WorkerError as error:
            ways.left_out[variant] = workers.why(error)
            print(f"  PyTorch, {variant}: left out: {workers.last_line(error)}", flush=True)
            continue
        print(f"  PyTorch, {variant}: {seconds:.3g} s a step", flush=True)
    if ways.tried:
        ways.best = min(ways.tried, key=lambda way: ways.tried[way]["seconds"])
    elif set(ways.left_out.values()) != {workers.OUT_OF_MEMORY}:
        ways.failed = "no way of PyTorch runs"
    return ways


def _timed(name: str, first: dict[str, Any], ways: Ways, bench: Bench) -> Timed:
    """Lets the sides take turns, or one act after the other where a card does not hold both."""
    if bench.torch_device == "cpu":
        try:
            return _steps(name, TOGETHER, ways.best, bench)
        except WorkerError as error:
            bench.end_workers()
            timed = _steps(name, (("ours",),), "", bench)
            timed.notes[measure.FAILED] = f"while both took turns: {workers.why(error)}"
            return timed
    best = ways.tried[ways.best]
    card, held = best["card_gib"], {"ours": first["peak_gib"], "torch": best["reserved_gib"]}
    share = shared.share(card, **held)
    note = {"card, GiB": card, "held alone": held}
    if share is not None:
        bench.share = share
        try:
            timed = _steps(name, TOGETHER, ways.best, bench)
            timed.notes["memory of the card"] = {**note, "ours may take": share * card}
            return timed
        except WorkerError as error:
            print(f"  not both on the card: {workers.last_line(error)}", flush=True)
            bench.end_workers()
    bench.share = shared.ALONE
    timed = _steps(name, APART, ways.best, bench)
    timed.notes["memory of the card"] = {**note, "turns": "none: ours first, alone, then PyTorch"}
    return timed


def _steps(name: str, turns, best: str, bench: Bench, warm: int = 1) -> Timed:
    """Lets sides act; where ours has acted already, it is not lost for what fails then.

    Args:
      turns: sides that take turns, and then other sides.
      best: PyTorch's way.
      warm: steps of each side that do not count.
    """
    timed = Timed()
    for sides in turns:
        try:
            _act(name, sides, best, bench, warm, timed)
        except WorkerError as error:
            if "ours" not in timed.said:
                raise
            timed.notes[measure.FAILED] = f"PyTorch, {best}: {workers.why(error)}"
            bench.end_workers()
    return timed


def _act(name: str, sides, best: str, bench: Bench, warm: int, timed: Timed) -> None:
    """Lets sides take turns; each figure is printed as it comes, for a run may be cut short."""
    pair = {}
    for side in sides:
        pair[side] = bench.side(name, best if side == "torch" else "")
        said = pair[side].ready | pair[side].memory()
        print(
            f"  {side}: first call {said['first_seconds']:.3g} s{said['known']}, "
            f"peak {said['peak_gib']:.3g} GiB",
            flush=True,
        )
    found = workers.take_turns(
        pair,
        bench.repeats,
        warm=warm,
        tell=lambda side, x: print(f"  {side}: {x['seconds']:.3g} s a step", flush=True),
    )
    for side in reversed(sides):  # what is traced comes last and has the card for itself
        timed.said[side], timed.found[side] = pair[side].ready | pair[side].memory(), found[side]
        if bench.device == "gpu" and side == "ours":
            timed.notes |= _traced(pair[side], found[side])
        pair[side].kill()


def _traced(worker: Worker, found) -> dict[str, Any]:
    """Says what a step's time goes to, on a GPU; a profiler's faults lose no figures."""
    if found[-1]["seconds"] > TRACED:
        return {"not traced": f"a step takes more than {TRACED:.0f} s"}
    try:
        return {key: shares for key, shares in worker.trace().items() if shares}  # none on CPU
    except WorkerError as error:
        return {"not traced": workers.why(error)}


def _starts(first: dict[str, Any], said: dict[str, Any], ways: Ways) -> dict[str, Any]:
    """Says what first steps took, of every side and way."""
    found = {way + one["known"]: one for way, one in ways.tried.items()}
    if "torch" in said:
        found[ways.best + said["torch"]["known"]] = said["torch"]
    found = {f"ours{one['known']}": one for one in (first, said["ours"])} | found
    names = {
        "first call, s": "first_seconds",
        "peak GiB": "peak_gib",
        "peak until the first step's end, GiB, with the compiler's processes": "start_gib",
    }
    return {
        text: {way: one[key] for way, one in found.items() if one[key] is not None}
        for text, key in names.items()
    }


def _last(timed: Timed, bench: Bench) -> dict[str, float]:
    """Says how far apart the sides are after the steps that both took."""
    if not all(side in timed.found for side in measure.SIDES):
        return {}
    last = (timed.found[side][-1] for side in measure.SIDES)
    return {f"step {bench.repeats + 2} by": _parity(*last)}


def _notes(timed: Timed) -> dict[str, Any]:
    """Says what was planned, and what share of the device's peak rate a step of ours reached."""
    said, seconds = timed.said["ours"], timed.seconds["ours"]
    kept = {"planned_gib": "planned peak, GiB", "not reported": "not reported"}
    notes = {text: said[key] for key, text in kept.items() if key in said}
    at_once = {side: said["at_once"] for side, said in timed.said.items() if "at_once" in said}
    if "at_once" in said:  # ours chooses, where rows are embedded
        notes["rows at a time, by positions"] = at_once
    if "operations" in said:
        notes["PFLOP a step"] = {kind: one / 1e15 for kind, one in said["operations"].items()}
    if said.get("peak_rate"):
        notes["MFU"] = {
            kind: one / seconds / said["peak_rate"] for kind, one in said["operations"].items()
        }
    return notes | timed.notes


def _parity(ours: dict[str, Any], torch: dict[str, Any]) -> float:
    """Largest relative difference of loss and gradient norm, or the vectors' cosine distance."""
    if "rows" in torch:
        a, b = np.array(ours["rows"]), np.array(torch["rows"])
        return float(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    names = ("loss", "gradient_norm")
    return float(np.max([abs(ours[name] / torch[name] - 1) for name in names]))  # NaN stays
