"""The check of every message (spoken.py): what is wrong fails the test that caused it, and what is right passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import spoken
from conftest import SOURCE, child, starting
from spoken import MODERN, Malformed, Peer

Json = Any
OLD, NEW = "2025-11-25", MODERN
TEXT = {"content": [{"type": "text", "text": "x"}]}
META = {
    "io.modelcontextprotocol/protocolVersion": NEW,
    "io.modelcontextprotocol/clientInfo": {"name": "a", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}
CALL = {"name": "t", "arguments": {}}
LISTED = {"resultType": "complete", "tools": [], "ttlMs": 0, "cacheScope": "private"}


def asked(method: str, params: Json = None, ident: Json = 1) -> Json:
    return {"jsonrpc": "2.0", "id": ident, "method": method, "params": params or {}}


def result(value: Json, ident: Json = 1) -> Json:
    return {"jsonrpc": "2.0", "id": ident, "result": value}


def error(code: int, data: Json = None) -> Json:
    return {"jsonrpc": "2.0", "id": 1, "error": {"code": code, "message": "m", "data": data}}


def told(method: str, params: Json = None) -> Json:
    return {"jsonrpc": "2.0", "method": method, "params": params or {}}


FORM = {"message": "m", "requestedSchema": {"type": "object", "properties": {}}}
INITIALIZED = told("notifications/initialized")

# Who hears it, in which version; what the peer said before; what Atrax says.
RIGHT: dict[str, tuple[bool, str, list[Json], list[Json]]] = {
    "a legacy result": (True, OLD, [asked("tools/call", CALL)], [result(TEXT)]),
    "a modern result": (
        True,
        NEW,
        [asked("tools/call", CALL)],
        [result({"resultType": "complete", **TEXT})],
    ),
    "a list": (True, NEW, [asked("tools/list")], [result(LISTED)]),
    "an error without an id": (True, OLD, [], [{**error(-32700), "id": None}]),
    "an ask": (True, OLD, [], [asked("elicitation/create", FORM)]),
    "a log message": (True, NEW, [], [told("notifications/message", {"level": "info", "data": 1})]),
    "a batch": (True, "2025-03-26", [asked("ping")], [[result({})]]),
    "a task": (
        True,
        NEW,
        [asked("tools/call", CALL)],
        [result({"resultType": "task", "taskId": "1"})],
    ),
    "a call": (False, OLD, [], [INITIALIZED, asked("tools/call", CALL)]),
    "a modern call": (False, NEW, [], [asked("tools/call", {**CALL, "_meta": META})]),
    "an answer": (False, OLD, [asked("elicitation/create", FORM)], [result({"action": "cancel"})]),
    "an extension": (False, NEW, [], [asked("theirs/own", {"_meta": META})]),
}
WRONG: dict[str, tuple[bool, str, list[Json], list[Json]]] = {
    "no version of JSON-RPC": (True, OLD, [asked("ping")], [{"id": 1, "result": {}}]),
    "no object": (True, OLD, [], ["hello"]),
    "a boolean id": (True, OLD, [], [asked("ping", ident=True)]),
    "an answer to nothing": (True, OLD, [], [result({})]),
    "an id of another type": (True, OLD, [asked("ping", ident="1")], [result({}, 1)]),
    "an id twice": (True, OLD, [], [asked("ping"), asked("ping")]),
    "a batch that the version lacks": (True, OLD, [asked("ping")], [[result({})]]),
    "a result of another method": (True, OLD, [asked("tools/call", CALL)], [result({"tools": []})]),
    "no resultType": (True, NEW, [asked("tools/call", CALL)], [result(TEXT)]),
    "no ttlMs": (True, NEW, [asked("tools/list")], [result({"resultType": "complete", "tools": []})]),
    "a resultType": (True, OLD, [asked("tools/call", CALL)], [result({"resultType": "complete", **TEXT})]),
    "a modern meta": (True, OLD, [asked("tools/call", CALL)], [result({**TEXT, "_meta": META})]),
    "content that the version lacks": (
        True, "2024-11-05", [asked("tools/call", CALL)],
        [result({"content": [{"type": "audio", "data": "", "mimeType": "audio/wav"}]})],
    ),
    "a request to a modern client": (True, NEW, [], [asked("elicitation/create", FORM)]),
    "an ask that the version lacks": (True, "2024-11-05", [], [asked("elicitation/create", FORM)]),
    "a broken ask": (True, OLD, [], [asked("elicitation/create", {"message": "m"})]),
    "a removed notification": (True, NEW, [], [told("notifications/elicitation/complete", {"elicitationId": "e"})]),
    "a broken notification": (True, OLD, [], [told("notifications/progress", {"progress": 1})]),
    "a legacy code": (True, NEW, [], [error(-32002)]),
    "a reserved code": (True, NEW, [], [error(-32042)]),
    "-32021 that names nothing": (True, NEW, [], [error(-32021)]),
    "a code of Atrax's inside": (True, OLD, [], [error(1099)]),
    "a code that is no integer": (True, OLD, [], [error("1")]),  # type: ignore[arg-type]
    "a call before the greeting": (False, OLD, [], [asked("tools/call", CALL)]),
    "a call without a name": (False, OLD, [], [INITIALIZED, asked("tools/call", {"arguments": {}})]),
    "a modern call without meta": (False, NEW, [], [asked("tools/call", CALL)]),
    "a legacy method to a modern child": (False, NEW, [], [asked("ping", {"_meta": META})]),
    "a modern method to a legacy child": (False, OLD, [], [INITIALIZED, asked("subscriptions/listen", {"_meta": META})]),
    "a modern meta to a legacy child": (False, OLD, [], [INITIALIZED, asked("tools/call", {**CALL, "_meta": META})]),
    "a response to a modern child": (False, NEW, [asked("ping")], [result({})]),
    "an answer that is none": (False, OLD, [asked("elicitation/create", FORM)], [result({"action": "ok"})]),
}  # fmt: skip


def hear(case: tuple[bool, str, list[Json], list[Json]]) -> None:
    client, version, sent, heard = case
    peer = Peer(client, version)
    for message in sent:
        peer.sent(message)
    for message in heard:
        peer.heard(message)


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes(name: str) -> None:
    hear(RIGHT[name])


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found(name: str) -> None:
    with pytest.raises(Malformed):
        hear(WRONG[name])


def broken(folder: Path, right: str, wrong: str) -> Path:
    """Atrax with one line changed."""
    source = SOURCE.read_text()
    assert source.count(right) == 1, f"the line that this test breaks has changed: {right}"
    file = folder / "atrax.py"
    file.write_text(source.replace(right, wrong))
    return file


async def test_a_malformed_message_to_a_client_fails_the_test_that_caused_it(
    tmp_path: Path, heard: list[spoken.Peer]
) -> None:
    program = broken(tmp_path, """b'{"resultType":"complete"'""", """b'{"resultTypo":"complete"'""")

    async with starting(tmp_path) as start:
        gateway = await start({"mcpServers": {"a": child("echo")}}, program=program)
        with pytest.raises(Malformed, match="resultType"):
            await gateway.modern().call("a__echo", {"text": "x"})

    # A test that does not look itself is failed by its fixture, which asks for these.
    assert any("resultType" in text for peer in heard for text in peer.complaints)
    for peer in heard:
        peer.complaints.clear()


async def test_a_malformed_message_to_a_child_fails_the_test_that_caused_it(tmp_path: Path) -> None:
    program = broken(
        tmp_path, 'Notice("notifications/initialized", {})', 'Notice("notifications/ready", {})'
    )

    with pytest.raises(AssertionError, match=r"tools/list.*\n.*before notifications/initialized"):
        async with starting(tmp_path) as start:
            gateway = await start({"mcpServers": {"a": child("echo")}}, program=program)
            assert (await gateway.modern().call("a__echo", {"text": "x"})).text == "x"
