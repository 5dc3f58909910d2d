"""Published weights as checkpoints: read tensor by tensor while they are written, on as many hosts as there are."""

import contextlib
import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
from etils import epath

from data_pipeline.cli import StopSignal, logger, make_folder
from data_pipeline.files import locked
from data_pipeline.progress import Progress
from data_pipeline.settings import UsageError
from data_pipeline.templates import load_template
from data_pipeline.tokenizer import Tokenizer, check_vocabulary
from mathscale_jax.checkpoint import TOKENIZER_FILE, Meta, steps_in
from mathscale_jax.checkpoint_lazy import LazyArray, write_lazily
from mathscale_jax.convert.dtypes import cast, numpy_dtype
from mathscale_jax.convert.mapping import Leaf, leaves
from mathscale_jax.convert.sources import Source, check_local, fetch, open_source
from mathscale_jax.convert.tokenizer_files import TEMPLATE_FILE, check_companions
from mathscale_jax.processes import all_or_none, check_shared, is_primary


def import_weights(
    source: str,
    destination: str,
    *,
    tokenizer: str | None = None,
    template: str | None = None,
    dtype: str | None = None,
    max_context: int | None = None,
) -> None:
    """Writes published weights as step 0 of a checkpoint.

    `source` is a folder in any format that `open_source` knows, or a model's name on Hugging Face's hub. `dtype` is
    that of the weights written, by default the one they have; `template` by default the one that was exported with
    them, if any. Every process of a run calls it.
    Raises UsageError for what is wrong with them; nothing that looks whole is left then.
    """
    out = epath.Path(destination)
    with StopSignal(), contextlib.ExitStack() as held:
        with all_or_none():
            _check_destination(out)
            check_local(source)
            opened = open_source(fetch(source), max_context)
            meta, pieces = described(opened, tokenizer, template)
            dtype = dtype or opened.dtype
            if (out / TOKENIZER_FILE).exists() and (out / TOKENIZER_FILE).read_bytes() != pieces.model:
                raise UsageError(f"{out} holds another {TOKENIZER_FILE}, which would be lost: choose another folder")
        with all_or_none():
            make_folder(out, "DST")
            if is_primary():
                held.enter_context(locked(out, "DST"))
        check_shared(out, "DST")
        meta = dataclasses.replace(meta, lineage=f"imported from {Path(source).resolve().name} ({opened.kind})")
        arrays = {leaf.name: _lazy(opened, leaf, dtype) for leaf in leaves(opened.config, opened.layout)}
        total = sum(array.piece_bytes * len(array.pieces) for array in arrays.values())
        logger.info(
            "importing %s: %.3g M parameters as %s, %.2f GB", opened.kind, opened.config.num_parameters / 1e6,
            dtype, total / 1e9,
        )  # fmt: skip
        with Progress(total, "importing", "bytes") as bar:
            try:
                write_lazily(out, 0, arrays, meta, pieces, bar.update)
            except BaseException:
                if is_primary():
                    _leave_nothing(out)
                raise
    logger.info("imported %s into %s", source, destination)


def described(source: Source, tokenizer: str | None = None, template: str | None = None) -> tuple[Meta, Tokenizer]:
    """What opened weights are, and their tokenizer; the files named replace those that lie beside the weights.

    Raises UsageError where there is no tokenizer, or one of another model.
    """
    published = source.path / TEMPLATE_FILE
    chat_template = load_template(str(published) if template is None and published.exists() else template)
    if tokenizer is None and not (source.path / TOKENIZER_FILE).exists():
        raise UsageError(
            f"{source.path} holds no {TOKENIZER_FILE}, SentencePiece's file (a tokenizer.json cannot take its "
            "place): put it there, or name it with --tokenizer to convert import"
        )
    file = tokenizer or str(source.path / TOKENIZER_FILE)
    pieces = Tokenizer.load(file)
    check_vocabulary(pieces, source.config.vocab_size, f"tokenizer {file}")
    check_companions(pieces, source.companions)
    lineage = f"published weights ({source.kind})"
    return Meta(source.config, chat_template, pieces.sha256, lineage, companions=source.companions), pieces


def _check_destination(out: epath.Path) -> None:
    if (out / "checkpoints").exists():
        raise UsageError(f"{out} is the folder of a training run: choose another one")
    if not out.is_dir():
        return
    if steps_in(out):
        raise UsageError(f"{out} already holds a checkpoint: choose another folder, or remove it")
    ours = (TOKENIZER_FILE, ".lock")  # beside the unfinished step that an import leaves when it is killed
    other = sorted(path.name for path in out.iterdir() if path.name not in ours and "orbax" not in path.name)
    if other:
        raise UsageError(f"{out} holds {other[0]}, which no import left there: choose another folder")


def _leave_nothing(out: epath.Path) -> None:
    """Removes a folder that holds no more than what locks it."""
    with contextlib.suppress(OSError):
        if [path.name for path in out.iterdir()] == [".lock"]:
            out.rmtree()


def _lazy(source: Source, leaf: Leaf, dtype: str) -> LazyArray:
    return LazyArray(leaf.spec.shape, numpy_dtype(dtype), leaf.tensors, partial(_read, source, leaf))


def _read(source: Source, leaf: Leaf, i: int, into: np.ndarray) -> None:
    tensor = cast(source.read(leaf.tensors[i]), into.dtype, leaf.tensors[i])
    leaf.from_tensor(tensor, into.reshape(leaf.slice_shape))
