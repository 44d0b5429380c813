"""Long lists: every item of every server once, in one order, page by page on both sides of Atrax."""

from __future__ import annotations

import json
from typing import Any

import pytest
import wire
from conftest import Start, child
from promises import promise

pytestmark = pytest.mark.needs_install()  # `quick` has no time for all of these

SERVERS = ("one", "two", "three", "four", "five")


def pages(name: str, **habits: Any) -> dict[str, Any]:
    return child("pages", json.dumps({"name": name, **habits}))


def five(**habits: Any) -> dict[str, Any]:
    """Five servers, of both eras in turn."""
    return {
        name: pages(name, modern=bool(number % 2), **habits) for number, name in enumerate(SERVERS)
    }


async def count_pages(client: wire.Modern | wire.Legacy, kind: str) -> int:
    """How many pages a client gets that follows each nextCursor."""
    pages, cursor = 1, (await client.request(f"{kind}/list")).result.get("nextCursor")
    while cursor is not None:
        answer = await client.request(f"{kind}/list", {"cursor": cursor})
        pages, cursor = pages + 1, answer.result.get("nextCursor")
    return pages


@promise("lists.complete")
@pytest.mark.parametrize(
    ("count", "size", "pages_of_ours"),
    [(100, 4096, 2), (500, 20, 3)],
    ids=["500 tools, 2 MiB", "2,500 tools"],
)
async def test_every_tool_is_listed_once_in_order_and_pages_are_followed(
    atrax: Start, count: int, size: int, pages_of_ours: int
) -> None:
    gateway = await (await atrax({"mcpServers": five(count=count, size=size, page=7)})).ready()
    items = [f"item{number}" for number in range(count)]
    exposed = [f"{server}__{item}" for server in SERVERS for item in items]

    for client in (gateway.modern(), await gateway.legacy()):
        for _ in "ab":  # the same a second time
            assert [tool["name"] for tool in await client.list("tools")] == exposed
        assert await count_pages(client, "tools") == pages_of_ours
        assert (await client.call(exposed[-1])).text == "five"
    for client in (gateway.modern("two"), await gateway.legacy("two")):
        assert [tool["name"] for tool in await client.list("tools")] == items


@promise("lists.complete")
async def test_prompts_resources_and_templates_have_pages_too(atrax: Start) -> None:
    gateway = await (await atrax({"mcpServers": five(count=300, page=50)})).ready()
    items = [(server, f"item{number}") for server in SERVERS for number in range(300)]

    for client in (gateway.modern(), await gateway.legacy()):
        prompts = [one["name"] for one in await client.list("prompts")]
        uris = [one["uri"] for one in await client.list("resources")]
        templates = [one["uriTemplate"] for one in await client.list("resources/templates")]
        assert prompts == [f"{server}__{item}" for server, item in items]
        assert uris == [f"pages://{server}/{item}" for server, item in items]
        assert templates == [f"pages://{server}/{item}/{{part}}" for server, item in items]
        assert [await count_pages(client, kind) for kind in ("prompts", "resources")] == [2, 2]


@promise("lists.complete")
async def test_a_cursor_that_was_not_given_is_refused(atrax: Start) -> None:
    gateway = await (await atrax({"mcpServers": five()})).ready()

    for client in (gateway.modern(), await gateway.legacy()):
        for cursor in ("nonsense", "", "tools from 3"):
            answer = await client.request("tools/list", {"cursor": cursor})
            assert answer.code == -32602


@promise("lists.equal_names")
@pytest.mark.parametrize("first", ["a", "a__b"])
async def test_of_equal_names_the_first_in_the_config_is_kept(atrax: Start, first: str) -> None:
    servers = {
        "a": pages("a", names=["b__x", "y"]),
        "a__b": pages("a__b", names=["x", "z"]),
    }
    second = "a__b" if first == "a" else "a"
    ordered = {first: servers[first], second: servers[second]}
    gateway = await (await atrax({"mcpServers": ordered})).ready()

    client = gateway.modern()
    names = [tool["name"] for tool in await client.list("tools")]
    hidden = {
        name: [
            (item["name"], item["reason"]) for item in server["hidden"] if item["kind"] == "tools"
        ]
        for name, server in (await gateway.status())["servers"].items()
    }

    assert sorted(names) == ["a__b__x", "a__b__z", "a__y"]
    assert (await client.call("a__b__x")).text == first
    assert hidden[first] == []
    [(name, reason)] = hidden[second]
    assert name == {"a": "b__x", "a__b": "x"}[second] and first in reason
    # On its own endpoint nothing takes its name.
    assert name in [tool["name"] for tool in await gateway.modern(second).list("tools")]
    assert (await gateway.modern(second).call(name)).text == second


@promise("lists.equal_names")
async def test_a_tool_that_its_server_lists_twice_is_listed_once(atrax: Start) -> None:
    twice = pages("a", names=["x", "y", "z", "x"])
    gateway = await (await atrax({"mcpServers": {"a": twice}})).ready()

    names = [tool["name"] for tool in await gateway.modern().list("tools")]
    [hidden] = [
        item
        for item in (await gateway.status())["servers"]["a"]["hidden"]
        if item["kind"] == "tools"
    ]

    assert names == ["a__x", "a__y", "a__z"]
    assert hidden["name"] == "x"
