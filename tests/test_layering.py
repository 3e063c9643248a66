"""Who may use whom: the floors of docs/architecture.md, read off the imports and includes of every source file.

Imports inside functions count, and those for type checkers alone (``if TYPE_CHECKING``) as well. The rows are exact in
both directions: an import that no row permits fails, and so does a permission that nobody uses.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "igpt_fast"

# What stands on the ground: the standard library and numpy alone.
GROUND = {"config", "draws", "files", "checks", "interrupts", "keywords", "kin", "locks", "processes"}
# Floor -> the floors that it uses, bottom up. A floor is a folder of the package, or a file beside the folders.
FLOORS: dict[str, set[str]] = {
    "reference": set(),
    "backend": {"igpt_fast"},
    "ground": set(),
    "world": {"ground"},
    "ops": {"backend", "ground", "reference"},
    "image": {"ground", "ops"},
    "checkpoint": {"backend", "ground"},
    "engines": {"backend", "ground", "ops"},
    "sampling": {"engines", "ground", "image", "ops", "reference"},
    "model": {"backend", "checkpoint", "engines", "ground", "ops", "sampling"},
    "environment": {"backend", "engines", "igpt_fast"},
    "hf": {"checkpoint", "engines", "ground", "image", "model", "ops"},
    "likelihood": {"engines", "ground", "image", "model", "ops", "sampling"},
    "pipeline": {"engines", "ground", "image", "likelihood", "model", "sampling"},
    "learning": {"checkpoint", "engines", "ground", "image", "likelihood", "model", "ops", "pipeline", "world"},
    "recipes": {"ground", "image", "learning", "model", "pipeline"},
    "web": {"ground", "image", "pipeline", "sampling"},
    "cli": {
        "backend",
        "checkpoint",
        "environment",
        "ground",
        "igpt_fast",
        "image",
        "learning",
        "likelihood",
        "pipeline",
        "sampling",
        "web",
        "world",
    },
    "__main__": {"cli"},
}
# What sampling knows of engines: the protocol, and who chooses one; never an engine by name.
SAMPLING_KNOWS = {"engines.decoder", "engines.network", "engines.choice", "engines.memory"}
# Distributions that only these floors, or modules, import.
ONLY = {
    "transformers": {"hf"},
    "sklearn": {"image.clusters", "learning"},
    "tyro": {"cli"},
    "starlette": {"web"},
    "uvicorn": {"web"},
    "huggingface_hub": {"files", "checkpoint"},
    "safetensors": {"checkpoint"},
}
# What floors import from outside at all, where that is part of their promise.
OUTSIDE = {
    "igpt_fast": set(),
    "config": set(),
    "reference": {"torch"},
    "world": {"torch"},
    "ops": {"torch"},
    "engines": {"torch"},
    "model": {"torch"},
}
# Our own variables, and those of others' conventions: terminals', torchrun's.
ENVIRONMENT = {
    "__main__": {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"},
    "backend": {"IGPT_FAST_BACKEND", "IGPT_FAST_ISA"},
    "cli.draw.preview": {"NO_COLOR", "TERM"},
    "processes": {"LOCAL_RANK", "RANK", "WORLD_SIZE"},
}

MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "__pycache__" not in path.parts
}


def floor(module: str) -> str:
    first = module.partition(".")[0]
    return "ground" if first in GROUND else "igpt_fast" if first == "__init__" else first


def runs(tree: ast.AST) -> list[ast.AST]:
    """Nodes that run when a module is imported: no bodies of functions, no blocks for type checkers."""
    found: list[ast.AST] = []
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            found += [child, *runs(child)]
    return found


def imports(name: str, when_imported: bool = False) -> tuple[set[str], set[str]]:
    """(modules of the package, distributions outside the standard library) that a module imports."""
    inside: set[str] = set()
    outside: set[str] = set()
    tree = ast.parse(MODULES[name].read_text("utf-8"))
    for node in runs(tree) if when_imported else ast.walk(tree):
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
    """``learning.data.load_tokens`` -> ``learning.data``; a name of the package itself -> ``__init__``."""
    parts = path.split(".") if path else []
    while parts and ".".join(parts) not in MODULES:
        if ".".join([*parts, "__init__"]) in MODULES:
            return ".".join([*parts, "__init__"])
        parts.pop()
    return ".".join(parts) or "__init__"


# The package's own file re-exports from everywhere, lazily; the rest stands on it for its version alone.
USES = {name: imports(name)[0] for name in MODULES if name != "__init__"}


@pytest.mark.parametrize("name", FLOORS)
def test_a_floor_uses_what_its_row_says(name: str) -> None:
    used: dict[str, str] = {}
    for module, targets in USES.items():
        if floor(module) == name:
            used |= {floor(target): f"{module} imports {target}" for target in targets if floor(target) != name}
    assert set(used) <= FLOORS[name], [used[other] for other in set(used) - FLOORS[name]]
    assert FLOORS[name] <= set(used), f"nobody on {name} uses {FLOORS[name] - set(used)}"


def test_every_module_stands_on_a_floor() -> None:
    assert {floor(name) for name in MODULES} - {"igpt_fast"} == set(FLOORS)
    assert {name for name in MODULES if floor(name) == "ground"} == GROUND


def test_the_floors_stand_on_each_other() -> None:
    done = {"igpt_fast"}
    for name, below in FLOORS.items():
        assert below <= done, f"{name} stands before {below - done} in FLOORS"
        done.add(name)


def test_the_modules_have_no_circle() -> None:
    """Type-only imports and those inside functions counted."""
    done: set[str] = {"__init__"}
    while rest := set(USES) - done:
        free = {name for name in rest if USES[name] <= done}
        assert free, f"a circle, or what stands on one: {sorted(rest)}"
        done |= free


def test_engines_are_known_by_name_to_their_choice_alone() -> None:
    for name, targets in USES.items():
        known = {target for target in targets if target.startswith(("engines.cpu.", "engines.cuda."))}
        own = {target for target in known if target.rpartition(".")[0] == name.rpartition(".")[0]}
        allowed = {
            "engines.choice": known,
            "engines.memory": known,
            "environment": known,
            "model.imagegpt": {"engines.cpu.forward"},
            "model.intermediates": {"engines.cpu.forward"},
            "hf.modules": {"engines.cpu.forward"},
            "learning.graphs": {"engines.cuda.capture"},
        }
        assert known - own <= allowed.get(name, set()), f"{name} imports {known - own}"
        if name.startswith("sampling."):
            assert {target for target in targets if floor(target) == "engines"} <= SAMPLING_KNOWS, name


def test_objectives_stand_apart_from_the_loop() -> None:
    for name, targets in USES.items():
        if name.startswith("learning.objectives."):
            own = {target for target in targets if target.startswith("learning.objectives.")}
            assert {target for target in targets if floor(target) == "learning"} <= own, name


@pytest.mark.parametrize("name", MODULES)
def test_imports_from_outside(name: str) -> None:
    _, outside = imports(name)
    for key in (floor(name), name):
        if key in OUTSIDE:
            assert outside <= OUTSIDE[key], f"{name} may not import {outside - OUTSIDE[key]}"
    for distribution, owners in ONLY.items():
        assert distribution not in outside or {floor(name), name} & owners, f"{name} may not import {distribution}"


@pytest.mark.parametrize("heavy", ["torch", "numpy", "PIL", "transformers"])
def test_the_command_line_starts_without(heavy: str) -> None:
    """Through everything that is imported before a command runs."""
    seen, todo = set(), ["cli.main", "__init__", *(name for name in MODULES if name.startswith("cli.commands."))]
    while todo:
        name = todo.pop()
        if name in seen or name not in MODULES:
            continue
        seen.add(name)
        inside, outside = imports(name, when_imported=True)
        assert heavy not in outside, f"{name} imports {heavy} at module level, and cli imports {name}"
        todo += inside
        parts = name.split(".")
        todo += [".".join([*parts[:i], "__init__"]) for i in range(1, len(parts))]


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES.values()} - {PACKAGE}))
def test_a_folder_says_what_lives_there_and_what_it_may_use(folder: Path) -> None:
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or ""
    assert re.search(r"^May use: ", text, re.MULTILINE), f"{folder.name}/__init__.py does not say what it may use"
    for path in folder.glob("*.py"):
        assert path.stem == "__init__" or f"``{path.stem}``" in text, f"{folder.name}/__init__.py: {path.stem}"


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
    written = {
        node.slice.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and ast.unparse(node.value) == "os.environ"
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.slice, ast.Constant)
    }
    assert read <= ENVIRONMENT.get(name, set())
    assert written <= read, f"{name} sets what it has not asked for"
    assert len(uses) == len(read) + len(written), (
        f"{name} uses the environment in another way than os.environ.get(NAME)"
    )


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
    allowed = {"arm_neon.h", "cstddef", "cstdint", "immintrin.h"}
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
