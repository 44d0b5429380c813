"""What is kept of each call: one line, whatever became of it, in a file that stops nobody."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import re
import signal
import stat
import sys
import time
from pathlib import Path
from typing import Any

import asking
import pytest
import wire
from asking import ACCEPT, ALL, Person, form
from conftest import Running, Start, child, eventually
from installed import ARCHIVE, HOME
from promises import promise

import atrax as program

pytestmark = pytest.mark.needs_install()  # `quick` has no time for all of these

Json = Any
CANARY = "canary-in-a-name-4711"


def lines(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


async def kept(path: Path, count: int) -> list[Json]:
    """The audit, once it has `count` lines."""
    await eventually(lambda: len(lines(path)) >= count, f"fewer than {count} lines in {path}")
    found = lines(path)
    assert len(found) == count, found
    return found


def digest(arguments: Json) -> str:
    """As README says it."""
    text = json.dumps(arguments, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "audit.log"


def config(file: Path, **servers: Json) -> Json:
    servers = servers or {"a": child("does")}
    return {"log": {"audit": str(file)}, "mcpServers": servers}


@promise("audit.each_call")
async def test_a_call_of_either_era_leaves_a_line_that_says_who_what_and_how_it_ended(
    atrax: Start, file: Path
) -> None:
    gateway = await atrax(config(file))
    arguments = {"what": "echo", "text": "hör\u00ad zu"}

    began = time.time()
    modern = await gateway.modern().call("a__do", arguments)
    legacy = await (await gateway.legacy("a")).call("do", arguments)

    first, second = await kept(file, 2)
    for answer, line, era in ((modern, first, "modern"), (legacy, second, "legacy")):
        assert began - 1 < line.pop("time") < time.time() + 1
        assert 0 <= line.pop("ms") < 60_000
        assert line.pop("request") == answer.headers["x-request-id"]
        assert line.pop("bytes") >= len(answer.text)
        assert line == {
            "principal": "anonymous",
            "address": "127.0.0.1",
            "era": era,
            "server": "a",
            "method": "tools/call",
            "name": "a__do",
            "digest": digest(arguments),
            "outcome": "ok",
            "code": None,
        }
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


async def test_prompts_and_resources_have_lines_and_lists_have_none(
    atrax: Start, file: Path
) -> None:
    gateway = await (await atrax(config(file, all=child("legacy")))).ready()
    client = gateway.modern()
    uri = (await client.list("resources"))[0]["uri"]
    await client.list("tools")

    await client.request("resources/read", {"uri": uri})
    await client.request("prompts/get", {"name": "all__nope"})

    found = [(line["method"], line["name"], line["outcome"]) for line in await kept(file, 2)]
    assert found == [("resources/read", uri, "ok"), ("prompts/get", "all__nope", "error")]


@promise("audit.each_call")
async def test_what_was_refused_has_a_line_too(atrax: Start, file: Path, tmp_path: Path) -> None:
    schema = {"t": {"type": "object", "properties": {"path": {"type": "string"}}}}
    server = child("schemas", json.dumps(schema), paths={"dirs": [str(tmp_path)]})
    gateway = await (await atrax(config(file, s=server, a=child("does")))).ready()
    client = gateway.modern()

    await client.call("s__unknown")
    await client.call("s__t", {"path": 1})
    await client.call("s__t", {"path": "/etc/passwd"})
    await client.call("a__do", {"what": "last", "nonsense": []})
    await client.request("x/unknown", {"about": 1})

    found = [
        (line["server"], line["name"], line["outcome"], line["code"])
        for line in await kept(file, 5)
    ]
    assert found[:3] == [
        ("", "s__unknown", "error", -32602),
        ("s", "s__t", "isError", None),
        ("s", "s__t", "isError", None),
    ]
    assert found[4] == ("", "", "error", -32601)


async def test_a_cancelled_call_is_cancelled_and_one_whose_child_died_has_its_code(
    atrax: Start, file: Path
) -> None:
    gateway = await (await atrax(config(file))).ready()

    exchange = await gateway.modern().open(
        "tools/call",
        {"name": "a__do", "arguments": {"what": "wait"}, "_meta": {"progressToken": "t"}},
    )
    exchange.connection.abort()
    await kept(file, 1)
    await gateway.modern().call("a__do", {"what": "die"})

    found = [(line["outcome"], line["code"]) for line in await kept(file, 2)]
    assert found == [("cancelled", None), ("error", program.CHILD_DIED)]


@promise("audit.rounds")
async def test_a_call_that_parks_has_one_line_at_its_end(atrax: Start, file: Path) -> None:
    gateway = await (await atrax(config(file, old=child("asks")))).ready()
    steps = [{"ask": {"one": form("one?")}}, {"ask": {"two": form("two?")}}]

    done = await Person({"elicitation/create": lambda _: ACCEPT}).act(
        gateway.modern(capabilities=ALL), "old__act", {"steps": steps}
    )

    assert done.rounds == 2
    (line,) = await kept(file, 1)
    assert (line["outcome"], line["digest"]) == ("ok", digest({"steps": steps}))


@promise("audit.rounds")
@pytest.mark.parametrize("era", ["modern", "legacy"])
async def test_a_modern_child_that_asks_has_a_line_for_the_first_round_and_one_for_the_end(
    atrax: Start, file: Path, era: str
) -> None:
    gateway = await (await atrax(config(file, new=child("rounds")))).ready()
    client: wire.Modern | wire.Legacy = (
        gateway.modern(capabilities=ALL)
        if era == "modern"
        else await gateway.legacy(capabilities=ALL)
    )
    rounds = [{f"k{at}": form(f"{at}?")} for at in range(3)]

    done = await Person({"elicitation/create": lambda _: ACCEPT}).act(
        client, "new__act", {"rounds": rounds}
    )

    assert len(done.asks) == 3
    found = [(line["outcome"], line["name"]) for line in await kept(file, 2)]
    assert found == [("input_required", "new__act"), ("ok", "new__act")]
    assert len({line["digest"] for line in lines(file)}) == 1


async def test_a_client_that_never_comes_back_has_left_its_line(atrax: Start, file: Path) -> None:
    gateway = await (await atrax(config(file, new=child("rounds")))).ready()

    answer = await gateway.modern(capabilities=ALL).call("new__act", {"rounds": [{"k": form("?")}]})

    assert asking.wants(answer)
    (line,) = await kept(file, 1)
    assert line["outcome"] == "input_required"


@promise("audit.redacted")
async def test_a_secret_in_a_name_is_redacted(atrax: Start, file: Path) -> None:
    server = child("does", env={"KEY": CANARY})
    gateway = await (await atrax(config(file, a=server))).ready()

    await gateway.modern().call(f"a__{CANARY}")
    await gateway.modern().request("resources/read", {"uri": f"x://{CANARY}/"})

    await kept(file, 2)
    assert CANARY not in file.read_text() and "[redacted]" in file.read_text()


@promise("audit.rotated")
async def test_at_sighup_it_goes_on_in_the_file_that_has_the_name_then(
    atrax: Start, file: Path
) -> None:
    file.write_text('{"before": true}\n')
    gateway = await atrax(config(file))
    await gateway.modern().call("a__do", {"what": "echo", "text": "old"})
    await kept(file, 2)

    old = file.rename(file.with_suffix(".1"))
    gateway.process.send_signal(signal.SIGHUP)
    await eventually(file.exists, "there is no new file")
    await gateway.modern().call("a__do", {"what": "echo", "text": "new"})

    (line,) = await kept(file, 1)
    assert line["digest"] == digest({"what": "echo", "text": "new"})
    assert len(lines(old)) == 2


async def failures(gateway: Running) -> int:
    text = (await gateway.get("/metrics"))[1].decode()
    found = re.search(r'atrax_events_total\{event="audit.failed"\} (\d+)', text)
    assert found, "it is not counted from 0 on"
    return int(found[1])


@promise("audit.stops_nobody")
async def test_a_full_disk_is_reported_and_stops_nobody(atrax: Start) -> None:
    gateway = await atrax(config(Path("/dev/full")))
    assert await failures(gateway) == 0

    for text in ("one", "two", "three"):
        answer = await gateway.modern().call("a__do", {"what": "echo", "text": text})
        assert answer.text == text

    await gateway.line("/dev/full cannot be written: No space left on device; .* lines wait")
    assert await failures(gateway) == 1
    assert await gateway.stop() == 0


@promise("audit.stops_nobody")
async def test_what_waits_for_a_directory_that_vanished_is_written_when_it_is_back(
    atrax: Start, tmp_path: Path
) -> None:
    file = tmp_path / "logs" / "audit.log"
    file.parent.mkdir()
    gateway = await atrax(config(file))
    file.unlink()
    file.parent.rmdir()

    for text in ("one", "two"):
        await gateway.modern().call("a__do", {"what": "echo", "text": text})
    await gateway.line("cannot be written: No such file or directory")
    file.parent.mkdir()

    found = await kept(file, 2)
    assert [line["digest"] for line in found] == [
        digest({"what": "echo", "text": text}) for text in ("one", "two")
    ]
    await gateway.line("can be written again")


async def test_at_the_end_the_rest_is_written(atrax: Start, file: Path) -> None:
    gateway = await (await atrax(config(file))).ready()
    client = gateway.modern()
    waiting = asyncio.ensure_future(client.call("a__do", {"what": "wait"}))
    await eventually(lambda: _in_flight(gateway), "it never came")

    await gateway.stop(signal.SIGINT)

    waiting.cancel()
    (line,) = lines(file)
    assert line["outcome"] == "cancelled"


async def _in_flight(gateway: Running) -> bool:
    return bool((await gateway.status())["servers"]["a"]["inFlight"])


@pytest.mark.parametrize("path", ["/nonexistent/audit.log", "/", "pipe"])
async def test_a_path_that_cannot_be_opened_is_refused_at_start_and_says_why(
    tmp_path: Path, path: str
) -> None:
    os.mkfifo(tmp_path / "pipe")  # that nobody reads: to open it would wait for ever
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"port": 0, **config(Path(path))}))

    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ARCHIVE), "serve", str(file)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    _, error = await process.communicate()

    assert process.returncode == 2
    reason = {"/": "Is a directory", "pipe": "No such device"}.get(path, "No such file")
    assert re.match(rf"log\.audit: \S+ cannot be opened: {reason}", error.decode())


def test_the_keys_of_large_arguments_are_not_sorted() -> None:
    """Sorting 400,000 of them would hold the loop six times as long as reading them."""

    def kept(arguments: Json) -> str:
        params = {"name": "a__b", "arguments": arguments}
        call = program.Call("tools/call", params, program.ANONYMOUS, program.MODERN, "")
        return program.Account.of(call, 0.0).digest

    small, large = {"b": 1, "a": 2}, {"b": "x" * program.SORTED, "a": 2}
    as_sent = hashlib.sha256(json.dumps(large, separators=(",", ":")).encode()).hexdigest()
    assert kept(small) == digest(small)
    assert kept(large) == f"sha256:{as_sent}"


@pytest.mark.parametrize("char", ["\x7f", "\x9b", "\u2028", "\u202e", "\U000e0041"])
def test_what_drives_a_terminal_is_escaped_in_json_lines(tmp_path: Path, char: str) -> None:
    """Whoever looks at the file with `cat` runs what stands in it."""
    fields = {"name": f"é{char}[31m", "message": ""}
    event = program.Event(1.0, program.AUDITED, "error", fields)
    audit = program.Audit(str(tmp_path / "audit"), program.Record())
    audit(event)
    audit.close(10)
    with (tmp_path / "log").open("w") as stream:
        log = program.Log("info", "json", stream)
        log(event)
        log.close(10)
    for name in ("audit", "log"):
        line = (tmp_path / name).read_text()
        assert char not in line and "é" in line
        assert json.loads(line)["name"] == fields["name"]


def test_a_name_or_method_of_any_length_is_cut() -> None:
    """Ten thousand lines may wait for the disk, and a body has 4 MiB."""
    call = program.Call("x" * 9999, {"name": "y" * 9999}, program.ANONYMOUS, "2025-11-25", "")
    account = program.Account.of(call, 0.0)
    assert (len(account.method), len(account.name)) == (program.NAME_SHOWN, program.NAME_SHOWN)


# ---- The writer itself, on real files ----


def happened(number: int) -> program.Event:
    return program.Event(time.time(), program.AUDITED, "debug", {"number": number, "pad": "x" * 90})


def test_lines_stay_whole_through_short_writes_and_a_rotation(tmp_path: Path) -> None:
    """A pipe takes what fits: 4 KiB here, in the middle of a line."""
    file = tmp_path / "pipe"
    os.mkfifo(file)
    reader = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, 1031, 4096)  # F_SETPIPE_SZ
    record = program.Record()
    audit = program.Audit(str(file), record)
    for number in range(200):
        audit(happened(number))

    def drained() -> bytes:
        try:
            return os.read(reader, 3000)
        except BlockingIOError:
            return b""

    read = b""
    limit = time.monotonic() + 30
    while read.count(b"\n") < 100:
        audit.wake(time.monotonic())
        read += drained()
        assert time.monotonic() < limit
    file.rename(tmp_path / "old")
    audit.reopen()
    audit.close(10)
    while more := drained():
        read += more
    os.close(reader)

    before = read.decode().split("\n")
    after = file.read_text().splitlines()
    numbers = [json.loads(line)["number"] for line in (*before[:-1], *after)]
    assert numbers == list(range(200))


def test_what_does_not_fit_is_counted_and_the_file_says_where_it_is_missing(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    file = folder / "audit.log"
    record = program.Record()
    seen: list[program.Event] = []
    record.watch(seen.append)
    audit = program.Audit(str(file), record)
    file.unlink()
    folder.rmdir()

    for number in range(program.AUDIT_LINES + 7):
        audit(happened(number))
    limit = time.monotonic() + 30
    while not seen:
        audit.wake(time.monotonic())
        assert time.monotonic() < limit
    folder.mkdir()
    while not file.exists() or len(file.read_text().splitlines()) < program.AUDIT_LINES:
        audit.wake(time.monotonic())
        assert time.monotonic() < limit
    audit(happened(-1))
    audit.close(10)

    assert (seen[0].name, seen[0].fields["lost"]) == ("audit.failed", 7)
    *kept, gap, last = lines(file)
    assert [line["number"] for line in kept] == list(range(program.AUDIT_LINES))
    assert (gap["event"], gap["lost"], last["number"]) == ("audit.failed", 7, -1)


async def test_without_an_audit_a_call_makes_no_event(atrax: Start) -> None:
    gateway = await atrax({"mcpServers": {"a": child("does")}})

    await gateway.modern().call("a__do", {"what": "echo", "text": "x"})

    assert b'event="call.ended"' not in (await gateway.get("/metrics"))[1]


# ---- Events by name ----


@promise("events.stable")
def test_the_security_events_are_those_that_security_md_names_and_each_is_raised_somewhere() -> (
    None
):
    security = (HOME / "SECURITY.md").read_text()
    shown = security.split("<!-- events -->\n")[1].split("<!-- /events -->")[0]
    rows = [f"| `{name}` | {meaning} |" for name, meaning in program.ALARMS.items()]
    assert shown.splitlines() == ["| event | meaning |", "|---|---|", *rows]

    source = (HOME / "atrax.py").read_text()
    assert [name for name in program.ALARMS if source.count(f'"{name}"') < 2] == []


@promise("events.stable")
def test_every_event_has_a_dotted_name() -> None:
    source = (HOME / "atrax.py").read_text()
    names = re.findall(r'\.(?:emit|alarm)\(\s*"([^"]*)"', source)
    assert len(names) > 15
    assert [name for name in names if not re.fullmatch(r"[a-z]+\.[a-z_]+", name)] == []


@promise("events.stable")
async def test_an_alarm_is_counted_each_time_and_told_ten_times_a_minute(atrax: Start) -> None:
    gateway = await atrax({"log": {"format": "json"}, "mcpServers": {"a": child("does")}})

    for _ in range(30):
        status, _body = await gateway.get("/mcp", {"Host": "evil.example"})
        assert status == 403

    text = (await gateway.get("/metrics"))[1].decode()
    assert 'atrax_events_total{event="host.refused"} 30' in text
    told = [json.loads(line) for line in gateway.log if '"host.refused"' in line]
    assert len(told) == 10
    assert told[0]["level"] == "warning" and told[0]["request"] and told[0]["address"]


# ---- The id of a request ----


@promise("request.id")
async def test_every_answer_has_an_id_of_its_own_which_the_log_has_too(atrax: Start) -> None:
    gateway = await atrax(
        {"log": {"format": "json", "level": "debug"}, "mcpServers": {"a": child("does")}}
    )
    http = wire.Http(gateway.url)
    ids = []
    for target in ("/health", "/nope", "/mcp"):
        exchange = await http.request("GET", target, {"X-Request-Id": "chosen-by-the-client"})
        await exchange.body()
        ids.append(exchange.headers["x-request-id"])
    connection = await wire.Connection.to(gateway.url)
    connection.writer.write(b"GARBAGE\r\n\r\n")
    answer = (await connection.reader.read()).decode()
    ids += re.findall(r"X-Request-Id: (\S+)", answer)
    connection.close()
    http.close()
    stream = await (await gateway.legacy()).listen()
    ids.append(stream.headers["x-request-id"])

    assert answer.startswith("HTTP/1.1 400")
    assert len(set(ids)) == 5 and "chosen-by-the-client" not in ids
    assert len({ident.rpartition("-")[0] for ident in ids}) == 1
    for ident in ids[1:4]:
        await gateway.line(f'"http.refused","request":"{ident}"')


async def test_an_id_that_a_trusted_proxy_made_is_taken_over_if_it_is_harmless(
    atrax: Start,
) -> None:
    gateway = await atrax({"trusted_proxies": ["127.0.0.1"], "mcpServers": {"a": child("does")}})
    http = wire.Http(gateway.url)

    got = []
    for ident in ("b4f1c2d3-proxy", "short", 'quoted"id"', "x" * 65):
        exchange = await http.request("GET", "/status", {"X-Request-Id": ident})
        await exchange.body()
        got.append(exchange.headers["x-request-id"] == ident)
    http.close()

    assert got == [True, False, False, False]
