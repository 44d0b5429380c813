"""Every promise has a test, and every test of a promise names one that was given."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from promises import PROMISES


def shown() -> Iterator[str]:
    """The ids in all `@promise("…")` of the tests; read from the source, so that `quick` and -k don't matter."""
    for file in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for decorator in getattr(node, "decorator_list", []):
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "promise":
                    yield from (ast.literal_eval(argument) for argument in decorator.args)


def test_every_promise_has_a_test() -> None:
    assert sorted(set(PROMISES) - set(shown())) == []


def test_every_test_of_a_promise_names_one_that_was_given() -> None:
    assert sorted(set(shown()) - set(PROMISES)) == []
