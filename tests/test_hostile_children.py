"""What a server can do with its pipes: each is tried by a real child on a real gateway, and costs nobody else much.

While the child floods, a neighbour's calls are answered, the gateway's memory stays bounded, and its log too."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Running, Start, child, eventually
from promises import promise

import atrax as program

pytestmark = pytest.mark.needs_install()  # `quick` has no time for all of these

Json = Any
MOST_GROWTH = 300 * 2**10  # KiB; what is thrown at it is several times that
MOST_LINES = 2_000  # of the log, for some 100,000 that a child writes


def told(method: str, **params: Any) -> str:
    return json.dumps({"jsonrpc": "2.0", "method": method, "params": params})


def asked(method: str, **params: Any) -> str:
    return json.dumps({"jsonrpc": "2.0", "id": "q", "method": method, "params": params})


FLOODS = {
    "empty lines": "",
    "lines of one character": "x",
    "junk": "Listening on stdio!",
    "broken JSON": '{"jsonrpc": "2.0", "id": 1, "result": {"content": [',
    "deep JSON": "[" * 100_000,
    "answers to nothing": '{"jsonrpc":"2.0","id":99999,"result":{}}',
    "errors for nothing": '{"jsonrpc":"2.0","id":null,"error":{"code":1,"message":"x"}}',
    "lists that changed": told("notifications/tools/list_changed"),
    "log messages": told("notifications/message", level="error", data="x" * 200),
    "progress of nothing": told("notifications/progress", progressToken=1, progress=1),
    "progress with texts as tokens": told("notifications/progress", progressToken="x", progress=1),
    "updates": told("notifications/resources/updated", uri="file:///x"),
    "states of tasks": told("notifications/tasks/status", taskId="x", status="working"),
    "ends of elicitations": told("notifications/elicitation/complete", elicitationId="x"),
    "cancellations": told("notifications/cancelled", requestId="x"),
    "unknown notifications": told("notifications/" + "y" * 100),
}


def memory(gateway: Running, name: str) -> int:
    """A field of its memory in KiB: VmRSS, or VmHWM for the most that it ever was."""
    status = Path(f"/proc/{gateway.pid}/status").read_text(errors="replace")
    found = re.search(rf"{name}:\s+(\d+) kB", status)
    assert found
    return int(found[1])


async def survived(gateway: Running, flood: asyncio.Task[Any], before: int) -> None:
    """The neighbour is served during `flood` and after it, memory and log stay bounded."""
    client, during = gateway.modern(), 0
    while not flood.done():
        assert (await client.call("good__do", {"what": "echo", "text": "here"})).text == "here"
        during += 1
        await asyncio.sleep(0.01)
    assert during > 3  # the loop is not held: a spell for the flood, then a turn for others
    assert (await client.call("good__do", {"what": "echo", "text": "on"})).text == "on"
    assert memory(gateway, "VmHWM") - before < MOST_GROWTH
    assert len(gateway.log) < MOST_LINES


@promise("child.bounded")
@pytest.mark.parametrize("name", FLOODS)
async def test_a_flood_of_a_child_costs_its_neighbours_nothing(atrax: Start, name: str) -> None:
    config = {"mcpServers": {"bad": child("does"), "good": child("does")}}
    gateway = await (await atrax({**config, "log": {"level": "debug"}}, judged=False)).ready()
    before = memory(gateway, "VmHWM")
    order = {"what": "flood", "line": FLOODS[name], "seconds": 1}
    call = gateway.modern().call("bad__do", order)
    await survived(gateway, asyncio.create_task(call), before)


@promise("child.bounded")
@pytest.mark.parametrize(
    "method", ["ping", "elicitation/create", "roots/list", "sampling/createMessage", "x/y"]
)
async def test_a_child_that_asks_without_end_and_reads_nothing_is_ended(
    atrax: Start, method: str
) -> None:
    config = {"mcpServers": {"bad": child("does"), "good": child("does")}}
    gateway = await (await atrax(config, judged=False)).ready()
    before = memory(gateway, "VmHWM")
    order = {"what": "flood", "line": asked(method, x="y" * 200), "seconds": 60}
    flood = asyncio.create_task(gateway.modern().call("bad__do", order))
    await survived(gateway, flood, before)
    answer = await flood
    # -32021 where what it asked for is a capability that this client does not have.
    assert answer.code in (1000, -32021) and "does not read" in answer.error["message"]


@promise("child.bounded")
async def test_lists_without_end_are_cut(atrax: Start) -> None:
    gateway = await atrax(
        {"mcpServers": {"bad": child("lists"), "good": child("does")}}, judged=False
    )
    await gateway.ready()
    before = memory(gateway, "VmHWM")

    await gateway.line(r"bad: .*more than [\d,]+ bytes")
    assert (await gateway.modern().call("good__do", {"what": "echo", "text": "on"})).text == "on"
    assert memory(gateway, "VmHWM") - before < 2 * MOST_GROWTH


@promise("child.bounded")
async def test_a_line_without_end_ends_the_child_and_stderr_without_lines_costs_nothing(
    atrax: Start,
) -> None:
    config = {
        "mcpServers": {"bad": child("obeys"), "good": child("does")},
        "limits": {"line": 2**20},
    }
    gateway = await (await atrax(config, judged=False)).ready()
    before = memory(gateway, "VmHWM")
    endless = "import os\nfor n in range(4000): os.write({fd}, b'x' * 65536)"
    stderr = asyncio.create_task(gateway.modern().call("bad__run", {"code": endless.format(fd=2)}))
    await survived(gateway, stderr, before)
    assert (await stderr).text == ""
    error = await gateway.modern().call("bad__run", {"code": endless.format(fd=1)})
    assert error.code == 1000 and "limits.line" in error.error["message"]
    assert memory(gateway, "VmHWM") - before < MOST_GROWTH


async def test_a_chunk_of_many_lines_is_handed_on_in_order_over_several_turns() -> None:
    loop, got = asyncio.get_running_loop(), list[bytes]()
    one = program.Child("bad", "bad.1", 2**26, 0, program.Record(), loop)
    one.receive = lambda line, now: got.append(line)
    lines = [b"%d" % number for number in range(200_000)]

    one._read(b"\n".join(lines) + b"\n")
    first = len(got)
    one._read(b"more\n")
    await eventually(lambda: len(got) > len(lines), "not all lines came")

    assert 0 < first < len(lines)
    assert got == [*lines, b"more"]


def test_of_a_chunk_of_stderr_no_more_is_looked_at_than_can_be_logged() -> None:
    record, seen = program.Record(), list[Json]()
    record.watch(seen.append)
    stderr = program.Stderr("bad", record, lambda: 1.0)
    stderr.feed(b"said\n" * 60_000 + b"\n" * 60_000 + b"the last\n\n\n")
    stderr.end()
    logged = [event for event in seen if event.name == "child.stderr"]
    assert len(logged) == program.STDERR_RATE
    assert stderr.last == "the last"
    assert "left out 59801 lines" in str(seen[-1])
