"""What is looked at while training: the loss on problems that are not trained on, and answers to a few of them."""

import hashlib
import json
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from data_pipeline.answers import extract, is_equal
from data_pipeline.cli import logger
from data_pipeline.files import write_json_lines
from data_pipeline.loader import Batches
from data_pipeline.settings import UsageError
from data_pipeline.sources import load_rows
from data_pipeline.tasks import get_task, read_problems
from data_pipeline.templates import Template
from data_pipeline.tokenizer import Tokenizer
from mathscale_jax import model
from mathscale_jax.config import ModelConfig, TrainSettings
from mathscale_jax.processes import from_primary, is_primary, rows_of_process
from mathscale_jax.sampler import Prompt, Sampler, SamplingSettings
from mathscale_jax.sampler.placement import memory_of
from mathscale_jax.step import SummedLoss, to_devices


class Validation:
    """The loss over every example of `settings.validation`, each counted once: sum of NLL / number of tokens."""

    def __init__(self, settings: TrainSettings, tokenizer: Tokenizer, template: Template, mesh: Mesh):
        assert settings.validation is not None
        data = settings.data.model_copy(update={"sources": settings.validation.sources})
        self._every = settings.validation.every
        self._num_rows = settings.batch_size // settings.accumulation_steps
        self._mesh = mesh
        self._rows = load_rows(data, tokenizer, template)
        self._batches = Batches(
            self._rows,
            data,
            batch_size=self._num_rows,
            seed=0,
            num_epochs=1,
            rows_of_process=rows_of_process(mesh, self._num_rows),
        )

    @property
    def sha256(self) -> str:
        """Of the tokenised examples."""
        return self._rows.sha256

    def due(self, step: int) -> bool:
        """Whether it is this step's turn by the settings; checkpoints are validated besides."""
        return step % self._every == 0

    def loss(self, summed_loss: SummedLoss, trained: Any, frozen: Any = None) -> float:
        """The mean NLL of a token in nats, under the weights of a training state. Call it inside `jax.set_mesh`."""
        total, tokens = 0.0, 0
        for step in range(len(self._batches)):
            on_devices = to_devices(self._batches[step], self._mesh, self._num_rows)
            nll, count = jax.device_get(summed_loss(trained, frozen, on_devices))
            total, tokens = total + float(nll), tokens + int(count)
        return total / tokens


class LoopSampling:
    """Answers to the first problems of a dataset, drawn with the weights of a training state on its mesh.

    The texts of a step are samples/step-<n>.jsonl in the run's folder.
    """

    def __init__(self, settings: TrainSettings, config: ModelConfig, tokenizer: Tokenizer, template: Template):
        assert settings.samples is not None
        wanted, source = settings.samples, settings.samples.source
        self._config, self._tokenizer, self._dtype = config, tokenizer, settings.compute.dtype
        self._folder, self._every = epath.Path(settings.output_dir) / "samples", wanted.every
        self._kind = get_task(source.task).graded_as
        self._problems = read_problems(source.task, source.split, source.path)[: wanted.num_problems]
        self._prompts = [
            Prompt(problem.id, tokenizer.encode_prompt(template.render_prompt(problem.question)))
            for problem in self._problems
        ]
        self._sampling = SamplingSettings(
            num_samples=wanted.num_samples, temperature=wanted.temperature, max_tokens=wanted.max_tokens
        )
        for prompt in self._prompts:
            if len(prompt.tokens) >= config.max_context:
                raise UsageError(
                    f"samples.source: problem {prompt.problem_id!r} has a prompt of {len(prompt.tokens)} tokens, the "
                    f"model's context is {config.max_context}; name another dataset"
                )

    @property
    def sha256(self) -> str:
        """Of the problems and their tokenised prompts."""
        told = [
            [problem.id, problem.answer, prompt.tokens]
            for problem, prompt in zip(self._problems, self._prompts, strict=True)
        ]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def due(self, step: int) -> bool:
        """Whether it is this step's turn by the settings."""
        return step % self._every == 0

    def answer(self, step: int, params: model.Params) -> float | None:
        """Draws, writes the texts, and returns the share of right answers. Call it inside `jax.set_mesh`.

        None, and a warning, where a copy of the weights and the caches find no room beside the training state.
        """
        sampler = Sampler(
            self._config,
            params,
            eos_id=self._tokenizer.eos_id,
            num_pieces=self._tokenizer.vocab_size,
            text=self._tokenizer.decode,
            dtype=self._dtype,
            memory=from_primary(memory_of(jax.local_devices()[0])),  # one number for all: they compile the same
        )
        try:
            every = sampler.sample(self._prompts, self._sampling)
        except UsageError as error:
            logger.warning("step %d: no samples: %s", step, error)
            return None
        rows = []
        for problem, drawn in zip(self._problems, every, strict=True):
            for sample_id, tokens in enumerate(drawn.tokens):
                text = self._tokenizer.decode(tokens.tolist())
                answer = extract(text, self._kind).answer
                right = answer is not None and bool(is_equal(answer, problem.answer, self._kind))
                told = {"problem_id": problem.id, "sample_id": sample_id, "question": problem.question}
                rows.append({**told, "text": text, "answer": answer, "gold": problem.answer, "correct": right})
        accuracy = float(np.mean([row["correct"] for row in rows]))
        if is_primary():
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json_lines(self._folder / f"step-{step}.jsonl", rows)
        logger.info("step %d: %.0f %% of %d sampled answers are right", step, 100 * accuracy, len(rows))
        return accuracy
