"""The cells of the paper's tables, as data.

A cell is a row (a method) in a column (a kind of task), in one variant of the settings: "paper", as
published; "authors_code", as in the authors' release; "ours", chosen on validation classes for
training on two CPU cores; "features", which starts from features learned under a ridge head, and
trains on tasks of similar classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from imaml_ext._checks import check_choice
from imaml_ext.experiments.config import Config

Settings = dict[str, Any]  # of a Config; under "test", those that differ in evaluation

VARIANTS = ("ours", "features", "paper", "authors_code")

COLUMNS: dict[str, Settings] = {
    "5w1s": {"way": 5, "shot": 1},
    "5w5s": {"way": 5, "shot": 5},
    "20w1s": {"way": 20, "shot": 1},
    "20w5s": {"way": 20, "shot": 5},
}


@dataclass(frozen=True)
class Row:
    """A method, and the settings that select it.

    Attributes:
        of_paper: whether the paper's tables have it.
    """

    label: str
    settings: Settings
    of_paper: bool = True


ROWS = {
    "ridge-head": Row("ridge head", {"method": "ridge-head"}, of_paper=False),
    "maml": Row("MAML", {"method": "maml"}),
    "fomaml": Row("first-order MAML", {"method": "fomaml"}),
    "reptile": Row("Reptile", {"method": "reptile"}),
    "imaml-gd": Row("iMAML, gradient descent", {"method": "imaml", "inner": "gd"}),
    "imaml-hf": Row("iMAML, Hessian-free", {"method": "imaml", "inner": "hessian-free"}),
    "implicit-head": Row(
        "learned features, implicit head",
        {"method": "ridge-head", "network": "wide"},
        of_paper=False,
    ),
}


_features = Config(
    dataset="omniglot", method="ridge-head", train_way=80, query=3, tasks=1, meta_lr=4e-3,
    decay="cosine", average=0.99, meta_steps=20_000, minutes=25.0,
)  # fmt: skip
FEATURES = {  # by name of the model, from which cells or other features start
    "omniglot-features": _features,
    "omniglot-features-hard": replace(
        _features, start="omniglot-features", hard_tasks=0.5, neighbours=150, meta_lr=2e-3,
        minutes=20.0,
    ),
}  # fmt: skip


_head: Settings = {
    "query": 3, "eval_query": 5, "tasks": 1, "meta_lr": 4e-3, "decay": "cosine", "average": 0.99,
    "meta_steps": 20_000,
}  # fmt: skip


def _omniglot(way: int, shot: int) -> dict[str, dict[str, Settings]]:
    if way == 5:
        maml = {"inner_lr": 0.4, "inner_steps": 1, "tasks": 32, "test": {"inner_steps": 3}}
    else:
        maml = {"inner_lr": 0.1, "inner_steps": 5, "tasks": 16}
    paper = _paper(shot, maml, {"lam": 2.0, "inner_steps": 16 if way == 5 else 25})
    authors_code = {
        "inner": "gd-then-proximal", "linear": "cg-authors-code", "meta_eps": 1e-3,
        "test": {"eval_proximal": False},
    }  # fmt: skip
    ours = {"query": 5, "eval_query": shot, "tasks": 8, "meta_lr": 2e-3, "meta_steps": 20_000}
    imaml = {**ours, "tasks": 6, "cg_steps": 3}
    rows: dict[str, Settings] = {
        "maml": {**ours, "inner_lr": 0.4, "inner_steps": 1},
        "fomaml": {**ours, "inner_lr": 0.1, "inner_steps": 5},
        "reptile": {**ours, "inner_lr": 0.1, "inner_steps": 4, "meta_lr": 1e-3},
        "imaml-gd": {**imaml, "lam": 0.3, "inner_lr": 0.1, "inner_steps": 8},
        "imaml-hf": {**imaml, "lam": 2.0, "inner_steps": 2, "curvature": "ggn"},
        "implicit-head": {**_head, "train_way": 80 if shot == 1 else 40},
    }
    start: Settings = {"start": "omniglot-features-hard"}
    fine_tuning: Settings = {
        **start, "hard_tasks": 1.0, "query_batches": 5 // shot, "meta_lr": 1e-3,
        "decay": "cosine", "average": 0.998,
    }  # fmt: skip
    from_features: dict[str, Settings] = {
        "imaml-gd": {
            "inner": "nesterov", "inner_lr": 0.3, "cg_steps": 5, "curvature": "ggn",
            "meta_lr": 3e-4, "query_scale": 4.0,
        },
        "imaml-hf": {"lam": 0.3, "cg_steps": 5, "meta_lr": 3e-4, "query_scale": 3.0},
        "maml": {"inner_lr": 0.3, "inner_steps": 3, "meta_lr": 3e-4, "query_scale": 4.0},
        "fomaml": {"meta_lr": 3e-4, "query_scale": 6.0},
        "reptile": {"query_batches": 1},
    }  # fmt: skip
    if way == 20:  # a task takes several times as long, and its gradient is smaller
        few = {"query": 2, "query_batches": 2} if shot == 1 else {"tasks": 4, "average": 0.99}
        fine_tuning |= few
        for row in ("maml", "fomaml", "reptile"):
            from_features[row] |= {"inner_lr": 0.5, "inner_steps": 5, "meta_lr": 3e-4}
    return {
        "ours": rows,
        "features": {
            "ridge-head": {**start, "eval_query": shot},
            **{row: rows[row] | fine_tuning | own for row, own in from_features.items()},
        },
        "paper": paper,
        "authors_code": {"imaml-gd": paper["imaml-gd"] | authors_code},
    }


def _natural(way: int, shot: int) -> dict[str, dict[str, Settings]]:
    maml = {
        "inner_lr": 0.01, "inner_steps": 5, "tasks": 4 if shot == 1 else 2,
        "test": {"inner_steps": 10},
    }  # fmt: skip
    ours = {"query": 5, "eval_query": 5, "tasks": 4, "meta_lr": 2e-3, "meta_steps": 60_000}
    imaml = {**ours, "cg_steps": 3, "curvature": "ggn"}
    return {
        "ours": {
            "maml": {**ours, "inner_lr": 0.1, "inner_steps": 3},
            "fomaml": {**ours, "inner_lr": 0.1, "inner_steps": 5},
            "reptile": {**ours, "inner_lr": 0.1, "inner_steps": 4, "meta_lr": 1e-3},
            "imaml-gd": {**imaml, "lam": 0.3, "inner_lr": 0.1, "inner_steps": 8},
            "imaml-hf": {**imaml, "lam": 2.0, "inner_steps": 2},
            "implicit-head": {**_head, "train_way": 20},
        },
        "paper": _paper(15, maml, {"lam": 0.5, "inner_steps": 10}),
    }


def _paper(query: int, maml: Settings, imaml: Settings) -> dict[str, Settings]:
    """By row. Reptile was published with an inner Adam on mini-batches, not implemented here.

    Source: MAML: Finn, Abbeel, Levine 2017, appendix A.1.
    """
    common = {"query": query, "eval_query": query, "meta_lr": 1e-3, "decay": "constant"}
    maml = {**common, **maml, "meta_steps": 60_000}
    imaml = {
        **common, **imaml, "inner_lr": 0.1, "cg_steps": 5, "tasks": 32, "meta_steps": 20_000,
    }  # fmt: skip
    hessian_free = imaml | {"inner_steps": 3}
    return {"maml": maml, "fomaml": maml, "imaml-gd": imaml, "imaml-hf": hessian_free}


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        settings: for a `way` and a `shot`, by variant and row.
        published: accuracies and 95% half-widths in percent, by row, in the order of the columns.

    Source: Rajeswaran, Finn, Kakade, Levine 2019, tables 2 and 3.
    """

    title: str
    dataset: str
    settings: Callable[..., dict[str, dict[str, Settings]]]
    columns: tuple[str, ...]
    published: dict[str, tuple[tuple[float, float], ...]]

    def rows(self, column: str, variant: str) -> dict[str, Settings]:
        """The settings of each row that the variant has.

        Raises:
            ValueError: there is no such column or variant.
        """
        check_choice("column", column, self.columns)
        variants = self.settings(**COLUMNS[column])
        check_choice(f"variant of {self.dataset}", variant, variants)
        return variants[variant]


TABLES = {
    "table2": Table(
        "Table 2: Omniglot",
        "omniglot",
        _omniglot,
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
        _natural,
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
        _natural,
        ("5w1s", "5w5s"),
        {},
    ),
}


@dataclass(frozen=True)
class Cell:
    """One number of a table.

    Attributes:
        train: how it is trained. `start`, if any, is a name in FEATURES.
        changes: settings that differ in evaluation.
        published: accuracy and 95% half-width in percent, if any.
    """

    table: str
    column: str
    row: str
    variant: str
    train: Config
    changes: Settings
    published: tuple[float, float] | None

    @property
    def name(self) -> str:
        return f"{self.table}-{self.column}-{self.row}-{self.variant}"


def kept_as(table: str, column: str, row: str) -> str:
    """The name of the model that is kept: one of a column for all methods of the paper."""
    return f"{table}-{column}" + ("" if ROWS[row].of_paper else f"-{row}")


def cell(table: str, column: str, row: str, variant: str = "ours") -> Cell:
    """The cell of a table.

    Raises:
        ValueError: there is no such table, column, row or variant, or the variant lacks the row.
    """
    check_choice("table", table, TABLES)
    of_table = TABLES[table]
    rows = of_table.rows(column, variant)
    check_choice(f"row in variant {variant!r}", row, rows)
    settings = ROWS[row].settings | rows[row]
    changes = settings.pop("test", {})
    train = Config(dataset=of_table.dataset, **COLUMNS[column], **settings)
    published = None
    if row in of_table.published:
        published = of_table.published[row][of_table.columns.index(column)]
    return Cell(table, column, row, variant, train, changes, published)
