"""The operator checks of `.ci/gpu`: complete, and sensitive to wrong results."""

import pytest
import torch


def test_every_operator_has_a_case_and_passes_on_the_cpu(check, capsys):
    smoke, cases = check("smoke"), check("operator_cases")
    every = smoke.Smoke()
    operators = smoke.check_operators(every, torch.device("cpu"), [17])
    assert set(operators) <= set(cases.CASES)
    assert not every.failed, capsys.readouterr().out
    assert every.passed > 2 * len(operators)


def test_an_operator_without_a_case_fails(check, monkeypatch):
    smoke = check("smoke")
    monkeypatch.delitem(smoke.operator_cases.CASES, "row_dot")
    every = smoke.Smoke()
    smoke.check_operators(every, torch.device("cpu"), [17])
    assert every.failed == ["row_dot"]


@pytest.mark.parametrize("fault", ["value", "row", "status"])
def test_an_operator_with_a_wrong_result_fails(check, monkeypatch, fault):
    smoke, cases = check("smoke"), check("operator_cases")
    _, operands = next(cases.cg_step([17]))
    right, calls = smoke.called, []

    def wrong(operator, given):
        results = right(operator, given)
        calls.append(len(given["x"]))
        if fault == "value" and len(calls) == 2:  # the first call on the device
            results["x"][0, 3] += 1e-5
        if fault == "row" and calls[-1] == 1:  # a row alone
            results["r"][0, 3] *= 1 + 1e-6
        if fault == "status" and len(calls) == 2:
            results["status"][0] = 1
        return results

    monkeypatch.setattr(smoke, "called", wrong)
    message = {"value": "x is off by", "row": "row 0 alone", "status": "status: "}[fault]
    with pytest.raises(AssertionError, match=message):
        smoke.check_operator("cg_step_", operands, torch.device("cpu"), torch.float32)
