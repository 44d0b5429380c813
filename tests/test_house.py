"""How atrax.py is built inside: what a reader may rely on when looking for a rule."""

from __future__ import annotations

import ast
import re
import symtable
from collections import Counter
from collections.abc import Iterator

import pytest
from installed import HOME
from promises import promise

SOURCE = (HOME / "atrax.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
RULE = re.compile(r"# ==== ([A-Z]\w+) =+$")
LINES = SOURCE.splitlines()
SECTIONS = [
    (number, match[1]) for number, line in enumerate(LINES, 1) if (match := RULE.match(line))
]
ORDER = (
    "Boot Terms Config Record Message Http Identity Clients Catalogue Subscriptions Policy Gateway "
    "Servers Containment Child Supervisor Endpoints Atrax Demo Commands Attachments"
).split()


def section_of(line: int) -> int:
    """The place in SECTIONS of the section that a line belongs to; -1 above the first."""
    return sum(1 for number, _ in SECTIONS if number <= line) - 1


def defined() -> Iterator[tuple[str, int]]:
    """Name and line of what the module defines; imports left out."""
    for node in TREE.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (
                (target.id, node.lineno) for target in targets if isinstance(target, ast.Name)
            )


def globals_used() -> Iterator[tuple[str, int]]:
    """Name and line of each global that code in a function or class refers to; annotations left out."""
    scopes = [symtable.symtable(SOURCE, "atrax.py", "exec")]
    functions: dict[int, symtable.SymbolTable] = {}
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        functions[scope.get_lineno()] = scope
        for symbol in scope.get_symbols():
            if symbol.is_global() and symbol.is_referenced() and scope.get_type() != "module":
                yield symbol.get_name(), scope.get_lineno()


@promise("house.sections")
def test_sections_stand_in_the_order_in_which_a_request_travels() -> None:
    names = [name for _, name in SECTIONS]
    assert names == [name for name in ORDER if name in names]


@promise("house.sections")
def test_a_section_names_only_what_stands_above_it() -> None:
    lines = dict(reversed(list(defined())))
    below = {
        f"{SECTIONS[section_of(line)][1]} (line {line}) names {name} of {SECTIONS[section_of(lines[name])][1]}"
        for name, line in globals_used()
        if name in lines
        and section_of(lines[name]) > section_of(line)
        and SECTIONS[section_of(lines[name])][1] != "Attachments"
    }
    assert sorted(below) == []


def test_a_name_is_defined_once() -> None:
    assert [
        name for name, count in Counter(name for name, _ in defined()).items() if count > 1
    ] == []


@promise("house.one_list_of_packages")
def test_the_packages_in_the_head_are_those_of_the_lock() -> None:
    head = re.search(r"^# dependencies = (\[.*\])$", SOURCE, re.MULTILINE)
    assert head
    lock = (HOME / ".lock" / "requirements.txt").read_text()
    for requirement in ast.literal_eval(head[1]):
        assert re.search(rf"^{re.escape(requirement.split(';')[0])}[ ;]", lock, re.MULTILINE), (
            requirement
        )


@pytest.mark.parametrize(
    "lock", [*sorted((HOME / ".lock").glob("*.txt")), HOME / ".lock" / "package-lock.json"]
)
def test_a_lock_names_no_registry(lock: object) -> None:
    # Whoever made the lock may have had a mirror: everyone else has another.
    text = (HOME / str(lock)).read_text()
    assert not re.search(
        r'"resolved"|--index-url|--extra-index-url|--find-links|--trusted-host|://\S*@', text
    )


def test_nothing_was_put_off() -> None:
    assert [line for line in LINES if re.search(r"\b(TODO|FIXME|XXX)\b", line)] == []
