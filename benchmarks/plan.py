"""python -m benchmarks.plan: makes the planned evidence of every TPU config again, with libtpu and no TPU.

    python -m benchmarks.plan                        # all of them: some minutes each on a few cores
    python -m benchmarks.plan llama2_7b_v5e_16       # one

Writes benchmarks/results/plan_<config>.json and .txt, and the paragraph "# Planned:" in the config's header. Each
is compiled in a process of its own, with the command that its header names.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.cli import RunError, run_command
from data_pipeline.settings import UsageError

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GIB = 2**30


def command_of(config: Path) -> list[str]:
    """The arguments of the plan command in a config's header."""
    lines = [line for line in config.read_text().splitlines() if line.startswith("#   python -m mathscale_jax.plan ")]
    if len(lines) != 1:
        raise UsageError(f"{config} must name one command that begins python -m mathscale_jax.plan, has {len(lines)}")
    return lines[0].split()[2:]


def paragraph(report: dict[str, Any], name: str) -> list[str]:
    """The lines of a config's header that say what was planned."""
    step, versions = report["programs"]["train_step"], report["versions"]
    memory = step["memory"]
    size = f"peak {memory['peak'] / GIB:.2f} of {memory['capacity'] / GIB:.2f} GiB a device"
    source = f"jax {versions['jax']}, libtpu {versions['libtpu']}; benchmarks/results/plan_{name}.json"
    if "speed" not in step:
        return [f"# Planned: does not fit, {size} ({source})."]
    roofline, speed = step["roofline"], step["speed"]
    return [
        f"# Planned: fits, {size}; each receives {step['collectives']['bytes'] / 1e9:.1f} GB a step. Bound by "
        f"{roofline['bound']}:",
        f"# {roofline['overlapped_seconds']:.2f} s a step at least, {roofline['one_by_one_seconds']:.2f} if nothing "
        f"overlaps, so {speed['tokens_per_second_per_device_overlapped']:.0f} tokens/s a device (MFU "
        f"{100 * speed['mfu_overlapped']:.0f} %) at most,",
        f"# {speed['tokens_per_second_per_device_one_by_one']:.0f} ({100 * speed['mfu_one_by_one']:.0f} %) then.",
        f"# Compiled, not measured: {source}.",
    ]


def write_header(config: Path, lines: Sequence[str]) -> None:
    """Replaces the paragraph that begins "# Planned:" and ends the header."""
    text = config.read_text().splitlines()
    start = next(i for i, line in enumerate(text) if line.startswith("# Planned:"))
    end = next(i for i in range(start, len(text)) if not text[i].startswith("#"))
    config.write_text("\n".join([*text[:start], *lines, *text[end:]]) + "\n")


def _main(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="names in configs/; by default all with a plan")
    arguments = parser.parse_args(argv)
    every = [path.stem for path in sorted((ROOT / "configs").glob("*.yaml")) if "# Planned:" in path.read_text()]
    for name in arguments.configs:
        if name not in every:
            raise UsageError(f"{name}: no such config with a plan; there are {', '.join(every)}")
    RESULTS.mkdir(exist_ok=True)
    for name in arguments.configs or every:
        config, result = ROOT / "configs" / f"{name}.yaml", RESULTS / f"plan_{name}.json"
        command = [sys.executable, "-m", *command_of(config)[1:], "--no-sampler", "--json", str(result)]
        run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if run.returncode not in (0, 1) or not run.stdout:
            raise RunError(f"planning {name} ended with exit code {run.returncode}")
        result.with_suffix(".txt").write_text(run.stdout)
        write_header(config, paragraph(json.loads(result.read_text()), name))
        print(run.stdout, flush=True)


if __name__ == "__main__":
    run_command(_main)
