"""Elicitation, sampling and roots between any client and any child: whole, once, and to the right one.

The children are asks.py (legacy) and rounds.py (modern), which ask as a call tells them; the clients are raw ones."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import wire
from asking import (
    ACCEPT,
    ALL,
    ROOTS,
    Answers,
    Client,
    Done,
    Person,
    form,
    heard,
    said,
    sample,
    wants,
)
from conftest import Running, Start, child, eventually, starting
from promises import promise

pytestmark = pytest.mark.needs_install()  # `quick` has no time for all of these

Json = Any
# One who asks for roots has a child of its own: a shared one would need `paths`.
ROOTED = {"offer": ["elicitation", "sampling", "roots"], "isolation": "session"}
SERVERS = {"old": child("asks"), "new": child("rounds"), "rooted": child("asks", **ROOTED)}
ERAS = ("legacy", "modern")
# A call that is still parked at the end of a test counts as one in flight.
NO_DRAIN = {"drain": 0.1}
cells = pytest.mark.parametrize(("of", "to"), list(itertools.product(ERAS, ERAS)))
clients = pytest.mark.parametrize("of", ERAS)
on_one_gateway = pytest.mark.asyncio(loop_scope="module")
NAMES: Answers = {"elicitation/create": lambda params: answer_of(params["message"])}


def answer_of(message: str) -> Json:
    return {"action": "accept", "content": {"name": f"answer to {message}"}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """One for all tests that need no other: clients come and go, as in life."""
    async with starting(tmp_path_factory.mktemp("gateway")) as start:
        yield await (await start({"mcpServers": SERVERS, **NO_DRAIN})).ready()


async def client_of(gateway: Running, era: str, server: str | None = None, **more: Any) -> Client:
    capabilities = more.pop("capabilities", ALL)
    if era == "modern":
        return gateway.modern(server, capabilities=capabilities)
    return await gateway.legacy(server, capabilities=capabilities, **more)


def script(to: str, *rounds: dict[str, Json], **more: Json) -> Json:
    """The arguments that make either child ask these rounds."""
    if to == "modern":
        return {"rounds": list(rounds)}
    return {"steps": [{"ask": asks, **more} for asks in rounds]}


def tool_of(to: str) -> str:
    return "new__act" if to == "modern" else "old__act"


async def server_of(gateway: Running, name: str) -> Any:
    return (await gateway.status())["servers"][name]


async def until(gateway: Running, name: str, what: str, number: int) -> None:
    """Wait until /status counts so many of the server's calls as `inFlight`, `waiting`, `parked`."""

    async def reached() -> bool:
        return bool((await server_of(gateway, name))[what] == number)

    await eventually(reached, f"{name}: {what} is not {number}")


# ---- What arrives -------------------------------------------------------------------------

SCHEMAS = {
    "plain": {"type": "string", "title": "A", "description": "B", "minLength": 1, "maxLength": 9},
    "email": {"type": "string", "format": "email"},
    "uri": {"type": "string", "format": "uri"},
    "date": {"type": "string", "format": "date"},
    "moment": {"type": "string", "format": "date-time", "default": "2026-01-01T00:00:00Z"},
    "named": {"type": "string", "default": "Ada"},
    "ratio": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.5},
    "count": {"type": "integer", "minimum": 0, "maximum": 7, "default": 3},
    "sure": {"type": "boolean", "default": True},
    "one": {"type": "string", "enum": ["a", "b"], "default": "a"},
    "titled": {"type": "string", "oneOf": [{"const": "a", "title": "A"}], "default": "a"},
    "old": {"type": "string", "enum": ["a", "b"], "enumNames": ["A", "B"]},
    "many": {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}, "minItems": 1},
    "many_titled": {
        "type": "array",
        "items": {"anyOf": [{"const": "a", "title": "A"}, {"const": "b", "title": "B"}]},
        "maxItems": 2,
        "default": ["a"],
    },
}
FILLED = {
    "plain": "x", "email": "a@b.cd", "uri": "https://a.b", "date": "2026-01-01", "named": "Ада",
    "ratio": 0.25, "count": 0, "sure": False, "one": "b", "titled": "a", "many": ["a", "b"], "many_titled": [],
}  # fmt: skip
FORM = {
    "message": "Fill it in",
    "requestedSchema": {"type": "object", "properties": SCHEMAS, "required": ["plain", "sure"]},
}
URL = {"mode": "url", "message": "Log in", "url": "https://example.com/login?a=b"}
TOOL = {"name": "weather", "description": "W", "inputSchema": {"type": "object", "properties": {}}}
TOOL_USE = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Paris"}}
WITH_TOOLS = sample("Use it", tools=[TOOL], toolChoice={"mode": "required"})[1]
PREFERENCES = {
    "systemPrompt": "Be short",
    "temperature": 0.5,
    "stopSequences": ["."],
    "modelPreferences": {"hints": [{"name": "claude"}], "speedPriority": 0.5},
    "metadata": {"theirs": [1, {"b": None}]},
    "includeContext": "thisServer",
}
# name → method, params of the ask, the answer
KINDS: dict[str, tuple[str, Json, Json]] = {
    "form": ("elicitation/create", FORM, {"action": "accept", "content": FILLED}),
    "form, by its mode": ("elicitation/create", {"mode": "form", **FORM}, {"action": "decline"}),
    "url": ("elicitation/create", URL, {"action": "accept"}),
    "cancel": ("elicitation/create", FORM, {"action": "cancel"}),
    "sampling": ("sampling/createMessage", sample("Hi", **PREFERENCES)[1], said("Ho")),
    "sampling, an image": (
        "sampling/createMessage",
        sample("Draw")[1],
        {**said(""), "content": {"type": "image", "data": "aGk=", "mimeType": "image/png"}},
    ),
    "sampling with tools": (
        "sampling/createMessage",
        WITH_TOOLS,
        {**said(""), "content": [TOOL_USE], "stopReason": "toolUse"},
    ),
    "roots": (
        "roots/list",
        {},
        {"roots": [{"uri": "file:///srv/a", "name": "A"}, {"uri": "file:///srv/b"}]},
    ),
}


def same_ask(seen: Json, sent: Json) -> bool:
    """Whether an ask arrived whole. A form may be called one or not; an elicitation's id is of one era."""
    loose = ("elicitationId", "_meta")
    seen, sent = ({k: v for k, v in one.items() if k not in loose} for one in (seen, sent))
    default = {"mode": "form"} if "requestedSchema" in sent else {}
    return bool({**default, **seen} == {**default, **sent})


@promise("cells.asks")
@cells
@on_one_gateway
async def test_every_kind_of_ask_arrives_whole_and_so_does_its_answer(
    gateway: Running, of: str, to: str
) -> None:
    client = await client_of(gateway, of)

    for name, (method, params, answer) in KINDS.items():
        tool = "rooted__act" if method == "roots/list" and to == "legacy" else tool_of(to)
        sent = {**params, "elicitationId": "e1"} if "url" in params and to == "legacy" else params
        person = Person({method: lambda asked, answer=answer: answer})
        done = await person.act(client, tool, script(to, {"key": [method, sent]}))

        [(asked, seen)] = done.asks
        assert asked == method and same_ask(seen, sent), name
        assert done.value["answers"] == {"key": answer}, name
        # The two eras differ in this one member: legacy asks for it, modern does not have it.
        has_id = {"legacy": "e1" if to == "legacy" else seen.get("elicitationId"), "modern": None}[
            of
        ]
        if name == "url":
            assert seen.get("elicitationId") == has_id and bool(has_id) == (of == "legacy")


@promise("cells.asks")
@cells
@on_one_gateway
async def test_several_asks_at_once_and_in_several_rounds_get_each_its_own_answer(
    gateway: Running, of: str, to: str
) -> None:
    client = await client_of(gateway, of)
    first = {"a": form("a"), "b": sample("b"), "c": form("c")}
    answers: Answers = {
        **NAMES,
        "sampling/createMessage": lambda params: said(params["messages"][0]["content"]["text"] * 2),
    }

    done = await Person(answers).act(
        client, tool_of(to), script(to, first, {"d": form("d")}, {"e": form("e")})
    )

    assert done.value["answers"] == {
        **{key: answer_of(key) for key in "acde"},
        "b": said("bb"),
    }
    asked = [params.get("message", "b") for _, params in done.asks]
    assert sorted(asked[:3]) == ["a", "b", "c"] and asked[3:] == ["d", "e"]


@clients
@on_one_gateway
async def test_a_key_is_the_childs_hint_else_its_own_id_else_method_and_number(
    gateway: Running, of: str
) -> None:
    client = await client_of(gateway, of)
    asks = {"x": form("x"), "y": form("y")}

    for keys in ("hint", "ids", "none"):
        steps = script("legacy", asks, keys=keys)
        done = await Person(NAMES).act(client, "old__act", steps)
        assert done.value["answers"] == {key: answer_of(key) for key in asks}
        # Only a hint is Atrax's to take away; what else a child says about its ask passes.
        assert all("atrax/inputKey" not in params.get("_meta", {}) for _, params in done.asks)
    if isinstance(client, wire.Modern):
        seen = await gather(client, "old__act", script("legacy", asks, keys="none"), 2)
        assert set(seen) == {"elicitation/create-1", "elicitation/create-2"}


async def gather(client: wire.Modern, tool: str, arguments: Json, number: int) -> Json:
    """The inputRequests of a call, once so many are asked. What comes too late for a round is in the next."""
    params = {"name": tool, "arguments": arguments}
    answer = await client.request("tools/call", params)
    while len(answer.result["inputRequests"]) < number:
        answer = await client.retry("tools/call", params, answer, {})
    return answer.result["inputRequests"]


@promise("cells.asks")
@cells
@on_one_gateway
async def test_the_childs_view_of_the_client_is_what_the_client_declared(
    gateway: Running, of: str, to: str
) -> None:
    """A modern child gets it with each request; a legacy one gets what was offered for all."""
    some = {"elicitation": {"form": {}}, "experimental": {"ours": {"a": 1}}}

    for capabilities in (some, {}, ALL):
        client = await client_of(gateway, of, capabilities=capabilities)
        done = await Person({}).act(client, tool_of(to), script(to))
        if to == "modern":
            assert done.value["declared"] == capabilities
        else:
            assert done.value["answers"] == {}


@on_one_gateway
async def test_a_client_of_2024_is_asked_on_its_stream(gateway: Running) -> None:
    answers: Answers = {
        "sampling/createMessage": lambda params: said("from 2024"),
        "roots/list": lambda params: {"roots": [{"uri": "file:///2024"}]},
    }

    for tool, to in (("old__act", "legacy"), ("new__act", "modern"), ("rooted__act", "legacy")):
        client = await wire.OldSse.start(gateway.url + "/sse", capabilities=ALL, answers=answers)
        asks = {"s": sample("Hi")} if tool == "old__act" else {"s": sample("Hi"), "r": ROOTS}
        call = {"name": tool, "arguments": script(to, asks)}
        result = (await client.request("tools/call", call))["result"]
        client.close()

        got = json.loads(result["content"][0]["text"])["answers"]
        assert got == {key: answers[method]({}) for key, (method, _) in asks.items()}


@promise("cells.asks")
@pytest.mark.parametrize("version", ["2025-03-26", "2025-06-18", "2025-11-25"])
@pytest.mark.parametrize("to", ERAS)
@on_one_gateway
async def test_each_legacy_version_is_asked_what_it_knows(
    gateway: Running, version: str, to: str
) -> None:
    client = await gateway.legacy(version=version, capabilities=ALL)
    answers: Answers = {**NAMES, "sampling/createMessage": lambda params: said("Ho")}

    if version >= "2025-06-18":  # elicitation came with it
        done = await Person(answers).act(client, tool_of(to), script(to, {"a": form("a")}))
        assert done.value["answers"] == {"a": answer_of("a")}
    done = await Person(answers).act(client, tool_of(to), script(to, {"b": sample("b")}))

    assert done.value["answers"] == {"b": said("Ho")}  # and spoken.py judged what was asked


# ---- Clients that do not answer, not well, or twice ---------------------------------------


@clients
@on_one_gateway
async def test_an_error_for_an_answer_reaches_a_legacy_child_and_stands_for_cancel_at_a_modern_one(
    gateway: Running, of: str
) -> None:
    if of == "modern":
        # inputResponses cannot carry an error; what is no answer is asked for again.
        client = gateway.modern(capabilities=ALL)
        params = {"name": "old__act", "arguments": script("legacy", {"a": form("a")})}
        asked = await client.request("tools/call", params)
        again = await client.retry("tools/call", params, asked, {"a": {"nonsense": 1}})
        assert again.result["inputRequests"] == asked.result["inputRequests"]
        done = await client.retry("tools/call", params, again, {"a": ACCEPT})
        assert json.loads(done.text)["answers"] == {"a": ACCEPT}
        return
    client = await gateway.legacy(capabilities=ALL)  # answers -32601 to whatever it is asked
    old = await client.call("old__act", script("legacy", {"a": form("a"), "b": sample("b")}))
    answers = json.loads(old.text)["answers"]
    assert [answers[key]["error"]["code"] for key in "ab"] == [-32601, -32601]
    new = await client.call("new__act", script("modern", {"a": form("a")}))
    assert json.loads(new.text)["answers"] == {"a": {"action": "cancel"}}
    failed = await client.call("new__act", script("modern", {"b": sample("b")}))
    assert failed.error["message"] == "not answered here"


SHORT = {"limits": {"park": 1.0}}


async def test_a_modern_client_that_never_comes_back_is_given_up(
    atrax: Start, tmp_path: Path
) -> None:
    gateway = await atrax({"mcpServers": SERVERS, **SHORT})
    client = gateway.modern(capabilities=ALL)
    params = {
        "name": "old__act",
        "arguments": script("legacy", {"e": form("e"), "s": sample("s")}),
    }
    asked = await client.request("tools/call", params)
    assert wants(asked)

    await gateway.line(r'old: e got \{"action": "cancel"\}')
    await gateway.line(r"old: s got .*limits\.park")

    await eventually(lambda: bool(heard(tmp_path, "notifications/cancelled")), "not cancelled")
    late = await client.retry("tools/call", params, asked, {"e": ACCEPT, "s": said("late")})
    assert late.code == -32602 and "again" in late.error["message"]
    assert [len(heard(tmp_path, answers=True))] == [2]  # the child got each answer once


async def test_a_legacy_client_that_answers_too_late_is_told_that_nobody_waits(
    atrax: Start, tmp_path: Path
) -> None:
    gateway = await atrax({"mcpServers": SERVERS, **SHORT})
    client = await gateway.legacy(capabilities=ALL)
    arguments = script("legacy", {"e": form("e"), "s": sample("s")})
    exchange = await client.open("tools/call", {"name": "old__act", "arguments": arguments})
    messages = [message async for message in exchange.messages()]

    asks = {m["id"]: m["method"] for m in messages if "id" in m and "method" in m}
    gone = [
        m["params"]["requestId"] for m in messages if m.get("method") == "notifications/cancelled"
    ]
    assert sorted(gone) == sorted(asks) and len(asks) == 2
    answers = json.loads(messages[-1]["result"]["content"][0]["text"])["answers"]
    assert (
        answers["e"] == {"action": "cancel"} and "limits.park" in answers["s"]["error"]["message"]
    )
    for ident in asks:  # ignored, with the status of a response that is taken
        assert await client.respond(ident, ACCEPT) == 202
    assert len(heard(tmp_path, answers=True)) == 2


@promise("cells.asks")
async def test_a_retry_that_comes_twice_is_answered_twice_and_consumed_once(
    atrax: Start, tmp_path: Path
) -> None:
    gateway = await atrax({"mcpServers": SERVERS})
    client = gateway.modern(capabilities=ALL)
    arguments = script("legacy", {"a": form("a")}, {"b": form("b")})
    params = {"name": "old__act", "arguments": arguments}
    first = await client.request("tools/call", params)

    second = await client.retry("tools/call", params, first, {"a": ACCEPT})
    again = await client.retry("tools/call", params, first, {"a": {"action": "decline"}})
    assert again.result == second.result and again.response["id"] != second.response["id"]
    done = await client.retry("tools/call", params, second, {"b": ACCEPT})
    repeated = await client.retry("tools/call", params, second, {"b": ACCEPT})

    assert done.result == repeated.result
    assert json.loads(done.text)["answers"] == {"a": ACCEPT, "b": ACCEPT}
    # A round before the last is over for good.
    assert (await client.retry("tools/call", params, first, {"a": ACCEPT})).code == -32602
    assert [line["result"] for line in heard(tmp_path, answers=True)] == [ACCEPT, ACCEPT]
    assert len(heard(tmp_path, "tools/call")) == 1


async def test_a_repeated_retry_takes_over_from_one_that_still_runs(
    atrax: Start, tmp_path: Path
) -> None:
    gateway = await atrax({"mcpServers": SERVERS})
    client = gateway.modern(capabilities=ALL)
    steps = [{"ask": {"a": form("a")}}, {"hold": str(tmp_path / "go on")}]
    params = {"name": "old__act", "arguments": {"steps": steps}}
    asked = await client.request("tools/call", params)
    retry = lambda: client.retry("tools/call", params, asked, {"a": ACCEPT})  # noqa: E731
    older = asyncio.create_task(retry())
    await eventually(lambda: bool(heard(tmp_path, answers=True)), "the answer did not arrive")

    newer = asyncio.create_task(retry())
    assert (await older).code == -32600
    assert not newer.done()
    (tmp_path / "go on").touch()

    assert json.loads((await newer).text)["answers"] == {"a": ACCEPT}
    assert len(heard(tmp_path, answers=True)) == 1


async def test_a_response_that_is_closed_while_its_call_runs_cancels_it_for_good(
    atrax: Start, tmp_path: Path
) -> None:
    gateway = await atrax({"mcpServers": SERVERS})
    client, other = gateway.modern(capabilities=ALL), gateway.modern(capabilities=ALL)
    steps = [{"ask": {"a": form("a")}}, {"hold": "/never/there"}]
    params = {"name": "old__act", "arguments": {"steps": steps}}
    asked = await client.request("tools/call", params)
    retry = asyncio.create_task(client.retry("tools/call", params, asked, {"a": ACCEPT}))
    await eventually(lambda: bool(heard(tmp_path, answers=True)), "the answer did not arrive")

    client.close()

    await eventually(lambda: bool(heard(tmp_path, "notifications/cancelled")), "not cancelled")
    late = await other.retry("tools/call", params, asked, {"a": ACCEPT})
    assert late.code == -32602 and "again" in late.error["message"]
    assert len(heard(tmp_path, answers=True)) == 1
    retry.cancel()


@promise("cells.asks")
@on_one_gateway
@pytest.mark.parametrize("to", ERAS)
async def test_a_legacy_client_whose_stream_breaks_while_it_is_asked_answers_and_fetches_the_rest(
    gateway: Running, to: str
) -> None:
    client = await gateway.legacy(capabilities=ALL)
    arguments = script(to, {"a": form("a")}, {"b": form("b")})
    exchange = await client.open("tools/call", {"name": tool_of(to), "arguments": arguments})
    async for event in exchange.events():
        if "elicitation/create" in event.data:
            break
    exchange.connection.abort()

    assert await client.respond(json.loads(event.data)["id"], answer_of("a")) == 202

    answer = wire.Answer(200, {})
    client.answers = NAMES
    async for message in (await client.listen(event.id)).messages():
        await client.take(message, answer)
    assert [ask["params"]["message"] for ask in answer.asks] == ["b"]
    assert json.loads(answer.text)["answers"] == {"a": answer_of("a"), "b": answer_of("b")}


async def test_a_legacy_answer_that_comes_twice_is_consumed_once(
    atrax: Start, tmp_path: Path
) -> None:
    gateway = await atrax({"mcpServers": SERVERS})
    client = await gateway.legacy(capabilities=ALL)

    for tool, to in (("old__act", "legacy"), ("new__act", "modern")):
        arguments = script(to, {"a": form("a")}, {"b": form("b")})
        exchange = await client.open("tools/call", {"name": tool, "arguments": arguments})
        async for message in exchange.messages():
            if "method" in message:
                name = message["params"]["message"]
                for words in (name, "another"):
                    assert await client.respond(message["id"], answer_of(words)) == 202
        got = json.loads(message["result"]["content"][0]["text"])["answers"]
        assert got == {"a": answer_of("a"), "b": answer_of("b")}
    assert len(heard(tmp_path, answers=True)) == 2


# ---- requestState is Atrax's own ----------------------------------------------------------


def forged(state: str) -> list[str]:
    """States that look like `state` and are none: altered in text and in signature, cut, and made up."""
    text, _, mark = state.rpartition(".")
    longer = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).replace(b"[", b"[ ", 1)
    return [
        f"{text[:-1]}{'A' if text[-1] != 'A' else 'B'}.{mark}",
        f"{text}.{mark[:-2]}{'AA' if mark[-2:] != 'AA' else 'BB'}",
        f"{base64.urlsafe_b64encode(longer).decode()}.{mark}",
        text,
        f".{mark}",
        "",
        "é" * 40,
    ]


@promise("cells.asks")
@pytest.mark.parametrize("to", ERAS)
async def test_a_state_that_was_altered_or_is_another_calls_is_refused_and_reaches_no_child(
    atrax: Start, tmp_path: Path, to: str
) -> None:
    servers = {**SERVERS, "other": SERVERS["old" if to == "legacy" else "new"]}
    gateway, other = await atrax({"mcpServers": servers}), await atrax({"mcpServers": servers})
    client = gateway.modern(capabilities=ALL)
    tool, arguments = tool_of(to), script(to, {"a": form("a")})
    params = {"name": tool, "arguments": arguments}
    asked = await client.request("tools/call", params)
    state = asked.result["requestState"]
    before = len(heard(tmp_path, "tools/call")), len(heard(tmp_path, answers=True))
    own = gateway.modern(tool.split("__")[0], capabilities=ALL)

    async def refused(who: wire.Modern, params: Json, state: Json) -> None:
        more = {"requestState": state, "inputResponses": {"a": ACCEPT}}
        answer = await who.request("tools/call", {**params, **more})
        assert answer.code == -32602, (state, answer.response)

    for wrong in [*forged(state), 7, None, [state]]:
        await refused(client, params, wrong)
    await refused(client, {**params, "name": "other__act"}, state)
    await refused(client, {**params, "arguments": {**arguments, "more": 1}}, state)
    await refused(own, {**params, "name": "act"}, state)  # another endpoint
    await refused(other.modern(capabilities=ALL), params, state)  # another gateway's key

    assert (len(heard(tmp_path, "tools/call")), len(heard(tmp_path, answers=True))) == before
    done = await client.retry("tools/call", params, asked, {"a": ACCEPT})
    assert json.loads(done.text)["answers"] == {"a": ACCEPT}


async def test_a_state_that_has_expired_is_refused(atrax: Start, tmp_path: Path) -> None:
    """A modern child's call holds nothing at Atrax: all that ends is the state."""
    gateway = await atrax({"mcpServers": SERVERS, **SHORT})
    client = gateway.modern(capabilities=ALL)
    params = {"name": "new__act", "arguments": script("modern", {"a": form("a")})}
    asked = await client.request("tools/call", params)
    expiry = json.loads(
        base64.urlsafe_b64decode(asked.result["requestState"].partition(".")[0] + "==")
    )[0]

    await eventually(lambda: time.time() > expiry, "time stands still")

    assert (await client.retry("tools/call", params, asked, {"a": ACCEPT})).code == -32602
    assert len(heard(tmp_path, "tools/call")) == 1


@on_one_gateway
async def test_answers_without_a_state_begin_anew_and_answer_what_fits(gateway: Running) -> None:
    client = gateway.modern(capabilities=ALL)
    params = {"name": "old__act", "arguments": script("legacy", {"a": form("a")}, {"b": form("b")})}

    ahead = await client.request(
        "tools/call", {**params, "inputResponses": {"a": answer_of("ahead"), "z": ACCEPT}}
    )

    assert list(ahead.result["inputRequests"]) == ["b"]
    done = await client.retry("tools/call", params, ahead, {"b": ACCEPT})
    assert json.loads(done.text)["answers"] == {"a": answer_of("ahead"), "b": ACCEPT}


@on_one_gateway
async def test_what_was_not_answered_is_asked_again_and_the_rest_is_kept(gateway: Running) -> None:
    client = gateway.modern(capabilities=ALL)
    params = {"name": "old__act", "arguments": script("legacy", {"a": form("a"), "b": form("b")})}
    asked = await client.request("tools/call", params)
    while len(asked.result["inputRequests"]) < 2:
        asked = await client.retry("tools/call", params, asked, {})

    half = await client.retry("tools/call", params, asked, {"b": answer_of("b"), "z": ACCEPT})
    assert half.result["inputRequests"] == {"a": asked.result["inputRequests"]["a"]}
    assert half.result["requestState"] != asked.result["requestState"]
    done = await client.retry("tools/call", params, half, {"a": answer_of("a"), "b": ACCEPT})

    assert json.loads(done.text)["answers"] == {"a": answer_of("a"), "b": answer_of("b")}


# ---- What the client did not declare ------------------------------------------------------

LACKS: dict[str, tuple[Json, Json, Json]] = {
    # capabilities, the ask, what would have been needed
    "elicitation": ({"sampling": {}}, form("a"), {"elicitation": {}}),
    "forms": ({"elicitation": {"url": {}}}, form("a"), {"elicitation": {"form": {}}}),
    "url": ({"elicitation": {}}, ["elicitation/create", {**URL, "elicitationId": "e"}],
            {"elicitation": {"url": {}}}),
    "sampling": ({"elicitation": {}}, sample("a"), {"sampling": {}}),
    "tools": ({"sampling": {}}, ["sampling/createMessage", WITH_TOOLS], {"sampling": {"tools": {}}}),
    "context": ({"sampling": {}}, sample("a", includeContext="allServers"), {"sampling": {"context": {}}}),
}  # fmt: skip


@promise("cells.asks")
@on_one_gateway
@pytest.mark.parametrize("lack", LACKS)
async def test_an_ask_that_was_not_declared_is_refused_and_the_call_goes_on(
    gateway: Running, lack: str
) -> None:
    capabilities, ask, needed = LACKS[lack]
    asks = {"a": ask}
    for client in (
        gateway.modern(capabilities=capabilities),
        await gateway.legacy(capabilities=capabilities),
    ):
        went_on = await Person({}).act(client, "old__act", script("legacy", asks))
        assert went_on.asks == [] and went_on.value["answers"]["a"]["error"]["code"] == -32601
        for step in ({"fail": "I need it"}, {"error": {"code": -32000, "message": "I need it"}}):
            failed = await client.call("old__act", {"steps": [{"ask": asks}, step]})
            if isinstance(client, wire.Modern):
                assert failed.status == 400 and failed.code == -32021
                assert failed.error["message"] == "I need it"
                assert failed.error["data"] == {"requiredCapabilities": needed}
            elif "fail" in step:
                assert failed.result["isError"] and failed.text == "I need it"
            else:
                assert failed.error == step["error"]
        # Nothing was asked, so nothing lacked: the child's own failure.
        plain = await client.call("old__act", {"steps": [{"fail": "only so"}]})
        assert plain.result["isError"] and plain.text == "only so"


@on_one_gateway
async def test_all_that_was_refused_is_named_and_what_was_declared_is_asked(
    gateway: Running,
) -> None:
    client = gateway.modern(capabilities={"elicitation": {}})
    asks = {
        "s": sample("a"),
        "u": ["elicitation/create", {**URL, "elicitationId": "e"}],
        "f": form("f"),
    }

    done = await Person(NAMES).act(
        client, "old__act", {"steps": [{"ask": asks}, {"fail": "all or nothing"}]}
    )

    assert [params["message"] for _, params in done.asks] == ["f"]
    needed = {"sampling": {}, "elicitation": {"url": {}}}
    assert done.answer.error["data"] == {"requiredCapabilities": needed}


@on_one_gateway
async def test_a_modern_childs_undeclared_ask_ends_the_call(gateway: Running) -> None:
    """It was told what the client has declared, so nobody can go on from here."""
    arguments = script("modern", {"s": sample("a")})
    modern = await gateway.modern(capabilities={"elicitation": {}}).call("new__act", arguments)
    legacy = await gateway.legacy(capabilities={"elicitation": {}})

    assert modern.status == 400 and modern.code == -32021
    assert modern.error["data"] == {"requiredCapabilities": {"sampling": {}}}
    assert "sampling" in (await legacy.call("new__act", arguments)).error["message"]


# ---- Limits, and children that die --------------------------------------------------------


async def test_so_many_calls_of_one_owner_may_be_parked_and_no_more(
    atrax: Start, tmp_path: Path
) -> None:
    gateway = await atrax({"mcpServers": SERVERS, "limits": {"parked": 2}, **NO_DRAIN})
    client = gateway.modern(capabilities=ALL)
    params = {"name": "old__act", "arguments": script("legacy", {"a": form("a")})}
    asked = [await client.request("tools/call", params) for _ in range(2)]

    refused = await client.request("tools/call", params)

    reason = json.loads(refused.text)["answers"]["a"]["error"]["message"]
    assert "limits.parked" in reason
    for one in asked:
        done = await client.retry("tools/call", params, one, {"a": ACCEPT})
        assert json.loads(done.text)["answers"] == {"a": ACCEPT}
    assert wants(await client.request("tools/call", params))  # and there is room again
    # A legacy client's asks are bounded by their calls: they park nothing.
    legacy = await gateway.legacy(capabilities=ALL)
    done = await Person(NAMES).act(legacy, "old__act", params["arguments"])
    assert done.value["answers"] == {"a": answer_of("a")}


@promise("cells.asks")
@cells
async def test_a_child_that_dies_while_its_client_is_asked_ends_that_call(
    atrax: Start, of: str, to: str
) -> None:
    gateway = await atrax({"mcpServers": SERVERS})
    client = await client_of(gateway, of)
    name = "new" if to == "modern" else "old"
    arguments = script(to, {"a": form("a")})
    params = {"name": tool_of(to), "arguments": arguments}

    async def kill() -> None:
        [pid] = (await server_of(gateway, name))["pids"]
        os.kill(pid, signal.SIGKILL)
        await gateway.line(f"{name}: .*SIGKILL")

    if isinstance(client, wire.Modern):
        asked = await client.request("tools/call", params)
        await kill()
        ended = await client.retry("tools/call", params, asked, {"a": ACCEPT})
    else:
        exchange = await client.open("tools/call", params)
        async for message in exchange.messages():
            if "method" in message:
                await kill()
                assert await client.respond(message["id"], ACCEPT) == 202
        ended = wire.Answer(200, {}, message)

    # A modern child's state is with its client: that its process is gone shows when it is asked for.
    code, words = (1010, "gone") if to == "modern" else (1000, "died")
    assert ended.code == code and words in ended.error["message"]
    # It had asked, so it was not begun again behind the client's back; the next call is served.
    done = await Person(NAMES).act(client, tool_of(to), arguments)
    assert done.value["answers"] == {"a": answer_of("a")}


async def test_the_clock_of_a_call_stands_still_while_its_client_is_asked(atrax: Start) -> None:
    hasty = child("asks", timeout=0.5, max_timeout=0.5)
    gateway = await atrax({"mcpServers": {"old": hasty}})
    clients: list[Client] = [
        gateway.modern(capabilities=ALL),
        await gateway.legacy(capabilities=ALL),
    ]

    async def act(client: Client) -> Done:
        begun = time.monotonic()

        def later(params: Json) -> Json:
            # The whole test's loop waits: it is Atrax's clock that matters.
            while time.monotonic() - begun < 1.0:
                time.sleep(0.05)
            return ACCEPT

        steps = script("legacy", {"a": form("a")})
        return await Person({"elicitation/create": later}).act(client, "old__act", steps)

    for client in clients:
        assert (await act(client)).value["answers"] == {"a": ACCEPT}
    # While it is not asked, the clock runs.
    slow = await clients[0].call("old__act", {"steps": [{"hold": "/never/there"}]})
    assert slow.code == 1001


# ---- Beside the answers -------------------------------------------------------------------


@on_one_gateway
async def test_a_clients_progress_on_an_ask_reaches_the_child_under_its_own_token(
    gateway: Running,
) -> None:
    client = await gateway.legacy(capabilities=ALL)
    method, params = form("a")
    ask = {"a": [method, {**params, "_meta": {"progressToken": "the child's"}}]}
    exchange = await client.open(
        "tools/call", {"name": "old__act", "arguments": script("legacy", ask)}
    )

    async for message in exchange.messages():
        if "method" in message:
            token = message["params"]["_meta"]["progressToken"]
            progress = {"progressToken": token, "progress": 0.5, "message": "thinking"}
            assert await client.notify("notifications/progress", progress) == 202
            assert await client.respond(message["id"], ACCEPT) == 202

    done = json.loads(message["result"]["content"][0]["text"])
    assert done["progress"] == [
        {"progressToken": "the child's", "progress": 0.5, "message": "thinking"}
    ]


@promise("cells.asks")
@on_one_gateway
async def test_a_child_that_takes_its_ask_back_spares_the_client_the_question(
    gateway: Running,
) -> None:
    """It asks for two things, gets the second, and does not want the first any more."""
    asks = {"a": form("a"), "b": form("b")}
    arguments = {
        "steps": [{"ask": asks, "wait": ["b"]}, {"take_back": ["a"]}, {"ask": {"c": form("c")}}]
    }
    params = {"name": "old__act", "arguments": arguments}

    modern = gateway.modern(capabilities=ALL)
    asked, seen = await modern.request("tools/call", params), []
    while wants(asked):
        seen.append(sorted(asked.result["inputRequests"]))
        answers = {key: ACCEPT for key in "bc" if key in asked.result["inputRequests"]}
        asked = await modern.retry("tools/call", params, asked, answers)
    assert json.loads(asked.text)["answers"] == {"b": ACCEPT, "c": ACCEPT}
    assert seen[-1] == ["c"] and "a" in itertools.chain(*seen)

    legacy = await gateway.legacy(capabilities=ALL)
    exchange = await legacy.open("tools/call", params)
    ids: dict[str, Json] = {}
    gone: list[Json] = []
    async for message in exchange.messages():
        if message.get("method") == "notifications/cancelled":
            gone.append(message["params"]["requestId"])
        elif "method" in message:
            ids[message["params"]["message"]] = message["id"]
            if message["params"]["message"] != "a":
                await legacy.respond(message["id"], ACCEPT)
    assert gone == [ids["a"]]
    done = json.loads(message["result"]["content"][0]["text"])
    assert done["answers"] == {"b": ACCEPT, "c": ACCEPT}


@on_one_gateway
async def test_the_end_of_an_elicitation_by_url_is_told_to_who_was_sent_there(
    gateway: Running,
) -> None:
    ask = {"a": ["elicitation/create", {**URL, "elicitationId": "e-77"}]}
    told = {
        "jsonrpc": "2.0",
        "method": "notifications/elicitation/complete",
        "params": {"elicitationId": "e-77"},
    }
    arguments = {"steps": [{"ask": ask}, {"say": told}]}
    client, other = await gateway.legacy(capabilities=ALL), await gateway.legacy(capabilities=ALL)
    streams = [(await one.listen()).messages() for one in (client, other)]

    done = await Person({"elicitation/create": lambda params: {"action": "accept"}}).act(
        client, "old__act", arguments
    )
    assert done.asks[0][1]["elicitationId"] == "e-77"
    seen = done.answer.notices or [await anext(streams[0])]
    assert seen == [told]

    # And nobody else heard of it: the end of its session is the next that the other hears.
    assert await other.delete() == 200
    assert [message async for message in streams[1]] == []
    # A modern client has no such notification, nor an id for it.
    modern = await Person({"elicitation/create": lambda params: {"action": "accept"}}).act(
        gateway.modern(capabilities=ALL), "old__act", arguments
    )
    assert "elicitationId" not in modern.asks[0][1] and modern.answer.notices == []


@promise("cells.asks")
async def test_a_demand_for_a_visit_is_an_ask_for_modern_clients_and_an_error_for_legacy_ones(
    atrax: Start, tmp_path: Path
) -> None:
    gateway = await atrax({"mcpServers": SERVERS})
    visits = [
        {**URL, "elicitationId": f"e{number}", "url": f"https://x.y/{number}"} for number in (1, 2)
    ]
    error = {"code": -32042, "message": "Log in first", "data": {"elicitations": visits}}
    arguments = {"steps": [{"error": error}]}
    params = {"name": "old__act", "arguments": arguments}

    legacy = await (await gateway.legacy(capabilities=ALL)).request("tools/call", params)
    assert legacy.error == error

    client = gateway.modern(capabilities=ALL)
    asked = await client.request("tools/call", params)
    requests = list(asked.result["inputRequests"].values())
    wanted = [{k: v for k, v in visit.items() if k != "elicitationId"} for visit in visits]
    assert [request["params"] for request in requests] == wanted
    before = len(heard(tmp_path, "tools/call"))
    visited = {key: {"action": "accept"} for key in asked.result["inputRequests"]}
    again = await client.retry("tools/call", params, asked, visited)
    assert wants(again)  # it was called again, and this child is never content
    assert len(heard(tmp_path, "tools/call")) == before + 1
    declined = {key: {"action": "decline"} for key in asked.result["inputRequests"]}
    assert (
        "declined" in (await client.retry("tools/call", params, again, declined)).error["message"]
    )
    assert len(heard(tmp_path, "tools/call")) == before + 1

    unable = await gateway.modern(capabilities={"elicitation": {}}).request("tools/call", params)
    assert unable.code == -32021
    assert unable.error["data"] == {"requiredCapabilities": {"elicitation": {"url": {}}}}


# ---- A modern child's own state -----------------------------------------------------------


@promise("cells.asks")
@clients
async def test_a_retry_goes_to_the_process_that_made_the_state(
    atrax: Start, tmp_path: Path, of: str
) -> None:
    gateway = await atrax({"mcpServers": {"new": child("rounds", processes=2, concurrency=1)}})
    arguments = script("modern", {"a": form("a")}, {"b": form("b")})
    params = {"name": "new__act", "arguments": arguments}
    early = gateway.modern(capabilities=ALL)
    asked = await early.request("tools/call", params)
    [first] = (await server_of(gateway, "new"))["pids"]
    # That process is busy now: the next client is asked by another one, in all of its rounds.
    go_on = tmp_path / "go on"
    holding = asyncio.create_task(gateway.modern().call("new__hold", {"until": str(go_on)}))
    await until(gateway, "new", "inFlight", 1)
    client = await client_of(gateway, of)
    others = [(await Person(NAMES).act(client, "new__act", arguments)).value for _ in range(2)]

    # The second is free, and still the first one's retry waits for the first.
    retry = asyncio.create_task(early.retry("tools/call", params, asked, {"a": ACCEPT}))
    await until(gateway, "new", "waiting", 1)
    go_on.touch()
    done = await early.retry("tools/call", params, await retry, {"b": ACCEPT})

    assert json.loads(done.text) == {
        "pid": first, "answers": {"a": ACCEPT, "b": ACCEPT}, "declared": ALL,
    }  # fmt: skip
    assert {other["pid"] for other in others} == set((await server_of(gateway, "new"))["pids"]) - {
        first
    }
    assert (await holding).result


@promise("cells.asks")
async def test_a_state_that_the_sdk_sealed_goes_to_its_process(
    atrax: Start, tmp_path: Path
) -> None:
    server = child("sealed", protocol="modern", processes=2, concurrency=1)
    server["args"].remove("-S")  # it needs the SDK
    gateway = await (await atrax({"mcpServers": {"new": server}})).ready()
    client, params = gateway.modern(capabilities=ALL), {"name": "new__act", "arguments": {}}
    asked = await client.request("tools/call", params)
    [first] = (await server_of(gateway, "new"))["pids"]
    go_on = tmp_path / "go on"
    holding = asyncio.create_task(gateway.modern().call("new__hold", {"until": str(go_on)}))
    await until(gateway, "new", "inFlight", 1)
    # The second process is there and free, and still the retry waits for the first.
    await gateway.modern(capabilities=ALL).request("tools/call", params)

    [key] = asked.result["inputRequests"]
    answers = {key: {"action": "accept", "content": {"name": "Ada"}}}
    retry = asyncio.create_task(client.retry("tools/call", params, asked, answers))
    await until(gateway, "new", "waiting", 1)
    go_on.touch()

    assert (await retry).text == f"{first} accept"
    assert (await holding).text == "held"


@on_one_gateway
async def test_a_state_alone_brings_a_client_back_until_there_is_an_answer(
    gateway: Running,
) -> None:
    arguments = script("modern", {}, {"a": form("a")}, {})

    for client in (gateway.modern(capabilities=ALL), await gateway.legacy(capabilities=ALL)):
        done = await Person(NAMES).act(client, "new__act", arguments)
        assert done.value["answers"] == {"a": answer_of("a")}
        assert [params["message"] for _, params in done.asks] == ["a"]


@on_one_gateway
async def test_a_modern_child_may_ask_a_legacy_client_in_ten_rounds_and_not_for_ever(
    gateway: Running,
) -> None:
    client = await gateway.legacy(capabilities=ALL)
    rounds = [{f"k{number}": form(f"{number}")} for number in range(11)]

    ten = await Person(NAMES).act(client, "new__act", script("modern", *rounds[:10]))
    eleven = await Person(NAMES).act(client, "new__act", script("modern", *rounds))

    assert len(ten.value["answers"]) == 10
    assert "10 rounds" in eleven.answer.error["message"] and len(eleven.asks) == 10


# ---- Roots, subscriptions, apps, tasks ----------------------------------------------------

WATCHED = "test://watched-resource"


@promise("travels.subscriptions")
async def test_one_subscription_at_the_child_stands_for_all_who_listen(
    atrax: Start, tmp_path: Path
) -> None:
    gateway = await (await atrax({"mcpServers": {"old": child("legacy")}})).ready()
    wanted = {"notifications": {"resourceSubscriptions": [WATCHED]}}
    listens = [
        await gateway.modern(server).open("subscriptions/listen", wanted)
        for server in (None, "old")
    ]
    streams = [listen.messages() for listen in listens]
    for stream in streams:
        assert (await anext(stream))["params"]["notifications"] == wanted["notifications"]
    legacy = await gateway.legacy()
    streams.append((await legacy.listen()).messages())
    assert (await legacy.request("resources/subscribe", {"uri": WATCHED})).result == {}
    counts = lambda: (  # noqa: E731
        len(heard(tmp_path, "resources/subscribe")) - len(heard(tmp_path, "resources/unsubscribe"))
    )
    assert counts() == len(heard(tmp_path, "resources/subscribe")) == 1

    assert (await gateway.modern().call("old__test_trigger_resource_update")).result
    for stream in streams:
        told = await anext(stream)
        assert (
            told["method"] == "notifications/resources/updated" and told["params"]["uri"] == WATCHED
        )

    # The last to leave puts out the light.
    for listen in listens:
        listen.close()
    assert (await gateway.modern().call("old__test_trigger_resource_update")).result
    assert (await anext(streams[2]))["method"] == "notifications/resources/updated"
    assert counts() == 1
    assert (await legacy.request("resources/unsubscribe", {"uri": WATCHED})).result == {}
    await eventually(lambda: counts() == 0, "it was not unsubscribed")
    assert len(heard(tmp_path, "resources/unsubscribe")) == 1


@promise("cells.apps")
@on_one_gateway
async def test_an_app_of_a_tool_is_read_where_all_servers_are_although_nobody_lists_it(
    gateway: Running,
) -> None:
    for client in (gateway.modern(), await gateway.legacy(), gateway.modern("old")):
        [tool] = [
            tool
            for tool in await client.list("tools")
            if tool["name"] in ("old__act", "act") and "_meta" in tool
        ]
        uri = tool["_meta"]["ui"]["resourceUri"]
        assert uri not in [resource["uri"] for resource in await client.list("resources")]
        [page] = (await client.request("resources/read", {"uri": uri})).result["contents"]
        assert page == {"uri": uri, "mimeType": "text/html;profile=mcp-app", "text": "<p>app</p>"}
        unknown = await client.request("resources/read", {"uri": "ui://asks/another"})
        assert unknown.code == (-32602 if isinstance(client, wire.Modern) else -32002)


@promise("cells.tasks")
@pytest.mark.parametrize("of", ERAS)
async def test_a_tool_that_must_be_a_task_is_called_by_clients_without_tasks(
    atrax: Start, tmp_path: Path, of: str
) -> None:
    gateway = await atrax({"mcpServers": {"old": child("asks", "tasks")}})

    for server, tool in ((None, "old__must"), ("old", "must")):
        client = await client_of(gateway, of, server)
        steps = [{"awaited": True}, {"ask": {"a": form("a")}}]
        done = await Person(NAMES).act(client, tool, {"steps": steps})
        assert done.value["answers"] == {"a": answer_of("a")}
        assert "task" not in done.answer.result and "taskId" not in done.answer.result
        failed = await client.call(tool, {"steps": [{"fail": "no"}]})
        assert failed.result["isError"] and failed.text == "no"


@promise("cells.tasks")
async def test_a_task_that_atrax_made_is_cancelled_with_its_call(
    atrax: Start, tmp_path: Path
) -> None:
    gateway = await atrax({"mcpServers": {"old": child("asks", "tasks")}})
    client = gateway.modern("old")
    call = asyncio.create_task(client.call("must", {"steps": [{"hold": "/never/there"}]}))
    await eventually(lambda: bool(heard(tmp_path, "tasks/result")), "the result is not awaited")

    client.close()

    await eventually(lambda: bool(heard(tmp_path, "tasks/cancel")), "the task goes on")
    call.cancel()


@promise("cells.tasks")
async def test_a_legacy_clients_tasks_pass_on_both_endpoints(atrax: Start) -> None:
    servers = {"old": child("asks", "tasks"), "twin": child("asks", "tasks")}
    gateway = await (await atrax({"mcpServers": servers})).ready()

    for server, tool in ((None, "old__job"), ("old", "job"), (None, "twin__must")):
        client = await gateway.legacy(server, capabilities=ALL)
        arguments = {"steps": [{"awaited": True}, {"ask": {"a": form("a")}}]}
        made = await client.request(
            "tools/call", {"name": tool, "arguments": arguments, "task": {}}
        )
        ident = made.result["task"]["taskId"]
        got = (await client.request("tasks/get", {"taskId": ident})).result
        assert got["taskId"] == ident and got["status"] == "working"
        listed = (await client.request("tasks/list")).result["tasks"]
        assert ident in [task["taskId"] for task in listed]
        client.answers = NAMES
        result = await client.request("tasks/result", {"taskId": ident})
        assert json.loads(result.text)["answers"] == {"a": answer_of("a")}
        assert result.asks[0]["params"]["_meta"]["io.modelcontextprotocol/related-task"] == {
            "taskId": ident
        }
        unknown = await client.request("tasks/get", {"taskId": "no such task"})
        assert unknown.code == -32602
    # One server's tasks are not known at another's endpoint.
    elsewhere = await gateway.legacy("twin")
    assert (await elsewhere.request("tasks/get", {"taskId": got["taskId"]})).result["status"]
    assert (
        await (await gateway.legacy("old")).request("tasks/get", {"taskId": ident})
    ).code == -32602


@promise("cells.tasks")
async def test_asking_for_a_task_needs_no_free_process(atrax: Start, tmp_path: Path) -> None:
    go_on = tmp_path / "go on"
    server = child("asks", "tasks", concurrency=1, processes=1)
    gateway = await (await atrax({"mcpServers": {"old": server}})).ready()
    client, other = await gateway.legacy("old"), await gateway.legacy("old")
    steps = {"steps": [{"hold": "/never/there"}]}
    made = await client.request("tools/call", {"name": "job", "arguments": steps, "task": {}})
    ident = made.result["task"]["taskId"]
    holding = asyncio.create_task(other.call("act", {"steps": [{"hold": str(go_on)}]}))
    await eventually(lambda: len(heard(tmp_path, "tools/call")) == 2, "nobody holds the process")

    got = await client.request("tasks/get", {"taskId": ident})
    ended = await client.request("tasks/cancel", {"taskId": ident})

    assert not holding.done() and got.result["status"] == "working"
    assert ended.result["status"] == "cancelled"
    go_on.touch()
    assert (await holding).result


@promise("cells.tasks")
async def test_a_running_task_is_a_use_of_its_process(atrax: Start) -> None:
    server = child("asks", "tasks", lazy=True, idle_stop=0.5)
    idle = child("asks", "tasks", lazy=True, idle_stop=0.5)
    gateway = await (await atrax({"mcpServers": {"old": server, "idle": idle}})).ready()
    client = await gateway.legacy("old")
    steps = {"steps": [{"awaited": True}]}
    made = await client.request("tools/call", {"name": "job", "arguments": steps, "task": {}})
    await (await gateway.legacy("idle")).call("act", {"steps": []})

    async def idle_has_stopped() -> bool:
        return (await gateway.status())["servers"]["idle"]["state"] == "stopped"

    await eventually(idle_has_stopped, "the server without a task goes on")

    assert (await gateway.status())["servers"]["old"]["state"] == "ready"
    result = await client.request("tasks/result", {"taskId": made.result["task"]["taskId"]})
    assert json.loads(result.text)["answers"] == {}


async def state(client: wire.Modern, task: str, wanted: str) -> Json:
    """The task, once its status is the one wanted."""
    seen: list[Json] = []

    async def reached() -> bool:
        seen.append((await client.request("tasks/get", {"taskId": task})).result)
        return bool(seen[-1]["status"] == wanted)

    await eventually(reached, f"the task is not {wanted}")
    return seen[-1]


EXTENSION = {"extensions": {"io.modelcontextprotocol/tasks": {}}}


@promise("cells.tasks")
async def test_a_modern_clients_tasks_pass_on_both_endpoints(atrax: Start) -> None:
    gateway = await (
        await atrax({"mcpServers": {"new": child("modern"), "other": child("modern")}})
    ).ready()

    for server, tool in ((None, "new__confirm_delete"), ("new", "confirm_delete")):
        client = gateway.modern(server, capabilities={**ALL, **EXTENSION})
        made = await client.call(tool, {"filename": "x"})
        ident = made.result["taskId"]

        asked = await state(client, ident, "input_required")
        assert list(asked["inputRequests"]) == ["confirm"]
        answers = {"confirm": {"action": "accept", "content": {"confirm": True}}}
        update = {"taskId": ident, "inputResponses": answers}
        assert (await client.request("tasks/update", update)).result
        done = await state(client, ident, "completed")
        assert done["result"]["content"][0]["text"] == "x: accept"
        assert (await client.request("tasks/get", {"taskId": "nothing"})).code == -32602
        undeclared = await gateway.modern(server).request("tasks/get", {"taskId": ident})
        assert undeclared.code == -32021 and undeclared.error["data"] == {
            "requiredCapabilities": EXTENSION
        }
    elsewhere = gateway.modern("other", capabilities=EXTENSION)
    assert (await elsewhere.request("tasks/get", {"taskId": ident})).code == -32602
