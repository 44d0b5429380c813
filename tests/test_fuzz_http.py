"""A short part of fuzz_http.py, always the same; and that it would find what has been wrong in others' parsers."""

from __future__ import annotations

import re
from collections.abc import Callable

import fuzz_http
import pytest
from promises import promise

import atrax


@promise("http.fuzzed")
def test_mutated_requests_are_read_like_h11_by_the_rfc_and_whatever_the_split() -> None:
    tally = fuzz_http.Tally()
    for part in fuzz_http.run(seed=1, inputs=6_000):
        tally.merge(part)

    assert not tally.findings
    # Both ways were taken, often, and where h11 is stricter, for the one reason that is written down.
    assert tally.counts["requests accepted"] > 2_000
    assert tally.counts["inputs refused"] > 2_000
    assert tally.counts[f"h11 alone refuses: {fuzz_http.EMPTY_LINE}"] > 0


Sabotage = Callable[[pytest.MonkeyPatch], None]


def takes_any_chunk_line(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(atrax, "_CHUNK", re.compile(rb"([0-9A-Fa-f]{1,16})[^\n]*\n"))


def strips_what_python_calls_space(patch: pytest.MonkeyPatch) -> None:
    def lenient(line: str) -> tuple[str, str]:
        name, _, value = line.partition(":")
        return name.strip().lower(), value.strip()

    lenient.__wrapped__ = lenient  # type: ignore[attr-defined]
    patch.setattr(atrax, "_field", lenient)


def lets_chunks_win_over_a_length(patch: pytest.MonkeyPatch) -> None:
    strict = atrax._length

    def lenient(method: str, headers: dict[str, str], modern: bool, most: int) -> int | None:
        if "transfer-encoding" in headers:
            headers = {k: v for k, v in headers.items() if k != "content-length"}
        return strict(method, headers, modern, most)

    patch.setattr(atrax, "_length", lenient)


def forgets_the_line_end_behind_a_chunk(patch: pytest.MonkeyPatch) -> None:
    strict = atrax.HttpParser._read_chunk_line

    def lenient(parser: atrax.HttpParser) -> bool:  # CVE-2025-43859
        if parser._in_chunk and parser.unread >= 2:
            at = parser._at
            parser._data = parser._data[:at] + b"\r\n" + parser._data[at + 2 :]
        return strict(parser)

    patch.setattr(atrax.HttpParser, "_read_chunk_line", lenient)


def minds_how_the_bytes_come(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(atrax.HttpParser, "_refuse_early", lambda *_: None)


@pytest.mark.parametrize(
    "sabotage",
    [
        takes_any_chunk_line,
        strips_what_python_calls_space,
        lets_chunks_win_over_a_length,
        forgets_the_line_end_behind_a_chunk,
        minds_how_the_bytes_come,
    ],
)
def test_a_parser_with_a_known_fault_is_found_out(
    sabotage: Sabotage, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = (atrax._head_of, atrax._field)
    for cache in caches:
        cache.cache_clear()
    sabotage(monkeypatch)

    stream = fuzz_http.Inputs(seed=1)
    inputs = iter(stream.next, b"no input")
    found = (
        data
        for data, _ in zip(inputs, range(20_000), strict=False)
        if fuzz_http.check(data, stream.cuts(data), atrax.Limits()).finding
    )
    assert next(found, None) is not None

    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()
