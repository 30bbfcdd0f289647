"""Prints torch's folders and versions for CMake, one key=value per line.

Does not import torch, which takes seconds and fails where its CUDA libraries cannot be loaded.
"""

import importlib.util
import runpy
import sys
from pathlib import Path


def torch_directory() -> Path:
    if len(sys.argv) > 1 and sys.argv[1]:
        return Path(sys.argv[1])
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("torch is not installed")
    return Path(spec.origin).parent


root = torch_directory()
version = runpy.run_path(str(root / "version.py"))
print(f"root={root}")
print(f"include={root / 'include'}")
print(f"lib={root / 'lib'}")
print(f"version={str(version['__version__']).split('+')[0]}")
print(f"cuda={version['cuda'] or ''}")
