"""Fifty servers, ten of them broken in ten ways: the forty others are served as if the ten were not there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SOURCE, Running, Start, child, eventually
from promises import promise

pytestmark = pytest.mark.needs_install()  # `quick` has no time for all of these

# What /status and the screens say of each. `bad-list` runs, and is broken all the same.
WRONG = {
    "missing": "no-such-command.* not found",
    "exits": "exited with 1 .*cannot open the database: no such file",
    "hangs": "did not answer within 3 s",
    "wrong-json": "did not answer within 3 s.*JSON",
    "wrong-version": "protocol version '1999-01-01'",
    "wrong-id": "did not answer within 3 s.*answered no request",
    "closes-stdout": "closed its stdout",
    "dies-after": "exited with 1",
    "endless-line": "line longer than limits.line",
    "bad-list": 'tools/list .*no list "tools"',
}
EARLY = (("starting", ""), ("ready", "legacy"))
# Odd, and to be served all the same.
ODD = ("junk", "discover-exits", "stderr-flood", "slow")
GOOD = tuple(f"good{number}" for number in range(36))


def fifty() -> dict[str, Any]:
    """The config: a broken one before every four others."""
    servers: dict[str, Any] = {}
    others = iter((*ODD, *GOOD))
    for broken in WRONG:
        late = {"start_timeout": 3} if "within 3 s" in WRONG[broken] else {}
        servers[broken] = child("broken", broken, **late)
        for name in (next(others) for _ in range(4)):
            servers[name] = child("broken", name, name)
    servers["missing"] = {"command": "no-such-command"}
    return {"mcpServers": servers, "limits": {"line": 1 << 20}}


async def served(gateway: Running, names: tuple[str, ...]) -> bool:
    servers = (await gateway.status())["servers"]
    return all(servers[name]["tools"] == 1 for name in names)


@promise("servers.side_by_side", "start.waits")
async def test_forty_are_served_while_ten_are_broken_and_one_is_slow(
    atrax: Start, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    config = fifty()
    config["mcpServers"]["slow"] = child("broken", "slow", "slow", str(seen))
    gateway = await atrax(config)
    modern, legacy = gateway.modern(), await gateway.legacy()
    # Calls to servers that have not started yet wait for them.
    early = asyncio.create_task(gateway.modern().call("slow__hello"))
    refused = asyncio.create_task(gateway.modern().call("hangs__hello"))
    prompt = (*ODD[:-1], *GOOD)
    await eventually(lambda: served(gateway, prompt), "39 of 50 are not served")

    listed = [[tool["name"] for tool in await client.list("tools")] for client in (modern, legacy)]
    answers = [await client.call(f"{name}__hello") for name in GOOD for client in (modern, legacy)]
    state = (await gateway.status())["servers"]["slow"]["state"]

    assert state == "starting" and not early.done()
    seen.touch()
    assert listed == [[f"{name}__hello" for name in prompt]] * 2
    assert [answer.text for answer in answers] == [name for name in GOOD for _ in "ab"]
    error = (await refused).error
    assert error["code"] == 1010
    assert error["data"]["atrax"]["server"] == "hangs" and error["data"]["atrax"]["retryAfter"] > 0
    assert (await early).text == "slow"
    assert [tool["name"] for tool in await modern.list("tools")] == [
        f"{name}__hello" for name in fifty()["mcpServers"] if name not in WRONG
    ]


@promise("servers.what_is_wrong")
async def test_status_says_what_is_wrong_with_each(atrax: Start) -> None:
    config = fifty()
    del config["mcpServers"]["slow"]  # shown above, and 8 s long
    gateway = await (await atrax(config)).ready()

    async def told() -> bool:
        servers = (await gateway.status())["servers"]
        said = {name: said_of(server) for name, server in servers.items()}
        untold.clear()
        untold.update(
            {name: said[name] for name in WRONG if not re.search(WRONG[name], said[name])}
        )
        untold.update({name: said[name] for name in said if name not in WRONG and said[name]})
        return not untold

    untold: dict[str, str] = {}
    with contextlib.suppress(AssertionError):  # a list is read a moment after its server is ready
        await eventually(told, "", within=3)
    assert untold == {}


def said_of(server: dict[str, Any]) -> str:
    hidden = [f"{item['kind']} {item['name']}: {item['reason']}" for item in server["hidden"]]
    return "; ".join(filter(None, [server.get("error"), server["lastError"], *hidden]))


@promise("servers.what_is_wrong")
@pytest.mark.parametrize("command", ["serve", "check"])
async def test_a_line_of_the_screen_says_what_is_wrong(
    atrax: Start, tmp_path: Path, command: str
) -> None:
    config = fifty()
    del config["mcpServers"]["slow"]
    if command == "serve":
        gateway = await atrax(config)
        await gateway.line("Connect a client")
        screen = gateway.log
    else:
        screen = await check(tmp_path, config)

    wrong = []
    for name in config["mcpServers"]:
        line = next(line for line in screen if line.startswith(f"  {name} "))
        state, _, about = line.split(maxsplit=1)[1].partition(" ")
        # The screen of `serve` waits 2 s for what it shows, `check` for everything.
        early = command == "serve" and (state, about.strip()) in EARLY
        if not early and not re.search(WRONG.get(name, "^ *legacy, 1 tool"), about):
            wrong.append(line)
    assert wrong == []


async def check(folder: Path, config: dict[str, Any]) -> list[str]:
    """What `atrax check` prints."""
    file = folder / "checked.json"
    file.write_text(json.dumps(config))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(SOURCE), "check", str(file)), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 1
    return out.decode().splitlines()
