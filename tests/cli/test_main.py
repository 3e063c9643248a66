"""The igpt command: results, exit codes, one line an error, nothing half-written."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from processor_time import processor_seconds
from screen import Screen

from igpt_fast import backend
from igpt_fast import environment as environment_module
from igpt_fast.cli import main as cli
from igpt_fast.cli.checks import choose_device


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of a command in this process."""
    try:
        code = cli.main([str(arg) for arg in args])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def fails(capsys: pytest.CaptureFixture[str], code: int, *args: object) -> str:
    """The one line of a command that must fail with ``code`` and print nothing."""
    got, out, err = run(capsys, *args)
    assert got == code, err
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("igpt")
    return err


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 200), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.mark.clock
def test_help_is_quick() -> None:
    """Without torch, which takes seconds: little beside what tyro's own import takes."""
    commands = (("-c", "import tyro"), ("-m", "igpt_fast", "--help"), ("-m", "igpt_fast", "sample", "--help"))
    rounds = [[processor_seconds(*command) for command in commands] for _ in range(4)]
    tyro, ours, of_sample = (min(times) for times in zip(*rounds, strict=True))
    assert ours < 2 * tyro + 0.12
    assert of_sample < 4 * tyro + 0.12
    code = """
import contextlib, sys
from igpt_fast.cli.main import main
for words in ["--help"], ["sample", "--help"]:
    with contextlib.suppress(SystemExit):
        main(words)
assert not {"torch", "numpy", "PIL"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_sample(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, gif = tmp_path / "grid.png", tmp_path / "grid.gif"
    code, text, _ = run(capsys, "sample", "-n", 3, "--seed", 5, "--out", out, "--gif", gif, "--json")
    assert code == 0
    report = json.loads(text)
    assert (report["images"], report["seed"], report["size"]) == (3, 5, [16, 16])
    assert 0.0 < report["nats_per_pixel"] < 2.0
    first = out.read_bytes()
    with Image.open(gif) as animation:
        assert animation.n_frames == 17
    assert "exists already" in fails(capsys, 1, "sample", "-n", 1, "--out", out)
    assert out.read_bytes() == first
    code, text, _ = run(capsys, "sample", "-n", 3, "--seed", 5, "--out", out, "--force", "--batch-size", 2)
    assert code == 0
    assert text.startswith(f"{out}: 3 images of 16x16, seed 5")
    assert out.read_bytes() == first


def test_every_file_of_sample(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = {"--out": "a.png", "--gif": "a.gif", "--singles": "s", "--tokens": "a.npz", "--sidecar": "a.json"}
    names = [word for option, name in files.items() for word in (option, tmp_path / name)]
    shape = ("-n", 2, "--columns", 2, "--upscale", 2)
    command = ("sample", *shape, "--seed", 5, "--min-p", 0.02, "--device", "cpu", "--json", *names)
    code, text, _ = run(capsys, *command)
    assert code == 0
    report, sidecar = json.loads(text), json.loads((tmp_path / "a.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == set(files.values())
    assert sidecar["command"] == "sample"
    assert (sidecar["seed"], sidecar["min_p"], sidecar["images"], sidecar["interrupted"]) == (5, 0.02, 2, False)
    assert (sidecar["columns"], sidecar["upscale"]) == (2, 2)
    assert len(sidecar["model_sha256"]) == 64
    for values in (report, sidecar):
        assert values["engine"] == ("reference" if backend._C is None else "cpu")
        assert values["images_per_second"] == pytest.approx(2 / values["seconds"], rel=0.02)
    with Image.open(tmp_path / "s" / "00001.png") as single, Image.open(tmp_path / "a.png") as grid:
        assert single.size == (32, 32)
        assert grid.size == (2 * 32 + 2, 32)
    with np.load(tmp_path / "a.npz") as arrays:
        nats = -arrays["logprobs"].mean()
    assert report["nats_per_pixel"] == pytest.approx(float(nats))
    for option, name in list(files.items())[1:]:  # each is looked for before the work
        assert "--force" in fails(capsys, 1, "sample", "-n", 1, "--out", tmp_path / "new.png", option, tmp_path / name)
    assert not (tmp_path / "new.png").exists()
    first = (tmp_path / "a.png").read_bytes()
    assert run(capsys, *command, "--force", "--scale", 2)[0] == 0  # --upscale's older name
    assert (tmp_path / "a.png").read_bytes() == first


@pytest.fixture
def classed(tmp_path: Path) -> Path:
    """A checkpoint of random weights, with three classes; images are 5 high and 4 wide."""
    from igpt_fast import ImageGPTConfig, ImageGPTForCausalImageModeling, ImageGPTImageProcessor

    config = ImageGPTConfig(vocab_size=9 + 3 + 1, n_positions=20, n_embd=32, n_layer=1, n_head=2, n_classes=3)
    ImageGPTForCausalImageModeling(config).save_pretrained(tmp_path / "classed")
    clusters = np.random.default_rng(0).uniform(-1, 1, (9, 3)).astype(np.float32)
    ImageGPTImageProcessor(clusters=clusters, size={"height": 5, "width": 4}).save_pretrained(tmp_path / "classed")
    return tmp_path / "classed"


def test_classes(capsys: pytest.CaptureFixture[str], tmp_path: Path, classed: Path, photo: Path) -> None:
    shared = ("--model", classed, "--seed", 5, "--cfg-scale", 1.5, "--json", "--out", tmp_path / "a.png", "--force")
    command = ("sample", "-n", 5, "--label", "2,0", "--tokens", tmp_path / "a.npz", *shared)
    code, text, _ = run(capsys, *command)
    assert code == 0
    report = json.loads(text)
    assert (report["labels"], report["cfg_scale"], report["size"]) == ([2, 0, 2, 0, 2], 1.5, [5, 4])
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["labels"].tolist() == [2, 0, 2, 0, 2]
        assert arrays["tokens"].shape == (5, 5, 4)
        assert arrays["tokens"].max() < 9
    code, text, _ = run(capsys, "complete", photo, photo, "--label", "1,2", "-n", 2, "--preview", *shared)
    assert code == 0
    assert json.loads(text)["labels"] == [1, 1, 2, 2]
    assert "--label 3 is not in 0..2" in fails(capsys, 2, "sample", "--label", 3, *shared)
    assert "--label 3 is not in 0..2" in fails(capsys, 2, "complete", photo, photo, "--label", "0,3", *shared)


def test_sample_in_int8(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Asked for by name, on the CPU; where it is not to be had, nothing else is drawn."""
    if backend._C is None:
        pytest.skip(backend.native_reason)
    command = ("sample", "-n", 1, "--seed", 5, "--device", "cpu", "--dtype", "int8", "--out", tmp_path / "int8.png")
    code, text, _ = run(capsys, *command, "--json")
    assert code == 0
    assert json.loads(text)["dtype"] == "int8"
    before = backend.get_backend()
    try:
        assert "int8" in fails(capsys, 3, *command, "--force", "--backend", "reference")
    finally:
        backend.set_backend(before)


def test_complete(capsys: pytest.CaptureFixture[str], tmp_path: Path, photo: Path) -> None:
    out = tmp_path / "completions.png"
    code, text, _ = run(capsys, "complete", photo, photo, "-n", 2, "--keep", 0.25, "--seed", 1, "--out", out, "--json")
    assert code == 0
    assert json.loads(text)["rows"] == 4
    with Image.open(out) as grid:
        width, height = grid.size
    assert width > 5 * 128 > height  # a row each: input, given part, two completions, original
    assert height > 2 * 128


def test_sample_in_fp8_values(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Asked for by name, of the CUDA kernels; elsewhere nothing else is drawn."""
    out = tmp_path / "fp8.png"
    command = ("sample", "-n", 1, "--seed", 5, "--device", "cpu", "--dtype", "fp8_values", "--out", out)
    assert "dtype 'fp8_values' is not available: the model is on cpu" in fails(capsys, 3, *command)
    assert not out.exists()
    assert "int8, fp8_values, fp8_cache, auto" in fails(capsys, 2, "sample", "--dtype", "fp8", "--out", out)


def test_complete_by_a_mask(capsys: pytest.CaptureFixture[str], tmp_path: Path, photo: Path) -> None:
    mask = np.full((16, 16), 255, dtype=np.uint8)
    mask[6:9, 3:11] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    names = ("--out", tmp_path / "a.png", "--tokens", tmp_path / "a.npz", "--singles", tmp_path / "s")
    names += ("--sidecar", tmp_path / "a.json")
    command = ("complete", photo, "--mask", tmp_path / "mask.png", "-n", 2, "--candidates", 3, "--seed", 1, *names)
    code, text, _ = run(capsys, *command, "--json")
    assert code == 0
    assert json.loads(text)["candidates"] == 3
    sidecar = json.loads((tmp_path / "a.json").read_text())
    assert sidecar["mask_sha256"] == hashlib.sha256((tmp_path / "mask.png").read_bytes()).hexdigest()
    assert sidecar["inputs_sha256"] == [hashlib.sha256(photo.read_bytes()).hexdigest()]
    assert (sidecar["columns"], sidecar["upscale"]) == (None, None)
    with np.load(tmp_path / "a.npz") as arrays:
        assert np.array_equal(np.isnan(arrays["logprobs"]), np.broadcast_to(mask == 255, (2, 16, 16)))
        assert (arrays["tokens"][0] == arrays["tokens"][1])[mask == 255].all()
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["00000-00.png", "00000-01.png"]
    assert run(capsys, "complete", photo, "--keep", "15rows", "-n", 1, "--out", tmp_path / "b.png")[0] == 0


def test_quantize_and_clusters(capsys: pytest.CaptureFixture[str], tmp_path: Path, photo: Path) -> None:
    clusters, tokens, preview = tmp_path / "clusters.npy", tmp_path / "tokens.npy", tmp_path / "preview.png"
    assert run(capsys, "clusters", tmp_path, "-k", 5, "--out", clusters, "--json")[0] == 0
    palette = np.load(clusters)
    assert palette.shape == (5, 3)
    assert run(capsys, "clusters", tmp_path, "-k", 5, "--out", clusters, "--force", "--all-pixels", "--side", 8)[0] == 0
    assert not np.array_equal(np.load(clusters), palette)
    palette = np.load(clusters)
    code, text, _ = run(
        capsys, "quantize", photo, "--clusters", clusters, "--side", 0, "--out", tokens, "--grid", preview, "--json"
    )
    assert code == 0
    assert json.loads(text)["shape"] == [1, 200, 300]
    array = np.load(tokens)
    assert array.dtype == np.uint16
    pixels = np.asarray(Image.open(photo).convert("RGB"), dtype=np.float64) / 127.5 - 1
    distances = ((pixels[:, :, None] - palette.astype(np.float64)) ** 2).sum(-1)
    chosen = np.take_along_axis(distances, array[0][..., None].astype(np.int64), axis=-1)[..., 0]
    assert np.array_equal(chosen, distances.min(axis=-1))
    assert run(capsys, "quantize", photo, "--out", tokens, "--force")[0] == 0
    assert np.load(tokens).shape == (1, 16, 16)
    with Image.open(preview) as image:
        assert image.size[0] >= 300


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, "env", "--json")
    assert code == 0
    assert json.loads(text) == json.loads(json.dumps(environment_module.config()))
    code, text, _ = run(capsys, "env")
    assert code == 0
    assert "quantize" in text
    assert "causal_attention_packed cpu " in text
    for device in ("cpu ", "cuda"):
        reason = f"[there is no kernel for {device.strip()} tensors in this version]"
        assert re.search(rf"full_attention +{device} +torch scaled_dot_product_attention, .* {re.escape(reason)}", text)


def test_usage_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path, photo: Path) -> None:
    fails(capsys, 2)
    fails(capsys, 2, "paint")
    assert "--nonsense" in fails(capsys, 2, "sample", "--nonsense")
    assert "x" in fails(capsys, 2, "sample", "-n", "x")
    assert "at least one" in fails(capsys, 2, "complete", "--out", tmp_path / "a.png")
    assert "at least one" in fails(capsys, 2, "quantize", "--out", tmp_path / "a.npy")
    assert "at least one" in fails(capsys, 2, "clusters", "--out", tmp_path / "a.npy")
    assert "must end in" in fails(capsys, 2, "sample", "--out", tmp_path / "a.txt")
    assert "must end in" in fails(capsys, 2, "sample", "--out", tmp_path / "a.png", "--gif", tmp_path / "b.png")
    assert "--backend" in fails(capsys, 2, "sample", "--out", tmp_path / "a.png", "--backend", "tpu")
    assert "--dtype" in fails(capsys, 2, "sample", "--out", tmp_path / "a.png", "--dtype", "int3")
    assert "--device" in fails(capsys, 2, "sample", "--out", tmp_path / "a.png", "--device", "abacus")
    assert "not both" in fails(
        capsys, 2, "quantize", photo, "--clusters", "a", "--model", "b", "--out", tmp_path / "t.npy"
    )
    out = ("--out", tmp_path / "a.png")
    assert "-n is 0" in fails(capsys, 2, "sample", "-n", 0, *out)
    assert "n is" in fails(capsys, 2, "sample", "-n", 10**20, *out)
    assert "--top-p is" in fails(capsys, 2, "sample", "--top-p", 3, *out)
    assert "--top-k is" in fails(capsys, 2, "sample", "--top-k", 0, *out)
    assert "complete: --temperature is" in fails(capsys, 2, "complete", photo, "--temperature", -1, *out)
    assert "--temperature is" in fails(capsys, 2, "sample", "--temperature", "nan", *out)
    assert "--seed is" in fails(capsys, 2, "sample", "--seed", -1, *out)
    assert "--batch-size is" in fails(capsys, 2, "sample", "--batch-size", 0, *out)
    assert "keep" in fails(capsys, 2, "complete", photo, "--keep", 1, *out)
    assert "16rows" in fails(capsys, 2, "complete", photo, "--keep", "16rows", *out)
    assert "not both" in fails(capsys, 2, "complete", photo, "--keep", "0.5", "--mask", photo, *out)
    assert "--candidates is 0" in fails(capsys, 2, "complete", photo, "--candidates", 0, *out)
    assert "no given pixel follows" in fails(capsys, 2, "complete", photo, "--candidates", 2, *out)
    assert "--min-p is" in fails(capsys, 2, "sample", "--min-p", 1.5, *out)
    assert "--cfg-scale is" in fails(capsys, 2, "sample", "--cfg-scale", "nan", *out)
    assert "--cfg-scale has no effect without --label:" in fails(capsys, 2, "sample", "--cfg-scale", 2, *out)
    assert "--label 9 is not in 0..8" in fails(capsys, 2, "sample", "--label", 9, *out)
    assert "did you mean smileys?" in fails(capsys, 2, "complete", photo, "--label", "smilies", *out)
    for option, suffix in (("--tokens", ".npz"), ("--sidecar", ".json")):
        assert suffix in fails(capsys, 2, "sample", option, tmp_path / "a.txt", *out)
    assert "single image" in fails(capsys, 2, "sample", "--out", tmp_path / "00000.png", "--singles", tmp_path)
    # What the grid would run into is found before the images are drawn.
    assert "--columns is 0" in fails(capsys, 2, "sample", "--columns", 0, *out)
    assert "--upscale is 1000" in fails(capsys, 2, "sample", "--scale", 1000, *out)
    large = fails(capsys, 2, "sample", "-n", 200, "--scale", 64, *out)
    assert large.endswith("pixels; make the grid's images smaller with --upscale 1, or draw fewer\n")
    assert "--upscale 1" in fails(capsys, 2, "sample", "-n", 1 << 24, *out)
    assert "--upscale 1" in fails(capsys, 2, "complete", photo, "-n", 1 << 20, *out)
    tall = ("-n", 482, "--columns", 1, "--gif", tmp_path / "a.gif")
    assert "a GIF has 65535" in fails(capsys, 2, "sample", *tall, *out)
    assert "also the directory" in fails(capsys, 2, "sample", "--singles", tmp_path / "a.png", *out)
    assert "--side" in fails(capsys, 2, "quantize", photo, "--side", -1, "--out", tmp_path / "t.npy")
    assert "--n-clusters" in fails(capsys, 2, "clusters", photo, "-k", 1, "--out", tmp_path / "t.npy")
    assert "--seed" in fails(capsys, 2, "clusters", photo, "--seed", -1, "--out", tmp_path / "t.npy")
    assert "--dtype" in fails(capsys, 2, "train", "--dtype", "int8", "--out", tmp_path / "run")
    assert "single" in fails(capsys, 2, "quantize", photo, photo, "--side", 0, "--out", tmp_path / "t.npy")
    assert "--side" in fails(capsys, 2, "clusters", photo, "--side", 0, "--out", tmp_path / "t.npy")
    for option in (("--side", 8), ("--n-clusters", 3), ("--holdout", 0.5), ("--clusters", photo), ("--all-pixels",)):
        assert option[0] in fails(capsys, 2, "train", *option, "--out", tmp_path / "run")
    os.mkfifo(tmp_path / "pipe")  # a token file, if anything
    assert "--side" in fails(capsys, 2, "train", tmp_path / "pipe", "--side", 8, "--out", tmp_path / "run")
    (tmp_path / "pipe").unlink()
    assert "no such file" in fails(capsys, 1, "train", tmp_path / "none", "--side", 8, "--out", tmp_path / "run")
    assert "only with --classes" in fails(capsys, 2, "train", "--label-dropout", 0.2, "--out", tmp_path / "run")
    assert "--resume" in fails(capsys, 2, "train", "--resume", "--force", "--out", tmp_path / "run")
    assert "steps is 0" in fails(capsys, 2, "train", "--steps", 0, "--out", tmp_path / "run")
    assert "multiple" in fails(capsys, 2, "train", "--n-head", 5, "--out", tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photo.jpg"]


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_usage_errors_are_of_the_option(encoding: str) -> None:
    """Whatever letters a terminal has for tyro's frames."""
    dtypes = "float32, bfloat16, float16, int8, fp8_values, fp8_cache, auto"
    for option, value, text in (
        ("--dtype", "int3", f"--dtype is 'int3'; want one of {dtypes}; did you mean int8?"),
        ("--temperature", "inf", "--temperature is inf; want a number in [0, 1.79769e+308] (see igpt sample --help)"),
        ("--nonsense", "1", "there is no option --nonsense"),
    ):
        command = [sys.executable, "-m", "igpt_fast", "sample", option, value]
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert (done.returncode, done.stderr) == (2, f"igpt sample: {text}\n")


def test_failures(capsys: pytest.CaptureFixture[str], tmp_path: Path, photo: Path) -> None:
    out = tmp_path / "a.png"
    assert "no such directory" in fails(capsys, 1, "sample", "--out", tmp_path / "none" / "a.png")
    assert "missing.jpg" in fails(capsys, 1, "complete", tmp_path / "missing.jpg", "--out", out)
    text = tmp_path / "text.png"
    text.write_text("not an image")
    assert "text.png" in fails(capsys, 1, "complete", text, "--out", out)
    assert "text.png" in fails(capsys, 1, "quantize", text, "--out", tmp_path / "t.npy")
    (tmp_path / "cut.jpg").write_bytes(photo.read_bytes()[:200])
    assert "cut.jpg" in fails(capsys, 1, "complete", tmp_path / "cut.jpg", "--out", out)
    assert "text.png" in fails(capsys, 1, "complete", photo, "--mask", text, "--out", out)
    assert "missing.png" in fails(capsys, 1, "complete", photo, "--mask", tmp_path / "missing.png", "--out", out)
    Image.new("L", (16, 16), 255).save(tmp_path / "white.png")
    assert "nothing to draw" in fails(capsys, 1, "complete", photo, "--mask", tmp_path / "white.png", "--out", out)
    assert "not a directory" in fails(capsys, 1, "sample", "--singles", photo, "--out", out)
    assert "missing" in fails(capsys, 1, "sample", "--model", tmp_path / "missing", "--out", out)
    (tmp_path / "empty").mkdir()
    assert "empty" in fails(capsys, 1, "sample", "--model", tmp_path / "empty", "--out", out)
    assert "empty" in fails(capsys, 1, "clusters", tmp_path / "empty", "--out", tmp_path / "c.npy")
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY garbage")
    assert "bad.npy" in fails(
        capsys, 1, "quantize", photo, "--clusters", tmp_path / "bad.npy", "--out", tmp_path / "t.npy"
    )
    np.save(tmp_path / "flat.npy", np.zeros(7, np.float32))
    assert "(7,)" in fails(
        capsys, 1, "quantize", photo, "--clusters", tmp_path / "flat.npy", "--out", tmp_path / "t.npy"
    )
    assert "bad.npy" in fails(capsys, 1, "train", tmp_path / "bad.npy", "--out", tmp_path / "run")
    assert "no run" in fails(capsys, 1, "train", "--resume", "--out", tmp_path / "run")
    left = {"photo.jpg", "text.png", "white.png", "cut.jpg", "empty", "bad.npy", "flat.npy"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_mps_where_torch_has_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every command takes it; where it is not there, that is 3, before anything is read or written."""
    (tmp_path / "a.png").write_bytes(b"")
    np.save(tmp_path / "a.npy", np.zeros((2, 4, 4, 3), np.uint8))
    data, picture, out = tmp_path / "a.npy", tmp_path / "a.png", ("--out", tmp_path / "out.png")
    commands = [
        ("sample", *out),
        ("complete", picture, *out),
        ("score", picture),
        ("features", picture, "--out", tmp_path / "f.npz"),
        ("quantize", picture, "--out", tmp_path / "q.npy"),
        ("probe", data),
        ("finetune", tmp_path, data, "--out", tmp_path / "tuned"),
        ("train", data, "--out", tmp_path / "run"),
    ]
    before = set(tmp_path.iterdir())
    for built, device, why in (
        (False, "mps", "this torch is a build without MPS"),
        (True, "mps", "torch sees none"),
        (True, "mps:1", "torch sees none"),
    ):
        with mock.patch.object(torch.backends.mps, "is_built", return_value=built):
            for command in commands:
                message = fails(capsys, 3, *command, "--device", device)
                assert f"device {device} is not available: {why}" in message, command
    assert set(tmp_path.iterdir()) == before
    with mock.patch.object(torch.backends.mps, "is_available", return_value=True):
        assert choose_device("mps") == torch.device("mps")
    assert "want cpu, cuda, cuda:N or mps" in fails(capsys, 2, "sample", *out, "--device", "xpu")


@pytest.mark.skipif(backend.unavailable("cuda") is None, reason="CUDA is available here")
def test_unavailable_is_three(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    assert "cuda" in fails(capsys, 3, "sample", "--backend", "cuda", "--out", out)
    assert "cuda:7" in fails(capsys, 3, "sample", "--device", "cuda:7", "--out", out)
    environment = {**os.environ, "IGPT_FAST_BACKEND": "abacus"}
    done = subprocess.run(
        [sys.executable, "-m", "igpt_fast", "env"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert "IGPT_FAST_BACKEND" in done.stderr
    assert not list(tmp_path.iterdir())


def test_unwritable_output(capsys: pytest.CaptureFixture[str]) -> None:
    """Said before the work is done; /proc takes no files, not even root's."""
    assert "cannot be written" in fails(capsys, 1, "sample", "--out", "/proc/samples.png")


@pytest.fixture
def terminal_pair() -> Iterator[tuple[int, Callable[[], str], Callable[[], str]]]:
    """A terminal of 60 x 24 for a child's stderr, what has been written to it so far, and when the child is gone."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    written: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the end of a terminal
            while part := os.read(ours, 1 << 16):
                written.append(part)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()

    def so_far() -> str:
        return b"".join(written).decode(errors="ignore").replace("\r\n", "\n")

    def text() -> str:
        os.close(theirs)
        thread.join()
        return so_far()

    yield theirs, so_far, text
    os.close(ours)


def test_progress_and_preview_on_a_terminal(
    tmp_path: Path, terminal_pair: tuple[int, Callable[[], str], Callable[[], str]]
) -> None:
    theirs, _, text = terminal_pair
    command = [sys.executable, "-m", "igpt_fast", "sample", "-n", "2", "--seed", "5", "--preview", "--device", "cpu"]
    environment = {**os.environ, "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    command += ["--out", str(tmp_path / "a.png"), "--upscale", "1"]
    done = subprocess.run(command, stdout=-1, stderr=theirs, env=environment, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith(f"{tmp_path / 'a.png'}: 2 images")  # results are apart
    shown = text()
    assert re.search(r"sampling \d+% of 2 images, +[\d.]+ images/s, \d\d:\d\d left \|", shown)
    pixels, inked = Screen(60).feed(shown).pixels(16, 33)
    with Image.open(tmp_path / "a.png") as grid:
        assert np.array_equal(pixels[inked], np.asarray(grid)[inked])
    assert inked.sum() == 2 * 16 * 16


@pytest.mark.clock
def test_interrupt_is_130_and_leaves_nothing_half_written(
    tmp_path: Path, terminal_pair: tuple[int, Callable[[], str], Callable[[], str]]
) -> None:
    theirs, so_far, text = terminal_pair
    command = [sys.executable, "-m", "igpt_fast", "sample", "-n", "4000", "--batch-size", "2", "--preview", "--json"]
    files = {"--out": "a.png", "--gif": "a.gif", "--singles": "s", "--tokens": "a.npz", "--sidecar": "a.json"}
    command += [word for option, name in files.items() for word in (option, str(tmp_path / name))]
    process = subprocess.Popen(command, stderr=theirs, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not re.search(r"\d images/s", so_far()) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        report, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130
    shown = text()
    assert shown.splitlines()[-1].endswith("igpt sample: interrupted")
    assert "Traceback" not in shown
    # What is said when nothing is finished may be wider than the terminal; a picture or a bar may not.
    assert Screen(60).feed(re.sub(r"[^\r\n]*no image is finished[^\r\n]*", "", shown)).cursor
    # The batches that were finished are there, whole; before the first one, nothing is.
    assert {path.name for path in tmp_path.iterdir()} == (set(files.values()) if report else set())
    if report:
        images = json.loads(report)["images"]
        assert images % 2 == 0
        assert json.loads((tmp_path / "a.json").read_text())["interrupted"]
        assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [f"{i:05}.png" for i in range(images)]
        with np.load(tmp_path / "a.npz") as arrays:
            assert arrays["tokens"].shape == (images, 16, 16)
        Image.open(tmp_path / "a.png").load()


def test_train_and_use(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A directory of pictures to a model that the other commands take; resuming a finished run changes nothing."""
    pictures, out = tmp_path / "pictures", tmp_path / "run"
    pictures.mkdir()
    generator = np.random.default_rng(0)
    for i in range(12):
        pixels = generator.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 30), Image.Resampling.BICUBIC).save(pictures / f"{i}.png")
    (pictures / "broken.png").write_text("no picture")
    settings = ("--n-layer", 1, "--n-embd", 16, "--n-head", 1, "--steps", 3, "--batch-size", 2, "--no-bf16")
    command = ("train", pictures, "--out", out, "--side", 8, "--n-clusters", 4, "--holdout", 0.3, *settings)
    assert "broken.png" in fails(capsys, 1, *command)
    code, text, progress = run(capsys, *command, "--skip-unreadable", "--json")
    assert code == 0, progress
    assert [line for line in progress.splitlines() if line.startswith("igpt: ") and "broken.png" in line]
    report = json.loads(text)
    assert report["images"] == 12
    assert report["heldout_nats"] == pytest.approx(np.log(4), abs=0.3)  # three steps away from uniform predictions
    weights = (out / "model" / "model.safetensors").read_bytes()
    assert run(capsys, *command, "--skip-unreadable", "--resume")[0] == 0
    assert (out / "model" / "model.safetensors").read_bytes() == weights
    assert "holds a run" in fails(capsys, 1, *command)  # before the broken picture is met
    half = (*command, "--skip-unreadable", "--resume", "--dtype", "bfloat16")
    assert run(capsys, *half)[0] == 0
    assert json.loads((out / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert len((out / "model" / "model.safetensors").read_bytes()) < 0.7 * len(weights)
    grid = tmp_path / "grid.png"
    assert run(capsys, "sample", "-n", 2, "--model", out / "model", "--out", grid)[0] == 0
    assert run(capsys, "complete", pictures / "3.png", "--model", out / "model", "--out", grid, "--force")[0] == 0


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_closed_streams(tmp_path: Path, closed: str) -> None:
    command = f"{sys.executable} -m igpt_fast sample -n 1 --out {tmp_path}/a.png {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    Image.open(tmp_path / "a.png").load()


def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m igpt_fast env | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", ["--help", "-V", "sample --help", "completion bash"])
def test_an_output_that_takes_nothing(words: str) -> None:
    """A pipe that nobody reads is left without a word, a full disk said in one line; with Python's buffer, as usual."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command, how = [sys.executable, "-m", "igpt_fast", *words.split()], {"env": environment, "stderr": -1, "text": True}
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as pipe:
        done = subprocess.run(command, stdout=pipe, check=False, **how)  # type: ignore[call-overload]
    assert (done.returncode, done.stderr) == (1, "")
    with open("/dev/full", "wb") as disk:
        done = subprocess.run(command, stdout=disk, check=False, **how)  # type: ignore[call-overload]
    assert done.returncode == 1
    assert re.fullmatch(r"igpt.*: No space left on device\n", done.stderr)
