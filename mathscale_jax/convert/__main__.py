"""python -m mathscale_jax.convert: published weights to a checkpoint, and back.

    python -m mathscale_jax.convert import Llama-2-7b-hf checkpoints/llama2-7b
    python -m mathscale_jax.convert verify checkpoints/llama2-7b Llama-2-7b-hf
    python -m mathscale_jax.convert export checkpoints/llama2-7b Llama-2-7b-again

A conversion that is stopped leaves nothing that looks whole; run it again.
"""

import argparse
from collections.abc import Sequence

from data_pipeline.cli import add_flags, from_flags, run_command
from mathscale_jax.convert.dtypes import DTYPES
from mathscale_jax.convert.exporting import export_hf
from mathscale_jax.convert.importing import import_weights
from mathscale_jax.convert.verify import TOLERANCES, verify
from mathscale_jax.processes import ProcessSettings, start_processes


def _main(argv: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mathscale_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    importer = commands.add_parser("import", help="published weights -> checkpoint")
    importer.add_argument(
        "source",
        metavar="SRC",
        help="folder with config.json and safetensors or .bin, or with params.json and consolidated.*.pth; or a "
        "model's name on Hugging Face's hub",
    )
    importer.add_argument("destination", metavar="DST", help="new checkpoint folder")
    importer.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model (default: the one in SRC)")
    importer.add_argument(
        "--template",
        metavar="YAML",
        help="prompt template saved with the weights (default: the one in SRC, as exports have it; else our own)",
    )
    importer.add_argument(
        "--max-context",
        type=int,
        metavar="N",
        help="longest text in tokens; only for Meta's weights, whose files do not say it (default: by RoPE base)",
    )
    group = importer.add_argument_group("several processes", "found without these on TPU pods and under Slurm")
    add_flags(group, ProcessSettings)
    exporter = commands.add_parser("export", help="checkpoint -> Hugging Face folder")
    exporter.add_argument(
        "source", metavar="CKPT", help="checkpoint or run folder; @STEP or @best behind it, else its newest step"
    )
    exporter.add_argument("destination", metavar="DST", help="new folder")
    exporter.add_argument(
        "--merge", action="store_true", help="of a LoRA run: the adapted model (default: the adapter, for peft)"
    )
    exporter.add_argument(
        "--base", metavar="NAME", help="of an adapter: the folder or name that peft loads its base by"
    )
    verifier = commands.add_parser("verify", help="whether a checkpoint is whole, and computes what it should")
    verifier.add_argument("source", metavar="CKPT", help="checkpoint or run folder; @STEP or @best behind it")
    verifier.add_argument(
        "reference",
        metavar="HF_DIR",
        nargs="?",
        help="folder whose logits by transformers must be these (extra torch)",
    )
    verifier.add_argument(
        "--compute", choices=tuple(TOLERANCES), default="float32", help="dtype of both computations (default: float32)"
    )
    for sub in (importer, exporter):
        sub.add_argument(
            "--dtype", choices=tuple(DTYPES.values()), help="dtype of the weights written (default: as they are stored)"
        )
    arguments = parser.parse_args(argv)
    if arguments.command == "import":
        start_processes(from_flags(ProcessSettings, arguments))
        import_weights(
            arguments.source,
            arguments.destination,
            tokenizer=arguments.tokenizer,
            template=arguments.template,
            dtype=arguments.dtype,
            max_context=arguments.max_context,
        )
    elif arguments.command == "verify":
        for line in verify(arguments.source, arguments.reference, arguments.compute):
            print(line, flush=True)
    else:
        export_hf(
            arguments.source, arguments.destination, dtype=arguments.dtype, merge=arguments.merge, base=arguments.base
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Console script mathscale-convert."""
    run_command(_main, argv)


if __name__ == "__main__":
    main()
