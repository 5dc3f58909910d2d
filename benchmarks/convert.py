"""python -m benchmarks.convert: how fast weights come in and go out, and in how much memory, against transformers.

    python -m benchmarks.convert --tokenizer tokenizer.model

Makes checkpoints of random bfloat16 weights, of TinyLlama's widths and two depths, as Hugging Face folders. Each is
copied (what the disk gives; in small and in large blocks, as not every system takes both equally well), imported,
exported again, and for comparison loaded and saved by transformers; one after the other, in several rounds, each in a
process of its own and some seconds after the last: the hosts of virtual machines take free memory back, and all shall
begin without it. What is written is on disk in the end. Memory is the anonymous memory of that process above what it
has when everything is imported and nothing is read: it must not grow with the depth, but with one stacked parameter.
What was exported is compared with the source, bit for bit.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import ml_dtypes
import numpy as np
import pydantic

from benchmarks.flags import Numbers, settings_and_command
from benchmarks.report import environment, table, write_results
from benchmarks.worker import anonymous_memory
from data_pipeline.cli import RunError, logger, run_command
from data_pipeline.files import write_json
from data_pipeline.settings import Settings
from data_pipeline.tokenizer import Tokenizer
from mathscale_jax.config import ModelConfig
from mathscale_jax.convert.configs import model_config_to_hf
from mathscale_jax.convert.exporting import SafetensorsWriter
from mathscale_jax.convert.mapping import leaves
from mathscale_jax.convert.sources import open_source

# Each contestant: prints a line when it is ready, then reads {source} and writes {target}.
_OURS = """
from mathscale_jax.convert.exporting import export_hf
from mathscale_jax.convert.importing import import_weights
import jax.numpy
jax.numpy.zeros(1).block_until_ready()
print("ready", flush=True)
"""
CONTESTANTS = {
    "copy of the files": """
import os, shutil
print("ready", flush=True)
shutil.copytree({source!r}, {target!r})
os.sync()
""",
    "copy, 16 MB at a time": """
import os
os.makedirs({target!r})
print("ready", flush=True)
for name in os.listdir({source!r}):
    with open(os.path.join({source!r}, name), "rb") as old, open(os.path.join({target!r}, name), "wb", 0) as new:
        while block := old.read(2**24):
            new.write(block)
os.sync()
""",
    "import": _OURS + "import_weights({source!r}, {target!r})\n",
    "export": _OURS + "export_hf({imported!r}, {target!r})\n",
    "transformers, load and save": """
import os, torch, transformers
transformers.logging.set_verbosity_error()
model_class = transformers.LlamaForCausalLM
print("ready", flush=True)
model_class.from_pretrained({source!r}, dtype="auto").save_pretrained({target!r})
os.sync()
""",
}


class ConvertSettings(Settings):
    """What is measured."""

    tokenizer: str = pydantic.Field(description="tokenizer.model; its pieces are the vocabulary")
    layers: Numbers = pydantic.Field((22, 44), description="depths (22: 1.1 B parameters)")
    width: pydantic.PositiveInt = pydantic.Field(2048, description="width of the residual stream, a multiple of 64")
    rounds: pydantic.PositiveInt = pydantic.Field(3, description="times that each is run; medians are shown")
    pause: pydantic.NonNegativeFloat = pydantic.Field(10, description="seconds before each run")
    folder: str | None = pydantic.Field(None, description="where the files lie meanwhile (default: a temporary folder)")
    out: str | None = pydantic.Field(None, description="folder for the results as Markdown and JSON")


def benchmark(settings: ConvertSettings, command: str) -> None:
    """Measures, prints, and writes the results."""
    load = os.getloadavg()[0]
    rows, measured = [], []
    with tempfile.TemporaryDirectory(dir=settings.folder) as temporary:
        for num_layers in settings.layers:
            folder = Path(temporary) / str(num_layers)
            config = config_of(num_layers, settings.width, settings.tokenizer)
            size = make_checkpoint(folder / "source", config, settings.tokenizer)
            largest = max(np.prod(leaf.spec.shape) for leaf in leaves(config)) * 2
            present = [name for name in CONTESTANTS if "transformers" not in name or find_spec("transformers")]
            runs: dict[str, list[tuple[float, int]]] = {name: [] for name in present}
            for number in range(settings.rounds):
                for name in present:
                    time.sleep(settings.pause)
                    runs[name].append(run(name, folder))
                    logger.info("round %d, %d layers, %s: %.1f s", number + 1, num_layers, name, runs[name][-1][0])
            for name in CONTESTANTS:
                if name not in runs:
                    rows.append([name, "not measured: needs the extra torch", *[""] * 4])
                    continue
                seconds = sorted(seconds for seconds, _ in runs[name])
                memory = max(memory for _, memory in runs[name])
                measured.append({"contestant": name, "parameters": config.num_parameters, "bytes": size,
                                 "seconds": seconds, "memory": memory, "largest_leaf": int(largest)})  # fmt: skip
                rows.append(
                    [
                        name,
                        f"{config.num_parameters / 1e9:.2f} B, {size / 1e9:.2f} GB",
                        f"{statistics.median(seconds):.1f} ({seconds[0]:.1f} to {seconds[-1]:.1f})",
                        f"{size / statistics.median(seconds) / 1e9:.2f}",
                        f"{memory / 1e9:.2f} GB",
                        f"{memory / largest:.1f}",
                    ]
                )
            shutil.rmtree(folder)
    header = ["", "bfloat16 weights", "seconds", "GB/s", "memory above idle", "in largest stacked parameters"]
    body = table(header, rows)
    print(body, flush=True)
    if settings.out is not None:
        where = environment("cpu", load)
        values = {"settings": settings.model_dump(exclude={"out", "folder", "tokenizer"}), "measured": measured}
        logger.info("wrote %s", write_results(settings.out, "convert", where, command, body, values))


def config_of(num_layers: int, width: int, tokenizer: str) -> ModelConfig:
    """TinyLlama's proportions at another width and depth."""
    return ModelConfig(
        vocab_size=Tokenizer.load(tokenizer).vocab_size,
        hidden_size=width, intermediate_size=width * 11 // 4, num_layers=num_layers,
        num_heads=width // 64, num_kv_heads=max(1, width // 512), head_dim=64, max_context=2048,
    )  # fmt: skip


def make_checkpoint(folder: Path, config: ModelConfig, tokenizer: str) -> int:
    """Writes a Hugging Face folder of random weights; returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    shutil.copy(tokenizer, folder / "tokenizer.model")
    write_json(folder / "config.json", model_config_to_hf(config, "bfloat16"))
    rng = np.random.default_rng(0)
    shapes = {name: leaf.tensor_shape for leaf in leaves(config) for name in leaf.tensors}
    with SafetensorsWriter(folder, shapes, "bfloat16") as writer:
        for name, shape in shapes.items():
            tensor = rng.standard_normal(shape, np.float32) * np.float32(0.02)
            writer.write(name, tensor.astype(ml_dtypes.bfloat16))
    return writer.num_bytes


def run(name: str, folder: Path) -> tuple[float, int]:
    """Seconds from ready to the end, and the peak of anonymous memory above that of being ready, in bytes."""
    target = folder / name.partition(",")[0].replace(" ", "-")
    shutil.rmtree(target, ignore_errors=True)
    program = CONTESTANTS[name].format(
        source=str(folder / "source"), target=str(target), imported=str(folder / "import")
    )
    said = folder / "stderr"
    with said.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE, stderr=stderr, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise RunError(f"{name}: {said.read_text()[-2000:]}")
    idle = peak = anonymous_memory(process.pid)
    started = time.perf_counter()
    while process.poll() is None:
        peak = max(peak, anonymous_memory(process.pid))
        time.sleep(0.005)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise RunError(f"{name}: {said.read_text()[-2000:]}")
    if name == "export":
        _check_same(folder / "source", target)
    if name != "import":
        shutil.rmtree(target)
    return seconds, peak - idle


def _check_same(source: Path, exported: Path) -> None:
    """Raises RunError where a tensor of the export is not the source's, bit for bit."""
    one, other = open_source(str(source)), open_source(str(exported))
    for name in one.shapes:
        if not np.array_equal(one.read(name).view(np.uint16), other.read(name).view(np.uint16)):
            raise RunError(f"{name} came out with other bits than it went in with")


def _main(argv: Sequence[str] | None) -> None:
    benchmark(*settings_and_command("benchmarks.convert", __doc__, ConvertSettings, argv))


if __name__ == "__main__":
    run_command(_main)
