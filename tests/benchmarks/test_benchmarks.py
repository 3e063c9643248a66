"""The benchmarks of the CPU: their sums, their peers' answers, and every script once with a tiny model."""

from __future__ import annotations

import importlib
import json
import shutil
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling, backend
from igpt_fast.engines.cpu import weights

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ImageGPTConfig(n_layer=2, n_embd=32, n_head=2, n_positions=24, vocab_size=33)

pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the tests run outside the repository")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("common")


@pytest.fixture
def peers(common: ModuleType) -> ModuleType:
    return importlib.import_module("peers")


@pytest.fixture
def limits(common: ModuleType) -> ModuleType:
    return importlib.import_module("ceilings")


@pytest.fixture
def model() -> ImageGPTForCausalImageModeling:
    torch.manual_seed(0)
    return ImageGPTForCausalImageModeling(CONFIG).eval().requires_grad_(False)


def tokens(batch: int) -> torch.Tensor:
    return torch.randint(32, (batch, 24), generator=torch.Generator().manual_seed(0))


def test_ratios(common: ModuleType) -> None:
    def row(name: str, dtype: str, ms: float, **more: Any) -> dict[str, Any]:
        return {"work": "step", "batch": 1, "name": name, "dtype": dtype, "ms": ms, **more}

    rows = [
        row("transformers", "float32", 20.0),
        row("transformers", "bfloat16", 30.0),
        row("PyTorch", "float32", 16.0),
        row("OpenVINO", "bfloat16", 8.0),
        row("OpenVINO", "int8", 5.0),
        row("igpt_fast", "float32", 4.0, limit_ms=2.0),
        row("igpt_fast", "bfloat16", 4.0, limit_ms=None),
        row("igpt_fast", "int8", 4.0),
        row("igpt_fast, PyTorch", "float32", 0.1),
        row("streaming read", "float32", 0.1),
        {"work": "step", "batch": 1, "name": "wrong", "dtype": "int8", "error": 9.0},
        row("igpt_fast", "int8", 4.0) | {"batch": 8},
    ]
    common.add_ratios(rows, ("work", "batch"))
    ours = rows[5:8]
    assert [r["times_hf"] for r in ours] == [5.0, 5.0, 5.0]  # over float32, its best
    assert [r["times_peer"] for r in ours] == [4.0, 2.0, 1.25]  # in the same dtype or a more exact one
    assert [r.get("of_limit") for r in ours] == [0.5, None, None]
    assert rows[0]["times_hf"] == 1.0
    assert "times_hf" not in rows[-2]
    assert "times_hf" not in rows[-1]
    assert "times_peer" not in rows[-1]


@pytest.mark.clock
def test_turns(common: ModuleType) -> None:
    turns: list[str] = []
    times = common.interleave({"a": lambda: turns.append("a"), ("b", 8): lambda: turns.append("b")}, 3, warm=True)
    assert turns == ["a", "b"] * 3
    assert {name: time["rounds"] for name, time in times.items()} == {"a": 3, ("b", 8): 3}
    turns.clear()
    slow = lambda: (time.sleep(0.02), turns.append("slow"))  # noqa: E731
    times = common.interleave({"slow": slow, "fast": lambda: turns.append("fast")}, 3, warm=True, budget=0.01)
    assert turns == ["slow", "fast", "fast", "fast"]
    assert times["slow"]["rounds"] == 1
    assert 20 <= times["slow"]["ms"] < 500
    turns.clear()
    common.interleave({"a": lambda: turns.append("a")}, 2, seconds=0)
    assert turns == ["a"] * 4  # twice to warm up
    turns.clear()
    settle = {"a": lambda: (turns.append("settle"), time.sleep(0.05))}
    times = common.interleave({"a": lambda: turns.append("a")}, 2, warm=True, settle=settle)
    assert turns == ["settle", "a"] * 2
    assert times["a"]["ms"] < 50  # untimed


def test_a_peer_may_fail_and_we_may_not(common: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise common.Refused("its logits are wrong")

    assert common.attempt(("int8", "torchao"), lambda: 3) == 3
    assert common.attempt(("int8", "torchao"), fails) is None
    assert "left out: torchao, int8: Refused: its logits are wrong" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="igpt_fast, int8"):
        common.attempt(("int8", "igpt_fast"), fails)
    assert not common.installed("no_such_package")
    assert "no_such_package" in capsys.readouterr().err


def test_relative_error(common: ModuleType) -> None:
    want = torch.tensor([3.0, 4.0])
    assert common.relative_error(want, want) == 0
    assert common.relative_error(want + torch.tensor([0.3, -0.4]), want) == pytest.approx(0.1)
    assert not common.relative_error(want * torch.nan, want) <= 1


def test_the_allocator_is_set_once(common: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr("os.execve", lambda *arguments: started.append(arguments))
    monkeypatch.setattr("sys.argv", ["bench.py", "--quick"])
    common.tune_allocator()
    _, command, environment = started.pop()
    assert command[1:] == ["bench.py", "--quick"]
    for name, value in common.ALLOCATOR.items():
        assert environment[name] == value
        monkeypatch.setenv(name, value)
    common.tune_allocator()
    assert not started
    assert not common.plain_allocator().keys() & common.ALLOCATOR.keys()
    monkeypatch.setenv("IGPT_FAST_ISA", "avx2")  # the peers are held to it as well
    common.tune_allocator()
    assert started.pop()[2].items() >= common.LIMITS["avx2"].items()


def test_the_processors_family(common: ModuleType, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    assert common._family_model(cpuinfo) is None
    cpuinfo.write_text("processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\n")
    assert common._family_model(cpuinfo) == "26, 2"
    cpuinfo.write_text("processor\t: 0\nCPU part\t: 0xd40\n")
    assert common._family_model(cpuinfo) is None


def test_the_limit(limits: ModuleType) -> None:
    none = dict.fromkeys(limits.UNITS, 0.0)
    units = none | {"avx2_fma": 0.25, "avx512_fma": 0.5, "amx_bf16": 8.0, "amx_int8": 16.0, "avx512_bf16": 1.0}
    ceilings = limits.Ceilings(2, {80: 50.0, 160: 40.0, 320: 30.0}, 20.0, units)
    assert [ceilings.read(size) for size in (1e6, 119e6, 121e6, 5e9)] == [50.0, 50.0, 40.0, 30.0]
    assert [ceilings.peak(dtype) for dtype in ("float32", "bfloat16", "int8")] == [0.5, 8.0, 16.0]
    work = limits.Work(read=160e6, flops=16e9)  # 4 ms, and 2 ms or 32
    assert ceilings.limit_ms(work, "bfloat16") == pytest.approx(4)
    assert ceilings.limit_ms(work, "float32") == pytest.approx(32)
    assert ceilings.limit_ms(limits.Work(flops=16e9, copied=20e6), "bfloat16") == pytest.approx(3)
    plain = limits.Ceilings(2, {80: 50.0}, 20.0, none | {"avx2_fma": 0.25, "vnni_256": 1.0})
    assert [plain.peak(dtype) for dtype in ("bfloat16", "int8")] == [0.25, 1.0]  # bf16 is multiplied as float32
    zen = limits.Ceilings(2, {80: 50.0}, 20.0, none | {"avx512_fma": 0.5, "avx512_bf16": 1.0, "avx512_vnni": 2.0})
    assert [zen.peak(dtype) for dtype in ("float32", "bfloat16", "int8")] == [0.5, 1.0, 2.0]
    nothing = limits.Ceilings(2, {80: 50.0}, 20.0, none)
    assert nothing.limit_ms(work, "float32") is None


def test_ceilings_that_move_refuse_the_run(limits: ModuleType) -> None:
    def ceilings(read: float, fma: float) -> Any:
        return limits.Ceilings(2, {80: read}, 20.0, dict.fromkeys(limits.UNITS, 0.0) | {"avx2_fma": fma})

    ceilings(50.0, 0.25).check_steady(ceilings(45.0, 0.27))
    with pytest.raises(SystemExit, match=r"GB/s of reading 80 MB from 50 to 30: another job"):
        ceilings(50.0, 0.25).check_steady(ceilings(30.0, 0.25))
    with pytest.raises(SystemExit, match=r"TFLOP/s of avx2_fma from 0\.1 to 0\.25"):
        ceilings(50.0, 0.1).check_steady(ceilings(50.0, 0.25))


@needs_compiler
def test_ceilings_are_measured(limits: ModuleType) -> None:
    found = limits.measure(1, (1, 2), seconds=0.005)
    assert found.read_gb_s.keys() == {1, 2}
    assert all(rate > 0.1 for rate in (*found.read_gb_s.values(), found.copy_gb_s))
    assert found.tflop_s.keys() == set(limits.UNITS)
    isas = dict(backend._C.cpu_isas()) if backend._C is not None else {}
    for isa, unit in (
        ("avx2", "avx2_fma"),
        ("avx_vnni", "vnni_256"),
        ("avx512", "avx512_fma"),
        ("avx512_vnni", "avx512_vnni"),
        ("avx512_vnni", "vnni_256"),
        ("avx512_bf16", "avx512_bf16"),
        ("amx", "amx_bf16"),
        ("amx", "amx_int8"),
    ):
        if isas.get(isa):
            assert found.tflop_s[unit] > 0.001


@needs_compiler
def test_memory(limits: ModuleType) -> None:
    memory = limits.Memory(10_000, 2)
    assert memory.size == 12288
    memory.block[5] = 7
    memory.read(10_000)
    memory.copy()
    assert memory.block[6144 + 5] == 7


def test_work_is_counted_right(common: ModuleType, peers: ModuleType, model: ImageGPTForCausalImageModeling) -> None:
    generate, forward = importlib.import_module("bench_generate"), importlib.import_module("bench_model")
    expert = peers.Expert(model)
    matrices = [p.numel() for block in expert.blocks for p in block.parameters() if p.ndim == 2]
    read = sum(matrices) + expert.head.weight.numel()
    work = generate.moved(CONFIG, 3, 10, "bfloat16")
    assert work.read == 2 * (read + 3 * 2 * 2 * 10 * 32)
    assert work.flops == 2 * 3 * (read + 2 * 2 * 10 * 32)
    assert generate.moved(CONFIG, 1, 10, "int8").read * 4 == generate.moved(CONFIG, 1, 10, "float32").read
    with FlopCounterMode(display=False) as counter:
        expert(tokens(3))
    attention = 3 * 2 * 4 * 32 * 24 * 25 / 2  # of what is not masked; the counter does not know this op
    assert forward.flops(CONFIG, 3) == counter.get_total_flops() + attention
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert forward.weights(CONFIG) == sum(p.numel() for p in model.parameters()) - norms


def test_the_expert_is_the_model(peers: ModuleType, model: ImageGPTForCausalImageModeling) -> None:
    want, expert = model(tokens(2)).logits, peers.Expert(model)
    torch.testing.assert_close(expert(tokens(2)), want)
    decoder = peers.ExpertDecoder(expert, 2, 24, compiled=False)
    for _ in range(2):
        decoder.restart()
        got = [decoder.prefill(tokens(2)[:, :7])] + [decoder.step(column) for column in tokens(2)[:, 7:].unbind(1)]
        torch.testing.assert_close(torch.stack(got, 1), want[:, 6:])
    torch.testing.assert_close(peers.transformers_model(model)(tokens(2)).logits, want)


def test_openvino_is_the_model(peers: ModuleType, model: ImageGPTForCausalImageModeling) -> None:
    pytest.importorskip("openvino")
    decoder = peers.OpenVino(peers.Expert(model), 2, "float32")
    want = model(tokens(2)).logits
    got = [decoder.prefill(tokens(2)[:, :7])] + [decoder.step(column) for column in tokens(2)[:, 7:].unbind(1)]
    torch.testing.assert_close(torch.stack(got, 1), want[:, 6:], rtol=1e-4, atol=1e-5)
    decoder.restart()
    torch.testing.assert_close(decoder.prefill(tokens(2)[:, :1]), want[:, 0], rtol=1e-4, atol=1e-5)


def test_a_wrong_peer_is_refused(common: ModuleType, model: ImageGPTForCausalImageModeling) -> None:
    generate = importlib.import_module("bench_generate")

    class Decoder:
        factor = 1.0

        def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
            self.read = tokens
            return model(tokens).logits[:, -1]

        def step(self, token: torch.Tensor) -> torch.Tensor:
            return self.factor * self.prefill(torch.cat([self.read, token[:, None]], 1))

    want, error = generate.check(("float32", "right"), Decoder(), tokens(1), 20, None)
    assert (want.shape, error) == ((1, 4, 32), 0)
    wrong = Decoder()
    wrong.factor = 1.02
    assert generate.check(("bfloat16", "near"), wrong, tokens(1), 20, want)[1] == pytest.approx(0.02, rel=1e-5)
    with pytest.raises(common.Refused, match=r"2\.0e-02"):
        generate.check(("float32", "wrong"), wrong, tokens(1), 20, want)
    wrong.factor = torch.nan
    with pytest.raises(common.Refused):
        generate.check(("int8", "wrong"), wrong, tokens(1), 20, want)


def test_images_take_the_strongest(common: ModuleType) -> None:
    generate = importlib.import_module("bench_generate")
    rows = [
        {"work": "step", "batch": batch, "name": name, "dtype": dtype, "ms": ms}
        for batch, name, dtype, ms in (
            (1, "transformers", "float32", 20.0),
            (1, "transformers", "bfloat16", 30.0),
            (1, "OpenVINO", "float32", 3.0),
            (1, "OpenVINO", "bfloat16", 2.0),
            (1, "OpenVINO", "int8", 1.5),
            (1, "torchao, weights", "int8", 1.0),
            (1, "igpt_fast", "bfloat16", 0.1),
            (1, "streaming read", "int8", 0.1),
            (8, "OpenVINO", "float32", 0.1),
        )
    ]
    chosen = {("float32", "transformers"), ("bfloat16", "OpenVINO"), ("int8", "torchao, weights")}
    assert generate.strongest(rows, 1) == chosen
    assert generate.strongest(rows, 8) == {("float32", "OpenVINO")}


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, Any]:
    """The result file of a script."""
    threads, file = torch.get_num_threads(), folder / f"{name.removeprefix('bench_')}.json"
    monkeypatch.setattr("sys.argv", [f"{name}.py", "--dry-run", "--json", str(file), *options])
    try:
        importlib.import_module(name).main()
    finally:
        torch.set_num_threads(threads)
    return json.loads(file.read_text("utf-8"))


@needs_compiler
def test_the_scripts(common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run("bench_model", tmp_path, monkeypatch, "--batch", "2", "--no-compile")
    assert {(row["work"], row["batch"]) for row in found["rows"]} == {("forward", 2), ("train", 4)}
    wanted: set[str] = {"transformers", "PyTorch", "igpt_fast", "igpt_fast, PyTorch"}
    assert wanted <= {row["name"] for row in found["rows"] if row["work"] == "train"}
    assert all(row["ms"] > 0 and row["times_hf"] > 0 and row["error"] < 0.1 for row in found["rows"])
    assert found["machine"]["commit"]
    assert found["ceilings"]["read_gb_s"]
    found = run("bench_train_loop", tmp_path, monkeypatch)
    assert [row["name"] for row in found["rows"]] == ["igpt_fast", "by hand"]
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in found["rows"])
    if weights.no_native_decoder() is None:
        found = run("bench_generate", tmp_path, monkeypatch, "--batch", "2", "--no-compile")
        assert {row["work"] for row in found["rows"]} == {"step", "image", "memory"}
        assert {row["dtype"] for row in found["rows"] if row["name"] == "igpt_fast"} == {"float32", "bfloat16", "int8"}
        assert all(row["mb"] > 50 for row in found["rows"] if row["work"] == "memory")
        assert all(row["ms"] > 0 for row in found["rows"] if row["work"] != "memory")
        found = run("bench_sample", tmp_path, monkeypatch, "--batch", "1", "3")
        assert [row["batch"] for row in found["rows"]] == [1] * 5 + [3] * 5
        assert {row["name"] for row in found["rows"]} == {"transformers", "igpt_fast", "igpt_fast, reference"}
        assert all(row["images_s"] == row["batch"] / row["seconds"] > 0 for row in found["rows"])
        found = run("bench_accelerate", tmp_path, monkeypatch, "--batch", "2")
        assert [row["name"] for row in found["rows"]] == 2 * ["transformers", "accelerated", "igpt_fast"]
        assert all(row["ms"] > 0 and row["times_hf"] > 0 and row["of_ours"] > 0 for row in found["rows"])
    found = run("bench_together", tmp_path, monkeypatch, "--batch", "2", "--threads", "1")
    assert [row["work"] for row in found["rows"]] == ["draw", "draw + draw"]
    assert found["rows"][0]["share"] == 1
    assert found["rows"][1]["share"] > 0
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("sys.argv", ["plot.py", "--results", str(tmp_path), "--out", str(tmp_path / "cpu.png")])
    importlib.import_module("plot").main()
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_other_tokens_are_found(common: ModuleType, model: ImageGPTForCausalImageModeling) -> None:
    accelerated = importlib.import_module("bench_accelerate")
    drawn = model.generate(tokens(1)[:, :1], do_sample=False, max_length=12)
    other = torch.cat([drawn[:, :-1], (drawn[:, -1:] + 1) % 32], dim=1)
    for exact in (True, False):
        accelerated.check({"transformers": drawn, "accelerated": drawn}, exact, model)
        with pytest.raises(SystemExit, match="accelerated: other tokens"):
            accelerated.check({"transformers": drawn, "accelerated": other}, exact, model)


def test_the_picture_takes_the_best_dtype(common: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plot = importlib.import_module("plot")
    row = {"work": "step", "batch": 1, "name": "igpt_fast"}
    rows = [
        row | {"dtype": dtype, "times_hf": times}
        for dtype, times in (("float32", 2.0), ("bfloat16", 5.0), ("int8", 12.0))
    ]
    rows += [row | {"name": "PyTorch", "dtype": "float32", "times_hf": 1.5}]
    rows += [row | {"name": name, "dtype": "float32", "times_hf": 9.0} for name in ("transformers", "streaming read")]
    (group,) = plot.network({"generate": {"rows": rows}})
    assert group.bars == {"PyTorch": 1.5, "igpt_fast": 5.0, "igpt_fast, int8": 12.0}
    shared = {"op": "quantize", "content": "photograph", "pixels": 256 * 32 * 32, "threads": 2}
    quantized = [shared | {"name": f"igpt_fast {dtype}", "times_hf": 3.0} for dtype in ("float32", "uint8")]
    (group,) = plot.quantize({"ops": {"rows": quantized}})
    assert list(group.bars) == ["igpt_fast", "igpt_fast, pixels"]  # exact, and in the colour of no int8
    assert len({colour for _, colour in plot.SERIES.values()}) == len(plot.SERIES)
    monkeypatch.setattr("sys.argv", ["plot.py", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="no results"):
        plot.main()
