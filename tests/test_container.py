"""The key `container`: what the engine is told, tried with a stand-in everywhere; what holds, tried with podman.

podman runs an image made of this machine's own Python, so no registry is asked. Where podman cannot run, its tests
are skipped with podman's own reason."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Running, Start, child, eventually
from promises import promise

import atrax as program
from atrax import Config, Unstartable, UsageError

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="tried on Linux alone"),
    pytest.mark.needs_install(),  # `quick` has no time for all of these
]

Json = Any
CHILDREN = Path(__file__).parent / "children"
PYTHON = os.path.realpath(sys.executable)
IMAGE = "localhost/atrax-test:1"
SECRET = "correct-horse-battery"


def boxed(*arguments: str, script: str = "obeys.py", **more: Any) -> dict[str, Any]:
    """The entry of a test server in a container that sees the folder of test servers; `container` in `more` adds
    to that."""
    mounts = [{"source": str(CHILDREN), "target": str(CHILDREN)}]
    own = more.pop("container", {})
    container = {"image": IMAGE, **own, "mounts": [*mounts, *own.get("mounts", [])]}
    script = str(CHILDREN / script)
    return {
        "command": PYTHON,
        "args": ["-S", script, *arguments],
        "container": container,
        **more,
    }


async def started(atrax: Start, servers: Json, environment: dict[str, str]) -> Running:
    """A gateway whose servers are up. What they hear is not judged: in a container nobody writes it down."""
    gateway = await atrax({"mcpServers": servers}, env=environment, judged=False)
    return await gateway.ready()


async def run(gateway: Running, code: str, server: str = "one") -> str:
    """What `code` prints in the container, or how it failed."""
    answer = await gateway.modern().call(f"{server}__run", {"code": code})
    return str(answer.result["content"][0]["text"])


# ---- what the config may say ----


def told(**server: Any) -> str:
    """What is wrong with a config of one server; "" if nothing is."""
    try:
        Config.load(json.dumps({"mcpServers": {"one": server}}), environ={})
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "image",
    ["mcp/time", "time:1.2", "ghcr.io/a/b-c_d:v1", "localhost:5000/x/y", f"a@sha256:{'0' * 64}", "0123abcd"],
)  # fmt: skip
def test_the_name_of_an_image_is_taken(image: str) -> None:
    assert told(container={"image": image}) == ""


@pytest.mark.parametrize(
    "image",
    ["", "-v/:/x", "--privileged", "a b", "a\nb", "../x", "dir:/etc", "oci-archive:/x.tar", "A/b c", "a;b", "x" * 600],
)  # fmt: skip
def test_what_is_no_name_of_an_image_is_refused(image: str) -> None:
    assert "mcpServers.one.container.image: " in told(container={"image": image})


@pytest.mark.parametrize(
    ("mount", "message"),
    [
        ({"source": "/", "target": "/host"}, "the whole file system is not mounted"),
        ({"source": "/usr/..", "target": "/host"}, "the whole file system is not mounted"),
        ({"source": "/var/run/docker.sock", "target": "/x"}, "engine's socket"),
        ({"source": "/var/run", "target": "/x"}, "engine's socket"),
        ({"source": "/run/user/1000", "target": "/x"}, "engine's socket"),
        ({"source": "/proc/1", "target": "/x"}, "is the system's"),
        ({"source": "/srv,readonly=false", "target": "/x"}, "source: "),
        ({"source": "/srv", "target": "data"}, "target: "),
        ({"source": "/srv", "target": "/a,source=/"}, "target: "),
        ({"source": "/srv", "target": "/a:rw"}, "target: "),
        ({"source": "/srv", "target": "/tmp/"}, "is the container's own"),
        ({"source": "/srv"}, "target: is missing"),
        ({"source": "/srv", "target": "/a", "rw": True}, "rw: unknown key"),
    ],
)
def test_a_mount_that_would_give_too_much_is_refused(mount: Json, message: str) -> None:
    assert message in told(container={"image": "a", "mounts": [mount]})


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ({}, 'mcpServers.one.command: is missing: the program to start, or "container"'),
        ({"command": "bundled:notes"}, "a bundled server lies in this file"),
        ({"sandbox": {}}, "a server has one of them"),
        ({"cwd": "work"}, "must be an absolute path inside"),
        ({"paths": {"dirs": ["/data"]}}, 'paths with container needs "cwd"'),
        ({"env": {"DOCKER_HOST": "tcp://x"}}, "DOCKER_HOST is read by the engine itself"),
        ({"env": {"LD_PRELOAD": "/x.so"}}, "LD_PRELOAD is read by the engine itself"),
        ({"env": {"AWS*": "x"}}, '"AWS*" is no name for a variable'),
    ],
)
def test_what_does_not_fit_a_container_is_refused(server: Json, message: str) -> None:
    container = {"image": "a"} if server else None
    assert message in told(**server, **({"container": container} if container else {}))


def test_a_source_is_relative_to_the_config_and_dirs_are_inside(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    file = tmp_path / "config.json"
    container = {"image": "a", "mounts": [{"source": "notes", "target": "/notes", "write": True}]}
    server = {"container": container, "cwd": "/work", "paths": {"dirs": [".", "/notes/../notes"]}}
    file.write_text(json.dumps({"mcpServers": {"one": server}}))
    one = Config.load(file).servers["one"]
    assert one.container and one.container.mounts[0].source == str(tmp_path / "notes")
    assert one.paths and one.paths.dirs == ["/work", "/notes"]


def test_paths_of_a_container_are_not_read_as_this_machines(tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to("/etc")
    data = str(tmp_path / "data")  # inside it is a plain directory
    server = Config.load(
        json.dumps(
            {"mcpServers": {"one": {"container": {"image": "a"}, "cwd": data, "paths": {"dirs": [data]}}}}
        )
    ).servers["one"]  # fmt: skip

    def wrong(path: str) -> bool:
        params = {"name": "read", "arguments": {"path": path}}
        call = program.Call("tools/call", params, program.ANONYMOUS, program.MODERN)
        return bool(program.path_error(program.Record(), "one", server, call))

    assert not wrong(f"{data}/note.txt") and not wrong("note.txt") and not wrong("a/../b")
    assert wrong("/etc/passwd") and wrong("../x") and wrong(f"{data}/%2e%2e/x") and wrong("~/x")


def test_check_says_what_a_container_may_do() -> None:
    mounts = [
        {"source": "/srv", "target": "/data"},
        {"source": "/usr/share", "target": "/out", "write": True},
    ]
    container = {"image": "mcp/time:1", "engine": "podman", "mounts": mounts}
    entry = {"container": container, "env": {"TOKEN": SECRET}}
    server = Config.load(json.dumps({"mcpServers": {"one": entry}})).servers["one"]
    shown = "\n".join(program.allowed(server))
    assert "mcp/time:1 by podman" in shown and "use no network" in shown
    assert "read its image, /data (/srv), /out (/usr/share)" in shown
    assert "change /tmp, /out (/usr/share)" in shown and "TOKEN" in shown and SECRET not in shown


# ---- what the engine is told, with a stand-in ----


class StandIn:
    """A folder for PATH that holds engines which tell how they were called."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder = folder
        self.environment = {"PATH": f"{folder}:/usr/bin:/bin"}
        for name in names:
            file = folder / name
            file.write_text(f"#!{PYTHON} -IS\n{(CHILDREN / 'engine.py').read_text()}")
            file.chmod(0o755)

    def calls(self, verb: str) -> list[Json]:
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [call for call in map(json.loads, lines) if call["argv"][0] == verb]

    async def removed(self, number: int = 1) -> list[str]:
        """The names of the containers that were removed, once there are so many."""
        await eventually(lambda: len(self.calls("rm")) >= number, "no container was removed")
        return [call["argv"][-1] for call in self.calls("rm")]

    def names(self) -> list[str]:
        """The names of the containers that were started."""
        return [
            option.partition("=")[2]
            for call in self.calls("run")
            for option in call["argv"]
            if option.startswith("--name=")
        ]


@pytest.fixture
def podman(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path, "podman", "docker")


@promise("container.hardened")
@pytest.mark.parametrize("engine", ["podman", "docker"])
async def test_the_engine_gets_each_lock_and_only_what_was_asked_for(
    atrax: Start, podman: StandIn, tmp_path: Path, engine: str
) -> None:
    mounts = [{"source": str(tmp_path), "target": "/data", "write": True}]
    container = {"engine": engine, "mounts": mounts, "memory": 256 * 2**20}
    servers = {"one": boxed(container=container, cwd="/")}
    gateway = await started(atrax, servers, podman.environment)
    assert await run(gateway, "print(6 * 7)") == "42"

    call = podman.calls("run")[0]
    place = next(at for at, argument in enumerate(call["argv"]) if argument == IMAGE)
    options = call["argv"][1:place]
    assert {
        "--rm", "--interactive", "--pull=never", "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges",
        "--network=none", "--ipc=private", "--log-driver=none", f"--memory={256 * 2**20}",
        f"--memory-swap={256 * 2**20}", "--workdir=/", f"--entrypoint={PYTHON}", "--env=HOME=/tmp",
        f"--mount=type=bind,source={CHILDREN},target={CHILDREN},readonly",
        f"--mount=type=bind,source={tmp_path},target=/data",
    } <= set(options)  # fmt: skip
    assert any(option.startswith("--tmpfs=/tmp:") and "noexec" in option for option in options)
    assert any(option.startswith("--pids-limit=") for option in options)
    nobody = f"--user={os.getuid() or 65534}:{os.getgid() if os.getuid() else 65534}"
    assert nobody in options and not any("privileged" in option for option in options)
    assert call["argv"][place + 1 :] == ["-S", str(CHILDREN / "obeys.py")]
    # podman without root needs newuidmap, which is setuid; inside it is the engine that forbids it.
    assert "NoNewPrivs:\t0" in call["status"]


async def test_podman_is_taken_first_and_the_network_only_when_asked_for(
    atrax: Start, podman: StandIn
) -> None:
    servers = {"one": boxed(container={"network": True})}
    gateway = await started(atrax, servers, podman.environment)
    await run(gateway, "pass")
    options = podman.calls("run")[0]["argv"]
    assert not any(option.startswith("--network") for option in options)
    assert "--read-only-tmpfs=false" in options  # docker has no such option


@promise("container.secrets")
async def test_a_secret_is_on_no_command_line_and_the_engines_settings_stay_outside(
    atrax: Start, podman: StandIn
) -> None:
    servers = {"one": boxed(env={"TOKEN": "${MY_TOKEN}"})}
    environment = {**podman.environment, "MY_TOKEN": SECRET, "GITHUB_TOKEN": "of another server"}
    environment["CONTAINER_HOST"] = "unix:///nowhere"
    gateway = await started(atrax, servers, environment)

    inside = json.loads(await run(gateway, "import json, os; print(json.dumps(dict(os.environ)))"))
    call = podman.calls("run")[0]
    assert inside["TOKEN"] == call["environment"]["TOKEN"] == SECRET and inside["HOME"] == "/tmp"
    assert "--env=TOKEN" in call["argv"] and SECRET not in " ".join(call["argv"])
    assert call["environment"]["CONTAINER_HOST"] == "unix:///nowhere"
    assert not {"CONTAINER_HOST", "GITHUB_TOKEN", "PATH", program.MARK} & set(inside)
    assert not {"GITHUB_TOKEN", "MY_TOKEN"} & set(call["environment"])
    await gateway.stop()
    assert SECRET not in str(gateway)


@promise("container.removed")
async def test_a_container_is_removed_when_its_client_dies_whatever_the_reason(
    atrax: Start, podman: StandIn
) -> None:
    gateway = await started(atrax, {"one": boxed()}, podman.environment)
    os.kill(podman.calls("run")[0]["pid"], signal.SIGKILL)
    assert await podman.removed() == podman.names()[:1]
    # The next one has a name of its own, and ends with Atrax.
    assert await run(gateway, "print('back')") == "back"
    await gateway.stop()
    first, second = await podman.removed(2)
    assert first != second and [first, second] == podman.names()
    assert all(name.startswith("atrax-one.") for name in podman.names())


async def test_a_client_that_does_not_end_is_killed_and_its_container_removed(
    atrax: Start, podman: StandIn
) -> None:
    servers = {"one": boxed("stubborn")}
    gateway = await started(atrax, servers, podman.environment)
    assert await gateway.stop() == 0
    assert await podman.removed() == podman.names()


@promise("container.told")
@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("Error: mcp/time: image not known\n", "image not known"),
        ("docker: Cannot connect to the daemon.\n\nRun 'docker run --help' for more information\n", "connect to"),
        ("docker: no such image: x.\nSee 'docker run --help'.\n", "no such image: x"),
    ],
)  # fmt: skip
async def test_what_the_engine_refuses_is_told_with_what_to_do(
    atrax: Start, podman: StandIn, said: str, reason: str
) -> None:
    (podman.folder / "refuses").write_text(said)
    servers = {"one": boxed(container={"engine": "docker"})}
    gateway = await started(atrax, servers, podman.environment)
    error = (await gateway.status())["servers"]["one"]["lastError"]
    assert (
        f"docker could not start the container. Is the image here? `docker pull {IMAGE}`" in error
    )
    assert reason in error and "--help" not in error


@pytest.mark.parametrize(
    ("container", "message"),
    [
        ({}, "container: neither podman nor docker is there"),
        ({"engine": "docker"}, "container: docker is not there"),
    ],
)
def test_without_an_engine_the_server_says_so(
    container: Json, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    entry = {"container": {"image": "a", **container}}
    with pytest.raises(Unstartable, match=message):
        program.launch(Config.model_validate({"mcpServers": {"one": entry}}).servers["one"])


def test_a_source_that_is_missing_is_named(
    podman: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", podman.environment["PATH"])
    mount = program.Mount(source="/no/such", target="/x")
    container = program.ContainerConfig(image="a", mounts=[mount])
    with pytest.raises(Unstartable, match=r'container\.mounts: "/no/such" does not exist'):
        program.launch(program.ServerConfig(container=container))


def test_a_source_that_became_a_link_is_mounted_no_more(
    podman: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", podman.environment["PATH"])
    source = tmp_path / "shared" / "mine"
    source.mkdir(parents=True)
    (tmp_path / "named").symlink_to(source)
    mounts = [{"source": str(tmp_path / "named"), "target": "/x"}]
    entry = {"container": {"image": "a", "mounts": mounts}}
    server = Config.load(json.dumps({"mcpServers": {"one": entry}})).servers["one"]
    # The link that the config named was followed when that was read.
    assert any(f"source={source.resolve()}," in one for one in program.launch(server).command)
    source.rmdir()
    source.symlink_to("/etc")  # by another server, which may write to shared
    with pytest.raises(Unstartable, match="has become a link"):
        program.launch(server)


# ---- what holds, with podman ----


class Podman:
    """A podman that runs, with its images in a folder of its own; `environment` leads Atrax to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.real = shutil.which("podman") or ""
        self.keeper: subprocess.Popen[bytes] | None = None
        store = f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/images"\nrunroot = "{folder}/run"\n'
        (folder / "storage.conf").write_text(store)
        # What podman asks for by default is more than some machines allow their root.
        limits = 'default_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]\n'
        # Locks and state of its own too: another run of these tests uses the same podman.
        engine = (
            '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\nlock_type = "file"\n'
        )
        engine += f'tmp_dir = "{folder}/tmp"\n'
        (folder / "containers.conf").write_text(f"[containers]\n{limits}{engine}")
        self.environment = {
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        }

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **self.environment}
        return subprocess.run(
            ["podman", *arguments], capture_output=True, text=True, timeout=120, env=environment
        )

    def names(self, *options: str) -> list[str]:
        """The containers that exist, running or not, or those that `options` of `podman ps` select."""
        return self("ps", "--all", "--format", "{{.Names}}", *options).stdout.split()

    def trial(self) -> str:
        """Why no container runs; "" if one does."""
        done = self("run", "--rm", "--pull=never", "--network=none", "--pids-limit=99",
                    f"--memory={2**28}", f"--entrypoint={PYTHON}", IMAGE, "-S", "-c", "print(42)")  # fmt: skip
        return "" if done.stdout == "42\n" else done.stderr.strip() or f"exit {done.returncode}"

    def without_hybrid_cgroups(self) -> None:
        """Has podman run where the second of two cgroup hierarchies is out of its sight."""
        script = "umount /sys/fs/cgroup/unified && echo && exec sleep 86400"
        self.keeper = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script], stdout=subprocess.PIPE
        )
        assert self.keeper.stdout is not None
        self.keeper.stdout.readline()
        enter = f"exec nsenter --mount=/proc/{self.keeper.pid}/ns/mnt {self.real}"
        bin = self.folder / "bin"
        bin.mkdir()
        (bin / "podman").write_text(f'#!/bin/sh\n{enter} "$@"\n')
        (bin / "podman").chmod(0o755)
        self.environment["PATH"] = f"{bin}:{os.environ['PATH']}"

    def close(self) -> None:
        self("rm", "--force", "--all")
        self("rmi", "--force", "--all")
        # What the overlay driver leaves mounted outside of the keeper's view.
        subprocess.run(["umount", f"{self.folder}/images/overlay"], capture_output=True)
        if self.keeper is not None:
            self.keeper.kill()
            self.keeper.wait()


def own_python(file: Path) -> None:
    """Writes a root file system to `file`: this interpreter, its library, and what they link to."""
    library = sysconfig.get_paths()["stdlib"]
    left_out = {
        "site-packages",
        "test",
        "idlelib",
        "tkinter",
        "ensurepip",
        "lib2to3",
        "__pycache__",
    }
    natives, texts = [PYTHON], []
    for base, folders, names in os.walk(library):
        folders[:] = [name for name in folders if name not in left_out and "config-" not in name]
        texts += [os.path.join(base, name) for name in names if name.endswith(".py")]
        natives += [os.path.join(base, name) for name in names if name.endswith(".so")]
    linked = subprocess.run(["ldd", *natives], capture_output=True, text=True).stdout.split()
    with tarfile.open(file, "w") as archive:
        for path in sorted(
            {*natives, *texts, *(one for one in linked if one.startswith("/") and ":" not in one)}
        ):
            archive.add(os.path.realpath(path), arcname=path)
        for name in ("tmp", "proc", "dev", "sys", "run", "etc"):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(folder)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """podman, with the image that the tests run."""
    folder = tmp_path_factory.mktemp("podman")
    podman = Podman(folder)
    own_python(folder / "root.tar")
    made = podman("import", str(folder / "root.tar"), IMAGE)
    why = podman.trial() if made.returncode == 0 else made.stderr.strip()
    if "hybrid mode" in why and os.getuid() == 0:
        podman.without_hybrid_cgroups()
        why = podman.trial()
    try:
        if why:
            pytest.skip(f"podman runs no container here: {why}")
        yield podman
    finally:
        podman.close()


@promise("container.holds")
@pytest.mark.needs_install("podman")
async def test_a_server_in_a_container_has_what_it_was_given_and_no_more(
    atrax: Start, real: Podman, tmp_path: Path
) -> None:
    shared, written = tmp_path / "shared", tmp_path / "written"
    shared.mkdir()
    written.mkdir(mode=0o777)
    written.chmod(0o777)
    (shared / "note").write_text("hello")
    mounts = [
        {"source": str(shared), "target": "/shared"},
        {"source": str(written), "target": "/written", "write": True},
    ]
    container = {"mounts": mounts, "memory": 128 * 2**20}
    servers = {"one": boxed(container=container, cwd="/written", env={"TOKEN": SECRET})}
    gateway = await started(atrax, servers, real.environment)

    status = await run(gateway, "print(open('/proc/self/status').read())")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["NoNewPrivs"] == "1" and fields["NSpid"] == "1"
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
    assert fields["Uid"].split()[0] == str(os.getuid() or 65534)
    assert (
        await run(gateway, "import os; print(os.getcwd(), os.environ['TOKEN'])")
        == f"/written {SECRET}"
    )
    assert await run(gateway, "print(open('/shared/note').read())") == "hello"
    # Nothing can be written, but where it may.
    for path in ("/x", "/shared/x", "/run/x", "/etc/x", f"{CHILDREN}/x"):
        assert "OSError(30" in await run(gateway, f"open({path!r}, 'w')"), path
    await run(gateway, "open('/written/x', 'w').write('mine')")
    assert (written / "x").read_text() == "mine"
    # /tmp can be written, and runs nothing.
    program = "import os; open('/tmp/x', 'w').write('#!'); os.chmod('/tmp/x', 0o755); os.execv('/tmp/x', ['x'])"
    assert "PermissionError" in await run(gateway, program)
    # No network, and nothing of this machine.
    assert await run(gateway, "import os; print(os.listdir('/sys/class/net'))") == "['lo']"
    port = gateway.url.rpartition(":")[2]
    connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
    assert "ConnectionRefusedError" in await run(gateway, connect)
    assert await run(gateway, f"import os; print(os.path.exists({str(tmp_path)!r}))") == "False"
    assert (
        await run(gateway, "import os; os.chown('/written/x', 0, 0)")
        == "PermissionError(1, 'Operation not permitted')"
    )


@promise("container.holds")
@pytest.mark.needs_install("podman")
async def test_a_server_that_fills_its_memory_or_forks_without_end_ends_alone(
    atrax: Start, real: Podman
) -> None:
    servers = {
        "one": boxed(container={"memory": 64 * 2**20}),
        "two": boxed(),
        "three": child("obeys"),
    }
    gateway = await started(atrax, servers, real.environment)
    fork = "import os\nfor n in range(400):\n    if os.fork() == 0:\n        import time; time.sleep(60); os._exit(0)"
    assert "BlockingIOError" in await run(gateway, fork, "two")

    full = await gateway.modern().call("one__run", {"code": "x = bytearray(b'x') * (200 * 2**20)"})

    assert full.code == 1000  # the child died
    assert await run(gateway, "print('well')", "three") == "well"
    assert await run(gateway, "print('anew')") == "anew"


@promise("container.removed")
@pytest.mark.needs_install("podman")
async def test_a_real_container_ends_with_its_client_and_with_atrax(
    atrax: Start, real: Podman
) -> None:
    servers = {"one": boxed("stubborn"), "two": boxed()}
    gateway = await started(atrax, servers, real.environment)
    before = real.names()
    assert len(before) == 2
    for pid in (await gateway.status())["servers"]["one"]["pids"]:
        os.kill(pid, signal.SIGKILL)  # the client; the server ignores that its stdin closed

    await eventually(lambda: len(set(before) & set(real.names())) == 1, "the container lives on")
    assert await run(gateway, "print('anew')") == "anew"
    assert await gateway.stop() == 0
    assert real.names() == []


@pytest.mark.needs_install("podman")
async def test_if_atrax_is_killed_a_container_sees_its_stdin_close_and_ends(
    atrax: Start, real: Podman
) -> None:
    gateway = await started(atrax, {"one": boxed()}, real.environment)
    before = real.names()
    assert len(before) == 1
    gateway.kill()
    # podman itself loses sight of one that ends at the wrong moment: it ran, and is not removed.
    await eventually(lambda: real.names("--filter=status=running") == [], "the container lives on")
    real("rm", "--force", *before)


@promise("container.told")
@pytest.mark.needs_install("podman")
async def test_a_missing_image_is_told_by_podman_and_nothing_is_fetched(
    atrax: Start, real: Podman
) -> None:
    entry = {"container": {"image": "registry.example/none:1", "engine": "podman"}}
    gateway = await started(atrax, {"one": entry}, real.environment)
    error = (await gateway.status())["servers"]["one"]["lastError"]
    assert "Is the image here? `podman pull registry.example/none:1`" in error
    assert "image not known" in error
