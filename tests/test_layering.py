"""Who may use whom: the layers of CONTRIBUTING.md, read off the imports and includes of every source file.

Imports inside functions count; imports for type checkers alone (``if TYPE_CHECKING``) do not.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "igpt_fast"

# One file for each op, or for a few that belong together.
OPS = {f"ops.{path.stem}" for path in (PACKAGE / "ops").glob("*.py")}
OPS -= {"ops.__init__", "ops.dispatch", "ops.colour_table"}
DECODERS = ("protocol", "plain_model", "reference_decoder", "cpu_decoder", "cuda_step", "cuda_decoder")
# Module -> modules of the package that it may import, bottom up. A new module needs a line here.
LAYERS: dict[str, set[str]] = {
    # the ground: no module of the package
    "__init__": set(),
    "files": set(),
    "config": {"files"},
    "reference": set(),
    "cache": set(),
    # ops
    "backend": {"__init__"},
    "ops.dispatch": {"backend"},
    "ops.colour_table": {"backend", "ops.dispatch"},
    **{name: {"backend", "reference", "ops.dispatch", "ops.colour_table"} for name in OPS},
    "ops.__init__": OPS | {"ops.colour_table"},
    # the model; generation may use the reference's random streams, which have no twin
    "outputs": {"cache"},
    "trainable": set(),
    "weights": {"files"},
    "checkpoint": {"config", "files", "weights"},
    "layers": {"cache", "config", "ops.__init__"},
    "packed": {"backend"},
    "decoders.protocol": set(),
    "decoders.plain_model": {"layers", "ops.__init__"},
    "decoders.reference_decoder": {"cache", "decoders.protocol"},
    "decoders.cpu_decoder": {
        *("backend", "decoders.plain_model", "decoders.protocol", "ops.activation", "ops.dispatch", "packed"),
    },
    "decoders.cuda_step": {
        *("backend", "decoders.plain_model", "ops.__init__", "ops.activation", "ops.attention_decode"),
    },
    "decoders.cuda_decoder": {
        *("backend", "cache", "ops.__init__", "ops.activation", "ops.attention_decode"),
        *("decoders.cuda_step", "decoders.plain_model", "decoders.protocol"),
    },
    "decoders.__init__": {"backend", *(f"decoders.{name}" for name in DECODERS)},
    "forwards": {"backend", "decoders.__init__", "ops.__init__", "ops.dispatch", "packed"},
    "generation": {"decoders.__init__", "ops.__init__", "reference"},
    "batches": {"decoders.__init__"},
    "mixin": {"batches", "generation"},
    "model": {
        *("backend", "cache", "checkpoint", "config", "forwards"),
        *("layers", "mixin", "ops.__init__", "outputs", "trainable"),
    },
    # images
    "clusters": {"files", "ops.__init__"},
    "pictures": {"clusters", "files"},
    "settings": {"clusters", "pictures"},
    "processor": {"clusters", "config", "files", "ops.__init__", "pictures", "settings"},
    "image": {"clusters", "pictures", "processor"},
    # what people call
    "inpainting": {"reference"},
    "results": {"generation", "image"},
    "streaming": {"batches", "generation", "inpainting", "model", "results"},
    "pipeline": {"decoders.__init__", "generation", "image", "inpainting", "model", "results", "streaming"},
    "hf": {"checkpoint", "config", "model"},
    "recipes.__init__": set(),
    "recipes.settings": set(),
    "recipes.data": {"clusters", "files", "image"},
    "recipes.emoji": {"clusters", "image", "recipes.data"},
    "recipes.state": {"files", "model", "recipes.data", "recipes.settings", "weights"},
    "recipes.output": {"files", "recipes.state"},
    "recipes.train": {
        *("config", "files", "image", "model", "ops.__init__", "pipeline"),
        *("recipes.data", "recipes.output", "recipes.settings", "recipes.state"),
    },
    "terminal": {"backend", "clusters", "image", "pipeline"},
    "options": {"generation", "image", "inpainting", "pipeline", "terminal"},
    "exports": {"files", "image", "options", "results", "terminal"},
    "preview": set(),
    "sharding": set(),
    "drawing": {
        *("__init__", "exports", "image", "options", "pipeline", "preview", "sharding", "streaming", "terminal"),
    },
    "commands": {
        *("backend", "clusters", "drawing", "exports", "files", "generation", "hf", "image", "options", "pipeline"),
        *("sharding", "terminal"),
        *("recipes.data", "recipes.settings", "recipes.train"),
    },
    "cli": {"__init__", "commands", "sharding", "terminal"},
    "__main__": {"cli"},
}
# What may be imported from outside, where that is part of a module's promise.
OUTSIDE: dict[str, set[str]] = {
    "__init__": set(),
    "config": set(),
    "reference": {"torch"},
    **{name: {"torch"} for name in (*OPS, "ops.colour_table", "ops.dispatch")},
    "cache": {"torch"},
    "model": {"torch"},
    "trainable": {"torch"},
    "layers": {"torch"},
    **{f"decoders.{name}": {"torch"} for name in ("__init__", *DECODERS)},
    "forwards": {"torch"},
    "generation": {"torch"},
    "batches": {"torch"},
    "mixin": {"torch"},
    "backend": {"torch", "numpy"},
    "hf": {"torch", "transformers"},
    "recipes.settings": set(),
}
# Distributions that only these modules import.
ONLY = {
    "transformers": {"hf"},
    "sklearn": {"clusters", "recipes.probe"},
    "tyro": {"cli", "commands", "options"},
    "huggingface_hub": {"files", "checkpoint"},
    "safetensors": {"weights", "checkpoint"},
}
# Our own variables, and those of others' conventions: terminals', torchrun's.
ENVIRONMENT = {
    "backend": {"IGPT_FAST_BACKEND", "IGPT_FAST_ISA"},
    "preview": {"NO_COLOR", "TERM"},
    "sharding": {"LOCAL_RANK", "RANK", "WORLD_SIZE"},
}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "__pycache__" not in path.parts
}


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def nodes(tree: ast.AST, functions: bool = True) -> list[ast.AST]:
    """Nodes that run: without blocks for type checkers and, if asked, without the bodies of functions."""
    found: list[ast.AST] = []
    for child in ast.iter_child_nodes(tree):
        if is_for_type_checkers(child):
            found += [node for branch in child.orelse for node in (branch, *nodes(branch, functions))]  # type: ignore[attr-defined]
        elif functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            found += [child, *nodes(child, functions)]
    return found


def imports(name: str, functions: bool = True) -> tuple[set[str], set[str]]:
    """(modules of the package, distributions outside the standard library) that a module imports."""
    inside: set[str] = set()
    outside: set[str] = set()
    for node in nodes(ast.parse(MODULES[name].read_text("utf-8")), functions):
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in full:
            first, _, rest = target.partition(".")
            if first == "igpt_fast":
                inside.add(module_of(rest))
            elif first not in sys.stdlib_module_names:
                outside.add(first)
    return inside - {name}, outside


def module_of(path: str) -> str:
    """``recipes.data.load_tokens`` -> ``recipes.data``; a name of the package itself -> ``__init__``."""
    parts = path.split(".") if path else []
    while parts and ".".join(parts) not in MODULES:
        if ".".join([*parts, "__init__"]) in MODULES:
            return ".".join([*parts, "__init__"])
        parts.pop()
    return ".".join(parts) or "__init__"


def test_every_module_has_its_line() -> None:
    assert set(MODULES) <= set(LAYERS), f"add to LAYERS: {set(MODULES) - set(LAYERS)}"


@pytest.mark.parametrize("name", MODULES)
def test_imports_within_the_package(name: str) -> None:
    inside, _ = imports(name)
    assert inside <= LAYERS.get(name, set()), f"{name} may not import {inside - LAYERS.get(name, set())}"


@pytest.mark.parametrize("name", MODULES)
def test_imports_from_outside(name: str) -> None:
    _, outside = imports(name)
    if name in OUTSIDE:
        assert outside <= OUTSIDE[name], f"{name} may not import {outside - OUTSIDE[name]}"
    for distribution, owners in ONLY.items():
        assert distribution not in outside or name in owners, f"{name} may not import {distribution}"


def test_the_layers_have_no_circle() -> None:
    done: set[str] = set()
    for name, below in LAYERS.items():
        assert below <= done, f"{name} stands before {below - done} in LAYERS"
        done.add(name)


@pytest.mark.parametrize("heavy", ["torch", "numpy", "PIL", "transformers"])
def test_the_command_line_starts_without(heavy: str) -> None:
    """Through everything that is imported before a command runs."""
    seen, todo = set(), ["cli", "__init__"]
    while todo:
        name = todo.pop()
        if name in seen or name not in MODULES:
            continue
        seen.add(name)
        inside, outside = imports(name, functions=False)
        assert heavy not in outside, f"{name} imports {heavy} at module level, and cli imports {name}"
        todo += inside
        todo += [f"{name.rpartition('.')[0]}.__init__"] if "." in name else []


@pytest.mark.parametrize("name", MODULES)
def test_environment_variables(name: str) -> None:
    """Each read by name, through os.environ, in one module."""
    tree = ast.parse(MODULES[name].read_text("utf-8"))
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")]
    read = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "os.environ.get"
        and isinstance(node.args[0], ast.Constant)
    }
    assert read <= ENVIRONMENT.get(name, set())
    assert len(uses) == len(read), f"{name} uses the environment in another way than os.environ.get(NAME)"


# ---- C++ and CUDA -------------------------------------------------------------------------------------------

SOURCES = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in (".cpp", ".cu", ".h", ".cuh", ".in")]


# Where the host compiler takes the emulator in nvcc's place.
EMULATED = {
    ("launch.cuh", "../emulator/emulator.h"),
    ("launch.cuh", "../emulator/record.h"),
    ("memory.cuh", "../emulator/memory.h"),
    ("ptx.cuh", "../emulator/ptx.h"),
    ("hopper.cuh", "../emulator/hopper.h"),
}


def includes(path: Path) -> set[str]:
    return set(re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text("utf-8"), re.MULTILINE))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_includes(path: Path) -> None:
    folder = path.relative_to(ROOT / "csrc").parts[0]
    for name in includes(path):
        parts = name.split("/")
        assert not {"torch", "ATen", "c10"} & set(parts), f"{path.name} includes torch"
        if folder != "bind" and path.name not in ("bind_emulator.h", "module.cpp"):
            assert parts[0] not in ("pybind11", "Python.h"), f"{path.name} includes {name}; only the bindings may"
        if folder in ("cpu", "cuda"):
            other = {"cpu": "cuda", "cuda": "cpu"}[folder]
            assert other not in parts, f"{folder}/{path.name} includes {name}"
        if "bodies" in parts:
            assert path.parent.name == "isa", f"{path.name} includes {name}: bodies are compiled for an instruction set"
        if folder == "bind" and parts[0] == "cuda":
            assert name == "cuda/ops.h", f"{path.name} sees of CUDA its ops.h alone"
        if folder != "emulator" and "emulator" in parts:
            assert (path.name, name) in EMULATED, f"{path.name} includes {name}: the emulator is for tests"


def test_the_emulator_is_behind_a_switch() -> None:
    """nvcc sees nothing of it, and no build but the tests' compiles it."""
    for name, include in EMULATED:
        text = (ROOT / "csrc" / "cuda" / name).read_text("utf-8")
        before, _, _ = text.partition(f'#include "{include}"')
        open_branches: list[str] = []
        for kind, condition in re.findall(r"^#(if|ifdef|ifndef|else|endif)\b[ ]*(.*)$", before, re.MULTILINE):
            if kind == "endif":
                open_branches.pop()
            elif kind == "else":
                open_branches[-1] = f"not {open_branches[-1]}"
            else:
                open_branches.append(f"{kind} {condition}".replace("ifndef", "not ifdef"))
        assert open_branches == ["not ifdef __CUDACC__"], name
    assert "emulator" not in (ROOT / "CMakeLists.txt").read_text("utf-8")


def test_kernels_declare_shared_memory_and_launch_in_one_place() -> None:
    """What the emulator does not see it cannot check."""
    for path in sorted((ROOT / "csrc" / "cuda").iterdir()):
        if path.name != "launch.cuh":
            assert not re.search(r"__shared__|<<<", path.read_text("utf-8")), path.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_neither_read_the_environment_nor_end_the_process(path: Path) -> None:
    assert not re.search(r"\b(getenv|exit|abort|_exit)\s*\(", path.read_text("utf-8"))


def test_bodies_of_instruction_sets_use_nothing_of_the_standard_library() -> None:
    """An inline function of a header compiled for AVX-512 could become everybody's; see csrc/cpu/ops.h."""
    allowed = {"cstddef", "cstdint", "immintrin.h"}
    isa = ROOT / "csrc" / "cpu" / "isa"
    todo, seen = sorted(set(isa.glob("*.cpp")) - {isa / "choice.cpp"}), set()
    assert todo
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in includes(path):
            local = path.parent / name
            assert local.exists() or name in allowed, f"{path.name} includes {name}"
            todo += [local] if local.exists() else []
