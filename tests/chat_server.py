"""A small server that speaks OpenAI's chat protocol, or fails to, as a test says."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Answers chat completions as `act(number of the request, its body)` says: (status, text), or None to hang up.

    The text of a redirect is where it leads to.
    """

    daemon_threads = True

    def __init__(self, act: Callable[[int, dict], tuple[int, str] | None]):
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
