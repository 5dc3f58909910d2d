"""The settings of a training run, and the architectures it knows."""

from typing import Any, Literal

import pydantic

from data_pipeline.settings import Settings, differences
from data_pipeline.sources import DataSettings, Source

AttentionBackend = Literal["auto", "xla", "splash", "cudnn", "pallas"]


class ModelConfig(Settings):
    """A LLaMA-family architecture. Travels with every checkpoint."""

    vocab_size: pydantic.PositiveInt = pydantic.Field(description="rows of the embedding table")
    hidden_size: pydantic.PositiveInt = pydantic.Field(description="width of the residual stream")
    intermediate_size: pydantic.PositiveInt = pydantic.Field(description="width of the SwiGLU layer")
    num_layers: pydantic.PositiveInt = pydantic.Field(description="decoder blocks")
    num_heads: pydantic.PositiveInt = pydantic.Field(description="query heads")
    num_kv_heads: pydantic.PositiveInt = pydantic.Field(description="key and value heads")
    head_dim: pydantic.PositiveInt = pydantic.Field(description="width of a head, even")
    max_context: pydantic.PositiveInt = pydantic.Field(description="longest sequence the model was made for")
    rope_theta: pydantic.PositiveFloat = pydantic.Field(10_000.0, description="base of the rotary embedding")
    rms_norm_eps: pydantic.PositiveFloat = pydantic.Field(1e-5, description="epsilon of RMSNorm")
    sliding_window: pydantic.PositiveInt | None = pydantic.Field(
        None, description="a token attends to this many positions up to its own; null: to all"
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _from_preset(cls, value: Any) -> Any:
        if isinstance(value, dict) and "preset" in value:
            name = value["preset"]
            if name not in PRESETS:
                raise ValueError(f"preset={name!r} is unknown; allowed: {', '.join(PRESETS)}")
            return {**PRESETS[name], **{k: v for k, v in value.items() if k != "preset"}}
        return value

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embedding turns pairs")
        return self

    @property
    def num_parameters(self) -> int:
        """Weights, the embedding table and the output layer included."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        block = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return self.num_layers * block + (2 * self.vocab_size + 1) * self.hidden_size


def _llama(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int | None = None, **more: Any) -> dict[str, Any]:
    shape = dict(hidden_size=hidden, intermediate_size=mlp, num_layers=layers, num_heads=heads)
    defaults = dict(vocab_size=32_000, head_dim=hidden // heads, num_kv_heads=kv_heads or heads, max_context=4096)
    return {**shape, **defaults, **more}


# From the published config.json of each model.
PRESETS: dict[str, dict[str, Any]] = {
    "llama2-7b": _llama(4096, 11_008, 32, 32),
    "llama2-13b": _llama(5120, 13_824, 40, 40),
    "llama2-70b": _llama(8192, 28_672, 80, 64, 8),
    "mistral-7b": _llama(4096, 14_336, 32, 32, 8, max_context=32_768, sliding_window=4096),
    "llemma-7b": _llama(4096, 11_008, 32, 32, vocab_size=32_016),
    "open-llama-3b": _llama(3200, 8640, 26, 32, max_context=2048, rms_norm_eps=1e-6),
    "demo": _llama(96, 256, 3, 4, vocab_size=512, max_context=512),
}


class MeshSettings(Settings):
    """How many devices each mesh axis spans; their product is the number of devices."""

    data: int = pydantic.Field(1, description="replicas of the model; -1: all devices that are left")
    fsdp: int = pydantic.Field(-1, description="devices that share the parameters; -1: all that are left")
    tensor: int = pydantic.Field(1, description="devices that share heads and MLP width; -1: all that are left")

    @pydantic.model_validator(mode="after")
    def _sizes(self) -> "MeshSettings":
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{axis}={size} must be a positive number, or -1 for all that are left")
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ValueError(f"only one mesh axis may be -1, got {sizes}")
        return self


class ComputeSettings(Settings):
    """How the forward and backward pass are carried out; none of it changes what is computed."""

    dtype: Literal["bfloat16", "float32"] = pydantic.Field(
        "bfloat16", description="of weights and activations in the pass; master weights stay float32"
    )
    attention: AttentionBackend = pydantic.Field(
        "auto", description="auto: the fastest that can do it; xla: anywhere; splash: TPU; cudnn, pallas: GPU"
    )
    remat: Literal["none", "dots", "save-attention", "full"] = pydantic.Field(
        "full",
        description="what the backward pass recomputes: nothing, all but matrix products, all but attention, all",
    )
    scan_unroll: pydantic.PositiveInt = pydantic.Field(1, description="blocks unrolled in a turn of the layer scan")
    loss_chunk: pydantic.PositiveInt = pydantic.Field(
        256, description="positions of a row whose logits exist at a time; divides data.context"
    )


class OptimizerSettings(Settings):
    """AdamW with warmup and cosine. The paper gives learning rate, schedule and warmup; the other defaults are ours."""

    learning_rate: pydantic.PositiveFloat = pydantic.Field(2e-5, description="peak (paper: 2e-5, Mistral 2e-6)")
    warmup_fraction: float = pydantic.Field(0.04, ge=0, lt=1, description="share of the steps with linear warmup")
    final_fraction: float = pydantic.Field(0.0, ge=0, le=1, description="of the peak, at the end of the cosine")
    beta1: float = pydantic.Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = pydantic.Field(0.999, ge=0, lt=1, description="decay of the second moment")
    eps: pydantic.PositiveFloat = pydantic.Field(1e-8, description="added to the root of the second moment")
    weight_decay: pydantic.NonNegativeFloat = pydantic.Field(0.0, description="of matrices; norms have none")
    clip_norm: pydantic.PositiveFloat | None = pydantic.Field(1.0, description="largest gradient norm; null: none")
    state_dtype: Literal["float32", "bfloat16"] = pydantic.Field(
        "float32", description="of both moments; bfloat16 (rounded stochastically) saves 4 bytes a parameter"
    )


# The matrices of a block that LoRA may adapt, by the names PEFT and transformers give them.
LORA_TARGETS: dict[str, tuple[str, str]] = {
    "q_proj": ("attention", "query"),
    "k_proj": ("attention", "key"),
    "v_proj": ("attention", "value"),
    "o_proj": ("attention", "output"),
    "gate_proj": ("mlp", "gate"),
    "up_proj": ("mlp", "up"),
    "down_proj": ("mlp", "down"),
}


class LoraSettings(Settings):
    """Low-rank adaptation (arXiv 2106.09685): weights stay, W + alpha / rank * A B is what computes."""

    rank: pydantic.PositiveInt = pydantic.Field(8, description="inner width of A B")
    alpha: pydantic.PositiveFloat = pydantic.Field(16.0, description="A B is scaled by alpha / rank")
    dropout: float = pydantic.Field(0.0, ge=0, lt=1, description="share of A's inputs dropped in training")
    targets: tuple[str, ...] = pydantic.Field(
        ("q_proj", "v_proj"), description=f"matrices of every block that are adapted: {', '.join(LORA_TARGETS)}"
    )

    @pydantic.field_validator("targets")
    @classmethod
    def _known(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in targets if name not in LORA_TARGETS]
        if unknown or not targets:
            said = f"{', '.join(unknown)} match no matrix of the model" if unknown else "no matrix is named"
            raise ValueError(f"{said}; allowed: {', '.join(LORA_TARGETS)}")
        return tuple(name for name in LORA_TARGETS if name in targets)  # in one order, each once


class CheckpointSettings(Settings):
    """When the whole training state is saved."""

    every: pydantic.PositiveInt = pydantic.Field(500, description="steps between checkpoints; the last step has one")
    keep: pydantic.PositiveInt = pydantic.Field(2, description="newest checkpoints kept")
    keep_every: pydantic.PositiveInt | None = pydantic.Field(
        None, description="checkpoints of steps that are a multiple of this are kept for good"
    )
    keep_best: pydantic.NonNegativeInt = pydantic.Field(
        1, description="checkpoints of the lowest validation loss kept besides; needs validation"
    )


class ValidationSettings(Settings):
    """The loss on problems that are not trained on, over all of them, at every checkpoint and in between."""

    sources: tuple[Source, ...] = pydantic.Field(min_length=1, description="list of datasets, as in data.sources")
    every: pydantic.PositiveInt = pydantic.Field(500, description="steps between evaluations")


class LoopSamplingSettings(Settings):
    """A few problems answered while training: their texts, and how many answers are right."""

    source: Source = pydantic.Field(description="the dataset; its first problems are taken")
    every: pydantic.PositiveInt = pydantic.Field(500, description="steps between samplings")
    num_problems: pydantic.PositiveInt = pydantic.Field(8, description="problems answered")
    num_samples: pydantic.PositiveInt = pydantic.Field(4, description="samples a problem")
    temperature: pydantic.NonNegativeFloat = pydantic.Field(0.7, description="of the draws; 0: greedy")
    max_tokens: pydantic.PositiveInt = pydantic.Field(512, description="longest response")


class ProfileSettings(Settings):
    """A window of steps recorded for TensorBoard's or Perfetto's profile viewer, in OUTPUT_DIR/profile."""

    first_step: pydantic.PositiveInt = pydantic.Field(10, description="first step recorded (later than compilation)")
    num_steps: pydantic.PositiveInt = pydantic.Field(3, description="steps recorded")


class TrainSettings(Settings):
    """A training run."""

    output_dir: str = pydantic.Field(description="folder for config.yaml, metrics.jsonl and checkpoints/")
    seed: int = pydantic.Field(0, ge=0, lt=2**32, description="of initial weights and order of the data")
    model: ModelConfig | None = pydantic.Field(
        None, description="architecture: {preset: NAME} or its fields; null with init_from"
    )
    init_from: str | None = pydantic.Field(None, description="checkpoint whose weights the run starts from")
    data: DataSettings = pydantic.Field(description="what the model reads")
    mesh: MeshSettings = pydantic.Field(MeshSettings(), description="how devices share the work")
    compute: ComputeSettings = pydantic.Field(ComputeSettings(), description="how a step is computed")
    optimizer: OptimizerSettings = pydantic.Field(OptimizerSettings(), description="AdamW, warmup, cosine")
    checkpoint: CheckpointSettings = pydantic.Field(CheckpointSettings(), description="when state is saved")
    lora: LoraSettings | None = pydantic.Field(None, description="train an adapter of init_from; null: all weights")
    validation: ValidationSettings | None = pydantic.Field(None, description="loss on other data; null: none")
    samples: LoopSamplingSettings | None = pydantic.Field(None, description="problems answered; null: none")
    profile: ProfileSettings | None = pydantic.Field(None, description="steps to profile; null: none")
    tensorboard: bool = pydantic.Field(False, description="write the metrics to OUTPUT_DIR/tensorboard as well")
    watchdog_minutes: pydantic.PositiveFloat | None = pydantic.Field(
        30.0, description="print every thread's stack when no step ends for so long; null: never"
    )
    compiler_options: dict[str, str | bool | int] | None = pydantic.Field(
        None, description="XLA options of the training step; null: what mathscale_jax/chips.py has for the chip"
    )
    batch_size: pydantic.PositiveInt = pydantic.Field(description="rows of data.context tokens in an optimizer step")
    accumulation_steps: pydantic.PositiveInt = pydantic.Field(1, description="parts a batch is computed in")
    num_steps: pydantic.PositiveInt | None = pydantic.Field(None, description="optimizer steps; or give num_epochs")
    num_epochs: pydantic.PositiveInt | None = pydantic.Field(
        None, description="passes over the data (paper: 3); the last batch may not be full"
    )
    log_every: pydantic.PositiveInt = pydantic.Field(10, description="steps between lines of metrics.jsonl")

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "TrainSettings":
        if (self.model is None) == (self.init_from is None):
            raise ValueError("give one of model (train from scratch) and init_from (start from a checkpoint)")
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError("give one of num_steps and num_epochs")
        if self.lora is not None and self.init_from is None:
            raise ValueError("lora adapts trained weights: it needs init_from")
        if self.model is not None:
            if self.data.tokenizer is None:
                raise ValueError("data.tokenizer is required when training from scratch")
            self.check_context(self.model)
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of accumulation_steps={self.accumulation_steps}"
            )
        if self.data.context % self.compute.loss_chunk:
            raise ValueError(
                f"compute.loss_chunk={self.compute.loss_chunk} must divide data.context={self.data.context}"
            )
        return self

    def check_context(self, model: ModelConfig) -> None:
        """Raises ValueError where the rows are longer than the model was made for."""
        if self.data.context > model.max_context:
            raise ValueError(
                f"data.context={self.data.context} is longer than the model's max_context={model.max_context}"
            )


# Resuming a run may change these and nothing else: they alter neither the maths nor the data of a step, but for
# num_steps, which stretches the learning rate schedule from the restored step on. num_epochs may not change: the
# last batch of a run in epochs is filled up with empty rows, so going on from there would skip examples.
MAY_CHANGE_ON_RESUME = (
    "output_dir",
    "mesh",
    "checkpoint",
    "validation",
    "samples",
    "profile",
    "tensorboard",
    "watchdog_minutes",
    "log_every",
    "num_steps",
    "data.tokenizer",  # by name: what they hold is compared with what the run began with
    "data.template",
    "data.prefetch",
    "data.cache_dir",
    "compiler_options",
    "compute.attention",  # the same maths in another order of rounding
    "compute.remat",
    "compute.scan_unroll",
    "compute.loss_chunk",
)


def changes_that_forbid_resume(before: TrainSettings, now: TrainSettings) -> list[str]:
    """Lines "key: old -> new" for every change between two settings that resuming does not allow."""
    lines = differences(before.model_dump(mode="json"), now.model_dump(mode="json"))
    may_change = tuple(f"{key}{end}" for key in MAY_CHANGE_ON_RESUME for end in ":.")
    return [line for line in lines if not line.startswith(may_change)]
