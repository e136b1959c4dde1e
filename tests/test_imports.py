"""Imports run downwards only, and pyproject.toml tells the truth about who needs what."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("search", "trainables")
DEPENDENCY = re.compile(r'^\s+"(?P<name>[\w-]+)[^"]*",\s*# (?P<files>[^:\n]+)(?P<reason>:.*)?$', re.MULTILINE)


def imported_by(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it; `from a import b` counts as both a and a.b."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write the full name"
            assert node.module
            modules.add(node.module)
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return modules


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*folders: str) -> dict[str, Path]:
    return {module_name(path): path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))}


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


SOURCES = sources(*OURS)
IMPORTS = {name: imported_by(path) for name, path in SOURCES.items()}
EVERY_FILE = [*ROOT.glob("*.py"), *sources(*OURS, "tests", "benchmarks").values()]


@pytest.mark.parametrize("module", [name for name in SOURCES if within(name, "search")])
def test_the_engine_knows_no_model(module: str) -> None:
    models = {
        name for name in IMPORTS[module] if within(name, "trainables") and not within(name, "trainables.contract")
    }
    assert models <= {"trainables"}  # the package, as in `from trainables import contract`


@pytest.mark.parametrize("module", [name for name in SOURCES if within(name, "trainables")])
def test_models_know_neither_the_engine_nor_ray(module: str) -> None:
    roots = {name.split(".")[0] for name in IMPORTS[module]}
    assert roots & {"launch", "search", "ray"} == set()


def test_the_contract_needs_only_torch() -> None:
    assert {name.split(".")[0] for name in IMPORTS["trainables.contract"]} - sys.stdlib_module_names == {"torch"}


def test_the_command_leans_on_the_engine_alone() -> None:
    imported = imported_by(ROOT / "launch.py")
    foreign = {name for name in imported if name.split(".")[0] not in {"search", *sys.stdlib_module_names}}
    assert {name for name in foreign if not within(name, "trainables.contract")} == set()


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: names & SOURCES.keys() - {module} for module, names in IMPORTS.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the modules
    assert sorted(order) == sorted(graph)


def declared() -> list[re.Match[str]]:
    project, _, _ = (ROOT / "pyproject.toml").read_text().partition("[build-system]")
    return list(DEPENDENCY.finditer(project))


def import_names(distribution: str) -> set[str]:
    normal = distribution.lower().replace("_", "-")
    installed = {
        name
        for name, distributions in packages_distributions().items()
        if normal in {each.lower().replace("_", "-") for each in distributions}
    }
    return installed or {normal.replace("-", "_")}  # not installed: the compiled extras, away from a GPU


def test_every_dependency_names_a_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    names = [re.split(r"[^\w-]", requirement)[0] for requirements in lists for requirement in requirements]
    assert [dependency["name"] for dependency in declared()] == names


@pytest.mark.parametrize("dependency", declared(), ids=lambda match: match["name"])
def test_the_named_files_need_the_dependency(dependency: re.Match[str]) -> None:
    for file in dependency["files"].split():
        path = ROOT / file
        assert path.exists(), f"pyproject.toml: {file}, said to need {dependency['name']}, does not exist"
        if dependency["reason"]:
            continue
        if path.suffix == ".py":
            roots = {name.split(".")[0] for name in imported_by(path)}
            assert roots & import_names(dependency["name"]), f"{file} does not import {dependency['name']}"
        else:
            assert re.search(rf"\b{dependency['name']}\b", path.read_text()), f"{file} does not use it"


@pytest.mark.slow
def test_every_foreign_import_is_declared() -> None:
    known = sys.stdlib_module_names | {"launch", "benchmarks", "tests", *OURS}
    known |= {name for dependency in declared() for name in import_names(dependency["name"])}
    for path in EVERY_FILE:
        near = [path.parent, ROOT / "benchmarks"] if path.parent.name == "tests" else [path.parent]
        neighbours = {neighbour.stem for folder in near for neighbour in folder.glob("*.py")}
        foreign = {name.split(".")[0] for name in imported_by(path)} - known - neighbours
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}, which pyproject.toml does not name"
