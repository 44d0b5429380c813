"""Who may what: one view of rights, so that what a list shows is exactly what a call may reach."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
from typing import Any

import pytest
import wire
from conftest import Start, child
from hypothesis import given, settings
from hypothesis import strategies as st
from promises import promise
from recorded import ALL, LISTS, Answers, Middle, Process, prompt, resource, template, tool

import atrax
from atrax import Call, Error, Grant, Kind, Offer, Outcome, Owner, Rights, Scope

TASK_CLIENT: dict[str, Any] = {"extensions": {atrax.META + "tasks": {}}}


# ---- Scope and Grant ----


def scope(*grants: tuple[list[str] | None, list[tuple[str, str]] | None]) -> Scope:
    """From pairs of servers and of tools, each with its server."""
    return Scope(
        Grant(
            None if servers is None else frozenset(servers),
            None if tools is None else frozenset(tools),
        )
        for servers, tools in grants
    )


@pytest.mark.parametrize(
    ("grants", "sees", "whole", "all_of", "tools"),
    [
        ([(None, None)], "ab", "ab", "ab", ["a__x", "a__y", "b__x"]),
        ([], "", "", "", []),
        ([(["a"], None)], "a", "a", "a", ["a__x", "a__y"]),
        ([([], None)], "", "", "", []),
        ([(None, [])], "", "", "", []),
        ([(["a"], [])], "a", "a", "", []),
        ([(None, [("a", "a__x")])], "a", "", "", ["a__x"]),
        ([(None, [("a", "*")])], "a", "", "", ["a__x", "a__y"]),
        ([(["a"], [("a", "*_x")])], "a", "a", "", ["a__x"]),
        ([(["a"], [("b", "b__*")])], "a", "a", "", []),
        ([(["a"], None), (None, [("b", "b__x")])], "ab", "a", "a", ["a__x", "a__y", "b__x"]),
        ([(["a"], [("a", "a__x")]), (None, [("a", "a__y")])], "a", "a", "", ["a__x", "a__y"]),
        ([(["a"], [("a", "a__x")]), (["a"], None)], "a", "a", "a", ["a__x", "a__y"]),
    ],
)
def test_a_scope_allows_what_one_of_its_grants_allows(
    grants: Any, sees: str, whole: str, all_of: str, tools: list[str]
) -> None:
    some = scope(*grants)
    assert [one for one in "ab" if some.sees(one)] == list(sees)
    assert [one for one in "ab" if some.whole(one)] == list(whole)
    assert [one for one in "ab" if some.all_of(one)] == list(all_of)
    names = ("a__x", "a__y", "b__x")
    assert [name for name in names if some.tool(name[0], name)] == tools
    assert some.everything is (grants == [(None, None)])


def test_scopes_of_equal_grants_are_equal_and_cover_what_has_fewer() -> None:
    a, b = (["a"], None), (None, [("b", "b__x")])
    assert scope(a, b) == scope(b, a)
    assert hash(scope(a, b)) == hash(scope(b, a))
    assert scope(a, b).covers(scope(b))
    assert not scope(b).covers(scope(a, b))
    assert atrax.EVERYTHING.covers(scope(a))
    assert not scope(a).covers(atrax.EVERYTHING)


def test_a_glob_matches_no_name_of_absurd_length_and_none_is_kept() -> None:
    some = scope((None, [("a", "a__*")]))
    assert some.tool("a", "a__" + "x" * 900)
    assert not some.tool("a", "a__" + "x" * 4_000_000)
    for number in range(11_000):
        assert some.tool("a", f"a__{number}")
    assert len(some._tools) <= 10_000
    assert scope((["a"], None)).tool("a", "x" * 5_000)


# ---- A world: servers with all that can collide, seen through random rights ----

NAMES = ("alpha", "bravo", "carol")
PREFIXES = ("", "a", "a_", "a__b", "b")
OWN = ("t", "b__t", "_t", "a__t")  # of tools and prompts: with a prefix many are the same
SHOWN = ("r", "b_t")  # what tools are renamed to
URIS = ("x://1", "x://2", "y://1", "ui://1", "ui://2", "link://alpha", "link://carol", "z://1")
TEMPLATES = ("x://{id}", "y://{id}", "z://{+rest}")
GLOBS = ("*", "*t", "a*", "[ab]*", "a_*", "a__*", "a___*", "a__b*", "a__b_t", "a__b__*", "b__*",
         "b_?", "t", "a__t", "a___t", "b__t", "_t", "?__t", "a__b__t", "b__b__t", "a_*_t")  # fmt: skip


@dataclasses.dataclass
class Server:
    """One server of a world, as it is written in the config and as it answers."""

    name: str
    prefix: str
    state: str  # ready, starting, down (and never read)
    isolated: bool
    extensions: bool
    tools: list[str]
    rename: dict[str, str]
    ui: dict[str, str]  # tool → the resource that it names
    prompts: list[str]
    resources: list[str]
    templates: list[str]

    def entry(self) -> dict[str, Any]:
        isolation = {"isolation": "principal"} if self.isolated else {}
        rules = {"tools": {"rename": self.rename}} if self.rename else {}
        return {"prefix": self.prefix, "start_timeout": 1, **isolation, **rules}

    def pages(self) -> dict[str, list[Any]]:
        def named(item: dict[str, Any]) -> dict[str, Any]:
            return {**item, "title": f"of {self.name}"}

        ui = {one: {"_meta": {"ui": {"resourceUri": uri}}} for one, uri in self.ui.items()}
        return {
            "tools/list": [named(tool(one, **ui.get(one, {}))) for one in self.tools],
            "prompts/list": [named(prompt(one)) for one in self.prompts],
            "resources/list": [named(resource(one)) for one in self.resources],
            "resources/templates/list": [named(template(one)) for one in self.templates],
        }


def some(of: tuple[str, ...]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(of), unique=True, max_size=4)


@st.composite
def server(draw: st.DrawFn, name: str, prefix: str) -> Server:
    tools = draw(some(OWN))
    return Server(
        name,
        prefix,
        draw(st.sampled_from(("ready", "ready", "ready", "starting", "down"))),
        draw(st.booleans()),
        draw(st.sampled_from((True, True, False))),
        tools,
        draw(st.dictionaries(st.sampled_from(OWN), st.sampled_from(SHOWN), max_size=2)),
        {one: draw(st.sampled_from(("ui://1", "ui://2"))) for one in tools if draw(st.booleans())},
        draw(some(OWN)),
        draw(some(URIS[:3])),
        draw(some(TEMPLATES)),
    )


@st.composite
def rights(draw: st.DrawFn) -> Rights:
    """More often a part of a server than all of it."""
    servers = draw(some(NAMES)) if draw(st.booleans()) else None
    globs = st.lists(st.sampled_from(GLOBS), max_size=3)
    return Rights(
        servers=servers, tools=draw(globs) if draw(st.sampled_from((True, True, False))) else None
    )


@st.composite
def worlds(draw: st.DrawFn) -> World:
    prefixes = draw(st.lists(st.sampled_from(PREFIXES), unique=True, min_size=3, max_size=3))
    servers = [draw(server(*pair)) for pair in zip(NAMES, prefixes, strict=True)]
    granted = draw(st.lists(rights(), min_size=1, max_size=2))
    return World(draw(st.permutations(servers)), draw(st.sampled_from(("__", "_"))), granted)


# ---- The rule, as DESIGN has it (Who may what; Lists; Resource URIs), and no faster ----


@dataclasses.dataclass
class Rule:
    servers: list[Server]  # in config order
    separator: str
    granted: list[Rights]
    links: dict[str, str]  # URI → the server that handed it out to us

    def head(self, server: Server) -> str:
        return server.prefix + self.separator if server.prefix else ""

    def home(self, glob: str) -> str | None:
        """The server that a glob is of: the longest prefix that its literal part begins with."""
        literal = re.split(r"[*?[]", glob)[0]
        fits = [one for one in self.servers if literal.startswith(self.head(one))]
        return max(fits, key=lambda one: len(self.head(one))).name if fits else None

    def sees(self, name: str) -> bool:
        return any(
            name in one.servers
            if one.servers is not None
            else one.tools is None or name in map(self.home, one.tools)
            for one in self.granted
        )

    def whole(self, name: str) -> bool:
        return any(
            one.tools is None if one.servers is None else name in one.servers
            for one in self.granted
        )

    def all_of(self, name: str) -> bool:
        return any(
            one.tools is None and (one.servers is None or name in one.servers)
            for one in self.granted
        )

    def may(self, kind: Kind, server: Server, exposed: str) -> bool:
        if kind is not Kind.TOOLS:
            return self.whole(server.name)
        return any(
            (one.servers is None or server.name in one.servers)
            and (
                one.tools is None
                or any(
                    self.home(glob) == server.name and fnmatch.fnmatchcase(exposed, glob)
                    for glob in one.tools
                )
            )
            for one in self.granted
        )

    def at(self, endpoint: str) -> list[Server]:
        return [one for one in self.servers if endpoint in ("", one.name)]

    def exists(self, endpoint: str) -> bool:
        return not endpoint or (endpoint in NAMES and self.sees(endpoint))

    def own_names(self, server: Server, kind: Kind) -> dict[str, str]:
        """What is on the server's own endpoint: the name there → the server's own."""
        names: dict[str, str] = {}
        for own in getattr(server, "templates" if kind is Kind.TEMPLATES else kind.value):
            shown = server.rename.get(own, own) if kind is Kind.TOOLS else own
            names.setdefault(shown, own)
        return names if server.state == "ready" else {}

    def listed(self, kind: Kind, endpoint: str) -> dict[str, tuple[str, str, str]]:
        """What a list shows, in order: name → server, the server's own name, the name on /mcp."""
        by_uri = kind in (Kind.RESOURCES, Kind.TEMPLATES)
        table: dict[str, tuple[Server, str, str]] = {}
        for one in self.at(endpoint):
            for local, own in self.own_names(one, kind).items():
                exposed = local if by_uri else self.head(one) + local
                if not by_uri or self.whole(one.name):  # of URIs the first of those counts
                    table.setdefault(local if endpoint else exposed, (one, own, exposed))
        return {
            name: (one.name, own, exposed)
            for name, (one, own, exposed) in table.items()
            if self.may(kind, one, exposed)
        }

    def found(self, kind: Kind, endpoint: str, name: str) -> tuple[str, str, str] | None:
        """What a call of `name` reaches: as `listed` has it."""
        if not self.exists(endpoint):
            return None
        if (entry := self.listed(kind, endpoint).get(name)) is not None:
            return entry
        if kind is Kind.RESOURCES:
            holder = self.holder(endpoint, name)
            return None if holder is None else (holder, name, name)
        one = self.at(endpoint)[0]
        if not endpoint or not one.isolated or one.state != "ready":
            return None
        # It may be in our own process alone: any name that stands for nothing that is listed.
        back = {shown: own for own, shown in reversed(one.rename.items())}
        own = back.get(name, name) if kind is Kind.TOOLS else name
        renamed = kind is Kind.TOOLS and one.rename.get(own, own) != name
        if renamed or own in (one.tools if kind is Kind.TOOLS else one.prompts):
            return None
        exposed = self.head(one) + name
        return (one.name, own, exposed) if self.may(kind, one, exposed) else None

    def holder(self, endpoint: str, uri: str) -> str | None:
        """Who is asked for a URI that no list names."""
        there = [one for one in self.at(endpoint) if one.state == "ready" and self.whole(one.name)]
        if endpoint:
            return endpoint if there else None
        fits = {"x://{id}": r"x://[^/]*", "y://{id}": r"y://[^/]*", "z://{+rest}": r"z://.*"}
        merged: dict[str, str] = {}
        for one in there:
            for text in one.templates:
                merged.setdefault(text, one.name)
        for text, name in merged.items():
            if re.fullmatch(fits[text], uri):
                return name
        taken: set[str] = set()
        for one in self.servers:
            for local, own in self.own_names(one, Kind.TOOLS).items():
                exposed = self.head(one) + local
                if exposed not in taken and one in there and one.ui.get(own) == uri:
                    return one.name
                taken.add(exposed)
        linked = self.links.get(uri)
        return linked if linked in [one.name for one in there] else None

    def verdict(self, kind: Kind, endpoint: str, name: str) -> Any:
        """What becomes of a call: the server and its own name, or unknown, waiting, unavailable."""
        if not self.exists(endpoint):
            return "no such server"
        if (entry := self.found(kind, endpoint, name)) is not None:
            return entry[:2]
        by_uri = kind in (Kind.RESOURCES, Kind.TEMPLATES)
        states = [
            one.state
            for one in self.at(endpoint)
            if one.state != "ready"
            and (endpoint or by_uri or name.startswith(self.head(one)))
            and self.may(kind, one, self.head(one) + name if endpoint else name)
        ]
        if "starting" in states:
            return "waiting"
        return "unavailable" if states else "unknown"

    def shown(self, kind: Kind, endpoint: str, late: bool = False) -> list[str] | str:
        """What a list shows, or why none comes; `late`: nobody waits any more."""
        if not self.exists(endpoint):
            return "no such server"
        may = self.sees if kind is Kind.TOOLS else self.whole
        there = [one for one in self.at(endpoint) if may(one.name)]
        if not late and any(one.state == "starting" for one in there):
            return "waiting"
        if endpoint and (not there or there[0].state != "ready"):
            return "unavailable" if there else "unknown"
        return list(self.listed(kind, endpoint))

    def template(self, endpoint: str, text: str) -> Any:
        """What becomes of a completion for a template, or for a resource."""
        entry = self.listed(Kind.TEMPLATES, endpoint).get(text) if self.exists(endpoint) else None
        return entry[:2] if entry is not None else self.verdict(Kind.RESOURCES, endpoint, text)

    def task(self, endpoint: str, ident: str) -> str | None:
        """The server where a task of ours is; of two servers' equal ids /mcp has the first one's."""
        ready = [one.name for one in self.servers if one.state == "ready"]
        homes = [one for one in ready if ident in (f"me at {one}", "me anywhere")]
        home = endpoint or next(iter(homes), "")
        return home if home in homes and self.sees(home) else None


class World(Middle):
    """The middle of a gateway over such servers, and the one who asks."""

    def __init__(self, servers: list[Server], separator: str, granted: list[Rights]) -> None:
        super().__init__({one.name: one.entry() for one in servers}, separator=separator)
        self.servers, self.granted = servers, granted
        self.gateway = atrax.Gateway(
            self.config, self.record, self.catalogue, self.subscriptions,
            atrax.Policy(self.record), self.pool, self.time, self.tasks,
        )  # fmt: skip
        self.step_ups: list[tuple[str, str]] = []
        self.gateway.step_up = lambda owner, server, tool: self.step_ups.append((server, tool))
        grants = (one for rights in granted for one in atrax.scope_of(self.config, rights).grants)
        self.owner = Owner("me", scope=Scope(grants))
        self.rule = Rule(servers, separator, granted, {})
        self.everything = Rule(servers, separator, [Rights()], self.rule.links)
        self.unseen = [one.name for one in servers if not self.rule.sees(one.name)]
        for one in servers:
            self.begin(one)

    def __repr__(self) -> str:
        return f"World({self.servers}, {self.rule.separator!r}, {self.granted})"

    def begin(self, server: Server) -> None:
        name = server.name
        if server.state == "down":
            self.pool.there[name] = atrax.own_error(
                atrax.UNAVAILABLE, f'"{name}" is down', "", name
            )
            self.catalogue.down(name)
        if server.state != "ready":
            return
        process = self.process(name)
        process.pages = {method: lambda _: {} for method in METHODS} | server.pages()
        more: dict[str, Any] = {"extensions": {"x/y": {}}} if server.extensions else {}
        capabilities = {**ALL, "completions": {}, "tasks": {}, **more}
        info = {"name": name, "version": "1"}
        self.catalogue.up(name, Offer(capabilities, info, f"Ask {name}.", "2025-11-25", "legacy"))
        link = {"type": "resource_link", "uri": f"link://{name}", "name": "n"}
        self.catalogue.remember(self.owner, name, {"content": [link]})
        self.rule.links[f"link://{name}"] = name
        for principal in ("me", "other"):
            for ident in (f"{principal} at {name}", f"{principal} anywhere"):
                task = {"taskId": ident, "status": "working"}
                self.tasks.note(name, process.place, principal, task)

    def open(self, method: str, endpoint: str, **params: Any) -> Answers:
        answers = Answers()
        call = Call(method, params, self.owner, "2025-11-25", endpoint, TASK_CLIENT)
        self.gateway.open(call, answers)
        return answers

    def reach(self, method: str, endpoint: str, **params: Any) -> Any:
        """What becomes of a call, in the words of Rule.verdict."""
        processes = {n: one for n, one in self.pool.there.items() if isinstance(one, Process)}
        for process in processes.values():
            process.sent.clear()
        self.step_ups.clear()
        answers = self.open(method, endpoint, **params)
        heard = [(name, sent.call.params) for name, one in processes.items() for sent in one.sent]
        if not answers.outcomes:
            assert not heard
            return "waiting"
        (outcome,) = answers.outcomes
        if not heard:
            self.tells_nothing(outcome, endpoint + json.dumps(params))
            assert outcome.error is not None
            return word(outcome.error)
        ((name, got),) = heard
        assert (outcome.error, outcome.server) == (None, name)
        ref = got.get("ref", got)
        return name, ref.get("name") or ref.get("uri") or ref.get("taskId")

    def tells_nothing(self, outcome: Outcome, said: str = "") -> None:
        """No answer names a server that we do not see, unless what we said does."""
        text = json.dumps(dataclasses.asdict(outcome), default=bytes.decode)
        assert not [name for name in self.unseen if name in text and name not in said], text

    def shows(self, kind: Kind, endpoint: str) -> list[str] | str:
        """What a list shows, or in a word why it shows nothing."""
        return self.shown(kind, endpoint, self.open(METHOD[kind], endpoint).outcomes)

    def shown(self, kind: Kind, endpoint: str, outcomes: list[Outcome]) -> list[str] | str:
        if not outcomes:
            return "waiting"
        (outcome,) = outcomes
        self.tells_nothing(outcome, endpoint)
        if outcome.error is not None:
            return word(outcome.error)
        assert outcome.raw is not None
        key = {Kind.RESOURCES: "uri", Kind.TEMPLATES: "uriTemplate"}.get(kind, "name")
        return [item[key] for item in json.loads(outcome.raw)[kind.value]]

    def raw(self, kind: Kind, endpoint: str) -> bytes | None:
        """A list as it is on the wire."""
        outcomes = self.open(METHOD[kind], endpoint).outcomes
        return outcomes[0].raw if outcomes else None

    def task_ids(self) -> list[str]:
        """In the order in which they were made."""
        ready = [one.name for one in self.servers if one.state == "ready"]
        made = (ident for one in ready for who in ("me", "other") for ident in (f"{who} at {one}", f"{who} anywhere"))  # fmt: skip
        return list(dict.fromkeys(made))

    def steps(self, kind: Kind, endpoint: str, name: str, verdict: Any) -> list[tuple[str, str]]:
        """For what more rights would have helped: the server, and the tool as /mcp has it."""
        if verdict != "unknown":
            return []
        if endpoint and kind is not Kind.TOOLS and not self.rule.whole(endpoint):
            # On its own endpoint it is as if the server had no such capability at all.
            ready = any(one.state == "ready" for one in self.rule.at(endpoint))
            return [(endpoint, "")] if ready else []
        found = self.everything.found(kind, endpoint, name)
        return [] if found is None else [(found[0], found[2] if kind is Kind.TOOLS else "")]

    def spoken_names(self) -> list[str]:
        """All names that mean something to somebody, on /mcp or on an endpoint."""
        bare = dict.fromkeys((*OWN, *SHOWN))
        heads = [self.rule.head(one) for one in self.servers]
        return list(dict.fromkeys([*bare, *(head + one for head in heads for one in bare)]))


def word(error: Error) -> str:
    """An error as Rule.verdict calls it."""
    own = error.data.get("atrax", {}) if isinstance(error.data, dict) else {}
    if error.code == atrax.UNAVAILABLE:
        return "no such server" if own["reason"] == "disabled" else "unavailable"
    assert error.code in (-32602, -32601), error
    return "unknown"


METHOD = {kind: method for method, key in LISTS.items() for kind in Kind if kind.value == key}
METHODS = ("tools/call", "prompts/get", "resources/read", "completion/complete", "x/own",
           *atrax.TASK_METHODS)  # fmt: skip
ENDPOINTS = ("", *NAMES, "nobody")
ARGUMENT = {"name": "a", "value": ""}
EXAMPLES = settings(max_examples=max(60, settings.default.max_examples))


@promise("scopes.one_view")
@EXAMPLES
@given(worlds())
def test_what_a_list_shows_is_exactly_what_a_call_may_reach(world: World) -> None:
    rule = world.rule
    for endpoint in ENDPOINTS:
        for kind in Kind:
            assert world.shows(kind, endpoint) == rule.shown(kind, endpoint), (endpoint, kind)
        for name in world.spoken_names():
            verdict = rule.verdict(Kind.TOOLS, endpoint, name)
            assert world.reach("tools/call", endpoint, name=name) == verdict, (endpoint, name)
            assert world.step_ups == world.steps(Kind.TOOLS, endpoint, name, verdict)

            verdict, ref = rule.verdict(Kind.PROMPTS, endpoint, name), {"type": "ref/prompt", "name": name}  # fmt: skip
            assert world.reach("prompts/get", endpoint, name=name) == verdict, (endpoint, name)
            assert world.step_ups == world.steps(Kind.PROMPTS, endpoint, name, verdict)
            assert world.reach("completion/complete", endpoint, ref=ref, argument=ARGUMENT) == verdict  # fmt: skip
        for uri in (*URIS, *TEMPLATES):
            verdict = rule.verdict(Kind.RESOURCES, endpoint, uri)
            assert world.reach("resources/read", endpoint, uri=uri) == verdict, (endpoint, uri)
            assert world.step_ups == world.steps(Kind.RESOURCES, endpoint, uri, verdict)

            verdict, ref = rule.template(endpoint, uri), {"type": "ref/resource", "uri": uri}
            assert world.reach("completion/complete", endpoint, ref=ref, argument=ARGUMENT) == verdict  # fmt: skip


@promise("scopes.one_view")
@EXAMPLES
@given(worlds())
def test_what_can_be_read_can_be_subscribed_to_and_nothing_else(world: World) -> None:
    rule, listens = world.rule, {}
    for endpoint in ENDPOINTS:
        wanted = {"resourceSubscriptions": list(URIS), "taskIds": world.task_ids()}
        listens[endpoint] = world.open("subscriptions/listen", endpoint, notifications=wanted)
    world.wait(6)  # an acknowledgement waits 5 s for servers in their start

    heard = dict.fromkeys(NAMES, frozenset[str]())
    for endpoint, answers in listens.items():
        found = {uri: rule.found(Kind.RESOURCES, endpoint, uri) for uri in URIS}
        tasks = [one for one in world.task_ids() if rule.task(endpoint, one)]
        assert answers.honoured is not None
        assert answers.honoured.get("resourceSubscriptions", []) == [uri for uri in URIS if found[uri]]  # fmt: skip
        assert sorted(answers.honoured.get("taskIds", [])) == sorted(tasks)
        for uri, entry in found.items():
            if entry is not None:
                heard[entry[0]] |= {uri}
    for name, process in world.pool.there.items():
        if isinstance(process, Process):
            streams = [sent.call.params["notifications"] for sent in process.listens]
            uris = [uri for one in streams for uri in one.get("resourceSubscriptions", ())]
            assert set(uris) == heard[name]


@promise("scopes.one_view")
@EXAMPLES
@given(worlds())
def test_tasks_status_and_introductions_are_of_servers_that_the_owner_sees(world: World) -> None:
    rule, scope = world.rule, world.owner.scope
    for endpoint in ENDPOINTS:
        there = [one for one in rule.at(endpoint) if rule.sees(one.name)]
        ready = [one for one in there if one.state == "ready"]
        own = {ident: rule.task(endpoint, ident) for ident in world.task_ids()}
        for ident, home in own.items():
            for method in atrax.TASK_METHODS:
                expected = "unknown" if home is None else (home, ident)
                params: Any = {"inputResponses": {}} if method == "tasks/update" else {}
                assert world.reach(method, endpoint, taskId=ident, **params) == expected
        (outcome,) = world.open("tasks/list", endpoint).outcomes
        listed = (outcome.result or {}).get("tasks", ())
        assert sorted(one["taskId"] for one in listed) == sorted(one for one in own if own[one])

        open_to_us = bool(endpoint and ready and ready[0].extensions and rule.all_of(endpoint))
        assert world.reach("x/own", endpoint) == ((endpoint, None) if open_to_us else "unknown")

        (outcome, *_) = [*world.open("server/discover", endpoint).outcomes, Outcome()]
        world.tells_nothing(outcome, endpoint)
        if outcome.result is not None:
            said = outcome.result.get("instructions", "")
            assert re.findall(r"Ask (\w+)\.", said) == [one.name for one in ready]
            whole = not endpoint or rule.whole(endpoint)
            assert ("prompts" in outcome.result["capabilities"]) is whole
        else:
            assert endpoint
            assert not ready

    counts = world.catalogue.counts(scope)
    assert list(counts) == [one.name for one in world.servers if rule.sees(one.name)]
    for name, count in counts.items():
        for kind in Kind:
            assert count[kind.value] == len(rule.listed(kind, name)), (name, kind)
        assert ("hidden" in count) is ("error" in count) is rule.all_of(name)
    world.tells_nothing(Outcome(result=dict(counts)))


@promise("scopes.list_changed")
@EXAMPLES
@given(worlds(), st.data())
def test_who_sees_no_change_of_a_list_hears_of_none(world: World, data: st.DataObject) -> None:
    flags = dict.fromkeys(("toolsListChanged", "promptsListChanged", "resourcesListChanged"), True)
    listens = {
        one: world.open("subscriptions/listen", one, notifications=flags) for one in ENDPOINTS
    }
    for one in world.servers:
        if one.state == "starting":  # so that no list waits for it
            one.state = "down"
            world.begin(one)
    world.wait(6)
    before = {(kind, one): world.raw(kind, one) for kind in Kind for one in ENDPOINTS}
    changing = data.draw(st.sampled_from(world.servers))
    process = world.pool.there.get(changing.name)
    if not isinstance(process, Process):
        return

    process.pages |= data.draw(server(changing.name, changing.prefix)).pages()
    for kind in (Kind.TOOLS, Kind.PROMPTS, Kind.RESOURCES):
        world.catalogue.changed(changing.name, kind)

    for endpoint, answers in listens.items():
        changed = {
            "resources" if kind is Kind.TEMPLATES else kind.value
            for kind in Kind
            if world.raw(kind, endpoint) != before[kind, endpoint]
        }
        assert set(answers.news) == changed, endpoint


@promise("scopes.unknown")
@EXAMPLES
@given(worlds())
def test_nobody_waits_for_what_is_not_theirs(world: World) -> None:
    """A wait, an error of a server or a late answer would tell that there is something."""
    rule = world.rule
    pending = {
        (kind, one): world.open(METHOD[kind], one).outcomes for kind in Kind for one in ENDPOINTS
    }
    calls = {
        (one, name): world.open("tools/call", one, name=name).outcomes
        for one in ENDPOINTS
        for name in world.spoken_names()
        if rule.verdict(Kind.TOOLS, one, name) == "waiting"
    }
    world.wait(3)  # more than start_timeout, and than a list on /mcp waits

    for (kind, endpoint), outcomes in pending.items():
        expected = rule.shown(kind, endpoint, late=True)
        assert world.shown(kind, endpoint, outcomes) == expected, (kind, endpoint)
    for (endpoint, _), (outcome,) in calls.items():
        world.tells_nothing(outcome, endpoint)
        assert outcome.error is not None
        assert word(outcome.error) == "unavailable"


@promise("scopes.one_view")
def test_of_equal_names_the_first_server_keeps_it_even_for_who_may_not_use_it() -> None:
    bare = Server("alpha", "", "ready", False, False, ["a__t"], {}, {}, ["a__t"], [URIS[0]], [])
    prefixed = Server("bravo", "a", "ready", False, False, ["t"], {}, {}, ["t"], [URIS[0]], [])
    for granted in (Rights(servers=["bravo"]), Rights(tools=["a__*"])):
        world = World([bare, prefixed], "__", [granted])
        assert world.shows(Kind.TOOLS, "") == []
        assert world.reach("tools/call", "", name="a__t") == "unknown"
        assert world.shows(Kind.TOOLS, "bravo") == ["t"]
    world = World([bare, prefixed], "__", [Rights(servers=["bravo"])])
    assert world.shows(Kind.PROMPTS, "") == []
    assert world.shows(Kind.RESOURCES, "") == [URIS[0]]  # a URI is the first one's of one's own
    assert world.reach("resources/read", "", uri=URIS[0]) == ("bravo", URIS[0])


# ---- The gateway itself: two servers, and tokens for parts of them ----

ANN, BOB, EVE = (
    {"Authorization": f"Bearer atrax_a-token-for-{who}"} for who in ("ann", "bob", "eve")
)
TEXT, CHANGE = "test_simple_text", "test_trigger_{}_change"
GUARDED = {
    "auth": {
        "type": "token",
        "tokens": [
            {"name": "ann", "token": ANN["Authorization"][7:], "servers": ["old"]},
            {"name": "bob", "token": BOB["Authorization"][7:], "tools": [f"new__{TEXT}"]},
            {"name": "eve", "token": EVE["Authorization"][7:]},
        ],
    },
    "mcpServers": {"old": child("legacy"), "new": child("modern")},
}


@promise("scopes.one_view")
async def test_two_tokens_see_and_reach_two_different_gateways(atrax: Start) -> None:
    gateway = await (await atrax(GUARDED)).ready()
    for client in (gateway.modern(headers=ANN), await gateway.legacy(headers=ANN)):
        tools = [one["name"] for one in await client.list("tools")]
        assert f"old__{TEXT}" in tools
        assert all(one.startswith("old__") for one in tools)
        assert (await client.call(f"old__{TEXT}")).text
        for name in (f"new__{TEXT}", f"none__{TEXT}"):
            error = (await client.call(name)).error
            assert (error["code"], error["message"]) == (-32602, f"Unknown tool: {name}")
        prompts = [one["name"] for one in await client.list("prompts")]
        assert all(one.startswith("old__") for one in prompts)
        assert (await client.request("prompts/get", {"name": prompts[0]})).result
        uri = (await client.list("resources"))[0]["uri"]
        assert (await client.request("resources/read", {"uri": uri})).result
    for client in (gateway.modern(headers=BOB), await gateway.legacy(headers=BOB)):
        assert [one["name"] for one in await client.list("tools")] == [f"new__{TEXT}"]
        assert (await client.call(f"new__{TEXT}")).text
        assert await client.list("prompts") == await client.list("resources") == []
        name = prompts[0].replace("old__", "new__")
        assert (await client.request("prompts/get", {"name": name})).code == -32602
        assert (await client.request("resources/read", {"uri": uri})).code in (-32602, -32002)
        for other in (f"old__{TEXT}", f"new__{CHANGE.format('tool')}"):
            assert (await client.call(other)).code == -32602


@promise("scopes.unknown")
async def test_an_endpoint_that_is_not_for_a_token_answers_as_one_that_does_not_exist(
    atrax: Start,
) -> None:
    gateway = await (await atrax(GUARDED)).ready()
    http = wire.Http(gateway.url)
    for tail in ("mcp", "sse", "messages"):
        for method in ("GET", "POST", "DELETE"):
            answers = []
            for name in ("new", "nobody"):
                answer = await http.request(method, f"/servers/{name}/{tail}", ANN, b"{}")
                body = (await answer.body()).replace(name.encode(), b"NAME")
                answers.append((answer.status, body))
            assert answers[0] == answers[1], (method, tail)
            assert answers[0][0] == 404
    own = gateway.modern("new", headers=BOB)
    assert [one["name"] for one in await own.list("tools")] == [TEXT]
    assert (await own.call(TEXT)).text
    assert (await own.request("prompts/list")).code == -32601
    assert "prompts" not in (await own.request("server/discover")).result["capabilities"]

    status = {who["Authorization"][-3:]: json.loads((await http.get("/status", who))[1]) for who in (ANN, BOB, EVE)}  # fmt: skip
    shown = {who: list(body["servers"]) for who, body in status.items()}
    assert shown == {"ann": ["old"], "bob": ["new"], "eve": ["old", "new"]}
    assert status["ann"]["servers"]["old"]["pids"]
    bob = status["bob"]["servers"]["new"]
    assert (bob["tools"], bob["prompts"], bob["state"]) == (1, 0, "ready")
    assert not {"pids", "lastError", "hidden", "inFlight"} & bob.keys()
    metrics = (await http.get("/metrics", BOB))[1].decode()
    assert 'server="new"' in metrics
    assert "old" not in metrics
    assert "atrax_events_total" not in metrics
    assert "atrax_events_total" in (await http.get("/metrics", EVE))[1].decode()
    http.close()


@promise("scopes.list_changed")
@pytest.mark.parametrize("era", ["modern", "legacy"])
async def test_a_token_hears_of_changes_of_its_own_lists_alone(atrax: Start, era: str) -> None:
    gateway = await (await atrax(GUARDED)).ready()
    flags = {"toolsListChanged": True, "promptsListChanged": True}

    async def stream(headers: dict[str, str]) -> Any:
        if era == "legacy":
            return (await (await gateway.legacy(headers=headers)).listen()).messages()
        client = gateway.modern(headers=headers)
        messages = (await client.open("subscriptions/listen", {"notifications": flags})).messages()
        await anext(messages)  # the acknowledgement
        return messages

    eve = gateway.modern(headers=EVE)
    heard = [await stream(headers) for headers in (ANN, BOB, EVE)]

    # Of the first change nobody hears but Eve, of the second Ann as well; Bob sees none of them.
    for server, what in (("new", "tool"), ("old", "prompt")):
        assert (await eve.call(f"{server}__{CHANGE.format(what)}")).result
        assert (await anext(heard[2]))["method"] == f"notifications/{what}s/list_changed"
    assert (await anext(heard[0]))["method"] == "notifications/prompts/list_changed"
    gateway.process.terminate()  # which ends the stream, behind all that was written to it
    assert [one for one in [one async for one in heard[1]] if "list_changed" in str(one)] == []
