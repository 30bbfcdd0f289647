"""Tables 2 and 3: training and testing cell by cell, and the report."""

import dataclasses
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from imaml_ext import MAML, Trainer
from imaml_ext.cli import main
from imaml_ext.experiments import cells
from imaml_ext.experiments.cells import ROWS, TABLES, cell
from imaml_ext.experiments.models import conv4
from imaml_ext.experiments.registry import DATASETS
from imaml_ext.experiments.reproduce import STUDIES, table_report, tables
from imaml_ext.experiments.reproduce.study import read
from imaml_ext.experiments.reproduce.table_report import (
    extrapolated,
    markdown,
    overview,
    write_section,
)
from imaml_ext.training.checkpoint import load_checkpoint
from imaml_ext.training.trainer import NonfiniteError


def test_a_variant_without_cells_is_refused(tmp_path, capsys):
    arguments = ["reproduce", "table3", "--variant", "authors_code", "--out", str(tmp_path)]
    assert main(arguments) == 1
    message = "variant of mini-imagenet must be one of 'ours', 'paper', got 'authors_code'"
    assert message in capsys.readouterr().err


@pytest.fixture
def few_classes(monkeypatch):
    """Small images whose classes differ in where they are bright, in place of Omniglot."""
    monkeypatch.setitem(conv4.__kwdefaults__, "filters", 8)  # a narrow network is fast
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


@pytest.mark.renders
def test_a_table_grows_cell_by_cell(tmp_path, capsys, few_classes, monkeypatch):
    monkeypatch.setattr(tables, "_TRAINED", 3)
    monkeypatch.chdir(tmp_path)
    here = Path()
    quick = ["--meta-steps", "3"]  # enough to be tested
    assert reproduce(here, *quick, "--methods", "fomaml") == 0
    printed = capsys.readouterr()
    assert "published 98.3" in printed.out
    assert "evaluating on 20 unseen tasks" in printed.err
    (first,) = lines(here)
    assert first["test_tasks"] == 20
    assert first["meta_steps"] == 3
    assert [step for step, _, _ in first["curve"]] == [1, 2, 3]
    assert {"commit", "command", "device", "torch", "date"} <= first["source"].keys()

    assert reproduce(here, *quick, "--methods", "fomaml", "imaml-gd") == 0
    already = "table2-5w1s-fomaml-ours: already in results/table2.jsonl, not trained again"
    assert already in capsys.readouterr().out
    fomaml, imaml = lines(here)
    assert fomaml == first
    assert "no_proximal_accuracy" in imaml
    assert "no_proximal_accuracy" not in fomaml
    text = (here / "results" / "README.md").read_text()
    assert f"| **{imaml['accuracy']:.2f} ± {imaml['ci95']:.2f}** | 99.16 ± 0.35 |" in text
    assert "- MAML (published: 98.7 ± 0.4 %)" in text  # not trained
    assert (here / "results" / "table2-5w1s.png").stat().st_size > 1000

    # The model kept is the better one on validation classes, and reproduces its figure.
    best = max((fomaml, imaml), key=lambda record: record["val_accuracy"])
    method = f"classes: {ROWS[best['row']].label}: "
    command = re.search(f"{method}`imaml-ext (eval .*) --data FOLDER`", text).group(1)
    arguments = [*command.split(), "--eval-tasks", "20", "--device", "cpu", "--json"]
    assert main(arguments) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["accuracy"] == best["accuracy"]
    assert figures["support_accuracy"] == best["support_accuracy"]


def test_an_unknown_commit_is_left_out(tmp_path, capsys, few_classes, monkeypatch):
    monkeypatch.setattr(tables, "_TRAINED", 1)
    assert reproduce(tmp_path, "--meta-steps", "1", "--methods", "fomaml", "reptile") == 0
    capsys.readouterr()
    records = lines(tmp_path)
    for commits, clause in ((("", ""), ""), (("", "abc"), "commit abc; ")):
        for record, commit in zip(records, commits, strict=True):
            record["source"]["commit"] = commit
        text = markdown("table2", records, tmp_path)
        source = records[0]["source"]
        assert f"; torch {source['torch']}; {clause}{source['date'][:10]}. Commands:" in text


def test_only_rows_with_a_published_training_are_extrapolated(
    tmp_path, capsys, few_classes, monkeypatch
):
    monkeypatch.setattr(tables, "_TRAINED", 1)
    for steps in ("1", "3"):
        command = ["--meta-steps", steps, "--methods", "fomaml", "reptile"]
        assert reproduce(tmp_path, *command, "--eval-tasks", "40") == 0
    capsys.readouterr()
    text = (tmp_path / "results" / "README.md").read_text()
    (extrapolation,) = (line for line in text.splitlines() if "power law" in line)
    assert extrapolation.startswith("first-order MAML: ")


def test_the_model_to_keep_is_chosen_on_validation_classes(
    tmp_path, capsys, few_classes, monkeypatch
):
    monkeypatch.setattr(tables, "_TRAINED", 1)
    figures = {"maml": (90.0, 10.0), "fomaml": (10.0, 95.0), "reptile": (80.0, 80.0)}

    def tested(experiment, tasks):
        val, test = figures[experiment.config.method]
        named = {"val_accuracy": val, "val_ci95": 1.0, "accuracy": test, "ci95": 1.0}
        return {"test_tasks": tasks, "adaptation_steps": 1, **named}

    monkeypatch.setattr(tables, "_test", tested)
    assert reproduce(tmp_path, "--meta-steps", "1", "--methods", *figures) == 0
    capsys.readouterr()
    state = load_checkpoint(tmp_path / "results" / "models" / "table2-5w1s.pt")
    assert json.loads(state["config"])["method"] == "maml"


def test_the_implicit_head_is_kept_apart(tmp_path, capsys, few_classes, monkeypatch):
    monkeypatch.setattr(tables, "_TRAINED", 2)
    narrow = dataclasses.replace(
        cell("table2", "5w1s", "implicit-head"),
        train=dataclasses.replace(cell("table2", "5w1s", "implicit-head").train, train_way=7),
    )
    original = cell
    monkeypatch.setattr(
        tables, "cell", lambda *names: narrow if names[2] == "implicit-head" else original(*names)
    )
    command = ["--meta-steps", "2", "--methods", "implicit-head", "fomaml"]
    assert reproduce(tmp_path, *command) == 0
    head, _ = lines(tmp_path)
    assert "support_accuracy" not in head  # running statistics
    capsys.readouterr()
    text = (tmp_path / "results" / "README.md").read_text()
    assert "ridge regression, running statistics |" in text
    name = "table2-5w1s-implicit-head.pt"
    model = tmp_path / "results" / "models" / name
    assert f"learned features, implicit head: `imaml-ext eval {model} --data" in text
    assert main(["eval", str(model), "--eval-tasks", "20", "--device", "cpu", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["accuracy"] == head["accuracy"]


def test_another_number_of_evaluation_tasks_tests_the_same_training_again(
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


def test_another_length_is_a_new_training(tmp_path, capsys, few_classes, monkeypatch):
    monkeypatch.setattr(tables, "_TRAINED", 2)
    for steps in ("1", "2", "3"):  # the first is a timing
        assert reproduce(tmp_path, "--meta-steps", steps, "--methods", "fomaml") == 0
    assert [record["meta_steps"] for record in lines(tmp_path)] == [1, 2, 3]
    assert len(list((tmp_path / "runs").iterdir())) == 3
    assert len(tables.select(lines(tmp_path))) == 3  # none replaces another
    capsys.readouterr()


def test_a_cell_that_fails_is_reported_and_the_others_are_trained(
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
    assert "a timing: seconds per meta-step" in capsys.readouterr().out
    (record,) = lines(tmp_path)
    assert "accuracy" not in record
    assert "curve" not in record
    assert not (tmp_path / "results" / "models").exists()
    assert "s for a meta-step of 8 tasks" in (tmp_path / "results" / "README.md").read_text()


def test_a_resumed_cell_ends_as_an_uninterrupted_one(tmp_path, capsys, few_classes, monkeypatch):
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


def test_a_checkpoint_with_other_settings_is_refused(tmp_path, capsys, few_classes, monkeypatch):
    assert reproduce(tmp_path, "--methods", "fomaml", "--meta-steps", "1") == 0
    one = cell("table2", "5w1s", "fomaml")
    changed = dataclasses.replace(one, train=dataclasses.replace(one.train, inner_lr=0.123))
    monkeypatch.setattr(tables, "cell", lambda *_: changed)
    assert reproduce(tmp_path, "--methods", "fomaml", "--meta-steps", "1") == 1
    assert "was trained with inner_lr=0.1, got 0.123" in capsys.readouterr().err


@pytest.fixture
def quick_features(monkeypatch):
    monkeypatch.setattr(tables, "_TRAINED", 2)
    for name, features in cells.FEATURES.items():
        few = {"meta_steps": 3, "train_way": 6, "neighbours": 7}
        quick = dataclasses.replace(features, minutes=0.0, **few)
        monkeypatch.setitem(cells.FEATURES, name, quick)

    def with_few_neighbours(*names):
        one = cell(*names)
        return dataclasses.replace(one, train=dataclasses.replace(one.train, neighbours=6))

    monkeypatch.setattr(tables, "cell", with_few_neighbours)


def test_cells_start_from_features_that_are_learned_once(
    tmp_path, capsys, few_classes, quick_features, monkeypatch
):
    trained = []
    step = Trainer.step

    def counted_step(trainer):
        trained.append(type(trainer.method).__name__)
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", counted_step)
    command = ["--variant", "features", "--meta-steps", "2", "--methods", "ridge-head", "fomaml"]
    assert reproduce(tmp_path, *command) == 0
    assert reproduce(tmp_path, *command, "--cells", "5w5s") == 0
    assert trained == ["RidgeHead"] * 6 + ["FOMAML"] * 4
    capsys.readouterr()
    ridge, fomaml, *_ = lines(tmp_path)
    assert ridge["start"] == fomaml["start"]
    assert ridge["start"]["meta_steps"] == 3
    assert (ridge["meta_steps"], fomaml["meta_steps"]) == (0, 2)
    text = (tmp_path / "results" / "README.md").read_text()
    assert "| ridge head, from features | **" in text
    assert "| first-order MAML, from features | **" in text
    assert "| 0 + 0 | ridge regression |" in text  # minutes of the features, and after them
    assert "classes: first-order MAML, from features: `imaml-ext eval" in text
    state = load_checkpoint(tmp_path / "results" / "models" / "table2-5w1s.pt")
    assert json.loads(state["config"])["method"] == "fomaml"

    # Another seed learns its own features.
    assert reproduce(tmp_path, *command, "--seed", "1") == 0
    assert trained[10:] == ["RidgeHead"] * 6 + ["FOMAML"] * 2
    models = {path.name for path in (tmp_path / "results" / "models").iterdir()}
    names = ("omniglot-features", "omniglot-features-hard")
    assert models >= {f"{name}{seed}.pt" for name in names for seed in ("", "-seed1")}
    first, second = (
        load_checkpoint(tmp_path / "results" / "models" / f"{name}.pt")["seconds"] for name in names
    )
    assert second > first  # includes it
    seeds = [r["accuracy"] for r in lines(tmp_path) if r["column"] == "5w1s" and r["meta_steps"]]
    text = (tmp_path / "results" / "README.md").read_text()
    assert "| first-order MAML, from features, seed 1 | **" in text
    assert (
        f"first-order MAML, from features: {sum(seeds) / 2:.2f}% on average over 2 seeds, which "
        f"share the test tasks (standard deviation {abs(seeds[0] - seeds[1]) / 2**0.5:.2f}; "
    ) in text
    capsys.readouterr()


def test_a_record_of_a_version_without_some_settings_is_not_measured_again(
    tmp_path, capsys, few_classes, monkeypatch
):
    command = ["--methods", "fomaml", "--meta-steps", "1"]
    assert reproduce(tmp_path, *command) == 0
    (record,) = lines(tmp_path)
    for name in ("start", "average", "hard_tasks", "neighbours", "train_way"):
        del record["config"][name]
    (tmp_path / "results" / "table2.jsonl").write_text(json.dumps(record) + "\n")
    capsys.readouterr()
    assert reproduce(tmp_path, *command) == 0
    assert "not trained again" in capsys.readouterr().out


def test_the_authors_variant_is_tested_without_the_proximal_term(
    tmp_path, capsys, few_classes, monkeypatch
):
    monkeypatch.setattr(tables, "_TRAINED", 1)
    assert reproduce(tmp_path, "--variant", "authors_code", "--meta-steps", "1") == 0
    (record,) = lines(tmp_path)  # from the only row with this variant
    assert record["test"] == {"eval_proximal": False}
    assert "proximal_accuracy" in record
    assert record["config"]["meta_eps"] == 1e-3
    capsys.readouterr()


def test_a_section_is_replaced_and_handwritten_text_is_kept(tmp_path):
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
        pytest.skip("no published results for this table")
    records = read(STUDIES[table], results / f"{table}.jsonl")
    for section in (overview(table, records), markdown(table, records, Path("results"))):
        assert section in (results / "README.md").read_text()


def test_a_timing_is_extrapolated_to_the_whole_training():
    record = {
        "table": "table2", "column": "20w5s", "row": "maml", "variant": "paper", "seconds": 30.0,
        "meta_steps": 3, "config": {"tasks": 16}, "source": {"device": "a machine", "threads": 2},
    }  # fmt: skip
    text = markdown("table2", [record], Path("results"))
    assert (
        "10.0 s for a meta-step of 16 tasks on a machine, 2 thread(s), so 60,000 would take "
        "167 hours" in text
    )


@pytest.mark.parametrize("start", [{}, {"start": {"seconds": 600.0}}], ids=["", "features"])
def test_learning_curves_have_the_published_errors_and_name_features_only_if_used(
    start, tmp_path, monkeypatch
):
    figures = []
    monkeypatch.setattr(table_report, "save", lambda figure, path: figures.append(figure) or path)
    record = {
        "row": "maml", "variant": "ours", "seed": 0, "seconds": 120.0, "published": [98.7, 0.4],
        "config": {"tasks": 8, "minutes": 2.0, "meta_steps": 100},
        "curve": [[10, 60.0, 80.0], [20, 120.0, 90.0]],
    }  # fmt: skip
    other = record | {"row": "implicit-head", "published": None}
    untrained = record | {"row": "ridge-head", "curve": [], "start": {"seconds": 600.0}}
    records = [untrained, record | start, record | {"seed": 1}, other]
    table_report._draw_column(records, tmp_path / "x.png")
    by_tasks, by_minutes = figures[0].axes
    assert by_tasks.get_lines()[0].get_xydata().tolist() == [[80, 20], [160, 10]]
    begin = 10 if start else 0
    assert by_minutes.get_lines()[0].get_xydata().tolist() == [[begin + 1, 20], [begin + 2, 10]]
    for axis in (by_tasks, by_minutes):
        first, *_, published = axis.get_lines()
        assert published.get_ydata() == pytest.approx([1.3, 1.3])
        assert published.get_linestyle() == "--"
        assert tuple(published.get_color()) == tuple(first.get_color())
        assert len(axis.get_lines()) == 4
        assert ("features" in axis.get_xlabel()) == bool(start)
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == [
        "MAML, seed 0",
        "MAML, seed 1",
        "learned features, implicit head",
        "MAML, published (test classes)",
    ]


def run_of(tasks, error, half_width):
    return {
        "meta_steps": tasks // 8, "config": {"tasks": 8}, "accuracy": 100 - error,
        "ci95": half_width,
    }  # fmt: skip


def test_the_extrapolation_of_a_power_law_is_the_power_law():
    runs = [run_of(tasks, 400 * tasks**-0.5, 0.1) for tasks in (800, 8000, 80_000)]
    low, middle, high = extrapolated(runs, 640_000)
    assert middle == pytest.approx(4.0 / 640_000**0.5, rel=1e-9)
    assert low < middle < high


def test_the_interval_of_the_extrapolation_covers_the_truth_as_often_as_it_says():
    generator, covered = np.random.default_rng(0), 0
    sizes, spread = np.array([10_000, 100_000]), 0.05  # standard error of the logarithm
    for _ in range(400):
        errors = 40 * sizes**-0.27 * np.exp(spread * generator.standard_normal(2))
        runs = [run_of(n, e, 1.96 * spread * e) for n, e in zip(sizes, errors, strict=True)]
        low, _, high = extrapolated(runs, 640_000)
        covered += low <= 0.4 * 640_000**-0.27 <= high
    assert 0.92 < covered / 400 < 0.98


@pytest.mark.parametrize("table", list(TABLES))
def test_every_table_is_a_study(table):
    assert table in STUDIES


def test_the_overview_has_the_longest_training_of_each_variant():
    def record(column, variant, minutes, accuracy, seed=0, **more):
        train = vars(cell("table2", column, "maml", variant).train) | {"tasks": 8}
        return {
            "column": column, "row": "maml", "variant": variant, "seed": seed, "config": train,
            "seconds": 60 * minutes, "meta_steps": 1000, "accuracy": accuracy, "ci95": 0.25, **more,
        }  # fmt: skip

    start = {"start": {"seconds": 2700.0, "meta_steps": 5000}}
    text = overview(
        "table2",
        [
            record("5w1s", "ours", 15, 91.0),
            record("5w1s", "ours", 30, 92.0),
            record("5w1s", "ours", 30, 93.0, seed=1),
            record("20w1s", "features", 20, 94.0, **start),
            {"column": "5w5s", "row": "maml", "variant": "ours", "seconds": 3.0, "meta_steps": 2},
        ],
    )
    published, ours, features = text.splitlines()[2:5]
    assert published == "| MAML | published | 98.7 ± 0.4 | 99.9 ± 0.1 | 95.8 ± 0.3 | 98.9 ± 0.2 |"
    assert ours == "|  | random weights | **92.00 ± 0.25**<br>30 min, 8,000 tasks |  |  |  |"
    assert features == (
        "|  | from features |  |  | **94.00 ± 0.25**<br>45 + 20 min, 8,000 tasks |  |"
    )
