"""A disk that fills up at any write of a run: one line, nothing of value lost, and the same command resumes."""

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from secvec_jax import digests
from tests.disks import KIBIBYTES, Disk
from tests.processes import call
from tests.toys import tiny_model

TRAINING = ["--batch-size", "4", "--max-seq-len", "64", "--max-steps", "4", "--learning-rate", "1e-2", "--schedule",
            "constant", "--warmup-steps", "0", "--remat", "none", "--check-prompts", "0",
            "--save-every-seconds", "0.001"]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny_model().save(folder / "model")
    for name, reply in (("harmful", "Sure {}"), ("benign", "It is {}")):
        rows = [{"prompt": f"What is {i}?", "response": reply.format(i)} for i in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def commands(files: Path, out: Path) -> dict[str, tuple[str, ...]]:
    """Verb -> its command, which writes into `out`."""
    model, harmful, benign = (str(files / name) for name in ("model", "harmful.jsonl", "benign.jsonl"))
    return {
        "finetune": ("train.py", "finetune", "--model", model, "--data", benign, "--vectors", "none", *TRAINING),
        "vectors": ("train.py", "vectors", "--model", model, "--data", harmful, "--benign", benign, *TRAINING),
        "score": ("eval.py", "score", "--model", model, "--harmful", harmful, "--benign", benign, "--limit", "2",
                  "--reply-tokens", "4"),
        "export": ("eval.py", "export", "--model", model),
        "out": ("--out", str(out)),
    }  # fmt: skip


def run(files: Path, verb: str, out: Path) -> tuple[int, str]:
    of_verb = commands(files, out)
    code, _, err = call(*of_verb[verb], *of_verb["out"])
    return code, err


def made(folder: Path) -> dict[str, str]:
    """The digests of a run's model, vectors and losses: what a full disk must not change."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        tensors = sorted(load_file(path).items())
        found[str(path.relative_to(folder))] = digests.of_values([name, array.tolist()] for name, array in tensors)
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    steps = {record["step"]: record["loss"] for record in map(json.loads, lines)}
    return found | {"losses": json.dumps(sorted(steps.items()))}


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory) -> Callable[[str], tuple[dict[str, str], int]]:
    """Of a verb: what it makes, and the most KiB that its folder takes."""
    known: dict[str, tuple[dict[str, str], int]] = {}

    def of(verb: str) -> tuple[dict[str, str], int]:
        if verb not in known:
            out = tmp_path_factory.mktemp(verb) / "run"
            code, err = run(files, verb, out)
            assert code == 0, err
            known[verb] = made(out), sum(path.stat().st_size for path in out.rglob("*")) // 1024
        return known[verb]

    return of


def fails_and_resumes(files: Path, disk: Disk, verb: str, kibibytes: int, expected: dict[str, str]) -> str:
    """The line with which a run on a disk of this size ends; on a larger one it must go on as if nothing had been."""
    out = disk.folder / "run"
    disk.resize(kibibytes)
    begin = time.monotonic()
    code, err = run(files, verb, out)
    assert code in (0, 2) and "Traceback" not in err and time.monotonic() - begin < 120, err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    if code == 2:
        assert len(lines) == 1 and str(disk.folder) in lines[0] and "No space left on device" in lines[0], err
    assert not list(disk.folder.rglob(".*unfinished*"))
    disk.resize(KIBIBYTES)
    code, err = run(files, verb, out)
    assert code == 0, err
    assert made(out) == expected
    shutil.rmtree(out)
    return lines[0] if lines else "it fits"


def test_a_training_on_a_full_disk_ends_in_one_line_and_resumes(files, disk, undisturbed):
    expected, size = undisturbed("finetune")
    for kibibytes in (8, size // 2):
        assert "cannot write" in fails_and_resumes(files, disk, "finetune", kibibytes, expected)


@pytest.mark.release
@pytest.mark.parametrize("verb", ["finetune", "vectors", "score", "export"])
def test_disks_of_many_sizes(files, disk, undisturbed, verb):
    expected, size = undisturbed(verb)
    rng = random.Random(verb)
    sizes = sorted({4, 8, 16, *(rng.randrange(20, size + 40) for _ in range(6))})
    for kibibytes in sizes:
        line = fails_and_resumes(files, disk, verb, kibibytes, expected)
        print(f"{verb} on {kibibytes} KiB: {line}")


def test_a_run_that_was_moved_resumes_where_it_is_now(files, tmp_path, undisturbed):
    of_verb = commands(files, tmp_path / "before")
    assert call(*of_verb["finetune"], *of_verb["out"], "--max-steps", "2")[0] == 0
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "before", tmp_path / "elsewhere" / "after")
    leftover = tmp_path / "elsewhere" / "after" / ".model.unfinished-abcd1234"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    code, err = run(files, "finetune", tmp_path / "elsewhere" / "after")
    assert code == 0, err
    assert made(tmp_path / "elsewhere" / "after") == undisturbed("finetune")[0]
    assert not leftover.exists() and not (tmp_path / "before").exists()
