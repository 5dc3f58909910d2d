"""A training run of seconds, for tests that need a whole one: as a config file, a subprocess, or in this process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import yaml

from data_pipeline.demo import DemoData, prepare_demo
from data_pipeline.settings import load_settings
from mathscale_jax.config import TrainSettings
from mathscale_jax.train import train

NUM_STEPS = 48  # enough that a test can still kill the process in mid-run


def write_config(folder: Path, **changes: object) -> Path:
    """Makes the data (once) and a config of `NUM_STEPS` steps in `folder`; `changes` replace top-level keys."""
    data = folder / "data"
    if not data.exists():
        prepare_demo(DemoData(out=str(data), num_train=40, num_test=20, vocab_size=340))
    config = {
        "output_dir": str(folder / "run"),
        "model": {
            "preset": "demo",
            "vocab_size": 340,
            "hidden_size": 32,
            "num_layers": 2,
            "head_dim": 8,
            "intermediate_size": 64,
        },
        "data": {
            "sources": [{"task": "demo", "path": str(data / "train.jsonl")}],
            "tokenizer": str(data / "tokenizer.model"),
            "context": 256,
            "cache_dir": str(folder / "cache"),
        },
        "compute": {"dtype": "float32", "remat": "none"},
        "optimizer": {"learning_rate": 1e-2},
        "batch_size": 8,
        "num_steps": NUM_STEPS,
        "log_every": 1,
        "checkpoint": {"every": 16, "keep": 3},
        **changes,
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def command(module: str, *arguments: str) -> list[str]:
    """The command line of one of our programs."""
    return [sys.executable, "-m", module, *arguments]


def run(module: str, *arguments: str, devices: int = 1, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs one of our programs to its end."""
    return subprocess.run(
        command(module, *arguments),
        env=environment(devices),
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )  # type: ignore[call-overload]


def train_here(config: Path, *overrides: str) -> None:
    """The training command in this process, on its eight devices. Raises what the command would report."""
    train(load_settings(TrainSettings, str(config), overrides))


def environment(devices: int = 1) -> dict[str, str]:
    """The environment of a program that sees `devices` CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1"}
