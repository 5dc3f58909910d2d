"""The text of a compiled XLA program as computations of instructions, and how often each one runs.

XLA's own cost analysis counts the body of a loop once, and its Python objects show neither shapes nor attributes, so
the text of `compiled.as_text()` is read here. It holds the program of one device after partitioning:

    %body (param: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
      %param = (s32[], f32[8,128]{1,0}) parameter(0)
      ...
      ROOT %tuple = (s32[], f32[8,128]{1,0}) tuple(%next, %sum)
    }
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128, "bf16": 16, "tf32": 32}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_BEGINS = re.compile(r"\s+(ROOT )?%?[\w.\-]+ = |(ENTRY )?%?[\w.\-]+ \(")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|body|to_apply|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """Type, dimensions and place of one array; `in_hbm` is False where the layout names another memory space."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        """Bytes without the padding of tiles."""
        bits = _BITS.get(self.dtype) or int(re.sub(r"\D", " ", self.dtype).split()[0]) if self.dtype != "token" else 0
        return self.size * bits // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. `arrays` are those of its result, a tuple's flattened."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def op_name(self) -> str:
        """Where in the traced Python program it comes from, as XLA's metadata says."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    def attribute(self, name: str) -> str | None:
        """The value of an attribute without braces in it, such as direction=LT."""
        found = re.search(rf"\b{name}=([^\s,{{}}]+)", self.attributes)
        return found.group(1) if found else None

    def numbers(self, name: str) -> tuple[int, ...]:
        """The value of an attribute such as dimensions={0,2}; empty where it is missing."""
        found = re.search(rf"\b{name}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in found.group(1).split(",") if n) if found else ()

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations it calls, those of branches excluded."""
        return tuple(_CALLED.findall(self.attributes))

    @property
    def branches(self) -> tuple[str, ...]:
        """Computations of which a conditional runs one."""
        names: list[str] = []
        for several, one in _BRANCHES.findall(self.attributes):
            names += _NAME.findall(several) if several else [one]
        return tuple(names)


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(i for i in reversed(self.instructions.values()) if i.is_root)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each instruction."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                found[operand].append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Its parameters by number."""
        return {int(i.arguments): i for i in self.instructions.values() if i.opcode == "parameter"}


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction of the program and how often a run of the program executes it.

    `fused` is True for what runs inside a fusion, where operands and results need not reach memory.
    """

    instruction: Instruction
    computation: Computation
    times: int
    fused: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program for one device."""

    computations: dict[str, Computation]
    entry: str

    def executed(self) -> Iterator[Executed]:
        """Every instruction with its count: loop bodies times their trips, a loop of unknown length once.

        Of a conditional every branch counts once, which is an upper bound. Computations that a reduction applies to
        single elements are left out.
        """
        yield from self._walk(self.entry, 1, False)

    def _walk(self, name: str, times: int, fused: bool) -> Iterator[Executed]:
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            yield Executed(instruction, computation, times, fused)
            match instruction.opcode:
                case "while":
                    body = instruction.attribute("body")
                    assert body is not None
                    trips = self.trip_count(instruction, computation)
                    yield from self._walk(body.lstrip("%"), times * (1 if trips is None else trips), fused)
                case "fusion":
                    for called in instruction.called:
                        yield from self._walk(called, times, True)
                case "call" | "call-start" | "async-start":  # their -update and -done name the same computation again
                    for called in instruction.called:
                        yield from self._walk(called, times, fused)
                case "conditional":
                    for called in instruction.branches:
                        yield from self._walk(called, times, fused)

    def unknown_loops(self) -> list[str]:
        """Names of the loops that count once because their length is not in the program."""
        return [
            e.instruction.op_name or e.instruction.name
            for e in self.executed()
            if e.instruction.opcode == "while" and self.trip_count(e.instruction, e.computation) is None
        ]

    def trip_count(self, loop: Instruction, computation: Computation) -> int | None:
        """How often a while loop runs; None where it depends on data.

        The compilers for CPU and GPU write known_trip_count beside the loop. The one for TPU does not, and there the
        count follows from the loop itself: `i < bound` in the condition, `i + step` in the body, i's first value
        among the operands, all constants.
        """
        known = re.search(r'known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)', loop.attributes)
        if known:
            return int(known.group(1))
        condition = self.computations[str(loop.attribute("condition")).lstrip("%")]
        body = self.computations[str(loop.attribute("body")).lstrip("%")]
        compare = self._through_fusion(condition.root, condition)
        if compare is None or compare.opcode != "compare" or compare.attribute("direction") not in ("LT", "GT"):
            return None
        sides = compare.operands if compare.attribute("direction") == "LT" else compare.operands[::-1]
        index = self._tuple_index(condition, sides[0])
        bound = self._constant(condition, sides[1])
        if index is None or bound is None or body.root.opcode != "tuple":
            return None
        first = self._element(computation, loop.operands[0], index)
        step = self._step(body, index)
        if first is None or not step:
            return None
        return max(0, -((first - bound) // step))

    def _through_fusion(self, instruction: Instruction, computation: Computation) -> Instruction | None:
        """A condition's comparison, with a fusion around it replaced by what it computes from the outer operands."""
        if instruction.opcode != "fusion":
            return instruction
        inner = self.computations[instruction.called[0]]
        outer = {p.name: instruction.operands[number] for number, p in inner.parameters.items()}
        operands: list[str] = []
        for name in inner.root.operands:
            if name not in outer:
                if inner.instructions[name].opcode != "constant":
                    return None
                computation.instructions.setdefault(name, inner.instructions[name])
            operands.append(outer.get(name, name))
        return dataclasses.replace(inner.root, operands=tuple(operands))

    def _tuple_index(self, computation: Computation, name: str) -> int | None:
        """Which element of the computation's parameter `name` is."""
        instruction = self._source(computation, name)
        if instruction.opcode != "get-tuple-element":
            return None
        if computation.instructions[instruction.operands[0]].opcode != "parameter":
            return None
        return int(str(instruction.attribute("index")))

    def _step(self, body: Computation, index: int) -> int | None:
        add = self._source(body, body.root.operands[index])
        if add.opcode == "fusion":
            unfused = self._through_fusion(add, body)
            if unfused is None:
                return None
            add = unfused
        if add.opcode != "add":
            return None
        for i, operand in enumerate(add.operands):
            if self._tuple_index(body, operand) == index:
                return self._constant(body, add.operands[1 - i])
        return None

    def _element(self, computation: Computation, name: str, index: int) -> int | None:
        instruction = self._source(computation, name)
        return self._constant(computation, instruction.operands[index]) if instruction.opcode == "tuple" else None

    def _constant(self, computation: Computation, name: str) -> int | None:
        """The value of an integer constant."""
        instruction = self._source(computation, name)
        if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.arguments):
            return int(instruction.arguments)
        return None

    def _source(self, computation: Computation, name: str) -> Instruction:
        """`name` behind copies and bitcasts, and behind the tuples of optimization barriers."""
        instruction = computation.instructions[name]
        while instruction.opcode in ("copy", "bitcast", "convert", "copy-done", "copy-start", "opt-barrier"):
            instruction = computation.instructions[instruction.operands[0]]
        if instruction.opcode == "get-tuple-element":
            source = computation.instructions[instruction.operands[0]]
            if source.opcode in ("tuple", "opt-barrier"):
                whole = self._source(computation, source.name)
                if whole.opcode == "tuple":
                    return self._source(computation, whole.operands[int(str(instruction.attribute("index")))])
        return instruction


def parse(text: str) -> Program:
    """Reads what `compiled.as_text()` gives. Raises ValueError where it is no program with an ENTRY."""
    computations: dict[str, Computation] = {}
    entry = ""
    current: dict[str, Instruction] | None = None
    for line in _whole_lines(text):
        header = _HEADER.match(line)
        if header:
            current = {}
            computations[header.group(2)] = Computation(header.group(2), current)
            entry = header.group(2) if header.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            instruction = _parse_instruction(line)
            if instruction is not None:
                current[instruction.name] = instruction
    if not entry:
        raise ValueError("no ENTRY computation in this text: is it the HLO of a compiled program?")
    return Program(computations, entry)


def _whole_lines(text: str) -> Iterator[str]:
    """The lines of a program, with those joined that a kernel's attributes, which hold line ends, break in parts."""
    whole = ""
    for line in text.split("\n"):
        begins = not line or (line.startswith("}") and not line.startswith("}}")) or _BEGINS.match(line)
        if begins:
            yield whole
            whole = line
        else:
            whole += " " + line
    yield whole


def _parse_instruction(line: str) -> Instruction | None:
    start = _INSTRUCTION.match(line)
    if start is None:
        return None
    rest = re.sub(r"/\*[^*]*\*/", "", line[start.end() :])
    shape_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:shape_end], rest[shape_end:].lstrip()
    opcode, _, _ = rest.partition("(")
    arguments_end = _closing(rest, len(opcode))
    arguments = rest[len(opcode) + 1 : arguments_end]
    operands = () if opcode in ("constant", "parameter") else tuple(_NAME.findall(arguments))
    return Instruction(
        name=start.group(2),
        opcode=opcode,
        arrays=parse_shape(shape),
        operands=operands,
        arguments=arguments,
        attributes=rest[arguments_end + 1 :],
        is_root=start.group(1) is not None,
    )


def parse_shape(text: str) -> tuple[Array, ...]:
    """The arrays of a shape such as `(bf16[2,4]{1,0:T(8,128)S(1)}, s32[])`, in order."""
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(text):
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        space = re.search(r"S\((\d+)\)", layout)
        arrays.append(Array(dtype, sizes, in_hbm=space is None or space.group(1) == "0"))
    return tuple(arrays)


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis at `opening` closes."""
    depth = 0
    for i in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses: {text[:80]!r}")
