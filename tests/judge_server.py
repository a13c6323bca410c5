"""A fake of an OpenAI-compatible address: its replies follow a script, and it keeps what it was sent."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]  # status, headers, body


def completion(text: object) -> Reply:
    """Return the reply whose message is a text."""
    body = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    return 200, {}, json.dumps(body).encode()


def data_of(request: dict[str, Any]) -> dict[str, Any]:
    """Return the data in the text of a request."""
    (message,) = request["messages"]
    _, data, _ = re.split(r"^===DATA===$", message["content"], flags=re.MULTILINE)
    return dict(json.loads(data))


class JudgeServer(ThreadingHTTPServer):
    """Answers each request by a function of it.

    Args:
        reply: a function of the request's JSON and of its number, from 0.
    """

    daemon_threads = True

    def __init__(self, reply: Callable[[dict[str, Any], int], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply = reply
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def answer(self, request: dict[str, Any], headers: dict[str, str], path: str) -> Reply:
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self.headers.append(headers)
            self.paths.append(path)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return self.reply(request, number)
        finally:
            with self._lock:
                self._at_once -= 1


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        status, headers, body = self.server.answer(json.loads(content), dict(self.headers), self.path)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def judge_server(reply: Callable[[dict[str, Any], int], Reply]) -> Iterator[JudgeServer]:
    """Run a server in a thread."""
    server = JudgeServer(reply)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def slow(request: dict[str, Any], number: int) -> Reply:
    """Reply after a moment."""
    time.sleep(0.1)
    return completion("RIGHT")
