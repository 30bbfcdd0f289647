"""The cells of the paper's tables, as data."""

from dataclasses import dataclass, replace
from typing import Any

from imaml_ext._checks import check_choice
from imaml_ext.experiments.config import Config

# A cell is a row (a method) in a column (a kind of task), in one variant of the settings: "paper",
# as published; "authors_code", as in the authors' release; "ours", chosen on validation
# classes for training on two CPU cores.

ROWS = {
    "maml": "MAML",
    "fomaml": "first-order MAML",
    "reptile": "Reptile",
    "imaml-gd": "iMAML, gradient descent",
    "imaml-hf": "iMAML, Hessian-free",
}


VARIANTS = ("ours", "paper", "authors_code")

_ROW: dict[str, dict[str, Any]] = {
    "maml": {"method": "maml"},
    "fomaml": {"method": "fomaml"},
    "reptile": {"method": "reptile"},
    "imaml-gd": {"method": "imaml", "inner": "gd"},
    "imaml-hf": {"method": "imaml", "inner": "hessian-free", "inner_steps": 3},
}

_TASKS: dict[str, dict[str, Any]] = {
    "5w1s": {"way": 5, "shot": 1},
    "5w5s": {"way": 5, "shot": 5},
    "20w1s": {"way": 20, "shot": 1},
    "20w5s": {"way": 20, "shot": 5},
}


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        published: accuracies and 95% half-widths in percent, by row, in the order of the columns.

    Source: Rajeswaran, Finn, Kakade, Levine 2019, tables 2 and 3.
    """

    title: str
    dataset: str
    columns: tuple[str, ...]
    published: dict[str, tuple[tuple[float, float], ...]]

    def figure(self, row: str, column: str) -> tuple[float, float] | None:
        """The published accuracy and half-width, if any."""
        return self.published[row][self.columns.index(column)] if row in self.published else None


TABLES = {
    "table2": Table(
        "Table 2: Omniglot",
        "omniglot",
        ("5w1s", "5w5s", "20w1s", "20w5s"),
        {
            "maml": ((98.7, 0.4), (99.9, 0.1), (95.8, 0.3), (98.9, 0.2)),
            "fomaml": ((98.3, 0.5), (99.2, 0.2), (89.4, 0.5), (97.9, 0.1)),
            "reptile": ((97.68, 0.04), (99.48, 0.06), (89.43, 0.14), (97.12, 0.32)),
            "imaml-gd": ((99.16, 0.35), (99.67, 0.12), (94.46, 0.42), (98.69, 0.1)),
            "imaml-hf": ((99.50, 0.26), (99.74, 0.11), (96.18, 0.36), (99.14, 0.1)),
        },
    ),
    "table3": Table(
        "Table 3: Mini-ImageNet",
        "mini-imagenet",
        ("5w1s",),
        {
            "maml": ((48.70, 1.84),),
            "fomaml": ((48.07, 1.75),),
            "reptile": ((49.97, 0.32),),
            "imaml-gd": ((48.96, 1.84),),
            "imaml-hf": ((49.30, 1.88),),
        },
    ),
    "natural": Table(
        "Table 3's protocol on other natural images: Tiny-ImageNet, 32x32",
        "tiny-imagenet",
        ("5w1s", "5w5s"),
        {},
    ),
}


@dataclass(frozen=True)
class Cell:
    """One number of a table.

    Attributes:
        train: how it is trained.
        changes: settings that differ in evaluation.
        published: accuracy and 95% half-width in percent, if any.
    """

    table: str
    column: str
    row: str
    variant: str
    train: Config
    changes: dict[str, Any]
    published: tuple[float, float] | None

    @property
    def name(self) -> str:
        return f"{self.table}-{self.column}-{self.row}-{self.variant}"

    @property
    def test(self) -> Config:
        """How it is tested."""
        return replace(self.train, **self.changes)


def cell(table: str, column: str, row: str, variant: str = "ours") -> Cell:
    """The cell of a table.

    Raises:
        ValueError: there is no such table, column, row or variant, or the row lacks the variant.
    """
    check_choice("table", table, TABLES)
    check_choice("column", column, TABLES[table].columns)
    check_choice("row", row, ROWS)
    check_choice("variant", variant, VARIANTS)
    settings = {"ours": _ours, "paper": _paper, "authors_code": _authors_code}[variant]
    train = replace(
        Config(dataset=TABLES[table].dataset), **_TASKS[column], **settings(table, column, row)
    )
    changes = _changes(table, column, row, variant)
    return Cell(table, column, row, variant, train, changes, TABLES[table].figure(row, column))


def _paper(table: str, column: str, row: str) -> dict[str, Any]:
    if row == "reptile":
        raise ValueError(
            "reptile has no variant 'paper': its published number was measured with an inner Adam "
            "on mini-batches, which is not implemented; use 'ours'"
        )
    way, shot = _TASKS[column]["way"], _TASKS[column]["shot"]
    natural = table != "table2"
    common = {"decay": "constant", "meta_lr": 1e-3, "query": 15 if natural else shot}
    common["eval_query"] = common["query"]
    if row in ("maml", "fomaml"):  # Finn, Abbeel, Levine 2017, appendix A.1
        if natural:
            of_adaptation = {"inner_steps": 5, "inner_lr": 0.01, "tasks": 4 if shot == 1 else 2}
        elif way == 5:
            of_adaptation = {"inner_steps": 1, "inner_lr": 0.4, "tasks": 32}
        else:
            of_adaptation = {"inner_steps": 5, "inner_lr": 0.1, "tasks": 16}
        return {**common, **_ROW[row], **of_adaptation, "meta_steps": 60_000}
    steps = 10 if natural else 16 if way == 5 else 25
    lam = 0.5 if natural else 2.0
    return {
        **common, "lam": lam, "inner_lr": 0.1, "inner_steps": steps, "cg_steps": 5, "tasks": 32,
        "meta_steps": 20_000, **_ROW[row],
    }  # fmt: skip


def _authors_code(table: str, column: str, row: str) -> dict[str, Any]:
    if table != "table2" or row != "imaml-gd":
        raise ValueError("only imaml-gd in table2 has the variant 'authors_code'")
    changed = {"inner": "gd-then-proximal", "linear": "cg-authors-code", "meta_eps": 1e-3}
    return {**_paper(table, column, row), **changed}


def _ours(table: str, column: str, row: str) -> dict[str, Any]:
    shot = _TASKS[column]["shot"]
    if table == "table2":
        common = {"query": 5, "eval_query": shot, "tasks": 8, "meta_lr": 2e-3}
        return {**common, "meta_steps": 20_000, **_ROW[row], **_OURS_OMNIGLOT[row]}
    common = {"query": 5, "eval_query": 5, "tasks": 4, "meta_lr": 2e-3}
    return {**common, "meta_steps": 60_000, **_ROW[row], **_OURS_NATURAL[row]}


_OURS_OMNIGLOT: dict[str, dict[str, Any]] = {
    "maml": {"inner_lr": 0.4, "inner_steps": 1},
    "fomaml": {"inner_lr": 0.1, "inner_steps": 5},
    "reptile": {"inner_lr": 0.1, "inner_steps": 4, "meta_lr": 1e-3},
    "imaml-gd": {"lam": 0.3, "inner_lr": 0.1, "inner_steps": 8, "cg_steps": 3, "tasks": 6},
    "imaml-hf": {"lam": 2.0, "inner_steps": 2, "cg_steps": 3, "tasks": 6, "curvature": "ggn"},
}


_OURS_NATURAL: dict[str, dict[str, Any]] = {
    "maml": {"inner_lr": 0.1, "inner_steps": 3},
    "fomaml": {"inner_lr": 0.1, "inner_steps": 5},
    "reptile": {"inner_lr": 0.1, "inner_steps": 4, "meta_lr": 1e-3},
    "imaml-gd": {
        "lam": 0.3, "inner_lr": 0.1, "inner_steps": 8, "cg_steps": 3, "curvature": "ggn",
    },
    "imaml-hf": {"lam": 2.0, "inner_steps": 2, "cg_steps": 3, "curvature": "ggn"},
}  # fmt: skip


def _changes(table: str, column: str, row: str, variant: str) -> dict[str, Any]:
    if variant == "authors_code":
        return {"eval_proximal": False}
    if variant == "paper" and row in ("maml", "fomaml"):
        if table != "table2":
            return {"inner_steps": 10}
        return {"inner_steps": 3} if _TASKS[column]["way"] == 5 else {}
    return {}
