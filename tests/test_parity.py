"""Live comparison with transformers, on checkpoints it writes here and now. Needs the torch extra."""

import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from data_pipeline.tokenizer import train_tokenizer
from mathscale_jax import model
from mathscale_jax.checkpoint import open_checkpoint
from mathscale_jax.convert.exporting import export_hf
from mathscale_jax.convert.importing import import_weights
from mathscale_jax.sampler import Prompt, Sampler, SamplingSettings

pytestmark = pytest.mark.torch

VOCAB = 320
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=8,
    max_position_embeddings=256,
)
FAMILIES: dict[str, dict[str, Any]] = {
    "multi-head (LLaMA-2 7B)": {},
    "grouped-query (LLaMA-2 70B)": dict(num_key_value_heads=2),
    "head_dim 100 (open_llama_3b)": dict(head_dim=100, rms_norm_eps=1e-6),
    "other RoPE base (Code Llama)": dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "sliding window (Mistral)": dict(num_key_value_heads=2, sliding_window=24),
}


@pytest.fixture(params=FAMILIES, ids=list(FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """transformers' model, and the checkpoint imported from what it saved."""
    torch = pytest.importorskip("torch")
    import transformers

    change = FAMILIES[request.param]
    kind = "Mistral" if "sliding_window" in change else "Llama"
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **change}, attn_implementation="eager")
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.12)
    theirs.save_pretrained(tmp_path / "hf")
    tokenizer = train_tokenizer(["words and numbers 0123456789 for a few merges", "words again"], VOCAB)
    (tmp_path / "hf" / "tokenizer.model").write_bytes(tokenizer.model)
    import_weights(str(tmp_path / "hf"), str(tmp_path / "checkpoint"))
    return theirs, tmp_path


def test_logits_agree_to_float32_noise(pair: tuple[Any, Path]) -> None:
    import torch

    theirs, folder = pair
    tokens = torch.randint(0, VOCAB, (2, 100))
    with torch.no_grad():
        narrow = theirs(tokens).logits.numpy()
        wide = theirs.double()(tokens).logits.numpy()
    checkpoint = open_checkpoint(str(folder / "checkpoint"))
    ours = model.logits(checkpoint.meta.model, checkpoint.restore_params(), jnp.asarray(tokens.numpy(), jnp.int32))
    noise = np.abs(narrow - wide).max()
    assert np.abs(ours - wide).max() < 4 * noise < 1e-4 * np.abs(wide).max()


def test_greedy_decoding_gives_the_tokens_of_generate(pair: tuple[Any, Path]) -> None:
    import torch

    theirs, folder = pair
    checkpoint = open_checkpoint(str(folder / "checkpoint"))
    sampler = Sampler.of(checkpoint, "float32")
    prompts = [[1, 17, 200, 45], [1, *range(30, 100)]]
    settings = SamplingSettings(num_samples=1, temperature=0, max_tokens=60)
    for prompt, ours in zip(prompts, sampler.sample([Prompt(str(p), p) for p in prompts], settings), strict=True):
        generated = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=60,
            do_sample=False,
            eos_token_id=2,
            bos_token_id=1,
            pad_token_id=0,
        )
        assert ours.tokens[0].tolist() == generated[0, len(prompt) :].tolist()


def test_transformers_loads_the_export_with_the_same_logits(pair: tuple[Any, Path]) -> None:
    import torch

    theirs, folder = pair
    export_hf(str(folder / "checkpoint"), str(folder / "out"))
    again = type(theirs).from_pretrained(folder / "out", attn_implementation="eager").eval()
    tokens = torch.randint(0, VOCAB, (2, 100))
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, again(tokens).logits)


def test_one_adamw_step_agrees_with_torch(pair: tuple[Any, Path]) -> None:
    """Gradients through the whole model, chunked loss and optimizer, against torch's autograd and AdamW."""
    import jax
    import torch

    from data_pipeline.loader import Batch
    from mathscale_jax.config import ComputeSettings, MeshSettings, OptimizerSettings
    from mathscale_jax.mesh import make_mesh
    from mathscale_jax.optimizer import make_optimizer
    from mathscale_jax.step import init_state, make_train_step, param_shardings, state_shardings, to_devices

    theirs, folder = pair
    theirs = theirs.double()
    tokens = np.random.default_rng(0).integers(0, VOCAB, (8, 33))
    mask = np.random.default_rng(1).random((8, 32)) < 0.5
    logits = theirs(torch.tensor(tokens[:, :-1])).logits
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), torch.tensor(tokens[:, 1:]), reduction="none")
    loss = nll[torch.tensor(mask)].mean()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.0)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    optimizer.step()

    checkpoint = open_checkpoint(str(folder / "checkpoint"))
    config = checkpoint.meta.model
    mesh = make_mesh(MeshSettings())
    settings = OptimizerSettings(learning_rate=1e-3, beta2=0.95, eps=1e-4, clip_norm=0.5)
    rule = make_optimizer(settings, lambda _: jnp.float32(1e-3))
    shardings = param_shardings(config, mesh)
    everything = state_shardings(shardings, rule, mesh)
    state = init_state(checkpoint.restore_params(shardings), rule, everything)
    compute = ComputeSettings(dtype="float32", remat="full", loss_chunk=8)
    step = make_train_step(config, compute, rule, lambda _: jnp.float32(1e-3), everything, mesh, 1)
    batch = Batch(
        tokens=tokens[:, :-1].astype(np.int32),
        targets=tokens[:, 1:].astype(np.int32),
        loss_mask=mask,
        segment_ids=np.ones((8, 32), np.int32),
        positions=np.broadcast_to(np.arange(32, dtype=np.int32), (8, 32)).copy(),
    )
    with jax.set_mesh(mesh):
        state, metrics = step(state, to_devices(batch, mesh))
    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-4)

    theirs.float().save_pretrained(folder / "stepped")
    shutil.copy(folder / "hf" / "tokenizer.model", folder / "stepped")
    import_weights(str(folder / "stepped"), str(folder / "expected"))
    before = checkpoint.restore_params()
    expected = open_checkpoint(str(folder / "expected")).restore_params()
    for old, new, ours in zip(*map(jax.tree.leaves, (before, expected, state.params)), strict=True):
        moved = np.abs(np.asarray(new) - np.asarray(old)).max()
        assert moved > 1e-5
        np.testing.assert_allclose(np.asarray(ours), np.asarray(new), atol=0.02 * moved)


def test_peft_loads_the_exported_adapter_with_the_same_logits_and_gradients(pair: tuple[Any, Path]) -> None:
    """Every matrix adapted, A and B random: alone under peft, merged under transformers, and trained one step."""
    import jax
    import peft
    import torch
    from etils import epath

    from mathscale_jax import lora
    from mathscale_jax.checkpoint import Meta
    from mathscale_jax.checkpoint_writer import Writer
    from mathscale_jax.config import LORA_TARGETS, CheckpointSettings, ComputeSettings, LoraSettings

    theirs, folder = pair
    base = open_checkpoint(str(folder / "checkpoint"))
    config, settings = base.meta.model, LoraSettings(rank=5, alpha=32, targets=tuple(LORA_TARGETS))
    leaves, treedef = jax.tree.flatten(lora.init(config, settings, seed=0))
    rng = np.random.default_rng(0)
    adapter = treedef.unflatten([jnp.float32(0.1 * rng.normal(size=leaf.shape)) for leaf in leaves])
    meta = Meta(config, base.meta.template, base.tokenizer.sha256, "test", lora=settings, base=base.as_base())
    with Writer(epath.Path(folder / "adapted"), CheckpointSettings(), base.tokenizer) as writer:
        writer.save(1, adapter, meta)
    export_hf(str(folder / "adapted"), str(folder / "peft"))
    export_hf(str(folder / "adapted"), str(folder / "merged"), merge=True)

    tokens = torch.randint(0, VOCAB, (2, 50))
    load = lambda where: type(theirs).from_pretrained(where, attn_implementation="eager").eval()  # noqa: E731
    with torch.no_grad():
        plain = load(folder / "hf")(tokens).logits.numpy()
        merged = load(folder / "merged")(tokens).logits.numpy()
    adapted = peft.PeftModel.from_pretrained(load(folder / "hf"), str(folder / "peft"), is_trainable=True).eval()
    logits = adapted(tokens).logits
    apart = logits.detach().numpy()

    ours_tokens = jnp.asarray(tokens.numpy(), jnp.int32)
    ours = model.logits(config, open_checkpoint(str(folder / "adapted")).restore_params(), ours_tokens)
    scale = np.abs(apart).max()
    assert np.abs(apart - plain).max() > 0.05 * scale
    assert np.abs(ours - apart).max() < 2e-5 * scale
    assert np.abs(merged - apart).max() < 2e-5 * scale

    (logits**2).mean().backward()
    theirs_gradient = {name: p.grad.numpy() for name, p in adapted.named_parameters() if p.grad is not None}
    compute = ComputeSettings(dtype="float32", remat="none")
    params = base.restore_params()

    def mean_square(adapter: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(50), (2, 50))
        low_ranks = lora.low_ranks(adapter, settings)
        hidden = model.hidden_states(
            config, params, ours_tokens, positions, jnp.ones_like(ours_tokens), compute, low_ranks
        )
        return jnp.mean((hidden @ params["output"]) ** 2)

    gradient = jax.grad(mean_square)(adapter)
    assert len(theirs_gradient) == 2 * len(LORA_TARGETS) * config.num_layers
    for target, part in [("o_proj", "A"), ("o_proj", "B"), ("q_proj", "A"), ("down_proj", "B")]:
        module, name = LORA_TARGETS[target]
        stacked = np.asarray(gradient[module][name][part.lower()])
        for layer in range(config.num_layers):
            flat = stacked[layer].reshape(-1, 5) if part == "A" else stacked[layer].reshape(5, -1)
            (expected,) = (
                g for n, g in theirs_gradient.items() if f"layers.{layer}." in n and f"{target}.lora_{part}" in n
            )
            np.testing.assert_allclose(flat.T, expected, atol=2e-5 * np.abs(expected).max())
