"""What a child may do and what becomes of it: real processes, looked at from inside and through /proc."""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import pytest
from conftest import eventually
from test_supervisor import alive, does, house

import atrax
from atrax import Config, Unstartable

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux is where all of this holds")

# A whole gateway's worth of supervision in a process of its own, so that it can be killed.
GATEWAY = """
import asyncio, json, sys
sys.path[:0] = {path!r}
import atrax
from test_supervisor import does, House
async def main():
    atrax.become_subreaper()
    home = House({{"one": does()}})
    home.supervisor.start()
    pids = [int(await home.call("one", "pid").text())]
    pids.append(int(await home.call("one", "fork").text()))
    pids.append(int(await home.call("one", "fork", escape=True).text()))
    print(json.dumps(pids), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    await home.supervisor.stop(1.0)
asyncio.run(main())
"""


def server(**options: Any) -> atrax.ServerConfig:
    return Config.model_validate({"mcpServers": {"one": options}}).servers["one"]


def staged(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """`command` by way of the stage, as Child starts it."""
    return subprocess.run(
        atrax.staged(atrax.Launch(tuple(command), {}, None)),
        capture_output=True,
        text=True,
        timeout=30,
        **options,
    )


def gateway() -> tuple[subprocess.Popen[str], list[int]]:
    source = GATEWAY.format(path=sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


# ---- what a child sees ----


async def test_a_child_sees_a_short_safe_environment_and_its_own_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GITHUB_TOKEN", "of another server")
    monkeypatch.setenv("BASH_FUNC_ls%%", "() { rm -rf /; }")
    monkeypatch.setenv("LC_TIME", "() { code; }")
    monkeypatch.setenv("HTTPS_PROXY", "http://user:password@proxy")
    async with house({"one": does(env={"MINE": "yes"})}) as home:
        seen = json.loads(await home.call("one", "environment").text())
    assert seen["MINE"] == "yes"
    # LC_CTYPE: what Python sets by itself where the locale is C.
    assert set(seen) <= atrax.SAFE_VARIABLES | {"MINE", atrax.MARK, "LC_CTYPE"}


async def test_a_child_has_no_descriptors_but_its_three() -> None:
    inherited = os.open("/etc/hostname", os.O_RDONLY)
    os.set_inheritable(inherited, True)  # as one that a shell or an init system left open
    try:
        async with house({"one": does()}) as home:
            assert set(json.loads(await home.call("one", "descriptors").text())) == {"0", "1", "2"}
    finally:
        os.close(inherited)


async def test_a_child_gains_no_privileges_and_leads_a_session_of_its_own() -> None:
    async with house({"one": does()}) as home:
        status = dict(
            line.split(":\t", 1) for line in (await home.call("one", "status").text()).splitlines()
        )
    assert status["NoNewPrivs"] == "1"
    assert status["NSsid"] == status["NSpgid"] == status["Pid"]


async def test_a_child_starts_with_no_signal_ignored_or_blocked() -> None:
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        shown = staged(["/bin/cat", "/proc/self/status"]).stdout
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        signal.signal(signal.SIGHUP, ignored)
    masks = dict(line.split(":\t") for line in shown.splitlines() if line.startswith("Sig"))
    assert int(masks["SigIgn"], 16) == int(masks["SigBlk"], 16) == 0


async def test_a_child_runs_in_its_cwd(tmp_path: pathlib.Path) -> None:
    async with house({"one": does(cwd=str(tmp_path))}) as home:
        assert await home.call("one", "directory").text() == str(tmp_path)


def test_no_secret_passes_through_a_command_line() -> None:
    order = atrax.staged(atrax.launch(server(command="/bin/true", env={"TOKEN": "s3cret"})))
    assert json.loads(order[5]).keys() == {"parent", "limits"}
    assert order[6:] == ["/bin/true"]


def test_a_limit_of_the_order_binds() -> None:
    limits = ((atrax.RLIMIT_NOFILE, 64),)
    command = atrax.staged(atrax.Launch(("/bin/sh", "-c", "ulimit -n"), {}, None, None, limits))
    assert subprocess.run(command, capture_output=True, text=True, timeout=30).stdout == "64\n"


# ---- what cannot be started ----


def test_a_command_that_is_no_program_is_one_clear_line(tmp_path: pathlib.Path) -> None:
    program = tmp_path / "server"
    program.write_text("#!/nonexistent/interpreter\n")
    program.chmod(0o755)
    done = staged([str(program)])
    assert done.returncode == 127
    assert done.stderr == f"atrax: cannot run {program}: No such file or directory\n"


def test_no_child_leaves_a_core_dump_that_may_hold_secrets() -> None:
    way = atrax.launch(server(command="/bin/sh", args=["-c", "ulimit -Hc"]))
    done = subprocess.run(atrax.staged(way), capture_output=True, text=True, timeout=30)
    assert done.stdout == "0\n"


def test_a_child_of_a_gateway_that_is_gone_does_not_start() -> None:
    command = atrax.staged(atrax.Launch(("/bin/echo", "started"), {}, None))
    command[5] = json.dumps({"parent": 1, "limits": []})
    assert subprocess.run(command, capture_output=True, text=True, timeout=30).stdout == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"command": "npx"}, 'command "npx" not found on PATH. Is Node.js installed?'),
        (
            {"command": "no-such-thing"},
            'command "no-such-thing" not found on PATH. Is it installed?',
        ),
        ({"command": "./server"}, 'command "./server" does not exist'),
        ({"command": "/tmp"}, 'command "/tmp" is a directory'),
        (
            {"command": "npx -y x"},
            'command "npx -y x" not found on PATH. What follows the program belongs in "args"',
        ),
        ({"command": "/etc/passwd"}, 'command "/etc/passwd" is not executable'),
        ({"command": "/bin/true", "cwd": "/no/such"}, 'cwd "/no/such" is not a directory'),
    ],
)
def test_what_cannot_be_started_says_what_to_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Unstartable) as caught:
        atrax.launch(server(env={"PATH": "/nonexistent"}, **options))
    assert str(caught.value) == message


def test_a_command_is_found_on_the_path_of_the_child(tmp_path: pathlib.Path) -> None:
    program = tmp_path / "server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    way = atrax.launch(server(command="server", args=["-v"], env={"PATH": str(tmp_path)}))
    assert way.command == (str(program), "-v")


def test_a_bundled_server_is_this_file_again() -> None:
    way = atrax.launch(server(command="bundled:notes", args=["x"]))
    assert way.command == (sys.executable, atrax.__file__, "bundled", "notes", "x")


# ---- what becomes of it ----


async def test_children_die_with_a_gateway_that_is_killed() -> None:
    process, (child, *_) = await asyncio.to_thread(gateway)
    assert alive(child)
    process.kill()
    process.wait()
    await eventually(lambda: not alive(child), f"{child} outlived its gateway")


async def test_a_gateway_that_stops_leaves_no_descendant_behind() -> None:
    process, pids = await asyncio.to_thread(gateway)
    assert all(map(alive, pids))
    process.communicate("stop\n", timeout=30)
    assert process.returncode == 0
    assert not any(map(alive, pids))


async def test_an_escaped_grandchild_is_ended_with_its_child_and_no_other_is() -> None:
    assert atrax.become_subreaper()
    async with house({"one": does(), "two": does()}) as home:
        theirs = int(await home.call("one", "fork", escape=True).text())
        others = int(await home.call("two", "fork", escape=True).text())
        await home.call("one", "die").error()
        await home.until(lambda: not alive(theirs))
        home.supervisor.sweep()
        assert alive(others)
    assert not alive(others)
