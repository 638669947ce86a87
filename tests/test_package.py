"""The package's own papers: extras that agree with the files the README's commands install, a license, a citation."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(file: str) -> list[str]:
    return (ROOT / file).read_text().split()


def test_the_tests_install_what_the_extras_name():
    extras = PROJECT["optional-dependencies"]
    assert sorted(requirements("tests/requirements.txt")) == sorted(
        extras["test"] + extras["harness"] + extras["wandb"] + extras["docs"]
    )


def test_every_requirement_is_installed():
    for line in requirements("requirements.txt") + requirements("tests/requirements.txt"):
        assert metadata.version(re.match(r"[\w-]+", line)[0]), line


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert "[Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
