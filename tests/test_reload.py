"""SIGHUP: who may come in changes at once; what somebody has no more right to ends, and nothing else does."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import pty
import signal
import sys
import time
from pathlib import Path
from typing import Any

import asking
import pytest
import wire
from asking import ACCEPT, ALL, form
from conftest import Running, Start, child, eventually, planted
from installed import ARCHIVE
from promises import promise
from recorded import Middle

import atrax as program

pytestmark = pytest.mark.needs_install()  # `quick` has no time for all of these

Json = Any
SECRETS = {name: f"{name}-secret-0123456789" for name in ("ann", "bob", "cyd")}
SERVERS = {"a": child("does", concurrency=20), "old": child("asks"), "e": child("legacy")}


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {SECRETS[name]}"}


def token(name: str, **more: Json) -> Json:
    return {"name": name, "token": SECRETS[name], **more}


def config(*tokens: Json, **more: Json) -> Json:
    return {"auth": {"type": "token", "tokens": list(tokens)}, "mcpServers": SERVERS, **more}


def soon(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(time.time() + seconds, datetime.UTC).isoformat()


async def started(atrax: Start, *tokens: Json, **more: Json) -> Running:
    gateway = await atrax(config(*tokens, **more), judged=False)
    await eventually(lambda: _all_up(gateway), "it did not get ready")
    return gateway


async def _all_up(gateway: Running) -> bool:
    return (await gateway.get("/ready"))[0] == 200


async def reload(gateway: Running, wanted: Json, event: str = "took over") -> None:
    """Write `wanted` where the config is, send SIGHUP, and wait for what the log says of it."""
    text = wanted if isinstance(wanted, str) else json.dumps({"port": 0, **planted(wanted)})
    before = len([line for line in gateway.log if event in line])
    gateway.config.write_text(text)
    gateway.process.send_signal(signal.SIGHUP)
    await eventually(
        lambda: len([line for line in gateway.log if event in line]) > before,
        f"no {event!r} in\n{gateway}",
    )


async def status(client: wire.Modern | wire.Legacy, method: str = "tools/list") -> int:
    """The HTTP status of a request. (A refusal of HTTP is no JSON-RPC message, which a client would check.)"""
    exchange = await client.open(method)
    await exchange.body()
    return exchange.status


class Tape:
    """A response that is read all the time, and what came of it so far."""

    def __init__(self, exchange: wire.Exchange) -> None:
        self.exchange, self.messages = exchange, []  # type: wire.Exchange, list[Json]
        self._reading = asyncio.create_task(self._read())  # ends with the response, or its test

    async def _read(self) -> None:
        with contextlib.suppress(ValueError, OSError):  # cut at the end of the test
            async for message in self.exchange.messages():
                self.messages.append(message)

    @property
    def over(self) -> bool:
        return self._reading.done()

    async def begun(self) -> Tape:
        await eventually(lambda: bool(self.messages), "nothing came")
        return self

    async def ended(self) -> list[Json]:
        """Everything that came; waits for the end."""
        await asyncio.wait_for(self._reading, 30)
        return self.messages


class Held:
    """What one principal has open: a listen, a session with its stream, an old stream, a parked call, a running one."""

    def __init__(self, gateway: Running, name: str) -> None:
        self.gateway, self.headers = gateway, bearer(name)
        self.modern = gateway.modern(headers=self.headers, capabilities=ALL)

    async def open(self) -> Held:
        gateway, headers = self.gateway, self.headers
        self.listen = Tape(
            await self.modern.open(
                "subscriptions/listen", {"notifications": {"toolsListChanged": True}}
            )
        )
        self.session = await gateway.legacy(headers=headers, capabilities=ALL)
        self.stream = Tape(await self.session.listen())
        self.old = await wire.OldSse.start(f"{gateway.url}/sse", headers=headers)
        self.question = {"name": "old__act", "arguments": {"steps": [{"ask": {"k": form("?")}}]}}
        self.asked = await self.modern.request("tools/call", self.question)
        assert asking.wants(self.asked)
        self.running = Tape(await self.modern.open("tools/call", waiting(), id="running"))
        self.call = Tape(await self.session.open("tools/call", waiting(), id="call"))
        await self.running.begun()
        await self.call.begun()
        return self

    @property
    def streams(self) -> tuple[Tape, ...]:
        return self.listen, self.stream, self.running, self.call

    async def old_is_over(self) -> None:
        await asyncio.wait_for(self.old._reader, 30)

    async def stands(self) -> dict[str, bool]:
        """What of it still works. (Uses up the parked call.)"""
        answer = await self.modern.retry("tools/call", self.question, self.asked, {"k": ACCEPT})
        return {
            "listen": not self.listen.over,
            "session": await status(self.session, "ping") == 200,
            "stream": not self.stream.over,
            "old": await self._pings(),
            "parked": "result" in (answer.response or {}),
        }

    async def _pings(self) -> bool:
        target = await self.old._target
        message = b'{"jsonrpc":"2.0","method":"notifications/x"}'
        headers = {"Content-Type": "application/json", **self.headers}
        exchange = await self.old.http.request("POST", target, headers, message)
        await exchange.body()
        return exchange.status == 202 and not self.old._reader.done()


def waiting() -> Json:
    return {"name": "a__do", "arguments": {"what": "wait"}, "_meta": {"progressToken": "t"}}


EVERYTHING = dict.fromkeys(("listen", "session", "stream", "old", "parked"), True)


@promise("reload.ends")
async def test_what_a_removed_token_has_open_ends_and_what_another_has_goes_on(
    atrax: Start,
) -> None:
    gateway = await started(atrax, token("ann"), token("bob"))
    ann, bob = await Held(gateway, "ann").open(), await Held(gateway, "bob").open()

    await reload(gateway, config(token("bob")))

    for tape in ann.streams:
        await tape.ended()
    await ann.old_is_over()
    assert (await status(ann.modern), await status(ann.session, "ping")) == (401, 401)
    assert await bob.stands() == EVERYTHING
    await bob.modern.call("a__do", {"what": "release"})
    assert "result" in (await bob.running.ended())[-1]
    ann.old.close()
    bob.old.close()


@promise("reload.ends")
async def test_calls_of_who_may_not_any_more_are_cancelled_at_the_child_and_its_answers_do_not_arrive(
    atrax: Start,
) -> None:
    gateway = await started(atrax, token("ann"), token("bob"))
    ann = gateway.modern(headers=bearer("ann"), capabilities=ALL)
    question = {"name": "old__act", "arguments": {"steps": [{"ask": {"k": form("?")}}]}}
    asked = await ann.request("tools/call", question)
    running = await Tape(await ann.open("tools/call", waiting(), id="running")).begun()

    await reload(gateway, config(token("bob")))
    answer = (await running.ended())[-1]
    await reload(gateway, config(token("ann"), token("bob")))
    late = await ann.retry("tools/call", question, asked, {"k": ACCEPT})

    assert answer["error"]["code"] == 1010
    assert late.code == -32602
    count = await gateway.modern(headers=bearer("bob")).call("a__do", {"what": "cancellations"})
    assert count.text == "1"


@promise("reload.ends")
async def test_with_fewer_rights_what_was_opened_with_more_ends(atrax: Start) -> None:
    gateway = await started(atrax, token("ann"), token("bob"))
    ann = await Held(gateway, "ann").open()

    await reload(gateway, config(token("ann", servers=["a", "old"]), token("bob")))

    for tape in ann.streams:
        await tape.ended()
    await ann.old_is_over()
    assert await status(ann.session, "ping") == 404
    late = await ann.modern.retry("tools/call", ann.question, ann.asked, {"k": ACCEPT})
    assert late.code == -32602
    names = {tool["name"].split("__")[0] for tool in await ann.modern.list("tools")}
    assert names == {"a", "old"}
    ann.old.close()


@promise("reload.takes_over")
async def test_a_new_token_comes_in_and_more_rights_end_nothing(atrax: Start) -> None:
    gateway = await started(atrax, token("ann", servers=["a", "old"]))
    ann = await Held(gateway, "ann").open()
    assert await status(gateway.modern(headers=bearer("cyd"))) == 401

    await reload(gateway, config(token("ann"), token("cyd")))

    assert await status(gateway.modern(headers=bearer("cyd"))) == 200
    stands = await ann.stands()
    # The session has more rights now, and its stream was opened with fewer; the old transport's
    # session is that stream.
    assert stands == {**EVERYTHING, "stream": False, "old": False}
    assert await ann.session.list("prompts")
    ann.old.close()


@promise("reload.takes_over")
async def test_a_config_that_is_wrong_changes_nothing_and_is_told(atrax: Start) -> None:
    gateway = await started(atrax, token("ann"))
    ann = await Held(gateway, "ann").open()

    await reload(gateway, "{", "nothing was changed")
    await reload(gateway, {**config(token("cyd")), "limts": {}}, "nothing was changed")
    await reload(gateway, config(token("cyd", servers=["nope"])), "nothing was changed")
    await reload(gateway, {"mcpServers": SERVERS}, '"auth.type" needs a restart')

    assert any('limts: unknown key. Did you mean "limits"?' in line for line in gateway.log)
    assert await status(gateway.modern(headers=bearer("cyd"))) == 401
    assert await ann.stands() == EVERYTHING
    metrics = (await gateway.get("/metrics", bearer("ann")))[1].decode()
    assert 'atrax_events_total{event="reload.failed"} 4' in metrics
    ann.old.close()


@promise("reload.takes_over")
async def test_what_needs_a_restart_is_named(atrax: Start) -> None:
    gateway = await started(atrax, token("ann"))

    servers = {**SERVERS, "new": child("echo"), "a": child("does", "changed")}
    await reload(gateway, {**config(token("ann")), "drain": 3.0, "mcpServers": servers})

    await gateway.line(
        r"nothing new .*; these need a restart: drain, mcpServers\.a, mcpServers\.new"
    )


@promise("reload.secrets")
async def test_a_secret_of_the_new_file_is_redacted_from_then_on(atrax: Start) -> None:
    gateway = await started(atrax, token("ann"), log={"level": "debug"})

    await reload(gateway, {**config(token("ann"), token("cyd")), "log": {"level": "debug"}})
    await gateway.modern(headers=bearer("cyd")).call(f"a__{SECRETS['cyd']}")
    await gateway.line(r"a__\[redacted\]")

    assert not any(secret in line for line in gateway.log for secret in SECRETS.values())


@promise("expiry.ends")
async def test_when_a_token_expires_what_stands_on_it_ends_and_calls_may_finish(
    atrax: Start,
) -> None:
    gateway = await started(atrax, token("ann", expires=soon(12)), token("bob"))
    ann, bob = await Held(gateway, "ann").open(), await Held(gateway, "bob").open()

    await ann.listen.ended()
    await ann.stream.ended()
    await ann.old_is_over()
    await gateway.line("a parked call ended: the token that it was opened with has expired")
    assert await status(ann.modern) == 401
    assert not ann.running.over and not ann.call.over
    assert await bob.stands() == EVERYTHING
    await bob.modern.call("a__do", {"what": "release"})
    for tape in (ann.running, ann.call):
        assert "result" in (await tape.ended())[-1]
    ann.old.close()
    bob.old.close()


@promise("expiry.ends")
async def test_a_newer_token_prolongs_a_session_but_not_the_stream_of_the_older_one(
    atrax: Start,
) -> None:
    gateway = await started(atrax, token("ann", expires=soon(10)))
    session = await gateway.legacy(headers=bearer("ann"))
    stream = Tape(await session.listen())

    await reload(gateway, config({"name": "ann", "token": SECRETS["cyd"]}))
    session.headers = bearer("cyd")
    assert await status(session, "ping") == 200
    assert not stream.over

    await stream.ended()
    assert await status(session, "ping") == 200
    assert (await session.listen()).status == 200


@promise("limits.per_principal")
@pytest.mark.parametrize("era", ["modern", "legacy"])
async def test_who_calls_too_often_gets_429_and_another_principal_does_not(
    atrax: Start, era: str
) -> None:
    gateway = await started(atrax, token("ann"), token("bob"), limits={"rate": 3, "inflight": 2})

    async def client(name: str) -> wire.Modern | wire.Legacy:
        if era == "modern":
            return gateway.modern(headers=bearer(name))
        return await gateway.legacy(headers=bearer(name))

    ann, bob = await client("ann"), await client("bob")
    echo = {"what": "echo", "text": "x"}
    for _ in range(3):
        assert (await ann.call("a__do", echo)).text == "x"
    refused = await ann.call("a__do", echo)
    assert (await bob.call("a__do", echo)).text == "x"
    held = [asyncio.ensure_future(bob.call("a__do", {"what": "wait"})) for _ in range(2)]
    await eventually(lambda: _in_flight(gateway, 2), "they do not run")
    crowded = await bob.call("a__do", echo)
    for task in held:
        task.cancel()

    for answer, code in ((refused, 1012), (crowded, 1011)):
        assert (answer.status, answer.code) == (429, code)
        assert int(answer.headers["retry-after"]) >= 1
    metrics = (await gateway.get("/metrics", bearer("ann")))[1].decode()
    assert 'atrax_events_total{event="rate.refused"} 2' in metrics


def test_what_is_remembered_of_rates_is_bounded() -> None:
    """With OAuth anybody whom the issuer knows is a principal."""
    middle = Middle({})
    gateway = program.Gateway(
        middle.config, middle.record, middle.catalogue, middle.subscriptions,
        program.Policy(middle.record), middle.pool, middle.time, middle.tasks,
    )  # fmt: skip

    for number in range(1000):
        middle.time.now = float(number)
        assert gateway._wait(f"user-{number}", 1.0, False) == 0
        assert gateway._wait(f"user-{number}", 1.0, False) == 61

    assert len(gateway._rates) <= 60


async def test_a_state_that_is_sent_again_and_again_is_held_to_the_rate(atrax: Start) -> None:
    """A further round is no new call, but each one reaches the child."""
    servers = {"m": child("rounds")}
    gateway = await started(atrax, token("ann"), limits={"rate": 2}, mcpServers=servers)
    ann = gateway.modern(headers=bearer("ann"), capabilities=ALL)
    params = {"name": "m__act", "arguments": {"rounds": [{"k": form("?")}]}}
    asked = await ann.request("tools/call", params)

    sent, status = 0, 200
    while status == 200 and sent < 1000:
        status = (await ann.retry("tools/call", params, asked, {"k": ACCEPT})).status
        sent += 1

    assert (status, sent > 20) == (429, True)  # ten for each call that the rate allows


async def _in_flight(gateway: Running, count: int) -> bool:
    status = json.loads((await gateway.get("/status", bearer("ann")))[1])
    return bool(status["servers"]["a"]["inFlight"] == count)


def test_a_terminal_that_is_closed_ends_it(tmp_path: Path) -> None:
    """It sends SIGHUP too; a gateway that took that for a reload would stay behind for ever."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"port": 0, "mcpServers": {"a": child("does")}}))
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, str(ARCHIVE), "serve", str(file)])
    seen = b""
    while b"Connect a client" not in seen:
        seen += os.read(terminal, 4096)
    os.kill(pid, signal.SIGHUP)
    while b"took over" not in seen:
        seen += os.read(terminal, 4096)

    os.close(terminal)

    limit = time.monotonic() + 30
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        assert time.monotonic() < limit
        time.sleep(0.05)
