"""A model's architecture as config.json (Hugging Face) and params.json (Meta) say it, and as we do."""

from collections.abc import Mapping
from typing import Any

from data_pipeline.cli import logger
from data_pipeline.settings import UsageError, validated
from mathscale_jax.config import ModelConfig

# The same facts under two names.
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
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
        raise UsageError(f"{where}: model_type={kind!r} is not supported; allowed: {', '.join(_ARCHITECTURES)}")
    ropes = {key: tree[key] for key in ("rope_parameters", "rope_scaling") if tree.get(key)}
    for key, rope in ropes.items():
        if not isinstance(rope, dict):
            raise UsageError(f"{where}: {key}={rope!r} must be a mapping")
    for key, unsupported in (
        ("quantization_config", bool(tree.get("quantization_config"))),
        ("tie_word_embeddings", bool(tree.get("tie_word_embeddings"))),
        ("attention_bias", bool(tree.get("attention_bias"))),
        ("mlp_bias", bool(tree.get("mlp_bias"))),
        ("hidden_act", tree.get("hidden_act", "silu") != "silu"),
        ("partial_rotary_factor", tree.get("partial_rotary_factor", 1) != 1),
        *((key, rope.get("rope_type", rope.get("type", "default")) != "default") for key, rope in ropes.items()),
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
    bases = {"rope_theta": tree.get("rope_theta")}
    bases |= {f"{key}.rope_theta": rope.get("rope_theta") for key, rope in ropes.items()}
    bases = {key: base for key, base in bases.items() if base}
    if len(set(bases.values())) > 1:
        told = " and ".join(f"{key}={base!r}" for key, base in bases.items())
        raise UsageError(f"{where}: {told} differ: remove what is wrong")
    ours["rope_theta"] = next(iter(bases.values()), 10_000.0)
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


# A params.json does not say the context: that of the models it was written for, by RoPE base and by having a window.
_META_CONTEXTS = {
    (1e4, False): (4096, "LLaMA-2"),
    (1e6, False): (16_384, "Code Llama"),
    (1e4, True): (32_768, "Mistral 7B"),
}
# What it may say beside those read below: of these the shapes of the weights, or the program that runs them, know.
_META_KEYS = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "norm_eps", "rope_theta", "sliding_window"),
    *("hidden_dim", "multiple_of", "ffn_dim_multiplier", "vocab_size", "max_seq_len", "max_batch_size"),
}


def model_config_from_meta(
    tree: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str, max_context: int | None
) -> ModelConfig:
    """Our architecture from a params.json, Meta's or Mistral's, and the shapes of the whole tensors.

    Raises UsageError for what it does not say, or what this model does not compute.
    """
    for key, value in tree.items():
        if key not in _META_KEYS and value:
            raise UsageError(f"{where}: {key}={value!r} is not supported: it may change what the model computes")
    for key, value in tree.items():
        if key in ("dim", "n_heads", "head_dim", "rope_theta") and not (isinstance(value, int | float) and value > 0):
            raise UsageError(f"{where}: {key}={value!r} must be a positive number")
    missing = [key for key in ("dim", "n_layers", "n_heads", "norm_eps") if key not in tree]
    if missing:
        raise UsageError(f"{where} does not say the model's {', '.join(missing)}")
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in shapes:
            raise UsageError(f"{where}: tensors of the model are missing, first {name}")
    theta = float(tree.get("rope_theta") or 10_000.0)
    window = tree.get("sliding_window")
    if max_context is None:
        if (theta, window is not None) not in _META_CONTEXTS:
            raise UsageError(
                f"{where} does not say the model's context, nor does rope_theta={theta:g}: give --max-context"
            )
        max_context, family = _META_CONTEXTS[theta, window is not None]
        logger.info("%s does not say the context: %d, as of %s (else: --max-context)", where, max_context, family)
    return validated(
        ModelConfig,
        {
            "vocab_size": shapes["tok_embeddings.weight"][0],
            "hidden_size": tree["dim"],
            "intermediate_size": shapes["layers.0.feed_forward.w1.weight"][0],
            "num_layers": tree["n_layers"],
            "num_heads": tree["n_heads"],
            "num_kv_heads": tree.get("n_kv_heads") or tree["n_heads"],
            "head_dim": tree.get("head_dim") or tree["dim"] // tree["n_heads"],
            "max_context": max_context,
            "rms_norm_eps": tree["norm_eps"],
            "rope_theta": theta,
            "sliding_window": window,
        },
        where,
    )
