"""Planning says what a compiled step needs, and the compiled step moves weights and gradients, each once.

What compiles for TPUs is skipped where libtpu is not installed.
"""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from data_pipeline.settings import UsageError
from data_pipeline.sources import DataSettings, Source
from mathscale_jax import aot, hlo, hlo_cost, plan
from mathscale_jax.chips import GIB, chip_of, parse_topology
from mathscale_jax.config import MeshSettings, ModelConfig, TrainSettings
from mathscale_jax.mesh import make_mesh, sharding_of

# A cut of a model: two layers, every matrix large enough that the TPU compiler treats it as it does a 70B model's.
LENGTH = 512
CUT = ModelConfig(
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    max_context=LENGTH,
)


def settings_of(mesh: MeshSettings, rows: int, **more: Any) -> TrainSettings:
    data = DataSettings(sources=(Source(task="jsonl", path="-"),), context=LENGTH)
    return TrainSettings(output_dir="-", init_from="-", data=data, mesh=mesh, batch_size=rows, num_steps=10, **more)


def run_plan(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit:
        plan.main([*arguments])
    return exit.value.code  # type: ignore[return-value]


# ---- the compiled step ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.parametrize(
    ("topology", "mesh"),
    [
        ("v5p:4x4x4", MeshSettings(fsdp=64)),  # by default libtpu gathers and scatters here by all-reducing
        ("v5e:4x4", MeshSettings(fsdp=4, tensor=4)),
    ],
    ids=lambda value: str(value).replace(" ", ","),
)
def test_the_step_moves_every_weight_twice_and_every_gradient_once(topology: str, mesh: MeshSettings) -> None:
    slice_ = parse_topology(topology)
    devices = aot.devices_of(slice_)
    made = make_mesh(mesh, devices)
    settings = settings_of(mesh, rows=made.shape["fsdp"])
    compiled = aot.lower_train_step(settings, CUT, made).compile()
    cost = hlo_cost.cost_of(hlo.parse(compiled.as_text()), dict(made.shape))

    # Gathered forward and backward, scattered once, in bfloat16; embedding and output layer are gathered once only.
    embeddings = 2 * CUT.vocab_size * CUT.hidden_size
    layers = CUT.num_parameters - embeddings
    share = (made.shape["fsdp"] - 1) / made.shape["fsdp"] / made.shape["tensor"]
    at_least, at_most = (3 * layers + 2 * embeddings) * 2 * share, 3 * CUT.num_parameters * 2 * share
    over_fsdp = cost.bytes_by("axes")["fsdp"]
    assert at_least * 0.99 < over_fsdp < at_most * 1.01
    if mesh.tensor == 1:  # embedding and output too are scattered, not all-reduced
        assert over_fsdp < at_least * 1.01

    # Over fsdp go single weights, never activations or logits; those only over tensor, as tensor parallelism must.
    for collective in cost.collectives:
        dims = collective.largest.dims
        assert collective.largest.num_bytes <= 2 * max(CUT.vocab_size, CUT.intermediate_size) * CUT.hidden_size
        if LENGTH in dims or settings.compute.loss_chunk in dims:
            assert collective.axes == "tensor" or collective.largest.num_bytes < 100_000, collective

    # Six FLOPs a parameter and token but for the embedding; two more for what is computed again, which is all but the
    # last product of a block. Attention is in kernels, whose FLOPs no program says.
    per_token = cost.flops * made.size / (settings.batch_size * LENGTH)
    down = CUT.num_layers * CUT.intermediate_size * CUT.hidden_size
    assert per_token == pytest.approx(8 * layers - 2 * down + 6 * embeddings / 2, rel=0.002)
    assert cost.opaque_kernels and all("splash" in name for name in cost.opaque_kernels)
    assert cost.unknown_loops == ()

    # Weights and two moments in float32, each device its part, and little besides.
    memory = aot.memory_of(compiled, slice_)
    assert memory.arguments == pytest.approx(12 * CUT.num_parameters / (mesh.fsdp * mesh.tensor), rel=0.02)
    assert memory.fits


@pytest.mark.slow
@pytest.mark.tpu
def test_a_known_gather_in_a_scan_of_known_length_is_counted_exactly() -> None:
    mesh = make_mesh(MeshSettings(fsdp=4), aot.devices_of(parse_topology("v5e:2x2")))
    rows, width, turns = 256, 512, 5

    def step(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ jax.lax.all_gather(weight, "fsdp", axis=0, tiled=True)), None

    def local(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.scan(step, x, weights)[0]

    specs = (PartitionSpec("fsdp"), PartitionSpec(None, "fsdp"))
    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[0]))
    x = jax.ShapeDtypeStruct((4 * rows, width), jnp.bfloat16, sharding=sharding_of(mesh, ("embed", None)))
    weights = jax.ShapeDtypeStruct(
        (turns, width, width), jnp.bfloat16, sharding=sharding_of(mesh, (None, "embed", None))
    )
    cost = hlo_cost.cost_of(hlo.parse(mapped.lower(x, weights).compile().as_text()), dict(mesh.shape))
    assert cost.bytes_by("kind") == {"all-gather": turns * width * width * 2 * 3 / 4}
    assert cost.flops == turns * 2 * rows * width * width
    # The weights' own part and the rows are read, the result is written; all between stays in VMEM.
    assert cost.hbm_bytes == pytest.approx(turns * width * width * 2 / 4 + 2 * rows * width * 2, rel=0.01)


@pytest.mark.tpu
def test_a_decode_step_leaves_the_caches_where_they_lie() -> None:
    """Neither gathered from the devices that share their rows, nor turned into another layout."""
    topology = parse_topology("v5e:2x2")
    mesh, programs = aot.compile_sampler(CUT, topology, aot.devices_of(topology))
    assert mesh.shape["data"] == 4
    caches = 2 * CUT.num_layers * CUT.num_kv_heads * CUT.head_dim * 2 * 256 * aot.DECODE_RESPONSE // 4
    memory = programs["decode"].memory_analysis()
    assert caches <= memory.alias_size_in_bytes < 1.1 * caches
    assert memory.temp_size_in_bytes < 0.5 * caches


# ---- the command ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.tpu
def test_the_command_says_what_fits_and_writes_it_as_json(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "plan.json"
    assert run_plan("--config", "configs/demo.yaml", "--topology", "v5e:2x2", "--json", str(file)) == 0
    out = capsys.readouterr().out
    for heading in ("TRAIN STEP", "PREFILL", "DECODE", "VERDICT", "bound by", "not measured", "train step fits, with"):
        assert heading in out
    report = json.loads(file.read_text())
    step = report["programs"]["train_step"]
    assert report["fits"] and report["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    roofline, speed = step["roofline"], step["speed"]
    assert roofline["overlapped_seconds"] == max(
        roofline[f"{name}_seconds"] for name in ("compute", "hbm", "interconnect")
    )
    assert speed["tokens_per_second_per_device_overlapped"] == pytest.approx(256 / roofline["overlapped_seconds"])
    assert speed["mfu_overlapped"] == pytest.approx(
        speed["tokens_per_second_per_device_overlapped"] * speed["flops_per_token_formula"] / 197e12
    )
    assert report["programs"]["decode"]["loops_of_unknown_length"] == ["jit(decode_chunk)/while"]


@pytest.mark.slow
@pytest.mark.tpu
def test_what_does_not_fit_ends_with_1_and_says_what_to_change(capsys: pytest.CaptureFixture) -> None:
    arguments = ("--config", "configs/demo.yaml", "--topology", "v5e:2x2", "--no-sampler", "batch_size=131072")
    assert run_plan(*arguments) == 1
    printed = capsys.readouterr()
    assert "train step does not fit, by" in printed.out
    assert "accumulation_steps=32768" in printed.out and "compute.remat=full" in printed.out
    assert "does not fit" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9:4x4"], "no such topology.*v4, v5e, v5p, v6e.*v5p:4x4x4"),
        (["--topology", "v5e"], "no such topology"),
        (["--topology", "v5p:4x4"], "3 dimensions"),
        (["--topology", "v5e:32x32"], "at most 256"),
        (["--topology", "v5e:4x4", "--preset", "llama3"], "--preset llama3: unknown; allowed: llama2-7b"),
        (["--topology", "v5e:4x4", "model=null", "init_from=nowhere"], "nowhere.*--preset llama2-7b"),
        (["--topology", "v5e:4x4", "batch=1"], "unknown key batch; did you mean batch_size"),
    ],
)
def test_mistakes_end_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert run_plan("--config", "configs/demo.yaml", *arguments) == 2
    error = capsys.readouterr().err.replace("\n", " ")
    assert re.search(message, error), error


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5e:2x4"], "batch_size=4 .* make batch_size a multiple of 8"),
        (["--topology", "v5e:2x2", "mesh.fsdp=8"], "mesh.fsdp=8.*does not divide the 4 tpu device"),
        (["--topology", "v5e:2x2", "mesh.fsdp=1", "mesh.tensor=4", "model.num_kv_heads=2"], "kv_heads dimension of 2"),
        (["--topology", "v5e:3x3"], "v5e:3x3.*not divisible"),
    ],
)
def test_what_the_slice_cannot_do_ends_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    test_mistakes_end_with_2(arguments, message, capsys)


def test_without_libtpu_the_command_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run_plan("--config", "configs/demo.yaml", "--topology", "v5e:2x2") == 2
    assert "-e '.[tpu]'" in capsys.readouterr().err


# ---- figures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (128.19G) "
            "exceeds available HBM (15.75G).",
            128.19,
        ),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.13G of "
         "15.75G hbm. Exceeded hbm capacity by 4.38G.", 20.13),
    ],
)  # fmt: skip
def test_the_compilers_refusal_says_how_much_is_needed(message: str, gib: float) -> None:
    memory = aot.memory_of_failure(Exception(message), parse_topology("v5e:4x4"))
    assert (memory.peak, memory.capacity, memory.fits) == (gib * GIB, 15.75 * GIB, False)


def test_other_errors_of_the_compiler_are_raised() -> None:
    with pytest.raises(ValueError, match="something else"):
        aot.memory_of_failure(ValueError("something else"), parse_topology("v5e:4x4"))


@pytest.mark.parametrize(
    ("topology", "coordinates", "links"),
    [
        ("v5p:4x4x4", [(i, 0, 0) for i in range(4)], 2),  # a closed ring: both neighbours
        ("v5p:4x4x4", [(i, j, k) for i in range(4) for j in range(4) for k in range(4)], 6),
        ("v5p:2x2x2", [(0, 0, 0), (1, 0, 0)], 1),
        ("v5e:4x4", [(i, j, 0) for i in range(4) for j in range(4)], 2),  # two open rows: their ends have one neighbour
        ("v5e:16x16", [(i, j, 0) for i in range(16) for j in range(16)], 4),
        (
            "v5e:16x16",
            [(i, j, 0) for i in range(16) for j in range(0, 16, 4)],
            2.5,
        ),  # each fourth
        ("v5e:16x16", [(0, j, 0) for j in range(4)], 1),  # a part of a ring is open
    ],
)
def test_bandwidth_is_that_of_the_links_a_group_spans(topology: str, coordinates: list, links: float) -> None:
    slice_ = parse_topology(topology)
    assert slice_.bandwidth(np.array(coordinates)) == links * slice_.chip.link_bandwidth


def test_chips_are_found_by_the_kind_that_jax_reports() -> None:
    kinds = {
        "TPU v5 lite": 197e12,
        "TPU v5": 459e12,
        "TPU v5p": 459e12,
        "NVIDIA H200": 989e12,
        "NVIDIA H100 80GB": 989e12,
    }
    for kind, peak in kinds.items():
        chip = chip_of(kind)
        assert chip is not None and chip.peak_flops == peak
    assert chip_of("cpu") is None


def test_a_context_beyond_the_presets_is_refused() -> None:
    settings = settings_of(MeshSettings(), rows=1).model_copy(
        update={"data": DataSettings(sources=(Source(task="jsonl", path="-"),), context=8192)}
    )
    with pytest.raises(UsageError, match="longer than the model's max_context=4096"):
        plan._architecture(settings, "llama2-7b")
