"""The page of one model: its routes, and the server."""

from __future__ import annotations

import asyncio
import io
import math
import re
import secrets
import socket
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from igpt_fast.checks import whole_number
from igpt_fast.draws import Sampling
from igpt_fast.files import BUNDLED, listed, parse_json, read_npz
from igpt_fast.image import center_crop, dequantize, open_image
from igpt_fast.pipeline import Generation, Pipeline
from igpt_fast.sampling import request as sampling_request
from igpt_fast.sampling.results import save_tokens
from igpt_fast.web.guard import Connection, Guard, numbers, policy_of, read, refused
from igpt_fast.web.guard import hosts_of as hosts_of
from igpt_fast.web.jobs import Job, Lines, Turns
from igpt_fast.web.recipe import Setup as Setup
from igpt_fast.web.recipe import recipe

MAX_PICTURE = 16 << 20  # bytes of a file
MAX_PIXELS = 50_000_000  # of a picture, which takes up to 10 bytes for each while it is decoded
MAX_QUESTION = 1 << 20  # bytes of JSON
MAX_IMAGES, MAX_CANDIDATES = 16, 64
MAX_CONNECTIONS = 64
KEPT = 16  # results
# Held-out pictures that the page offers first.
_SHOWN = (
    *("noto/1F60E", "noto/1F60D", "noto/1F608", "noto/1F3DD-FE0F"),
    *("noto/1F559", "noto/2665-FE0F", "twemoji/2B50", "twemoji/1F1E9-1F1F0"),
)
_QUESTION = {"tokens", "known", "n", "seed", "candidates", "temperature", "top_k", "top_p", "label", "cfg_scale"}
_TYPES = {"png": "image/png", "gif": "image/gif", "npz": "application/octet-stream"}


class Studio:
    """The page's model, its queue, its last results."""

    def __init__(self, pipeline: Pipeline, setup: Setup) -> None:
        self.turns = Turns()
        self._pipeline, self._setup = pipeline, setup
        self._height, self._width = pipeline.processor.height, pipeline.processor.width
        self._colours = pipeline.model.config.n_colours
        self._results: dict[str, Generation] = {}  # the oldest first
        self._pictures = asyncio.Semaphore(1)  # files that are decoded, or made, at once
        with (BUNDLED.parent / "emoji16.npz").open("rb") as file:
            found = read_npz(file, ("tokens", "clusters", "heldout"), ("names",))
        tokens, side = found["tokens"][found["heldout"]], math.isqrt(found["tokens"].shape[1])
        self._examples = dequantize(tokens, found["clusters"]).reshape(-1, side, side, 3)
        self._names = found["names"][found["heldout"]].tolist()
        self._shown = [self._names.index(name) for name in _SHOWN if name in self._names] or [0]

    def routes(self) -> list[Route]:
        return [
            Route("/model", self.model),
            Route("/icon.png", self.icon),
            Route("/example/{number}", self.example),
            Route("/tokens", self.tokens, methods=["POST"]),
            Route("/surprise", self.surprise, methods=["POST"]),
            Route("/complete", self.complete, methods=["POST"]),
            Route("/result/{name}", self.result),
        ]

    def warm(self) -> None:
        """Draws a row, so that the first visitor does not wait for weights to be packed."""
        self.turns.prepare(lambda: next(self._pipeline.stream(1, seed=0, dtype=self._setup.rounded)))

    async def model(self, request: Request) -> Response:
        """What the page has to know."""
        config, processor = self._pipeline.model.config, self._pipeline.processor
        assert processor.clusters is not None
        names = config.id2label if len(config.id2label) == config.n_classes else {}  # else of another head
        values = {
            "name": self._setup.model or "bundled emoji",
            "height": self._height,
            "width": self._width,
            "palette": dequantize(np.arange(self._colours), np.asarray(processor.clusters)).tolist(),
            "classes": [str(names.get(i, i)) for i in range(config.n_classes)],
            "parameters": sum(weight.numel() for weight in self._pipeline.model.parameters()),
            "device": str(self._pipeline.device),
            "most": {"n": MAX_IMAGES, "candidates": MAX_CANDIDATES, "picture": MAX_PICTURE},
            "examples": len(self._examples),
            "shown": self._shown,
        }
        return JSONResponse(values)

    async def icon(self, request: Request) -> Response:
        """An example, which stands for the page."""
        return Response(_png(Image.fromarray(self._examples[self._shown[0]])), media_type="image/png")

    async def example(self, request: Request) -> Response:
        """A picture that the bundled model has not been trained on, and what Unicode calls it."""
        name = request.path_params["number"]
        # Not a number of the route: Python makes none of more than 4300 digits.
        if re.fullmatch("[0-9]{1,9}", name) is None or (number := int(name)) >= len(self._examples):
            raise HTTPException(404, f"there are {len(self._examples)} examples")
        tokens = self._tokens_of(Image.fromarray(self._examples[number]))
        return JSONResponse({"tokens": tokens, "name": _emoji_name(self._names[number])})

    async def tokens(self, request: Request) -> Response:
        """The tokens of a file."""
        content = await read(request, MAX_PICTURE)
        async with self._pictures:
            with refused():
                tokens = await asyncio.to_thread(lambda: self._tokens_of(open_image(content, max_pixels=MAX_PIXELS)))
        return JSONResponse({"tokens": tokens})

    def _tokens_of(self, picture: Image.Image) -> list[int]:
        cut = center_crop(picture, self._width / self._height)
        return self._pipeline.processor(cut, return_tensors="pt")["input_ids"][0].tolist()

    async def surprise(self, request: Request) -> Response:
        """Nats of every pixel of a picture."""
        content = await read(request, MAX_QUESTION)
        with refused():
            asked = self._question(content, {"tokens", "label"})
            tokens = torch.tensor([self._tokens_in(asked)])
            label = self._label_in(asked)

        def work(job: Job) -> None:
            job.say(nats=[round(nats, 4) for nats in self._pipeline.score_tokens(tokens, label).nats[0].tolist()])

        return Lines(self.turns, self.turns.add(work))

    async def complete(self, request: Request) -> Response:
        """Draws the pixels of a picture that are not known; all of them, and of no picture, where none is."""
        content = await read(request, MAX_QUESTION)
        with refused():
            asked = self._request(self._question(content, _QUESTION))

        def work(job: Job) -> None:
            begin = time.perf_counter()
            job.say(**recipe(asked, self._setup))
            stream = self._pipeline.start(asked, job.advance)
            for event in stream:
                row = {"first": event.first, "row": event.row, "tokens": event.tokens.tolist()}
                job.say(**row, done=event.done, total=event.total)
            drawn = stream.result
            key = secrets.token_hex(8)
            self._results[key] = drawn
            for old in list(self._results)[:-KEPT]:
                del self._results[old]
            nats = [value if math.isfinite(value) else None for value in (-drawn.logprobs.nanmean(dim=1)).tolist()]
            seconds = round(time.perf_counter() - begin, 3)
            files = [kind for kind in _FILES if _has(drawn, kind) and (kind != "mask.png" or asked.keep is None)]
            job.say(end=key, seconds=seconds, engine=stream.engine, seed=str(asked.seed), nats=nats, files=files)

        return Lines(self.turns, self.turns.add(work))

    def _question(self, content: bytes, names: set[str]) -> dict[str, Any]:
        asked = parse_json(content)
        if unknown := asked.keys() - names:
            raise ValueError(f"unknown {listed(unknown)}; want some of {', '.join(sorted(names))}")
        return asked

    def _tokens_in(self, asked: dict[str, Any]) -> list[int]:
        return numbers("tokens", asked.get("tokens"), self._height * self._width, self._colours - 1)

    def _label_in(self, asked: dict[str, Any]) -> int | None:
        label = asked.get("label")
        self._pipeline.checked_labels(label if label is None else whole_number("label", label, 0), 1, "images")
        return label

    def _request(self, asked: dict[str, Any]) -> sampling_request.Request:
        """What is to be drawn, checked; ValueError, TypeError."""
        tokens = self._tokens_in(asked)
        known = np.array(numbers("known", asked.get("known"), len(tokens), 1), dtype=bool)
        rows = int(known.argmin()) // self._width
        # Whole rows from the top are what igpt complete --keep names; all else is a mask.
        keep = rows if not known[rows * self._width :].any() else known.reshape(self._height, self._width)
        pictures = self._pipeline.processor.decode(torch.tensor([tokens])) if known.any() else None
        draw = {name: asked[name] for name in ("temperature", "top_k", "top_p") if name in asked}
        seed = asked.get("seed")
        if isinstance(seed, str) and re.fullmatch("[0-9]{1,20}", seed):
            seed = int(seed)  # JavaScript's numbers have 53 bits
        return self._pipeline.request(
            whole_number("n", asked.get("n", 4), 1, MAX_IMAGES),
            images=pictures,
            keep=keep,
            candidates=whole_number("candidates", asked.get("candidates", 1), 1, MAX_CANDIDATES),
            labels=self._label_in(asked),
            seed=seed,
            sampling=Sampling(**draw),
            cfg_scale=asked.get("cfg_scale", 1.0),
            dtype=self._setup.rounded,
        )

    async def result(self, request: Request) -> Response:
        """A file of one of the last results: ID.png, .gif, .npz; of what it was made of: .picture.png, .mask.png."""
        key, _, kind = request.path_params["name"].partition(".")
        drawn, make = self._results.get(key), _FILES.get(kind)
        if drawn is None or make is None or not _has(drawn, kind):
            raise HTTPException(404, f"no such file; the page keeps the last {KEPT} results")
        async with self._pictures:
            content = await asyncio.to_thread(make, drawn)
        name = kind if "." in kind else f"{'samples' if drawn.inputs is None else 'completions'}.{kind}"
        headers = {"content-disposition": f'attachment; filename="{name}"'}
        return Response(content, headers=headers, media_type=_TYPES[kind.rpartition(".")[2]])


def _has(drawn: Generation, kind: str) -> bool:
    """Whether it was made of a file of that kind, or can be made one."""
    return drawn.inputs is not None or "." not in kind


def _grid(drawn: Generation) -> bytes:
    return _png(drawn.grid())


def _gif(drawn: Generation) -> bytes:
    with io.BytesIO() as file:
        drawn.save_gif(file)
        return file.getvalue()


def _npz(drawn: Generation) -> bytes:
    with io.BytesIO() as file:
        save_tokens(drawn, file)
        return file.getvalue()


def _input(drawn: Generation) -> bytes:
    assert drawn.inputs is not None
    return _png(drawn.inputs[0])


def _mask(drawn: Generation) -> bytes:
    assert drawn.known is not None
    shape = drawn.processor.height, drawn.processor.width
    return _png(Image.fromarray(drawn.known[0].numpy().reshape(shape)))


def _png(picture: Image.Image) -> bytes:
    with io.BytesIO() as file:
        picture.save(file, "PNG")
        return file.getvalue()


_FILES = {"png": _grid, "gif": _gif, "npz": _npz, "picture.png": _input, "mask.png": _mask}


def _emoji_name(name: str) -> str:
    """``noto/1F60D`` is a smiling face with heart-shaped eyes."""
    code = name.rpartition("/")[2].partition("-")[0]
    said = unicodedata.name(chr(int(code, 16)), "emoji").lower()
    return "flag" if said.startswith("regional") else said


class Server(uvicorn.Server):
    """The page of a model, for those who ask for one of ``hosts``; ``ready`` is called when they can."""

    def __init__(self, pipeline: Pipeline, setup: Setup, hosts: frozenset[str], ready: Callable[[], None]) -> None:
        self.studio, self._ready = Studio(pipeline, setup), ready
        config = uvicorn.Config(
            _application(self.studio, hosts),
            http=Connection,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=1,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.studio.turns.stop()  # drawings are no reason to wait
        await super().shutdown(sockets)

    def listen(self, sock: socket.socket) -> None:
        """Serves until Ctrl-C, or until ``should_exit`` is set."""
        self.studio.warm()
        try:
            self.run([sock])
        finally:
            self.studio.turns.close()


def _application(studio: Studio, hosts: frozenset[str]) -> Starlette:
    content = Path(__file__).with_name("page.html").read_text("utf-8")

    async def page(request: Request) -> Response:
        return Response(content, media_type="text/html")

    async def failed(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code)

    async def left(request: Request, error: Exception) -> Response:
        return Response(status_code=400)  # nobody reads it

    return Starlette(
        routes=[Route("/", page), *studio.routes()],
        middleware=[Middleware(Guard, hosts=hosts, policy=policy_of(content))],
        exception_handlers={HTTPException: failed, ClientDisconnect: left},
    )


def listening(host: str, port: int) -> socket.socket:
    """A socket that accepts connections at ``host``; OSError, which names both, where there can be none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(128)
        except OSError:
            found.close()
            raise
    except OSError as error:
        raise OSError(f"{host}:{port}: {error.strerror or error}; choose another --host or --port") from error
    return found
