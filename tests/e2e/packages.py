"""Packages of many kinds for the end-to-end tests."""

import zipfile
from collections.abc import Mapping
from pathlib import Path


def make_package(
    path: Path,
    *commands: str,
    files: Mapping[str, str | bytes] | None = None,
    script: str = "train-script.sh",
    folder: str = "",
    big: Path | None = None,
) -> Path:
    """Write a package whose script holds these commands.

    Args:
        path: The zip file to write.
        commands: Lines of its script.
        files: Its other files, by name.
        script: Name of its script.
        folder: The top folder of all files, with a slash, or an empty text.
        big: Another file, which need not fit into memory.

    Returns:
        The zip file.
    """
    text = "\n".join(("#!/bin/bash", *commands, ""))
    with zipfile.ZipFile(path, "w") as package:
        package.writestr(folder + script, text)
        for name, content in (files or {}).items():
            package.writestr(folder + name, content)
        if big is not None:
            package.write(big, folder + big.name)
    return path
