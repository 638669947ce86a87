"""A process that is killed during a write: the same command then ends as if it had not been."""

import json
import random
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file

from secvec_jax import assets, digests
from secvec_jax.grid import attacks
from tests.bad_inputs.models import write_gguf
from tests.chat_server import Server, says
from tests.kills import arm
from tests.processes import Program, call
from tests.toys import tiny_model

TRAINING = ["--batch-size", "4", "--max-seq-len", "64", "--max-steps", "4", "--learning-rate", "1e-2", "--schedule",
            "constant", "--warmup-steps", "0", "--remat", "none", "--check-prompts", "0",
            "--save-every-seconds", "0.001"]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """verb: of `commands`. part: the paths whose writes are interrupted, as a pattern. kills: how many."""

    verb: str
    part: str
    kills: int


KINDS = {
    "model": Kind("finetune", r"/run/\.?model\b", 5),
    "checkpoint": Kind("finetune", r"/run/checkpoints/", 5),
    "vectors": Kind("vectors", r"/run/vectors\b", 4),
    "export": Kind("export", r"/\.?run\b", 7),
    "conversion": Kind("convert", r"/cache/models/", 6),
    "verdicts": Kind("judge", r"/cache/verdicts/", 5),
    "cell": Kind("grid", r"/run/cells/", 3),
    "results": Kind("judge", r"/run/\.?results\.json", 5),
}


NOT_COMPARED = re.compile(r"^settings|\.lock$|/checkpoints/|/tensorboard/|\.md$|\.png$|/digests/|/cache/[pf]")
"""Times, locks, and what is kept to resume."""


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
    experiment = {
        "model": str(folder / "model"),
        "aligns": False,
        "sizes": sizes,
        "probed": 4,
        "finetune_training": training,
    }
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
    return {"SECVEC_CACHE": str(folder / "cache"), "COLUMNS": "160", "JAX_NUM_CPU_DEVICES": "8"}


def made(folder: Path) -> dict[str, Any]:
    """What a run and its cache hold, but for times and for what is kept to resume."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if NOT_COMPARED.search(name):
            continue
        if path.name == "metrics.jsonl":
            records = map(json.loads, path.read_text().splitlines())
            found[name] = sorted({(r["stage"], r["step"]): r["loss"] for r in records if "loss" in r}.items())
        elif path.name == "results.json":
            found[name] = json.loads(path.read_text())["rows"]
        elif path.parent.name in ("stages", "cells"):
            record = json.loads(path.read_text())
            if isinstance(record.get("result"), dict):
                record["result"] |= {"asked": 0, "tokens": 0}  # of the judge, by the last start
            found[name] = record | {"seconds": 0.0, "seconds_of": {}, "digest": ""}
        elif path.suffix == ".safetensors":  # in which the order of metadata is that of a hash table
            found[name] = {key: digests.of_values([array.tolist()]) for key, array in sorted(load_file(path).items())}
        elif path.suffix in (".yaml", ".json"):
            found[name] = path.read_text()
        else:
            found[name] = digests.of_values([path.read_bytes().hex()])
    return json.loads(json.dumps(found).replace(str(folder), ""))


def leftovers(folder: Path) -> list[str]:
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    return [name for name in names if re.search(r"(^|/)\.|unfinished|tmp", name) and not name.endswith(".lock")]


def start_to_be_killed(files: Path, folder: Path, kind: Kind, command: list[str], number: int, size: int) -> Program:
    environment = begin(folder)
    settings = {"part": re.escape(str(folder)) + kind.part, "number": number, "size": size, "command": command,
                "gguf": str(files / "tiny.gguf")}  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    return Program("-m", "tests.kills", folder / "settings.json", **environment)


@pytest.mark.release
@pytest.mark.parametrize("name", KINDS)
def test_kills_amid_writes(commands, files, tmp_path, monkeypatch, name):
    kind = KINDS[name]
    monkeypatch.setattr(assets, "extract", lambda *_: files / "tiny.gguf")
    monkeypatch.setattr(attacks, "NUM_KNOWN", 8)

    def run(folder: Path) -> None:
        monkeypatch.setenv("SECVEC_CACHE", str(folder / "cache"))
        code, _, err = call(*commands[kind.verb], "--out", str(folder / "run"))
        assert code == 0, err

    whole = tmp_path / "whole"
    begin(whole)
    changes = arm(re.escape(str(whole)) + kind.part, None, 0)
    run(whole)
    expected, choose, ends = made(whole), random.Random(name), []
    assert len(changes) > 2 and expected and leftovers(whole) == []
    for kill in range(kind.kills):
        folder = tmp_path / f"killed-{kill}"
        number, size = choose.randrange(1, len(changes) - 1), int(2 ** choose.uniform(0, 6 if kill % 2 else 17))
        aimed = f"{name}: change {number} of {len(changes)} ({changes[number - 1]}), {size} bytes"
        command = [*commands[kind.verb], "--out", str(folder / "run")]
        killed = start_to_be_killed(files, folder, kind, command, number, size)
        _, err = killed.communicate(timeout=1200)
        assert killed.returncode in (-signal.SIGKILL, -signal.SIGXFSZ), f"{aimed}: {killed.returncode} {err}"
        left = leftovers(folder)
        run(folder)
        assert leftovers(folder) == [], aimed
        assert made(folder) == expected, aimed
        ends.append(signal.Signals(-killed.returncode).name)
        print(f"{aimed}: {ends[-1]}, {len(left)} left behind and cleared", flush=True)
        shutil.rmtree(folder)
    print(f"{name}: {len(ends)} kills, {ends.count('SIGXFSZ')} of them amid a write's bytes; all resumed", flush=True)
