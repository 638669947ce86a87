"""Imports between packages go one way: a lower package never imports a higher one, not even inside a function."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "secvec_jax"
MAY_IMPORT = {
    "model": set(),
    "data": set(),
    "vectors": {"model"},
    "activations": {"data", "model"},
    "inference": {"data", "model", "vectors"},
    "training": {"data", "model"},
    "planning": {"model", "training"},
    "evaluation": {"data", "inference", "model", "vectors"},
    "defenses": {"activations", "data", "evaluation", "inference", "model", "training", "vectors"},
    "workspace": {"data", "defenses", "evaluation", "inference", "model", "training", "vectors"},
    "recipes": {"data", "defenses", "evaluation", "inference", "model", "planning", "training", "vectors", "workspace"},
    "grid": {"activations", "data", "defenses", "evaluation", "inference", "model", "training", "vectors", "workspace"},
}
"""Package, or module that reads packages -> the others of this table that it may import; modules that are not listed,
none."""


def imports() -> set[tuple[str, str, str]]:
    """(package, file, imported package) of every import between packages; a module beside them counts as one."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE)
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"secvec_jax.{name}" for name in names] if node.module == "secvec_jax" else [node.module]
            targets = {name.split(".")[1] for name in names if name and name.startswith("secvec_jax.")}
            found |= {(place.parts[0].removesuffix(".py"), str(place), target) for target in targets}
    return {(package, file, target) for package, file, target in found if package != target}


def test_a_lower_package_imports_no_higher_one():
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    levels = set(MAY_IMPORT)
    assert packages <= levels, "a new package needs its line in MAY_IMPORT"
    wrong = [
        (file, target)
        for package, file, target in imports()
        if package != "__init__" and target in levels - MAY_IMPORT.get(package, set())
    ]
    assert not wrong


def test_planning_is_imported_by_its_verb_alone():
    users = {file for package, file, target in imports() if target == "planning"}
    assert users == {"recipes/plan.py"}


def test_the_check_sees_imports():
    assert ("training", "training/meter.py", "model") in imports()
    assert ("planning", "planning/plan.py", "training") in imports()
