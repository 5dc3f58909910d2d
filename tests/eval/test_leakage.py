"""Losses of sets against transformers-free arithmetic, and a model that has learnt one of them by heart."""

import json
from pathlib import Path

import numpy as np
import pytest
from small_run import train_here, write_config

from data_pipeline.word_problems import generate_problems
from eval.leakage import LeakageSettings, differences, leakage, summary


def write_rows(path: Path, problems: list) -> str:
    rows = [{"question": p.question, "solution": p.solution, "answer": p.answer} for p in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_differences_are_of_means_over_tokens() -> None:
    sums = {
        "test": np.array([[10.0, 5], [20.0, 10]]),  # 2 nats a token
        "new": np.array([[30.0, 15]]),  # 2
        "train": np.array([[5.0, 10], [10.0, 5]]),  # 1
    }
    told = differences(sums)
    assert {name: entry["value"] for name, entry in told["loss"].items()} == {"test": 2, "new": 2, "train": 1}
    assert told["d1"]["value"] == 0 and told["d2"]["value"] == 1
    assert told["d2"]["ci95"] == [0.0, 1.5]  # train is 0.5 or 2 where one batch is drawn twice
    assert "no sign" in summary(told)
    assert "may have been trained on it" in summary(differences({**sums, "new": np.array([[60.0, 15], [61.0, 15]])}))


@pytest.mark.slow
def test_a_test_set_that_was_trained_on_shows(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    problems = list(generate_problems(288, seed=77))
    files = {
        name: write_rows(tmp_path / f"{name}.jsonl", problems[96 * i : 96 * i + 96])
        for i, name in enumerate(("test", "new", "train"))
    }
    train_here(
        config,
        f"data.sources=[{{task: demo, path: {files['test']}}}, {{task: demo, path: {files['train']}}}]",
        "num_steps=150",
    )
    told = leakage(LeakageSettings(checkpoint=str(tmp_path / "run"), dtype="float32", batch_size=1, **files))
    assert told["num_examples"] == {"test": 96, "new": 96, "train": 96}
    assert told["d1"]["ci95"][1] < 0 and "may have been trained on it" in summary(told)
    clean = leakage(
        LeakageSettings(
            checkpoint=str(tmp_path / "run"), dtype="float32", batch_size=1, **{**files, "test": files["new"]}
        )
    )
    assert clean["d1"]["value"] == 0 and clean["d2"]["ci95"][0] > 0 and "no sign" in summary(clean)
