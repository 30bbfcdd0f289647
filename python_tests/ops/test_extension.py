"""The compiled extension: loading, build information, and its numbers of the statuses."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operator_calls import OPERATORS

import imaml_ext
from imaml_ext import ops
from imaml_ext.ops import extension
from imaml_ext.solvers.solution import Status


@pytest.mark.skipif(bool(ops.build_info()["cuda"]), reason="built with CUDA kernels")
def test_every_operator_of_a_cpu_build_names_the_remedy_on_cuda_tensors():
    # There may be no GPU, so the CUDA kernel is called directly.
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    values = {"Tensor": torch.ones(1), "float": 1.0, "int": 1, "SymInt": 1, "bool": False}
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("imaml::")]
    assert {name.partition("::")[2] for name in names} >= set(OPERATORS)
    for name in names:
        operator = getattr(torch.ops.imaml, name.partition("::")[2]).default
        arguments = [values.get(str(a.type)) for a in operator._schema.arguments]
        remedy = (
            f"^{operator._opname}: .* without CUDA kernels: reinstall it with `pip install [^\n]*$"
        )
        with pytest.raises(RuntimeError, match=remedy) as caught:
            operator.redispatch(cuda, *arguments)
        assert type(caught.value) is RuntimeError


def test_status_has_the_numbers_of_the_kernels():
    header = Path(__file__).parents[2] / "csrc" / "formulas.h"
    if not header.is_file():
        pytest.skip("needs the sources")
    text = header.read_text()
    for status in Status:
        name = "k" + "".join(word.capitalize() for word in status.name.split("_"))
        assert f"{name} = {status.value}," in text


def test_build_info_names_the_version():
    assert imaml_ext.build_info()["version"] == imaml_ext.__version__


@pytest.mark.parametrize(
    ("stub", "message"),
    [
        ("raise ImportError('undefined symbol: x')", "pip install ."),
        ("def build_info(): return {'version': '0.0.0'}", "pip install --force-reinstall"),
        (None, "start it in another folder"),  # the sources, not built in place
    ],
)
def test_a_missing_or_stale_extension_names_the_remedy(stub, message, tmp_path):
    package = tmp_path / "imaml_ext"
    shutil.copytree(imaml_ext.__path__[0] + "/ops", package / "ops")
    shutil.copy2(imaml_ext.__path__[0] + "/_version.py", package)
    (package / "__init__.py").write_text("")
    if stub is None:
        (tmp_path / "setup.py").write_text("")
    else:
        (package / "_C.py").write_text(stub)
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if '__editable__' not in str(f)]"
    result = subprocess.run(
        [sys.executable, "-c", f"{code}; import imaml_ext.ops"],  # not one of an editable install
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "ImportError: imaml_ext: " in result.stderr
    assert message in result.stderr


@pytest.mark.skipif(not hasattr(extension.extension, "cg_occupancy"), reason="built without CUDA")
def test_cluster_occupancy_describes_the_launch_of_cg_step():
    blocks, concurrent_rows = ops.cluster_occupancy(113221, torch.float32, 16)
    assert list(concurrent_rows) == [1, 2, 4, 8, 16]
    if torch.cuda.is_available():
        assert blocks == 0 or concurrent_rows[blocks] > 0
    else:
        assert (blocks, sum(concurrent_rows.values())) == (0, 0)
