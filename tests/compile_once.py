"""An object that was compiled before is copied: for the builds that .ci/run makes (tests/test_build.py has another).

    CMAKE_CXX_COMPILER_LAUNCHER="python3;<whole path>/tests/compile_once.py"

Its name is the hash of what the preprocessor makes of the source, of the compiler and of its flags: where the files
lie is no matter. The objects lie in build/objects.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

OBJECTS = Path(__file__).resolve().parents[1] / "build" / "objects"


def main(command: list[str]) -> int:
    """Runs a compiler, or does what it did.

    Args:
        command: The compiler and its arguments.

    Returns: its exit status.
    """
    places = {word: command[i + 1] for i, word in enumerate(command[:-1]) if word in ("-o", "-c", "-MF", "-MT")}
    if not {"-o", "-c"} <= places.keys():  # it links, or is asked what it is
        return subprocess.run(command, check=False).returncode
    # Writes the list of headers, which is another in every folder, as the compiler does.
    preprocess = ["-E" if word == "-c" else word for word in command]
    preprocess[command.index("-o") + 1] = "-"
    text = subprocess.run([*preprocess, "-P"], capture_output=True, check=False)
    version = subprocess.run([command[0], "--version"], capture_output=True, check=False)
    flags = [word for word in command if word not in places.values() and not word.startswith("-I")]
    digest = hashlib.sha256("\0".join(flags).encode() + version.stdout + text.stdout).hexdigest()
    kept, target = OBJECTS / f"{Path(places['-c']).stem}-{digest[:20]}.o", Path(places["-o"])
    if text.returncode or not kept.exists():
        if status := subprocess.run(command, check=False).returncode:
            return status
        OBJECTS.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}.partial")
        shutil.copyfile(target, partial)
        partial.replace(kept)
    else:
        shutil.copyfile(kept, target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
