"""How fast, as ratios side by side in one run: `python3 tests/bench.py [--calls 20000] [--peer NAME=URL:PID …]`.

One gateway in front of one cheap child (children/echo.py), tools/call, raw keep-alive connections on the same
machine. Steer by CPU per call of the gateway; wall clock is placement on two cores. A peer is any gateway that
you started yourself in front of the same child: it is measured in the same rounds, interleaved."""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

HERE = Path(__file__).resolve().parent
TICKS = os.sysconf("SC_CLK_TCK")
META = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "bench", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}


def cpu(pid: int) -> float:
    """Seconds of user and system time that process `pid` has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def memory(pid: int) -> float:
    """Resident megabytes of process `pid`."""
    for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


class Caller(asyncio.Protocol):
    """One keep-alive connection that calls again as soon as it has its answer, until `left` says stop."""

    def __init__(
        self,
        request: bytes,
        left: Callable[[], bool],
        times: list[float],
        over: asyncio.Future[None],
    ) -> None:
        self.request, self.left, self.times, self.over = request, left, times, over
        self.buffer, self.sent = b"", 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.call()

    def call(self) -> None:
        if not self.left():
            self.transport.close()
            if not self.over.done():
                self.over.set_result(None)
            return
        self.sent = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head = self.buffer.find(b"\r\n\r\n")
        if head < 0 or not self.whole(self.buffer[:head].lower(), head + 4):
            return
        if b" 200 " not in self.buffer[:20] or b'"error":' in self.buffer[head : head + 200]:
            raise RuntimeError(f"not an answer: {self.buffer[:600]!r}")
        self.times.append(time.perf_counter() - self.sent)
        self.buffer = b""
        self.call()

    def whole(self, head: bytes, start: int) -> bool:
        """Whether the body that begins at `start` has come; peers answer by chunked event streams."""
        if b"transfer-encoding: chunked" in head:
            return self.buffer.endswith(b"0\r\n\r\n")
        length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
        return len(self.buffer) >= start + int(length)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_exception(RuntimeError(f"the connection broke: {error}"))


def request(
    url: str, method: str, params: dict[str, object], headers: dict[str, str], meta: bool
) -> bytes:
    """One POST as bytes."""
    parts = urlsplit(url)
    if meta:
        params = {**params, "_meta": META}
    body = json.dumps({"jsonrpc": "2.0", "id": 7, "method": method, "params": params}).encode()
    lines = {
        "Host": parts.netloc,
        "Content-Type": "application/json",
        "Accept": "application/json, text/event-stream",
        "User-Agent": "bench/1.0",
        "Content-Length": str(len(body)),
        **headers,
    }
    head = f"POST {parts.path} HTTP/1.1\r\n" + "".join(
        f"{name}: {value}\r\n" for name, value in lines.items()
    )
    return head.encode() + b"\r\n" + body


def modern(url: str, method: str, params: dict[str, object]) -> bytes:
    headers = {"MCP-Protocol-Version": "2026-07-28", "Mcp-Method": method}
    if "name" in params:
        headers["Mcp-Name"] = str(params["name"])
    return request(url, method, params, headers, meta=True)


async def load(url: str, message: bytes, clients: int, calls: int) -> list[float]:
    """`calls` calls over `clients` connections; the seconds of each."""
    parts, loop = urlsplit(url), asyncio.get_running_loop()
    count, times = iter(range(calls)), []
    overs = []
    for _ in range(clients):
        over = loop.create_future()
        overs.append(over)
        maker = functools.partial(
            Caller, message, lambda: next(count, None) is not None, times, over
        )
        await loop.create_connection(maker, parts.hostname, parts.port)
    await asyncio.gather(*overs)
    return times


async def measure(url: str, pid: int, message: bytes, clients: int, calls: int) -> dict[str, float]:
    """CPU us per call of process `pid`, median us and calls per second."""
    before, began = cpu(pid), time.perf_counter()
    times = await load(url, message, clients, calls)
    took = time.perf_counter() - began
    return {
        "cpu": (cpu(pid) - before) / calls * 1e6,
        "p50": statistics.median(times) * 1e6,
        "rate": calls / took,
    }


class Running:
    """Atrax in front of the echo child, started from `command` (a checkout or an archive)."""

    def __init__(self, command: list[str], tools: int = 1) -> None:
        self.folder = tempfile.TemporaryDirectory()
        config = {
            "port": 0,
            "log": {"level": "warning"},
            "mcpServers": {
                "e": {
                    "command": sys.executable,
                    "args": ["-S", str(HERE / "children" / "echo.py")],
                    "env": {"TOOLS": str(tools)},
                }
            },
        }
        path = Path(self.folder.name, "config.json")
        path.write_text(json.dumps(config))
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            [*command, "serve", str(path)], stdout=subprocess.PIPE, text=True
        )
        self.url = ""
        for line in self.process.stdout:
            if "http://" in line:
                self.url = "http://" + line.split("http://", 1)[1].split()[0]
                break
        if not self.url:
            raise SystemExit("Atrax did not start; what it said is above")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        self.folder.cleanup()


def first_answer(command: list[str]) -> float:
    """Seconds from the start of the process to its first answered call."""
    running = Running(command)
    asyncio.run(
        load(
            running.url,
            modern(running.url, "tools/call", {"name": "e__echo", "arguments": {"text": "x"}}),
            1,
            1,
        )
    )
    took = time.perf_counter() - running.began
    running.stop()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--command", default=f"{sys.executable} {HERE.parent / 'atrax.py'}")
    parser.add_argument("--peer", action="append", default=[], help="NAME=URL,PID,TOOL")
    options = parser.parse_args()
    command = options.command.split()
    running = Running(command)
    pid = running.process.pid
    idle = memory(pid)
    subjects: list[tuple[str, str, int, bytes]] = []
    echo = {"name": "e__echo", "arguments": {"text": "hello"}}
    subjects.append(
        ("atrax, modern client", running.url, pid, modern(running.url, "tools/call", echo))
    )
    for peer in options.peer:
        name, rest = peer.split("=", 1)
        url, number, tool = rest.split(",")
        call = request(
            url, "tools/call", {"name": tool, "arguments": {"text": "hello"}}, {}, meta=False
        )
        subjects.append((name, url, int(number), call))
    results: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for clients in (1, 16, 64, 256):
            for name, url, number, message in subjects:
                calls = max(options.calls // 4, 1) if clients == 1 else options.calls
                found = asyncio.run(
                    asyncio.wait_for(measure(url, number, message, clients, calls), 120)
                )
                results.setdefault((name, clients), []).append(found)
    print(f"{'':28}{'clients':>8}{'CPU us/call':>13}{'p50 us':>10}{'calls/s':>10}{'CPU ratio':>11}")
    for (name, clients), found in results.items():
        base = statistics.median(item["cpu"] for item in results[(subjects[0][0], clients)])
        row = {
            key: statistics.median(item[key] for item in found) for key in ("cpu", "p50", "rate")
        }
        print(
            f"{name:28}{clients:>8}{row['cpu']:>13.1f}{row['p50']:>10.0f}{row['rate']:>10.0f}{row['cpu'] / base:>11.2f}"
        )
    print(f"memory: idle {idle:.1f} MB, after load {memory(pid):.1f} MB")
    big = modern(running.url, "tools/call", {"name": "e__echo", "arguments": {"size": 1 << 20}})
    print(f"1 MiB results: {asyncio.run(measure(running.url, pid, big, 4, 400))['rate']:.0f} /s")
    running.stop()
    listing = Running(command, tools=500)
    message = modern(listing.url, "tools/list", {})
    print(
        f"lists of 500 tools: {asyncio.run(measure(listing.url, listing.process.pid, message, 4, 1000))['rate']:.0f} /s"
    )
    listing.stop()
    starts = [first_answer(command) for _ in range(3)]
    print(f"start to the first answered call: {statistics.median(starts):.2f} s")


if __name__ == "__main__":
    main()
