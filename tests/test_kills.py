"""A process that is killed amid a write: the same command then ends as if nothing had been, and leaves nothing behind."""

import json
import random
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from secvec_jax import assets, digests
from secvec_jax.grid import attacks, probes
from tests.bad_inputs.models import write_gguf
from tests.chat_server import Server, says
from tests.processes import Program, call
from tests.toys import tiny_model

KILLS = 5
"""Of each kind of write."""
TRAINING = ["--batch-size", "4", "--max-seq-len", "64", "--max-steps", "4", "--learning-rate", "1e-2", "--schedule",
            "constant", "--warmup-steps", "0", "--remat", "none", "--check-prompts", "0",
            "--save-every-seconds", "0.001"]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """verb: of `commands`. part: the paths whose writes are interrupted, as a pattern."""

    verb: str
    part: str


KINDS = {
    "model": Kind("finetune", r"/run/\.?model\b"),
    "checkpoint": Kind("finetune", r"/run/checkpoints/"),
    "vectors": Kind("vectors", r"/run/vectors\b"),
    "export": Kind("export", r"/\.?run\b"),
    "conversion": Kind("convert", r"/cache/models/"),
    "verdicts": Kind("judge", r"/cache/verdicts/"),
    "cell": Kind("grid", r"/run/cells/"),
    "results": Kind("score", r"/run/\.?results\.json"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A model as a folder and as a GGUF file, rows of two kinds, and a grid of one cell."""
    folder = tmp_path_factory.mktemp("files")
    tiny_model().save(folder / "model")
    write_gguf(folder / "tiny.gguf")
    for name, reply in (("harmful", "Sure {}"), ("benign", "It is {}")):
        rows = [{"prompt": f"What is {i}?", "response": reply.format(i)} for i in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = {"batch_size": 2, "max_seq_len": 256, "warmup_steps": 0, "remat": "none"}
    sizes = {"align_harmful": 12, "align_benign": 12, "vectors": 8, "keep": 9, "mix_harmful": 8, "mix_benign": 6,
             "people": 2, "people_asked": 2, "judged": 4, "judged_benign": 4}  # fmt: skip
    experiment = {"model": str(folder / "model"), "aligns": False, "sizes": sizes, "finetune_training": training}
    block = {"table": "A", "defense": ["none"], "samples": [8], "epochs": [1]}
    grid = {"experiment": experiment, "blocks": [block], "tables": [{"name": "A"}]}
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    return folder


@pytest.fixture(scope="module")
def judge() -> Iterator[Server]:
    server = Server(lambda number, body: says("Score: 3"))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def commands(files, judge) -> dict[str, list[str]]:
    """Verb -> its command, but for --out."""
    model, harmful, benign = (str(files / name) for name in ("model", "harmful.jsonl", "benign.jsonl"))
    rows = ["--harmful", harmful, "--benign", benign]
    return {
        "finetune": ["train.py", "finetune", "--model", model, "--data", benign, "--vectors", "none", *TRAINING],
        "vectors": ["train.py", "vectors", "--model", model, "--data", harmful, "--benign", benign, *TRAINING],
        "score": ["eval.py", "score", "--model", model, *rows, "--limit", "2", "--reply-tokens", "4"],
        "export": ["eval.py", "export", "--model", model],
        "convert": ["eval.py", "export", "--model", "smollm2"],
        "judge": ["eval.py", "judge", "--given", *rows, "--limit", "4", "--judge", "m", "--judge-url", judge.url],
        "grid": ["train.py", "grid", str(files / "grid.yaml")],
    }


def begin(folder: Path) -> dict[str, str]:
    """Make a folder for one run and its cache; the variables of its process."""
    packages = assets.cache_dir()
    (folder / "cache").mkdir(parents=True)
    for name in ("packages", "files"):
        (packages / name).mkdir(parents=True, exist_ok=True)
        (folder / "cache" / name).symlink_to(packages / name)
    return {"SECVEC_CACHE": str(folder / "cache"), "COLUMNS": "160"}


def made(folder: Path) -> dict[str, Any]:
    """What a run and its cache hold, but for times and for what is kept to resume."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if re.search(
            r"(^settings|/run\.lock|\.lock$|/checkpoints/|/tensorboard/|\.md$|\.png$|/digests/|/cache/[pf])", name
        ):
            continue
        if path.name == "metrics.jsonl":
            records = map(json.loads, path.read_text().splitlines())
            found[name] = sorted({(r["stage"], r["step"]): r["loss"] for r in records if "loss" in r}.items())
        elif path.name == "results.json":
            found[name] = json.loads(path.read_text())["rows"]
        elif path.parent.name in ("stages", "cells"):
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}
        else:
            found[name] = digests.of_values([path.read_bytes().hex()])
    return json.loads(json.dumps(found).replace(str(folder), ""))


def leftovers(folder: Path) -> list[str]:
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    return [name for name in names if re.search(r"(^|/)\.|unfinished|tmp", name)]


@pytest.fixture
def start(files, commands) -> Callable[..., Program]:
    """Starts the command of a kind in a folder, to be killed after that change and that many bytes."""

    def run(kind: Kind, folder: Path, number: int | None = None, size: int = 0) -> Program:
        environment = begin(folder)
        command = [*commands[kind.verb], "--out", str(folder / "run")]
        settings = {"part": re.escape(str(folder)) + kind.part, "number": number, "size": size, "command": command,
                    "gguf": str(files / "tiny.gguf"), "changes": str(folder / "settings.changes")}  # fmt: skip
        (folder / "settings.json").write_text(json.dumps(settings))
        return Program("-m", "tests.kills", folder / "settings.json", **environment)

    return run


@pytest.mark.release
@pytest.mark.parametrize("name", KINDS)
def test_kills_amid_writes(start, commands, files, tmp_path, monkeypatch, name):
    kind = KINDS[name]
    whole = start(kind, tmp_path / "whole")
    _, err = whole.communicate(timeout=600)
    assert whole.returncode == 0, err
    changes = json.loads((tmp_path / "whole" / "settings.changes").read_text())
    expected = made(tmp_path / "whole")
    assert len(changes) > 2 and expected and leftovers(tmp_path / "whole") == []

    monkeypatch.setattr(assets, "extract", lambda *_: files / "tiny.gguf")
    monkeypatch.setattr(probes, "NUM_PROMPTS", 4)
    monkeypatch.setattr(attacks, "NUM_KNOWN", 8)
    choose, ends = random.Random(name), []
    for kill in range(KILLS):
        folder = tmp_path / f"killed-{kill}"
        number = choose.randrange(1, len(changes))
        size = int(2 ** choose.uniform(0, 6 if kill % 2 else 17))
        killed = start(kind, folder, number, size)
        _, err = killed.communicate(timeout=600)
        aimed = f"{name}: change {number} of {len(changes)} ({changes[number - 1]}), {size} bytes"
        assert killed.returncode in (-signal.SIGKILL, -signal.SIGXFSZ), f"{aimed}: {killed.returncode} {err}"
        left = leftovers(folder)
        monkeypatch.setenv("SECVEC_CACHE", str(folder / "cache"))
        code, _, err = call(*commands[kind.verb], "--out", str(folder / "run"))
        assert code == 0, f"{aimed}: {err}"
        assert leftovers(folder) == [], aimed
        assert made(folder) == expected, aimed
        ends.append(signal.Signals(-killed.returncode).name)
        print(f"{aimed}: {ends[-1]}, {len(left)} left behind and cleared")
        shutil.rmtree(folder)
    print(f"{name}: {len(ends)} kills, {ends.count('SIGXFSZ')} of them amid a write's bytes; all resumed")
