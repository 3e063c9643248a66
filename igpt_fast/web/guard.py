"""Who may ask, and how much: neither a page of another site nor another name that leads here ("DNS rebinding") shall
use the model; sizes are checked while they are read, and every number before it is used.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from igpt_fast.checks import whole_number
from igpt_fast.files import first_line

PATIENCE = 30.0  # seconds for a question to arrive, and for an answer to be taken
_HERE = ("localhost", "127.0.0.1", "::1")


def hosts_of(host: str, more: Sequence[str]) -> frozenset[str]:
    """The names by which the page may be asked for: that of the address it listens at, and ``more``."""
    here = _HERE if host in (*_HERE, "0.0.0.0", "::") else ()
    return frozenset(name.lower() for name in (host, *here, *map(_without_port, more)))


def _without_port(name: str) -> str:
    """As it may stand in an address: ``box:7860``, ``[::1]:7860``, ``::1``."""
    bare = name.count(":") > 1 and not name.startswith("[")
    return name if bare else re.sub(r":\d*$", "", name).strip("[]")


class Guard:
    """Lets through what asks for a host that is allowed and comes from the page itself; puts headers on all answers.

    Args:
        app: What it stands before.
        hosts: Names and addresses, in lower case and without ports, for these may be forwarded.
        policy: The Content-Security-Policy.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str], policy: str) -> None:
        self._app, self._hosts = app, hosts
        headers = {
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cross-origin-resource-policy": "same-origin",
            "cache-control": "no-store",
        }
        self._headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *self._headers]}
            await send(message)

        reason = self._why_not([(name, value.decode("latin-1").lower()) for name, value in scope["headers"]])
        answer = self._app if reason is None else JSONResponse({"error": reason}, 403)
        await answer(scope, receive, safely)

    def _why_not(self, headers: Sequence[tuple[bytes, str]]) -> str | None:
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1 or re.sub(r":\d*$", "", hosts[0]).strip("[]") not in self._hosts:
            return f"host {', '.join(hosts)[:100]!r} is not served here; igpt demo --allow-host NAME allows one"
        for name, value in headers:
            if name == b"origin" and value not in (f"http://{hosts[0]}", f"https://{hosts[0]}"):
                return f"origin {value[:100]!r} is another page"
        return None


class Connection(H11Protocol):
    """A connection that ends when its client does nothing: when between two looks, ``PATIENCE`` apart, no question has
    begun that was waited for, or nothing was taken of what is written. uvicorn would wait for both without an end, and
    so many connections of that kind as there may be would keep everybody else out.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._seen: tuple[object, ...] = ()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._next.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        self._next = self.loop.call_later(PATIENCE, self._look)
        unwritten, closing = self.transport.get_write_buffer_size(), self.transport.is_closing()
        answered = self.cycle is None or self.cycle.response_complete
        seen = (self.cycle, answered, closing, unwritten)
        if seen == self._seen and (answered or closing or unwritten):
            self.transport.abort()
        self._seen = seen


def policy_of(page: str) -> str:
    """The Content-Security-Policy of a page: of what it loads, and of its own style and script, by their hashes."""
    rules = ["default-src 'self'"]
    for name in ("style", "script"):
        found = re.findall(f"<{name}>(.*?)</{name}>", page, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
        rules.append(" ".join([f"{name}-src", *(f"'sha256-{text}'" for text in hashes)]))
    none = ("base-uri", "form-action", "frame-ancestors", "object-src")
    return "; ".join([*rules, *(f"{name} 'none'" for name in none)])


async def read(request: Request, most: int) -> bytes:
    """The body of a request; HTTPException where it is too large, as soon as that shows, or too slow."""
    said, content = request.headers.get("content-length", ""), bytearray()
    too_large = HTTPException(413, f"more than {most / (1 << 20):g} MiB")
    if said.isascii() and said.isdigit() and int(said) > most:
        raise too_large
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                content += part
                if len(content) > most:
                    raise too_large
    except TimeoutError:
        raise HTTPException(408, f"the question has not arrived in {PATIENCE:g} s") from None
    return bytes(content)


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Makes a value that is out of its range an answer of status 400, with the reason."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise HTTPException(400, first_line(error)) from error


def numbers(name: str, value: Any, count: int, most: int) -> list[int]:
    """A list of ``count`` integers in 0..most, else ValueError."""
    if not isinstance(value, list) or len(value) != count:
        got = f"a list of {len(value)}" if isinstance(value, list) else type(value).__name__
        raise ValueError(f"{name} is {got}; want a list of {count} integers")
    return [whole_number(f"{name}[{i}]", item, 0, most) for i, item in enumerate(value)]
