"""What a command takes: the signature as the parser has it, what is misspelt, examples that can be typed."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from processor_time import processor_seconds

from igpt_fast.cli import help as help_module
from igpt_fast.cli import main as cli
from igpt_fast.cli.checks import UsageError
from igpt_fast.cli.commands import COMMANDS, GROUPS, load
from igpt_fast.cli.signature import checked_words, explained, nearest, options_of


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_and_the_parser_know_the_same_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """tyro's own help names what is parsed; nothing of it is unknown to ours, and nothing of ours to it."""
    with pytest.raises(SystemExit):
        tyro.cli(load(name), args=["--help"], prog="igpt", config=(tyro.conf.FlagCreatePairsOff,))
    parsed = set(re.findall(r"(?:^|[ ,])(--?[a-z][a-z0-9-]*)(?= [A-Z{]|,|  |\n| *│)", capsys.readouterr().out, re.M))
    ours = {word for option in options_of(load(name)) for word in option.switch or option.names}
    assert ours == parsed - {"-h", "--help"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_an_example_that_can_be_typed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    first, blank, *rest = text.splitlines()
    assert first.startswith("Example: ")
    assert blank == ""
    assert f"usage: igpt {name}" in text
    assert not re.search(r"\{None\}|\[\[|default: (True|None)|``", text)
    assert all(len(line) <= 120 for line in rest)
    for option in options_of(load(name)):
        assert option.text, option.name
        assert option.name.upper() in text if not option.names else (option.switch or option.names)[-1] in text
    words = re.search(r"igpt (.*?)\)?$", first)
    assert words is not None
    command, *more = shlex.split(words[1])
    assert command == name
    cli._parsed(name, more)


def test_groups_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help", "train"]) == 0
    text = capsys.readouterr().out
    places = [text.index(f"\n{part}") for part in ("options:", "How a directory", "The run:", "How it is computed")]
    assert places == sorted(places)
    assert re.search(r"\n  --no-flip +.*\n.*\(on; this turns it off\)", text)
    assert re.search(r"\n  --side INT  ", text)
    assert re.search(r"--seed INT .*\n.*\(default: 0\)", text)
    assert re.search(r"\nusage: igpt train \[DATA\] \[options\]\n", text)


def test_overview(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["-h"], ["help"], ["help", "help"]):
        assert cli.main(words) == 0
        out = capsys.readouterr().out
        assert out.startswith("Example: igpt sample ")
        for group, names in GROUPS.items():
            assert f"\n{group}:\n" in out
            assert all(re.search(rf"\n  {name} +[A-Z]", out) for name in names)
    for words in (["-V"], ["--version"]):
        assert cli.main(words) == 0
        assert re.fullmatch(r"igpt_fast \d+\.\d+\.\d+\n", capsys.readouterr().out)


MISTAKES = {
    "samle": "there is no command samle; did you mean sample?",
    "help trian": "there is no command trian; did you mean train?",
    "qqq": "there is no command qqq (see igpt --help)",
    "": "give a command: sample, ",
    "sample --sed 3": "there is no option --sed; did you mean --seed?",
    "sample --top_kk=3": "there is no option --top-kk; did you mean --top-k?",
    "train --stpes 3": "there is no option --stpes; did you mean --steps?",
    "train --flip": "there is no option --flip; it is on, and --no-flip turns it off",
    "sample --backend cud": "--backend is 'cud'; want one of auto, reference, cpu, cuda; did you mean cuda?",
    "sample --backend": "--backend is ''; want one of auto",
    "sample --dtype fp8": "--dtype is 'fp8'; want one of float32, bfloat16, float16, int8, fp8_values, fp8_cache, auto",
    "sample --device abacus": "--device is 'abacus'; want cpu, cuda, cuda:N or mps",
    "train --device cuda:x": "--device is 'cuda:x'",
    "sample -n x": "-n is 'x'; want a whole number",
    f"sample -n {'9' * 5000}": "want a whole number of 4,300 digits at most",
    "tokenize a --size 123456": "--size is '123456'; want HEIGHTxWIDTH, such as 32x32, or the edge of a square, of 1..",
    "sample --seed 1.5": "--seed is '1.5'; want a whole number",
    "sample --temperature warm": "--temperature is 'warm'; want a number",
    "sample -n 0": "-n is 0; want an integer in 1..16777216",
    "sample --out a.txt": "must end in .png",
    "sample --cfg-scale 2": "--cfg-scale has no effect without --label",
    "sample --top-p 3": "--top-p is 3",
    "train --holdout 3 .": "--holdout is 3.0",
    "train --lr -1": "--lr is -1",
    "train --json --resume --force": "give one of them",
    "complete": "at least one",
    "quantize --side 9999 a.png": "--side is 9999; want 0..4096",
    "finetune a": "DATA",
    "probe": "the bundled emoji are not probed",
    "score --by size": "--by is 'size'; want one of nats, ood",
    "convert a b --dtype int8": "--dtype is 'int8'; want one of float32, bfloat16, float16",
    "tokenize a --size 3by3": "--size is '3by3'",
    "completion fish": "fish",
}


def test_mistakes_of_usage_are_found_without_torch() -> None:
    """Which takes a second to import; in one process, for the sake of time."""
    code = f"""
import contextlib, io, shlex, sys
from igpt_fast.cli.main import main
for words, expected in {MISTAKES!r}.items():
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(shlex.split(words))
    text = said.getvalue()
    assert (code, expected in text, text.count(chr(10))) == (2, True, 1), (words, code, text)
    assert not {{"torch", "numpy", "PIL"}} & set(sys.modules), words
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.clock
def test_a_mistake_is_answered_at_once() -> None:
    assert min(processor_seconds("-m", "igpt_fast", "sample", "--sed", "3") for _ in range(3)) < 0.3


def test_only_the_chosen_command_is_imported() -> None:
    code = """
import sys
from igpt_fast.cli.main import main
main(["sample", "--sed", "3"])
found = {name.rpartition(".")[2] for name in sys.modules if name.startswith("igpt_fast.cli.commands.")}
assert found == {"sample"}, found
"""
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)


def test_words() -> None:
    train = load("train")
    for given, expected in {
        "a --compile --out b": "a --compile True --out b",
        "--no-compile": "--compile False",
        "--compile": "--compile True",
        "--compile reduce-overhead": "--compile reduce-overhead",
        "--compile=False": "--compile=False",
        "-k 3 --n_clusters 4": "-k 3 --n_clusters 4",
        "-- --nonsense": "-- --nonsense",
    }.items():
        assert checked_words(train, given.split()) == expected.split()
    with pytest.raises(UsageError, match="--compile is 'maybe'"):
        checked_words(train, ["--compile=maybe"])


def test_explained() -> None:
    text = """One.

    Args:
        a: First
            and more.
        b: ``second``.

    Returns:
        c: no.
    """
    assert explained(text) == {"a": "First and more.", "b": "second."}
    assert explained("One.") == {}
    assert nearest("sede", ["--seed", "seed"]) == "; did you mean seed?"
    assert nearest("zzz", ["seed"]) == ""


def test_lines_are_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, most in ((20, 60), (80, 80), (300, 120)):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = help_module.of_command("sample").splitlines()
        assert most - 12 < max(map(len, lines)) <= most + 30


def test_names_are_paths() -> None:
    (option,) = [one for one in options_of(load("train")) if one.name == "data"]
    assert (option.names, option.values, option.default) == ((), "DATA", None)
    assert Path(load("sample").__code__.co_filename).name == "sample.py"
