"""What MCP has beside results, in all four cells: clients of both eras, children of both eras, one URL."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import wire
from conftest import Running, Start, child, eventually
from promises import promise

SERVERS = {"old": child("legacy"), "new": child("modern")}
WATCHED = "test://watched-resource"
LIMIT = 20.0  # seconds for what must come; a limit, never a measure


async def start(atrax: Start) -> Running:
    return await (await atrax({"mcpServers": SERVERS})).ready()


async def following(messages: AsyncIterator[Any]) -> Any:
    return await asyncio.wait_for(anext(messages), LIMIT)


async def listening(client: wire.Modern, **wanted: Any) -> tuple[AsyncIterator[Any], Any]:
    """The frames of a subscriptions/listen after the acknowledgement, and what that has honoured."""
    exchange = await client.open("subscriptions/listen", {"notifications": wanted}, id="sub-1")
    messages = exchange.messages()
    first = await following(messages)
    assert first["method"] == "notifications/subscriptions/acknowledged"
    return messages, first["params"]["notifications"]


def subscription(message: Any) -> Any:
    return message["params"]["_meta"]["io.modelcontextprotocol/subscriptionId"]


@promise("travels.list_changed")
async def test_list_changed_is_passed_on_and_the_list_is_new(atrax: Start) -> None:
    gateway = await start(atrax)
    modern, legacy = gateway.modern(), await gateway.legacy()
    news, honoured = await listening(
        gateway.modern(), toolsListChanged=True, promptsListChanged=True
    )
    standing = (await legacy.listen()).messages()
    assert honoured == {"toolsListChanged": True, "promptsListChanged": True}

    for name in SERVERS:
        for kind in ("tool", "prompt"):
            assert (await modern.call(f"{name}__test_trigger_{kind}_change")).result
            told = [await following(news), await following(standing)]
            assert [one["method"] for one in told] == [f"notifications/{kind}s/list_changed"] * 2
            assert subscription(told[0]) == "sub-1" and "params" not in told[1]
            for client in (modern, legacy):
                names = [item["name"] for item in await client.list(f"{kind}s")]
                assert f"{name}__test_extra_{kind}" in names


@promise("travels.list_changed")
async def test_a_client_of_one_server_hears_of_that_server_alone(atrax: Start) -> None:
    gateway = await start(atrax)
    wanted = {"toolsListChanged": True, "promptsListChanged": True}
    news, _ = await listening(gateway.modern("new"), **wanted)
    standing = (await (await gateway.legacy("new")).listen()).messages()

    assert (await gateway.modern().call("old__test_trigger_tool_change")).result
    everybody = gateway.modern()

    async def listed() -> bool:
        return "old__test_extra_tool" in [tool["name"] for tool in await everybody.list("tools")]

    await eventually(listed, "the list has not changed")
    assert (await gateway.modern().call("new__test_trigger_prompt_change")).result

    for messages in (news, standing):
        assert (await following(messages))["method"] == "notifications/prompts/list_changed"


@promise("travels.progress")
async def test_progress_comes_under_the_token_of_its_request(atrax: Start) -> None:
    gateway = await start(atrax)

    for client in (gateway.modern(), await gateway.legacy()):
        for token in ("token", 7):
            for name in SERVERS:
                params = {
                    "name": f"{name}__test_tool_with_progress",
                    "_meta": {"progressToken": token},
                }
                answer = await client.request("tools/call", params)
                progress = [notice["params"] for notice in answer.notices]
                assert [one["progress"] for one in progress] == [0, 50, 100]
                assert all(one["progressToken"] == token for one in progress)
                assert all(type(one["progressToken"]) is type(token) for one in progress)
                assert "successfully" in answer.text
        # Nobody who did not ask for it gets any.
        assert (await client.call("old__test_tool_with_progress")).notices == []
        assert (await client.call("new__test_tool_with_progress")).notices == []


@promise("travels.logging")
async def test_log_messages_come_from_the_level_that_the_client_wants(atrax: Start) -> None:
    gateway = await start(atrax)
    legacy, chatty = await gateway.legacy(), await gateway.legacy()
    # Its children are set to what the most curious client wants; the others are spared it.
    assert (await chatty.request("logging/setLevel", {"level": "debug"})).result == {}
    level = "io.modelcontextprotocol/logLevel"
    texts = [f"log message {number}" for number in (1, 2, 3)]

    for name in SERVERS:
        tool = f"{name}__test_logging_tool"
        for wanted, heard in (("debug", texts), ("info", texts), ("error", [])):
            modern = await gateway.modern().call(tool, meta={level: wanted})
            answer = await legacy.request("logging/setLevel", {"level": wanted})
            assert answer.result == {}
            for notices in (modern.notices, (await legacy.call(tool)).notices):
                assert [notice["params"]["data"] for notice in notices] == heard, (name, wanted)
                assert all(notice["params"]["level"] == "info" for notice in notices)
        assert len((await chatty.call(tool)).notices) == 3
        # A modern client that does not name a level wants none.
        assert (await gateway.modern().call(tool)).notices == []


@promise("travels.subscriptions")
async def test_a_resource_that_is_subscribed_to_is_told_of(atrax: Start) -> None:
    gateway = await start(atrax)

    for name in SERVERS:
        modern, legacy = gateway.modern(name), await gateway.legacy(name)
        news, honoured = await listening(gateway.modern(name), resourceSubscriptions=[WATCHED])
        standing = (await legacy.listen()).messages()
        assert honoured == {"resourceSubscriptions": [WATCHED]}
        assert (await legacy.request("resources/subscribe", {"uri": WATCHED})).result == {}

        assert (await modern.call("test_trigger_resource_update")).result

        told = [await following(news), await following(standing)]
        assert [one["method"] for one in told] == ["notifications/resources/updated"] * 2
        assert [one["params"]["uri"] for one in told] == [WATCHED] * 2
        assert subscription(told[0]) == "sub-1"
        read = await modern.request("resources/read", {"uri": WATCHED})
        assert read.result["contents"][0]["text"] == "Updated 1 times."

        # Unsubscribed: the next thing on its stream is another one.
        assert (await legacy.request("resources/unsubscribe", {"uri": WATCHED})).result == {}
        assert (await modern.call("test_trigger_resource_update")).result
        assert (await following(news))["method"] == "notifications/resources/updated"
        assert (await modern.call("test_trigger_tool_change")).result
        assert (await following(standing))["method"] == "notifications/tools/list_changed"


@promise("travels.completion")
async def test_completion_is_answered_by_the_server_of_the_reference(atrax: Start) -> None:
    gateway = await start(atrax)
    argument = {"name": "arg1", "value": "par"}

    for client in (gateway.modern(), await gateway.legacy()):
        for name in SERVERS:
            ref = {"type": "ref/prompt", "name": f"{name}__test_prompt_with_arguments"}
            params = {"ref": ref, "argument": argument}
            answer = await client.request("completion/complete", params)
            assert answer.result["completion"]["values"] == ["paris", "park", "party"]
        template = {"type": "ref/resource", "uri": "test://template/{id}/data"}
        params = {"ref": template, "argument": {"name": "id", "value": "tes"}}
        answer = await client.request("completion/complete", params)
        assert answer.result["completion"]["values"] == ["testing"]
        unknown = {"ref": {"type": "ref/prompt", "name": "nobody__has"}, "argument": argument}
        assert (await client.request("completion/complete", unknown)).code == -32602


@promise("travels.cancellation")
async def test_a_legacy_client_cancels_by_a_notification(atrax: Start) -> None:
    gateway = await atrax({"mcpServers": {**SERVERS, "a": child("does")}})
    client, other = await gateway.legacy(), await gateway.legacy()
    calls = [
        asyncio.create_task(one.call("a__do", {"what": "wait"}, id="same"))
        for one in (client, other)
    ]
    compute = asyncio.create_task(client.call("new__slow_compute", {"seconds": 600}, id="slow"))
    await in_flight(gateway, a=2, new=1)

    for ident in ("same", "slow", "nobody's"):
        assert await client.notify("notifications/cancelled", {"requestId": ident}) == 202

    cancelled = await calls[0]  # its response ends, without an answer
    assert cancelled.response is None and cancelled.status == 200
    assert (await compute).response is None
    await in_flight(gateway, a=1, new=0)
    assert (await client.call("a__do", {"what": "cancellations"})).text == "1"
    # The other session's call of the same id goes on.
    assert (await client.call("a__do", {"what": "release"})).text == "done"
    assert (await calls[1]).text == "released"
    assert (await client.call("new__greet", {"name": "Ada"})).text == "Hello, Ada!"


async def in_flight(gateway: Running, **numbers: int) -> None:
    async def reached() -> bool:
        servers = (await gateway.status())["servers"]
        return all(servers[name]["inFlight"] == number for name, number in numbers.items())

    await eventually(reached, f"not in flight: {numbers}")


@promise("travels.meta")
async def test_trace_context_and_unknown_members_pass_both_ways(atrax: Start) -> None:
    gateway = await atrax({"mcpServers": {"a": child("does")}})
    meta = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "ours/x": [1]}
    text = '{"jsonrpc":"2.0","id":@ID@,"result":{"content":[],"odd":{"b":1,"a":2.50},"_meta":{"theirs/y":1}}}'

    for client in (gateway.modern(), await gateway.legacy()):
        params = {
            "name": "a__do",
            "arguments": {"what": "line"},
            "_meta": meta,
            "unknown": {"x": 1},
        }
        line = json.loads((await client.request("tools/call", params)).text)
        assert line["params"]["_meta"] == meta
        assert line["params"]["unknown"] == {"x": 1}
        result = (await client.call("a__do", {"what": "say", "text": text})).result
        assert result["odd"] == {"b": 1, "a": 2.5} and result["_meta"]["theirs/y"] == 1


@promise("travels.links")
async def test_links_in_results_are_passed_on_and_never_followed(atrax: Start) -> None:
    visits = 0

    def visited(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal visits
        visits += 1
        writer.close()

    there = await asyncio.start_server(visited, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{there.sockets[0].getsockname()[1]}/secret"
    content = [
        {"type": "resource_link", "uri": url, "name": "link", "icons": [{"src": url}]},
        {"type": "resource", "resource": {"uri": url, "text": f"![]({url})"}},
    ]
    result = {"content": content, "_meta": {"ui/resourceUri": url}}
    text = json.dumps({"jsonrpc": "2.0", "id": "@ID@", "result": result}).replace('"@ID@"', "@ID@")
    gateway = await (await atrax({"mcpServers": {"a": child("does")}})).ready()
    async with there:
        for client in (gateway.modern(), await gateway.legacy()):
            answer = await client.call("a__do", {"what": "say", "text": text})
            assert answer.result["content"] == content
            # Nor for who asks for it: a server that offers no resources is not asked either.
            assert (await client.request("resources/read", {"uri": url})).error
        assert visits == 0
        await asyncio.open_connection(*there.sockets[0].getsockname())  # it would have been heard
        await eventually(lambda: visits == 1, "the listener hears nobody")
