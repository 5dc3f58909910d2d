"""`eval study --emit`: each cell as a script of the launch commands, for machines that are not this one."""

import hashlib
import re
import shlex
from collections.abc import Callable, Iterator, Sequence

from etils import epath

from data_pipeline.cli import StopSignal, flags_of, logger, make_folder
from data_pipeline.files import write_text
from data_pipeline.settings import UsageError
from eval.sample import SampleSettings
from eval.study.cells import begin, is_done
from eval.study.grid import Cell, cells_of, paths_of
from eval.study.record import check_unchanged, done_stages
from eval.study.run import check_paths, choose, make_data
from eval.study.settings import StudySettings

_LONGEST_NAME = 40  # of a TPU, so that suffixes fit into Cloud TPU's 61


def _slurm(cell: Cell, study: StudySettings) -> Iterator[str]:
    yield "# TRAIN_FLAGS, EVAL_FLAGS: all options of sbatch, GPUs too; GRADE_FLAGS: --grade-flag=...; SHARDS: a number."
    if "train" not in done_stages(cell):
        yield f"launch/slurm.sh train --wait ${{TRAIN_FLAGS---gpus-per-node=8}} -- --config {_train(cell)}"
    for words in _sampled(cell, study):
        yield (
            "launch/slurm.sh evaluate --wait --shards ${SHARDS-8} ${GRADE_FLAGS-} ${EVAL_FLAGS---gpus=1} -- "
            f"{shlex.join(words)}"
        )


def _tpu(cell: Cell, study: StudySettings) -> Iterator[str]:
    local = [f"{key}={path}" for key, path in paths_of(cell) if "://" not in path]
    if "://" not in cell.folder or cell.train.init_from is None or "://" not in cell.train.init_from:
        raise UsageError(
            f"out={study.out}, init_from={cell.train.init_from}: what a TPU writes is deleted with it, and large files "
            "do not go there: name gs:// folders for both"
        )
    name = _tpu_name(f"{study.out.rstrip('/').rsplit('/', 1)[1]}-{cell.name}")
    yield "# TPU_FLAGS: options of launch/tpu_vm.py, --type above all."
    for path in local:
        yield f"# Must be in the checkout, and known to git, to go along: {path}"
    flags = "${TPU_FLAGS:?say --type v5litepod-16, for example}"
    if "train" not in done_stages(cell):
        yield f"launch/tpu_vm.py job {name} {flags} -- python -m mathscale_jax.train --config {_train(cell)}"
    for number, words in enumerate(_sampled(cell, study)):
        yield f"launch/tpu_vm.py evaluate {name}-eval{number} {flags} -- {shlex.join(words)}"


LAUNCHERS: dict[str, Callable[[Cell, StudySettings], Iterator[str]]] = {"slurm": _slurm, "tpu": _tpu}


def write_jobs(settings: StudySettings, launcher: str, which: str | None, again: Sequence[str]) -> epath.Path:
    """Makes the data, and writes a script for each cell that is not done, or for those of `which`; returns the folder.

    `again` are the words of the command that reports when all have ended. See `study` for errors.
    """
    cells = choose(cells_of(settings), which)
    check_unchanged(cells)
    make_folder(epath.Path(settings.out), "out")
    with StopSignal() as stop:
        make_data(settings, cells, stop)
    check_paths(cells)
    todo = [cell for cell in cells if not is_done(cell, settings)]
    scripts = {cell.name: list(LAUNCHERS[launcher](cell, settings)) for cell in todo}
    name = settings.out.rstrip("/").rsplit("/", 1)[1]
    jobs = epath.Path(f"runs/jobs/{name}" if "://" in settings.out else f"{settings.out}/jobs")
    make_folder(jobs, "jobs")
    for cell in todo:
        begin(cell)
        lines = [
            "#!/usr/bin/env bash",
            f"# {cell.name}: run it from the folder that the paths start from; run again, it goes on.",
            "set -euo pipefail",
            *scripts[cell.name],
        ]
        write_text(jobs / f"{cell.name}.sh", "\n".join(lines) + "\n")
    if not todo:
        some = "" if which is None else "chosen "
        logger.info("nothing to do: the %d %scells are done. This reports:\n  %s", len(cells), some, shlex.join(again))
        return jobs
    later = [*settings.sheets, *(["leakage"] if settings.leakage else [])]
    logger.info(
        "jobs in %s: %d. bash %s/%s.sh begins one. When all have ended, this reports%s:\n  %s",
        jobs, len(todo), jobs, todo[0].name,
        f", and does what is left to a device at hand ({', '.join(later)})" if later else "", shlex.join(again),
    )  # fmt: skip
    return jobs


def _sampled(cell: Cell, study: StudySettings) -> Iterator[list[str]]:
    """The settings of each eval that is drawn and graded, and not done. slurm.sh would grade a sheet, too."""
    for name, given in cell.evals.items():
        if name not in study.sheets and name not in done_stages(cell):
            yield flags_of(given, SampleSettings)


def _tpu_name(text: str) -> str:
    """A name that Cloud TPU takes: cut to length, and still different from others."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 7].rstrip('-')}-{digest}"


def _train(cell: Cell) -> str:
    return shlex.quote(f"{cell.folder}/train.yaml")
