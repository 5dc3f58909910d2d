"""python -m mathscale_jax.convert: published weights to a checkpoint, and back.

    python -m mathscale_jax.convert import Llama-2-7b-hf checkpoints/llama2-7b
    python -m mathscale_jax.convert verify checkpoints/llama2-7b Llama-2-7b-hf
    python -m mathscale_jax.convert export checkpoints/llama2-7b Llama-2-7b-again

A conversion that is stopped leaves nothing that looks whole; run it again.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from data_pipeline import cli


def _import(parser: ArgumentParser) -> cli.Action:
    from mathscale_jax.convert.importing import import_weights
    from mathscale_jax.processes import ProcessSettings, start_processes

    parser.add_argument(
        "source",
        metavar="SRC",
        help="folder with config.json and safetensors or .bin, or with params.json and consolidated.*.pth; or a "
        "model's name on Hugging Face's hub",
    )
    parser.add_argument("destination", metavar="DST", help="new checkpoint folder")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model (default: the one in SRC)")
    parser.add_argument(
        "--template",
        metavar="YAML",
        help="prompt template saved with the weights (default: the one in SRC, as exports have it; else our own)",
    )
    parser.add_argument(
        "--max-context",
        type=int,
        metavar="N",
        help="longest text in tokens; only for Meta's weights, whose files do not say it (default: by RoPE base)",
    )
    _add_dtype(parser)
    group = parser.add_argument_group("several processes", "found without these on TPU pods and under Slurm")
    cli.add_flags(group, ProcessSettings)

    def act(arguments: Namespace) -> None:
        start_processes(cli.from_flags(ProcessSettings, arguments))
        import_weights(
            arguments.source,
            arguments.destination,
            tokenizer=arguments.tokenizer,
            template=arguments.template,
            dtype=arguments.dtype,
            max_context=arguments.max_context,
        )

    return act


def _export(parser: ArgumentParser) -> cli.Action:
    from mathscale_jax.convert.exporting import export_hf

    parser.add_argument(
        "source", metavar="CKPT", help="checkpoint or run folder; @STEP or @best behind it, else its newest step"
    )
    parser.add_argument("destination", metavar="DST", help="new folder")
    parser.add_argument(
        "--merge", action="store_true", help="of a LoRA run: the adapted model (default: the adapter, for peft)"
    )
    parser.add_argument("--base", metavar="NAME", help="of an adapter: the folder or name that peft loads its base by")
    _add_dtype(parser)

    def act(arguments: Namespace) -> None:
        export_hf(
            arguments.source, arguments.destination, dtype=arguments.dtype, merge=arguments.merge, base=arguments.base
        )

    return act


def _verify(parser: ArgumentParser) -> cli.Action:
    from mathscale_jax.convert.verify import TOLERANCES, verify

    parser.add_argument("source", metavar="CKPT", help="checkpoint or run folder; @STEP or @best behind it")
    parser.add_argument(
        "reference",
        metavar="HF_DIR",
        nargs="?",
        help="folder whose logits by transformers must be these (extra torch)",
    )
    parser.add_argument(
        "--compute", choices=tuple(TOLERANCES), default="float32", help="dtype of both computations (default: float32)"
    )

    def act(arguments: Namespace) -> None:
        for line in verify(arguments.source, arguments.reference, arguments.compute):
            print(line, flush=True)

    return act


def _add_dtype(parser: ArgumentParser) -> None:
    from mathscale_jax.convert.dtypes import DTYPES

    parser.add_argument(
        "--dtype", choices=tuple(DTYPES.values()), help="dtype of the weights written (default: as they are stored)"
    )


COMMANDS = {
    "import": cli.Command("published weights -> checkpoint", _import),
    "export": cli.Command("checkpoint -> Hugging Face folder", _export),
    "verify": cli.Command("whether a checkpoint is whole, and computes what it should", _verify),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Console script mathscale-convert."""
    cli.run_commands("python -m mathscale_jax.convert", __doc__, COMMANDS, argv)


if __name__ == "__main__":
    main()
