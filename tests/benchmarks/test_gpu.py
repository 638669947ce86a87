"""What benchmarks/gpu.py does around its measurements; `--toy` covers the measurements themselves."""

import importlib
import json
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def load(monkeypatch):
    """`load("gpu")`: a file of benchmarks/ as the module that it is when it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def row(load):
    return load("gpu").Row("part", "ours", "full", "toy", 256, 1024, remats=("dots", "full"))


def test_the_names_of_rows_are_known_to_their_processes(load):
    gpu, rows, attention = load("gpu"), load("gpu_rows"), load("gpu_attention")
    everything = gpu.all_rows(False) + gpu.all_rows(True)
    assert len({row.key for row in everything}) == len(everything)
    assert set(gpu.KERNELS) == set(attention.KERNELS)
    assert all((ROOT / "configs" / "models" / f"{rows.FILES[model]}.json").exists() for model in gpu.MODELS)


def test_sequences_are_halved_after_everything_else_was_tried(row):
    assert row.attempts == [(4, "dots"), (4, "full"), (2, "full"), (1, "full")]


def test_a_row_that_runs_out_of_memory_goes_on_in_another_process(load, row):
    calls = []

    def start(row, attempts, seconds):
        calls.append(list(attempts))
        return {"out_of_memory": 1} if len(calls) == 1 else {"attempt": 1, "lines": attempts[1][0]}

    found = load("gpu").measured(row, time.monotonic() + 100, start)
    assert [len(attempts) for attempts in calls] == [4, 2]
    assert (found["status"], found["lines"]) == ("measured", 1)
    assert found["too_large"] == [(4, "dots"), (4, "full"), (2, "full")]


@pytest.mark.parametrize(
    ("said", "status"),
    [({"out_of_memory": 3}, "failed"), ({"error": "no kernel"}, "failed"), ({"skipped": "late"}, "skipped")],
)
def test_why_a_row_has_no_number_is_kept(load, row, said, status):
    found = load("gpu").measured(row, time.monotonic() + 100, lambda *arguments: said)
    assert found["status"] == status and found["error"]


def test_nothing_is_started_when_a_part_has_no_time_left(load, row):
    found = load("gpu").measured(row, time.monotonic(), lambda *arguments: pytest.fail("started"))
    assert found["status"] == "skipped"


def test_packed_sequences_hold_whole_segments(load):
    batch = load("gpu_rows").packed(3, 64, 4, 100)
    assert batch["tokens"].shape == (3, 64) and batch["weights"].all()
    assert np.array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    for segments, positions in zip(batch["segments"], batch["positions"]):
        assert sorted(set(segments)) == [1, 2, 3, 4] and np.all(np.diff(segments) >= 0)
        for segment in range(1, 5):
            assert positions[segments == segment].tolist() == list(range((segments == segment).sum()))


def test_sequences_of_real_rows_hold_whole_rows_and_padding(load):
    rows = load("gpu_rows")
    batch = rows.packed(3, 1024, 0, 100)
    lengths = [int((line == segment).sum()) for line in batch["segments"] for segment in range(1, line.max() + 1)]
    assert lengths == json.loads(rows.ROW_LENGTHS.read_text())[: len(lengths)]
    assert np.array_equal(batch["weights"] > 0, batch["segments"] > 0) and batch["weights"].mean() > 0.7
    starts = batch["positions"] == 0
    assert [line.sum() for line in starts] == [line.max() + (line == 0).any() for line in batch["segments"]]
    assert max(lengths) < 1024 and 250 < rows.mean_real_length() < 350


def test_mfu_is_the_formula_over_the_peak_of_the_device(load):
    rows = load("gpu_rows")
    row = {"model": "7b", "length": 2048, "segments": 4}
    found = rows.account(row, [rows.Work(16384, 0, full=True)], [2.0, 1.0, 9.0], "NVIDIA H200")
    n, a = 6_607_077_376, 2 * 2048 * 4096 * 32
    assert found["seconds"] == 2.0 and found["tokens_per_second"] == 8192
    assert found["mfu"] == pytest.approx(16384 * (6 * n + 3 * a) / 2.0 / 989e12)
    assert rows.account(row, [rows.Work(1, 0, full=True)], [1.0], "cpu")["mfu"] is None


def test_the_table_has_a_line_for_every_row(load):
    gpu = load("gpu")
    step = {
        "status": "measured", "device": "NVIDIA H200", "part": "train-1b-2048", "kind": "full", "model": "1b",
        "length": 2048, "segments": 4, "optimizer": "adamw", "trained": "float32",
        "frozen": "bfloat16", "unrolled": False, "lines": 8, "remat": "dots",
        "formula": "6N+3a per token", "mfu": 0.4, "peak_bytes": 2**34, "seconds": 0.5,
    }  # fmt: skip
    shapes = {"1b 2048": {"seconds": 0.001, "tflops": 300.0, "difference": 0.01}, "1b 4096": {"error": "too long"}}
    kernel = {"status": "measured", "device": "NVIDIA H200", "part": "attention", "kind": "triton", "shapes": shapes}
    ours = step | {"by": "ours", "tokens_per_second": 30000.0, "program_bytes": 2**33}
    text = gpu.table({"rows": {
        "a": ours, "b": step | {"by": "peft", "tokens_per_second": 2e4},
        "c": kernel | {"by": "attention"}, "d": {"status": "failed", "error": "it broke"},
    }})  # fmt: skip
    line = "| triton | 1.00 ms, 300 TFLOP/s | - | 1.0e-02 |"
    for part in (
        line,
        "1.50x",
        "40.0%",
        "16.0 GiB",
        "16.0 (8.0) GiB",
        "- d: failed: it broke",
        "- c: 1b 4096: too long",
    ):
        assert part in text
