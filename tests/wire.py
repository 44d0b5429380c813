"""A raw client for both eras, on asyncio streams: what a test needs to see every byte that matters.

    modern = wire.Modern(url)                       # stateless, 2026-07-28
    answer = await modern.call("files__list")       # answer.result, .error, .notices, .status, .headers
    exchange = await modern.open("tools/call", …)   # not waited for: exchange.messages(), .close()

    legacy = await wire.Legacy.start(url)           # initialize, initialized; a session
    legacy.answers["elicitation/create"] = lambda params: {"action": "accept", "content": {}}
    answer = await legacy.call("notes__delete", id=1)

Ids count from 1 in every client, so that clients of one test use equal ids. Stdlib only; no retries, no
timeouts of its own (pytest has one per test). `listener` makes who checks what each client hears: conftest.py
sets it for every test (spoken.py).
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

MODERN = "2026-07-28"
LATEST_LEGACY = "2025-11-25"
META = "io.modelcontextprotocol/"
BOTH = "application/json, text/event-stream"
LIMIT = (
    256 * 1024 * 1024
)  # bytes of one line that a test reads: an SSE event may carry a big result
# Which member of params a modern client repeats as Mcp-Name (2026-07-28, basic/transports).
NAMED_BY = {
    "tools/call": "name",
    "prompts/get": "name",
    "resources/read": "uri",
    "tasks/get": "taskId",
    "tasks/update": "taskId",
    "tasks/cancel": "taskId",
}

Json = Any
Answers = dict[str, Callable[[Json], Json]]  # method → params → result


class Ear(Protocol):
    """Who checks what is said to one client; knows what that client sent."""

    def sent(self, message: Json) -> None: ...
    def heard(self, message: Json) -> None: ...


class _Deaf:
    """The Ear of a client that nobody checks."""

    def sent(self, message: Json) -> None: ...
    def heard(self, message: Json) -> None: ...


# Makes the Ear of a client that speaks a version; None: a legacy one, whose version comes with initialize.
listener: Callable[[str | None], Ear] = lambda version: _Deaf()  # noqa: E731


# ---- HTTP --------------------------------------------------------------------------------


@dataclasses.dataclass
class Event:
    """One event of an event stream; comments are events whose `comment` is set."""

    data: str = ""
    id: str | None = None
    event: str = "message"
    retry: int | None = None
    comment: str | None = None


class Connection:
    """One connection, one request at a time. `url` may be http[s]://HOST:PORT or unix:/PATH."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(
        cls, url: str, tls: ssl.SSLContext | None = None, source: str | None = None
    ) -> Connection:
        """`source`: the address to come from, as 127.0.0.2."""
        parts = urlsplit(url)
        if parts.scheme == "unix":
            return cls(*await asyncio.open_unix_connection(parts.path, limit=LIMIT))
        local = (source, 0) if source else None
        return cls(
            *await asyncio.open_connection(
                parts.hostname, parts.port, limit=LIMIT, ssl=tls, local_addr=local
            )
        )

    async def send(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> None:
        lines = [
            f"{method} {target} HTTP/1.1",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await self.writer.drain()

    def close(self) -> None:
        self.writer.close()

    def abort(self) -> None:
        """Cut it with a reset, as a crashed client does."""
        self.writer.transport.abort()


class Exchange:
    """A response whose head was read. Read its body once: `body`, `events` or `messages`."""

    def __init__(
        self, connection: Connection, status: int, headers: dict[str, str], done: Done
    ) -> None:
        self.connection, self.status, self.headers, self._done = connection, status, headers, done
        self.ear: Ear = _Deaf()

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes; then the connection goes back to its pool."""
        reader = self.connection.reader
        if "chunked" in self.headers.get("transfer-encoding", ""):
            while size := int((await reader.readline()).split(b";")[0], 16):
                yield await reader.readexactly(size)
                await reader.readexactly(2)
            await reader.readline()
        elif "content-length" in self.headers:
            yield await reader.readexactly(int(self.headers["content-length"]))
        elif self.status not in (204, 304):
            while data := await reader.read(65536):
                yield data
        self._done(self)

    async def body(self) -> bytes:
        return b"".join([chunk async for chunk in self.chunks()])

    async def events(self, comments: bool = False) -> AsyncIterator[Event]:
        """The events of an event stream, until the server ends it."""
        rest = b""
        async for chunk in self.chunks():
            *blocks, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
            for block in blocks:
                event = _event(block.decode())
                if event.data and event.event == "message":
                    self.ear.heard(json.loads(event.data))
                if event.comment is None or comments:
                    yield event

    async def messages(self) -> AsyncIterator[Json]:
        """JSON-RPC messages, whichever way they came."""
        if not self.is_stream:
            body = await self.body()
            if body:
                message = json.loads(body)
                self.ear.heard(message)
                yield message
            return
        async for event in self.events():
            if event.data and event.event == "message":
                yield json.loads(event.data)

    def close(self) -> None:
        """Hang up before the end: what a client does that lost interest."""
        self.connection.close()


Done = Callable[[Exchange], None]


def _event(block: str) -> Event:
    event, data = Event(), []
    for line in block.split("\n"):
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
        elif name == "":
            event.comment = value
        elif name == "retry":
            event.retry = int(value)
        elif name in ("id", "event"):
            setattr(event, name, value)
    event.data = "\n".join(data)
    if any(line.startswith(("data", "id", "event", "retry")) for line in block.split("\n")):
        event.comment = None
    return event


EXTRA: dict[str, str] = {}  # headers of every request


class Http:
    """Keep-alive connections to one origin; as many as there are requests at once."""

    def __init__(
        self, url: str, tls: ssl.SSLContext | None = None, source: str | None = None
    ) -> None:
        self.url, self._tls, self._source = url, tls, source
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()

    async def request(
        self, method: str, target: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> Exchange:
        """Send and read the head. Host and Content-Length are added unless given; 100 is passed over."""
        if self._idle:
            connection = self._idle.pop()
        else:
            connection = await Connection.to(self.url, self._tls, self._source)
        self._open.add(connection)
        sent = {"Host": urlsplit(self.url).netloc or "localhost", **EXTRA, **(headers or {})}
        if body or method == "POST":
            sent.setdefault("Content-Length", str(len(body)))
        await connection.send(method, target, sent, body)
        status, received = await _head(connection.reader)
        return Exchange(connection, status, received, self._release)

    async def get(self, target: str, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
        """Status and body of a GET."""
        exchange = await self.request("GET", target, headers)
        return exchange.status, await exchange.body()

    def close(self) -> None:
        """Hang up everything that is open."""
        for connection in self._open:
            connection.close()
        self._open.clear()
        self._idle.clear()

    def _release(self, exchange: Exchange) -> None:
        if exchange.headers.get("connection", "").lower() == "close":
            exchange.connection.close()
            self._open.discard(exchange.connection)
        else:
            self._idle.append(exchange.connection)


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    status = int(first.split(" ")[1])
    if status == 100:
        return await _head(reader)
    pairs = (line.split(":", 1) for line in lines if line)
    return status, {name.lower(): value.strip() for name, value in pairs}


# ---- MCP ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Answer:
    """What one request brought: its response, and what came before it."""

    status: int
    headers: dict[str, str]
    response: Json = None
    notices: list[Json] = dataclasses.field(default_factory=list)
    asks: list[Json] = dataclasses.field(default_factory=list)

    @property
    def result(self) -> Json:
        assert self.response and "result" in self.response, (
            f"no result: {self.status} {self.response}"
        )
        return self.response["result"]

    @property
    def error(self) -> Json:
        assert self.response and "error" in self.response, (
            f"no error: {self.status} {self.response}"
        )
        return self.response["error"]

    @property
    def code(self) -> int:
        """The JSON-RPC error's code."""
        code: int = self.error["code"]
        return code

    @property
    def text(self) -> str:
        """The text of a tool's result."""
        return "\n".join(
            block["text"] for block in self.result["content"] if block["type"] == "text"
        )


class Modern:
    """A client of 2026-07-28: each request stands alone. `url` is an endpoint, …/mcp."""

    def __init__(
        self,
        url: str,
        capabilities: Json = None,
        headers: Mapping[str, str] | None = None,
        http: Http | None = None,
    ) -> None:
        self.path = urlsplit(url).path
        self.http = http or Http(url)
        self.capabilities, self.headers = capabilities or {}, dict(headers or {})
        self.ear = listener(MODERN)
        self._ids = itertools.count(1)

    def meta(self, **more: Json) -> dict[str, Json]:
        """The `_meta` of a request; `more` are members of the specification's namespace, as logLevel."""
        own = {
            "protocolVersion": MODERN,
            "clientInfo": {"name": "wire", "version": "1"},
            "clientCapabilities": self.capabilities,
            **more,
        }
        return {META + name: value for name, value in own.items()}

    async def open(
        self,
        method: str,
        params: Json = None,
        *,
        id: Json = None,
        meta: Json = None,
        headers: Mapping[str, str] | None = None,
    ) -> Exchange:
        """Send a request and read the head of its response. `meta` and `headers` are added to what is due."""
        params = dict(params or {})
        params["_meta"] = {**self.meta(), **params.get("_meta", {}), **(meta or {})}
        number = next(self._ids) if id is None else id
        message = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
        due = {
            "Content-Type": "application/json",
            "Accept": BOTH,
            "MCP-Protocol-Version": MODERN,
            "Mcp-Method": method,
        }
        if method in NAMED_BY and NAMED_BY[method] in params:
            due["Mcp-Name"] = str(params[NAMED_BY[method]])
        due |= self.headers | dict(headers or {})
        self.ear.sent(message)
        exchange = await self.http.request("POST", self.path, due, json.dumps(message).encode())
        exchange.ear = self.ear
        return exchange

    async def request(self, method: str, params: Json = None, **more: Json) -> Answer:
        """Send a request and read its response to the end; `more` as for `open`."""
        exchange = await self.open(method, params, **more)
        answer = Answer(exchange.status, exchange.headers)
        async for message in exchange.messages():
            if "method" in message:
                answer.notices.append(message)
            else:
                answer.response = message
        return answer

    async def call(self, tool: str, arguments: Json = None, **more: Json) -> Answer:
        return await self.request(
            "tools/call", {"name": tool, "arguments": arguments or {}}, **more
        )

    async def retry(
        self, method: str, params: Json, asked: Answer, responses: Json, **more: Json
    ) -> Answer:
        """The next round of a call that ended in `input_required`: its state and answers to its requests."""
        state = (
            {"requestState": asked.result["requestState"]} if "requestState" in asked.result else {}
        )
        return await self.request(method, {**params, **state, "inputResponses": responses}, **more)

    async def list(self, kind: str) -> list[Json]:
        """All pages of tools, prompts, resources; `resources/templates` for resourceTemplates."""
        return await _pages(self, kind)

    def close(self) -> None:
        self.http.close()


class Legacy:
    """A client of the legacy era over streamable HTTP, with a session."""

    def __init__(
        self, url: str, version: str, headers: Mapping[str, str] | None, http: Http | None
    ) -> None:
        self.path = urlsplit(url).path
        self.http = http or Http(url)
        self.version, self.headers = version, dict(headers or {})
        self.session: str | None = None
        self.initialized: Json = None
        # How requests of the server are answered: method -> params -> result. Absent: -32601.
        self.answers: Answers = {}
        self.ear = listener(None)
        self._ids = itertools.count(1)

    @classmethod
    async def start(
        cls,
        url: str,
        version: str = LATEST_LEGACY,
        capabilities: Json = None,
        headers: Mapping[str, str] | None = None,
        http: Http | None = None,
    ) -> Legacy:
        """A client whose session is open."""
        self = cls(url, version, headers, http)
        info = {"name": "wire", "version": "1"}
        params = {
            "protocolVersion": version,
            "capabilities": capabilities or {},
            "clientInfo": info,
        }
        answer = await self.request("initialize", params)
        self.initialized = answer.result
        self.version = answer.result["protocolVersion"]
        self.session = answer.headers.get("mcp-session-id")
        await self.notify("notifications/initialized")
        return self

    def due_headers(self) -> dict[str, str]:
        due = {"Content-Type": "application/json", "Accept": BOTH}
        if self.session:
            due["Mcp-Session-Id"] = self.session
        if self.initialized and self.version >= "2025-06-18":
            due["MCP-Protocol-Version"] = self.version
        return due | self.headers

    async def post(self, message: Json, headers: Mapping[str, str] | None = None) -> Exchange:
        """Send any message, or a batch, and read the head of the response."""
        due = self.due_headers() | dict(headers or {})
        self.ear.sent(message)
        exchange = await self.http.request("POST", self.path, due, json.dumps(message).encode())
        exchange.ear = self.ear
        return exchange

    async def open(
        self,
        method: str,
        params: Json = None,
        *,
        id: Json = None,
        headers: Mapping[str, str] | None = None,
    ) -> Exchange:
        number = next(self._ids) if id is None else id
        message = {"jsonrpc": "2.0", "id": number, "method": method}
        if params is not None:
            message["params"] = params
        return await self.post(message, headers)

    async def request(self, method: str, params: Json = None, **more: Json) -> Answer:
        """Send a request, answer what the server asks meanwhile, and read the response."""
        exchange = await self.open(method, params, **more)
        answer = Answer(exchange.status, exchange.headers)
        async for message in exchange.messages():
            await self.take(message, answer)
        return answer

    async def take(self, message: Json, answer: Answer) -> None:
        """File one message of a stream into `answer`; a request of the server is answered at once."""
        if "method" not in message:
            answer.response = message
        elif "id" not in message:
            answer.notices.append(message)
        else:
            answer.asks.append(message)
            respond = self.answers.get(message["method"])
            if respond is None:
                await self.respond(
                    message["id"], error={"code": -32601, "message": "not answered here"}
                )
            else:
                await self.respond(message["id"], respond(message.get("params")))

    async def call(self, tool: str, arguments: Json = None, **more: Json) -> Answer:
        return await self.request(
            "tools/call", {"name": tool, "arguments": arguments or {}}, **more
        )

    async def list(self, kind: str) -> list[Json]:
        """All pages of tools, prompts, resources; `resources/templates` for resourceTemplates."""
        return await _pages(self, kind)

    async def notify(self, method: str, params: Json = None) -> int:
        """Send a notification; the HTTP status."""
        message = {
            "jsonrpc": "2.0",
            "method": method,
            **({} if params is None else {"params": params}),
        }
        exchange = await self.post(message)
        await exchange.body()
        return exchange.status

    async def respond(self, id: Json, result: Json = None, error: Json = None) -> int:
        """Answer a request of the server; the HTTP status."""
        body = {"error": error} if error else {"result": {} if result is None else result}
        exchange = await self.post({"jsonrpc": "2.0", "id": id, **body})
        await exchange.body()
        return exchange.status

    async def listen(self, last_event_id: str | None = None) -> Exchange:
        """The session's own stream, or the rest of a stream that was cut."""
        more = {"Last-Event-ID": last_event_id} if last_event_id else {}
        due = self.due_headers() | {"Accept": "text/event-stream"} | more
        exchange = await self.http.request("GET", self.path, due)
        exchange.ear = self.ear
        return exchange

    async def delete(self) -> int:
        exchange = await self.http.request("DELETE", self.path, self.due_headers())
        await exchange.body()
        return exchange.status

    def close(self) -> None:
        self.http.close()


class OldSse:
    """A client of the 2024-11-05 HTTP+SSE transport: one stream down, POSTs up. `url` is …/sse."""

    def __init__(self, stream: Exchange, http: Http, answers: Answers) -> None:
        self.stream, self.http, self.answers = stream, http, answers
        self.ear = stream.ear = listener("2024-11-05")
        self.messages: dict[Json, asyncio.Future[Json]] = {}
        self.notices: list[Json] = []
        self.headers: dict[str, str] = {}
        self.initialized: Json = None
        self._ids = itertools.count(1)
        self._target: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read())  # ends with the stream, by `close`

    @classmethod
    async def start(
        cls,
        url: str,
        headers: Mapping[str, str] | None = None,
        capabilities: Json = None,
        answers: Answers | None = None,
    ) -> OldSse:
        """A client that is initialized; `answers` as of Legacy."""
        http = Http(url)
        due = {"Accept": "text/event-stream", **(headers or {})}
        self = cls(await http.request("GET", urlsplit(url).path, due), http, answers or {})
        self.headers = dict(headers or {})
        info = {"name": "wire", "version": "1"}
        params = {
            "protocolVersion": "2024-11-05",
            "capabilities": capabilities or {},
            "clientInfo": info,
        }
        self.initialized = (await self.request("initialize", params))["result"]
        await self.post({"jsonrpc": "2.0", "method": "notifications/initialized"})
        return self

    async def _read(self) -> None:
        async for event in self.stream.events():
            if event.event == "endpoint":
                self._target.set_result(event.data)  # a path, or a whole URL of this origin
                continue
            message = json.loads(event.data)
            if "method" not in message and message.get("id") in self.messages:
                self.messages.pop(message["id"]).set_result(message)
            elif "id" in message and message["method"] in self.answers:
                result = self.answers[message["method"]](message.get("params"))
                await self.post({"jsonrpc": "2.0", "id": message["id"], "result": result})
            else:
                self.notices.append(message)

    async def post(self, message: Json) -> int:
        due = {"Content-Type": "application/json", **self.headers}
        self.ear.sent(message)
        target = urlsplit(await self._target)._replace(scheme="", netloc="").geturl()
        exchange = await self.http.request("POST", target, due, json.dumps(message).encode())
        await exchange.body()
        return exchange.status

    async def request(self, method: str, params: Json = None) -> Json:
        """Send a request; the response that came down the stream."""
        number = next(self._ids)
        self.messages[number] = asyncio.get_running_loop().create_future()
        await self.post({"jsonrpc": "2.0", "id": number, "method": method, "params": params or {}})
        return await self.messages[number]

    def close(self) -> None:
        self._reader.cancel()
        self.http.close()


async def _pages(client: Modern | Legacy, kind: str) -> list[Json]:
    member = "resourceTemplates" if kind == "resources/templates" else kind
    items: list[Json] = []
    cursor: Json = {}
    while cursor is not None:
        result = (await client.request(f"{kind}/list", cursor)).result
        items += result[member]
        cursor = {"cursor": result["nextCursor"]} if "nextCursor" in result else None
    return items
