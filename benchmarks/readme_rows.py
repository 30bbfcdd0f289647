"""The README's table of times: one meta-gradient on each device, by implementation."""

from typing import Any

Result = dict[str, Any]

BEGIN, END = "<!-- times: by benchmarks/tables.py -->\n", "<!-- end -->\n"
NOTHING = "\nNot yet measured on a GPU.\n"

WORKLOADS = {
    "sinusoid": "sinusoid",
    "omniglot-5w1s": "Omniglot 5-way 1-shot",
    "omniglot-20w1s": "Omniglot 20-way 1-shot",
    "omniglot-20w5s": "Omniglot 20-way 5-shot",
}
OTHERS = {  # the fastest implementation whose name starts with this, by the column's title
    "batched PyTorch": "batched PyTorch",
    "JAX": "JAX",
    "TorchOpt": "TorchOpt",
    "lean loop": "loop over tasks",
}


def section(results: list[Result]) -> str:
    """The text between the README's marks."""
    timed = [r for r in results if r["benchmark"] == "meta_grad" and not r["settings"].get("tf32")]
    order = list(WORKLOADS)
    timed.sort(key=lambda r: (_on_gpu(r), r["device"], order.index(r["settings"]["workload"])))
    titles = ["a meta-gradient", "device", "imaml_ext", *OTHERS.values()]
    rows = [titles, ["---"] * len(titles), *map(_row, timed)]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return table if any(map(_on_gpu, timed)) else table + NOTHING


def _row(result: Result) -> list[str]:
    """The time of the fastest variant of imaml_ext, and the others relative to it."""
    settings = result["settings"]
    ours = _fastest(result, "imaml_ext")
    assert ours is not None
    others = [_fastest(result, prefix) for prefix in OTHERS]
    device = result["device"]
    return [
        f"{WORKLOADS[settings['workload']]}, {settings['tasks']} tasks",
        device if _on_gpu(result) else f"{device}, {result['threads']} cores",
        f"{1e3 * ours:.3g} ms" if ours < 1 else f"{ours:.2g} s",
        *("" if other is None else _ratio(other / ours) for other in others),
    ]


def _ratio(value: float) -> str:
    return f"{value:.0f}x" if value >= 10 else f"{value:.1f}x"


def _fastest(result: Result, prefix: str) -> float | None:
    times = [
        row["median"] for name, row in result["implementations"].items() if name.startswith(prefix)
    ]
    return min(times, default=None)


def _on_gpu(result: Result) -> bool:
    return bool(result.get("device_type") == "cuda")


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
