"""Runs a command and all that it starts with a pretended GPU: `python tests/pretend/run.py pytest tests/test_train.py`.

A build of torch without CUDA is given two CUDA devices in the host's memory (device.cpp), which compute by the CPU's
kernels. What is tested by it: where each tensor is, what a GPU refuses, pinned memory, and FSDP2's way on a GPU. Not:
a GPU's kernels, its speed and its memory, NCCL, the order of streams, and forks, which a real GPU does not survive.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILT = HERE.parents[1] / "build" / "pretend"


def torch_folder() -> Path:
    """Returns where torch is, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("pretended GPU: torch is not installed")
    return Path(spec.origin).parent


def compiled(source: str, *options: str) -> Path:
    """Compiles a source of this folder, once for each version of torch; returns the shared object."""
    version = (torch_folder() / "version.py").read_bytes()
    if b"cuda: str | None = None" not in version and b"cuda: Optional[str] = None" not in version:
        sys.exit("pretended GPU: this torch has CUDA; run the tests on its GPU as they are")
    key = hashlib.sha256(version + (HERE / source).read_bytes()).hexdigest()[:16]
    made = BUILT / f"{source.partition('.')[0]}-{key}.so"
    if not made.exists():
        if shutil.which("g++") is None:
            sys.exit("pretended GPU: it is compiled by g++, which is not there")
        BUILT.mkdir(parents=True, exist_ok=True)
        part = made.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", "-shared", "-fPIC", "-O1", str(HERE / source), "-o", str(part), *options], check=True)
        part.rename(made)
    return made


def main() -> None:
    folder = torch_folder()
    include, libraries = folder / "include", folder / "lib"
    device = compiled(
        "device.cpp", "-std=c++20", "-I", str(include), "-I", str(include / "torch/csrc/api/include"),
        "-L", str(libraries), "-lc10", "-ltorch_cpu",
    )  # fmt: skip
    forks = compiled("forks.cpp", "-ldl")
    path = [str(HERE / "startup"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {"PRETEND_GPU": str(device), "PYTHONPATH": os.pathsep.join(path), "LD_PRELOAD": str(forks)}
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
