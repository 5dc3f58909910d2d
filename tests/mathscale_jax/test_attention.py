"""Every attention back-end keeps the one mask contract, forward and backward; and what a choice of one promises."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipeline.settings import UsageError
from mathscale_jax import attention_kernels, model
from mathscale_jax.attention import attend, choose_backend
from mathscale_jax.config import ComputeSettings, MeshSettings, ModelConfig
from mathscale_jax.mesh import make_mesh

Arrays = tuple[np.ndarray, ...]


def reference(arrays: Arrays, segment_ids: np.ndarray, window: int | None) -> Arrays:
    """(attended, d_query, d_key, d_value) in float64, head by head, by the textbook's formulas."""
    query, key, value, d_attended = (np.asarray(x, np.float64) for x in arrays)
    _, length, num_heads, head_dim = query.shape
    group = num_heads // key.shape[2]
    attended, d_query, d_key, d_value = (np.zeros_like(x) for x in (query, query, key, value))
    for row, head in np.ndindex(len(query), num_heads):
        q, k, v = query[row, :, head], key[row, :, head // group], value[row, :, head // group]
        weights = np.zeros((length, length))
        for position in range(length):
            seen = [
                other
                for other in range(position + 1)
                if segment_ids[row, other] == segment_ids[row, position]
                and (window is None or position - other < window)
            ]
            scores = k[seen] @ q[position] / head_dim**0.5
            weights[position, seen] = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        upstream = d_attended[row, :, head]
        d_weights = upstream @ v.T
        d_scores = weights * (d_weights - (weights * d_weights).sum(axis=1, keepdims=True)) / head_dim**0.5
        attended[row, :, head] = weights @ v
        d_query[row, :, head] = d_scores @ k
        d_key[row, :, head // group] += d_scores.T @ q
        d_value[row, :, head // group] += weights.T @ upstream
    return attended, d_query, d_key, d_value


def random_arrays(batch: int, length: int, heads: int, kv_heads: int, head_dim: int) -> Arrays:
    """(query, key, value, upstream gradient), with scores of several units so that the softmax is far from flat."""
    rng = np.random.default_rng(length + heads + head_dim)
    counts = (heads, kv_heads, kv_heads, heads)
    scales = (2, 1, 1, 1)
    return tuple(
        scale * rng.standard_normal((batch, length, count, head_dim)).astype(np.float32)
        for count, scale in zip(counts, scales, strict=True)
    )


def packed(length: int) -> np.ndarray:
    """Two rows: examples of uneven length, one with padding behind them."""
    first = np.repeat(
        [1, 2, 3, 0], [length // 4, length // 2, length // 8, length - length // 4 - length // 2 - length // 8]
    )
    return np.stack([first, np.repeat([1, 2], [length - 5, 5])])


def computed(
    backend: str, arrays: Arrays, segment_ids: np.ndarray, window: int | None, dtype: str = "float32"
) -> Arrays:
    query, key, value, d_attended = (jnp.asarray(x, dtype) for x in arrays)

    @jax.jit
    def both(query: jax.Array, key: jax.Array, value: jax.Array, d_attended: jax.Array) -> tuple[jax.Array, ...]:
        def function(*qkv: jax.Array) -> jax.Array:
            return attend(*qkv, jnp.asarray(segment_ids), sliding_window=window, backend=backend)

        attended, pull_back = jax.vjp(function, query, key, value)
        return attended, *pull_back(d_attended)

    return tuple(np.asarray(x, np.float64) for x in both(query, key, value, d_attended))


def assert_close(ours: Arrays, theirs: Arrays, tolerance: float = 2e-6) -> None:
    for name, a, b in zip(("attended", "d_query", "d_key", "d_value"), ours, theirs, strict=True):
        assert np.isfinite(a).all(), name
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), name


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "INTERPRET", True)


# (length, heads, kv_heads, head_dim, window); xla's blocks on a CPU are 128 and 256 positions.
XLA_CASES = [
    (40, 2, 2, 64, None),  # one block, no multiple of anything
    (128, 4, 2, 100, None),
    (300, 2, 2, 8, None),  # padded to three blocks
    (512, 2, 1, 8, None),
    (512, 2, 2, 8, 70),  # a window within a block
    (400, 4, 2, 8, 200),  # a window over a block's border
    (256, 2, 1, 128, 2),  # each token sees itself and the one before
]
KERNEL_CASES = [(128, 2, 2, 64, None), (256, 4, 2, 100, None), (200, 2, 1, 128, None)]
SPLASH_CASES = [*KERNEL_CASES, (256, 2, 2, 8, 100)]


@pytest.mark.parametrize("segments", ["packed", "unpacked"])
@pytest.mark.parametrize("case", XLA_CASES, ids=str)
def test_xla_equals_the_formulas(case: tuple, segments: str) -> None:
    length, *heads, window = case
    arrays = random_arrays(2, length, *heads)
    ids = packed(length) if segments == "packed" else np.ones((2, length), int)
    assert_close(computed("xla", arrays, ids, window), reference(arrays, ids, window))


@pytest.mark.slow
@pytest.mark.parametrize("segments", ["packed", "unpacked"])
@pytest.mark.parametrize("case", SPLASH_CASES, ids=str)
def test_splash_equals_the_formulas(interpreted: None, case: tuple, segments: str) -> None:
    length, *heads, window = case
    arrays = random_arrays(2, length, *heads)
    ids = packed(length) if segments == "packed" else np.ones((2, length), int)
    assert_close(computed("splash", arrays, ids, window), reference(arrays, ids, window))


@pytest.mark.slow
@pytest.mark.parametrize("segments", ["packed", "unpacked"])
@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_pallas_equals_the_formulas(interpreted: None, case: tuple, segments: str) -> None:
    length, *heads, window = case
    arrays = random_arrays(2, length, *heads)
    ids = packed(length) if segments == "packed" else np.ones((2, length), int)
    assert_close(computed("pallas", arrays, ids, window), reference(arrays, ids, window))


def test_a_segment_may_lie_apart() -> None:
    """The contract knows ids only; that packed rows ascend is not part of it."""
    arrays = random_arrays(2, 512, 2, 2, 8)
    ids = np.stack([np.repeat([2, 1, 0, 2], 128), np.repeat([0, 3, 1, 3], 128)])
    assert_close(computed("xla", arrays, ids, None), reference(arrays, ids, None))


@pytest.mark.parametrize("backend", ["xla", "splash", "pallas"])
def test_bfloat16_is_as_close_as_its_rounding(interpreted: None, backend: str) -> None:
    arrays = tuple(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in random_arrays(1, 128, 2, 1, 64))
    ids = np.ones((1, 128), int)
    assert_close(computed(backend, arrays, ids, None, "bfloat16"), reference(arrays, ids, None), tolerance=2e-2)


@pytest.mark.parametrize("settings", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}], ids=str)
@pytest.mark.parametrize("batch", [8, 2])  # two rows cannot be split over four devices
def test_a_mesh_changes_nothing(settings: dict[str, int], batch: int) -> None:
    arrays = random_arrays(batch, 200, 4, 2, 8)
    ids = np.concatenate([packed(200)] * (batch // 2))
    with jax.set_mesh(make_mesh(MeshSettings(**settings))):
        ours = computed("xla", arrays, ids, None)
    assert_close(ours, reference(arrays, ids, None))


def test_inside_a_mesh_each_device_computes_its_own_rows_and_heads() -> None:
    mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    split = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor", None))
    query = jax.ShapeDtypeStruct((4, 256, 4, 8), jnp.float32, sharding=split)
    ids = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))

    def loss(query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array) -> jax.Array:
        return attend(query, key, value, ids, sliding_window=None, backend="xla").sum()

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(query, query, query, ids).compile().as_text()
    assert not re.search(r"all-gather|all-to-all|collective-permute|all-reduce", text)


def test_memory_of_xla_grows_with_the_length_not_with_its_square() -> None:
    def temporary_bytes(length: int) -> int:
        def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            ids = jnp.ones((1, length), jnp.int32)
            return attend(query, key, value, ids, sliding_window=None, backend="xla").sum()

        arrays = [jax.ShapeDtypeStruct((1, length, 4, 16), jnp.float32)] * 3
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    at, at_double = temporary_bytes(2048), temporary_bytes(4096)
    assert at_double < 2.1 * at
    assert at_double < 4 * 4096 * 4096 * 4 / 10  # a tenth of one [heads, length, length] float32


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["xla", "pallas"])  # splash: see the programs for TPUs below
def test_save_attention_computes_the_forward_pass_of_attention_once(interpreted: None, backend: str) -> None:
    config = ModelConfig.model_validate({"preset": "demo", "num_layers": 2, "num_kv_heads": 2})
    params = jax.eval_shape(lambda: model.init(config, 0))
    rows = jax.ShapeDtypeStruct((2, 128), jnp.int32)

    def forward_passes(remat: str) -> int:
        compute = ComputeSettings(remat=remat, attention=backend, dtype="float32")

        def loss(params: model.Params, rows: jax.Array) -> jax.Array:
            return model.hidden_states(config, params, rows, rows, rows, compute).sum()

        text = jax.jit(jax.grad(loss)).lower(params, rows).compile().as_text()
        # The running maximum of the scores: the only maximum of two arrays of floats, taken in the forward pass.
        return len(re.findall(r"f32\[\d[\d,]*\]\S* maximum\(", text))

    assert forward_passes("none") == 1
    assert forward_passes("full") >= 2
    assert forward_passes("save-attention") == 1


@pytest.mark.slow
def test_save_attention_changes_neither_loss_nor_gradient() -> None:
    config = ModelConfig.model_validate({"preset": "demo", "num_layers": 2})
    params = jax.jit(lambda: model.init(config, 0))()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 512, (2, 48)))

    def loss(params: model.Params, remat: str) -> jax.Array:
        return jnp.mean(model.logits(config, params, tokens, ComputeSettings(dtype="float32", remat=remat)) ** 2)

    plain, saving = (jax.value_and_grad(loss)(params, remat) for remat in ("none", "save-attention"))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(saving), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max()))


CUDA_CALLS = {"pallas": r"triton", "cudnn": r"__cudnn\$fmhaSoftmax\b|__cudnn\$fmhaSoftmaxBackward"}


@pytest.mark.parametrize("head_dim", [64, 100, 128])
@pytest.mark.parametrize("backend", CUDA_CALLS)
def test_the_gpu_kernels_lower_for_cuda(monkeypatch: pytest.MonkeyPatch, backend: str, head_dim: int) -> None:
    """As far as one gets without a GPU: their checks of shapes pass, and the program calls the kernels."""
    fused = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(fused, lambda: 91_000)

    def loss(query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array) -> jax.Array:
        window = None if backend == "pallas" else 100
        return attend(query, key, value, ids, sliding_window=window, backend=backend).astype(jnp.float32).sum()

    query = jax.ShapeDtypeStruct((2, 200, 4, head_dim), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((2, 200, 2, head_dim), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, 200), jnp.int32)
    targets = ("__gpu$xla.gpu.triton", "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in targets]
    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    text = jax.export.export(gradient, platforms=["cuda"], disabled_checks=allowed)(query, key, key, ids).mlir_module()
    assert len(re.findall(rf"custom_call @[^(]*(?:{CUDA_CALLS[backend]})", text)) >= 2
    if backend == "cudnn":
        assert text.count(r"sliding_window_length\22: 100") == 2


def test_cudnn_gives_nan_rather_than_mixing_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = jax.nn.dot_product_attention

    def with_xla(*arrays: jax.Array, implementation: str, **more: object) -> jax.Array:
        assert implementation == "cudnn"
        return plain(*arrays, implementation="xla", **more)

    monkeypatch.setattr(jax.nn, "dot_product_attention", with_xla)
    arrays = random_arrays(2, 40, 2, 1, 100)
    padded = np.stack([np.repeat([1, 0], [30, 10]), np.ones(40, int)])
    ours, theirs = computed("cudnn", arrays, padded, 7), reference(arrays, padded, 7)
    real = padded > 0
    assert np.abs(ours[0][real] - theirs[0][real]).max() < 1e-5
    assert np.isfinite(ours[0]).all()
    assert np.isnan(computed("cudnn", arrays, packed(40), 7)[0]).all()


def choose(requested: str, platform: str, **change: object) -> str:
    plain = dict(layout="packed", length=2048, head_dim=128, sliding_window=None, dtype="bfloat16")
    return choose_backend(requested, platform=platform, **{**plain, **change})


@pytest.mark.parametrize(
    ("platform", "change", "chosen"),
    [
        ("cpu", {}, "xla"),
        ("tpu", {}, "splash"),
        ("tpu", {"head_dim": 100, "sliding_window": 512}, "splash"),
        ("gpu", {}, "pallas"),
        ("gpu", {"sliding_window": 4096}, "pallas"),
        ("gpu", {"sliding_window": 1024}, "xla"),
        ("gpu", {"head_dim": 256}, "xla"),
        ("gpu", {"layout": "padded"}, "cudnn"),
        ("gpu", {"layout": "padded", "sliding_window": 1024}, "cudnn"),
        ("gpu", {"layout": "padded", "dtype": "float32"}, "pallas"),
    ],
)
def test_auto_takes_the_fastest_that_can_do_it(platform: str, change: dict[str, object], chosen: str) -> None:
    assert choose("auto", platform, **change) == chosen
    assert choose(chosen, platform, **change) == chosen


@pytest.mark.parametrize(
    ("requested", "platform", "change", "told"),
    [
        ("splash", "cpu", {}, ["compute.attention=splash", "platform cpu", "it may be xla, or auto"]),
        ("cudnn", "tpu", {}, ["platform tpu", "splash, xla"]),
        ("cudnn", "gpu", {}, ["data.layout is packed", "pallas, xla"]),
        ("cudnn", "gpu", {"layout": "padded", "dtype": "float32"}, ["compute.dtype is float32"]),
        ("pallas", "gpu", {"sliding_window": 512}, ["model.sliding_window=512", "2048", "may be xla"]),
        ("pallas", "gpu", {"head_dim": 256}, ["model.head_dim is 256"]),
    ],
)
def test_what_a_backend_cannot_do_is_refused(
    requested: str, platform: str, change: dict[str, object], told: list[str]
) -> None:
    with pytest.raises(UsageError) as refused:
        choose(requested, platform, **change)
    for words in told:
        assert words in str(refused.value)


COMPILE_FOR_TPU = """
import json, re, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from mathscale_jax import model
from mathscale_jax.config import ComputeSettings, MeshSettings, ModelConfig
from mathscale_jax.mesh import make_mesh, sharding_of
from mathscale_jax.step import param_shardings

mesh = make_mesh(MeshSettings(fsdp=2, tensor=2), topologies.get_topology_desc("v5e:2x2", platform="tpu").devices)
for head_dim, length, window, remat in json.loads(sys.argv[1]):
    config = ModelConfig(
        vocab_size=256, hidden_size=256, intermediate_size=256, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=head_dim, max_context=length, sliding_window=window,
    )
    compute = ComputeSettings(remat=remat, attention="splash")
    params = jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16, sharding=sharding),
        model.param_specs(config), param_shardings(config, mesh), is_leaf=lambda x: isinstance(x, model.ParamSpec),
    )
    row = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=sharding_of(mesh, ("batch", None)))
    def loss(params, tokens, positions, segment_ids):
        return model.hidden_states(config, params, tokens, positions, segment_ids, compute).astype(jnp.float32).sum()
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(params, row, row, row).compile().as_text()
    kernels = re.findall(r"%splash_mha_(fwd|dq|dkv)[\\w.]* = [^\\n]*custom-call\\(", text)
    print("KERNELS", json.dumps(sorted(kernels)), flush=True)
"""


@pytest.mark.slow
@pytest.mark.tpu
def test_splash_compiles_for_tpus_forward_and_backward() -> None:
    """A two-layer model over a mesh of four TPU chips, by the real compiler; no TPU is needed."""
    cases = [  # head_dim, length, window, remat; the kernels in the program, which scans over the layers
        ((128, 512, None, "save-attention"), ["dkv", "fwd"]),
        ((64, 384, None, "full"), ["dkv", "fwd", "fwd"]),
        ((100, 700, 300, "save-attention"), ["dkv", "fwd"]),
        ((64, 2560, None, "save-attention"), ["dkv", "dq", "fwd"]),  # more than four blocks: two backward kernels
    ]
    surroundings = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": "",
    }
    arguments = [sys.executable, "-c", COMPILE_FOR_TPU, json.dumps([case for case, _ in cases])]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        arguments, env={**os.environ, **surroundings}, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("KERNELS")]
    assert told == [kernels for _, kernels in cases]
