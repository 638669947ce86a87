"""Processes join a cluster, or fail with a one-line error; a single process decides alone."""

import json

import jax
import pytest

from secvec_jax.distributed import (
    Cluster,
    Consensus,
    all_gather_json,
    all_max,
    broadcast_from_first,
    is_main_process,
    on_main_process,
    start_cluster,
)
from secvec_jax.errors import UserError
from secvec_jax.sharding import make_mesh
from tests.processes import run


def test_nothing_is_started_without_settings():
    start_cluster(Cluster())
    assert jax.sharding.get_mesh().empty and not jax.distributed.is_initialized()
    assert (
        is_main_process()
        and broadcast_from_first(3) == 3
        and all_max(5) == 5
        and all_gather_json({"a": 1}) == [{"a": 1}]
    )


def test_a_mesh_in_the_settings_becomes_the_ambient_one():
    with jax.set_mesh(make_mesh(data=8)):  # given back at the end
        start_cluster(Cluster("fsdp=4,tensor=2"))
        assert dict(jax.sharding.get_mesh().shape) == {"slice": 1, "data": 1, "fsdp": 4, "tensor": 2}
    assert jax.sharding.get_mesh().empty


_JOIN = """
import json, sys
from secvec_jax.distributed import Cluster, start_cluster
from secvec_jax.errors import UserError
for settings in json.loads(sys.argv[1]):
    try:
        start_cluster(Cluster(**settings))
    except UserError as error:
        print(error)
"""


def test_a_cluster_that_cannot_be_joined_is_one_line_each():
    cases = {
        "the number of processes": {"cluster": "127.0.0.1:1"},
        "the index of this one": {"cluster": "127.0.0.1:1", "processes": 2},
        "--process 2 of 2": {"cluster": "127.0.0.1:1", "processes": 2, "process": 2},
        "has no port": {"cluster": "nonsense", "processes": 2, "process": 0},
        "does not answer at 127.0.0.1:1 within 1 s": {"cluster": "127.0.0.1:1", "processes": 2, "process": 1},
        "not a TPU pod, Slurm or MPI job": {"cluster": "auto"},
    }
    settings = [values | {"distributed_timeout": 1} for values in cases.values()]
    done = run("-c", _JOIN, json.dumps(settings))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases)
    for line, (words, values) in zip(lines, cases.items(), strict=True):
        assert line.startswith(f"cannot join the cluster {values['cluster']!r}") and words in line


def test_joining_too_late_is_reported_as_well():
    jax.devices()
    with pytest.raises(UserError, match=r"cannot join the cluster .*already computed"):
        start_cluster(Cluster(cluster="127.0.0.1:1", processes=2, process=0))
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize("first_fails", [False, True])
def test_work_of_the_first_process_is_done_and_its_error_raised(first_fails):
    done = []

    def work():
        done.append(True)
        if first_fails:
            raise OSError("no room")

    if first_fails:
        with pytest.raises(OSError, match="no room"):
            on_main_process(work)
    else:
        on_main_process(work)
    assert done == [True]


def test_a_vote_of_one_process_decides():
    consensus = Consensus()
    assert [consensus(vote) for vote in (0, 2, 1)] == [0, 2, 1]
