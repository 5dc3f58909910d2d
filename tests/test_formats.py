"""Weights in the formats that torch writes, made here by transformers and torch. Needs the torch extra."""

import copy
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from data_pipeline.cli import RunError
from data_pipeline.settings import UsageError
from data_pipeline.tokenizer import train_tokenizer
from mathscale_jax import model
from mathscale_jax.checkpoint import Checkpoint, open_checkpoint, steps_in
from mathscale_jax.checkpoint_lazy import LazyReader
from mathscale_jax.convert.importing import import_weights
from mathscale_jax.convert.sources import open_source
from mathscale_jax.convert.verify import verify

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

VOCAB, HEADS, KV_HEADS, WIDTH = 320, 8, 4, 64


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """transformers' model, and a folder with its weights as .bin (in bin/) and as Meta's two parts (in meta/)."""
    import transformers

    folder = tmp_path_factory.mktemp("published")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=3, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=4096, rms_norm_eps=1e-5, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.12)
    tokenizer = train_tokenizer(["words and numbers 0123456789 for a few merges", "words again"], VOCAB)
    for name in ("bin", "meta"):
        (folder / name).mkdir()
        (folder / name / "tokenizer.model").write_bytes(tokenizer.model)
    config.save_pretrained(folder / "bin")
    (folder / "bin" / "generation_config.json").write_text('{"temperature": 0.6}')
    weights = theirs.state_dict()
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, folder / "bin" / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    params = {"dim": WIDTH, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "n_layers": 3, "norm_eps": 1e-5, "vocab_size": -1}
    (folder / "meta" / "params.json").write_text(json.dumps(params))
    for number, part in enumerate(_meta_parts(weights)):
        torch.save(part, folder / "meta" / f"consolidated.{number:02d}.pth")
    return theirs, folder


def _meta_parts(weights: dict[str, Any], num_parts: int = 2, head_dim: int = 8) -> list[dict[str, Any]]:
    """Meta's names and layout, cut as fairscale's layers are: by their outputs, or by their inputs."""
    half = head_dim // 2
    names = {
        "self_attn.q_proj": ("attention.wq", 0), "self_attn.k_proj": ("attention.wk", 0),
        "self_attn.v_proj": ("attention.wv", 0), "self_attn.o_proj": ("attention.wo", 1),
        "mlp.gate_proj": ("feed_forward.w1", 0), "mlp.down_proj": ("feed_forward.w2", 1),
        "mlp.up_proj": ("feed_forward.w3", 0), "input_layernorm": ("attention_norm", None),
        "post_attention_layernorm": ("ffn_norm", None),
    }  # fmt: skip
    whole = {
        "tok_embeddings.weight": (weights["model.embed_tokens.weight"], 1),
        "norm.weight": (weights["model.norm.weight"], None),
        "output.weight": (weights["lm_head.weight"], 0),
        "rope.freqs": (torch.ones(4), None),
    }
    for layer in range(3):
        for theirs, (ours, axis) in names.items():
            tensor = weights[f"model.layers.{layer}.{theirs}.weight"]
            if theirs.endswith(("q_proj", "k_proj")):
                # A head's row i and its row i + head_dim / 2 lie beside each other there.
                heads = range(0, len(tensor), head_dim)
                tensor = tensor[[first + second + i for first in heads for i in range(half) for second in (0, half)]]
            whole[f"layers.{layer}.{ours}.weight"] = (tensor, axis)
    return [
        {name: (t if axis is None else t.chunk(num_parts, axis)[part]).clone() for name, (t, axis) in whole.items()}
        for part in range(num_parts)
    ]


def _same_logits(theirs: Any, checkpoint: Checkpoint) -> None:
    tokens = torch.randint(0, VOCAB, (2, 60))
    with torch.no_grad():
        expected = theirs(tokens).logits.numpy()
    ours = model.logits(checkpoint.meta.model, checkpoint.restore_params(), jnp.asarray(tokens.numpy(), jnp.int32))
    np.testing.assert_allclose(ours, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("format", ["bin", "meta"])
def test_logits_are_those_of_transformers(
    published: tuple[Any, Path], tmp_path: Path, format: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "mathscale")
    theirs, folder = published
    import_weights(str(folder / format), str(tmp_path))
    checkpoint = open_checkpoint(str(tmp_path))
    _same_logits(theirs, checkpoint)
    assert checkpoint.meta.model.max_context == 4096
    assert ("does not say the context: 4096, as of LLaMA-2" in caplog.text) == (format == "meta")
    assert checkpoint.meta.companions == ({"generation_config.json": {"temperature": 0.6}} if format == "bin" else {})


def test_the_params_of_mistral_say_their_window_and_heads(published: tuple[Any, Path], tmp_path: Path) -> None:
    """As Mistral publishes its 7B: one file, a head_dim and a window in params.json; both change the logits."""
    import transformers

    theirs, folder = published
    config = transformers.MistralConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=100, sliding_window=24, max_position_embeddings=32768, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(1)
    theirs = transformers.MistralForCausalLM(config).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.12)
    (whole,) = _meta_parts(theirs.state_dict(), num_parts=1, head_dim=100)
    source = tmp_path / "mistral"
    source.mkdir()
    shutil.copy(folder / "meta" / "tokenizer.model", source)
    torch.save(whole, source / "consolidated.00.pth")
    params = {
        "dim": WIDTH, "n_layers": 3, "head_dim": 100, "hidden_dim": 96, "n_heads": 2, "n_kv_heads": 1,
        "norm_eps": 1e-5, "sliding_window": 24, "vocab_size": VOCAB,
    }  # fmt: skip
    (source / "params.json").write_text(json.dumps(params))
    import_weights(str(source), str(tmp_path / "out"))
    checkpoint = open_checkpoint(str(tmp_path / "out"))
    assert checkpoint.meta.model.max_context == 32768
    _same_logits(theirs, checkpoint)
    (source / "params.json").write_text(json.dumps({**params, "moe": {"num_experts": 8}}))
    with pytest.raises(UsageError, match=r"moe=.* is not supported"):
        import_weights(str(source), str(tmp_path / "other"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_in_two_bytes_come_in_bit_for_bit(published: tuple[Any, Path], tmp_path: Path, dtype: str) -> None:
    theirs, folder = published
    narrow = shutil.copytree(folder / "bin", tmp_path / "narrow")
    for file in narrow.glob("*.bin"):
        tensors = torch.load(file, weights_only=True)
        torch.save({name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}, file)
    import_weights(str(narrow), str(tmp_path / "out"))
    checkpoint = open_checkpoint(str(tmp_path / "out"))
    assert checkpoint.stored_dtype() == dtype
    expected = theirs.state_dict()["lm_head.weight"].to(getattr(torch, dtype)).T.contiguous().view(torch.int16).numpy()
    np.testing.assert_array_equal(
        np.concatenate([piece.copy() for piece in LazyReader(checkpoint).pieces("output")]).view(np.int16), expected
    )


def _hf(published: tuple[Any, Path], folder: Path, weights: dict[str, Any] | None = None) -> str:
    """A folder that transformers wrote of its model, with some tensors replaced."""
    theirs, made = published
    changed = copy.deepcopy(theirs)
    changed.load_state_dict({**theirs.state_dict(), **(weights or {})})
    changed.save_pretrained(folder)
    shutil.copy(made / "bin" / "tokenizer.model", folder)
    return str(folder)


def test_verify_finds_the_same_model(published: tuple[Any, Path], tmp_path: Path) -> None:
    import_weights(str(published[1] / "meta"), str(tmp_path / "ours"))
    page = "\n".join(verify(str(tmp_path / "ours"), _hf(published, tmp_path / "hf")))
    assert "whole, every checksum agrees" in page and "the same model" in page
    assert "top 5 agree 100.0 %" in page and "Meta .pth" in page


def test_verify_in_bfloat16_finds_rounding_and_no_more(published: tuple[Any, Path], tmp_path: Path) -> None:
    import_weights(_hf(published, tmp_path / "hf"), str(tmp_path / "ours"))
    assert "the same model" in "\n".join(verify(str(tmp_path / "ours"), str(tmp_path / "hf"), "bfloat16"))
    weights = published[0].state_dict()
    name = "model.layers.1.self_attn.k_proj.weight"
    other = _hf(published, tmp_path / "other", {name: weights[name].roll(1, 0)})
    with pytest.raises(RunError, match="NOT the same model"):
        list(verify(str(tmp_path / "ours"), other, "bfloat16"))


def test_verify_knows_permuted_queries_and_keys(published: tuple[Any, Path], tmp_path: Path) -> None:
    """As a conversion leaves them that forgets Meta's order."""
    weights, forgotten = published[0].state_dict(), {}
    for name, tensor in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            order = [8 * head + 4 * half + i for head in range(len(tensor) // 8) for i in range(4) for half in (0, 1)]
            forgotten[name] = tensor[order]
    import_weights(_hf(published, tmp_path / "wrong", forgotten), str(tmp_path / "ours"))
    with pytest.raises(RunError, match=r"NOT the same model: .* q/k look permuted"):
        list(verify(str(tmp_path / "ours"), _hf(published, tmp_path / "right")))


def _imported_and_changed(published: tuple[Any, Path], folder: Path, change: dict[str, Any]) -> str:
    """Imports into ours/, and then changes the config.json of the source, whose folder it returns."""
    source = _hf(published, folder / "hf")
    import_weights(source, str(folder / "ours"))
    config = Path(source) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    return source


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            r"rope_theta \(10000.0 here, 1000000.0 there\)",
        ),
        # Which the logits of short prompts do not show.
        ({"model_type": "mistral", "sliding_window": 2048}, r"sliding_window \(None here, 2048 there\)"),
    ],
)
def test_verify_names_what_the_architectures_differ_in(
    published: tuple[Any, Path], tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    source = _imported_and_changed(published, tmp_path, change)
    with pytest.raises(RunError, match=f"NOT the same model: .* {told}"):
        list(verify(str(tmp_path / "ours"), source))


def test_verify_takes_another_stated_context_for_the_same_model(published: tuple[Any, Path], tmp_path: Path) -> None:
    source = _imported_and_changed(published, tmp_path, {"max_position_embeddings": 2048})
    page = list(verify(str(tmp_path / "ours"), source))
    assert "the same model" in page[-2] and "(4096 here, 2048 there)" in page[-1]


def test_verify_compares_with_models_only(published: tuple[Any, Path], tmp_path: Path) -> None:
    import_weights(_hf(published, tmp_path / "hf"), str(tmp_path / "ours"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for folder, told in ((tmp_path / "adapter", "--merge"), (tmp_path / "ours", "no config.json")):
        with pytest.raises(UsageError, match=told):
            list(verify(str(tmp_path / "ours"), str(folder)))


def test_verify_of_other_weights_says_so(published: tuple[Any, Path], tmp_path: Path) -> None:
    import_weights(_hf(published, tmp_path / "hf"), str(tmp_path / "ours"))
    other = {"lm_head.weight": published[0].state_dict()["lm_head.weight"] + 0.01 * torch.randn(VOCAB, WIDTH)}
    with pytest.raises(RunError, match="NOT the same model"):
        list(verify(str(tmp_path / "ours"), _hf(published, tmp_path / "other", other)))


class _Harmful:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def _hold_code(folder: Path) -> None:
    torch.save({"x": _Harmful(folder / "ran")}, folder / "pytorch_model-00001-of-00002.bin")


def _pickle_only(folder: Path) -> None:
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(pickle.dumps({"x": _Harmful(folder / "ran")}))


def _truncate(folder: Path) -> None:
    file = next(path for pattern in ("*.bin", "*.pth") for path in sorted(folder.glob(pattern)))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _lose_part(folder: Path) -> None:
    (folder / "consolidated.00.pth").unlink()


def _lose_last_part(folder: Path) -> None:
    (folder / "consolidated.01.pth").unlink()


def _lose_params(folder: Path) -> None:
    (folder / "params.json").unlink()


def _other_base(folder: Path) -> None:
    file = folder / "params.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_theta": 5e5}))


def _no_heads(folder: Path) -> None:
    file = folder / "params.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "n_heads": 0}))


def _nothing_but_a_tensor(folder: Path) -> None:
    torch.save(torch.zeros(3), folder / "pytorch_model-00001-of-00002.bin")


def _change_part(name: str, change: Any) -> Any:
    def apply(folder: Path) -> None:
        file = folder / "consolidated.01.pth"
        tensors = torch.load(file)
        tensors[name] = change(tensors[name])
        torch.save(tensors, file)

    return apply


@pytest.mark.parametrize(
    ("format", "damage", "told"),
    [
        ("bin", _hold_code, "00001-of-00002.bin holds more than weights and could run code: it is not loaded"),
        ("bin", _pickle_only, "00001-of-00002.bin"),
        ("bin", _truncate, "00001-of-00002.bin is truncated or damaged"),
        ("bin", _nothing_but_a_tensor, "is no dictionary of tensors by name"),
        ("meta", _truncate, "consolidated.00.pth is truncated or damaged"),
        ("meta", _lose_part, "consolidated.00.pth is missing"),
        ("meta", _lose_last_part, r"shape .*; 1 file\(s\) consolidated.\*.pth were found: is one missing\?"),
        ("meta", _change_part("norm.weight", lambda part: part + 1), "its part of norm.weight does not go with"),
        ("meta", _change_part("layers.0.attention.wq.weight", torch.Tensor.half), "wq.weight does not go with"),
        ("meta", _change_part("layers.0.attention.wq.weight", lambda part: part[:, 1:]), "wq.weight does not go with"),
        ("meta", _change_part("layers.0.attention.wq.weight", lambda part: part[0]), "wq.weight does not go with"),
        ("meta", _change_part("output.weight", torch.Tensor.to_sparse), "is no dictionary of tensors by name"),
        ("meta", _lose_params, "params.json is missing"),
        ("meta", _no_heads, "n_heads=0 must be a positive number"),
        ("meta", _other_base, "rope_theta=500000: give --max-context"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(
    published: tuple[Any, Path], tmp_path: Path, format: str, damage: Any, told: str
) -> None:
    folder = shutil.copytree(published[1] / format, tmp_path / "folder")
    damage(folder)
    with pytest.raises(UsageError, match=told):
        import_weights(str(folder), str(tmp_path / "out"))
    assert not (folder / "ran").exists()
    assert not (tmp_path / "out").exists() or not steps_in(tmp_path / "out")


def test_a_flipped_byte_is_read_or_refused(published: tuple[Any, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(published[1] / "bin", tmp_path / "folder")
    file = folder / "pytorch_model-00001-of-00002.bin"
    content = file.read_bytes()
    refused = 0
    for i in range(0, content.index(b"/data/0"), 5):  # the list of tensors, a pickle, comes first
        file.write_bytes(content[:i] + bytes([content[i] ^ 0x15]) + content[i + 1 :])
        try:
            open_source(str(folder))
        except UsageError:
            refused += 1
    assert refused > 50


def test_weights_of_parameters_that_were_trained_are_read(published: tuple[Any, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(published[1] / "bin", tmp_path / "folder")
    for file in folder.glob("*.bin"):
        torch.save({name: torch.nn.Parameter(tensor) for name, tensor in torch.load(file).items()}, file)
    import_weights(str(folder), str(tmp_path / "out"))
    _same_logits(published[0], open_checkpoint(str(tmp_path / "out")))
