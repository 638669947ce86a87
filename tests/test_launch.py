"""configs/launch: each file starts a command that this version takes, on a mesh of the devices that it asks for.

What can be checked without a scheduler: the scripts are run by bash with stand-ins for python and srun, and the
commands that these are given are parsed as the command line does.
"""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from secvec_jax import cli, command_line
from secvec_jax.sharding import parse_mesh
from tests.test_package import ROOT

LAUNCH = ROOT / "configs" / "launch"
DOCUMENTED = (ROOT / "docs" / "launch.md").read_text()
STAND_IN = '#!/bin/bash\nprintf "%s\\0" "$@" >> "$CALLS"\nexit "${CODE:-0}"\n'


def commands(script: str, tmp_path: Path, *, arguments=(), code: int = 0, **variables: str) -> list[list[str]]:
    """The arguments of `train.py` in each call that the script makes, in a folder with stand-ins for all programs."""
    shared = tmp_path / "shared"
    for name in ("bin/srun", "bin/scontrol", "bin/python", "bin/pip", "bin/python3", "shared/venv/bin/python"):
        program = tmp_path / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(STAND_IN)
        program.chmod(0o755)
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "bin").symlink_to(tmp_path / "bin")
    (shared / "secvec_jax").mkdir()
    calls = tmp_path / "calls"
    environment = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "CALLS": str(calls),
        "CODE": str(code),
    }
    script = script.replace("cd /runs/", f"cd {shared}/")
    result = subprocess.run(
        ["/bin/bash", *(arguments or ("-c",)), script], env=environment | {"SHARED": str(shared)} | variables,
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == code and not result.stderr, result.stderr
    words = calls.read_text().split("\0")[:-1]
    starts = [index for index, word in enumerate(words) if word == "train.py"]
    return [words[start + 1 :] for start in starts]


def parsed(arguments: list[str]):
    """The settings and the devices of a command; its paths need not exist."""
    verb = cli.TRAIN[arguments[0]]
    return command_line.parse(verb, verb.load()[0], arguments)


def devices_of(mesh: str) -> int:
    count = 1
    for size in parse_mesh(mesh).values():
        count *= size
    return count


def directives(text: str) -> dict[str, str]:
    """The options of a batch script. Raises AssertionError for a line that sbatch would not read."""
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    matches = [re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line) for line in lines]
    assert all(matches), lines
    first_command = next(i for i, line in enumerate(text.splitlines()) if line and not line.startswith("#"))
    assert all(i < first_command for i, line in enumerate(text.splitlines()) if line.startswith("#SBATCH"))
    return {match[1]: match[2] or "" for match in matches}


SBATCH = {"job-name", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time", "signal",
          "requeue", "open-mode", "output", "array"}  # fmt: skip
"""Options of sbatch, from its manual."""


def test_the_slurm_script_trains_on_all_gpus_and_requeues_what_was_saved(tmp_path):
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = directives(text)
    assert set(options) <= SBATCH and options["ntasks-per-node"] == options["gpus-per-node"]
    tasks = int(options["nodes"]) * int(options["ntasks-per-node"])
    (command,) = commands(text, tmp_path, code=130, SLURM_NTASKS=str(tasks), SLURM_JOB_ID="7")
    settings, cluster = parsed(command[: command.index("requeue")])
    assert cluster.cluster == "auto" and devices_of(cluster.mesh) == tasks
    assert settings.training.batch_size % tasks == 0
    assert command[command.index("requeue") :] == ["requeue", "7"]


def test_the_slurm_array_runs_every_part_of_a_grid_once(tmp_path):
    text = (LAUNCH / "slurm-grid.sbatch").read_text()
    options = directives(text)
    assert set(options) <= SBATCH
    first, last = map(int, options["array"].split("-"))
    variables = {"SLURM_ARRAY_TASK_ID": str(last), "SLURM_ARRAY_TASK_COUNT": str(last - first + 1)}
    (command,) = commands(text, tmp_path, **variables)
    settings, _ = parsed(command)
    assert first == 1 and settings.part == f"{last}/{last}" and (ROOT / settings.grid).is_file()


SKYPILOT = {"name", "workdir", "resources", "num_nodes", "envs", "secrets", "file_mounts", "setup", "run"}
"""Fields of a task, from SkyPilot's schema (0.14), which both files were checked with."""


@pytest.mark.parametrize("name", ["skypilot-gpu.yaml", "skypilot-tpu.yaml"])
def test_the_skypilot_tasks(name, tmp_path):
    task = yaml.safe_load((LAUNCH / name).read_text())
    assert set(task) <= SKYPILOT and task["num_nodes"] == 1
    accelerators, variables = task["resources"]["accelerators"], dict(task["envs"])
    if name == "skypilot-gpu.yaml":
        gpu, _, devices = accelerators.partition(":")
        assert gpu == "H100" and "jax[cuda13]" in task["setup"]
        variables["SKYPILOT_NUM_GPUS_PER_NODE"] = devices
    else:
        devices = accelerators.rpartition("-")[2]
        assert accelerators.startswith("tpu-v5litepod-") and "jax[tpu]" in task["setup"]
    (command,) = commands(task["run"], tmp_path, **variables)
    settings, cluster = parsed(command)
    assert devices_of(cluster.mesh) == int(devices) and not cluster.cluster
    assert settings.training.batch_size % int(devices) == 0
    assert (settings.model, settings.out) == (task["envs"]["MODEL"], task["envs"]["OUT"])
    assert all(task["envs"][path].startswith("/runs/") for path in ("DATA", "VECTORS", "OUT"))


def test_the_jobset_has_a_host_for_each_four_chips_of_the_pod(tmp_path):
    jobset = yaml.safe_load((LAUNCH / "jobset-v5p.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    hosts = chips // container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == hosts and job["completionMode"] == "Indexed"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    variables = {each["name"]: each["value"] for each in container["env"]}
    shell, flags, script = container["command"]
    assert shell == "bash"
    (command,) = commands(script, tmp_path, arguments=(flags,), **variables)
    settings, cluster = parsed(command)
    assert cluster.cluster == "auto" and devices_of(cluster.mesh) == chips
    assert settings.out == variables["OUT"] and settings.training.batch_size % chips == 0


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_every_value_to_fill_in_is_documented(path):
    section = re.search(rf"^## `{path.name}`\n(.*?)(?=^## |\Z)", DOCUMENTED, re.M | re.S)
    assert section, f"docs/launch.md has no section on {path.name}"
    text = path.read_text()
    lines = [line for line in text.splitlines() if "# fill in" in line and not line.startswith("#")]
    assert lines
    for line in lines:
        key = re.search(r'(?::\s*"\$\{(\w+):=|([\w]+):)', line.strip().lstrip("- "))
        assert key, line
        name = key[1] or key[2]
        if name == "value":  # of an environment variable of a container, whose name is in the line before
            name = re.search(rf"name: (\w+)\n{re.escape(line)}", text)[1]
        assert f"`{name}`" in section[1], f"docs/launch.md does not say what {name} of {path.name} is"
