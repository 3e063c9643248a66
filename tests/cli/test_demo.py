"""``igpt demo``: what it says, refuses and opens, and how it ends."""

import http.client
import re
import signal
import socket
import subprocess
import sys
import webbrowser
from pathlib import Path

import pytest

from igpt_fast.cli import main as cli
from igpt_fast.cli.commands import demo


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    for name in [name for name in sys.modules if name.startswith("igpt_fast.web")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)  # type: ignore[arg-type]
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == f"igpt demo: the page needs {missing}: pip install 'igpt_fast[demo]'\n"


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("fe80::1", "[fe80::1]"), ("box", "box")],
)
def test_the_address_is_one_that_a_browser_reaches(host: str, address: str) -> None:
    assert demo._address(host, 7860) == f"http://{address}:7860/"


def test_what_makes_no_sense_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--port", "65536"], ["--port", "-1"], ["--dtype", "float7"], ["--device", "abacus"]):
        port = [] if "--port" in words else ["--port", "0"]
        assert cli.main(["demo", "--no-browser", *port, *words]) == 2
        assert words[0] in capsys.readouterr().err.replace("dtype is", "--dtype is")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.main(["demo", "--no-browser", "--port", port]) == 1
        assert f"127.0.0.1:{port}: " in capsys.readouterr().err
    assert cli.main(["demo", "--no-browser", "--port", "0", "--model", "./nothing"]) == 1
    assert "./nothing: no such folder" in capsys.readouterr().err


def test_it_serves_until_ctrl_c(tmp_path: Path) -> None:
    """And ends in the middle of a drawing too, at once, having written nothing."""
    command = (sys.executable, "-m", "igpt_fast", "demo", "--port", "0", "--no-browser", "--allow-host", "box.local")
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends it\)\n", process.stdout.readline())
            assert found
            connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=30)
            for host, status in (("box.local", 200), ("other.local", 403)):
                connection.request("GET", "/", headers={"host": host})
                answer = connection.getresponse()
                answer.read()
                assert answer.status == status
            known = ",".join("0" * 255 + "1")
            body = f'{{"tokens": [{",".join("0" * 256)}], "known": [{known}], "n": 16, "candidates": 64}}'
            connection.request("POST", "/complete", body)
            assert connection.getresponse().readline() == b'{"waiting":0}\n'
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130
    assert said.endswith("igpt demo: interrupted\n")
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_the_page_opens_in_a_browser_with_windows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    for kind in (webbrowser.GenericBrowser, webbrowser.BackgroundBrowser):
        browser = kind("browser")
        monkeypatch.setattr(browser, "open", opened.append)
        monkeypatch.setattr(webbrowser, "get", lambda browser=browser: browser)
        demo._open(f"http://{kind.__name__}/")
    monkeypatch.setattr(webbrowser, "get", lambda: (_ for _ in ()).throw(webbrowser.Error("none")))
    demo._open("http://nothing/")
    assert opened == ["http://BackgroundBrowser/"]
