"""Make pip notice packages whose installation was interrupted.

pip takes a package as installed when its metadata folder is there, complete or not. This script removes the
metadata of every package in the running environment that lacks a file it lists, so that pip installs it again.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from importlib.metadata import Distribution
from pathlib import Path


def is_complete(package: Distribution) -> bool:
    """Whether every file that the package lists is there with its listed size."""
    if package.read_text("METADATA") is None or not package.files:
        return False
    for file in package.files:
        path = Path(str(file.locate()))
        if file.suffix == ".pyc" or file.size is None:
            continue
        if not path.is_file() or path.stat().st_size != file.size:
            return False
    return True


def main() -> None:
    """Check every package of this environment."""
    if sys.prefix == sys.base_prefix:
        sys.exit("mend_venv: run this with the Python of a virtual environment")
    for folder in sorted(Path(sysconfig.get_path("purelib")).glob("*.dist-info")):
        if not is_complete(Distribution.at(folder)):
            print(f"set-up: {folder.name} was not installed completely; installing it again")
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
