"""Tables 2 and 3: their data, the settings that differ by variant, and the run, cell by cell."""

import contextlib
import dataclasses
import json
import os
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from imaml_ext import MAML, GradientDescent, Trainer
from imaml_ext.cli import main
from imaml_ext.experiments.authors_code import AuthorsCodeCG, DescentThenProximal
from imaml_ext.experiments.build import build
from imaml_ext.experiments.cells import ROWS, TABLES, VARIANTS, cell
from imaml_ext.experiments.presets import PRESETS
from imaml_ext.experiments.registry import DATASETS
from imaml_ext.experiments.reproduce import STUDIES, tables
from imaml_ext.experiments.reproduce.study import read
from imaml_ext.experiments.reproduce.table_report import markdown, write_section
from imaml_ext.experiments.run import train_to_end
from imaml_ext.problem.layout import Layout
from imaml_ext.problem.objective import Objective
from imaml_ext.problem.proximal import Proximal
from imaml_ext.training.checkpoint import load_checkpoint
from imaml_ext.training.trainer import NonfiniteError

# ---- the data ---------------------------------------------------------------------------------


def every_cell():
    for table, description in TABLES.items():
        for column in description.columns:
            for row in ROWS:
                for variant in VARIANTS:
                    with contextlib.suppress(ValueError):
                        yield cell(table, column, row, variant)


def test_every_cell_of_table_2_has_settings_in_every_flavour_that_exists():
    names = [one.name for one in every_cell()]
    assert len(set(names)) == len(names)
    of_table_2 = [one for one in every_cell() if one.table == "table2"]
    assert len(of_table_2) == 20 + 16 + 4  # ours, paper without Reptile, the code's iMAML
    for one in of_table_2:
        way, shot = int(one.column.split("w")[0]), int(one.column[-2])
        assert (one.train.way, one.train.shot) == (way, shot)
        assert one.published is not None
        assert one.test.eval_query == shot


def test_the_papers_settings():
    one = cell("table2", "20w5s", "imaml-gd", "paper").train
    assert (one.lam, one.inner_lr, one.inner_steps, one.cg_steps) == (2.0, 0.1, 25, 5)
    assert (one.tasks, one.query, one.meta_lr, one.decay) == (32, 5, 1e-3, "constant")
    assert cell("table2", "5w1s", "imaml-gd", "paper").train.inner_steps == 16
    assert cell("table2", "5w1s", "imaml-hf", "paper").train.inner == "hessian-free"
    assert cell("table3", "5w1s", "imaml-gd", "paper").train.lam == 0.5
    assert cell("table2", "20w1s", "imaml-hf", "paper").published == (96.18, 0.36)
    maml = cell("table2", "5w1s", "maml", "paper")
    assert (maml.train.inner_steps, maml.test.inner_steps) == (1, 3)


def test_a_flavour_without_cells_is_refused(tmp_path, capsys):
    arguments = ["reproduce", "table3", "--variant", "authors_code", "--out", str(tmp_path)]
    assert main(arguments) == 1
    assert "table3 has no cell in variant 'authors_code'" in capsys.readouterr().err


def test_a_cell_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="column must be one of"):
        cell("table3", "20w1s", "maml")
    with pytest.raises(ValueError, match="an inner Adam"):
        cell("table2", "5w1s", "reptile", "paper")
    with pytest.raises(ValueError, match="only imaml-gd in table2"):
        cell("table2", "5w1s", "maml", "authors_code")


# ---- what the released code does --------------------------------------------------------------


def quadratic(tasks=3, dim=4):
    factor = torch.randn(tasks, dim, dim, dtype=torch.float64)
    hessian, linear = factor @ factor.mT / dim, torch.randn(tasks, dim, dtype=torch.float64)

    def loss(params, data):
        h, b = data
        return 0.5 * params["w"] @ h @ params["w"] - b @ params["w"]

    theta = torch.randn(dim, dtype=torch.float64)
    layout = Layout({"w": theta.requires_grad_()})
    problem = Proximal(
        Objective(loss, layout, (hessian, linear)), theta.detach(), theta.detach().new_full((1,), 2)
    )
    return problem, hessian, linear


def test_the_released_code_applies_the_proximal_term_once():
    problem, hessian, linear = quadratic()
    phi = problem.start()
    for _ in range(7):
        phi = phi - 0.1 * ((hessian @ phi[..., None])[..., 0] - linear)
    want = problem.theta + (1 - 0.1 * 2) * (phi - problem.theta)
    got = DescentThenProximal(lr=0.1, steps=7).solve(problem).value
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, GradientDescent(lr=0.1, steps=7).solve(problem).value)


def test_the_released_code_solves_another_system():
    problem, hessian, _ = quadratic()
    v = torch.randn(3, 4, dtype=torch.float64)
    at = problem.objective.linearise(problem.start(), "hessian")
    solution = AuthorsCodeCG(max_iter=8).solve(at.matvec, v, problem.lam)
    lam = 2.0
    system = 2 * torch.eye(4, dtype=torch.float64) + hessian / (lam + 10)
    torch.testing.assert_close(lam * solution.value, torch.linalg.solve(system, v))
    with pytest.raises(ValueError, match="carries no curvature"):  # no certificate of the true one
        _ = solution.error_estimate


def test_without_the_proximal_term_adaptation_is_plain_descent():
    config = dataclasses.replace(PRESETS["sinusoid"], lam=5.0, inner_steps=3)
    with_term = build(config)
    without = with_term.adapting(eval_proximal=False)
    support = with_term.sources["test"].sample(0).support
    maml = with_term.adapting(method="maml").method.adapt(support)
    for name, phi in without.method.adapt(support).items():
        torch.testing.assert_close(phi, maml[name])
        assert not torch.allclose(phi, with_term.method.adapt(support)[name])


def test_adapting_otherwise_keeps_what_was_learned():
    one = build(dataclasses.replace(PRESETS["sinusoid"], learn_lam="scalar"))
    with torch.no_grad():
        for tensor in one.method.extra().values():
            tensor += 1
    other = one.adapting(eval_proximal=False, inner_steps=3).method
    for name, tensor in one.method.extra().items():
        torch.testing.assert_close(other.extra()[name], tensor)


# ---- time as the limit ------------------------------------------------------------------------


class Clock:
    """Every look at it is 0.5 s later."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.5
        return self.now


def test_a_run_limited_by_time_ends_there_and_its_rate_falls(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "imaml_ext.training.trainer.time.perf_counter", Clock()
    )  # a step takes 0.5 s
    config = dataclasses.replace(PRESETS["sinusoid"], tasks=2, minutes=10 / 60, meta_steps=10**6)
    one = build(config)
    trainer = one.trainer()
    rates = []
    step = trainer.step

    def noting():
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        return step()

    monkeypatch.setattr(trainer, "step", noting)
    train_to_end(one, trainer, tmp_path / "c.pt", validations=4)
    assert trainer.steps == 20
    assert trainer.seconds == 10
    assert rates[:10] == [config.meta_lr] * 10
    assert all(a > b for a, b in pairwise(rates[11:]))
    assert rates[-1] < 0.25 * config.meta_lr
    assert [record["step"] for record in trainer.validation] == [5, 10, 15, 20]


# ---- a table, on small images of the test's own -----------------------------------------------


@pytest.fixture
def few_classes(monkeypatch):
    """Classes that differ in where they are bright, in place of Omniglot."""
    images = (40 * torch.rand(30, 12, 28, 28)).to(torch.uint8)
    for c in range(30):
        images[c, :, 5 * (c % 5) : 5 * (c % 5) + 4, 4 * (c // 5) : 4 * (c // 5) + 4] += 200
    parts = dict(zip(("train", "val", "test"), images.split(10), strict=True))
    few = dataclasses.replace(DATASETS["omniglot"], images=lambda *_: parts)
    monkeypatch.setitem(DATASETS, "omniglot", few)
    return parts


def reproduce(folder, *more):
    return main(
        [
            "reproduce", "table2", "--cells", "5w1s", "--out", str(folder / "results"),
            "--runs", str(folder / "runs"), "--eval-tasks", "20", "--device", "cpu", *more,
        ]
    )  # fmt: skip


def lines(folder):
    return [json.loads(x) for x in (folder / "results" / "table2.jsonl").read_text().splitlines()]


def test_a_table_grows_cell_by_cell(tmp_path, capsys, few_classes, monkeypatch):
    monkeypatch.setattr(tables, "_TRAINED", 3)
    quick = ["--meta-steps", "3"]  # enough to be tested
    assert reproduce(tmp_path, *quick, "--methods", "fomaml") == 0
    assert "published 98.3" in capsys.readouterr().out
    (first,) = lines(tmp_path)
    assert first["test_tasks"] == 20
    assert first["meta_steps"] == 3
    assert [step for step, _, _ in first["curve"]] == [1, 2, 3]
    assert {"commit", "command", "device", "torch", "date"} <= first["source"].keys()

    assert reproduce(tmp_path, *quick, "--methods", "fomaml", "imaml-gd") == 0
    assert "already measured" in capsys.readouterr().out
    fomaml, imaml = lines(tmp_path)
    assert fomaml == first
    assert "no_proximal_accuracy" in imaml
    assert "no_proximal_accuracy" not in fomaml
    text = (tmp_path / "results" / "README.md").read_text()
    assert f"| **{imaml['accuracy']:.2f} ± {imaml['ci95']:.2f}** | 99.16 ± 0.35 |" in text
    assert "- MAML (published: 98.7 ± 0.4 %)" in text  # not trained
    assert (tmp_path / "results" / "table2-5w1s.png").stat().st_size > 1000

    # the model kept is the better one on validation classes, and evaluates to its figure
    best = max((fomaml, imaml), key=lambda record: record["val_accuracy"])
    assert f"{ROWS[best['row']]}, is kept: `imaml-ext eval models/table2-5w1s.pt" in text
    model = tmp_path / "results" / "models" / "table2-5w1s.pt"
    arguments = ["eval", str(model), "--eval-tasks", "20", "--device", "cpu", "--json"]
    assert main(arguments) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["accuracy"] == best["accuracy"]
    assert figures["support_accuracy"] == best["support_accuracy"]


def test_the_model_is_kept_by_validation_and_not_by_the_test(
    tmp_path, capsys, few_classes, monkeypatch
):
    monkeypatch.setattr(tables, "_TRAINED", 1)
    figures = {"maml": (90.0, 10.0), "fomaml": (10.0, 95.0), "reptile": (80.0, 80.0)}

    def tested(_, one, tasks):
        val, test = figures[one.row]
        named = {"val_accuracy": val, "val_ci95": 1.0, "accuracy": test, "ci95": 1.0}
        return {"test_tasks": tasks, "adaptation_steps": 1, **named}

    monkeypatch.setattr(tables, "_test", tested)
    assert reproduce(tmp_path, "--meta-steps", "1", "--methods", *figures) == 0
    capsys.readouterr()
    state = load_checkpoint(tmp_path / "results" / "models" / "table2-5w1s.pt")
    assert json.loads(state["config"])["method"] == "maml"


def test_other_evaluation_tasks_are_another_test_of_the_same_training(
    tmp_path, capsys, few_classes, monkeypatch
):
    monkeypatch.setattr(tables, "_TRAINED", 1)
    command = ["--meta-steps", "1", "--methods", "fomaml"]
    assert reproduce(tmp_path, *command) == 0
    monkeypatch.setattr(Trainer, "step", None)  # nothing is trained again
    assert reproduce(tmp_path, *command, "--eval-tasks", "40") == 0
    assert [record["test_tasks"] for record in lines(tmp_path)] == [20, 40]
    assert tables.select(lines(tmp_path)) == lines(tmp_path)[1:]
    capsys.readouterr()


def test_another_length_is_another_run_from_the_start(tmp_path, capsys, few_classes, monkeypatch):
    monkeypatch.setattr(tables, "_TRAINED", 2)
    for steps in ("1", "2", "3"):  # the first is a timing
        assert reproduce(tmp_path, "--meta-steps", steps, "--methods", "fomaml") == 0
    assert [record["meta_steps"] for record in lines(tmp_path)] == [1, 2, 3]
    assert len(list((tmp_path / "runs").iterdir())) == 3
    assert len(tables.select(lines(tmp_path))) == 3  # none displaces another
    capsys.readouterr()


def test_a_cell_that_fails_is_reported_and_the_others_go_on(
    tmp_path, capsys, few_classes, monkeypatch
):
    step = Trainer.step

    def failing_step(trainer):
        if isinstance(trainer.method, MAML):
            raise NonfiniteError("meta-step 0: the meta-gradient is not finite")
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", failing_step)
    assert reproduce(tmp_path, "--meta-steps", "1", "--methods", "maml", "fomaml") == 0
    maml, fomaml = lines(tmp_path)
    assert maml["failed"].startswith("meta-step 0")
    assert fomaml["meta_steps"] == 1
    assert "meta-step 0: the meta-gradient" in (tmp_path / "results" / "README.md").read_text()
    capsys.readouterr()


def test_a_short_run_is_a_timing(tmp_path, capsys, few_classes):
    assert reproduce(tmp_path, "--methods", "maml", "--meta-steps", "2") == 0
    assert "a timing: seconds a meta-step" in capsys.readouterr().out
    (record,) = lines(tmp_path)
    assert "accuracy" not in record
    assert "curve" not in record
    assert not (tmp_path / "results" / "models").exists()
    assert "s for a meta-step of 8 tasks" in (tmp_path / "results" / "README.md").read_text()


def test_a_cell_that_was_stopped_goes_on_as_if_it_had_not_been(
    tmp_path, capsys, few_classes, monkeypatch
):
    monkeypatch.setattr(tables, "_TRAINED", 1)
    command = ["--methods", "imaml-gd", "--meta-steps", "4"]
    assert reproduce(tmp_path / "whole", *command) == 0
    step = Trainer.step

    def interrupted_step(trainer):
        if trainer.steps == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", interrupted_step)
    assert reproduce(tmp_path / "cut", *command) == 130
    monkeypatch.setattr(Trainer, "step", step)
    assert "to resume: repeat the command" in capsys.readouterr().err
    (folder,) = (tmp_path / "cut" / "runs").iterdir()
    assert load_checkpoint(folder / "checkpoint.pt")["steps"] == 2
    assert reproduce(tmp_path / "cut", *command) == 0
    capsys.readouterr()
    (whole,), (cut,) = lines(tmp_path / "whole"), lines(tmp_path / "cut")
    for record in (whole, cut):
        for timed in ("seconds", "source"):
            record.pop(timed)
        record["curve"] = [[s, a] for s, _, a in record["curve"]]
    assert cut == whole


def test_a_checkpoint_of_other_settings_is_not_taken_for_the_cell(
    tmp_path, capsys, few_classes, monkeypatch
):
    assert reproduce(tmp_path, "--methods", "fomaml", "--meta-steps", "1") == 0
    one = cell("table2", "5w1s", "fomaml")
    changed = dataclasses.replace(one, train=dataclasses.replace(one.train, inner_lr=0.123))
    monkeypatch.setattr(tables, "cell", lambda *_: changed)
    assert reproduce(tmp_path, "--methods", "fomaml", "--meta-steps", "1") == 1
    assert "was trained with inner_lr=0.1, got 0.123" in capsys.readouterr().err


def test_the_published_protocols_change_what_they_should(
    tmp_path, capsys, few_classes, monkeypatch
):
    monkeypatch.setattr(tables, "_TRAINED", 1)
    assert reproduce(tmp_path, "--variant", "authors_code", "--meta-steps", "1") == 0
    (record,) = lines(tmp_path)  # of the one row that has this variant
    assert record["test"] == {"eval_proximal": False}
    assert "proximal_accuracy" in record
    assert record["config"]["meta_eps"] == 1e-3
    capsys.readouterr()


def test_sections_are_replaced_and_what_is_written_by_hand_stays(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# By hand\n")
    write_section(path, "a", "one\n")
    write_section(path, "b", "two\n")
    write_section(path, "a", "three\n")
    text = path.read_text()
    assert text.startswith("# By hand\n")
    assert "one" not in text
    assert text.index("three") < text.index("two")


@pytest.mark.parametrize("table", list(TABLES))
def test_the_published_section_follows_from_the_published_lines(table):
    results = Path(__file__).parents[2] / "results"
    if not (results / f"{table}.jsonl").is_file():
        pytest.skip("nothing is published of this table, or the sources are not here")
    section = markdown(table, read(STUDIES[table], results / f"{table}.jsonl"))
    assert section in (results / "README.md").read_text()


def test_short_runs_say_what_a_whole_one_would_take():
    record = {
        "table": "table2", "column": "20w5s", "row": "maml", "variant": "paper", "seconds": 30.0,
        "meta_steps": 3, "config": {"tasks": 16}, "source": {"device": "a machine", "threads": 2},
    }  # fmt: skip
    text = markdown("table2", [record])
    assert (
        "10.0 s for a meta-step of 16 tasks on a machine, 2 thread(s), so 60,000 would take "
        "167 hours" in text
    )


@pytest.mark.parametrize("table", list(TABLES))
def test_every_table_is_a_study(table):
    assert table in STUDIES
