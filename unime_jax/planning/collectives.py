"""Lists what devices send each other in a compiled program, from its text.

A collective inside a loop counts as often as the loop runs. Bytes are those of the whole array that
a device ends up with or gives: the result of an all-gather, the operand of a reduce-scatter.
"""

import collections
import dataclasses
import math
import re

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s64": 64, "u64": 64, "f64": 64, "c64": 64}
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w*|c64)\[([\d,]*)\]")
_END = re.compile(r"^\}(, execution_thread=.*)?$")  # of a computation; kernels' own end as "}}, "
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
      hosts: that they are on, at most.
      loop: how often the outermost loop around them runs; 1 without a loop.
      calls: in one step.
      bytes: of all calls, on one device.
    """

    kind: str
    shape: str
    group: int
    hosts: int
    loop: int
    calls: int
    bytes: float

    @property
    def sent(self) -> float:
        """Bytes that a device sends, in a ring where all send to all."""
        if self.kind == "collective-permute":  # to one other device
            return self.bytes
        times = 2 if self.kind == "all-reduce" else 1
        return times * self.bytes * (self.group - 1) / self.group


def read(text: str, devices_of_host: int | None = None) -> tuple[list[Collective], bool]:
    """Lists the collectives of a program, the largest first.

    Args:
      text: of the compiled program.
      devices_of_host: of which every host has so many, in the program's order; None: all on one.

    Returns:
      The list, and whether the trip count of every loop around them is known.
    """
    computations, entry = _split(text)
    calls: collections.Counter = collections.Counter()
    known = True

    def visit(name: str, times: int, loop: int) -> None:
        nonlocal known
        for line in computations.get(name, ()):
            found = _OPERATION.match(line)
            if not found:
                continue
            result, operation, rest = found.groups()
            kind = operation.removesuffix("-start")
            if kind in KINDS and not operation.endswith("-done"):
                groups = _groups(rest)
                taking, hosts = max(map(len, groups)), _hosts(groups, devices_of_host)
                calls[kind, _result(result, operation), taking, hosts, loop] += times
                continue
            inner, outermost = times, loop
            if operation == "while":
                trips = _trips(line, computations)
                inside = _reaches(line, computations)
                known = known and (trips is not None or not inside)
                inner = times * (1 if trips is None else trips)
                outermost = loop if loop > 1 else trips or 1
            for called in _called(line):
                visit(called, inner, outermost)

    visit(entry, 1, 1)
    found = []
    for (kind, shape, group, hosts, loop), count in calls.items():
        size = _bytes(shape) * (group if kind == "reduce-scatter" else 1)
        found.append(Collective(kind, shape, group, hosts, loop, count, size * count))
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
        elif _END.match(line):
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


def _groups(rest: str) -> list[list[int]]:
    """Returns the devices that take part in a collective, group by group."""
    listed = re.search(r"replica_groups=\{(\{[\d,{}]+\})\}", rest)
    if listed:  # {{0,1},{2,3}}
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    counted = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if counted:  # [2,4]<=[4,2]T(1,0): 0 to 7 as an array of 4 x 2, transposed, then of 2 x 4
        devices = np.arange(int(counted[1]) * int(counted[2])).reshape(_numbers(counted[3]))
        devices = devices.transpose(_numbers(counted[4])) if counted[4] else devices
        return devices.reshape(int(counted[1]), int(counted[2])).tolist()
    named = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", rest)
    if named:
        return _named_groups(named[1], named[2])
    pairs = re.search(r"source_target_pairs=\{(.*?\})\}", rest)
    found = [_numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])] if pairs else []
    return found or [[0, 1]]


def _named_groups(mesh: str, taking: str) -> list[list[int]]:
    """Reads mesh['a'=2,'b'=8] {'a','b':(1)4}: of axis b those 4 that follow 1 of its outer part."""
    sizes = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)]
    parts = {
        name: (int(before or 1), int(size or dict(sizes)[name]))
        for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", taking)
    }
    shape, inside = [], []
    for name, size in sizes:
        before, part = parts.get(name, (size, 1))
        inside.append(len(shape) + 1)
        shape += [before, part, size // (before * part)]
    outside = [axis for axis in range(len(shape)) if axis not in inside]
    devices = np.arange(math.prod(shape)).reshape(shape).transpose(outside + inside)
    return devices.reshape(-1, math.prod(shape[axis] for axis in inside)).tolist()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _hosts(groups: list[list[int]], devices_of_host: int | None) -> int:
    if devices_of_host is None:
        return 1
    return max(len({device // devices_of_host for device in group}) for group in groups)


def _bytes(shape: str) -> float:
    total = 0.0
    for dtype, sizes in _ARRAY.findall(shape):
        bits = _BITS.get(dtype) or (8 if dtype.startswith("f8") else int(dtype.lstrip("subf")))
        total += bits / 8 * math.prod(int(size) for size in sizes.split(",") if size)
    return total
