"""JAX's connections to its coordination service, relayed through the port at which the processes of a cluster meet.

    JAX's client in process k  ->  relay in process k  ->  process 0  ->  JAX's service

A relay keeps JAX's connection open when process 0 is lost, so that JAX, which would abort, notices nothing before
`rendezvous` has reported the loss.
"""

import asyncio
import contextlib
import socket

RELAY = b"relay\n"
"""The first line of a connection that is relayed."""


class Relay:
    """One process's relay; its coroutines run in the loop of the rendezvous.

    process_0: the host and port where process 0 listens; None in process 0 itself. timeout: the seconds to wait for a
    connection.
    """

    def __init__(self, process_0: tuple[str, int] | None, timeout: float):
        self._process_0, self._timeout = process_0, timeout
        self._service_port = 0
        self._tasks: set[asyncio.Task] = set()

    async def open(self) -> int:
        """The local port at which JAX's service is to listen (process 0), or at which its client finds it."""
        if self._process_0 is None:
            self._service_port = _free_port()
            return self._service_port
        self._server = await asyncio.start_server(self.forward, "127.0.0.1", 0)
        return self._server.sockets[0].getsockname()[1]

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Connect JAX's client to process 0, or there, to JAX's service, which may not listen yet."""
        for _ in range(int(self._timeout * 10)):
            try:
                if self._process_0 is None:
                    onward, onward_writer = await asyncio.open_connection("127.0.0.1", self._service_port)
                else:
                    onward, onward_writer = await asyncio.open_connection(*self._process_0)
                    onward_writer.write(RELAY)
                break
            except OSError:
                await asyncio.sleep(0.1)
        else:
            return
        task = asyncio.create_task(_copy(reader, onward_writer))
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)
        # Never closed towards JAX's client, which would abort.
        await _copy(onward, writer, closes=self._process_0 is None)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, closes: bool = True) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
    if closes:
        writer.close()
    else:
        await asyncio.Event().wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
