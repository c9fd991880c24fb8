"""The parts import each other in one direction: promprune <- runtime <- export, and no folders import each other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from promprune.runtime.bench.plugins import PLUGINS

ROOT = Path(__file__).parents[1]
FLOORS = ("promprune", "runtime", "export")  # each may import itself and those before it
LINKS = ("promprune/export", "promprune/runtime")  # for editors; the files are those of the other two folders
# What a floor, or a folder of it, must not need; torch is part of the method's own folder only.
HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript")
FORBIDDEN = {"promprune": HEAVY, "runtime": HEAVY, "export": ()}
TORCH_ALLOWED = "promprune/method"
# The only strings that name a module of a higher floor.
UPWARD_TABLE = "runtime/bench/plugins.py"


def files_of(floor: str) -> list[Path]:
    files = sorted((ROOT / floor).rglob("*.py"))
    return [path for path in files if not str(path.relative_to(ROOT)).startswith(LINKS)]


def floor_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "promprune":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS[1:] else "promprune"


def file_of(module: str) -> Path | None:
    """Return the file of one of our modules; ``None`` if it is a name inside one, or not ours."""
    floor = floor_of(module)
    if floor is None:
        return None
    inner = module.split(".")[1 if floor == "promprune" else 2 :]
    path = ROOT.joinpath(floor, *inner)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imports_of(path: Path) -> Iterator[str]:
    """Yield every module that a file imports, at its top, in a function or for types only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            submodules = [name for name in names if file_of(name) is not None]
            yield from submodules
            if len(submodules) < len(names):
                yield node.module


def module_strings_of(path: Path) -> Iterator[str]:
    """Yield the strings of a file that name one of our modules, as ``importlib`` takes them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.partition(":")[0]
            if re.fullmatch(r"promprune(\.\w+)+", name) and file_of(name) is not None:
                yield name


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_only_itself_and_those_below(floor: str) -> None:
    allowed = FLOORS[: FLOORS.index(floor) + 1]
    for path in files_of(floor):
        name = path.relative_to(ROOT).as_posix()
        heavy = [] if name.startswith(TORCH_ALLOWED) else FORBIDDEN[floor]
        for module in imports_of(path):
            assert floor_of(module) in (None, *allowed), f"{name} imports {module}"
            assert module.partition(".")[0] not in heavy, f"{name} imports {module}"
        if name != UPWARD_TABLE:
            for module in module_strings_of(path):
                assert floor_of(module) in allowed, f"{name} names {module}"


def test_the_table_of_names_leads_to_modules() -> None:
    assert set(module_strings_of(ROOT / UPWARD_TABLE)) == set(PLUGINS.values())
    assert all(file_of(name) is not None for name in PLUGINS.values())


def folder_graph() -> Mapping[str, set[str]]:
    """Return folder -> folders that its files import; each of the three public faces is a separate node."""

    def node_of(path: Path) -> str:
        face = path.name == "__init__.py" and path.parent.name in FLOORS and path.parent.parent == ROOT
        return (path if face else path.parent).relative_to(ROOT).as_posix()

    graph: dict[str, set[str]] = {}
    for floor in FLOORS:
        for path in files_of(floor):
            found = {node_of(file) for module in imports_of(path) if (file := file_of(module)) is not None}
            graph.setdefault(node_of(path), set()).update(found - {node_of(path)})
    return graph


def test_no_folders_import_each_other() -> None:
    try:
        TopologicalSorter(folder_graph()).prepare()
    except CycleError as error:
        pytest.fail(f"a cycle of folders: {' -> '.join(error.args[1])}")


def test_tests_import_no_scripts_and_no_other_tests() -> None:
    """But for ``scripts/gpu``, a package that is tested like any other. What tests share is in ``tests/support``."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        scripts = [module for module in imports_of(path) if module.startswith("scripts")]
        assert all(module.startswith("scripts.gpu") for module in scripts), f"{path.name} imports {scripts}"
    for path in [*(ROOT / "scripts").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        shared = [module for module in imports_of(path) if module.startswith("tests")]
        assert all(module.startswith("tests.support") for module in shared), f"{path.name} imports {shared}"
