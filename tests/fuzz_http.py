"""Feeds the HTTP parser with hostile bytes, and compares what it understood with two other readings.

    python tests/fuzz_http.py --inputs 10000000 --processes 2 --report fuzz-report.txt
    python tests/fuzz_http.py --atheris -max_total_time=600     # guided by coverage; pip install atheris

An input is what one connection sends: often several requests, made by a grammar of the tricks or from the corpus
in tests/hostile, then mutated. Inputs that bring a new combination of outcomes are mutated further. For each:

1. Nothing is raised but HttpError, and after it always the same.
2. What is accepted is accepted by h11 too, and read alike: method, target, headers, body, and where the next
   request begins, which is what request smuggling is about. Where h11 refuses, LENIENT must say why we need not.
3. What is accepted has one reading by the letter of RFC 9112 (`ambiguity`); h11 takes bare LF, folded lines,
   two lengths that agree, or a length beside chunks.
4. However the bytes are cut, the same comes out.

A seed and a number of inputs give the same inputs again. tests/test_fuzz_http.py runs a short part."""

from __future__ import annotations

import argparse
import collections
import functools
import gc
import itertools
import multiprocessing
import random
import re
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

HOME = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HOME), str(HOME / "tests")]

import h11  # noqa: E402
from hostile import bodies, heads  # noqa: E402

import atrax  # noqa: E402

# ---- Three readings ----


class Message(NamedTuple):
    """A request as somebody read it; `end`: the first byte behind it."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes
    end: int


class Reading(NamedTuple):
    """Requests in order; why the bytes after them are refused, or "" if they may be the begin of one."""

    messages: list[Message]
    refusal: str
    closed: bool = False  # the last request ends the connection: nothing behind it is read


def ours(pieces: Sequence[bytes], limits: atrax.Limits) -> Reading:
    """What HttpParser makes of `pieces`, read as Connection reads: up to a request that closes."""
    parser = atrax.HttpParser(limits)
    messages: list[Message] = []
    fed = 0
    for piece in pieces:
        parser.feed(piece)
        fed += len(piece)
        try:
            while (request := parser.next()) is not None or parser.more:
                if request is not None:
                    asked = (request.method, request.path, request.query, request.headers)
                    messages.append(Message(*asked, request.body, fed - parser.unread))
                    if parser.last:
                        return Reading(messages, "", True)
        except atrax.HttpError as error:
            return Reading(messages, _again(parser, error))
    return Reading(messages, "")


def _again(parser: atrax.HttpParser, error: atrax.HttpError) -> str:
    """The refusal, which must stand whatever comes after it."""
    parser.feed(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    try:
        parser.next()
    except atrax.HttpError as second:
        if second is error:
            return f"{error.status} {error}"
    raise AssertionError(f"after the refusal {error} the parser went on")


# What h11 refuses and we need not, with the reason.
WAITS: Final = "h11 waits for more"
EMPTY_LINE: Final = "an empty line before a request"
LENIENT: Final = {
    EMPTY_LINE: "RFC 9112, 2.2: a server should ignore one; it can hide no request",
}


@functools.lru_cache(4096)
def theirs(data: bytes) -> Message | str:
    """The first request in `data` as h11 reads it; why h11 refuses it; or WAITS.

    Remembered, since of several requests in one input mostly one has been mutated."""
    start = 2 if data.startswith(b"\r\n") else 0  # EMPTY_LINE
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=10**7)
    parser.receive_data(data[start:])
    body = b""
    request: Any = None
    while True:
        try:
            event: Any = parser.next_event()
        except h11.RemoteProtocolError as error:
            return str(error)
        kind = type(event)
        if kind is h11.Request:
            request = event
        elif kind is h11.Data:
            body += event.data
        elif kind is h11.EndOfMessage:
            return Message(*_asked(request), body, len(data) - len(parser.trailing_data[0]))
        else:
            return WAITS


def _asked(request: Any) -> tuple[str, str, str, dict[str, str]]:
    headers: dict[str, str] = {}
    for name, value in request.headers:
        key, text = name.decode(), value.decode("latin-1")
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    target = request.target.decode("latin-1")
    if not target.startswith("/") and target != "*":
        target = re.sub(r"^\w+://[^/?#]*", "", target)
        target = target if target.startswith("/") else "/" + target
    path, _, query = target.partition("?")
    decoded = urllib.parse.unquote_to_bytes(path).decode(errors="replace")
    return request.method.decode(), decoded, query, headers


_WRONG: Final = re.compile(rb"[\0-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)|(?<!\r)\n")
_TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_LINE: Final = re.compile(rb"[A-Z]+ [!-~]+ HTTP/1\.[01]")
_FIELD: Final = re.compile(
    rb"(" + _TOKEN + rb"):[ \t]*((?:[!-~\x80-\xff](?:[ \t!-~\x80-\xff]*[!-~\x80-\xff])?)?)[ \t]*"
)
_CHUNK: Final = re.compile(
    rb"([0-9A-Fa-f]+)(?:;" + _TOKEN + rb"(?:=(?:" + _TOKEN
    + rb'|"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"))?)*\r\n'
)  # fmt: skip


def disagreement(raw: bytes, mine: Message) -> str:
    """What is wrong with accepting `raw`, all of it, as the request `mine`; mine.end counts from its first byte."""
    his = theirs(raw)
    if isinstance(his, str):
        return f"h11 refuses: {his}"
    if mine != his:
        pairs = zip(mine._fields, mine, his, strict=True)
        return "h11 reads otherwise: " + ", ".join(
            name for name, one, other in pairs if one != other
        )
    unclear = ambiguity(raw, mine.body)
    return unclear and f"ambiguous: {unclear}"


@functools.lru_cache(4096)
def ambiguity(raw: bytes, body: bytes) -> str:
    """What in the accepted request `raw` has no one reading by RFC 9112, or has not this `body`."""
    head, _, rest = raw.removeprefix(b"\r\n").partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    fields = [_FIELD.fullmatch(line) for line in lines]
    if _WRONG.search(head) or not _LINE.fullmatch(first):
        return "the request line, a line end or a control character"
    values: dict[bytes, list[bytes]] = {}
    for field in fields:
        if field is None:
            return "a header line"
        values.setdefault(field[1].lower(), []).append(field[2])
    modern = first.endswith(b"1")
    lengths, codings = values.get(b"content-length", []), values.get(b"transfer-encoding", [])
    if len(values.get(b"host", [])) + (not modern) not in (1, 2)[: 1 + (not modern)]:
        return "no Host, or several"
    if len(lengths) + len(codings) > 1 or (codings and not modern):
        return "two lengths"
    if codings:
        return "" if codings == [b"chunked"] and _chunked(rest) == body else "the chunks"
    if lengths and not re.fullmatch(rb"0|[1-9][0-9]*", lengths[0]):
        return "the length"
    return "" if rest == body and len(rest) == int(*lengths) else "the length of the body"


def _chunked(data: bytes) -> bytes | None:
    """The body in a chunked body, whole and without fault by RFC 9112, 7.1; else None."""
    whole, at = b"", 0
    while line := _CHUNK.match(data, at):
        at = line.end()
        size = int(line[1], 16)
        if not size:
            trailer = data[at:].split(b"\r\n")
            well = trailer[-2:] == [b"", b""] and all(map(_FIELD.fullmatch, trailer[:-2]))
            return whole if well and not _WRONG.search(data[at:]) else None
        whole += data[at : at + size]
        at += size + 2
        if data[at - 2 : at] != b"\r\n":
            return None
    return None


# ---- One input ----


class Verdict(NamedTuple):
    """What came of an input; `finding` is what must not be."""

    accepted: int
    refusal: str
    h11: str  # what h11 says where we stopped: "", "accepts", or why it refuses
    finding: str
    shape: tuple[Any, ...]  # inputs of one shape took the same ways


def check(data: bytes, cuts: Sequence[int], limits: atrax.Limits) -> Verdict:
    """Read `data` whole, cut at `cuts`, by h11 and by the RFC."""
    try:
        mine = ours((data,), limits)
        edges = (0, *cuts, len(data))
        again = ours([data[a:b] for a, b in itertools.pairwise(edges)], limits)
    except Exception as error:  # whatever it is, it is what we look for
        return Verdict(0, "", "", f"raised {error!r}", ())
    finding = "" if mine == again else "other requests when cut otherwise"
    start = 0
    for message in mine.messages:
        raw = data[start : message.end]
        finding = finding or disagreement(raw, message._replace(end=len(raw)))
        start = message.end
    # Of what we refuse, what h11 says is for the report alone: asked one time in four.
    ask = not mine.closed and start < len(data) and (not mine.refusal or not len(data) & 3)
    his = theirs(data[start:]) if ask else ""
    if isinstance(his, Message):
        his = "accepts"
        if not mine.refusal:
            finding = finding or "h11 accepts what we wait for"
    shape = (
        min(len(mine.messages), 3), _kind(mine.refusal), mine.closed,
        tuple(mine.messages[-1].headers) if mine.messages else (),
        bool(mine.messages and mine.messages[-1].body),
    )  # fmt: skip
    return Verdict(len(mine.messages), mine.refusal, his, finding, shape)


@functools.lru_cache(4096)
def _kind(reason: str) -> str:
    """A reason without what it quotes and counts."""
    return re.sub(r"\d+", "N", reason.partition(":")[0])[:60]


# ---- Inputs ----

NAMES: Final = (
    b"Host", b"Content-Length", b"Transfer-Encoding", b"Connection", b"Expect", b"Upgrade", b"Trailer", b"TE",
    b"Content-Type", b"Accept", b"Origin", b"Authorization", b"X", b"Keep-Alive", b"HTTP2-Settings",
    b"Transfer_Encoding", b"Content_Length", b"X-Forwarded-For", b"X_Forwarded_For", b"Forwarded", b"Via",
    b"MCP-Protocol-Version", b"Mcp-Session-Id", b"Mcp-Method", b"Mcp-Name", b"Mcp-Param-A", b"Last-Event-ID",
    b"Content-Encoding", b"Range", b"Cookie", b"X-HTTP-Method-Override", b"Proxy-Connection",
)  # fmt: skip
VALUES: Final = (
    b"a", b"b", b"localhost", b"[::1]:80", b"a:80", b"chunked", b"Chunked", b"identity", b"gzip, chunked",
    b"chunked, identity", b"xchunked", b"chunked\x0b", b"chunked\xa0", b'"chunked"', b"0", b"5", b"05", b"+5",
    b"5, 5", b"5,6", b"1_0", b"0x5", b"41", b"close", b"keep-alive", b"Upgrade", b"close, TE", b"100-continue",
    b"h2c", b"websocket", b"application/json", b"*/*", b"null", b"http://a", b"", b" ", b"\t", b"\xff\xfe",
    b"a\x00b", b"a\x7fb", b"trailers", b"\xd9\xa5", b"99999999999999999999", b"4194304", b"x" * 40,
)  # fmt: skip
TARGETS: Final = (
    b"/", b"/mcp", b"/servers/x/mcp", b"//mcp", b"/mcp/..;/status", b"/servers/x%2f..%2fmcp", b"/../status", b"*",
    b"http://a/mcp", b"http://b/mcp", b"HTTP://A", b"a:443", b"/%00", b"/%2e%2e/x", b"/a?b=c", b"/a?b=%zz",
    b"/a#b", b"/\xc3\xa9", b"/%c3%a9", b"http://a?x", b"http://u@a/", b"/mcp?x=http://b/", b"\\mcp", b"/mcp;a=b",
)  # fmt: skip
COLONS: Final = (b": ", b":", b" : ", b"\t:", b":\t")
METHODS: Final = (
    b"GET",
    b"POST",
    b"HEAD",
    b"OPTIONS",
    b"DELETE",
    b"CONNECT",
    b"PRI",
    b"get",
    b"G(T",
    b"",
)
VERSIONS: Final = (
    b"HTTP/1.1",
    b"HTTP/1.0",
    b"HTTP/2.0",
    b"HTTP/0.9",
    b"HTTP/1.10",
    b"http/1.1",
    b"",
)
ENDS: Final = (
    b"\r\n",
    b"\n",
    b"\r",
    b"\r\r\n",
    b"\n\r",
    b" \r\n",
    b"\r\n ",
    b"\r\n\t",
    b"",
    b"\r\n\r\n",
)
SIZES: Final = (b"0", b"5", b"A", b"a", b"05", b"0x5", b"+5", b"-5", b" 5", b"5 ", b"5;", b"5;a", b"5;a=b",
    b'5;a="\r\n"', b'5;a="b;c"', b"5\t;a", b"5;a\n", b"5;a\rX", b"1_0", b"", b"FFFFFFFFFFFFFFFF",
    b"10000000000000005", b"00000000000000005", b"0;a", b"00", b"5;a=\"", b"5;\xe9")  # fmt: skip
JUNK: Final = (*ENDS, *VALUES[:30], *SIZES, b"\0", b" ", b"\t", b":", b";", b",", b"%", b"\xff", b"\x85", b"\x0b",
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"0\r\n\r\n", b"Host: a\r\n", b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n", b" HTTP/1.1", b": ", b" :", b"_", b"-")  # fmt: skip
LONGEST: Final = 600  # bytes of an input that is mutated further
SEEDS: Final = [
    *(row.data for row in (*heads.ROWS, *bodies.ROWS) if len(row.data) <= LONGEST),
    *(row.data[:LONGEST] for row in (*heads.ROWS, *bodies.ROWS) if len(row.data) > LONGEST),
    (
        b"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1:4000\r\nContent-Type: application/json\r\nAccept: */*\r\n"
        b"MCP-Protocol-Version: 2026-07-28\r\nMcp-Method: tools/call\r\nMcp-Name: a__b\r\n"
        b'Content-Length: 17\r\n\r\n{"jsonrpc":"2.0"}'
    ),
    b"GET /sse HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\nLast-Event-ID: 7\r\n\r\n",
    b"DELETE /mcp HTTP/1.1\r\nHost: localhost\r\nMcp-Session-Id: abc\r\n\r\n",
]
KEPT: Final = 20_000  # inputs; what brings something new later takes the place of another


class Inputs:
    """An endless stream of inputs that learns which of them took new ways."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._random = self._chance.random
        self.corpus = list(SEEDS)
        self._shapes: set[Any] = set()

    def next(self) -> bytes:
        """One input, of one to five requests."""
        data = self._some()
        while self._random() < 0.3 and len(data) < LONGEST:
            data += self._some()
        return self.mutated(data)

    def learn(self, data: bytes, shape: tuple[Any, ...]) -> None:
        """Keep `data` if no input of its shape came before."""
        if shape in self._shapes or len(data) > LONGEST:
            return
        self._shapes.add(shape)
        if len(self.corpus) < KEPT:
            self.corpus.append(data)
        else:
            self.corpus[self._below(KEPT)] = data

    def cuts(self, data: bytes) -> list[int]:
        """Where to cut `data`: at some places, or at each."""
        size = len(data)
        if size < 150 and self._random() < 0.005:
            return list(range(1, size))
        return sorted(self._below(size + 1) for _ in range(1 + self._below(4)))

    def limits(self) -> atrax.Limits:
        """Mostly the defaults."""
        return LIMITS[self._below(len(LIMITS))] if self._random() < 0.1 else LIMITS[0]

    def _below(self, number: int) -> int:
        return int(self._random() * number)

    def _of(self, things: Sequence[bytes]) -> bytes:
        return things[int(self._random() * len(things))]

    def _usual(self, things: Sequence[bytes], often: float) -> bytes:
        """The first of `things`, which is right, or another."""
        return things[0] if self._random() < often else self._of(things)

    def _some(self) -> bytes:
        return self._built() if self._random() < 0.3 else self._of(self.corpus)

    def _built(self) -> bytes:
        """A request by the grammar, with a trick here and there."""
        end = self._usual(ENDS, 0.95)
        line = b" ".join((self._of(METHODS[:5] if self._random() < 0.9 else METHODS),
            self._usual(TARGETS, 0.3), self._usual(VERSIONS, 0.85)))  # fmt: skip
        fields = [b"Host: a"] if self._random() < 0.95 else []
        fields += [
            self._of(NAMES) + self._usual(COLONS, 0.9) + self._of(VALUES)
            for _ in range(self._below(4))
        ]
        fields, body = self._framed(fields)
        return (
            line
            + end
            + b"".join(field + self._usual((end, *ENDS), 0.97) for field in fields)
            + end
            + body
        )

    def _framed(self, fields: list[bytes]) -> tuple[list[bytes], bytes]:
        chance = self._random()
        if chance < 0.4:
            body = b"hello"[: self._below(6)]
            size = len(body) if self._random() < 0.9 else self._below(60)
            fields.insert(self._below(len(fields) + 1), b"Content-Length: %d" % size)
            return fields, body
        if chance < 0.8:
            value = self._usual((b"chunked", *VALUES[5:14]), 0.85)
            fields.insert(self._below(len(fields) + 1), b"Transfer-Encoding: " + value)
            return fields, self._chunks()
        return fields, b""

    def _chunks(self) -> bytes:
        parts = []
        for _ in range(self._below(4)):
            good = self._random() < 0.8
            parts.append(b"5" if good else self._of(SIZES))
            parts += (self._usual(ENDS, 0.96), b"hello", self._usual(ENDS, 0.96))
        parts += (self._usual((b"0", *SIZES), 0.9), self._usual(ENDS, 0.96))
        while self._random() < 0.15:
            parts += (self._of(NAMES), b": ", self._of(VALUES), self._usual(ENDS, 0.96))
        return b"".join((*parts, self._usual(ENDS, 0.97)))

    def mutated(self, data: bytes) -> bytes:
        """`data` with none to some edits."""
        while self._random() < 0.55:
            data = EDITS[self._below(len(EDITS))](self, data)
        return data

    def _insert(self, data: bytes) -> bytes:
        at = self._below(len(data) + 1)
        return data[:at] + self._of(JUNK) + data[at:]

    def _replace(self, data: bytes) -> bytes:
        at = self._below(len(data) + 1)
        return data[:at] + self._of(JUNK) + data[at + self._below(4) :]

    def _flip(self, data: bytes) -> bytes:
        at = self._below(len(data) + 1)
        return data[:at] + bytes((self._below(256),)) + data[at + 1 :]

    def _delete(self, data: bytes) -> bytes:
        at = self._below(len(data) + 1)
        return data[:at] + data[at + 1 + self._below(6) :]

    def _cut(self, data: bytes) -> bytes:
        return data[: self._below(len(data) + 1)]

    def _lines(self, data: bytes) -> bytes:
        """Two lines change places, or one is doubled."""
        lines = data.split(b"\r\n")
        one, other = self._below(len(lines)), self._below(len(lines))
        if self._random() < 0.5:
            lines[one], lines[other] = lines[other], lines[one]
        else:
            lines.insert(other, lines[one])
        return b"\r\n".join(lines)

    def _splice(self, data: bytes) -> bytes:
        other = self._of(self.corpus)
        return data[: self._below(len(data) + 1)] + other[self._below(len(other) + 1) :]

    def _case(self, data: bytes) -> bytes:
        at = self._below(len(data) + 1)
        return data[:at] + data[at : at + 12].swapcase() + data[at + 12 :]


EDITS: Final[Sequence[Callable[[Inputs, bytes], bytes]]] = (
    Inputs._insert, Inputs._replace, Inputs._flip, Inputs._delete, Inputs._cut, Inputs._lines, Inputs._splice,
    Inputs._case,
)  # fmt: skip
LIMITS: Final = (
    atrax.Limits(), atrax.Limits(header=60), atrax.Limits(body=4), atrax.Limits(header=200, body=11)
)  # fmt: skip


# ---- Runs ----


class Tally:
    """What a run has seen."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.findings: dict[str, bytes] = {}  # one input for each kind

    def add(self, data: bytes, verdict: Verdict) -> None:
        """Count `verdict`."""
        counts = self.counts
        counts["inputs"] += 1
        counts["requests accepted"] += verdict.accepted
        if verdict.refusal:
            counts["inputs refused"] += 1
            stricter = " (h11, where asked, accepts)" if verdict.h11 == "accepts" else ""
            counts["refused: " + _kind(verdict.refusal) + stricter] += 1
        elif verdict.h11 not in ("", WAITS):
            counts["we wait, h11 refuses: " + _kind(verdict.h11)] += 1
        if data.startswith(b"\r\n") and verdict.accepted:
            counts[f"h11 alone refuses: {EMPTY_LINE}"] += 1
        if verdict.finding:
            counts["FOUND: " + verdict.finding] += 1
            self.findings.setdefault(verdict.finding, data)

    def merge(self, other: Tally) -> None:
        """Add what another run has seen."""
        self.counts += other.counts
        self.findings = {**other.findings, **self.findings}


def run(seed: int, inputs: int) -> Iterator[Tally]:
    """Try `inputs` inputs; what was seen, in parts."""
    stream, tally = Inputs(seed), Tally()
    for number in range(1, inputs + 1):
        data = stream.next()
        verdict = check(data, stream.cuts(data), stream.limits())
        tally.add(data, verdict)
        stream.learn(data, verdict.shape)
        if number % 20_000 == 0 or number == inputs:
            yield tally
            tally = Tally()


def _work(seed: int, inputs: int, results: Any) -> None:
    gc.set_threshold(100_000)  # an exception that is kept is a cycle; a tenth faster
    try:
        for tally in run(seed, inputs):
            results.put(tally)
    finally:
        results.put(None)  # so that a bug of ours does not look like patience


def many(seeds: Sequence[int], inputs: int) -> Iterator[Tally]:
    """One process for each seed, `inputs` in all; parts as they come. A slow or stopped one delays nothing."""
    results: Any = multiprocessing.Queue()
    for seed in seeds:
        multiprocessing.Process(target=_work, args=(seed, inputs, results), daemon=True).start()
    while inputs > 0 and (part := results.get()) is not None:
        inputs -= part.counts["inputs"]
        yield part


def report(tally: Tally, seeds: Sequence[int], seconds: float) -> str:
    """The run in words: numbers, classes, findings, and a closing line."""
    counts = tally.counts
    lines = [f"{count:>12,}  {name}" for name, count in counts.most_common()]
    lines += [f"h11 need not be followed in: {name} ({why})" for name, why in LENIENT.items()]
    lines += [f"FOUND {name}: {data!r}" for name, data in tally.findings.items()]
    lines.append(
        f"fuzz_http: {counts['inputs']:,} inputs, seeds {', '.join(map(str, seeds))}, {seconds:.0f} s "
        f"({counts['inputs'] / max(seconds, 0.001):,.0f} a second): {counts['requests accepted']:,} requests accepted, "
        f"{counts['inputs refused']:,} inputs refused, {len(tally.findings)} kinds of findings"
    )
    return "\n".join(lines) + "\n"


def with_atheris(options: list[str]) -> None:
    """libFuzzer chooses by the coverage of the parser's bytecode; our mutations stand beside its own."""
    import atheris

    section = [atrax.HttpParser._read_head.__code__.co_firstlineno - 200, 0]
    section[1] = section[0] + 700
    things = [*vars(atrax).values(), *vars(atrax.HttpParser).values()]
    for thing in things:
        function = getattr(thing, "__wrapped__", thing)
        code = getattr(function, "__code__", None)
        if (
            code is not None
            and code.co_filename == atrax.__file__
            and section[0] < code.co_firstlineno < section[1]
        ):
            atheris.instrument_func(function)
    tally, begun = Tally(), time.monotonic()

    def one(data: bytes) -> None:
        stream = Inputs(len(data) * 31 + sum(data[:64]))
        verdict = check(data, stream.cuts(data), stream.limits())
        tally.add(data, verdict)
        if tally.counts["inputs"] % 100_000 == 0:
            print(report(tally, ["atheris"], time.monotonic() - begun), flush=True)
        if verdict.finding:
            raise AssertionError(f"{verdict.finding}: {data!r}")

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        stream = Inputs(seed)
        changed = (
            atheris.Mutate(data, most) if seed % 3 == 0 else stream.mutated(data or stream.next())
        )
        return bytes(changed[:most])

    corpus = Path(options.pop(0)) if options and not options[0].startswith("-") else None
    if corpus is not None:
        corpus.mkdir(exist_ok=True)
        for number, data in enumerate(SEEDS):
            (corpus / f"seed{number}").write_bytes(data)
        options.append(str(corpus))
    atheris.Setup([sys.argv[0], f"-max_len={LONGEST}", *options], one, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    """Run as the command line says; 1 if something was found."""
    if sys.argv[1:2] == ["--atheris"]:
        with_atheris(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description="Fuzz the HTTP parser, and compare it with h11.")
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--report", type=Path, help="rewritten every minute")
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + options.processes)
    tally, begun, shown = Tally(), time.monotonic(), 0.0
    for part in many(seeds, options.inputs):
        tally.merge(part)
        seconds = time.monotonic() - begun
        if seconds - shown > 60:
            shown = seconds
            text = report(tally, seeds, seconds)
            print(text.splitlines()[-1], flush=True)
            if options.report:
                options.report.write_text("so far:\n" + text)
    text = report(tally, seeds, time.monotonic() - begun)
    print(text, end="")
    if options.report:
        options.report.write_text(text)
    return bool(tally.findings) or tally.counts["inputs"] < options.inputs


if __name__ == "__main__":
    sys.exit(main())
