"""What a row of this folder is, and two ways to write its bytes shortly."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """`data` is sent on a new connection; `statuses` are those of all responses, in order.

    A last status that is not 200 means that the server must close, whatever else was sent."""

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
# A request that must never be seen by the handler: it would have been smuggled.
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
