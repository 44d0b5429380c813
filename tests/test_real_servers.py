"""Servers that are not ours, all in one config: four from npm, three from PyPI.

Two speak one era, three both; one writes files, one goes to the network, one keeps its state in a file.
Each must be served to clients of both eras as if the others were not there."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
import wire
from conftest import Running, descendants, eventually, starting
from installed import node_server, python_server
from promises import promise

Json = Any
pytestmark = [
    pytest.mark.needs_install("node", "servers", "git"),
    pytest.mark.asyncio(loop_scope="module"),
]

PAGE: Final = "A page that only this test serves."


@dataclasses.dataclass(frozen=True)
class World:
    """What the servers work on: a folder, a git repository in it, a page of HTTP."""

    folder: Path
    url: str

    @property
    def repository(self) -> Path:
        return self.folder / "repository"

    def config(self) -> Json:
        """All seven in one map, in an order in which nobody's neighbour is of its kind."""
        memory = node_server("memory") | {
            "env": {"MEMORY_FILE_PATH": str(self.folder / "memory.jsonl")}
        }
        return {
            "mcpServers": {
                "everything": node_server("everything"),
                "time": python_server("time", "--local-timezone", "UTC"),
                "filesystem": node_server("filesystem", str(self.folder)),
                "git": python_server("git", "--repository", str(self.repository)),
                "memory": memory,
                # The page lies on loopback, which it otherwise refuses.
                "fetch": python_server("fetch", "--ignore-robots-txt", "--allow-private-ips"),
                "thinking": node_server("sequential-thinking"),
            }
        }


@dataclasses.dataclass(frozen=True)
class Real:
    """What is known of a real server: its era, a tool, arguments for it, and a text of its answer."""

    era: str
    tools: int  # that it has at least
    tool: str
    arguments: Callable[[World], Json]
    answers: str  # a pattern


SERVERS: Final = {
    "everything": Real("legacy", 13, "get-sum", lambda world: {"a": 20, "b": 22}, "42"),
    "time": Real(
        "modern",
        2,
        "convert_time",
        lambda world: {"source_timezone": "UTC", "time": "12:00", "target_timezone": "Asia/Tokyo"},
        r"21:00:00\+09:00",
    ),
    "filesystem": Real(
        "legacy",
        11,
        "read_text_file",
        lambda world: {"path": str(world.folder / "note.txt")},
        "what the note says",
    ),
    "git": Real(
        "modern",
        10,
        "git_log",
        lambda world: {"repo_path": str(world.repository)},
        "The only commit",
    ),
    "memory": Real(
        "legacy",
        9,
        "create_entities",
        lambda world: {
            "entities": [{"name": "Atrax", "entityType": "gateway", "observations": ["serves"]}]
        },
        r"\[",  # the second time it creates nothing, and says so by an empty list
    ),
    "fetch": Real("modern", 1, "fetch", lambda world: {"url": world.url, "raw": True}, PAGE),
    "thinking": Real(
        "legacy",
        1,
        "sequentialthinking",
        lambda world: {
            "thought": "One is enough.",
            "thoughtNumber": 1,
            "totalThoughts": 1,
            "nextThoughtNeeded": False,
        },
        '"totalThoughts": 1',
    ),
}
every_server = pytest.mark.parametrize("server", SERVERS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A folder with a note and a repository, and a page on loopback."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "note.txt").write_text("This is what the note says.")
    git = ["git", "-c", "user.name=Test", "-c", "user.email=test@localhost", "-C"]
    git.append(str(folder / "repository"))
    subprocess.run(["git", "init", "--quiet", git[-1]], check=True)
    subprocess.run(
        [*git, "commit", "--quiet", "--allow-empty", "-m", "The only commit"], check=True
    )

    async def page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            head = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n"
            writer.write(f"{head}Content-Length: {len(PAGE)}\r\n\r\n{PAGE}".encode())
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(page, "127.0.0.1", 0) as site:
        yield World(folder, f"http://127.0.0.1:{site.sockets[0].getsockname()[1]}/page")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(world: World, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """All servers behind one gateway."""
    async with starting(tmp_path_factory.mktemp("gateway")) as start:
        yield await (await start(world.config())).ready()


async def client_of(
    gateway: Running, era: str, server: str | None = None
) -> wire.Modern | wire.Legacy:
    return gateway.modern(server) if era == "modern" else await gateway.legacy(server)


async def assert_answers(
    client: wire.Modern | wire.Legacy, server: str, world: World, prefix: str = ""
) -> None:
    """One real call of `server`, by the name that the endpoint gives its tool."""
    real = SERVERS[server]
    answer = await client.call(prefix + real.tool, real.arguments(world))
    assert not answer.result.get("isError"), answer.text
    assert re.search(real.answers, answer.text), answer.text


@promise("servers.real")
async def test_all_real_servers_are_ready_side_by_side(gateway: Running) -> None:
    servers = (await gateway.status())["servers"]

    assert {name: shown["state"] for name, shown in servers.items()} == dict.fromkeys(
        SERVERS, "ready"
    )
    assert {name: shown["era"] for name, shown in servers.items()} == {
        name: real.era for name, real in SERVERS.items()
    }


@promise("servers.real")
@pytest.mark.parametrize("era", ["modern", "legacy"])
async def test_the_lists_of_all_real_servers_are_one_list(gateway: Running, era: str) -> None:
    client = await client_of(gateway, era)

    names = [tool["name"] for tool in await client.list("tools")]

    owners = [name.partition("__")[0] for name in names]
    assert list(dict.fromkeys(owners)) == list(SERVERS)  # in config order
    assert len(names) == len(set(names))
    few = {name for name, real in SERVERS.items() if owners.count(name) < real.tools}
    assert not few, names


@promise("servers.real")
@pytest.mark.parametrize("era", ["modern", "legacy"])
@every_server
async def test_a_real_server_answers_a_real_call(
    gateway: Running, world: World, server: str, era: str
) -> None:
    await assert_answers(await client_of(gateway, era), server, world, f"{server}__")
    await assert_answers(await client_of(gateway, era, server), server, world)


@promise("servers.real")
async def test_a_real_server_that_dies_harms_no_other_and_the_end_leaves_nothing(
    world: World, tmp_path: Path
) -> None:
    before = {pid for pid, _ in descendants()}
    async with starting(tmp_path) as start:
        running = await (await start(world.config())).ready()
        client = running.modern()
        started = {pid for pid, _ in descendants()} - before - {running.pid}
        assert len(started) >= len(SERVERS)

        os.kill((await running.status())["servers"]["memory"]["pids"][0], signal.SIGKILL)
        others = [server for server in SERVERS if server != "memory"]
        await asyncio.gather(
            *(assert_answers(client, server, world, f"{server}__") for server in others)
        )
        await eventually(lambda: is_ready(running, "memory"), f"memory is not back:\n{running}")
        await assert_answers(client, "memory", world, "memory__")

        assert await running.stop() == 0, str(running)
        left = lambda: started & {pid for pid, _ in descendants()}  # noqa: E731
        await eventually(lambda: not left(), "a server was left behind", within=3)


async def is_ready(gateway: Running, server: str) -> bool:
    shown = (await gateway.status())["servers"][server]
    return shown["state"] == "ready" and shown["restarts"] > 0
