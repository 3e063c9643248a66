"""``igpt demo``: a page in the browser to play with a model."""

from __future__ import annotations

import sys
import webbrowser
from typing import Annotated

from tyro.conf import UseAppendAction, arg

from igpt_fast.cli import checks, terminal
from igpt_fast.cli.draw.job import load_pipeline
from igpt_fast.cli.draw.options import ROUNDED, DrawOptions, Dtype


def demo(
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str | None = None,
    dtype: Dtype = "float32",
    browser: bool = True,
    allow_host: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NAME")] = (),
) -> None:
    """Open a page in the browser to play with a model: paint, hide pixels, watch them be drawn again.

    Example: igpt demo --model runs/mine/model

    Needs pip install 'igpt_fast[demo]'. One drawing at a time has the model, the others wait. Who can reach the address
    can use the model: leave it at this machine's own unless you trust the network.

    Args:
        model: Directory or hub id of a checkpoint; the bundled emoji model if not given.
        host: Address to listen at; 0.0.0.0 is every one of this machine.
        port: Port to listen at; 0 takes a free one.
        device: cpu, cuda, cuda:N or mps; cuda if torch has it, if not given.
        dtype: As of igpt sample: float32, bfloat16, float16, auto, int8, fp8_values or fp8_cache.
        browser: Open the page in this machine's browser, where it has one with windows.
        allow_host: Another name by which the page may be asked for, such as that of this machine in its network; once
            for each.
    """
    checks.check_range("--port", port, 0, 65535)
    with checks.as_usage():
        drawing = DrawOptions(model=model, device=device, dtype=dtype)
    try:
        from igpt_fast.web import page
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("starlette", "uvicorn"):
            raise
        raise ImportError(f"the page needs {missing}: pip install 'igpt_fast[demo]'") from error
    sock = page.listening(host, port)
    with sock:
        pipeline = load_pipeline(drawing, None)
        rounded = dtype if dtype in ROUNDED else None
        loaded = "bfloat16" if rounded else None if dtype == "float32" else dtype
        setup = page.Setup(model, device, loaded, rounded)
        address = _address(host, sock.getsockname()[1])

        def ready() -> None:
            terminal.say(f"{address} (Ctrl-C ends it)", sys.stdout)
            if browser:
                _open(address)

        page.Server(pipeline, setup, page.hosts_of(host, allow_host), ready).listen(sock)


def _address(host: str, port: int) -> str:
    """At which this machine's browser reaches the page."""
    near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{near}]' if ':' in near else near}:{port}/"


def _open(address: str) -> None:
    """In a browser with windows: one in the terminal would take it over."""
    try:
        found = webbrowser.get()
    except webbrowser.Error:
        return
    if type(found) is not webbrowser.GenericBrowser:  # Python's class of those in the terminal
        found.open(address)
