"""What Atrax promises: id, sentence, source. Each has a test that shows it; each such test names its promise.

    @promise("crash.isolated")
    async def test_a_child_that_dies_fails_only_its_own_calls(atrax): …

test_promises.py fails for a promise without a test and for a test of a promise that is not here."""

from __future__ import annotations

import dataclasses
from typing import Final

import pytest


@dataclasses.dataclass(frozen=True, slots=True)
class Promise:
    """One sentence that a user relies on, and where it was given."""

    sentence: str
    source: str


PROMISES: Final = {
    # One file
    "file.builds_from_locks": Promise(
        "A fresh clone, an empty HOME and one command give atrax.pyz, from packages locked by hash.",
        "issue 4; DESIGN, One file",
    ),
    "file.runs_without_network": Promise(
        "Once built, atrax.pyz runs, and is built again, without a network.", "issue 4"
    ),
    "file.same_bytes": Promise("The same inputs give the same bytes.", "DESIGN, One file"),
    "file.from_memory": Promise(
        "Native modules load from memory; nothing is written, no HOME and no writable directory is needed.",
        "DESIGN, One file",
    ),
    "file.from_cache": Promise(
        "Without memfd they load from a cache keyed by content; one that others can write is not used.",
        "DESIGN, One file",
    ),
    "file.other_python": Promise(
        "Another Python than the one it was built for is told so in one line.", "issue 4, item 9"
    ),
    "file.alone": Promise(
        "What the machine has installed is never imported in place of what lies in the file.",
        "DESIGN, One file",
    ),
    "file.clear_errors": Promise(
        "No pip, no network, a wrong hash: the build says which and what to do, without a traceback.",
        "DESIGN, Commands",
    ),
    # The house
    "house.sections": Promise(
        "A section of atrax.py names only what stands above it.", "STYLE, table of contents"
    ),
    "house.one_list_of_packages": Promise(
        "The packages in the head of atrax.py are those of the lock.", "issue 4, item 10"
    ),
}


def promise(*ids: str) -> pytest.MarkDecorator:
    """Marks a test as one that shows these promises. (test_promises.py reads it in the source.)"""
    return pytest.mark.promise(*ids)
