"""What one device computes, reads and receives in a run of a compiled program.

FLOPs are two per multiply-add of matrix products and convolutions (the TPU compiler writes most products as
convolutions; positions of padding and dilation do not count), plus what a Pallas kernel declares of itself.

Collectives count the bytes that a device receives, n being the size of its group:

    all-gather          result * (n - 1) / n          reduce-scatter   operand * (n - 1) / n
    all-reduce          2 * operand * (n - 1) / n     all-to-all       operand * (n - 1) / n
    collective-permute  operand, times the share of devices that receive

The TPU compiler renames and splits them, so these rules look at operands and groups: an asynchronous pair counts at
its start; a collective spread over several fusions (custom calls AsyncCollectiveStart and -Done, one channel) counts
in the fusion that starts it; an all-reduce fused with the slice that is kept of it is a reduce-scatter. What the
compiler does the long way counts the long way: a gather done as the all-reduce of a buffer that is zero but for the
own part, or an all-reduce that is sliced by a later instruction.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Sequence

import numpy as np

from mathscale_jax.hlo import Array, Computation, Executed, Instruction, Program

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program; `received_bytes` are those of one execution."""

    kind: str
    axes: str  # of the mesh, joined by "+"
    largest: Array  # the whole array it gathers or reduces
    received_bytes: float
    times: int
    op_name: str

    @property
    def total_bytes(self) -> float:
        """Received in a run of the program."""
        return self.received_bytes * self.times


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one run on one device. `opaque_kernels` names custom calls whose FLOPs nobody declares."""

    flops: float
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    unknown_loops: tuple[str, ...]
    opaque_kernels: tuple[str, ...]

    @property
    def collective_bytes(self) -> float:
        """Received over the interconnect."""
        return sum(c.total_bytes for c in self.collectives)

    def bytes_by(self, attribute: str) -> dict[str, float]:
        """Received bytes by "kind" or "axes", the largest first."""
        totals: dict[str, float] = {}
        for collective in self.collectives:
            key = getattr(collective, attribute)
            totals[key] = totals.get(key, 0) + collective.total_bytes
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    @property
    def largest_collective(self) -> Collective | None:
        """The one with the largest single operand."""
        return max(self.collectives, key=lambda c: c.largest.num_bytes, default=None)


def cost_of(program: Program, mesh_shape: dict[str, int]) -> Cost:
    """The cost of a program compiled for a mesh of these axis sizes, devices in the mesh's own order."""
    executed = list(program.executed())
    started = {
        _channel(e.instruction)
        for e in executed
        if _base_kind(e.instruction) and _starts_async(e.instruction, e.computation)
    }
    flops, hbm_bytes, collectives, opaque = 0.0, 0.0, [], []
    for e in executed:
        match e.instruction.opcode:
            case "dot":
                flops += e.times * dot_flops(e.instruction, e.computation)
            case "convolution":
                flops += e.times * convolution_flops(e.instruction, e.computation)
            case "custom-call" if e.instruction.attribute("custom_call_target") == '"tpu_custom_call"':
                declared = _declared_flops(e.instruction)
                flops += e.times * (declared or 0)
                if declared is None:
                    opaque.append(e.instruction.op_name or e.instruction.name)
        if not e.fused:
            hbm_bytes += e.times * _hbm_bytes(e, program)
        kind = _base_kind(e.instruction)
        split = _channel(e.instruction) in started and not _starts_async(e.instruction, e.computation)
        if kind and not split:
            kind = "reduce-scatter" if kind == "all-reduce" and e.fused and _is_sliced(e) else kind
            collectives.append(_collective(kind, e, mesh_shape))
    return Cost(flops, hbm_bytes, tuple(collectives), tuple(program.unknown_loops()), tuple(opaque))


# ---- FLOPs ----------------------------------------------------------------------------------------------------


def dot_flops(dot: Instruction, computation: Computation) -> float:
    """2 * elements of the result * length of the contraction."""
    lhs = computation.instructions[dot.operands[0]].arrays[0]
    contracted = np.prod([lhs.dims[d] for d in dot.numbers("lhs_contracting_dims")], dtype=float)
    return 2.0 * dot.arrays[0].size * float(contracted)


def convolution_flops(convolution: Instruction, computation: Computation) -> float:
    """2 * multiply-adds of real elements.

    Batch dimensions of a product appear as spatial ones whose padding or dilation leaves few valid positions.
    """
    lhs, rhs = (computation.instructions[name].arrays[0] for name in convolution.operands[:2])
    lhs_labels, rhs_labels, out_labels = re.split(r"_|->", str(convolution.attribute("dim_labels")))
    out = convolution.arrays[0]
    valid = 1.0
    for i, label in enumerate(sorted(c for c in lhs_labels if c.isdigit())):
        valid *= _valid_positions(
            lhs.dims[lhs_labels.index(label)],
            rhs.dims[rhs_labels.index(label)],
            out.dims[out_labels.index(label)],
            {key: values[i] for key, values in _window(convolution).items()},
        )
    batch, features = out.dims[out_labels.index("b")], out.dims[out_labels.index("f")]
    return 2.0 * valid * batch * features * rhs.dims[rhs_labels.index("i")]


def _window(convolution: Instruction) -> dict[str, list[str]]:
    found = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    pairs = (item.split("=") for item in found.group(1).split()) if found else ()
    return {key: value.split("x") for key, value in pairs}


def _valid_positions(lhs: int, kernel: int, out: int, window: dict[str, str]) -> int:
    """Pairs of output and kernel position of one spatial dimension that meet an element, not padding or a hole."""
    stride, lhs_dilate, rhs_dilate = (int(window.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    padding = int(window.get("pad", "0_0").split("_")[0])
    at = np.arange(out)[:, None] * stride + np.arange(kernel)[None, :] * rhs_dilate - padding
    return int(np.sum((at >= 0) & (at < (lhs - 1) * lhs_dilate + 1) & (at % lhs_dilate == 0)))


def _declared_flops(kernel: Instruction) -> float | None:
    found = re.search(r'"cost_estimate":\s*(\{[^}]*\})', kernel.attributes)
    return float(json.loads(found.group(1)).get("flops", 0)) if found else None


# ---- collectives ----------------------------------------------------------------------------------------------


def _base_kind(instruction: Instruction) -> str | None:
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def _channel(instruction: Instruction) -> str | None:
    return instruction.attribute("channel_id")


def _starts_async(instruction: Instruction, computation: Computation) -> bool:
    return any('"AsyncCollectiveStart"' in user.attributes for user in computation.users[instruction.name])


def _is_sliced(executed: Executed) -> bool:
    """Whether nothing but slices of the result is used."""
    users = executed.computation.users[executed.instruction.name]
    while len(users) == 1 and users[0].opcode in ("bitcast", "convert", "reshape"):
        users = executed.computation.users[users[0].name]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _collective(kind: str, executed: Executed, mesh_shape: dict[str, int]) -> Collective:
    instruction = executed.instruction
    operands = [a for name in instruction.operands for a in executed.computation.instructions[name].arrays]
    size = sum(a.num_bytes for a in operands)
    groups = device_groups(instruction, int(np.prod(list(mesh_shape.values()))))
    n = len(groups[0])
    largest = max(operands, key=lambda a: a.num_bytes)
    match kind:
        case "all-gather":
            received = float(size * (n - 1))
            largest = max(instruction.arrays, key=lambda a: a.num_bytes)
        case "all-reduce":
            received = 2 * size * (n - 1) / n
        case "collective-permute":
            received = size * len(groups) / np.prod(list(mesh_shape.values()))
        case _:
            received = size * (n - 1) / n
    return Collective(kind, _axes(groups, mesh_shape), largest, float(received), executed.times, instruction.op_name)


def device_groups(instruction: Instruction, num_devices: int) -> list[list[int]]:
    """The groups of a collective (of a permute, its source-target pairs) as positions in the mesh.

    Written as {{0,1},{2,3}}, as an iota `[groups,size]<=[dims]T(permutation)`, as named axes
    `mesh['a'=4,'b'=2] {'a'}`, or not at all, which means all devices. Raises ValueError at other notations.
    """
    text = instruction.attributes
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}\s]*\})\}", text)
    if listed:
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,\s]+)\}", listed.group(1))]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        return _iota(iota.group(2), iota.group(3)).reshape(_integers(iota.group(1))).tolist()
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", text
    )
    if named:
        mesh, dims, permutation, axes = named.groups()
        return _groups_of_axes(mesh, None if dims is None else _iota(dims, permutation), axes)
    if "replica_groups=" in text and "replica_groups={}" not in text:
        raise ValueError(f"device groups in an unknown notation: {text[:200]}")
    return [list(range(num_devices))]


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    ids = np.arange(np.prod(_integers(dims))).reshape(_integers(dims))
    return ids.transpose(_integers(permutation)) if permutation else ids


def _groups_of_axes(mesh: str, device_ids: np.ndarray | None, axes: str) -> list[list[int]]:
    dims: list[int] = []
    chosen: list[int] = []
    parts = {name: (int(before), int(size)) for name, before, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", axes)}
    whole = set(re.findall(r"'([^']+)'(?!:)", axes))
    for name, size in ((name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)):
        if name in parts:  # 'a':(2)4 is the part of size 4 of axis a, inside its first part of size 2
            before, part = parts[name]
            chosen.append(len(dims) + 1)
            dims += [before, part, size // before // part]
        else:
            chosen += [len(dims)] if name in whole else []
            dims.append(size)
    ids = np.arange(np.prod(dims)) if device_ids is None else device_ids
    ids = np.moveaxis(ids.reshape(dims), chosen, range(len(dims) - len(chosen), len(dims)))
    return ids.reshape(-1, int(np.prod([dims[i] for i in chosen]))).tolist()


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _axes(groups: Sequence[Sequence[int]], mesh_shape: dict[str, int]) -> str:
    """The mesh axes along which the members of a group differ."""
    sizes = list(mesh_shape.values())
    differs = np.zeros(len(sizes), bool)
    for group in groups:
        coordinates = np.array(np.unravel_index(np.array(group), sizes))
        differs |= (coordinates != coordinates[:, :1]).any(axis=1)
    return "+".join(itertools.compress(mesh_shape, differs)) or "none"


# ---- memory traffic -------------------------------------------------------------------------------------------

# These move nothing: they name buffers, end what was counted at its start, or run computations counted by themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "opt-barrier", "partition-id", "replica-id", "call-start", "async-start", "async-update", "domain",
}  # fmt: skip
_FREE_TARGETS = ('"ConcatBitcast"', '"AllocateBuffer"', '"AssumeGatherIndicesInBound"')


def _hbm_bytes(executed: Executed, program: Program) -> float:
    """Bytes that an instruction reads from and writes to HBM; buffers that live in VMEM do not count."""
    instruction, computation = executed.instruction, executed.computation
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
        return 0
    if any(target in instruction.attributes for target in _FREE_TARGETS):
        return 0
    if instruction.opcode == "fusion":
        return _fusion_bytes(instruction, computation, program)
    operands = [computation.instructions[name].arrays for name in instruction.operands]
    return sum(_moved(instruction, operands))


def _moved(instruction: Instruction, operands: Sequence[Sequence[Array]]) -> Iterator[float]:
    result = instruction.arrays
    match instruction.opcode:
        case "copy-start":  # (destination, source, context)
            yield from (a.num_bytes for a in result[:2] if a.in_hbm)
        case "slice-start":  # (source, destination, context): what is read is as large as what is written
            yield from (result[1].num_bytes for a in result[:2] if a.in_hbm)
        case "collective-permute-start" | "all-gather-start" | "all-reduce-start":
            yield from (a.num_bytes for arrays in operands for a in arrays if a.in_hbm)
            yield from (a.num_bytes for a in result[len(operands) :] if a.in_hbm and a.dims)
        case "dynamic-slice" | "slice" | "gather":
            yield from (result[0].num_bytes for a in (operands[0][0], result[0]) if a.in_hbm)
        case "dynamic-update-slice":  # in place
            yield from (operands[1][0].num_bytes for a in (operands[1][0], result[0]) if a.in_hbm)
        case _:
            yield from (a.num_bytes for arrays in (*operands, result) for a in arrays if a.in_hbm)


def _fusion_bytes(fusion: Instruction, computation: Computation, program: Program) -> float:
    fused, total = program.computations[fusion.called[0]], 0.0
    for number, parameter in fused.parameters.items():
        for array in computation.instructions[fusion.operands[number]].arrays[:1]:
            if array.in_hbm:
                total += min(array.num_bytes, sum(_bytes_used(parameter, fused, program)))
    roots = [fused.instructions[name] for name in fused.root.operands] if fused.root.opcode == "tuple" else [fused.root]
    for root, array in zip(roots, fusion.arrays, strict=False):
        while root.opcode == "bitcast":
            root = fused.instructions[root.operands[0]]
        if root.opcode == "dynamic-update-slice":
            array = dataclasses.replace(fused.instructions[root.operands[1]].arrays[0], in_hbm=array.in_hbm)
        if array.in_hbm and root.opcode != "parameter" and _base_kind(root) is None:
            total += array.num_bytes
    return total


def _bytes_used(value: Instruction, fused: Computation, program: Program) -> Iterator[float]:
    """What the users of a fusion's parameter read of it: slices only, or all of it."""
    for user in fused.users[value.name]:
        if user.opcode == "bitcast":
            yield from _bytes_used(user, fused, program)
        elif user.opcode == "fusion":  # one fusion inside another
            inner = program.computations[user.called[0]]
            for number, operand in enumerate(user.operands):
                if operand == value.name:
                    yield from _bytes_used(inner.parameters[number], inner, program)
        elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == value.name:
            yield user.arrays[0].num_bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            yield 0  # in place
        elif user.opcode not in ("tuple", "custom-call") and not _base_kind(user):  # passed on, or counted there
            yield value.arrays[0].num_bytes
