"""All of tests/hostile against a real gateway with a child that counts its calls: it still serves after each row,
and the call that is hidden in many of them never happens."""

from __future__ import annotations

import asyncio
import contextlib
import json

from conftest import Running, Start, child
from hostile import bodies, gateway, heads
from hostile.row import SMUGGLED, Row, get
from promises import promise

LIMIT = 20.0  # seconds
SAFE = {  # headers of every answer
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
HEALTH = get(b"Host: a", b"Connection: close", target=b"/health")


async def said(running: Running, data: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Status, headers and body of each response to `data`, until the gateway closes."""
    origin = running.url.removeprefix("http://")
    reader, writer = await asyncio.open_connection(*origin.rsplit(":", 1), limit=1 << 24)
    found = []
    async with asyncio.timeout(LIMIT):
        writer.write(data)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                first, *lines = head[:-4].split("\r\n")
                headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
                bare = not found and data.startswith(b"HEAD")
                size = 0 if bare else int(headers.get("content-length", 0))
                status = int(first.split(" ")[1])
                if status >= 200:
                    found.append((status, headers, await reader.readexactly(size)))
        writer.close()
    return found


async def wrong(running: Running, row: Row, exactly: bool) -> str:
    """What is not as it must be after `row`; `exactly`: its statuses are the gateway's, not only the parser's."""
    answers = await said(running, row.data + HEALTH)
    if answers and answers[-1][2] == b'{"status":"ok"}' and len(answers) > len(row.statuses):
        answers.pop()  # HEALTH's: the row left the connection open
    statuses = tuple(status for status, _, _ in answers)
    if exactly:
        fits = statuses == row.statuses
    else:  # the parser lets pass what nothing here answers
        fits = len(statuses) == len(row.statuses) and all(
            got < 500 if due == 200 else got == due
            for got, due in zip(statuses, row.statuses, strict=True)
        )
    if not fits:
        return f"{row.id}: {statuses} and not {row.statuses}: {answers[-1:]}"
    if unsafe := [headers for _, headers, _ in answers if not headers.items() >= SAFE.items()]:
        return f"{row.id}: answered without {SAFE}: {unsafe}"
    silent = [answer for answer in answers if answer[0] >= 400 and b'"message"' not in answer[2]]
    if silent and not row.data.startswith(b"HEAD"):
        return f"{row.id}: refused without a reason: {silent}"
    if [status for status, _, _ in await said(running, HEALTH)] != [200]:
        return f"{row.id}: the gateway does not serve any more"
    return ""


async def calls(running: Running) -> int:
    """How many calls the child has got, this one not counted."""
    return int((await running.modern("smuggled").call("do", {"what": "calls"})).text) - 1


@promise("http.smuggled")
async def test_no_hostile_request_reaches_a_child_or_stops_the_gateway(atrax: Start) -> None:
    config = {
        **gateway.ALLOWED,
        "log": {"format": "json"},
        "mcpServers": {"smuggled": child("does")},
    }
    running = await (await atrax(config)).ready()
    rows = [(row, False) for row in (*heads.ROWS, *bodies.ROWS)]
    rows += [(row, True) for row in gateway.ROWS]

    faults, expected = [], 0
    for row, exactly in rows:
        fault = await wrong(running, row, exactly)
        seen = await calls(running)
        if seen != expected:
            fault += f"{row.id}: the child has been called"
        expected = seen + 1  # our question is a call too
        faults += [fault] if fault else []
    assert not faults, "\n".join(faults)

    assert not [line for line in running.log if '"internal.error"' in line or "Traceback" in line]
    # Had it not been hidden, it would have been answered.
    [(status, _, answer)] = await said(
        running, SMUGGLED.replace(b"Host: a\r\n", b"Host: a\r\nConnection: close\r\n")
    )
    assert status == 200 and json.loads(answer)["result"]["content"], answer
