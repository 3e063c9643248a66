"""igpt tokenize: every kind of source, hostile ones too; going on after an interruption."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from igpt_fast.cli import main as cli
from igpt_fast.image.reading import read_middle, read_square
from igpt_fast.learning import pool
from igpt_fast.learning import tokenize as tokenize_module
from igpt_fast.learning.folders import tokens_from_images
from igpt_fast.learning.shards import ShardData
from igpt_fast.learning.sources.opening import open_source
from igpt_fast.learning.sources.protocol import MAX_FILE
from igpt_fast.learning.taking import Taking
from igpt_fast.learning.tokenize import tokenize

PALETTE = np.stack(np.meshgrid([-1, 1], [-1, 0, 1], [-1, 1]), -1).reshape(-1, 3).astype(np.float32)
HOW = Taking(4, 4, PALETTE, classes=True, holdout=0.0, shard_size=4)
CLASSES = ["bird", "cat"]
N = 10


def pixels(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (6, 5, 3), dtype=np.uint8)


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(i)).save(file, "PNG")
    return file.getvalue()


def names() -> list[str]:
    """Ordered as every source has them."""
    return sorted(f"{CLASSES[i % 2]}/{i:02d}.png" for i in range(N))


def number(name: str) -> int:
    return int(name[-6:-4])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in names():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number(name)))
    return tmp_path / "images"


def a_zip(path: Path) -> Path:
    with zipfile.ZipFile(path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names():
            archive.writestr(f"all/{name}", png(number(name)))
    return path / "a.zip"


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def a_tar(path: Path) -> Path:
    """WebDataset's, of two parts in a directory."""
    (path / "web").mkdir()
    for part in (0, 1):
        with tarfile.open(path / "web" / f"train-{part}.tar", "w") as archive:
            for name in names()[part * 5 : part * 5 + 5]:
                add(archive, f"{number(name):02d}.png", png(number(name)))
                if part:
                    add(archive, f"{number(name):02d}.cls", str(CLASSES.index(name.split("/")[0])).encode())
                else:
                    add(
                        archive,
                        f"{number(name):02d}.json",
                        json.dumps({"label": name[0] == "c"} | {"label": 0}).encode(),
                    )
    return path / "web"


def table() -> pa.Table:
    image = [{"bytes": png(number(name)), "path": "/etc/passwd"} for name in names()]
    label = [CLASSES.index(name.split("/")[0]) for name in names()]
    kind = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    text = json.dumps({"info": {"features": kind}})
    return pa.table({"image": image, "label": label}).replace_schema_metadata({"huggingface": text})


def a_parquet(path: Path) -> Path:
    (path / "hub" / "data").mkdir(parents=True)
    for part in (0, 1):
        target = path / "hub" / "data" / f"train-0000{part}-of-00002.parquet"
        pa.parquet.write_table(table().slice(part * 5, 5), target, row_group_size=2)
    return path / "hub"


def an_arrow(path: Path) -> Path:
    """As datasets.save_to_disk."""
    (path / "saved").mkdir()
    (path / "saved" / "state.json").write_text("{}")
    with pa.ipc.new_stream(str(path / "saved" / "data-00000-of-00001.arrow"), table().schema) as writer:
        writer.write_table(table(), max_chunksize=3)
    return path / "saved"


def an_npz(path: Path) -> Path:
    labels = [CLASSES.index(name.split("/")[0]) for name in names()]
    np.savez(path / "a.npz", images=np.stack([pixels(number(name)) for name in names()]), labels=labels)
    return path / "a.npz"


@pytest.mark.parametrize("source", [None, a_zip, a_tar, a_parquet, an_arrow, an_npz])
def test_every_kind_of_source(folder: Path, tmp_path: Path, source: Callable[[Path], Path] | None) -> None:
    path = folder if source is None else source(tmp_path)
    summary = tokenize(path, tmp_path / "out", HOW)
    assert (summary["images"], summary["shards"], summary["skipped"]) == (N, 3, 0)
    data = ShardData(tmp_path / "out", classes=True)
    wanted = tokens_from_images(folder, 4, len(PALETTE), 0.0, clusters=PALETTE, classes=True)
    tokens, labels = data.train_batch(range(N))
    assert torch.equal(tokens, wanted.tokens.long())
    assert torch.equal(labels, wanted.labels)  # type: ignore[arg-type]
    named = source not in (a_tar, an_npz)
    assert list(data.class_names) == (CLASSES if named else ["0", "1"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "clusters.npy", "heldout.npy", "labels.npy", "manifest.json", "shard-00000.npy", "shard-00001.npy",
        "shard-00002.npy", "skipped.jsonl",
    ]  # fmt: skip


def test_as_a_folder_is_read_by_itself(folder: Path, tmp_path: Path) -> None:
    """The fit, the held-out part and the tokens are those of ``tokens_from_images``, whoever decodes."""
    wanted = tokens_from_images(folder, 5, 7, 0.3)
    taking = Taking(5, 5, n_clusters=7, holdout=0.3, shard_size=3)
    for workers in (0, 2):
        tokenize(folder, tmp_path / str(workers), taking, workers=workers)
    data = ShardData(tmp_path / "2")
    assert torch.equal(data.heldout, wanted.heldout)
    assert 0 < data.n_heldout < N
    assert torch.equal(torch.cat([tokens for tokens, _ in data.heldout_batches(2)]), wanted.heldout_tokens.long())
    for path in (tmp_path / "0").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes(), path


def test_codes_come_from_an_array(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(0, 700, (9, 2, 3)).astype(np.int32)
    np.save(tmp_path / "codes.npy", codes)
    tokenize(tmp_path / "codes.npy", tmp_path / "out", Taking(vocabulary=700, holdout=0.0, shard_size=4))
    data = ShardData(tmp_path / "out")
    assert (data.height, data.width, data.vocabulary, data.tokenizer.clusters) == (2, 3, 700, None)
    assert np.array_equal(data.train_batch(range(9))[0].numpy(), codes.reshape(9, 6))
    with pytest.raises(ValueError, match=r"codes\.npy: token \d+ is not in 0\.\.99"):
        tokenize(tmp_path / "codes.npy", tmp_path / "b", Taking(vocabulary=100))


def test_grey_arrays_are_mapped_and_keep_their_size(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 2, 4), np.uint8))
    summary = tokenize(tmp_path / "a.npy", tmp_path / "out", Taking(clusters=PALETTE, holdout=0.0))
    assert (summary["height"], summary["width"]) == (2, 4)


def test_damaged_pictures_are_listed_and_skipped(folder: Path, tmp_path: Path) -> None:
    (folder / names()[1]).write_bytes(png(1)[:60])
    (folder / names()[6]).write_bytes(b"no picture")
    summary = tokenize(folder, tmp_path / "out", HOW)
    assert (summary["images"], summary["skipped"]) == (N - 2, 2)
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [names()[1], names()[6]]
    data = ShardData(tmp_path / "out", classes=True)
    kept = [name for name in names() if name not in (names()[1], names()[6])]
    assert data.labels is not None
    assert data.labels.tolist() == [CLASSES.index(name.split("/")[0]) for name in kept]


def test_nothing_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="images: no images in it"):
        tokenize(tmp_path / "images", tmp_path / "out", Taking())
    (tmp_path / "images" / "a.png").write_bytes(b"")
    for taking in (Taking(), Taking(clusters=PALETTE)):
        with pytest.raises(ValueError, match=r"none of .* can be read: a\.png"):
            tokenize(tmp_path / "images", tmp_path / "out", taking)
    assert not list((tmp_path / "out").glob("*"))


# ---- hostile archives -------------------------------------------------------------------------------------------


def test_a_tar_is_read_in_place(tmp_path: Path) -> None:
    """Links, devices and directions mean nothing; what is too large is left out unread."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "../../up.png", png(0))
        add(archive, "/absolute.png", png(1))
        for kind, name in (
            (tarfile.SYMTYPE, "link.png"),
            (tarfile.LNKTYPE, "hard.png"),
            (tarfile.CHRTYPE, "device.png"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    found = dict(open_source(tmp_path / "a.tar").pictures())
    assert list(found.values()) == [png(0), png(1)]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_zip_bomb_is_left_out(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(MAX_FILE + 1))
        archive.writestr("good.png", png(0))
    summary = tokenize(tmp_path / "a.zip", tmp_path / "out", Taking(4, 4, PALETTE, holdout=0.0))
    assert (summary["images"], summary["skipped"]) == (1, 1)
    assert "claims 67108865 bytes" in (tmp_path / "out" / "skipped.jsonl").read_text()


@pytest.mark.parametrize("make", [a_zip, a_tar, a_parquet, an_arrow, an_npz])
def test_a_damaged_archive_is_named(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    files = [path] if path.is_file() else [part for part in path.rglob("*.*") if part.suffix != ".json"]
    files[0].write_bytes(files[0].read_bytes()[:600])
    with pytest.raises(ValueError, match=files[0].name.replace(".", r"\.")) as caught:
        tokenize(path, tmp_path / "out", HOW)
    assert "\n" not in str(caught.value)


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy: not a usable"):
        open_source(tmp_path / "a.npy")


def test_a_compressed_tar_and_unknown_kinds(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        add(archive, "a.png", png(0))
    with pytest.raises(ValueError, match=r"a\.tar: .*is compressed"):
        open_source(tmp_path / "a.tar")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"a\.txt: want a directory of images"):
        open_source(tmp_path / "a.txt")


def test_labels_out_of_range(tmp_path: Path) -> None:
    features = json.dumps({"info": {"features": {"label": {"names": ["a"], "_type": "ClassLabel"}}}})
    rows = pa.table({"image": [png(0), png(1)], "label": [0, 3]}).replace_schema_metadata({"huggingface": features})
    pa.parquet.write_table(rows, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: image 1 has the label 3, which is not in 0\.\.0"):
        tokenize(tmp_path / "a.parquet", tmp_path / "out", HOW)
    assert not (tmp_path / "out").exists()


# ---- going on -----------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize(folder, tmp_path / "whole", HOW)
    real, made = tokenize_module._make_shard, []

    def stopped(out: Path, number: int, *rest: Any) -> Any:
        if number == 2 and len(made) == 2:
            raise KeyboardInterrupt
        made.append(number)
        return real(out, number, *rest)

    monkeypatch.setattr(tokenize_module, "_make_shard", stopped)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        tokenize(folder, out, HOW)
    assert sorted(path.name for path in out.iterdir()) == [
        "clusters.npy", "plan.json", "shard-00000.json", "shard-00000.npy", "shard-00001.json", "shard-00001.npy"
    ]  # fmt: skip
    with pytest.raises(FileExistsError, match="holds shards already"):
        tokenize(folder, out, HOW)
    with pytest.raises(ValueError, match=r"plan\.json: made of something else: holdout was 0\.0, is 0\.5"):
        tokenize(folder, out, Taking(4, 4, PALETTE, classes=True, holdout=0.5, shard_size=4), resume=True)
    with pytest.raises(ValueError, match="colours was"):
        tokenize(folder, out, Taking(4, 4, -PALETTE, classes=True, holdout=0.0, shard_size=4), resume=True)
    made.append(-1)
    tokenize(folder, out, HOW, resume=True)
    assert made == [0, 1, -1, 2]
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes(), path
    assert tokenize(folder, out, HOW, resume=True)["images"] == N  # nothing is left to do
    (folder / names()[0]).write_bytes(png(3) + b"x")
    with pytest.raises(ValueError, match=r"manifest\.json: made of something else: the source differs"):
        tokenize(folder, out, HOW, resume=True)


def test_other_files_are_left_alone(folder: Path, tmp_path: Path) -> None:
    tokenize(folder, tmp_path / "out", HOW)
    (tmp_path / "out" / "mine.txt").write_text("mine")
    tokenize(folder, tmp_path / "out", Taking(4, 4, PALETTE, holdout=0.0), overwrite=True)
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert left == ["clusters.npy", "heldout.npy", "manifest.json", "mine.txt", "shard-00000.npy", "skipped.jsonl"]


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["labels.npy", "manifest.json", "shard-00002.npy", "shard-00000.json", "plan.json"])
def test_files_of_others_are_not_overwritten(folder: Path, tmp_path: Path, name: str, overwrite: bool) -> None:
    out = tmp_path / "out"
    if overwrite and name != "manifest.json":
        tokenize(folder, out, Taking(4, 4, PALETTE, holdout=0.0, shard_size=N))  # of one shard, without classes
    out.mkdir(exist_ok=True)
    (out / name).write_text("{}")
    before = listing(out)
    with pytest.raises(FileExistsError, match=f"{name}: exists, and was not written by igpt tokenize") as caught:
        tokenize(folder, out, HOW, overwrite=overwrite)
    assert "\n" not in str(caught.value)
    assert listing(out) == before


def test_a_source_among_the_shards_is_kept(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((9, 4), np.uint8))
    taking = Taking(vocabulary=8, holdout=0.0)
    tokenize(tmp_path / "a.npy", tmp_path / "out", taking)
    before = listing(tmp_path / "out")
    with pytest.raises(ValueError, match=r"shard-00000\.npy: would be overwritten, being the source"):
        tokenize(tmp_path / "out" / "shard-00000.npy", tmp_path / "out", taking, overwrite=True)
    assert listing(tmp_path / "out") == before


def test_a_manifest_cannot_name_the_files_of_others(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tokenize(folder, out, HOW)
    for path in (tmp_path / "mine.txt", out / "mine.txt"):
        path.write_text("mine")
    values = json.loads((out / "manifest.json").read_text())
    values["sha256"] |= {"mine.txt": "", "../mine.txt": "", str(tmp_path / "mine.txt"): ""}
    (out / "manifest.json").write_text(json.dumps(values))
    tokenize(folder, out, HOW, overwrite=True)
    assert (out / "mine.txt").exists()
    assert (tmp_path / "mine.txt").exists()


def test_what_is_interrupted_while_it_removes_can_be_begun_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = tokenize(folder, out, HOW)
    removed: list[Path] = []

    def unlink(path: Path, missing_ok: bool = False, real: Any = Path.unlink) -> None:
        if path.parent == out and len(removed) == 5:
            raise KeyboardInterrupt
        removed.append(path)
        real(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            tokenize(folder, out, HOW, overwrite=True)
    assert tokenize(folder, out, HOW, overwrite=True)["images"] == first["images"]


def test_a_failure_removes_what_it_wrote_alone(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    (tmp_path / "out").mkdir()
    for name in ("labels.npy", "12345.json", "shard-00001.npy", ".mine.0123456789abcdef.partial"):
        (tmp_path / "out" / name).write_text("mine")
    before = listing(tmp_path / "out")
    with pytest.raises(ValueError, match="can be read"):
        tokenize(tmp_path / "images", tmp_path / "out", Taking(4, 4, PALETTE, holdout=0.0))
    assert listing(tmp_path / "out") == before


@pytest.mark.parametrize("what", ["gone", "cut", "another", "note"])
def test_resuming_makes_a_damaged_shard_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    out = tmp_path / "out"
    tokenize(folder, tmp_path / "whole", HOW)
    monkeypatch.setattr(tokenize_module._Making, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tokenize(folder, out, HOW)
    monkeypatch.undo()
    (out / ".mine.0123456789abcdef.partial").touch()
    (out / ".shard-00001.npy.0123456789abcdef.partial.npy").touch()  # of a process that was killed
    shard = out / "shard-00001.npy"
    {
        "gone": shard.unlink,
        "cut": lambda: shard.write_bytes(shard.read_bytes()[:-1]),
        "another": lambda: shard.write_bytes((out / "shard-00000.npy").read_bytes()),
        "note": lambda: shard.with_suffix(".json").write_text("{}"),
    }[what]()
    tokenize(folder, out, HOW, resume=True)
    assert listing(out) == listing(tmp_path / "whole") | {".mine.0123456789abcdef.partial": b""}


@pytest.mark.parametrize("name", ["shard-00001.npy", "labels.npy"])
def test_resuming_what_is_finished_looks_at_it(folder: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    tokenize(folder, out, HOW)
    content = bytearray((out / name).read_bytes())
    content[-1] ^= 1
    (out / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: is damaged"):
        tokenize(folder, out, HOW, resume=True)
    (out / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        tokenize(folder, out, HOW, resume=True)


def _array_of(path: Path, labels: list[int]) -> Path:
    np.savez(path / "a.npz", images=np.zeros((len(labels), 4, 4), np.uint8), labels=labels)
    return path / "a.npz"


@pytest.mark.parametrize(
    ("labels", "holdout", "reason"),
    [
        ([0, 2, 0], 0.0, "class '1' has no image to train on"),
        ([0, 0, 0], 0.999999, "holdout 0.999999 leaves none of the 3 images to train on"),
    ],
)
def test_what_cannot_be_trained_on_shows_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: list[int], holdout: float, reason: str
) -> None:
    monkeypatch.setattr(tokenize_module, "_make_shard", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=rf"a\.npz: {reason}"):
        tokenize(_array_of(tmp_path, labels), tmp_path / "out", Taking(4, 4, PALETTE, None, None, True, holdout))
    assert not (tmp_path / "out").exists()


def test_a_class_with_a_name_of_two_lines(tmp_path: Path) -> None:
    rows = pa.table({"image": [png(0), png(1)], "label": ["a\n", "b"]})
    pa.parquet.write_table(rows, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: a class is called 'a\\n'") as caught:
        tokenize(tmp_path / "a.parquet", tmp_path / "out", HOW)
    assert "\n" not in str(caught.value)


def test_a_class_of_which_no_image_can_be_read(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "cat").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="images: class 'cat' has no image to train on"):
        tokenize(folder, tmp_path / "out", HOW)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_killed_process_is_said() -> None:
    with pytest.raises(RuntimeError, match="a process that decodes was killed"):
        list(pool.in_processes(os._exit, iter([(9,)]), 1))


def test_a_full_disk_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "clusters.npy", PALETTE)
    how = ["--clusters", tmp_path / "clusters.npy", "--size", "64", "--workers", "0", "--out", tmp_path / "out"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        code = cli.main(["tokenize", str(folder), *map(str, how)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    captured = capsys.readouterr()
    assert (code, captured.out) == (1, "")
    assert captured.err.count("\n") == 1
    assert "out: File too large" in captured.err or "shard-00000.npy: File too large" in captured.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clusters.npy", "plan.json"]


def test_ctrl_c_ends_every_process(folder: Path, tmp_path: Path) -> None:
    for i in range(N, 400):
        (folder / f"{i:04d}.png").write_bytes(png(i % N))
    command = [sys.executable, "-m", "igpt_fast", "tokenize", str(folder), "--out", str(tmp_path / "out")]
    command += ["--workers", "2", "--shard-size", "10", "--size", "8", "-k", "4"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    while "tokenized" not in (line := process.stderr.readline()):
        assert line or process.poll() is None, line
    os.killpg(process.pid, signal.SIGINT)
    rest = process.stderr.read()  # which ends when every process has
    assert process.wait() == 130
    assert [line for line in rest.splitlines() if "tokenized" not in line] == ["igpt tokenize: interrupted"]
    assert not list((tmp_path / "out").glob(".*"))
    assert (tmp_path / "out" / "plan.json").exists()


# ---- the command line ---------------------------------------------------------------------------------------


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def igpt(*args: object) -> tuple[int, str, str]:
        code = cli.main(["tokenize", *map(str, args)])
        return code, *capsys.readouterr()

    out = tmp_path / "out"
    code, printed, _ = igpt(folder, "--out", out, "--size", "3x4", "-k", 6, "--classes", "--workers", 0, "--json")
    values = json.loads(printed)
    assert code == 0
    assert (values["images"], values["height"], values["width"], values["vocabulary"], values["classes"]) == (
        10,
        3,
        4,
        6,
        2,
    )
    for code, arguments, reason in (
        (1, [folder, "--out", out], "holds shards already"),
        (1, [tmp_path / "none"], "none: no such file"),
        (2, [folder, "--size", "3x"], "--size is '3x'"),
        (2, [folder, "--size", "9999"], "--size is 9999; want 1..4096"),
        (2, [folder, "-k", "4", "--vocabulary", "9"], "--n-clusters and --vocabulary exclude each other"),
        (2, [folder, "--holdout", "1"], "--holdout is 1.0"),
        (2, [folder, "--resume", "--force"], "give one of them"),
        (1, [folder, "--out", tmp_path / "new", "--resume"], "nothing to resume"),
    ):
        got, printed, err = igpt(*arguments)
        assert (got, printed, err.count("\n")) == (code, "", 1), err
        assert reason in err


def test_where_there_is_no_affinity(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 500)
    monkeypatch.setattr(tokenize_module, "tokenize", lambda *_, workers, **__: seen.append(workers) or 1 / 0)
    cli.main(["tokenize", str(folder), "--out", str(tmp_path / "out")])
    assert seen == [32]


def test_one_process_of_several_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["tokenize", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "start one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- large JPEGs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path: Path, orientation: int) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(coarse).resize((1000, 700), Image.Resampling.BICUBIC).save(
        tmp_path / "a.jpg", quality=90, exif=exif
    )
    exact = read_square(tmp_path / "a.jpg", 32).astype(float)
    quick = read_middle(tmp_path / "a.jpg", 32, 32).astype(float)
    # Turned, it is decoded as a whole.
    assert (orientation == 6) == np.array_equal(exact, quick)
    assert ((exact - quick) ** 2).mean() < 255**2 * 10**-4.0  # 40 dB
    assert np.array_equal(read_middle((tmp_path / "a.jpg").read_bytes(), 32, 32), quick)
