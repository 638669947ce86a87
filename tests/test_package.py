"""The package's metadata: extras that agree with the files the README's commands install, a license, a citation."""

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import secvec_jax as sv
from secvec_jax import cli

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(file: str) -> list[str]:
    return (ROOT / file).read_text().split()


OPTIONAL = {"anyio", "inspect_ai", "lm_eval", "torch", "wandb"}
"""Imported by the verbs that need them: extras."""

UNLISTED = {"pip"}
"""Imported, and part of every environment."""


def imported() -> set[str]:
    """The top-level modules that the package imports, other than its own and Python's."""
    found = set()
    for path in (ROOT / "secvec_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"secvec_jax"}


def name_of(requirement: str) -> str:
    return canonicalize_name(re.match(r"[\w.-]+", requirement)[0])


def test_what_is_imported_is_required_and_what_is_required_is_imported():
    distributions = metadata.packages_distributions()
    modules = imported()
    used = {canonicalize_name(name) for module in modules - OPTIONAL for name in distributions[module]}
    listed = {name_of(line) for line in requirements("requirements.txt")}
    assert used - UNLISTED == listed
    assert OPTIONAL <= modules


def test_the_oldest_versions_are_the_lower_bounds():
    oldest = [line.replace(">=", "==") for line in requirements("requirements.txt")]
    assert requirements("requirements-oldest.txt") == oldest


def test_the_lock_file_has_one_version_of_every_requirement_within_its_bounds():
    locked = dict(line.split("==") for line in requirements("requirements.lock"))
    assert all(Version(version) for version in locked.values())
    for line in requirements("requirements.txt") + requirements("tests/requirements.txt"):
        requirement = Requirement(line)
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier, line


def test_the_console_command_runs_the_verbs():
    (entry,) = metadata.EntryPoints(
        metadata.EntryPoint(name, value, "console_scripts") for name, value in PROJECT["scripts"].items()
    )
    assert entry.name == "secvec" and entry.load() is cli.main
    assert (ROOT / "secvec_jax" / "py.typed").exists()


def test_the_tests_install_what_the_extras_name():
    extras = PROJECT["optional-dependencies"]
    assert sorted(requirements("tests/requirements.txt")) == sorted(
        extras["test"] + extras["harness"] + extras["inspect"] + extras["wandb"] + extras["docs"]
    )


def test_every_requirement_is_installed():
    for line in requirements("requirements.txt") + requirements("tests/requirements.txt"):
        assert metadata.version(re.match(r"[\w-]+", line)[0]), line


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == sv.__version__ and citation["license"] == PROJECT["license"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    newest = re.search(r"(?m)^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text())
    assert newest and newest[1] == sv.__version__


def test_the_version_is_in_one_place():
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    assert re.findall(r"(?m)^__version__ = \"(.+)\"$", (ROOT / "secvec_jax" / "__init__.py").read_text()) == [
        sv.__version__
    ]


def test_the_workflow_names_files_that_exist():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    commands = " ".join(step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"])
    for file in re.findall(r"(?<![\w/])[\w./-]+\.(?:py|txt)|\.ci/run", commands):
        assert (ROOT / file).exists(), file
