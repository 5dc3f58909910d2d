"""Makes the golden checkpoints and logits with transformers: python tests/golden/make.py (needs the torch extra).

Each folder is what `save_pretrained` writes, in bfloat16 to stay small, and golden.npz: token ids, transformers'
logits in float64, and the largest difference of its own float32 logits from them, which sets the tolerance.
"""

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

HERE = Path(__file__).parent
SHAPE = dict(
    vocab_size=320,
    hidden_size=48,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
)


def make(name: str, model: transformers.PreTrainedModel, length: int) -> None:
    """Writes one folder."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.15)
    model.to(torch.bfloat16).save_pretrained(HERE / name)
    # Loaded afresh: a cast to bfloat16 rounds the rotary frequencies too, and no cast brings them back.
    model = type(model).from_pretrained(HERE / name, dtype=torch.float32).eval()
    tokens = torch.randint(0, SHAPE["vocab_size"], (2, length))
    with torch.no_grad():
        narrow = model(tokens).logits.numpy()
        wide = model.double()(tokens).logits.numpy()
    np.savez(
        HERE / name / "golden.npz",
        tokens=tokens.numpy(),
        logits=wide,
        float32_error=np.abs(narrow - wide).max(),
    )
    print(name, "largest logit", np.abs(wide).max(), "float32 error", np.abs(narrow - wide).max())


if __name__ == "__main__":
    make("llama_gqa", LlamaForCausalLM(LlamaConfig(**SHAPE, rms_norm_eps=1e-5)).eval(), length=40)
    window = MistralConfig(
        **SHAPE,
        rms_norm_eps=1e-5,
        sliding_window=16,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    make("mistral_window", MistralForCausalLM(window).eval(), length=40)
