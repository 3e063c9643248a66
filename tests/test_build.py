"""The build: one real wheel without CUDA, what is in it, how it is found, and what CMake decides about nvcc.

The wheel is unpacked into the site-packages of a bare virtual environment that sees this one's packages, but neither
this environment's igpt_fast nor its editable hook.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "cmake", "csrc", "igpt_fast")
BIN = Path(sys.executable).parent
CMAKE = shutil.which("cmake", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")

pytestmark = [
    pytest.mark.xdist_group("build"),
    pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="the tests run outside the repository"),
    *(
        pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")
        for name in ("scikit_build_core", "pybind11", "pip")
    ),
]


def run(*command: object, ok: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


def copy_sources(folder: Path) -> Path:
    """The files that a build needs, without compiled ones."""
    folder.mkdir(parents=True)
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.partial"))
        else:
            shutil.copy(source, folder / name)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """source/, built by pip into dist/*.whl with its objects in source/build/."""
    folder = tmp_path_factory.mktemp("build")
    source = copy_sources(folder / "source")
    options = ("-C", "cmake.define.IGPT_CUDA=OFF", "-C", "build-dir=build")
    command = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-cache-dir", "-q")
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("CXXFLAGS", None)  # instruction sets are chosen file by file
    run(*command, *options, "-w", folder / "dist", source, env=environment)
    return folder


@pytest.fixture(scope="module")
def bare(built: Path) -> Path:
    """A virtual environment with this one's packages, less igpt_fast."""
    run(sys.executable, "-m", "venv", "--without-pip", built / "venv")
    site = next((built / "venv").glob("lib/python*/site-packages"))
    links = built / "packages"
    links.mkdir()
    for folder in dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))):
        for item in Path(folder).iterdir():
            if "igpt_fast" not in item.name and item.suffix != ".pth" and not (links / item.name).exists():
                (links / item.name).symlink_to(item)
    (site / "packages.pth").write_text(f"{links}\n")
    return site


@pytest.fixture
def installed(built: Path, bare: Path) -> Path:
    """The wheel, unpacked into the bare environment: what a plain ``pip install`` leaves."""
    with zipfile.ZipFile(next((built / "dist").glob("*.whl"))) as wheel:
        wheel.extractall(bare)
    return bare


@pytest.fixture
def uninstalled(bare: Path) -> Path:
    for item in bare.glob("igpt_fast*"):
        shutil.rmtree(item)
    return bare


REPORT = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import igpt_fast
    from igpt_fast import backend, ops
import torch
black_and_white = torch.tensor([[0, 0, 0], [255, 255, 255]], dtype=torch.uint8)
tokens = ops.quantize(black_and_white, torch.tensor([[1.0] * 3, [-1.0] * 3]))
print(json.dumps({
    "package": igpt_fast.__file__,
    "module": backend._C and backend._C.__file__,
    "status": backend._C and backend._C.cuda_status,
    "warnings": [f"{w.category.__name__}: {w.message}" for w in caught if "igpt_fast" in str(w.message)],
    "tokens": tokens.tolist(),
}))
"""


def report(built: Path, folder: Path) -> dict[str, object]:
    """What a Python of the bare environment that is started in ``folder`` says."""
    python = built / "venv" / "bin" / "python"
    # -B: the copy of the sources that other tests change must not leave bytecode.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return json.loads(run(python, "-B", "-c", REPORT, cwd=folder, env=environment).stdout)


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    wheel = next((built / "dist").glob("*.whl"))
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    compiled = {name for name in names if name.endswith(".so")}
    assert len(compiled) == 1
    assert next(iter(compiled)).startswith("igpt_fast/_C.")
    sources = {
        str(path.relative_to(built / "source"))
        for path in (built / "source" / "igpt_fast").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".partial"
    }
    assert names - metadata - compiled == sources
    assert {"igpt_fast/py.typed", "igpt_fast/_C.pyi", "igpt_fast/assets/NOTICE"} <= names
    assert {name.split("/", 1)[1] for name in metadata if "/licenses/" in name} == {
        "licenses/LICENSE",
        "licenses/igpt_fast/assets/NOTICE",
    }
    text = zipfile.ZipFile(wheel).read(next(name for name in metadata if name.endswith("METADATA"))).decode()
    assert "Requires-Python: >=3.11" in text
    assert "Requires-Dist: torch>=2.6" in text
    assert "License-Expression: Apache-2.0 AND CC-BY-4.0" in text


def test_torch_is_not_needed_to_build() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    assert "torch" not in re.search(r"\[build-system\](.*?)\n\[", text, re.DOTALL).group(1)  # type: ignore[union-attr]


def test_a_plain_install_is_found_from_elsewhere(built: Path, installed: Path, tmp_path: Path) -> None:
    found = report(built, tmp_path)
    assert found["package"] == str(installed / "igpt_fast" / "__init__.py")
    assert Path(str(found["module"])).parent == installed / "igpt_fast"
    assert (found["status"], found["warnings"], found["tokens"]) == ("off: IGPT_CUDA=OFF", [], [1, 0])


def test_a_plain_install_lends_its_module_to_the_sources(built: Path, installed: Path) -> None:
    """From the root of the repository, Python takes the package from there, where no module is."""
    found = report(built, built / "source")
    assert found["package"] == str(built / "source" / "igpt_fast" / "__init__.py")
    assert Path(str(found["module"])).parent == installed / "igpt_fast"
    assert (found["warnings"], found["tokens"]) == ([], [1, 0])


def test_sources_of_another_version_do_not_take_the_module(built: Path, installed: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(built / "source" / "igpt_fast", source / "igpt_fast")
    init = source / "igpt_fast" / "__init__.py"
    init.write_text(re.sub(r'__version__ = ".*"', '__version__ = "0.0.0"', init.read_text("utf-8")), "utf-8")
    found = report(built, source)
    assert found["module"] is None
    assert len(found["warnings"]) == 1  # type: ignore[arg-type]


def test_sources_alone_run_on_the_reference_and_say_so(built: Path, uninstalled: Path) -> None:
    found = report(built, built / "source")
    assert (found["module"], found["tokens"]) == (None, [1, 0])
    (warning,) = found["warnings"]  # type: ignore[misc]
    assert str(warning).startswith("RuntimeWarning: igpt_fast runs on plain PyTorch")


def test_the_source_distribution_builds(built: Path) -> None:
    folder = built / "sdist"
    code = f"from scikit_build_core.build import build_sdist; build_sdist({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=built / "source")
    with tarfile.open(next(folder.glob("igpt_fast-*.tar.gz"))) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"CMakeLists.txt", "pyproject.toml", "csrc/cuda/norm.cu", "igpt_fast/ops/norm.py"} <= names
    assert not {name for name in names if name.startswith(("build/", "dist/"))}


def test_without_a_compiled_module_it_is_pure(built: Path, bare: Path, uninstalled: Path, tmp_path: Path) -> None:
    """For who has no compiler that can: it runs on the definitions, and says so."""
    folder = built / "pure"
    command = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-cache-dir", "-q")
    run(*command, "-C", "wheel.cmake=false", "-w", folder, built / "source")
    (wheel,) = folder.glob("*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(bare)
    found = report(built, tmp_path)
    assert (found["package"], found["module"]) == (str(bare / "igpt_fast" / "__init__.py"), None)
    assert found["tokens"] == [1, 0]
    (warning,) = found["warnings"]  # type: ignore[misc]
    assert str(warning).startswith("RuntimeWarning: igpt_fast runs on plain PyTorch")


# ---- Instruction sets ---------------------------------------------------------------------------------------


def objects(built: Path) -> dict[str, Path]:
    """By the source's name below csrc."""
    paths = (built / "source" / "build").rglob("*.cpp.o")
    found = {path.as_posix().rpartition("/csrc/")[2].removesuffix(".cpp.o"): path for path in paths}
    assert {"cpu/isa/choice", "cpu/isa/generic", "cpu/quantize", "bind/module"} <= set(found)
    return found


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils are not installed")
def test_files_of_an_instruction_set_give_the_linker_nothing_but_their_table(built: Path) -> None:
    """A weak symbol (an inline function, a template) of the AVX-512 file could serve every processor, and crash it."""
    for name, path in objects(built).items():
        if name.startswith("cpu/isa/") and name != "cpu/isa/choice":
            lines = run("nm", "-C", "--defined-only", path).stdout.splitlines()
            shared = [line.split(None, 2) for line in lines if line.split(None, 2)[1] not in "bdrt"]
            assert [symbol for _, _, symbol in shared] == [f"igpt::cpu::{path.name.partition('.')[0]}_ops"], name


@pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils are not installed")
@pytest.mark.skipif(sysconfig.get_platform() != "linux-x86_64", reason="x86 alone has these instructions")
def test_no_other_file_uses_their_instructions(built: Path) -> None:
    wide = re.compile(r"%[yz]mm|\bv[a-z0-9]+\s.*%xmm")
    uses = {name for name, path in objects(built).items() if wide.search(run("objdump", "-d", path).stdout)}
    assert uses == {f"cpu/isa/{name}" for name in ("avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx")}
    for name in ("avx2", "avx_vnni"):
        assert "%zmm" not in run("objdump", "-d", objects(built)[f"cpu/isa/{name}"]).stdout, name
    # By its own prefix (VEX): AVX-512's would be an illegal instruction there.
    assert "{vex} vpdpwssd" in run("objdump", "-d", objects(built)["cpu/isa/avx_vnni"]).stdout


# ---- What CMake decides about nvcc --------------------------------------------------------------------------

BROKEN = 'echo "nvcc fatal : no license" >&2; exit 1'
PICKY = """case "$*" in
*--list-gpu-arch*) printf 'compute_75\\ncompute_90\\ncompute_100\\n' ;;
*) echo '#error -- unsupported GNU version! gcc versions later than 11 are not supported!' >&2; exit 1 ;;
esac"""
OLD = "printf 'compute_60\\ncompute_75\\n'"


def configure(folder: Path, nvcc: str, *definitions: str) -> tuple[bool, str]:
    """Configures the sources with a pretended nvcc; returns (success, all that CMake said, on one line)."""
    import pybind11

    (folder / "bin").mkdir()
    (folder / "bin" / "nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
    (folder / "bin" / "nvcc").chmod(0o755)
    path = os.pathsep.join([str(folder / "bin"), str(BIN), os.environ["PATH"]])
    options = [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    options += [f"-D{definition}" for definition in definitions]
    done = run(CMAKE, "-S", ROOT, "-B", folder / "out", *options, ok=False, env=os.environ | {"PATH": path})
    return done.returncode == 0, " ".join((done.stdout + done.stderr).split())


@pytest.mark.skipif(CMAKE is None, reason="cmake is not installed")
@pytest.mark.parametrize(
    ("nvcc", "reason"),
    [(BROKEN, "no license"), (PICKY, "unsupported GNU version"), (OLD, "knows no architecture from 80 up")],
)
def test_an_nvcc_that_does_not_work(tmp_path: Path, nvcc: str, reason: str) -> None:
    """AUTO goes on without CUDA and says why, here and in the module; ON ends."""
    success, text = configure(tmp_path, nvcc, "IGPT_CUDA=AUTO")
    assert success, text
    assert re.search(rf"CUDA off: [^-]*{re.escape(str(tmp_path))}/bin/nvcc .*{reason}", text)
    assert reason in (tmp_path / "out" / "include" / "build_info.h").read_text("utf-8")
    shutil.rmtree(tmp_path / "bin")
    success, text = configure(tmp_path, nvcc, "IGPT_CUDA=ON")
    assert not success
    assert "IGPT_CUDA=ON: " in text
    assert reason in text


@pytest.mark.skipif(CMAKE is None, reason="cmake is not installed")
def test_wrong_choices(tmp_path: Path) -> None:
    success, text = configure(tmp_path, PICKY, "IGPT_CUDA=MAYBE")
    assert not success
    assert "must be AUTO, ON or OFF, not 'MAYBE'" in text
    if shutil.which("nvidia-smi") is None:
        shutil.rmtree(tmp_path / "bin")
        success, text = configure(tmp_path, PICKY, "IGPT_CUDA=AUTO", "IGPT_CUDA_ARCHS=native")
        assert not success
        assert "needs a visible GPU" in text


@pytest.mark.skipif(CMAKE is None, reason="cmake is not installed")
def test_a_second_openmp_library_is_told(tmp_path: Path) -> None:
    """clang's would stand beside torch's, which took seven times as long for small steps."""
    found = ("OpenMP_CXX_FLAGS=-fopenmp", "OpenMP_CXX_LIB_NAMES=omp", "OpenMP_omp_LIBRARY=/usr/lib/libomp.so")
    success, text = configure(tmp_path, OLD, "IGPT_CUDA=OFF", *found)
    assert success, text
    assert re.search(r"CMake Warning .* links /usr/lib/libomp.so, a second pool of threads beside torch's", text)
    assert "/usr/lib/libomp.so" in (tmp_path / "out" / "include" / "build_info.h").read_text("utf-8")
