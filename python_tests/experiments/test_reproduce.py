"""The studies of the paper's analysis, at small sizes."""

import json

import pytest
import torch

from imaml_ext.cli import main
from imaml_ext.experiments.cells import TABLES
from imaml_ext.experiments.reproduce import STUDIES, fig2a, fig2b, sinusoid, table1
from imaml_ext.experiments.reproduce.study import Settings, read


def settings(data="nowhere", **more):
    return Settings(torch.device("cpu"), data, **more)


@pytest.fixture(scope="module")
def figure_2a():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fig2a, "BUDGETS", [10, 100, 2000])
        return list(fig2a.measure(settings()))


@pytest.mark.slow
def test_figure_2a_reaches_the_exact_gradient_and_its_estimates_follow_the_errors(figure_2a):
    maml, two, five, ten = (record["error"] for record in figure_2a)
    assert maml[-1] < 1e-6
    assert ten[-1] < 1e-6  # the closed form and the solvers agree
    assert two[-1] > 0.1  # a floor
    assert all(a <= b for a, b in zip(five[:2], maml[:2], strict=True))
    assert all(a <= b for a, b in zip(ten[:2], maml[:2], strict=True))
    for name in ("phi", "x"):
        pairs = zip(figure_2a[2][f"{name}_bound"], figure_2a[2][f"{name}_error"], strict=True)
        assert all(0.5 * error < bound < 100 * error for bound, error in pairs)


@pytest.mark.slow
def test_the_closed_form_of_figure_2a_is_the_derivative(figure_2a):
    # F(theta) = mean_i of the query loss at the exact optimum, differentiated by autograd.
    theta, batch = fig2a.make_tasks(0, torch.device("cpu"))
    theta.requires_grad_()
    hessian, linear = fig2a.normal_equations(batch.support)
    system = hessian + fig2a.LAM * torch.eye(len(theta), dtype=theta.dtype)
    best = torch.linalg.solve(system, linear + fig2a.LAM * theta)
    losses = [fig2a.loss({"w": w}, (x, y)) for w, x, y in zip(best, *batch.query, strict=True)]
    (want,) = torch.autograd.grad(torch.stack(losses).mean(), theta)
    # Measured as near the closed form, and near the derivative.
    *_, record = figure_2a
    assert record["error"][-1] < 1e-6
    got = fig2a.implicit_meta_grad(
        fig2a.loss, {"w": theta.detach()}, batch.support, batch.query, lam=fig2a.LAM,
        inner=fig2a.GradientDescent(record["lr"], record["inner_steps"][-1]),
        linear=fig2a.ConjugateGradient(record["cg_steps"]),
    )  # fmt: skip
    torch.testing.assert_close(got.params["w"], want, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_the_costs_of_table_1_grow_with_kappa_as_in_the_paper(monkeypatch):
    monkeypatch.setattr(table1, "KAPPAS", (5, 20))
    monkeypatch.setattr(table1, "DIM", 30)
    records = list(table1.measure(settings()))
    assert all(record["error"] <= table1.ERROR for record in records)
    slopes = table1.summary(records)
    assert slopes["maml"]["compute"] > 0.9
    assert slopes["maml-accelerated"]["compute"] < 0.7
    assert slopes["imaml"]["compute"] < 0.7
    assert slopes["maml"]["memory"] > 0.3
    assert abs(slopes["imaml"]["memory"]) < 0.2


def test_the_slope_of_a_power_law_is_its_exponent():
    assert table1.slope([(x, 7 * x**1.5) for x in (1.0, 10.0, 50.0)]) == pytest.approx(1.5)


def test_the_fewest_steps_are_found(monkeypatch):
    monkeypatch.setattr(table1, "ERROR", 0.5)
    for steps in (1, 2, 3, 17, 31):
        assert table1.fewest(lambda k, n=steps: 0.0 if k >= n else 1.0) == steps


def test_in_figure_2b_only_the_memory_of_maml_grows(monkeypatch, omniglot_root):
    points = [("maml", 1, 0), ("imaml", 1, 5), ("maml", 12, 0), ("imaml", 12, 5)]
    monkeypatch.setattr(fig2b, "POINTS", points)
    records = list(fig2b.measure(settings(omniglot_root)))
    bytes_of = {(r["method"], r["inner_steps"]): r["peak_bytes"] for r in records}
    assert bytes_of["maml", 12] > 2 * bytes_of["maml", 1]
    # The allocator alone changes a resident set by some 20 MiB.
    assert bytes_of["imaml", 12] < bytes_of["imaml", 1] + 40 * 2**20
    assert bytes_of["maml", 12] > bytes_of["imaml", 12] + 200 * 2**20


@pytest.mark.renders
def test_a_study_is_measured_and_drawn_again_without_measuring(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sinusoid, "INNER_STEPS", (1, 2))
    command = ["reproduce", "sinusoid", "--out", str(tmp_path), "--device", "cpu", "--json"]
    command += ["--eval-tasks", "20"]
    assert main([*command, "--meta-steps", "2"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["imaml, 2 inner steps"]["loss"] > 0
    lines = tmp_path / "sinusoid.jsonl"
    first = lines.read_text()
    assert len(first.splitlines()) == 6
    assert all(json.loads(line)["source"]["torch"] for line in first.splitlines())
    picture = tmp_path / "sinusoid.png"
    drawn = picture.read_bytes()
    picture.unlink()

    def fail(*_):
        raise AssertionError("drawing measured")

    monkeypatch.setattr(sinusoid, "build", fail)
    assert main([*command, "--draw-only"]) == 0
    printed = capsys.readouterr().out
    assert f"drawn     from {lines}, nothing was measured\n" in printed
    assert "measured  " not in printed
    assert picture.read_bytes() == drawn
    assert lines.read_text() == first


def test_the_last_run_is_drawn(tmp_path):
    lines = tmp_path / "x.jsonl"
    dates = ["2026-01-01", "2026-01-02", "2026-01-02"]
    lines.write_text("".join(json.dumps({"source": {"date": d}, "n": d}) + "\n" for d in dates))
    assert [record["n"] for record in read(STUDIES["sinusoid"], lines)] == dates[1:]


@pytest.mark.parametrize("study", list(STUDIES))
def test_missing_measurements_are_reported_in_one_line(study, tmp_path, capsys):
    arguments = ["reproduce", study, "--draw-only", "--out", str(tmp_path)]
    if study in TABLES:
        assert main(arguments) == 0  # a table with no cell trained
        assert "Not trained:" in (tmp_path / "README.md").read_text()
    else:
        assert main(arguments) == 1
        assert "does not contain measurements" in capsys.readouterr().err
    (tmp_path / f"{study}.jsonl").write_text("{}\n")
    assert main(arguments) == 1
    assert "does not contain measurements" in capsys.readouterr().err


def test_an_incomplete_line_is_reported_before_anything_is_measured(tmp_path, capsys):
    lines = tmp_path / "table1.jsonl"
    for content in ('{"a": 1}\n{"b": ', '{"a": 1}\n{"b": 2}'):
        lines.write_text(content)
        assert main(["reproduce", "table1", "--out", str(tmp_path), "--device", "cpu"]) == 1
        assert f"{lines}, line 2" in capsys.readouterr().err
        assert lines.read_text() == content


@pytest.mark.parametrize("budget", ["--budget", "--minutes"])
def test_table_flags_are_refused_for_other_studies(budget, tmp_path, capsys):
    assert main(["reproduce", "fig2a", budget, "3", "--out", str(tmp_path)]) == 1
    assert "apply to table2, table3, natural, got fig2a" in capsys.readouterr().err


def test_figure_2b_without_data_fails_in_one_line(tmp_path, capsys):
    assert main(["reproduce", "fig2b", "--data", str(tmp_path), "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "no Omniglot: expected" in error
    assert "with --data, or download it with imaml-ext train" in error
