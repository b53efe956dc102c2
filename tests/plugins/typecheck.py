"""Check every annotation of attnlab at run time: jaxtyping's import hook with beartype, on all modules but the public boundary.

The boundary validates what users hand in and must raise its own errors, which tests assert; a checker in front would
raise first. jaxtyping hooks a name and everything below it, so a package is named only where nothing below it is left
out; elsewhere its files are named one by one, and its ``__init__`` goes unchecked.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

BOUNDARY_MODULES = {"attnlab.core.contract", "attnlab.core.streaming"}
BOUNDARY_PACKAGES = {"attnlab.ops"}  # the __init__ of each package directly in these
KERNELS = {"kernels", "triton_tiles"}  # modules in Triton's language: its compiler wants functions as they were written


def at_boundary(module: str, *, package: bool) -> bool:
    """True for a module (or a package's own ``__init__``) that the hook must leave alone."""
    folder, _, name = module.rpartition(".")
    return module in BOUNDARY_MODULES or name in KERNELS or (package and folder in BOUNDARY_PACKAGES)


def hooked_modules(folder: Path, name: str = "attnlab") -> list[str]:
    """Names that make the hook cover the package ``name`` in ``folder`` except its boundary."""
    names, whole = _walk(folder, name)
    return [name] if whole else names


def _walk(folder: Path, name: str) -> tuple[list[str], bool]:
    """Names to hook below a package, and whether nothing in it, itself included, is left out."""
    names, whole = [], not at_boundary(name, package=True)
    for path in sorted(folder.iterdir()):
        child = f"{name}.{path.stem}"
        if path.suffix == ".py" and path.stem != "__init__":
            if at_boundary(child, package=False):
                whole = False
            else:
                names.append(child)
        elif path.is_dir() and path.name.isidentifier() and path.name != "__pycache__":
            below, complete = _walk(path, child)
            names += [child] if complete else below
            whole = whole and complete
    return names, whole


def install() -> None:
    """Install the hook, unless the environment variable ``ATTNLAB_TYPECHECK`` is 0; call it before attnlab is imported."""
    if os.environ.get("ATTNLAB_TYPECHECK", "1") == "0":
        return
    if early := [name for name in sys.modules if name.partition(".")[0] == "attnlab"]:
        raise RuntimeError(f"attnlab was imported before its import hook was installed: {early}")
    from jaxtyping import install_import_hook

    spec = find_spec("attnlab")
    if spec is None or spec.origin is None:
        raise RuntimeError("attnlab is not installed; see README.md")
    install_import_hook(hooked_modules(Path(spec.origin).parent), "beartype.beartype")
