"""The sandbox against a child that tries (children/tries.py): as who runs the tests, and as nobody where that is root.

Each act is stopped by the kernel; those that pass through seccomp are shown as events. What a machine's kernel
or container lacks skips, with what is missing; that such a child is not started is tested on every Linux."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Running, Start, alive, eventually, starting
from installed import ARCHIVE, HOME, NODE, NODE_MODULES
from promises import promise

import atrax as source
from atrax import Config, Unstartable

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Linux is where all of this holds"),
    pytest.mark.needs_install(),  # `quick` has no time for all of these
]

NOBODY = 65534


class House:
    """Directories that a sandboxed child may read, may write, and may not touch; a gateway over them."""

    def __init__(self, root: Path, python: str, user: int | None, start: Start) -> None:
        self.root, self.python, self.user, self._start = root, python, user, start
        self.program = root / "atrax.pyz"
        for name in ("read", "write", "out", "children", "home"):
            (root / name).mkdir()
        shutil.copy(ARCHIVE, self.program)
        shutil.copy(HOME / "tests" / "children" / "tries.py", root / "children")
        (root / "read" / "file").write_text("may be read")
        (root / "out" / "secret").write_text("may not be read")
        (root / "out" / "program").write_text("#!/bin/sh\necho ran\n")
        (root / "out" / "program").chmod(0o755)
        (root / "read" / "link").symlink_to(root / "out" / "secret")
        for path in [root, *root.rglob("*")]:
            os.chown(path, *[os.getuid() if user is None else user] * 2, follow_symlinks=False)
        root.chmod(0o755)  # of mkdtemp it is 0700

    def server(self, **sandbox: Any) -> dict[str, Any]:
        """The entry of children/tries.py with a sandbox; what it lies in is readable."""
        read = [str(self.root / "children"), str(self.root / "read")]
        whole = {"read": read, "write": [str(self.root / "write")], **sandbox}
        script = str(self.root / "children" / "tries.py")
        return {"command": self.python, "args": ["-S", script], "sandbox": whole}

    async def serve(self, servers: dict[str, Any], **options: Any) -> Running:
        """A gateway that runs as `user`, ready."""
        config = {"log": {"format": "json"}, "mcpServers": servers}
        gateway = await self._start(
            config,
            program=options.pop("program", self.program),
            env={"HOME": str(self.root / "home"), "ATRAX": str(self.program), **options},
            judged=False,
            python=self.python,
            user=self.user,
        )
        return await gateway.ready()

    def seen_outside(self) -> dict[str, Any]:
        """All that can be changed of what lies in `out` and `read`."""
        found = {}
        for path in sorted([*(self.root / "out").rglob("*"), *(self.root / "read").rglob("*")]):
            status = path.lstat()
            labels = os.listxattr(path, follow_symlinks=False)
            text = path.read_text() if path.is_file() else ""
            found[str(path)] = (status.st_mode, status.st_uid, status.st_mtime, text, labels)
        return found


def python_for(user: int) -> str | None:
    """An interpreter that `user` can run, of the version that the archive was built for."""
    ask = "import ctypes, sys; print(sys.version_info[:2])"
    for python in dict.fromkeys((sys.executable, "/usr/local/bin/python3", "/usr/bin/python3")):
        with contextlib.suppress(OSError):
            asked = [python, "-I", "-c", ask]
            done = subprocess.run(
                asked,
                capture_output=True,
                text=True,
                user=user,
                group=user,
                extra_groups=[],
                cwd="/",
            )
            if done.stdout.strip() == str(sys.version_info[:2]) and not done.returncode:
                return os.path.realpath(python)
    return None


@functools.cache
def lacking(user: int | None, python: str) -> str:
    """What this machine lacks for a sandbox; "" if nothing."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        archive, config = Path(folder, "atrax.pyz"), Path(folder, "config.json")
        shutil.copy(ARCHIVE, archive)
        server = {"command": "bundled:files", "args": ["/usr"], "sandbox": {}}
        config.write_text(json.dumps({"mcpServers": {"one": server}}))
        who: dict[str, Any] = {} if user is None else {"user": user, "group": user}
        command = [python, str(archive), "check", "--json", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", **who)
        status = json.loads(done.stdout)["servers"]["one"]
        return "" if status["state"] == "ready" else str(status["lastError"])


@pytest.fixture(params=["as we are", "as nobody"])
async def house(request: pytest.FixtureRequest) -> AsyncIterator[House]:
    """The house, if this machine can hold a child in it."""
    user, python = None, sys.executable
    if request.param == "as nobody":
        if os.getuid() != 0:
            pytest.skip("only root can become nobody")
        user, other = NOBODY, python_for(NOBODY)
        if other is None:
            pytest.skip("no Python of this version that nobody may run")
        python = other
    if lacks := lacking(user, python):
        pytest.skip(lacks)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "configs").mkdir()
        os.chmod(folder, 0o755)
        os.mkdir(root := Path(folder, "house"))
        async with starting(Path(folder, "configs")) as start:
            yield House(root, python, user, start)


def events(gateway: Running, name: str) -> list[dict[str, Any]]:
    """The events of that name in the log so far."""
    lines = [json.loads(line) for line in gateway.log if line.startswith("{")]
    return [event for event in lines if event["event"] == name]


async def shown(gateway: Running, name: str, **fields: Any) -> dict[str, Any]:
    """The first event of that name and with these fields, past or to come."""
    found: list[dict[str, Any]] = []

    def look() -> bool:
        found[:] = [one for one in events(gateway, name) if fields.items() <= one.items()]
        return bool(found)

    await eventually(look, f"no event {name} {fields} in:\n{gateway}")
    return found[0]


async def attempt(gateway: Running, act: str, server: str = "tries", **arguments: Any) -> str:
    """What came of the act: "done …", or the name of an errno and perhaps when."""
    answer = await gateway.modern(server).call(act, arguments)
    return str(answer.result["content"][0]["text"])


def listeners(folder: Path) -> dict[str, socket.socket]:
    """Sockets of ours that nobody in a sandbox may reach."""
    kinds = {"tcp": (socket.AF_INET, 1), "udp": (socket.AF_INET, 2), "tcp6": (socket.AF_INET6, 1)}
    opened: dict[str, socket.socket] = {}
    for name, (family, kind) in kinds.items():
        with contextlib.suppress(OSError):  # a machine without IPv6
            opened[name] = socket.socket(family, kind)
            opened[name].bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
    names = {"path": str(folder / "unix"), "abstract": f"\0atrax-test-{os.getpid()}"}
    for name, place in names.items():
        opened[name] = socket.socket(socket.AF_UNIX)
        opened[name].bind(place)
    opened["datagrams"] = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    opened["datagrams"].bind(str(folder / "datagrams"))
    for name in ("path", "datagrams"):
        os.chmod(str(folder / ("unix" if name == "path" else name)), 0o777)
    for one in opened.values():
        if one.type == socket.SOCK_STREAM:
            one.listen()
        one.setblocking(False)
    return opened


def heard(one: socket.socket) -> bool:
    """Whether anything reached a listener of ours."""
    with contextlib.suppress(BlockingIOError):
        if one.type == socket.SOCK_STREAM:
            one.accept()
        else:
            one.recv(100)
        return True
    return False


# ---- files ----


@promise("sandbox.files")
async def test_a_child_reads_and_changes_nothing_outside_of_its_directories(house: House) -> None:
    gateway = await house.serve({"tries": house.server()})
    root, proc = house.root, f"/proc/{gateway.pid}"
    secret, program, new = (str(root / "out" / name) for name in ("secret", "program", "new"))
    own, readable = str(root / "write" / "own"), str(root / "read" / "file")
    assert await attempt(gateway, "write", path=own) == "done"
    before = house.seen_outside()
    refused = {
        "EACCES": [
            ("read", {"path": secret}),
            ("read", {"path": str(root / "read" / "link")}),
            ("read", {"path": f"{root}/read/../out/secret"}),
            ("read", {"path": f"/proc/self/root{secret}"}),
            ("read", {"path": f"/proc/self/cwd/../../../../../../../..{secret}"}),
            ("read", {"path": f"{proc}/root{secret}"}),
            ("read", {"path": f"{proc}/environ"}),
            ("read", {"path": f"{proc}/cmdline"}),
            ("read", {"path": "/etc/shadow"}),
            ("read", {"path": str(gateway.config)}),
            ("list", {"path": str(root / "out")}),
            ("run", {"path": program}),
        ],
        # Which of Landlock, read-only mounts and the edges of mounts comes first is the kernel's affair.
        "EACCES EROFS EXDEV EPERM": [
            ("write", {"path": new}),
            ("append", {"path": secret}),
            ("write", {"path": readable}),
            ("truncate", {"path": secret}),
            ("truncate", {"path": readable}),
            ("make", {"path": new}),
            ("remove", {"path": secret}),
            ("remove", {"path": readable}),
            ("rename", {"src": own, "dst": new}),
            ("rename", {"src": secret, "dst": str(root / "write" / "moved")}),
            ("link", {"src": secret, "dst": str(root / "write" / "linked")}),
            ("link", {"src": own, "dst": new}),
            ("symlink", {"src": own, "dst": new}),
            ("chmod", {"path": secret}),
            ("chmod", {"path": readable}),
            ("chown", {"path": secret}),
            ("touch", {"path": secret}),
            ("label", {"path": secret}),
            ("mount", {"path": str(root / "write")}),
        ],
    }
    for names, acts in refused.items():
        for act, arguments in acts:
            got = await attempt(gateway, act, **arguments)
            assert got in names.split(), (act, arguments, got)
    link = str(root / "write" / "link")
    assert await attempt(gateway, "symlink", src=secret, dst=link) == "done"
    assert await attempt(gateway, "read", path=link) == "EACCES"
    assert await attempt(gateway, "append", path=link) in ("EACCES", "EROFS")
    assert house.seen_outside() == before
    assert sorted(os.listdir(root / "out")) == ["program", "secret"]


@promise("sandbox.honest")
async def test_honest_work_inside_goes_on(house: House) -> None:
    gateway = await house.serve({"tries": house.server(processes=None, memory=2**31, files=256)})
    inside, other = str(house.root / "write" / "a"), str(house.root / "write" / "b")
    for act, arguments, expected in (
        ("read", {"path": str(house.root / "read" / "file")}, "done may be read"),
        ("write", {"path": inside}, "done"),
        ("append", {"path": inside}, "done"),
        ("read", {"path": inside}, "done writtenwritten"),
        ("chmod", {"path": inside}, "done"),
        ("touch", {"path": inside}, "done"),
        ("rename", {"src": inside, "dst": other}, "done"),
        ("link", {"src": other, "dst": inside}, "done"),
        ("truncate", {"path": other}, "done"),
        ("make", {"path": str(house.root / "write" / "dir")}, "done"),
        ("remove", {"path": other}, "done"),
        ("spawn", {"command": ["/bin/sh", "-c", "cat /etc/hosts > /dev/null && echo fine"]}, "done 0 fine"),
        ("helper", {}, "done -15"),
        ("thread", {}, "done"),
        ("pair", {}, "done"),
    ):  # fmt: skip
        assert await attempt(gateway, act, **arguments) == expected, (act, arguments)
    assert Path(inside).stat().st_uid == (os.getuid() if house.user is None else house.user)
    assert events(gateway, "sandbox.denied") == []


@promise("sandbox.honest")
async def test_the_bundled_servers_work_in_a_sandbox(house: House) -> None:
    inside, notes = str(house.root / "read"), str(house.root / "write" / "notes.db")
    read, write = {"read": [inside]}, {"write": [str(house.root / "write")]}
    gateway = await house.serve({
        "files": {"command": "bundled:files", "args": [inside], "sandbox": read},
        "notes": {"command": "bundled:notes", "args": [notes], "sandbox": write},
    })  # fmt: skip
    listed = await gateway.modern("files").call("read", {"path": "file"})
    assert "may be read" in json.dumps(listed.result)
    added = await gateway.modern("notes").call("add", {"title": "one", "text": "from a sandbox"})
    assert not added.result.get("isError"), added.result
    assert Path(notes).exists()


@promise("sandbox.honest")
@pytest.mark.needs_install("node")
async def test_a_real_node_server_works_in_a_sandbox(tmp_path: Path, atrax: Start) -> None:
    if lacks := lacking(None, sys.executable):
        pytest.skip(lacks)
    script = NODE_MODULES / "@modelcontextprotocol" / "server-filesystem" / "dist" / "index.js"
    for name in ("inside", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "secret").write_text("outside")
    packages, inside = str(NODE_MODULES.resolve()), str(tmp_path / "inside")
    # Told that both may be touched: it is the kernel that says no.
    server = {
        "command": str(NODE),
        "args": [str(script.resolve()), inside, str(tmp_path / "outside")],
    }
    sandbox = {"read": [packages], "write": [inside], "memory": 2**31, "files": 256}
    config = {"mcpServers": {"fs": {**server, "sandbox": sandbox}}}
    gateway = await (await atrax(config)).ready()
    client, file = gateway.modern("fs"), f"{inside}/new.txt"
    written = await client.call("write_file", {"path": file, "content": "hello"})
    assert not written.result.get("isError"), written.result
    assert Path(file).read_text() == "hello"
    refused = await client.call("read_text_file", {"path": str(tmp_path / "outside" / "secret")})
    assert refused.result["isError"]
    assert "EACCES" in json.dumps(refused.result)


# Atrax in mounts of its own, where what lies at READ_ONLY is mounted read-only.
MOUNTED = """
import ctypes, os, sys
libc, place = ctypes.CDLL(None), os.environ["READ_ONLY"].encode()
for done in (
    libc.unshare(0x20000),
    libc.mount(b"none", b"/", None, 0x4000 | 1 << 18, None),
    libc.mount(place, place, None, 4096, None),
    libc.mount(b"none", place, None, 4096 | 32 | 1, None),
):
    if done:
        sys.exit("cannot mount")
os.execv(sys.executable, [sys.executable, os.environ["ATRAX"], *sys.argv[1:]])
"""


@promise("sandbox.files")
@pytest.mark.parametrize("house", ["as we are"], indirect=True)
async def test_what_was_mounted_read_only_below_write_stays_so(house: House) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can mount")
    if subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("this root may not mount")
    fixed, program = house.root / "write" / "fixed", house.root / "mounted.py"
    fixed.mkdir()
    program.write_text(MOUNTED)
    servers = {
        "above": house.server(),
        "at": house.server(write=[str(fixed)]),
    }
    gateway = await house.serve(servers, program=program, READ_ONLY=str(fixed))
    for server in servers:
        new, mode = str(fixed / "new"), str(fixed)
        assert await attempt(gateway, "write", server, path=new) == "EROFS", server
        assert await attempt(gateway, "chmod", server, path=mode) == "EROFS", server
    assert await attempt(gateway, "write", "above", path=str(house.root / "write" / "a")) == "done"


# ---- network ----


@promise("sandbox.network")
async def test_a_child_without_network_reaches_no_socket_and_each_try_is_an_event(
    house: House,
) -> None:
    opened = listeners(house.root)
    try:
        gateway = await house.serve({"tries": house.server()})
        ports = {
            name: one.getsockname()[1] for name, one in opened.items() if name[:3] in ("tcp", "udp")
        }
        ports["gateway"] = int(gateway.url.rpartition(":")[2])
        for name, port in ports.items():
            kind = "tcp" if name == "gateway" else name
            assert await attempt(gateway, "connect", kind=kind, port=port) == "EPERM", name
        for path in (str(house.root / "unix"), f"@atrax-test-{os.getpid()}"):
            assert await attempt(gateway, "connect", path=path) == "EPERM"
        for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):  # to Unix both are datagrams
            path = str(house.root / "datagrams")
            assert await attempt(gateway, "dgram", path=path, kind=kind) == "EPERM"
        assert await attempt(gateway, "io_uring") == "ENOSYS"
        for act in ("TCP socket", "UDP socket", "Unix socket", "pair of datagram sockets"):
            await shown(gateway, "sandbox.denied", server="tries", act=act)
        assert not any(map(heard, opened.values()))
    finally:
        for one in opened.values():
            one.close()


@promise("sandbox.network")
async def test_with_network_tcp_and_udp_pass_and_unix_sockets_do_not(house: House) -> None:
    opened = listeners(house.root)
    try:
        gateway = await house.serve({"tries": house.server(network=True)})
        for kind in ("tcp", "udp"):
            port = opened[kind].getsockname()[1]
            assert await attempt(gateway, "connect", kind=kind, port=port) == "done"
            assert heard(opened[kind])
        assert await attempt(gateway, "connect", path=str(house.root / "unix")) == "EPERM"
        assert await attempt(gateway, "connect", path=f"@atrax-test-{os.getpid()}") == "EPERM"
        assert await attempt(gateway, "dgram", path=str(house.root / "datagrams")) == "EPERM"
        assert not any(heard(opened[name]) for name in ("path", "abstract", "datagrams"))
    finally:
        for one in opened.values():
            one.close()


# ---- other processes, the system ----


@promise("sandbox.others")
async def test_a_child_cannot_touch_atrax_or_its_siblings_and_each_try_is_an_event(
    house: House,
) -> None:
    gateway = await house.serve({"tries": house.server(), "sibling": house.server()})
    me, sibling = [
        int((await attempt(gateway, "pid", name)).split()[1]) for name in ("tries", "sibling")
    ]
    for target in (gateway.pid, sibling, os.getppid()):
        for act in ("ptrace", "peek", "kill", "thread_kill", "limit", "nice"):
            got = await attempt(gateway, act, pid=target)
            assert got == "EPERM", (act, target, got)
    assert await attempt(gateway, "kill", pid=-1) == "done"  # to nobody: so kill(2) says it
    # Process 0 of "all of this user's" are Atrax and the siblings too.
    assert await attempt(gateway, "nice", which=os.PRIO_USER) == "EPERM"
    assert await attempt(gateway, "nice_io") == "EPERM"
    assert await attempt(gateway, "nice") == "done"
    for act in ("unshare", "clone", "keyring"):
        assert await attempt(gateway, act) == "EPERM"
    assert await attempt(gateway, "setns", path=f"/proc/{gateway.pid}/ns/net") == "EACCES"
    assert await attempt(gateway, "read", path=f"/proc/{sibling}/environ") == "EACCES"
    kill = "kill of a process that is not its own"
    for act in (
        "ptrace",
        "process_vm_readv",
        kill,
        "limits of another process",
        "unshare",
        "keyctl",
    ):
        event = await shown(gateway, "sandbox.denied", server="tries", act=act)
        assert event["pid"] == me
    # Once for each kind of act: a child that tries again and again floods no log.
    acts = [event["act"] for event in events(gateway, "sandbox.denied")]
    assert len(acts) == len(set(acts))
    status = await gateway.status()
    assert [status["servers"][name]["pids"] for name in ("tries", "sibling")] == [[me], [sibling]]
    metrics = (await gateway.get("/metrics"))[1].decode()
    assert f'atrax_events_total{{event="sandbox.denied"}} {len(acts)}' in metrics


@promise("sandbox.killed")
async def test_what_no_honest_program_does_ends_the_child_and_is_an_event(house: House) -> None:
    gateway = await house.serve({"tries": house.server()})
    acts = ["reboot", "foreign"] if platform.machine() == "x86_64" else ["reboot"]
    for number, act in enumerate(acts, 1):
        answer = await gateway.modern("tries").call(act)
        assert answer.code == source.CHILD_DIED
        await eventually(
            lambda number=number: len(events(gateway, "sandbox.killed")) == number,  # type: ignore[misc]
            f"{act} is no event:\n{gateway}",
        )
        await gateway.modern("tries").call("pid")  # its successor
    event = await shown(gateway, "sandbox.killed", server="tries")
    assert "system call" in event["message"]


async def test_a_root_child_keeps_no_right_but_those_over_files(house: House) -> None:
    gateway = await house.serve({"tries": house.server()})
    status = dict(
        line.split(":\t") for line in (await attempt(gateway, "status")).splitlines()[1:] if ":\t" in line
    )  # fmt: skip
    rights = 0b11011111 if house.user is None and os.getuid() == 0 else 0
    assert int(status["CapEff"], 16) & ~rights == 0
    assert status["NoNewPrivs"].strip() == "1"
    assert "Max core file size        0                    0" in await attempt(gateway, "limits")


# ---- limits ----


@promise("sandbox.limits")
async def test_memory_and_files_are_limited_and_reaching_the_limit_is_an_event(
    house: House,
) -> None:
    gateway = await house.serve({"tries": house.server(memory=2**28, files=64)})
    opened = await attempt(gateway, "open")
    assert opened.startswith("done EMFILE after ")
    assert int(opened.rsplit(maxsplit=1)[1]) < 64
    await shown(gateway, "sandbox.limit", server="tries", limit="files")
    filled = await attempt(gateway, "fill")
    assert filled.startswith("done ENOMEM after ")
    assert int(filled.rsplit(maxsplit=1)[1]) < 256
    await shown(gateway, "sandbox.limit", server="tries", limit="memory")


@promise("sandbox.killed")
async def test_a_child_that_crashes_of_its_memory_limit_is_an_event(house: House) -> None:
    gateway = await house.serve({"tries": house.server(memory=2**28)})
    assert (await gateway.modern("tries").call("fill_and_crash")).code == source.CHILD_DIED
    event = await shown(gateway, "sandbox.killed", server="tries")
    assert event["message"] == "was killed by SIGABRT; its sandbox limits memory to 268435456 bytes"


@promise("sandbox.limits")
async def test_processes_are_limited_or_root_is_told_that_they_cannot_be(house: House) -> None:
    limited, free = house.server(processes=20), house.server()
    gateway = await house.serve({"tries": limited, "other": free})
    if house.user is None and os.getuid() == 0:
        status = (await gateway.status())["servers"]
        assert status["tries"]["state"] == "failed"
        assert "does not bind root" in status["tries"]["lastError"]
        assert status["other"]["state"] == "ready"
        return
    forked = await attempt(gateway, "fork")
    assert forked.startswith("done EAGAIN after ")
    assert int(forked.rsplit(maxsplit=1)[1]) < 20
    await shown(gateway, "sandbox.limit", server="tries", limit="processes")
    # The limit is that child's own, not its user's.
    assert (await attempt(gateway, "helper", "other")) == "done -15"


@promise("sandbox.limits")
async def test_what_a_child_says_of_itself_in_proc_is_read_with_care(house: House) -> None:
    gateway = await house.serve({"tries": house.server(files=64)})
    assert await attempt(gateway, "rename_itself") == "done"
    orphan = (await attempt(gateway, "huge_environment")).removeprefix("done ")
    assert orphan.isdigit(), orphan
    assert (await attempt(gateway, "open")).startswith("done EMFILE")
    await shown(gateway, "sandbox.limit", server="tries", limit="files")
    status = Path(f"/proc/{gateway.pid}/status").read_text()
    assert int(status.partition("VmHWM:")[2].split()[0]) < 2**19, "KiB: it read 1 GiB of zeros"


# ---- ends ----


@promise("sandbox.ends")
async def test_descendants_of_a_sandboxed_child_end_with_it(house: House) -> None:
    gateway = await house.serve({"tries": house.server(), "other": house.server()})
    pids = []
    for server in ("tries", "other"):
        got = (await attempt(gateway, "daemon", server)).split()[1]
        pids.append(int(got))
    assert all(map(alive, pids))
    child = int((await attempt(gateway, "pid")).split()[1])
    os.kill(child, 9)
    await eventually(lambda: not alive(pids[0]), "a grandchild outlived its sandboxed child")
    assert alive(pids[1])
    await gateway.stop()
    assert not alive(pids[1])


@promise("sandbox.ends")
async def test_a_sandboxed_child_dies_with_a_gateway_that_is_killed(house: House) -> None:
    gateway = await house.serve({"tries": house.server()})
    child = int((await attempt(gateway, "pid")).split()[1])
    gateway.kill()
    await eventually(lambda: not alive(child), f"{child} outlived its gateway")


# ---- where it cannot be done ----

# Atrax as on a kernel that lacks the system calls named in WITHOUT: a filter that every kernel with seccomp has.
LACKING = """
import ctypes, json, os, struct, sys
libc = ctypes.CDLL(None)
numbers = json.loads(os.environ["WITHOUT"])
code = [(0x20, 0, 0, 0)]
for number in numbers:
    code += [(0x15, 0, 1, number), (6, 0, 0, 0x50000 | 38)]
code += [(6, 0, 0, 0x7FFF0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
libc.prctl(38, 1, 0, 0, 0)
if libc.prctl(22, 2, struct.pack("HP", len(code), ctypes.addressof(program)), 0, 0) != 0:
    sys.exit("no seccomp here")
os.execv(sys.executable, [sys.executable, os.environ["ATRAX"], *sys.argv[1:]])
"""
LANDLOCK = [444]
UNSHARE = [{"x86_64": 272, "aarch64": 97}.get(platform.machine(), 272)]


def lacking_calls(house: Path, numbers: list[int]) -> tuple[Path, dict[str, str]]:
    """What to run in place of Atrax, and its environment."""
    program = house / "lacking.py"
    program.write_text(LACKING)
    return program, {"WITHOUT": json.dumps(numbers)}


@promise("sandbox.files", "sandbox.network", "sandbox.refused")
async def test_without_namespaces_seccomp_stops_what_they_would_have(house: House) -> None:
    program, without = lacking_calls(house.root, UNSHARE)
    limited = {"limited": house.server(processes=9)}
    servers = {"tries": house.server(), **limited}
    gateway = await house.serve(servers, program=program, **without)
    secret, own = str(house.root / "out" / "secret"), str(house.root / "write" / "own")
    before = house.seen_outside()
    assert await attempt(gateway, "write", path=own) == "done"
    for act in ("chmod", "chown", "touch", "label"):
        assert await attempt(gateway, act, path=secret) == "EPERM", act
    assert await attempt(gateway, "flag", path=str(house.root / "read" / "file")) == "EPERM"
    # It cannot tell which file is meant: nobody in there may, and SECURITY says so.
    assert await attempt(gateway, "chmod", path=own) == "EPERM"
    assert await attempt(gateway, "truncate", path=secret) == "EACCES"
    for kind in ("tcp", "udp"):
        assert await attempt(gateway, "connect", kind=kind, port=9) == "EPERM"
    assert await attempt(gateway, "helper") == "done -15"
    assert house.seen_outside() == before
    status = (await gateway.status())["servers"]["limited"]
    assert status["state"] == "failed"
    assert "limit on processes" in status["lastError"]


@promise("sandbox.refused")
async def test_what_the_kernel_cannot_do_fails_that_server_alone_or_is_named(
    atrax: Start, children: Path, tmp_path: Path
) -> None:
    program, without = lacking_calls(tmp_path, LANDLOCK)
    tries = {"command": sys.executable, "args": ["-S", str(children / "tries.py")]}
    config = {"log": {"format": "json", "level": "debug"}, "mcpServers": {
        "strict": {**tries, "sandbox": {}},
        "best": {**tries, "sandbox": {"best_effort": True}},
        "plain": tries,
    }}  # fmt: skip
    gateway = await atrax(
        config, program=program, env={"ATRAX": str(ARCHIVE), **without}, judged=False
    )
    await gateway.ready()
    status = (await gateway.status())["servers"]
    assert status["strict"]["state"] == "failed"
    assert "no Landlock" in status["strict"]["lastError"]
    assert status["best"]["state"] == status["plain"]["state"] == "ready"
    assert any("files are open" in way for way in status["best"]["open"])
    event = await shown(gateway, "sandbox.open", server="best")
    assert "best_effort" in event["message"]
    assert any("no Landlock" in line for line in gateway.log[:12])  # the start-up screen
    # Tried once: nothing of it changes by itself, so there is no storm of new attempts.
    moves = [one for one in events(gateway, "server.state") if one["server"] == "strict"]
    assert [one["state"] for one in moves].count("starting") == 1
    failed = await gateway.modern("strict").call("pid")
    assert failed.code == source.UNAVAILABLE
    assert await attempt(gateway, "read", "plain", path=str(program))
    assert await attempt(gateway, "connect", "best", kind="tcp", port=1) == "EPERM"


@promise("sandbox.refused")
@pytest.mark.parametrize("key", ["read", "write"])
def test_a_directory_that_is_not_there_is_named(key: str, tmp_path: Path) -> None:
    config = Config.load(json.dumps({"mcpServers": {"one": {
        "command": "/bin/true", "cwd": str(tmp_path), "sandbox": {key: ["gone"]},
    }}}))  # fmt: skip
    with pytest.raises(Unstartable, match=rf'sandbox\.{key}: "{tmp_path}/gone" does not exist'):
        source.launch(config.servers["one"])


def test_a_failure_of_the_stage_never_execs(tmp_path: Path) -> None:
    order = {
        "read": [str(tmp_path / "gone")],
        "write": [],
        "always": source.ALWAYS,
        "network": True,
        "processes": False,
        "best_effort": True,
        "seccomp": None,
    }
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.set_inheritable(True)
        way = source.Launch(("/bin/echo", "ran"), {}, None, order)
        command = source.staged(way, theirs.fileno())
        done = subprocess.run(command, capture_output=True, text=True, close_fds=False)
        theirs.close()
        said = json.loads(ours.recv(65536))
    assert (done.returncode, done.stdout) == (127, "")
    assert "failed" in said


# ---- what a child leaves for the next one ----


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that says in whose memory it is, and whether that may read /etc/shadow."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("library")
    (folder / "evil.c").write_text(
        "#include <fcntl.h>\n#include <unistd.h>\n"
        "__attribute__((constructor)) static void ran(void) {\n"
        '  if (open("/etc/hostname", O_RDONLY) >= 0) write(2, "loaded outside\\n", 15);\n'
        '  else write(2, "loaded inside\\n", 14);\n}\n'
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "evil.so", folder / "evil.c"], check=True)  # fmt: skip
    return folder / "evil.so"


@promise("sandbox.before")
async def test_a_library_that_a_child_wrote_is_loaded_inside_alone(
    house: House, preloaded: Path
) -> None:
    library = house.root / "write" / "evil.so"
    shutil.copy(preloaded, library)
    library.chmod(0o755)
    gateway = await house.serve({"tries": {**house.server(), "env": {"LD_PRELOAD": str(library)}}})
    assert any("loaded inside" in line for line in gateway.log), str(gateway)
    assert not any("loaded outside" in line for line in gateway.log)


@promise("sandbox.before")
def test_what_a_child_can_write_does_not_say_what_it_may_read(tmp_path: Path) -> None:
    secret, write = tmp_path / "secret", tmp_path / "write"
    (secret / "bin").mkdir(parents=True)
    write.mkdir()
    (secret / "bin" / "tool").write_text("#!/bin/sh\n")
    (secret / "bin" / "tool").chmod(0o755)
    config = Config.load(json.dumps({"mcpServers": {"one": {
        "command": str(write / "server"), "sandbox": {"write": [str(write)]},
    }}}))  # fmt: skip

    def readable() -> set[str]:
        order = source.launch(config.servers["one"]).sandbox
        assert order is not None
        return {path for path in order["always"] if path.startswith(str(secret))}

    # The kernel runs "-x" from `cwd`, and who takes that for an option reads the secret as interpreter.
    (write / "server").write_text(f"#!-x {secret}\n")
    (write / "server").chmod(0o755)
    assert not readable()
    (write / "server").unlink()
    (write / "server").symlink_to(secret / "bin" / "tool")
    assert not readable()


@promise("sandbox.before")
async def test_a_directory_that_became_a_link_gives_no_right(house: House) -> None:
    outer, inner = house.root / "write", house.root / "write" / "inner"
    inner.mkdir()
    os.chown(inner, *[os.getuid() if house.user is None else house.user] * 2)
    servers = {
        "tries": house.server(write=[str(outer)]),
        "other": house.server(write=[str(inner)]),
    }
    gateway = await house.serve(servers)
    secret = str(house.root / "out" / "secret")
    assert await attempt(gateway, "read", "other", path=secret) == "EACCES"
    assert await attempt(gateway, "rename", src=str(inner), dst=str(outer / "moved")) == "done"
    assert await attempt(gateway, "symlink", src=str(house.root / "out"), dst=str(inner)) == "done"
    os.kill(int((await attempt(gateway, "pid", "other")).split()[1]), 9)

    async def failed() -> bool:
        return bool((await gateway.status())["servers"]["other"]["state"] == "failed")

    await eventually(failed, "it was started again in another directory")
    error = (await gateway.status())["servers"]["other"]["lastError"]
    assert str(inner) in error and "link" in error


# ---- what it says and how it is made ----


def test_paths_of_a_sandbox_are_resolved_like_those_of_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    sandbox = {"read": ["~/docs", "here"], "write": ["${PLACE}"]}
    text = json.dumps(
        {"mcpServers": {"one": {"command": "x", "cwd": str(tmp_path), "sandbox": sandbox}}}
    )
    read = Config.load(text, {"PLACE": "/srv/x"}).servers["one"].sandbox
    assert read is not None
    assert read.read == ["/home/somebody/docs", f"{tmp_path}/here"]
    assert read.write == ["/srv/x"]


@promise("sandbox.told")
def test_what_a_child_may_do_is_told_without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANG", "C.UTF-8")

    def told(**options: Any) -> str:
        server = {"command": "/bin/true", "env": {"TOKEN": "s3cret-value"}, **options}
        return "\n".join(
            source.allowed(Config.model_validate({"mcpServers": {"a": server}}).servers["a"])
        )

    free, held = (
        told(),
        told(sandbox={"read": ["/srv"], "network": True, "memory": 1000, "files": 9}),
    )
    assert "LANG" in free and "TOKEN" in free and "s3cret" not in free + held
    assert f"do what user {source.user_name()} can: it is not sandboxed" in free
    assert "read what programs need to run, /srv" in held
    assert "change nothing" in held
    assert "use TCP and UDP, but no Unix sockets" in held
    assert "take up to 1000 bytes of memory, 9 open files" in held


def test_what_a_program_is_installed_in_is_code_and_no_more(tmp_path: Path) -> None:
    for part in ("real/bin", "real/lib", "venv/bin", "venv/lib"):
        (tmp_path / part).mkdir(parents=True)
    real, link, script = (
        tmp_path / name for name in ("real/bin/python", "venv/bin/python", "venv/bin/tool")
    )
    real.write_bytes(b"\x7fELF")
    link.symlink_to("../../real/bin/python")
    script.write_text(f"#!{link} -I\n")
    found = source.installation(str(script), "")
    wanted = {"venv/bin", "venv/lib", "venv/pyvenv.cfg", "real/bin", "real/lib", "venv/bin/tool"}
    assert {str(tmp_path / name) for name in wanted} <= set(found)
    assert not {str(tmp_path), str(tmp_path / "real"), str(tmp_path / "venv")} & set(found)


def judged(program: bytes, machine: int, number: int, *arguments: int) -> int:
    """What a seccomp program says of a call: classic BPF, as seccomp(2) runs it."""
    data = struct.pack("IIQ6Q", number, machine, 0, *arguments, *[0] * (6 - len(arguments)))
    lines = list(struct.iter_unpack("HBBI", program))
    value = at = 0
    while True:
        code, yes, no, operand = lines[at]
        at += 1
        if code == 0x06:
            return int(operand)
        if code == 0x20:
            (value,) = struct.unpack_from("I", data, operand)
        elif code == 0x54:
            value &= operand
        else:
            holds = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}
            at += yes if holds[code] else no


@pytest.mark.parametrize("name", source._PROCESSORS)
def test_the_filter_says_what_it_is_meant_to_on_every_processor(name: str) -> None:
    column, machine, _ = source._PROCESSORS[name]
    allow, kill, tell, watch = source._ALLOW, source._KILL, source._TELL, source._WATCH
    eperm, enosys = source._ERRNO | 1, source._ERRNO | 38
    numbers = {call: row[column] for call, row in source._SPECIAL.items()}
    for network in (False, True):
        program = source._assembled(machine, source._main_filter(column, network))
        ask = functools.partial(judged, program, machine)
        through = allow if network else tell
        for family, expected in ((1, tell), (2, through), (10, through), (16, through), (17, tell)):
            assert ask(numbers["socket"], family, 1, 0) == expected, family
        assert ask(numbers["socket"], 16, 3, 9) == tell  # NETLINK_AUDIT
        assert ask(numbers["socketpair"], 1, 1 | 0o2000000) == allow
        assert ask(numbers["socketpair"], 1, 5) == allow  # whole messages, but connected
        for kind in (2, 2 | 0o2000000, 3, 4):
            assert ask(numbers["socketpair"], 1, kind) == tell
        assert ask(numbers["socketpair"], 30, 1) == tell  # TIPC
        assert ask(numbers["clone"], 0x3D0F00) == allow  # a thread
        for bit in (17, 25, 26, 27, 28, 29, 30):
            assert ask(numbers["clone"], 1 << bit) == tell
        assert ask(numbers["prlimit64"], 0, 7, 0xDEAD) == allow
        assert ask(numbers["prlimit64"], 9, 7, 0) == allow  # only asks
        assert ask(numbers["prlimit64"], 9, 7, 0xDEAD) == tell
        assert ask(numbers["prlimit64"], 9, 7, 0xDEAD << 32) == tell
        assert ask(numbers["kill"], 9, 9) == watch
        for row in source._OWN_ONLY.values():
            arguments = [0] * 6
            assert ask(row[column], *arguments) == allow
            arguments[row[2]] = 9
            assert ask(row[column], *arguments) == eperm
        for call, user in (("setpriority", 2), ("ioprio_set", 3)):
            assert ask(source._OWN_ONLY[call][column], user, 0) == eperm
        for calls, expected in (
            (source._REFUSED, tell),
            (source._DEADLY, kill),
            (source._ABSENT, enosys),
        ):
            for call, row in calls.items():
                assert row[column] < 0 or ask(row[column]) == expected, call
        assert ask({"x86_64": 1, "aarch64": 64}[name]) == allow  # write
        assert judged(program, machine ^ 1, 1) == kill
        assert ask(0x40000001) == kill  # x32
        assert ask(source._NEWEST + 1) == enosys  # what a later kernel can do, nobody has looked at


@pytest.fixture(scope="module", autouse=True)
def _archive_is_built() -> Iterator[None]:
    assert ARCHIVE.exists(), "atrax.pyz is not built: python3 build_zipapp.py"
    yield
