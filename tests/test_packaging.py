"""What stands in several places of the packaging agrees, and the files that other tools read can be read."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import igpt_fast

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="the tests run outside the repository")


def text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def project() -> dict:  # type: ignore[type-arg]
    return tomllib.loads(text("pyproject.toml"))


def test_one_version() -> None:
    version = igpt_fast.__version__
    assert re.search(r"^## (\S+)", text("CHANGELOG.md"), re.MULTILINE)[1] == version  # type: ignore[index]
    assert yaml.safe_load(text("CITATION.cff"))["version"] == version


def test_one_licence() -> None:
    names = project()["project"]["license"].split(" AND ")
    assert yaml.safe_load(text("CITATION.cff"))["license"] == names
    assert [(ROOT / name).is_file() for name in project()["project"]["license-files"]] == [True, True]


def test_wheels_for_the_pythons_that_are_declared() -> None:
    declared = project()["project"]
    built = {int(each.removeprefix("cp3").removesuffix("-*")) for each in project()["tool"]["cibuildwheel"]["build"]}
    named = {int(minor) for minor in re.findall(r"Python :: 3\.(\d+)", "\n".join(declared["classifiers"]))}
    assert min(built) == min(named) == int(declared["requires-python"].removeprefix(">=3."))
    assert named <= built


def test_no_wheel_brings_an_openmp_library() -> None:
    settings = project()["tool"]["cibuildwheel"]
    assert "--exclude libgomp.so.1" in settings["linux"]["repair-wheel-command"]
    assert "--exclude libomp.dylib" in settings["macos"]["repair-wheel-command"]
    assert settings["macos"]["environment"]["IGPT_OPENMP"] == "OFF"
    assert '"--exclude", "libgomp.so.1"' in text("tests/check_wheel.py")


@pytest.mark.parametrize(("name", "steps"), [("ci", {".ci/run"}), ("wheels", {"make wheel"})])
def test_workflows_run_what_is_here(name: str, steps: set[str]) -> None:
    jobs = yaml.safe_load(text(f".github/workflows/{name}.yml"))["jobs"]
    runs = {step["run"] for job in jobs.values() for step in job["steps"] if "run" in step}
    assert steps <= runs
    targets = set(re.findall(r"^([\w-]+):", text("Makefile"), re.MULTILINE))
    assert {run.split()[1] for run in runs if run.startswith("make ")} <= targets
    assert all(job["timeout-minutes"] for job in jobs.values())


def test_hooks_are_those_of_make_lint() -> None:
    (repository,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"  # nothing is downloaded
    tools = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in repository["hooks"]}
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", text("Makefile"), re.MULTILINE)[1]  # type: ignore[index]
    assert tools == set(re.findall(r"\$\(BIN\)/(\S+)", lint))
