"""The commands of the README on real input: a checkpoint that transformers wrote, GSM8K, 256 samples, and back."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from small_run import run

from data_pipeline.tasks import read_problems

pytestmark = pytest.mark.torch

NUM_SAMPLES = 256
NUM_PROBLEMS = 4
STEPS = 6


def succeed(module: str, *arguments: str) -> str:
    result = run(module, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def folder(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where a checkpoint was imported, trained on GSM8K, sampled, graded and exported by the commands."""
    torch = pytest.importorskip("torch")
    import transformers

    folder = tmp_path_factory.mktemp("loop")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    shutil.copy(test_data / "mistral_v1_tokenizer.model", folder / "base" / "tokenizer.model")

    succeed("mathscale_jax.convert", "import", str(folder / "base"), str(folder / "imported"))
    settings = {
        "output_dir": str(folder / "run"),
        "init_from": str(folder / "imported"),
        "data": {
            "sources": [{"task": "gsm8k", "path": str(test_data / "gsm8k_train.jsonl.gz")}],
            "context": 512,
            "cache_dir": str(folder / "cache"),
        },
        "compute": {"dtype": "float32"},
        "optimizer": {"learning_rate": 3e-3},
        "batch_size": 4,
        "num_steps": STEPS,
        "log_every": 1,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    succeed("mathscale_jax.train", "--config", str(folder / "config.yaml"))
    test_rows = [
        "--task",
        "gsm8k",
        "--source",
        str(test_data / "gsm8k_test.jsonl.gz"),
        "--num-problems",
        str(NUM_PROBLEMS),
    ]
    drawing = ["--num-samples", str(NUM_SAMPLES), "--max-tokens", "48", "--dtype", "float32"]
    succeed(
        "eval",
        "run",
        "--checkpoint",
        str(folder / "run"),
        *test_rows,
        *drawing,
        "--out",
        str(folder / "eval"),
    )
    succeed("mathscale_jax.convert", "export", str(folder / "run"), str(folder / "exported"))
    return folder


def test_training_on_gsm8k_lowers_the_loss_from_that_of_a_uniform_guess(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[0]["loss"] == pytest.approx(np.log(32_000), abs=0.1)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert all(line["examples"] > 4 for line in lines)  # packed: several examples a row


def test_256_samples_of_each_problem_are_drawn_and_graded(folder: Path, test_data: Path) -> None:
    metrics = json.loads((folder / "eval" / "metrics.json").read_text())
    assert (
        metrics["complete"] is True
        and metrics["num_problems"] == NUM_PROBLEMS
        and metrics["num_samples"] == NUM_SAMPLES
    )
    assert set(metrics["pass_at"]) == {str(k) for k in range(1, NUM_SAMPLES + 1)}
    problems = read_problems("gsm8k", "test", str(test_data / "gsm8k_test.jsonl.gz"))[:NUM_PROBLEMS]
    parts = sorted((folder / "eval" / "samples").iterdir())
    rows = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    for index, problem in enumerate(problems):
        samples = rows[index * NUM_SAMPLES : (index + 1) * NUM_SAMPLES]
        assert [sample["sample_id"] for sample in samples] == list(range(NUM_SAMPLES))
        assert {sample["problem_id"] for sample in samples} == {problem.id}
        assert len({sample["text"] for sample in samples}) > NUM_SAMPLES / 2
    assert (folder / "eval" / "report.html").stat().st_size > 10_000


def test_transformers_loads_the_export_and_gives_the_logits_of_the_trained_checkpoint(folder: Path) -> None:
    import jax.numpy as jnp
    import torch
    import transformers

    from mathscale_jax import model
    from mathscale_jax.checkpoint import open_checkpoint

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "exported", dtype=torch.float32).eval()
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    checkpoint = open_checkpoint(str(folder / "run"))
    assert checkpoint.step == STEPS
    tokens = checkpoint.tokenizer.encode_prompt(checkpoint.meta.template.render_prompt("How many eggs are 3 + 4 eggs?"))
    ours = model.logits(checkpoint.meta.model, checkpoint.restore_params(), jnp.array([tokens]))
    with torch.no_grad():
        narrow = theirs(torch.tensor([tokens])).logits.numpy()
        untrained = base(torch.tensor([tokens])).logits.numpy()
        wide = theirs.double()(torch.tensor([tokens])).logits.numpy()
    assert np.abs(ours - wide).max() < 4 * np.abs(narrow - wide).max()
    assert np.abs(untrained - wide).max() > 0.1  # the training is in the export


def test_the_exported_tokenizer_encodes_as_ours(folder: Path) -> None:
    import transformers

    from data_pipeline.tokenizer import Tokenizer

    theirs = transformers.AutoTokenizer.from_pretrained(folder / "exported")
    ours = Tokenizer.load(folder / "exported" / "tokenizer.model")
    for text in (
        "Problem: Ann has 12 books.\nSolution:",
        "Half of 3/4 is $\\frac{3}{8}$; 1,234.5 more.\nThe answer is: 7.",
    ):
        assert ours.encode_prompt(text) == theirs(text)["input_ids"]
