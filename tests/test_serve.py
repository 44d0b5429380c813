"""`atrax serve`, as its user sees it: the screen, every kind of client on one URL, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import socket
import sys
import termios
from pathlib import Path

import pytest
import wire
from conftest import SOURCE, Running, Start, child, eventually
from promises import promise

TWO = {"old": child("legacy"), "new": child("modern")}
VERSIONS = ("2025-03-26", "2025-06-18", "2025-11-25")


@promise("serve.screen")
async def test_the_screen_shows_the_url_each_server_and_how_to_connect(atrax: Start) -> None:
    broken = child("broken", "exits", restart={"backoff": [60, 60]})
    gateway = await atrax({"mcpServers": {**TWO, "gone": broken}})

    await gateway.line(r"claude mcp add --transport http atrax " + gateway.endpoint())

    screen = str(gateway)
    assert re.search(rf"^Atrax \S+  {gateway.endpoint()}$", screen, re.MULTILINE)
    assert re.search(
        r"^  old +ready +legacy, 30 tools, 3 resources, 5 prompts", screen, re.MULTILINE
    )
    assert re.search(
        r"^  new +ready +modern, 36 tools, 3 resources, 5 prompts", screen, re.MULTILINE
    )
    assert re.search(
        r"^  gone +backoff +.*cannot open the database: no such file", screen, re.MULTILINE
    )


async def _use(client: wire.Modern | wire.Legacy, prefix: str) -> None:
    """List, call, read, and get one error right."""
    tools = [tool["name"] for tool in await client.list("tools")]
    assert f"{prefix}greet" in tools and len(tools) == len(set(tools))
    assert (await client.call(f"{prefix}greet", {"name": "Ada"})).text == "Hello, Ada!"
    read = await client.request("resources/read", {"uri": "test://static-text"})
    assert "static text resource" in read.result["contents"][0]["text"]
    unknown = await client.call(f"{prefix}no-such-tool")
    assert unknown.code == -32602 and "no-such-tool" in unknown.error["message"]


@promise("clients.one_url")
async def test_clients_of_both_eras_use_one_url(atrax: Start) -> None:
    gateway = await (await atrax({"mcpServers": TWO})).ready()

    for server, prefixes in ((None, ("old__", "new__")), ("old", ("",)), ("new", ("",))):
        legacy = [await gateway.legacy(server, version) for version in VERSIONS]
        assert [client.version for client in legacy] == list(VERSIONS)
        for client in (gateway.modern(server), *legacy):
            for prefix in prefixes:
                await _use(client, prefix)


@promise("clients.one_url")
async def test_a_client_of_2024_uses_its_own_transport(atrax: Start) -> None:
    gateway = await (await atrax({"mcpServers": TWO})).ready()

    for path, prefix in (("/sse", "new__"), ("/servers/old/sse", ""), ("/servers/new/sse", "")):
        client = await wire.OldSse.start(gateway.url + path)
        tools = (await client.request("tools/list"))["result"]["tools"]
        greet = {"name": f"{prefix}greet", "arguments": {"name": "Ada"}}
        greeting = await client.request("tools/call", greet)
        unknown = await client.request("tools/call", {"name": "no-such-tool"})
        client.close()

        assert client.initialized["protocolVersion"] == "2024-11-05"
        assert f"{prefix}greet" in [tool["name"] for tool in tools]
        assert greeting["result"]["content"][0]["text"] == "Hello, Ada!"
        assert unknown["error"]["code"] == -32602


async def test_a_modern_server_need_not_name_itself(atrax: Start) -> None:
    """A legacy client must be told a name all the same (2025-11-25, schema: InitializeResult)."""
    nameless = child("pages", '{"modern": true, "named": false}')
    gateway = await (await atrax({"mcpServers": {"a": nameless}})).ready()

    info = (await gateway.legacy("a")).initialized["serverInfo"]

    assert info["name"] and info["version"]


async def test_what_is_not_there_is_404_and_says_where_to_look(atrax: Start) -> None:
    off = child("legacy", disabled=True)
    gateway = await atrax({"mcpServers": {"here": child("echo"), "off": off}})

    for path in ("/nope", "/servers/nope/mcp", "/servers/here", "/servers/off/mcp", "/mcp/"):
        status, body = await gateway.get(path)
        assert status == 404, path
        assert re.search(r"/mcp|/status", json.loads(body)["error"]["message"])


async def test_a_port_in_use_is_told_before_any_server_is_started(tmp_path: Path) -> None:
    mark = tmp_path / "started"
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"mcpServers": {"a": child("does", "once", str(mark))}}))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(SOURCE), "serve", str(config), "--port", port),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, error = await process.communicate()

    assert process.returncode == 2
    assert re.fullmatch(rf".*port {port} .*in use.*--port.*\n", error.decode(), re.DOTALL)
    assert out == b"" and not mark.exists()


# ---- The end ----


async def _told(gateway: Running, server: str, **order: object) -> str:
    return (await gateway.modern().call(f"{server}__do", order)).text


def _alive(pid: int) -> bool:
    """Whether `pid` runs; one that has ended and was not reaped does not."""
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
            != "Z"
        )
    except OSError:
        return False


@promise("stop.everything")
async def test_ctrl_c_ends_children_and_grandchildren_in_order(atrax: Start) -> None:
    stubborn = child("does", "stubborn")
    gateway = await atrax({"mcpServers": {"good": child("does"), "stubborn": stubborn}})
    pids = [int(await _told(gateway, name, what="pid")) for name in ("good", "stubborn")]
    pids.append(int(await _told(gateway, "good", what="fork")))
    pids.append(int(await _told(gateway, "stubborn", what="fork", escape=True)))
    waiting = asyncio.create_task(gateway.modern().call("good__do", {"what": "wait"}))
    await eventually(lambda: _in_flight(gateway, "good"), "the call is not in flight")
    assert all(map(_alive, pids))

    gateway.process.send_signal(signal.SIGINT)

    # In order: who waits is told, and its connection is not cut under it.
    assert (await waiting).code == 1010
    assert await gateway.process.wait() == 0
    left = [pid for pid in pids if _alive(pid)]
    await gateway.stop()  # reads its log to the end
    assert left == []
    stopped = next(n for n, line in enumerate(gateway.log) if "SIGINT: stopping" in line)
    assert not re.search(r"warning|error|Traceback|Exception", "\n".join(gateway.log[stopped:]))


async def _in_flight(gateway: Running, server: str, calls: int = 1) -> bool:
    return bool((await gateway.status())["servers"][server]["inFlight"] == calls)


@promise("stop.everything")
async def test_ctrl_c_at_a_terminal_ends_it_without_a_traceback(tmp_path: Path) -> None:
    """As a shell starts it: the terminal sends SIGINT to the whole foreground group."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"port": 0, "mcpServers": {"a": child("does")}}))
    leader, follower = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(SOURCE), "serve", str(config)),
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(follower)
    shown = b""
    while b"others" not in shown:
        shown += await asyncio.to_thread(os.read, leader, 65536)
    os.write(leader, b"\x03")
    with contextlib.suppress(OSError):  # EIO: the last one has closed its end
        while data := await asyncio.to_thread(os.read, leader, 65536):
            shown += data
    os.close(leader)

    assert await process.wait() == 0
    assert b"SIGINT: stopping" in shown
    assert not re.search(rb"Traceback|Exception|KeyboardInterrupt", shown)


@promise("stop.drains")
async def test_sigterm_lets_a_call_in_flight_finish(atrax: Start, tmp_path: Path) -> None:
    gateway = await atrax({"mcpServers": {"a": child("does")}})
    path = tmp_path / "go on"
    client = await gateway.legacy()
    order = {"what": "until", "path": str(path)}
    calls = [asyncio.create_task(one.call("a__do", order)) for one in (client, gateway.modern())]
    await eventually(lambda: _in_flight(gateway, "a", 2), "the calls are not in flight")

    gateway.process.send_signal(signal.SIGTERM)
    await gateway.line("SIGTERM: stopping")
    assert (await gateway.get("/ready"))[0] == 503
    path.touch()

    assert [(await call).text for call in calls] == ["it is there"] * 2
    assert await gateway.process.wait() == 0


@promise("stop.drains")
@pytest.mark.parametrize(("drain", "signals"), [(0.1, 1), (1000, 2)])
async def test_a_call_that_outlasts_the_drain_is_told(
    atrax: Start, drain: float, signals: int
) -> None:
    """The drain is over after its time, or when a second signal comes."""
    gateway = await atrax({"drain": drain, "mcpServers": {"a": child("does")}})
    clients = (gateway.modern(), await gateway.legacy())
    calls = [asyncio.create_task(one.call("a__do", {"what": "wait"})) for one in clients]
    await eventually(lambda: _in_flight(gateway, "a", 2), "the calls are not in flight")

    for _ in range(signals):
        gateway.process.send_signal(signal.SIGTERM)
        await gateway.line("SIGTERM: stopping")

    for call in calls:
        error = (await call).error
        assert error["code"] == 1010 and "stopping" in error["message"]
    assert await gateway.process.wait() == 0


@promise("stop.killed")
async def test_children_die_with_an_atrax_that_is_killed(atrax: Start) -> None:
    gateway = await atrax({"mcpServers": {"a": child("does"), "b": child("does", "stubborn")}})
    pids = [int(await _told(gateway, name, what="pid")) for name in ("a", "b")]

    gateway.kill()
    await gateway.process.wait()

    await eventually(lambda: not any(map(_alive, pids)), "children outlive Atrax", within=5)


@promise("serve.probes")
async def test_a_foreign_host_learns_whether_atrax_is_ready_and_no_names(atrax: Start) -> None:
    gateway = await (await atrax({"mcpServers": {"secret-project": child("does")}})).ready()

    for host, names in (({}, True), ({"Host": "evil.example.com"}, False)):
        status, body = await gateway.get("/ready", host)
        assert status == 200 and json.loads(body)["status"] == "ready"
        assert ("waiting" in json.loads(body)) is names
