"""The packages stand on floors: what is imported lies lower, in no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# From the ground up; of two packages in one tuple neither imports the other.
FLOORS = [
    ("core", "metrics"),
    ("towers",),
    ("config", "data", "quant"),
    ("models", "cli"),
    ("results",),
    ("suites", "deploy", "sweeps"),
    ("evaluation", "reports"),
    ("training",),
    ("callbacks",),
    ("stages",),
    ("fit", "evaluate", "export", "bench", "sweep"),
    ("api", "__main__"),
]
HEIGHT = {package: height for height, floor in enumerate(FLOORS) for package in floor}
DATA = {"recipes", "slurm", "assets"}  # read as files


def modules() -> dict[str, Path]:
    """Return {name below qatlab: file} of every module."""
    found = {}
    for path in (ROOT / "qatlab").rglob("*.py"):
        parts = path.relative_to(ROOT / "qatlab").with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").rstrip(".")] = path
    for path in (ROOT / "callbacks").glob("*.py"):
        found[f"callbacks.{path.stem}".removesuffix(".__init__")] = path
    return found


def imported(path: Path) -> Iterator[str]:
    """Yield the dotted names below qatlab that a file imports, lazily or for types alone too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@cache
def arrows() -> dict[str, set[str]]:
    """Return {module: modules of qatlab that it imports}."""
    known = modules()
    found: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for dotted in imported(path):
            package, _, rest = dotted.partition(".")
            if package != "qatlab":
                continue
            target = rest if rest in known else rest.rpartition(".")[0]
            assert target in known, f"{path} imports {dotted}, which is no module"
            if target != name:
                found[name].add(target)
    return found


def package_of(module: str) -> str:
    return module.partition(".")[0]


def test_every_package_has_a_floor() -> None:
    packages = {package_of(name) for name in modules()} - {""}
    assert packages - DATA == set(HEIGHT)


def test_imports_go_down() -> None:
    wrong = [
        f"{name} -> {target}"
        for name, targets in arrows().items()
        for target in sorted(targets)
        if name and target and package_of(name) != package_of(target)
        if HEIGHT[package_of(target)] >= HEIGHT[package_of(name)]
    ]
    assert wrong == []


def test_metrics_import_nothing_of_the_project() -> None:
    for name, targets in arrows().items():
        if package_of(name) == "metrics":
            assert {package_of(target) for target in targets} <= {"metrics"}, name


def test_only_stages_import_callbacks() -> None:
    users = {
        package_of(name)
        for name, targets in arrows().items()
        if "callbacks" in {package_of(target) for target in targets}
    }
    assert users - {"callbacks"} == {"stages"}


def test_no_module_imports_itself_by_a_detour() -> None:
    left = {name: set(targets) for name, targets in arrows().items()}
    while done := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in done:
            del left[name]
    assert left == {}
