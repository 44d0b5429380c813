"""The life of a server's children: real processes, driven through the Supervisor's own seam."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import atrax
from atrax import Call, Cause, Error, Lines, Link, Notice, Offer, Outcome, Owner, State

CHILDREN = pathlib.Path(__file__).parent / "children"
ALICE, BOB = Owner("alice"), Owner("bob")
LIMIT = 15.0  # seconds that anything here may take


def child(name: str, *arguments: str, **options: Any) -> dict[str, Any]:
    return {"command": sys.executable, "args": [str(CHILDREN / name), *arguments], **options}


def does(*habits: str, **options: Any) -> dict[str, Any]:
    return child("does.py", *habits, **options)


class Answer:
    """A Sink that can be waited for."""

    def __init__(self) -> None:
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.asks: asyncio.Queue[atrax.Ask] = asyncio.Queue()
        self.handle: Any = None
        self.place = ""

    def note(self, notice: Notice) -> None: ...

    def ask(self, ask: atrax.Ask) -> None:
        self.asks.put_nowait(ask)

    def done(self, outcome: Outcome) -> None:
        self.outcome.set_result(outcome)

    async def text(self) -> str:
        outcome = await asyncio.wait_for(self.outcome, LIMIT)
        assert outcome.error is None, outcome.error
        return outcome.result["content"][0]["text"]  # type: ignore[index]

    async def error(self) -> Error:
        outcome = await asyncio.wait_for(self.outcome, LIMIT)
        assert outcome.error is not None
        return outcome.error


class House:
    """A running Supervisor, what it told its Shelf, and the events that it published."""

    def __init__(self, servers: dict[str, Any], **options: Any) -> None:
        loop = asyncio.get_running_loop()
        config = atrax.Config.model_validate({"mcpServers": servers, **options})
        self.record = atrax.Record({"s3cret-value"})
        self.events: list[atrax.Event] = []
        self.shelf: list[tuple[str, ...]] = []
        self.record.watch(self._happened)
        self._more = asyncio.Event()
        self.supervisor = atrax.Supervisor(config, self.record, self, loop.time, loop)

    def _happened(self, event: atrax.Event) -> None:
        self.events.append(event)
        self._more.set()

    # Shelf
    def up(self, server: str, offer: Offer) -> None:
        self.shelf.append(("up", server))

    def down(self, server: str) -> None:
        self.shelf.append(("down", server))

    def changed(self, server: str, kind: atrax.Kind) -> None: ...
    def told(self, server: str, place: str, notice: Notice) -> None: ...

    def moves(self, server: str) -> list[tuple[str, str, str]]:
        return [
            (event.fields["before"], event.fields["cause"], event.fields["state"])
            for event in self.events
            if event.name == "server.state" and event.fields["server"] == server
        ]

    def said(self, name: str, server: str) -> list[str]:
        events = [e for e in self.events if e.name == name and e.fields["server"] == server]
        return [event.fields["message"] for event in events]

    def status(self, server: str) -> dict[str, Any]:
        return self.supervisor.status()[server]

    async def until(self, true: Callable[[], Any]) -> None:
        """Wait until `true`; looked at after each event and each tick."""
        async with asyncio.timeout(LIMIT):
            while not true():
                self._more.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._more.wait(), 0.02)

    async def is_in(self, server: str, state: State) -> None:
        await self.until(lambda: self.supervisor.state(server) is state)

    async def link(self, server: str, owner: Owner | None = ALICE, place: str = "") -> Link | Error:
        got: asyncio.Future[Link | Error] = asyncio.get_running_loop().create_future()
        self.supervisor.lease(server, owner, place, got.set_result)
        return await asyncio.wait_for(got, LIMIT)

    def call(
        self, server: str, what: str, owner: Owner = ALICE, place: str = "", **more: Any
    ) -> Answer:
        """Lease and send, like the Gateway; an error of the lease is the answer."""
        answer = Answer()
        params = {"name": "do", "arguments": {"what": what, **more}}
        call = Call("tools/call", params, owner, "2025-11-25", capabilities={"elicitation": {}})

        def ready(link: Link | Error) -> None:
            if isinstance(link, Error):
                answer.done(Outcome(error=link))
                return
            answer.place = link.place
            answer.handle = link.send(call, answer)

        self.supervisor.lease(server, owner, place, ready)
        return answer


@contextlib.asynccontextmanager
async def house(servers: dict[str, Any], **options: Any) -> AsyncIterator[House]:
    running = House(servers, **options)
    running.supervisor.start()

    async def tick() -> None:
        while True:
            running.supervisor.wake(asyncio.get_running_loop().time())
            await asyncio.sleep(0.02)

    ticking = asyncio.ensure_future(tick())
    try:
        yield running
    finally:
        await running.supervisor.stop(0.5)
        ticking.cancel()
        faults = [event for event in running.events if event.name == "internal.error"]
        assert not faults, faults


def alive(pid: int) -> bool:
    try:
        state = (
            pathlib.Path(f"/proc/{pid}/stat")
            .read_text(errors="replace")
            .rsplit(")", 1)[1]
            .split()[0]
        )
    except FileNotFoundError:
        return False
    return state != "Z"


# ---- the table ----


def test_every_state_can_be_reached_and_disabled() -> None:
    reached = {State.STOPPED}
    for _ in State:
        reached |= {after for state in reached for after in atrax.MOVES[state].values()}
    assert reached == set(State) == set(atrax.MOVES)
    assert all(row[Cause.DISABLED] is State.DISABLED for row in atrax.MOVES.values())


async def test_each_move_is_one_event_and_follows_from_the_one_before() -> None:
    async with house({"good": does(), "bad": child("broken.py", "exits")}) as home:
        await home.is_in("good", State.READY)
        await home.until(lambda: len(home.moves("bad")) > 3)
        await home.call("good", "die").error()
    for server in ("good", "bad"):
        state = "stopped"
        for before, cause, after in home.moves(server):
            assert before == state
            assert atrax.MOVES[State(before)][Cause(cause)] is State(after)
            state = after
        assert state == "disabled"


# ---- start ----


async def test_servers_start_side_by_side_and_are_told_to_the_shelf_once_each() -> None:
    names = [f"server{number}" for number in range(6)]
    async with house({name: does() for name in names}) as home:
        for name in names:
            await home.is_in(name, State.READY)
        assert sorted(home.shelf) == sorted(("up", name) for name in names)
        assert all(home.status(name)["settled"] for name in names)
        assert home.status(names[0])["era"] == "legacy"
        assert home.status(names[0])["protocolVersion"] == "2025-11-25"


async def test_a_missing_command_fails_at_once_and_says_what_to_install() -> None:
    async with house({"git": {"command": "uvx", "env": {"PATH": "/nonexistent"}}}) as home:
        await home.is_in("git", State.FAILED)
        error = await home.call("git", "echo").error()
        assert error.code == atrax.UNAVAILABLE
        assert 'command "uvx" not found on PATH. Is uv installed?' in error.message
        assert error.data["atrax"]["state"] == "failed"
        assert error.data["atrax"]["retryAfter"] > 0
        assert home.shelf == [("down", "git")]


async def test_a_server_that_exits_on_the_probe_is_asked_as_legacy_and_counts_no_crash() -> None:
    async with house({"rust": child("broken.py", "discover-exits")}) as home:
        await home.is_in("rust", State.READY)
        assert [cause for _, cause, _ in home.moves("rust")] == ["wanted", "probed", "answered"]
        assert home.status("rust")["restarts"] == 0

        # Its era is remembered: the next process is not asked in vain.
        os.kill(home.status("rust")["pids"][0], 9)
        await home.until(lambda: home.shelf.count(("up", "rust")) == 2)
        assert [cause for _, cause, _ in home.moves("rust")][3:] == ["died", "due", "answered"]


async def test_a_first_start_that_fails_shows_its_last_line() -> None:
    async with house({"database": child("broken.py", "exits")}) as home:
        await home.until(lambda: home.status("database")["settled"])
        assert home.status("database")["lastError"] == (
            'exited with 1 before it answered; its last line: "cannot open the database: no such file"'
        )


async def test_a_server_that_stays_silent_is_ended_after_start_timeout() -> None:
    async with house({"silent": child("broken.py", "hangs", start_timeout=0.5)}) as home:
        await home.until(lambda: home.status("silent")["pids"])
        (pid,) = home.status("silent")["pids"]
        await home.until(lambda: ("starting", "late", "backoff") in home.moves("silent"))
        assert "did not answer within 0.5 s" in home.status("silent")["lastError"]
        assert not alive(pid)


async def test_a_server_of_an_unknown_version_is_refused_by_name() -> None:
    async with house({"old": child("broken.py", "wrong-version")}) as home:
        await home.until(lambda: ("starting", "unfit", "backoff") in home.moves("old"))
        assert "1999-01-01" in home.status("old")["lastError"]


async def test_a_call_waits_for_the_first_start() -> None:
    async with house({"slow": does()}) as home:
        assert home.supervisor.state("slow") is State.STARTING
        assert await home.call("slow", "echo", text="here").text() == "here"


async def test_a_disabled_server_is_not_started_and_says_so() -> None:
    async with house({"off": does(disabled=True)}) as home:
        error = await home.call("off", "echo").error()
        assert (error.code, error.data["atrax"]["state"]) == (atrax.UNAVAILABLE, "disabled")
        assert home.status("off")["pids"] == []
        assert home.status("off")["settled"]


# ---- death ----


async def test_a_child_that_dies_fails_only_its_own_calls() -> None:
    async with house({"sleepy": does(), "steady": does()}) as home:
        slow, other = home.call("sleepy", "wait"), home.call("steady", "wait")
        await home.until(
            lambda: home.status("sleepy")["inFlight"] and home.status("steady")["inFlight"]
        )
        os.kill(home.status("sleepy")["pids"][0], 9)
        error = await slow.error()
        assert error.code == atrax.CHILD_DIED
        assert "SIGKILL" in error.message
        home.call("steady", "release")
        assert await other.text() == "released"


async def test_a_call_that_follows_a_death_gets_the_successor() -> None:
    async with house({"phoenix": does()}) as home:
        first = await home.call("phoenix", "pid").text()
        died = home.call("phoenix", "die")
        again: list[Answer] = []
        died.outcome.add_done_callback(lambda _: again.append(home.call("phoenix", "pid")))
        await died.error()
        await asyncio.sleep(0)
        assert await again[0].text() != first
        assert home.status("phoenix")["restarts"] == 1
        assert home.shelf == [("up", "phoenix"), ("down", "phoenix"), ("up", "phoenix")]


async def test_the_last_words_of_a_child_are_delivered() -> None:
    async with house({"brief": does()}) as home:
        assert (
            await home.call("brief", "last", text="farewell " * 20_000).text()
            == "farewell " * 20_000
        )


async def test_a_crash_loop_opens_the_circuit_and_is_probed_again_later(
    tmp_path: pathlib.Path,
) -> None:
    program = tmp_path / "server.py"
    program.write_text("import sys; sys.exit('not today')")
    restart = {"backoff": [0.01, 0.05], "failures": 3, "window": 60}
    config = {
        "command": sys.executable,
        "args": [str(program)],
        "restart": restart,
        "protocol": "legacy",
    }
    async with house({"loop": config}) as home:
        await home.is_in("loop", State.FAILED)
        causes = [cause for _, cause, _ in home.moves("loop")]
        assert causes == ["wanted", "died", "due", "died", "due", "died", "gave_up"]
        error = await home.call("loop", "echo").error()
        assert error.code == atrax.UNAVAILABLE
        assert "not today" in error.message

        # One failed probe is enough to give up again, and each pause is longer than the last.
        await home.until(lambda: home.moves("loop").count(("backoff", "gave_up", "failed")) == 3)
        program.write_text((CHILDREN / "does.py").read_text())
        await home.is_in("loop", State.READY)
        assert await home.call("loop", "echo", text="at last").text() == "at last"


async def test_who_waits_is_told_when_the_circuit_opens() -> None:
    restart = {"backoff": [0.01, 60.0], "failures": 1, "window": 60}
    async with house({"bad": child("broken.py", "exits", restart=restart)}) as home:
        waiting = [home.call("bad", "echo", owner) for owner in (ALICE, BOB)]
        for answer in waiting:
            error = await answer.error()
            assert error.data["atrax"]["state"] == "failed"
            assert 50 < error.data["atrax"]["retryAfter"] <= 60


async def test_a_child_that_closes_its_stdout_is_ended() -> None:
    async with house({"mute": does()}) as home:
        pid = int(await home.call("mute", "pid").text())
        await home.call("mute", "mute").text()
        await home.until(lambda: not alive(pid))
        await home.is_in("mute", State.READY)


async def test_a_line_that_is_too_long_ends_the_child_and_says_so() -> None:
    async with house({"long": does()}, limits={"line": 100_000}) as home:
        assert (await home.call("long", "long", size=99_999).text()) == "written"
        error = await home.call("long", "long", size=100_001).error()
        assert error.code == atrax.CHILD_DIED
        assert "limits.line" in error.message


async def test_a_flood_on_stderr_is_logged_in_part_and_counted() -> None:
    async with house({"loud": does()}) as home:
        assert await home.call("loud", "stderr", lines=5_000, size=20).text() == "written"
        await home.until(lambda: home.said("child.stderr_dropped", "loud"))
        assert len(home.said("child.stderr", "loud")) <= 2 * atrax.STDERR_RATE
        assert "left out" in home.said("child.stderr_dropped", "loud")[0]


@pytest.mark.needs_install()  # seconds of flood, for which `quick` has no time
@pytest.mark.parametrize("line", ["junk", '{"jsonrpc":"2.0","id":9999,"result":{}}'])
async def test_a_child_that_writes_without_end_does_not_hold_the_loop(line: str) -> None:
    async with house({"loud": does(), "other": does()}) as home:
        await home.call("other", "pid").text()
        flood = home.call("loud", "flood", line=line, seconds=2)
        await asyncio.sleep(0.2)
        since, answered = time.monotonic(), 0
        while time.monotonic() - since < 1.5:
            assert await home.call("other", "echo", text="heard").text() == "heard"
            answered += 1
            await asyncio.sleep(0.01)
        assert answered > 5  # it was none
        assert await flood.text() == "stopped"


async def test_a_child_that_asks_without_end_and_reads_nothing_is_ended() -> None:
    async with house({"deaf": does()}) as home:
        ping = '{"jsonrpc":"2.0","id":"' + "x" * 1000 + '","method":"ping"}'
        error = await home.call("deaf", "flood", line=ping, seconds=20).error()
        assert error.code == atrax.CHILD_DIED
        assert "does not read" in error.message


async def test_a_secret_on_stderr_is_hidden_in_log_and_status() -> None:
    async with house({"leaky": does(restart={"backoff": [5, 5]})}) as home:
        await home.call("leaky", "die", words="the token is s3cret-value").error()
        await home.is_in("leaky", State.BACKOFF)
        shown = json.dumps([dict(event.fields) for event in home.events]) + json.dumps(
            home.status("leaky")
        )
        assert "the token is [redacted]" in shown
        assert "s3cret-value" not in shown


async def test_children_that_come_and_go_leave_no_descriptor_open() -> None:
    restart = {"backoff": [0.01, 0.01], "failures": 100}
    async with house({"brief": does(restart=restart)}) as home:
        await home.call("brief", "pid").text()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            await home.call("brief", "die").error()
            await home.call("brief", "pid").text()
        assert len(os.listdir("/proc/self/fd")) == before


# ---- which process? ----


async def test_calls_share_one_process_while_nothing_speaks_against_it() -> None:
    async with house({"one": does()}) as home:
        waiting = [home.call("one", "wait") for _ in range(20)]
        await home.until(lambda: home.status("one")["inFlight"] == 20)
        assert len(home.status("one")["pids"]) == 1
        home.call("one", "release")
        assert {await answer.text() for answer in waiting} == {"released"}


async def test_concurrency_starts_processes_and_then_makes_calls_wait_in_order() -> None:
    async with house({"narrow": does(concurrency=1, processes=2)}) as home:
        first, second = home.call("narrow", "wait"), home.call("narrow", "wait")
        third, fourth = home.call("narrow", "pid"), home.call("narrow", "pid")
        await home.until(lambda: home.status("narrow")["inFlight"] == 2)
        assert len(home.status("narrow")["pids"]) == 2
        assert home.status("narrow")["waiting"] == 2
        assert {first.place, second.place} == {link.place for link in members(home, "narrow")}

        order: list[int] = []
        third.outcome.add_done_callback(lambda _: order.append(3))
        fourth.outcome.add_done_callback(lambda _: order.append(4))
        first.handle.cancel("enough")  # frees its process
        await third.text()
        await fourth.text()
        assert order == [3, 4]


async def test_an_owner_gets_the_process_that_it_used_last() -> None:
    async with house({"two": does(concurrency=1, processes=2)}) as home:
        held, moved = home.call("two", "wait", ALICE), home.call("two", "pid", BOB)
        bobs = await moved.text()
        home.supervisor.wake(asyncio.get_running_loop().time())
        held.handle.cancel("enough")
        assert await home.call("two", "pid", BOB).text() == bobs
        assert await home.call("two", "pid", BOB).text() == bobs


async def test_a_call_that_waits_too_long_is_refused_as_overloaded() -> None:
    async with house({"full": does(concurrency=1, processes=1, timeout=0.5)}) as home:
        await home.is_in("full", State.READY)
        # A call of its own clock would end first: hold the process by a longer one.
        link = await home.link("full")
        assert not isinstance(link, Error)
        link.open_calls += 1  # type: ignore[attr-defined]
        error = await home.call("full", "echo", BOB).error()
        assert error.code == atrax.OVERLOADED
        assert error.data["atrax"]["server"] == "full"


async def test_a_cancelled_lease_is_never_served() -> None:
    async with house({"slow": does()}) as home:
        got: list[Link | Error] = []
        lease = home.supervisor.lease("slow", ALICE, "", got.append)
        lease.cancel()
        await home.is_in("slow", State.READY)
        assert await home.call("slow", "echo", text="x").text() == "x"
        assert got == []


async def test_a_second_process_that_dies_before_ready_lowers_processes(
    tmp_path: pathlib.Path,
) -> None:
    lock = str(tmp_path / "lock")
    async with house({"locked": does("once", lock, concurrency=1, protocol="legacy")}) as home:
        await home.is_in("locked", State.READY)
        assert home.status("locked")["processes"] == 4
        held, waiting = home.call("locked", "wait"), home.call("locked", "echo", text="later")
        await home.until(lambda: home.status("locked")["processes"] == 1)
        assert home.supervisor.state("locked") is State.READY
        assert home.status("locked")["restarts"] == 0
        held.handle.cancel("enough")
        assert await waiting.text() == "later"


async def test_while_a_call_is_parked_the_next_gets_a_process_of_its_own() -> None:
    async with house({"asker": does(processes=2)}) as home:
        asking = home.call("asker", "ask", ALICE)
        ask = await asyncio.wait_for(asking.asks.get(), LIMIT)
        other = home.call("asker", "pid", BOB)
        await other.text()
        assert other.place != asking.place
        assert home.status("asker")["parked"] == 1
        asking.handle.answer(ask, Outcome(result={"action": "accept", "content": {}}))
        assert json.loads(await asking.text()) == {"action": "accept", "content": {}}
        assert home.status("asker")["asks"]
        assert home.status("asker")["concurrency"] == 1


async def test_if_all_processes_are_parked_the_one_with_fewest_takes_the_call() -> None:
    async with house({"asker": does(processes=1)}) as home:
        asking = home.call("asker", "ask", ALICE)
        await asyncio.wait_for(asking.asks.get(), LIMIT)
        assert await home.call("asker", "echo", BOB, text="no matter").text() == "no matter"


async def test_a_process_that_holds_a_cancelled_call_of_a_server_that_asks_retires() -> None:
    async with house({"asker": does(processes=1)}) as home:
        asking = home.call("asker", "ask", ALICE)
        await asyncio.wait_for(asking.asks.get(), LIMIT)
        (old,) = home.status("asker")["pids"]
        asking.handle.cancel("the client has gone")
        assert int(await home.call("asker", "pid", BOB).text()) != old
        await home.until(lambda: not alive(old))
        assert home.status("asker")["restarts"] == 0


async def test_a_process_that_does_not_read_gets_no_more_calls() -> None:
    async with house({"deaf": does(processes=2)}) as home:
        await home.call("deaf", "deaf", seconds=3).text()
        deaf = home.call("deaf", "echo", text="x" * 3_000_000)
        await home.until(lambda: members(home, "deaf")[0].child.busy)
        other = home.call("deaf", "echo", BOB, text="heard")
        assert await other.text() == "heard"
        assert other.place != deaf.place
        assert len(await deaf.text()) == 3_000_000


async def test_a_place_leads_to_its_process_and_is_gone_with_it() -> None:
    async with house({"sealed": does(concurrency=1, processes=2)}) as home:
        held = home.call("sealed", "wait", ALICE)
        free = home.call("sealed", "pid", BOB)
        await free.text()
        same = home.call("sealed", "echo", BOB, place=held.place, text="here")
        await home.until(lambda: home.status("sealed")["waiting"] == 1)
        held.handle.cancel("enough")
        assert await same.text() == "here"
        assert same.place == held.place

        await home.call("sealed", "die", place=held.place).error()
        error = await home.call("sealed", "echo", place=held.place).error()
        assert (error.code, error.data["atrax"]["reason"]) == (atrax.UNAVAILABLE, "place_gone")


def members(home: House, server: str) -> list[Any]:
    return home.supervisor._families[server].nest.members


# ---- isolation ----


async def test_with_session_isolation_each_session_has_a_process_that_ends_with_it() -> None:
    one, two = Owner("alice", "s1"), Owner("alice", "s2")
    async with house({"own": does(isolation="session")}) as home:
        await home.is_in("own", State.READY)
        (lists,) = home.status("own")["pids"]
        first = int(await home.call("own", "pid", one).text())
        second = int(await home.call("own", "pid", two).text())
        assert len({lists, first, second}) == 3
        assert int(await home.call("own", "pid", one).text()) == first

        theirs = home.call("own", "wait", one)
        home.supervisor.gone(one)
        assert (await theirs.error()).code == atrax.CHILD_DIED
        await home.until(lambda: not alive(first))
        assert alive(second)
        assert alive(lists)


async def test_with_principal_isolation_the_sessions_of_a_principal_share_a_process() -> None:
    async with house({"own": does(isolation="principal")}) as home:
        mine = await home.call("own", "pid", Owner("alice", "s1")).text()
        assert await home.call("own", "pid", ALICE).text() == mine
        assert await home.call("own", "pid", BOB).text() != mine
        home.supervisor.gone(Owner("alice", "s1"))
        assert await home.call("own", "pid", ALICE).text() == mine


async def test_a_place_of_somebody_elses_isolated_process_is_as_good_as_gone() -> None:
    async with house({"own": does(isolation="principal")}) as home:
        mine = home.call("own", "pid", ALICE)
        await mine.text()
        error = await home.call("own", "pid", BOB, place=mine.place).error()
        assert error.data["atrax"]["reason"] == "place_gone"


async def test_past_the_limit_of_children_the_longest_idle_isolated_one_makes_room() -> None:
    async with house({"own": does(isolation="principal")}, limits={"children": 3}) as home:
        await home.is_in("own", State.READY)
        first = int(await home.call("own", "pid", Owner("a")).text())
        second = home.call("own", "wait", Owner("b"))
        await home.until(lambda: second.place)
        assert await home.call("own", "pid", Owner("c")).text()
        await home.until(lambda: not alive(first))
        third = home.call("own", "wait", Owner("c"))
        await home.until(lambda: third.place)
        error = await home.call("own", "pid", Owner("d")).error()
        assert error.code == atrax.OVERLOADED
        assert "limits.children" in error.message


# ---- use ----


async def test_a_lazy_server_runs_once_for_its_lists_and_then_at_first_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(atrax, "LISTS_READ", 0.1)
    async with house({"lazy": does(lazy=True)}) as home:
        await home.is_in("lazy", State.READY)
        link = await home.link("lazy", None)
        assert not isinstance(link, Error)
        lists = Answer()
        link.send(Call("tools/list", {}, Owner(""), "2025-11-25"), lists)
        await lists.outcome
        await home.is_in("lazy", State.STOPPED)
        assert isinstance(await home.link("lazy", None), Error)  # Atrax itself starts nothing
        assert home.supervisor.state("lazy") is State.STOPPED
        assert await home.call("lazy", "echo", text="woken").text() == "woken"
        assert home.supervisor.state("lazy") is State.READY


async def test_an_idle_server_is_stopped_but_not_one_in_use() -> None:
    async with house({"idle": does(idle_stop=0.2), "used": does(idle_stop=0.2)}) as home:
        held = home.call("used", "wait")
        await home.call("idle", "pid").text()
        await home.is_in("idle", State.STOPPED)
        await home.until(lambda: home.status("idle")["pids"] == [])
        home.call("used", "release")
        assert await held.text() == "released"
        assert home.moves("idle")[-1] == ("ready", "unused", "stopped")
        assert await home.call("idle", "echo", text="again").text() == "again"


async def test_a_subscription_keeps_an_idle_server_running() -> None:
    async with house({"watched": child("legacy.py", idle_stop=0.2)}) as home:
        link = await home.link("watched")
        assert not isinstance(link, Error)
        params = {"notifications": {"resourceSubscriptions": ["test://watched-resource"]}}
        listen = link.send(Call("subscriptions/listen", params, ALICE, "2026-07-28"), Answer())
        await asyncio.sleep(0.6)  # three times as long as it may be unused
        assert home.supervisor.state("watched") is State.READY
        listen.cancel("enough")
        await home.is_in("watched", State.STOPPED)


async def test_stop_ends_stubborn_children_and_all_that_they_started() -> None:
    async with house({"stubborn": does("stubborn"), "parent": does()}) as home:
        grandchild = int(await home.call("parent", "fork").text())
        pids = [*home.status("stubborn")["pids"], *home.status("parent")["pids"], grandchild]
        await home.is_in("stubborn", State.READY)
        assert all(map(alive, pids))
    assert not any(map(alive, pids))


async def test_a_grandchild_in_the_group_of_a_dead_child_is_ended() -> None:
    async with house({"parent": does()}) as home:
        grandchild = int(await home.call("parent", "fork").text())
        assert alive(grandchild)
        await home.call("parent", "die").error()
        await home.until(lambda: not alive(grandchild))


# ---- lines ----


@given(st.lists(st.binary(max_size=12).filter(lambda line: b"\n" not in line)), st.data())
def test_lines_are_the_same_however_they_are_split(lines: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(line + b"\n" for line in lines)
    cuts = data.draw(st.lists(st.integers(0, len(whole))).map(sorted))
    framing, got = Lines(12), []
    for begin, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        got += framing.feed(whole[begin:end])
    assert got == lines
    assert framing.end() == []
    assert not framing.overlong


@given(st.integers(0, 5), st.integers(11, 40), st.integers(1, 9))
def test_a_long_line_ends_the_framing_wherever_it_is_split(
    before: int, size: int, step: int
) -> None:
    whole = b"good\n" * before + b"x" * size + b"\nnever\n"
    framing, got = Lines(10), []
    for at in range(0, len(whole), step):
        got += framing.feed(whole[at : at + step])
        if framing.overlong:
            break
    assert framing.overlong
    assert got == [b"good"] * before


def test_a_line_without_its_newline_is_the_last_one() -> None:
    framing = Lines(100)
    assert framing.feed(b"one\ntw") == [b"one"]
    assert framing.feed(b"o") == []
    assert framing.end() == [b"two"]
