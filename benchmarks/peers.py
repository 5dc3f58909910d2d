"""One training step, twice: ours, and that of PyTorch with transformers. Same weights, batch, optimizer and dtype."""

import dataclasses
import os
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from benchmarks.worker import anonymous_memory
from data_pipeline.loader import Batch
from mathscale_jax.config import ComputeSettings, MeshSettings, ModelConfig, OptimizerSettings
from mathscale_jax.convert.configs import model_config_to_hf
from mathscale_jax.convert.mapping import Leaf, leaves

OPTIMIZER = OptimizerSettings()  # AdamW and gradient clipping as a run has them, at a constant learning rate


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Steps done one after another: their wall time and CPU time in seconds, and the loss of each."""

    seconds: float
    cpu_seconds: float
    losses: list[float]


class Peer(Protocol):
    """What a contestant's process holds."""

    def run(self, num_steps: int) -> Measurement:
        """Trains, from wherever it stands."""

    def describe(self) -> dict[str, Any]:
        """device, num_devices, peak_flops a device (None where not known)."""

    def peak_memory(self) -> int | None:
        """Bytes a device needs at most, in a step: on a CPU, by how much this process grew for it."""


def initial_weights(config: ModelConfig) -> Iterator[tuple[Leaf, np.ndarray]]:
    """Random float32 weights that depend on the architecture alone, one of our stacked parameters at a time."""
    for number, leaf in enumerate(leaves(config)):
        if leaf.path[-1] == "scale":
            yield leaf, np.ones(leaf.spec.shape, np.float32)
        else:
            rng = np.random.default_rng(number)
            yield leaf, rng.standard_normal(leaf.spec.shape, np.float32) * np.float32(0.02)


def _repeated(batch: Batch, times: int) -> Batch:
    """The rows of a batch `times` over, for as many devices: the mean loss stays what it is."""
    return Batch(
        tokens=np.tile(batch["tokens"], (times, 1)),
        targets=np.tile(batch["targets"], (times, 1)),
        loss_mask=np.tile(batch["loss_mask"], (times, 1)),
        segment_ids=np.tile(batch["segment_ids"], (times, 1)),
        positions=np.tile(batch["positions"], (times, 1)),
    )


class JaxPeer:
    """Our step over all devices; each device has the rows of `batches`."""

    def __init__(self, config: ModelConfig, compute: ComputeSettings, batches: list[Batch], same_weights: bool):
        import jax
        import jax.numpy as jnp

        from mathscale_jax import model
        from mathscale_jax.mesh import make_mesh
        from mathscale_jax.optimizer import make_optimizer
        from mathscale_jax.step import init_state, make_train_step, param_shardings, state_shardings, to_devices

        self._jax = jax
        self._mesh = make_mesh(MeshSettings())
        self._before = anonymous_memory()
        shardings = param_shardings(config, self._mesh)
        if same_weights:
            params: Any = {}
            for leaf, values in initial_weights(config):
                node, sharding = params, shardings
                for key in leaf.path:
                    parent, node, sharding = node, node.setdefault(key, {}), sharding[key]
                parent[leaf.path[-1]] = jax.device_put(values, sharding)
        else:  # what the weights are does not change the speed; made where they lie
            params = jax.jit(lambda: model.init(config, 0), out_shardings=shardings)()

        def schedule(step: Any) -> Any:
            return jnp.float32(OPTIMIZER.learning_rate)

        optimizer = make_optimizer(OPTIMIZER, schedule)
        all_shardings = state_shardings(shardings, optimizer, self._mesh)
        self._state = init_state(params, optimizer, all_shardings)
        self._step = make_train_step(config, compute, optimizer, schedule, all_shardings, self._mesh, 1)
        self._batches = [to_devices(_repeated(batch, jax.device_count()), self._mesh) for batch in batches]
        self._done = 0

    def run(self, num_steps: int) -> Measurement:
        """See Peer."""
        started, cpu_started = time.perf_counter(), time.process_time()
        losses = []
        with self._jax.set_mesh(self._mesh):
            for _ in range(num_steps):
                self._state, metrics = self._step(self._state, self._batches[self._done % len(self._batches)])
                losses.append(metrics["loss"])
                self._done += 1
        self._jax.block_until_ready(self._state)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        return Measurement(seconds, cpu_seconds, [float(loss) for loss in losses])

    def describe(self) -> dict[str, Any]:
        """See Peer."""
        from mathscale_jax.telemetry import peak_flops_per_device

        device = self._jax.devices()[0]
        return {
            "device": device.device_kind,
            "num_devices": self._jax.device_count(),
            "peak_flops": peak_flops_per_device(),
        }

    def peak_memory(self) -> int | None:
        """See Peer."""
        statistics = self._jax.local_devices()[0].memory_stats()
        if statistics is not None:
            return statistics.get("peak_bytes_in_use")
        return _growth_in_a_step(self, self._before)


class TorchPeer:
    """The same step as PyTorch does it: LlamaForCausalLM with its fused attention, fused AdamW, on one device.

    In bfloat16 the weights stay float32 and autocast narrows them. `recompute` is transformers' gradient
    checkpointing of every block.
    """

    def __init__(self, config: ModelConfig, dtype: str, batches: list[Batch], compiled: bool, recompute: bool):
        import torch
        import transformers

        torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as XLA takes
        self._torch, self._dtype = torch, dtype
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._before = anonymous_memory()
        settings = transformers.AutoConfig.for_model(
            **{**model_config_to_hf(config, "float32"), "use_cache": False}, attn_implementation="sdpa"
        )
        with self._device:
            self._model = transformers.AutoModelForCausalLM.from_config(settings).train()
        tensors = dict(self._model.named_parameters())
        with torch.no_grad():
            for leaf, values in initial_weights(config):
                for name, part in zip(leaf.tensors, values if leaf.is_stacked else [values], strict=True):
                    tensor = np.empty(leaf.tensor_shape, np.float32)
                    leaf.to_tensor(part, tensor)
                    tensors[name].copy_(torch.from_numpy(tensor))
        if recompute:
            self._model.gradient_checkpointing_enable()
        self._forward = torch.compile(self._model) if compiled else self._model
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=OPTIMIZER.learning_rate,
            betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
            eps=OPTIMIZER.eps,
            weight_decay=OPTIMIZER.weight_decay,
            fused=True,
        )
        # Causal attention never looks to the right, where the padding is: no mask, which is torch's fastest.
        self._batches = [
            (
                torch.from_numpy(batch["tokens"]).long().to(self._device),
                torch.from_numpy(np.where(batch["loss_mask"], batch["targets"], -100)).long().to(self._device),
            )
            for batch in batches
        ]
        self._done = 0

    def run(self, num_steps: int) -> Measurement:
        """See Peer."""
        torch = self._torch
        started, cpu_started = time.perf_counter(), time.process_time()
        losses = []
        for _ in range(num_steps):
            tokens, targets = self._batches[self._done % len(self._batches)]
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._dtype == "bfloat16"):
                logits = self._forward(input_ids=tokens, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            del logits
            loss.backward()
            if OPTIMIZER.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(self._model.parameters(), OPTIMIZER.clip_norm)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            self._done += 1
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        return Measurement(seconds, cpu_seconds, [float(loss) for loss in losses])

    def describe(self) -> dict[str, Any]:
        """See Peer."""
        cuda = self._device.type == "cuda"
        return {"device": self._torch.cuda.get_device_name() if cuda else "cpu", "num_devices": 1, "peak_flops": None}

    def peak_memory(self) -> int | None:
        """See Peer."""
        if self._device.type == "cuda":
            return self._torch.cuda.max_memory_allocated()
        return _growth_in_a_step(self, self._before)


def _growth_in_a_step(peer: Peer, before: int) -> int | None:
    """The most memory this process had during a step beyond `before`, in bytes: read every 2 ms."""
    if not before:
        return None
    peak, ended = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.002):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    peer.run(1)
    ended.set()
    watcher.join()
    return peak - before
