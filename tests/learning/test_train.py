"""The recipe end to end: it learns, goes on bit for bit, stops cleanly, and distrusts the files it reads."""

import dataclasses
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from PIL import Image

from igpt_fast import backend
from igpt_fast.learning import train as recipe
from igpt_fast.learning.data import TokenData
from igpt_fast.learning.evaluate import evaluate, lookup_table_nats
from igpt_fast.learning.objectives.next_pixel import NextPixel
from igpt_fast.learning.run import run
from igpt_fast.learning.schedule import augmented, chosen_at, learning_rate
from igpt_fast.learning.settings import FinetuneConfig, TrainConfig
from igpt_fast.learning.state import Output
from igpt_fast.learning.stepping import Stepper, inputs_at
from igpt_fast.learning.train import train
from igpt_fast.learning.watch import DivergedError
from igpt_fast.likelihood.nats import image_nats, mean_nats
from igpt_fast.model import ImageGPTForCausalImageModeling

TINY = TrainConfig(
    n_layer=1, n_embd=32, n_head=2, steps=20, batch_size=4, lr=1e-3, warmup_steps=3, eval_every=10, save_every=6
)

THROUGHPUT = ("images_per_second", "tokens_per_second", "flops_per_second", "mfu", "peak_memory", "world_size")
THROUGHPUT += ("precision",)


@pytest.fixture(scope="module")
def tiny() -> TokenData:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 6, (30, 16), generator=generator)
    clusters = np.linspace(-1, 1, 18, dtype=np.float32).reshape(6, 3)
    return TokenData(tokens, clusters, torch.arange(30) % 5 == 0)


def digits() -> TokenData:
    """scikit-learn's 8x8 digits (0..16) in 16 levels; a random tenth is held out."""
    from sklearn.datasets import load_digits

    images = load_digits().images.reshape(-1, 64)
    tokens = torch.from_numpy(np.rint(images * 15 / 16).astype(np.int64))
    grey = np.linspace(-1, 1, 16, dtype=np.float32)[:, None].repeat(3, axis=1)
    heldout = torch.zeros(len(tokens), dtype=torch.bool)
    heldout[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))[: len(tokens) // 10]] = True
    return TokenData(tokens, grey, heldout)


def records(out: Path) -> list[dict]:
    """The log without its times."""
    return [without_times(json.loads(line)) for line in (out / "log.jsonl").read_text().splitlines()]


def without_times(record: dict) -> dict:
    return {key: value for key, value in record.items() if key not in ("seconds", *THROUGHPUT)}


def assert_same_state(one: Path, other: Path) -> None:
    a, b = (torch.load(out / "train.pt", weights_only=True) for out in (one, other))
    assert a["step"] == b["step"]
    assert a["model"].keys() == b["model"].keys()
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    for index, moments in a["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, b["optimizer"]["state"][index][name]), (index, name)


def test_digits_are_learned(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """In 300 steps; with --soak in 800, as well as it gets."""
    steps, best = (800, 1.47) if pytestconfig.getoption("--soak") else (300, 1.53)
    data = digits()
    # An earlier trial's table, which saw black outside the image, reached 1.633 on a split of its own; over twenty
    # random splits this one reaches 1.649 with a standard deviation of 0.015.
    assert lookup_table_nats(data, border=0) == pytest.approx(1.633, abs=0.03)
    table = lookup_table_nats(data)
    config = TrainConfig(
        n_layer=4,
        n_embd=64,
        n_head=2,
        steps=steps,
        batch_size=16,
        lr=4e-3,
        warmup_steps=steps // 8,
        flip=False,
        shift=0,
        dropout=0.0,
        bf16=False,
        eval_every=steps // 2,
        save_every=steps // 2,
    )
    summary = run(data, tmp_path, config)
    assert summary["heldout_nats"] <= best < table - 0.07
    assert summary["lookup_table_nats"] == table
    log = records(tmp_path)
    assert [record["step"] for record in log] == list(range(50, steps + 1, 50))
    assert [record["step"] for record in log if "heldout_nats" in record] == [steps // 2, steps]
    assert log[-1]["heldout_nats"] == pytest.approx(summary["heldout_nats"], abs=1e-6)
    assert log[0]["nats"] < math.log(16)
    # The model in the folder is the one that was scored.
    loaded = ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "model")
    assert evaluate(loaded, data.heldout_tokens) == pytest.approx(summary["heldout_nats"], abs=1e-6)
    # Its samples look like digits to the statistics of neighbours: the table finds them likelier than other pictures.
    samples = _sampled(tmp_path)
    scored = TokenData(
        torch.cat([data.train_tokens, samples]),
        data.clusters,
        torch.arange(len(data.train_tokens) + len(samples)) >= len(data.train_tokens),
    )
    assert lookup_table_nats(scored) < table + 0.25


def _sampled(out: Path) -> torch.Tensor:
    from igpt_fast.pipeline import Pipeline

    return Pipeline.from_pretrained(out / "model", device="cpu").sample(16, seed=0).tokens


def test_run_writes_a_usable_folder(tiny: TokenData, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "a"
    seen: list[dict] = []
    config = dataclasses.replace(TINY, steps=4, dropout=0.25)
    summary = run(tiny, out, config, save_dtype=torch.bfloat16, progress=seen.append)
    assert sorted(path.name for path in out.iterdir()) == ["log.jsonl", "model", "samples.png", "train.pt"]
    assert sorted(path.name for path in (out / "model").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert json.loads((out / "log.jsonl").read_text()) == seen[0]
    assert seen[0].keys() == {"step", "nats", "grad_norm", "lr", "seconds", "heldout_nats", *THROUGHPUT}
    assert all(summary[name] == seen[0][name] for name in THROUGHPUT)
    json.dumps(summary)
    written = json.loads((out / "model" / "config.json").read_text())
    assert (written["resid_pdrop"], written["embd_pdrop"], written["attn_pdrop"]) == (0.25, 0.0, 0.0)
    assert (written["vocab_size"], written["n_positions"]) == (7, 16)
    loaded = ImageGPTForCausalImageModeling.from_pretrained(out / "model", dtype="auto")
    state = torch.load(out / "train.pt", weights_only=True)["model"]
    assert loaded.dtype == torch.bfloat16
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name].to(torch.bfloat16)), name
    with Image.open(out / "samples.png") as picture:
        assert picture.width >= 4 * 128
    colours = json.loads((out / "model" / "preprocessor_config.json").read_text())
    assert np.array_equal(np.array(colours["clusters"], dtype=np.float32), tiny.clusters)
    assert colours["size"] == {"height": 4, "width": 4}


def test_run_without_heldout_images(tiny: TokenData, tmp_path: Path) -> None:
    data = TokenData(tiny.tokens, tiny.clusters, torch.zeros(30, dtype=torch.bool))
    summary = run(data, tmp_path, dataclasses.replace(TINY, steps=2))
    assert summary["heldout_nats"] is None
    assert summary["lookup_table_nats"] is None
    assert "heldout_nats" not in records(tmp_path)[-1]


def test_an_existing_run_is_safe(tiny: TokenData, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, steps=2)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    run(tiny, tmp_path, config)
    before = (tmp_path / "train.pt").read_bytes()
    with pytest.raises(FileExistsError, match="holds a run already"):
        run(tiny, tmp_path, dataclasses.replace(config, seed=1))
    assert (tmp_path / "train.pt").read_bytes() == before
    with pytest.raises(ValueError, match="exclude each other"):
        run(tiny, tmp_path, config, resume=True, overwrite=True)
    run(tiny, tmp_path, dataclasses.replace(config, seed=1), overwrite=True)
    assert torch.load(tmp_path / "train.pt", weights_only=True)["identity"]["config"]["seed"] == 1
    assert len(records(tmp_path)) == 1
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for place in (file, file / "below", tmp_path / "dangling"):
        with pytest.raises(NotADirectoryError, match="is not a directory"):
            run(tiny, place, dataclasses.replace(config, steps=10**9))


@pytest.mark.parametrize("fault", ["model", "first step", "write"])
def test_overwriting_costs_nothing_until_there_is_something_new(
    tiny: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    run(tiny, tmp_path, dataclasses.replace(TINY, steps=2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    config = dataclasses.replace(TINY, n_layer=99_999_999) if fault == "model" else TINY

    def broken(*args: object, **kwargs: object) -> None:
        raise ValueError("n_layer, or the device is out of memory")

    if fault != "model":
        where = (Stepper, "step") if fault == "first step" else (recipe, "check_writable")
        monkeypatch.setattr(*where, broken)
    with pytest.raises(ValueError, match="n_layer"):
        run(tiny, tmp_path, config, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_no_directory_before_there_is_something_to_write(
    tiny: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs" / "a"
    with pytest.raises(FileNotFoundError, match=r"train\.pt: no such file; there is no run to resume"):
        run(tiny, out, TINY, resume=True)
    with pytest.raises(ValueError, match="n_layer"):
        run(tiny, out, dataclasses.replace(TINY, n_layer=99_999_999))

    def early(*args: object) -> None:
        signal.raise_signal(signal.SIGINT)

    # Of a step a second one, which acts at once.
    for place, name, stopped in ((recipe, "new_model", early), (Stepper, "step", lambda *_: (early(), early()))):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, stopped)
            with pytest.raises(KeyboardInterrupt):
                run(tiny, out, TINY)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_gives_the_same_files(tiny: TokenData, tmp_path: Path) -> None:
    from igpt_fast.pipeline import Pipeline

    config = dataclasses.replace(TINY, dropout=0.2)

    def stop(record: dict) -> None:
        raise KeyboardInterrupt

    summary = run(tiny, tmp_path / "straight", config)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "cut", config, progress=stop)
    again = run(tiny, tmp_path / "cut", config, resume=True)
    for name in ("model/model.safetensors", "model/config.json", "model/preprocessor_config.json", "samples.png"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name
    again, summary = ({**without_times(found), "model": "", "samples": ""} for found in (again, summary))
    assert again == summary
    pipeline = Pipeline.from_pretrained(tmp_path / "cut" / "model", device="cpu")
    assert pipeline.sample(2, seed=0).tokens.shape == (2, 16)
    with Image.open(tmp_path / "cut" / "samples.png") as picture:
        picture.load()


def test_held_out_images_are_evaluated_once(tiny: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []

    def counting(*args: Any) -> float:
        calls.append(mean_nats(*args))
        return calls[-1]

    monkeypatch.setattr("igpt_fast.learning.objectives.next_pixel.mean_nats", counting)
    summary = run(tiny, tmp_path, TINY)
    assert len(calls) == 2  # at steps 10 and 20
    assert summary["heldout_nats"] == calls[-1] == records(tmp_path)[-1]["heldout_nats"]
    assert run(tiny, tmp_path, TINY, resume=True)["heldout_nats"] == calls[-1]  # already at its end
    assert len(calls) == 3


def test_the_callers_random_numbers_go_on(tiny: TokenData, tmp_path: Path) -> None:
    devices = range(torch.cuda.device_count())
    torch.manual_seed(5)
    before = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
    train(tiny, tmp_path / "cpu", dataclasses.replace(TINY, steps=2, dropout=0.5))
    recipe.new_model(tiny, TINY, NextPixel())
    if devices:
        train(tiny, tmp_path / "cuda", dataclasses.replace(TINY, steps=2, dropout=0.5), device="cuda")
    after = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_the_type_of_the_tokens_does_not_matter(tiny: TokenData, tmp_path: Path) -> None:
    narrow = TokenData(tiny.tokens.to(torch.uint8), tiny.clusters, tiny.heldout)
    train(tiny, tmp_path / "wide", TINY)
    train(narrow, tmp_path / "narrow", TINY, stop_after=7)
    train(tiny, tmp_path / "narrow", TINY, resume=True)
    assert_same_state(tmp_path / "wide", tmp_path / "narrow")
    assert records(tmp_path / "wide") == records(tmp_path / "narrow")
    assert inputs_at(0, narrow, TINY, NextPixel())[0].dtype == torch.int64


@pytest.mark.parametrize("bf16", [False, True])
def test_resume_is_bit_identical(tiny: TokenData, tmp_path: Path, bf16: bool) -> None:
    config = dataclasses.replace(TINY, bf16=bf16, dropout=0.2)
    train(tiny, tmp_path / "straight", config)
    train(tiny, tmp_path / "halves", config, stop_after=11)
    torch.rand(7)  # whatever else the process drew in between
    train(tiny, tmp_path / "halves", config, resume=True)
    assert_same_state(tmp_path / "straight", tmp_path / "halves")
    assert records(tmp_path / "straight") == records(tmp_path / "halves")
    assert [record["step"] for record in records(tmp_path / "halves")] == [10, 20]


def test_resume_after_a_kill_while_writing(tiny: TokenData, tmp_path: Path) -> None:
    train(tiny, tmp_path / "straight", TINY)
    killed = tmp_path / "killed"
    train(tiny, killed, TINY, stop_after=6)
    # What SIGKILL leaves: half a checkpoint under its temporary name, records of steps that were not saved, and a
    # record cut short.
    (killed / ".train.pt.x1.partial.pt").write_bytes((killed / "train.pt").read_bytes()[:1000])
    with (killed / "log.jsonl").open("a") as log:
        log.write('{"step": 10, "nats": 7.0, "seconds": 1.0}\n{"step": 20, "na')
    train(tiny, killed, TINY, resume=True)
    assert_same_state(tmp_path / "straight", killed)
    assert records(tmp_path / "straight") == records(killed)
    assert sorted(path.name for path in killed.iterdir()) == ["log.jsonl", "train.pt"]


@pytest.mark.parametrize(
    "line",
    ['{"step": 2, "seconds": 1e999}', '{"step": 2, "seconds": ' + "9" * 400 + "}", "[" * 9999, '{"step": true}', "x"],
)
def test_a_log_is_kept_up_to_the_first_line_that_is_no_record(tmp_path: Path, line: str) -> None:
    good = '{"step": 1, "seconds": 2.5}\n'
    (tmp_path / "log.jsonl").write_text(good + line + "\n" + good)
    assert Output(tmp_path, ()).resume(5) == 2.5
    assert (tmp_path / "log.jsonl").read_text() == good


def test_a_failing_write_keeps_the_old_checkpoint(
    tiny: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny, tmp_path, TINY, stop_after=6)
    before = (tmp_path / "train.pt").read_bytes()

    def full(state: object, file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        train(tiny, tmp_path, TINY, resume=True)
    assert (tmp_path / "train.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_interrupt_saves_the_last_whole_step(tiny: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny, tmp_path / "straight", TINY)
    step_of = torch.optim.AdamW.step

    def interrupted(self: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        # Ctrl-C in the worst moment: inside the update.
        if next(iter(self.state.values()), {}).get("step", torch.zeros(())).item() == 12:
            signal.raise_signal(signal.SIGINT)
        return step_of(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tiny, tmp_path / "cut", TINY)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert torch.load(tmp_path / "cut" / "train.pt", weights_only=True)["step"] == 13
    train(tiny, tmp_path / "cut", TINY, resume=True)
    assert_same_state(tmp_path / "straight", tmp_path / "cut")
    assert records(tmp_path / "straight") == records(tmp_path / "cut")


def test_a_second_interrupt_acts_at_once(tiny: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def impatient(model: object, tokens: torch.Tensor, *_: object) -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("still running")

    monkeypatch.setattr("igpt_fast.learning.objectives.next_pixel.image_nats", impatient)
    with pytest.raises(KeyboardInterrupt):
        train(tiny, tmp_path, TINY)
    assert not (tmp_path / "train.pt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_raised_by_progress(tiny: TokenData, tmp_path: Path) -> None:
    def stop(record: dict) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path, TINY, progress=stop)
    assert torch.load(tmp_path / "train.pt", weights_only=True)["step"] == 10
    assert not (tmp_path / "model").exists()
    assert run(tiny, tmp_path, TINY, resume=True)["steps"] == 20


def test_training_in_another_thread(tiny: TokenData, tmp_path: Path) -> None:
    """Signal handlers can be set in the main thread only."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            train(tiny, tmp_path, dataclasses.replace(TINY, steps=2))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
    assert (tmp_path / "train.pt").exists()


def test_a_killed_process_goes_on(tiny: TokenData, tmp_path: Path) -> None:
    """SIGKILL at any moment, as often as it takes: the result is that of one uninterrupted run."""
    from igpt_fast.learning.data import save_tokens

    config = dataclasses.replace(TINY, steps=80, save_every=1, eval_every=20)
    save_tokens(tiny, tmp_path / "tiny.npz")
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from igpt_fast.learning.data import load_tokens\n"
        "from igpt_fast.learning.train import TrainConfig, train\n"
        f"train(load_tokens({str(tmp_path / 'tiny.npz')!r}), {str(tmp_path / 'killed')!r}, {config!r})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    checkpoint = tmp_path / "killed" / "train.pt"
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < torch.load(checkpoint, weights_only=True)["step"] < 80
    train(tiny, tmp_path / "killed", config, resume=True)
    train(tiny, tmp_path / "straight", dataclasses.replace(config, save_every=80))
    assert_same_state(tmp_path / "straight", tmp_path / "killed")
    assert records(tmp_path / "straight") == records(tmp_path / "killed")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_divergence_keeps_the_last_good_checkpoint(
    tiny: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    calls = []

    def diverging(model: ImageGPTForCausalImageModeling, tokens: torch.Tensor, *_: object) -> torch.Tensor:
        calls.append(model.training)
        return image_nats(model, tokens) * (bad if calls.count(True) == 9 else 1.0)

    monkeypatch.setattr("igpt_fast.learning.objectives.next_pixel.image_nats", diverging)
    with pytest.raises(DivergedError, match=r"step 9: the loss is (nan|inf)"):
        train(tiny, tmp_path, TINY)
    state = torch.load(tmp_path / "train.pt", weights_only=True)
    assert state["step"] == 6
    assert all(bool(torch.isfinite(value).all()) for value in state["model"].values())


def test_resume_of_another_run(tiny: TokenData, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train\.pt: no such file"):
        train(tiny, tmp_path, TINY, resume=True)
    train(tiny, tmp_path, TINY, stop_after=2)
    with pytest.raises(
        ValueError, match=r"train\.pt: written by another run: lr was 0\.001, is 0\.5; seed was 0, is 3"
    ):
        train(tiny, tmp_path, dataclasses.replace(TINY, lr=0.5, seed=3), resume=True)
    with pytest.raises(ValueError, match="n_embd was 32, is 64"):
        train(tiny, tmp_path, dataclasses.replace(TINY, n_embd=64), resume=True)
    other = TokenData((tiny.tokens + 1) % 6, tiny.clusters, tiny.heldout)
    with pytest.raises(ValueError, match="the data differ"):
        train(other, tmp_path, TINY, resume=True)


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.target}",)


class Glutton:
    def __reduce__(self) -> tuple:
        return bytearray, (10**11,)


def _damaged(kind: str, good: bytes, path: Path) -> None:
    """Writes a file of a kind that must be refused."""
    state = torch.load(path, weights_only=True)
    first = next(iter(state["model"]))
    if kind in ("bomb", "glutton"):
        state["model"][first] = Bomb(path.parent / "ran") if kind == "bomb" else Glutton()
        torch.save(state, path)
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps(Bomb(path.parent / "ran")))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "not a zip":
        path.write_bytes(b"hello" * 100)
    elif kind == "compressed":
        with zipfile.ZipFile(path) as old:
            entries = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name, content in entries.items():
                new.writestr(name, content)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "missing weight":
        del state["model"][first]
        torch.save(state, path)
    elif kind == "huge view":
        state["model"][first] = torch.zeros(1).expand(10**9, 10**3)
        torch.save(state, path)
    elif kind == "nan":
        state["model"][first].view(-1)[0] = math.nan
        torch.save(state, path)
    elif kind == "moment shape":
        state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
        torch.save(state, path)
    elif kind == "no moments":
        state["optimizer"]["state"] = {}
        torch.save(state, path)
    elif kind == "other optimizer":
        state["optimizer"]["param_groups"][0]["betas"] = (0.5, 0.5)
        torch.save(state, path)
    elif kind == "late step":
        state["step"] = 21
        torch.save(state, path)
    elif kind == "bool step":
        state["step"] = True
        torch.save(state, path)
    elif kind == "tensor setting":
        state["identity"]["config"]["lr"] = torch.ones(3)
        torch.save(state, path)
    elif kind == "setting of text":
        state["identity"]["config"]["\x1b" * 9999] = "\n" * 9999
        torch.save(state, path)
    elif kind == "tensor data":
        state["identity"]["data"] = torch.ones(3)
        torch.save(state, path)
    elif kind == "tensor betas":
        state["optimizer"]["param_groups"][0]["betas"] = torch.ones(3)
        torch.save(state, path)
    elif kind == "nan lr":
        state["optimizer"]["param_groups"][0]["lr"] = math.nan
        torch.save(state, path)
    elif kind == "long shape":
        state["optimizer"]["state"][0]["exp_avg"] = torch.zeros([1] * 60)
        torch.save(state, path)
    elif kind == "moments before the first step":
        state["step"] = 0
        state["optimizer"]["state"] = {"a": state["optimizer"]["state"][0]}
        torch.save(state, path)
    else:
        path.write_bytes(good[: int(len(good) * float(kind))])


@pytest.mark.parametrize(
    "kind",
    [
        *("bomb", "glutton", "plain pickle", "empty", "not a zip", "compressed", "list", "missing weight"),
        *("huge view", "nan", "moment shape", "no moments", "other optimizer", "late step", "bool step"),
        *("tensor setting", "setting of text", "tensor data", "tensor betas", "nan lr", "long shape"),
        "moments before the first step",
        *("0.1", "0.5", "0.99", "0.9999"),
    ],
)
def test_a_bad_checkpoint_is_refused(tiny: TokenData, tmp_path: Path, kind: str) -> None:
    config = dataclasses.replace(TINY, n_embd=8)
    train(tiny, tmp_path, config, stop_after=1)
    path = tmp_path / "train.pt"
    log = (tmp_path / "log.jsonl").read_text()
    _damaged(kind, path.read_bytes(), path)
    with pytest.raises(ValueError, match=r"train\.pt: not a usable training state: .") as caught:
        train(tiny, tmp_path, config, resume=True)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    assert not (tmp_path / "ran").exists()
    assert (tmp_path / "log.jsonl").read_text() == log


def test_learning_rate() -> None:
    config = TrainConfig(steps=1000, warmup_steps=100, lr=2.0)
    assert learning_rate(0, config) == pytest.approx(0.02)
    assert learning_rate(99, config) == learning_rate(100, config) == 2.0
    assert learning_rate(550, config) == pytest.approx(1.0)
    assert learning_rate(1000, config) == pytest.approx(0.0)
    assert learning_rate(0, dataclasses.replace(config, warmup_steps=0)) == 2.0
    assert learning_rate(0, TrainConfig(steps=1, warmup_steps=1)) > 0.0
    # A short run warms up for a tenth of its steps, unless it is said for how long.
    assert [TrainConfig(steps=steps).warmup for steps in (1, 30, 2000, 9000)] == [0, 3, 200, 200]
    assert TrainConfig(steps=30, warmup_steps=0).warmup == 0
    assert FinetuneConfig().training(1, 1, 1).warmup == 10


def batch_at(step: int, tokens: torch.Tensor, side: int, config: TrainConfig) -> torch.Tensor:
    return augmented(step, tokens[chosen_at(step, len(tokens), config)], side, side, config)


def test_batches_cover_every_image_once_a_pass() -> None:
    tokens = torch.arange(10)[:, None].repeat(1, 4)  # images that no flip or shift changes
    config = TrainConfig(batch_size=4, seed=5)
    drawn = torch.cat([batch_at(step, tokens, 2, config) for step in range(5)])[:, 0].tolist()
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert torch.equal(batch_at(3, tokens, 2, config), batch_at(3, tokens, 2, config))
    larger = batch_at(0, tokens, 2, dataclasses.replace(config, batch_size=25))[:, 0].tolist()
    assert sorted(larger[:10]) == sorted(larger[10:20]) == list(range(10))


def test_augmentation_moves_whole_images() -> None:
    image = torch.arange(25).view(5, 5)
    config = TrainConfig(batch_size=64, seed=0)
    padded = np.pad(image.numpy(), 1, mode="edge")
    shifted = [padded[y : y + 5, x : x + 5] for y in range(3) for x in range(3)]
    mirrored = np.pad(image.numpy()[:, ::-1], 1, mode="edge")
    shifted += [mirrored[y : y + 5, x : x + 5] for y in range(3) for x in range(3)]
    possible = {part.tobytes() for part in shifted}
    batch = torch.cat([batch_at(step, image.view(1, 25), 5, config) for step in range(4)])
    assert {row.numpy().tobytes() for row in batch} == possible
    plain = batch_at(0, image.view(1, 25), 5, dataclasses.replace(config, flip=False, shift=0))
    assert bool((plain == image.flatten()).all())


def test_image_nats_scores_every_pixel_from_those_before(tiny: TokenData) -> None:
    model = recipe.new_model(tiny, dataclasses.replace(TINY, n_layer=2), NextPixel()).eval()
    tokens = tiny.tokens[:3]
    with torch.no_grad():
        assert torch.allclose(image_nats(model, tokens), torch.full((3, 16), math.log(6)))  # the head starts at zero
        torch.nn.init.normal_(model.lm_head.weight)
        before = image_nats(model, tokens)
        changed = tokens.clone()
        changed[:, 7] = (changed[:, 7] + 1) % 6
        after = image_nats(model, changed)
        logits = model(torch.cat([torch.full((3, 1), 6), tokens[:, :-1]], 1)).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert bool((before[:, 7:] != after[:, 7:]).any(dim=1).all())
    expected = -torch.log_softmax(logits, -1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(before, expected)
    whole = evaluate(model, tiny.tokens, batch_size=7)
    assert whole == pytest.approx(image_nats(model, tiny.tokens).mean().item(), rel=1e-6)
    with pytest.raises(ValueError, match="no images"):
        evaluate(model, tiny.tokens[:0])


def test_evaluate_is_without_dropout_and_leaves_the_mode(tiny: TokenData) -> None:
    model = recipe.new_model(tiny, dataclasses.replace(TINY, dropout=0.9), NextPixel())
    torch.nn.init.normal_(model.lm_head.weight)
    model.train()
    assert evaluate(model, tiny.tokens) == evaluate(model, tiny.tokens)
    assert model.training


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("steps", 2.5),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", math.nan),
        ("clip", -1.0),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("dropout", 1.0),
        ("label_dropout", 1.0),
        ("label_dropout", -0.1),
        ("seed", -1),
        ("seed", 1 << 32),
        ("n_head", 5),
        ("save_every", 0),
        ("n_layer", True),
    ],
)
def test_settings_are_checked(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        TrainConfig(**{field: value})


def test_messages_begin_with_the_settings_name() -> None:
    with pytest.raises(ValueError, match=r"^steps is 0; want an integer in 1\.\.2\^32-1$"):
        TrainConfig(steps=0)


def test_largest_seed(tiny: TokenData) -> None:
    (batch,) = inputs_at(5, tiny, TrainConfig(batch_size=2, seed=(1 << 32) - 1), NextPixel())
    assert batch.shape == (2, 16)


@pytest.mark.skipif(not backend._C or sys.platform != "linux", reason="instruction sets are chosen by name on x86-64")
def test_no_autocast_where_the_processor_has_no_bfloat16(
    tiny: TokenData, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """The same bits as a run in float32, which the log and a warning say; another processor goes on, and says so."""
    before = backend._C.cpu_isa()
    config = dataclasses.replace(TINY, bf16=True, steps=2)
    try:
        assert backend._C.select_cpu_isa("generic")
        records: list[dict[str, Any]] = []
        with pytest.warns(UserWarning, match="trains in float32 throughout: products of bfloat16 are"):
            first = train(tiny, tmp_path / "a", config, progress=records.append)
        recwarn.clear()
        plain = train(tiny, tmp_path / "b", dataclasses.replace(config, bf16=False))
        assert not any("float32" in str(warning.message) for warning in recwarn)
    finally:
        backend._C.select_cpu_isa(before)
    assert {record["precision"] for record in records} == {"float32"}
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), plain.parameters(), strict=True))
    if backend._C.cpu_bf16_products():
        with pytest.warns(UserWarning, match="was computed by 1 process, --accumulate 1, float32, goes on by"):
            train(tiny, tmp_path / "a", config, resume=True)
