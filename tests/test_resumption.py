"""A legacy client whose stream breaks fetches the rest; a modern one that hangs up has cancelled."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
import wire
from conftest import Running, Start, child, eventually
from promises import promise

CONFIG = {"mcpServers": {"a": child("does"), "b": child("does")}}
VERSIONS = ("2025-03-26", "2025-06-18", "2025-11-25")


def order(what: str, server: str = "a", progress: bool = True, **more: Any) -> dict[str, Any]:
    """The params of a call; with progress, its response is an event stream from the start."""
    meta = {"_meta": {"progressToken": "token"}} if progress else {}
    return {"name": f"{server}__do", "arguments": {"what": what, **more}, **meta}


async def cut(client: wire.Legacy, **more: Any) -> list[wire.Event]:
    """Begin a call that waits, read its stream up to the progress, and break the connection."""
    exchange = await client.open("tools/call", order("wait", **more), id="cut")
    events: list[wire.Event] = []
    async for event in exchange.events():
        events.append(event)
        if "notifications/progress" in event.data:
            break
    exchange.connection.abort()
    return events


async def release(gateway: Running, server: str = "a") -> None:
    """Let the child answer all that wait; its answers are written when this returns."""
    assert (await gateway.modern().call(f"{server}__do", {"what": "release"})).text == "done"


async def cancellations(gateway: Running, server: str = "a") -> int:
    return int((await gateway.modern().call(f"{server}__do", {"what": "cancellations"})).text)


async def rest(client: wire.Legacy, last: str | None) -> list[Any]:
    """The messages that a GET with Last-Event-ID brings, until Atrax ends it."""
    exchange = await client.listen(last)
    assert exchange.status == 200 and exchange.is_stream
    return [message async for message in exchange.messages()]


@promise("resume.post_stream")
async def test_the_result_of_a_stream_that_was_cut_is_fetched_by_its_event_id(atrax: Start) -> None:
    gateway = await atrax(CONFIG)

    for version, early in itertools.product(VERSIONS, (True, False)):
        client = await gateway.legacy(version=version)
        events = await cut(client)
        if early:
            await release(gateway)
        exchange = await client.listen(events[-1].id)
        if not early:
            await release(gateway)
        [answer] = [message async for message in exchange.messages()]

        # Only clients of 2025-11-25 know an event without data.
        assert (events[0].data == "" and bool(events[0].id)) == (version == "2025-11-25")
        assert answer["id"] == "cut" and answer["result"]["content"][0]["text"] == "released"
    assert await cancellations(gateway) == 0


@promise("resume.post_stream")
async def test_each_message_is_given_once_and_on_its_own_stream_alone(atrax: Start) -> None:
    gateway = await atrax(CONFIG)
    client = await gateway.legacy()
    standing = await client.listen()

    first, second = await cut(client), await cut(client, server="b")
    await release(gateway)
    await release(gateway, "b")

    # From the event that opened the stream: everything, in order.
    stream = await client.listen(first[0].id)
    events = [event async for event in stream.events()]
    kinds = [("progress" in event.data, "released" in event.data) for event in events]
    assert kinds == [(True, False), (False, True)]
    # From the last one: nothing is left. The other call's stream has its own result.
    assert await rest(client, events[-1].id) == []
    assert len(await rest(client, second[-1].id)) == 1
    every = [event.id for event in (*first, *events[1:], *second)]
    assert len(set(every)) == len(every)
    # And nothing of it was on the session's own stream.
    assert await client.delete() == 200
    assert [message async for message in standing.messages()] == []


@promise("resume.post_stream")
async def test_a_foreign_or_invented_event_id_gives_nothing(atrax: Start) -> None:
    gateway = await atrax(CONFIG)
    client, other = await gateway.legacy(), await gateway.legacy()
    events = await cut(client)
    await release(gateway)

    foreign = await other.listen(events[-1].id)
    assert foreign.status == 400
    assert b"released" not in await foreign.body()
    for made_up in (
        "999-1",
        "0-5",
        "1-99",
        "1",
        "x-y",
        "-1--1",
        "1-1-1",
        "9" * 30 + "-1",
        "1-1\t2",
    ):
        answer = await client.listen(made_up)
        assert answer.status == 400, made_up
        await answer.body()
    # The session belongs to the endpoint that made it.
    elsewhere = wire.Legacy(gateway.endpoint("a"), client.version, {}, None)
    elsewhere.session = client.session
    assert (await elsewhere.listen(events[-1].id)).status == 404
    elsewhere.close()
    assert len(await rest(client, events[-1].id)) == 1


@promise("resume.post_stream")
async def test_a_client_that_was_given_no_event_id_gets_nothing_and_cancels_nothing(
    atrax: Start,
) -> None:
    gateway = await atrax(CONFIG)
    client = await gateway.legacy()
    await client.listen()
    lost = asyncio.create_task(client.request("tools/call", order("wait", progress=False)))
    await in_flight(gateway, 1)

    client.http.close()  # both: the plain response that was awaited, and the standing stream
    lost.cancel()
    client.http = wire.Http(gateway.url)
    standing = await client.listen()
    await in_flight(gateway, 1)  # closing has cancelled nothing …
    await release(gateway)
    assert await cancellations(gateway) == 0
    await in_flight(gateway, 0)

    assert await client.delete() == 200  # … and nobody is sent the answer
    assert [message async for message in standing.messages()] == []


async def in_flight(gateway: Running, number: int) -> None:
    async def reached() -> bool:
        return bool((await gateway.status())["servers"]["a"]["inFlight"] == number)

    await eventually(reached, f"not {number} in flight")


@promise("resume.post_stream")
async def test_delete_cancels_what_runs_and_drops_what_is_kept(atrax: Start) -> None:
    gateway = await atrax(CONFIG)
    client = await gateway.legacy()
    events = await cut(client)

    assert await client.delete() == 200

    assert await cancellations(gateway) == 1
    assert (await client.listen(events[-1].id)).status == 404
    assert (await client.open("tools/list", {})).status == 404


@promise("cancel.closing")
@pytest.mark.parametrize("progress", [False, True], ids=["before a head", "in the stream"])
async def test_a_modern_client_that_hangs_up_cancels_its_call_at_the_child(
    atrax: Start, progress: bool
) -> None:
    gateway = await atrax(CONFIG)
    client = gateway.modern()
    opening = asyncio.create_task(client.open("tools/call", order("wait", progress=progress)))
    await in_flight(gateway, 1)
    if progress:
        await opening  # the head of the event stream is there

    client.close()
    opening.cancel()

    await in_flight(gateway, 0)
    assert await cancellations(gateway) == 1


@promise("cancel.closing")
async def test_a_client_of_2024_that_closes_its_stream_ends_its_session(atrax: Start) -> None:
    gateway = await atrax(CONFIG)
    client = await wire.OldSse.start(gateway.url + "/sse")
    lost = asyncio.create_task(client.request("tools/call", order("wait", progress=False)))
    await in_flight(gateway, 1)

    client.close()
    lost.cancel()

    await in_flight(gateway, 0)
    assert await cancellations(gateway) == 1
    client.http = wire.Http(gateway.url)
    assert await client.post({"jsonrpc": "2.0", "id": 9, "method": "ping"}) == 404
    client.http.close()
