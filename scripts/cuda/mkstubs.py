#!/usr/bin/env python3
"""Makes the libraries that a CUDA binary is linked against where the real ones are missing.

    mkstubs.py --cudarc DIR --cuda MAJOR --out DIR NAME...

NAME is cuda, cublas, cublasLt, curand, nvrtc, nccl or cudnn. Each lib<NAME>.so carries the name
that the real library has at run time (its SONAME) and every function that cudarc's bindings
declare. They are for the linker: a function that is called returns 34, the driver's
CUDA_ERROR_STUB_LIBRARY.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys

# cudarc's module, and the library's version where it is not CUDA's own.
LIBRARIES = {
    "cuda": ("driver", 1),
    "cublas": ("cublas", None),
    "cublasLt": ("cublaslt", None),
    "curand": ("curand", 10),
    "nvrtc": ("nvrtc", None),
    "nccl": ("nccl", 2),
    "cudnn": ("cudnn", 9),
}
STUB_LIBRARY = 34


def declared(bindings: str) -> list[str]:
    """Functions that the bindings import: the ones that stand within an extern block."""
    names, within = set(), False
    for line in map(str.strip, bindings.splitlines()):
        if line.endswith('extern "C" {'):
            within = True
        elif line == "}":
            within = False
        elif within and (found := re.match(r"(?:pub )?fn (\w+)\s*\(", line)):
            names.add(found[1])
    return sorted(names)


def build(name: str, cudarc: pathlib.Path, cuda: int, out: pathlib.Path) -> None:
    module, version = LIBRARIES[name]
    file = cudarc / "src" / module / "sys" / "mod.rs"
    names = declared(file.read_text())
    if not names:
        sys.exit(f"mkstubs: {file}: declares no functions")
    source = "".join(f"int {function}(void) {{ return {STUB_LIBRARY}; }}\n" for function in names)
    soname = f"lib{name}.so.{version or cuda}"
    command = [os.environ.get("CC", "cc"), "-x", "c", "-", "-shared", "-fPIC", "-nostdlib", "-w"]
    command += [f"-Wl,-soname,{soname}", "-o", str(out / f"lib{name}.so")]
    subprocess.run(command, input=source, text=True, check=True)
    print(f"{soname}: {len(names)} functions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cudarc", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--cuda", type=int, required=True, metavar="MAJOR")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("names", nargs="+", choices=LIBRARIES, metavar="NAME")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        for name in args.names:
            build(name, args.cudarc, args.cuda, args.out)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"mkstubs: {error}")


if __name__ == "__main__":
    main()
