"""Every script of benchmarks/ runs whole, at toy size, and writes what it measured."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HELPERS = {"gpu_attention", "gpu_rows", "rival", "sides", "toy"}
"""Files of benchmarks/ that are parts of the others."""
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def run_script(name: str, *arguments: object) -> str:
    command = [sys.executable, f"benchmarks/{name}.py", "--toy", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def train_speed(out: Path) -> None:
    printed = run_script("train_speed", "--json", out, "--rounds", 1)
    found = json.loads(out.read_text())
    assert {"vectors_vs_peft", "raw_vs_peft", "vaccine_vs_sft", "frozen_vectors_overhead"} <= set(found["ratios"])
    assert len(found["sides"]) == 18 and all(name in printed for name in found["sides"])
    assert found["largest difference of losses"] < 1e-3


def decode_speed(out: Path) -> None:
    assert "equal tokens" in run_script("decode_speed", "--json", out, "--rounds", 1)
    assert json.loads(out.read_text())["equal tokens"] > 0.9


def growth(out: Path) -> None:
    printed = run_script("growth", "--json", out)
    found = json.loads(out.read_text())
    assert len(found) == 7 and all(len(part["points"]) == 2 and name in printed for name, part in found.items())


def startup(out: Path) -> None:
    assert "| warm |" in run_script("startup", "--json", out)
    assert {"imports", "rows", "model", "vectors", "step"} <= set(json.loads(out.read_text())["watched"]["seconds"])


def gpu(out: Path) -> None:
    run_script("gpu", "--json", out)
    rows = json.loads(out.read_text())["rows"].values()
    assert sum(row["status"] == "measured" for row in rows) > 5


def scale(out: Path) -> None:
    assert "llama-3.2-1b" in run_script("scale")


SCRIPTS = {check.__name__: check for check in (train_speed, decode_speed, growth, startup, gpu, scale)}
"""What each script must leave; one that is not listed fails."""


@pytest.mark.release
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.stem, marks=needs_compiler if path.stem == "scale" else ())
        for path in sorted((ROOT / "benchmarks").glob("*.py"))
        if path.stem not in HELPERS
    ],
)
def test_every_benchmark_script_runs_whole(name, tmp_path):
    SCRIPTS[name](tmp_path / "out.json")
