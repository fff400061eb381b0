from __future__ import annotations

import math
from typing import Annotated, Any

import pytest

from qatlab.core.domains import (
    AtLeast,
    Between,
    Block,
    Count,
    OneOf,
    Place,
    Positive,
    Seed,
    Some,
    Takes,
    checked,
    fits,
    words,
    written,
    wrong,
)  # fmt: skip
from qatlab.core.errors import UserError

COLOUR = Annotated[str, OneOf("red", "green")]
CASES: list[tuple[Any, list[Any], list[Any], str]] = [
    (int, [0, -3], [1.0, True, "1", None, [1], 2**63, 1e30], "a whole number"),
    (Count, [1, 7], [0, -1, True], "a whole number from 1 on"),
    (Seed, [0, 2**32 - 1], [-1, 2**32], "a whole number from 0 to 4294967295"),
    (float, [0, 1.5, -1e30], [math.nan, math.inf, -math.inf, True, "1", None], "a number"),
    (Positive, [1e-9], [0, -1, math.inf], "a number above 0"),
    (Annotated[float, Between(0, 1, below=True)], [0, 0.999], [1, -0.1], "a number from 0 to below 1"),
    (Annotated[float, Between(50, 100, above=True)], [100, 50.1], [50], "a number above 50, at most 100"),
    (Annotated[float, Between(high=3)], [3, -1e9], [3.1], "a number at most 3"),
    (bool, [True, False], [0, 1, "true", None], "true or false"),
    (str, ["x"], ["", "  ", 1, None], "text"),
    (Place, ["~/x"], ["", 1], "a path"),
    (COLOUR, ["red"], ["blue", "", 0, None], "red | green"),
    (COLOUR | None, ["red", None], ["blue"], "red | green | null"),
    (Count | None, [1, None], [0, ""], "a whole number from 1 on or null"),
    (list[Count], [[], [1, 2], (3,)], [[0], 1, None, "1"], "a list, each a whole number from 1 on"),
    (Annotated[list[COLOUR], Some()], [["red"]], [[], ["blue"], "red"], "a list of one or more, each red | green"),
    (tuple[Count, Count], [[1, 2]], [[1], [1, 2, 3], [0, 1]], "a list of 2, each a whole number from 1 on"),
    (Block, [{"_target_": "a.B"}], [1, [], None], "a block with a _target_"),
    (Annotated[Any, Takes(COLOUR | list[int])], ["red", [1]], ["blue", ["red"], 1], "red | green or a list, each a whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("hint", "inside", "outside", "said"), CASES, ids=[case[-1] for case in CASES])
def test_a_domain_holds_what_it_says(hint: Any, inside: list[Any], outside: list[Any], said: str) -> None:
    assert words(hint) == said
    assert [value for value in inside if not fits(value, hint)] == []
    assert [value for value in outside if fits(value, hint)] == []


@pytest.mark.parametrize(
    ("value", "hint", "sentence"),
    [
        ("rad", COLOUR, "a.b=rad is unknown (did you mean 'red'?); there are red, green."),
        ("rad", COLOUR | None, "a.b=rad is unknown (did you mean 'red'?); there are red, green."),
        (["rad"], list[COLOUR], "a.b=[rad]: it takes a list, each red | green (did you mean 'red'?)."),
        (None, Count, "a.b=null: it takes a whole number from 1 on."),
        ("", Place, "a.b=: it takes a path."),
        ("x" * 1000, Count, f"a.b={'x' * 100}...: it takes a whole number from 1 on."),
    ],
)
def test_a_value_outside_is_told_with_what_was_expected(value: Any, hint: Any, sentence: str) -> None:
    assert wrong("a.b", value, hint) == sentence


def test_values_are_written_as_on_the_command_line() -> None:
    assert written({"a": [None, True, math.nan, "x"]}) == "{a: [null, true, nan, x]}"


def test_a_class_that_python_makes_is_checked_too() -> None:
    class Made:
        @checked
        def __init__(self, bits: Annotated[int, AtLeast(2)], *, name: str = "") -> None:
            self.bits = bits

    assert Made(2).bits == 2  # a default is not checked
    with pytest.raises(UserError, match=r"^bits=1: it takes a whole number from 2 on\.$"):
        Made(1)
