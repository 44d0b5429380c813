"""Fifty clients that are asked at once: each answers its own question, and no answer is another's.

One small child that answers one call at a time, in eight processes. Every question carries a nonce of its call, and so
does every answer; among the clients are some that behave badly. Then the same with clients that are not ours."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections import Counter
from typing import Any

import pytest
import wire
from asking import ACCEPT, ALL, ROOTS, Answers, Client, Person, form, said, sample, wants
from conftest import HOME, Running, Start, child
from installed import NODE
from promises import promise

Json = Any
EIGHT = {"concurrency": 1, "processes": 8}
# A shared child may ask for roots where it is said how far they reach.
ROOTED = {"offer": ["elicitation", "sampling", "roots"], "paths": {"dirs": ["/"]}}
CONFIG = {"mcpServers": {"old": child("asks", **EIGHT, **ROOTED), "new": child("rounds", **EIGHT)}}


def questions(nonce: str) -> list[Json]:
    """Two rounds, the second of three asks."""
    return [
        {"first": form(f"first {nonce}")},
        {"second": form(f"second {nonce}"), "model": sample(f"model {nonce}"), "roots": ROOTS},
    ]


def arguments(server: str, nonce: str) -> Json:
    rounds = questions(nonce)
    return {"rounds": rounds} if server == "new" else {"steps": [{"ask": asks} for asks in rounds]}


def words(params: Json) -> str:
    """What an ask says: its message, or its prompt; one for roots says nothing."""
    prompt = params.get("messages") or [{"content": {"text": ""}}]
    return str(params.get("message") or prompt[0]["content"]["text"])


def is_for(nonce: str, params: Json) -> bool:
    return nonce in words(params).split() or not words(params)


def answers_of(name: str) -> Answers:
    """One client's answers; they say who gave them, and to what."""

    def filled(params: Json) -> Json:
        return {"action": "accept", "content": {"name": f"{name}: {words(params)}"}}

    return {
        "elicitation/create": filled,
        "sampling/createMessage": lambda params: said(f"{name}: {words(params)}"),
        "roots/list": lambda params: {"roots": [{"uri": f"file:///{name}"}]},
    }


def right(name: str, nonce: str) -> Json:
    """What the child must have got."""
    filled = {
        key: {"action": "accept", "content": {"name": f"{name}: {key} {nonce}"}}
        for key in ("first", "second")
    }
    roots = {"roots": [{"uri": f"file:///{name}"}]}
    return {**filled, "model": said(f"{name}: model {nonce}"), "roots": roots}


async def client_of(gateway: Running, number: int) -> Client:
    if number % 2:
        return gateway.modern(capabilities=ALL)
    return await gateway.legacy(capabilities=ALL)


@promise("asks.attributed", "cells.asks")
async def test_eight_clients_are_asked_eight_things_at_once_each_its_own(atrax: Start) -> None:
    gateway = await atrax(CONFIG)
    clients = [await client_of(gateway, number) for number in range(8)]
    waiting: list[tuple[Client, Any]] = []
    # All are asked before any of them answers.
    for number, client in enumerate(clients):
        params = {"name": "old__act", "arguments": arguments("old", f"n{number}")}
        if isinstance(client, wire.Modern):
            waiting.append((client, await client.request("tools/call", params)))
        else:
            messages = (await client.open("tools/call", params)).messages()
            waiting.append((client, (messages, await anext(messages))))
    server = (await gateway.status())["servers"]["old"]
    assert server["parked"] == 8 and len(server["pids"]) == 8

    pids = set()
    for number, (client, asked) in reversed(list(enumerate(waiting))):
        nonce, answers = f"n{number}", answers_of(f"client-{number}")
        params = {"name": "old__act", "arguments": arguments("old", nonce)}
        if isinstance(client, wire.Modern):
            answer = asked
            while wants(answer):
                requests = answer.result["inputRequests"]
                assert all(is_for(nonce, ask.get("params", {})) for ask in requests.values())
                given = {
                    key: answers[ask["method"]](ask.get("params", {}))
                    for key, ask in requests.items()
                }
                answer = await client.retry("tools/call", params, answer, given)
        else:
            messages, message = asked
            while "method" in message:
                ask = message.get("params", {})
                assert is_for(nonce, ask)
                await client.respond(message["id"], answers[message["method"]](ask))
                message = await anext(messages)
            answer = wire.Answer(200, {}, message)
        value = json.loads(answer.text)
        assert value["answers"] == right(f"client-{number}", nonce)
        pids.add(value["pid"])
    assert len(pids) == 8


@promise("asks.attributed", "cells.asks")
async def test_fifty_clients_are_asked_at_once_and_no_answer_is_anothers(atrax: Start) -> None:
    gateway = await (await atrax({**CONFIG, "limits": {"park": 3.0}, "drain": 0.1})).ready()
    most = 0

    async def good(number: int) -> None:
        server, name, nonce = ("old", "new")[number // 2 % 2], f"client-{number}", f"n{number}"
        client = await client_of(gateway, number)
        person = Person(answers_of(name))
        done = await person.act(client, f"{server}__act", arguments(server, nonce))
        assert done.value["answers"] == right(name, nonce)
        assert all(is_for(nonce, params) for _, params in done.asks) and len(done.asks) == 4

    async def declines() -> None:
        no: Answers = {"elicitation/create": lambda params: {"action": "decline"}}
        for number in (0, 1):
            steps = {"steps": [{"ask": {"a": form("no")}}]}
            done = await Person(no).act(await client_of(gateway, number), "old__act", steps)
            assert done.value["answers"] == {"a": {"action": "decline"}}

    async def answers_twice() -> None:
        client = gateway.modern(capabilities=ALL)
        params = {"name": "old__act", "arguments": {"steps": [{"ask": {"a": form("twice")}}]}}
        asked = await client.request("tools/call", params)
        ends = [await client.retry("tools/call", params, asked, {"a": ACCEPT}) for _ in range(2)]
        assert ends[0].result == ends[1].result

    async def disappears() -> None:
        client = gateway.modern(capabilities=ALL)
        params = {"name": "old__act", "arguments": {"steps": [{"ask": {"gone": form("gone")}}]}}
        asked = await client.request("tools/call", params)
        assert wants(asked)
        client.close()
        await gateway.line(r"old: gone got .*cancel")
        late = await gateway.modern(capabilities=ALL).retry(
            "tools/call", params, asked, {"gone": ACCEPT}
        )
        assert late.code == -32602

    async def loses_its_child() -> None:
        client = await gateway.legacy(capabilities=ALL)
        steps = [{"ask": {"a": form("last words")}}, {"exit": 7}]
        done = await Person(answers_of("x")).act(client, "old__act", {"steps": steps})
        assert done.answer.code == 1000

    async def watch() -> None:
        nonlocal most
        while True:
            servers = (await gateway.status())["servers"]
            most = max(most, servers["old"]["parked"])
            await asyncio.sleep(0.01)

    watching = asyncio.create_task(watch())
    odd = [declines(), answers_twice(), disappears(), loses_its_child()]
    await asyncio.gather(*odd, *map(good, range(50)))
    watching.cancel()

    assert most > 2, "they were not asked at once: nothing is shown"
    servers = (await gateway.status())["servers"]
    assert [
        servers[name][what] for name in servers for what in ("parked", "inFlight", "waiting")
    ] == [0] * 6


# ---- Clients that are not ours ------------------------------------------------------------

PYTHON = (sys.executable, str(HOME / "tests" / "clients" / "asked_new.py"))
TYPESCRIPT = (str(NODE), str(HOME / "tests" / "clients" / "asked_new.mjs"))
MODES = ("legacy", "2026-07-28")


async def ask_all(gateway: Running, programs: list[tuple[str, ...]], each: int) -> None:
    """Start every program, each with so many clients; each client's calls must see its own nonces."""
    processes = []
    for (server, program), mode in itertools.product(
        itertools.product(("old", "new"), programs), MODES
    ):
        made = {server: json.dumps(arguments(server, "NONCE"))}
        processes.append(
            await asyncio.create_subprocess_exec(
                *program, gateway.endpoint(), f"{server}__act", mode, str(each), made[server],
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        )  # fmt: skip
    told: Counter[str] = Counter()
    for process in processes:
        out, complaint = await process.communicate()
        assert process.returncode == 0, complaint.decode() + str(gateway)
        for name, text in json.loads(out).items():
            assert json.loads(text)["answers"] == right(name, name), name
            told[name] += 1
    assert len(told) == len(processes) * each and set(told.values()) == {1}


@pytest.mark.needs_install()  # 28 interpreters are too many for `quick`
@promise("clients.real", "cells.asks")
async def test_real_python_clients_of_both_eras_are_asked_by_children_of_both(atrax: Start) -> None:
    gateway = await (await atrax(CONFIG)).ready()

    await ask_all(gateway, [PYTHON], 4)


@pytest.mark.needs_install("node")
@promise("clients.real", "cells.asks")
async def test_fifty_real_clients_are_asked_at_once_and_no_answer_is_anothers(
    atrax: Start,
) -> None:
    gateway = await (await atrax(CONFIG)).ready()

    await ask_all(gateway, [PYTHON, TYPESCRIPT], 7)  # of two programs, modes and children: 56
