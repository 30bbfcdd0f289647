"""The contents of sdist and wheel, the build requirements, and the messages of failed builds."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from fakes import fake_tool, fake_torch

import imaml_ext

ROOT = Path(__file__).parents[2]
NOT_PACKED = (
    ".ci/", ".clang-format", ".github/", ".gitignore", ".pre-commit-config.yaml", "noxfile.py",
    "results/",
)  # fmt: skip

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")


def tracked():
    """The files that git tracks, and others that it does not ignore, without environments."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode != 0 or "setup.py" not in listed.stdout.split("\n"):
        pytest.skip("the sources are not in git")
    names = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    environments = {name.removesuffix("pyvenv.cfg") for name in names if "/pyvenv.cfg" in name}
    return {name for name in names if not name.startswith(tuple(environments))}


@pytest.fixture
def sources(tmp_path):
    """A copy, to build in."""
    target = tmp_path / "sources"
    for name in tracked():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    return target


@pytest.fixture
def backend(monkeypatch):
    pytest.importorskip("setuptools", minversion="77")
    monkeypatch.syspath_prepend(str(ROOT / "build_backend"))
    monkeypatch.delenv("IMAML_TORCH_DIR", raising=False)
    return importlib.import_module("imaml_build")


def build(sources, *command, **variables):
    """Without a terminal, to which messages would go instead of stderr."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=sources, env=os.environ | variables, capture_output=True, text=True,
        start_new_session=True,
    )  # fmt: skip


def test_the_sdist_has_the_tracked_files_except_results_and_tools(sources, backend):
    stale = sources / "imaml_ext.egg-info"
    stale.mkdir()
    (sources / "left_behind.txt").write_text("by an earlier build")
    (stale / "SOURCES.txt").write_text("left_behind.txt\n")
    (sources / "imaml_ext" / "_C.so").write_text("compiled")
    code = (
        "import sys; sys.path.insert(0, 'build_backend'); import imaml_build; "
        "imaml_build.build_sdist('dist')"
    )
    built = build(sources, "-c", code, PATH="")  # no program is run, not even git
    assert built.returncode == 0, built.stderr
    name = f"imaml_ext-{imaml_ext.__version__}"
    with tarfile.open(sources / "dist" / f"{name}.tar.gz") as archive:
        packed = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
        metadata = archive.extractfile(f"{name}/PKG-INFO").read().decode()
    packed = {name for name in packed if ".egg-info/" not in name}
    wanted = {name for name in tracked() if not name.startswith(NOT_PACKED)}
    assert packed == wanted | {"PKG-INFO", "setup.cfg"}
    assert f"\nVersion: {imaml_ext.__version__}\n" in metadata
    assert "\nDescription-Content-Type: text/markdown\n" in metadata
    assert "\n# imaml_ext\n" in metadata
    assert "](docs/" not in metadata
    assert not stale.exists()


README = """# Name

An [older
paper](https://arxiv.org/abs/1), [a section](#use), `list[0](x)`, [mail](mailto:a@b.c) and
[docs/](docs/README.md#top) ([details](docs/more.md)).

![A figure](results/fig.png)

*Its caption,
in two lines.*

    code [0](1)

## Use

## Documentation

[Guides](docs/README.md) · [API](docs/api.md) ·
[changes](CHANGELOG.md)

## Citation
"""
WITHOUT_REPOSITORY = """# Name

An [older
paper](https://arxiv.org/abs/1), [a section](#use), `list[0](x)`, [mail](mailto:a@b.c) and
docs/.

    code [0](1)

## Use

## Citation
"""


@pytest.mark.parametrize(
    ("repository", "expected"),
    [
        ("", WITHOUT_REPOSITORY),
        (
            "https://example.org/owner/name/",
            README.replace("(docs/", "(https://example.org/owner/name/blob/v1.2/docs/")
            .replace("(CHANGELOG", "(https://example.org/owner/name/blob/v1.2/CHANGELOG")
            .replace("(results/", "(https://example.org/owner/name/raw/v1.2/results/"),
        ),
    ],
)
def test_the_description_links_to_the_repository_or_nowhere(repository, expected, backend):
    readme = importlib.import_module("imaml_readme")
    assert readme.for_index(README, repository, "v1.2") == expected


def test_the_wheel_has_only_the_modules_and_their_types(sources, backend):
    shutil.copy2(ROOT / "python_tests" / "conftest.py", sources / "imaml_ext" / "unwanted.txt")
    built = build(sources, "setup.py", "--quiet", "build_py", "--build-lib", "lib")
    assert built.returncode == 0, built.stderr
    packed = {str(p.relative_to(sources / "lib")) for p in (sources / "lib").rglob("*.*")}
    wanted = {name for name in tracked() if name.startswith("imaml_ext/")}
    assert packed == wanted
    assert {"imaml_ext/py.typed", "imaml_ext/_C.pyi"} <= packed


@pytest.mark.parametrize(
    ("version", "headers", "message"),
    [
        ("2.9.1+cu128", True, r"is torch 2\.9\.1\+cu128, which is too old; torch>=2\.10 is needed"),
        ("2.13.0", False, r"is torch 2\.13\.0, without its headers"),
        ("unknown", True, r"without a version"),
    ],
)
def test_an_unusable_torch_is_named(version, headers, message, backend, tmp_path, monkeypatch):
    torch = fake_torch(tmp_path, version, headers=headers)
    monkeypatch.setattr(backend, "_site_packages", lambda: iter([tmp_path]))
    assert backend.find_torch() is None
    with pytest.raises(SystemExit, match=f"needs torch>=2.10.*{torch}"):
        backend.require_torch()
    monkeypatch.setenv("IMAML_TORCH_DIR", str(torch))
    with pytest.raises(SystemExit, match=message):
        backend.find_torch()


def test_an_installed_torch_is_used_and_a_missing_one_is_required(backend, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "_site_packages", lambda: iter([tmp_path]))
    assert backend.TORCH in backend.get_requires_for_build_wheel()
    torch = fake_torch(tmp_path, "2.10.0", headers=True)  # 2.10 is newer than 2.9
    assert backend.find_torch() == torch
    assert backend.TORCH not in backend.get_requires_for_build_wheel()


def test_old_or_missing_tools_are_required(backend, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert backend.missing_tools() == ["cmake>=3.22", "ninja"]
    fake_tool(tmp_path, "ninja", ["echo 1.11.1"])
    fake_tool(tmp_path, "cmake", ["echo cmake version 3.18.4"])
    assert backend.missing_tools() == ["cmake>=3.22"]
    fake_tool(tmp_path, "cmake", ["echo cmake version 4.0.1"])
    assert backend.missing_tools() == []


@pytest.fixture
def tools(backend, tmp_path):
    """Variables of an environment whose cmake fails and that lacks nothing else."""
    fake_tool(tmp_path / "bin", "ninja", ["echo 1.11.1"])
    fake_tool(
        tmp_path / "bin", "cmake",
        ["[ $1 = --version ] && echo version 3.25.1 && exit", "echo the reason >&2", "exit 1"],
    )  # fmt: skip
    (tmp_path / "bin" / "pybind11.py").write_text("get_cmake_dir = str\n")
    torch = fake_torch(tmp_path, "2.13.0", headers=True)
    return {
        "PATH": str(tmp_path / "bin"), "PYTHONPATH": str(tmp_path / "bin"),
        "IMAML_TORCH_DIR": str(torch),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "the reason\nimaml_ext: CMake failed; its output is above"),
        ({"TORCH_CUDA_ARCH_LIST": "sm_90"}, "TORCH_CUDA_ARCH_LIST: cannot read 'sm_90'"),
        ({"PATH": "/nowhere"}, "needs: pip install 'cmake>=3.22' 'ninja'"),
        ({"IMAML_TORCH_DIR": "/nowhere"}, "IMAML_TORCH_DIR=/nowhere is no torch package"),
    ],
)
def test_an_impossible_build_ends_with_one_line_and_no_traceback(change, message, sources, tools):
    built = build(sources, "setup.py", "build_ext", **tools | change)
    assert built.returncode == 1
    assert message in built.stderr
    assert "Traceback" not in built.stderr
    assert re.search(r"^(imaml_ext|TORCH_CUDA)", built.stderr.splitlines()[-1])


@pytest.mark.parametrize("lacks", ["ON", "OFF"])
def test_the_last_line_of_a_build_without_nvcc_reports_it(lacks, sources, tools, tmp_path):
    torch = fake_torch(tmp_path / "cuda", "2.14.1", cuda="13.0")
    fake_tool(
        tmp_path / "bin", "cmake",
        ["[ $1 = --version ] && echo version 3.25.1",
         '[ $1 = -S ] && mkdir -p "$4" && echo IMAML_LACKS_NVCC:INTERNAL=' + lacks
         + ' > "$4/CMakeCache.txt"', "exit 0"],
    )  # fmt: skip
    variables = tools | {"IMAML_TORCH_DIR": str(torch), "PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    built = build(sources, "setup.py", "build_ext", **variables)
    assert built.returncode == 0, built.stderr
    said = "imaml_ext: built with CPU kernels only: torch has CUDA 13.0"
    assert (said in (built.stderr.splitlines() or [""])[-1]) == (lacks == "ON")
