"""python -m mathscale_jax.convert: Hugging Face weights to a checkpoint, and back.

    python -m mathscale_jax.convert import Llama-2-7b-hf checkpoints/llama2-7b
    python -m mathscale_jax.convert export checkpoints/llama2-7b Llama-2-7b-again

A conversion that is stopped leaves nothing that looks whole; run it again.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from etils import epath

from data_pipeline.cli import logger, make_folder, run_command
from data_pipeline.files import write_json
from data_pipeline.progress import progress
from data_pipeline.settings import UsageError
from data_pipeline.templates import DEFAULT_TEMPLATE, load_template
from data_pipeline.tokenizer import Tokenizer
from mathscale_jax.checkpoint import (
    TOKENIZER_FILE,
    Checkpoint,
    Meta,
    check_vocabulary,
    open_checkpoint,
    steps_in,
)
from mathscale_jax.checkpoint_writer import Writer
from mathscale_jax.config import CheckpointSettings
from mathscale_jax.convert.hf import HfFolder, SafetensorsWriter, import_params
from mathscale_jax.convert.mapping import leaves, model_config_to_hf
from mathscale_jax.convert.peft import write_adapter
from mathscale_jax.mesh import largest_mesh
from mathscale_jax.step import param_shardings

DTYPES = ("float32", "bfloat16", "float16")


def import_hf(source: str, destination: str, *, tokenizer: str | None, template: str, dtype: str | None) -> None:
    """Writes the weights of a Hugging Face folder as step 0 of a checkpoint. Raises UsageError."""
    out = epath.Path(destination)
    _check_local(source)
    if (out / "checkpoints").exists():
        raise UsageError(f"{destination} is the folder of a training run: choose another one")
    if steps_in(out):
        raise UsageError(f"{destination} already holds a checkpoint: choose another folder, or remove it")
    chat_template = load_template(template)
    if not Path(source).is_dir():
        raise UsageError(
            f"{source!r} is no folder; give one with config.json and safetensors (names on a hub are not fetched)"
        )
    with HfFolder(source) as folder:
        pieces = Tokenizer.load(tokenizer or folder.path / TOKENIZER_FILE)
        check_vocabulary(pieces, folder.config, f"tokenizer {tokenizer or folder.path / TOKENIZER_FILE}")
        dtype = dtype or folder.dtype
        make_folder(out, "DST")
        shardings = param_shardings(folder.config, largest_mesh(folder.config))
        params = import_params(folder, shardings, dtype)
        meta = Meta(folder.config, chat_template, pieces.sha256, lineage=f"imported from {folder.path.name}")
    with Writer(out, CheckpointSettings(), pieces) as writer:
        writer.save(0, params, meta)
    logger.info("imported %.3g M parameters into %s", meta.model.num_parameters / 1e6, destination)


def export_hf(source: str, destination: str, *, dtype: str | None = None, merge: bool = False) -> None:
    """Writes a checkpoint as a folder that transformers loads: safetensors, config.json, tokenizer.model.

    Of a LoRA run it is, with `merge`, the adapted model; without, PEFT's folder of the adapter alone, in float32.
    The folder is made under a temporary name beside `destination` and renamed when it is whole.
    Raises UsageError where the destination exists, the checkpoint does not, or an option does not fit it.
    """
    _check_local(destination)
    out = Path(destination)
    if out.exists():
        raise UsageError(f"{destination} exists: choose another folder, or remove it")
    checkpoint = open_checkpoint(source)
    adapter_alone = checkpoint.meta.lora is not None and not merge
    if merge and checkpoint.meta.lora is None:
        raise UsageError(f"--merge: {checkpoint.name} holds no adapter, all its weights are exported as they are")
    if adapter_alone and dtype is not None:
        raise UsageError(f"--dtype {dtype}: an adapter is exported in float32; leave it out, or give --merge")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(epath.Path(partial), "DST")
    try:
        if adapter_alone:
            assert checkpoint.meta.base is not None
            write_adapter(partial, checkpoint, checkpoint.meta.base.path)
            _write_tokenizer(partial, checkpoint.tokenizer)
        else:
            _write_model(partial, checkpoint, dtype or checkpoint.stored_dtype())
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    logger.info("exported %s%s to %s", "the adapter of " if adapter_alone else "", checkpoint.name, destination)


def _check_local(path: str) -> None:
    if "://" in path:
        raise UsageError(f"{path}: Hugging Face folders are read and written on a local disk; copy it from or to there")


def _write_model(folder: Path, checkpoint: Checkpoint, dtype: str) -> None:
    every_leaf = list(leaves(checkpoint.meta.model))
    shapes = {name: leaf.tensor_shape for leaf in every_leaf for name in leaf.tensors}
    writer = SafetensorsWriter(folder, shapes, dtype)
    read = checkpoint.leaf_reader()
    for leaf in progress(every_leaf, "exporting", "leaves"):
        values = np.asarray(read(".".join(leaf.path)))
        for name, ours in zip(leaf.tensors, values if leaf.is_stacked else [values], strict=True):
            writer.write(name, leaf.to_tensor(ours))
    writer.close()
    ids = {"bos_token_id": checkpoint.tokenizer.bos_id, "eos_token_id": checkpoint.tokenizer.eos_id}
    write_json(folder / "config.json", {**model_config_to_hf(checkpoint.meta.model, dtype), **ids})
    write_json(folder / "generation_config.json", ids)
    _write_tokenizer(folder, checkpoint.tokenizer)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """The tokenizer as transformers reads it. A prompt begins with BOS, as it does in training and in our sampler."""
    (folder / TOKENIZER_FILE).write_bytes(tokenizer.model)
    names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.unk_id}
    pieces = {name: tokenizer.piece(token_id) for name, token_id in names.items()}
    rules = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
    }
    write_json(folder / "tokenizer_config.json", {**rules, **pieces})


def _main(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mathscale_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    importer = commands.add_parser("import", help="Hugging Face folder -> checkpoint")
    importer.add_argument("source", metavar="SRC", help="folder with config.json, safetensors and tokenizer.model")
    importer.add_argument("destination", metavar="DST", help="new checkpoint folder")
    importer.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model (default: the one in SRC)")
    importer.add_argument(
        "--template",
        default=DEFAULT_TEMPLATE,
        metavar="YAML",
        help="chat template saved with the weights (default: default)",
    )
    exporter = commands.add_parser("export", help="checkpoint -> Hugging Face folder")
    exporter.add_argument(
        "source", metavar="CKPT", help="checkpoint or run folder; @STEP or @best behind it, else its newest step"
    )
    exporter.add_argument("destination", metavar="DST", help="new folder")
    exporter.add_argument(
        "--merge", action="store_true", help="of a LoRA run: the adapted model (default: the adapter, for peft)"
    )
    for sub in (importer, exporter):
        sub.add_argument("--dtype", choices=DTYPES, help="dtype of the weights written (default: as they are stored)")
    arguments = parser.parse_args(argv)
    if arguments.command == "import":
        import_hf(
            arguments.source,
            arguments.destination,
            tokenizer=arguments.tokenizer,
            template=arguments.template,
            dtype=arguments.dtype,
        )
    else:
        export_hf(arguments.source, arguments.destination, dtype=arguments.dtype, merge=arguments.merge)


def main(argv: Sequence[str] | None = None) -> None:
    """Console script mathscale-convert."""
    run_command(_main, argv)


if __name__ == "__main__":
    main()
