"""Command-line flags for the fields of Config."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, get_type_hints

from imaml_ext.experiments.config import Config
from imaml_ext.experiments.presets import PRESETS
from imaml_ext.experiments.registry import CHOICES

SETTINGS = [field.name for field in dataclasses.fields(Config) if field.name != "dataset"]
_GROUPS = {  # titles in the help, by the first field of each group
    "method": "model and method",
    "way": "tasks",
    "lam": "adaptation and meta-gradient",
    "meta_lr": "outer loop",
}


def flag(name: str) -> str:
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def add_settings(
    parser: argparse.ArgumentParser, names: Sequence[str], defaults: str, *, with_presets: bool
) -> None:
    """Add groups of flags for these fields, whose defaults are described by a text. Flags that are
    not given set no attribute."""
    hints, groups = get_type_hints(Config, include_extras=True), {}
    title = ""
    for name in SETTINGS:
        title = _GROUPS.get(name, title)
        if name not in names:
            continue
        if title not in groups:
            groups[title] = parser.add_argument_group(f"{title} (defaults: {defaults})")
        (text,) = hints[name].__metadata__
        if with_presets:
            text += f" ({_presets(name)})"
        kind = type(getattr(PRESETS["sinusoid"], name))
        parsing: dict[str, Any] = {"type": kind, "choices": CHOICES.get(name)}
        if kind is bool:
            parsing = {"action": argparse.BooleanOptionalAction}
        groups[title].add_argument(
            flag(name), default=argparse.SUPPRESS, help=text.replace("%", "%%"), **parsing
        )


def _presets(name: str) -> str:
    values = {dataset: getattr(config, name) for dataset, config in PRESETS.items()}
    if len(set(values.values())) == 1:
        return f"default: {values['sinusoid']}" if values["sinusoid"] != "" else "default: none"
    return ", ".join(f"{dataset}: {value}" for dataset, value in values.items())


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The fields that were given on the command line."""
    return {name: value for name, value in vars(options).items() if name in SETTINGS}
