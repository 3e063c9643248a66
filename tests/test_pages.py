"""Every block of README.md and docs/ that is marked sh or python runs, in order, in one folder a page.

The folder has what a reader would bring, small: a photograph, a mask, pictures, some with classes, tokens; the hub's
name stands for a tiny checkpoint. ``igpt`` lines call the command's entry point in this process, under --soak the
installed command. Long commands get smaller settings (``SMALLER``), which the page does not show. A block with a
comment ``<!-- not run: REASON -->`` in front is left out.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_models import small

from igpt_fast import ImageGPTForImageClassification, ImageGPTImageProcessor
from igpt_fast.cli import main as cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN_ELSEWHERE = {"transformers"}  # by tests/hf/test_recipes.py, which looks at what comes out
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S.* -->\n\Z")
COLOURS, SIDE = 16, 8
SMALLER = {
    r" --steps \d+": "",
    r"\bigpt train\b": "igpt train --steps 2 --batch-size 4 --n-layer 2 --n-embd 32 --n-head 2",
    r"\bigpt finetune\b": "igpt finetune --steps 2 --batch-size 4",
    r"-k \d+": f"-k {COLOURS}",
    r"--side \d+": f"--side {SIDE}",
    r"--size \d+x\d+": f"--size {SIDE}x{SIDE}",
    r"openai/imagegpt-small": "checkpoint",
}


@dataclass(frozen=True)
class Block:
    """A block of a page: where it begins, what it is written in, its text, and why it is not run."""

    line: int
    language: str
    text: str
    skipped: bool

    def smaller(self) -> str:
        text = self.text
        for pattern, replacement in SMALLER.items():
            text = re.sub(pattern, replacement, text)
        return text


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, at.start()) + 1, at[1], at[2], NOT_RUN.search(text[: at.start()]) is not None)
        for at in FENCE.finditer(text)
    ]


def pictures(folder: Path, count: int, seed: int) -> None:
    """So many PNG files of 24x24 pixels, smooth, with many colours."""
    folder.mkdir(parents=True)
    rough = np.random.default_rng(seed).integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    for number, pixels in enumerate(rough):
        Image.fromarray(pixels).resize((24, 24), Image.Resampling.BICUBIC).save(folder / f"{number:02}.png")


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader brings, in one folder."""
    folder = tmp_path_factory.mktemp("brought")
    for number, name in enumerate(("pictures", "usual", "strange", "labelled/cat", "labelled/dog")):
        pictures(folder / name, 40 if name in ("pictures", "labelled/cat", "labelled/dog") else 6, number)
    Image.open(folder / "pictures/00.png").resize((80, 60)).save(folder / "photo.jpg")
    hole = np.full((16, 16), 255, dtype=np.uint8)
    hole[5:11, 5:11] = 0
    Image.fromarray(hole).save(folder / "hole.png")
    with tarfile.open(folder / "pictures.tar", "w") as tar:
        tar.add(folder / "labelled", arcname="")
    np.save(folder / "codes.npy", np.random.default_rng(0).integers(0, 99, (40, SIDE, SIDE)))
    sizes = {"vocab_size": COLOURS + 1, "n_positions": SIDE * SIDE, "n_embd": 16, "n_layer": 12, "num_labels": 10}
    small(head=ImageGPTForImageClassification, spread=0.05, **sizes).save_pretrained(folder / "checkpoint")
    clusters = np.random.default_rng(0).uniform(-1, 1, (COLOURS, 3)).astype(np.float32)
    ImageGPTImageProcessor(clusters=clusters, size=SIDE).save_pretrained(folder / "checkpoint")
    return folder


@pytest.fixture
def folder(brought: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new folder with it, where the test stands."""
    for item in brought.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def shell(text: str, installed: bool) -> None:
    """Runs commands; those of igpt here, unless it is to be the installed one, and all lines of others by a shell."""
    lines = text.replace("\\\n", " ").splitlines()
    if installed or not all(line.startswith("igpt ") for line in lines):
        done = subprocess.run(["sh", "-eu", "-c", text], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}"
        return
    for line in lines:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = cli.main(shlex.split(line, comments=True)[1:])
        assert code == 0, f"{line}: {said.getvalue()}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in PAGES if page.stem not in RUN_ELSEWHERE], ids=lambda page: page.stem)
def test_blocks_run(page: Path, request: pytest.FixtureRequest) -> None:
    runnable = [block for block in blocks(page) if not block.skipped and block.language in ("sh", "python")]
    if not runnable:
        return
    request.getfixturevalue("folder")
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in runnable:
        where = f"{page.name}:{block.line}"
        try:
            if block.language == "sh":
                shell(block.smaller(), request.config.getoption("--soak"))
            else:
                exec(compile(block.smaller(), where, "exec"), namespace)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{where}: {error}") from error


def test_blocks_say_what_they_are() -> None:
    """No block is passed over because it has no language, or is indented, and each that is not run has a reason."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found = blocks(page)
        assert text.count("```") == 2 * len(found), page
        assert {block.language for block in found} <= {"sh", "python", "text"}, page
        assert sum(block.skipped for block in found) == text.count("<!-- not run"), page
        outside = FENCE.sub("", text)
        assert page.name == "api.md" or not re.search(r"^\n {4}\S", outside, re.MULTILINE), page


def test_links_lead_somewhere() -> None:
    """Of the pages that are no part of the site, too, whose own links make docs looks at."""
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
