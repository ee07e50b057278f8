"""What the instructions of a compiled GPU program cost, read from its HLO text."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

PRODUCTS, ATTENTION, INTEGERS = "products", "attention", "random numbers, integers"
ELEMENTWISE, REDUCTIONS, COPIES = "elementwise", "reductions", "copies and layout"
SLICES, RESIDUALS, PADDING = "slices of stacked weights", "saving residuals", "padding"
GATHERS, COLLECTIVES, OTHER = "gathers and scatters", "collectives", "other kernels"

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "add-dependency", "domain",
}  # fmt: skip
_INTEGER = {
    "add", "subtract", "multiply", "divide", "remainder", "and", "or", "xor", "not", "negate",
    "shift-left", "shift-right-logical", "shift-right-arithmetic", "minimum", "maximum", "popcnt",
}  # fmt: skip
_MOVES = _FREE | {"copy", "transpose", "reshape", "slice", "concatenate", "broadcast", "iota"}
_BY_OP = {
    "dynamic-slice": SLICES, "dynamic-update-slice": RESIDUALS, "pad": PADDING,
    "reduce": REDUCTIONS, "reduce-window": REDUCTIONS, "gather": GATHERS, "scatter": GATHERS,
    "rng-bit-generator": INTEGERS, "dot": PRODUCTS, "convolution": PRODUCTS,
    "sort": OTHER, "custom-call": OTHER,
    **dict.fromkeys(("copy", "copy-start", "transpose", "reshape", "slice"), COPIES),
    **dict.fromkeys(("concatenate", "broadcast", "iota"), COPIES),
}  # fmt: skip
_UPDATES = ("dynamic-update-slice", "scatter")
_COLLECTIVE = re.compile(r"(all-|reduce-scatter|collective-|ragged-|send|recv)")
_GEMM = re.compile(r"cublas|gemm|matmul|conv(Forward|Backward|Bias)", re.IGNORECASE)
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a GPU does in a second.

    Attributes:
      products: FLOP/s of bf16 products that are expected of it; attention's too.
      single: of f32 products that may not be rounded to TF32.
      memory: bytes.
      integers: operations on 32-bit integers.
      link: bytes sent to another GPU.
    """

    products: float
    single: float
    memory: float
    integers: float
    link: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """An instruction of a program and all that it takes in a step, however often it runs.

    Attributes:
      name, shape, op_name: as the text has them.
      kind: one of the names above.
      times: how often it runs.
      seconds: the longest of its operations, bytes and integer operations.
      busy: the seconds of its operations alone.
      operations: of products and attention.
      bytes: read from memory and written to it; sent, of a collective.
      integers: operations on integers.
    """

    name: str
    kind: str
    shape: str
    op_name: str
    times: float
    seconds: float
    busy: float
    operations: float
    bytes: float
    integers: float

    def scaled(self, factor: float) -> "Cost":
        """Returns the cost of what takes so many times as much."""
        names = ("times", "seconds", "busy", "operations", "bytes", "integers")
        return dataclasses.replace(self, **{name: factor * getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    number: int  # of a parameter
    root: bool

    def called(self, key: str) -> str | None:
        """Returns the computation that an attribute names."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found and found[1]

    @property
    def target(self) -> str:
        """Is what a custom call calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Returns dtype and sides of the arrays of a shape, of several if it is a tuple."""
    return [
        (dtype, tuple(int(side) for side in sides.split(",") if side))
        for dtype, sides in _ARRAY.findall(shape)
    ]


def nbytes(shape: str) -> float:
    """Counts the bytes of a shape; 4-bit numbers are packed."""
    return sum(map(_bytes, arrays(shape)))


def _bytes(array: tuple[str, tuple[int, ...]]) -> float:
    dtype, sides = array
    bits = re.search(r"\d+", dtype)
    return math.prod(sides) * (int(bits[0]) / 8 if bits else float(dtype == "pred"))


def _elements(shape: str) -> int:
    return sum(math.prod(sides) for _, sides in arrays(shape))


class Program:
    """Is a scheduled HLO module of one device."""

    def __init__(self, text: str):
        self.computations, self.entry = _parse(text)
        self.unknown_loops = 0  # whose bodies are taken once

    def costs(self, rates: Rates) -> list[Cost]:
        """Returns what every instruction costs that is run."""
        self.unknown_loops = 0
        return list(self._walk(self.entry, 1.0, rates))

    def _walk(self, name: str, times: float, rates: Rates) -> Iterator[Cost]:
        computation = self.computations[name]
        for one in computation.values():
            if one.op == "while":
                count = re.search(r'"known_trip_count":\{"n":"(\d+)"', one.attributes)
                self.unknown_loops += count is None
                turns = int(count[1]) if count else 1
                yield from self._walk(one.called("body"), times * turns, rates)
            elif one.op in ("call", "async-start"):
                inner = one.called("to_apply") or one.called("calls")
                yield from self._walk(inner, times, rates)
            elif one.op == "conditional":
                yield from self._dearest(one, times, rates)
            elif one.op not in _FREE and not one.op.endswith(("-done", "-update")):
                yield self._cost(one, computation, times, rates)

    def _dearest(self, one: Instruction, times: float, rates: Rates) -> list[Cost]:
        names = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
        found = re.findall(r"[\w.\-]+", names[1]) if names else []
        found = found or [one.called("true_computation"), one.called("false_computation")]
        branches = [list(self._walk(name, times, rates)) for name in found]
        return max(branches, key=lambda branch: sum(cost.seconds for cost in branch))

    def _cost(self, one: Instruction, around: Computation, times: float, rates: Rates) -> Cost:
        operations, busy = self._operations(one, around, rates)
        integers = self._integers(one)
        moved = self._bytes(one, around)
        collective = _COLLECTIVE.match(one.op) is not None
        travel = moved / (rates.link if collective else rates.memory)
        count = integers / rates.integers
        if collective:
            kind = COLLECTIVES
        elif operations:
            kind = ATTENTION if "fmha" in one.target else PRODUCTS
        elif count > travel:
            kind = INTEGERS
        else:
            kind = self._kind(one)
        shape, seconds = re.sub(r"\{[^{}]*\}", "", one.shape), max(busy, travel, count)
        numbers = 1.0, seconds, busy, operations, moved, integers
        return Cost(one.name, kind, shape, self._op_name(one), *numbers).scaled(times)

    # ---- operations

    def _operations(self, one: Instruction, around: Computation, rates: Rates):
        """Counts the operations of products and attention, and the seconds that they take."""
        if one.op == "fusion":
            inside = self.computations[one.called("calls")]
            parts = [self._operations(each, inside, rates) for each in inside.values()]
            return sum(part[0] for part in parts), sum(part[1] for part in parts)
        if "fmha" in one.target:
            operations = _attention(one, around)
        elif one.op == "convolution" or "$conv" in one.target:
            operations = _convolution(one, around)
        elif one.op == "dot" or _GEMM.search(one.target):
            operations = _product(one, around)
        else:
            return 0.0, 0.0
        rate = rates.products
        if arrays(around[one.operands[0]].shape)[0][0] == "f32" and "fmha" not in one.target:
            exact = re.search(r"operand_precision=\{[^}]*highest|HIGHEST", one.attributes)
            rate = rates.single if exact else rates.products / 2
        return operations, operations / rate

    def _integers(self, one: Instruction) -> float:
        """Counts operations on integers, which have a pipe of their own."""
        if one.op == "fusion":
            inside = self.computations[one.called("calls")].values()
            return sum(self._integers(each) for each in inside)
        if one.op == "rng-bit-generator":
            return 80.0 * _elements(one.shape)  # threefry
        whole = re.match(r"[su]\d", one.shape) is not None
        return float(_elements(one.shape)) if whole and one.op in _INTEGER else 0.0

    # ---- bytes

    def _bytes(self, one: Instruction, around: Computation) -> float:
        """Counts bytes read and written; of what is sliced or updated in place, the part."""
        sizes = [nbytes(around[name].shape) for name in one.operands if name in around]
        if one.op == "fusion":
            return self._fusion_bytes(one, around)
        if one.op in ("dynamic-slice", "slice", "gather"):
            return 2 * nbytes(one.shape)
        if one.op == "dynamic-update-slice":
            return 2 * sizes[1]
        if one.op == "scatter":
            return 3 * sizes[-1]
        if _COLLECTIVE.match(one.op):
            return max(*map(_bytes, arrays(one.shape)), *sizes)
        if one.op == "copy-start":
            return 2 * sizes[0]
        return nbytes(one.shape) + sum(sizes)

    def _fusion_bytes(self, one: Instruction, around: Computation) -> float:
        inside = self.computations[one.called("calls")]
        total = nbytes(one.shape)
        parameters = {each.number: each for each in inside.values() if each.op == "parameter"}
        for number, name in enumerate(one.operands):
            if number in parameters and name in around:
                parameter = parameters[number]
                total += _share(parameter, inside) * nbytes(parameter.shape)
        for each in inside.values():
            if each.op in _UPDATES and _in_place(each, inside):
                total += nbytes(inside[each.operands[-1 if each.op == "scatter" else 1]].shape)
                total -= nbytes(each.shape)
        return max(total, 0.0)

    # ---- kinds

    def _kind(self, one: Instruction) -> str:
        if one.op != "fusion":
            return _BY_OP.get(one.op, ELEMENTWISE)
        inside = self.computations[one.called("calls")]
        ops = {each.op for each in inside.values() if arrays(each.shape) and _big(each)}
        roots = {each.op for each in _roots(inside)}
        if "scatter" in ops or "gather" in roots:
            return GATHERS
        if "dynamic-update-slice" in roots:
            return RESIDUALS
        if ops & {"reduce", "reduce-window"}:
            return REDUCTIONS
        if "custom-call" in ops:
            return OTHER
        for op, kind in (("pad", PADDING), ("dynamic-slice", SLICES)):
            if op in ops and ops <= _MOVES | {"pad", "dynamic-slice"}:
                return kind
        return COPIES if ops <= _MOVES else ELEMENTWISE

    def _op_name(self, one: Instruction) -> str:
        """Returns where in the program it is from; a fusion without a name has its contents'."""
        found = re.search(r'op_name="([^"]*)"', one.attributes)
        if found or one.op != "fusion":
            return found[1] if found else ""
        inside = self.computations[one.called("calls")]
        return next(filter(None, map(self._op_name, reversed(inside.values()))), "")


def _attention(one: Instruction, around: Computation) -> float:
    """Two products of pairs of positions; causal ones are half, and the way back is 2.5 times."""
    text = re.search(
        r'"intermediate_tensor_shape":\s*\{[^\[]*"dimensions":\s*\[([^\]]*)\]', one.attributes
    )
    pairs = math.prod(int(side) for side in re.findall(r"\d+", text[1]))
    operations = 4.0 * pairs * arrays(around[one.operands[0]].shape)[0][1][-1]
    if "CAUSAL" in one.attributes:
        operations /= 2
    return 2.5 * operations if "Backward" in one.target else operations


def _product(one: Instruction, around: Computation) -> float:
    sides = arrays(around[one.operands[0]].shape)[0][1]
    found = re.search(r'lhs_contracting_dim\w+"?[=:]\s*[\[{]([^\]}]*)[\]}]', one.attributes)
    inner = math.prod(sides[int(axis)] for axis in re.findall(r"\d+", found[1]))
    return 2.0 * inner * math.prod(arrays(one.shape)[0][1])


def _convolution(one: Instruction, around: Computation) -> float:
    labels = re.search(r"dim_labels=\w+_(\w+)->(\w+)", one.attributes)
    kernel = arrays(around[one.operands[1]].shape)[0][1]
    inner = math.prod(kernel) / kernel[labels[1].index("o")]
    return 2.0 * inner * math.prod(arrays(one.shape)[0][1])


def _share(one: Instruction, inside: Computation) -> float:
    """Returns the share of an array that a fusion needs, at most: all, but for slices of it."""
    if one in _roots(inside):
        return 1.0
    share = 0.0
    for user in inside.values():
        if one.name not in user.operands:
            continue
        if user.op in ("dynamic-slice", "slice", "gather"):
            part = _elements(user.shape) / _elements(one.shape)
            share += part * _share(user, inside) if one.name == user.operands[0] else 1.0
        elif user.op in _UPDATES and user.operands[0] == one.name and _in_place(user, inside):
            continue
        elif _elements(user.shape) == _elements(one.shape) and user.op != "dot":
            share += _share(user, inside)
        else:
            return 1.0
        if share >= 1:
            return 1.0
    return share


def _source(name: str, inside: Computation) -> str:
    while inside[name].op == "bitcast":
        name = inside[name].operands[0]
    return name


def _in_place(one: Instruction, inside: Computation) -> bool:
    """Says whether an update is written into a parameter, and is what the fusion returns."""
    from_outside = inside[_source(one.operands[0], inside)].op == "parameter"
    return from_outside and one.name in {each.name for each in _roots(inside)}


def _roots(inside: Computation) -> list[Instruction]:
    root = next(each for each in inside.values() if each.root)
    names = root.operands if root.op == "tuple" else (root.name,)
    return [inside[_source(name, inside)] for name in names]


def _big(one: Instruction) -> bool:
    return _elements(one.shape) > 1


# ---- text


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            head = re.match(r"(ENTRY )?%?([\w.\-]+) (\(.*\) -> .*)?\{\s*$", line)
            if head:
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", line):
            current[found[2]] = _instruction(found[2], found[3], bool(found[1]))
    return computations, entry


def _instruction(name: str, text: str, root: bool) -> Instruction:
    end = _closing(text) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    op, rest = rest.split("(", 1)
    end = _closing("(" + rest) - 1
    inner, attributes = rest[: end - 1], rest[end:]
    number = int(inner) if op == "parameter" else -1
    operands = tuple(_operands(inner)) if op not in ("parameter", "constant") else ()
    return Instruction(name, shape, op, operands, attributes, number, root)


@functools.cache
def _operands(inner: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", inner)


def _closing(text: str) -> int:
    """Returns the place behind the bracket that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place + 1
    raise ValueError(f"no closing bracket: {text[:80]}")
