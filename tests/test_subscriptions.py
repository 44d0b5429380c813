"""Who listens to what: acknowledgements, list changes, one upstream stream per server, its loss."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded import ALL, Answers, Middle, Process, prompt, resource, template, tool

import atrax
from atrax import Error, Kind, Outcome, Owner

FILES = [resource(f"file:///{name}") for name in "abc"]
A, B, C = (item["uri"] for item in FILES)


def started(**options: Any) -> tuple[Middle, Process]:
    """A server `s` with three resources, ready."""
    middle = Middle({"s": options})
    return middle, middle.start("s", tools=[tool("t")], resources=FILES)


# ---- filters ----


def test_the_acknowledgement_comes_first_and_says_what_is_honoured() -> None:
    middle, process = started()
    answers, _ = middle.listen(
        toolsListChanged=True, promptsListChanged=False, resourceSubscriptions=[B, "x://none", A, B]
    )
    assert answers.honoured == {"toolsListChanged": True, "resourceSubscriptions": [B, A]}
    assert process.listens[0].uris == [A, B]
    assert answers.outcomes == []


def test_an_empty_filter_is_honoured_empty() -> None:
    middle, process = started()
    answers, _ = middle.listen()
    assert answers.honoured == {}
    assert process.listens == []


def test_flags_are_cut_to_what_the_own_endpoint_has() -> None:
    middle = Middle({"s": {}})
    middle.start("s", {"tools": {}})
    everything = {
        "toolsListChanged": True,
        "promptsListChanged": True,
        "resourcesListChanged": True,
    }
    answers, _ = middle.listen("s", **everything)
    assert answers.honoured == {"toolsListChanged": True}
    answers, _ = middle.listen(**everything)
    assert answers.honoured == everything


def test_a_server_that_sends_no_updates_has_no_subscriptions() -> None:
    middle = Middle({"s": {}})
    process = middle.start("s", {"resources": {}}, resources=FILES)
    answers, _ = middle.listen(resourceSubscriptions=[A])
    assert answers.honoured == {}
    assert process.listens == []


def test_more_than_a_thousand_uris_in_one_listen_are_refused() -> None:
    middle, _ = started()
    answers, handle = middle.listen(resourceSubscriptions=[f"x://{n}" for n in range(1001)])
    assert answers.outcomes[0].error is not None
    assert answers.outcomes[0].error.code == -32602
    handle.cancel("harmless")
    assert len(answers.outcomes) == 1


@pytest.mark.parametrize(
    "wanted",
    [{"toolsListChanged": "yes"}, {"resourceSubscriptions": A}, {"resourceSubscriptions": [1]}],
)
def test_what_has_another_type_is_not_asked_for(wanted: Any) -> None:
    middle, _ = started()
    answers, _ = middle.listen(**wanted)
    assert answers.honoured == {}


# ---- list changes ----


def test_list_changed_reaches_who_asked_for_that_list_of_that_endpoint() -> None:
    middle = Middle({"s": {}, "other": {}})
    process = middle.start("s", tools=[tool("t")])
    middle.start("other")
    tools, _ = middle.listen(toolsListChanged=True)
    prompts, _ = middle.listen(promptsListChanged=True)
    own, _ = middle.listen("s", toolsListChanged=True, resourcesListChanged=True)
    elsewhere, _ = middle.listen("other", toolsListChanged=True)
    process.pages["tools/list"] = [tool("u")]
    middle.wait(1)
    middle.catalogue.changed("s", Kind.TOOLS)
    assert [sink.news for sink in (tools, prompts, own, elsewhere)] == [
        ["tools"],
        [],
        ["tools"],
        [],
    ]
    assert tools.notes[1] == atrax.Notice("notifications/tools/list_changed", {})
    process.pages["prompts/list"] = [prompt("p")]
    process.pages["resources/templates/list"] = [template("s://{x}")]
    middle.wait(1)
    middle.catalogue.changed("s", Kind.PROMPTS)
    middle.catalogue.changed("s", Kind.RESOURCES)
    assert [sink.news for sink in (tools, prompts, own)] == [
        ["tools"],
        ["prompts"],
        ["tools", "resources"],
    ]


def test_a_change_that_nobody_can_see_is_not_announced() -> None:
    middle, process = started(tools={"deny": ["secret"]})
    answers, _ = middle.listen(toolsListChanged=True)
    process.pages["tools/list"] = [tool("t"), tool("secret")]
    middle.wait(1)
    middle.catalogue.changed("s", Kind.TOOLS)
    assert answers.news == []


def test_a_change_before_the_acknowledgement_follows_it() -> None:
    middle, process = started()
    process.accept = False
    answers, _ = middle.listen(toolsListChanged=True, resourceSubscriptions=[A])
    for name in ("u", "v"):
        process.pages["tools/list"] = [tool(name)]
        middle.wait(1)
        middle.catalogue.changed("s", Kind.TOOLS)
    assert answers.notes == []
    process.listens[0].acknowledge()
    assert answers.honoured == {"toolsListChanged": True, "resourceSubscriptions": [A]}
    assert answers.news == ["tools"]  # two changes before it are one


# ---- one upstream stream for many ----


def test_many_listeners_share_one_upstream_stream() -> None:
    middle, process = started()
    sinks = [middle.listen(resourceSubscriptions=[A])[0] for _ in range(50)]
    assert len(process.calls("subscriptions/listen")) == 1
    process.listens[0].update(A)
    assert all(sink.news == [A] for sink in sinks)


def test_a_new_uri_opens_the_union_and_then_ends_the_old_stream() -> None:
    middle, process = started()
    first, _ = middle.listen(resourceSubscriptions=[A])
    (old,) = process.listens
    process.accept = False
    second, _ = middle.listen(resourceSubscriptions=[B, A])
    new = process.listens[1]
    assert (old.cancelled, new.uris, second.notes) == (None, [A, B], [])
    old.update(A)  # the old one is heard until the new one is known to work
    new.acknowledge()
    assert old.cancelled
    assert second.honoured == {"resourceSubscriptions": [B, A]}
    assert (first.news, second.news) == ([A], [A])


def test_doubles_of_two_streams_are_dropped() -> None:
    middle, process = started()
    first, _ = middle.listen(resourceSubscriptions=[A])
    (old,) = process.listens
    process.accept = False
    middle.listen(resourceSubscriptions=[B])
    new = process.listens[1]
    new.acknowledge()
    for stream in (old, new):
        stream.sink.note(atrax.Notice("notifications/resources/updated", {"uri": A}))
    assert first.news == [A]


def test_uris_that_come_while_a_stream_opens_are_asked_for_together() -> None:
    middle, process = started()
    process.accept = False
    sinks = [middle.listen(resourceSubscriptions=[uri])[0] for uri in (A, B, C)]
    assert [sent.uris for sent in process.listens] == [[A]]
    process.accept = True
    process.listens[0].acknowledge()
    assert [sent.uris for sent in process.listens] == [[A, B, C]]
    assert all(sink.honoured for sink in sinks)


def test_updates_reach_who_asked_for_that_uri_alone() -> None:
    middle, process = started()
    on_a, _ = middle.listen(resourceSubscriptions=[A])
    on_b, _ = middle.listen(resourceSubscriptions=[B])
    stream = process.listens[-1]
    stream.update(A)
    stream.update("x://never-asked")
    assert (on_a.news, on_b.news) == ([A], [])
    meta = {"uri": B, "_meta": {"traceparent": "00-1"}}
    stream.sink.note(atrax.Notice("notifications/resources/updated", meta))
    assert on_b.notes[-1].params == meta


def test_an_update_of_a_part_reaches_who_asked_for_the_whole() -> None:
    middle = Middle({"s": {}})
    process = middle.start("s", templates=[template("{+any}")])
    whole, _ = middle.listen(resourceSubscriptions=["x://dir", "x://dir/deep/"])
    alike, _ = middle.listen(resourceSubscriptions=["x://di"])
    process.listens[-1].update("x://dir/deep/file")
    assert whole.news == ["x://dir/deep/file"]  # once, though two of its URIs hold it
    assert alike.news == []


def test_the_last_listener_of_a_uri_takes_it_away() -> None:
    middle, process = started()
    _, first = middle.listen(resourceSubscriptions=[A, B])
    _, second = middle.listen(resourceSubscriptions=[A])
    first.cancel("gone")
    assert [sent.uris for sent in process.listens] == [[A]]
    second.cancel("gone")
    assert process.listens == []
    middle.wait(0.2)
    assert middle.subscriptions._upstreams == {}


def test_a_cancelled_listen_is_done_once_and_hears_nothing_more() -> None:
    middle, process = started()
    answers, handle = middle.listen(toolsListChanged=True, resourceSubscriptions=[A])
    middle.listen(resourceSubscriptions=[A])
    handle.cancel("closed")
    handle.cancel("closed")
    process.listens[0].update(A)
    middle.subscriptions.listed(Kind.TOOLS, "", lambda scope: True)
    assert answers.outcomes[0].error is not None
    assert answers.outcomes[0].error.code == atrax.CANCELLED
    assert answers.news == []


def test_a_server_has_a_stream_of_its_own() -> None:
    middle = Middle({"a": {}, "b": {}})
    one = middle.start("a", resources=[resource("a://1")])
    two = middle.start("b", resources=[resource("b://1")])
    answers, _ = middle.listen(resourceSubscriptions=["b://1", "a://1"])
    assert (one.listens[0].uris, two.listens[0].uris) == (["a://1"], ["b://1"])
    assert answers.honoured == {"resourceSubscriptions": ["b://1", "a://1"]}
    two.listens[0].update("a://1")  # of a resource that is not its own
    assert answers.news == []


def test_with_isolation_each_owner_has_a_stream_at_its_own_child() -> None:
    middle, process = started(isolation="session")
    for session in ("one", "two", "two"):
        params = {"notifications": {"resourceSubscriptions": [A]}}
        call = atrax.Call("subscriptions/listen", params, Owner("p", session), "2025-11-25")
        middle.subscriptions.open(call, Answers())
    owners = [sent.call.owner for sent in process.listens]
    assert owners == [Owner("p", "one"), Owner("p", "two")]
    assert middle.pool.leases[-2:] == [("s", Owner("p", "one")), ("s", Owner("p", "two"))]


# ---- the bounded wait ----


def test_uris_that_a_server_does_not_accept_are_not_honoured() -> None:
    middle, process = started()
    process.accept = False
    answers, _ = middle.listen(resourceSubscriptions=[A, B])
    process.listens[0].acknowledge([B, "x://made-up"])
    assert answers.honoured == {"resourceSubscriptions": [B]}
    assert len(process.calls("subscriptions/listen")) == 1  # and not asked for again


def test_a_server_that_takes_no_listen_is_refused_at_once() -> None:
    middle, process = started()
    process.accept = False
    answers, _ = middle.listen(toolsListChanged=True, resourceSubscriptions=[A])
    process.listens[0].sink.done(Outcome(error=Error(-32601, "Method not found")))
    assert answers.honoured == {"toolsListChanged": True}


def test_the_acknowledgement_waits_five_seconds_at_most() -> None:
    middle = Middle({"s": {}, "slow": {}})
    process = middle.start("s", resources=FILES)
    answers, _ = middle.listen(resourceSubscriptions=[A, "slow://1"])
    assert process.listens[0].uris == [A]
    middle.wait(4.5)
    assert answers.notes == []
    middle.wait(0.7)
    assert answers.honoured == {"resourceSubscriptions": [A]}
    slow = middle.start("slow", resources=[resource("slow://1")])
    assert slow.listens == []


def test_an_unanswered_stream_is_given_up_and_opened_again() -> None:
    middle, process = started()
    process.accept = False
    answers, _ = middle.listen(resourceSubscriptions=[A])
    middle.wait(5.2)
    assert answers.honoured == {}
    assert process.listens == []  # nobody wants it any more


def test_a_uri_of_a_starting_server_is_subscribed_to_when_it_is_ready() -> None:
    middle = Middle({"slow": {}})
    answers, _ = middle.listen(resourceSubscriptions=["slow://1"])
    middle.wait(2)
    middle.start("slow", resources=[resource("slow://1")])
    assert answers.honoured == {"resourceSubscriptions": ["slow://1"]}


# ---- loss ----


def test_a_lost_stream_is_opened_again_and_each_uri_is_told_once() -> None:
    middle, process = started()
    answers, _ = middle.listen(resourceSubscriptions=[A, B])
    process.listens[0].sink.done(Outcome(error=Error(atrax.CHILD_DIED, "died")))
    middle.down("s")
    middle.wait(10)
    assert answers.news == []
    successor = middle.start("s", resources=FILES)
    assert [sent.uris for sent in successor.listens] == [[A, B]]
    assert answers.news == [A, B]  # a change may have been missed
    successor.listens[0].update(A)
    assert answers.news == [A, B, A]


def test_a_new_listener_hears_of_no_change_that_it_could_not_miss() -> None:
    middle, process = started()
    middle.listen(resourceSubscriptions=[A])
    process.listens[0].sink.done(Outcome(result={}))
    late, _ = middle.listen(resourceSubscriptions=[B])
    middle.wait(0.4)
    assert late.honoured == {"resourceSubscriptions": [B]}
    assert late.news == []


def test_a_stream_that_ends_at_once_again_and_again_is_opened_ever_more_rarely() -> None:
    middle, process = started()
    middle.listen(resourceSubscriptions=[A])
    for _ in range(600):  # two minutes
        for sent in process.listens:
            if not sent.sink.over:  # type: ignore[attr-defined]
                sent.sink.done(Outcome(result={}))
        middle.wait(0.2)
    assert len(process.calls("subscriptions/listen")) < 15


def test_a_uri_that_is_lost_for_good_is_warned_of() -> None:
    middle, process = started()
    middle.listen(resourceSubscriptions=[A, B])
    process.accept = False
    process.listens[0].sink.done(Outcome(result={}))
    middle.wait(0.4)
    process.calls("subscriptions/listen")[1].acknowledge([A])
    assert "file:///b any more" in middle.said("subscription.refused")[0]


def test_a_stopped_server_is_started_for_who_listens() -> None:
    middle, _ = started()
    middle.down("s")
    stopped = Error(1010, "stopped", {"atrax": {"reason": "stopped", "state": "stopped"}})
    middle.pool.there["s"] = stopped
    middle.listen(resourceSubscriptions=[A])
    assert middle.pool.leases[-2:] == [("s", None), ("s", Owner("anonymous"))]


# ---- bounds, shutdown, reload ----


def test_uris_are_bounded_in_all_and_freed_with_their_listen() -> None:
    middle, _ = started()
    handles = []
    for number in range(100):
        uris = [f"x://{number}/{n}" for n in range(1000)]
        sink, handle = middle.listen(resourceSubscriptions=uris)
        assert sink.outcomes == []
        handles.append(handle)
    assert middle.listen(resourceSubscriptions=[A])[0].outcomes[0].error
    handles[0].cancel("gone")
    assert middle.listen(resourceSubscriptions=[A])[0].honoured


def test_close_ends_every_listen_with_its_result() -> None:
    middle, process = started()
    sinks = [middle.listen(toolsListChanged=True, resourceSubscriptions=[A])[0] for _ in range(3)]
    middle.subscriptions.close()
    assert all(sink.outcomes == [Outcome(result={})] for sink in sinks)
    assert process.listens == []
    late, _ = middle.listen()
    assert late.outcomes[0].error is not None


def test_what_a_child_says_outside_any_call_is_counted() -> None:
    middle, _ = started()
    middle.subscriptions.told("s", "s#1", atrax.Notice("notifications/tasks/status", {}))
    assert middle.record.counters[("untold", ("server", "s"))] == 1


# ---- tasks ----


def task_of(middle: Middle, task: str, principal: str = "anonymous") -> None:
    middle.tasks.note("s", "s#1", principal, {"resultType": "task", "taskId": task})


def state(task: str, method: str = "notifications/tasks") -> atrax.Notice:
    return atrax.Notice(method, {"taskId": task, "status": "working"})


def test_the_states_of_own_tasks_come_by_one_listen_at_their_process() -> None:
    middle, process = started()
    for task in ("t1", "t2"):
        task_of(middle, task)
    task_of(middle, "foreign", "bob")
    process.accept = False
    answers, handle = middle.listen(
        resourceSubscriptions=[A], taskIds=["t2", "foreign", "none", "t1", "t2"]
    )
    of_resources, of_tasks = sorted(process.listens, key=lambda sent: "taskIds" in str(sent.call))
    assert of_tasks.call.params == {"notifications": {"taskIds": ["t2", "t1"]}}
    of_resources.acknowledge()
    assert answers.honoured is None
    of_tasks.sink.note(state("t1"))
    of_tasks.acknowledge()
    of_tasks.sink.note(state("foreign"))
    of_tasks.sink.note(state("t2"))
    assert answers.honoured == {"resourceSubscriptions": [A], "taskIds": ["t2", "t1"]}
    assert [note.params["taskId"] for note in answers.notes[1:]] == ["t1", "t2"]
    handle.cancel("")
    assert process.listens == []


def test_tasks_whose_process_is_gone_or_silent_are_not_honoured() -> None:
    middle, process = started()
    task_of(middle, "t1")
    process.accept = False
    silent, _ = middle.listen(taskIds=["t1"])
    middle.wait(5.2)
    assert silent.honoured == {} and process.listens == []
    middle.pool.there["s"] = Error(atrax.UNAVAILABLE, "gone")
    gone, _ = middle.listen(taskIds=["t1"])
    assert gone.honoured == {} and not gone.outcomes


def test_a_state_that_a_child_tells_everybody_reaches_the_sessions_of_its_principal_alone() -> None:
    middle, _ = started()
    task_of(middle, "t1")
    owners = [
        Owner("anonymous", "1"),
        Owner("anonymous", "2"),
        Owner("anonymous"),
        Owner("bob", "3"),
    ]
    heard = []
    for owner in owners:
        heard.append(Answers())
        call = atrax.Call("subscriptions/listen", {"notifications": {}}, owner, "2025-11-25")
        middle.subscriptions.open(call, heard[-1])
    middle.subscriptions.told("s", "s#1", state("t1", "notifications/tasks/status"))
    middle.subscriptions.told("s", "s#2", state("t1", "notifications/tasks/status"))
    middle.subscriptions.told("s", "s#1", state("t2", "notifications/tasks/status"))
    assert [len(answers.notes) - 1 for answers in heard] == [1, 1, 0, 0]


# ---- any order ----

steps = st.lists(
    st.tuples(
        st.sampled_from(["listen", "cancel", "ack", "update", "lose", "wait"]), st.integers(0, 7)
    ),
    max_size=40,
)


@given(steps)
def test_in_any_order_each_listener_hears_each_update_once(actions: list[tuple[str, int]]) -> None:
    """Random listens, cancels, acknowledgements, losses: afterwards all who listen hear, nobody else."""
    middle, process = started()
    process.accept = False
    open_: list[tuple[Answers, atrax.Handle, list[str]]] = []
    closed: list[Answers] = []
    sets = [[A], [B], [C], [A, B], [B, C], [A, C], [A, B, C], []]
    for action, number in actions:
        live = [sent for sent in process.listens if not sent.sink.over]  # type: ignore[attr-defined]
        if action == "listen":
            open_.append((*middle.listen(resourceSubscriptions=sets[number]), sets[number]))
        elif action == "cancel" and open_:
            answers, handle, _ = open_.pop(number % len(open_))
            handle.cancel("")
            closed.append(answers)
        elif action == "ack" and live:
            live[-1].acknowledge()
        elif action == "update" and live:
            live[number % len(live)].update(A)
        elif action == "lose" and live:
            live[number % len(live)].sink.done(Outcome(result={}))
        elif action == "wait":
            middle.wait(number / 2)
    process.accept = True
    for sent in process.listens:
        if not sent.sink.over and not sent.sink.accepted:  # type: ignore[attr-defined]
            sent.acknowledge()
    middle.wait(60)
    before = {id(answers): len(answers.news) for answers, _, _ in open_}
    heard = [len(answers.notes) for answers in closed]
    for sent in list(process.listens):
        for uri in (A, B, C):
            sent.update(uri)
    for answers, _, _ in open_:
        assert answers.honoured is not None
        told = answers.news[before[id(answers)] :]
        assert sorted(told) == sorted(answers.honoured.get("resourceSubscriptions", []))
    assert [len(answers.notes) for answers in closed] == heard
    for _, handle, _ in open_:
        handle.cancel("")
    assert process.listens == [] or all(sent.sink.over for sent in process.listens)  # type: ignore[attr-defined]
    middle.wait(0.2)
    assert middle.subscriptions._upstreams == {}
    assert middle.subscriptions._uris == 0


def test_all_capabilities_of_the_recorder_are_what_a_server_can_declare() -> None:
    """Guards the tests themselves: a typing error in ALL would let them pass for nothing."""
    middle, _ = started()
    offer = middle.catalogue.offer("s", atrax.EVERYTHING)
    assert offer is not None and offer.capabilities == ALL
