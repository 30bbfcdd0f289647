"""The cells of the paper's tables, as data."""

from dataclasses import dataclass, replace
from typing import Any

from imaml_ext.experiments.config import Config

# The tables of the paper. A cell is a row (a method) in a column (a kind of task), in one variant:
# "paper", the published setting; "authors_code", what the authors' release does instead; "ours",
# found on validation classes with the time of two CPU cores in mind.

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
    """A table of the paper: its columns, and its accuracies and 95% half-widths in percent.

    Source: Rajeswaran, Finn, Kakade, Levine 2019, tables 2 and 3.
    """

    title: str
    dataset: str
    columns: tuple[str, ...]
    published: dict[str, tuple[tuple[float, float], ...]]  # by row, in the order of the columns

    def figure(self, row: str, column: str) -> tuple[float, float] | None:
        """The published accuracy and half-width, if there is one."""
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
    """One number of a table: how it is trained and tested, and what was published."""

    table: str
    column: str
    row: str
    variant: str
    train: Config
    test: Config
    published: tuple[float, float] | None  # accuracy and 95% half-width, in percent

    @property
    def name(self) -> str:
        return f"{self.table}-{self.column}-{self.row}-{self.variant}"


def cell(table: str, column: str, row: str, variant: str = "ours") -> Cell:
    """A cell of TABLES.

    Raises:
        ValueError: there is no such cell.
    """
    _one_of("table", table, list(TABLES))
    _one_of("column", column, list(TABLES[table].columns))
    _one_of("row", row, list(ROWS))
    _one_of("variant", variant, list(VARIANTS))
    settings = {"ours": _ours, "paper": _paper, "authors_code": _authors_code}[variant]
    train = replace(
        Config(dataset=TABLES[table].dataset), **_TASKS[column], **settings(table, column, row)
    )
    test = replace(train, **_test(table, column, row, variant))
    return Cell(table, column, row, variant, train, test, TABLES[table].figure(row, column))


def _one_of(name: str, value: str, choices: list[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _paper(table: str, column: str, row: str) -> dict[str, Any]:
    if row == "reptile":
        raise ValueError(
            "no variant 'paper' for reptile: its published number is of an inner Adam on "
            "mini-batches, which is not built in; take 'ours'"
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
        raise ValueError("variant 'authors_code' is of imaml-gd in table2 alone")
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


def _test(table: str, column: str, row: str, variant: str) -> dict[str, Any]:
    """What differs from training in evaluation."""
    if variant == "authors_code":
        return {"eval_proximal": False}
    if variant == "paper" and row in ("maml", "fomaml"):
        if table != "table2":
            return {"inner_steps": 10}
        return {"inner_steps": 3} if _TASKS[column]["way"] == 5 else {}
    return {}
