"""The one table between our parameters and the tensors of a Hugging Face LLaMA, used both ways.

A Hugging Face matrix is [out, in] with heads and head_dim flattened into one dimension; ours is [in, out] with
heads apart. Rotary embedding has the same layout in both, so nothing is permuted.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_pipeline.settings import UsageError, validated
from mathscale_jax.config import ModelConfig
from mathscale_jax.model import ParamSpec, param_specs

LeafPath = tuple[str, ...]

_IN_LAYERS = {
    ("attention_norm", "scale"): "input_layernorm.weight",
    ("attention", "query"): "self_attn.q_proj.weight",
    ("attention", "key"): "self_attn.k_proj.weight",
    ("attention", "value"): "self_attn.v_proj.weight",
    ("attention", "output"): "self_attn.o_proj.weight",
    ("mlp_norm", "scale"): "post_attention_layernorm.weight",
    ("mlp", "gate"): "mlp.gate_proj.weight",
    ("mlp", "up"): "mlp.up_proj.weight",
    ("mlp", "down"): "mlp.down_proj.weight",
}
TENSOR_NAMES: dict[LeafPath, str] = {
    ("embedding",): "model.embed_tokens.weight",
    **{("blocks", *path): f"model.layers.{{layer}}.{name}" for path, name in _IN_LAYERS.items()},
    ("norm", "scale"): "model.norm.weight",
    ("output",): "lm_head.weight",
}
# The embedding table is [vocab, embed] on both sides.
_NOT_TRANSPOSED = (("embedding",),)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One of our parameters, and the Hugging Face tensors it is made of: one per layer, or a single one."""

    path: LeafPath
    spec: ParamSpec
    tensors: tuple[str, ...]

    @property
    def is_stacked(self) -> bool:
        """Whether axis 0 counts layers."""
        return self.spec.axes[0] == "layers"

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """Shape of what one tensor fills."""
        return self.spec.shape[1:] if self.is_stacked else self.spec.shape

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each Hugging Face tensor."""
        if len(self.slice_shape) == 1 or self.path in _NOT_TRANSPOSED:
            return self.slice_shape
        rows, columns = self._matrix_shape
        return columns, rows

    def from_tensor(self, tensor: np.ndarray) -> np.ndarray:
        """A Hugging Face tensor as our slice."""
        if len(self.slice_shape) > 1 and self.path not in _NOT_TRANSPOSED:
            tensor = tensor.T
        return tensor.reshape(self.slice_shape)

    def to_tensor(self, ours: np.ndarray) -> np.ndarray:
        """Our slice as a Hugging Face tensor."""
        if len(self.slice_shape) == 1 or self.path in _NOT_TRANSPOSED:
            return ours
        return ours.reshape(self._matrix_shape).T

    @property
    def _matrix_shape(self) -> tuple[int, int]:
        # The residual stream is the first axis of what reads it and the last axis of what writes to it.
        axes = self.spec.axes[1:] if self.is_stacked else self.spec.axes
        size = int(np.prod(self.slice_shape))
        rows = self.slice_shape[0] if axes[0] == "embed" else size // self.slice_shape[-1]
        return rows, size // rows


def leaves(config: ModelConfig) -> Iterator[Leaf]:
    """All parameters of a model with the tensors they correspond to."""
    for path, name in TENSOR_NAMES.items():
        spec: Any = param_specs(config)
        for key in path:
            spec = spec[key]
        names = tuple(name.format(layer=i) for i in range(config.num_layers)) if "{layer}" in name else (name,)
        yield Leaf(path, spec, names)


# config.json of a Hugging Face folder, and ours: the same facts under two names.
_CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_context",
    "rms_norm_eps": "rms_norm_eps",
    "sliding_window": "sliding_window",
}
# What a config.json must say: transformers' defaults for these changed between versions.
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "max_context", "rms_norm_eps")
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}


def model_config_from_hf(tree: dict[str, Any], where: str) -> ModelConfig:
    """Our architecture from a config.json. Raises UsageError for what this model does not compute."""
    kind = tree.get("model_type")
    if kind not in _ARCHITECTURES:
        raise UsageError(f"{where}: model_type={kind!r} is not supported; allowed: {', '.join(_ARCHITECTURES)}")
    rope_key = "rope_parameters" if tree.get("rope_parameters") else "rope_scaling"
    rope = tree.get(rope_key) or {}
    if not isinstance(rope, dict):
        raise UsageError(f"{where}: {rope_key}={rope!r} must be a mapping")
    for key, unsupported in (
        ("tie_word_embeddings", bool(tree.get("tie_word_embeddings"))),
        ("attention_bias", bool(tree.get("attention_bias"))),
        ("mlp_bias", bool(tree.get("mlp_bias"))),
        ("hidden_act", tree.get("hidden_act", "silu") != "silu"),
        ("partial_rotary_factor", tree.get("partial_rotary_factor", 1) != 1),
        (rope_key, rope.get("rope_type", rope.get("type", "default")) != "default"),
    ):
        if unsupported:
            raise UsageError(
                f"{where}: {key}={tree.get(key)!r} is not supported: this model would compute something else"
            )
    ours = {our: tree[theirs] for theirs, our in _CONFIG_KEYS.items() if tree.get(theirs) is not None}
    missing = [theirs for theirs, our in _CONFIG_KEYS.items() if our in _REQUIRED and our not in ours]
    if missing:
        raise UsageError(f"{where} does not say the model's {', '.join(missing)}")
    if kind == "llama":
        ours.pop("sliding_window", None)  # transformers' LLaMA has no window, whatever its config says
    elif "sliding_window" not in tree:
        raise UsageError(f"{where} does not say the model's sliding_window (null for none)")
    ours["rope_theta"] = tree.get("rope_theta") or rope.get("rope_theta") or 10_000.0
    ours.setdefault("num_kv_heads", ours["num_heads"])
    if "head_dim" not in ours and all(isinstance(ours[k], int) and ours[k] > 0 for k in ("hidden_size", "num_heads")):
        ours["head_dim"] = ours["hidden_size"] // ours["num_heads"]
    return validated(ModelConfig, ours, where)


def model_config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """What a config.json says of the architecture, in the words that transformers and serving engines read."""
    kind = "llama" if config.sliding_window is None else "mistral"
    shape = {theirs: getattr(config, ours) for theirs, ours in _CONFIG_KEYS.items()}
    if kind == "llama":
        del shape["sliding_window"]
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        **shape,
        "rope_theta": config.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
