"""Where things lie that `python3 tests` installs, and how to ask whether they are there. Stdlib only."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
BUILD = HOME / ".build"
ARCHIVE = HOME / "atrax.pyz"

NODE_MODULES = BUILD / "node" / "node_modules"
# Node 22 from npm: the conformance suite cannot start on the Node 20 of many machines.
_MACHINE = {"x86_64": "x64", "aarch64": "arm64", "arm64": "arm64"}.get(platform.machine(), "x64")
NODE = NODE_MODULES / f"node-linux-{_MACHINE}" / "bin" / "node"
CONFORMANCE = NODE_MODULES / "@modelcontextprotocol" / "conformance"
# Environments of their own: real Python servers and uv; and the SDK of the legacy era.
SERVERS = BUILD / "servers" / "bin"
SDK1 = BUILD / "sdk1" / "bin" / "python"

PLACES = {"node": NODE, "servers": SERVERS / "python", "sdk1": SDK1}
# Debian packages by the command that they bring; asked for only where the command is missing.
DEBIAN = {"git": "git", "nginx": "nginx", "podman": "podman", "systemd-analyze": "systemd"}


def node_server(name: str, *arguments: str) -> dict[str, object]:
    """The `mcpServers` entry of an npm server of @modelcontextprotocol: everything, memory, …"""
    script = NODE_MODULES / "@modelcontextprotocol" / f"server-{name}" / "dist" / "index.js"
    return {"command": str(NODE), "args": [str(script), *arguments]}


def python_server(name: str, *arguments: str) -> dict[str, object]:
    """The `mcpServers` entry of a PyPI server: time, git, fetch."""
    return {"command": str(SERVERS / f"mcp-server-{name}"), "args": list(arguments)}


def missing(thing: str) -> str | None:
    """Why `thing` cannot be used; None if it can."""
    place = PLACES.get(thing)
    there = place.exists() if place else shutil.which(thing) is not None
    return None if there else f"{thing} could not be had; `python3 tests install` says why"
