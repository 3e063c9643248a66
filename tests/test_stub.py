"""``_C.pyi`` says what the compiled module has: the same names, members and parameters by name."""

import ast
import re
from pathlib import Path

import pytest

import igpt_fast
from igpt_fast import backend

ROOT = Path(__file__).resolve().parents[1]
STUB = ast.parse((Path(igpt_fast.__file__).parent / "_C.pyi").read_text("utf-8"))
TYPES = {"Source", "Launch"}  # of the stub alone


def members(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    named = {node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return named | {ast.unparse(node.target): node for node in body if isinstance(node, ast.AnnAssign)}


def of_cuda() -> set[str]:
    text = (ROOT / "csrc" / "bind" / "cuda.cpp").read_text("utf-8")
    return set(re.findall(r'\bdef(?:<\w+>\(m, |\()"(\w+)"', text))


@pytest.fixture(scope="module")
def module() -> object:
    if backend._C is None:
        pytest.skip(backend.native_reason)
    return backend._C


def public(item: object) -> set[str]:
    return {name for name in dir(item) if not name.startswith("_")}


@pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="the tests run outside the repository")
def test_names(module: object) -> None:
    stub, cuda = set(members(STUB.body)) - TYPES, of_cuda()
    assert {"gemv_cuda", "make_stream", "attention_decode_splits"} <= cuda <= stub
    assert public(module) == (stub if backend._C.has_cuda else stub - cuda)  # type: ignore[union-attr]


def parameters(function: ast.FunctionDef) -> list[str]:
    """Their names; of those that have none for the caller ``arg``, as pybind11 writes arg0, arg1 and so on."""
    unnamed = ["self" if each.arg == "self" else "arg" for each in function.args.posonlyargs]
    return unnamed + [re.sub(r"arg\d+", "arg", each.arg) for each in function.args.args + function.args.kwonlyargs]


def check(function: ast.FunctionDef, built: object) -> None:
    """pybind11 writes the signature of a function into its first line of documentation."""
    if not isinstance(built, property):
        line = (built.__doc__ or "").splitlines()[0]
        (found,) = ast.parse(f"def {line}: ...").body
        assert isinstance(found, ast.FunctionDef)
        assert parameters(found) == parameters(function), line


def test_members_and_parameters(module: object) -> None:
    for name, node in members(STUB.body).items():
        if not hasattr(module, name) or name in TYPES:
            continue
        built = getattr(module, name)
        if isinstance(node, ast.FunctionDef):
            check(node, built)
        elif isinstance(node, ast.ClassDef):
            inside = members(node.body)
            assert public(built) == set(inside) - {"__init__"}, name
            for key, function in inside.items():
                assert isinstance(function, ast.FunctionDef)
                check(function, getattr(built, key))
