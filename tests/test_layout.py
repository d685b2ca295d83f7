"""Who may import whom: the folders of docs/architecture.md, read from the sources."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "torchquant": ROOT / "torchquant",
    "torchquant.quantizers": ROOT / "quantizers",
    "torchquant.backends": ROOT / "backends",
}
# inside the core, only downwards: a module may import from its own layer or from a lower one
LAYERS = [
    ["errors"],
    ["types", "files", "surroundings"],
    ["formats", "fx"],
    ["observers"],
    ["calibration"],
    ["measure"],
    ["artifacts", "lowering"],
    ["ops", "reporting", "solving"],
    ["analysis"],
    ["algorithms"],
    ["flow"],
    ["language", "precision", "training"],
    ["qat"],
    ["cli", "__init__"],
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def modules() -> dict[str, Path]:
    files = {}
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = list(file.relative_to(folder).with_suffix("").parts)
            if package == "torchquant" and parts[0] in ("quantizers", "backends"):
                continue
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            files[".".join([package, *parts])] = file
    return files


MODULES = modules()


def imports_of(file: Path) -> set[str]:
    imported = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= members & set(MODULES) or {str(node.module)}
    return imported


EDGES = {name: {i for i in imports_of(file) if i in MODULES and i != name} for name, file in MODULES.items()}


def folder_of(module: str) -> str:
    return next((f for f in ("torchquant.quantizers", "torchquant.backends") if module.startswith(f)), "torchquant")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_folders_import_only_what_they_may(module):
    allowed = {
        "torchquant": {"torchquant"},
        "torchquant.quantizers": {"torchquant", "torchquant.quantizers", "torchquant.backends"},
        "torchquant.backends": {"torchquant", "torchquant.backends"},
    }[folder_of(module)]
    if module not in ("torchquant.cli.main", "torchquant.cli.commands"):
        assert {folder_of(i) for i in EDGES[module]} <= allowed
    assert not imports_of(MODULES[module]) & {"quantizers", "backends"}, "import them as torchquant.quantizers, ..."


@pytest.mark.parametrize("module", sorted(m for m in MODULES if folder_of(m) == "torchquant"))
def test_the_core_imports_only_downwards(module):
    def rank(name: str) -> int:
        parts = name.split(".")
        return RANK[parts[1] if len(parts) > 1 else "__init__"]  # a KeyError: give the new module a layer above

    upward = {i for i in EDGES[module] if folder_of(i) == "torchquant" and i != "torchquant" and rank(i) > rank(module)}
    assert not upward


def test_there_is_no_import_cycle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' > '.join((*path, module))}"
        if module not in done:
            for imported in EDGES[module]:
                visit(imported, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_pyproject_names_every_package():
    text = (ROOT / "pyproject.toml").read_text()
    declared = set(re.findall(r'"([\w.]+)"', re.search(r"^packages = \[(\"torchquant\".*)\]$", text, re.M).group(1)))
    present = {name for name, file in MODULES.items() if file.name == "__init__.py"}
    assert declared == present
