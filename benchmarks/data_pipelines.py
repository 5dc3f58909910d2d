"""The contestants of benchmarks.data: from a file of rows to the batches of an epoch, each in a process of its own.

    python -m benchmarks.data_pipelines '{"contestant": "ours", ...}'

prints what it measured as one line of JSON. What is imported, and threads that libraries start, come before the clock.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pydantic

from data_pipeline.settings import Settings
from data_pipeline.templates import Template


class Work(Settings):
    """What a contestant is to do, and with how many cores."""

    contestant: Literal["ours", "ours, mixed", "trl", "trl, as tensors"]
    source: str  # rows of the task jsonl
    second: str  # the other dataset of a mixture
    tokenizer: str  # folder with tokenizer.model and tokenizer.json
    cache: str  # folder that is empty, or has what an earlier run of the same contestant left in it
    context: int
    rows: int  # of a batch
    cores: int


class Made(Settings):
    """What came out. Tokens are positions that hold an example, trained ones those that the loss is taken on."""

    first_seconds: float  # from the files to the first batch
    seconds: float  # of all other batches of the epoch
    first_tokens: int  # in the first batch
    tokens: int  # in all
    trained: int
    bins: int

    @property
    def rate(self) -> float:
        """Tokens a second, once the first batch is there."""
        return (self.tokens - self.first_tokens) / self.seconds


def _ours(work: Work) -> Iterator[tuple[int, int, int]]:
    """Of each batch: tokens, trained tokens, rows."""
    import numpy as np

    from data_pipeline.loader import Batches, iterate
    from data_pipeline.sources import DataSettings, load_epoch
    from data_pipeline.tokenizer import Tokenizer

    sources: list[dict[str, Any]] = [{"task": "jsonl", "path": work.source}]
    if work.contestant == "ours, mixed":
        sources[0] |= {"weight": 3, "resample": {"power": 1.0}}
        sources.append({"task": "jsonl", "path": work.second, "weight": 1})
    settings = DataSettings.model_validate({"sources": sources, "context": work.context, "cache_dir": work.cache})
    yield 0, 0, 0  # everything is imported
    epoch = load_epoch(settings, Tokenizer.load(f"{work.tokenizer}/tokenizer.model"), Template())
    batches = Batches(epoch.rows, settings, batch_size=work.rows, seed=0, num_epochs=1)
    with contextlib.closing(iterate(batches, 0, settings.prefetch)) as made:
        for batch in made:
            segments = batch["segment_ids"]
            rows = int((segments[:, 0] > 0).sum())
            yield int(np.count_nonzero(segments)), int(np.count_nonzero(batch["loss_mask"])), rows


def _trl(work: Work) -> Iterator[tuple[int, int, int]]:
    """Tokenised and packed as TRL's SFTTrainer does with `packing=True`, whose collator makes the batches."""
    os.environ |= {"HF_HOME": work.cache, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import datasets
    import torch
    from transformers import AutoTokenizer
    from trl import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    datasets.disable_progress_bars()
    torch.set_num_threads(work.cores)
    processes = {"num_proc": work.cores} if work.cores > 1 else {}
    tokenizer = AutoTokenizer.from_pretrained(work.tokenizer)
    template = Template()

    def tokenized(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        prompts = tokenizer([template.render_prompt(q) for q in rows["question"]], add_special_tokens=False)
        texts = map(template.render_response, rows["solution"], rows["answer"])
        responses = tokenizer(list(texts), add_special_tokens=False)
        ids: list[list[int]] = []
        labels: list[list[int]] = []
        for prompt, response in zip(prompts["input_ids"], responses["input_ids"], strict=True):
            ids.append([tokenizer.bos_token_id, *prompt, *response, tokenizer.eos_token_id])
            labels.append([-100] * (1 + len(prompt)) + ids[-1][1 + len(prompt) :])
        return {"input_ids": ids, "labels": labels}

    yield 0, 0, 0
    rows = datasets.load_dataset("json", data_files=work.source, split="train")
    # Names for what is made, as hashes of a tokenizer are not always the same in the next process.
    name = Path(work.source).stem
    made = rows.map(
        tokenized, batched=True, remove_columns=rows.column_names, new_fingerprint=f"{name}-tokens", **processes
    )
    packed = pack_dataset(made, work.context, "bfd", {"new_fingerprint": f"{name}-packed", **processes})
    if work.contestant == "trl, as tensors":
        packed = packed.with_format("torch")
    loader = torch.utils.data.DataLoader(
        packed,
        batch_size=work.rows,
        shuffle=True,
        collate_fn=DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True),
        num_workers=0 if work.cores == 1 else work.cores,
    )
    for batch in loader:
        starts = int((batch["position_ids"] == 0).sum())  # an example of n tokens is n - 1 positions of ours
        yield batch["input_ids"].numel() - starts, int((batch["labels"] != -100).sum()), work.rows


CONTESTANTS: dict[str, Callable[[Work], Iterator[tuple[int, int, int]]]] = {
    "ours": _ours, "ours, mixed": _ours, "trl": _trl, "trl, as tensors": _trl,
}  # fmt: skip


def run(work: Work) -> Made:
    """Makes the batches of an epoch, and throws them away."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: work.cores])
    batches = CONTESTANTS[work.contestant](work)
    next(batches)
    started = time.perf_counter()
    first_tokens, trained, bins = next(batches)
    ready = time.perf_counter()
    tokens = first_tokens
    for more, more_trained, more_bins in batches:
        tokens, trained, bins = tokens + more, trained + more_trained, bins + more_bins
    ended = time.perf_counter()
    return Made(
        first_seconds=ready - started,
        seconds=ended - ready,
        first_tokens=first_tokens,
        tokens=tokens,
        trained=trained,
        bins=bins,
    )


if __name__ == "__main__":
    try:
        print(run(Work.model_validate_json(sys.argv[1])).model_dump_json(), flush=True)
    except pydantic.ValidationError as error:
        sys.exit(str(error))
