"""tests/compile_once.py: what is compiled again, and what is not."""

import shutil
from pathlib import Path

import compile_once
import pytest

CXX = shutil.which("g++")


@pytest.mark.skipif(CXX is None, reason="g++ is not installed")
def test_only_what_differs_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_once, "OBJECTS", tmp_path / "objects")

    def compiled(folder: str, *flags: str, text: str = "int f() { return N; }", header: str = "#define N 3") -> int:
        """In a folder of its own, as CMake says it; how many objects there are then."""
        source, target = tmp_path / folder / "f.cpp", tmp_path / folder / "f.cpp.o"
        source.parent.mkdir(exist_ok=True)
        source.write_text(f'#include "f.h"\n{text}\n')
        (source.parent / "f.h").write_text(f"{header}\n")
        places = ("-MD", "-MT", "f.cpp.o", "-MF", f"{target}.d", "-o", str(target), "-c", str(source))
        status = compile_once.main([str(CXX), f"-I{source.parent}", *flags, *places])
        if status:
            return -status
        assert target.stat().st_size > 0
        depends = Path(f"{target}.d").read_text().split()
        assert depends[0] == "f.cpp.o:"
        assert {str(source), str(source.with_suffix(".h"))} <= set(depends)
        return len(list((tmp_path / "objects").glob("*.o")))

    assert compiled("a") == 1
    assert compiled("b") == 1
    assert (tmp_path / "a" / "f.cpp.o").read_bytes() == (tmp_path / "b" / "f.cpp.o").read_bytes()
    assert compiled("b", "-O3") == 2
    assert compiled("b", header="#define N 4") == 3
    assert compiled("b", text="int f() { return N }") == -1
    assert compiled("b", header="#error") == -1
    assert compiled("a") == 3
    assert compile_once.main([str(CXX), str(tmp_path / "a" / "f.cpp.o"), "-shared", "-o", str(tmp_path / "f.so")]) == 0
