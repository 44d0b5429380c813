"""What a row of this folder is, and short ways to write its bytes."""

from __future__ import annotations

import dataclasses
import json


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """`data` is sent on a new connection; `statuses` are those of all responses, in order.

    A last status that is not 200 means that the server must close, whatever else was sent. Rows for the gateway
    (gateway.py) are answered by what stands behind the parser, which need not close."""

    id: str
    data: bytes
    statuses: tuple[int, ...]
    source: str


def get(*lines: bytes, target: bytes = b"/", version: bytes = b"HTTP/1.1") -> bytes:
    """A GET whose header lines are `lines`, without Host unless it is among them."""
    return (
        b"GET %b %b\r\n" % (target, version) + b"".join(line + b"\r\n" for line in lines) + b"\r\n"
    )


def post(*lines: bytes, body: bytes = b"") -> bytes:
    """A POST with a Host, `lines` and `body`, which nothing counts or checks."""
    head = b"".join(line + b"\r\n" for line in (b"Host: a", *lines))
    return b"POST / HTTP/1.1\r\n" + head + b"\r\n" + body


HOST = b"Host: a"
CHUNKED = b"Transfer-Encoding: chunked"
META = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "hostile", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}
TARGET = b"/servers/smuggled/mcp"
MODERN = {
    b"Host": b"a",
    b"Content-Type": b"application/json",
    b"Accept": b"application/json, text/event-stream",
    b"MCP-Protocol-Version": b"2026-07-28",
    b"Mcp-Method": b"tools/call",
    b"Mcp-Name": b"do",
}
ARGUMENTS = b'{"what":"calls"}'


def body(arguments: bytes = ARGUMENTS) -> bytes:
    """The message of a tools/call of `do` with `arguments`."""
    params = b'{"name":"do","arguments":%b,"_meta":%b}' % (arguments, json.dumps(META).encode())
    return b'{"jsonrpc":"2.0","id":7,"method":"tools/call","params":%b}' % params


def call(
    message: bytes | None = None,
    *,
    target: bytes = TARGET,
    method: bytes = b"POST",
    **headers: bytes | None,
) -> bytes:
    """A request that the gateway answers by asking the child `smuggled`, unless what is given spoils it.

    `headers` by name with `_` for `-`; None leaves one out. Others are added in front."""
    message = body() if message is None else message
    given = {name.replace("_", "-").encode(): value for name, value in headers.items()}
    due = {**given, **{name: value for name, value in MODERN.items() if name not in given}}
    due.setdefault(b"Content-Length", b"%d" % len(message))
    lines = [b"%b: %b\r\n" % (name, value) for name, value in due.items() if value is not None]
    return b"%b %b HTTP/1.1\r\n" % (method, target) + b"".join(lines) + b"\r\n" + message


# A request that nobody must see: it would have been smuggled. The gateway would call a tool.
SMUGGLED = call()
