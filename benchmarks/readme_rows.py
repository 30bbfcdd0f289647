"""The GPU rows of the README's table of times."""

from typing import Any

Result = dict[str, Any]

BEGIN, END = "<!-- measured on a GPU: by benchmarks/tables.py -->\n", "<!-- end -->\n"
NOTHING = "Not yet measured on a GPU.\n"

WORK = {
    "cg": lambda s: (
        f"{s['iterations']} CG iterations without the HVPs, {s['tasks']} tasks, D = {s['dim']:,}"
    ),
    "prox": lambda s: f"a proximal step of {s['step']}, {s['tasks']} tasks, D = {s['dim']:,}",
    "meta_grad": lambda s: f"a meta-gradient, {s['workload']}, {s['tasks']} tasks",
}
OTHERS = 4  # implementations listed in a row


def section(results: list[Result]) -> str:
    """The text between the README's marks: one table per GPU."""
    cards: dict[str, list[Result]] = {}
    for result in results:
        timed = result["benchmark"] in WORK and not result["settings"].get("tf32")
        if result.get("device_type") == "cuda" and timed:
            cards.setdefault(result["device"], []).append(result)
    return "\n".join(_table(card, cards[card]) for card in sorted(cards)) or NOTHING


def _table(card: str, results: list[Result]) -> str:
    order = list(WORK)
    lines = [
        f"On one {card}, float32:",
        "",
        "| | imaml_ext | others, relative to the fastest of imaml_ext |",
        "| --- | --- | --- |",
        *(_row(result) for result in sorted(results, key=lambda r: order.index(r["benchmark"]))),
    ]
    return "\n".join(lines) + "\n"


def _row(result: Result) -> str:
    """Times of imaml_ext's variants; ratios of the others to the fastest of them."""
    rows = sorted(result["implementations"].items(), key=lambda item: item[1]["median"])
    ours = [(name, row) for name, row in rows if name.startswith("imaml_ext")]
    others = [(name, row) for name, row in rows if not name.startswith("imaml_ext")]
    best = ours[0][1]["median"]
    times = "; ".join(_named(name, row) for name, row in reversed(ours))
    against = ", ".join(f"{name} {row['median'] / best:.1f}x" for name, row in others[:OTHERS])
    return f"| {WORK[result['benchmark']](result['settings'])} | {times} | {against} |"


def _named(name: str, row: dict[str, float]) -> str:
    way = name.removeprefix("imaml_ext").removeprefix(", ")
    text = f"{way} {1e3 * row['median']:.3g} ms".lstrip()
    share = row.get("share_of_copy_bandwidth")
    return text if share is None else f"{text} ({100 * share:.0f}% of copy bandwidth)"


def replaced(page: str, results: list[Result]) -> str:
    """The page with a new section.

    Raises:
        ValueError: the page has no marks.
    """
    before, mark, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise ValueError(f"the page must contain {BEGIN.strip()!r} and {END.strip()!r}")
    return before + mark + section(results) + end + after
