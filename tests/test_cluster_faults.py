"""Two processes that differ, die, stop or never come: all end in bounded time, with exit code 2 and one line."""

import json
import os
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.processes import ROOT, Program, free_port, outputs

TRAINING = ("--batch-size", 4, "--max-seq-len", 192, "--max-steps", 4, "--learning-rate", 1e-3,
            "--schedule", "constant", "--warmup-steps", 0, "--remat", "none", "--check-prompts", 0)  # fmt: skip
TIMEOUT = 12
"""--distributed-timeout. The bound on what a test waits is wider: it counts a slow machine's start of a program too."""
BOUND = 90

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tiny_model, tmp_path_factory) -> dict[str, Path]:
    """A small model, and two hosts' folders, whose rows differ."""
    folder = tmp_path_factory.mktemp("hosts")
    for host, word in (("one", "is"), ("other", "was"), ("absent", None)):
        (folder / host).mkdir()
        if word is not None:
            rows = [{"prompt": f"What is {i}?", "response": f"It {word} {i}"} for i in range(12)]
            (folder / host / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": tiny_model("llama").folder, "hosts": folder}


_ON_HOST = """
import os, runpy, sys
os.chdir(sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Cluster:
    """The processes of one `train.py finetune`; process k runs in the folder of its host."""

    def __init__(self, files: dict[str, Path], out: Path, hosts: Sequence[str] = ("one", "one")):
        self.files, self.out, self.hosts = files, out, hosts
        self.port = free_port()
        self.running: dict[int, Program] = {}

    def start(self, process: int, *more: object) -> Program:
        command = ("-c", _ON_HOST, self.files["hosts"] / self.hosts[process], ROOT / "train.py", "finetune",
                   "--model", self.files["model"], "--data", "rows.jsonl", "--vectors", "none", "--out", self.out,
                   *TRAINING, "--mesh", "fsdp=2", "--distributed-timeout", TIMEOUT, "--processes", 2,
                   "--cluster", f"127.0.0.1:{self.port}", "--process", process, *more)  # fmt: skip
        self.running[process] = Program(*command, COLUMNS="160")
        return self.running[process]

    def wait_for_step(self, step: int) -> None:
        log = self.out / "metrics.jsonl"
        while not (log.exists() and log.read_text().count("\n") >= step):
            assert all(process.poll() is None for process in self.running.values())
            time.sleep(0.05)

    def end(self, *lost: int) -> str:
        """The one line that all but the lost processes end with, which must be the same on each."""
        alive = {k: process for k, process in self.running.items() if k not in lost}
        told = outputs(list(alive.values()), BOUND)
        assert [process.returncode for process in alive.values()] == [2] * len(alive), told
        lines = set()
        for _, err in told:
            assert "Traceback" not in err and "Check failure" not in err and "coordination_service" not in err, err
            (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
            lines.add(line)
        assert len(lines) == 1, lines
        return lines.pop()


@pytest.fixture
def two(files, tmp_path):
    clusters = []

    def make(*hosts: str) -> Cluster:
        clusters.append(Cluster(files, tmp_path / "run", hosts or ("one", "one")))
        return clusters[-1]

    yield make
    for cluster in clusters:
        for process in cluster.running.values():
            process.kill()
            process.communicate()


def test_another_learning_rate_is_reported_before_the_first_step(two):
    cluster = two()
    cluster.start(0)
    cluster.start(1, "--learning-rate", 2e-3)
    assert "--learning-rate is 0.001 on process 0 and 0.002 on process 1" in cluster.end()
    assert not cluster.out.exists()


DIFFERENT = {
    "--seed": 1,
    "--max-seq-len": 256,
    "--optimizer": "adamw",
    "--data": "other.jsonl",
    "--max-steps": 5,
    "--model": "smollm2",
    "--vectors": "vectors.safetensors",
    "--mesh": "data=2",
}


@pytest.mark.release
@pytest.mark.parametrize("flag", DIFFERENT)
def test_any_other_setting_is_reported(two, flag):
    cluster = two()
    cluster.start(0)
    cluster.start(1, flag, DIFFERENT[flag])
    assert f"the processes differ: {flag} is " in cluster.end()


@pytest.mark.release
@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("other", "--data rows.jsonl has other content on process 1"),
        ("absent", "rows.jsonl cannot be read on process 1"),
    ],
)
def test_a_host_with_other_files_is_reported(two, host, words):
    cluster = two("one", host)
    cluster.start(0)
    cluster.start(1)
    assert words in cluster.end()
    assert not (cluster.out / "metrics.jsonl").exists()


@pytest.mark.release
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_stops_in_a_training_ends_the_other(two, victim, number):
    cluster = two()
    for process in (0, 1):
        cluster.start(process, "--max-steps", 100_000)
    cluster.wait_for_step(3)
    begin = time.monotonic()
    os.kill(cluster.running[victim].pid, number)
    line = cluster.end(victim)
    print(f"signal {number} to process {victim}: {time.monotonic() - begin:.1f} s: {line}")
    said = "ended without a message" if number == signal.SIGKILL else f"has not answered for {TIMEOUT} s"
    assert line.startswith(f"error: process {victim} of 2 {said}")
    assert time.monotonic() - begin < TIMEOUT + 30


@pytest.mark.release
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_while_it_loads_ends_the_other(two, victim):
    cluster = two()
    for process in (0, 1):
        cluster.start(process)
    while not cluster.out.exists():  # both have met
        time.sleep(0.01)
    cluster.running[victim].kill()
    assert cluster.end(victim).startswith(f"error: process {victim} of 2 ended without a message")


@pytest.mark.release
@pytest.mark.parametrize("absent", [0, 1])
def test_a_process_that_never_comes_is_reported(two, absent):
    cluster = two()
    cluster.start(1 - absent)
    said = "process 0 of 2 does not answer at" if absent == 0 else "process 1 of 2 did not join within"
    assert said in cluster.end()


@pytest.mark.release
def test_processes_that_agree_end_well(two):
    """What the others differ from."""
    cluster = two()
    for process in (0, 1):
        cluster.start(process)
    told = outputs(list(cluster.running.values()), 2 * BOUND)
    assert [process.returncode for process in cluster.running.values()] == [0, 0], told
    assert "error" not in "".join(err for _, err in told) and "Task" not in "".join(err for _, err in told)


@pytest.mark.release
def test_a_port_in_use_is_reported(two):
    cluster = two()
    with socket.create_server(("127.0.0.1", cluster.port)):
        cluster.start(0)
        assert f"port {cluster.port} is already in use" in cluster.end()
