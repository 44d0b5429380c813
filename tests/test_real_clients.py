"""Clients that are not ours, against a real server that is not ours (@modelcontextprotocol/server-everything).

Each client lists, calls, reads and gets one error right, on both endpoints; the programs are in
tests/clients. A tour is a process of the client's own SDK, as a user's client would be."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
from conftest import Running, starting
from installed import HOME, NODE, NODE_MODULES, SDK1, node_server
from promises import promise

Json = Any
pytestmark = [
    pytest.mark.needs_install("node", "sdk1"),
    pytest.mark.asyncio(loop_scope="module"),
]

LEGACY, MODERN = "2025-11-25", "2026-07-28"
# An unknown tool, in both eras (server/tools, Error Handling).
UNKNOWN: Final = -32602
CLIENTS: Final = HOME / "tests" / "clients"
INSPECTOR: Final = (
    NODE_MODULES / "@modelcontextprotocol" / "inspector/clients/launcher/build/index.js"
)
REMOTE: Final = NODE_MODULES / "mcp-remote/dist/proxy.js"
RESOURCE: Final = "demo://resource/dynamic/text/1"


@dataclasses.dataclass(frozen=True)
class Tour:
    """A client's program, its last arguments, and the version that it should end up with."""

    program: tuple[str, str]
    mode: tuple[str, ...]
    version: str
    path: str = "mcp"  # the endpoint's last part


PYTHON: Final = (sys.executable, "python_new.py")
PYTHON_1: Final = (str(SDK1), "python_old.py")
TYPESCRIPT: Final = (str(NODE), "typescript_new.mjs")
TYPESCRIPT_1: Final = (str(NODE), "typescript_old.mjs")
TOURS: Final = {
    "mcp-2.3.0-legacy": Tour(PYTHON, ("legacy",), LEGACY),
    "mcp-2.3.0-auto": Tour(PYTHON, ("auto",), MODERN),
    "mcp-2.3.0-modern": Tour(PYTHON, (MODERN,), MODERN),
    "mcp-1.30.0-http": Tour(PYTHON_1, (), LEGACY),
    "mcp-1.30.0-sse": Tour(PYTHON_1, ("sse",), LEGACY, "sse"),
    "sdk-1.32.2-http": Tour(TYPESCRIPT_1, (), LEGACY),
    "sdk-1.32.2-sse": Tour(TYPESCRIPT_1, ("sse",), LEGACY, "sse"),
    "client-2.4.0-legacy": Tour(TYPESCRIPT, ("legacy",), LEGACY),
    "client-2.4.0-auto": Tour(TYPESCRIPT, ("auto",), MODERN),
    "client-2.4.0-pinned": Tour(TYPESCRIPT, (MODERN,), MODERN),
}
# server → the prefix of its names on that endpoint
ENDPOINTS: Final = {"aggregate": (None, "everything__"), "own": ("everything", "")}
both_endpoints = pytest.mark.parametrize("endpoint", ENDPOINTS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """One gateway for all clients: they come and go, as in life."""
    async with starting(tmp_path_factory.mktemp("gateway")) as start:
        running = await start({"mcpServers": {"everything": node_server("everything")}})
        yield await running.ready()


async def output(*command: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a client's process."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=env,
    )
    try:
        printed, complained = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, printed.decode(), complained.decode()


async def take(tour: Tour, gateway: Running, endpoint: str) -> Json:
    """What the client saw on its tour."""
    server, prefix = ENDPOINTS[endpoint]
    url = gateway.endpoint(server).removesuffix("mcp") + tour.path
    interpreter, program = tour.program
    code, printed, complained = await output(
        interpreter, str(CLIENTS / program), url, prefix, *tour.mode
    )
    assert code == 0, f"{complained}\n{gateway}"
    return json.loads(printed)


def assert_is_right(seen: Json, version: str, prefix: str) -> None:
    """List, call, read and error are those of server-everything, under the names of the endpoint."""
    assert seen["version"] == version
    # 13 tools of its own, and those that it offers where somebody can be asked.
    assert {prefix + "echo", prefix + "get-sum", prefix + "trigger-elicitation-request"} <= set(
        seen["names"]
    )
    assert all(name.startswith(prefix) for name in seen["names"])
    assert len(set(seen["names"])) == len(seen["names"]) >= 13
    assert seen["echo"].startswith("Echo: from ")
    assert "Resource 1" in seen["read"]
    assert seen["error"] == UNKNOWN


@promise("clients.real")
@both_endpoints
@pytest.mark.parametrize("client", TOURS)
async def test_a_real_client_lists_calls_reads_and_gets_an_error_right(
    gateway: Running, client: str, endpoint: str
) -> None:
    tour = TOURS[client]

    seen = await take(tour, gateway, endpoint)

    assert_is_right(seen, tour.version, ENDPOINTS[endpoint][1])


@promise("clients.real")
@both_endpoints
async def test_mcp_remote_bridges_a_stdio_client(
    gateway: Running, endpoint: str, tmp_path: Path
) -> None:
    # Its state belongs to this test: in HOME it would be the user's own.
    bridge = ["env", f"MCP_REMOTE_CONFIG_DIR={tmp_path}", str(NODE), str(REMOTE)]
    bridge += [gateway.endpoint(ENDPOINTS[endpoint][0]), "--transport", "http-only"]

    seen = await take(Tour(PYTHON, (f"stdio:{shlex.join(bridge)}",), LEGACY), gateway, endpoint)

    assert_is_right(seen, LEGACY, ENDPOINTS[endpoint][1])


# ---- the Inspector: a command per request ------------------------------------------------


@promise("clients.real")
@both_endpoints
@pytest.mark.parametrize("era", ["legacy", "modern", "auto"])
async def test_the_inspector_lists_calls_reads_and_gets_errors_right(
    gateway: Running, era: str, endpoint: str, tmp_path: Path
) -> None:
    server, prefix = ENDPOINTS[endpoint]

    async def inspect(method: str, *more: str) -> tuple[int, Json]:
        code, printed, complained = await output(
            *(str(NODE), str(INSPECTOR), "--cli", gateway.endpoint(server)),
            *("--transport", "http", "--protocol-era", era, "--format", "json", "--quiet"),
            *("--method", method, *more),
            env={**os.environ, "HOME": str(tmp_path)},  # where it keeps what it knows of servers
        )
        assert printed or complained, f"{method}: nothing at all, exit {code}\n{gateway}"
        return code, json.loads(printed or complained)

    # Side by side: each is a process that mostly starts up.
    listed, called, read, missing, refused = await asyncio.gather(
        inspect("tools/list"),
        inspect("tools/call", "--tool-name", prefix + "echo", "--tool-arg", "message=hello"),
        inspect("resources/read", "--uri", RESOURCE),
        inspect("resources/read", "--uri", "demo://nothing"),
        inspect("tools/call", "--tool-name", prefix + "get-sum", "--tool-args-json", '{"a": 1}'),
    )

    assert prefix + "echo" in [tool["name"] for tool in listed[1]["result"]["tools"]]
    assert called[1]["result"]["content"] == [{"type": "text", "text": "Echo: hello"}]
    assert "Resource 1" in read[1]["result"]["contents"][0]["text"]
    assert listed[0] == called[0] == read[0] == 0
    assert missing[0] == 1
    assert "not found" in missing[1]["error"]["message"]
    assert refused[0] == 5  # its code for a tool's isError
    assert 'must have the required "b"' in refused[1]["result"]["content"][0]["text"]
