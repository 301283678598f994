"""A fake OpenAI-compatible server on loopback that behaves as badly as it is told."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclasses.dataclass
class Seen:
    """One request as the server saw it."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    time: float

    @property
    def request(self) -> str | None:
        return self.headers.get("x-client-request-id")

    @property
    def prompt(self) -> str:
        return self.body["messages"][0]["content"] if "messages" in self.body else self.body["prompt"]


Behaviour = Callable[["Handler", Seen], None]


class FakeTeacher(ThreadingHTTPServer):
    """`plan` holds a behaviour for each of the next requests; after them all, and by default, `usual` answers."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, usual: Behaviour | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[Seen] = []
        self.count = 0  # of samples, for behaviours that number them
        self.plan: list[Behaviour] = []
        self.usual = usual or samples()
        self.lock = threading.Lock()
        self.released = threading.Event()  # ends whatever hangs

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that go away are the point


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeTeacher

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def do_GET(self) -> None:
        self.answer({})

    def answer(self, body: dict[str, Any]) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(self.path, headers, body, time.monotonic())
        with self.server.lock:
            self.server.seen.append(seen)
            behave = self.server.plan.pop(0) if self.server.plan else self.server.usual
        with contextlib.suppress(OSError):
            behave(self, seen)

    def send(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content_type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def send_json(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving(usual: Behaviour | None = None) -> Iterator[FakeTeacher]:
    server = FakeTeacher(usual)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


# Behaviours


def samples(
    honours_n: bool = True, texts: Callable[[Seen, int], Any] | None = None, usage: bool = True, delay_s: float = 0.0
) -> Behaviour:
    """As asked: `n` choices, or one where `n` is ignored; each text says which request it came from."""

    def behave(handler: Handler, seen: Seen) -> None:
        if delay_s:
            handler.server.released.wait(delay_s)
        count = seen.body["n"] if honours_n else 1
        said = [texts(seen, i) if texts else f"Reason {seen.request} {i}.\nAnswer: {i}" for i in range(count)]
        value = {"choices": [choice(text, "messages" in seen.body) for text in said]}
        if usage:
            value["usage"] = {"prompt_tokens": 10, "completion_tokens": 20 * count}
        handler.send_json(value)

    return behave


def choice(text: Any, chat: bool = True, finish: str = "stop") -> dict[str, Any]:
    return ({"message": {"role": "assistant", "content": text}} if chat else {"text": text}) | {"finish_reason": finish}


def status(code: int, text: str = "no", **headers: str) -> Behaviour:
    return lambda handler, seen: handler.send(code, json.dumps({"error": {"message": text}}).encode(), **headers)


def raw(body: bytes, code: int = 200, length: int | None = None, **headers: str) -> Behaviour:
    return lambda handler, seen: handler.send(code, body, length, **headers)


def hang(handler: Handler, seen: Seen) -> None:
    handler.server.released.wait(30)


def slow_body(handler: Handler, seen: Seen) -> None:
    """Headers at once, then a byte now and then."""
    handler.send(200, b"{", 10_000)
    _drip(handler, b" ")


def slow_headers(handler: Handler, seen: Seen) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Drip: ")
    _drip(handler, b"a")


def _drip(handler: Handler, byte: bytes) -> None:
    while not handler.server.released.wait(0.05):
        handler.wfile.write(byte)
        handler.wfile.flush()


def half_closed(handler: Handler, seen: Seen) -> None:
    """Fewer bytes than were promised, then the end."""
    handler.send(200, b'{"choices": [', 5000)
    handler.connection.shutdown(socket.SHUT_WR)
    handler.close_connection = True


def no_reply(handler: Handler, seen: Seen) -> None:
    """The connection is closed at once."""
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def gzip_bomb(size: int) -> Behaviour:
    body = gzip.compress(b'{"choices": [{"message": {"content": "' + b"a" * size + b'"}}]}')
    return raw(body, content_encoding="gzip")


def gzipped(handler: Handler, seen: Seen) -> None:
    body = json.dumps({"choices": [choice("Zipped.\nAnswer: 7")]}).encode()
    handler.send(200, gzip.compress(body), content_encoding="gzip")
