"""Packages that only some of attnlab needs, imported when it is used."""

from __future__ import annotations

import importlib
from types import ModuleType

from attnlab.core.errors import MissingPackageError


def optional(package: str, extra: str, what: str) -> ModuleType:
    """Import ``package``, which the extra ``attnlab[extra]`` brings.

    Args:
        package: the module's name.
        extra: of pyproject.toml.
        what: who needs it, as the message begins: "the Ray executor".

    Raises:
        MissingPackageError: it is not installed; the message says how to do so.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingPackageError(f'{what} needs {package}, which is not installed: pip install "attnlab[{extra}]"') from error
