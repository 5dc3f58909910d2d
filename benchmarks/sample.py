"""python -m benchmarks.sample: useful tokens a second when many samples of each problem are drawn.

    python -m benchmarks.sample --checkpoint runs/small --source gsm8k_test.jsonl.gz --dtype float32 --peers true
    python -m benchmarks.sample --preset llama2-7b --num-problems 16

All draw the same number of samples of the same prompts, one contestant after the other, in several rounds, each in a
process of its own. Useful tokens are those up to and including EOS; their time holds prefill, drawing, and what the
host does, but nothing of what is compiled or loaded: each contestant has drawn all of it once before.

The weights are a checkpoint's, with problems of GSM8K; or random ones of a preset's shape, with random prompts, that
end a response after `mean_length` tokens on average, each token with the same chance: speed depends on nothing else.
With peers (a checkpoint's only; they need the extra torch): transformers' generate with num_return_sequences, and
ctranslate2, where it is installed.
"""

import os
import statistics
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic

from benchmarks import samplers
from benchmarks.flags import settings_and_command
from benchmarks.report import environment, table, write_results
from benchmarks.samplers import Drawn, Work
from benchmarks.worker import Limits, Worker, WorkerFailed
from data_pipeline.cli import logger, run_command
from data_pipeline.settings import Settings, UsageError
from data_pipeline.tasks import read_problems
from mathscale_jax.checkpoint import open_checkpoint
from mathscale_jax.config import ModelConfig


class SampleBenchmark(Settings):
    """What is measured."""

    checkpoint: str | None = pydantic.Field(None, description="weights to draw from, with --source")
    source: str | None = pydantic.Field(None, description="file of GSM8K's problems; the first ones are taken")
    preset: str | None = pydantic.Field(None, description="or: random weights of this architecture")
    prompt_length: pydantic.PositiveInt = pydantic.Field(150, description="tokens of the random prompts")
    mean_length: pydantic.PositiveFloat = pydantic.Field(150, description="tokens of the responses of random weights")
    num_problems: pydantic.PositiveInt = pydantic.Field(4, description="problems")
    num_samples: pydantic.PositiveInt = pydantic.Field(256, description="samples a problem")
    temperature: pydantic.PositiveFloat = pydantic.Field(0.7, description="of the draws")
    max_tokens: pydantic.PositiveInt = pydantic.Field(512, description="longest response")
    dtype: Literal["bfloat16", "float32"] = pydantic.Field("bfloat16", description="of weights, activations, caches")
    kv_cache: Literal["int8"] | None = pydantic.Field(None, description="dtype of our caches")
    rows: pydantic.PositiveInt = pydantic.Field(256, description="samples that ours decodes at once")
    plain: bool = pydantic.Field(True, description="measure ours without shared prompts and packing, too")
    peers: bool = pydantic.Field(False, description="measure transformers and ctranslate2, too")
    rounds: pydantic.PositiveInt = pydantic.Field(3, description="times that each draws everything; medians are shown")
    threads: pydantic.PositiveInt | None = pydantic.Field(None, description="threads of the peers on a CPU")
    time_limit: pydantic.PositiveFloat = pydantic.Field(1800, description="seconds for one contestant's round")
    out: str | None = pydantic.Field(None, description="folder for the results as Markdown and JSON")

    @pydantic.model_validator(mode="after")
    def _weights_from_one_place(self) -> "SampleBenchmark":
        if (self.checkpoint is None) == (self.preset is None) or (self.checkpoint is None) != (self.source is None):
            raise ValueError("give a checkpoint with source, or preset")
        if self.peers and self.checkpoint is None:
            raise ValueError("peers=true: they draw from a checkpoint")
        return self


def benchmark(settings: SampleBenchmark, command: str) -> None:
    """Measures, prints, and writes the results."""
    load = os.getloadavg()[0]
    work, weights = _work(settings)
    limits = Limits(settings.time_limit, None, {})
    with tempfile.TemporaryDirectory() as folder:
        contestants = _contestants(settings, work, weights, Path(folder))
        drawn: dict[str, list[Drawn]] = {name: [] for name in contestants}
        told: dict[str, str] = {}
        where: dict[str, Any] = {"device": "cpu"}
        for name, (factory, arguments) in contestants.items():
            logger.info("%s: loading, and drawing everything once", name)
            try:
                with Worker(factory, arguments, limits) as worker:
                    worker.call("run", 0)
                    for seed in range(1, settings.rounds + 1):
                        drawn[name].append(worker.call("run", seed))
                        logger.info("%s: %.0f useful tokens/s", name, samplers.speed(drawn[name][-1]))
                    if name == "ours":
                        where = worker.call("describe")
            except WorkerFailed as failure:
                told[name] = str(failure)
                logger.warning("%s: %s", name, failure)
    rows = [_row(name, of, drawn["ours"], told.get(name)) for name, of in drawn.items()]
    header = ["", "useful tokens/s", "ours is faster by", "seconds", "tokens a response: mean, longest"]
    config = weights if isinstance(weights, ModelConfig) else open_checkpoint(weights).meta.model
    of_bound = _of_bound(settings, work, config, where, drawn["ours"])
    body = f"{_described(settings, work)}\n\n{table(header, rows)}{of_bound}"
    print(body, flush=True)
    if settings.out is not None:
        subject = f"sample-{Path(settings.checkpoint).name if settings.checkpoint else settings.preset}"
        values = {
            "settings": settings.model_dump(exclude={"out"}),
            "measured": {
                name: {
                    "seconds": [d.seconds for d in of],
                    "tokens": [sum(d.lengths) for d in of],
                    "failed": told.get(name),
                }
                for name, of in drawn.items()
            },
        }
        logger.info(
            "wrote %s", write_results(settings.out, subject, environment(where["device"], load), command, body, values)
        )


def _work(settings: SampleBenchmark) -> tuple[Work, str | ModelConfig]:
    weights: str | ModelConfig
    if settings.checkpoint is not None:
        weights = settings.checkpoint
        problems = read_problems("gsm8k", "test", settings.source)[: settings.num_problems]
        prompts = samplers.prompts_of_problems(settings.checkpoint, [problem.question for problem in problems])
    else:
        weights = ModelConfig.model_validate({"preset": settings.preset})
        rng = np.random.default_rng(0)
        shape = settings.num_problems, settings.prompt_length
        prompts = tuple(map(tuple, rng.integers(3, weights.vocab_size, shape).tolist()))
    if not prompts:
        raise UsageError(f"source={settings.source}: no problems")
    return Work(prompts, settings.num_samples, settings.temperature, settings.max_tokens), weights


def _contestants(
    settings: SampleBenchmark, work: Work, weights: str | ModelConfig, folder: Path
) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    own = (weights, work, settings.dtype, settings.rows, settings.mean_length, settings.kv_cache)
    contestants: dict[str, tuple[Any, tuple[Any, ...]]] = {"ours": (samplers.Ours, own)}
    if settings.plain:
        contestants["ours, prompts not shared, rows not packed"] = (samplers.Plain, own)
    if settings.peers:
        assert isinstance(weights, str)
        theirs = (samplers.export_for_peers(weights, folder), work, settings.dtype, settings.threads)
        contestants["transformers generate"] = (samplers.Transformers, theirs)
        if find_spec("ctranslate2"):
            contestants["ctranslate2"] = (samplers.CTranslate2, theirs)
    return contestants


def _row(name: str, of: list[Drawn], ours: list[Drawn], failure: str | None) -> list[str]:
    if not of:
        return [name, failure or "not measured", "", "", ""]
    speeds = sorted(map(samplers.speed, of))
    ratios = sorted(samplers.speed(a) / samplers.speed(b) for a, b in zip(ours, of, strict=False))
    lengths = [length for drawn in of for length in drawn.lengths]
    return [
        name,
        f"{statistics.median(speeds):,.0f} ({speeds[0]:,.0f} to {speeds[-1]:,.0f})",
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})" if ratios else "",
        f"{statistics.median(drawn.seconds for drawn in of):.1f}",
        f"{np.mean(lengths):.0f}, {max(lengths)}",
    ]


def _of_bound(
    settings: SampleBenchmark, work: Work, config: ModelConfig, where: dict[str, Any], of: list[Drawn]
) -> str:
    mean_prompt = float(np.mean([len(prompt) for prompt in work.prompts]))
    lengths = of[0].lengths if of else []
    bound = samplers.bound(config, where, settings.kv_cache, mean_prompt, lengths, settings.rows) if lengths else None
    if bound is None:
        return ""
    reached = 100 * statistics.median(map(samplers.speed, of)) / bound
    return f"\n\nWith every row always busy the devices' bound is {bound:,.0f} useful tokens/s; {reached:.0f} % of it."


def _described(settings: SampleBenchmark, work: Work) -> str:
    lengths = [len(prompt) for prompt in work.prompts]
    return (
        f"{len(work.prompts)} problems x {work.num_samples} samples at temperature {work.temperature:g}, prompts of "
        f"{min(lengths)} to {max(lengths)} tokens, responses of at most {work.max_tokens}; {settings.dtype}"
        + (", our caches in int8" if settings.kv_cache else "")
    )


def _main(argv: Sequence[str] | None) -> None:
    benchmark(*settings_and_command("benchmarks.sample", __doc__, SampleBenchmark, argv))


if __name__ == "__main__":
    run_command(_main)
