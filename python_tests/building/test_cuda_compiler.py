"""Which nvcc a build uses, what it requires without one, and what it reports."""

import importlib
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import fake_tool, fake_torch

ROOT = Path(__file__).parents[2]
BACKEND = ROOT / "build_backend"
OF_OFFLINE = ("PIP_NO_INDEX", "UV_OFFLINE", "UV_NO_INDEX")
OF_CUDA = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDAFLAGS", "CUDAHOSTCXX", "IMAML_CUDA")
WORKS = ["exit 0"]
FAILS = ["echo no cicc >&2", "exit 1"]

pytestmark = pytest.mark.skipif(not BACKEND.is_dir(), reason="needs the source tree")


@pytest.fixture
def compilers(monkeypatch, tmp_path):
    """The module imaml_cuda, on an online machine without nvcc."""
    monkeypatch.syspath_prepend(str(BACKEND))
    module = importlib.import_module("imaml_cuda")
    for name in (*OF_CUDA, *OF_OFFLINE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(module, "TOOLKITS", tmp_path / "toolkits")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not Path(p, "nvidia").is_dir()])
    monkeypatch.setattr(module, "_command_line", lambda process: ["/usr/bin/python", "pip"])
    monkeypatch.setattr(module, "_pip_configuration", str)
    return module


def packages(version):
    return [f"cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]=={version}.*"]


@pytest.mark.parametrize(
    ("cuda", "asked"),
    [
        ("13.0", packages("13.0")),
        ("13.2", packages("13.2")),
        ("14.1", packages("14.1")),
        ("12.8", []),
        (None, []),
    ],
)
def test_without_nvcc_the_compiler_for_the_cuda_version_of_torch_is_required(
    cuda, asked, compilers, tmp_path
):
    assert compilers.compiler_packages(fake_torch(tmp_path, "2.14.1", cuda=cuda)) == asked


def test_the_backend_requires_the_compiler_unless_it_requires_torch(
    compilers, tmp_path, monkeypatch
):
    pytest.importorskip("setuptools", minversion="77")
    backend = importlib.import_module("imaml_build")
    monkeypatch.delenv("IMAML_TORCH_DIR", raising=False)
    monkeypatch.setattr(backend, "_site_packages", lambda: iter([tmp_path]))
    hooks = backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable
    for hook in hooks:
        assert not any("cuda-toolkit" in requirement for requirement in hook())
    fake_torch(tmp_path, "2.14.1", cuda="13.0")
    for hook in hooks:
        assert packages("13.0")[0] in hook()
    monkeypatch.setenv("IMAML_CUDA", "OFF")  # CMake also ignores case
    for hook in hooks:
        assert not any("cuda-toolkit" in requirement for requirement in hook())


def place(kind, tmp_path, monkeypatch):
    """The folder of an nvcc of this kind; sets the variables that point to it."""
    if kind == "CUDACXX":
        monkeypatch.setenv("CUDACXX", str(tmp_path / "cxx" / "nvcc"))
        return tmp_path / "cxx"
    if kind in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(kind, str(tmp_path / kind))
        return tmp_path / kind / "bin"
    if kind == "PATH":
        monkeypatch.setenv("PATH", str(tmp_path / "bin") + os.pathsep + os.environ["PATH"])
        return tmp_path / "bin"
    if kind == "build environment":
        monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
        return tmp_path / "site" / "nvidia" / "cu13" / "bin"
    if kind == "next to torch":
        return tmp_path / "nvidia" / "cu13" / "bin"
    return tmp_path / "toolkits" / kind / "bin"


PLACES = [
    "CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH", "cuda", "cuda-13.2", "cuda-13.0",
    "build environment", "next to torch",
]  # fmt: skip


@pytest.mark.parametrize("kind", PLACES)
def test_a_working_nvcc_is_found_in_every_location(kind, compilers, tmp_path, monkeypatch, capfd):
    torch = fake_torch(tmp_path, "2.14.1", cuda="13.0")
    nvcc = fake_tool(place(kind, tmp_path, monkeypatch), "nvcc", WORKS)
    assert compilers.find_nvcc(torch) == nvcc
    assert compilers.compiler_packages(torch) == []
    assert capfd.readouterr().err == ""


def test_the_first_working_nvcc_is_used_and_the_broken_ones_before_it_are_named(
    compilers, tmp_path, monkeypatch, capfd
):
    torch = fake_torch(tmp_path, "2.14.1", cuda="13.0")
    tools = [fake_tool(place(kind, tmp_path, monkeypatch), "nvcc", FAILS) for kind in PLACES]
    assert compilers.find_nvcc(torch) is None
    said = [f"imaml_ext: {tool} does not work: no cicc" for tool in tools]
    assert capfd.readouterr().err.splitlines() == said
    assert compilers.compiler_packages(torch) == packages("13.0")
    for number in reversed(range(len(PLACES))):
        fake_tool(tools[number].parent, "nvcc", WORKS)
        capfd.readouterr()
        assert compilers.find_nvcc(torch) == tools[number]
        assert capfd.readouterr().err.splitlines() == said[:number]


def test_a_missing_nvcc_in_cudacxx_is_named(compilers, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    assert compilers.find_nvcc(fake_torch(tmp_path, "2.14.1", cuda="13.0")) is None
    assert "imaml_ext: /nowhere/nvcc does not work: " in capfd.readouterr().err


def test_nvcc_is_tested_with_the_variables_of_cmake_and_the_library_folder_that_it_lacks(
    compilers, tmp_path, monkeypatch
):
    torch = fake_torch(tmp_path, "2.14.1", cuda="13.0")
    root = tmp_path / "nvidia" / "cu13"
    fake_tool(root / "bin", "nvcc", [f'echo "$@" > {tmp_path}/said', "exit 0"])
    (root / "lib").mkdir()
    (root / "lib" / "libcudart_static.a").touch()
    monkeypatch.setenv("CUDAFLAGS", "-flag -other")
    monkeypatch.setenv("CUDAHOSTCXX", "g++-12")
    nvcc = compilers.find_nvcc(torch)
    assert f"-flag -other -ccbin g++-12 -L{root}/lib -o " in (tmp_path / "said").read_text()
    assert compilers.library_folder(nvcc) == root / "lib"
    (root / "lib64").mkdir()
    assert compilers.library_folder(nvcc) is None


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_nvcc_of_this_machine_works():
    ran = subprocess.run(
        [sys.executable, str(BACKEND / "imaml_cuda.py"), "/nowhere/torch"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.partition(";")[0]).name == "nvcc"


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
@pytest.mark.parametrize("name", OF_OFFLINE)
def test_an_offline_build_requires_the_compiler_only_with_imaml_cuda_on(
    name, value, compilers, tmp_path, monkeypatch
):
    torch = fake_torch(tmp_path, "2.14.1", cuda="13.0")
    monkeypatch.setenv(name, value)
    assert compilers.offline() == f"{name}={value}"
    assert compilers.compiler_packages(torch) == []
    monkeypatch.setenv("IMAML_CUDA", "on")  # a folder of wheels may contain them
    assert compilers.compiler_packages(torch) == packages("13.0")
    monkeypatch.delenv("IMAML_CUDA")
    monkeypatch.setenv(name, "0")
    assert compilers.compiler_packages(torch) == packages("13.0")


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no /proc")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["install", "--no-index", "."], "--no-index"),
        (["install", "--no-ind", "."], "--no-ind"),
        (["pip", "install", "--offline", "."], "--offline"),
        (["install", "--no-input", "--index-url", "--offline-mirror", "."], ""),
    ],
)
def test_an_offline_option_of_the_frontend_is_recognised(arguments, expected):
    backend = "import imaml_cuda; print(imaml_cuda.offline())"
    frontend = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {backend!r}])"
    env = {name: value for name, value in os.environ.items() if name not in OF_OFFLINE}
    env |= {"PYTHONPATH": str(BACKEND), "PIP_CONFIG_FILE": os.devnull}
    said = subprocess.run(
        [sys.executable, "-c", frontend, *arguments], env=env, stdout=subprocess.PIPE, text=True
    ).stdout
    assert said == expected + "\n"


def test_an_offline_setting_of_pip_is_recognised(compilers, tmp_path, monkeypatch):
    pytest.importorskip("pip")
    monkeypatch.undo()  # the fixture replaced it
    for name in OF_OFFLINE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(compilers, "_command_line", lambda process: ["/usr/bin/python", "pip"])
    configuration = tmp_path / "pip.conf"
    monkeypatch.setenv("PIP_CONFIG_FILE", str(configuration))
    for text, expected in (
        ("[install]\nno-index = true\n", "no-index in pip's configuration"),
        ("[global]\nno-index = 1\n", "no-index in pip's configuration"),
        ("[global]\nno-index = false\n", ""),
        ("[global]\nindex-url = https://example.org/no-index\n", ""),
    ):
        configuration.write_text(text)
        assert compilers.offline() == expected
    configuration.write_text("[global]\nno-index = true\n")
    monkeypatch.setenv("PIP_NO_INDEX", "0")  # a variable overrides a file
    assert compilers.offline() == ""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setattr(compilers, "_command_line", lambda process: ["/usr/bin/uv", "pip"])
    assert compilers.offline() == ""  # uv does not read it


def test_a_build_without_cuda_kernels_reports_why_and_the_remedy(compilers, tmp_path, monkeypatch):
    torch = fake_torch(tmp_path, "2.14.1", cuda="13.0")
    line = compilers.shortfall(torch)
    assert "torch has CUDA 13.0, but there is no working nvcc. For" in line
    assert f"pip install '{packages('13.0')[0]}', then pip install --force-reinstall" in line
    monkeypatch.setenv("UV_OFFLINE", "1")
    assert "offline (UV_OFFLINE=1)" in compilers.shortfall(torch)
    old = fake_torch(tmp_path / "old", "2.10.0", cuda="12.8")
    assert "CUDA 12.8" in compilers.shortfall(old)
    assert "install the CUDA toolkit, then" in compilers.shortfall(old)
    assert not any("\n" in compilers.shortfall(t) for t in (torch, old))


TELL = "import imaml_cuda; imaml_cuda.tell('the line')"


def test_a_line_reaches_the_terminal_although_stderr_is_captured(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(BACKEND))
    screen, terminal = pty.openpty()
    take = f"import fcntl, termios; fcntl.ioctl({terminal}, termios.TIOCSCTTY, 0)"
    ran = subprocess.run(
        [sys.executable, "-c", f"{take}; {TELL}"],
        capture_output=True, text=True, pass_fds=[terminal], start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    shown = os.read(screen, 1024)
    os.close(screen)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "the line\n")
    assert shown.split(b"\r\n").count(b"the line") == 1


def test_without_a_terminal_a_line_goes_to_stderr_only(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(BACKEND))
    ran = subprocess.run(
        [sys.executable, "-c", TELL], capture_output=True, text=True, start_new_session=True
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "the line\n")


def configure(folder, found, **settings):
    """Run cuda.cmake with an imaml_cuda.py that prints `found`."""
    shutil.copytree(ROOT / "cmake", folder / "cmake")
    (folder / "build_backend").mkdir()
    (folder / "build_backend" / "imaml_cuda.py").write_text(f"print({found!r})\n")
    (folder / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(test LANGUAGES NONE)\n"
        "include(cmake/cuda.cmake)\n"
    )
    settings |= {"Python_EXECUTABLE": sys.executable, "TORCH_root": "/nowhere/torch"}
    return subprocess.run(
        ["cmake", "-S", ".", "-B", "build", *(f"-D{k}={v}" for k, v in settings.items())],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip


LACKS = "IMAML_LACKS_NVCC:INTERNAL=ON"


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
@pytest.mark.parametrize(
    ("wanted", "cuda", "error", "lacks"),
    [
        ("auto", "13.0", "", True),
        ("auto", "", "", False),
        ("off", "13.0", "", False),
        ("on", "13.0", "IMAML_CUDA=on, but there is no working nvcc", False),
        ("on", "", "IMAML_CUDA=on, but there is no working nvcc", False),
        ("yes", "13.0", "IMAML_CUDA must be auto, on or off, got 'yes'", False),
    ],
)
def test_without_nvcc_cmake_fails_if_imaml_cuda_is_on_and_otherwise_records_it(
    wanted, cuda, error, lacks, tmp_path
):
    ran = configure(tmp_path, "", IMAML_CUDA=wanted, TORCH_cuda=cuda)
    assert (ran.returncode != 0) == bool(error)
    assert error in " ".join(ran.stderr.split())
    assert (LACKS in (tmp_path / "build" / "CMakeCache.txt").read_text()) == lacks
