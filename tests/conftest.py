"""Eight fake CPU devices for every test, and the fixtures that more than one file uses."""

import importlib.util
import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before jax is imported anywhere.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# Many tests start the same program in a new process: what one has compiled, the others of this test run read.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="mathscale-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import pytest

from data_pipeline.tasks import Problem, read_problems

# A job in the background of a shell ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what compiles for TPUs where their compiler is missing."""
    if item.get_closest_marker("tpu") and importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: make test-tpu")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder with the public data sets; the project carries none of them."""
    folder = os.environ.get("MATHSCALE_TEST_DATA")
    if folder is None:
        message = "MATHSCALE_TEST_DATA is not set: it names a folder with GSM8K and a 32,000-piece tokenizer"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return Path(folder)


@pytest.fixture(scope="session")
def gsm8k_train(test_data: Path) -> list[Problem]:
    return read_problems("gsm8k", "train", str(test_data / "gsm8k_train.jsonl.gz"))


@pytest.fixture(scope="session")
def gsm8k_test(test_data: Path) -> list[Problem]:
    return read_problems("gsm8k", "test", str(test_data / "gsm8k_test.jsonl.gz"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """Small checkpoints that transformers wrote, with its logits (see tests/golden/make.py)."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def logging_left_as_it_was() -> Iterator[None]:
    """For commands, which set up logging: pytest's own handlers stay out of it and come back."""
    root, absl, own = logging.getLogger(), logging.getLogger("absl"), logging.getLogger("mathscale")
    handlers, levels = root.handlers, [(log, log.level) for log in (root, absl, own)]
    root.handlers = []
    yield
    root.handlers = handlers
    for log, level in levels:
        log.setLevel(level)
