"""The client edge, both eras, without a socket: requests in, replies out, time as an argument.

The seams are Atrax's own, so a recorder stands for a Reply and a Door that a test answers by hand.
Real clients and processes are in test_four_cells and test_conformance."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from promises import promise

import atrax
from atrax import (
    META_CAPABILITIES,
    META_CLIENT,
    META_LOG_LEVEL,
    META_SERVER,
    META_SUBSCRIPTION,
    META_VERSION,
    MODERN,
    Ask,
    Call,
    Clients,
    Error,
    Grant,
    HttpError,
    HttpRequest,
    Limits,
    Notice,
    Outcome,
    Owner,
    Record,
    Scope,
)

BOTH = "application/json, text/event-stream"
FORM = {"message": "who?", "requestedSchema": {"type": "object", "properties": {}}}
CAN_ALL: dict[str, Any] = {
    "elicitation": {"form": {}, "url": {}},
    "sampling": {"tools": {}, "context": {}},
    "roots": {},
}


class Told:
    """A Reply that remembers."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.ended = False
        self.closed: Callable[[], None] | None = None
        self.stalled = False
        self.extra: Any = ()
        self.waiting = 0

    def full(self, status: int, headers: Any, body: bytes) -> None:
        self.head(status, headers)
        self.body, self.ended = body, True

    def head(self, status: int, headers: Any) -> None:
        assert self.status == 0, "a response begins once"
        self.status, self.headers = status, {name.lower(): value for name, value in headers}

    def write(self, data: bytes) -> None:
        assert self.status and not self.ended
        self.body += data

    def end(self) -> None:
        assert self.status and not self.ended
        self.ended = True

    def leave(self) -> None:
        """The client closes the connection."""
        if self.closed is not None:
            closed, self.closed = self.closed, None
            closed()

    @property
    def json(self) -> Any:
        assert self.headers["content-type"] == "application/json", self.body
        return json.loads(self.body)

    @property
    def streams(self) -> bool:
        return self.headers.get("content-type") == "text/event-stream"

    @property
    def events(self) -> list[dict[str, str]]:
        assert self.streams
        blocks = [block for block in self.body.decode().split("\n\n") if block and block != ":"]
        return [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]

    @property
    def messages(self) -> list[Any]:
        return [json.loads(event["data"]) for event in self.events if event["data"].startswith("{")]


class Opened:
    """One call that reached the door, with the handle that Clients holds."""

    def __init__(self, call: Call, sink: Any) -> None:
        self.call, self.sink = call, sink
        self.answers: list[tuple[Ask, Outcome]] = []
        self.notes: list[Notice] = []
        self.cancelled: list[str] = []
        self.over = False

    def answer(self, ask: Ask, outcome: Outcome) -> None:
        self.answers.append((ask, outcome))

    def note(self, notice: Notice) -> None:
        self.notes.append(notice)

    def cancel(self, reason: str) -> None:
        if not self.over:
            self.cancelled.append(reason)
            self.done(Outcome(error=Error(atrax.CANCELLED, reason)))

    def done(self, outcome: Outcome) -> None:
        assert not self.over, "done comes once"
        self.over = True
        self.sink.done(outcome)

    def asks(self, key: str, method: str = "elicitation/create", **params: Any) -> None:
        self.sink.ask(Ask(key, method, params or FORM))

    def result(self, result: dict[str, Any], **more: Any) -> None:
        self.done(Outcome(result=result, raw=json.dumps(result).encode(), **more))

    def fails(self, code: int, message: str = "no", data: Any = None, **more: Any) -> None:
        self.done(Outcome(error=Error(code, message, data), **more))


class Stand:
    """Clients with a door that the test holds, and a clock that it turns."""

    def __init__(self) -> None:
        self.calls: list[Opened] = []
        self.at_once: Callable[[Opened], None] | None = None
        self.time = 100.0
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.gone: list[Any] = []
        self.fallen: set[str] = set()  # principals that a reload took away
        self.judged = 0  # how often `stands` was asked
        self.expires = atrax.math.inf  # of the token that requests come with
        self.limits = Limits(sessions=3, parked=2)
        self.scope = atrax.EVERYTHING  # what comes with each request
        self.clients = Clients(
            self, self.limits, Record(), lambda: self.time, b"k" * 32, self.gone.append,
            self.later,
            atrax.check_request,
            atrax.check_answer,
            lambda: 1e9 + self.time,
            self.stands,
        )  # fmt: skip

    def stands(self, owner: Owner, now: float) -> bool:
        self.judged += 1
        return owner.principal not in self.fallen and owner.expires > now

    def open(self, call: Call, sink: Any) -> Opened:
        opened = Opened(call, sink)
        self.calls.append(opened)
        if call.method == "server/discover" and self.at_once is None:
            opened.result(DISCOVERED)
        elif self.at_once is not None:
            self.at_once(opened)
        return opened

    def later(self, delay: float, act: Callable[[], None]) -> None:
        self.timers.append((self.time + delay, act))

    def wait(self, seconds: float) -> None:
        """Let time pass, in steps as section Atrax does."""
        end = self.time + seconds
        while self.time < end:
            self.time = min(self.time + 0.2, end)
            due = [act for when, act in self.timers if when <= self.time]
            self.timers = [item for item in self.timers if item[0] > self.time]
            for act in due:
                act()
            self.clients.wake(self.time)

    @property
    def last(self) -> Opened:
        return self.calls[-1]

    def send(
        self,
        method: str,
        body: Any,
        headers: dict[str, str],
        who: str = "anonymous",
        endpoint: str = "",
    ) -> Told:
        told = Told()
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = HttpRequest(method, "/mcp", "", headers, data, "127.0.0.1")
        try:
            owner = Owner(who, scope=self.scope, expires=self.expires)
            unproved = (who, self.expires) == (
                "anonymous",
                atrax.math.inf,
            ) and owner.scope.everything
            self.clients.handle(request, told, atrax.ANONYMOUS if unproved else owner, endpoint)
        except HttpError as error:
            told.full(error.status, [("Content-Type", "application/json"), *error.headers], b"{}")
        return told

    # ---- modern ----

    def modern(
        self, method: str, params: dict[str, Any] | None = None, *, ident: Any = 1, who: str = "anonymous",
        capabilities: Any = None, meta: dict[str, Any] | None = None, endpoint: str = "", **headers: str | None,
    ) -> Told:  # fmt: skip
        params = dict(params or {})
        params["_meta"] = {
            META_VERSION: MODERN, META_CLIENT: {"name": "c", "version": "1"},
            META_CAPABILITIES: CAN_ALL if capabilities is None else capabilities, **(meta or {}),
        }  # fmt: skip
        sent = {
            "content-type": "application/json", "accept": BOTH, "mcp-protocol-version": MODERN,
            "mcp-method": method,
        }  # fmt: skip
        for field in ("name", "uri"):
            if field in params:
                sent["mcp-name"] = params[field]
        for name, value in headers.items():
            sent[name.replace("_", "-")] = value  # type: ignore[assignment]
        sent = {name: value for name, value in sent.items() if value is not None}
        message = {"jsonrpc": "2.0", "id": ident, "method": method, "params": params}
        return self.send("POST", message, sent, who, endpoint)

    def tool(self, **more: Any) -> Told:
        params = {"name": "t", "arguments": {"a": 1}, **more.pop("params", {})}
        return self.modern("tools/call", params, **more)

    # ---- legacy ----

    def legacy(
        self, body: Any, session: str | None = None, version: str | None = None, who: str = "anonymous",
        endpoint: str = "", **headers: str,
    ) -> Told:  # fmt: skip
        sent = {"content-type": "application/json", "accept": BOTH, **headers}
        if session:
            sent["mcp-session-id"] = session
        if version:
            sent["mcp-protocol-version"] = version
        return self.send("POST", body, sent, who, endpoint)

    def get(
        self, session: str | None, last: str = "", who: str = "anonymous", endpoint: str = ""
    ) -> Told:
        headers = {"accept": "text/event-stream"}
        if session:
            headers["mcp-session-id"] = session
        if last:
            headers["last-event-id"] = last
        return self.send("GET", b"", headers, who, endpoint)

    def session(
        self,
        version: str = "2025-11-25",
        capabilities: Any = None,
        who: str = "anonymous",
        endpoint: str = "",
    ) -> str:
        told = self.legacy(
            initialize(version, CAN_ALL if capabilities is None else capabilities),
            who=who,
            endpoint=endpoint,
        )
        assert told.status == 200, told.body
        return told.headers["mcp-session-id"]


DISCOVERED = {
    "supportedVersions": [MODERN],
    "capabilities": {"tools": {"listChanged": True}, "logging": {}},
    "instructions": "be kind",
    "_meta": {META_SERVER: {"name": "atrax", "version": "9"}},
}


def initialize(version: str = "2025-11-25", capabilities: Any = None) -> dict[str, Any]:
    params = {
        "protocolVersion": version,
        "capabilities": capabilities or {},
        "clientInfo": {"name": "c", "version": "1"},
    }
    return rpc("initialize", params, 0)


def rpc(method: str, params: dict[str, Any] | None = None, ident: Any = 1) -> dict[str, Any]:
    message: dict[str, Any] = {"jsonrpc": "2.0", "method": method}
    if ident is not None:
        message["id"] = ident
    if params is not None:
        message["params"] = params
    return message


def tool(ident: Any = 1, **meta: Any) -> dict[str, Any]:
    params: dict[str, Any] = {"name": "t", "arguments": {"a": 1}}
    if meta:
        params["_meta"] = meta
    return rpc("tools/call", params, ident)


def assert_nothing_left(stand: Stand) -> None:
    """After `close` nobody may remember anything: what stays would grow for as long as Atrax runs."""
    modern, legacy, edge = stand.clients.modern, stand.clients.legacy, stand.clients
    assert not modern.parking.calls and not modern.parking.counts and not modern.parking.remembered
    assert not modern.streaming
    assert not legacy.sessions and not legacy.lone and not legacy.asked and not legacy.lingering
    assert not legacy.store.size and not legacy.store.events
    assert not edge.beats and not edge.silent and not edge.held


@pytest.fixture
def stand() -> Iterator[Stand]:
    stand = Stand()
    yield stand
    stand.clients.close()
    assert_nothing_left(stand)


# ---- the era ----


def test_the_era_comes_from_meta_or_header_and_never_from_the_method(stand: Stand) -> None:
    assert stand.legacy(initialize()).status == 200
    told = stand.modern("initialize", ident=7)
    assert told.status == 404
    assert told.json["error"]["code"] == atrax.METHOD_NOT_FOUND and told.json["id"] == 7
    told = stand.legacy(rpc("tools/list"), version=MODERN)  # header alone: modern, and malformed
    assert (told.status, told.json["error"]["code"]) == (400, atrax.INVALID_PARAMS)


def test_other_methods_and_media_types_are_refused(stand: Stand) -> None:
    assert stand.send("PUT", b"", {}).status == 405
    assert stand.send("GET", b"", {"mcp-protocol-version": MODERN}).status == 405
    assert stand.send("DELETE", b"", {"mcp-protocol-version": MODERN}).status == 405
    assert stand.send("POST", b"{}", {"content-type": "text/plain"}).status == 415
    assert (
        stand.send(
            "POST", b"{}", {"content-type": "application/json", "accept": "text/html"}
        ).status
        == 406
    )
    assert (
        stand.send(
            "POST", b"{}", {"content-type": "application/json", "accept": "application/json"}
        ).status
        == 406
    )
    for accept in (
        "*/*",
        "application/*, text/*",
        "text/event-stream;q=0.5,application/json ; q=1",
    ):
        headers = {"content-type": "application/json; charset=utf-8", "accept": accept}
        told = stand.send("POST", rpc("ping"), headers)
        assert (told.status, told.json["result"]) == (200, {})


def test_what_is_no_json_is_a_parse_error_without_an_id(stand: Stand) -> None:
    told = stand.send("POST", b"{", {"content-type": "application/json"})
    assert (told.status, told.json["id"], told.json["error"]["code"]) == (
        400,
        None,
        atrax.PARSE_ERROR,
    )


# ---- modern: the ladder ----


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"mcp_protocol_version": None}, 400, atrax.HEADER_MISMATCH),
        ({"mcp_protocol_version": "v999.0.0"}, 400, atrax.HEADER_MISMATCH),
        ({"meta": {META_VERSION: "v999.0.0"}}, 400, atrax.HEADER_MISMATCH),
        (
            {"meta": {META_VERSION: "v999.0.0"}, "mcp_protocol_version": "v999.0.0"},
            400,
            atrax.UNSUPPORTED_VERSION,
        ),
        (
            {"meta": {META_VERSION: "2025-11-25"}, "mcp_protocol_version": "2025-11-25"},
            400,
            atrax.UNSUPPORTED_VERSION,
        ),
        ({"meta": {META_VERSION: 1}}, 400, atrax.INVALID_PARAMS),
        ({"meta": {META_CAPABILITIES: None}}, 400, atrax.INVALID_PARAMS),
        ({"meta": {META_CLIENT: {"name": "x"}}}, 400, atrax.INVALID_PARAMS),
        ({"meta": {META_CLIENT: None}}, 400, atrax.INVALID_PARAMS),
        ({"meta": {META_LOG_LEVEL: "loud"}}, 400, atrax.INVALID_PARAMS),
        ({"meta": {META_LOG_LEVEL: ["debug"]}}, 400, atrax.INVALID_PARAMS),
        ({"meta": {"progressToken": 1.5}}, 400, atrax.INVALID_PARAMS),
        ({"meta": {"progressToken": None}}, 400, atrax.INVALID_PARAMS),
        ({"mcp_method": None}, 400, atrax.HEADER_MISMATCH),
        ({"mcp_method": "tools/list"}, 400, atrax.HEADER_MISMATCH),
        ({"mcp_name": None}, 400, atrax.HEADER_MISMATCH),
        ({"mcp_name": "other"}, 400, atrax.HEADER_MISMATCH),
        ({"mcp_name": "=?base64?dB==?="}, 400, atrax.HEADER_MISMATCH),  # not canonical
        ({"mcp_name": "=?base64?!?="}, 400, atrax.HEADER_MISMATCH),
    ],
)
def test_an_envelope_that_is_wrong_is_refused_with_its_id(
    stand: Stand, change: dict[str, Any], status: int, code: int
) -> None:
    told = stand.tool(ident="id-5", **change)
    assert (told.status, told.json["error"]["code"], told.json["id"]) == (status, code, "id-5")
    assert stand.calls == []


def test_an_unsupported_version_is_told_which_are_supported(stand: Stand) -> None:
    told = stand.tool(meta={META_VERSION: "v9"}, mcp_protocol_version="v9")
    assert told.json["error"]["data"] == {"supported": [MODERN], "requested": "v9"}


def test_a_name_may_come_as_base64_and_a_task_id_is_a_name(stand: Stand) -> None:
    name = "=?base64?" + base64.b64encode(b"t").decode() + "?="
    stand.tool(mcp_name=name)
    assert len(stand.calls) == 1
    told = stand.modern("tasks/get", {"taskId": "x"})
    assert told.json["error"]["code"] == atrax.HEADER_MISMATCH
    stand.modern("tasks/get", {"taskId": "x"}, mcp_name="x")
    assert len(stand.calls) == 2


def test_a_response_is_refused_and_a_notification_is_accepted_and_ignored(stand: Stand) -> None:
    headers = {"content-type": "application/json", "mcp-protocol-version": MODERN}
    assert stand.send("POST", {"jsonrpc": "2.0", "id": 1, "result": {}}, headers).status == 400
    assert stand.send("POST", [rpc("ping")], headers).status == 400
    stand.tool()
    told = stand.send("POST", rpc("notifications/cancelled", {"requestId": 1}, None), headers)
    assert (told.status, told.body) == (202, b"")
    assert stand.last.cancelled == []
    stand.last.result({"content": []})


def test_a_call_reaches_the_door_without_its_era(stand: Stand) -> None:
    stand.tool(
        meta={META_LOG_LEVEL: "error", "progressToken": 0, "traceparent": "00-a"}, mcp_param_region="eu", who="ann",
        endpoint="git",
    )  # fmt: skip
    call = stand.last.call
    assert call.params == {"name": "t", "arguments": {"a": 1}, "_meta": {"traceparent": "00-a"}}
    assert (call.version, call.endpoint, call.log_level, call.progress) == (
        MODERN,
        "git",
        "error",
        True,
    )
    assert call.owner == Owner("ann") and call.mirrored == {"mcp-param-region": "eu"}
    assert call.capabilities == CAN_ALL and call.client == {"name": "c", "version": "1"}
    stand.tool()
    assert "_meta" not in stand.last.call.params


# ---- modern: answers ----


def test_a_result_is_json_with_its_own_bytes_and_a_result_type(stand: Stand) -> None:
    told = stand.tool(ident="x")
    stand.last.done(Outcome(result={"content": []}, raw=b' {"content" : []}'))
    assert (
        told.body == b'{"jsonrpc":"2.0","id":"x","result":{"resultType":"complete","content" : []}}'
    )
    for raw in (b"{}", b"{ }"):
        told = stand.tool()
        stand.last.done(Outcome(result={}, raw=raw))
        assert told.json["result"] == {"resultType": "complete"}
    told = stand.tool()
    stand.last.result({"resultType": "task", "taskId": "1"})
    assert told.json["result"] == {"resultType": "task", "taskId": "1"}


def test_lists_and_reads_say_how_long_they_hold(stand: Stand) -> None:
    told = stand.modern("tools/list")
    stand.last.done(Outcome(raw=b'{"tools":[]}', ttl_ms=60000, public=True))
    assert told.json["result"] == {
        "resultType": "complete",
        "ttlMs": 60000,
        "cacheScope": "public",
        "tools": [],
    }
    told = stand.modern("resources/read", {"uri": "a:b"})
    stand.last.result({"contents": []})
    assert told.json["result"] == {
        "resultType": "complete",
        "ttlMs": 0,
        "cacheScope": "private",
        "contents": [],
    }
    own = {"resultType": "complete", "contents": [], "ttlMs": 5, "cacheScope": "public"}
    told = stand.modern("resources/read", {"uri": "a:b"})
    stand.last.result(own)
    assert told.json["result"] == own
    told = stand.modern("resources/read", {"uri": "a:b"}, who="ann")
    stand.last.result(own)
    assert told.json["result"] == {**own, "cacheScope": "private"}


def test_who_proves_to_be_called_anonymous_is_somebody(stand: Stand) -> None:
    """A JWT's subject may be anything; a cache must not hand its answers to others."""
    stand.expires = 2e9

    told = stand.modern("resources/read", {"uri": "a:b"}, who="anonymous")
    stand.last.result({"contents": [], "cacheScope": "public"})

    assert told.json["result"]["cacheScope"] == "private"


@pytest.mark.parametrize(
    ("code", "status", "out"),
    [
        (atrax.METHOD_NOT_FOUND, 404, atrax.METHOD_NOT_FOUND),
        (atrax.MISSING_CAPABILITY, 400, atrax.MISSING_CAPABILITY),
        (atrax.INVALID_PARAMS, 200, atrax.INVALID_PARAMS),
        (atrax.LEGACY_RESOURCE_NOT_FOUND, 200, atrax.INVALID_PARAMS),
        (-32050, 200, atrax.INTERNAL_ERROR),
        (1000, 200, 1000),
    ],
)
def test_errors_have_the_codes_and_statuses_of_the_era(
    stand: Stand, code: int, status: int, out: int
) -> None:
    told = stand.tool()
    stand.last.fails(code, "why")
    assert (told.status, told.json["error"]["code"], told.json["error"]["message"]) == (
        status,
        out,
        "why",
    )


def test_too_many_requests_travel_with_retry_after(stand: Stand) -> None:
    told = stand.tool()
    error = atrax.own_error(atrax.OVERLOADED, "busy", "inflight", retryAfter=7)
    error.status = 429
    stand.last.done(Outcome(error=error))
    assert (told.status, told.headers["retry-after"]) == (429, "7")


def test_notes_make_the_response_an_event_stream_with_the_token_of_the_request(
    stand: Stand,
) -> None:
    told = stand.tool(meta={"progressToken": 0, META_LOG_LEVEL: "warning"})
    sink = stand.last.sink
    sink.note(Notice("notifications/message", {"level": "info", "data": "no"}))
    assert told.status == 0
    sink.note(Notice("notifications/progress", {"progress": 1}))
    sink.note(Notice("notifications/message", {"level": "error", "data": "yes"}))
    sink.note(Notice("notifications/elicitation/complete", {"elicitationId": "e"}))
    stand.last.fails(atrax.METHOD_NOT_FOUND)
    assert told.streams and told.ended and told.status == 200
    assert [message.get("method") for message in told.messages] == [
        "notifications/progress",
        "notifications/message",
        None,
    ]
    assert told.messages[0]["params"] == {"progressToken": 0, "progress": 1}
    assert told.messages[2]["error"]["code"] == atrax.METHOD_NOT_FOUND


def test_without_token_and_level_there_are_no_notes(stand: Stand) -> None:
    told = stand.tool()
    stand.last.sink.note(Notice("notifications/message", {"level": "emergency", "data": 1}))
    stand.last.sink.note(Notice("notifications/progress", {"progress": 1}))
    stand.last.result({})
    assert told.json["result"] == {"resultType": "complete"}


def test_a_call_that_takes_long_becomes_a_stream_with_comments(stand: Stand) -> None:
    told = stand.tool()
    stand.wait(4.5)
    assert told.status == 0
    stand.wait(1)
    assert told.streams and told.body == b""
    stand.wait(15)
    assert told.body == b":\n\n"
    stand.last.result({})
    assert told.messages[0]["result"] == {"resultType": "complete"} and told.ended


def test_closing_the_response_cancels(stand: Stand) -> None:
    for seconds in (0, 6):
        told = stand.tool()
        stand.wait(seconds)
        told.leave()
        assert stand.last.cancelled == ["the client closed the response"]
    stand.at_once = lambda opened: stand_leaves[0].leave()  # before `open` returned
    stand_leaves = [Told()]
    request = HttpRequest("POST", "/mcp", "", {}, b"", "")
    params = {"name": "t", "_meta": {META_VERSION: MODERN, META_CAPABILITIES: {}}}
    request.body = json.dumps(rpc("tools/call", params)).encode()
    request.headers = {
        "content-type": "application/json", "mcp-protocol-version": MODERN, "mcp-method": "tools/call", "mcp-name": "t",
    }  # fmt: skip
    stand.clients.handle(request, stand_leaves[0], Owner("a"), "")
    assert stand.last.cancelled == ["the client closed the response"]


def test_a_slow_reader_loses_the_oldest_notes_and_nothing_else(stand: Stand) -> None:
    told = stand.tool(meta={"progressToken": 1})
    told.stalled = True
    text = "x" * 1000
    for number in range(2000):
        stand.last.sink.note(
            Notice("notifications/progress", {"progress": number, "message": text})
        )
    stand.wait(1)
    assert told.body == b""
    told.stalled = False
    stand.wait(1)
    stand.last.result({})
    numbers = [message["params"]["progress"] for message in told.messages[:-1]]
    assert numbers == list(range(numbers[0], 2000)) and 800 < len(numbers) < 1050
    assert told.messages[-1]["result"] == {"resultType": "complete"}


def test_a_listen_has_its_id_on_every_frame_and_ends_with_its_own_result(stand: Stand) -> None:
    told = stand.modern(
        "subscriptions/listen", {"notifications": {"toolsListChanged": True}}, ident=3
    )
    assert told.streams
    sink = stand.last.sink
    sink.note(
        Notice(
            "notifications/subscriptions/acknowledged",
            {"notifications": {"toolsListChanged": True}},
        )
    )
    sink.note(Notice("notifications/tools/list_changed", {}))
    stand.clients.drain()
    assert told.ended and len(stand.last.cancelled) == 1
    assert [m["params"]["_meta"] for m in told.messages[:2]] == [{META_SUBSCRIPTION: 3}] * 2
    assert told.messages[2] == {
        "jsonrpc": "2.0", "id": 3, "result": {"resultType": "complete", "_meta": {META_SUBSCRIPTION: 3}},
    }  # fmt: skip


def test_a_listen_that_is_refused_at_once_is_no_stream(stand: Stand) -> None:
    stand.at_once = lambda opened: opened.fails(atrax.INVALID_PARAMS, "bad filter")
    told = stand.modern("subscriptions/listen", {"notifications": {}})
    assert told.json["error"]["message"] == "bad filter"


def test_a_listen_ends_when_its_client_leaves(stand: Stand) -> None:
    told = stand.modern("subscriptions/listen", {"notifications": {}})
    told.leave()
    assert stand.last.cancelled == ["the client closed the response"]
    assert stand.clients.modern.listens == []


# ---- modern: parking ----


def parked(stand: Stand, *keys: str, **more: Any) -> tuple[Opened, Any]:
    told = stand.tool(**more)
    opened = stand.last
    for key in keys:
        opened.asks(key)
    assert told.status == 0
    stand.wait(0.2)
    return opened, told.json["result"]


def retry(stand: Stand, state: str, answers: dict[str, Any], **more: Any) -> Told:
    params = {"requestState": state, "inputResponses": answers, **more.pop("params", {})}
    return stand.tool(params=params, **more)


YES = {"action": "accept", "content": {"a": "b"}}


def test_asks_are_gathered_into_one_round_and_the_retry_answers_them(stand: Stand) -> None:
    opened, asked = parked(stand, "one", "two", meta={"progressToken": 1})
    assert asked["resultType"] == "input_required"
    assert asked["inputRequests"]["one"] == {"method": "elicitation/create", "params": FORM}
    opened.sink.note(Notice("notifications/progress", {"progress": 1}))  # nobody is there: dropped
    told = retry(
        stand,
        asked["requestState"],
        {"one": YES, "two": YES, "three": 5},
        ident=2,
        meta={"progressToken": "b"},
    )
    assert [(ask.key, outcome.result) for ask, outcome in opened.answers] == [
        ("one", YES),
        ("two", YES),
    ]
    opened.sink.note(Notice("notifications/progress", {"progress": 2}))
    opened.result({"content": []})
    assert told.messages[0]["params"] == {"progressToken": "b", "progress": 2}
    assert told.messages[1]["id"] == 2
    assert len(stand.calls) == 1


def test_what_is_missing_or_wrong_is_asked_for_again(stand: Stand) -> None:
    opened, asked = parked(stand, "one", "two", "three")
    told = retry(stand, asked["requestState"], {"one": YES, "two": 7})
    stand.wait(0.2)
    again = told.json["result"]
    assert (
        set(again["inputRequests"]) == {"two", "three"}
        and again["requestState"] != asked["requestState"]
    )
    assert [ask.key for ask, _ in opened.answers] == ["one"]
    told = retry(stand, again["requestState"], {"two": YES, "three": YES})
    opened.result({"ok": 1})
    assert told.json["result"] == {"resultType": "complete", "ok": 1}


def test_a_late_ask_is_in_the_next_round(stand: Stand) -> None:
    opened, asked = parked(stand, "one")
    opened.asks("two")
    told = retry(stand, asked["requestState"], {"one": YES})
    stand.wait(0.2)
    assert set(told.json["result"]["inputRequests"]) == {"two"}


def test_an_ask_that_the_child_takes_back_leaves_the_round(stand: Stand) -> None:
    told = stand.tool()
    opened = stand.last
    opened.asks("one")
    opened.sink.note(Notice("notifications/cancelled", {"requestId": "one"}))
    stand.wait(0.2)
    assert told.status == 0
    opened.result({})
    assert told.json["result"] == {"resultType": "complete"}


def test_a_repeated_retry_takes_over_while_it_runs_and_gets_the_same_answer_afterwards(
    stand: Stand,
) -> None:
    opened, asked = parked(stand, "one")
    first = retry(stand, asked["requestState"], {"one": YES}, ident=2)
    second = retry(stand, asked["requestState"], {"one": YES}, ident=3)
    assert first.ended and "error" in first.json
    opened.result({"n": 1})
    third = retry(stand, asked["requestState"], {"one": YES}, ident=4)
    assert second.json["result"] == third.json["result"] == {"resultType": "complete", "n": 1}
    assert third.json["id"] == 4 and len(opened.answers) == 1 and len(stand.calls) == 1


def test_a_round_that_was_lost_on_the_way_is_told_again(stand: Stand) -> None:
    opened, asked = parked(stand, "one", "two")
    second = retry(stand, asked["requestState"], {"one": YES})
    stand.wait(0.2)
    again = retry(stand, asked["requestState"], {"one": YES})
    assert again.json["result"] == second.json["result"]
    assert len(opened.answers) == 1


def test_the_result_of_a_retry_is_not_to_be_cached(stand: Stand) -> None:
    told = stand.modern("resources/read", {"uri": "a:b"})
    stand.last.asks("k")
    stand.wait(0.2)
    state = told.json["result"]["requestState"]
    told = stand.modern(
        "resources/read", {"uri": "a:b", "requestState": state, "inputResponses": {"k": YES}}
    )
    stand.last.result({"contents": [], "ttlMs": 9000, "cacheScope": "public"})
    assert told.json["result"]["ttlMs"] == 0


def test_an_outcome_that_comes_while_parked_waits_for_the_retry(stand: Stand) -> None:
    opened, asked = parked(stand, "one")
    opened.fails(atrax.CHILD_DIED, "died")
    told = retry(stand, asked["requestState"], {"one": YES})
    assert told.json["error"]["message"] == "died"


@pytest.mark.parametrize(
    "change",
    [
        {"state": lambda state: state + "-TAMPERED"},
        {"state": lambda state: "x" + state},
        {"state": lambda state: state.replace(".", "A.")},
        {"state": lambda state: ""},
        {"state": lambda state: 5},
        {"state": lambda state: "ü.ü"},
        {"who": "mallory"},
        {"endpoint": "git"},
        {"params": {"arguments": {"a": 2}}},
        {"params": {"name": "u"}},
    ],
)
def test_a_state_that_was_altered_or_is_another_calls_is_refused(
    stand: Stand, change: dict[str, Any]
) -> None:
    opened, asked = parked(stand, "one")
    change = dict(change)
    state = change.pop("state", lambda state: state)(asked["requestState"])
    told = retry(stand, state, {"one": YES}, **change)
    assert told.json["error"]["code"] == atrax.INVALID_PARAMS
    assert opened.answers == [] and len(stand.calls) == 1
    good = retry(stand, asked["requestState"], {"one": YES})
    opened.result({})
    assert good.json["result"] == {"resultType": "complete"}


def test_a_state_expires_with_its_call(stand: Stand) -> None:
    opened, asked = parked(stand, "one")
    opened.asks("two", "sampling/createMessage", messages=[])
    stand.wait(301)
    assert opened.answers[0][1].result == {"action": "cancel"}
    assert opened.answers[1][1].error is not None
    assert len(opened.cancelled) == 1
    told = retry(stand, asked["requestState"], {"one": YES})
    assert told.json["error"]["code"] == atrax.INVALID_PARAMS


def test_closing_the_response_of_a_retry_ends_the_call_for_good(stand: Stand) -> None:
    opened, asked = parked(stand, "one")
    retry(stand, asked["requestState"], {"one": YES}).leave()
    assert opened.cancelled
    told = retry(stand, asked["requestState"], {"one": YES})
    assert told.json["error"]["code"] == atrax.INVALID_PARAMS


def test_parked_calls_are_bounded_per_owner(stand: Stand) -> None:
    first, asked = parked(stand, "one")
    parked(stand, "one")
    told = stand.tool()
    third = stand.last
    third.asks("one")
    assert "limits.parked" in third.answers[0][1].error.message
    third.result({})
    assert told.json["result"] == {"resultType": "complete"}
    parked(stand, "one", who="ann")  # another owner has its own
    retry(stand, asked["requestState"], {"one": YES})
    first.result({})
    parked(stand, "one")


def test_an_undeclared_ask_is_refused_alone_and_named_when_the_call_fails(stand: Stand) -> None:
    told = stand.tool(capabilities={"sampling": {}})
    opened = stand.last
    opened.asks("e")
    opened.asks("u", mode="url", url="https://x", message="m")
    opened.asks("s", "sampling/createMessage", messages=[], maxTokens=1)
    assert [ask.key for ask, outcome in opened.answers if outcome.error] == ["e", "u"]
    stand.wait(0.2)
    assert set(told.json["result"]["inputRequests"]) == {"s"}
    for failure in ({"isError": True, "content": [{"type": "text", "text": "sad"}]}, None):
        told = stand.tool(capabilities={})
        stand.last.asks("s", "sampling/createMessage", messages=[])
        if failure is None:
            stand.last.fails(-32603, "sad")
        else:
            stand.last.result(failure)
        error = told.json["error"]
        assert (told.status, error["code"], error["message"]) == (
            400,
            atrax.MISSING_CAPABILITY,
            "sad",
        )
        assert error["data"] == {"requiredCapabilities": {"sampling": {}}}
    told = stand.tool(capabilities={})
    stand.last.asks("s", "roots/list")
    stand.last.result({"content": []})
    assert told.json["result"] == {"resultType": "complete", "content": []}


def test_answers_without_a_state_are_used_where_they_fit(stand: Stand) -> None:
    told = stand.tool(params={"inputResponses": {"one": YES, "two": 5}})
    opened = stand.last
    opened.asks("one")
    assert opened.answers[0][1].result == YES
    opened.asks("two")
    stand.wait(0.2)
    assert set(told.json["result"]["inputRequests"]) == {"two"}
    for bad in (None, 5, []):
        assert (
            stand.tool(params={"inputResponses": bad}).json["error"]["code"] == atrax.INVALID_PARAMS
        )
    assert len(stand.calls) == 1


def test_a_modern_childs_own_state_travels_inside_ours_and_finds_its_process(stand: Stand) -> None:
    told = stand.tool()
    question = {"k": {"method": "roots/list"}}
    result = {
        "resultType": "input_required",
        "inputRequests": question,
        "requestState": "own",
        "_meta": {"x": 1},
    }
    stand.last.result(result, place="git#2")
    asked = told.json["result"]
    assert (
        asked["inputRequests"] == question
        and asked["requestState"] != "own"
        and asked["_meta"] == {"x": 1}
    )
    told = retry(stand, asked["requestState"], {"k": {"roots": []}})
    call = stand.last.call
    assert (call.params["requestState"], call.place) == ("own", "git#2")
    assert call.params["inputResponses"] == {"k": {"roots": []}}
    stand.last.result({"resultType": "input_required", "inputRequests": question}, place="git#2")
    state = told.json["result"]["requestState"]
    retry(stand, state, {"k": {"roots": []}})
    assert "requestState" not in stand.last.call.params and stand.last.call.place == "git#2"


def test_a_modern_child_that_asks_the_undeclared_or_asks_where_it_must_not_is_an_error(
    stand: Stand,
) -> None:
    told = stand.tool(capabilities={})
    question = {"k": {"method": "elicitation/create", "params": FORM}}
    stand.last.result({"resultType": "input_required", "inputRequests": question})
    assert told.json["error"]["data"] == {"requiredCapabilities": {"elicitation": {}}}
    told = stand.modern("tools/list")
    stand.last.result({"resultType": "input_required", "inputRequests": question})
    assert told.json["error"]["code"] == atrax.INTERNAL_ERROR
    for bad in ({}, {"inputRequests": 5}, {"inputRequests": {"k": 5}}, {"requestState": 5}):
        told = stand.tool()
        stand.last.result({"resultType": "input_required", **bad})
        assert told.json["error"]["code"] == atrax.INTERNAL_ERROR


def test_a_url_that_must_be_visited_is_asked_for_and_the_retry_calls_again(stand: Stand) -> None:
    told = stand.tool()
    elicitation = {"mode": "url", "url": "https://x", "message": "m", "elicitationId": "e1"}
    stand.last.fails(
        atrax.LEGACY_URL_ELICITATION, "visit", {"elicitations": [elicitation]}, place="git#1"
    )
    asked = told.json["result"]
    params = asked["inputRequests"]["elicitation-1"]["params"]
    assert params == {"mode": "url", "url": "https://x", "message": "m"}
    retry(stand, asked["requestState"], {"elicitation-1": {"action": "accept"}})
    assert stand.last.call.place == "git#1"
    assert set(stand.last.call.params) == {"name", "arguments"}
    told = retry(stand, asked["requestState"], {"elicitation-1": {"action": "decline"}})
    assert "declined" in told.json["error"]["message"]
    told = stand.tool(capabilities={"elicitation": {}})
    stand.last.fails(atrax.LEGACY_URL_ELICITATION, "visit", {"elicitations": [elicitation]})
    assert told.json["error"]["data"] == {"requiredCapabilities": {"elicitation": {"url": {}}}}
    told = stand.tool()
    stand.last.fails(atrax.LEGACY_URL_ELICITATION, "visit", {"elicitations": "?"})
    assert told.json["error"]["code"] == atrax.INTERNAL_ERROR


def test_a_principal_that_is_dropped_loses_what_it_has_open(stand: Stand) -> None:
    opened, _ = parked(stand, "one", who="ann")
    told = stand.tool(who="ann")
    listen = stand.modern("subscriptions/listen", {"notifications": {}}, who="ann")
    session = stand.session(who="ann")
    stand.fallen.add("ann")
    stand.clients.review()
    assert told.ended and listen.ended and len(opened.cancelled) == 1
    assert stand.legacy(rpc("ping"), session, who="ann").status == 404


def test_a_parked_call_ends_with_its_token_and_a_retry_with_a_newer_one_prolongs_it(
    stand: Stand,
) -> None:
    stand.expires = 1e9 + stand.time + 10
    first, _ = parked(stand, "one")
    second, asked = parked(stand, "two")
    stand.expires += 20
    told = retry(stand, asked["requestState"], {"two": YES})
    second.asks("three")
    stand.wait(15)
    assert len(first.cancelled) == 1 and not second.cancelled
    stand.wait(20)
    assert second.cancelled and told.ended


def test_running_calls_outlive_the_expiry_of_their_token(stand: Stand) -> None:
    stand.expires = 1e9 + stand.time + 10
    session = stand.session()
    modern, legacy = stand.tool(), stand.legacy(rpc("tools/call", {"name": "t"}), session)
    calls = stand.calls[-2:]
    stand.wait(20)
    assert not any(call.cancelled for call in calls)
    assert session in stand.clients.legacy.sessions
    for call in calls:
        call.result({"content": []})
    assert modern.ended and legacy.ended
    stand.wait(2)
    assert session not in stand.clients.legacy.sessions


def test_nobody_looks_at_sessions_until_the_first_may_expire(stand: Stand) -> None:
    stand.expires = 1e9 + stand.time + 1000
    stand.session()
    stand.expires = atrax.math.inf
    stand.session()
    stand.wait(900)
    assert not stand.judged
    stand.wait(200)
    assert 0 < stand.judged < 5 and len(stand.clients.legacy.sessions) == 1


# ---- legacy: sessions ----


def test_initialize_makes_a_session_and_says_what_there_is(stand: Stand) -> None:
    told = stand.legacy(initialize("2025-06-18"), version="2025-11-25")
    session = told.headers["mcp-session-id"]
    assert all(0x21 <= ord(char) <= 0x7E for char in session)
    assert told.json["result"] == {
        "protocolVersion": "2025-06-18",
        "capabilities": DISCOVERED["capabilities"],
        "serverInfo": {"name": "atrax", "version": "9"},
        "instructions": "be kind",
    }
    call = stand.last.call
    assert (call.method, call.version, call.client) == (
        "server/discover",
        "2025-06-18",
        {"name": "c", "version": "1"},
    )
    assert stand.legacy(initialize("2027-01-01")).json["result"]["protocolVersion"] == "2025-11-25"
    assert (
        stand.legacy(initialize("1"), version="1").json["result"]["protocolVersion"] == "2025-11-25"
    )


def test_an_initialize_that_fails_makes_no_session(stand: Stand) -> None:
    stand.at_once = lambda opened: opened.fails(atrax.UNAVAILABLE, "down")
    told = stand.legacy(initialize())
    assert told.json["error"]["code"] == atrax.UNAVAILABLE and "mcp-session-id" not in told.headers
    stand.at_once = None
    big = initialize()
    big["params"]["clientInfo"]["title"] = "x" * 2**16  # it would be kept as long as the session
    assert "bytes at most" in stand.legacy(big).json["error"]["message"]
    told = stand.legacy(rpc("initialize", {"protocolVersion": 1}))
    assert told.json["error"]["code"] == atrax.INVALID_PARAMS
    assert stand.clients.legacy.sessions == {}


def test_a_session_is_known_to_its_principal_and_endpoint_alone_until_it_is_deleted(
    stand: Stand,
) -> None:
    session = stand.session(who="ann", endpoint="git")
    assert stand.legacy(rpc("ping"), session, who="ann", endpoint="git").json["result"] == {}
    for who, endpoint in (("bob", "git"), ("ann", ""), ("ann", "time")):
        assert stand.legacy(rpc("ping"), session, who=who, endpoint=endpoint).status == 404
    assert (
        stand.legacy(rpc("ping"), session, who="ann", endpoint="git", version="1999-01-01").status
        == 400
    )
    headers = {"mcp-session-id": session}
    assert stand.send("DELETE", b"", headers, "ann", "git").status == 200
    assert stand.send("DELETE", b"", headers, "ann", "git").status == 404
    assert stand.legacy(rpc("ping"), session, who="ann", endpoint="git").status == 404
    assert [owner.principal for owner in stand.gone] == ["ann"]
    assert stand.send("DELETE", b"", {}).status == 400 and stand.get(None).status == 400


def test_requests_without_a_session_are_served_as_far_as_they_need_none(stand: Stand) -> None:
    told = stand.legacy(tool())
    call = stand.last.call
    assert (call.version, call.owner, call.any_output, call.mirrored) == (
        "2025-03-26",
        Owner("anonymous"),
        False,
        None,
    )
    stand.last.asks("k")
    assert stand.last.answers[0][1].error is not None
    stand.last.result({"content": []})
    assert told.json["result"] == {"content": []}
    stand.legacy(tool(), version="2025-11-25")
    assert stand.last.call.version == "2025-11-25"
    told = stand.legacy(rpc("logging/setLevel", {"level": "info"}))
    assert told.json["error"]["code"] == atrax.INVALID_REQUEST
    assert stand.legacy({"jsonrpc": "2.0", "id": "atrax-1", "result": {}}).status == 400
    told = stand.legacy(tool())
    told.leave()
    assert stand.last.cancelled


def test_the_longest_idle_session_makes_room_and_busy_ones_do_not(stand: Stand) -> None:
    first, second, third = (stand.session() for _ in range(3))
    stand.legacy(tool(), first)
    stream = stand.get(second)
    stand.session()
    assert stand.legacy(rpc("ping"), third).status == 404
    assert stand.legacy(rpc("ping"), first).status == 200
    fourth = list(stand.clients.legacy.sessions)[-1]
    stand.legacy(tool(), fourth)
    for session in list(stand.clients.legacy.sessions):
        stand.legacy(tool(9), session) if session not in (first, second) else None
    told = stand.legacy(initialize())
    assert told.status == 503 and told.headers["retry-after"] == "30"
    assert stream.ended is False


def test_an_idle_session_ends_and_one_with_a_stream_does_not(stand: Stand) -> None:
    idle, used = stand.session(), stand.session()
    stand.get(used)
    stand.time += 3601
    stand.wait(0.2)
    assert stand.legacy(rpc("ping"), idle).status == 404
    assert stand.legacy(rpc("ping"), used).status == 200


def test_errors_are_http_200_and_the_codes_of_the_era(stand: Stand) -> None:
    session = stand.session()
    told = stand.legacy(rpc("foo/bar"), session)
    stand.last.done(Outcome(error=Error(atrax.METHOD_NOT_FOUND, "no", status=404)))
    assert (told.status, told.json["error"]["code"]) == (200, atrax.METHOD_NOT_FOUND)
    told = stand.legacy(rpc("resources/read", {"uri": "a:b"}), session)
    stand.last.fails(atrax.INVALID_PARAMS, "no", {"uri": "a:b"})
    assert told.json["error"]["code"] == atrax.LEGACY_RESOURCE_NOT_FOUND
    told = stand.legacy(rpc("tools/call", {"name": "t", "_meta": 5}), session)
    assert told.json["error"]["code"] == atrax.INVALID_PARAMS
    told = stand.legacy({"jsonrpc": "2.0", "id": 4, "method": 5}, session)
    assert (told.status, told.json["id"], told.json["error"]["code"]) == (
        400,
        4,
        atrax.INVALID_REQUEST,
    )


def test_levels_filter_log_messages(stand: Stand) -> None:
    session = stand.session()

    def heard() -> list[str]:
        told = stand.legacy(tool(), session)
        for level in ("debug", "info", "error"):
            stand.last.sink.note(Notice("notifications/message", {"level": level, "data": 1}))
        stand.last.result({})
        return [m["params"]["level"] for m in told.messages if "method" in m]

    assert heard() == ["info", "error"]
    assert stand.legacy(rpc("logging/setLevel", {"level": "debug"}), session).body.endswith(
        b'"result":{}}'
    )
    assert heard() == ["debug", "info", "error"] and stand.last.call.log_level == "debug"
    assert (
        stand.legacy(rpc("logging/setLevel", {"level": 5}), session).json["error"]["code"]
        == atrax.INVALID_PARAMS
    )


# ---- legacy: results by version ----


def test_a_result_passes_untouched_where_nothing_has_to_change(stand: Stand) -> None:
    session = stand.session()
    told = stand.legacy(tool("x"), session)
    stand.last.done(
        Outcome(
            result={"content": [], "_meta": {"a/b": 1}}, raw=b'{"content" : [],"_meta":{"a/b":1}}'
        )
    )
    assert told.body == b'{"jsonrpc":"2.0","id":"x","result":{"content" : [],"_meta":{"a/b":1}}}'
    told = stand.legacy(rpc("tools/list"), session)
    stand.last.done(Outcome(raw=b'{"tools":[]}', ttl_ms=5))
    assert told.json["result"] == {"tools": []}


def test_a_legacy_client_gets_nothing_of_the_modern_era(stand: Stand) -> None:
    told = stand.legacy(rpc("resources/read", {"uri": "a:b"}), stand.session())
    stand.last.result({
        "resultType": "complete", "ttlMs": 0, "cacheScope": "private", "contents": [], "own": 1,
        "_meta": {META_SERVER: {}, "x": 1},
    })  # fmt: skip
    assert told.json["result"] == {"contents": [], "own": 1, "_meta": {"x": 1}}
    told = stand.legacy(tool(), stand.session())
    stand.last.result({"resultType": "complete", "content": [], "_meta": {META_SERVER: {}}})
    assert told.json["result"] == {"content": []}


@pytest.mark.parametrize(
    ("version", "kinds"),
    [
        ("2024-11-05", ["text", "text", "text", "image"]),
        ("2025-03-26", ["text", "audio", "text", "image"]),
        ("2025-06-18", ["text", "audio", "resource_link", "image"]),
    ],
)
def test_content_that_a_version_lacks_becomes_text(
    stand: Stand, version: str, kinds: list[str]
) -> None:
    content = [
        {"type": "text", "text": "t"},
        {"type": "audio", "data": "", "mimeType": "audio/wav"},
        {"type": "resource_link", "uri": "a:b", "name": "n"},
        {"type": "image", "data": "", "mimeType": "image/png"},
    ]
    session = stand.session(version)
    told = stand.legacy(tool(), session)
    stand.last.result({"content": content})
    assert [item["type"] for item in told.json["result"]["content"]] == kinds
    told = stand.legacy(rpc("prompts/get", {"name": "p"}), session)
    stand.last.result({"messages": [{"role": "user", "content": item} for item in content]})
    assert [item["content"]["type"] for item in told.json["result"]["messages"]] == kinds


def test_structured_content_that_is_no_object_becomes_a_text_block_once(stand: Stand) -> None:
    session = stand.session()
    told = stand.legacy(tool(), session)
    stand.last.result({"content": [], "structuredContent": [1, 2]})
    assert told.json["result"] == {"content": [{"type": "text", "text": "[1,2]"}]}
    told = stand.legacy(tool(), session)
    own = [{"type": "text", "text": "[1, 2]"}]
    stand.last.result({"content": own, "structuredContent": [1, 2]})
    assert told.json["result"] == {"content": own}
    told = stand.legacy(tool(), session)
    stand.last.result({"content": [], "structuredContent": {"a": 1}})
    assert told.json["result"]["structuredContent"] == {"a": 1}


# ---- legacy: batches ----


def test_a_batch_is_answered_by_an_array_in_the_version_that_has_them(stand: Stand) -> None:
    session = stand.session("2025-03-26")
    told = stand.legacy(
        [tool(1), rpc("ping", None, 2), rpc("notifications/x", None, None), {"id": 3}], session
    )
    assert told.status == 0
    stand.last.result({"content": []})
    assert [(item["id"], "result" in item) for item in told.json] == [
        (2, True),
        (3, False),
        (1, True),
    ]
    assert stand.legacy([rpc("notifications/x", None, None)], session).status == 202
    for bad in ([], [initialize()], [rpc("ping")] * 101):
        assert stand.legacy(bad, session).status == 400
    assert stand.legacy([rpc("ping")], stand.session("2025-06-18")).status == 400
    assert stand.legacy([rpc("ping")]).json[0]["result"] == {}


def test_a_batch_whose_call_says_something_becomes_a_stream(stand: Stand) -> None:
    told = stand.legacy(
        [tool(1, progressToken="t"), rpc("ping", None, 2), tool(3)], stand.session("2025-03-26")
    )
    first, second = stand.calls[-2:]
    first.sink.note(Notice("notifications/progress", {"progress": 1}))
    first.result({})
    assert not told.ended
    second.result({})
    assert told.ended
    assert [m.get("id", "note") for m in told.messages] == [2, "note", 1, 3]


# ---- legacy: streams and resumption ----


def test_a_stream_is_primed_in_the_newest_version_and_has_ids_in_all(stand: Stand) -> None:
    told = stand.legacy(tool(1, progressToken=5), stand.session())
    stand.last.sink.note(Notice("notifications/progress", {"progress": 1}))
    assert told.events[0] == {"id": "1-0", "retry": "1000", "data": ""}
    assert told.events[1]["id"] == "1-1" and told.messages[0]["params"]["progressToken"] == 5
    told = stand.legacy(tool(1, progressToken=5), stand.session("2025-06-18"))
    stand.last.sink.note(Notice("notifications/progress", {"progress": 1}))
    assert told.events[0]["id"] == "1-1"


def test_closing_does_not_cancel_and_the_answer_is_fetched_where_the_stream_broke(
    stand: Stand,
) -> None:
    session = stand.session()
    told = stand.legacy(tool(1, progressToken=5), session)
    opened = stand.last
    for number in (1, 2):
        opened.sink.note(Notice("notifications/progress", {"progress": number}))
    told.leave()
    assert opened.cancelled == []
    opened.sink.note(Notice("notifications/progress", {"progress": 3}))
    again = stand.get(session, told.events[1]["id"])
    assert [event["id"] for event in again.events] == ["1-2", "1-3"]
    assert [m["params"]["progress"] for m in again.messages] == [2, 3]
    again.leave()
    opened.result({"content": []})
    last = stand.get(session, "1-3")
    assert last.ended and last.messages == [{"jsonrpc": "2.0", "id": 1, "result": {"content": []}}]
    assert stand.get(session, "1-3").ended  # for a minute
    stand.wait(61)
    assert stand.get(session, "1-3").status == 400
    assert stand.clients.legacy.store.size == 0


def test_a_slow_call_that_was_only_primed_can_be_resumed(stand: Stand) -> None:
    session = stand.session()
    told = stand.legacy(tool(), session)
    stand.wait(5.2)
    told.leave()
    stand.last.result({"n": 1})
    stand.wait(120)
    assert stand.get(session, "1-0").messages[0]["result"] == {"n": 1}


def test_an_answer_is_dropped_if_no_event_id_was_ever_sent(stand: Stand) -> None:
    session = stand.session()
    told = stand.legacy(tool(), session)
    told.leave()
    assert stand.last.cancelled == []
    stand.last.result({"n": 1})
    assert stand.clients.legacy.store.size == 0
    for last in ("1-0", "7-7", "x", "1-", "9999999999-1"):
        assert stand.get(session, last).status == 400


def test_the_resumption_store_is_bounded(stand: Stand) -> None:
    session = stand.session()
    told = stand.legacy(tool(1, progressToken=5), session)
    opened = stand.last
    for number in range(3000):
        opened.sink.note(Notice("notifications/progress", {"progress": number}))
    told.leave()
    again = stand.get(session, "1-1")
    assert [m["params"]["progress"] for m in again.messages] == list(range(2000, 3000))
    again.leave()
    opened.result({"big": "x" * 5_000_000})
    assert stand.get(session, "1-1").status == 400
    assert stand.clients.legacy.store.size == 0


def test_another_sessions_stream_cannot_be_fetched(stand: Stand) -> None:
    first, second = stand.session(), stand.session()
    stand.legacy(tool(1, progressToken=5), first)
    stand.last.sink.note(Notice("notifications/progress", {"progress": 1}))
    assert stand.get(second, "1-0").status == 400


def test_a_second_get_takes_over_and_each_message_is_on_one_stream(stand: Stand) -> None:
    session = stand.session()
    first = stand.get(session)
    listen = stand.last
    acknowledge(listen)
    listen.sink.note(Notice("notifications/tools/list_changed", {}))
    second = stand.get(session)
    assert first.ended
    listen.sink.note(Notice("notifications/prompts/list_changed", {}))
    assert [m["method"] for m in first.messages] == ["notifications/tools/list_changed"]
    assert [m["method"] for m in second.messages] == ["notifications/prompts/list_changed"]
    third = stand.get(session, "0-0")
    assert second.ended and len(third.messages) == 2


def test_a_cancelled_call_ends_as_a_stream_without_a_response(stand: Stand) -> None:
    session = stand.session()
    told = stand.legacy(tool(8), session)
    other = stand.legacy(tool("8"), session)
    cancel = rpc("notifications/cancelled", {"requestId": 8, "reason": "enough"}, None)
    assert stand.legacy(cancel, session).status == 202
    assert stand.calls[-2].cancelled == ["enough"] and stand.last.cancelled == []
    assert told.streams and told.ended and told.body == b"" and other.status == 0
    stand.legacy(cancel, session)
    stand.legacy(rpc("notifications/cancelled", {"requestId": []}, None), session)


def test_ending_a_session_cancels_its_calls_and_closes_its_streams(stand: Stand) -> None:
    session = stand.session()
    told, stream = stand.legacy(tool(), session), stand.get(session)
    listen = stand.last
    stand.send("DELETE", b"", {"mcp-session-id": session})
    assert stand.calls[1].cancelled and listen.cancelled and told.ended and stream.ended


# ---- legacy: asks ----

SAMPLED = {"role": "assistant", "content": {"type": "text", "text": "t"}, "model": "m"}


def test_an_ask_is_a_request_on_the_calls_stream_and_its_answer_finds_the_child(
    stand: Stand,
) -> None:
    session = stand.session()
    told = stand.legacy(tool(), session)
    opened = stand.last
    opened.asks("a")
    opened.asks("b", "sampling/createMessage", messages=[], _meta={"progressToken": 7})
    first, second = told.messages
    assert (first["method"], first["params"]) == ("elicitation/create", FORM)
    assert second["params"]["_meta"] == {"progressToken": second["id"]}
    note = rpc("notifications/progress", {"progressToken": second["id"], "progress": 1}, None)
    stand.legacy(note, session)
    assert opened.notes == [Notice("notifications/progress", {"progressToken": 7, "progress": 1})]
    answer = {"jsonrpc": "2.0", "id": second["id"], "error": {"code": -1, "message": "no"}}
    assert stand.legacy(answer, session).status == 202
    stand.legacy({"jsonrpc": "2.0", "id": first["id"], "result": YES}, session)
    stand.legacy({"jsonrpc": "2.0", "id": first["id"], "result": YES}, session)  # twice: ignored
    stand.legacy({"jsonrpc": "2.0", "id": 99, "result": YES}, session)
    assert [(ask.key, outcome.result) for ask, outcome in opened.answers] == [
        ("b", None),
        ("a", YES),
    ]
    assert opened.answers[0][1].error.message == "no"
    opened.result({})
    assert told.ended and told.messages[-1] == {"jsonrpc": "2.0", "id": 1, "result": {}}


def test_an_answer_that_is_none_is_an_error_for_the_child(stand: Stand) -> None:
    session = stand.session()
    told = stand.legacy(tool(), session)
    for key, method, wrong in (
        ("a", "elicitation/create", {"action": "maybe"}),
        ("b", "roots/list", {"roots": [1]}),
    ):
        stand.last.asks(key, method)
        answer = {"jsonrpc": "2.0", "id": told.messages[-1]["id"], "result": wrong}
        assert stand.legacy(answer, session).status == 202
    assert [outcome.error.code for _, outcome in stand.last.answers] == [atrax.INVALID_PARAMS] * 2


def test_another_session_cannot_answer(stand: Stand) -> None:
    session, other = stand.session(), stand.session()
    told = stand.legacy(tool(), session)
    stand.last.asks("a")
    ident = told.messages[0]["id"]
    assert stand.legacy({"jsonrpc": "2.0", "id": ident, "result": YES}, other).status == 202
    assert stand.last.answers == []


@pytest.mark.parametrize(
    ("capabilities", "method", "params"),
    [
        ({}, "elicitation/create", FORM),
        ({"elicitation": {"url": {}}}, "elicitation/create", FORM),
        ({"elicitation": {}}, "elicitation/create", {"mode": "url", "url": "u"}),
        ({"sampling": {}}, "sampling/createMessage", {"tools": []}),
        ({"sampling": {}}, "sampling/createMessage", {"includeContext": "allServers"}),
        ({"sampling": {}}, "roots/list", {}),
        (CAN_ALL, "other/thing", {}),
    ],
)
def test_what_a_client_did_not_declare_is_refused(
    stand: Stand, capabilities: Any, method: str, params: Any
) -> None:
    told = stand.legacy(tool(), stand.session(capabilities=capabilities))
    stand.last.sink.ask(Ask("k", method, params))
    assert stand.last.answers[0][1].error.code == atrax.METHOD_NOT_FOUND and told.status == 0
    stand.last.result({"isError": True, "content": []})
    assert told.json["result"] == {"isError": True, "content": []}


def test_an_ask_that_is_taken_back_or_not_answered_is_cancelled_at_the_client(stand: Stand) -> None:
    told = stand.legacy(tool(), stand.session())
    stand.last.asks("a")
    stand.last.asks("b")
    stand.last.sink.note(Notice("notifications/cancelled", {"requestId": "a"}))
    ids = [m["id"] for m in told.messages if m["method"] == "elicitation/create"]
    assert told.messages[2] == rpc("notifications/cancelled", {"requestId": ids[0]}, None)
    stand.wait(301)
    assert told.messages[3] == rpc("notifications/cancelled", {"requestId": ids[1]}, None)
    assert stand.last.answers[0][1].result == {"action": "cancel"}


def test_an_ask_of_a_broken_stream_waits_in_the_store_and_one_nobody_can_read_is_refused(
    stand: Stand,
) -> None:
    session = stand.session()
    told = stand.legacy(tool(1, progressToken=1), session)
    stand.last.sink.note(Notice("notifications/progress", {"progress": 1}))
    told.leave()
    stand.last.asks("a")
    assert stand.last.answers == []
    assert stand.get(session, "1-1").messages[0]["method"] == "elicitation/create"
    told = stand.legacy(tool(), session)
    told.leave()
    stand.last.asks("a")
    assert stand.last.answers[0][1].error is not None


def test_a_url_elicitation_gets_an_id_and_old_versions_no_mode(stand: Stand) -> None:
    told = stand.legacy(tool(), stand.session())
    stand.last.asks("a", mode="url", url="https://x", message="m")
    assert told.messages[0]["params"]["elicitationId"]
    told = stand.legacy(tool(), stand.session("2025-06-18", {"elicitation": {}}))
    stand.last.asks("a", mode="form", **FORM)
    assert told.messages[0]["params"] == FORM


# ---- legacy client, modern child ----

ROUND = {
    "resultType": "input_required",
    "inputRequests": {"k": {"method": "elicitation/create", "params": FORM}},
}


def test_a_modern_childs_questions_are_asked_and_the_call_is_made_again(stand: Stand) -> None:
    session = stand.session()
    told = stand.legacy(tool(1, progressToken="p", traceparent="00"), session)
    stand.last.call.params["name"] = "rewritten by the door"
    stand.last.result({**ROUND, "requestState": "s"}, place="git#1")
    ident = told.messages[0]["id"]
    stand.legacy({"jsonrpc": "2.0", "id": ident, "result": YES}, session)
    call = stand.last.call
    assert call.params == {
        "name": "t", "arguments": {"a": 1}, "_meta": {"traceparent": "00"},
        "inputResponses": {"k": YES}, "requestState": "s",
    }  # fmt: skip
    assert (call.place, call.progress) == ("git#1", True)
    stand.last.sink.note(Notice("notifications/progress", {"progress": 1}))
    stand.last.result({"resultType": "complete", "content": []})
    assert told.messages[1]["params"]["progressToken"] == "p"
    assert told.messages[2] == {"jsonrpc": "2.0", "id": 1, "result": {"content": []}}


def test_a_modern_child_is_content_after_ten_rounds_or_never(stand: Stand) -> None:
    session = stand.session()
    told = stand.legacy(tool(), session)
    for number in range(10):
        stand.last.result(ROUND)
        stand.legacy({"jsonrpc": "2.0", "id": told.messages[number]["id"], "result": YES}, session)
    stand.last.result(ROUND)
    assert "10 rounds" in told.messages[-1]["error"]["message"] and told.ended


def test_a_state_alone_is_sent_again_after_a_moment(stand: Stand) -> None:
    told = stand.legacy(tool(), stand.session())
    stand.last.result({"resultType": "input_required", "requestState": "s"})
    count = len(stand.calls)
    stand.wait(0.4)
    assert len(stand.calls) == count + 1 and stand.last.call.params["requestState"] == "s"
    stand.last.result({"content": []})
    assert told.json["result"] == {"content": []}


def test_a_clients_error_cancels_an_elicitation_and_ends_a_call_that_samples(stand: Stand) -> None:
    session = stand.session()
    told = stand.legacy(tool(), session)
    stand.last.result(ROUND)
    no = {"code": -1, "message": "user said no"}
    stand.legacy({"jsonrpc": "2.0", "id": told.messages[0]["id"], "error": no}, session)
    assert stand.last.call.params["inputResponses"] == {"k": {"action": "cancel"}}
    sampling = {
        "a": {"method": "sampling/createMessage", "params": {}},
        "b": {"method": "roots/list"},
    }
    stand.last.result({"resultType": "input_required", "inputRequests": sampling})
    stand.legacy({"jsonrpc": "2.0", "id": told.messages[1]["id"], "error": no}, session)
    assert told.ended and told.messages[-1]["error"] == no
    assert not stand.clients.legacy.asked


def test_a_call_that_is_cancelled_between_rounds_is_not_made_again(stand: Stand) -> None:
    session = stand.session()
    told = stand.legacy(tool(), session)
    stand.last.result(ROUND)
    count = len(stand.calls)
    stand.legacy(rpc("notifications/cancelled", {"requestId": 1}, None), session)
    stand.legacy({"jsonrpc": "2.0", "id": told.messages[0]["id"], "result": YES}, session)
    assert told.ended and len(stand.calls) == count


# ---- legacy: subscriptions ----


def acknowledge(listen: Opened, *uris: str) -> None:
    assert listen.call.method == "subscriptions/listen"
    honoured = {"toolsListChanged": True, "resourceSubscriptions": list(uris)}
    listen.sink.note(
        Notice("notifications/subscriptions/acknowledged", {"notifications": honoured})
    )


def subscribe(uri: str, ident: Any = 1, method: str = "resources/subscribe") -> dict[str, Any]:
    return rpc(method, {"uri": uri}, ident)


def test_subscriptions_stand_on_one_listen_that_is_replaced_when_they_change(stand: Stand) -> None:
    session = stand.session()
    stream = stand.get(session)
    first = stand.last
    acknowledge(first)
    told = stand.legacy(subscribe("a:1"), session)
    second = stand.last
    assert second.call.params["notifications"]["resourceSubscriptions"] == ["a:1"]
    waiting = [
        stand.legacy(subscribe("a:2", 2), session),
        stand.legacy(subscribe("bad:", 3), session),
    ]
    assert stand.last is second and first.cancelled == []
    first.sink.note(Notice("notifications/resources/updated", {"uri": "a:0"}))
    acknowledge(second, "a:1")
    third = stand.last
    assert (
        told.json["result"] == {}
        and first.cancelled
        and third.call.params["notifications"]["resourceSubscriptions"] == ["a:1", "a:2", "bad:"]
    )
    acknowledge(third, "a:1", "a:2")
    assert (
        waiting[0].json["result"] == {}
        and waiting[1].json["error"]["code"] == atrax.LEGACY_RESOURCE_NOT_FOUND
    )
    first.sink.note(Notice("notifications/resources/updated", {"uri": "late"}))
    third.sink.note(Notice("notifications/resources/updated", {"uri": "a:2"}))
    assert [m["params"]["uri"] for m in stream.messages] == ["a:0", "a:2"]
    told = stand.legacy(subscribe("a:1", 4, "resources/unsubscribe"), session)
    assert told.json["result"] == {}
    assert stand.last.call.params["notifications"]["resourceSubscriptions"] == ["a:2"]
    acknowledge(stand.last, "a:2")
    assert third.cancelled
    count = len(stand.calls)
    assert stand.legacy(subscribe("no:", 5, "resources/unsubscribe"), session).json["result"] == {}
    assert len(stand.calls) == count


@promise("scopes.session")
def test_a_session_with_more_rights_than_a_request_does_not_exist_for_it(stand: Stand) -> None:
    few, more = Scope([Grant(frozenset({"a"}))]), Scope([Grant(frozenset({"a", "b"}))])
    stand.scope = few
    session = stand.session()
    stand.get(session)
    first = stand.last
    acknowledge(first)
    stand.scope = atrax.EVERYTHING
    stand.legacy(tool(), session)
    assert stand.last.call.method == "tools/call"
    assert stand.last.call.owner.scope.everything
    listen = stand.calls[-2]
    assert listen.call.owner.scope.everything  # it hears of all that it sees now
    acknowledge(listen)
    assert first.cancelled
    assert listen.call.owner == first.call.owner
    for stand.scope in (few, more):
        assert stand.legacy(tool(2), session).status == 404
        assert stand.get(session).status == 404


@promise("scopes.session")
def test_a_retry_with_fewer_rights_than_its_call_finds_nothing(stand: Stand) -> None:
    opened, asked = parked(stand, "one")
    stand.scope = Scope([Grant(frozenset({"a"}))])
    told = retry(stand, asked["requestState"], {"one": YES})
    assert told.json["error"]["code"] == atrax.INVALID_PARAMS
    assert opened.answers == []
    stand.scope = atrax.EVERYTHING
    retry(stand, asked["requestState"], {"one": YES})
    assert [ask.key for ask, _ in opened.answers] == ["one"]


def test_a_listen_that_fails_fails_its_subscribes_and_is_opened_again(stand: Stand) -> None:
    session = stand.session()
    told = stand.legacy(subscribe("a:1"), session)
    stand.last.fails(atrax.UNAVAILABLE, "down")
    assert told.json["error"]["message"] == "down"
    told = stand.legacy(subscribe("a:1"), session)
    acknowledge(stand.last, "a:1")
    stand.last.result({})
    count = len(stand.calls)
    stand.wait(6)
    assert len(stand.calls) == count + 1
    assert stand.last.call.params["notifications"]["resourceSubscriptions"] == ["a:1"]
    assert stand.legacy(subscribe(5), session).json["error"]["code"] == atrax.INVALID_PARAMS  # type: ignore[arg-type]


def test_changed_roots_are_told_to_the_sessions_calls(stand: Stand) -> None:
    session = stand.session()
    stand.legacy(tool(), session)
    stand.legacy(rpc("notifications/roots/list_changed", None, None), session)
    assert [notice.method for notice in stand.last.notes] == ["notifications/roots/list_changed"]


# ---- 2024-11-05 ----


class Old:
    """A client of the HTTP+SSE transport."""

    def __init__(self, stand: Stand, endpoint: str = "") -> None:
        self.stand, self.endpoint, self.told = stand, endpoint, Told()
        request = HttpRequest("GET", "/sse", "", {"accept": "text/event-stream"}, b"", "")
        stand.clients.sse(request, self.told, Owner("anonymous"), endpoint)
        self.path, _, self.query = self.told.events[0]["data"].partition("?")

    def send(self, body: Any, who: str = "anonymous") -> Told:
        told = Told()
        headers = {"content-type": "application/json"}
        request = HttpRequest("POST", self.path, self.query, headers, json.dumps(body).encode(), "")
        try:
            self.stand.clients.messages(request, told, Owner(who), self.endpoint)
        except HttpError as error:
            told.full(error.status, (), b"")
        return told


def test_the_old_transport_has_one_stream_for_everything(stand: Stand) -> None:
    old = Old(stand, "git")
    assert old.told.events[0]["event"] == "endpoint" and old.path == "/servers/git/messages"
    assert old.send(initialize("2024-11-05")).status == 202
    assert old.told.messages[0]["result"]["protocolVersion"] == "2024-11-05"
    old.send(rpc("notifications/initialized", None, None))
    acknowledge(stand.last)
    stand.last.sink.note(Notice("notifications/tools/list_changed", {}))
    old.send(tool(1, progressToken=1))
    stand.last.sink.note(Notice("notifications/progress", {"progress": 1}))
    stand.last.result({"content": []})
    assert [m.get("method", m.get("id")) for m in old.told.messages[1:]] == [
        "notifications/tools/list_changed", "notifications/progress", 1,
    ]  # fmt: skip
    assert "id" not in old.told.events[-1]
    assert old.send(rpc("ping"), who="bob").status == 404
    old.send(tool(2))
    old.told.leave()
    assert stand.last.cancelled and len(stand.gone) == 1
    assert old.send(rpc("ping")).status == 404


def test_the_old_transport_relays_asks_and_ends_when_atrax_closes(stand: Stand) -> None:
    old = Old(stand)
    assert old.path == "/messages"
    old.send(initialize("2024-11-05", {"sampling": {}}))
    old.send(tool())
    stand.last.asks("a", "sampling/createMessage", includeContext="thisServer", messages=[])
    old.send({"jsonrpc": "2.0", "id": old.told.messages[-1]["id"], "result": SAMPLED})
    assert stand.last.answers[0][1].result == SAMPLED
    stand.clients.close()
    assert old.told.ended


def test_nothing_is_left_of_ten_thousand_sessions(stand: Stand) -> None:
    stand.clients.limits = Limits(sessions=20_000)
    for _ in range(10_000):
        stand.session()
    stand.time += 4000
    stand.wait(0.2)
    assert not stand.clients.legacy.sessions and len(stand.gone) == 10_000


# ---- whatever happens, in whatever order ----


class Chaos:
    """A stand where clients, children and time do as they like; what they may not do, they don't.

    A Told asserts that a response begins and ends once; `check` that it ends at most with one answer."""

    def __init__(self, stand: Stand) -> None:
        self.stand = stand
        self.replies: list[Told] = []
        self.sessions: list[str] = ["gone"]
        self.states: list[str] = ["forged"]
        self.asks = 0
        self.moves: list[Callable[[int], None]] = [
            self.modern_call, self.modern_call, self.retry, self.retry, self.listen, self.session, self.legacy_call,
            self.legacy_call, self.batch, self.cancel, self.answer, self.answer, self.get, self.resume, self.subscribe,
            self.delete, self.leave, self.ask, self.ask, self.note, self.take_back, self.result, self.fail,
            self.input_required, self.acknowledge, self.pass_time, self.stall, self.drop,
        ]  # fmt: skip

    def pick(self, things: list[Any], number: int) -> Any:
        return things[-1 - number % len(things)] if things else None

    def keep(self, told: Told) -> Told:
        self.replies.append(told)
        for one in self.replies:
            if one.ended and one.status == 200 and b"requestState" in one.body:
                found = one.messages if one.streams else [one.json]
                self.states += [
                    m["result"]["requestState"]
                    for m in found
                    if isinstance(m, dict) and "result" in m
                ]
        return told

    @property
    def running(self) -> list[Opened]:
        return [opened for opened in self.stand.calls if not opened.over]

    # ---- clients ----

    def modern_call(self, n: int) -> None:
        meta = {"progressToken": n} if n % 2 else {}
        self.keep(self.stand.tool(capabilities={} if n % 5 == 0 else None, ident=n, meta=meta))

    def retry(self, n: int) -> None:
        answers = {f"k{key}": YES if (n + key) % 3 else 5 for key in range(self.asks)}
        self.keep(retry(self.stand, self.pick(self.states, n), answers, ident=n))

    def listen(self, n: int) -> None:
        self.keep(self.stand.modern("subscriptions/listen", {"notifications": {}}, ident=n))

    def session(self, n: int) -> None:
        told = self.keep(
            self.stand.legacy(initialize(atrax.LEGACY[n % 4], CAN_ALL if n % 3 else {}))
        )
        if told.status == 200:
            self.sessions.append(told.headers["mcp-session-id"])

    def legacy_call(self, n: int) -> None:
        session = self.pick(self.sessions, n) if n % 7 else None
        self.keep(
            self.stand.legacy(tool(n % 4, progressToken=n) if n % 2 else tool(n % 4), session)
        )

    def batch(self, n: int) -> None:
        self.keep(self.stand.legacy([tool(1), rpc("ping"), tool(2)], self.pick(self.sessions, n)))

    def cancel(self, n: int) -> None:
        self.stand.legacy(
            rpc("notifications/cancelled", {"requestId": n % 4}, None), self.pick(self.sessions, n)
        )

    def answer(self, n: int) -> None:
        response = {"jsonrpc": "2.0", "id": f"atrax-{n % 9}"}
        outcome = {"result": YES} if n % 3 else {"error": {"code": 1, "message": "no"}}
        self.stand.legacy({**response, **outcome}, self.pick(self.sessions, n))

    def get(self, n: int) -> None:
        self.keep(self.stand.get(self.pick(self.sessions, n)))

    def resume(self, n: int) -> None:
        self.keep(self.stand.get(self.pick(self.sessions, n), f"{n % 5}-{n % 3}"))

    def subscribe(self, n: int) -> None:
        method = "resources/subscribe" if n % 3 else "resources/unsubscribe"
        self.keep(
            self.stand.legacy(subscribe(f"a:{n % 3}", n, method), self.pick(self.sessions, n))
        )

    def delete(self, n: int) -> None:
        self.stand.send("DELETE", b"", {"mcp-session-id": self.pick(self.sessions, n)})

    def leave(self, n: int) -> None:
        told = self.pick([told for told in self.replies if not told.ended], n)
        if told is not None:
            told.leave()
            self.replies.remove(told)

    def stall(self, n: int) -> None:
        told = self.pick(self.replies, n)
        if told is not None:
            told.stalled = not told.stalled

    # ---- children ----

    def on(self, n: int) -> Opened | None:
        found: Opened | None = self.pick(self.running, n)
        return found

    def ask(self, n: int) -> None:
        if (opened := self.on(n)) is not None:
            self.asks += 1
            method = ("elicitation/create", "sampling/createMessage", "roots/list")[n % 3]
            opened.asks(f"k{self.asks}", method)

    def note(self, n: int) -> None:
        if (opened := self.on(n)) is not None:
            opened.sink.note(Notice("notifications/progress", {"progress": n}))
            opened.sink.note(Notice("notifications/message", {"level": "error", "data": n}))

    def take_back(self, n: int) -> None:
        if (opened := self.on(n)) is not None and self.asks:
            opened.sink.note(Notice("notifications/cancelled", {"requestId": f"k{n % self.asks}"}))

    def result(self, n: int) -> None:
        if (opened := self.on(n)) is not None:
            opened.result({"content": []})

    def fail(self, n: int) -> None:
        if (opened := self.on(n)) is not None:
            opened.fails(
                (atrax.CHILD_DIED, atrax.METHOD_NOT_FOUND, atrax.LEGACY_URL_ELICITATION)[n % 3]
            )

    def input_required(self, n: int) -> None:
        opened = self.on(n)
        if opened is not None and opened.call.method == "tools/call":
            opened.result([ROUND, {"resultType": "input_required", "requestState": "s"}][n % 2])

    def acknowledge(self, n: int) -> None:
        listens = [
            opened for opened in self.running if opened.call.method == "subscriptions/listen"
        ]
        if listens:
            acknowledge(self.pick(listens, n), "a:1")

    def pass_time(self, n: int) -> None:
        self.stand.wait((0.2, 6, 20, 301)[n % 4])

    def drop(self, n: int) -> None:
        if n % 3 == 0:
            self.stand.fallen = {"anonymous"}
            self.stand.clients.review()
            self.stand.fallen = set()

    def check(self) -> None:
        for told in self.replies:
            if told.status == 200 and told.streams:
                answers = [m for m in told.messages if "method" not in m]
                assert len(answers) <= 3 and (told.ended or len(answers) < 3)


@settings(suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 27), st.integers(0, 1000)), max_size=80))
def test_nothing_breaks_and_nothing_is_left_whatever_the_order(
    moves: list[tuple[int, int]],
) -> None:
    stand = Stand()
    chaos = Chaos(stand)
    for move, number in moves:
        chaos.moves[move](number)
    stand.clients.close()
    stand.wait(1)
    chaos.check()
    for told in chaos.replies:
        assert told.ended or told.closed is None
    assert_nothing_left(stand)
    assert chaos.running == []
