"""A small server that speaks OpenAI's chat protocol, or fails to, as a test says."""

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Answers chat completions as `act(number of the request, its body)` says: (status, text), None to hang up, or the
    bytes to send, part by part, header and all.

    The text of a redirect is where it leads to.
    """

    daemon_threads = True
    request_queue_size = 64  # of 5, a connection of many at once would wait a second

    def __init__(self, act: Callable[[int, dict], tuple[int, str] | Iterable[bytes] | None]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.act, self.bodies, self.keys, self.lock = act, [], [], threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.bodies)
            self.server.bodies.append(body)
            self.server.keys.append(self.headers["Authorization"])
        acted = self.server.act(number, body)
        if acted is None:  # a stream that ends in the middle
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [{"mess')
            self.close_connection = True
            return
        if not isinstance(acted, tuple):
            self.close_connection = True
            try:
                for part in acted:
                    self.wfile.write(part)
            except OSError:  # the client has had enough
                pass
            return
        status, text = acted
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text.encode())))
        self.send_header("retry-after-ms", "1")
        if 300 <= status < 400:
            self.send_header("Location", text)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args) -> None:
        pass


def says(text: str | None) -> tuple[int, str]:
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
    answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "usage": usage,
              "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}  # fmt: skip
    return 200, json.dumps(answer)


HEADER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def drips(before: bytes = HEADER + b"\r\n", part: bytes = b" ") -> Iterator[bytes]:
    """A byte at a time, forever: each arrives soon enough for a limit on the time between two."""
    yield before
    while True:
        time.sleep(0.05)
        yield part


def endless(status: bytes = b"200 OK") -> Iterator[bytes]:
    """A body that does not end, as fast as it is read."""
    yield b"HTTP/1.1 " + status + b"\r\nContent-Type: application/json\r\n\r\n"
    while True:
        yield b" " * 2**16


def bomb() -> Iterator[bytes]:
    """A megabyte that decompresses to a gigabyte."""
    yield HEADER + b"Content-Encoding: gzip\r\n\r\n"
    yield gzip.compress(bytes(2**20)) * 1024
