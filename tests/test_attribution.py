"""Whose ask is it? A legacy child does not say which call its request belongs to, and a wrong guess would show one
user's question to another. So: to the one open call of that process, or to nobody.

The child (asks.py) is rude: it asks on when its call was cancelled, over, or one of several."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import wire
from asking import ACCEPT, ALL, ROOTS, Answers, Client, Person, form, heard, wants
from conftest import Running, Start, alive, child, eventually
from installed import node_server
from promises import promise

pytestmark = pytest.mark.needs_install()  # `quick` has no time for all of these

Json = Any
NO_DRAIN = {"drain": 0.1}
NEVER = "/never/there"
ERAS = ("legacy", "modern")
clients = pytest.mark.parametrize("of", ERAS)


def answer_of(message: str) -> Json:
    return {"action": "accept", "content": {"name": f"answer to {message}"}}


NAMES: Answers = {"elicitation/create": lambda params: answer_of(params["message"])}


async def client_of(gateway: Running, era: str, server: str | None = None) -> Client:
    if era == "modern":
        return gateway.modern(server, capabilities=ALL)
    return await gateway.legacy(server, capabilities=ALL)


def act(steps: list[Json], **more: Json) -> Json:
    """The params of a call."""
    return {"name": "a__act", "arguments": {"steps": steps, **more}}


async def status(gateway: Running, name: str = "a") -> Any:
    return (await gateway.status())["servers"][name]


async def until(gateway: Running, what: str, number: int) -> None:
    async def reached() -> bool:
        return bool((await status(gateway))[what] == number)

    await eventually(reached, f"{what} is not {number}")


async def given_up(client: Client, call: asyncio.Task[wire.Answer], ident: Json) -> None:
    """The client cancels its call, as its era does it."""
    if isinstance(client, wire.Modern):
        client.close()
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
    else:
        assert await client.notify("notifications/cancelled", {"requestId": ident}) == 202
        assert (await call).response is None


async def refused(gateway: Running, key: str) -> str:
    """The reason that the child was given for its ask `key`."""
    match = await gateway.line(rf"a: {key} got (.*)$")
    answer = json.loads(match[1])
    assert answer["error"]["code"] == -32601, answer
    return str(answer["error"]["message"])


def asked_of(answer: wire.Answer) -> list[str]:
    """The messages of all asks in a legacy client's answer."""
    return [ask["params"]["message"] for ask in answer.asks]


# ---- Several calls, and cancelled ones ----------------------------------------------------


@promise("asks.attributed")
@clients
async def test_an_ask_among_two_open_calls_is_refused_and_says_what_to_set(
    atrax: Start, tmp_path: Path, of: str
) -> None:
    gateway = await atrax({"mcpServers": {"a": child("asks")}})
    go_on, finish = tmp_path / "go on", tmp_path / "finish"
    steps = [{"hold": str(go_on)}, {"ask": {"mine": form("mine")}}]
    one, other = await client_of(gateway, of), await gateway.legacy(capabilities=ALL)
    other.answers = NAMES
    calls = [
        asyncio.create_task(one.request("tools/call", act(steps))),
        asyncio.create_task(other.request("tools/call", act([{"hold": str(finish)}]))),
    ]
    await until(gateway, "inFlight", 2)
    assert len((await status(gateway))["pids"]) == 1  # or else there would be nothing to confuse
    go_on.touch()

    first = await calls[0]
    finish.touch()
    second = await calls[1]

    assert first.asks == second.asks == []
    reason = json.loads(first.text)["answers"]["mine"]["error"]["message"]
    assert "concurrency" in reason and "processes" in reason
    # It is known to ask now: from here on one call at a time, and each is asked its own.
    assert (await status(gateway))["asks"] and (await status(gateway))["concurrency"] == 1
    done = await Person(NAMES).act(one, "a__act", {"steps": [{"ask": {"mine": form("mine")}}]})
    assert done.value["answers"] == {"mine": answer_of("mine")}


@promise("asks.attributed")
@clients
async def test_the_ask_of_a_cancelled_call_is_never_shown_to_the_other_one(
    atrax: Start, tmp_path: Path, of: str
) -> None:
    """Two calls in one process; the first client cancels, and the child asks for it all the same."""
    gateway = await atrax({"mcpServers": {"a": child("asks")}})
    go_on = tmp_path / "go on"
    asker, bystander = await client_of(gateway, of), await gateway.legacy(capabilities=ALL)
    bystander.answers = NAMES
    rude = act([{"hold": NEVER}, {"ask": {"secret": form("secret")}}], late=True)
    call = asyncio.create_task(asker.request("tools/call", rude, id="cancel me"))
    await until(gateway, "inFlight", 1)
    steps = [{"hold": str(go_on)}, {"ask": {"own": form("own")}}]
    other = asyncio.create_task(bystander.request("tools/call", act(steps)))
    await until(gateway, "inFlight", 2)

    await given_up(asker, call, "cancel me")

    assert "2 calls are open" in await refused(gateway, "secret")
    # The cancelled call was answered late: it is over, and the other one is asked its own.
    go_on.touch()
    answer = await other
    assert asked_of(answer) == ["own"]
    assert json.loads(answer.text)["answers"] == {"own": answer_of("own")}


@promise("asks.attributed")
@clients
async def test_an_ask_after_its_call_was_cancelled_is_refused_and_the_next_client_is_not_asked(
    atrax: Start, of: str
) -> None:
    gateway = await atrax({"mcpServers": {"a": child("asks")}})
    asker, nxt = await client_of(gateway, of), await gateway.legacy(capabilities=ALL)
    nxt.answers = NAMES
    # It goes on being busy after the cancellation, and asks then.
    steps = [{"hold": NEVER}, {"hold": NEVER}, {"ask": {"secret": form("secret")}}]
    call = asyncio.create_task(asker.request("tools/call", act(steps), id="cancel me"))
    await until(gateway, "inFlight", 1)

    await given_up(asker, call, "cancel me")

    assert "cancelled" in await refused(gateway, "secret")
    later = await nxt.request("tools/call", act([{"ask": {"own": form("own")}}]))
    assert asked_of(later) == ["own"]


@promise("asks.attributed")
async def test_a_call_that_timed_out_counts_as_cancelled(atrax: Start, tmp_path: Path) -> None:
    gateway = await atrax({"mcpServers": {"a": child("asks", timeout=1.5)}})
    asker, nxt = gateway.modern(capabilities=ALL), await gateway.legacy(capabilities=ALL)
    nxt.answers = NAMES
    steps = [{"hold": NEVER}, {"ask": {"secret": form("secret")}}]

    late = await asker.request("tools/call", act(steps))

    assert late.code == 1001
    assert "cancelled" in await refused(gateway, "secret")
    own = await nxt.request("tools/call", act([{"ask": {"own": form("own")}}]))
    assert asked_of(own) == ["own"]


@promise("asks.attributed")
async def test_a_process_that_owes_an_answer_retires_and_its_live_calls_are_finished(
    atrax: Start, tmp_path: Path
) -> None:
    """Known to ask, it could ask the next client for the call that was cancelled: so there is no next one."""
    gateway = await atrax({"mcpServers": {"a": child("asks", concurrency=2, processes=1)}})
    asker, other = await gateway.legacy(capabilities=ALL), await gateway.legacy(capabilities=ALL)
    asker.answers = other.answers = NAMES
    first = await asker.request("tools/call", act([{"ask": {"k": form("k")}}]))
    old = json.loads(first.text)["pid"]
    go_on = tmp_path / "go on"
    calls = [
        asyncio.create_task(
            asker.request("tools/call", act([{"hold": NEVER}] * 2), id="cancel me")
        ),
        asyncio.create_task(other.request("tools/call", act([{"hold": str(go_on)}]))),
    ]
    await until(gateway, "inFlight", 2)

    await given_up(asker, calls[0], "cancel me")

    nxt = await other.request("tools/call", act([{"ask": {"own": form("own")}}]))
    assert asked_of(nxt) == ["own"] and json.loads(nxt.text)["pid"] != old
    assert alive(old)
    go_on.touch()
    assert json.loads((await calls[1]).text)["pid"] == old
    await eventually(lambda: not alive(old), "the retired process lives on")


# ---- Of no call ---------------------------------------------------------------------------


@promise("asks.attributed")
async def test_an_ask_of_no_call_is_refused_and_nobody_sees_it(
    atrax: Start, tmp_path: Path
) -> None:
    gateway = await atrax({"mcpServers": {"a": child("asks")}})
    timer, go_on = tmp_path / "timer", tmp_path / "go on"
    client, listener = (
        await gateway.legacy(capabilities=ALL),
        await gateway.legacy(capabilities=ALL),
    )
    standing = [(await one.listen()).messages() for one in (client, listener)]
    behind = [{"later": {"behind": form("behind")}}]
    by_timer = [{"later": {"timed": form("timed"), "roots": ROOTS}, "at": str(timer)}]

    assert (await client.request("tools/call", act(behind))).asks == []
    assert "no call is open" in await refused(gateway, "behind")
    assert (await client.request("tools/call", act(by_timer))).asks == []
    timer.touch()
    assert "no call is open" in await refused(gateway, "timed")
    await refused(gateway, "roots")

    # And among several calls there is nobody to ask either.
    timer.unlink()
    assert (await client.request("tools/call", act(by_timer))).result
    calls = [
        asyncio.create_task(one.request("tools/call", act([{"hold": str(go_on)}])))
        for one in (client, listener)
    ]
    await until(gateway, "inFlight", 2)
    timer.touch()
    await eventually(lambda: str(gateway).count("timed got") == 2, "it was not answered")
    go_on.touch()
    assert [(await call).asks for call in calls] == [[], []]
    for one, messages in zip((client, listener), standing, strict=True):
        assert await one.delete() == 200
        assert [message async for message in messages] == []


# ---- Tasks --------------------------------------------------------------------------------


@promise("asks.attributed")
async def test_a_tasks_ask_goes_to_who_awaits_its_result_or_is_refused(
    atrax: Start, tmp_path: Path
) -> None:
    gateway = await (await atrax({"mcpServers": {"a": child("asks", "tasks")}})).ready()
    owner, other = await gateway.legacy(capabilities=ALL), await gateway.legacy(capabilities=ALL)
    owner.answers = other.answers = NAMES
    go_on = tmp_path / "go on"

    async def make(*steps: Json) -> str:
        params = {"name": "a__job", "arguments": {"steps": list(steps)}, "task": {}}
        return str((await owner.request("tools/call", params)).result["task"]["taskId"])

    # Nobody awaits the result of this one, though another client's call is open.
    busy = asyncio.create_task(other.request("tools/call", act([{"hold": str(go_on)}])))
    await until(gateway, "inFlight", 1)
    await make({"ask": {"unawaited": form("unawaited")}})
    assert "task" in await refused(gateway, "unawaited")
    # This one's owner does: it is asked, and not the other.
    task = await make({"awaited": True}, {"ask": {"mine": form("mine")}})
    done = await owner.request("tasks/result", {"taskId": task})
    assert asked_of(done) == ["mine"]
    assert json.loads(done.text)["answers"] == {"mine": answer_of("mine")}
    go_on.touch()
    assert (await busy).asks == []
    # A related task that does not exist is nobody's.
    odd = form("odd")
    odd[1]["_meta"] = {"io.modelcontextprotocol/related-task": {"taskId": "none"}}
    answer = await other.request("tools/call", act([{"ask": {"odd": odd}}]))
    assert answer.asks == [] and "task" in await refused(gateway, "odd")


# ---- Isolation ----------------------------------------------------------------------------


async def pid_of(client: Client) -> int:
    return int(json.loads((await client.request("tools/call", act([]))).text)["pid"])


@promise("isolation.children")
async def test_each_session_has_children_of_its_own_that_end_with_it(atrax: Start) -> None:
    servers = {"a": child("asks", isolation="session")}
    gateway = await (await atrax({"mcpServers": servers})).ready()
    [lists] = (await status(gateway))["pids"]
    one, other = await gateway.legacy(capabilities=ALL), await gateway.legacy(capabilities=ALL)
    modern = [gateway.modern(capabilities=ALL) for _ in range(2)]

    pids = [await pid_of(client) for client in (one, other, *modern)]

    # Modern clients have no sessions: those of one principal share. Nobody gets the one that is for lists.
    assert len({*pids, lists}) == 4 and pids[2] == pids[3]
    assert [await pid_of(client) for client in (one, other, *modern)] == pids
    assert set((await status(gateway))["pids"]) == {*pids, lists}

    assert await one.delete() == 200
    await eventually(lambda: not alive(pids[0]), "the child of a session that is gone lives on")
    assert alive(pids[1]) and await pid_of(other) == pids[1]
    # What it had to ask is asked of its own session.
    done = await Person(NAMES).act(other, "a__act", {"steps": [{"ask": {"k": form("k")}}]})
    assert done.value == {"pid": pids[1], "answers": {"k": answer_of("k")}, "progress": []}


@promise("isolation.children")
async def test_a_session_that_ends_while_its_child_asks_takes_the_question_along(
    atrax: Start,
) -> None:
    gateway = await atrax({"mcpServers": {"a": child("asks", isolation="session")}})
    client, other = await gateway.legacy(capabilities=ALL), await gateway.legacy(capabilities=ALL)
    pid = await pid_of(client)
    exchange = await client.open("tools/call", act([{"ask": {"k": form("k")}}]))
    messages = exchange.messages()
    ask = await anext(messages)

    assert await client.delete() == 200

    assert [message async for message in messages] == []
    await eventually(lambda: not alive(pid), "its child lives on")
    # Another session cannot answer in its place.
    assert await other.respond(ask["id"], ACCEPT) == 202
    assert await pid_of(other) != pid


@promise("isolation.children")
async def test_a_principal_has_children_of_its_own_whatever_its_clients(atrax: Start) -> None:
    servers = {"a": child("asks", isolation="principal", idle_stop=0.5)}
    gateway = await (await atrax({"mcpServers": servers})).ready()
    [lists] = (await status(gateway))["pids"]
    legacy = await gateway.legacy(capabilities=ALL)

    pids = {await pid_of(client) for client in (legacy, gateway.modern(capabilities=ALL))}

    assert len(pids) == 1 and pids != {lists}
    assert await legacy.delete() == 200
    assert alive(*pids)  # it is not the session's
    await eventually(lambda: not alive(*pids), "it is unused, and lives on")
    assert await pid_of(gateway.modern(capabilities=ALL)) not in pids


@promise("isolation.children")
async def test_isolated_children_are_bounded_and_the_longest_idle_one_makes_room(
    atrax: Start,
) -> None:
    servers = {"a": child("asks", isolation="session")}
    gateway = await (await atrax({"mcpServers": servers, "limits": {"children": 3}})).ready()
    sessions = [await gateway.legacy(capabilities=ALL) for _ in range(3)]

    first, second = await pid_of(sessions[0]), await pid_of(sessions[1])
    third = await pid_of(sessions[2])

    await eventually(lambda: not alive(first), "there are more children than limits.children")
    assert alive(second) and alive(third)
    assert await pid_of(sessions[0]) not in (first, second, third)


@promise("isolation.children")
async def test_a_parked_call_keeps_its_isolated_child(atrax: Start) -> None:
    servers = {"a": child("asks", isolation="session", idle_stop=0.3)}
    gateway = await atrax({"mcpServers": servers, **NO_DRAIN})
    client, other = gateway.modern(capabilities=ALL), await gateway.legacy(capabilities=ALL)
    params = act([{"ask": {"k": form("k")}}])
    asked = await client.request("tools/call", params)
    unused = await pid_of(other)

    await eventually(lambda: not alive(unused), "an unused child lives on")

    done = await client.retry("tools/call", params, asked, {"k": ACCEPT})
    assert json.loads(done.text)["answers"] == {"k": ACCEPT}


# ---- Roots --------------------------------------------------------------------------------


async def allowed(client: Client, tool: str) -> str:
    return (await client.call(tool)).text


@pytest.mark.needs_install("node")
@promise("roots.never_widen")
async def test_a_clients_roots_never_widen_what_a_file_server_may_touch(
    atrax: Start, tmp_path: Path
) -> None:
    """server-filesystem replaces its directories by the client's roots, at initialize and when they change."""
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    files = node_server("filesystem", str(inside))
    gateway = await (await atrax({"mcpServers": {"files": files}})).ready()
    roots = {"roots/list": lambda params: {"roots": [{"uri": "file:///", "name": "all"}]}}
    legacy, modern = await gateway.legacy(capabilities=ALL), gateway.modern(capabilities=ALL)
    legacy.answers = roots
    standing = (await legacy.listen()).messages()

    for client in (legacy, modern):
        assert (await allowed(client, "files__list_allowed_directories")).split()[-1] == str(inside)
        if isinstance(client, wire.Legacy):
            assert await client.notify("notifications/roots/list_changed") == 202
        secret = await client.call("files__read_text_file", {"path": str(tmp_path / "secret.txt")})
        assert secret.result["isError"] and "secret\n" not in secret.text
        assert (await allowed(client, "files__list_allowed_directories")).split()[-1] == str(inside)
    assert await legacy.delete() == 200
    assert [message["method"] async for message in standing] == []


@promise("roots.never_widen")
async def test_roots_changes_reach_no_child_that_others_use(atrax: Start, tmp_path: Path) -> None:
    rooted = {"offer": ["elicitation", "roots"], "isolation": "session"}
    gateway = await atrax({"mcpServers": {"a": child("asks"), "own": child("asks", **rooted)}})
    client = await gateway.legacy(capabilities=ALL)
    changed = "notifications/roots/list_changed"
    client.answers = {"roots/list": lambda params: {"roots": [{"uri": "file:///mine"}]}}
    go_on = str(tmp_path / "go on")
    steps = {"steps": [{"hold": go_on}, {"ask": {"r": ROOTS}}]}
    calls = [asyncio.create_task(client.call(f"{name}__act", steps)) for name in ("a", "own")]
    await until(gateway, "inFlight", 1)
    await eventually(lambda: len(heard(tmp_path, "tools/call")) == 2, "not both were called")

    assert await client.notify(changed) == 202

    await eventually(lambda: bool(heard(tmp_path, changed)), "its own child did not hear of it")
    Path(go_on).touch()
    shared, own = [json.loads((await call).text)["answers"]["r"] for call in calls]
    assert own == {"roots": [{"uri": "file:///mine"}]}
    assert shared["error"]["code"] == -32601 and "offer" in shared["error"]["message"]
    assert len(heard(tmp_path, changed)) == 1


@promise("roots.never_widen")
@clients
async def test_roots_outside_of_paths_are_taken_away(atrax: Start, tmp_path: Path, of: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "link").symlink_to("/")
    keys = {"offer": ["roots"], "paths": {"dirs": [str(inside)]}}
    gateway = await atrax({"mcpServers": {"a": child("asks", **keys)}})
    client = await client_of(gateway, of)
    good = [{"uri": f"file://{inside}", "name": "in"}, {"uri": f"file://{inside}/deeper"}]
    bad = [
        {"uri": uri}
        for uri in (
            "file:///",
            f"file://{inside}/..",
            f"file://{inside}-2",
            f"file://{tmp_path}/link",
            "file://host/x",
        )
    ]

    done = await Person({"roots/list": lambda params: {"roots": [*bad, *good]}}).act(
        client, "a__act", {"steps": [{"ask": {"r": ROOTS}}]}
    )

    assert done.value["answers"] == {"r": {"roots": good}}
    os.unlink(tmp_path / "link")


# ---- Two who ask at the same time ---------------------------------------------------------


@promise("asks.attributed")
async def test_a_foreign_session_or_principal_cannot_answer_an_ask(atrax: Start) -> None:
    gateway = await atrax({"mcpServers": {"a": child("asks")}})
    client, other = await gateway.legacy(capabilities=ALL), await gateway.legacy(capabilities=ALL)
    exchange = await client.open("tools/call", act([{"ask": {"k": form("k")}}]))
    messages = exchange.messages()
    ask = await anext(messages)

    assert await other.respond(ask["id"], answer_of("another's")) == 202
    assert await client.respond(ask["id"], ACCEPT) == 202

    result = (await anext(messages))["result"]
    assert json.loads(result["content"][0]["text"])["answers"] == {"k": ACCEPT}
    assert not wants(wire.Answer(200, {}, {"result": result}))
