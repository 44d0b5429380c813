"""What all servers offer: reading, merging, names, waiting, pages, templates, reload."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import Middle, body, prompt, resource, template, tool

import atrax
from atrax import Entry, Error, Kind, Outcome, Owner

NO_CHANGES = {"tools": {}, "resources": {}}


def error_of(outcomes: list[Any]) -> Error:
    (outcome,) = outcomes
    error = outcome.error if isinstance(outcome, Outcome) else outcome
    assert isinstance(error, Error)
    return error


# ---- merging and names ----


def test_lists_are_merged_in_config_order_with_prefixes() -> None:
    middle = Middle({"b": {}, "a": {}, "bare": {"prefix": ""}}, separator=".")
    middle.start("a", tools=[tool("z"), tool("y")], prompts=[prompt("p")])
    middle.start("bare", tools=[tool("t")])
    middle.start("b", tools=[tool("x")], prompts=[prompt("p")])
    assert middle.names() == ["b.x", "a.z", "a.y", "t"]
    assert middle.names("prompts") == ["b.p", "a.p"]
    assert middle.names(endpoint="a") == ["z", "y"]


def test_resources_and_templates_keep_their_uris() -> None:
    middle = Middle({"a": {}, "b": {}})
    middle.start("a", resources=[resource("file:///x")], templates=[template("a://{id}")])
    middle.start("b", resources=[resource("file:///x"), resource("file:///y")])
    assert middle.names("resources") == ["file:///x", "file:///y"]
    assert middle.names("resourceTemplates") == ["a://{id}"]
    (entry,) = middle.look_up(Kind.RESOURCES, "file:///x")
    assert entry.server == "a"
    assert middle.names("resources", "b") == ["file:///x", "file:///y"]


def test_rules_allow_deny_rename_and_describe() -> None:
    rules = {
        "allow": ["get_*", "put"],
        "deny": ["*_secret"],
        "rename": {"get_a": "fetch"},
        "describe": {"get_a": "exactly", "get_*": "by glob"},
    }
    middle = Middle({"s": {"tools": rules}})
    tools = [
        tool(name, description="own") for name in ("get_a", "get_secret", "get_b", "put", "no")
    ]
    middle.start("s", tools=tools)
    (outcome,) = middle.ask_for("tools/list")
    shown = {item["name"]: item["description"] for item in body(outcome)["tools"]}
    assert shown == {"s__fetch": "exactly", "s__get_b": "by glob", "s__put": "own"}
    (entry,) = middle.look_up(Kind.TOOLS, "s__fetch")
    assert (entry.own, entry.local, entry.item["description"]) == ("get_a", "fetch", "own")
    error = error_of(middle.look_up(Kind.TOOLS, "s__get_a"))
    assert (error.code, error.message) == (-32602, "Unknown tool: s__get_a")
    hidden = {item["name"]: item["reason"] for item in middle.catalogue.counts()["s"]["hidden"]}
    assert hidden == {"get_secret": 'denied by tools.deny "*_secret"', "no": "not in tools.allow"}
    assert middle.said("catalogue.hidden") == []  # the user wants it so


def test_of_equal_names_the_first_in_config_order_wins_whoever_starts_first() -> None:
    middle = Middle({"a": {"prefix": ""}, "b": {"prefix": "x", "tools": {"rename": {"t": "u"}}}})
    middle.start("b", tools=[tool("t")])
    assert middle.look_up(Kind.TOOLS, "x__u")[0].server == "b"
    middle.start("a", tools=[tool("x__u")])
    assert middle.look_up(Kind.TOOLS, "x__u")[0].server == "a"
    assert middle.look_up(Kind.TOOLS, "u", "b")[0].server == "b"  # its own endpoint keeps it
    (hidden,) = middle.catalogue.counts()["b"]["hidden"]
    assert hidden["reason"] == 'on /mcp "x__u" is of "a"'
    assert "x__u" in middle.said("catalogue.hidden")[0]


def test_malformed_items_are_skipped_with_a_reason_and_harm_nobody() -> None:
    middle = Middle({"a": {}})
    items = [7, {"name": 3}, {"name": "no_schema"}, {"name": "x", "inputSchema": {"type": "array"}},
             tool("ok"), tool("ok", description="again"), tool("")]  # fmt: skip
    middle.start("a", tools=items, resources=[{"uri": "a://nameless"}])
    assert middle.names() == ["a__ok"]
    counts = middle.catalogue.counts()["a"]
    assert (counts["tools"], counts["resources"], len(counts["hidden"])) == (1, 0, 7)
    assert [item["name"] for item in counts["hidden"]][:2] == ["7", '{"name":3}']
    assert len(middle.said("catalogue.hidden")) == 2  # one line per list


def test_a_tool_that_policy_refuses_is_hidden_with_its_reason() -> None:
    asked: list[str] = []

    def check(entry: Entry) -> str:
        asked.append(entry.own)
        return "unknown dialect" if entry.own == "odd" else ""

    middle = Middle({"a": {}}, check=check)
    process = middle.start("a", tools=[tool("odd"), tool("fine")])
    assert middle.names() == ["a__fine"]
    assert error_of(middle.look_up(Kind.TOOLS, "a__odd")).code == -32602
    process.pages["tools/list"] = [tool("odd"), tool("fine"), tool("new")]
    middle.wait(1)
    middle.catalogue.changed("a", Kind.TOOLS)
    assert asked == [
        "odd",
        "fine",
        "odd",
        "new",
    ]  # what was shown and is the same is not asked again


def test_legacy_clients_get_no_output_schema_that_is_not_an_object() -> None:
    middle = Middle({"a": {}})
    tools = [
        tool("array", outputSchema={"type": "array"}),
        tool("object", outputSchema={"type": "object"}),
    ]
    middle.start("a", tools=tools)
    whole, cut = (
        body(middle.ask_for("tools/list", any_output=any_)[0])["tools"] for any_ in (True, False)
    )
    assert [item.get("outputSchema") for item in whole] == [{"type": "array"}, {"type": "object"}]
    assert [item.get("outputSchema") for item in cut] == [None, {"type": "object"}]


def test_unknown_members_pass_untouched() -> None:
    middle = Middle({"a": {}})
    item = tool("t", _meta={"x/y": [1, None]}, future={"a": 1.5}, title="T")
    middle.start("a", tools=[item])
    (outcome,) = middle.ask_for("tools/list")
    assert body(outcome)["tools"] == [{**item, "name": "a__t"}]


# ---- reading ----


def test_all_upstream_pages_are_read() -> None:
    def pages(cursor: str | None) -> dict[str, Any]:
        number = int(cursor or 0)
        result: dict[str, Any] = {
            "tools": [tool(f"t{number}")],
            "ttlMs": 9000 - number,
        }
        return result | ({"nextCursor": str(number + 1)} if number < 700 else {})

    middle = Middle({"a": {}})
    middle.start("a", tools=pages)
    assert middle.names() == [f"a__t{number}" for number in range(701)]
    (outcome,) = middle.ask_for("tools/list")
    assert outcome.ttl_ms == 8300


@pytest.mark.parametrize(
    ("pages", "items", "why"),
    [
        (lambda _: {"tools": [tool("t")], "nextCursor": "same"}, 1, "gave before"),
        (lambda c: {"tools": [], "nextCursor": str(int(c or 0) + 1)}, 0, "1,000 pages"),
        (lambda _: {"tools": [tool("t")], "nextCursor": 5}, 1, "not a string"),
        (lambda _: {"tools": [tool(f"t{n}") for n in range(50_001)]}, 50_000, "50,000 items"),
    ],
    ids=["repeated", "endless", "no-string", "huge"],
)
def test_a_list_without_end_is_cut_off_and_what_came_counts(
    pages: Any, items: int, why: str
) -> None:
    middle = Middle({"a": {}}, check=lambda entry: "")
    middle.start("a", tools=pages)
    assert middle.catalogue.counts()["a"]["tools"] == items
    assert why in middle.said("catalogue.reading")[0]


def test_a_list_that_fails_keeps_the_old_items_and_is_read_again() -> None:
    middle = Middle({"a": {}})
    process = middle.start("a", tools=[tool("t")])
    process.pages["tools/list"] = Error(-32603, "oops")
    middle.wait(1)
    middle.catalogue.changed("a", Kind.TOOLS)
    assert middle.names() == ["a__t"]
    assert "oops" in middle.said("catalogue.reading")[0]
    process.pages["tools/list"] = [tool("u")]
    middle.wait(1)
    assert middle.names() == ["a__u"]


def test_an_answer_that_is_no_list_is_a_failure() -> None:
    middle = Middle({"a": {}})
    process = middle.start("a", tools=lambda _: {"tools": "none"})
    assert 'has no list "tools"' in middle.said("catalogue.reading")[0]
    assert "tools/list cannot be read" in middle.catalogue.counts()["a"]["error"]
    assert error_of(middle.look_up(Kind.TOOLS, "a__t")).code == atrax.UNAVAILABLE
    process.pages["tools/list"] = [tool("t")]
    middle.wait(1)
    assert middle.names() == ["a__t"]
    assert middle.catalogue.counts()["a"]["error"] is None


def test_a_list_that_is_not_implemented_is_empty() -> None:
    middle = Middle({"a": {}})
    middle.start("a", templates=Error(-32601, "Method not found"), resources=[resource("a://1")])
    assert middle.names("resourceTemplates") == []
    assert middle.settled
    assert middle.said("catalogue.reading") == []


def test_announcements_during_a_reading_become_one_more_reading() -> None:
    middle = Middle({"a": {}})
    process = middle.process("a")
    process.hold = {"tools/list"}
    middle.up("a")
    for _ in range(50):
        middle.catalogue.changed("a", Kind.TOOLS)
    middle.wait(0.4)
    assert len(process.calls("tools/list")) == 1
    process.calls("tools/list")[0].sink.done(Outcome(result={"tools": []}))
    middle.wait(0.2)
    assert len(process.calls("tools/list")) == 2
    process.calls("tools/list")[1].sink.done(Outcome(result={"tools": []}))
    middle.wait(5)
    assert len(process.calls("tools/list")) == 2


def test_a_flood_of_announcements_costs_a_bounded_number_of_readings() -> None:
    middle = Middle({"a": {}})
    process = middle.start("a")
    before = len(process.sent)
    for _ in range(10):
        for _ in range(100):
            middle.catalogue.changed("a", Kind.TOOLS)
        middle.wait(0.1)
    assert len(process.sent) - before <= 6


def test_list_changed_of_resources_reads_the_templates_too() -> None:
    middle = Middle({"a": {}})
    process = middle.start("a")
    process.pages["resources/templates/list"] = [template("a://{x}")]
    middle.wait(1)
    middle.catalogue.changed("a", Kind.RESOURCES)
    assert middle.names("resourceTemplates") == ["a://{x}"]


def test_watchers_hear_of_visible_changes_alone() -> None:
    middle = Middle({"a": {"prefix": ""}, "b": {"prefix": "p", "tools": {"deny": ["hidden"]}}})
    middle.start("a", tools=[tool("p__same")])
    process = middle.start("b")
    middle.changes.clear()

    def now_lists(*tools: Any) -> list[tuple[str, str]]:
        process.pages["tools/list"] = list(tools)
        middle.wait(1)
        middle.changes.clear()
        middle.catalogue.changed("b", Kind.TOOLS)
        return middle.changes

    assert now_lists() == []
    assert now_lists(tool("hidden")) == []
    assert now_lists(tool("same")) == [("tools", "b")]  # on /mcp it is the tool of a
    assert now_lists(tool("same"), tool("t")) == [("tools", "b"), ("tools", "")]
    assert now_lists(tool("t"), tool("same")) == [("tools", "b")]
    assert now_lists(tool("t", x=1), tool("same")) == [("tools", "b"), ("tools", "")]
    assert now_lists(tool("t", x=True), tool("same")) == [("tools", "b"), ("tools", "")]
    assert now_lists(tool("t", x=True), tool("same")) == []


def test_checking_a_long_list_does_not_hold_the_loop() -> None:
    def slow(entry: Entry) -> str:
        time.sleep(0.001)
        return ""

    turns: list[Any] = []
    middle = Middle({"a": {}})
    middle.catalogue = atrax.Catalogue(
        middle.config,
        middle.pool,
        middle.record,
        middle.time,
        slow,
        lambda _, work: turns.append(work),
    )
    middle.start("a", tools=[tool(f"t{n}") for n in range(50)])
    waiting = middle.ask_for("tools/list")
    slices = 0
    while turns:
        assert waiting == []  # all or nothing
        slices += 1
        turns.pop(0)()
    assert slices >= 5
    assert len(body(waiting[0])["tools"]) == 50


def test_a_server_that_goes_while_its_list_is_checked_leaves_nothing_behind() -> None:
    def slow(entry: Entry) -> str:
        time.sleep(0.006)
        return ""

    turns: list[Any] = []
    middle = Middle({"a": {}})
    middle.catalogue = atrax.Catalogue(
        middle.config,
        middle.pool,
        middle.record,
        middle.time,
        slow,
        lambda _, work: turns.append(work),
    )
    middle.start("a", tools=[tool("old"), tool("old2")])
    (before,) = turns
    turns.clear()
    middle.down("a")
    middle.start("a", tools=[tool("new")])
    before()
    while turns:
        turns.pop(0)()
    assert middle.names() == ["a__new"]


def test_an_unchanged_definition_keeps_its_entry_and_what_is_cached_on_it() -> None:
    middle = Middle({"a": {}})
    process = middle.start("a", tools=[tool("t"), tool("u")])
    (entry,) = middle.look_up(Kind.TOOLS, "a__t")
    entry.validator = "compiled"
    process.pages["tools/list"] = [tool("v"), tool("t")]
    middle.wait(1)
    middle.catalogue.changed("a", Kind.TOOLS)
    assert middle.look_up(Kind.TOOLS, "a__t") == [entry]
    assert entry.validator == "compiled"


def test_a_silent_list_is_read_again_behind_an_answer_when_it_is_old() -> None:
    middle = Middle({"a": {}})
    process = middle.start("a", NO_CHANGES, tools=[tool("t")])
    process.pages["tools/list"] = [tool("u")]
    middle.wait(59)
    assert middle.names() == ["a__t"]
    middle.wait(2)
    assert middle.names() == ["a__t"]  # answered from memory, read behind it
    middle.wait(0.2)
    assert middle.names() == ["a__u"]
    middle.wait(200)
    assert len(process.calls("tools/list")) == 2  # nobody asks: nothing is read


def test_a_server_that_says_ttl_0_is_read_again_once_in_a_while_at_most() -> None:
    middle = Middle({"a": {}})
    process = middle.start("a", NO_CHANGES, tools=lambda _: {"tools": [], "ttlMs": 0})
    for _ in range(10):
        for _ in range(100):
            middle.names()
        middle.wait(0.1)
    assert len(process.calls("tools/list")) <= 6


def test_ttl_is_the_least_of_the_servers_and_lists_are_private() -> None:
    def says(**hints: Any) -> Any:
        return lambda _: {"tools": [], "cacheScope": "public", **hints}

    def answered(*hints: dict[str, Any]) -> int | None:
        middle = Middle({f"s{n}": {} for n in range(len(hints))})
        for number, hint in enumerate(hints):
            middle.start(f"s{number}", tools=says(**hint))
        (outcome,) = middle.ask_for("tools/list")
        assert not outcome.public
        return outcome.ttl_ms

    assert answered() == 60_000
    assert answered({}) == 60_000
    assert answered({"ttlMs": 300_000}) == 300_000
    assert answered({"ttlMs": 300_000}, {}) == 60_000
    assert answered({"ttlMs": 5}, {"ttlMs": 7}) == 5
    assert answered({"ttlMs": -5}) == 0
    assert answered({"ttlMs": True}) == 60_000


# ---- life: starting, up, down ----


def test_a_list_waits_two_seconds_for_servers_in_their_first_start() -> None:
    middle = Middle({"fast": {}, "slow": {}})
    middle.start("fast", tools=[tool("t")])
    answers = middle.ask_for("tools/list")
    middle.wait(1.9)
    assert answers == []
    middle.wait(0.2)
    assert [item["name"] for item in body(answers[0])["tools"]] == ["fast__t"]
    assert answers[0].ttl_ms == 0
    middle.changes.clear()
    middle.start("slow", tools=[tool("t")])
    assert ("tools", "") in middle.changes
    assert middle.names() == ["fast__t", "slow__t"]


def test_a_list_is_answered_as_soon_as_the_last_server_is_read() -> None:
    middle = Middle({"a": {}, "b": {}})
    answers = middle.ask_for("tools/list")
    middle.start("a", tools=[tool("t")])
    assert answers == []
    middle.start("b", tools=[tool("t")])
    assert len(body(answers[0])["tools"]) == 2
    assert answers[0].ttl_ms == 60_000


def test_a_failed_first_start_holds_nobody_up() -> None:
    middle = Middle({"good": {}, "bad": {}})
    middle.start("good", tools=[tool("t")])
    answers = middle.ask_for("tools/list")
    assert not middle.settled
    middle.down("bad")
    assert middle.settled
    assert answers[0].ttl_ms == 0
    assert middle.names() == ["good__t"]


def test_a_server_that_crashed_keeps_its_items() -> None:
    middle = Middle({"a": {}})
    middle.start("a", tools=[tool("t")])
    middle.down("a")
    assert middle.names() == ["a__t"]
    assert middle.look_up(Kind.TOOLS, "a__t")[0].server == "a"
    middle.start("a", tools=[tool("u")])
    assert middle.names() == ["a__u"]


def test_a_server_that_no_longer_declares_a_list_loses_its_items() -> None:
    middle = Middle({"a": {}})
    middle.start("a", tools=[tool("t")], prompts=[prompt("p")])
    middle.start("a", {"prompts": {}}, prompts=[prompt("p")])
    assert middle.names() == []
    assert middle.names("prompts") == ["a__p"]


def test_the_own_endpoint_waits_for_its_start_and_then_says_1010() -> None:
    middle = Middle({"a": {"start_timeout": 10}, "b": {}})
    answers = middle.ask_for("tools/list", "a")
    middle.wait(9)
    assert answers == []
    middle.wait(1.1)
    error = error_of(answers)
    assert error.code == atrax.UNAVAILABLE
    assert error.data["atrax"]["retryAfter"] == 1
    middle.down("b")
    middle.pool.there["b"] = Error(
        1010, "crashed", {"atrax": {"state": "backoff", "retryAfter": 7}}
    )
    assert error_of(middle.ask_for("tools/list", "b")).data["atrax"]["retryAfter"] == 7


def test_the_own_endpoint_refuses_lists_that_the_server_does_not_declare() -> None:
    middle = Middle({"a": {}})
    middle.start("a", {"tools": {}})
    error = error_of(middle.ask_for("prompts/list", "a"))
    assert (error.code, error.status) == (-32601, 404)
    assert middle.names("prompts") == []


def test_the_trouble_of_one_server_empties_no_other_list() -> None:
    middle = Middle({"a": {}, "b": {}})
    middle.start("a", tools=Error(-32603, "no"))
    middle.start("b", tools=[tool("t")])
    assert middle.names() == ["b__t"]
    assert middle.ask_for("tools/list")[0].ttl_ms == 0


def test_disabled_servers_offer_nothing() -> None:
    middle = Middle({"a": {}, "off": {"disabled": True}})
    middle.start("a")
    middle.up("off")
    middle.catalogue.changed("off", Kind.TOOLS)
    middle.catalogue.down("off")
    assert middle.settled
    assert middle.catalogue.counts()["off"]["settled"]
    assert error_of(middle.ask_for("tools/list", "off")).code == atrax.UNAVAILABLE
    assert error_of(middle.ask_for("server/discover", "off")).code == atrax.UNAVAILABLE
    assert error_of(middle.look_up(Kind.TOOLS, "t", "off")).code == atrax.UNAVAILABLE


# ---- looking up ----


def test_unknown_names_are_refused_at_once_when_all_is_read() -> None:
    middle = Middle({"a": {}})
    middle.start("a", tools=[tool("t")])
    assert error_of(middle.look_up(Kind.TOOLS, "a__x")).message == "Unknown tool: a__x"
    assert error_of(middle.look_up(Kind.TOOLS, "t")).code == -32602  # never split, never guessed
    assert error_of(middle.look_up(Kind.PROMPTS, "a__x")).message == "Unknown prompt: a__x"
    error = error_of(middle.look_up(Kind.RESOURCES, "a://x"))
    assert (error.code, error.data) == (-32602, {"uri": "a://x"})


def test_an_unknown_name_waits_for_servers_whose_prefix_it_has() -> None:
    middle = Middle({"a": {}, "slow": {}})
    middle.start("a", tools=[tool("t")])
    assert error_of(middle.look_up(Kind.TOOLS, "a__x")).code == -32602  # slow cannot have it
    found = middle.look_up(Kind.TOOLS, "slow__t")
    assert found == []
    middle.start("slow", tools=[tool("t")])
    assert found[0].server == "slow"


def test_an_unknown_name_becomes_1010_when_its_server_fails_or_is_late() -> None:
    middle = Middle({"a": {"start_timeout": 3}})
    late = middle.look_up(Kind.TOOLS, "a__t")
    middle.wait(3.2)
    assert error_of(late).code == atrax.UNAVAILABLE
    waiting = middle.look_up(Kind.TOOLS, "a__t")
    middle.down("a")
    assert error_of(waiting).code == atrax.UNAVAILABLE
    assert error_of(middle.look_up(Kind.TOOLS, "a__t")).code == atrax.UNAVAILABLE
    assert error_of(middle.look_up(Kind.TOOLS, "b__t")).code == -32602


def test_a_name_that_the_awaited_server_lacks_becomes_unknown() -> None:
    middle = Middle({"a": {}})
    found = middle.look_up(Kind.TOOLS, "a__nothing")
    middle.start("a", tools=[tool("t")])
    assert error_of(found).code == -32602


def test_a_cancelled_look_up_is_never_answered() -> None:
    middle = Middle({"a": {}})
    found = middle.look_up(Kind.TOOLS, "a__t")
    middle.lease.cancel()
    middle.start("a", tools=[tool("t")])
    middle.wait(60)
    assert found == []


def test_uris_wait_for_every_server_that_was_never_read() -> None:
    middle = Middle({"a": {}, "slow": {}})
    middle.start("a")
    found = middle.look_up(Kind.RESOURCES, "x://1")
    assert found == []
    middle.start("slow", templates=[template("x://{id}")])
    assert (found[0].server, found[0].own) == ("slow", "x://1")


def test_a_uri_is_found_by_list_then_template_then_ui() -> None:
    middle = Middle({"t": {}, "listed": {}, "ui": {}})
    middle.start("t", templates=[template("doc://{id}")])
    middle.start("listed", resources=[resource("doc://7")])
    meta = [{"ui": {"resourceUri": "ui://new"}}, {"ui/resourceUri": "ui://old"}, {"ui": "odd"}]
    middle.start("ui", tools=[tool(f"t{n}", _meta=one) for n, one in enumerate(meta)])
    assert middle.look_up(Kind.RESOURCES, "doc://7")[0].server == "listed"
    assert middle.look_up(Kind.RESOURCES, "doc://8")[0].server == "t"
    assert middle.look_up(Kind.RESOURCES, "ui://new")[0].server == "ui"
    assert middle.look_up(Kind.RESOURCES, "ui://old")[0].server == "ui"
    assert error_of(middle.look_up(Kind.RESOURCES, "ui://none")).code == -32602
    assert middle.look_up(Kind.TEMPLATES, "doc://{id}")[0].server == "t"


def test_the_own_endpoint_passes_unlisted_uris_to_its_server() -> None:
    middle = Middle({"a": {}, "tools_only": {}})
    middle.start("a")
    middle.start("tools_only", {"tools": {}})
    assert middle.look_up(Kind.RESOURCES, "a://unlisted", "a")[0].server == "a"
    assert error_of(middle.look_up(Kind.RESOURCES, "a://unlisted")).code == -32602
    assert error_of(middle.look_up(Kind.RESOURCES, "a://unlisted", "tools_only")).code == -32602


def test_with_isolation_the_own_endpoint_passes_unlisted_names_but_no_hidden_ones() -> None:
    rules = {"deny": ["no*"], "rename": {"t": "u"}}
    middle = Middle({"a": {"isolation": "session", "tools": rules}})
    middle.start("a", tools=[tool("t"), {"name": "broken"}])
    assert middle.look_up(Kind.TOOLS, "mine", "a")[0].own == "mine"
    assert middle.look_up(Kind.PROMPTS, "mine", "a")[0].own == "mine"
    for name in ("nope", "t", "broken"):
        assert error_of(middle.look_up(Kind.TOOLS, name, "a")).code == -32602
    assert error_of(middle.look_up(Kind.TOOLS, "a__mine")).code == -32602


def link(uri: Any) -> dict[str, Any]:
    return {"type": "resource_link", "uri": uri, "name": "n"}


def test_a_uri_that_no_list_names_goes_to_who_handed_it_out_in_a_resource_link() -> None:
    middle = Middle({"t": {}, "a": {}, "b": {}, "no_resources": {}})
    middle.start("t", templates=[template("doc://{id}")])
    middle.start("a")
    middle.start("b")
    middle.start("no_resources", {"tools": {}})
    me, other = Owner("me"), Owner("other")

    def server(uri: str, owner: Owner = me) -> str:
        found: list[Any] = []
        middle.catalogue.lookup(Kind.RESOURCES, "", uri, found.append, owner)
        return found[0].server if isinstance(found[0], Entry) else str(found[0].code)

    remember = middle.catalogue.remember
    assert server("x://1") == "-32602"
    remember(me, "b", {"content": [{"type": "text", "text": ""}, link("x://1"), link("doc://1")]})
    remember(me, "a", {"messages": [{"role": "user", "content": link("x://2")}]})
    remember(me, "no_resources", {"content": [link("x://3")]})
    assert [server(f"x://{n}") for n in (1, 2, 3)] == ["b", "a", "-32602"]
    assert server("doc://1") == "t"  # templates come first
    assert server("x://1", other) == "-32602"
    remember(me, "a", {"content": [link("x://1")]})
    assert server("x://1") == "a"  # the last who handed it out


def test_the_last_thousand_links_of_an_owner_are_remembered_and_not_too_many_in_all() -> None:
    middle = Middle({"a": {}})
    catalogue = middle.catalogue
    middle.start("a")
    for n in range(1001):
        catalogue.remember(Owner("me"), "a", {"content": [link(f"x://{n}")]})
    known = [catalogue.known(Kind.RESOURCES, "", f"x://{n}", Owner("me")) for n in (0, 1, 1000)]
    assert [entry is not None for entry in known] == [False, True, True]
    for n in range(150):
        catalogue.remember(Owner(str(n)), "a", {"content": [link(str(m)) for m in range(1000)]})
    assert catalogue.known(Kind.RESOURCES, "", "x://1000", Owner("me")) is None
    assert catalogue.known(Kind.RESOURCES, "", "1", Owner("149")) is not None
    assert sum(map(len, catalogue._links.values())) == catalogue._linked == 100_000


@pytest.mark.parametrize(
    "result",
    [
        {},
        {"content": None},
        {"content": 5},
        {"content": [None, 5, {}, link(None), link({}), link("x" * 5000)]},
        {"messages": 5},
        {"messages": [None, {}, {"content": [link("x")]}]},
    ],
)
def test_a_result_without_a_link_that_can_be_used_is_not_remembered(result: Any) -> None:
    middle = Middle({"a": {}})
    middle.catalogue.remember(Owner("me"), "a", result)
    assert not middle.catalogue._links


# ---- templates ----


@pytest.mark.parametrize(
    ("pattern", "fits", "does_not"),
    [
        ("test://template/{id}/data", ["test://template/123/data"], ["test://template/1/2/data"]),
        ("a://{x}", ["a://", "a://b%20c", "a://b?c"], ["a://b/c", "b://x", "a://b/"]),
        ("file:///{+path}", ["file:///a/b/c", "file:///"], ["file://"]),
        ("a://b{/x,y}", ["a://b", "a://b/1", "a://b/1/2"], ["a://bc"]),
        ("a://b{/x*}", ["a://b", "a://b/1/2/3"], ["a://bc"]),
        ("a://b{?q,r}", ["a://b", "a://b?q=1&r=2"], ["a://b&q=1", "a://b/x"]),
        ("a://b?x=1{&q}", ["a://b?x=1", "a://b?x=1&q=2"], ["a://b?x=2"]),
        ("a://b{#frag}", ["a://b", "a://b#x"], ["a://bx"]),
        ("a://b{.ext}", ["a://b.txt", "a://b"], ["a://b/txt"]),
        ("a://b{;p}", ["a://b;p=1"], ["a://bp"]),
        ("a://{x}.(?:{y})+", ["a://1.(?:2)+"], ["a://1.22"]),
        ("a://{+a}-{b}", ["a://x-y/z-w"], ["a://x-y/z"]),
        ("a://\n{x}", ["a://\nb"], ["a://b"]),
        ("a://{broken", [], ["a://1", "a://"]),
    ],
)
def test_templates_match_what_could_have_come_from_them(
    pattern: str, fits: list[str], does_not: list[str]
) -> None:
    middle = Middle({"a": {}})
    middle.start("a", templates=[template(pattern)])
    for uri in fits:
        assert isinstance(middle.look_up(Kind.RESOURCES, uri)[0], Entry), uri
    for uri in does_not:
        assert isinstance(middle.look_up(Kind.RESOURCES, uri)[0], Error), uri


def test_a_hostile_template_and_uri_take_no_more_than_linear_time() -> None:
    middle = Middle({"a": {}})
    middle.start("a", templates=[template("{+a}" + "-{+b}" * 30 + "!")])
    began = time.perf_counter()
    assert isinstance(middle.look_up(Kind.RESOURCES, "-" * 8_192)[0], Error)
    assert isinstance(middle.look_up(Kind.RESOURCES, "-" * 4_000_000)[0], Error)
    # Exponential or of degree 30, this would end with the universe: any bound will do.
    assert time.perf_counter() - began < 5


@given(st.text(), st.text())
def test_no_template_and_no_uri_raises(pattern: str, uri: str) -> None:
    middle = Middle({"a": {}})
    middle.start("a", templates=[template("x" + pattern)])
    assert len(middle.look_up(Kind.RESOURCES, "x" + uri)) == 1


# ---- pages ----


def walk(middle: Middle, method: str, endpoint: str = "") -> list[list[str]]:
    """All pages, as the names on each."""
    pages, params = [], {}
    while True:
        (outcome,) = middle.ask_for(method, endpoint, **params)
        assert outcome.error is None
        result = body(outcome)
        pages.append([item["name"] for item in result["tools"]])
        if "nextCursor" not in result:
            return pages
        params = {"cursor": result["nextCursor"]}


def test_long_lists_come_in_pages_of_a_thousand() -> None:
    middle = Middle({"a": {}, "b": {}})
    middle.start("a", tools=[tool(f"t{n}") for n in range(1500)])
    middle.start("b", tools=[tool(f"t{n}") for n in range(1500)])
    pages = walk(middle, "tools/list")
    assert [len(page) for page in pages] == [1000, 1000, 1000]
    assert [name for page in pages for name in page] == [
        f"{s}__t{n}" for s in "ab" for n in range(1500)
    ]
    assert [len(page) for page in walk(middle, "tools/list", "a")] == [1000, 500]


def test_pages_hold_about_one_mebibyte() -> None:
    middle = Middle({"a": {}})
    text = "x" * 400_000
    middle.start(
        "a", tools=[tool(f"t{n}", description=text) for n in range(5)] + [tool("big", d=text * 4)]
    )
    assert [len(page) for page in walk(middle, "tools/list")] == [2, 2, 1, 1]


def test_a_cursor_goes_on_at_its_item_when_the_list_has_changed() -> None:
    middle = Middle({"a": {}})
    process = middle.start("a", tools=[tool(f"t{n:04}") for n in range(2000)])
    (first,) = middle.ask_for("tools/list")
    cursor = body(first)["nextCursor"]

    def follow(*tools: Any) -> Outcome:
        process.pages["tools/list"] = list(tools)
        middle.wait(1)
        middle.catalogue.changed("a", Kind.TOOLS)
        return middle.ask_for("tools/list", cursor=cursor)[0]

    after_insert = follow(tool("new"), *(tool(f"t{n:04}") for n in range(2000)))
    assert body(after_insert)["tools"][0]["name"] == "a__t1000"
    # The item it names is gone, and with it the place.
    assert error_of([follow(tool("only"))]).code == -32602


@pytest.mark.parametrize("cursor", ["", "x", "\u20ac", "bm9wZQ", 5, {}, "WyJwcm9tcHRzIiwwLCJ4Il0"])
def test_a_cursor_that_is_not_ours_is_refused(cursor: Any) -> None:
    middle = Middle({"a": {}})
    middle.start("a", tools=[tool("t")])
    assert error_of(middle.ask_for("tools/list", cursor=cursor)).code == -32602


@given(st.text())
def test_no_cursor_raises(cursor: str) -> None:
    middle = Middle({"a": {}})
    middle.start("a", tools=[tool("t")])
    assert error_of(middle.ask_for("tools/list", cursor=cursor)).code == -32602


names = st.text(alphabet="abc_-", min_size=1, max_size=3)


@given(st.lists(st.lists(names, max_size=6), min_size=1, max_size=3), st.sampled_from(["", "p"]))
def test_what_is_listed_is_what_is_found(servers: list[list[str]], first: str) -> None:
    """Any servers, any names: each listed name leads to the server and name that it came from."""
    middle = Middle(
        {f"s{n}": {"prefix": first} if n == 0 else {} for n in range(len(servers))}, separator="_"
    )
    for number, own in enumerate(servers):
        middle.start(f"s{number}", tools=[tool(name) for name in own])
    shown = middle.names()
    assert len(shown) == len(set(shown))
    for name in shown:
        (entry,) = middle.look_up(Kind.TOOLS, name)
        assert entry.name == name
        assert entry.own in servers[int(entry.server[1:])]
    hidden = sum(len(counts["hidden"]) for counts in middle.catalogue.counts().values())
    assert len(shown) + hidden == sum(map(len, servers))


# ---- discover ----


def test_discover_on_mcp_answers_at_once() -> None:
    middle = Middle({"a": {}, "b": {}})
    (outcome,) = middle.ask_for("server/discover")
    assert outcome.result is not None
    assert outcome.result["supportedVersions"] == ["2026-07-28"]
    assert outcome.result["capabilities"]["resources"] == {"listChanged": True, "subscribe": True}
    assert outcome.result["_meta"][atrax.META_SERVER]["name"] == "atrax"
    assert "instructions" not in outcome.result
    assert outcome.ttl_ms == 0
    for name in ("b", "a"):
        offer = atrax.Offer({}, {}, f"Use {name}.", "2025-11-25", "legacy")
        middle.catalogue.up(name, offer)
    (outcome,) = middle.ask_for("server/discover")
    assert outcome.result is not None
    assert outcome.result["instructions"] == "## a\nUse a.\n\n## b\nUse b."
    assert outcome.ttl_ms == 60_000


def test_discover_on_mcp_names_the_extensions_and_tasks_of_all_servers() -> None:
    middle = Middle({"a": {}, "b": {}, "c": {}})
    middle.start("b", {"extensions": {"x/y": {"of": "b"}, "x/z": {}}})
    middle.start("a", {"extensions": {"x/y": {"of": "a"}}, "tasks": {"list": {}}})
    middle.start("c", {"extensions": None})
    capabilities = middle.ask_for("server/discover")[0].result["capabilities"]  # type: ignore[index]
    assert capabilities["extensions"] == {"x/y": {"of": "a"}, "x/z": {}}
    assert capabilities["tasks"] == {"list": {}}


def test_a_server_without_a_name_is_not_given_an_empty_one() -> None:
    middle = Middle({"a": {}})
    middle.catalogue.up("a", atrax.Offer({}, {}, "", "2026-07-28", "modern"))
    assert "_meta" not in middle.ask_for("server/discover", "a")[0].result  # type: ignore[operator]


def test_discover_on_the_own_endpoint_says_what_the_server_offers() -> None:
    middle = Middle({"a": {}})
    answers = middle.ask_for("server/discover", "a")
    assert answers == []
    capabilities = {
        "tools": {},
        "resources": {"subscribe": True},
        "experimental": {"x": {}},
        "tasks": {},
    }
    middle.start("a", capabilities)
    result = answers[0].result
    assert result is not None
    assert result["capabilities"] == {
        "tools": {"listChanged": True},
        "resources": {"subscribe": True, "listChanged": True},
        "experimental": {"x": {}},
        "tasks": {},
    }
    assert result["_meta"][atrax.META_SERVER] == {"name": "a", "version": "1"}
    assert middle.catalogue.offer("a", atrax.EVERYTHING) is not None
    middle.down("a")
    assert middle.ask_for("server/discover", "a")[0].error is None  # it is known what it is


def test_discover_on_the_own_endpoint_of_a_server_that_does_not_start_is_1010() -> None:
    middle = Middle({"a": {"start_timeout": 2}})
    answers = middle.ask_for("server/discover", "a")
    middle.wait(2.2)
    assert error_of(answers).code == atrax.UNAVAILABLE
    middle.down("a")
    assert error_of(middle.ask_for("server/discover", "a")).code == atrax.UNAVAILABLE
