"""SECURITY's recipes for systemd and Docker, as far as they can be judged without running either."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from installed import ARCHIVE, HOME
from promises import promise

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
