"""benchmarks/gpu_check.py, as far as it goes without a GPU: its steps, its file, what it takes with it."""

from __future__ import annotations

import functools
import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import run_decoder
from implementations import Implementation

from igpt_fast import backend

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the tests run outside the repository")


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The module, with its folders below a temporary one."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("gpu_check")
    monkeypatch.setattr(module, "WORK", tmp_path / "work")
    monkeypatch.setattr(module, "REPORT", tmp_path / "junit.xml")
    return module


def python(check: ModuleType, name: str, code: str, **more: Any) -> Any:
    return check.Step(name, [sys.executable, "-c", code], more.pop("seconds", 20), **more)


def run(check: ModuleType, *steps: Any, **more: Any) -> tuple[bool, dict[str, Any]]:
    report: dict[str, Any] = {"commit": "abc1234"}
    saved: list[str] = []
    passed = check.run_steps(steps, report, lambda r: saved.append(json.dumps(r)), **more)
    assert len(saved) == len(steps)
    assert json.loads(saved[-1]) == report
    return passed, {result["name"]: result for result in report["steps"]}


def test_a_failing_step_is_written_down_and_the_rest_runs(check: ModuleType) -> None:
    passed, results = run(
        check,
        python(check, "first", "print('fine')"),
        python(check, "second", "import sys; print('oh', file=sys.stderr); sys.exit(4)"),
        python(check, "third", "print('as well')"),
    )
    assert not passed
    assert [result["status"] for result in results.values()] == ["passed", "failed", "passed"]
    assert results["second"]["reason"] == "exit status 4"
    assert results["second"]["tail"] == "oh\n"
    assert results["third"]["tail"] == "as well\n"
    assert all(result["seconds"] >= 0 for result in results.values())
    assert results["first"]["command"] == "python -c 'print('\"'\"'fine'\"'\"')'"  # no folder of this machine


def test_all_well(check: ModuleType) -> None:
    passed, results = run(
        check, python(check, "a", ""), check.Step("b", [], 1, skip="not here"), python(check, "c", "", needs=("a",))
    )
    assert passed
    assert results["b"] == {
        "name": "b",
        "status": "skipped",
        "reason": "not here",
        "seconds": 0.0,
        "commit": "abc1234",
    }


def test_what_needs_a_failed_step_does_not_run(check: ModuleType, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w')"
    passed, results = run(check, python(check, "build", "1 / 0"), python(check, "tests", code, needs=("build",)))
    assert not passed
    assert results["tests"]["reason"] == "needs build"
    assert not mark.exists()


@pytest.mark.clock
def test_a_step_that_hangs_is_ended_with_what_it_started(check: ModuleType, tmp_path: Path) -> None:
    late = tmp_path / "late"
    child = f"import time; time.sleep(2.0); open({str(late)!r}, 'w')"
    code = f"import subprocess, sys; print('on', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    passed, results = run(check, python(check, "hangs", code, seconds=1.0), python(check, "next", ""))
    assert not passed
    assert results["hangs"]["reason"] == "ended after 1 s"
    assert results["hangs"]["tail"] == "on\n"
    assert results["next"]["status"] == "passed"
    time.sleep(1.5)
    assert not late.exists()


@pytest.mark.clock
def test_the_time_for_all_steps(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "BUDGET", 0.5)
    passed, results = run(check, python(check, "a", ""))
    assert not passed
    assert results["a"]["reason"].endswith("are over; make gpu-check ONLY=a runs it")


def test_what_is_unchanged_does_not_run_again(check: ModuleType) -> None:
    """By the digest of its sources in the run that it passed; other runs' results stay."""
    was = {"name": "a", "status": "passed", "commit": "old", "sources": "x", "rows": [1], "seconds": 3.0}
    other = {"name": "other", "status": "passed", "commit": "old"}
    fails = "1 / 0"
    passed, results = run(check, python(check, "a", fails, sources="x"), earlier=[was, other], again=False)
    assert passed
    assert results == {"a": was, "other": other}
    for step, result, again in (
        (python(check, "a", fails, sources="x"), was, True),
        (python(check, "a", fails, sources="y"), was, False),
        (python(check, "a", fails, sources="x"), was | {"status": "failed"}, False),
        (python(check, "a", fails, sources="x"), other, False),
        (python(check, "a", fails), was | {"sources": ""}, False),
    ):
        passed, results = run(check, step, earlier=[result], again=again)
        assert not passed
        assert (results["a"]["status"], results["a"]["commit"]) == ("failed", "abc1234")
        assert results["a"].get("sources", "") == step.sources


def test_the_digest_of_sources(check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("a")
    (tmp_path / "other").write_text("a")
    found = [check.digest(["csrc/*"], device(check))]
    (tmp_path / "other").write_text("b")
    assert check.digest(["csrc/*"], device(check)) == found[0]
    assert check.digest(["csrc/*", "csrc/a.cu"], device(check)) == found[0]
    (tmp_path / "csrc" / "a.cu").write_text("b")
    found.append(check.digest(["csrc/*"], device(check)))
    (tmp_path / "csrc" / "a.cu").rename(tmp_path / "csrc" / "b.cu")
    found.append(check.digest(["csrc/*"], device(check)))
    found.append(check.digest(["csrc/*"], check.Device("Another GPU", (9, 0), "580.1", 79.6, {"torch": "2.11"})))
    found.append(check.digest(["csrc/*"], check.Device("A GPU", (9, 0), "580.1", 79.6, {"torch": "2.12"})))
    assert len(set(found)) == 5


def test_the_sources_of_the_parts(check: ModuleType) -> None:
    assert check.SOURCES.keys() == check.SECONDS_IF_CHANGED.keys()
    for pattern in {pattern for patterns in check.SOURCES.values() for pattern in patterns}:
        assert any(path.is_file() for path in ROOT.glob(pattern)), pattern
    bound = ("csrc/bind/cuda.cpp", "csrc/bind/cpu.cpp", "csrc/cuda/norm.cu", "igpt_fast/backend.py")
    engine = ("igpt_fast/engines/cuda/step.py", "igpt_fast/engines/cuda/decoder.py", "tests/emulator/test_decoder.py")
    for part, paths in {
        **dict.fromkeys(("memcheck", "racecheck", "benchmark"), bound),
        **dict.fromkeys(("tests", "determinism"), (*bound, *engine)),
        "conformance": ("csrc/cuda/ptx.cuh", "csrc/emulator/include/cuda_runtime.h", "tests/emulator/conformance.cu"),
    }.items():
        for path in paths:
            assert any(ROOT / path in ROOT.glob(pattern) for pattern in check.SOURCES[part]), f"{part}: {path}"


@pytest.mark.clock
def test_what_is_looked_at_afterwards(check: ModuleType) -> None:
    def broken() -> tuple[str, dict[str, Any]]:
        raise FileNotFoundError("no report")

    passed, results = run(
        check,
        python(check, "good", "", look=lambda: ("", {"rows": [1]})),
        python(check, "bad", "", look=lambda: ("no row", {})),
        python(check, "half", "import time; time.sleep(60)", seconds=1.0, look=lambda: ("", {"rows": [1]})),
        python(check, "worse", "", look=broken),
        python(check, "no program", "", before=broken),
        check.Step("missing", ["/no/such/program"], 5),
    )
    assert not passed
    assert (results["good"]["status"], results["good"]["rows"]) == ("passed", [1])
    assert results["bad"]["reason"] == "no row"
    assert (results["half"]["reason"], results["half"]["rows"]) == ("ended after 1 s", [1])
    assert results["worse"]["reason"] == "no result: no report"
    assert results["missing"]["reason"].startswith("FileNotFoundError")
    assert [result["status"] for result in results.values()] == ["passed", *["failed"] * 5]


CASE = '<testcase name="t" time="0.1">{}</testcase>'


@pytest.mark.parametrize(
    ("cases", "problem", "counts"),
    [
        ([""], "", (1, 0, 0)),
        (["", '<skipped message="one GPU"/>'], "", (1, 0, 1)),
        (["", "<failure/>", "<error/>"], "", (1, 2, 0)),
        ([], "no test ran", (0, 0, 0)),
        (['<skipped message="one GPU"/>'], "no test ran", (0, 0, 1)),
        (["", '<skipped message="gpu: no device"/>'], "tests were skipped: gpu: no device", (1, 0, 1)),
    ],
)
def test_reading_the_report_of_pytest(
    check: ModuleType, cases: list[str], problem: str, counts: tuple[int, int, int]
) -> None:
    body = "".join(CASE.format(case) for case in cases)
    check.REPORT.write_text(f"<testsuites><testsuite>{body}</testsuite></testsuites>", "utf-8")
    found, more = check.tests_that_ran()
    assert found == problem
    assert tuple(more["tests"].values()) == counts


def device(check: ModuleType) -> Any:
    return check.Device("A GPU", (9, 0), "580.1", 79.6, {"torch": "2.11"})


def test_the_file(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "gpu_check.json"
    monkeypatch.setattr(check, "find_device", lambda: device(check))
    monkeypatch.setattr(check, "make_steps", lambda _: [python(check, "a", ""), python(check, "b", "", needs=("a",))])
    assert check.main(["--out", str(out), "--commit", "abc1234"]) == 0
    report = json.loads(out.read_text("utf-8"))
    assert report["commit"] == "abc1234"
    assert (report["device"], report["capability"], report["driver"]) == ("A GPU", "9.0", "580.1")
    assert report["versions"] == {"torch": "2.11"}
    assert report["passed"] is True
    assert [step["name"] for step in report["steps"]] == ["a", "b"]
    monkeypatch.setattr(check, "make_steps", lambda _: [python(check, "a", "1 / 0")])
    assert check.main(["--out", str(out), "--commit", "abc1234"]) == 1
    assert json.loads(out.read_text("utf-8"))["passed"] is False
    monkeypatch.setattr(check, "make_steps", lambda _: [python(check, name, "") for name in ("build", "sampling")])
    assert check.main(["--out", str(out), "--commit", "def5678", "--only", "sampling"]) == 0
    report = json.loads(out.read_text("utf-8"))
    assert [(step["name"], step["commit"]) for step in report["steps"]] == [("sampling", "def5678")]
    assert check.main(["--out", str(out), "--commit", "7777777", "--only", "build"]) == 0
    report = json.loads(out.read_text("utf-8"))
    assert [(step["name"], step["commit"]) for step in report["steps"]] == [
        ("build", "7777777"),
        ("sampling", "def5678"),
    ]
    with pytest.raises(SystemExit) as ended:
        check.main(["--only", "sampling,nothing"])
    assert ended.value.code == 2
    assert f"no part nothing; there are {', '.join(check.PARTS)}" in capsys.readouterr().err


def test_a_part_by_itself_has_the_time_of_all(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(check, "find_device", lambda: device(check))
    monkeypatch.setattr(
        check, "run_steps", lambda steps, report, *_, **__: seen.append(steps) or report.update(seconds=0)
    )
    out = ["--out", str(tmp_path / "out.json"), "--commit", "abc1234"]
    check.main(out)
    assert {step.name for step in seen[0]} == check.PARTS.keys() - check.SECONDS_IF_NAMED.keys()
    assert all(step.seconds == check.PARTS[step.name] for step in seen[0])
    check.main([*out, "--only", "training,compiled"])
    assert [step.name for step in seen[1]] == ["build", "module", "training", "compiled"]
    assert sum(step.seconds for step in seen[1]) == pytest.approx(check.BUDGET)


def test_results_of_an_earlier_run(check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    assert check.earlier_results(file, device(check)) == []
    steps = [{"name": "sampling", "status": "passed"}, {"name": "no such part"}, {"name": "tests", "commit": "new"}]
    file.write_text(json.dumps({"commit": "old", "device": "A GPU", "steps": steps}))
    assert check.earlier_results(file, device(check)) == [
        {"name": "sampling", "status": "passed", "commit": "old"},
        {"name": "tests", "commit": "new"},
    ]
    file.write_text(json.dumps({"commit": "old", "device": "Another", "steps": steps}))
    assert check.earlier_results(file, device(check)) == []
    assert not capsys.readouterr().err
    for text in ("{", "[]", '{"steps": [3], "commit": "a", "device": "A GPU"}', '{"steps": [{}]}'):
        file.write_text(text)
        assert check.earlier_results(file, device(check)) == []
        assert "is no report of this check" in capsys.readouterr().err


def test_without_a_gpu(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.import_module("gpu_device"), "PROBE", "print('\"torch has no CUDA device\"')")
    assert check.main(["--out", str(tmp_path / "out.json")]) == 3
    assert "torch has no CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(importlib.import_module("gpu_device"), "PROBE", "import no_such_module")
    assert check.main(["--out", str(tmp_path / "out.json")]) == 3
    assert "no_such_module" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.skipif(backend.unavailable("cuda") is None, reason="there is a GPU")
def test_the_commands_without_a_gpu(check: ModuleType, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out.json")]
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), *out], capture_output=True)
    assert done.returncode == 3
    assert b"nothing was checked" in done.stderr
    for script, text in (("ops/run_cases.py", b"no case ran"), ("emulator/run_decoder.py", b"nothing was drawn")):
        done = subprocess.run([sys.executable, str(ROOT / "tests" / script)], capture_output=True)
        assert done.returncode == 3
        assert text in done.stderr


@pytest.mark.skipif(backend.unavailable("cuda") is None, reason="there is a GPU")
def test_every_benchmark_takes_its_options(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [step.command for step in check.make_steps(device(check)) if step.command[1].startswith("benchmarks/")]
    assert len(commands) == 13
    for command in commands:
        monkeypatch.setattr("sys.argv", list(command[1:]))
        try:
            status = importlib.import_module(Path(command[1]).stem).main()
        except SystemExit as ended:
            status = ended.code
        assert status == 3, command  # there is no GPU; 2 would be wrong usage


def test_the_commit_of_a_copy(check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A copy without .git is of no known commit, also where a repository is around it."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is such a copy")
    copy = ROOT / "build"
    copy.mkdir(exist_ok=True)
    assert check.common.commit() != "unknown"
    monkeypatch.setattr(check.common, "ROOT", copy)
    assert check.common.commit() == "unknown"


def test_the_steps(check: ModuleType) -> None:
    steps = check.make_steps(device(check))
    names = [step.name for step in steps]
    assert names == list(check.PARTS)
    assert names[:3] == ["build", "module", "sampling"]
    assert sum(check.SECONDS.values()) == check.BUDGET == 480
    assert set(check.COMMANDS_NEED) == set(importlib.import_module("bench_commands").NEEDED)
    assert [step.name for step in steps if step.sources] == list(check.SECONDS_IF_CHANGED)
    for i, step in enumerate(steps):
        assert set(step.needs) <= set(names[:i])
    assert steps[0].environment["IGPT_CUDA_ARCHS"] == "90a-real"
    assert check.Device("", (8, 9), "", 0.0, {}).architecture == "89-real"
    strict = {step.name for step in steps if step.environment.get("IGPT_FAST_BACKEND") == "cuda"}
    named = {"likelihoods", "compiled", "training-compiled", "training-graphs"}
    assert strict == {"forward", "training", "commands"} | named
    for argument in (argument for step in steps for argument in step.command):
        if argument.startswith(("tests/", "benchmarks/")):
            assert (ROOT / argument).exists(), argument


@pytest.mark.parametrize("case", run_decoder.CASES, ids=str)
def test_what_the_sanitizers_watch(emulation: Implementation, case: Any) -> None:
    emulation.module.reset_counters()
    tokens = run_decoder.draw("cpu", *case)
    assert tokens.shape == (case[0] * case[3], run_decoder.POSITIONS - run_decoder.PRIMER)
    assert ((tokens >= 0) & (tokens < 40)).all()
    assert emulation.module.counters()["launches"] >= 7 * tokens.shape[1]


# ---- What the tests of a GPU need ---------------------------------------------------------------------------

# pytest, where these distributions cannot be imported.
WITHOUT = """
import importlib.abc, sys, torch, torch._dynamo
NAMES = set(sys.argv.pop(1).split(","))
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in NAMES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
OPTIONAL = ("hypothesis", "_hypothesis_pytestplugin", "skimage", "scipy", "sklearn", "transformers", "PIL", "tyro")
MODELS = ("safetensors", "huggingface_hub", "tqdm")
COLLECTED = pytest.mark.xdist_group("collected")


@functools.cache
def collect(without: tuple[str, ...], *paths: str) -> set[str]:
    """The tests with the marker gpu that pytest finds where some distributions are missing."""
    options = ["-m", "gpu", "--collect-only", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib -q"]
    command = [sys.executable, "-c", WITHOUT, ",".join(without) or "-", *options, *paths]
    environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return {line for line in done.stdout.splitlines() if "::" in line}


def below(names: set[str], paths: tuple[str, ...]) -> set[str]:
    return {name for name in names if name.startswith(paths)}


@pytest.fixture
def everywhere(request: pytest.FixtureRequest) -> set[str]:
    """Those of all files: this run's own, where it has them all; to collect them again takes long."""
    config, chosen = request.config, request.config.option
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS and chosen.markexpr == "not mutation"
    if not whole or chosen.keyword or chosen.lf or chosen.deselect:
        return collect((), "tests")
    items = [item for item in request.session.items if item.get_closest_marker("gpu")]
    # pytest-xdist puts a group behind the name. What --soak adds is not collected below.
    return {re.sub(r"@\w+$", "", item.nodeid) for item in items if not item.get_closest_marker("soak")}


@COLLECTED
def test_every_gpu_test_is_among_those_of_the_check(check: ModuleType, everywhere: set[str]) -> None:
    apart = (*check.MODEL_TESTS, *check.LEARNING_TESTS, *check.TOOL_TESTS)
    assert below(everywhere, (*check.GPU_TESTS, *apart)) == everywhere
    for path in (*check.GPU_TESTS, *apart, *check.CONFORMANCE, *check.DECODER_TESTS):
        assert below(everywhere, (path,)), path
    assert {name for name in everywhere if check.DETERMINISM in name}


@COLLECTED
def test_gpu_tests_of_ops_need_torch_and_pytest_alone(check: ModuleType, everywhere: set[str]) -> None:
    assert collect((*OPTIONAL, *MODELS), *check.GPU_TESTS) == below(everywhere, check.GPU_TESTS)


@COLLECTED
def test_gpu_tests_of_models_need_no_extra(check: ModuleType, everywhere: set[str]) -> None:
    assert collect(OPTIONAL, *check.MODEL_TESTS) == below(everywhere, check.MODEL_TESTS)
    without = tuple(name for name in OPTIONAL if name not in check.LEARNING_NEEDS)
    assert collect(without, *check.LEARNING_TESTS) == below(everywhere, check.LEARNING_TESTS)
