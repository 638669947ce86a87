"""The processes of a cluster connect, compare their inputs and settings, and notice when one of them is lost.

JAX's coordination service ends a process with a C++ abort when another one is lost or late. So the processes connect
here first, over one TCP connection each to process 0, at the coordinator's address, and JAX's own connections are
relayed through the same port (see `relay`):

    process k    hello, heartbeats, records   ->  process 0    results, losses  ->  all

Whoever can connect to the port is trusted, as JAX's service does.
"""

import asyncio
import contextlib
import dataclasses
import errno
import json
import os
import sys
import threading
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from secvec_jax.arguments import whole_number
from secvec_jax.errors import UserError
from secvec_jax.relay import RELAY, Relay

_HELLO = "secvec_jax"
_LINE_BYTES = 2**24
"""The longest message."""
_GRACE = 2.0
"""Seconds that a process whose peer failed has to report its own error, which may be the cause."""

Record = Mapping[str, Any]


def first_difference(records: Sequence[Record]) -> str | None:
    """Describe the first value in which a process differs from process 0, or return None if none does.

    records: label -> JSON value, of each process in order. Digests ("sha256:...") are named, not shown.
    """
    first = records[0]
    for process, record in enumerate(records[1:], 1):
        for label in {**first, **record}:
            here, there = first.get(label), record.get(label)
            if here == there:
                continue
            if any(str(value).startswith("sha256:") for value in (here, there)):
                if None in (here, there):
                    return f"{label} cannot be read on process {0 if here is None else process}"
                return f"{label} has other content on process {process} than on process 0"
            return f"{label} is {here!r} on process 0 and {there!r} on process {process}"
    return None


@dataclasses.dataclass
class _Peer:
    """Another process, as this one sees it."""

    process: int
    writer: asyncio.StreamWriter
    silence: float = 0.0
    """Seconds since its last message, not counting time in which this process was stopped."""
    has_left: bool = False

    def send(self, message: dict[str, Any]) -> None:
        if not self.writer.is_closing():
            self.writer.write(json.dumps(message).encode() + b"\n")


class Rendezvous:
    """This process's place among `processes` that meet at `address` (HOST:PORT, where process 0 listens).

    timeout: the seconds after which a process that does not connect, or stops answering, counts as lost. Once one is
    lost, this process reports that in one line and ends with exit code 2, whatever it is doing. Raises UserError for an
    address without a port.
    """

    def __init__(self, address: str, processes: int, process: int, timeout: float):
        host, colon, digits = address.rpartition(":")
        port = whole_number(digits)
        if not colon or port is None or not 0 < port < 2**16:
            raise UserError(f"{address!r} has no port: give HOST:PORT")
        self._host, self._port = host.strip("[]"), port
        self._processes, self._process, self._timeout = processes, process, timeout
        self._interval = min(timeout / 6, 5.0)
        self._peers: dict[int, _Peer] = {}
        self._records: dict[int, dict[int, Record]] = {}
        self._results: dict[int, asyncio.Future[str | None]] = {}
        self._round = 0
        self._tasks: set[asyncio.Task] = set()
        self._relay = Relay(None if process == 0 else (self._host, self._port), timeout)
        self._loss: str | None = None
        self._is_lost = threading.Event()
        self._last_word = threading.Lock()
        self._is_ending = self._has_reported = False
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="rendezvous", daemon=True).start()

    def meet(self, record: Record) -> None:
        """Wait for all processes. Raises UserError if one does not connect, or if their records differ."""
        self._run(self._meet(record))

    def open_relay(self) -> str:
        """Return the address at which JAX's service is to listen (process 0), or at which its client finds it."""
        return f"127.0.0.1:{self._run(self._relay.open())}"

    def require_same(self, record: Record) -> None:
        """Wait until all processes have called this. Raises UserError if their records differ."""
        problem = self._run(self._compare(record))
        if problem is not None:
            raise UserError(problem)

    def leave(self) -> None:
        """Tell the others that this process is done: that its connection will close is no loss."""
        self._loop.call_soon_threadsafe(self._broadcast, {"left": True})

    def begin_ending(self) -> None:
        """Call before printing why this process ends. Does not return if it has reported a loss and is ending."""
        with self._last_word:
            self._is_ending = True
            has_reported = self._has_reported
        if has_reported:
            threading.Event().wait()

    def fail(self, line: str, *, interrupted: bool = False) -> None:
        """Tell the others that this process ends, after `begin_ending`, so that they end too; waits until they know."""
        with contextlib.suppress(Exception):
            self._run(self._fail({"failed": line, "interrupted": interrupted}))

    def loss(self, seconds: float) -> str | None:
        """Return the line that names the lost process, waiting for it up to `seconds`; None if none is lost."""
        self._is_lost.wait(seconds)
        return self._loss

    # The rest runs in the loop's thread.

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _start(self, work: Coroutine[Any, Any, Any]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)

    async def _meet(self, record: Record) -> None:
        if self._process == 0:
            try:
                self._server = await asyncio.start_server(self._accept, None, self._port, limit=_LINE_BYTES)
            except OSError as error:
                cause = (error.strerror or str(error)).lower()
                if error.errno == errno.EADDRINUSE:
                    cause = "already in use on this host: choose another one, or end the program that uses it"
                raise UserError(f"port {self._port} is {cause}") from error
        else:
            reader = await self._connect(record)
            self._start(self._listen(reader, self._peers[0]))
        self._start(self._watch())
        if self._process == 0:
            self._loop.call_later(self._timeout, self._refuse_absent)
        problem = await self._compare(record)
        if problem is not None:
            self._is_ending = True
            await self._flush()
            raise UserError(problem)

    def _refuse_absent(self) -> None:
        """Process 0: the time to join is over."""
        absent = [str(process) for process in range(1, self._processes) if process not in self._peers]
        if absent:
            self._lose(
                f"process {', '.join(absent)} of {self._processes} did not join within {self._timeout:g} s: start all "
                "processes together, or give them longer with --distributed-timeout"
            )

    async def _connect(self, record: Record) -> asyncio.StreamReader:
        address, deadline = f"{self._host}:{self._port}", self._loop.time() + self._timeout
        while True:
            try:
                reader, writer = await asyncio.wait_for(
                    asyncio.open_connection(self._host, self._port, limit=_LINE_BYTES), self._timeout
                )
                break
            except OSError as error:  # not listening yet; includes timeouts
                if self._loop.time() > deadline:
                    raise UserError(
                        f"process 0 of {self._processes} does not answer at {address} within {self._timeout:g} s "
                        f"({error.strerror or type(error).__name__}): start it, and check the address and the firewall"
                    ) from error
                await asyncio.sleep(0.1)
        self._peers[0] = _Peer(0, writer)
        self._peers[0].send({_HELLO: self._processes, "process": self._process})
        try:
            answer = json.loads(await asyncio.wait_for(reader.readline(), self._timeout))
            refusal = answer["welcome"]
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(f"what listens at {address} is not process 0 of this command: check --cluster") from None
        if refusal is not None:
            raise UserError(refusal)
        return reader

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Process 0: a peer that joins, or another process's relay."""
        try:
            line = await asyncio.wait_for(reader.readline(), self._timeout)
            if line == RELAY:
                await self._relay.forward(reader, writer)
                return
            hello = json.loads(line)
            processes, process = int(hello[_HELLO]), int(hello["process"])
        except (OSError, ValueError, TypeError, KeyError, asyncio.LimitOverrunError):  # not one of our processes
            writer.close()
            return
        refusal = None
        if processes != self._processes:
            refusal = f"--processes is {self._processes} on process 0 and {processes} on process {process}"
        elif not 0 < process < processes or process in self._peers:
            refusal = f"two processes were started with --process {process}: number them from 0 to {processes - 1}"
        peer = _Peer(process, writer)
        peer.send({"welcome": refusal})
        if refusal is not None:
            self._lose(refusal)
            return
        self._peers[process] = peer
        await self._listen(reader, peer)

    async def _listen(self, reader: asyncio.StreamReader, peer: _Peer) -> None:
        """Read a peer's messages until it ends."""
        with contextlib.suppress(OSError, ValueError):
            while line := await reader.readline():
                peer.silence = 0.0
                self._receive(peer, json.loads(line))
        if not peer.has_left:
            self._lose(f"{self._named(peer)} ended without a message: it was killed or has crashed")

    def _receive(self, peer: _Peer, message: dict[str, Any]) -> None:
        if "record" in message:
            number, record = message["record"]
            self._collect(number, peer.process, record)
        elif "result" in message:
            number, problem = message["result"]
            self._settle(number, problem)
        elif "failed" in message:
            peer.has_left = True
            self._lose(f"{self._named(peer)} failed: {message['failed']}", message["interrupted"])
        elif "lost" in message:
            self._lose(message["lost"], message["interrupted"])
        elif "left" in message:
            peer.has_left = True

    async def _compare(self, record: Record) -> str | None:
        """What differs among the records of this round; None if nothing does."""
        number, self._round = self._round, self._round + 1
        result = self._results.setdefault(number, self._loop.create_future())
        if self._process == 0:
            self._collect(number, 0, record)
        else:
            self._peers[0].send({"record": [number, record]})
        return await result

    def _collect(self, number: int, process: int, record: Record) -> None:
        """Process 0: keep a record, and once all are there, compare them."""
        records = self._records.setdefault(number, {})
        records[process] = record
        if len(records) == self._processes:
            difference = first_difference([records[k] for k in range(self._processes)])
            problem = None
            if difference is not None:
                problem = f"the processes differ: {difference}; start all with the same command, files and versions"
            self._broadcast({"result": [number, problem]})
            self._settle(number, problem)

    def _settle(self, number: int, problem: str | None) -> None:
        result = self._results.setdefault(number, self._loop.create_future())
        if not result.done():
            result.set_result(problem)

    async def _watch(self) -> None:
        """Send heartbeats, and notice those that stop. The time in which this process was stopped does not count."""
        last = self._loop.time()
        while True:
            self._broadcast({"beat": True})
            await asyncio.sleep(self._interval)
            passed = min(self._loop.time() - last, 2 * self._interval)
            last = self._loop.time()
            for peer in list(self._peers.values()):
                peer.silence += passed
                if peer.silence > self._timeout - self._interval:
                    self._lose(
                        f"{self._named(peer)} has not answered for {self._timeout:g} s: it or its host is stopped"
                    )

    def _broadcast(self, message: dict[str, Any]) -> None:
        for peer in self._peers.values():
            peer.send(message)

    async def _flush(self) -> None:
        """Wait until the peers have read what was sent, or a second."""
        with contextlib.suppress(OSError):
            drains = [peer.writer.drain() for peer in self._peers.values() if not peer.writer.is_closing()]
            await asyncio.wait_for(asyncio.gather(*drains), 1.0)
        await asyncio.sleep(0.2)

    async def _fail(self, message: dict[str, Any]) -> None:
        self._broadcast(message)
        waited = 0.0
        # Data that a peer has not read is lost if this end closes first.
        while waited < 2 * _GRACE and any(not peer.writer.is_closing() for peer in self._peers.values()):
            if self._process != 0 and waited > 0.2:
                break
            await asyncio.sleep(0.05)
            waited += 0.05
            for peer in self._peers.values():
                if peer.has_left:
                    peer.writer.close()

    def _lose(self, line: str, interrupted: bool = False) -> None:
        """A process is lost: tell the others, and end."""
        if self._loss is not None:
            return
        self._loss = line
        if self._process == 0:
            self._broadcast({"lost": line, "interrupted": interrupted})
        for result in self._results.values():
            if not result.done():
                result.set_result(line)
        self._is_lost.set()
        # After Ctrl-C the processes stop together, and saving the last step may take one of them a while.
        self._start(self._end(line, self._timeout if interrupted else _GRACE))

    async def _end(self, line: str, grace: float) -> None:
        await asyncio.sleep(grace)
        with self._last_word:
            self._has_reported = not self._is_ending
        if self._has_reported:
            print(f"error: {line}", file=sys.stderr, flush=True)
        else:  # that process reports why
            await asyncio.sleep(self._timeout)
        await self._flush()
        os._exit(2)

    def _named(self, peer: _Peer) -> str:
        return f"process {peer.process} of {self._processes}"
