"""The page over HTTP: what it answers, whom it refuses, what becomes of those who leave or do not read."""

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import re
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from serving import Site, endless, patched, question, serving, until
from small_models import small_pipeline

from igpt_fast import Pipeline
from igpt_fast.cli import main as cli
from igpt_fast.web import guard, jobs, page

pytestmark = pytest.mark.xdist_group("web")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with serving(Pipeline.from_pretrained(device="cpu"), page.Setup(device="cpu")) as found:
        yield found


def png(size: tuple[int, int] = (40, 30)) -> bytes:
    with io.BytesIO() as file:
        Image.linear_gradient("L").resize(size).convert("RGB").save(file, "PNG")
        return file.getvalue()


def rows_of(lines: list[dict[str, Any]]) -> np.ndarray:
    """(n, H, W) tokens of the rows of an answer, which must come from the top to the bottom."""
    rows = [line for line in lines if "row" in line]
    assert [line["row"] for line in rows] == list(range(len(rows)))
    return np.stack([line["tokens"] for line in rows], axis=1)


def test_the_page_allows_itself_alone(site: Site) -> None:
    status, headers, content = site.ask("/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")
    policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    for name in ("style", "script"):
        (block,) = re.findall(f"<{name}>(.*?)</{name}>", content.decode(), re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert policy[f"{name}-src"] == f"'sha256-{digest}'"
    assert not re.search(rb'https?://|\bstyle="|\bon[a-z]+="', content)  # nothing from elsewhere; nothing it forbids
    assert not re.search(rb"innerHTML|insertAdjacent|\beval\b|document\.write", content)  # texts stay texts
    assert site.ask("/nothing")[0] == 404
    assert site.ask("/complete")[0] == 405


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("evil.example", None, 403),
        ("evil.example:{port}", None, 403),
        ("127.0.0.1.evil.example", None, 403),
        ("", None, 403),
        ("LOCALHOST:{port}", None, 200),
        ("[::1]:{port}", None, 200),
        ("localhost:9", "http://localhost:9", 200),  # a forwarded port
        ("localhost:{port}", "https://localhost:{port}", 200),
        ("localhost:{port}", "http://localhost:9", 403),
        ("localhost:{port}", "http://127.0.0.1:{port}", 403),
        ("localhost:{port}", "http://evil.example", 403),
        ("localhost:{port}", "null", 403),
    ],
)
def test_hosts_and_origins(site: Site, host: str, origin: str | None, status: int) -> None:
    headers = {} if origin is None else {"origin": origin.format(port=site.port)}
    got, answered, content = site.ask("/tokens", png(), headers, host.format(port=site.port))
    assert got == status, content
    assert answered["x-content-type-options"] == "nosniff"
    if status == 403:
        assert re.search("not served here|another page", json.loads(content)["error"])


def test_names_that_are_served() -> None:
    assert guard.hosts_of("127.0.0.1", ("Box.local",)) == {"127.0.0.1", "localhost", "::1", "box.local"}
    assert guard.hosts_of("10.0.0.7", ()) == {"10.0.0.7"}
    assert guard.hosts_of("a", ("B:7860", "[FE80::1]:80", "fe80::2", "[fe80::3]")) - {"a"} == {
        *("b", "fe80::1", "fe80::2", "fe80::3")
    }
    assert guard.hosts_of("0.0.0.0", ()) == {"0.0.0.0", "127.0.0.1", "localhost", "::1"}


def test_a_second_host_is_refused(site: Site) -> None:
    with socket.create_connection(("127.0.0.1", site.port), 30) as client:
        client.sendall(b"GET /model HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\nconnection: close\r\n\r\n")
        assert re.match(rb"HTTP/1\.1 40[03] ", client.recv(4096))


def test_the_model_and_its_examples(site: Site) -> None:
    model = site.json("/model")
    assert (model["height"], model["width"], len(model["palette"])) == (16, 16, 128)
    assert len(model["classes"]) == Pipeline.from_pretrained(device="cpu").model.config.n_classes
    assert len(model["shown"]) == 8
    assert max(model["shown"]) < model["examples"]
    found = [site.json(f"/example/{number}") for number in model["shown"]]
    assert found[0]["name"] == "smiling face with sunglasses"
    assert all(len(example["tokens"]) == 256 and max(example["tokens"]) < 128 for example in found)
    for number in (model["examples"], "9" * 5000, "-1", "%D9%A1", "1.0"):
        assert site.ask(f"/example/{number}")[0] == 404
    assert site.ask("/icon.png")[2].startswith(b"\x89PNG")


def test_the_tokens_of_a_file(site: Site) -> None:
    pipeline = Pipeline.from_pretrained(device="cpu")
    picture = Image.open(io.BytesIO(png())).crop((5, 0, 35, 30))
    want = pipeline.processor(picture, return_tensors="pt")["input_ids"][0].tolist()
    assert site.json("/tokens", png())["tokens"] == want
    for wrong in (b"no picture\n" * 9, b"", png()[:60], b"GIF89a"):
        assert "not a readable image" in site.refused("/tokens", wrong)


def test_a_body_is_no_longer_than_allowed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "16 MiB" in site.refused("/tokens", bytes((16 << 20) + 1), 413)
    assert "7072x7072 is more than 50000000 pixels" in site.refused("/tokens", png((7072, 7072)))
    assert "1 MiB" in site.refused("/complete", b" " * ((1 << 20) + 1), 413)
    with socket.create_connection(("127.0.0.1", site.port), 30) as client:  # one who does not say how long it is
        client.sendall(b"POST /surprise HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(64):
                client.sendall(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 413 ")
    monkeypatch.setattr(guard, "PATIENCE", 0.1)
    with socket.create_connection(("127.0.0.1", site.port), 30) as client:
        client.sendall(b"POST /surprise HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{")
        assert client.recv(4096).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n": 100_000}, "n is 100000"),
        ({"n": 0}, "n is 0"),
        ({"n": 2.5}, "n is 2.5"),
        ({"n": True}, "n is True"),
        ({"seed": -5}, "seed is -5"),
        ({"seed": "five"}, "seed is 'five'"),
        ({"seed": 1 << 64}, "seed is"),
        ({"seed": "99999999999999999999"}, "seed is"),
        ({"seed": "9" * 5000}, "seed is"),
        ({"seed": "\u0661"}, "seed is"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e999}, "not usable JSON|temperature is"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"candidates": 65}, "candidates is 65"),
        ({"candidates": 2}, "no given pixel follows"),
        ({"label": 99}, "no classes|label 99 is not in"),
        ({"label": "cat"}, "label is 'cat'"),
        ({"cfg_scale": 2}, "cfg_scale has no effect"),
        ({"known": [1] * 256}, "gives every pixel"),
        ({"known": [2] * 256}, r"known\[0\] is 2"),
        ({"known": [1] * 255}, "known is a list of 255"),
        ({"known": None}, "known is NoneType"),
        ({"tokens": [128] * 256}, r"tokens\[0\] is 128"),
        ({"tokens": [-1] * 256}, r"tokens\[0\] is -1"),
        ({"tokens": [[0] * 16] * 16}, "tokens is a list of 16"),
        ({"images": 4}, "unknown images"),
    ],
)
def test_what_is_out_of_range_is_refused_with_the_reason(site: Site, changes: dict[str, Any], reason: str) -> None:
    assert re.search(reason, site.refused("/complete", question(site, **changes)))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"7", b"\xff", b'{"n": 1, "n": 2}', b"[" * 100_000, b'{"a":' * 100 + b"1" + b"}" * 100],
)
def test_what_is_no_question_is_refused(site: Site, content: bytes) -> None:
    for path in ("/complete", "/surprise"):
        assert "not usable JSON" in site.refused(path, content)


def test_completions_come_row_by_row(site: Site) -> None:
    asked = question(site, n=3, temperature=0.9, top_k=20, top_p=0.95)
    lines = site.lines("/complete", asked)
    assert lines[0] == {"waiting": 0}
    drawn = rows_of(lines)
    assert drawn.shape == (3, 16, 16)
    assert (drawn.reshape(3, 256)[:, :128] == asked["tokens"][:128]).all()
    pipeline = Pipeline.from_pretrained(device="cpu")
    (picture,) = pipeline.processor.decode(torch.tensor([asked["tokens"]]))
    want = pipeline.complete(picture, keep=8, n=3, seed=5, temperature=0.9, top_k=20, top_p=0.95)
    assert torch.equal(torch.from_numpy(drawn.reshape(3, 256)), want.tokens)
    end = lines[-1]
    assert (end["engine"], end["seed"]) == (want.settings["engine"], "5")
    np.testing.assert_allclose(end["nats"], -want.logprobs.nanmean(dim=1), rtol=1e-5)
    grid = Image.open(io.BytesIO(site.ask(f"/result/{end['end']}.png")[2]))
    assert grid.tobytes() == want.grid().tobytes()
    with Image.open(io.BytesIO(site.ask(f"/result/{end['end']}.gif")[2])) as animation:
        assert (animation.format, animation.size, animation.n_frames) == ("GIF", grid.size, 9)
    headers = site.ask(f"/result/{end['end']}.npz")[1]
    assert headers["content-disposition"] == 'attachment; filename="completions.npz"'


@pytest.mark.parametrize("kind", ["rows", "mask", "nothing"])
def test_the_settings_to_copy_draw_the_same(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    asked = question(site, temperature=0.8, top_k=30)
    if kind == "mask":
        asked |= {"known": patched(asked["known"]), "candidates": 3, "n": 2}
    if kind == "nothing":
        asked["known"] = [0] * 256
    lines = site.lines("/complete", asked)
    key, (said,) = lines[-1]["end"], [line for line in lines if "command" in line]
    files = {"rows": ["picture.png"], "mask": ["picture.png", "mask.png"], "nothing": []}[kind]
    assert lines[-1]["files"] == ["png", "gif", "npz", *files]
    for name in files:
        (tmp_path / name).write_bytes(site.ask(f"/result/{key}.{name}")[2])
    monkeypatch.chdir(tmp_path)
    words = shlex.split(said["command"])
    assert words[0] == "igpt"
    assert cli.main([*words[1:], "--tokens", "t.npz"]) == 0
    with np.load("t.npz") as mine, np.load(io.BytesIO(site.ask(f"/result/{key}.npz")[2])) as theirs:
        np.testing.assert_array_equal(mine["tokens"], theirs["tokens"])
        assert mine["tokens"].tolist() == rows_of(lines).tolist()
    (written,) = [name for name in ("completions.png", "samples.png") if Path(name).exists()]
    Path(written).unlink()
    assert said["python"].count("\n") == 2
    exec(said["python"], {})
    with Image.open(written) as mine, Image.open(io.BytesIO(site.ask(f"/result/{key}.png")[2])) as theirs:
        assert mine.tobytes() == theirs.tobytes()
    for name in {"picture.png", "mask.png"} - set(files):
        assert site.ask(f"/result/{key}.{name}")[0] == (404 if kind == "nothing" else 200)


def test_a_seed_may_have_64_bits(site: Site) -> None:
    seed = (1 << 64) - 1
    ends = [site.lines("/complete", question(site, n=1, seed=said))[-2:] for said in (seed, str(seed))]
    assert [end["seed"] for _, end in ends] == [str(seed)] * 2
    assert ends[0][0]["tokens"] == ends[1][0]["tokens"]


def test_surprise(site: Site) -> None:
    asked = question(site)
    lines = site.lines("/surprise", {"tokens": asked["tokens"]})
    want = Pipeline.from_pretrained(device="cpu").score_tokens(torch.tensor([asked["tokens"]])).nats[0]
    np.testing.assert_allclose(lines[-1]["nats"], want, atol=6e-5)
    assert "unknown known" in site.refused("/surprise", {"tokens": asked["tokens"], "known": asked["known"]})
    assert re.search("no classes|99 is not in", site.refused("/surprise", {"tokens": asked["tokens"], "label": 99}))


def test_a_model_with_classes_and_of_another_shape() -> None:
    pipeline = small_pipeline(5, 4, 9, classes=3, dtype=torch.float32)
    with serving(pipeline, page.Setup("some where", "cpu", "bfloat16", "int8")) as site:
        model = site.json("/model")
        assert (model["height"], model["width"], model["classes"]) == (5, 4, ["0", "1", "2"])
        pipeline.model.config.id2label = {0: "cat", 1: "dog", 2: "<b>"}
        assert site.json("/model")["classes"] == ["cat", "dog", "<b>"]
        assert len(site.json("/tokens", png())["tokens"]) == 20
        assert "label 3 is not in 0..2" in site.refused("/complete", question(site, label=3))
        command = "igpt complete picture.png --keep 2rows -n 2 --seed 5 --cfg-scale 1.5 --label 1 --model 'some where'"
        lines = site.lines("/complete", question(site, label=1, cfg_scale=1.5))
        (said,) = [line for line in lines if "command" in line]
        assert said["command"] == f"{command} --device cpu --dtype int8"
        assert said["python"].splitlines()[1:] == [
            "pipeline = igpt_fast.Pipeline.from_pretrained('some where', device='cpu', dtype='bfloat16')",
            "pipeline.complete('picture.png', keep=2, n=2, seed=5, cfg_scale=1.5, labels=1, dtype='int8')"
            ".save_grid('completions.png')",
        ]
        nats = [site.lines("/surprise", {"tokens": [0] * 20, "label": label})[-1]["nats"] for label in (0, 1, None)]
        assert nats[0] != nats[1] != nats[2]


def test_what_fails_while_it_is_drawn_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = small_pipeline(5, 4, 9, dtype=torch.float32)
    with torch.no_grad():
        pipeline.model.lm_head.weight.fill_(torch.nan)
    with serving(pipeline) as site:
        assert "not finite" in site.lines("/complete", question(site))[-1]["error"]
        assert "not finite" in site.lines("/surprise", {"tokens": [0] * 20})[-1]["error"]
        assert site.idle()


# ---- several at once --------------------------------------------------------------------------------------------


def line_of(client: socket.socket) -> dict[str, Any]:
    """The next line of an answer, in chunks whose lengths are skipped."""
    text = b""
    while not (text.startswith(b"{") and text.endswith(b"}\n")):
        mark = client.recv(1)
        assert mark
        text = b"" if mark == b"\n" and not text.startswith(b"{") else text + mark
    return json.loads(text)


def test_two_at_once_wait_for_each_other(site: Site) -> None:
    with site.begin(endless(site)) as first:
        assert line_of(first) == {"waiting": 0}
        with site.begin(question(site, n=1)) as second:
            assert line_of(second) == {"waiting": 1}
            first.close()
            assert line_of(second) == {"waiting": 0}
            lines = []
            while not lines or "end" not in lines[-1]:
                lines.append(line_of(second))
    assert rows_of(lines).shape == (1, 16, 16)
    assert site.idle()


def test_one_who_waits_may_leave(site: Site) -> None:
    with site.begin(endless(site)) as first, site.begin(question(site)) as third:
        line_of(first)
        with site.begin(question(site)) as second:
            line_of(second)
        waits = line_of(third)["waiting"]
        while waits > 1:
            waits = line_of(third)["waiting"]
    assert site.idle()


@pytest.mark.parametrize("when", ["at once", "while it is drawn"])
def test_whoever_leaves_frees_the_model(site: Site, when: str) -> None:
    """Within a pixel: the drawing would take a minute."""
    with site.begin(endless(site)) as client:
        while when != "at once" and line_of(client).get("done", 0) < 1000:
            pass
    assert site.idle()
    assert rows_of(site.lines("/complete", question(site))).shape == (2, 16, 16)


def test_a_slow_reader_keeps_nobody_waiting(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = question(site, n=16, known=[0] * 256)
    clients = [site.begin(asked) for _ in range(3)]  # and none of them reads
    assert rows_of(site.lines("/complete", question(site, n=1))).shape == (1, 16, 16)
    assert site.idle()
    for client in clients:
        lines = []
        while not lines or "end" not in lines[-1]:
            lines.append(line_of(client))
        assert rows_of(lines).shape == (16, 16, 16)  # it is all there when they do
        client.close()


def test_a_reader_who_takes_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PATIENCE", 0.05)
    turns, said = jobs.Turns(), []

    def work(job: jobs.Job) -> None:
        for number in range(10_000):
            job.say(number=number)
            time.sleep(0.005)

    async def never(message: object) -> None:
        said.append(message)
        if len(said) == 2:  # the first line
            await asyncio.Event().wait()

    async def served() -> None:
        await jobs.Lines(turns, turns.add(work))({}, asyncio.Event().wait, never)

    asyncio.run(served())
    assert len(said) == 2
    turns.close()


GET = b"GET / HTTP/1.1\r\nhost: localhost\r\n"


@pytest.mark.parametrize("said", [b"", GET, (GET + b"\r\n") * 200], ids=["silent", "half a question", "takes nothing"])
def test_connections_that_do_nothing_end(site: Site, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    """Else 64 of them would keep everybody out."""
    monkeypatch.setattr(guard, "PATIENCE", 0.2)
    connections = site.server.server_state.connections
    assert until(lambda: not connections)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", site.port))
        client.sendall(said)
        assert until(lambda: connections)
        assert until(lambda: not connections)


def test_a_connection_that_waits_for_its_answer_stays(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "PATIENCE", 0.05)
    with site.begin(endless(site)) as client:
        begin = time.monotonic()
        while time.monotonic() - begin < 0.5:
            line_of(client)
    assert site.idle()


def test_the_queue_is_bounded(site: Site) -> None:
    with contextlib.ExitStack() as stack:
        asked = endless(site)
        for _ in range(16):
            line_of(stack.enter_context(site.begin(asked)))
        assert "later" in site.refused("/complete", question(site), 503)
        assert site.json("/tokens", png())  # what does not need the model goes on
    assert site.idle()


def test_the_last_results_are_kept(site: Site) -> None:
    asked = question(site, n=1)
    asked["known"] = [int(i < 240) for i in range(256)]
    keys = [site.lines("/complete", asked)[-1]["end"] for _ in range(17)]
    assert len(set(keys)) == 17
    assert [site.ask(f"/result/{key}.png")[0] for key in keys[:2]] == [404, 200]
    for wrong in ("x.png", f"{keys[-1]}.exe", keys[-1], f"{keys[-1]}.", "..%2f..%2fetc%2fpasswd"):
        assert site.ask(f"/result/{wrong}")[0] == 404


WRITTEN: list[Any] = []
RECORDING = False


def test_nothing_is_written(site: Site) -> None:
    def hook(event: str, args: tuple[Any, ...]) -> None:
        if RECORDING and event == "open" and (set(str(args[1])) & set("wax+") or (args[2] or 0) & 3):
            WRITTEN.append(args)

    global RECORDING
    sys.addaudithook(hook)
    RECORDING = True
    try:
        with contextlib.suppress(OSError):
            Path("/nowhere/file").write_bytes(b"")
        key = site.lines("/complete", {**question(site), "known": patched([1] * 256)})[-1]["end"]
        for kind in ("png", "gif", "npz", "picture.png", "mask.png"):
            assert site.ask(f"/result/{key}.{kind}")[0] == 200
        site.json("/tokens", png((2000, 2000)))
    finally:
        RECORDING = False
    assert [args[0] for args in WRITTEN] == ["/nowhere/file"]


def test_a_port_that_is_taken_is_named(site: Site) -> None:
    with pytest.raises(OSError, match=rf"127\.0\.0\.1:{site.port}: .*in use; choose another"):
        page.listening("127.0.0.1", site.port)
    with pytest.raises(OSError, match=r"no\.such\.name\.invalid:7860: "):
        page.listening("no.such.name.invalid", 7860)


def test_the_thread_of_a_closed_page_has_ended() -> None:
    with serving(small_pipeline(5, 4, 9, dtype=torch.float32)) as site:
        client = site.begin({**question(site), "n": 16})
        thread = site.server.studio.turns._thread
    client.close()
    assert until(lambda: not any(worker.is_alive() for worker in thread._threads))
