"""What belongs to one principal is to another as if it did not exist: every verb, the same answer as for a made-up id."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import asking
import pytest
import wire
from asking import ACCEPT, ALL, form
from conftest import Running, Start, child, eventually
from promises import promise

Json = Any
TOKENS = {name: f"{name}-secret-0123456789" for name in ("ann", "bob")}
SERVERS = {
    "a": child("does", concurrency=20),
    "old": child("asks", concurrency=5),
    "new": child("rounds"),
    "t": child("modern"),
}
TASKS = {"extensions": {"io.modelcontextprotocol/tasks": {}}}
MADE_UP = "AAAAAAAAAAAAAAAAAAAAAA.BBBBBBBBBBBBBBBBBBBBBB"


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {TOKENS[name]}"}


@pytest.fixture
async def gateway(atrax: Start) -> Running:
    tokens = [{"name": name, "token": secret} for name, secret in TOKENS.items()]
    config = {"auth": {"type": "token", "tokens": tokens}, "mcpServers": SERVERS}
    running = await atrax(config, judged=False)

    async def up() -> bool:
        return (await running.get("/ready"))[0] == 200

    await eventually(up, "it did not get ready")
    return running


@dataclasses.dataclass
class Verb:
    """One request that names a session: how it is made from the session's id."""

    method: str
    body: Json = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    path: str = "/mcp"

    async def __call__(self, gateway: Running, who: str, session: str) -> tuple[int, bytes, str]:
        """Status, body and content type of the answer."""
        http = wire.Http(gateway.url)
        headers = {**bearer(who), "Accept": wire.BOTH, "MCP-Protocol-Version": "2025-11-25"}
        target = self.path
        if "?" in target:
            target += session
        else:
            headers["Mcp-Session-Id"] = session
        body = b""
        if self.body is not None:
            body, headers["Content-Type"] = json.dumps(self.body).encode(), "application/json"
        exchange = await http.request(self.method, target, headers | self.headers, body)
        try:
            return exchange.status, await exchange.body(), exchange.headers["content-type"]
        finally:
            http.close()


def rpc(method: str, **params: Json) -> Json:
    return {"jsonrpc": "2.0", "id": 7, "method": method, "params": params}


def verbs(ask: str) -> Iterator[Verb]:
    yield Verb("GET", headers={"Accept": "text/event-stream"})
    for event in ("0-0", "0-1", "1-0", "1-1", "2-1", "9-9", "nonsense"):
        yield Verb("GET", headers={"Accept": "text/event-stream", "Last-Event-ID": event})
    yield Verb("POST", rpc("ping"))
    yield Verb("POST", rpc("tools/list"))
    yield Verb("POST", rpc("tools/call", name="a__do", arguments={"what": "pid"}))
    yield Verb("POST", rpc("resources/subscribe", uri="x://y"))
    yield Verb("POST", rpc("logging/setLevel", level="debug"))
    cancel = {"requestId": "asked", "reason": "by somebody else"}
    yield Verb("POST", {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": cancel})
    yield Verb("POST", {"jsonrpc": "2.0", "id": ask, "result": ACCEPT})
    yield Verb("POST", {"jsonrpc": "2.0", "id": ask, "error": {"code": -1, "message": "no"}})
    yield Verb("POST", [rpc("ping")])
    yield Verb("DELETE")
    yield Verb("POST", rpc("ping"), path="/messages?sessionId=")
    yield Verb("POST", {"jsonrpc": "2.0", "id": ask, "result": ACCEPT}, path="/messages?sessionId=")
    yield Verb("GET", headers={"Accept": "text/event-stream"}, path="/servers/a/mcp")
    yield Verb("POST", rpc("ping"), path="/servers/a/mcp")
    yield Verb("POST", rpc("ping"), path="/servers/a/messages?sessionId=")


@promise("owners.unseen")
async def test_no_verb_of_another_principal_finds_a_session_or_touches_it(gateway: Running) -> None:
    ann = await gateway.legacy(headers=bearer("ann"), capabilities=ALL)
    stream = await ann.listen()
    steps = [{"ask": {"k": form("?")}}]
    asked = await ann.open(
        "tools/call", {"name": "old__act", "arguments": {"steps": steps}}, id="asked"
    )
    messages = asked.messages()
    ask = await anext(messages)

    assert ann.session
    for verb in verbs(ask["id"]):
        theirs = await verb(gateway, "bob", ann.session)
        nobodys = await verb(gateway, "bob", MADE_UP)
        assert theirs == nobodys and theirs[0] == 404, verb

    assert not stream.connection.reader.at_eof()
    assert await ann.respond(ask["id"], ACCEPT) == 202
    assert "result" in await anext(messages)
    metrics = (await gateway.get("/metrics", bearer("ann")))[1].decode()
    refused = re.search(r'atrax_events_total\{event="session.refused"\} (\d+)', metrics)
    assert refused and int(refused[1]) == len(list(verbs("")))


@promise("owners.unseen")
async def test_a_session_is_of_its_endpoint_even_to_its_own_principal(gateway: Running) -> None:
    ann = await gateway.legacy(headers=bearer("ann"))
    assert ann.session

    for verb in verbs("atrax-1"):
        if verb.path.startswith("/servers/"):
            assert await verb(gateway, "ann", ann.session) == await verb(gateway, "ann", MADE_UP)


@promise("owners.unseen")
async def test_the_session_of_the_old_transport_takes_no_message_of_another_principal(
    gateway: Running,
) -> None:
    ann = await wire.OldSse.start(f"{gateway.url}/sse", headers=bearer("ann"))
    ident = (await ann._target).partition("sessionId=")[2]

    for verb in verbs("atrax-1"):
        assert await verb(gateway, "bob", ident) == await verb(gateway, "bob", MADE_UP), verb

    assert "result" in await ann.request("ping")
    ann.close()


@promise("owners.unseen")
@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("old__act", {"steps": [{"ask": {"k": form("?")}}]}),
        ("new__act", {"rounds": [{"k": form("?")}]}),
    ],
)
async def test_the_state_of_another_principals_call_is_a_forged_one(
    gateway: Running, tool: str, arguments: Json
) -> None:
    ann, bob = (gateway.modern(headers=bearer(name), capabilities=ALL) for name in TOKENS)
    params = {"name": tool, "arguments": arguments}
    asked = await ann.request("tools/call", params)
    assert asking.wants(asked)
    state = asked.result["requestState"]

    async def retried(client: wire.Modern, state: str, **more: Json) -> wire.Answer:
        answers = {"inputResponses": {"k": ACCEPT}, "requestState": state}
        return await client.request("tools/call", {**params, **more, **answers}, id=1)

    forged = state[:-4] + ("AAAA" if not state.endswith("AAAA") else "BBBB")
    theirs, nobodys = await retried(bob, state), await retried(bob, forged)
    other = await retried(ann, state, arguments={"steps": [], "rounds": []})

    assert theirs.code == other.code == -32602
    assert (theirs.status, theirs.response) == (nobodys.status, nobodys.response)
    assert theirs.response == other.response
    assert "result" in (await retried(ann, state)).response


@promise("owners.unseen")
async def test_a_task_is_its_principals_in_every_session_and_unknown_to_others(
    gateway: Running,
) -> None:
    ann, again, bob = (
        gateway.modern(headers=bearer(name), capabilities=TASKS) for name in ("ann", "ann", "bob")
    )
    made = await ann.call("t__failing_job")
    task = made.result["taskId"]

    methods: dict[str, Json] = {
        "tasks/get": {},
        "tasks/update": {"inputResponses": {}},
        "tasks/cancel": {},
    }
    for method, more in methods.items():
        theirs = await bob.request(method, {"taskId": task, **more}, id=1)
        nobodys = await bob.request(method, {"taskId": "made-up", **more}, id=1)
        told = json.loads(json.dumps(theirs.response).replace(task, "made-up"))
        assert (theirs.status, told) == (nobodys.status, nobodys.response)
        assert theirs.code == -32602

    assert (await again.request("tasks/get", {"taskId": task})).result["taskId"] == task
