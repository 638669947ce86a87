"""Processes that meet differ, come late, stop and die: one line each, in bounded time. Here they share a process."""

import asyncio
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from secvec_jax.errors import UserError
from secvec_jax.rendezvous import Rendezvous, first_difference
from tests.processes import free_port

SAME = {"--seed": 0}


_made: list[Rendezvous] = []


@pytest.fixture(autouse=True)
def ends(monkeypatch):
    """The exit codes with which processes would have ended; in the end all are stopped, before they end this one."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr("secvec_jax.rendezvous._GRACE", 0.1)
    yield codes

    def stop(loop: asyncio.AbstractEventLoop) -> None:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.call_later(0.1, loop.stop)

    for process in _made:
        process._loop.call_soon_threadsafe(stop, process._loop)
    wait_for(lambda: not any(process._loop.is_running() for process in _made))
    _made.clear()


def place(address: str, count: int, process: int, timeout: float = 2.0) -> Rendezvous:
    _made.append(Rendezvous(address, count, process, timeout))
    return _made[-1]


def start(count: int = 2, timeout: float = 2.0) -> list[Rendezvous]:
    address = f"127.0.0.1:{free_port()}"
    return [place(address, count, process, timeout) for process in range(count)]


def on_all(work, *of_each) -> list:
    """What each call returns, or the text of the UserError that it raises."""

    def call(arguments):
        try:
            return work(*arguments)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(of_each[0])) as pool:
        return list(pool.map(call, zip(*of_each, strict=True)))


@pytest.mark.parametrize("address", ["host", "host:", "host:0", "host:65536", "host:²", "host:" + "9" * 5_000])
def test_an_address_without_a_port_is_refused(address):
    with pytest.raises(UserError, match="has no port: give HOST:PORT"):
        Rendezvous(address, 2, 0, 1.0)


def met(count: int = 2, timeout: float = 2.0) -> list[Rendezvous]:
    processes = start(count, timeout)
    assert on_all(Rendezvous.meet, processes, [SAME] * count) == [None] * count
    return processes


@pytest.mark.parametrize(
    ("records", "line"),
    [
        ([SAME, SAME], None),
        ([SAME, {"--seed": 1}], "--seed is 0 on process 0 and 1 on process 1"),
        ([SAME, SAME, {"--seed": 0, "--model": "m"}], "--model is None on process 0 and 'm' on process 2"),
        ([{"--data a": "sha256:1"}, {"--data a": "sha256:2"}], "--data a has other content on process 1 than"),
        ([{"--data a": "sha256:1"}, {"--data a": None}], "--data a cannot be read on process 1"),
        ([{"--data a": None}, {"--data a": "sha256:1"}], "--data a cannot be read on process 0"),
    ],
)
def test_the_first_difference_is_named_with_its_process(records, line):
    found = first_difference(records)
    assert found == line if line is None else found.startswith(line)


def test_all_meet_and_compare_as_often_as_they_like(ends):
    processes = met(3)
    for value in (1, 2):
        assert on_all(Rendezvous.require_same, processes, [{"a": value}] * 3) == [None] * 3
    told = on_all(Rendezvous.require_same, processes, [{"a": 1}, {"a": 1}, {"a": 2}])
    assert told == ["the processes differ: a is 1 on process 0 and 2 on process 2; start all with the same command, "
                    "files and versions"] * 3  # fmt: skip
    for process in processes:
        process.leave()
    assert not ends


def test_other_settings_are_reported_on_all_before_jax_starts(ends):
    told = on_all(Rendezvous.meet, start(), [SAME, {"--seed": 1}])
    assert all("--seed is 0 on process 0 and 1 on process 1" in line for line in told)


def test_a_process_that_never_comes_is_named(ends):
    begin = time.monotonic()
    two_of_three, second_of_two = [p for k, p in enumerate(start(3)) if k != 1], start()[1:]
    first, last, told = on_all(Rendezvous.meet, [*two_of_three, *second_of_two], [SAME] * 3)
    assert first == last and "process 1 of 3 did not join within 2 s" in first
    assert "process 0 of 2 does not answer at 127.0.0.1:" in told
    assert time.monotonic() - begin < 10


def test_a_port_in_use_is_reported():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (told,) = on_all(Rendezvous.meet, [place(f"127.0.0.1:{port}", 2, 0)], [SAME])
        assert told.startswith(f"port {port} is already in use on this host")
        answer = threading.Thread(target=lambda: taken.accept()[0].sendall(b"HTTP/1.1 400\r\n"))
        answer.start()
        (told,) = on_all(Rendezvous.meet, [place(f"127.0.0.1:{port}", 2, 1)], [SAME])
        assert told.startswith(f"what listens at 127.0.0.1:{port} is not process 0")
        answer.join()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([(3, 1), (3, 1)], "two processes were started with --process 1"),
        ([(2, 1)], "--processes is 3 on process 0 and 2"),
    ],
)
def test_processes_with_one_number_or_other_counts_are_reported(more, words):
    address = f"127.0.0.1:{free_port()}"
    processes = [place(address, count, process) for count, process in [(3, 0), *more]]
    told = on_all(Rendezvous.meet, processes, [SAME] * len(processes))
    assert words in told[0] and any(words in line for line in told[1:]), told


def test_a_process_that_dies_ends_the_others_at_once(ends, capsys):
    for victim, other in ((1, 0), (0, 1)):
        processes = met(timeout=30)
        begin = time.monotonic()
        dead = processes[victim]
        dead._loop.call_soon_threadsafe(lambda dead=dead: [p.writer.transport.abort() for p in dead._peers.values()])
        line = processes[other].loss(10)
        assert line == f"process {victim} of 2 ended without a message: it was killed or has crashed"
        assert time.monotonic() - begin < 5
    wait_for(lambda: ends and set(ends) == {2} and len(ends) >= 2)
    assert "error: process 1 of 2 ended without a message" in capsys.readouterr().err


def test_a_process_that_is_stopped_ends_the_others_in_time(ends):
    clusters, goes_on = (met(timeout=2), met(timeout=2)), threading.Event()
    for victim, processes in enumerate(clusters):
        processes[victim]._loop.call_soon_threadsafe(goes_on.wait, 30)
    for victim, processes in enumerate(clusters):
        line = f"process {victim} of 2 has not answered for 2 s: it or its host is stopped"
        assert processes[1 - victim].loss(10) == line
    wait_for(lambda: len(ends) >= 2)
    goes_on.set()


def test_a_failure_is_reported_with_its_reason_but_the_cause_speaks_first(ends, capsys):
    first, last = met(timeout=5)
    last.begin_ending()  # as the command line does: it prints its own error
    last.fail("no file rows.jsonl")
    assert first.loss(5) == "process 1 of 2 failed: no file rows.jsonl"
    wait_for(lambda: ends == [2])
    first, last = met(timeout=5)
    first.begin_ending()  # to print an error of its own
    last.begin_ending()
    last.fail("the main process failed")
    first.loss(5)
    time.sleep(0.5)  # it would speak after the grace of a tenth of a second
    assert ends == [2] and "main process" not in capsys.readouterr().err


def test_a_process_that_has_left_is_no_loss(ends):
    first, last = met(timeout=2)
    first.leave()
    last.leave()
    wait_for(lambda: first._peers[1].has_left and last._peers[0].has_left)
    last._loop.call_soon_threadsafe(lambda: last._peers[0].writer.close())
    assert first.loss(0.5) is None and not ends


def test_the_relay_reaches_the_service_and_outlives_it(ends):
    processes = met(timeout=30)
    service = socket.create_server(("127.0.0.1", int(processes[0].open_relay().rpartition(":")[2])))
    client = socket.create_connection(processes[1].open_relay().split(":"))
    client.sendall(b"to the service")
    served, _ = service.accept()
    assert served.recv(100) == b"to the service"
    served.sendall(b"to the client")
    assert client.recv(100) == b"to the client"
    served.close()
    service.close()
    client.settimeout(0.3)
    with pytest.raises(TimeoutError):  # JAX's client would abort if this end were closed
        client.recv(100)


def wait_for(condition, seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)
