"""A child that dies harms its own calls alone, its server comes back, and one that keeps dying is left in peace."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
import wire
from conftest import Running, Start, child, eventually
from promises import promise

QUICK = {"restart": {"backoff": [0.05, 0.4], "failures": 3, "window": 60}}
DEBUG = {"log": {"level": "debug"}}  # where every move is logged


async def do(client: wire.Modern | wire.Legacy, server: str, what: str, **more: Any) -> wire.Answer:
    return await client.call(f"{server}__do", {"what": what, **more})


async def server(gateway: Running, name: str) -> Any:
    """What /status says of it."""
    return (await gateway.status())["servers"][name]


async def in_flight(gateway: Running, name: str, number: int) -> None:
    async def reached() -> bool:
        return bool((await server(gateway, name))["inFlight"] == number)

    await eventually(reached, f"not {number} calls in flight")


@promise("crash.isolated")
async def test_a_child_that_dies_fails_only_its_own_calls(atrax: Start) -> None:
    gateway = await atrax({"mcpServers": {"a": child("does"), "b": child("does")}})
    modern, legacy = gateway.modern(), await gateway.legacy()
    lost = [asyncio.create_task(do(client, "a", "wait")) for client in (modern, legacy)]
    kept = asyncio.create_task(do(gateway.modern(), "b", "wait"))
    await in_flight(gateway, "a", 2)
    await in_flight(gateway, "b", 1)

    died = await do(gateway.modern(), "a", "die", code=3)

    for answer in (died, *[await call for call in lost]):
        assert answer.status == 200 and answer.code == 1000
        assert "exited with 3" in answer.error["message"]
        assert answer.error["data"]["atrax"]["server"] == "a"
        assert answer.error["data"]["atrax"]["reason"]
    assert not kept.done()
    assert (await do(modern, "b", "release")).text == "done"
    assert (await kept).text == "released"
    # It comes back, for the same sessions, and what it offers was never gone.
    assert "a__do" in [tool["name"] for tool in await legacy.list("tools")]
    assert (await do(legacy, "a", "echo", text="anew")).text == "anew"


@promise("crash.repeated")
async def test_a_call_that_may_be_made_twice_is_repeated_once(atrax: Start, tmp_path: Path) -> None:
    servers = {"safe": child("does", "safe"), "unsafe": child("does")}
    servers["never"] = child("does", "safe", repeat=False)
    gateway = await atrax({"mcpServers": servers})

    for number, client in enumerate((gateway.modern(), await gateway.legacy())):
        files = {name: tmp_path / f"{name}{number}" for name in servers}
        answers = {
            name: await do(client, name, "die", unless=str(file)) for name, file in files.items()
        }
        assert answers["safe"].text == "lives on"
        assert answers["unsafe"].code == answers["never"].code == 1000
        assert all(file.exists() for file in files.values())
        # What the client has seen a part of is not begun again.
        order = {"what": "die", "unless": str(tmp_path / f"seen{number}")}
        params = {"name": "safe__do", "arguments": order, "_meta": {"progressToken": "t"}}
        seen = await client.request("tools/call", params)
        assert [notice["method"] for notice in seen.notices] == ["notifications/progress"]
        assert seen.code == 1000


@promise("crash.repeated")
async def test_a_call_that_kills_every_process_is_repeated_only_once(atrax: Start) -> None:
    gateway = await atrax({"mcpServers": {"safe": child("does", "safe")}})

    answer = await do(gateway.modern(), "safe", "die", words="farewell")

    assert answer.code == 1000
    assert (await do(gateway.modern(), "safe", "echo", text="here")).text == "here"
    await gateway.stop()  # reads its log to the end
    assert sum(line.endswith("farewell") for line in gateway.log) == 2


@promise("crash.circuit")
async def test_backoff_and_circuit_are_visible_and_it_comes_back(
    atrax: Start, tmp_path: Path
) -> None:
    file = tmp_path / "needed"
    dying = child("does", "needs", str(file), **QUICK)
    gateway = await atrax({"mcpServers": {"dying": dying, "well": child("does")}, **DEBUG})

    await gateway.line(r"dying: backoff: exited with 1 .*the file it needs is not there")
    await gateway.line(r"dying: failed: ")

    status = await server(gateway, "dying")
    assert status["lastError"].endswith('"the file it needs is not there"')
    assert status["retryAfter"] is None or status["retryAfter"] > 0
    error = (await do(gateway.modern(), "dying", "pid")).error
    assert error["code"] == 1010 and "not there" in error["message"]
    assert error["data"]["atrax"]["retryAfter"] > 0
    assert (await do(gateway.modern(), "well", "echo", text="well")).text == "well"

    listen = await gateway.modern().open(
        "subscriptions/listen", {"notifications": {"toolsListChanged": True}}
    )
    news = listen.messages()
    assert (await anext(news))["method"].endswith("acknowledged")
    file.touch()

    assert (await anext(news))["method"] == "notifications/tools/list_changed"
    assert (await do(gateway.modern(), "dying", "echo", text="back")).text == "back"
    assert (await server(gateway, "dying"))["state"] == "ready"


@promise("crash.circuit")
async def test_so_many_deaths_open_the_circuit_and_no_more_are_had(atrax: Start) -> None:
    broken = child("broken", "exits", protocol="legacy", **QUICK)  # auto would try each time twice
    gateway = await atrax({"mcpServers": {"a": broken}, **DEBUG})

    await gateway.line("a: failed: ")

    moves = re.findall(r"a: (backoff|failed): ", str(gateway))
    assert moves == ["backoff"] * QUICK["restart"]["failures"] + ["failed"]
    deaths = re.findall("a: cannot open the database", str(gateway))
    assert len(deaths) == QUICK["restart"]["failures"]


@promise("crash.isolated")
@pytest.mark.parametrize("how", ["kill", "last", "mute"])
async def test_every_way_to_die_is_told_and_survived(atrax: Start, how: str) -> None:
    gateway = await atrax({"mcpServers": {"a": child("does")}})
    client = gateway.modern()
    waiting = asyncio.create_task(do(gateway.modern(), "a", "wait"))
    await in_flight(gateway, "a", 1)

    last = await do(client, "a", how, signal=9, text="last words")

    if how == "last":  # what it wrote before its end was read
        assert last.text == "last words"
    if how == "kill":
        assert "SIGKILL" in last.error["message"]
    assert (await waiting).code == 1000
    assert (await do(client, "a", "echo", text="anew")).text == "anew"
