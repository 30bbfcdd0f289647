"""A fake torch and fake tools, for tests of the build."""


def fake_torch(folder, version, *, headers=True, cuda=None):
    torch = folder / "torch"
    stable = torch / "include" / "torch" / "csrc" / "stable"
    stable.mkdir(parents=True)
    lines = [f"__version__ = '{version}'", "debug = False", f"cuda: Optional[str] = {cuda!r}"]
    (torch / "version.py").write_text("\n".join([*lines, "hip: Optional[str] = None", ""]))
    if headers:
        (stable / "library.h").touch()
    return torch


def fake_tool(folder, name, lines):
    folder.mkdir(parents=True, exist_ok=True)
    tool = folder / name
    tool.write_text("\n".join(["#!/bin/sh", *lines]))
    tool.chmod(0o755)
    return tool
