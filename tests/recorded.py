"""Small recorders for the middle: a Pool whose processes answer what a test tells them, and sinks.

They stand at the seams of section Message, so Catalogue and Subscriptions are driven without a loop,
a clock or a process: time is what the test says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import atrax
from atrax import Call, Error, Notice, Offer, Outcome, Owner

ALL = {
    "tools": {"listChanged": True},
    "prompts": {"listChanged": True},
    "resources": {"listChanged": True, "subscribe": True},
}
LISTS = {
    "tools/list": "tools",
    "prompts/list": "prompts",
    "resources/list": "resources",
    "resources/templates/list": "resourceTemplates",
}


class Time:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Turns:
    """`later` without a loop: what is put off runs when what runs now has returned, as deep and no deeper."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []

    def __call__(self, delay: float, work: Callable[[], None]) -> None:
        self.queue.append(work)
        if len(self.queue) == 1:
            while self.queue:
                self.queue[0]()
                del self.queue[0]


class Sent:
    """One call that a process got, and the Handle of who sent it."""

    def __init__(self, call: Call, sink: atrax.Sink) -> None:
        self.call, self.sink = call, sink
        self.answers: list[tuple[atrax.Ask, Outcome]] = []
        self.cancelled: str | None = None

    @property
    def uris(self) -> list[str]:
        return self.call.params["notifications"]["resourceSubscriptions"]

    def acknowledge(self, uris: list[str] | None = None) -> None:
        accepted = self.call.params["notifications"]
        params = {
            "notifications": {**accepted, "resourceSubscriptions": uris}
            if uris is not None
            else accepted
        }
        self.sink.note(Notice("notifications/subscriptions/acknowledged", params))

    def update(self, uri: str) -> None:
        self.sink.note(Notice("notifications/resources/updated", {"uri": uri}))

    def answer(self, ask: atrax.Ask, outcome: Outcome) -> None:
        self.answers.append((ask, outcome))

    def note(self, notice: Notice) -> None: ...

    def cancel(self, reason: str) -> None:
        if self.cancelled is None:
            self.cancelled = reason
            self.sink.done(Outcome(error=Error(atrax.CANCELLED, reason)))


class Process:
    """A Link. Lists are answered at once from `pages`; what a test wants to answer itself is in `held`."""

    def __init__(self, server: str) -> None:
        self.server, self.place = server, server + "#1"
        self.pages: dict[str, Any] = {}  # method → items, or a function of the cursor to a result
        self.sent: list[Sent] = []
        self.hold: set[str] = set()  # methods that the test answers itself
        self.accept = True  # acknowledge listens at once
        self.turns = Turns()

    def send(self, call: Call, sink: atrax.Sink) -> atrax.Handle:
        sent = Sent(call, sink)
        self.sent.append(sent)
        if call.method in self.hold:
            return sent
        if call.method == "subscriptions/listen":
            if self.accept:
                sent.acknowledge()
            return sent
        # The next page is asked for by `done`, and so on a thousand times: one after the other.
        self.turns(0, lambda: sink.done(self.outcome(call)))
        return sent

    def outcome(self, call: Call) -> Outcome:
        pages = self.pages.get(call.method, [])
        if isinstance(pages, Error):
            return Outcome(error=pages)
        if callable(pages):
            return Outcome(result=pages(call.params.get("cursor")))
        return Outcome(result={LISTS[call.method]: list(pages)})

    def calls(self, method: str) -> list[Sent]:
        return [sent for sent in self.sent if sent.call.method == method]

    @property
    def listens(self) -> list[Sent]:
        """Those that nobody has cancelled."""
        return [sent for sent in self.calls("subscriptions/listen") if sent.cancelled is None]


class Waiting:
    """A Lease that a Pool has not granted yet."""

    def __init__(self, server: str, ready: Callable[[Any], None]) -> None:
        self.server, self.ready = server, ready
        self.over = False

    def cancel(self) -> None:
        self.over = True


class Processes:
    """A Pool: one process per server, or an error in its place, or (neither) a lease that waits."""

    def __init__(self) -> None:
        self.there: dict[str, Process | Error] = {}
        self.leases: list[tuple[str, Owner | None]] = []
        self.waiting: list[Waiting] = []

    def lease(
        self, server: str, owner: Owner | None, place: str, ready: Callable[[Any], None]
    ) -> atrax.Lease:
        self.leases.append((server, owner))
        lease = Waiting(server, ready)
        if server in self.there:
            ready(self.there[server])
        else:
            self.waiting.append(lease)
        return lease

    def grant(self, server: str) -> None:
        """Its process is there: who waited for it gets it."""
        granted = [lease for lease in self.waiting if lease.server == server]
        self.waiting = [lease for lease in self.waiting if lease.server != server]
        for lease in granted:
            if not lease.over:
                lease.ready(self.there[server])

    def at(self, server: str, owner: Owner, place: str) -> Process | Error:
        return self.there[server]

    def gone(self, owner: Owner) -> None: ...


class Answers:
    """A Sink that keeps what came."""

    def __init__(self) -> None:
        self.notes: list[Notice] = []
        self.outcomes: list[Outcome] = []

    def note(self, notice: Notice) -> None:
        assert not self.outcomes, "nothing comes after done"
        self.notes.append(notice)

    def ask(self, ask: atrax.Ask) -> None:
        raise AssertionError("nobody asks here")

    def done(self, outcome: Outcome) -> None:
        assert not self.outcomes, "done comes once"
        self.outcomes.append(outcome)

    @property
    def honoured(self) -> dict[str, Any] | None:
        """What the acknowledgement says; it is the first note."""
        if not self.notes:
            return None
        assert self.notes[0].method == "notifications/subscriptions/acknowledged"
        return self.notes[0].params["notifications"]

    @property
    def news(self) -> list[str]:
        """What came behind the acknowledgement, in short: a URI or a list's name."""
        return [note.params.get("uri") or note.method.split("/")[1] for note in self.notes[1:]]


class Middle:
    """A Catalogue and its Subscriptions over recorded processes."""

    def __init__(self, servers: dict[str, dict[str, Any]], **options: Any) -> None:
        check = options.pop("check", None)
        self.time = Time()
        self.config = config(servers, **options)
        self.pool = Processes()
        self.record = atrax.Record()
        self.events: list[atrax.Event] = []
        self.record.watch(self.events.append)
        check = check or atrax.Policy(self.record).definition
        self.catalogue = atrax.Catalogue(
            self.config, self.pool, self.record, self.time, check, Turns()
        )
        self.changes: list[tuple[str, str]] = []
        self.catalogue.watch.append(self.changed)
        self.tasks = atrax.Tasks(lambda: 0.0)
        self.subscriptions = atrax.Subscriptions(
            self.config, self.catalogue, self.pool, self.record, self.time, self.tasks.home
        )

    @property
    def settled(self) -> bool:
        return all(server["settled"] for server in self.catalogue.counts().values())

    def start(
        self, server: str, capabilities: dict[str, Any] | None = None, **pages: Any
    ) -> Process:
        """Let `server` become ready. `pages`: tools=[…], prompts=[…], resources=[…], templates=[…]."""
        process = self.process(server, **pages)
        self.up(server, capabilities)
        return process

    def process(self, server: str, **pages: Any) -> Process:
        process = Process(server)
        names = {"templates": "resources/templates/list"}
        process.pages = {names.get(kind, f"{kind}/list"): items for kind, items in pages.items()}
        self.pool.there[server] = process
        return process

    def up(self, server: str, capabilities: dict[str, Any] | None = None) -> None:
        offer = Offer(
            ALL if capabilities is None else capabilities,
            {"name": server, "version": "1"},
            "",
            "2025-11-25",
            "legacy",
        )
        self.catalogue.up(server, offer)
        self.subscriptions.up(server, offer)
        self.pool.grant(server)

    def down(self, server: str) -> None:
        self.pool.there.pop(server, None)
        self.catalogue.down(server)
        self.subscriptions.down(server)

    def wait(self, seconds: float) -> None:
        """Let time pass, in the steps of the wiring."""
        end = self.time.now + seconds
        while self.time.now < end:
            self.time.now = min(self.time.now + 0.2, end)
            self.catalogue.wake(self.time.now)
            self.subscriptions.wake(self.time.now)

    def changed(self, kind: atrax.Kind, at: str, changed: Callable[[atrax.Scope], bool]) -> None:
        if changed(atrax.EVERYTHING):
            self.changes.append((kind.value, at))

    def ask_for(
        self, method: str, endpoint: str = "", any_output: bool = True, **params: Any
    ) -> list[Outcome]:
        """A list (or discover): the outcomes so far; the same list grows when a late one comes."""
        outcomes: list[Outcome] = []
        call = Call(
            method, params, Owner("anonymous"), "2026-07-28", endpoint, any_output=any_output
        )
        own = self.catalogue.discover if method == "server/discover" else self.catalogue.listing
        self.lease = own(call, outcomes.append)
        return outcomes

    def names(self, what: str = "tools", endpoint: str = "") -> list[str]:
        """The names that a client sees now."""
        method = {value: key for key, value in LISTS.items()}[what]
        (outcome,) = self.ask_for(method, endpoint)
        assert outcome.error is None, outcome.error
        key = {"resources": "uri", "resourceTemplates": "uriTemplate"}.get(what, "name")
        return [item[key] for item in body(outcome)[what]]

    def look_up(self, kind: atrax.Kind, name: str, endpoint: str = "") -> list[Any]:
        found: list[Any] = []
        self.lease = self.catalogue.lookup(kind, endpoint, name, found.append, Owner("anonymous"))
        return found

    def listen(self, endpoint: str = "", **wanted: Any) -> tuple[Answers, atrax.Handle]:
        answers = Answers()
        filter_ = {"notifications": wanted}
        call = Call("subscriptions/listen", filter_, Owner("anonymous"), "2026-07-28", endpoint)
        return answers, self.subscriptions.open(call, answers)

    def said(self, name: str) -> list[str]:
        return [str(event.fields["message"]) for event in self.events if event.name == name]


def config(servers: dict[str, dict[str, Any]], **options: Any) -> atrax.Config:
    entries = {name: {"command": "true", **entry} for name, entry in servers.items()}
    return atrax.Config.load(json.dumps({"mcpServers": entries, **options}), {})


def body(outcome: Outcome) -> dict[str, Any]:
    """The list result, decoded by another JSON library than the one that wrote it."""
    assert outcome.raw is not None
    result: dict[str, Any] = json.loads(outcome.raw)
    return result


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "inputSchema": {"type": "object"}, **more}


def prompt(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, **more}


def resource(uri: str, **more: Any) -> dict[str, Any]:
    return {"uri": uri, "name": uri, **more}


def template(uri: str, **more: Any) -> dict[str, Any]:
    return {"uriTemplate": uri, "name": uri, **more}
