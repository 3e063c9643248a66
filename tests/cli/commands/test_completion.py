"""Tab completion: what bash offers, asked of bash itself."""

import subprocess
from pathlib import Path

import pytest

from igpt_fast.cli import main as cli
from igpt_fast.cli.commands import COMMANDS


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["completion", "bash"]) == 0
    return capsys.readouterr().out


def offered(script: str, line: str, folder: Path) -> list[str]:
    words = line.split(" ")
    asked = f"COMP_WORDS=({' '.join(word or repr('') for word in words)}); COMP_CWORD={len(words) - 1}; _igpt"
    code = f'{script}\n{asked}\nprintf "%s\\n" "${{COMPREPLY[@]}}"; complete -p igpt'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    *found, declared = done.stdout.splitlines()
    assert declared == "complete -o default -F _igpt igpt"  # files where nothing else is offered
    return [word for word in found if word]


def test_what_bash_offers(script: str, tmp_path: Path) -> None:
    for line, expected in {
        "igpt sam": ["sample"],
        "igpt ": [*COMMANDS, "help"],
        "igpt help tra": ["train"],
        "igpt sample --see": ["--seed"],
        "igpt sample --backend c": ["cpu", "cuda"],
        "igpt train --no-f": ["--no-flip"],
        "igpt train --objective ": ["next_pixel", "masked"],
        "igpt completion z": ["zsh"],
        "igpt complete pho": [],
        "igpt sample --out ": [],
        "igpt nonsense --see": [],
    }.items():
        assert offered(script, line, tmp_path) == expected, line


def test_zsh_takes_it_through_its_own_emulation(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "zsh"]) == 0
    first, _, rest = capsys.readouterr().out.partition("\n")
    assert "bashcompinit" in first
    assert rest == script
