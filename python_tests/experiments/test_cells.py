"""The cells of the tables as data."""

import contextlib

import pytest

from imaml_ext.experiments.cells import FEATURES, ROWS, TABLES, VARIANTS, cell


def every_cell():
    for table, description in TABLES.items():
        for column in description.columns:
            for row in ROWS:
                for variant in VARIANTS:
                    with contextlib.suppress(ValueError):
                        yield cell(table, column, row, variant)


@pytest.mark.parametrize("table", list(TABLES))
def test_every_column_has_our_settings_for_every_row(table):
    for column in TABLES[table].columns:
        assert ["ridge-head", *TABLES[table].rows(column, "ours")] == list(ROWS)


def test_every_cell_of_table_2_has_settings_in_every_variant_that_exists():
    names = [one.name for one in every_cell()]
    assert len(set(names)) == len(names)
    of_table_2 = [one for one in every_cell() if one.table == "table2"]
    # ours, with the implicit head; features, with the ridge head; paper, without Reptile;
    # authors_code, iMAML alone
    assert len(of_table_2) == 24 + 24 + 16 + 4
    for one in of_table_2:
        way, shot = int(one.column.split("w")[0]), int(one.column[-2])
        assert (one.train.way, one.train.shot) == (way, shot)
        assert (one.published is not None) == ROWS[one.row].of_paper
        # Batch norm of the query set has as many images of a class as the support set.
        assert one.train.eval_query == (5 if one.row == "implicit-head" else shot)
        assert (one.train.start in FEATURES) == (one.variant == "features")


def test_the_paper_variant_has_the_papers_settings():
    one = cell("table2", "20w5s", "imaml-gd", "paper").train
    assert (one.lam, one.inner_lr, one.inner_steps, one.cg_steps) == (2.0, 0.1, 25, 5)
    assert (one.tasks, one.query, one.meta_lr, one.decay) == (32, 5, 1e-3, "constant")
    assert cell("table2", "5w1s", "imaml-gd", "paper").train.inner_steps == 16
    assert cell("table2", "5w1s", "imaml-hf", "paper").train.inner == "hessian-free"
    assert cell("table3", "5w1s", "imaml-gd", "paper").train.lam == 0.5
    assert cell("table2", "20w1s", "imaml-hf", "paper").published == (96.18, 0.36)
    maml = cell("table2", "5w1s", "maml", "paper")
    assert (maml.train.inner_steps, maml.changes) == (1, {"inner_steps": 3})


def test_an_unknown_cell_is_refused():
    with pytest.raises(ValueError, match="column must be one of"):
        cell("table3", "20w1s", "maml")
    with pytest.raises(ValueError, match=r"row in variant 'paper' must be .*, got 'reptile'"):
        cell("table2", "5w1s", "reptile", "paper")
    with pytest.raises(ValueError, match="row in variant 'authors_code' must be one of 'imaml-gd'"):
        cell("table2", "5w1s", "maml", "authors_code")
    with pytest.raises(
        ValueError, match="variant of mini-imagenet must be one of 'ours', 'paper', got"
    ):
        cell("table3", "5w1s", "imaml-gd", "authors_code")
