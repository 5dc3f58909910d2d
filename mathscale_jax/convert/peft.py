"""Adapters as PEFT's files: adapter_config.json and adapter_model.safetensors, which peft loads over the base model."""

from pathlib import Path

import numpy as np
import safetensors.numpy

from data_pipeline.files import write_json
from mathscale_jax.checkpoint import Checkpoint
from mathscale_jax.config import LORA_TARGETS
from mathscale_jax.convert.mapping import HF


def write_adapter(folder: Path, checkpoint: Checkpoint, base_model: str) -> None:
    """Writes the adapter of a LoRA checkpoint, in float32. `base_model` is what peft is told it belongs to."""
    settings = checkpoint.meta.lora
    assert settings is not None
    adapter = checkpoint.restore_adapter()
    tensors: dict[str, np.ndarray] = {}
    for target in settings.targets:
        module, name = LORA_TARGETS[target]
        prefix = HF.names["blocks", module, name].removesuffix(".weight")
        low_rank = {part: np.asarray(array) for part, array in adapter[module][name].items()}
        for layer, (a, b) in enumerate(zip(low_rank["a"], low_rank["b"], strict=True)):
            stem = "base_model.model." + prefix.format(layer=layer)
            # torch's linear layers are [out, in]; contiguous, as safetensors writes memory as it lies.
            tensors[f"{stem}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, settings.rank).T)
            tensors[f"{stem}.lora_B.weight"] = np.ascontiguousarray(b.reshape(settings.rank, -1).T)
    # Not save_file, which makes a file that only its owner can read.
    content = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").write_bytes(content)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": list(settings.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", config)
