"""`eval study --emit`: each cell as a script of the launch commands, for machines that are not this one."""

import re
import shlex
from collections.abc import Callable, Iterator, Sequence

from etils import epath

from data_pipeline.cli import flags_of, logger, make_folder
from data_pipeline.files import write_text
from data_pipeline.settings import UsageError
from eval.sample import SampleSettings
from eval.study.cells import begin, check_unchanged, is_done
from eval.study.grid import Cell, cells_of
from eval.study.settings import StudySettings

_LONGEST_NAME = 40  # of a TPU, so that suffixes fit into Cloud TPU's 61


def _slurm(cell: Cell, study: str) -> Iterator[str]:
    yield "# TRAIN_FLAGS and EVAL_FLAGS: options of sbatch; SHARDS: jobs that share the sampling."
    yield f"launch/slurm.sh train --wait ${{TRAIN_FLAGS---gpus-per-node=8}} -- --config {_train(cell)}"
    for given in cell.evals.values():
        words = shlex.join(flags_of(given, SampleSettings))
        yield f"launch/slurm.sh evaluate --wait --shards ${{SHARDS-8}} ${{EVAL_FLAGS---gpus=1}} -- {words}"


def _tpu(cell: Cell, study: str) -> Iterator[str]:
    if not cell.folder.startswith("gs://"):
        raise UsageError(f"out={study}: what a TPU writes is deleted with it: name a gs:// folder")
    name = re.sub(r"[^a-z0-9]+", "-", f"{study.rsplit('/', 1)[1]}-{cell.name}".lower()).strip("-")[:_LONGEST_NAME]
    yield "# TPU_FLAGS: options of launch/tpu_vm.py, --type above all."
    flags = "${TPU_FLAGS:?say --type v5litepod-16, for example}"
    yield f"launch/tpu_vm.py job {name} {flags} -- python -m mathscale_jax.train --config {_train(cell)}"
    for number, given in enumerate(cell.evals.values()):
        words = shlex.join(flags_of(given, SampleSettings))
        yield f"launch/tpu_vm.py evaluate {name}-eval{number} {flags} -- {words}"


LAUNCHERS: dict[str, Callable[[Cell, str], Iterator[str]]] = {"slurm": _slurm, "tpu": _tpu}


def write_jobs(settings: StudySettings, launcher: str, config: str, overrides: Sequence[str]) -> None:
    """Writes OUT/jobs/CELL.sh of each cell that is not done, and the cell's own settings. See `study` for errors."""
    cells = cells_of(settings)
    check_unchanged(cells)
    jobs = epath.Path(settings.out) / "jobs"
    make_folder(jobs, "out")
    again = shlex.join(["python", "-m", "eval", "study", "--config", config, *overrides])
    todo = [cell for cell in cells if not is_done(cell, settings)]
    for cell in todo:
        lines = [
            "#!/usr/bin/env bash",
            f"# {cell.name}: run it from the folder that the paths start from; run again, it goes on.",
            *LAUNCHERS[launcher](cell, settings.out.rstrip("/")),
        ]
        begin(cell)
        write_text(jobs / f"{cell.name}.sh", "\n".join([*lines[:3], "set -euo pipefail", *lines[3:]]) + "\n")
    logger.info(
        "%d jobs are in %s: bash %s/%s.sh begins one. When all have ended, this reports:\n  %s",
        len(todo), jobs, jobs, todo[0].name if todo else "CELL", again,
    )  # fmt: skip


def _train(cell: Cell) -> str:
    return shlex.quote(f"{cell.folder}/train.yaml")
