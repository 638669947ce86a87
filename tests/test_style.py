"""The code is as ruff and mypy want it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


COMMANDS = [
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "secvec_jax", "tests", "docs"),
    pytest.param(("mypy",), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_clean(command, tmp_path):
    cache = ("--cache-dir", str(tmp_path)) if command[0] == "mypy" else ("--no-cache",)
    done = subprocess.run([sys.executable, "-m", *command, *cache], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
