"""Runs transformers' own tests of ImageGPT, from a folder that has them, on the classes of this package.

    python tests/compatibility/run_transformers_tests.py FOLDER [--target ours] [--select EXPRESSION] [--json]

FOLDER is a checkout of transformers, or as much of it as the tests import: ``tests/``, ``utils/test_module``,
``src/transformers/__init__.py``, ``conftest.py``, ``pyproject.toml``; of the version that is installed. ``--target``
says what stands in for transformers' classes in ``test_modeling_imagegpt.py``:

    control      nothing: transformers' own
    ours         igpt_fast's classes and configuration
    bridge       transformers' classes as ``igpt_fast.hf.to_transformers`` makes them, of our model
    accelerated  transformers' classes, each model passed through ``igpt_fast.hf.accelerate``

The last line counts what passed, failed and was skipped; ``--json`` prints one object with all names instead. The exit
status is 1 where something failed. docs/compatibility.md has what is expected to fail, and why.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

FILE = "tests/models/imagegpt/test_modeling_imagegpt.py"
CLASSES = ("ImageGPTForCausalImageModeling", "ImageGPTForImageClassification", "ImageGPTModel")


class Outcomes:
    """A plugin of pytest's that puts the classes into the module of tests, and keeps what became of each test."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.found: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
        self.reasons: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        modules = {item.module for item in items}
        for module in modules:
            substitute(module, self.target)

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.rpartition("::")[2]
        if type(report).__name__ == "SubtestReport" and report.outcome == "passed":
            return
        if report.when == "call" or report.outcome != "passed":
            listed = self.found[report.outcome]
            if name not in listed:
                listed.append(name)
            if report.outcome == "failed":
                crash = getattr(report.longrepr, "reprcrash", None)
                reason = str(report.longrepr) if crash is None else crash.message
                self.reasons.setdefault(name, reason.strip().partition("\n")[0][:300])


def substitute(module: Any, target: str) -> None:
    """Puts the target's classes into a module of transformers' tests."""
    names = replacements(target)
    for name, value in names.items():
        if hasattr(module, name):
            setattr(module, name, value)
    case = getattr(module, "ImageGPTModelTest", None)
    if case is not None and names:
        case.all_model_classes = tuple(names.get(cls.__name__, cls) for cls in case.all_model_classes)
        mapping = case.pipeline_model_mapping
        case.pipeline_model_mapping = {task: names.get(cls.__name__, cls) for task, cls in mapping.items()}


def replacements(target: str) -> dict[str, Any]:
    import transformers

    if target == "control":
        return {}
    import igpt_fast

    if target == "ours":
        register = getattr(igpt_fast.hf, "register", None)
        if register is not None:
            register()
        return {name: getattr(igpt_fast, name) for name in (*CLASSES, "ImageGPTConfig")}
    for name in CLASSES:
        remake(getattr(transformers, name), target)
    return {}


def remake(theirs: Any, target: str) -> None:
    """Has the instances of a class of transformers go through this package when they are made.

    Not those on the meta device, and not those with tied embeddings, which have no counterpart here.
    """
    import igpt_fast
    from igpt_fast import hf

    plain = theirs.__init__

    def __init__(self: Any, config: Any, *args: Any, **keywords: Any) -> None:
        plain(self, config, *args, **keywords)
        recomputes = self.is_activation_checkpointing
        meta = any(parameter.is_meta for parameter in self.parameters())
        if type(self) is not theirs or _busy or meta or config.tie_word_embeddings:
            return
        _busy.append(self)
        try:
            if target == "accelerated":
                hf.accelerate(self)
            else:
                ours = getattr(igpt_fast, theirs.__name__)(igpt_fast.ImageGPTConfig.of(config, "bridge"))
                ours.load_state_dict(self.state_dict())
                self._modules = hf.to_transformers(ours)._modules
                if recomputes:
                    self.activation_checkpointing_enable()
        finally:
            _busy.pop()

    theirs.__init__ = __init__


_busy: list[Any] = []  # whose twin is being made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", choices=("control", "ours", "bridge", "accelerated"), default="ours")
    parser.add_argument("--select", default="", help="an expression for pytest's -k")
    parser.add_argument("--json", action="store_true", help="print one object instead of a report")
    parser.add_argument("--traceback", default="no", help="pytest's --tb")
    arguments = parser.parse_args()
    if not (arguments.folder / FILE).is_file():
        parser.error(f"{arguments.folder} has no {FILE}")
    import pytest

    os.chdir(arguments.folder)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    outcomes = Outcomes(arguments.target)
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:warnings", "-c", "pyproject.toml"]
    options += [f"--tb={arguments.traceback}", *(["-k", arguments.select] if arguments.select else [])]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if arguments.json else sys.stdout):
        pytest.main([*options, FILE], plugins=[outcomes])
    failed = outcomes.found["failed"]
    outcomes.found["passed"] = [name for name in outcomes.found["passed"] if name not in failed]
    if arguments.json:
        reasons = {name: re.sub(r"0x[0-9a-f]+", "0x", reason) for name, reason in outcomes.reasons.items()}
        print(json.dumps({"target": arguments.target, **outcomes.found, "reasons": reasons}, indent=2))
    else:
        for name in failed:
            print(f"{name}: {outcomes.reasons.get(name, '')}")
        print(f"{arguments.target}: " + ", ".join(f"{len(names)} {word}" for word, names in outcomes.found.items()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
