"""Lists what devices send each other in a compiled program, from its text.

A collective inside a loop counts as often as the loop runs. Bytes are those of the whole array that
a device ends up with or gives: the result of an all-gather, the operand of a reduce-scatter.
"""

import collections
import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s64": 64, "u64": 64, "f64": 64, "c64": 64}
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w*|c64)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERATION = re.compile(r"^(?:ROOT )?%?[\w.-]+ = (.*?) ([\w-]+)\((.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over arrays of one shape.

    Attributes:
      kind: one of KINDS.
      shape: as the compiler writes it.
      group: devices that take part.
      calls: in one step.
      bytes: of all calls, on one device.
    """

    kind: str
    shape: str
    group: int
    calls: int
    bytes: float

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a ring."""
        times = 2 if self.kind == "all-reduce" else 1
        return times * self.bytes * (self.group - 1) / self.group


def read(text: str) -> tuple[list[Collective], bool]:
    """Lists the collectives of a program, the largest first.

    Returns:
      The list, and whether the trip count of every loop around them is known.
    """
    computations, entry = _split(text)
    calls: collections.Counter = collections.Counter()
    known = True

    def visit(name: str, times: int) -> None:
        nonlocal known
        for line in computations.get(name, ()):
            found = _OPERATION.match(line)
            if not found:
                continue
            result, operation, rest = found.groups()
            kind = operation.removesuffix("-start")
            if kind in KINDS and not operation.endswith("-done"):
                calls[kind, _result(result, operation), _group(rest)] += times
                continue
            inner = times
            if operation == "while":
                trips = _trips(line, computations)
                inside = _reaches(line, computations)
                known = known and (trips is not None or not inside)
                inner = times * (1 if trips is None else trips)
            for called in _called(line):
                visit(called, inner)

    visit(entry, 1)
    found = []
    for (kind, shape, group), count in calls.items():
        size = _bytes(shape) * (group if kind == "reduce-scatter" else 1)
        found.append(Collective(kind, shape, group, count, size * count))
    return sorted(found, key=lambda one: -one.bytes), known


def _split(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of every computation, and the name of the first one to run."""
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line.strip())
    return computations, entry


def _called(line: str) -> list[str]:
    names = []
    for found in _CALLED.findall(line):
        names += [name.strip().lstrip("%") for name in found.strip("{}").split(",")]
    return names


def _reaches(line: str, computations: dict[str, list[str]]) -> bool:
    """Says whether a collective is among what a line calls."""
    waiting, seen = _called(line), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for inner in computations.get(name, ()):
            if any(f" {kind}(" in inner or f" {kind}-start(" in inner for kind in KINDS):
                return True
            waiting += _called(inner)
    return False


def _trips(line: str, computations: dict[str, list[str]]) -> int | None:
    """Returns how often a loop runs: as the compiler notes it, or from its counter's limit."""
    noted = _TRIPS.search(line)
    if noted:
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.-]+)", line)
    inner = computations.get(condition[1], []) if condition else []
    limits = [int(n) for text in inner for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", text)]
    return limits[0] if len(limits) == 1 else None


def _result(result: str, operation: str) -> str:
    """Returns the arrays that a collective makes; `-start` lists its operands in front of them."""
    arrays = [found.group(0) for found in _ARRAY.finditer(result)]
    if operation in ("all-gather-start", "collective-permute-start"):
        arrays = [one for one in arrays if one != "u32[]"]  # of a permute's bookkeeping
        arrays = arrays[len(arrays) // 2 :]
    return " ".join(arrays)


def _group(rest: str) -> int:
    """Returns how many devices take part in a collective."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        return len(listed[1].split(","))
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
    if counted:
        return int(counted[1])
    named = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", rest)
    if named:  # mesh['a'=1,'b'=8] {'b'}; part of an axis is 'b':(1)4, the last number its size
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
    return max(2, pairs[1].count("{")) if pairs else 2


def _bytes(shape: str) -> float:
    total = 0.0
    for dtype, sizes in _ARRAY.findall(shape):
        bits = _BITS.get(dtype) or (8 if dtype.startswith("f8") else int(dtype.lstrip("subf")))
        total += bits / 8 * math.prod(int(size) for size in sizes.split(",") if size)
    return total
