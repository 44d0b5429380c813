"""Fixtures. There are few, and each starts something real.

    atrax      a factory: `running = await atrax({"mcpServers": {…}})` is `atrax serve` in a process of its own
    children   the folder with the test servers, for configs: {"command": sys.executable, "args": [str(children / "echo.py")]}

At the end of a test every gateway is stopped; one that leaves a process behind, wrote a traceback of its own, or
shows CANARY in its log, its audit, /status or /metrics, fails the test. So does a message that is not what the version of whom it was said to allows, wherever it
was read: by our clients (wire.py) or by our children (children/tap.py). See spoken.py."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import re
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import spoken
import wire
from installed import ARCHIVE, HOME, missing

# The same examples each time: CI must not fail by luck. To look for more of them:
# python3 tests quick --hypothesis-profile=explore
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, max_examples=40)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("suite")

SOURCE = HOME / "atrax.py"
# A secret that stands in the environment of each gateway, in the `env` of each server, and in a cookie that each
# client sends. Nobody asked for it, so nobody may see it.
CANARY = f"canary-{os.urandom(12).hex()}"
wire.EXTRA["Cookie"] = f"session={CANARY}"
WAIT = 30.0  # seconds for what must happen; a limit, never a measure


class Running:
    """A gateway that runs: `url` is its origin; `log` all lines that it wrote to stdout and stderr."""

    def __init__(self, process: asyncio.subprocess.Process, config: Path) -> None:
        self.process, self.config, self.url = process, config, ""
        self.tls: ssl.SSLContext | None = None  # of clients, where `url` is https
        self.log: list[str] = []
        self.audit: Path | None = None
        self.pages: list[str] = []  # as it showed them before it was stopped
        self._news = asyncio.Condition()
        self._clients: list[wire.Modern | wire.Legacy] = []
        # They end when the process has closed its ends; `stop` waits for them.
        self._readers = [
            asyncio.create_task(self._read(stream))
            for stream in (process.stdout, process.stderr)
            if stream
        ]

    @property
    def pid(self) -> int:
        return self.process.pid

    def endpoint(self, server: str | None = None) -> str:
        """The URL that a client is given: of all servers, or of one."""
        return f"{self.url}/servers/{server}/mcp" if server else f"{self.url}/mcp"

    def modern(self, server: str | None = None, **more: Any) -> wire.Modern:
        """A modern client; `more` as for wire.Modern."""
        more.setdefault("http", wire.Http(self.url, self.tls))
        client = wire.Modern(self.endpoint(server), **more)
        self._clients.append(client)
        return client

    async def legacy(
        self, server: str | None = None, version: str = "2025-11-25", **more: Any
    ) -> wire.Legacy:
        """A legacy client with an open session; `more` as for wire.Legacy.start."""
        more.setdefault("http", wire.Http(self.url, self.tls))
        client = await wire.Legacy.start(self.endpoint(server), version, **more)
        self._clients.append(client)
        return client

    async def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        """Status and body of a GET on a connection of its own."""
        http = wire.Http(self.url, self.tls)
        try:
            return await http.get(path, headers)
        finally:
            http.close()

    async def status(self) -> Any:
        """/status, decoded."""
        return json.loads((await self.get("/status"))[1])

    async def ready(self) -> Running:
        """Wait until every server has been ready once or has failed its first start."""
        await eventually(self._is_ready, "/ready is not 200")
        return self

    async def _is_ready(self) -> bool:
        return (await self.get("/ready"))[0] == 200

    async def line(self, pattern: str) -> re.Match[str]:
        """Wait for a line of the log, past or to come."""
        seen = 0

        def found() -> re.Match[str] | None:
            nonlocal seen
            lines, seen = self.log[seen:], len(self.log)
            return next((match for line in lines if (match := re.search(pattern, line))), None)

        async with self._news:
            while (match := found()) is None:
                if all(reader.done() for reader in self._readers):
                    raise AssertionError(f"Atrax ended without a line like {pattern!r}:\n{self}")
                try:
                    await asyncio.wait_for(self._news.wait(), WAIT)
                except TimeoutError:
                    raise AssertionError(f"no line like {pattern!r} in:\n{self}") from None
        return match

    def leaks(self) -> list[str]:
        """Where CANARY was to be seen: lines of the log and of the audit, and pages."""
        kept = self.audit.read_text().splitlines() if self.audit and self.audit.is_file() else []
        return [text for text in (*self.log, *self.pages, *kept) if CANARY in text]

    async def _look(self) -> None:
        """Keep what the pages show. Not every gateway has some to show to us."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(2):
                for path in ("/status", "/metrics"):
                    self.pages.append((await self.get(path))[1].decode())

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """End it by a signal, in order; its exit code."""
        if self.process.returncode is None and self.url:
            await self._look()
        for client in self._clients:
            client.close()
        if self.process.returncode is None:
            self.process.send_signal(number)
        try:
            code = await asyncio.wait_for(self.process.wait(), WAIT)
        except TimeoutError:
            self.process.kill()
            raise AssertionError(f"Atrax did not stop within {WAIT} s:\n{self}") from None
        # A child that was left behind may hold our pipe: it is found and named by the caller.
        await asyncio.wait(self._readers, timeout=2)
        return code

    def kill(self) -> None:
        self.process.kill()

    async def _read(self, stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            async with self._news:
                self.log.append(line.decode(errors="replace").rstrip("\n"))
                self._news.notify_all()
        async with self._news:
            self._news.notify_all()

    def __str__(self) -> str:
        return "\n".join(self.log)


Start = Callable[..., Awaitable[Running]]
TAPS: list[spoken.Taps] = []  # of the gateways that run


@pytest.fixture(autouse=True)
def heard() -> Iterator[list[spoken.Peer]]:
    """All clients of the test, which check what they hear. A complaint fails the test, even if it was raised in
    a task that nobody waits for; a test that means it clears it (`spoken.Peer.complaints`). What the children of a
    gateway that outlives the test have heard in it fails it too."""
    peers: list[spoken.Peer] = []

    def listener(version: str | None) -> wire.Ear:
        peers.append(spoken.Peer(client=True, version=version))
        return peers[-1]

    before, wire.listener = wire.listener, listener
    yield peers
    wire.listener = before
    complaints = [text for peer in peers for text in peer.complaints]
    complaints += [text for taps in TAPS for text in taps.complaints()]
    assert not complaints, "\n\n".join(complaints)


@pytest.fixture
async def atrax(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts gateways: `await atrax(config, *options, program=…, env=None, judged=True, tls=None, …)` → Running, listening.

    `config` is a dict, or the path of a file. A port is chosen by the system unless the config has one.
    `program` is what to run in place of atrax.py, as the fixture `archive`. What is said to the test servers is
    judged by spoken.py, unless it is broken on purpose."""
    async with starting(tmp_path) as start:
        yield start


@contextlib.asynccontextmanager
async def starting(folder: Path) -> AsyncIterator[Start]:
    """What the fixture `atrax` gives, for a fixture that lives longer; configs are written to `folder`."""
    gateways: list[Running] = []
    taps = spoken.Taps(folder / "said")
    TAPS.append(taps)
    before = {pid for pid, _ in descendants()}
    adopt_orphans(True)

    async def start(
        config: Any,
        *options: str,
        program: Path = ARCHIVE,  # what users run; it starts in half the time of a checkout
        env: dict[str, str] | None = None,
        judged: bool = True,
        tls: ssl.SSLContext | None = None,
        python: str = sys.executable,
        user: int | None = None,  # who runs it, where not we
    ) -> Running:
        file = config if isinstance(config, Path) else folder / f"config{len(gateways)}.json"
        if not isinstance(config, Path):
            config = planted(tapped(config, taps.folder) if judged else config)
            file.write_text(json.dumps({"port": 0, **config}))
        process = await asyncio.create_subprocess_exec(
            *(python, str(program), "serve", str(file), *options),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "ATRAX_CANARY": CANARY, **(env or {})},
            limit=wire.LIMIT,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )
        gateway = Running(process, file)
        gateway.tls = tls
        if isinstance(config, dict) and "audit" in config.get("log", {}):
            gateway.audit = Path(config["log"]["audit"])
        gateways.append(gateway)
        socket = config.get("socket") if isinstance(config, dict) else None
        if socket:
            await eventually(lambda: Path(socket).exists(), f"no socket {socket}:\n{gateway}")
        # The first line of the screen: a line of the log may name another URL before it.
        match = None if socket else await gateway.line(r"^Atrax \S+ +(https?://[\w.\[\]:-]+)")
        gateway.url = f"unix:{socket}" if match is None else match[1]
        return gateway

    left: list[str] = []
    try:
        yield start
        for gateway in gateways:
            await gateway.stop()
    finally:
        left = await end_of_all(before)
        adopt_orphans(False)
        TAPS.remove(taps)
    assert not left, "processes were left behind:\n" + "\n".join(left)
    # A child's own traceback stands behind its name in the log; one at the start of a line is ours.
    for gateway in gateways:
        assert not any(line.startswith("Traceback (most") for line in gateway.log), str(gateway)
        assert not gateway.leaks(), gateway.leaks()
    malformed = list(taps.complaints())
    assert not malformed, "\n\n".join(malformed)


def child(name: str, *arguments: str, **more: Any) -> dict[str, Any]:
    """The `mcpServers` entry of the test server NAME.py in tests/children; `more` are keys of the entry."""
    script = str(HOME / "tests" / "children" / f"{name}.py")
    # -S: they need nothing but the standard library, and fifty of them start in half the time.
    return {"command": sys.executable, "args": ["-S", script, *arguments], **more}


def tapped(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`config` with its test servers run by children/tap.py, which writes what they hear to `folder`."""
    ours = str(HOME / "tests" / "children") + os.sep

    def entry(server: dict[str, Any]) -> dict[str, Any]:
        arguments = server.get("args", ())
        script = next(
            (index for index, one in enumerate(arguments) if str(one).startswith(ours)), None
        )
        if script is None or script > 1:
            return server
        tap = [ours + "tap.py", str(folder)]
        return {**server, "args": [*arguments[:script], *tap, *arguments[script:]]}

    servers = config.get("mcpServers", {})
    return {**config, "mcpServers": {name: entry(server) for name, server in servers.items()}}


def planted(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with CANARY among the secrets of each server."""

    def entry(server: Any) -> Any:
        env = server.get("env", {}) if isinstance(server, dict) else None
        if not isinstance(env, dict):
            return server  # wrong on purpose
        return {**server, "env": {"CANARY": CANARY, **env}}

    servers = config.get("mcpServers", {})
    return {**config, "mcpServers": {name: entry(server) for name, server in servers.items()}}


@pytest.fixture(scope="session")
def children() -> Path:
    """The folder of the test servers, each with one habit."""
    return HOME / "tests" / "children"


@pytest.fixture(scope="session")
def archive() -> Path:
    """atrax.pyz, which `python3 tests` has built."""
    assert ARCHIVE.exists(), "atrax.pyz is not built: python3 build_zipapp.py"
    return ARCHIVE


async def eventually(
    condition: Callable[[], Awaitable[bool] | bool], message: str, within: float = WAIT
) -> None:
    """Wait until `condition` holds, asking again and again; for what sends no event of its own."""
    limit = time.monotonic() + within
    while True:
        holds = condition()
        if await holds if isinstance(holds, Awaitable) else holds:
            return
        assert time.monotonic() < limit, message
        await asyncio.sleep(0.02)


def adopt_orphans(adopt: bool) -> None:
    """Whether an orphan below us becomes our child, so that none can hide (Linux: a subreaper)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, int(adopt), 0, 0, 0)


def alive(pid: int) -> bool:
    """Whether `pid` runs. An adopted orphan that has ended is a zombie until we end: that is dead."""
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
            != "Z"
        )
    except OSError:
        return False


def descendants() -> Iterator[tuple[int, str]]:
    """Pid and command line of all our living descendants (Linux)."""
    if sys.platform != "linux":
        return
    parents: dict[int, list[int]] = {}
    zombies = set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            state, parent = (
                Path(f"/proc/{entry}/stat")
                .read_text(errors="replace")
                .rpartition(")")[2]
                .split()[:2]
            )
            parents.setdefault(int(parent), []).append(int(entry))
            if state == "Z":
                zombies.add(int(entry))
    found = list(parents.get(os.getpid(), ()))
    for pid in found:  # grows as it is walked
        found += parents.get(pid, ())
        if pid not in zombies:
            with contextlib.suppress(OSError):
                yield (
                    pid,
                    Path(f"/proc/{pid}/cmdline")
                    .read_bytes()
                    .replace(b"\0", b" ")
                    .decode(errors="replace"),
                )


async def end_of_all(before: set[int]) -> list[str]:
    """What is still there of the processes started since `before`; it is killed."""

    def left() -> list[tuple[int, str]]:
        return [(pid, command) for pid, command in descendants() if pid not in before]

    # One that was killed is gone a moment after the gateway is: its end is not ours to wait for.
    with contextlib.suppress(AssertionError):
        await eventually(lambda: not left(), "", within=3)
    remains = left()
    for pid, _ in remains:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [f"{pid}: {command}" for pid, command in remains]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What cannot be had skips a test on a person's machine, and fails it where everything must be there."""
    for mark in item.iter_markers("needs_install"):
        for why in filter(None, map(missing, mark.args)):
            (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
