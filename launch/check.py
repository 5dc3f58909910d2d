"""Checks the settings of a command before a machine is rented, or a queue waited in, for it.

    python launch/check.py python -m mathscale_jax.train --config configs/x.yaml key=value ...
    python launch/check.py python -m eval sample --task gsm8k ...

Prints the folder that the command writes to. Exit code 2: the settings are wrong, and the message says how; 3: this
Python has not the packages that could tell. Other commands are not looked at.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(words: list[str]) -> None:
    """Checks `words`; ends the process."""
    try:
        from data_pipeline.cli import add_flags, from_flags
        from data_pipeline.settings import UsageError, load_settings
        from eval.sample import RunSettings, SampleSettings
        from mathscale_jax.config import TrainSettings
    except ImportError:
        sys.exit(3)
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    rest = words[words.index("-m") + 2 :] if module else []
    try:
        if module == "mathscale_jax.train":
            parser = argparse.ArgumentParser(prog="python -m mathscale_jax.train", usage="see --help")
            parser.add_argument("--config", required=True)
            given, others = parser.parse_known_args(rest)
            overrides = [word for word in others if "=" in word and not word.startswith("--")]
            print(load_settings(TrainSettings, given.config, overrides).output_dir)
        elif module == "eval" and rest[:1] in (["sample"], ["run"]):
            settings = SampleSettings if rest[0] == "sample" else RunSettings
            parser = argparse.ArgumentParser(prog=f"python -m eval {rest[0]}", usage="see --help")
            add_flags(parser, settings)
            print(from_flags(settings, parser.parse_args(rest[1:])).out)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
