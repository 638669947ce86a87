"""Every script of benchmarks/ runs to completion at toy size and writes its measurements."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HELPERS = {"gpu_attention", "gpu_rows", "rival", "sides", "toy"}
"""Files of benchmarks/ that are parts of the others."""
PATHS = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)}
COMPILERS = {
    name: pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")
    for name, package in (("scale", "libtpu"), ("scale_gpu", "jax_cuda13_plugin"))
}
"""Scripts that need a compiler for devices that are not here."""


def run_script(name: str, *arguments: object) -> str:
    command = [sys.executable, f"benchmarks/{name}.py", "--toy", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def positive(numbers: Iterable[float]) -> bool:
    """Whether there are some, all finite and above 0."""
    numbers = list(numbers)
    return bool(numbers) and all(math.isfinite(number) and number > 0 for number in numbers)


def check_sides(found: dict, count: int, printed: str) -> None:
    assert len(found["sides"]) == count and all(name in printed for name in found["sides"])
    for side in found["sides"].values():
        assert positive([side["seconds"], side["peak_gib"], *side["rounds"]])


def train_speed(out: Path) -> None:
    printed = run_script("train_speed", "--json", out, "--rounds", 1)
    found = json.loads(out.read_text())
    check_sides(found, 21, printed)
    assert len(found["ranges"]) == 12 and positive(found["ranges"][name]["median"] for name in found["ranges"])
    assert {"vectors_vs_peft", "raw_vs_peft", "vaccine_vs_sft", "frozen_vectors_overhead"} <= set(found["ratios"])
    assert len(found["useful tokens per step"]) == 6 and positive(found["useful tokens per step"].values())
    assert found["largest difference of losses"] < 1e-3


def decode_speed(out: Path) -> None:
    printed = run_script("decode_speed", "--json", out, "--rounds", 1)
    found = json.loads(out.read_text())
    check_sides(found, 3, printed)
    assert positive(found["ratios"].values()) and found["equal tokens"] > 0.9


def growth(out: Path) -> None:
    printed = run_script("growth", "--json", out)
    found = json.loads(out.read_text())
    assert set(found) == {"length", "length-whole", "line", "layers", "rank", "vectors", "batch"}
    for name, part in found.items():
        assert f"**{name}**" in printed and len(part["points"]) >= 2
        for point in part["points"]:
            assert positive(point[key] for key in ("seconds", "compile_seconds", "bytes", "temporary_bytes", "tokens"))
        assert all(math.isfinite(number) for fit in part["fits"].values() for number in fit.values())


def growth_runs(out: Path) -> None:
    printed = run_script("growth_runs", "--json", out)
    found = json.loads(out.read_text())
    assert set(found) == {"rows", "cells", "prompts"} and printed.count("| exponent |") == 3
    for part in found.values():
        assert len(part["points"]) == 2 and all(positive(point.values()) for point in part["points"])


def startup(out: Path) -> None:
    assert "| warm |" in run_script("startup", "--json", out)
    found = json.loads(out.read_text())
    assert len(found["cold"]) == len(found["warm"]) == 1
    assert positive([*found["cold"][0].values(), *found["warm"][0].values(), found["watched"]["first_step"]])
    parts = found["watched"]["seconds"]
    assert positive(parts[name] for name in ("imports", "rows", "model", "vectors", "batch", "step"))
    assert found["watched"]["compiling"] and positive(found["imports"][name] for name in ("jax", "secvec_jax"))


def gpu(out: Path) -> None:
    run_script("gpu", "--json", out, "--share")
    rows = json.loads(out.read_text())["rows"]
    parts = {"goals-toy", "attention-toy", "precision-toy", "remat-toy", "train-toy-256", "peft-toy-256"}
    assert {row["part"] for row in rows.values()} == parts
    for name, row in rows.items():
        assert row["status"] == "measured" or "cudnn" in name or "triton" in name, (name, row)
        if row["status"] == "measured":
            assert positive(found["seconds"] for found in row.get("shapes", {name: row}).values())


def precision_quality(out: Path) -> None:
    printed = run_script("precision_quality", "--json", out)
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["plain", "float32", "nf4", "int8", "bfloat16"] and "| float32, without vectors |" in printed
    for row in rows.values():
        assert positive([row["harmful_loss"]["value"], row["refusal"]["n"], row["exact_match"]["n"]])


def scale(out: Path) -> None:
    assert "llama-3.2-1b" in run_script("scale")


def scale_gpu(out: Path) -> None:
    assert "1 x h100 | task LoRA | bfloat16 | 1 x 128, dots |" in run_script("scale_gpu")


def alignment_adapter(out: Path) -> None:
    assert "% of the squared change" in run_script("alignment_adapter")


CHECKS = (
    *(train_speed, decode_speed, growth, growth_runs, precision_quality, startup, gpu, scale, scale_gpu),
    alignment_adapter,
)
SCRIPTS = {check.__name__: check for check in CHECKS}
"""What each script must leave; one that is not listed fails."""


@pytest.mark.slow
@pytest.mark.release
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.stem, marks=COMPILERS.get(path.stem, ()))
        for path in sorted((ROOT / "benchmarks").glob("*.py"))
        if path.stem not in HELPERS
    ],
)
def test_every_benchmark_script_runs_whole(name, tmp_path):
    assert name in SCRIPTS, f"benchmarks/{name}.py has no check of what it writes"
    SCRIPTS[name](tmp_path / "out.json")  # asserts on the results
