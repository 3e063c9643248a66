"""The benchmarks that are for a GPU, each with a tiny model, so that no minute of a GPU meets a mistake of theirs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from implementations import Implementation

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling, backend

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the tests run outside the repository")


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("common")


@pytest.fixture
def peers(common: ModuleType) -> ModuleType:
    return importlib.import_module("peers")


def quick(name: str, file: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[int, list[dict[str, Any]]]:
    """The status and the rows of a script that is for a GPU."""
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--device", "cpu", "--quick", "--json", str(file), *options])
    status = importlib.import_module(name).main()
    return status, json.loads(file.read_text("utf-8"))["rows"]


def test_sampling_on_a_gpu(
    emulation: Implementation, common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody draws, ours with the CUDA decoder on the emulated kernels; each row says how."""
    status, rows = quick("bench_sample_cuda", tmp_path / "s.json", monkeypatch)
    assert status == 0
    drawn, ours = "cuda: draw, step_drawn", "igpt_fast"
    one = ["default", "no ring", "drawing apart", "no cluster", "late", "no dependent"]
    nine = ["default", "no ring", "drawing apart", "late", "no dependent", "cuBLAS", "halves", "whole"]
    nine += ["halves, no ring", "whole, no ring"]
    assert [(row["part"], row["batch"], row["name"], row["path"]) for row in rows] == [
        ("sampling", 2, ours, drawn),
        ("sampling", 2, "transformers", "multinomial, step"),
        ("sampling", 2, "transformers, generate", "generate"),
        ("sampling", 2, "PyTorch layers", "multinomial, step"),
        ("gpt-fast", 2, ours, drawn),
        ("gpt-fast", 2, "gpt-fast form", "one traced call a token"),
        *(("steps", n, f"{ours}, {way}", drawn) for n in (2, 9) for way in ("eager", "graph", "graph, dependent")),
        *(("ab", 1, f"{ours}, {way}", drawn) for way in one * 3),
        *(("ab", 9, f"{ours}, {way}", drawn) for way in nine),
        ("profile", 1, ours, drawn),
    ]
    assert all(row["us"] > 0 for row in rows)
    assert all(row["times"] > 0 for row in rows[:6] if row["name"] != ours)
    assert [row.get("at") for row in rows if row["part"] == "ab"] == [
        at for at, count in ((None, 6), ("first", 6), ("last", 6), (None, 10)) for _ in range(count)
    ]
    flipped = [row for row in rows if row["part"] == "ab" and not row["name"].endswith("default")]
    assert all(row["times"] > 0 and row["interleaved"] for row in flipped)
    assert all(row["off"] < 0.03 for row in rows[:6])
    assert rows[-1]["kernels"]
    assert emulation.module.counters()["launches"] > 100


def test_sampling_is_timed_as_the_device_draws_or_not_at_all(common: ModuleType) -> None:
    sampling = importlib.import_module("bench_sample_cuda")

    class Slow:
        name = "reference"

    with pytest.raises(TypeError, match="Slow does not draw on the GPU; want a decoder"):
        sampling.Ours(Slow(), "cuda")
    assert sampling.Ours(Slow(), "cpu").path == "reference: sample, step"


def test_sampling_refuses_wrong_tokens(common: ModuleType) -> None:
    sampling = importlib.import_module("bench_sample_cuda")
    config = ImageGPTConfig(n_layer=1, n_embd=32, n_head=2, n_positions=24, vocab_size=33)
    model = ImageGPTForCausalImageModeling(config).eval()

    class Drawing(sampling.Ours):
        add = 0

        def token(self) -> torch.Tensor:
            return (super().token() + self.add) % 32

    with torch.no_grad():
        drawing = Drawing(sampling.make_decoder(model, 2, 24), "cpu")
        drawing.begin(torch.randint(32, (2, 6)))
        drawing.check_tokens(3)
        drawing.add = 1
        with pytest.raises(common.Refused, match="6 of 6 tokens"):
            drawing.check_tokens(3)


def test_a_row_that_fails_costs_no_other(
    common: ModuleType, peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = importlib.import_module("bench_sample_cuda")
    monkeypatch.setattr(common, "installed", lambda name: False)
    monkeypatch.setattr(peers.GptFast, "prefill", lambda self, tokens: 1 / 0)
    status, rows = quick("bench_sample_cuda", tmp_path / "s.json", monkeypatch, "--only", "sampling,gpt-fast")
    assert status == 0
    missing = "ModuleNotFoundError: transformers is not installed"
    assert {row["name"]: row.get("error") for row in rows} == {
        "transformers": missing,
        "transformers, generate": missing,
        "igpt_fast": None,
        "PyTorch layers": None,
        "gpt-fast form": "ZeroDivisionError: division by zero",
    }
    monkeypatch.setattr(sampling, "make_decoder", lambda *_: 1 / 0)
    status, rows = quick("bench_sample_cuda", tmp_path / "s.json", monkeypatch, "--only", "sampling,profile")
    assert status == 1
    assert {row["part"] for row in rows if row["name"] == "igpt_fast" and "division" in row["error"]} == {
        "sampling",
        "profile",
    }
    assert any(row["us"] > 0 for row in rows if row["name"] == "PyTorch layers")


def test_one_that_fails_in_its_turn_costs_no_other(
    common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = importlib.import_module("bench_sample_cuda")
    monkeypatch.setattr(common, "installed", lambda name: False)
    monkeypatch.setattr(sampling.TokenByToken, "turn", lambda self, count: None if count == 3 else 1 / 0)
    status, rows = quick("bench_sample_cuda", tmp_path / "s.json", monkeypatch, "--only", "sampling")
    assert status == 0
    found = {row["name"]: row.get("error") for row in rows if "transformers" not in row["name"]}
    assert found == {"igpt_fast": None, "PyTorch layers": "ZeroDivisionError: division by zero"}
    monkeypatch.setattr(sampling.Ours, "turn", lambda self, count: 1 / 0)
    status, rows = quick("bench_sample_cuda", tmp_path / "s.json", monkeypatch, "--only", "profile")
    assert status == 1
    assert [row["error"] for row in rows] == ["ZeroDivisionError: division by zero"]


@pytest.mark.parametrize(("step", "whose"), [("step", "float32; want"), ("step_drawn", "float32 of what it drew")])
def test_steps_with_wrong_logits_have_no_time(
    emulation: Implementation,
    common: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    whose: str,
) -> None:
    """Whichever way comes first in a program: after a new start none is compared with itself alone."""
    sampling = importlib.import_module("bench_sample_cuda")
    right = getattr(sampling.CudaDecoder, step)
    monkeypatch.setattr(sampling.CudaDecoder, step, lambda self, *tokens: 1.1 * right(self, *tokens))
    status, rows = quick("bench_sample_cuda", tmp_path / "s.json", monkeypatch, "--only", "steps")
    assert status == 1
    assert len(rows) == 6
    assert all(whose in row["error"] for row in rows)


def test_after_a_new_start_the_ways_are_compared_with_the_first(
    emulation: Implementation, common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling, file = importlib.import_module("bench_sample_cuda"), tmp_path / "s.json"
    quick("bench_sample_cuda", file, monkeypatch, "--only", "steps")
    written = json.loads(file.read_text("utf-8"))
    written["rows"] = written["rows"][:1]
    file.write_text(json.dumps(written), "utf-8")
    near, compared = sampling.near, []
    monkeypatch.setattr(sampling, "near", lambda *given: (compared.append(given[3:]), near(*given))[1])
    status, rows = quick("bench_sample_cuda", file, monkeypatch, "--only", "steps", "--resume")
    assert (status, len(rows)) == (0, 6)
    assert compared.count(("those of the first way",)) == 5


def test_a_run_goes_on_behind_what_ended_it(
    common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails for all of a size loses the context, twice; each start gets further, and the last to the end."""
    sampling, starts = importlib.import_module("bench_sample_cuda"), []

    class Ended(BaseException):
        pass

    def start(*arguments: Any) -> None:
        starts.append(arguments[1])
        raise Ended

    for name in ("right", "most_images"):
        monkeypatch.setattr(sampling, name, lambda *_, **__: 1 / 0)
    monkeypatch.setattr(common, "context_works", lambda: False)
    monkeypatch.setattr("os.execve", start)
    options = ["--only", "sampling,steps,profile"]
    with pytest.raises(Ended):
        quick("bench_sample_cuda", tmp_path / "s.json", monkeypatch, *options)
    for _ in range(2):
        with pytest.raises(Ended):
            quick("bench_sample_cuda", tmp_path / "s.json", monkeypatch, *options, "--resume")
    status, rows = quick("bench_sample_cuda", tmp_path / "s.json", monkeypatch, *options, "--resume")
    assert status == 1
    assert [(row["part"], row["batch"], row.get("error")) for row in rows] == [
        ("sampling", 2, "ZeroDivisionError: division by zero"),
        *(("steps", batch, "ZeroDivisionError: division by zero") for batch in (2, 9)),
        ("profile", 1, None),
    ]
    assert all(arguments[-1] == "--resume" for arguments in starts)


def test_the_network_on_a_gpu(common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked for has transformers beside it, which is measured once."""
    status, rows = quick("bench_model_cuda", tmp_path / "m.json", monkeypatch, "--only", "compiled")
    assert status == 0
    everybody = ["transformers", "PyTorch", "igpt_fast"]
    more = ("--resume", "--only", "score,features")
    status, rows = quick("bench_model_cuda", tmp_path / "m.json", monkeypatch, *more)
    assert status == 0
    assert [(row["work"], row["name"]) for row in rows] == [
        *(("forward", name) for name in ("transformers", *(f"{name}, compiled" for name in everybody))),
        *((work, name) for work in ("score", "features") for name in everybody),
    ]
    check_whole(rows)


def test_training_on_a_gpu(
    common: ModuleType, peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each candidate is compiled by itself, one of ours with ops that the compiler does not look into."""
    seen: list[str] = []

    def see(graph: Any, _: Any) -> Any:
        seen.append(backend.get_compiled_ops())
        return graph

    compiled = lambda function, *_: torch.compile(function, backend=see, fullgraph=True, dynamic=False)  # noqa: E731
    monkeypatch.setattr(peers, "compiled", compiled)
    status, rows = quick("bench_train_cuda", tmp_path / "m.json", monkeypatch, "--only", "eager,opaque,graphs,loop")
    assert status == 0
    assert [(row["part"], row["name"]) for row in rows] == [
        *(("eager", name) for name in ("transformers", "PyTorch", "igpt_fast")),
        *(("opaque", f"igpt_fast, compiled{how}") for how in ("", ", opaque")),
        ("graphs", "transformers"),
        *(("graphs", f"{name}, compiled, graphs") for name in ("PyTorch", "igpt_fast")),
        *(("loop", name) for name in ("PyTorch", "igpt_fast", "igpt_fast, graph")),
    ]
    assert seen == ["plain", "opaque", "plain", "plain"]
    check_whole([row for row in rows if row["part"] in ("eager", "graphs")])
    assert all(row["off"] < 0.03 and row["ms"] > 0 and row["interleaved"] for row in rows)
    assert all(row["gradient"] < 0.1 for row in rows if row["part"] != "loop")


def check_whole(rows: list[dict[str, Any]]) -> None:
    assert all(row["ms"] > 0 and row["img_s"] > 0 and row["tflop_s"] > 0 and row["off"] < 0.03 for row in rows)
    assert all(row["times_hf"] > 0 for row in rows if row["name"] != "transformers")
    assert all(("times_peer" in row) == row["name"].startswith("igpt_fast") for row in rows)
    paths = {row["path"] for row in rows if row["name"].startswith("igpt_fast")}
    assert (paths, {row["path"] for row in rows} - paths) == ({"cpu kernels"}, {"PyTorch"})


def test_candidates_take_turns_while_the_memory_has_room(
    common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each is measured before the next one is made; who fails in its turn costs no other."""
    models = importlib.import_module("whole_models")
    case = models.Case("p", "w", "tiny", 2, ImageGPTConfig(**models.TINY), torch.device("cpu"))
    seen: list[str] = []
    monkeypatch.setattr(common, "machine", dict)  # it asks git

    def make(_: Any, name: str) -> Any:
        seen.append(f"make {name}")
        calls = iter(range(4 if name == "PyTorch" else 9))
        return lambda: (seen.append(name), next(calls))

    work = models.Work(make, lambda _: 1, lambda call, right: {"off": 0.0})
    for fits in (True, False):
        seen.clear()
        monkeypatch.setattr(models.Case, "fit", lambda self, count, fits=fits: fits)
        rows = common.Rows(None, models.NAMES)
        models.Bench({"w": work}, rows, 2, 0.0, None).run(case, ("PyTorch", "igpt_fast"))
        turns = ["PyTorch", "igpt_fast"] * 2
        ready = ["make PyTorch", *["PyTorch"] * 3, "make igpt_fast", *["igpt_fast"] * 3]
        alone = [*ready[:4], *["PyTorch"] * 2, *ready[4:], *["igpt_fast"] * 2]
        assert seen == (ready + turns if fits else alone)
        assert {row["name"]: row.get("error") for row in rows.rows} == {"PyTorch": "StopIteration: ", "igpt_fast": None}


def test_on_a_gpu_nothing_of_ours_falls_back(
    common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network has the backend that raises where there are no kernels; a command's engine is the CUDA one."""
    bench, commands = (importlib.import_module(name) for name in ("bench_model_cuda", "bench_commands"))
    models = importlib.import_module("whole_models")
    case = models.Case("eager", "training", "tiny", 1, ImageGPTConfig(**models.TINY), torch.device("cuda"))
    backends = {name: case.backend(name) for name in (*bench.EAGER, *bench.COMPILED)}
    assert backends == {name: "cuda" if name.startswith("igpt_fast") else "auto" for name in backends}
    seen: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        seen.append(command)
        return subprocess.CompletedProcess(command, 0, json.dumps({"images": 1, "engine": "reference"}), "")

    monkeypatch.setattr(commands.subprocess, "run", run)
    with pytest.raises(RuntimeError, match="the engine is 'reference'; want 'cuda'"):
        commands.run("igpt sample -n 1", "cuda", tmp_path)
    assert seen[0][-2:] == ["--backend", "cuda"]
    assert commands.run("igpt sample -n 1", "cpu", tmp_path)["said"]["engine"] == "reference"


def test_a_wrong_network_is_refused(common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = ImageGPTForCausalImageModeling.forward

    def wrong(self: Any, *arguments: Any, **more: Any) -> Any:
        out = network(self, *arguments, **more)
        out.logits = 1.1 * out.logits
        out.loss = None if out.loss is None else 1.1 * out.loss
        return out

    monkeypatch.setattr(ImageGPTForCausalImageModeling, "forward", wrong)
    monkeypatch.setattr(common, "installed", lambda name: False)
    for script, parts in (("bench_model_cuda", "forward,score"), ("bench_train_cuda", "eager")):
        status, rows = quick(script, tmp_path / "m.json", monkeypatch, "--only", parts)
        assert status == 1
        for row in rows:
            refused = "Refused: its " + ("nats are off" if row["work"] == "score" else "lo")
            text = {"transformers": "transformers is not installed", "igpt_fast": refused}.get(row["name"])
            assert row["ms"] > 0 if text is None else text in row["error"]


def test_commands(common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = importlib.import_module("bench_commands")
    status, rows = quick("bench_commands", tmp_path / "c.json", monkeypatch, "--only", "sample")
    assert status == 0
    assert [row["name"] for row in rows] == ["igpt sample -n 1 --seed 0"]
    assert rows[0]["seconds"] > 0
    assert (rows[0]["said"]["images"], rows[0]["said"]["dtype"]) == (1, "float32")
    done = subprocess.run([sys.executable, "-m", "igpt_fast", "train", "--help"], capture_output=True, text=True)
    for command in (*commands.PARTS["train"], *commands.QUICK["train"]):
        assert all(word in done.stdout for word in command.split() if word.startswith("--"))
    monkeypatch.setitem(commands.QUICK, "sample", ("igpt sample -n 0",))
    status, rows = quick("bench_commands", tmp_path / "c.json", monkeypatch, "--only", "sample")
    assert status == 1
    assert "exit status 2" in rows[0]["error"]
    monkeypatch.setattr(commands, "NEEDED", ("tyro", "no_such_package"))
    status, rows = quick("bench_commands", tmp_path / "c.json", monkeypatch)
    assert status == 1
    assert [row["error"] for row in rows] == ["ModuleNotFoundError: not installed: no_such_package"] * 2
    monkeypatch.setattr(commands, "NEEDED", ())
    monkeypatch.setattr(commands, "LIMIT", 0.01)
    with pytest.raises(RuntimeError, match="igpt sample took more than 0 s"):
        commands.run("igpt sample -n 1", "cpu", tmp_path)


def test_rows_are_there_as_they_come(common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, started = tmp_path / "new" / "rows.json", []
    read = lambda: json.loads(file.read_text("utf-8"))  # noqa: E731
    rows = common.Rows(file, ("name", "batch"), bandwidth=3.0)
    assert (read()["rows"], read()["bandwidth"]) == ([], 3.0)
    assert rows.status() == 1  # nothing was measured
    rows.add({"name": "peer", "batch": 1, "error": "not here"})
    rows.add({"name": "igpt_fast", "batch": 1, "us": 2.0})
    assert read()["rows"] == rows.rows
    assert [path.name for path in file.parent.iterdir()] == ["rows.json"]
    assert rows.status() == 0
    assert rows.has({"name": "peer", "batch": 1, "us": 7})
    assert not rows.has({"name": "peer", "batch": 2})
    assert rows.attempt({"name": "fine", "batch": 1}, lambda: 3) == 3
    monkeypatch.setattr("os.execve", lambda *arguments: started.append(arguments))
    monkeypatch.setattr("sys.argv", ["bench.py", "--json", str(file)])
    assert rows.attempt({"name": "igpt_fast", "batch": 8}, lambda: 1 / 0) is None
    assert not started
    assert rows.status() == 1
    monkeypatch.setattr(common, "context_works", lambda: False)
    rows.attempt({"name": "peer", "batch": 8}, lambda: [][0])
    assert started[0][1][1:] == ["bench.py", "--json", str(file), "--resume"]
    assert read()["rows"][-1] == {"name": "peer", "batch": 8, "error": "IndexError: list index out of range"}
    assert common.Rows(file, ("name", "batch"), resume=True).rows == rows.rows
    monkeypatch.undo()
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: [][0])
    with pytest.raises(IndexError):
        common.context_works()

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("torch.cuda.synchronize", lost)
    assert not common.context_works()


@pytest.mark.parametrize(
    ("options", "status", "text"),
    [
        (["--only", "sampling,no"], 2, "no part no; there are sampling, gpt-fast, steps, ab, profile"),
        (["--resume", "--device", "cpu"], 2, "--resume: want --json"),
        ([], 3, "there is no GPU to measure"),
    ],
)
def test_usage_of_what_is_for_a_gpu(
    common: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    status: int,
    text: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench_sample_cuda.py", *options])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("bench_sample_cuda").main()
    assert ended.value.code == status
    assert text in capsys.readouterr().err
