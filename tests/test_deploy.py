"""SECURITY's recipes for systemd and Docker, as far as they can be judged without either."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Start, child
from installed import ARCHIVE, HOME
from promises import promise
from test_sandbox import lacking

SECURITY = (HOME / "SECURITY.md").read_text()


def output(*command: str) -> str:
    """What a program says; it must end well."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@promise("deploy.systemd")
@pytest.mark.needs_install("systemd-analyze")
def test_systemd_understands_the_unit_and_finds_it_hardened(tmp_path: Path) -> None:
    unit = SECURITY.split("```ini\n")[1].split("```")[0]
    # verify looks whether the programs are there.
    assert "ExecStart=/usr/bin/python3 /opt/atrax/atrax.pyz serve" in unit
    file = tmp_path / "atrax.service"
    file.write_text(unit.replace("/usr/bin/python3 /opt/atrax/atrax.pyz", str(ARCHIVE.resolve())))
    assert output("systemd-analyze", "verify", str(file)) == ""
    rated = output("systemd-analyze", "security", "--offline=yes", "--threshold=25", str(file))
    assert re.search(r"Overall exposure level for atrax.service: [0-2]\.\d OK", rated), rated


def expanded(words: list[str]) -> list[str]:
    """Names of system calls, with systemd's groups (@…) replaced by what is in them."""
    calls: list[str] = []
    while words:
        word = words.pop()
        if not word.startswith("@"):
            calls.append(word)
            continue
        lines = output("systemd-analyze", "syscall-filter", word).splitlines()[1:]
        words += [line.strip() for line in lines if line.strip() and "#" not in line]
    return calls


@promise("deploy.systemd")
@pytest.mark.needs_install("systemd-analyze")
async def test_atrax_and_a_sandboxed_server_run_under_the_units_filter_of_system_calls(
    atrax: Start,
) -> None:
    if lacks := lacking(None, sys.executable):
        pytest.skip(lacks)
    [words] = re.findall(r"^SystemCallFilter=(.*)$", SECURITY, re.MULTILINE)
    calls = expanded(words.split())
    assert {"read", "seccomp", "mount_setattr"} <= set(calls)
    assert not {"ptrace", "bpf", "reboot", "init_module"} & set(calls)
    children = str(HOME / "tests" / "children")
    held = child("does", sandbox={"read": [children]})
    seen = {}
    for calls_of in (None, calls):
        env = {"ATRAX": str(ARCHIVE), "FILTER": " ".join(calls_of or ())}
        program = HOME / "tests" / "filtered.py" if calls_of else ARCHIVE
        config = {"mcpServers": {"held": held, "free": child("does")}}
        gateway = await (await atrax(config, program=program, env=env, judged=False)).ready()
        assert ("2" if calls_of else "0") == filters(gateway.pid)
        client = gateway.modern()
        for name in config["mcpServers"]:
            assert (await client.call(f"{name}__do", {"what": "pid"})).text
        status = await gateway.status()
        seen[bool(calls_of)] = {name: one["state"] for name, one in status["servers"].items()}
        assert not [line for line in gateway.log if "error" in line], gateway
        assert await gateway.stop() == 0
    assert seen[True] == seen[False] == {"held": "ready", "free": "ready"}


def filters(pid: int) -> str:
    """How a process's system calls are filtered: 0 not at all, 2 by a program."""
    return re.findall(
        r"^Seccomp:\s*(\d)", Path(f"/proc/{pid}/status").read_text(errors="replace"), re.MULTILINE
    )[0]


@promise("deploy.docker")
def test_docker_or_podman_knows_each_option() -> None:
    engine = shutil.which("docker") or shutil.which("podman")
    if engine is None:
        pytest.skip("neither docker nor podman is here, so the Docker recipe was not looked at")
    [line] = re.findall(r"    docker run .*?\n\n", SECURITY, re.DOTALL)
    options = re.findall(r" (-{1,2}[a-z-]+)", line.partition("python:3.11-slim")[0])
    assert "--cap-drop" in options and "-p" in options
    known = output(engine, "run", "--help")
    assert [one for one in options if not re.search(rf"(?m)^ *(-\w, )?{one}[ ,]", known)] == []
