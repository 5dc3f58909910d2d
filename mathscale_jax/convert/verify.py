"""What a checkpoint is, whether it is whole, and whether it computes what transformers does with the same weights."""

import collections
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from data_pipeline.cli import RunError, first_line, logger
from data_pipeline.progress import Progress
from data_pipeline.settings import UsageError
from mathscale_jax import model
from mathscale_jax.checkpoint import Checkpoint, open_checkpoint
from mathscale_jax.checkpoint_lazy import LazyReader
from mathscale_jax.config import ComputeSettings, ModelConfig
from mathscale_jax.convert.configs import model_config_from_hf
from mathscale_jax.convert.dtypes import numpy_dtype
from mathscale_jax.convert.mapping import leaves
from mathscale_jax.convert.sources import fetch, read_json

PROMPTS = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips "
    "did Natalia sell altogether in April and May?",
    "Let $f(x) = x^2 - 3x + 2$. Find all real numbers $x$ with $f(x) = 0$, and say how you know that these are all.",
    "def add(a: int, b: int) -> int:\n    return a + b\n\nassert add(2, 3) == 5\n",
)
# The largest Kullback-Leibler divergence of a position, in nats, that is rounding: weights that are laid out or read
# wrongly give whole nats.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
Logits = Float[np.ndarray, "positions vocab"]


def verify(path: str, hf_folder: str | None = None, dtype: str = "float32") -> Iterator[str]:
    """Lines on the checkpoint at `path`: what it is, and that every bit of it is what was saved.

    With `hf_folder`, its logits are compared with transformers' on `PROMPTS`, both computing in `dtype`. Raises
    DamagedCheckpoint where bits have changed; RunError, with a hint, where the models are not the same.
    """
    checkpoint = open_checkpoint(path)
    folder = None if hf_folder is None else _reference(hf_folder)
    yield from _description(checkpoint)
    if folder is None:
        return
    differing = _differences(checkpoint.meta.model, folder)
    context = differing.pop("max_context", None)
    if differing:  # prompts are short: not every difference shows in their logits, and some make them useless
        told = ", ".join(f"{name} ({difference})" for name, difference in differing.items())
        raise RunError(f"NOT the same model: the architectures differ in {told}")
    theirs = _their_logits(folder, checkpoint, dtype)
    params = checkpoint.restore_params(dtype=dtype)
    worst, compared = _compare(_our_logits(checkpoint, params, dtype), theirs)
    yield from ("", f"against {folder} in {dtype}, on {len(PROMPTS)} prompts", *compared)
    if worst > TOLERANCES[dtype]:
        hint = _hint(checkpoint, params, theirs, dtype)
        raise RunError(f"NOT the same model: {TOLERANCES[dtype]:g} nats would be rounding; {hint}")
    yield f"the same model: no position differs by more than {TOLERANCES[dtype]:g} nats"
    if context is not None:
        yield f"only the stated context differs ({context}); of Meta's weights, import takes it by --max-context"


def _reference(name: str) -> str:
    """The folder of transformers' model. Raises UsageError where it holds none."""
    folder = fetch(name)
    if (Path(folder) / "adapter_config.json").exists():
        raise UsageError(f"{folder} is an adapter: export the run with --merge and compare with that")
    if not (Path(folder) / "config.json").exists():
        raise UsageError(f"{folder} is no Hugging Face folder: it has no config.json")
    return folder


def _description(checkpoint: Checkpoint) -> list[str]:
    meta, config = checkpoint.meta, checkpoint.meta.model
    sizes = collections.Counter[str]()
    lock = threading.Lock()
    total = config.num_parameters * numpy_dtype(checkpoint.stored_dtype()).itemsize
    with Progress(total, "verifying", "bytes") as bar:

        def read(_: str, pieces: Iterator[np.ndarray]) -> None:
            for piece in pieces:
                bar.update(piece.nbytes)
                with lock:
                    sizes[str(piece.dtype)] += piece.nbytes

        LazyReader(checkpoint).read([leaf.name for leaf in leaves(config)], read)
    size = ", ".join(f"{size / 1e9:.3f} GB of {dtype}" for dtype, size in sorted(sizes.items()))
    window = "" if config.sliding_window is None else f", sliding window {config.sliding_window}"
    lines = [
        f"{checkpoint.name}: whole, every checksum agrees",
        f"  model       {config.num_parameters / 1e9:.3f} billion parameters; {config.num_layers} layers of "
        f"{config.hidden_size}, {config.num_heads} heads ({config.num_kv_heads} of keys and values) of "
        f"{config.head_dim}, MLP {config.intermediate_size}",
        f"  positions   context {config.max_context}, RoPE base {config.rope_theta:g}{window}",
        f"  weights     {size}",
        f"  tokenizer   {checkpoint.tokenizer.vocab_size} pieces of a vocabulary of {config.vocab_size}, sha256 "
        f"{meta.tokenizer_sha256[:16]}",
        f"  template    {meta.template.prompt!r} {meta.template.response!r}",
        f"  lineage     {meta.lineage}",
    ]
    if meta.lora is not None and meta.base is not None:
        lines.append(f"  adapter     rank {meta.lora.rank} on {', '.join(meta.lora.targets)}, of {meta.base.path}")
    if meta.validation_loss is not None:
        lines.append(f"  validation  loss {meta.validation_loss:.4f}")
    return lines


def _prompts(checkpoint: Checkpoint) -> list[list[int]]:
    return [checkpoint.tokenizer.encode_prompt(text)[: checkpoint.meta.model.max_context] for text in PROMPTS]


def _our_logits(checkpoint: Checkpoint, params: model.Params, dtype: Any) -> list[Logits]:
    compute = ComputeSettings(dtype=dtype, remat="none")
    logits = jax.jit(model.logits, static_argnums=(0, 3))
    return [
        np.asarray(logits(checkpoint.meta.model, params, jnp.asarray([tokens]), compute))[0]
        for tokens in _prompts(checkpoint)
    ]


def _their_logits(folder: str, checkpoint: Checkpoint, dtype: str) -> list[Logits]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UsageError("comparing needs transformers: pip install -c constraints.txt -e '.[torch]'") from error
    logger.info("loading %s with transformers", folder)
    transformers.utils.logging.disable_progress_bar()
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True, attn_implementation="eager"
        ).eval()
    except Exception as error:  # of several libraries, and of many kinds
        raise UsageError(f"{folder}: transformers cannot load it: {first_line(error)}") from error
    with torch.no_grad():
        return [theirs(torch.tensor([tokens])).logits[0].float().numpy() for tokens in _prompts(checkpoint)]


def _compare(ours: list[Logits], theirs: list[Logits]) -> tuple[float, list[str]]:
    """The largest divergence of a position, and lines that say how the logits differ."""
    if ours[0].shape != theirs[0].shape:
        return np.inf, [f"  vocabulary  {ours[0].shape[1]} here, {theirs[0].shape[1]} there"]
    lines, worst = [], 0.0
    for text, a, b in zip(PROMPTS, ours, theirs, strict=True):
        divergence = _divergence(b.astype(np.float64), a.astype(np.float64))
        top = [set(np.argsort(row)[-5:]) for row in a], [set(np.argsort(row)[-5:]) for row in b]
        agreement = np.mean([len(x & y) / 5 for x, y in zip(*top, strict=True)])
        lines.append(
            f"  {text[:24]!r:28} KL a position: mean {divergence.mean():.2e}, largest {divergence.max():.2e} nats (at "
            f"{divergence.argmax()} of {len(a)}); top 5 agree {100 * agreement:.1f} %; logits differ by at most "
            f"{np.abs(a - b).max():.2e} of {np.abs(b).max():.3g}"
        )
        worst = max(worst, float(divergence.max()) if np.isfinite(divergence).all() else np.inf)
    return worst, lines


def _divergence(p: Float[np.ndarray, "positions vocab"], q: Logits) -> Float[np.ndarray, " positions"]:
    """KL(p || q) of each position, of logits."""
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (p, q))
    return np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0)


def _differences(ours: ModelConfig, folder: str) -> dict[str, str]:
    """What the architectures differ in, by name. Raises RunError where theirs is none that this model computes."""
    try:
        stated = model_config_from_hf(read_json(Path(folder) / "config.json"), f"{folder}/config.json")
    except UsageError as error:
        raise RunError(f"NOT the same model: {error}") from error
    return {
        name: f"{getattr(ours, name)!r} here, {getattr(stated, name)!r} there"
        for name in ModelConfig.model_fields
        if getattr(ours, name) != getattr(stated, name)
    }


def _hint(checkpoint: Checkpoint, params: model.Params, theirs: list[Logits], dtype: str) -> str:
    """What kind of mistake makes these logits, where it is known by its signature."""
    pairs = np.arange(checkpoint.meta.model.head_dim).reshape(2, -1).T.reshape(-1)
    for order in (pairs, np.argsort(pairs)):  # neighbours taken for halves, and the other way round
        attention = params["blocks"]["attention"]
        reordered = {name: attention[name][..., order] for name in ("query", "key")}
        changed = {**params, "blocks": {**params["blocks"], "attention": {**attention, **reordered}}}
        if _compare(_our_logits(checkpoint, changed, dtype), theirs)[0] <= TOLERANCES[dtype]:
            return (
                "q/k look permuted: the rows of the query and key matrices are in the other of Meta's and Hugging "
                "Face's orders than their file says; import them from the format they were published in"
            )
    if checkpoint.meta.lora is not None:
        return "it is a model with an adapter: the other one may be without it (export --merge gives both in one)"
    return "no known mistake has this signature: other weights, perhaps"
