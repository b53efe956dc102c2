"""The house rules on ``src/``: sizes, docstrings, annotations, and imports that go downward only."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
MAX_FILE, MAX_FUNCTION, MEDIAN_FILE = 400, 60, 130

# Rooms of src/attnlab from the ground up. A room imports from lower floors only, never from a neighbour on its own.
FLOORS = (
    {"core"},
    {"ops"},
    {"positions", "modifiers"},
    {"mixers"},
    {"channel_mixers", "reducers"},
    {"models"},
    {"objectives"},
    {"tasks"},
    {"training"},
    {"pretrained", "parallel"},
    {"compare", "papers", "inspect", "checking"},
    {"claims"},
    {"cli"},
)
# Rooms divided into packages that do not import each other. The room's own modules serve all of them, and so do the packages
# named here; its modules import none of its packages, but for its __init__, which gathers them.
DIVIDED: dict[str, set[str]] = {"ops": set(), "mixers": {"parts"}}
FACADES = {"attnlab", "attnlab.__main__"}  # stand above the top floor: import anything, imported by nothing


@dataclass(frozen=True)
class Module:
    """A source file, parsed."""

    name: str
    package: bool
    lines: int
    tree: ast.Module

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.name.split("."))


def read(source: Path) -> dict[str, Module]:
    """Every module below ``source`` by name."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        package = path.stem == "__init__"
        parts = path.relative_to(source).with_suffix("").parts
        name = ".".join(parts[:-1] if package else parts)
        found[name] = Module(name, package, len(text.splitlines()), ast.parse(text, str(path)))
    return found


def imported(module: Module, known: dict[str, Module]) -> Iterator[tuple[int, str]]:
    """Line and full name of every attnlab module that ``module`` imports, wherever in the file."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            anchor = module.parts[: len(module.parts) + module.package - node.level] if node.level else ()
            base = ".".join((*anchor, *filter(None, [node.module])))
            names = [full if (full := f"{base}.{alias.name}") in known else base for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.partition(".")[0] == "attnlab")


def floor(name: str) -> int:
    """Number of the floor that a module's room is on, the facade's above all; -1 where it is on none."""
    if name in FACADES:
        return len(FLOORS)
    return next((number for number, rooms in enumerate(FLOORS) if name.split(".")[1] in rooms), -1)


def wing(name: str, known: dict[str, Module]) -> str | None:
    """The package of a divided room that a module belongs to; None for the room's own and shared modules."""
    parts = name.split(".")
    if len(parts) < 3 or parts[1] not in DIVIDED or parts[2] in DIVIDED[parts[1]]:
        return None
    head = known.get(".".join(parts[:3]))
    return parts[2] if head is None or head.package else None


def import_faults(known: dict[str, Module]) -> list[str]:
    """Imports that go upward, sideways, or between the packages of a divided room."""
    faults = []
    for module in known.values():
        if floor(module.name) < 0:
            faults.append(f"{module.name} is in no room: give it a floor in {Path(__file__).name}")
            continue
        for line, target in imported(module, known):
            where = f"{module.name}:{line} imports {target}"
            here, there = module.parts[1:2], tuple(target.split("."))[1:2]
            if floor(target) > floor(module.name):
                faults.append(f"{where}: upward")
            elif floor(target) == floor(module.name) and here != there:
                faults.append(f"{where}: a neighbour on its own floor")
            elif here == there and (other := wing(target, known)) is not None:
                gathers = module.package and len(module.parts) == 2
                if wing(module.name, known) != other and not gathers:
                    faults.append(
                        f"{where}: packages of {here[0]!r} do not import each other, nor does what they share import them"
                    )
    return faults


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(tree: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, Definition]]:
    """Public classes and functions with their qualified names, methods of public classes included."""
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield f"{prefix}.{node.name}:{node.lineno}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{prefix}.{node.name}")


def is_overload(node: Definition) -> bool:
    """True for one of several signatures of a function, documented where it is defined."""
    return any(ast.unparse(decorator).endswith(("overload", ".setter")) for decorator in node.decorator_list)


def is_annotated(node: ast.FunctionDef | ast.AsyncFunctionDef, *, method: bool) -> bool:
    """True when the return and every argument but ``self`` or ``cls`` have a type."""
    arguments = [
        *node.args.posonlyargs,
        *node.args.args,
        *node.args.kwonlyargs,
        *filter(None, [node.args.vararg, node.args.kwarg]),
    ]
    static = any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
    typed = arguments[1:] if method and not static else arguments
    return node.returns is not None and all(argument.annotation is not None for argument in typed)


@pytest.fixture(scope="module")
def house() -> dict[str, Module]:
    return read(SOURCE)


def listed(faults: list[str]) -> str:
    """All of them, a line each; pytest would show the first."""
    return "\n".join(["", *faults])


def test_files_are_short(house):
    long = [f"{module.name}: {module.lines} lines" for module in house.values() if module.lines > MAX_FILE]
    assert not long, listed(long)


def test_the_median_file_is_shorter(house):
    assert statistics.median(module.lines for module in house.values()) < MEDIAN_FILE


def test_functions_are_short(house):
    functions = [
        (f"{module.name}.{node.name}", (node.end_lineno or 0) - node.lineno + 1)
        for module in house.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = [f"{name}: {lines} lines" for name, lines in functions if lines > MAX_FUNCTION]
    assert not long, listed(long)


def test_every_public_name_has_a_docstring(house):
    bare = [module.name for module in house.values() if ast.get_docstring(module.tree) is None]
    for module in house.values():
        definitions = public(module.tree, module.name)
        bare += [name for name, node in definitions if not is_overload(node) and ast.get_docstring(node) is None]
    assert not bare, listed(bare)


def test_public_functions_are_annotated(house):
    untyped = []
    for module in house.values():
        top = set(module.tree.body)
        for name, node in public(module.tree, module.name):
            if not isinstance(node, ast.ClassDef) and not is_annotated(node, method=node not in top):
                untyped.append(name)
    assert not untyped, listed(untyped)


def test_imports_go_downward(house):
    faults = import_faults(house)
    assert not faults, listed(faults)


def test_nothing_is_asserted_on_users(house):
    asserts = [
        f"{module.name}:{node.lineno}"
        for module in house.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Assert)
    ]
    assert not asserts, listed(asserts)


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("core/a.py", "from attnlab.mixers import linear", "upward"),
        ("core/a.py", "def f():\n    from ..ops import base", "upward"),
        ("cli/a.py", "import attnlab", "upward"),
        ("papers/a.py", "import attnlab.compare.b", "neighbour"),
        ("mixers/linear/a.py", "from attnlab.mixers.local import b", "do not import each other"),
        ("mixers/linear/a.py", "from ..local.b import c", "do not import each other"),
        ("mixers/base.py", "from attnlab.mixers.local import b", "do not import each other"),
        ("attic/a.py", "", "in no room"),
        ("mixers/__init__.py", "from attnlab.mixers import linear", None),
        ("mixers/linear/a.py", "from attnlab.mixers.base import c\nfrom . import a\nfrom attnlab.ops.base import d", None),
        ("__init__.py", "from attnlab.cli import main", None),
    ],
)
def test_planted_imports_are_judged(tmp_path, name, text, fault):
    files = (
        "__init__",
        "core/__init__",
        "ops/base",
        "mixers/__init__",
        "mixers/base",
        "mixers/linear/__init__",
        "mixers/local/__init__",
    )
    for file in (*files, "mixers/local/b", "compare/b"):
        (tmp_path / "attnlab" / f"{file}.py").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "attnlab" / f"{file}.py").touch()
    (tmp_path / "attnlab" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "attnlab" / name).write_text(text)
    faults = import_faults(read(tmp_path))
    assert len(faults) == (fault is not None), faults
    assert fault is None or fault in faults[0]
