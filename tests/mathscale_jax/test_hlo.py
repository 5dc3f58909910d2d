"""Counts in compiled programs equal those worked out by hand: loops, products, collectives, memory traffic."""

import pytest

from mathscale_jax import hlo, hlo_cost

MESH = {"data": 2, "fsdp": 4, "tensor": 1}


def program(body: str, more: str = "") -> hlo.Program:
    return hlo.parse(f"""HloModule test, is_scheduled=true

{more}
ENTRY %main (x: f32[16]) -> f32[16] {{
  %x = f32[16]{{0}} parameter(0)
{body}
  ROOT %done = f32[16]{{0}} copy(%x)
}}
""")


def loop(first: int, bound: int, step: int, direction: str = "LT", attributes: str = "") -> hlo.Program:
    """A loop around an all-gather of f32[4] over the four devices of fsdp: 48 bytes received a turn."""
    sides = "%i, %bound" if direction == "LT" else "%bound, %i"
    return program(
        f"""  %first = s32[] constant({first})
  %start = (s32[], f32[4]{{0}}) tuple(%first, %part)
  %part = f32[4]{{0}} slice(%x), slice={{[0:4]}}
  %loop = (s32[], f32[4]{{0}}) while(%start), condition=%condition, body=%body{attributes}""",
        more=f"""%condition (state: (s32[], f32[4])) -> pred[] {{
  %state = (s32[], f32[4]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %bound = s32[] constant({bound})
  ROOT %more = pred[] compare({sides}), direction={direction}
}}

%body (state: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %state = (s32[], f32[4]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %part = f32[4]{{0}} get-tuple-element(%state), index=1
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  %whole = f32[16]{{0}} all-gather(%part), replica_groups=[2,4]<=[8], dimensions={{0}}
  ROOT %result = (s32[], f32[4]{{0}}) tuple(%next, %part)
}}
""",
    )


@pytest.mark.parametrize(
    ("arguments", "turns"),
    [
        ({"first": 0, "bound": 7, "step": 1}, 7),
        ({"first": 1, "bound": 7, "step": 2}, 3),
        ({"first": 0, "bound": 7, "step": 2}, 4),  # 0, 2, 4, 6
        ({"first": 9, "bound": 7, "step": 1}, 0),
        ({"first": 0, "bound": 5, "step": 1, "direction": "GT"}, 5),  # written bound > i
        ({"first": 0, "bound": 0, "step": 0, "attributes": ', backend_config={"known_trip_count":{"n":"11"}}'}, 11),
    ],
    ids=str,
)
def test_a_loop_counts_its_turns(arguments: dict, turns: int) -> None:
    cost = hlo_cost.cost_of(loop(**arguments), MESH)
    assert cost.collective_bytes == turns * 48
    assert cost.unknown_loops == ()


def test_a_loop_whose_length_depends_on_data_counts_once_and_is_named() -> None:
    cost = hlo_cost.cost_of(loop(0, 7, 1, direction="NE"), MESH)
    assert cost.collective_bytes == 48
    assert cost.unknown_loops == ("loop",)


# Of f32[16] (64 bytes), or f32[4] to be gathered to it, in groups of the four devices of fsdp.
@pytest.mark.parametrize(
    ("line", "received", "kind"),
    [
        ("%c = f32[16]{0} all-gather(%part), replica_groups=[2,4]<=[8], dimensions={0}", 48, "all-gather"),
        ("%c = f32[4]{0} reduce-scatter(%x), replica_groups=[2,4]<=[8], to_apply=%add", 48, "reduce-scatter"),
        ("%c = f32[16]{0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add", 96, "all-reduce"),
        ("%c = f32[16]{0} all-to-all(%x), replica_groups=[2,4]<=[8], dimensions={0}", 48, "all-to-all"),
        (
            "%c = f32[16]{0} collective-permute(%x), source_target_pairs="
            "{{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}",
            64,
            "collective-permute",
        ),
        ("%c = f32[16]{0} collective-permute(%x), source_target_pairs={{0,1},{4,5}}", 16, "collective-permute"),
        (
            "%s = (f32[4]{0}, f32[16]{0}) all-gather-start(%part), replica_groups=[2,4]<=[8], dimensions={0}\n"
            "  %c = f32[16]{0} all-gather-done(%s)",
            48,
            "all-gather",
        ),
        (
            "%s = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs="
            "{{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}\n  %c = f32[16]{0} collective-permute-done(%s)",
            64,
            "collective-permute",
        ),
    ],
)
def test_received_bytes(line: str, received: float, kind: str) -> None:
    cost = hlo_cost.cost_of(program(f"  %part = f32[4]{{0}} slice(%x), slice={{[0:4]}}\n  {line}"), MESH)
    assert cost.bytes_by("kind") == {kind: received}
    assert cost.bytes_by("axes") == {"fsdp": received}
    assert cost.largest_collective is not None
    assert str(cost.largest_collective.largest) == "f32[16]"


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),  # the major half of the axis
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("{}", [[0, 1, 2, 3]]),
    ],
)
def test_device_groups_in_every_notation(written: str, groups: list[list[int]]) -> None:
    line = f"  %c = f32[16]{{0}} all-reduce(%x), channel_id=1, replica_groups={written}, use_global_device_ids=true"
    instruction = program(line).computations["main"].instructions["c"]
    assert sorted(sorted(group) for group in hlo_cost.device_groups(instruction, 4)) == groups


def test_device_groups_in_a_new_notation_are_refused_rather_than_miscounted() -> None:
    instruction = program("  %c = f32[16]{0} all-reduce(%x), replica_groups=<4>").computations["main"].instructions["c"]
    with pytest.raises(ValueError, match="unknown notation"):
        hlo_cost.device_groups(instruction, 4)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", "data"),
        ("{{0,1,2,3,4,5,6,7}}", "data+fsdp"),
        ("{{0,1},{2,3},{4,5},{6,7}}", "fsdp"),
    ],
)
def test_groups_are_named_by_the_mesh_axes_they_span(groups: str, axes: str) -> None:
    cost = hlo_cost.cost_of(program(f"  %c = f32[16]{{0}} all-reduce(%x), replica_groups={groups}"), MESH)
    assert list(cost.bytes_by("axes")) == [axes]


def test_an_all_reduce_fused_with_the_slice_that_is_kept_is_a_reduce_scatter() -> None:
    fused = """%all-reduce-scatter (p: f32[16], i: s32[]) -> f32[4] {
  %p = f32[16]{0} parameter(0)
  %i = s32[] parameter(1)
  %sum = f32[16]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %own = f32[4]{0} dynamic-slice(%sum, %i), dynamic_slice_sizes={4}
}
"""
    call = "  %i = s32[] constant(0)\n  %f = f32[4]{0} fusion(%x, %i), kind=kCustom, calls=%all-reduce-scatter"
    assert hlo_cost.cost_of(program(call, fused), MESH).bytes_by("kind") == {"reduce-scatter": 48}
    apart = """  %i = s32[] constant(0)
  %sum = f32[16]{0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
  %own = f32[4]{0} dynamic-slice(%sum, %i), dynamic_slice_sizes={4}"""
    assert hlo_cost.cost_of(program(apart), MESH).bytes_by("kind") == {"all-reduce": 96}


def test_a_collective_spread_over_fusions_counts_where_it_starts() -> None:
    def fusion(name: str, last: str) -> str:
        return f"""%{name} (p: f32[4]) -> f32[16] {{
  %p = f32[4]{{0}} parameter(0)
  %part = f32[16]{{0}} all-gather(%p), channel_id=3, replica_groups=[2,4]<=[8], dimensions={{0}}
  ROOT %r = f32[16]{{0}} {last}
}}
"""

    computations = [
        fusion("begins", 'custom-call(%part), custom_call_target="AsyncCollectiveStart"'),
        fusion("goes_on", "copy(%part)"),
        fusion("ends", 'custom-call(%part), custom_call_target="AsyncCollectiveDone"'),
    ]
    body = "  %part = f32[4]{0} slice(%x), slice={[0:4]}\n" + "\n".join(
        f"  %f{i} = f32[16]{{0}} fusion(%part), kind=kLoop, calls=%{name}"
        for i, name in enumerate(("begins", "goes_on", "ends"))
    )
    assert hlo_cost.cost_of(program(body, "\n".join(computations)), MESH).collective_bytes == 48


def test_a_collective_on_another_core_counts_once() -> None:
    offloaded = """%offloaded (p: f32[4]) -> f32[16] {
  %p = f32[4]{0} parameter(0)
  ROOT %whole = f32[16]{0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}
}
"""
    body = """  %part = f32[4]{0} slice(%x), slice={[0:4]}
  %start = ((f32[4]{0}), f32[16]{0}) call-start(%part), async_execution_thread="sparsecore", to_apply=%offloaded
  %whole = f32[16]{0} call-done(%start)"""
    assert hlo_cost.cost_of(program(body, offloaded), MESH).collective_bytes == 48


def test_every_branch_of_a_conditional_counts() -> None:
    branches = "".join(
        f"%{name} (p: f32[16]) -> f32[16] {{\n  %p = f32[16]{{0}} parameter(0)\n"
        "  ROOT %s = f32[16]{0} all-reduce(%p), replica_groups=[2,4]<=[8]\n}\n"
        for name in ("left", "right")
    )
    body = (
        "  %which = pred[] constant(true)\n  %c = f32[16]{0} conditional(%which, %x, %x), "
        "true_computation=%left, false_computation=%right"
    )
    assert hlo_cost.cost_of(program(body, branches), MESH).collective_bytes == 2 * 96


# ---- FLOPs: products [6, 5] x [5, 7], 2 * 6 * 5 * 7 = 420 each ----


@pytest.mark.parametrize(
    ("lhs", "rhs", "line", "flops"),
    [
        ("f32[6,5]", "f32[5,7]", "f32[6,7] dot(%l, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 420),
        (
            "f32[3,6,5]",
            "f32[3,5,7]",
            "f32[3,6,7] dot(%l, %r), lhs_batch_dims={0}, rhs_batch_dims={0}, lhs_contracting_dims={2}, "
            "rhs_contracting_dims={1}",
            1260,
        ),
        ("f32[6,5]", "f32[5,7]", "f32[6,7] convolution(%l, %r), dim_labels=bf_io->bf", 420),
        # The batch as a spatial dimension, dilated so that output i meets element i of both sides only.
        (
            "f32[3,6,5]",
            "f32[3,5,7]",
            "f32[3,6,7] convolution(%l, %r), window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf",
            1260,
        ),
        # Two output heads of a projection, as a reversed kernel over a padded dimension of one element.
        (
            "f32[6,1,5]",
            "f32[2,5,7]",
            "f32[6,2,7] convolution(%l, %r), window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=b0f_0io->b0f",
            840,
        ),
    ],
)
def test_flops_of_products(lhs: str, rhs: str, line: str, flops: float) -> None:
    body = f"  %l = {lhs}{{}} broadcast(%x)\n  %r = {rhs}{{}} broadcast(%x)\n  %p = {line}"
    assert hlo_cost.cost_of(program(body), MESH).flops == flops


def test_kernels_count_what_they_declare_and_are_named_where_they_declare_nothing() -> None:
    body = (
        '  %k = f32[16]{0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/splash"}, '
        'backend_config={"custom_call_config": {"cost_estimate": {"flops": "1234", "bytes_accessed": 5}}}\n'
        '  %q = f32[16]{0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/other"}'
    )
    cost = hlo_cost.cost_of(program(body), MESH)
    assert (cost.flops, cost.opaque_kernels) == (1234, ("jit(f)/other",))


# ---- memory traffic; the last copy of every program reads and writes 64 bytes ----


@pytest.mark.parametrize(
    ("body", "fused", "moved"),
    [
        ("  %a = f32[16]{0} add(%x, %x)", "", 3 * 64),
        ("  %a = f32[16]{0:S(1)} add(%x, %x)", "", 2 * 64),  # the result stays in VMEM
        ("  %a = f32[4]{0} slice(%x), slice={[0:4]}", "", 2 * 16),
        ("  %a = f32[4,4]{1,0} bitcast(%x)", "", 0),
        (
            "  %i = s32[] constant(0)\n  %a = f32[4]{0} fusion(%x, %i), kind=kLoop, calls=%f",
            "%f (p: f32[16], i: s32[]) -> f32[4] {\n  %p = f32[16]{0} parameter(0)\n  %i = s32[] parameter(1)\n"
            "  %s = f32[4]{0} dynamic-slice(%p, %i), dynamic_slice_sizes={4}\n  ROOT %n = f32[4]{0} negate(%s)\n}\n",
            16 + 4 + 16,  # a slice of the operand, the index, the result
        ),
        (
            "  %i = s32[] constant(0)\n  %a = f32[4]{0} fusion(%x, %i), kind=kOutput, calls=%outer",
            "%f (p: f32[16], i: s32[]) -> f32[4] {\n  %p = f32[16]{0} parameter(0)\n  %i = s32[] parameter(1)\n"
            "  ROOT %s = f32[4]{0} dynamic-slice(%p, %i), dynamic_slice_sizes={4}\n}\n"
            "%outer (p: f32[16], i: s32[]) -> f32[4] {\n  %p = f32[16]{0} parameter(0)\n  %i = s32[] parameter(1)\n"
            "  %s = f32[4]{0} fusion(%p, %i), kind=kLoop, calls=%f\n  ROOT %n = f32[4]{0} negate(%s)\n}\n",
            16 + 4 + 16,  # the same where one fusion is inside another
        ),
    ],
)
def test_bytes_to_and_from_memory(body: str, fused: str, moved: float) -> None:
    assert hlo_cost.cost_of(program(body, fused), MESH).hbm_bytes == moved + 128


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing")


def test_sizes_of_types() -> None:
    arrays = hlo.parse_shape(
        "(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, pred[8]{0}, s4[4]{0}, f8e4m3fn[3], /*index=4*/u32[], token[])"
    )
    assert [a.num_bytes for a in arrays] == [12, 8, 2, 3, 4, 0]
    assert [a.in_hbm for a in arrays] == [False, True, True, True, True, True]
