"""Many clients of both eras that all use the same JSON-RPC ids, each looking for answers that are not its own.

    stampede.py URL CALLS CLIENTS PATIENCE TOOL …

Every call carries a nonce that no other call has. An answer is misdelivered when its text is not the nonce of the
request it answers, when its id is not that request's, or when a second answer comes. One call in fifty is cancelled in
the way of its era. Prints a line of JSON: {"calls", "answered", "cancelled", "failed", "overlap", "flying",
"misdelivered": […]}; `failed` ended in an error, `overlap` is how many were in flight at once, `flying` how many were
still waiting when nothing had come for PATIENCE seconds."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import sys
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

Json = Any
META = json.dumps(
    {
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientInfo": {"name": "stampede", "version": "1"},
        "io.modelcontextprotocol/clientCapabilities": {},
    }
)
HELLO = {"protocolVersion": "2025-11-25", "capabilities": {}}
HELLO["clientInfo"] = {"name": "stampede", "version": "1"}
CHANCE = random.Random(7)


@dataclass
class Tally:
    calls: int = 0
    answered: int = 0
    cancelled: int = 0
    failed: int = 0
    flying: int = 0
    overlap: int = 0
    misdelivered: list[str] = field(default_factory=list)

    def sent(self) -> None:
        self.calls += 1
        self.flying += 1
        self.overlap = max(self.overlap, self.flying)

    @property
    def over(self) -> int:
        return self.calls - self.flying

    def judge(self, ident: Json, nonce: str, messages: list[Json], cancelled: bool = False) -> None:
        """Count one call that is over, or say what was wrong with its answer."""
        self.flying -= 1
        if cancelled and not messages:
            self.cancelled += 1
            return
        ours = [m for m in messages if m.get("id") == ident and type(m["id"]) is type(ident)]
        if len(messages) != 1 or len(ours) != 1:
            self.misdelivered.append(f"id {ident!r} nonce {nonce} got {str(messages)[:200]}")
        elif "error" in messages[0]:
            self.failed += 1
        elif (text := messages[0]["result"]["content"][0]["text"]) != nonce:
            self.misdelivered.append(f"id {ident!r} nonce {nonce} got the answer {text}")
        else:
            self.answered += 1


class Wire(asyncio.Protocol):
    """One keep-alive connection with one request at a time. Streams would cost twice as much per call."""

    def __init__(self) -> None:
        self.buffer = b""
        self.waiting: asyncio.Future[tuple[bytes, list[Json]]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_exception(ConnectionError(f"the connection was cut: {error}"))

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.buffer[:end]
        body = whole_body(head, self.buffer[end + 4 :])
        if body is not None and self.waiting is not None:
            self.buffer = b""  # one request at a time: nothing can follow
            self.waiting.set_result((head, messages_of(head, body)))

    def send(self, head: bytes, body: bytes) -> asyncio.Future[tuple[bytes, list[Json]]]:
        self.waiting = asyncio.get_running_loop().create_future()
        self.transport.write(b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body))
        return self.waiting


def whole_body(head: bytes, rest: bytes) -> bytes | None:
    """The body of a response, None while it is not all there. A stream is read to its end."""
    head = head.lower()
    if b"transfer-encoding: chunked" in head:
        if not rest.endswith(b"0\r\n\r\n"):
            return None
        chunks = []
        while size := int(rest[: rest.index(b"\r\n")], 16):
            begin = rest.index(b"\r\n") + 2
            chunks.append(rest[begin : begin + size])
            rest = rest[begin + size + 2 :]
        return b"".join(chunks)
    at = head.find(b"content-length:")
    length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
    return rest if len(rest) >= length else None


def messages_of(head: bytes, body: bytes) -> list[Json]:
    """The JSON-RPC responses of a body, JSON or event stream."""
    if b"text/event-stream" not in head.lower():
        return [json.loads(body)] if body else []
    lines = [line[5:] for line in body.splitlines() if line.startswith(b"data:")]
    found = [json.loads(line) for line in lines if line.strip()]
    return [message for message in found if "method" not in message]


class Crowd:
    """What all clients share: where they call, how many calls are left, what came of them."""

    def __init__(self, url: str, calls: int) -> None:
        parts = urlsplit(url)
        self.host, self.port, self.path = parts.hostname, parts.port, parts.path
        self.numbers: Iterator[int] = iter(range(calls))
        self.tally = Tally()

    async def connect(self) -> Wire:
        _, wire = await asyncio.get_running_loop().create_connection(Wire, self.host, self.port)
        return wire

    def head(self, **headers: str) -> bytes:
        due = {
            "Host": f"{self.host}:{self.port}",
            "Content-Type": "application/json",
            "Accept": "application/json, text/event-stream",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in due.items())
        return f"POST {self.path} HTTP/1.1\r\n{lines}".encode()

    async def modern(self, tool: str, as_text: bool) -> None:
        """A stateless client; the id of all its calls is 1. It cancels by hanging up."""
        version = "2026-07-28"
        head = self.head(MCP_Protocol_Version=version, Mcp_Method="tools/call", Mcp_Name=tool)
        ident: Json = "1" if as_text else 1
        wire = await self.connect()
        for number in self.numbers:
            nonce = f"nonce-{number}"
            self.tally.sent()
            answer = wire.send(head, call(ident, tool, nonce, f',"_meta":{META}'))
            if CHANCE.random() < 0.02:
                await asyncio.sleep(CHANCE.choice((0, 0.002)))
                if not answer.done():
                    answer.cancel()
                    wire.transport.abort()
                    self.tally.judge(ident, nonce, [], cancelled=True)
                    wire = await self.connect()
                    continue
            self.tally.judge(ident, nonce, (await answer)[1])
        wire.transport.abort()

    async def legacy(self, tool: str, as_text: bool) -> None:
        """A session; its ids count from 1, as those of all sessions. It cancels by a notification."""
        wire, side = await self.connect(), await self.connect()
        hello, _ = await wire.send(self.head(), message(0, "initialize", json.dumps(HELLO)))
        session = re.findall(rb"(?i)mcp-session-id: *(\S+)", hello)[0].decode()
        head = self.head(MCP_Protocol_Version="2025-11-25", Mcp_Session_Id=session)
        await wire.send(head, message(None, "notifications/initialized", "{}"))
        for count, number in zip(itertools.count(1), self.numbers, strict=False):
            nonce, ident = f"nonce-{number}", str(count) if as_text else count
            self.tally.sent()
            answer = wire.send(head, call(ident, tool, nonce))
            cancel = CHANCE.random() < 0.02
            if cancel:
                await asyncio.sleep(CHANCE.choice((0, 0.002)))
                params = json.dumps({"requestId": ident})
                await side.send(head, message(None, "notifications/cancelled", params))
            self.tally.judge(ident, nonce, (await answer)[1], cancelled=cancel)
        wire.transport.abort()
        side.transport.abort()


def message(ident: Json, method: str, params: str) -> bytes:
    number = "" if ident is None else f'"id":{json.dumps(ident)},'
    return f'{{"jsonrpc":"2.0",{number}"method":"{method}","params":{params}}}'.encode()


def call(ident: Json, tool: str, nonce: str, more: str = "") -> bytes:
    return message(ident, "tools/call", f'{{"name":"{tool}","arguments":{{"n":"{nonce}"}}{more}}}')


async def stampede(url: str, calls: int, clients: int, patience: float, tools: list[str]) -> Tally:
    crowd = Crowd(url, calls)
    eras: list[Callable[..., Any]] = [crowd.modern, crowd.legacy]
    kinds = itertools.cycle(itertools.product(tools, (False, True), eras))
    ways = [era(tool, text) for _, (tool, text, era) in zip(range(clients), kinds, strict=False)]
    running = {asyncio.create_task(way) for way in ways}  # awaited or cancelled below
    before = -1
    while running and before != crowd.tally.over:
        before = crowd.tally.over
        done, running = await asyncio.wait(running, timeout=patience)
        for task in done:
            task.result()
    for task in running:
        task.cancel()
    return crowd.tally


def main() -> None:
    url, calls, clients, patience, *tools = sys.argv[1:]
    crowd = stampede(url, int(calls), int(clients), float(patience), tools)
    print(json.dumps(asdict(run(crowd))))


def run(crowd: Coroutine[Any, Any, Tally]) -> Tally:
    """On uvloop where it is: a quarter less per call, and it is not the stampede that is tested."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(crowd)
    return uvloop.run(crowd)


if __name__ == "__main__":
    main()
