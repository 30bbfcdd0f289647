"""The command-line flags generated from the fields of Config."""

import argparse
import dataclasses

import pytest

from imaml_ext.cli import main
from imaml_ext.experiments.config import Config
from imaml_ext.experiments.flags import SETTINGS, add_settings, given_settings


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_settings(parser, SETTINGS, "settings", with_presets=True)
    return given_settings(parser.parse_args(arguments))


def test_flags_have_the_types_of_the_fields():
    assert parse() == {}
    given = parse("--inner-steps", "3", "--lam", "2", "--no-eval-proximal", "--nonfinite", "omit")
    assert given == {"inner_steps": 3, "lam": 2.0, "eval_proximal": False, "nonfinite": "omit"}
    assert type(given["lam"]) is float


@pytest.mark.parametrize(
    "arguments", [("--shot", "1.5"), ("--linear", "lu"), ("--curvature", "fisher")]
)
def test_values_that_a_field_cannot_have_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        parse(*arguments)
    assert f"argument {arguments[0]}: invalid" in capsys.readouterr().err


def test_help_describes_every_field_and_its_presets(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # unwrapped
    for field in dataclasses.fields(Config)[1:]:
        assert f"--{field.name.replace('_', '-')}" in text
    assert "cosine: to 0 over the whole run (default: linear)" in text
    assert "(sinusoid: 10, omniglot: 1, mini-imagenet: 1, tiny-imagenet: 1)" in text
