"""A page that is served from a thread, and clients of it, polite and others."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from igpt_fast import Pipeline
from igpt_fast.web import page


class Site:
    """A server, and what one asks it."""

    def __init__(self, server: page.Server, port: int) -> None:
        self.server, self.port = server, port

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, host: str | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body); a POST where there is a body, which bytes are as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            said = {"host": f"127.0.0.1:{self.port}" if host is None else host, **(headers or {})}
            connection.request("GET" if content is None else "POST", path, content, said)
            answer = connection.getresponse()
            return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def json(self, path: str, body: Any = None) -> Any:
        status, _, content = self.ask(path, body)
        assert status == 200, content
        return json.loads(content)

    def lines(self, path: str, body: Any) -> list[dict[str, Any]]:
        """Of a whole answer."""
        status, _, content = self.ask(path, body)
        assert status == 200, content
        return [json.loads(line) for line in content.splitlines()]

    def refused(self, path: str, body: Any, status: int = 400) -> str:
        """The reason of a question that must be refused."""
        got, _, content = self.ask(path, body)
        assert got == status, content
        return json.loads(content)["error"]

    def begin(self, question: Any) -> socket.socket:
        """A client that has asked for a drawing, and reads nothing yet."""
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.settimeout(30)
        client.connect(("127.0.0.1", self.port))
        body = json.dumps(question).encode()
        client.sendall(b"POST /complete HTTP/1.1\r\nhost: localhost:%d\r\n" % self.port)
        client.sendall(b"content-length: %d\r\n\r\n" % len(body) + body)
        return client

    def idle(self) -> bool:
        """Whether nobody has the model, after a while of waiting for it."""
        return until(lambda: len(self.server.studio.turns) == 0)


def until(condition: Any, seconds: float = 30.0) -> bool:
    """Whether something has come true, after so many seconds at most."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


@contextmanager
def serving(pipeline: Pipeline, setup: page.Setup | None = None) -> Iterator[Site]:
    """A page of a pipeline."""
    ready = threading.Event()
    with page.listening("127.0.0.1", 0) as sock:
        server = page.Server(pipeline, setup or page.Setup(), page.hosts_of("127.0.0.1", ()), ready.set)
        thread = threading.Thread(target=server.listen, args=(sock,), daemon=True)
        thread.start()
        try:
            assert ready.wait(30)
            yield Site(server, sock.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def question(site: Site, **changes: Any) -> dict[str, Any]:
    """For completions of an example whose upper half is kept."""
    model = site.json("/model")
    pixels = model["height"] * model["width"]
    known = [int(i < pixels // 2 // model["width"] * model["width"]) for i in range(pixels)]
    return {"tokens": site.json("/example/7")["tokens"], "known": known, "n": 2, "seed": 5, **changes}


def patched(known: list[int], rows: range = range(4, 6)) -> list[int]:
    """A mask that keeps all but some rows of 16 pixels: kept pixels follow drawn ones."""
    return [int(i // 16 not in rows) for i in range(len(known))]


def endless(site: Site) -> dict[str, Any]:
    """A drawing of a minute."""
    asked = question(site, n=16, candidates=64)
    return {**asked, "known": [int(i == 255) for i in range(256)]}
