"""A plan compiles the actual step for a topology that is not attached; its FLOPs are those of the formula."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from secvec_jax.errors import UserError
from secvec_jax.model.decoder import abstract_decoder
from secvec_jax.model.flops import matmul_parameters
from secvec_jax.model.hub import load_architecture
from secvec_jax.planning.plan import Work, topology_mesh
from tests.processes import call
from tests.toys import ARCHITECTURE

ROOT = Path(__file__).parents[2]
SHAPES = sorted((ROOT / "configs" / "models").glob("*.json"))
needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def train(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "train.py", "plan", *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize(("full", "keep", "expected"), [(True, 0, 6), (False, 0, 4)])
def test_flops_are_those_of_the_formula(full, keep, expected):
    a, length = ARCHITECTURE, 64
    work = Work(learn=1000, keep=keep, full=full)
    attention = 2 * length * a.hidden_size * a.num_layers
    assert work.flops(a, length) == 1000 * (expected * matmul_parameters(a) + 3 * attention)
    assert work.formula.startswith(f"{expected}N+3a")


def test_rows_to_keep_are_read_once_more_without_vectors():
    a, length = ARCHITECTURE, 64
    with_keep, without = (Work(1000, keep, False).flops(a, length) for keep in (500, 0))
    attention = 2 * length * a.hidden_size * a.num_layers
    assert with_keep - without == 500 * (6 * matmul_parameters(a) + 4 * attention)


_PUBLISHED = {"llama-3.2-1b": 1.24, "llama-3.2-3b": 3.21}
"""Billions of parameters by their model cards, where the name says less."""


@pytest.mark.parametrize("path", SHAPES, ids=[path.stem for path in SHAPES])
def test_the_published_shapes_have_their_names_many_parameters(path):
    architecture = load_architecture(path)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_decoder(architecture)))
    billions = _PUBLISHED.get(path.stem) or float(path.stem.split("-")[-1].removesuffix("b"))
    assert parameters / 1e9 == pytest.approx(billions, rel=0.05)
    embedding = 0 if architecture.tied_head else architecture.vocab_size * architecture.hidden_size
    norms = parameters - matmul_parameters(architecture) - embedding
    assert 0 < norms < 1e-3 * parameters


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_the_compiler_the_extra_is_named():
    with pytest.raises(UserError, match=r"pip install \"jax\[tpu\]\""):
        topology_mesh("v5e:4x4", "")
    code, _, errors = call("train.py", "plan")
    assert code == 2
    assert errors.strip().count("\n") == 0 and "jax[tpu]" in errors


@needs_compiler
@pytest.mark.release
@pytest.mark.parametrize("phase", ["finetune", "vectors"])
def test_a_plan_names_memory_and_utilization(phase):
    done = train(
        "--model", "smollm2", "--topology", "v5e:2x2", "--phase", phase, "--batch-size", "8", "--max-seq-len", "512"
    )
    assert done.returncode == 0, done.stderr
    assert "HBM per chip: parameters" in done.stdout and "of 16.00 GiB" in done.stdout
    assert "MFU" in done.stdout and "compile time" in done.stdout
    assert "WARNING" not in done.stderr


@needs_compiler
@pytest.mark.release
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--topology", "v5e:9x9x9"), "unknown TPU topology 'v5e:9x9x9'"),
        (("--mesh", "fsdp=3"), "needs 3 devices, but there are 4"),
        (("--mesh", "tensor=4", "--model", "smollm2"), "tensor=4 does not divide the model's 9 attention heads"),
        (("--batch-size", "6"), "6 sequences"),
        (
            ("--model", "configs/models/llama-2-70b.json", "--topology", "v5e:2x2", "--batch-size", "4"),
            "does not fit into",
        ),
    ],
)
def test_what_cannot_be_is_reported_in_a_line(arguments, words):
    done = train(*arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr and done.stderr.strip().count("\n") == 0
