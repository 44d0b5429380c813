"""The two adapters and the probe, driven as what they are: lists of inputs and lists of events."""

from __future__ import annotations

import contextlib
import json
import pathlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import atrax
from atrax import Call, Error, Kind, Notice, Outcome, Owner, Probe

CHILDREN = pathlib.Path(__file__).parent / "children"
ALL: dict[str, Any] = {"offer": ["elicitation", "sampling", "roots"], "isolation": "session"}
LOUD = {"logging": {}, "resources": {"subscribe": True, "listChanged": True}}


class Talk:
    """What a host keeps of one process: its probe, then the peer that took over."""

    def __init__(self, host: Any, era: str = "auto") -> None:
        self.peer: Any = Probe(host, era)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.peer, name)


class Side:
    """Both ends of one process: what was written to it, what the host heard, and a clock to turn."""

    def __init__(self, **options: Any) -> None:
        self.now = 1000.0
        self.sent: list[Any] = []
        self.events: list[tuple[Any, ...]] = []
        self.config = atrax.ServerConfig(command="child", **options)
        self.limits = atrax.Limits()
        self.server, self.place = "srv", "srv#1"
        self.talk: Any = None

    # Host
    def ready(self, peer: Any) -> None:
        self.talk.peer = peer
        self.events.append(("ready", peer.offer.era, peer.offer.version))

    def unfit(self, reason: str) -> None:
        self.events.append(("unfit", reason))

    def changed(self, kind: Kind) -> None:
        self.events.append(("changed", kind))

    def told(self, notice: Notice) -> None:
        self.events.append(("told", notice.method))

    def logged(self, level: str, message: str) -> None:
        self.events.append(("logged", level, message))

    def freed(self) -> None:
        self.events.append(("freed",))

    # The pipe and the clock
    def write(self, line: bytes) -> None:
        assert b"\n" not in line
        self.sent.append(json.loads(line))

    def clock(self) -> float:
        return self.now

    def wait(self, peer: Any, seconds: float) -> None:
        self.now += seconds
        peer.wake(self.now)

    def hear(self, peer: Any, *messages: Any) -> None:
        for message in messages:
            line = message if isinstance(message, bytes) else json.dumps(message).encode()
            peer.receive(line, self.now)

    def last(self) -> Any:
        return self.sent[-1]

    def of(self, name: str) -> list[tuple[Any, ...]]:
        return [event for event in self.events if event[0] == name]

    def probe(self, era: str = "auto") -> Talk:
        self.talk = Talk(self, era)
        self.talk.start(self.now)
        return self.talk

    def legacy(self, capabilities: Any = LOUD, version: str = "2025-11-25") -> Talk:
        talk = self.probe("legacy")
        self.hear(talk, initialized(self.last()["id"], version, capabilities))
        self.sent.clear()
        self.events.clear()
        return talk

    def modern(self, capabilities: Any | None = None) -> Talk:
        talk = self.probe()
        self.hear(talk, discovered(self.last()["id"], [atrax.MODERN], capabilities))
        self.events.clear()
        return talk


class Ear:
    """A sink that writes down what it hears."""

    def __init__(self) -> None:
        self.notes: list[Notice] = []
        self.asks: list[atrax.Ask] = []
        self.ends: list[Outcome] = []

    def note(self, notice: Notice) -> None:
        assert not self.ends, "nothing may come after done"
        self.notes.append(notice)

    def ask(self, ask: atrax.Ask) -> None:
        assert not self.ends, "nothing may come after done"
        self.asks.append(ask)

    def done(self, outcome: Outcome) -> None:
        assert not self.ends, "done comes exactly once"
        self.ends.append(outcome)

    @property
    def error(self) -> Error:
        assert self.ends and self.ends[0].error is not None
        return self.ends[0].error

    @property
    def result(self) -> Any:
        assert self.ends, "not answered"
        assert self.ends[0].error is None, self.ends[0].error
        return self.ends[0].result


def call(method: str = "tools/call", **more: Any) -> Call:
    params = more.pop("params", {"name": "echo", "arguments": {}})
    return Call(method, params, Owner("ann"), "2025-11-25", **more)


def discovered(ident: int, versions: Any, capabilities: Any | None = None) -> Any:
    result = {
        "supportedVersions": versions,
        "capabilities": capabilities or {},
        "instructions": "hi",
    }
    result["_meta"] = {atrax.META_SERVER: {"name": "child", "version": "1"}}
    return {"jsonrpc": "2.0", "id": ident, "result": result}


def initialized(ident: int, version: Any, capabilities: Any | None = None) -> Any:
    result = {"protocolVersion": version, "capabilities": capabilities or {}}
    result["serverInfo"] = {"name": "child", "version": "1"}
    return {"jsonrpc": "2.0", "id": ident, "result": result}


def failed(ident: int, code: int, data: Any = None) -> Any:
    return {"jsonrpc": "2.0", "id": ident, "error": {"code": code, "message": "no", "data": data}}


def asking(ident: Any, method: str = "elicitation/create", **params: Any) -> Any:
    return {"jsonrpc": "2.0", "id": ident, "method": method, "params": params}


def notice(method: str, **params: Any) -> Any:
    return {"jsonrpc": "2.0", "method": f"notifications/{method}", "params": params}


def good(ident: int, **result: Any) -> Any:
    return {"jsonrpc": "2.0", "id": ident, "result": result}


def compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


# ---- The probe ----

UNSUPPORTED = atrax.UNSUPPORTED_VERSION


def refused(ident: int, *versions: str) -> Any:
    return failed(ident, UNSUPPORTED, {"supported": list(versions), "requested": "x"})


# What the child does, and what it is: discover's id is 1, initialize's the next.
PROBES: list[tuple[str, list[Any], str]] = [
    ("a modern server", [discovered(1, ["2026-07-28"])], "modern"),
    ("a server of both eras", [discovered(1, ["2026-07-28", "2025-11-25"])], "modern"),
    (
        "discover lists legacy only",
        [discovered(1, ["2025-11-25"]), initialized(2, "2025-11-25")],
        "legacy",
    ),
    ("unknown method", [failed(1, -32601), initialized(2, "2025-11-25")], "legacy"),
    ("any error at all", [failed(1, 17), initialized(2, "2024-11-05")], "legacy"),
    ("not initialized yet", [failed(1, -32002), initialized(2, "2025-06-18")], "legacy"),
    (
        "nonsense for a result",
        [good(1, supportedVersions=7), initialized(2, "2025-03-26")],
        "legacy",
    ),
    ("silent, then initialize", [3, initialized(2, "2025-11-25"), 1], "legacy"),
    (
        "slow, reads both, modern",
        [9, discovered(1, ["2026-07-28"]), initialized(2, "2025-11-25")],
        "modern",
    ),
    (
        "slow, answers in any order",
        [9, initialized(2, "2025-11-25"), discovered(1, ["2026-07-28"])],
        "modern",
    ),
    ("slow, reads both, legacy", [9, failed(1, -32601), initialized(2, "2025-11-25")], "legacy"),
    ("slow, legacy, other order", [9, initialized(2, "2025-11-25"), failed(1, -32601)], "legacy"),
    (
        "modern, refuses initialize first",
        [9, failed(2, -32601), discovered(1, ["2026-07-28"])],
        "modern",
    ),
    (
        "-32022 to initialize",
        [failed(1, -32601), refused(2, "2026-07-28"), discovered(3, ["2026-07-28"])],
        "modern",
    ),
    (
        "-32022 to initialize, slow",
        [9, refused(2, "2026-07-28"), discovered(1, ["2026-07-28"])],
        "modern",
    ),
    ("-32022, older only", [refused(1, "2024-11-05"), initialized(2, "2024-11-05")], "legacy"),
    (
        "-32022 to initialize, older",
        [failed(1, 1), refused(2, "2025-03-26"), initialized(3, "2025-03-26")],
        "legacy",
    ),
    ("-32022, none of ours", [refused(1, "2031-01-01")], "unfit"),
    ("another version", [failed(1, -32601), initialized(2, "2031-01-01")], "unfit"),
    ("no version", [failed(1, -32601), initialized(2, None)], "unfit"),
    ("refuses both", [failed(1, -32601), failed(2, -32601)], "unfit"),
    ("refuses both, slow", [9, failed(2, -32601), failed(1, -32601)], "unfit"),
    ("banners first", [b"Welcome!", b"", b"[]", discovered(1, ["2026-07-28"])], "modern"),
    ("never anything", [60], "auto"),
    ("answers of nobody's", [initialized(77, "2025-11-25"), discovered(0, ["2026-07-28"])], "auto"),
]


@pytest.mark.parametrize(("name", "script", "era"), PROBES, ids=[row[0] for row in PROBES])
def test_the_probe_finds_the_era(name: str, script: list[Any], era: str) -> None:
    side = Side()
    talk = side.probe()

    for step in script:
        if isinstance(step, int):
            side.wait(talk, step)
        else:
            side.hear(talk, step)

    ends = side.of("ready") + side.of("unfit")
    assert [end[0] if end[0] == "unfit" else end[1] for end in ends] == (
        [] if era == "auto" else [era]
    )
    assert talk.era == (era if era in ("modern", "legacy") else "auto")


def test_initialize_follows_two_seconds_of_silence_and_offers_what_the_config_says() -> None:
    side = Side(**ALL)
    talk = side.probe()
    assert talk.exited_on_probe  # if it died now

    side.wait(talk, 1.9)
    assert [message["method"] for message in side.sent] == ["server/discover"]
    side.wait(talk, 0.2)

    assert side.last()["method"] == "initialize"
    params = side.last()["params"]
    assert params["protocolVersion"] == "2025-11-25"
    assert params["clientInfo"]["name"] == "atrax"
    assert params["capabilities"] == {
        "elicitation": {"form": {}, "url": {}},
        "sampling": {"tools": {}, "context": {}},
        "roots": {"listChanged": True},
    }
    assert not talk.exited_on_probe


def test_nothing_is_said_before_the_process_runs() -> None:
    side = Side()
    talk = side.talk = Talk(side)
    side.wait(talk, 100)
    assert side.sent == []
    talk.start(side.now)
    assert side.last()["method"] == "server/discover"


def test_a_forced_era_is_not_probed() -> None:
    legacy, modern = Side(protocol="legacy"), Side(protocol="modern")
    old, new = legacy.probe(), modern.probe()
    assert legacy.last()["method"] == "initialize"
    assert "elicitation" in legacy.last()["params"]["capabilities"]
    assert "roots" not in legacy.last()["params"]["capabilities"]

    legacy.hear(old, refused(1, "2026-07-28"))
    modern.hear(new, failed(1, -32601))
    modern.wait(new, 10)

    assert legacy.of("unfit") and modern.of("unfit")
    assert len(legacy.sent) == len(modern.sent) == 1
    assert not new.exited_on_probe


def test_a_remembered_legacy_era_gives_way_to_modern_evidence() -> None:
    side = Side()
    talk = side.probe("legacy")
    side.hear(talk, refused(1, "2026-07-28"))
    assert side.last()["method"] == "server/discover"
    side.hear(talk, discovered(2, ["2026-07-28"]))
    assert talk.era == "modern"


def test_before_it_is_ready_a_child_is_answered_and_cannot_be_called() -> None:
    side = Side()
    talk = side.probe()
    ear = Ear()
    talk.send(call(), ear).cancel("")
    assert ear.error.code == atrax.UNAVAILABLE

    side.hear(talk, asking("p", "ping"), asking(5, "roots/list"))

    assert side.sent[-2] == {"jsonrpc": "2.0", "id": "p", "result": {}}
    assert side.sent[-1]["error"]["code"] == -32601


# ---- Calls, in both eras ----

PEERS: list[Callable[[Side], Talk]] = [Side.legacy, Side.modern]
both = pytest.mark.parametrize("make", PEERS, ids=["legacy", "modern"])


@both
def test_answers_find_their_calls_in_any_order(make: Callable[[Side], Talk]) -> None:
    side = Side()
    talk = make(side)
    ears = [Ear() for _ in range(5)]
    ids = []
    for ear in ears:
        talk.send(call(), ear)
        ids.append(side.last()["id"])
    assert len(set(ids)) == 5 and talk.open_calls == 5

    for index in (3, 0, 4, 1, 2):
        side.hear(talk, good(ids[index], index=index))

    assert [ear.result["index"] for ear in ears] == [0, 1, 2, 3, 4]
    assert {(ear.ends[0].server, ear.ends[0].place) for ear in ears} == {("srv", "srv#1")}
    assert talk.open_calls == 0 and len(side.of("freed")) == 5


@both
def test_a_result_travels_as_its_own_bytes(make: Callable[[Side], Talk]) -> None:
    side = Side()
    talk = make(side)
    raws = [b'{"a":1.0}', b' {"a" : [1, {"id":2}]} ', b"{}", b'{"t":"}\\u0000"}']
    for raw in raws:
        ear = Ear()
        talk.send(call(), ear)
        side.hear(talk, b'{"jsonrpc":"2.0","id":%d,"result":%b}\r' % (side.last()["id"], raw))
        assert ear.ends[0].raw == raw.strip()
        assert ear.result == json.loads(raw)


@both
@pytest.mark.parametrize(
    "shape",
    [
        b'{"result":{"a":1},"jsonrpc":"2.0","id":%d}',
        b'{ "jsonrpc":"2.0","id":%d,"result":{"a":1}}',
        b'{"jsonrpc":"2.0","id":%d,"error":null,"result":{"a":1}}',
    ],
)
def test_any_other_shape_is_decoded_whole(make: Callable[[Side], Talk], shape: bytes) -> None:
    side = Side()
    talk = make(side)
    ear = Ear()
    talk.send(call(), ear)
    side.hear(talk, shape % side.last()["id"])
    assert ear.result == {"a": 1}
    assert ear.ends[0].raw is None


BROKEN = {
    "a member behind the result": b'{"jsonrpc":"2.0","id":%d,"result":{"a":1},"id":999}',
    "not an object": b'{"jsonrpc":"2.0","id":%d,"result":[1]}',
    "null": b'{"jsonrpc":"2.0","id":%d,"result":null}',
    "not an object, other shape": b'{"result":5,"jsonrpc":"2.0","id":%d}',
    "NaN": b'{"jsonrpc":"2.0","id":%d,"result":{"a":NaN}}',
    "NaN, other shape": b'{"result":{"a":NaN},"jsonrpc":"2.0","id":%d}',
    "an integer beyond 64 bits": b'{"jsonrpc":"2.0","id":%d,"result":{"a":99999999999999999999}}',
    "the same, other shape": b'{"result":{"a":99999999999999999999},"jsonrpc":"2.0","id":%d}',
    "too deep": b'{"jsonrpc":"2.0","id":%%d,"result":{"a":%b}}' % (b"[" * 250 + b"]" * 250),
    "too deep, other shape": b'{"result":{"a":%b},"id":%%d,"jsonrpc":"2.0"}'
    % (b"[" * 250 + b"]" * 250),
    "cut off": b'{"jsonrpc":"2.0","id":%d,"result":{"a":"b',
    "both": b'{"jsonrpc":"2.0","id":%d,"error":{"code":1},"result":{"a":1}}',
    "no version": b'{"id":%d,"result":{"a":1}}',
    "an error that is none": b'{"jsonrpc":"2.0","id":%d,"error":"sorry"}',
}


@both
@pytest.mark.parametrize("line", BROKEN.values(), ids=BROKEN)
def test_a_broken_answer_fails_its_own_call_alone(
    make: Callable[[Side], Talk], line: bytes
) -> None:
    side = Side()
    talk = make(side)
    ear, other = Ear(), Ear()
    talk.send(call(), ear)
    ident = side.last()["id"]
    talk.send(call(), other)

    side.hear(talk, line % ident)

    if line.endswith(b'"id":999}'):  # the whole line says id 999: nobody's, and no harm done
        assert not ear.ends or ear.error.code == -32603
    else:
        assert ear.error.code == -32603
    assert not other.ends


@both
def test_late_double_and_foreign_answers_are_dropped(make: Callable[[Side], Talk]) -> None:
    side = Side()
    talk = make(side)
    ear, other = Ear(), Ear()
    handle = talk.send(call(), ear)
    ident = side.last()["id"]
    handle.cancel("changed my mind")
    talk.send(call(), other)
    live = side.last()["id"]

    for wrong in (ident, ident, 0, -1, 10**6, str(live), True, None, float(live)):
        side.hear(talk, {"jsonrpc": "2.0", "id": wrong, "result": {"x": 1}})
        side.hear(talk, compact({"jsonrpc": "2.0", "id": wrong, "result": {"x": 1}}))
    side.hear(talk, good(live, y=1), good(live, y=2))

    assert ear.error.code == atrax.CANCELLED
    assert other.result == {"y": 1}


@both
def test_a_childs_error_keeps_its_code_and_data(make: Callable[[Side], Talk]) -> None:
    side = Side()
    talk = make(side)
    ear = Ear()
    talk.send(call(), ear)
    side.hear(talk, failed(side.last()["id"], atrax.LEGACY_URL_ELICITATION, {"elicitations": []}))
    assert (ear.error.code, ear.error.message) == (-32042, "no")
    assert ear.error.data == {"elicitations": []}


@both
def test_the_params_of_a_call_are_written_and_stay_as_they_are(
    make: Callable[[Side], Talk],
) -> None:
    side = Side()
    talk = make(side)
    params = {
        "name": "t",
        "arguments": {"a": 1},
        "_meta": {"traceparent": "00-1"},
        "requestState": "s",
    }
    before = json.dumps(params)

    talk.send(call(params=params, progress=True), Ear())

    sent = side.last()
    assert json.dumps(params) == before
    assert sent["params"]["arguments"] == {"a": 1}
    assert sent["params"]["_meta"]["traceparent"] == "00-1"
    assert sent["params"]["_meta"]["progressToken"] == sent["id"]
    assert ("requestState" in sent["params"]) == (talk.era == "modern")


def test_a_modern_child_gets_the_envelope_of_each_request() -> None:
    side = Side()
    talk = side.modern()
    talk.send(
        call(
            capabilities={"sampling": {}}, client={"name": "ann", "version": "2"}, log_level="info"
        ),
        Ear(),
    )
    assert side.last()["params"]["_meta"] == {
        atrax.META_VERSION: "2026-07-28",
        atrax.META_CLIENT: {"name": "ann", "version": "2"},
        atrax.META_CAPABILITIES: {"sampling": {}},
        atrax.META_LOG_LEVEL: "info",
    }


@both
def test_progress_reaches_its_call_without_the_token(make: Callable[[Side], Talk]) -> None:
    side = Side()
    talk = make(side)
    asked, silent = Ear(), Ear()
    talk.send(call(progress=True), asked)
    first = side.last()["id"]
    talk.send(call(), silent)
    second = side.last()["id"]

    for token in (first, second, str(first), None, 10**9, True):
        side.hear(talk, notice("progress", progressToken=token, progress=1, total=2))

    assert [note.params for note in asked.notes] == [{"progress": 1, "total": 2}]
    assert silent.notes == []


# ---- Time and endings, in both eras ----


@both
def test_a_call_times_out_and_the_child_is_told(make: Callable[[Side], Talk]) -> None:
    side = Side(timeout=60)
    talk = make(side)
    ear = Ear()
    talk.send(call(), ear)
    ident = side.last()["id"]

    side.wait(talk, 59)
    assert not ear.ends
    side.wait(talk, 2)

    assert ear.error.code == atrax.TIMED_OUT
    assert ear.error.data["atrax"]["server"] == "srv"
    cancelled = [sent for sent in side.sent if sent["method"] == "notifications/cancelled"]
    assert cancelled[0]["params"]["requestId"] == ident
    assert talk.open_calls == 0


@both
def test_progress_restarts_the_clock_but_never_past_max_timeout(
    make: Callable[[Side], Talk],
) -> None:
    side = Side(timeout=10, max_timeout=25)
    talk = make(side)
    ear = Ear()
    talk.send(call(progress=True), ear)
    ident = side.last()["id"]
    for step in range(3):
        side.wait(talk, 8)
        assert not ear.ends
        side.hear(talk, notice("progress", progressToken=ident, progress=step))
    side.wait(talk, 2)
    assert ear.error.code == atrax.TIMED_OUT
    assert "max_timeout" in ear.error.message


@both
def test_a_dead_child_ends_every_call_and_takes_no_more(
    make: Callable[[Side], Talk],
) -> None:
    side = Side()
    talk = make(side)
    ears = [Ear() for _ in range(3)]
    for ear in ears:
        talk.send(call(), ear)
    ident = side.last()["id"]

    talk.lost("exited with 3")
    talk.lost("again")
    heard = len(side.events)
    side.hear(talk, good(ident), notice("tools/list_changed"), b"junk", notice("tasks/status"))
    assert len(side.events) == heard
    late = Ear()
    talk.send(call(), late)
    side.wait(talk, 1000)

    assert {ear.error.code for ear in [*ears, late]} == {atrax.CHILD_DIED}
    assert "exited with 3" in ears[0].error.message
    assert talk.open_calls == 0


@both
def test_a_sink_that_raises_costs_nobody_else_an_answer(
    make: Callable[[Side], Talk],
) -> None:
    class Bad(Ear):
        def done(self, outcome: Outcome) -> None:
            raise RuntimeError("boom")

        note = ask = done  # type: ignore[assignment]

    side = Side()
    talk = make(side)
    bad, fine = Bad(), Ear()
    talk.send(call(progress=True), bad)
    ident = side.last()["id"]
    talk.send(call(), fine)
    second = side.last()["id"]
    side.hear(
        talk, notice("progress", progressToken=ident, progress=1), good(ident), good(second, ok=1)
    )
    assert fine.result == {"ok": 1}
    assert [event[1] for event in side.of("logged")] == ["error", "error"]


@both
def test_a_silent_child_with_calls_in_flight_is_asked_for_a_sign_of_life(
    make: Callable[[Side], Talk],
) -> None:
    side = Side(timeout=300)
    talk = make(side)
    side.wait(talk, 1000)  # idle, not silent
    idle = len(side.sent)
    ear = Ear()
    talk.send(call(), ear)
    side.wait(talk, 5)
    assert len(side.sent) == idle + 1
    side.wait(talk, 31)

    assert side.last()["method"] == ("ping" if talk.era == "legacy" else "server/discover")
    assert talk.open_calls == 1
    side.wait(talk, 301)
    assert any("sign of life" in event[2] for event in side.of("logged"))


@both
def test_what_atrax_asks_for_itself_is_no_open_call(make: Callable[[Side], Talk]) -> None:
    side = Side()
    talk = make(side)
    ear = Ear()
    talk.send(call("tools/list", params={}), ear)
    assert talk.open_calls == 0
    side.hear(talk, compact(good(side.last()["id"], tools=[])))
    assert ear.ends[0].raw == b'{"tools":[]}'
    assert side.of("freed") == []


def test_one_call_that_ends_may_send_the_next_at_once() -> None:
    side = Side()
    talk = side.legacy()
    second = Ear()

    class Again(Ear):
        def done(self, outcome: Outcome) -> None:
            super().done(outcome)
            talk.send(call(), second)

    talk.send(call(), Again())
    talk.lost("gone")
    assert second.error.code == atrax.CHILD_DIED


@given(
    st.lists(st.one_of(st.binary(max_size=200), st.text(max_size=60).map(str.encode)), max_size=20)
)
def test_garbage_never_raises(lines: list[bytes]) -> None:
    for make in (*PEERS, Side.probe):
        side = Side()
        talk = make(side)
        for line in lines:
            talk.receive(line, side.now)
        side.wait(talk, 100)
        talk.lost("done")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
METHODS = st.sampled_from(
    [
        *atrax.LIST_CHANGED,
        *atrax.ASK_KINDS,
        *atrax.OF_NO_CALL,
        "ping",
        "notifications/progress",
        "notifications/message",
        "notifications/cancelled",
        "notifications/resources/updated",
        "notifications/subscriptions/acknowledged",
    ]
)
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.just("2.0") | JSON,
        "id": st.integers(0, 8) | JSON,
        "method": METHODS | JSON,
        "params": st.fixed_dictionaries(
            {},
            optional={
                "progressToken": st.integers(0, 8) | JSON,
                "requestId": st.integers(0, 8) | JSON,
                "level": st.sampled_from(atrax.LOG_LEVELS) | JSON,
                "uri": JSON,
                "_meta": JSON
                | st.fixed_dictionaries(
                    {},
                    optional={
                        atrax.META_INPUT_KEY: JSON,
                        atrax.META_TASK: JSON,
                        atrax.META_SUBSCRIPTION: st.integers(0, 8) | JSON,
                    },
                ),
            },
        )
        | JSON,
        "result": JSON,
        "error": st.fixed_dictionaries(
            {"code": st.integers(-40000, 10) | JSON}, optional={"data": JSON}
        )
        | JSON,
    },
)


@given(st.lists(MESSAGES, max_size=12))
def test_nearly_right_messages_never_raise_and_end_no_call_twice(messages: list[Any]) -> None:
    for make in PEERS:
        side = Side(**ALL)
        talk = make(side, {**LOUD, "tools": {"listChanged": True}})  # type: ignore[call-arg]
        ears = [Ear(), Ear()]
        talk.send(call(progress=True, log_level="debug"), ears[0])
        talk.send(
            call(
                "subscriptions/listen",
                params={"notifications": {"resourceSubscriptions": ["a://b"]}},
            ),
            ears[1],
        )
        side.hear(talk, *messages)
        for ear in ears:
            for ask in ear.asks:
                assert isinstance(ask.key, str)
        side.wait(talk, 100)
        talk.lost("done")
        assert [len(ear.ends) for ear in ears] == [1, 1]
        assert talk.open_calls == 0 and talk.parked == 0


def test_what_is_said_of_junk_is_bounded() -> None:
    side = Side()
    talk = side.legacy()
    for _ in range(1000):
        side.hear(talk, b"junk on stdout")
    assert len(side.of("logged")) == atrax.REMARKS
    side.wait(talk, atrax.WINDOW + 1)
    assert "980 more" in side.of("logged")[-1][2]


# ---- Legacy: whose ask is it ----


def test_an_ask_goes_to_the_one_open_call_and_its_answer_to_the_child() -> None:
    side = Side(**ALL)
    talk = side.legacy()
    ear = Ear()
    handle = talk.send(call(), ear)
    ident = side.last()["id"]

    side.hear(talk, asking(7, message="name?"))

    ask = ear.asks[0]
    assert (ask.method, ask.params) == ("elicitation/create", {"message": "name?"})
    assert talk.parked == 1 and talk.known_to_ask
    handle.answer(ask, Outcome(result={"action": "accept", "content": {"name": "Ann"}}))
    handle.answer(ask, Outcome(result={"action": "decline"}))  # once is enough
    assert side.last() == good(7, action="accept", content={"name": "Ann"})
    assert len(side.sent) == 2 and talk.parked == 0
    side.hear(talk, good(ident, done=1))
    assert ear.result == {"done": 1}


def test_an_ask_that_is_refused_by_the_client_is_an_error_for_the_child() -> None:
    side = Side()
    talk = side.legacy()
    ear = Ear()
    handle = talk.send(call(), ear)
    side.hear(talk, asking("a"), asking("b", "sampling/createMessage"))
    handle.answer(ear.asks[0], Outcome(error=Error(-1, "declined", {"x": 1})))
    handle.answer(ear.asks[1], Outcome(error=Error(atrax.CANCELLED, "gone")))
    assert side.sent[-2]["error"] == {"code": -1, "message": "declined", "data": {"x": 1}}
    assert side.sent[-1]["error"]["code"] == -32603


def refusal(side: Side) -> str:
    error = side.last()["error"]
    assert error["code"] == -32601
    return str(error["message"])


def test_an_ask_of_no_call_is_refused() -> None:
    side = Side(**ALL)
    talk = side.legacy()
    side.hear(talk, asking(1, "roots/list"))
    assert "nobody to ask" in refusal(side)
    assert not talk.known_to_ask


def test_an_ask_with_several_calls_open_is_refused_and_says_what_to_set() -> None:
    side = Side()
    talk = side.legacy()
    ears = [Ear(), Ear()]
    for ear in ears:
        talk.send(call(), ear)
    side.hear(talk, asking(1))
    assert "srv.concurrency" in refusal(side) and "processes" in refusal(side)
    assert talk.known_to_ask
    assert not ears[0].asks and not ears[1].asks


def test_a_parked_call_is_open_too() -> None:
    side = Side()
    talk = side.legacy()
    parked, other = Ear(), Ear()
    talk.send(call(), parked)
    side.hear(talk, asking(1))
    talk.send(call(), other)
    side.hear(talk, asking(2))
    assert refusal(side)
    assert len(parked.asks) == 1 and not other.asks


def test_a_list_is_never_whom_an_ask_belongs_to() -> None:
    side = Side()
    talk = side.legacy()
    ear = Ear()
    talk.send(call("tools/list", params={}), Ear())
    talk.send(call(), ear)
    side.hear(talk, asking(1))
    assert len(ear.asks) == 1


def test_a_cancelled_call_stays_open_until_it_is_answered() -> None:
    side = Side()
    talk = side.legacy()
    gone, live = Ear(), Ear()
    handle = talk.send(call(), gone)
    ident = side.last()["id"]
    handle.cancel("enough")
    assert side.last()["params"] == {"requestId": ident, "reason": "enough"}
    assert talk.overdue and talk.open_calls == 0

    side.hear(talk, asking(1))
    assert "cancelled" in refusal(side)
    talk.send(call(), live)
    side.hear(talk, asking(2))
    assert "2 calls" in refusal(side)
    side.hear(talk, good(ident, late=1), asking(3))

    assert not talk.overdue
    assert [ask.source for ask in live.asks] == [3]
    assert len(gone.ends) == 1 and not gone.asks


def test_a_call_that_timed_out_is_overdue_too() -> None:
    side = Side(timeout=5)
    talk = side.legacy()
    talk.send(call(), Ear())
    side.wait(talk, 6)
    assert talk.overdue


def test_a_modern_child_is_never_overdue() -> None:
    side = Side()
    talk = side.modern()
    talk.send(call(), Ear()).cancel("")
    assert not talk.overdue


def test_the_asks_of_a_call_that_is_cancelled_are_refused_to_the_child() -> None:
    side = Side()
    talk = side.legacy()
    ear = Ear()
    handle = talk.send(call(), ear)
    side.hear(talk, asking("q"))
    handle.cancel("")
    assert [sent.get("method") for sent in side.sent[-2:]] == ["notifications/cancelled", None]
    assert "cancelled" in refusal(side)
    assert talk.parked == 0
    handle.answer(ear.asks[0], Outcome(result={"action": "accept"}))
    assert refusal(side)


def test_the_clock_stands_still_while_a_person_is_asked() -> None:
    side = Side(timeout=10, max_timeout=20)
    talk = side.legacy()
    ear = Ear()
    handle = talk.send(call(), ear)
    side.wait(talk, 5)
    side.hear(talk, asking(1))
    side.wait(talk, 290)
    assert not ear.ends
    handle.answer(ear.asks[0], Outcome(result={"action": "accept"}))
    side.wait(talk, 4)
    assert not ear.ends
    side.wait(talk, 2)
    assert ear.error.code == atrax.TIMED_OUT


def test_what_was_not_offered_is_refused() -> None:
    side = Side(offer=["sampling"])
    talk = side.legacy()
    ear = Ear()
    talk.send(call(), ear)
    side.hear(talk, asking(1), asking(2, "roots/list"))
    assert "offer" in refusal(side) and not ear.asks


def test_the_child_can_ping_and_ask_for_nothing_else() -> None:
    side = Side()
    talk = side.legacy()
    side.hear(talk, asking("x", "ping"))
    assert side.last() == {"jsonrpc": "2.0", "id": "x", "result": {}}
    side.hear(talk, asking(3, "tools/call"))
    assert refusal(side)


def test_keys_are_the_childs_own_or_stable_and_always_unique() -> None:
    side = Side(**ALL)
    talk = side.legacy()
    ear = Ear()
    talk.send(call(), ear)
    hint = {atrax.META_INPUT_KEY: "user_name", "other": 1}

    side.hear(
        talk,
        asking(1, message="m", _meta=hint),
        asking(2, message="m", _meta={atrax.META_INPUT_KEY: "user_name"}),
        asking("mine"),
        asking(3),
        asking(4),
        asking(5, "roots/list"),
        asking("elicitation/create-1"),
        asking(6, _meta={atrax.META_INPUT_KEY: 7}),
        asking("x" * 500),
    )

    assert [ask.key for ask in ear.asks] == [
        "user_name",
        "user_name-2",
        "mine",
        "elicitation/create-1",
        "elicitation/create-2",
        "roots/list-1",
        "elicitation/create-1-2",
        "elicitation/create-3",
        "elicitation/create-4",
    ]
    assert ear.asks[0].params == {"message": "m", "_meta": {"other": 1}}
    assert ear.asks[1].params == {"message": "m"}


def test_the_child_can_take_an_ask_back() -> None:
    side = Side()
    talk = side.legacy()
    ear = Ear()
    handle = talk.send(call(), ear)
    side.hear(talk, asking(4), notice("cancelled", requestId=4))
    assert ear.notes == [Notice("notifications/cancelled", {"requestId": ear.asks[0].key})]
    assert talk.parked == 0
    handle.answer(ear.asks[0], Outcome(result={}))
    assert len(side.sent) == 1


def test_a_tasks_ask_goes_to_who_waits_for_its_result() -> None:
    side = Side()
    talk = side.legacy()
    ear, other = Ear(), Ear()
    talk.send(call(), other)
    talk.send(call("tasks/result", params={"taskId": "t1"}), ear)
    side.hear(talk, asking(1, _meta={atrax.META_TASK: {"taskId": "t1"}}))
    assert len(ear.asks) == 1 and not other.asks
    side.hear(talk, asking(2, _meta={atrax.META_TASK: {"taskId": "t2"}}))
    assert "task" in refusal(side)


def test_a_child_that_loops_cannot_pile_up_asks() -> None:
    side = Side()
    talk = side.legacy()
    ear = Ear()
    talk.send(call(), ear)
    for number in range(atrax.ASKS_PER_CALL + 5):
        side.hear(talk, asking(number))
    assert len(ear.asks) == atrax.ASKS_PER_CALL
    assert "wait already" in refusal(side)


def test_an_ask_that_cannot_be_read_is_answered() -> None:
    side = Side()
    talk = side.legacy()
    ear = Ear()
    talk.send(call(), ear)
    side.hear(
        talk,
        b'{"jsonrpc":"2.0","id":"q","method":"elicitation/create","params":{"n":1e999,"m":%b}}'
        % (b"9" * 30),
    )
    assert side.last()["id"] == "q" and side.last()["error"]["code"] == -32600
    assert not ear.asks


# ---- Legacy: the rest ----


def test_batches_are_read_from_2025_03_26_alone() -> None:
    for version, fine in (("2025-03-26", True), ("2025-06-18", False)):
        side = Side()
        talk = side.legacy(version=version)
        ears = [Ear(), Ear()]
        for ear in ears:
            talk.send(call(), ear)
        ids = [sent["id"] for sent in side.sent]
        side.hear(talk, [good(ids[1], n=1), notice("tools/list_changed"), 5, good(ids[0], n=0)])
        assert [len(ear.ends) for ear in ears] == ([1, 1] if fine else [0, 0])


def test_a_missing_resource_is_told_as_modern_clients_know_it() -> None:
    side = Side()
    talk = side.legacy()
    ear, other = Ear(), Ear()
    talk.send(call("resources/read", params={"uri": "a://b"}), ear)
    side.hear(talk, failed(side.last()["id"], -32002))
    talk.send(call(), other)
    side.hear(talk, failed(side.last()["id"], -32002))
    assert (ear.error.code, ear.error.data) == (-32602, {"uri": "a://b"})
    assert other.error.code == -32002


def test_the_log_level_only_ever_goes_down() -> None:
    side = Side()
    talk = side.legacy()
    for level in ("warning", "error", "debug", "debug", None):
        talk.send(call(log_level=level), Ear())
    levels = [sent["params"]["level"] for sent in side.sent if sent["method"] == "logging/setLevel"]
    assert levels == ["warning", "debug"]
    assert side.sent[0]["method"] == "logging/setLevel"  # before the call that wants it

    quiet = Side()
    quiet.legacy({}).send(call(log_level="debug"), Ear())
    assert [sent["method"] for sent in quiet.sent] == ["tools/call"]


@both
def test_a_log_message_goes_to_the_one_open_call_that_wants_it(
    make: Callable[[Side], Talk],
) -> None:
    side = Side()
    talk = make(side)
    ear, other = Ear(), Ear()
    talk.send(call(log_level="warning"), ear)
    side.hear(
        talk,
        notice("message", level="info", data="no"),
        notice("message", level="error", data="yes"),
    )
    talk.send(call(), other)
    side.hear(talk, notice("message", level="critical", logger="db", data={"a": 1}))
    assert [note.params["data"] for note in ear.notes] == ["yes"]
    assert not other.notes
    assert side.of("logged") == [("logged", "error", "db: {'a': 1}")]


@both
def test_what_changed_is_passed_on(make: Callable[[Side], Talk]) -> None:
    side = Side()
    talk = make(side)
    for kind in ("tools", "prompts", "resources"):
        side.hear(talk, notice(f"{kind}/list_changed"))
    kinds = [event[1] for event in side.of("changed")]
    assert kinds == [Kind.TOOLS, Kind.PROMPTS, Kind.RESOURCES, Kind.TEMPLATES]


@both
def test_what_belongs_to_no_call_is_told(make: Callable[[Side], Talk]) -> None:
    side = Side()
    talk = make(side)
    side.hear(
        talk, notice("tasks/status", taskId="t"), notice("elicitation/complete", elicitationId="e")
    )
    assert [event[1] for event in side.of("told")] == [
        "notifications/tasks/status",
        "notifications/elicitation/complete",
    ]


def test_roots_list_changed_reaches_a_child_of_one_session_alone() -> None:
    for isolation, sent in (("session", 2), ("shared", 1), ("principal", 1)):
        side = Side(isolation=isolation)
        handle = side.legacy().send(call(), Ear())
        handle.note(Notice("notifications/roots/list_changed", {}))
        handle.note(Notice("notifications/other", {}))
        assert len(side.sent) >= sent and len(side.sent) == sent


# ---- Listens ----


def listening(*uris: str, **more: Any) -> Call:
    return call(
        "subscriptions/listen",
        params={"notifications": {"resourceSubscriptions": list(uris), **more}},
    )


ACKNOWLEDGED = "notifications/subscriptions/acknowledged"


def test_a_legacy_listen_is_one_subscription_per_uri_however_many_listeners() -> None:
    side = Side()
    talk = side.legacy()
    one, two = Ear(), Ear()
    first = talk.send(listening("a://1", "a://2", "a://1"), one)
    second = talk.send(listening("a://1"), two)
    assert [sent["params"]["uri"] for sent in side.sent] == ["a://1", "a://2"]
    assert not one.notes and talk.open_calls == 0 and len(talk.listens) == 2

    side.hear(talk, notice("resources/updated", uri="a://1"))  # before it has answered
    side.hear(talk, good(side.sent[0]["id"]), failed(side.sent[1]["id"], -32601))

    assert [note.method for note in one.notes] == [ACKNOWLEDGED, "notifications/resources/updated"]
    assert one.notes[0].params == {"notifications": {"resourceSubscriptions": ["a://1"]}}
    assert two.notes[0].params == {"notifications": {"resourceSubscriptions": ["a://1"]}}

    side.hear(
        talk,
        notice("resources/updated", uri="a://1/part"),  # who listens knows what lies in what
    )
    assert len(one.notes) == 3 and len(two.notes) == 3

    first.cancel("")
    assert one.error.code == atrax.CANCELLED and len(side.sent) == 2
    second.cancel("")
    assert side.last()["method"] == "resources/unsubscribe"
    talk.lost("gone")
    assert len(two.ends) == 1


def test_a_legacy_child_without_subscribe_honours_nothing() -> None:
    side = Side()
    talk = side.legacy({"resources": {}})
    ear = Ear()
    talk.send(listening("a://1"), ear)
    assert ear.notes == [Notice(ACKNOWLEDGED, {"notifications": {}})] and not side.sent
    talk.lost("gone")
    assert ear.error.code == atrax.CHILD_DIED


def test_a_legacy_listen_ends_with_its_process() -> None:
    side = Side()
    talk = side.legacy()
    ear = Ear()
    talk.send(listening("a://1"), ear)
    talk.lost("gone")
    assert not ear.notes
    assert ear.error.code == atrax.CHILD_DIED


def tagged(method: str, ident: int, **params: Any) -> Any:
    return notice(method, _meta={atrax.META_SUBSCRIPTION: ident}, **params)


def test_a_modern_listen_is_a_real_one_and_does_not_time_out() -> None:
    side = Side()
    talk = side.modern()
    ear, other = Ear(), Ear()
    talk.send(listening("a://1"), ear)
    ident = side.last()["id"]
    handle = talk.send(listening("a://1"), other)
    second = side.last()["id"]

    side.hear(
        talk,
        tagged(
            "subscriptions/acknowledged", ident, notifications={"resourceSubscriptions": ["a://1"]}
        ),
        tagged("resources/updated", ident, uri="a://1"),
        tagged("resources/updated", 99, uri="a://1"),
        notice("resources/updated", uri="a://1"),
    )
    side.wait(talk, 10_000)

    assert [(note.method, note.params) for note in ear.notes] == [
        (ACKNOWLEDGED, {"notifications": {"resourceSubscriptions": ["a://1"]}}),
        ("notifications/resources/updated", {"uri": "a://1"}),
    ]
    assert not ear.ends and not other.notes and talk.open_calls == 0 and len(talk.listens) == 2
    side.hear(talk, notice("cancelled", requestId=ident))
    assert ear.result == {}
    handle.cancel("")
    assert side.last()["params"]["requestId"] == second


def test_a_modern_child_is_listened_to_for_its_list_changes_and_again_when_it_ends_that() -> None:
    side = Side()
    talk = side.modern(
        {"tools": {"listChanged": True}, "prompts": {}, "resources": {"listChanged": True}}
    )
    assert side.last()["method"] == "subscriptions/listen"
    assert side.last()["params"]["notifications"] == {
        "toolsListChanged": True,
        "resourcesListChanged": True,
    }
    ident = side.last()["id"]
    side.hear(talk, tagged("subscriptions/acknowledged", ident, notifications={}))
    assert side.of("changed") == []
    side.hear(talk, tagged("tools/list_changed", ident))
    assert side.of("changed") == [("changed", Kind.TOOLS)]

    side.hear(talk, good(ident, resultType="complete"))
    side.wait(talk, 0.5)
    assert side.last()["id"] == ident
    side.wait(talk, 1)
    again = side.last()["id"]
    assert again != ident
    side.hear(talk, tagged("subscriptions/acknowledged", again, notifications={}))

    # What changed meanwhile is not known, so all that was listened to is read again.
    assert [event[1] for event in side.of("changed")[1:]] == [
        Kind.TOOLS,
        Kind.RESOURCES,
        Kind.TEMPLATES,
    ]


def test_a_modern_child_that_has_no_listen_is_not_asked_again() -> None:
    side = Side()
    talk = side.modern({"tools": {"listChanged": True}})
    side.hear(talk, failed(side.last()["id"], -32601))
    side.wait(talk, 1000)
    assert [sent["method"] for sent in side.sent] == ["server/discover", "subscriptions/listen"]


def test_a_modern_child_must_not_ask() -> None:
    side = Side(**ALL)
    talk = side.modern()
    ear = Ear()
    talk.send(call(), ear)
    written = len(side.sent)
    side.hear(talk, asking(1), asking(2, "ping"))
    assert not ear.asks and len(side.sent) == written


# ---- The fixtures: real processes of one era each, and a driver that is as small as can be ----


class Running:
    """A child of `tests/children` in conversation, read line by line until something is so."""

    def __init__(self, script: str, **options: Any) -> None:
        command = [sys.executable, str(CHILDREN / script)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.side = Side(**{**ALL, **options})
        self.lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self.side.clock = time.monotonic  # type: ignore[method-assign]
        self.side.write, self._note = self._write, self.side.write  # type: ignore[method-assign]
        self.talk = self.side.talk = Talk(self.side)
        self.talk.start(time.monotonic())
        self.until(lambda: self.talk.era != "auto")

    def _write(self, line: bytes) -> None:
        self._note(line)
        assert self.process.stdin is not None
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line.rstrip(b"\n"))

    def until(self, so: Callable[[], object], limit: float = 10) -> None:
        deadline = time.monotonic() + limit
        while not so():
            assert time.monotonic() < deadline, "waited for too long"
            with contextlib.suppress(queue.Empty):
                self.talk.receive(self.lines.get(timeout=0.05), time.monotonic())
            self.talk.wake(time.monotonic())

    def call(self, method: str, params: Any, **more: Any) -> Ear:
        """Call, and answer every ask by `answer_to`."""
        ear = Ear()
        more.setdefault("capabilities", {"elicitation": {}, "sampling": {}, "roots": {}})
        handle = self.talk.send(call(method, params=params, **more), ear)
        answered = 0
        while not ear.ends:
            self.until(lambda seen=answered: ear.ends or len(ear.asks) > seen)
            for ask in ear.asks[answered:]:
                answered += 1
                handle.answer(ask, Outcome(result=answer_to(ask.method)))
        return ear

    def tool(self, name: str, **more: Any) -> Any:
        """Call a tool, and again with the answers for as long as a modern child requires input."""
        params: Any = {"name": name, "arguments": more.pop("arguments", {})}
        rounds = 0
        while True:
            result = self.call("tools/call", params, **more).result
            if result.get("resultType") != "input_required":
                return result
            rounds += 1
            assert rounds < 5
            answers = {
                key: answer_to(ask["method"]) for key, ask in result["inputRequests"].items()
            }
            params = {**params, "inputResponses": answers, "requestState": result["requestState"]}

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(10) == 0


def answer_to(method: str) -> Any:
    if method == "elicitation/create":
        return {"action": "accept", "content": {"name": "Ann", "color": "blue"}}
    if method == "sampling/createMessage":
        return {"role": "assistant", "model": "m", "content": {"type": "text", "text": "Paris"}}
    return {"roots": [{"uri": "file:///tmp"}]}


@pytest.fixture(params=["legacy", "modern"])
def child(request: pytest.FixtureRequest) -> Any:
    running = Running(f"{request.param}.py")
    assert running.talk.era == request.param
    yield running
    running.close()


def test_a_fixture_offers_what_the_suite_asks_for(child: Running) -> None:
    tools = child.call("tools/list", {}).result["tools"]
    names = {tool["name"] for tool in tools}
    assert tools[0]["name"] == "test_simple_text"  # the suite calls the first one with {}
    assert {"test_input_required_result_multi_round", "json_schema_2020_12_tool"} <= names
    assert len(child.call("prompts/list", {}).result["prompts"]) == 5
    assert len(child.call("resources/list", {}).result["resources"]) == 3
    read = child.call("resources/read", {"uri": "test://template/123/data"}).result
    assert json.loads(read["contents"][0]["text"])["id"] == "123"
    missing = child.call("resources/read", {"uri": "test://none"})
    assert (missing.error.code, missing.error.data) == (-32602, {"uri": "test://none"})
    prompt = child.call("prompts/get", {"name": "test_simple_prompt"}).result
    assert prompt["messages"][0]["role"] == "user"
    complete = {
        "ref": {"type": "ref/prompt", "name": "x"},
        "argument": {"name": "a", "value": "par"},
    }
    assert child.call("completion/complete", complete).result["completion"]["total"] == 3


EXPECTED = {
    "test_simple_text": "This is a simple text response for testing.",
    "test_input_required_result_elicitation": "Hello, Ann!",
    "test_input_required_result_sampling": "Paris",
    "test_input_required_result_list_roots": 'Roots: [{"uri": "file:///tmp"}]',
    "test_input_required_result_request_state": "state-ok",
    "test_input_required_result_multiple_inputs": "Got client_roots, greeting, user_name",
    "test_input_required_result_multi_round": "Ann likes blue",
    "test_input_required_result_capabilities": "Answered: greeting, user_name",
    "test_missing_capability": "LLM response: Paris",
}


def test_every_tool_of_a_fixture_ends_as_it_should(child: Running) -> None:
    got = {name: child.tool(name)["content"][0]["text"] for name in EXPECTED}
    assert got == EXPECTED
    for tool in child.call("tools/list", {}).result["tools"]:
        if not tool["name"].startswith("test_trigger"):
            result = (
                child.tool(tool["name"], capabilities=TASKS)
                if tool["name"] in TASK_TOOLS
                else child.tool(tool["name"])
            )
            assert result.get("content") or result.get("taskId"), tool["name"]
    assert child.tool("test_error_handling")["isError"] is True


TASKS = {"elicitation": {}, "extensions": {"io.modelcontextprotocol/tasks": {}}}
TASK_TOOLS = (
    "slow_compute",
    "failing_job",
    "protocol_error_job",
    "confirm_delete",
    "multi_input",
    "test_tool_with_task",
)


def test_progress_and_logs_of_a_fixture_reach_their_call(child: Running) -> None:
    params = {"name": "test_tool_with_progress", "arguments": {}}
    progress = child.call("tools/call", params, progress=True)
    assert [note.params["progress"] for note in progress.notes] == [0, 50, 100]
    logs = child.call("tools/call", {"name": "test_tool_with_logging"}, log_level="debug")
    assert len(logs.notes) == 3


def test_the_keys_of_a_legacy_childs_asks_are_its_own() -> None:
    child = Running("legacy.py")
    ear = child.call("tools/call", {"name": "test_input_required_result_multiple_inputs"})
    assert [ask.key for ask in ear.asks] == ["user_name", "greeting", "client_roots"]
    assert all("_meta" not in ask.params for ask in ear.asks)
    child.close()


def test_changes_of_a_fixture_are_heard(child: Running) -> None:
    ear = Ear()
    handle = child.talk.send(listening("test://watched-resource"), ear)
    child.until(lambda: ear.notes)
    assert ear.notes[0].params["notifications"] == {
        "resourceSubscriptions": ["test://watched-resource"]
    }

    child.tool("test_trigger_resource_update")
    child.until(lambda: len(ear.notes) == 2)
    assert ear.notes[1] == Notice(
        "notifications/resources/updated", {"uri": "test://watched-resource"}
    )

    child.tool("test_trigger_tool_change")
    child.until(lambda: child.side.of("changed"))
    assert "test_extra_tool" in {
        tool["name"] for tool in child.call("tools/list", {}).result["tools"]
    }
    child.tool("test_trigger_prompt_change")
    child.until(lambda: len(child.side.of("changed")) == 2)
    handle.cancel("")


def test_a_cancelled_call_of_a_fixture_is_overdue_for_good(child: Running) -> None:
    ear = Ear()
    handle = child.talk.send(call(params={"name": "test_tool_with_progress"}, progress=True), ear)
    child.until(lambda: ear.notes)
    handle.cancel("enough")
    assert child.tool("test_simple_text")["content"]
    assert bool(child.talk.overdue) == (child.talk.era == "legacy")


def test_a_modern_fixture_knows_its_own_state_only() -> None:
    child = Running("modern.py")
    params: Any = {"name": "test_input_required_result_tampered_state", "arguments": {}}
    first = child.call("tools/call", params).result
    again = {**params, "inputResponses": {"confirm": answer_to("elicitation/create")}}
    bad = child.call("tools/call", {**again, "requestState": first["requestState"] + "-TAMPERED"})
    assert bad.error.code == -32602
    asked = child.call("tools/call", {"name": "test_missing_capability"}, capabilities={})
    assert asked.error.code == -32021
    assert asked.error.data == {"requiredCapabilities": {"sampling": {}}}
    child.close()


def test_a_modern_fixture_has_tasks() -> None:
    child = Running("modern.py")
    made = child.call(
        "tools/call", {"name": "confirm_delete", "arguments": {"filename": "f"}}, capabilities=TASKS
    )
    task = {"taskId": made.result["taskId"]}
    state: Any = {}
    while state.get("status") != "input_required":
        state = child.call("tasks/get", task, capabilities=TASKS).result
    answers = {key: answer_to("elicitation/create") for key in state["inputRequests"]}
    child.call("tasks/update", {**task, "inputResponses": answers}, capabilities=TASKS)
    while state["status"] != "completed":
        state = child.call("tasks/get", task, capabilities=TASKS).result
    assert state["result"]["content"][0]["text"] == "f: accept"
    refused_task = child.call("tools/call", {"name": "failing_job"})
    assert refused_task.error.code == -32021
    child.close()
