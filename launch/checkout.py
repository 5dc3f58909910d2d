"""The checkout as a file, for machines that are not here."""

import gzip
import hashlib
import io
import os
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
_MAX_CODE = 200e6  # bytes


class NotPacked(Exception):
    """What is wrong with the checkout."""


class Code(NamedTuple):
    """The checkout as a file, and what identifies it."""

    file: Path
    digest: str


def names() -> list[str]:
    """The files that git knows, and new ones that it does not ignore. Raises NotPacked."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(git, capture_output=True, check=False)
    except FileNotFoundError:
        raise NotPacked("git is not installed: it says which files are code") from None
    if listed.returncode:
        raise NotPacked(f"{ROOT} is no git checkout, so which of its files are code is not known")
    return sorted({name for name in listed.stdout.decode().split("\0") if name and not name.startswith("runs/")})


def travels(path: str) -> bool:
    """Whether a path, as a command names it, is a file or folder of what `pack` packs. Raises NotPacked."""
    name = os.path.normpath(path)
    return any(file == name or file.startswith(f"{name}/") for file in names())


def pack(folder: Path) -> Code:
    """The files of `names` as they are here, changed or not. Raises NotPacked."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names():
            if (ROOT / name).is_file():
                info = archive.gettarinfo(str(ROOT / name), name)
                info.uid = info.gid = info.mtime = 0
                info.uname = info.gname = ""
                with (ROOT / name).open("rb") as opened:
                    archive.addfile(info, opened)
    if buffer.tell() > _MAX_CODE:
        raise NotPacked(f"{ROOT} holds {buffer.tell() / 1e6:.0f} MB that git does not ignore: more than code is")
    file = folder / "mathscale-code.tgz"
    file.write_bytes(gzip.compress(buffer.getvalue(), mtime=0))
    return Code(file, hashlib.sha256(buffer.getvalue()).hexdigest()[:16])
