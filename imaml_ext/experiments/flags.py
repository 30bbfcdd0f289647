"""Command-line flags for the fields of Config."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, get_type_hints

from imaml_ext.experiments.config import Config
from imaml_ext.experiments.presets import PRESETS
from imaml_ext.experiments.registry import CHOICES

SETTINGS = [field.name for field in dataclasses.fields(Config) if field.name != "dataset"]


def flag(name: str) -> str:
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def add_settings(
    parser: argparse.ArgumentParser, title: str, names: Sequence[str], *, with_presets: bool
) -> None:
    """Add a group of flags for these fields. Flags that are not given set no attribute."""
    group, hints = parser.add_argument_group(title), get_type_hints(Config, include_extras=True)
    for name in names:
        (text,) = hints[name].__metadata__
        if with_presets:
            text += f" ({_presets(name)})"
        kind = type(getattr(PRESETS["sinusoid"], name))
        parsing: dict[str, Any] = {"type": kind, "choices": CHOICES.get(name)}
        if kind is bool:
            parsing = {"action": argparse.BooleanOptionalAction}
        group.add_argument(
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
