"""The checks of arguments."""

import math
from functools import partial

import pytest
import torch

from imaml_ext._checks import (
    check_callable,
    check_choice,
    check_instance,
    check_integer,
    check_like,
    check_range,
)


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("(0, inf)", [1e-300, 1, 1e300], [0, -1, math.inf, math.nan]),
        ("[0, inf)", [0, 0.0, 1e300], [-1e-300, math.inf, -math.inf, math.nan]),
        ("[0, inf]", [0, math.inf], [-1, math.nan]),
        ("[0, 1)", [0, 0.999], [1, -0.1, math.nan]),
        ("(0, 1]", [1, 0.1], [0, 1.1]),
        ("[0, inf)", [10**300], [10**400 * -1]),
    ],
)
def test_numbers_outside_the_interval_are_rejected(interval, inside, outside):
    for value in inside:
        check_range("x", value, interval)
    for value in outside:
        with pytest.raises(ValueError, match=r"^x must be .*, got "):
            check_range("x", value, interval)


@pytest.mark.parametrize("value", ["1", None, True, 1j, torch.ones(()), [1.0]])
def test_anything_but_a_real_number_is_rejected(value):
    with pytest.raises(TypeError, match=r"^x must be a number, got "):
        check_range("x", value, "[0, 2]")


def test_messages_name_the_argument_the_range_and_the_value():
    for interval, words in [
        ("(0, inf)", "positive and finite"),
        ("[0, inf)", "finite and non-negative"),
        ("[1, 2)", r"in \[1, 2\)"),
    ]:
        with pytest.raises(ValueError, match=f"^lr must be {words}, got -3$"):
            check_range("lr", -3, interval)


def test_integers_have_a_minimum():
    check_integer("n", 3, minimum=3)
    check_integer("n", -3)
    with pytest.raises(ValueError, match=r"^n must be at least 3, got 2$"):
        check_integer("n", 2, minimum=3)
    for value in (1.0, "1", True, None):
        with pytest.raises(TypeError, match=r"^n must be an integer, got "):
            check_integer("n", value)


def test_choices_are_listed():
    check_choice("kind", "b", ("a", "b"))
    with pytest.raises(ValueError, match=r"^kind must be one of 'a', None, got 'c'$"):
        check_choice("kind", "c", ("a", None))


def test_tensors_must_have_one_of_the_shapes_and_the_same_dtype():
    b = torch.zeros(2, 3)
    check_like("t", torch.ones(2, 3), b)
    check_like("t", torch.ones(3), b, (2, 3), (3,))
    message = r"^t must be \[2, 3\] or \[3\] torch.float32 on cpu, got \[2\] torch.float32 on cpu$"
    with pytest.raises(ValueError, match=message):
        check_like("t", torch.ones(2), b, (2, 3), (3,))
    with pytest.raises(ValueError, match=r"got \[2, 3\] torch.float64"):
        check_like("t", b.double(), b)


def test_an_instance_of_another_class_is_named_with_the_remedy():
    check_instance("n", True, int, "pass a number")
    with pytest.raises(TypeError, match=r"^n must be an instance of int, got str: pass a number$"):
        check_instance("n", "1", int, "pass a number")
    with pytest.raises(TypeError, match=r"got the class int: pass a number$"):
        check_instance("n", int, int, "pass a number")


class Adds(torch.nn.Module):
    def forward(self, a, b=0):
        return a + b


def test_a_function_must_accept_its_parameters():
    for function in (lambda a, b: 0, lambda *args: 0, Adds(), Adds().forward, max, partial(max, 1)):
        check_callable("f", function, "(a, b)")
    for value, got in (
        (3, "int"),
        (Adds, "the class Adds"),
        (lambda a: 0, r"<lambda>\(a\)"),
        (lambda a, b, c: 0, r"<lambda>\(a, b, c\)"),
    ):
        with pytest.raises(TypeError, match=rf"^f must be a function of \(a, b\), got {got}$"):
            check_callable("f", value, "(a, b)")
    with pytest.raises(TypeError, match=r"got Adds\(a, b\): pass another$"):
        check_callable("f", Adds(), "(a, b, c)", "pass another")
