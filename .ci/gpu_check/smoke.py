"""Checks the extension's operators, meta-gradients and training on a device.

Every operator with a kernel for the device is called on the device, and on the CPU in float64:
results and statuses must agree; a second call, and a call with one row, must give the same bits. An
operator without a case fails. Then a captured meta-gradient and captured training are checked.

Tests the imaml_ext that Python imports. Prints a line for each check, and JSON at the end.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import imaml_ext
from imaml_ext.ops.rows import cluster_occupancy

sys.path.insert(0, str(Path(__file__).resolve().parent))
import operator_cases

# A sum over 500,000 elements that omits one is off by 2e-6. Elements are rounded a few times, and
# in float64 sums the rounding errors of the terms cancel.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
LAYER_TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}  # sums of products in that dtype

Operands = dict[str, Any]


class Smoke:
    """Runs checks and counts them; one that fails does not stop the others."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed: list[str] = []

    def check(self, name: str, run: Callable[[], str]) -> None:
        try:
            print(f"ok     {name}: {run()}", flush=True)
            self.passed += 1
        except Exception as error:
            message = " ".join(str(error).split())[:200]
            print(f"FAILED {name}: {type(error).__name__}: {message}", flush=True)
            if not isinstance(error, AssertionError):
                traceback.print_exc(file=sys.stdout)
            self.failed.append(name)


def converted(operator: str, operands: Operands, dtype: torch.dtype) -> Operands:
    """Copies, in `dtype` except for operands that are always float64."""
    own = operator_cases.ALWAYS_DOUBLE if operator in operator_cases.ON_ROWS else set()
    return {
        name: value.to(dtype, copy=True)
        if isinstance(value, Tensor) and value.dtype.is_floating_point and name not in own
        else copied(value)
        for name, value in operands.items()
    }


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def called(operator: str, operands: Operands) -> dict[str, Tensor]:
    """Call the operator on copies. Returns the tensors that it returns, or writes to, by name."""
    overload = getattr(torch.ops.imaml, operator).default
    arguments = overload._schema.arguments
    given = {argument.name: copied(operands[argument.name]) for argument in arguments}
    returned = overload(**given)
    results = {} if returned is None else {"result": returned}
    if isinstance(returned, tuple | list):
        results = {f"result {number}": tensor for number, tensor in enumerate(returned)}
    for argument in arguments:
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and given[argument.name] is not None:
            results[argument.name] = given[argument.name]
    return results


def row(operands: Operands, number: int) -> Operands:
    return {
        name: value[number : number + 1].contiguous()
        if isinstance(value, Tensor) and name not in operator_cases.SHARED
        else value
        for name, value in operands.items()
    }


def largest_error(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> float:
    """The largest error relative to the largest element of a result; checks the tolerance."""
    worst = 0.0
    for name, expected in want.items():
        found = got[name].cpu()
        assert found.shape == expected.shape, f"{name}: {found.shape}, expected {expected.shape}"
        if expected.numel() == 0:
            continue
        if not expected.dtype.is_floating_point:
            assert torch.equal(found, expected), (
                f"{name}: {found.tolist()}, expected {expected.tolist()}"
            )
            continue
        found, expected = found.double(), expected.double()
        same = torch.equal(found.isfinite(), expected.isfinite())
        assert same, f"{name}: {(~found.isfinite()).sum()} elements are not finite"
        found, expected = found.nan_to_num(0, 0, 0), expected.nan_to_num(0, 0, 0)
        scale = expected.abs().max().clamp_min(1.0)
        error = ((found - expected).abs().max() / scale).item()
        assert error <= tolerance, f"{name} is off by {error:.1e}, tolerance {tolerance:.0e}"
        worst = max(worst, error)
    return worst


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Names of the results that differ."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().view(torch.uint8)

    return [name for name, t in first.items() if not torch.equal(bits(t), bits(second[name]))]


def check_operator(
    operator: str, operands: Operands, device: torch.device, dtype: torch.dtype
) -> str:
    layer = operator not in operator_cases.ON_ROWS
    tolerance = (LAYER_TOLERANCE if layer else TOLERANCE)[dtype]
    rounded = converted(operator, operands, dtype)  # so that both start from the same numbers
    want = called(operator, converted(operator, rounded, torch.float64))
    there = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in rounded.items()}
    got = called(operator, there)
    error = largest_error(got, want, tolerance)
    differ = same_bits(got, called(operator, there))
    assert not differ, f"a second call gives different bits of {differ}"
    rows = len(next(t for n, t in rounded.items() if n not in operator_cases.SHARED))
    for number in range(0 if operator in operator_cases.SUMS else rows):
        alone = called(operator, row(there, number))
        in_batch = {name: t[number : number + 1] for name, t in got.items()}
        differ = same_bits(in_batch, alone)
        assert not differ, f"row {number} alone gives different bits of {differ}"
    return f"largest error {error:.1e}"


def registered(device: torch.device) -> list[str]:
    """Operators with a kernel for the device."""
    key = {"cuda": "CUDA", "cpu": "CPU"}[device.type]
    return sorted(
        name.removeprefix("imaml::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("imaml::") and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    )


def check_operators(smoke: Smoke, device: torch.device, dims: list[int]) -> list[str]:
    operators = registered(device)
    for operator in operators:
        if operator not in operator_cases.CASES:
            smoke.check(operator, lambda: missing_case())
            continue
        for label, operands in operator_cases.CASES[operator](dims):
            for dtype in TOLERANCE:
                smoke.check(
                    f"{operator} {label} {str(dtype).removeprefix('torch.')}",
                    lambda o=operator, a=operands, d=dtype: check_operator(o, a, device, d),
                )
    return operators


def missing_case() -> str:
    raise AssertionError("no case in operator_cases.py")


def clusters(device: torch.device) -> Iterator[str]:
    """How many clusters of each size run at once, and which size is chosen."""
    if device.type == "cpu":
        yield "the CPU has none"
        return
    for dtype in TOLERANCE:
        for dim in (4097, 113221, 462848):
            for rows in (1, 16, 64):
                yield f"{dtype}, D={dim}, {rows} rows: {cluster_occupancy(dim, dtype, rows)}"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", default="cuda")
    options.add_argument("--dims", type=int, nargs="+", default=[17, 4097, 113221, 462848, 500000])
    options.add_argument("--operators-only", action="store_true", help="skip captures")
    chosen = options.parse_args()
    device, smoke = torch.device(chosen.device), Smoke()
    print(f"imaml_ext from {imaml_ext.__file__}, {imaml_ext.build_info()}, {device}", flush=True)
    operators = check_operators(smoke, device, chosen.dims)
    found: dict[str, Any] = {"operators": operators}
    if not chosen.operators_only:
        import captures

        smoke.check("clusters", lambda: "; ".join(clusters(device)))
        for name, run in captures.CHECKS.items():
            smoke.check(name, lambda run=run: run(device))
    found["checks passed"] = smoke.passed
    if smoke.failed:
        print(f"{len(smoke.failed)} checks failed, {smoke.passed} passed")
        return 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
