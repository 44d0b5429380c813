"""Http: what is read, what is refused, and how a connection lives and ends. Real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any

import h11
import pytest
import uvloop
from hostile import bodies, heads
from hostile.row import HOST, TARGET, Row, get, post
from hypothesis import given
from hypothesis import strategies as st

import atrax

ROWS = [*heads.ROWS, *bodies.ROWS]
LIMIT = 10.0  # seconds that any wait in this file may take
LOOPS = pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
NewLoop = Callable[[], asyncio.AbstractEventLoop]


def run(loop: NewLoop, test: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(asyncio.wait_for(test, 6 * LIMIT))


class Echo:
    """A handler that answers at once, or keeps the reply when the path is /wait."""

    def __init__(self) -> None:
        self.seen: list[atrax.HttpRequest] = []
        self.kept: list[atrax.Reply] = []
        self.left: list[int] = []
        self.news = asyncio.Event()

    def handle(self, request: atrax.HttpRequest, reply: atrax.Reply) -> None:
        self.seen.append(request)
        if request.path == "/bug":
            raise ZeroDivisionError("a secret")
        if request.path == "/refused":
            raise atrax.HttpError(403, "not you", [("X-Why", "because")])
        if request.path == "/wait":
            number = len(self.kept)
            self.kept.append(reply)
            reply.closed = lambda: (self.left.append(number), self.news.set())  # type: ignore[func-returns-value]
            self.news.set()
            return
        body = atrax.encode({"path": request.path, "body": len(request.body)})
        reply.full(200, atrax.JSON_HEADERS, body)

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT):
            while not true():
                self.news.clear()
                await self.news.wait()


class Client:
    """A raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def line(self) -> bytes:
        return await asyncio.wait_for(self.reader.readline(), LIMIT)

    async def rest(self) -> bytes:
        """All until the server closes; a reset ends it too."""
        got = b""
        with contextlib.suppress(ConnectionError):
            while part := await asyncio.wait_for(self.reader.read(65536), LIMIT):
                got += part
        return got

    async def response(self, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        """One final response, read by h11; 1xx ones are skipped."""
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
        parser.send(h11.EndOfMessage())
        head: h11.Response | None = None
        body = b""
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                # Byte by byte: what belongs to the next response must stay in the reader.
                parser.receive_data(await asyncio.wait_for(self.reader.read(1), LIMIT))
            elif isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                return head.status_code, {k.decode(): v.decode() for k, v in head.headers}, body

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


class Served:
    """A real HttpServer with an Echo, on a port of its own."""

    def __init__(self, **limits: int | float) -> None:
        self.record = atrax.Record()
        self.events: list[atrax.Event] = []
        self.record.watch(self.events.append)
        self.echo = Echo()
        self.now = 1000.0
        self.server = atrax.HttpServer(
            self.echo,
            atrax.Limits(**limits),
            self.record,
            lambda: self.now,  # type: ignore[arg-type]
        )
        self.port = 0

    async def client(self) -> Client:
        return Client(*await asyncio.open_connection("127.0.0.1", self.port))

    def pass_time(self, seconds: int) -> None:
        """Let the server believe that `seconds` have gone, a second at a time."""
        for _ in range(seconds):
            self.now += 1.0
            self.server.wake(self.now)

    async def until_connections(self, count: int) -> None:
        async with asyncio.timeout(LIMIT):
            while len(self.server.connections) != count:
                await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def served(**limits: int | float) -> AsyncIterator[Served]:
    it = Served(**limits)
    urls = await it.server.listen("127.0.0.1", 0)
    it.port = int(urls[0].rpartition(":")[2])
    try:
        yield it
    finally:
        await it.server.close(0)


def statuses(data: bytes) -> tuple[int, ...]:
    """Of all responses in `data`; each one's body is delimited by Content-Length."""
    found: list[int] = []
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        found.append(int(lines[0].split(" ")[1]))
        size = next((int(x[15:]) for x in lines if x.lower().startswith("content-length:")), 0)
        if found[-1] >= 400:
            assert json.loads(rest[:size])["error"]["message"]
            assert "Connection: close" in lines
        data = rest[size:]
    return tuple(found)


# ---- hostile requests ----


@LOOPS
@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_a_hostile_request_gets_its_status_and_the_server_goes_on(row: Row, loop: NewLoop) -> None:
    async def test() -> None:
        async with served() as it:
            client = await it.client()
            client.send(row.data)
            if row.statuses[-1] == 200:
                client.writer.write_eof()
            answer = await client.rest()
            assert statuses(answer) == row.statuses
            assert all(request.path != TARGET.decode() for request in it.echo.seen)
            await client.close()

            again = await it.client()
            again.send(get(HOST, target=b"/still"))
            assert (await again.response())[0] == 200
            await again.close()
            assert not [event for event in it.events if event.level == "error"]

    run(loop, test())


def test_there_are_enough_rows_and_each_has_a_name_of_its_own() -> None:
    assert len(ROWS) >= 100
    assert len({row.id for row in ROWS}) == len(ROWS)


# ---- the parser alone ----

Happened = tuple[Any, ...]


def parse(pieces: Iterable[bytes], limits: atrax.Limits | None = None) -> list[Happened]:
    """What a parser makes of `pieces`: requests, and the error that ends them."""
    parser = atrax.HttpParser(limits or atrax.Limits())
    events: list[Happened] = []
    for piece in pieces:
        parser.feed(piece)
        try:
            while (request := parser.next()) is not None or parser.more:
                if request is not None:
                    facts = (request.method, request.path, request.query, request.headers)
                    events.append((*facts, request.body, parser.last, parser.chunks))
        except atrax.HttpError as error:
            return [*events, (error.status, str(error))]
    return events


def pieces_of(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(cut for cut in cuts if cut <= len(data)), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges) if a < b]


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_every_byte_alone_is_read_like_all_at_once(row: Row) -> None:
    data = row.data[:12_000]
    assert parse(data[i : i + 1] for i in range(len(data))) == parse([data])


@given(st.sampled_from(ROWS), st.sampled_from(ROWS), st.lists(st.integers(0, 2000), max_size=8))
def test_any_split_of_the_bytes_gives_the_same(first: Row, second: Row, cuts: list[int]) -> None:
    data = first.data + second.data
    assert parse(pieces_of(data, cuts)) == parse([data])


# What makes and breaks framing; thrown into good requests.
JUNK = [b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\0", b" ", b"\t", b":", b"0", b"5", b"f", b";", b",",
        b"Host: a\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"\xff", b"%",
        b"GET ", b" HTTP/1.1", b"chunked", b"\x85", b"\xa0", b"\x0b"]  # fmt: skip


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(ROWS)).data[:3000])
    for _ in range(draw(st.integers(0, 4))):
        at, junk = draw(st.integers(0, len(data))), draw(st.sampled_from(JUNK))
        keep = draw(st.integers(0, 3))
        data[at : at + keep] = junk
    return bytes(data)


@given(mutations(), st.lists(st.integers(0, 3000), max_size=5))
def test_a_mutated_request_is_read_or_refused_whatever_the_split(
    data: bytes, cuts: list[int]
) -> None:
    assert parse(pieces_of(data, cuts)) == parse([data])


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=5))
def test_garbage_raises_nothing_but_our_own_error(data: bytes, cuts: list[int]) -> None:
    assert parse(pieces_of(data, cuts)) == parse([data])


@given(
    st.sampled_from(ROWS), st.integers(9, 200), st.integers(1, 50), st.lists(st.integers(0, 600))
)
def test_limits_hold_whatever_the_split(row: Row, header: int, body: int, cuts: list[int]) -> None:
    limits = atrax.Limits(header=header, body=body)
    events = parse(pieces_of(row.data[:2000], cuts), limits)
    assert events == parse([row.data[:2000]], limits)
    assert all(len(event[4]) <= body for event in events if len(event) > 2)


def read_by_h11(data: bytes) -> tuple[list[tuple[str, bytes]], bool]:
    """Requests (method, body) as h11 reads them, and whether it refused what came then."""
    found: list[tuple[str, bytes]] = []
    while data:
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=10**7)
        # The one thing that h11 refuses and RFC 9112, 2.2 wants accepted: an empty line in front.
        parser.receive_data(data.removeprefix(b"\r\n"))
        method, body = "", b""
        while True:
            try:
                event = parser.next_event()
            except h11.RemoteProtocolError:
                return found, True
            if isinstance(event, h11.Request):
                method = event.method.decode()
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                return found, False
        found.append((method, body))
        data = parser.trailing_data[0]
    return found, False


@given(mutations())
def test_what_h11_refuses_is_refused_and_the_rest_is_read_alike(data: bytes) -> None:
    theirs, refused = read_by_h11(data)
    ours = parse([data])
    requests = [(event[0], event[4]) for event in ours if len(event) > 2]
    last = next((i for i, event in enumerate(ours) if len(event) > 2 and event[5]), None)
    if last is not None:  # what stands behind a request that closes is not read by Connection
        requests = requests[: last + 1]
    assert requests == theirs[: len(requests)]
    if refused and last is None:
        assert ours and len(ours[-1]) == 2, "h11 refuses this, we wait or accept"


def test_repeated_fields_are_joined_and_names_are_lower_case() -> None:
    data = get(HOST, b"ACCEPT: a/b", b"Accept:  c/d ;q=1\t", b"X-Empty:")
    assert parse([data])[0][3] == {"host": "a", "accept": "a/b, c/d ;q=1", "x-empty": ""}


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"/mcp", "/mcp", ""),
        (b"/mcp?", "/mcp", ""),
        (b"/a%20b%C3%A9?x=%20&y", "/a bé", "x=%20&y"),
        (b"/%252F", "/%2F", ""),
        (b"//evil", "//evil", ""),
        (b"http://a", "/", ""),
        (b"HTTP://A/x?y", "/x", "y"),
        (b"https://a?y", "/", "y"),
    ],
)
def test_a_path_is_decoded_once_and_the_query_is_left_raw(
    target: bytes, path: str, query: str
) -> None:
    assert parse([get(HOST, target=target)])[0][1:3] == (path, query)


def test_a_body_of_many_small_chunks_is_read_in_turns() -> None:
    parser = atrax.HttpParser(atrax.Limits())
    parser.feed(post(b"Transfer-Encoding: chunked", body=b"1\r\na\r\n" * 5000 + b"0\r\n\r\n"))
    turns = 0
    while (request := parser.next()) is None:
        assert parser.more
        turns += 1
    assert len(request.body) == 5000
    assert turns >= 4


# ---- connections ----


@LOOPS
def test_pipelined_requests_are_answered_in_order_each_after_the_one_before(loop: NewLoop) -> None:
    async def test() -> None:
        async with served() as it:
            client = await it.client()
            client.send(get(HOST, target=b"/wait") + get(HOST, target=b"/second"))
            await it.echo.until(lambda: len(it.echo.kept) == 1)
            assert [request.path for request in it.echo.seen] == ["/wait"]
            it.echo.kept[0].full(200, (), b"first")
            assert (await client.response())[2] == b"first"
            assert json.loads((await client.response())[2])["path"] == "/second"
            await client.close()

    run(loop, test())


@LOOPS
def test_hundreds_of_pipelined_requests_are_all_answered(loop: NewLoop) -> None:
    async def test() -> None:
        async with served() as it:
            client = await it.client()
            for number in range(300):
                client.send(get(HOST, target=b"/%d" % number))
            for number in range(300):
                head = await client.reader.readuntil(b"}")
                assert head.endswith(b'{"path":"/%d","body":0}' % number)
            await client.close()

    run(loop, test())


@LOOPS
def test_a_flood_behind_an_open_request_is_not_read(loop: NewLoop) -> None:
    async def test() -> None:
        async with served() as it:
            client = await it.client()
            client.send(get(HOST, target=b"/wait"))
            await it.echo.until(lambda: len(it.echo.kept) == 1)
            flood = get(HOST, b"X: " + b"y" * 20_000, target=b"/flood")
            client.send(flood * 1500)  # 30 MB: more than all socket buffers hold
            draining = asyncio.ensure_future(client.writer.drain())
            (connection,) = it.server.connections
            async with asyncio.timeout(LIMIT):
                while not connection._paused:
                    await asyncio.sleep(0)
            assert connection._parser.unread < 1_000_000
            it.echo.kept[0].full(200, (), b"")
            for _ in range(1501):
                assert (await client_fast(client)) == 200
            await draining
            await client.close()

    run(loop, test())


async def client_fast(client: Client) -> int:
    """The status of one response with Content-Length."""
    head = await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), LIMIT)
    size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    await client.reader.readexactly(size)
    return int(head.split(b" ")[1])


@LOOPS
def test_a_client_that_leaves_before_the_answer_is_noticed_once(loop: NewLoop) -> None:
    async def test() -> None:
        async with served() as it:
            client = await it.client()
            client.send(get(HOST, target=b"/wait"))
            await it.echo.until(lambda: len(it.echo.kept) == 1)
            await client.close()
            await it.echo.until(lambda: it.echo.left == [0])
            await it.until_connections(0)
            # Nothing of this may raise: an answer comes when it comes.
            it.echo.kept[0].full(200, (), b"late")
            it.echo.kept[0].write(b"later")
            it.echo.kept[0].end()
            assert it.echo.left == [0]
            assert it.echo.kept[0].waiting == 0

    run(loop, test())


@LOOPS
def test_writing_to_a_client_that_has_reset_the_connection_raises_nothing(loop: NewLoop) -> None:
    async def test() -> None:
        async with served() as it:
            client = await it.client()
            client.send(get(HOST, target=b"/wait"))
            await it.echo.until(lambda: len(it.echo.kept) == 1)
            reply = it.echo.kept[0]
            reply.head(200, atrax.SSE_HEADERS)
            sock = client.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.writer.transport.abort()
            async with asyncio.timeout(LIMIT):
                while not it.echo.left:
                    reply.write(b"x" * 1000)
                    await asyncio.sleep(0)
            reply.write(b"x")
            reply.end()
            assert not [event for event in it.events if event.level == "error"]

    run(loop, test())


@LOOPS
def test_a_stream_is_chunked_and_the_connection_lives_on(loop: NewLoop) -> None:
    async def test() -> None:
        async with served() as it:
            client = await it.client()
            client.send(get(HOST, target=b"/wait"))
            await it.echo.until(lambda: len(it.echo.kept) == 1)
            reply = it.echo.kept[0]
            reply.extra = [("Vary", "Origin")]
            reply.head(200, atrax.SSE_HEADERS)
            reply.write(atrax.sse_event(b"{}", "7"))
            reply.write(b"")
            reply.write(atrax.sse_comment())
            reply.end()
            status, headers, body = await client.response()
            assert (status, body) == (200, b"event: message\nid: 7\ndata: {}\n\n:\n\n")
            assert headers["transfer-encoding"] == "chunked"
            assert headers["cache-control"] == "no-cache, no-transform"
            assert headers["x-accel-buffering"] == "no"
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["vary"] == "Origin"
            client.send(get(HOST))
            assert (await client.response())[0] == 200
            await client.close()

    run(loop, test())


@LOOPS
def test_http_1_0_gets_a_stream_that_ends_with_the_connection(loop: NewLoop) -> None:
    async def test() -> None:
        async with served() as it:
            client = await it.client()
            client.send(get(HOST, target=b"/wait", version=b"HTTP/1.0"))
            await it.echo.until(lambda: len(it.echo.kept) == 1)
            it.echo.kept[0].head(200, atrax.SSE_HEADERS)
            it.echo.kept[0].write(b"one")
            it.echo.kept[0].write(b"two")
            it.echo.kept[0].end()
            head, _, body = (await client.rest()).partition(b"\r\n\r\n")
            assert body == b"onetwo"
            assert b"chunked" not in head
            assert b"Connection: close" in head

    run(loop, test())


@LOOPS
def test_head_gets_the_headers_of_get_and_no_body(loop: NewLoop) -> None:
    async def test() -> None:
        async with served() as it:
            client = await it.client()
            client.send(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n" + get(HOST, target=b"/after"))
            status, headers, body = await client.response("HEAD")
            assert (status, body) == (200, b"")
            assert int(headers["content-length"]) > 0
            assert json.loads((await client.response())[2])["path"] == "/after"
            await client.close()

    run(loop, test())


@LOOPS
def test_a_body_that_waits_for_100_continue_is_asked_for(loop: NewLoop) -> None:
    async def test() -> None:
        async with served() as it:
            client = await it.client()
            client.send(post(b"Content-Length: 5", b"Expect: 100-Continue"))
            assert await client.line() == b"HTTP/1.1 100 Continue\r\n"
            assert await client.line() == b"\r\n"
            client.send(b"hello")
            status, _, body = await client.response()
            assert (status, json.loads(body)["body"]) == (200, 5)
            client.send(post(b"Content-Length: 5", b"Expect: 100-continue", body=b"hello"))
            assert await client.line() == b"HTTP/1.1 200 OK\r\n"
            await client.close()

    run(loop, test())


@LOOPS
def test_a_body_of_four_mebibytes_is_taken_and_nothing_of_it_stays_counted(loop: NewLoop) -> None:
    async def test() -> None:
        async with served() as it:
            client = await it.client()
            client.send(post(b"Content-Length: 4194304", body=b"x" * 4194304))
            assert json.loads((await client.response())[2])["body"] == 4194304
            assert it.server.held == 0
            await client.close()

    run(loop, test())


@LOOPS
def test_unfinished_bodies_of_all_clients_together_are_bounded(loop: NewLoop) -> None:
    async def test() -> None:
        async with served() as it:
            it.server.held = atrax.BODIES  # as if other clients had sent so much
            client = await it.client()
            client.send(post(b"Content-Length: 5", body=b"he"))
            assert statuses(await client.rest()) == (503,)
            await client.close()
            await it.until_connections(0)
            assert it.server.held == atrax.BODIES

    run(loop, test())


@LOOPS
def test_a_client_that_sends_on_after_a_refusal_still_reads_why(loop: NewLoop) -> None:
    async def test() -> None:
        async with served() as it:
            client = await it.client()
            client.send(post(b"Content-Length: 9000000", body=b"x" * 9000000))
            answer = await client.rest()
            assert statuses(answer) == (413,)
            await client.close()

    run(loop, test())


@LOOPS
def test_a_bug_in_a_handler_is_recorded_and_answered_without_details(loop: NewLoop) -> None:
    async def test() -> None:
        async with served() as it:
            client = await it.client()
            client.send(get(HOST, target=b"/bug") + get(HOST))
            status, _, body = await client.response()
            assert status == 500
            assert b"secret" not in body and b"Zero" not in body
            assert (await client.response())[0] == 200
            (event,) = [event for event in it.events if event.name == "internal.error"]
            assert "ZeroDivisionError" in event.fields["traceback"]
            await client.close()

    run(loop, test())


@LOOPS
def test_a_handler_may_refuse_and_the_connection_lives_on(loop: NewLoop) -> None:
    async def test() -> None:
        async with served() as it:
            client = await it.client()
            client.send(get(HOST, target=b"/refused") + get(HOST))
            status, headers, body = await client.response()
            assert (status, headers["x-why"]) == (403, "because")
            assert json.loads(body) == {"error": {"message": "not you"}}
            assert (await client.response())[0] == 200
            await client.close()

    run(loop, test())


@LOOPS
def test_a_header_with_a_line_end_is_never_sent(loop: NewLoop) -> None:
    async def test() -> None:
        async with served() as it:
            client = await it.client()
            client.send(get(HOST, target=b"/wait"))
            await it.echo.until(lambda: len(it.echo.kept) == 1)
            for bad in ("a\r\nSet-Cookie: b", "a\nb", "a\rb"):
                with pytest.raises(ValueError):
                    it.echo.kept[0].full(200, [("X", bad)], b"")
            it.echo.kept[0].full(200, [], b"ok")
            assert (await client.response())[2] == b"ok"
            await client.close()

    run(loop, test())


@LOOPS
@pytest.mark.parametrize(
    ("sent", "seconds", "status"),
    [
        (b"", 11, ()),
        (b"GET / HTTP/1.1\r\nHo", 11, (408,)),
        (post(b"Content-Length: 5", body=b"he"), 31, (408,)),
        (post(b"Transfer-Encoding: chunked", body=b"5\r\nhe"), 31, (408,)),
    ],
)
def test_who_takes_too_long_to_ask_is_cut(
    loop: NewLoop, sent: bytes, seconds: int, status: tuple[int, ...]
) -> None:
    async def test() -> None:
        async with served() as it:
            client = await it.client()
            await it.until_connections(1)
            (connection,) = it.server.connections
            client.send(sent)
            async with asyncio.timeout(LIMIT):
                while connection._parser.unread + connection._parser.held == 0 and sent:
                    await asyncio.sleep(0)
            it.pass_time(seconds - 2)
            assert it.server.connections
            assert not connection._transport.is_closing()
            it.pass_time(2)
            assert statuses(await client.rest()) == status
            await client.close()
            await it.until_connections(0)

    run(loop, test())


@LOOPS
def test_a_trickle_does_not_extend_the_time_for_a_head(loop: NewLoop) -> None:
    async def test() -> None:
        async with served() as it:
            client = await it.client()
            await it.until_connections(1)
            (connection,) = it.server.connections
            for number, byte in enumerate(b"GET / HTT"):
                client.send(bytes([byte]))
                async with asyncio.timeout(LIMIT):
                    while connection._parser.unread <= number:
                        await asyncio.sleep(0)
                it.pass_time(1)
            it.pass_time(2)
            assert statuses(await client.rest()) == (408,)
            await client.close()

    run(loop, test())


@LOOPS
@pytest.mark.parametrize(
    ("begin", "more"),
    [(post(b"Content-Length: 500"), b"x"), (post(b"Transfer-Encoding: chunked"), b"1\r\nx\r\n")],
)
def test_a_trickle_does_not_extend_the_time_for_a_body(
    loop: NewLoop, begin: bytes, more: bytes
) -> None:
    async def test() -> None:
        async with served() as it:
            client = await it.client()
            await it.until_connections(1)
            (connection,) = it.server.connections
            client.send(begin)
            for number in range(1, 30):
                client.send(more)
                async with asyncio.timeout(LIMIT):
                    while connection._parser.held < number:
                        await asyncio.sleep(0)
                it.pass_time(1)
            it.pass_time(2)
            assert statuses(await client.rest()) == (408,)
            await client.close()

    run(loop, test())


@LOOPS
def test_an_idle_connection_is_closed_and_one_that_waits_for_its_answer_is_not(
    loop: NewLoop,
) -> None:
    async def test() -> None:
        async with served() as it:
            idle, waiting = await it.client(), await it.client()
            idle.send(get(HOST))
            assert (await idle.response())[0] == 200
            waiting.send(get(HOST, target=b"/wait"))
            await it.echo.until(lambda: len(it.echo.kept) == 1)
            it.pass_time(200)
            assert await idle.rest() == b""
            it.echo.kept[0].full(200, (), b"at last")
            assert (await waiting.response())[2] == b"at last"
            await idle.close()
            await waiting.close()

    run(loop, test())


async def fill(reply: atrax.Reply) -> None:
    """Write until all buffers between here and the client are full."""
    async with asyncio.timeout(LIMIT):
        while reply.waiting < 1_000_000:
            reply.write(b"x" * 100_000)
            await asyncio.sleep(0)


@LOOPS
def test_a_slow_reader_is_stalled_then_cut_and_one_that_reads_on_is_not(loop: NewLoop) -> None:
    async def test() -> None:
        async with served() as it:
            client = await it.client()
            client.send(get(HOST, target=b"/wait"))
            await it.echo.until(lambda: len(it.echo.kept) == 1)
            reply = it.echo.kept[0]
            reply.head(200, atrax.SSE_HEADERS)
            assert not reply.stalled
            await fill(reply)
            assert reply.stalled
            it.pass_time(20)
            before = reply.waiting
            async with asyncio.timeout(LIMIT):
                while reply.waiting == before:
                    await client.reader.read(100_000)
            await fill(reply)
            it.pass_time(20)
            assert it.echo.left == []
            it.pass_time(12)
            await it.echo.until(lambda: it.echo.left == [0])
            assert "http.stalled" in [event.name for event in it.events]
            await client.close()

    run(loop, test())


@LOOPS
def test_answers_that_nobody_reads_do_not_pile_up(loop: NewLoop) -> None:
    async def test() -> None:
        class Big:
            answered = 0

            def handle(self, request: atrax.HttpRequest, reply: atrax.Reply) -> None:
                self.answered += 1
                reply.full(200, (), b"x" * 500_000)

        async with served() as it:
            big = it.server.handler = Big()
            client = await it.client()
            client.send(get(HOST) * 300)
            await it.until_connections(1)
            (connection,) = it.server.connections
            async with asyncio.timeout(LIMIT):
                while not connection._full:
                    await asyncio.sleep(0)
            for _ in range(100):
                await asyncio.sleep(0)
            assert big.answered < 150
            for _ in range(300):
                assert await client_fast(client) == 200
            await client.close()

    run(loop, test())


@LOOPS
def test_connections_past_the_limit_are_told_so(loop: NewLoop) -> None:
    async def test() -> None:
        async with served(connections=2) as it:
            first, second = await it.client(), await it.client()
            await it.until_connections(2)
            third = await it.client()
            assert statuses(await third.rest()) == (503,)
            await third.close()
            await first.close()
            await it.until_connections(1)
            fourth = await it.client()
            fourth.send(get(HOST))
            assert (await fourth.response())[0] == 200
            await second.close()
            await fourth.close()

    run(loop, test())


@LOOPS
def test_connections_of_one_address_are_limited_and_of_a_socket_are_not(
    loop: NewLoop, tmp_path: Any
) -> None:
    async def test() -> None:
        async with served(connections_per_address=1) as it:
            first = await it.client()
            await it.until_connections(1)
            second = await it.client()
            assert statuses(await second.rest()) == (429,)
            path = str(tmp_path / "s")
            assert await it.server.listen("", 0, path) == [f"unix:{path}"]
            local = [Client(*await asyncio.open_unix_connection(path)) for _ in range(3)]
            for client in local:
                client.send(get(HOST))
                assert (await client.response())[0] == 200
            for client in (*local, first, second):
                await client.close()

    run(loop, test())


@LOOPS
def test_draining_ends_idle_connections_and_lets_answers_finish(loop: NewLoop) -> None:
    async def test() -> None:
        async with served() as it:
            idle, waiting = await it.client(), await it.client()
            idle.send(get(HOST))
            await idle.response()
            waiting.send(get(HOST, target=b"/wait"))
            await it.echo.until(lambda: len(it.echo.kept) == 1)
            it.server.refuse()
            assert await idle.rest() == b""
            probe = await it.client()
            probe.send(get(HOST))
            assert b"Connection: close" in await probe.rest()
            closing = asyncio.ensure_future(it.server.close(LIMIT))
            it.echo.kept[0].full(200, (), b"done")
            answer = await waiting.rest()
            assert answer.endswith(b"done") and b"Connection: close" in answer
            await waiting.close()
            await closing
            assert not it.server.connections
            with pytest.raises(OSError):
                await it.client()
            await idle.close()
            await probe.close()

    run(loop, test())


@LOOPS
def test_when_the_grace_is_over_everything_is_cut(loop: NewLoop) -> None:
    async def test() -> None:
        async with served() as it:
            client = await it.client()
            client.send(get(HOST, target=b"/wait"))
            await it.echo.until(lambda: len(it.echo.kept) == 1)
            await it.server.close(0.01)
            await it.echo.until(lambda: it.echo.left == [0])
            assert await client.rest() == b""
            await client.close()

    run(loop, test())


@LOOPS
def test_a_port_in_use_is_named_with_what_to_do(loop: NewLoop) -> None:
    async def test() -> None:
        async with served() as it:
            other = atrax.HttpServer(it.echo, atrax.Limits(), it.record, lambda: 0.0)
            with pytest.raises(atrax.UsageError) as error:
                await other.listen("127.0.0.1", it.port)
            assert str(error.value) == (
                f"port {it.port} on 127.0.0.1 is in use."
                f" Stop what uses it, or choose another: --port {it.port + 1}"
            )
            with pytest.raises(atrax.UsageError, match="no address of this machine"):
                await other.listen("192.0.2.1", 0)
            with pytest.raises(atrax.UsageError, match="can be resolved"):
                await other.listen("no such host", 0)

    run(loop, test())


@LOOPS
def test_a_socket_that_a_dead_process_left_is_taken_over_and_a_living_one_is_not(
    loop: NewLoop, tmp_path: Any
) -> None:
    async def test() -> None:
        path = str(tmp_path / "socket")
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
        async with served() as it:
            await it.server.listen("", 0, path)
            other = atrax.HttpServer(it.echo, atrax.Limits(), it.record, lambda: 0.0)
            with pytest.raises(atrax.UsageError, match="in use"):
                await other.listen("", 0, path)
            (tmp_path / "file").write_text("precious")
            with pytest.raises(atrax.UsageError, match="in use"):
                await other.listen("", 0, str(tmp_path / "file"))
            assert (tmp_path / "file").read_text() == "precious"

    run(loop, test())
    assert not (tmp_path / "socket").exists()


# ---- event streams ----


@pytest.mark.parametrize(
    ("event", "wire"),
    [
        (atrax.sse_event(b'{"a":1}'), b'event: message\ndata: {"a":1}\n\n'),
        (atrax.sse_event(b"", "s-1"), b"event: message\nid: s-1\ndata: \n\n"),
        (atrax.sse_event(b"/messages", event="endpoint"), b"event: endpoint\ndata: /messages\n\n"),
        (atrax.sse_event(b'{\r"a":\n1,\r\n"b":2}'), b'event: message\ndata: { "a": 1,  "b":2}\n\n'),
        (atrax.sse_comment(), b":\n\n"),
    ],
)
def test_an_event_is_one_data_line(event: bytes, wire: bytes) -> None:
    assert event == wire


def test_random_bytes_over_a_socket_never_stop_the_server() -> None:
    async def test() -> None:
        chance = random.Random(7)
        async with served() as it:
            for _ in range(200):
                client = await it.client()
                row = chance.choice(ROWS).data[:2000]
                at = chance.randrange(len(row))
                client.send(row[:at] + chance.randbytes(20) + row[at:])
                client.writer.write_eof()
                await client.rest()
                await client.close()
            client = await it.client()
            client.send(get(HOST))
            assert (await client.response())[0] == 200
            await client.close()
            assert not [event for event in it.events if event.level == "error"]

    run(uvloop.new_event_loop, test())
