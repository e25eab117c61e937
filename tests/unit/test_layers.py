"""Imports point down only: the layers of docs/design.md, read from the source.

Every import statement counts, in a function or under `if TYPE_CHECKING` too, and so does
`import_module` with a literal name. What stands under `rawaio.loops` or `rawaio.cli` is one entry
of the order seen from outside; among each other its modules may not form a cycle.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "rawaio"

# Lowest first. A module imports only what stands before it: then no arrow between layers points
# up, none within a layer points against this order, and no cycle is possible.
ORDER = {
    "errors": 0,
    "_light": 0,
    "enums": 0,
    "_uninterrupted": 0,
    "unraisable": 0,
    "protocols": 0,
    "syscalls": 0,
    "memory": 0,
    "ring": 1,
    "request": 1,
    "lifecycle": 1,
    "slab": 1,
    "geometry": 2,
    "polling": 2,
    "busypoll": 2,
    "queue": 2,
    "statistics": 2,
    "kernel": 2,
    "pieces": 2,
    "bulk": 2,
    "bulkcalls": 2,
    "reaping": 2,
    "context": 2,
    "rangelock": 2,
    "workers": 2,
    "descriptor": 3,
    "operation": 3,
    "driver": 3,
    "transfer": 3,
    "blocking": 3,
    "many": 3,
    "loops": 3,
    "handle": 3,
    "reading": 3,
    "writing": 3,
    "file": 3,
    "testing": 4,
    "cli": 4,
    "__main__": 4,
}
HIGHEST_EAGER = 2  # what is above, rawaio/__init__.py imports on first use only
LOWEST_USER_OF_ROOT = 4  # those below would import the whole package with its public names

# Nothing of the package at all, and nothing of these.
FORBIDDEN = {
    "errors": {PACKAGE},
    "_light": {PACKAGE},
    "queue": {"ctypes", "os"},
    "polling": {"ctypes", "os"},
}
# For types only, and known to type checkers without being installed.
STUBS = {"_typeshed", "typing_extensions"}


class Import(NamedTuple):
    """One imported module, by its full name."""

    importer: str
    target: str
    line: int
    lazy: bool  # in a function: happens when that is called
    typing_only: bool  # never happens

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}: {self.target}"


class Reader(ast.NodeVisitor):
    """Collects the imports of one module."""

    def __init__(self, name: str, is_package: bool, known: set[str]) -> None:
        self.name = name
        self.parent = name.split(".") if is_package else name.split(".")[:-1]
        self.known = known
        self.found: list[Import] = []
        self._lazy = False
        self._typing_only = False

    def _add(self, node: ast.AST, target: str) -> None:
        line = getattr(node, "lineno", 0)
        self.found.append(Import(self.name, target, line, self._lazy, self._typing_only))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self.parent[: len(self.parent) - node.level + 1] if node.level else []
        origin = ".".join([*base, *filter(None, [node.module])])
        for alias in node.names:
            # `from package import name` is a submodule, or something in the package itself.
            submodule = f"{origin}.{alias.name}"
            self._add(node, submodule if submodule in self.known else origin)

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        called = function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
        if called in {"import_module", "__import__"} and node.args:
            target = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            if isinstance(target, str):
                relative = target.startswith(".")
                self._add(node, ".".join(self.parent) + target if relative else target)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        before = self._typing_only
        self._typing_only |= ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
        for statement in node.body:
            self.visit(statement)
        self._typing_only = before
        for statement in node.orelse:
            self.visit(statement)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._visit_later(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._visit_later(node)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._visit_later(node)

    def _visit_later(self, node: ast.AST) -> None:
        before = self._lazy
        self._lazy = True
        self.generic_visit(node)
        self._lazy = before


def read_imports(root: Path) -> dict[str, list[Import]]:
    """The imports of every module of the package under `root`, by the module's full name."""
    paths: dict[str, Path] = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = list(path.relative_to(root).with_suffix("").parts)
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    result: dict[str, list[Import]] = {}
    for name, path in paths.items():
        reader = Reader(name, path.name == "__init__.py", set(paths))
        reader.visit(ast.parse(path.read_text("utf-8"), str(path)))
        result[name] = reader.found
    return result


def entry(module: str) -> str:
    """What stands for a module in ORDER; "" for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def is_own(module: str) -> bool:
    """Whether a module is the package or in it."""
    return module.partition(".")[0] == PACKAGE


def complaint(found: Import) -> str | None:
    """What is wrong with one import, if anything is."""
    source, target, top = entry(found.importer), entry(found.target), found.target.partition(".")[0]
    if top in FORBIDDEN.get(source, ()):
        return f"{found}: {source} must do without {top}"
    if not is_own(found.target):
        if top in sys.stdlib_module_names or source == "cli":
            return None
        if found.typing_only and top in STUBS:
            return None
        return f"{found}: not in the standard library"
    if target and target not in ORDER:
        return f"{found}: has no layer"
    if not source:  # rawaio/__init__.py
        if target and ORDER[target] > HIGHEST_EAGER and not (found.lazy or found.typing_only):
            return f"{found}: L{ORDER[target]} must be imported on first use"
        return None
    if not target:
        if ORDER[source] < LOWEST_USER_OF_ROOT:
            return f"{found}: points up, to the package itself"
        return None
    names = list(ORDER)
    if names.index(target) > names.index(source):
        return f"{found}: points up, from L{ORDER[source]} to L{ORDER[target]}"
    return None


def find_cycle(edges: dict[str, set[str]]) -> list[str]:
    """The modules of one cycle, its first one again at the end; empty when there is none."""
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(edges.get(module, ())):
            if cycle := search(target, [*path, module]):
                return cycle
        done.add(module)
        return []

    for module in sorted(edges):
        if cycle := search(module, []):
            return cycle
    return []


def complaints(root: Path) -> list[str]:
    """Everything that is wrong with the imports of the package under `root`."""
    imports = read_imports(root)
    result = [
        f"{name}: has no layer; give it one in {Path(__file__).name}"
        for name in imports
        if entry(name) and entry(name) not in ORDER
    ]
    # A module without a layer is complained of once, not for each of its imports too.
    placed = [name for name in imports if not entry(name) or entry(name) in ORDER]
    result += [text for name in placed for found in imports[name] if (text := complaint(found))]
    # The package itself hands out the names of all layers, later and on demand: no cycle.
    edges = {
        name: {found.target for found in imports[name] if is_own(found.target)} - {PACKAGE}
        for name in imports
        if name != PACKAGE
    }
    if cycle := find_cycle(edges):
        result.append(f"cycle: {' -> '.join(cycle)}")
    return result


def test_imports_point_down() -> None:
    assert read_imports(ROOT)
    assert complaints(ROOT) == []


def test_importing_the_package_brings_in_little() -> None:
    # -S leaves .pth files and sitecustomize out, and with them what others import at start.
    # site-packages itself stays in reach, so that an import tried "if there is one" shows.
    path = [ROOT, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    program = f"import sys, {PACKAGE}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert PACKAGE in loaded
    assert "asyncio" not in loaded
    assert loaded - {PACKAGE, "__main__"} <= sys.stdlib_module_names


# What follows asks whether the checker itself sees what it should.

SOUND = {
    "__init__.py": """
        from typing import TYPE_CHECKING
        from .context import IOContext
        if TYPE_CHECKING:
            from .file import File
        def __getattr__(name):
            from importlib import import_module
            from . import testing
            return import_module(".file", __name__)
    """,
    "__main__.py": "from rawaio.cli import main",
    "_uninterrupted.py": "from collections import deque",
    "errors.py": "",
    "syscalls.py": "import ctypes\nfrom .errors import RawAIOError",
    "memory.py": """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from _typeshed import ReadableBuffer
    """,
    "ring.py": "from rawaio import syscalls",
    "request.py": "from . import memory, syscalls\nfrom .errors import RawAIOError",
    "polling.py": "from dataclasses import dataclass",
    "queue.py": "import rawaio.request",
    "context.py": "from .polling import Rule\nfrom .queue import SubmissionQueue\nimport os",
    "file.py": "import asyncio\nfrom .context import IOContext\nfrom .loops import driver",
    "loops/__init__.py": "from ._asyncio import driver",
    "loops/_asyncio.py": "import asyncio\nfrom ..context import IOContext",
    "testing.py": "from .queue import SubmissionQueue\nimport rawaio",
    "cli/__init__.py": "def main():\n    from . import bench",
    "cli/bench.py": "import rawaio\nimport rich\nfrom ._table import table",
    "cli/_table.py": "from rich.table import Table",
}


def grow(root: Path, modules: dict[str, str]) -> Path:
    for name, source in modules.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ast.unparse(ast.parse(_dedented(source))), "utf-8")
    return root


def _dedented(source: str) -> str:
    lines = source.strip("\n").split("\n")
    margin = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[margin:] for line in lines)


def test_a_sound_tree_passes(tmp_path: Path) -> None:
    assert complaints(grow(tmp_path, SOUND)) == []


def test_modules_may_still_be_missing(tmp_path: Path) -> None:
    assert complaints(grow(tmp_path, {"errors.py": "", "queue.py": ""})) == []


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("queue.py", "from .context import IOContext", "points up, from L2 to L2"),
        ("polling.py", "from rawaio.context import IOContext", "points up, from L2 to L2"),
        ("geometry.py", "import rawaio.context", "points up, from L2 to L2"),
        ("ring.py", "from . import queue", "points up, from L1 to L2"),
        ("memory.py", "from rawaio import ring as r", "points up, from L0 to L1"),
        ("request.py", "def f():\n    from .queue import Q", "points up, from L1 to L2"),
        ("request.py", "f = lambda: __import__('rawaio.queue')", "points up, from L1 to L2"),
        ("context.py", "import_module('.file', 'rawaio')", "points up, from L2 to L3"),
        ("context.py", "async def f():\n    import rawaio.loops", "points up, from L2 to L3"),
        ("context.py", "try:\n    import rawaio.cli\nexcept E:\n    pass", "from L2 to L4"),
        ("loops/_asyncio.py", "from ..file import File", "points up, from L3 to L3"),
        ("file.py", "from .testing import SimulatedKernel", "points up, from L3 to L4"),
        (
            "context.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .file import File",
            "points up, from L2 to L3",
        ),
        ("file.py", "import rawaio", "points up, to the package itself"),
        ("bulk.py", "from . import IOContext", "points up, to the package itself"),
        ("errors.py", "from . import _uninterrupted", "errors must do without rawaio"),
        ("_light.py", "from .errors import E", "_light must do without rawaio"),
        ("queue.py", "def f():\n    import os.path", "queue must do without os"),
        ("queue.py", "from ctypes import sizeof", "queue must do without ctypes"),
        ("polling.py", "from os import read", "polling must do without os"),
        ("context.py", "import numpy", "not in the standard library"),
        ("context.py", "from typing_extensions import Buffer", "not in the standard library"),
        ("__init__.py", "def f():\n    import rich", "not in the standard library"),
        ("__init__.py", "from .file import File", "L3 must be imported on first use"),
        ("__init__.py", "class C:\n    from . import testing", "L4 must be imported on first use"),
        ("misc.py", "", "has no layer"),
        ("file.py", "import rawaio.misc", "has no layer"),
        ("cli/_table.py", "from .bench import B", "cycle: rawaio.cli.bench -> rawaio.cli._table"),
        ("cli/bench.py", "from . import main", "cycle: rawaio.cli -> rawaio.cli.bench"),
    ],
)
def test_an_unsound_tree_fails(tmp_path: Path, module: str, source: str, expected: str) -> None:
    first, *others = complaints(grow(tmp_path, {**SOUND, module: source}))
    assert expected in first
    assert all(text.startswith("cycle: ") for text in others)


def test_a_cycle_between_layers_is_named(tmp_path: Path) -> None:
    tree = grow(tmp_path, {**SOUND, "request.py": "from .queue import SubmissionQueue"})
    assert complaints(tree) == [
        "rawaio.request, line 1: rawaio.queue: points up, from L1 to L2",
        "cycle: rawaio.queue -> rawaio.request -> rawaio.queue",
    ]
