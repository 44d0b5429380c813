#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["mcp==2.3.0", "orjson==3.13.0", "uvloop==0.23.0; sys_platform != 'win32'"]
# ///
"""Atrax: every MCP server you have, behind one HTTP endpoint.

Atrax runs stdio MCP servers as child processes and serves them all at one URL, to clients of the
modern era (2026-07-28, stateless) and of the legacy one (2024-11-05 to 2025-11-25, sessions),
whatever era a server is of. The path of a request, and of its answer back:

    socket > Http > ModernClient | LegacyClient > Gateway > ModernServer | LegacyServer > pipe
             bytes  request to Call               who may,  Call to lines,
                                                  which     lines to Outcome
                                                  server

What crosses the middle is one Call and one Sink, and era is a matter of the two edges alone. Calls
go down this file, through seams that section Message declares and section Atrax plugs together.
A section names only what stands above it.

    Ground    Boot, Terms, Config, Record, Message
    In        Http, Identity, Clients
    Middle    Catalogue, Subscriptions, Policy, Gateway
    Out       Servers, Containment, Child, Supervisor
    Running   Endpoints, Atrax, Demo, Commands, Attachments
"""

# ==== Boot ========================================================================
# What must come before the other imports: native modules out of the archive this file lies in.
# Knows the archive and this interpreter. Must not know anything below.
#
# Python imports byte-code from a zip, but dlopen wants a file. So a finder stands in front of all
# others: it writes a native module into anonymous memory (memfd) and loads that by its name in
# /proc, which needs no writable directory and leaves nothing behind. Without memfd (macOS, Windows)
# or /proc it comes from a cache that is keyed by content. It stands here since orjson needs it.
from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import enum
import errno
import fnmatch
import fractions
import functools
import hashlib
import hmac
import importlib.machinery
import importlib.util
import io
import ipaddress
import itertools
import json
import marshal
import math
import os
import random
import re
import secrets
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import traceback
import zipimport
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Final,
    Literal,
    NoReturn,
    Protocol,
    TextIO,
    TypeAlias,
    cast,
)

if TYPE_CHECKING:
    import sqlite3
    from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
    from mcp.server.mcpserver import MCPServer
    from mcp.server.session import ServerSession
    from mcp_types import EmptyResult, SubscribeRequestParams, ToolAnnotations
    from mcp_types import UnsubscribeRequestParams
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails
    from types import ModuleType

# JSON has no type that mypy can narrow usefully; Any under one name says where it is meant.
Json: TypeAlias = Any

_FOLDER: Final = os.path.dirname(os.path.abspath(__file__))
# The archive that this file lies in; None in a checkout, where packages come from the environment.
ARCHIVE: Final = _FOLDER if os.path.isfile(_FOLDER) else None
# Memory that nobody can run as a program (Linux 6.3). dlopen maps it all the same, and where
# vm.memfd_noexec is 2 no other kind is allowed.
_MFD_NOEXEC_SEAL: Final = 0x0008


class NativeModules:
    """Finds the native modules of an archive, for `sys.meta_path`; ImportError says what stood against it."""

    def __init__(self, archive: str) -> None:
        self._archive = zipimport.zipimporter(archive)
        built: Json = json.loads(self._read("built.json"))
        if built["suffix"] not in importlib.machinery.EXTENSION_SUFFIXES:
            raise ImportError(
                f"{archive} was built for {built['for']}, and this is Python "
                f"{sys.version_info[0]}.{sys.version_info[1]} ({sys.implementation.cache_tag}, "
                f"{sys.platform}). Run it with that Python, or `python3 build_zipapp.py` with this one"
            )
        self._modules: dict[str, str] = built["modules"]

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module `name` as a file that dlopen can open; None if it is not a native one of ours."""
        member = self._modules.get(name)
        if member is None:
            return None
        data = self._read(member)
        file = _in_memory(name, data) or _in_cache(data, os.path.splitext(member)[1])
        if file is None:
            raise ImportError(
                f"{name} is native code and found no place to load from: there is no memfd_create or "
                "no /proc, and no cache directory. Set HOME or TMPDIR to a directory of your own that "
                "is writable and not mounted noexec"
            )
        loader = importlib.machinery.ExtensionFileLoader(name, file)
        return importlib.util.spec_from_file_location(name, file, loader=loader)

    def _read(self, member: str) -> bytes:
        return self._archive.get_data(member.replace("/", os.sep))


def _in_memory(name: str, data: bytes) -> str | None:
    """The name of a file in memory that holds `data`; None where the system has no such thing."""
    create = getattr(os, "memfd_create", None)
    if create is None or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        descriptor: int = create(name, os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
    except OSError:  # an older kernel does not know the flag
        try:
            descriptor = create(name, os.MFD_CLOEXEC)
        except OSError:  # a seccomp filter, gVisor
            return None
    # Never closed: glibc takes two libraries loaded through one /proc/self/fd/N for the same one.
    with os.fdopen(descriptor, "wb", closefd=False) as file:
        file.write(data)
    return f"/proc/self/fd/{descriptor}"


def _in_cache(data: bytes, suffix: str) -> str | None:
    """The path of a file in the user's cache that holds `data`; None if no directory will do."""
    digest = hashlib.sha256(data).hexdigest()
    for directory in _cache_directories():
        file = os.path.join(directory, digest + suffix)
        try:
            if _is_private(directory) and (_holds(file, digest) or _written(file, data)):
                return file
        except OSError:
            continue
    return None


def _cache_directories() -> Iterator[str]:
    home = os.path.expanduser("~")
    by_system = {
        "win32": os.environ.get("LOCALAPPDATA"),
        "darwin": os.path.join(home, "Library", "Caches"),
    }
    user = os.environ.get("XDG_CACHE_HOME") or by_system.get(sys.platform)
    yield os.path.join(user or os.path.join(home, ".cache"), "atrax")
    for variable in ("TMPDIR", "TEMP", "TMP"):
        if variable in os.environ:
            yield os.path.join(os.environ[variable], f"atrax-{_user()}")
    yield from (f"{directory}/atrax-{_user()}" for directory in ("/tmp", "/var/tmp"))


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


def _is_private(directory: str) -> bool:
    """Makes `directory`. Whether it is ours alone: in /tmp somebody else may have made it before us."""
    os.makedirs(directory, mode=0o700, exist_ok=True)
    if sys.platform == "win32":
        return True
    status = os.lstat(directory)
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == _user()
    noexec = os.statvfs(directory).f_flag & os.ST_NOEXEC
    return ours and not status.st_mode & 0o022 and not noexec


def _holds(file: str, digest: str) -> bool:
    if not os.path.exists(file):
        return False
    with open(file, "rb") as stream:
        return hashlib.sha256(stream.read()).hexdigest() == digest


def _written(file: str, data: bytes) -> bool:
    # Beside it and then renamed: another Atrax may be loading the file at this moment.
    draft = f"{file}.{os.getpid()}"
    with open(draft, "wb") as stream:
        stream.write(data)
    os.replace(draft, file)
    return True


try:
    if ARCHIVE:
        sys.meta_path.insert(0, NativeModules(ARCHIVE))
        # The machine's own packages are no part of this file: what was tested is what runs.
        # Nor is any plugin of pydantic's, and not to look for one saves 25 ms of the start.
        os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"
        sys.path[:] = [entry for entry in sys.path if not entry.endswith(("site-packages", "dist-packages"))]
    import orjson
    from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
    from pydantic import field_validator, model_validator
    from pydantic.json_schema import SkipJsonSchema
except ImportError as error:
    # One line: it is what a person sees who copied the file to another machine.
    _HINT: Final = "" if ARCHIVE else ". Build atrax.pyz with `python3 build_zipapp.py`, or `uv run atrax.py`"
    sys.exit(f"atrax: {error}{_HINT}.")



# The stage: a child is first this function, in an interpreter of its own, and then execs what was
# asked for. Not `preexec_fn`: that turns vfork off, and a spawn takes 18 ms once Atrax holds
# 500 MB. It stands here because its code object travels alone: it names nothing of this module.


def become_child() -> None:
    """Bind this process to Atrax by the order in argv[1] (JSON), then exec argv[2:].

    The order is `{"parent": pid, "limits": [[rlimit, number], …]}`. The environment is the child's
    own already: no secret passes through it. A failure is one line on stderr and exit code 127."""
    import ctypes
    import json
    import os
    import signal
    import sys

    def control(option: int, value: int) -> None:
        if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({option})")

    order, command = json.loads(sys.argv[1]), sys.argv[2:]
    try:
        control(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: SIGKILL of Atrax ends this process too
        if os.getppid() != order["parent"]:
            os._exit(127)  # Atrax ended before the line above: nobody is left to read an answer
        control(38, 1)  # PR_SET_NO_NEW_PRIVS: no setuid program below here gains anything
        # What Atrax ignores (SIGPIPE, and SIGHUP under nohup) would stay ignored over exec.
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for limit, most in order["limits"]:
            import resource  # native code, which a minimal root file system may lack

            resource.setrlimit(limit, (most, most))
        # Python's own descriptors close on exec; what a shell or an init system gave us does not.
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.execve(command[0], command, os.environ)
    except (OSError, ValueError) as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        os.write(2, f"atrax: cannot run {command[0]}: {reason}\n".encode(errors="replace"))
        os._exit(127)
# ==== Terms =======================================================================
# The words: versions, eras, header and `_meta` names, error codes, the exception family.
# Knows the specification's vocabulary. Must not know anything that runs.

VERSION: Final = "0.1.0"
MODERN: Final = "2026-07-28"
LEGACY: Final = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
LATEST_LEGACY: Final = LEGACY[-1]
WITHOUT_SESSION: Final = "2025-03-26"  # what a legacy request without a session speaks (2025-11-25, transports)
LOG_LEVELS: Final = ("debug", "info", "notice", "warning", "error", "critical", "alert", "emergency")

META: Final = "io.modelcontextprotocol/"
META_VERSION: Final = META + "protocolVersion"
META_CLIENT: Final = META + "clientInfo"
META_CAPABILITIES: Final = META + "clientCapabilities"
META_LOG_LEVEL: Final = META + "logLevel"
META_SERVER: Final = META + "serverInfo"
META_SUBSCRIPTION: Final = META + "subscriptionId"
META_TASK: Final = META + "related-task"
META_INPUT_KEY: Final = "atrax/inputKey"  # how a legacy child may name the key of its ask (DESIGN, Parking)

# JSON-RPC 2.0, section 5.1, and MCP's own (2026-07-28, basic/index, Error Codes).
PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
INTERNAL_ERROR: Final = -32603
LEGACY_RESOURCE_NOT_FOUND: Final = -32002
LEGACY_URL_ELICITATION: Final = -32042
HEADER_MISMATCH: Final = -32020
MISSING_CAPABILITY: Final = -32021
UNSUPPORTED_VERSION: Final = -32022
# Atrax's own, outside the reserved range; each carries data.atrax = {reason, server, state?, retryAfter?}.
CHILD_DIED: Final = 1000
TIMED_OUT: Final = 1001
UNAVAILABLE: Final = 1010
OVERLOADED: Final = 1011
NOT_ALLOWED: Final = 1012
# Never on a wire: how `done` says that the call was cancelled and nobody waits for an answer.
CANCELLED: Final = 1099


class Kind(enum.Enum):
    """What a server can list; the value is the member of the list result."""

    TOOLS = "tools"
    PROMPTS = "prompts"
    RESOURCES = "resources"
    TEMPLATES = "resourceTemplates"


class AtraxError(Exception):
    """The one family. The text is for its reader: what, where, what to do. `exit` is the exit code."""

    exit: ClassVar[int] = 1


class UsageError(AtraxError):
    """The user wrote a wrong command line or config."""

    exit: ClassVar[int] = 2


class RpcError(AtraxError):
    """A message that is answered by a JSON-RPC error. `status` is the HTTP status a modern client gets."""

    def __init__(self, code: int, message: str, data: Json = None, status: int = 200) -> None:
        super().__init__(message)
        self.code, self.data, self.status = code, data, status


class HttpError(AtraxError):
    """An HTTP request that is answered by an error status, with a JSON body that says why (RFC 9110)."""

    def __init__(self, status: int, message: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


# ==== Config ======================================================================
# What the user wrote, checked; every default, unit and help text once. Knows the JSON file, the
# environment, and what other MCP clients write. Must not know the running gateway.

MIB: Final = 2**20
LOOPBACK_NAMES: Final = ("localhost", "127.0.0.1", "::1")
EMBEDDED: Final = ("files", "notes")  # what `"command": "bundled:NAME"` may name (section Demo)
ASKS: Final = ("elicitation", "sampling", "roots")

# Keys of the design that nothing in this build enforces. A protection that is accepted and then
# ignored is worse than none, so each is refused by name until its feature lands and its row leaves.
UNENFORCED: Final = frozenset({
    "auth.token", "auth.oauth", "tls", "trusted_proxies", "log.audit", "replicas", "name",
    "mcpServers.*.paths", "mcpServers.*.sandbox", "mcpServers.*.container",
    "mcpServers.*.pin", "mcpServers.*.clean",
})  # fmt: skip

# What desktop clients keep beside the servers in the same file, and per server. No use here.
_CLIENT_KEYS: Final = frozenset({
    "globalShortcut", "preferences", "inputs", "isUsingBuiltInNodeForMcp",
    "isDxtAutoUpdatesEnabled", "scale", "locale", "theme", "userThemeMode",
})  # fmt: skip
_CLIENT_SERVER_KEYS: Final = frozenset({
    "autoApprove", "alwaysAllow", "alwaysLoad", "trust", "headers", "dev", "gallery", "version",
    "source", "settings", "networkTimeout", "watchPaths", "start_on_launch", "inputs", "iconPath",
})  # fmt: skip
_KIND_KEYS: Final = ("type", "transport")
_SWITCHES: Final = ("enabled", "isActive")  # Zed's and Cherry Studio's word for not disabled
_STDIO_NAMES: Final = ("stdio", "local", "command")  # how clients spell `type` for a command
_SERVERS_KEYS: Final = ("servers", "context_servers")  # VS Code's and Zed's word for mcpServers
_TOOL_LISTS: Final = {"disabledTools": "deny", "excludeTools": "deny",
                      "enabledTools": "allow", "includeTools": "allow"}  # fmt: skip
_SHORTEST_SECRET: Final = 6  # redacting "1", "true" or "debug" would make the log unreadable
_SECRET_FILE: Final = 64 * 1024  # bytes; more is no secret but a mistake, or /dev/zero
_REFERENCE: Final = re.compile(r"\$\$\{|\$\{([^}]*)(\}|\Z)")
_VARIABLE: Final = re.compile(r"(?:env:)?([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TOOL_NAME: Final = re.compile(r"[A-Za-z0-9_./-]{1,128}")  # MCP, server/tools, Tool Names

_Seconds: TypeAlias = Annotated[float, Field(gt=0, strict=True)]
_Count: TypeAlias = Annotated[int, Field(ge=1)]


def _option(default: Json, text: str, unit: str = "", shown: str | None = None) -> Json:
    """One option: default, help, unit. `shown`: the default in words, where the value says less."""
    extra: dict[str, Json] = {"unit": unit} if unit else {}
    if shown:
        extra["shown"] = shown
    if callable(default):
        return Field(default_factory=default, description=text, json_schema_extra=extra)
    return Field(default=default, description=text, json_schema_extra=extra)


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("holds a NUL character, which no program can be given")
    return value


def _tool_name(value: str) -> str:
    if not _TOOL_NAME.fullmatch(value):
        raise ValueError("a tool name is 1 to 128 of the characters A-Z a-z 0-9 _ - . /")
    return value


_Text: TypeAlias = Annotated[str, AfterValidator(_no_nul)]


class _Options(BaseModel):
    # Strict: "4000" is no port and 1 is no bool. Frozen: a reload makes a new Config.
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False
    )


class Limits(_Options):
    """What one client, child or message may take."""

    body: _Count = _option(4 * MIB, "largest request body", "bytes")
    header: _Count = _option(32 * 1024, "largest request head", "bytes")
    header_timeout: _Seconds = _option(10.0, "how long a request head may take", "s")
    body_timeout: _Seconds = _option(30.0, "how long a request body may take", "s")
    connections: _Count = _option(20_000, "open connections")
    connections_per_address: _Count = _option(
        5_000, "open connections of one address (not with `socket`)"
    )
    line: _Count = _option(64 * MIB, "longest line of a child; a longer one ends it", "bytes")
    # Above 240 orjson could no longer write what it read once the envelope stands around it.
    depth: Annotated[int, Field(ge=8, le=240)] = _option(200, "deepest nesting of a message")
    sessions: _Count = _option(20_000, "sessions; past it the longest idle one ends")
    session_idle: _Seconds = _option(3600.0, "how long a session may be idle", "s")
    children: _Count = _option(200, "processes; past it the longest idle isolated one is stopped")
    inflight: _Count = _option(1_000, "calls in flight per principal")
    rate: _Count | None = _option(None, "calls a minute per principal", shown="none")
    parked: _Count = _option(8, "calls per owner that wait for an answer of the client")
    park: _Seconds = _option(300.0, "how long an ask may wait for its client", "s")


class Restart(_Options):
    """When a dead child is started again, and when no more."""

    # Lax for the tuple alone: JSON has only lists.
    backoff: Annotated[tuple[_Seconds, _Seconds], Field(strict=False)] = _option(
        (0.2, 30.0), "first and longest pause between two starts", "s"
    )
    failures: _Count = _option(5, "early deaths within `window` that open the circuit")
    window: _Seconds = _option(60.0, "over which `failures` are counted", "s")

    @field_validator("backoff")
    @classmethod
    def _grows(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("the first pause must not be longer than the longest")
        return value


class ToolRules(_Options):
    """Which of a server's tools are shown, and as what; globs on the server's own names."""

    allow: list[str] | None = _option(None, "only these tools", shown="all")
    deny: list[str] = _option(list, "not these tools")
    rename: dict[str, Annotated[str, AfterValidator(_tool_name)]] = _option(
        dict, "own name → shown name"
    )
    describe: dict[str, str] = _option(dict, "own name → description")

    @field_validator("rename")
    @classmethod
    def _distinct(cls, value: dict[str, str]) -> dict[str, str]:
        if len(set(value.values())) < len(value):
            raise ValueError("two tools are renamed to one name")
        return value


class LogConfig(_Options):
    """What is written to stderr."""

    level: Literal["debug", "info", "warning", "error"] = _option("info", "least level shown")
    format: Literal["text", "json"] = _option("text", "for people or for machines")


class Auth(_Options):
    """How clients prove who they are."""

    type: Literal["none"] = _option("none", "`none`: everybody who reaches the port may call")
    unsafe: bool = _option(False, "allows `none` on a host that other machines can reach")


def _server_schema(schema: dict[str, Json]) -> None:
    """What the reader accepts beyond the model: keys of other clients, and entries it skips."""
    properties = schema["properties"]
    words = {*_CLIENT_SERVER_KEYS, *_TOOL_LISTS, *_KIND_KEYS, *_SWITCHES, "envFile"}
    for key in sorted(words - set(properties)):
        properties[key] = {"description": "a key of other MCP clients"}
    # Copilot writes `tools` as a list of the allowed ones.
    properties["tools"] = {"anyOf": [properties["tools"], {"type": "array"}]}
    whole = {"properties": properties, "additionalProperties": False, "required": ["command"]}
    schema["anyOf"] = [
        whole,
        {"required": ["url"], "not": {"required": ["command"]}},
        {"required": ["serverUrl"], "not": {"required": ["command"]}},
    ]
    for key in ("properties", "additionalProperties", "required"):
        del schema[key]


class ServerConfig(_Options):
    """One entry of `mcpServers`."""

    model_config = ConfigDict(json_schema_extra=_server_schema)

    command: Annotated[_Text, Field(min_length=1)] = Field(
        description="the program, or `bundled:NAME` for a server that lies in the file itself",
    )
    args: list[_Text] = _option(list, "its arguments")
    env: dict[str, _Text] = Field(
        default_factory=dict, repr=False, description="its environment, beside a short safe list"
    )
    cwd: _Text | None = _option(None, "its working directory", shown="the config's directory")
    description: str = _option("", "a text for people")
    disabled: bool = _option(False, "true: not started, not offered")
    protocol: Literal["auto", "legacy", "modern"] = _option("auto", "`auto` probes, others force")
    prefix: str = _option("", 'before its names on `/mcp`; `""` exposes bare names', shown="NAME")
    tools: ToolRules = _option(ToolRules, "which tools, under which names")
    isolation: Literal["shared", "principal", "session"] = _option(
        "shared", "who shares its processes: all clients, one principal, one legacy session"
    )
    processes: _Count = _option(4, "most processes per isolation key")
    concurrency: _Count | None = _option(None, "most calls in flight per process", shown="none")
    offer: list[Literal["elicitation", "sampling", "roots"]] = _option(
        lambda: ["elicitation", "sampling"], "what a legacy child is told that clients can do"
    )
    timeout: _Seconds = _option(60.0, "per request; progress starts it again", "s")
    max_timeout: _Seconds = _option(3600.0, "per request, whatever the progress", "s")
    start_timeout: _Seconds = _option(30.0, "from spawn to ready", "s")
    lazy: bool = _option(False, "start at first use")
    idle_stop: _Seconds | None = _option(None, "stop when unused so long", "s", shown="none")
    restart: Restart = _option(Restart, "when a dead child is started again")
    repeat: bool = _option(True, "repeat what a dead child left, where its annotations allow it")

    @field_validator("command")
    @classmethod
    def _embedded(cls, value: str) -> str:
        kind, _, name = value.partition(":")
        if kind == "bundled" and name not in EMBEDDED:
            raise ValueError(f'no such bundled server: "{name}". {_near(name, EMBEDDED)}'.strip())
        return value

    @field_validator("env")
    @classmethod
    def _environment(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not name or "=" in name or "\0" in name:
                raise ValueError(f'"{name}" cannot be the name of a variable')
        return value

    @field_validator("prefix")
    @classmethod
    def _prefix(cls, value: str) -> str:
        if value and not _NAME.fullmatch(value):
            raise ValueError("a prefix is at most 64 of the characters A-Z a-z 0-9 _ -")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ServerConfig:
        # Some clients write milliseconds under this name; then every call would wait for days.
        if self.timeout > self.max_timeout:
            raise ValueError(
                f"timeout {self.timeout:g} is more than max_timeout {self.max_timeout:g};"
                " durations are in seconds"
            )
        if "roots" in self.offer and self.isolation == "shared":
            raise ValueError(
                'offer: "roots" with isolation "shared" needs "paths", which this build does not'
                ' enforce yet; use "isolation": "session"'
            )
        return self

    @property
    def argv(self) -> list[str]:
        """What to run; a bundled server is this file again, in a process of its own."""
        kind, _, name = self.command.partition(":")
        if kind != "bundled":
            return [self.command, *self.args]
        own = ARCHIVE or os.path.abspath(__file__)
        return [sys.executable, own, "bundled", name, *self.args]


def _host_name(value: str) -> str:
    if not value or "/" in value or "@" in value or any(c.isspace() for c in value):
        raise ValueError(f'"{value}" is no host name: give it without scheme and path')
    return value.lower()


def _origin(value: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s@?#]+", value.lower()):
        raise ValueError(f'"{value}" is no origin: give scheme and host, "https://app.example.com"')
    return value.lower()


class Config(_Options):
    """The whole config. `servers` are in the order of the file, under slugged names."""

    model_config = ConfigDict(title="Atrax config")

    host: Annotated[str, Field(min_length=1)] = _option(
        "127.0.0.1", "address to listen on; others than loopback need auth"
    )
    port: Annotated[int, Field(ge=0, le=65535)] = _option(4000, "port; 0: any free one")
    socket: str | None = _option(None, "a Unix socket instead of a port", shown="none")
    public_url: str | None = _option(None, "what clients call this gateway", shown="from Host")
    auth: Auth = _option(Auth, "how clients prove who they are")
    allowed_hosts: list[Annotated[str, AfterValidator(_host_name)]] = _option(
        lambda: list(LOOPBACK_NAMES), "accepted Host headers",
        shown="loopback names and the host of `public_url`",
    )  # fmt: skip
    allowed_origins: list[Annotated[str, AfterValidator(_origin)]] = _option(
        list, "accepted Origin headers of web pages", shown="none"
    )
    separator: str = _option("__", "between server and tool name")
    limits: Limits = _option(Limits, "what one client, child or message may take")
    drain: Annotated[float, Field(ge=0)] = _option(10.0, "for calls in flight at SIGTERM", "s")
    log: LogConfig = _option(LogConfig, "what is written to stderr")
    key: Annotated[str, Field(min_length=16)] | None = Field(
        default=None, repr=False, description="secret that signs session ids and requestState",
        json_schema_extra={"shown": "random at start"},
    )  # fmt: skip
    servers: dict[str, ServerConfig] = Field(
        alias="mcpServers", default_factory=dict, description="the servers, each under its name"
    )

    # Not written by the user: what reading found.
    remarks: SkipJsonSchema[list[str]] = Field(default_factory=list, exclude=True)
    secrets: SkipJsonSchema[set[str]] = Field(default_factory=set, exclude=True, repr=False)
    originals: SkipJsonSchema[dict[str, str]] = Field(default_factory=dict, exclude=True)
    path: SkipJsonSchema[str] = Field(default="", exclude=True)

    @field_validator("separator")
    @classmethod
    def _separator(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_./-]{1,8}", value):
            raise ValueError("a separator is 1 to 8 of the characters A-Z a-z 0-9 _ - . /")
        return value

    @field_validator("public_url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^/\s@?#]+(/[^\s?#]*)?", value):
            raise ValueError('give an http or https URL, "https://mcp.example.com"')
        return value.rstrip("/") if value else value

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        environ: Mapping[str, str] | None = None,
        overrides: Mapping[str, Json] | None = None,
    ) -> Config:
        """The config in the file `source`, or in `source` itself where that is JSON text.

        `overrides` are keys that the command line sets. Raises UsageError with every mistake,
        one a line."""
        environ = os.environ if environ is None else environ
        if isinstance(source, str) and source.lstrip().startswith("{"):
            name, folder, text = "config", os.getcwd(), source
        else:
            name = os.fspath(source)
            folder, text = os.path.dirname(os.path.abspath(name)), _config_text(name)
        return _ConfigReader(name, folder, environ, overrides or {}).read(text)


# ---- Reading ----


def _config_text(path: str) -> str:
    try:
        # "-sig": Windows editors put a BOM in front.
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 at byte {error.start}") from None
    except FileNotFoundError:
        raise UsageError(
            f"{path}: no such file. The smallest config:\n"
            '{"mcpServers": {"time": {"command": "uvx", "args": ["mcp-server-time"]}}}'
        ) from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None


class _Object(dict[str, Json]):
    """A JSON object that remembers its repeated keys: parsers take the last, people the first."""

    def __init__(self, pairs: list[tuple[str, Json]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.doubles = sorted({name for name in names if names.count(name) > 1}) if (
            len(self) < len(names)) else []  # fmt: skip


def _no_constant(word: str) -> Json:
    raise ValueError(f"{word} is no JSON")


def _parse(text: str, name: str) -> Json:
    try:
        return json.loads(text, object_pairs_hook=_Object, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1] if text.strip() else ""
        hint = " JSON has no comments." if line.lstrip().startswith(("//", "/*", "#")) else ""
        if "property name" in error.msg or "Illegal trailing comma" in error.msg:
            hint = hint or " Is there a comma too many before it?"
        where = f"line {error.lineno} column {error.colno}"
        raise UsageError(f"{name}: {where}: not valid JSON: {error.msg}.{hint}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name}: not valid JSON: {error}") from None


def _near(word: str, known: Iterable[str]) -> str:
    """The hint for a misspelt `word`, or ""."""
    import difflib

    lower = {name.lower(): name for name in known}
    match = difflib.get_close_matches(word.lower(), lower, 1, 0.6)
    return f'Did you mean "{lower[match[0]]}"?' if match else ""


def _dotted(parts: Iterable[str | int]) -> str:
    """`mcpServers.git.args[1]`; a name with other characters in brackets and quotes."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif re.fullmatch(r"[\w$-]+", part):
            path += f".{part}" if path else part
        else:
            path += f"[{json.dumps(part, ensure_ascii=False)}]"
    return path


def _doubles(value: Json, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths of all repeated keys."""
    if isinstance(value, _Object):
        yield from ((*path, name) for name in value.doubles)
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in items:
        if isinstance(child, (dict, list)):
            yield from _doubles(child, (*path, key))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name that only looks local is not trusted."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


_WRONG: Final = {  # pydantic's error type: what a reader is told
    "string_type": "must be a string",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "missing": "is missing",
    "string_too_short": "is too short: at least {min_length} characters",
    "too_short": "must have {min_length} entries",
    "too_long": "must have {max_length} entries",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a number",
    "literal_error": "must be one of {expected}",
}
_JSON_WORDS: Final = {str: "a string", bool: "true or false", int: "a number", float: "a number",
                      list: "a list", dict: "an object", type(None): "null"}  # fmt: skip


class _ConfigReader:
    """One reading of one config: what clients write becomes ours; all that is wrong is kept."""

    def __init__(
        self, name: str, folder: str, environ: Mapping[str, str], overrides: Mapping[str, Json]
    ) -> None:
        self.name, self.folder, self.environ, self.overrides = name, folder, environ, overrides
        self.errors: dict[tuple[str | int, ...], str] = {}
        self.remarks: list[str] = []
        self.secrets: set[str] = set()
        self.originals: dict[str, str] = {}

    def read(self, text: str) -> Config:
        """The steps: JSON, our own shape, the models, then what only the whole can show."""
        raw = _parse(text, self.name)
        if not isinstance(raw, dict):
            raise UsageError(f"{self.name}: must be an object: {{…}}")
        for path in _doubles(raw):
            self.wrong("is written twice", *path)
        config = self.validated(self.top(dict(raw)))
        if self.errors or config is None:
            raise UsageError("\n".join(self.told(path) for path in self.errors))
        self.warn(config)
        found = {"remarks": self.remarks, "secrets": self.secrets, "originals": self.originals}
        return config.model_copy(update={**found, "path": self.name})

    def wrong(self, message: str, *path: str | int) -> None:
        # The first finding about a place is the cause; what follows from it would only confuse.
        self.errors.setdefault(path, message)

    def told(self, path: tuple[str | int, ...]) -> str:
        if path and path[0] in self.overrides:
            return f"--{path[0]}: {self.errors[path]}"
        return ": ".join(part for part in (self.name, _dotted(path), self.errors[path]) if part)

    def remark(self, message: str, *path: str | int) -> None:
        self.remarks.append(f"{self.name}: {_dotted(path)}: {message}")

    # The file as a whole

    def top(self, raw: dict[str, Json]) -> dict[str, Json]:
        raw.pop("$schema", None)
        for alias in _SERVERS_KEYS:
            if alias in raw and "mcpServers" not in raw:
                raw["mcpServers"] = raw.pop(alias)
                self.remark("read as mcpServers", alias)
        for key in sorted(_CLIENT_KEYS & set(raw)):
            del raw[key]
            self.remark("a key of a desktop client, ignored", key)
        self.listener(raw)
        self.unenforced(raw)
        if isinstance(raw.get("key"), str):
            raw["key"] = self.expanded(raw["key"], "key")
            self.secret(raw["key"])
        if isinstance(raw.get("socket"), str):
            raw["socket"] = os.path.join(self.folder, raw["socket"])
        if raw.get("public_url") and "allowed_hosts" not in raw:
            raw["allowed_hosts"] = [*LOOPBACK_NAMES, *_host_of(raw["public_url"])]
        self.servers(raw)
        return raw

    def listener(self, raw: dict[str, Json]) -> None:
        """The command line wins; and no open door without auth."""
        if {"host", "port"} & set(self.overrides):
            raw.pop("socket", None)  # the last word is a port
        raw.update(self.overrides)
        host, auth = raw.get("host", LOOPBACK_NAMES[1]), raw.get("auth")
        asks_who = isinstance(auth, dict) and auth.get("type", "none") != "none"
        if asks_who or (isinstance(auth, dict) and auth.get("unsafe") is True):
            return
        if isinstance(host, str) and host and not raw.get("socket") and not is_loopback(host):
            message = (
                f'"{host}" can be reached from other machines, and nothing asks who calls. Listen'
                ' on 127.0.0.1, or say "auth": {"type": "none", "unsafe": true}'
            )
            self.wrong(message, "host")

    def unenforced(self, raw: dict[str, Json]) -> None:
        auth = raw.get("auth")
        if isinstance(auth, dict) and f"auth.{auth.get('type')}" in UNENFORCED:
            self.refuse(raw, "auth")
        for key in [key for key in raw if key in UNENFORCED]:
            self.refuse(raw, key)
        log = raw.get("log")
        if isinstance(log, dict) and "log.audit" in UNENFORCED and "audit" in log:
            raw["log"] = log = dict(log)
            self.refuse(log, "audit", "log")

    def refuse(self, owner: dict[str, Json], key: str, *path: str) -> None:
        del owner[key]
        self.wrong(f'this build does not enforce "{key}" yet, so it refuses it', *path, key)

    # The servers

    def servers(self, raw: dict[str, Json]) -> None:
        servers = raw.get("mcpServers")
        if servers is None:
            example = '{"NAME": {"command": …, "args": […]}}'
            self.wrong(f"is missing: the servers, {example}", "mcpServers")
        if not isinstance(servers, dict):
            return
        raw["mcpServers"] = kept = {}
        names = self.names(servers)
        prefixes: dict[str, str] = {}
        for original, entry in servers.items():
            name = names[original]
            if not isinstance(entry, dict):
                kept[name] = entry  # the models refuse it
                continue
            ready = self.server(original, entry)
            if ready is not None:
                kept[name] = ready
                self.prefix(ready.setdefault("prefix", name), original, prefixes)

    def names(self, servers: Mapping[str, Json]) -> dict[str, str]:
        """Each server's name here. Whoever is well named keeps the name; slugs go around those."""
        names = {name: name for name in servers if _NAME.fullmatch(name)}
        for original in servers:
            if original in names:
                continue
            slug = re.sub(r"[^A-Za-z0-9_-]+", "-", original).strip("-")[:60] or "server"
            free = (slug if n == 1 else f"{slug}-{n}" for n in itertools.count(1))
            names[original] = name = next(name for name in free if name not in names.values())
            self.originals[name] = original
            self.remark(f"is called {name} here", "mcpServers", original)
        return names

    def prefix(self, prefix: Json, original: str, taken: dict[str, str]) -> None:
        if not isinstance(prefix, str):
            return
        if prefix in taken:
            message = f'"{prefix}" is the prefix of "{taken[prefix]}" too; give each its own'
            self.wrong(message, "mcpServers", original, "prefix")
        taken.setdefault(prefix, original)

    def server(self, name: str, entry: dict[str, Json]) -> dict[str, Json] | None:
        """`entry` in our own words; None where it is skipped."""
        entry, path = dict(entry), ("mcpServers", name)
        url = next((key for key in ("url", "serverUrl", "httpUrl") if key in entry), None)
        if url is not None and "command" not in entry:
            self.remark("skipped: it is reached by a URL, and Atrax starts commands", *path)
            return None
        for key in [key for key in entry if key in _CLIENT_SERVER_KEYS or key == url]:
            del entry[key]
            self.remark("a key of other clients, ignored", *path, key)
        for key in [key for key in entry if f"mcpServers.*.{key}" in UNENFORCED]:
            self.refuse(entry, key, *path)
        self.kind(entry, path)
        self.tool_lists(entry, path)
        self.switch(entry, path)
        self.expand(entry, path)
        return entry

    def kind(self, entry: dict[str, Json], path: tuple[str, str]) -> None:
        for key in _KIND_KEYS:
            value = entry.pop(key, None)
            if value is not None and value not in _STDIO_NAMES:
                self.wrong('must be "stdio" beside a command', *path, key)

    def tool_lists(self, entry: dict[str, Json], path: tuple[str, str]) -> None:
        """Other clients' lists of tools become `tools.allow` and `tools.deny`."""
        tools = entry.get("tools")
        rules: dict[str, Json] = dict(tools) if isinstance(tools, dict) else {}
        found = {key: entry.pop(key) for key in _TOOL_LISTS if key in entry}
        if isinstance(tools, list):
            found["tools"] = tools
        for key, names in found.items():
            rule = _TOOL_LISTS.get(key, "allow")
            if not isinstance(names, list):
                self.wrong("must be a list", *path, key)
                continue
            rules[rule] = [*(rules.get(rule) or []), *names]
            self.remark(f"read as tools.{rule}", *path, key)
        if found:
            entry["tools"] = rules

    def switch(self, entry: dict[str, Json], path: tuple[str, str]) -> None:
        for key in _SWITCHES:
            value = entry.pop(key, None)
            if value is False:
                entry["disabled"] = True
                self.remark("read as disabled", *path, key)
            elif value not in (None, True):
                self.wrong("must be true or false", *path, key)

    # ${VAR}, ${VAR:-default}, ${file:PATH}

    def expand(self, entry: dict[str, Json], path: tuple[str, str]) -> None:
        for key in ("command", "cwd"):
            if key in entry:
                entry[key] = self.expanded(entry[key], *path, key)
        if isinstance(entry.get("args"), list):
            entry["args"] = [
                self.expanded(value, *path, "args", at) for at, value in enumerate(entry["args"])
            ]
        cwd = entry.get("cwd", "")
        if isinstance(cwd, str):
            cwd = os.path.join(self.folder, os.path.expanduser(cwd))
            entry["cwd"] = os.path.normpath(cwd)
        self.environment(entry, path)

    def environment(self, entry: dict[str, Json], path: tuple[str, str]) -> None:
        env, file = entry.get("env", {}), entry.pop("envFile", None)
        if not isinstance(env, dict):
            return
        env = {key: self.expanded(value, *path, "env", key) for key, value in env.items()}
        if file is not None:
            env = self.env_file(self.expanded(file, *path, "envFile"), path) | env
        for value in env.values():
            self.secret(value)
        entry["env"] = env

    def expanded(self, value: Json, *path: str | int) -> Json:
        """`value` with its references replaced; what is no string is left to the models."""
        if not isinstance(value, str):
            return value

        def replaced(match: re.Match[str]) -> str:
            if match[1] is None:
                return "${"  # "$${" stands for itself
            if not match[2]:
                self.wrong('"${" without "}"; a literal one is written "$${"', *path)
                return ""
            return self.reference(match[1], *path)

        return _REFERENCE.sub(replaced, value)

    def reference(self, inner: str, *path: str | int) -> str:
        if inner.startswith("file:"):
            return self.file(inner.removeprefix("file:"), *path)
        match = _VARIABLE.fullmatch(inner)
        if match is None:
            known = "${VAR}, ${VAR:-default} or ${file:PATH}"
            self.wrong(f'"${{{inner}}}" is not understood: write {known}', *path)
            return ""
        name, default = match[1], match[2]
        value = self.environ.get(name)
        if value is None and default is None:
            other = f"${{{name}:-default}}"
            self.wrong(f"the variable {name} is not set; set it, or write {other}", *path)
            return ""
        if default is not None and not value:
            return default  # as in a shell: for an empty variable too
        self.secret(value)
        return value or ""

    def file(self, name: str, *path: str | int) -> str:
        text = self.text(os.path.join(self.folder, name), *path)
        text = text.removesuffix("\n")  # an editor's, no part of the secret
        self.secret(text)
        return text

    def text(self, name: str, *path: str | int) -> str:
        try:
            with open(name, "rb") as file:
                data = file.read(_SECRET_FILE + 1)
            if len(data) > _SECRET_FILE:
                raise ValueError(f"more than {_SECRET_FILE} bytes")
            return data.decode()
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            self.wrong(f"cannot read {name}: {why}", *path)
            return ""

    def env_file(self, name: Json, path: tuple[str, str]) -> dict[str, str]:
        """A file of NAME=VALUE lines, as VS Code reads it."""
        if not isinstance(name, str):
            self.wrong("must be a string", *path, "envFile")
            return {}
        values = {}
        for line in self.text(os.path.join(self.folder, name), *path, "envFile").splitlines():
            key, found, value = line.strip().removeprefix("export ").partition("=")
            value = value.strip()
            if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
                value = value[1:-1]
            if found and not key.startswith("#"):
                values[key.strip()] = value
        return values

    def secret(self, value: Json) -> None:
        # Line by line too: a child's stderr shows a key file one line at a time.
        for part in (value, *value.splitlines()) if isinstance(value, str) else ():
            if len(part) >= _SHORTEST_SECRET:
                self.secrets.add(part)

    # The models

    def validated(self, raw: dict[str, Json]) -> Config | None:
        for key in (set(Config.model_fields) - set(_keys(Config))) & set(raw):
            self.unknown((key,))  # a field of the model, but no key of the file
            del raw[key]
        try:
            return Config.model_validate(raw)
        except ValidationError as error:
            for item in error.errors(include_url=False):
                self.refused(item)
            return None

    def refused(self, item: ErrorDetails) -> None:
        path = tuple(item["loc"])
        if len(path) > 1 and path[0] == "mcpServers":
            name = str(path[1])
            path = ("mcpServers", self.originals.get(name, name), *path[2:])
        kind, context = item["type"], item.get("ctx", {})
        if kind == "extra_forbidden":
            self.unknown(path)
        elif kind == "value_error":
            self.wrong(str(context["error"]), *path)
        elif kind == "literal_error":
            words = re.findall(r"'([^']*)'", str(context["expected"]))
            listed = ", ".join(f'"{word}"' for word in words)
            hint = _near(item["input"], words) if isinstance(item["input"], str) else ""
            self.wrong(f"must be one of {listed}. {hint}".strip(), *path)
        else:
            message = _WRONG.get(kind, item["msg"]).format_map(context)
            # The kind of the value alone: the value itself may be a secret.
            got = _JSON_WORDS.get(type(item["input"]))
            typed = kind.endswith("_type") and got
            self.wrong(f"{message}, not {got}" if typed else message, *path)

    def unknown(self, path: tuple[str | int, ...]) -> None:
        key = str(path[-1])
        known = _keys(_model_at(path[:-1]))
        homes = [home for home, model in _HOMES.items() if key in _keys(model)]
        hint = _near(key, known)
        if not hint and homes:
            hint = f"It belongs to {homes[0]}."
        self.wrong(f"unknown key. {hint}".strip(), *path)

    def warn(self, config: Config) -> None:
        """What is allowed and yet seldom meant."""
        if not config.servers:
            self.remark("no server is left to start", "mcpServers")
        isolated = [name for name, server in config.servers.items() if server.isolation != "shared"]
        if isolated and config.auth.type == "none":
            names = ", ".join(isolated)
            message = f"without auth all modern clients are one principal to {names}"
            self.remark(message, "auth")
        reachable = not config.socket and not is_loopback(config.host)
        if reachable and set(config.allowed_hosts) <= set(LOOPBACK_NAMES):
            message = "only loopback names are accepted as Host; set public_url or allowed_hosts"
            self.remark(message, "host")


def _host_of(url: Json) -> list[str]:
    match = re.match(r"https?://(\[[^\]/]*\]|[^/:@?#\s]+)", url) if isinstance(url, str) else None
    return [match[1].strip("[]").lower()] if match else []


# ---- What the options are, for `schema`, README and hints ----

_HOMES: Final[dict[str, type[_Options]]] = {
    "the top level": Config,
    "mcpServers.NAME": ServerConfig,
    "limits": Limits,
    "mcpServers.NAME.restart": Restart,
    "mcpServers.NAME.tools": ToolRules,
    "log": LogConfig,
    "auth": Auth,
}


def _keys(model: type[_Options] | None) -> dict[str, FieldInfo]:
    """The keys that a user may write, by the names in the file."""
    if model is None:
        return {}
    fields = model.model_fields.items()
    return {field.alias or name: field for name, field in fields if not field.exclude}


def _model_at(path: tuple[str | int, ...]) -> type[_Options] | None:
    if not path:
        return Config
    parts = [str(part) for part in path]
    if len(parts) > 1 and parts[0] == "mcpServers":
        parts[1] = "NAME"
    return _HOMES.get(".".join(parts))


def config_schema() -> dict[str, Json]:
    """The JSON Schema (2020-12) of a config file."""
    schema: dict[str, Json] = Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    properties = schema["properties"]
    properties["$schema"] = {"type": "string"}
    for key in sorted(_CLIENT_KEYS):
        properties[key] = {"description": "a key of a desktop client, ignored"}
    for alias in _SERVERS_KEYS:
        properties[alias] = {**properties["mcpServers"], "description": "read as mcpServers"}
    schema["anyOf"] = [{"required": [key]} for key in ("mcpServers", *_SERVERS_KEYS)]
    return schema


def config_table() -> str:
    """Every option as a row of Markdown: key, default, meaning."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for home, model in _HOMES.items():
        base = "" if model is Config else f"{home}."
        for key, field in _keys(model).items():
            nested = isinstance(field.default_factory, type) and issubclass(
                field.default_factory, BaseModel
            )
            if not nested and key != "mcpServers":
                rows.append(f"| `{base}{key}` | {_default(field)} | {field.description} |")
    return "\n".join(rows) + "\n"


def _default(field: FieldInfo) -> str:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    if "shown" in extra:
        return str(extra["shown"])
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    unit = f" {extra['unit']}" if "unit" in extra else ""
    if extra.get("unit") == "bytes" and value % 1024 == 0:
        value, unit = (value // MIB, " MiB") if value % MIB == 0 else (value // 1024, " KiB")
    if isinstance(value, float):
        return f"{value:g}{unit}"
    return f"`{json.dumps(value)}`{unit}" if unit == "" else f"{json.dumps(value)}{unit}"


# ==== Record ======================================================================
# One stream of events, redacted at the source; log, metrics and status are views of it.
# Knows names and fields of events. Must not know who emits them or who looks.

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}
HIDDEN: Final = "[redacted]"
CounterKey: TypeAlias = tuple[str | tuple[str, str], ...]  # name, then label and value pairs
LOG_LINES: Final = 10_000  # waiting for a slow stderr; past it the oldest are dropped and counted


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. `name` is stable (`child.exited`), `time` in seconds since the epoch."""

    time: float
    name: str
    level: str
    fields: Mapping[str, Json]


class Record:
    """The stream. Whatever is emitted here is free of `secrets` before anybody sees it."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        # Longest first: a secret that contains another one is hidden whole.
        parts = sorted({secret for secret in secrets if secret}, key=len, reverse=True)
        self._secrets = re.compile("|".join(map(re.escape, parts))) if parts else None
        self._watchers: list[Callable[[Event], None]] = []
        self.counters: dict[CounterKey, int] = {}

    def emit(self, event: str, level: str = "info", **fields: Json) -> None:
        """Publish `event`. `message`, where given, is a sentence for people; `server` names a server."""
        shown = self.redact(fields) if self._secrets else fields
        self.count("events", event=event)
        happened = Event(time.time(), event, level, shown)
        for watcher in self._watchers:
            watcher(happened)

    def count(self, name: str, **labels: str) -> None:
        """One more of the counter `atrax_NAME_total` with these labels; no event, no log line."""
        key: CounterKey = (name, *sorted(labels.items()))
        self.counters[key] = self.counters.get(key, 0) + 1

    def redact(self, value: Json) -> Json:
        """`value` with every secret in its texts replaced; keys stay, since names are ours."""
        if self._secrets is None:
            return value
        if isinstance(value, str):
            return self._secrets.sub(HIDDEN, value)
        if isinstance(value, dict):
            return {key: self.redact(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.redact(item) for item in value]
        return value

    def watch(self, watcher: Callable[[Event], None]) -> Callable[[], None]:
        """Every event goes to `watcher`, which must not raise or block, until what is returned is called."""
        self._watchers.append(watcher)
        return lambda: self._watchers.remove(watcher)

    def metrics(self) -> str:
        """All counters in the text format of Prometheus (exposition format 0.0.4)."""
        lines: list[str] = []
        last = ""
        for key, number in sorted(self.counters.items(), key=lambda item: str(item[0])):
            name = f"atrax_{key[0]}_total"
            if name != last:
                lines.append(f"# TYPE {name} counter")
            last = name
            labels = ",".join(f'{pair[0]}="{_label(pair[1])}"' for pair in key[1:])
            lines.append(f"{name}{{{labels}}} {number}" if labels else f"{name} {number}")
        return "\n".join(lines) + "\n"


def _label(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class Log:
    """The view on stderr, as text or as JSON lines.

    Written by a thread of its own: a terminal that is held with Ctrl-S or a full pipe would otherwise
    stop the loop, and with it every client."""

    def __init__(self, level: str, form: str, stream: TextIO) -> None:
        self._level, self._json, self._stream = LEVELS[level], form == "json", stream
        self._lines: deque[str] = deque()
        self._dropped = 0
        self._work = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def __call__(self, event: Event) -> None:
        if LEVELS[event.level] < self._level:
            return
        if len(self._lines) >= LOG_LINES:
            self._lines.popleft()
            self._dropped += 1
        self._lines.append(self._as_json(event) if self._json else self._as_text(event))
        self._idle.clear()
        self._work.set()

    def close(self, patience: float = 1.0) -> None:
        """Wait until what was logged is written, `patience` seconds at most."""
        self._idle.wait(patience)

    def _write(self) -> None:
        while self._work.wait():
            self._work.clear()
            while self._lines:
                line = self._lines.popleft()
                dropped, self._dropped = self._dropped, 0
                if dropped:
                    line = f"{dropped} log lines were dropped: stderr is read too slowly\n{line}"
                try:
                    self._stream.write(line + "\n")
                except (OSError, ValueError):
                    return  # stderr is gone: there is nobody left to tell
            with contextlib.suppress(OSError, ValueError):
                self._stream.flush()
            if not self._lines:
                self._idle.set()

    def _as_json(self, event: Event) -> str:
        body = {"time": round(event.time, 3), "level": event.level, "event": event.name, **event.fields}
        return orjson.dumps(body, default=str).decode()

    def _as_text(self, event: Event) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(event.time))
        fields = dict(event.fields)
        server, message = fields.pop("server", ""), fields.pop("message", "")
        rest = " ".join(f"{key}={value}" for key, value in fields.items() if value not in (None, ""))
        text = " ".join(part for part in (message or event.name, "" if message else rest) if part)
        head = f"{clock} {event.level:<7} " + (f"{server}: " if server else "")
        return head + _printable(text)


def _printable(text: str) -> str:
    """`text` on one line and without control characters: a child's stderr must not drive the terminal."""
    return "".join(char if char.isprintable() or char == "\t" else f"\\x{ord(char):02x}" for char in text)


# ==== Message =====================================================================
# Bytes to JSON-RPC and back, what crosses the middle (Call, Ask, Notice, Outcome), and the seams.
# Knows JSON-RPC 2.0 and how JSON can mislead. Must not know eras, HTTP or processes.

DEPTH: Final = 200  # default of limits.depth; orjson reads 1,024 levels but writes only 254
DIGITS: Final = bytes(0x30 if 0x30 <= byte <= 0x39 else byte for byte in range(256))
LONG_NUMBER: Final = b"0" * 19
SAFE_INTEGERS: Final = range(-(2**63), 2**64)


class InvalidJson(AtraxError):
    """Bytes that are not one JSON value, or one that could be read in two ways."""


def decode(data: bytes, depth: int = DEPTH) -> Json:
    """The one JSON value in `data`; raises InvalidJson.

    Refused: BOM, NaN, lone surrogates, invalid UTF-8 (by orjson), more than `depth` levels, and
    integers outside 64 bits, which orjson would silently turn into floats (PROTOCOL, JSON)."""
    try:
        # translate() and a search cost 0.3 us for 300 bytes; a regular expression 3 us.
        value = _exactly(data) if LONG_NUMBER in data.translate(DIGITS) else orjson.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidJson(f"not valid JSON: {error}") from None
    # No more openers than levels allowed: nothing to measure. True for nearly every message.
    if data.count(b"[") + data.count(b"{") > depth and deeper(value, depth):
        raise InvalidJson(f"more than {depth} levels deep (limits.depth)")
    return value


def _exactly(data: bytes) -> Json:
    """`data` with its long integers kept; orjson first, since json.loads accepts NaN and surrogates."""
    orjson.loads(data)
    value: Json = json.loads(data, parse_int=_integer)
    return value


def _integer(digits: str) -> int:
    # Checked before int(): converting a million digits takes seconds (CVE-2020-10735).
    if len(digits) > 20 or int(digits) not in SAFE_INTEGERS:
        raise ValueError(f"the integer {digits[:24]}… does not fit in 64 bits")
    return int(digits)


def deeper(value: Json, levels: int) -> bool:
    """Whether `value` nests more than `levels` lists or objects. Level by level, so it cannot overflow."""
    layer = [value]
    for _ in range(levels):
        layer = [
            child
            for node in layer
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    return any(isinstance(node, (dict, list)) for node in layer)


def encode(value: Json) -> bytes:
    """`value` as JSON, without white space. Never fails for what `decode` gave."""
    return orjson.dumps(value)


@dataclasses.dataclass(slots=True)
class Request:
    """A JSON-RPC request (section 4)."""

    id: int | str
    method: str
    params: dict[str, Json]


@dataclasses.dataclass(slots=True)
class Notice:
    """A JSON-RPC notification (section 4.1). In the middle: one that belongs to a call, or to a server."""

    method: str
    params: dict[str, Json]


@dataclasses.dataclass(slots=True)
class Response:
    """A JSON-RPC response (section 5). `result` or `error`, the other is None."""

    id: int | str | None
    result: dict[str, Json] | None
    error: Error | None


@dataclasses.dataclass(slots=True)
class Error:
    """A JSON-RPC error object. `status`: the HTTP status for a modern client whose response has not begun."""

    code: int
    message: str
    data: Json = None
    status: int = 200


def read_message(value: Json) -> Request | Notice | Response:
    """One JSON-RPC message; raises RpcError -32600. Ids are strings or integers (MCP, basic/index).

    Members beyond JSON-RPC's own are dropped here and never reach a child; `params` pass whole."""
    if not isinstance(value, dict) or value.get("jsonrpc") != "2.0":
        raise RpcError(INVALID_REQUEST, 'not a JSON-RPC 2.0 message: an object with "jsonrpc": "2.0" is needed')
    method = value.get("method")
    if method is None:
        return _read_response(value)
    if not isinstance(method, str):
        raise RpcError(INVALID_REQUEST, '"method" must be a string')
    params = value.get("params", {})
    if not isinstance(params, dict):
        raise RpcError(INVALID_REQUEST, '"params" must be an object')
    if "id" not in value:
        return Notice(method, params)
    return Request(_read_id(value["id"]), method, params)


def _read_id(value: Json) -> int | str:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise RpcError(INVALID_REQUEST, '"id" must be a string or an integer')
    return value


def _read_response(value: dict[str, Json]) -> Response:
    error, result = value.get("error"), value.get("result")
    if (error is None) == (result is None):
        raise RpcError(INVALID_REQUEST, 'a message needs "method", or one of "result" and "error"')
    if result is not None:
        if not isinstance(result, dict):
            raise RpcError(INVALID_REQUEST, '"result" must be an object')
        return Response(_read_id(value.get("id")), result, None)
    ident = value.get("id")
    return Response(None if ident is None else _read_id(ident), None, read_error(error))


def read_error(value: Json) -> Error:
    """A peer's error object; raises RpcError -32600 where it is none."""
    code, message = (value.get("code"), value.get("message")) if isinstance(value, dict) else (None, None)
    if not isinstance(value, dict) or isinstance(code, bool) or not isinstance(code, int):
        raise RpcError(INVALID_REQUEST, '"error" must be an object with an integer "code"')
    return Error(code, message if isinstance(message, str) else "", value.get("data"))


def write_request(ident: int | str, method: str, params: dict[str, Json]) -> bytes:
    return orjson.dumps({"jsonrpc": "2.0", "id": ident, "method": method, "params": params})


def write_notice(notice: Notice) -> bytes:
    if not notice.params:
        return orjson.dumps({"jsonrpc": "2.0", "method": notice.method})
    return orjson.dumps({"jsonrpc": "2.0", "method": notice.method, "params": notice.params})


def write_result(ident: int | str, raw: bytes) -> bytes:
    """A response around `raw`, which is one JSON object and goes on as its own bytes."""
    return b'{"jsonrpc":"2.0","id":%b,"result":%b}' % (orjson.dumps(ident), raw)


def write_error(ident: int | str | None, error: Error) -> bytes:
    """An error response. `ident` None: the request's id could not be read, so the member is null."""
    body: dict[str, Json] = {"code": error.code, "message": error.message}
    if error.data is not None:
        body["data"] = error.data
    return orjson.dumps({"jsonrpc": "2.0", "id": ident, "error": body})


# ---- What crosses the middle ----
# The canonical form is modern: requests without their era's `_meta` keys, results with or without
# `resultType` (absent means complete), asks as (method, params). Not frozen: made once per call on
# the hot path, where a frozen dataclass of ten fields costs 1.5 us more.


@dataclasses.dataclass(frozen=True, slots=True)
class Owner:
    """Who a call belongs to: the principal, and for a legacy client its session too ("" for a modern one)."""

    principal: str
    session: str = ""


@dataclasses.dataclass(slots=True)
class Call:
    """One request of a client on its way to a server. `Door.open` takes it over and may rewrite `params`.

    `params` hold no reserved `_meta` keys of an era (version, client, capabilities, logLevel) and no
    progressToken; all other `_meta` members (trace context, extensions) are in `params["_meta"]`."""

    method: str
    params: dict[str, Json]
    owner: Owner
    version: str  # the protocol version that the client speaks; Policy checks params by it
    endpoint: str = ""  # the server's name on /servers/NAME/mcp, "" on /mcp
    capabilities: dict[str, Json] = dataclasses.field(default_factory=dict)  # what the client can be asked
    client: dict[str, Json] | None = None  # clientInfo
    log_level: str | None = None  # the lowest level the client wants; None: it did not say
    progress: bool = False  # whether the client sent a progressToken
    place: str = ""  # the process that must take it (a retry, a task); "" for any
    mirrored: Mapping[str, str] | None = None  # Mcp-Param-* headers, lower-case name to raw value; None: legacy
    address: str = ""  # the client's address, for the record
    any_output: bool = True  # False: the client knows outputSchema and structuredContent of type object only


@dataclasses.dataclass(slots=True)
class Ask:
    """A request from server to client. `key` is unique in its call and the same when the call is repeated."""

    key: str
    method: str
    params: dict[str, Json]
    source: object = None  # the child's own id: only the adapter that made the ask looks at it


@dataclasses.dataclass(slots=True)
class Outcome:
    """How a call ended: `error`, or a result.

    `result` is the decoded object. `raw` is its own bytes, valid for as long as nobody changed `result`.
    Either may be missing: lists of the Catalogue come as `raw` alone, results made here as `result` alone."""

    result: dict[str, Json] | None = None
    raw: bytes | None = None
    error: Error | None = None
    server: str = ""  # the server that answered, "" for Atrax
    place: str = ""  # the process that answered
    ttl_ms: int | None = None  # how long a list or read may be cached; None: the result says it, or 0
    public: bool = False  # whether caches may share it


@dataclasses.dataclass(slots=True)
class Offer:
    """What one server said of itself (DiscoverResult, InitializeResult), for Catalogue and status."""

    capabilities: dict[str, Json]
    info: dict[str, Json]
    instructions: str
    version: str  # protocol version spoken with it
    era: str  # "modern" or "legacy": shown in /status, decided upon by nobody


def own_error(code: int, message: str, reason: str, server: str = "", **more: Json) -> Error:
    """An error of Atrax's own (1000 …), with the data that DESIGN promises; None values are left out."""
    detail: dict[str, Json] = {"reason": reason}
    if server:
        detail["server"] = server
    detail |= {key: value for key, value in more.items() if value is not None}
    return Error(code, message, {"atrax": detail})


# ---- The seams ----


class Reply(Protocol):
    """One HTTP response. Either `full`, or `head`, any number of `write`, and `end`. Never raises for a gone client."""

    closed: Callable[[], None] | None  # set by the handler; called once if the client goes before the end
    stalled: bool  # the reader does not keep up: more than the high-water mark is waiting
    extra: Sequence[tuple[str, str]]  # headers that go with whatever is answered (CORS); set by the wiring

    @property
    def waiting(self) -> int: ...  # bytes that were written and that the client has not taken
    def full(self, status: int, headers: Sequence[tuple[str, str]], body: bytes) -> None: ...
    def head(self, status: int, headers: Sequence[tuple[str, str]]) -> None: ...
    def write(self, data: bytes) -> None: ...
    def end(self) -> None: ...


@dataclasses.dataclass(slots=True)
class HttpRequest:
    """A whole request. `headers`: lower-case names; a repeated field is joined by ", " (RFC 9110, 5.3)."""

    method: str
    path: str  # decoded once, without query
    query: str  # raw
    headers: dict[str, str]
    body: bytes
    address: str  # the client's address
    secure: bool = False  # came over TLS


class Handler(Protocol):
    """Http → Clients, Endpoints."""

    def handle(self, request: HttpRequest, reply: Reply) -> None: ...


class Sink(Protocol):
    """Where one call's answers go. `note` and `ask` any number of times, then `done` exactly once.

    `done` comes after a cancel too (error CANCELLED), nothing comes after it, and all of them may come
    before `open` returns. Progress comes as Notice("notifications/progress", params without token);
    an ask that the child took back as Notice("notifications/cancelled", {"requestId": ask.key})."""

    def note(self, notice: Notice) -> None: ...
    def ask(self, ask: Ask) -> None: ...
    def done(self, outcome: Outcome) -> None: ...


class Handle(Protocol):
    """The way on into a call under way. All verbs are harmless after `done`."""

    def answer(self, ask: Ask, outcome: Outcome) -> None: ...
    def note(self, notice: Notice) -> None: ...
    def cancel(self, reason: str) -> None: ...


class Door(Protocol):
    """Clients → Gateway. Never raises: what is wrong with a call comes as `done` with an error."""

    def open(self, call: Call, sink: Sink) -> Handle: ...


class Link(Protocol):
    """Gateway → Servers: one ready process."""

    server: str
    place: str

    def send(self, call: Call, sink: Sink) -> Handle: ...


class Lease(Protocol):
    """A wait for a process. `cancel` is harmless after `ready`."""

    def cancel(self) -> None: ...


class Pool(Protocol):
    """Gateway, Catalogue, Subscriptions → Supervisor.

    `ready` is called exactly once unless cancelled: at once where a process is free, else when one is, or
    with an Error (1010 with state and retryAfter, 1011). `owner` None: for Atrax itself, which needs no
    free process (lists, listen, ping) and never starts a stopped one of its own accord."""

    def lease(
        self, server: str, owner: Owner | None, place: str, ready: Callable[[Link | Error], None]
    ) -> Lease: ...
    def gone(self, owner: Owner) -> None: ...


class Shelf(Protocol):
    """Supervisor → Catalogue, Subscriptions: what happened at a server's children."""

    def up(self, server: str, offer: Offer) -> None: ...  # the first process is ready (again)
    def down(self, server: str) -> None: ...  # no process is left, or the first start failed
    def changed(self, server: str, kind: Kind) -> None: ...  # list_changed
    def told(self, server: str, place: str, notice: Notice) -> None: ...  # of no call: tasks, elicitation/complete


# ==== Http ========================================================================
# Bytes to requests and back: a strict sans-I/O parser, then the one asyncio Protocol that owns a
# socket. Knows RFC 9110, RFC 9112 and the event stream format. Must not know MCP.

# One way to read a request, or 400. Whatever a proxy in front might read differently (two lengths,
# a folded line, a bare LF, a space before a colon) is how one request is smuggled inside another
# (RFC 9112, 11.2; CWE-444), so nothing is repaired. Every refusal ends the connection: after bytes
# that were not understood nobody knows where the next request begins.

REQUEST_LINE: Final = 8192  # bytes; RFC 9112, 3 asks for 8,000 at least
FIELDS: Final = 100  # header lines in a request, and lines of a trailer
CHUNK_LINE: Final = 256  # bytes of a chunk's size with its extensions, which nobody uses
CHUNKS: Final = 1000  # read in one go; 256 KB of one-byte chunks would hold the loop for 90 ms
PIPELINE: Final = 64 * 1024  # unparsed bytes behind a request under way; past it nothing is read
TURN: Final = 16  # pipelined requests that one connection gets in one turn of the loop
IDLE: Final = 75.0  # s a connection may wait for its next request; pools of clients keep fewer
LINGER: Final = 2.0  # s that a refused client has to read why
STALLED: Final = 30.0  # s after which a reader that takes nothing is cut (DESIGN, Inside)
BODIES: Final = 256 * 1024 * 1024  # bytes of unfinished bodies, all connections together
COPIED: Final = 64 * 1024  # a larger body is not copied to stand in one piece behind its head
BACKLOG: Final = 2048

METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
# A second one of these has no one meaning. The others are lists, or nobody here reads them.
SINGLE: Final = frozenset({
    "host", "content-length", "transfer-encoding", "content-type", "content-encoding", "expect",
    "authorization", "origin", "last-event-id", "access-control-request-method",
})  # fmt: skip

_FIELD_TOKEN: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_BEGINNING: Final = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~\r\n-]")
_FIELD_VALUE: Final = re.compile(r"[\t -~\x80-\xff]*")
_VERSION: Final = re.compile(r"HTTP/[0-9]\.[0-9]")
_HOST: Final = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_LENGTH: Final = re.compile(r"0|[1-9][0-9]*")  # and not int(): it takes +5, 1_0 and Arabic digits
_PATH: Final = re.compile(r"/(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*")
_QUERY: Final = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*")
_ABSOLUTE: Final = re.compile(r"https?://([^/?#]*)(/[^?#]*)?((?:\?.*)?)", re.IGNORECASE)
_CHUNK: Final = re.compile(
    rb"([0-9A-Fa-f]{1,16})"
    rb"(?:;[A-Za-z0-9!#$%&'*+.^_`|~-]+"
    rb'(?:=(?:[A-Za-z0-9!#$%&\'*+.^_`|~-]+|"(?:[\t !#-\[\]-~]|\\[\t -~])*"))?)*\r\n'
)
_MISPLACED: Final = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?=[^\n])|(?<!\r)\n")


class Phase(enum.IntEnum):  # an index, since hashing an Enum runs Python code
    """What a connection waits for."""

    IDLE = 0  # the next request
    HEAD = 1  # the rest of a request head
    BODY = 2  # the rest of a request body
    ANSWER = 3  # the answer to its request
    LINGER = 4  # the client to read why it was refused
    GONE = 5  # nothing any more


class HttpParser:
    """The server's side of reading HTTP/1.1 and 1.0 (RFC 9112): bytes into `feed`, requests out of
    `next`. How the bytes were cut changes nothing.

    After `next` gave a request, `last` and `chunks` tell of it until `next` is called again."""

    def __init__(self, limits: Limits, address: str = "", secure: bool = False) -> None:
        self._limits, self._address, self._secure = limits, address, secure
        self._data = b""  # received and not consumed from _at on
        self._at = 0
        self._clean = 0  # bytes of an unfinished head or trailer that were looked at
        self._error: HttpError | None = None
        self._request: HttpRequest | None = None  # the one whose body is being read
        self._left = 0  # bytes of the body, or of the chunk, still to come
        self._chunked = self._in_chunk = self._trailer = False
        self._parts: list[bytes] = []
        self._size = 0  # bytes in _parts
        self._extensions = 0  # bytes spent on chunk extensions in this body
        self.last = False  # the client wants the connection closed after the answer
        self.chunks = True  # the client understands the chunked transfer coding
        self.expects = False  # the client waits for "100 Continue" before it sends the body
        self.more = False  # `next` gave None to let others run: call it again without new bytes

    @property
    def phase(self) -> Phase:
        """IDLE, HEAD or BODY: what the bytes so far are the beginning of."""
        if self._request is not None:
            return Phase.BODY
        if self._at == len(self._data):
            return Phase.IDLE
        # A client that ends its body with an empty line has not begun a request.
        begun = self.unread > 2 or not b"\r\n".startswith(self._data[self._at :])
        return Phase.HEAD if begun else Phase.IDLE

    @property
    def unread(self) -> int:
        """Bytes that were fed and are not part of a body or an earlier request."""
        return len(self._data) - self._at

    @property
    def held(self) -> int:
        """Bytes of the unfinished body."""
        return self._size

    def feed(self, data: bytes) -> None:
        """Take `data` from the client."""
        self._data = data if self._at == len(self._data) else self._data[self._at :] + data
        self._at = 0

    def next(self) -> HttpRequest | None:
        """The next whole request; None: more bytes are needed, or `more`.

        Raises HttpError, and from then on always the same."""
        if self._error is not None:
            raise self._error
        try:
            return self._next()
        except HttpError as error:
            self._error, self._data, self._at, self._parts = error, b"", 0, []
            raise

    def _next(self) -> HttpRequest | None:
        request = self._request or self._read_head()
        if request is None:
            return None
        done = self._read_chunks() if self._chunked else self._read_length()
        if not done:
            self._request = request
            return None
        request.body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._request, self._parts, self._size, self.expects = None, [], 0, False
        return request

    # ---- the head ----

    def _read_head(self) -> HttpRequest | None:
        data, at = self._data, self._at
        if at == len(data):
            return None
        # One empty line before a request is tolerated (RFC 9112, 2.2): old clients end a body so.
        start = at + 2 if data.startswith(b"\r\n", at) else at
        end = data.find(b"\r\n\r\n", start + max(self._clean - 3, 0))
        if end < 0:
            if start < len(data):
                self._refuse_early(data[start:], self._clean)
                self._clean = len(data) - start
            return None
        self._clean = 0
        size = end - start
        lines = data[start:end].decode("latin-1").split("\r\n")
        if size > self._limits.header or len(lines) > FIELDS + 1 or len(lines[0]) > REQUEST_LINE:
            self._refuse_early(data[start : end + 4])
        try:
            method, path, query, modern, authority = _request_line(lines[0])
            headers = _fields(lines[1:], cached=size <= CACHED)
        except HttpError:
            # Had the bytes come one by one, a later fault might have been seen first.
            self._refuse_early(data[start : end + 4])
            raise
        host = headers.get("host")
        if host is None and modern:
            raise HttpError(400, "the Host header is missing")
        # RFC 9112, 3.2.2 lets a target with a host win over the Host header; two readers could then
        # disagree about the host that was checked, so they must be equal.
        if authority is not None and (host is None or authority.lower() != host.lower()):
            raise HttpError(400, "the request target must be a path, or a URL of the same Host")
        connection = headers.get("connection")
        self.chunks = modern
        self.last = not modern or (
            connection is not None and connection != "keep-alive" and "close" in _list(connection)
        )
        self._read_framing(method, headers)
        self._at = end + 4
        return HttpRequest(method, path, query, headers, b"", self._address, self._secure)

    def _refuse_early(self, head: bytes, clean: int = 0) -> None:
        """Raise what is wrong first in `head`, which may be a part; nothing if all may be well.

        By the first wrong byte, so that the answer does not depend on how the bytes came. The first
        `clean` bytes were looked at before: else each byte of a trickle costs half a ms."""
        limit, line = self._limits.header, head.find(b"\r\n")
        faults: list[tuple[int, HttpError]] = []
        if wrong := _MISPLACED.search(head, max(clean - 1, 0)):
            faults.append((wrong.end(), _misplaced(head, wrong.start())))
        if not _BEGINNING.match(head):
            # A client that sends this and waits would wait for the timeout (h11 does this too).
            faults.append((1, HttpError(400, "a request must begin with its method")))
        if line == 0:
            faults.append((2, HttpError(400, "an empty line where a request line should stand")))
        if len(head) >= REQUEST_LINE + 2 and not 0 <= line <= REQUEST_LINE:
            faults.append((REQUEST_LINE + 2, HttpError(414, "the request line is too long")))
        if len(head) >= limit + 4 and head.find(b"\r\n\r\n", 0, limit + 4) < 0:
            message = f"the request head is larger than {limit} bytes (limits.header)"
            faults.append((limit + 4, HttpError(431, message)))
        if head.count(b"\r\n") - head.endswith(b"\r\n\r\n") > FIELDS + 1:
            faults.append((_nth(head, FIELDS + 2), HttpError(431, f"more than {FIELDS} headers")))
        if faults:
            raise min(faults, key=lambda fault: fault[0])[1]

    def _read_framing(self, method: str, headers: dict[str, str]) -> None:
        """How long the body is (RFC 9112, 6.3)."""
        length, coding = headers.get("content-length"), headers.get("transfer-encoding")
        self._left, self._chunked = 0, False
        if coding is not None:
            if length is not None:
                raise HttpError(400, "Content-Length and Transfer-Encoding exclude each other")
            # Exactly: a proxy that does not know "CHUNKED" or "gzip, chunked" reads another body.
            if coding != "chunked" or not self.chunks:
                raise HttpError(400, "the only Transfer-Encoding is chunked, in HTTP/1.1")
            self._chunked, self._in_chunk, self._trailer = True, False, False
            self._extensions = 0
        elif length is not None:
            # By its length first: converting a million digits takes seconds (CVE-2020-10735).
            if len(length) > 18 or int(length) > self._limits.body:
                raise self._too_large()
            self._left = int(length)
        elif "content-type" in headers and method == "POST":
            # It announces a body whose end nobody knows. Without one, POST is a bare command.
            raise HttpError(411, "a body needs a Content-Length")
        expect = headers.get("expect")
        if expect is not None and self.chunks:  # RFC 9110, 10.1.1: ignored in HTTP/1.0
            if expect.lower() != "100-continue":
                raise HttpError(417, "the only Expect is 100-continue")
            self.expects = True

    def _too_large(self) -> HttpError:
        return HttpError(413, f"a body may have {self._limits.body} bytes (limits.body)")

    # ---- the body ----

    def _read_length(self) -> bool:
        if self._left:
            part = self._data[self._at : self._at + self._left]
            if part:
                self._take(part)
        return not self._left

    def _take(self, part: bytes) -> None:
        self._parts.append(part)
        self._size += len(part)
        self._at += len(part)
        self._left -= len(part)

    def _read_chunks(self) -> bool:
        """RFC 9112, 7.1. Whether the last chunk and the trailer have been read."""
        self.more = False
        for _ in range(CHUNKS):
            if self._trailer:
                return self._read_trailer()
            if self._in_chunk and not self._read_chunk():
                return False
            if not self._read_chunk_line():
                return False
        self.more = True
        return False

    def _read_chunk(self) -> bool:
        if not self._read_length():
            return False
        # The line end behind the data is checked, not skipped: else a chunk longer than its size
        # says would go unnoticed (CVE-2025-43859, h11).
        ending = self._data[self._at : self._at + 2]
        if not b"\r\n".startswith(ending):
            raise HttpError(400, "a chunk is not as long as its size says")
        if len(ending) < 2:
            return False
        self._at += 2
        self._in_chunk = False
        return True

    def _read_chunk_line(self) -> bool:
        end = self._data.find(b"\n", self._at, self._at + CHUNK_LINE)
        if end < 0:
            if self.unread >= CHUNK_LINE:
                raise HttpError(400, "a chunk's size line is too long")
            return False
        line = _CHUNK.fullmatch(self._data, self._at, end + 1)
        if line is None:
            raise HttpError(400, "a chunk's size line is malformed")
        self._extensions += end - 1 - line.end(1)
        if self._extensions > self._limits.header:
            raise HttpError(400, "too many chunk extensions")
        self._left = int(line[1], 16)
        if self._size + self._left > self._limits.body:
            raise self._too_large()
        self._at = end + 1
        self._in_chunk, self._trailer = self._left > 0, self._left == 0
        return True

    def _read_trailer(self) -> bool:
        """Read and dropped: no field in a trailer has a meaning here (RFC 9110, 6.5.1)."""
        data, at = self._data, self._at
        if data.startswith(b"\r\n", at):
            self._at = at + 2
            return True
        end = data.find(b"\r\n\r\n", at)
        # A trailer is bound like a head, whose first line it lacks.
        trailer = b"-\r\n" + (data[at:] if end < 0 else data[at : end + 4])
        self._refuse_early(trailer, self._clean)
        self._clean = len(trailer) if end < 0 else 0
        if end < 0:
            return False
        _fields(data[at:end].decode("latin-1").split("\r\n"), cached=False)
        self._at = end + 4
        return True


# Clients repeat themselves: most lines of a request were read before. Looking them up costs 0.1 us
# a line, reading 0.4. Small heads alone, which bounds what the caches hold to a few MB.
CACHED: Final = 2048


def _fields(lines: list[str], cached: bool) -> dict[str, str]:
    """Header lines, checked (RFC 9110, 5). A repeated field becomes one list."""
    read = _field if cached else _field.__wrapped__
    headers = dict(map(read, lines))
    if len(headers) < len(lines):
        headers.clear()
        for name, value in map(read, lines):
            if name in headers:
                if name in SINGLE or name.startswith("mcp-"):
                    raise HttpError(400, "a header that may stand only once is repeated")
                value = f"{headers[name]}, {value}"
            headers[name] = value
    return headers


@functools.lru_cache(1024)
def _field(line: str) -> tuple[str, str]:
    """One header line. A folded line begins with a space: no name does (RFC 9112, 5.2)."""
    name, colon, value = line.partition(":")
    if not colon:
        raise HttpError(400, "a header line without a colon")
    if not _FIELD_TOKEN.fullmatch(name):
        raise HttpError(400, "a header name is malformed, or a header line is folded")
    if not _FIELD_VALUE.fullmatch(value):
        raise HttpError(400, "a control character in a header")
    name = name.lower()
    # strip(" \t") and not strip(): \x85 or \xa0 around "chunked" would pass us and fool the proxy
    # in front.
    value = value.strip(" \t")
    if name == "host" and not _HOST.fullmatch(value):
        raise HttpError(400, "the Host header is malformed")
    if name == "content-length" and not _LENGTH.fullmatch(value):
        raise HttpError(400, "Content-Length must be decimal digits")
    return name, value


@functools.lru_cache(256)
def _request_line(line: str) -> tuple[str, str, str, bool, str | None]:
    """Method, path, query, whether it is HTTP/1.1, and the host that the target names, if any."""
    parts = line.split(" ")
    if len(parts) != 3:
        raise HttpError(400, "the request line must be method, target and version")
    method, target, version = parts
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        if _VERSION.fullmatch(version):
            raise HttpError(505, "HTTP/1.1 is spoken here")
        raise HttpError(400, "the HTTP version is malformed")
    if method not in METHODS:
        if _FIELD_TOKEN.fullmatch(method):
            raise HttpError(501, "this method is not implemented here")
        raise HttpError(400, "the method is malformed")
    return method, *_target(method, target), version == "HTTP/1.1", _authority(target)


def _authority(target: str) -> str | None:
    absolute = _ABSOLUTE.fullmatch(target)
    return absolute[1] if absolute is not None else None


def _target(method: str, target: str) -> tuple[str, str]:
    """Path and query (RFC 9112, 3.2)."""
    if target == "*" and method == "OPTIONS":
        return "*", ""
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is not None:
        target = (absolute[2] or "/") + absolute[3]
    path, _, query = target.partition("?")
    if not _PATH.fullmatch(path) or not _QUERY.fullmatch(query):
        raise HttpError(400, "the request target is malformed")
    return (_decode(path) if "%" in path else path), query


def _decode(path: str) -> str:
    """`path` decoded once. An encoded slash, backslash or control character would mean one path to
    a proxy and another to us."""
    first, *rest = path.split("%")
    octets = b"".join(bytes([int(part[:2], 16)]) + part[2:].encode() for part in rest)
    try:
        decoded = octets.decode()
    except UnicodeDecodeError:
        raise HttpError(400, "the path is not UTF-8") from None
    encoded = {part[:2].upper() for part in rest}
    if encoded & {"2F", "5C"} or not decoded.isprintable():
        raise HttpError(400, "the path holds an encoded slash or control character")
    return first + decoded


def _list(value: str) -> set[str]:
    return {item.strip(" \t").lower() for item in value.split(",")}


def _nth(head: bytes, count: int) -> int:
    """Where the line end number `count` of `head` ends."""
    end = 0
    for _ in range(count):
        end = head.index(b"\r\n", end) + 2
    return end


def _misplaced(head: bytes, at: int) -> HttpError:
    if at == 0 and head[:1] == b"\x16":
        return HttpError(400, "this port speaks plain HTTP: use http://, not https://")
    if head[at : at + 1] in (b"\r", b"\n"):
        return HttpError(400, "lines must end with CR LF")
    return HttpError(400, "a control character in the request head")


# ---- Responses ----

REASONS: Final = {
    100: "Continue", 200: "OK", 202: "Accepted", 204: "No Content", 304: "Not Modified",
    400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 406: "Not Acceptable", 408: "Request Timeout", 409: "Conflict",
    411: "Length Required", 413: "Content Too Large", 414: "URI Too Long",
    415: "Unsupported Media Type", 417: "Expectation Failed", 421: "Misdirected Request",
    429: "Too Many Requests", 431: "Request Header Fields Too Large", 500: "Internal Server Error",
    501: "Not Implemented", 502: "Bad Gateway", 503: "Service Unavailable",
    504: "Gateway Timeout", 505: "HTTP Version Not Supported",
}  # fmt: skip
BODILESS: Final = (204, 304)
# nosniff: a browser must not take JSON for a page. No Server, no version: nobody needs them.
_STARTS: Final = {
    status: f"HTTP/1.1 {status} {reason}\r\nX-Content-Type-Options: nosniff\r\n"
    for status, reason in REASONS.items()
}
JSON_HEADERS: Final = (("Content-Type", "application/json"),)
# X-Accel-Buffering: nginx would otherwise hold events back (MCP 2026-07-28, Streamable HTTP).
SSE_HEADERS: Final = (
    ("Content-Type", "text/event-stream"),
    ("Cache-Control", "no-cache, no-transform"),
    ("X-Accel-Buffering", "no"),
)


def sse_event(data: bytes, event_id: str = "", event: str = "message") -> bytes:
    """One Server-Sent Event. `data` is JSON, or nothing; on one line, as some readers need.

    JSON holds raw line ends as white space only, and a lone CR would end the line for a client."""
    if b"\r" in data or b"\n" in data:
        data = data.replace(b"\r", b" ").replace(b"\n", b" ")
    if event_id:
        return b"event: %b\nid: %b\ndata: %b\n\n" % (event.encode(), event_id.encode(), data)
    return b"event: %b\ndata: %b\n\n" % (event.encode(), data)


def sse_comment() -> bytes:
    """What keeps an idle stream open; clients ignore it."""
    return b":\n\n"


def error_body(message: str) -> bytes:
    """The body of every error response of Atrax."""
    return encode({"error": {"message": message}})


@functools.lru_cache(256)
def _head(status: int, headers: tuple[tuple[str, str], ...], last: bool) -> bytes:
    """Status line and headers, without what depends on the body; most answers begin alike."""
    text = _STARTS.get(status) or f"HTTP/1.1 {status} \r\n"
    count = text.count("\n")
    for name, value in headers:
        text += f"{name}: {value}\r\n"
        count += 1
    # A line end inside a value would be a header, or a whole response, of somebody else's making.
    if text.count("\n") != count or text.count("\r") != count:
        raise ValueError("a response header holds a line end")
    return (text + ("Connection: close\r\n" if last else "")).encode("latin-1")


class Stage(enum.Enum):
    """How far a response is."""

    WAITING = "not begun"
    OPEN = "begun"
    OVER = "over"  # ended, or the client has gone


class HttpReply:
    """One response on one connection (the `Reply` that handlers get)."""

    __slots__ = ("_body", "_chunks", "_connection", "_stage", "closed", "extra", "stalled")

    def __init__(self, connection: Connection, chunks: bool, body: bool) -> None:
        self._connection, self._chunks, self._body = connection, chunks, body
        self._stage = Stage.WAITING
        self.closed: Callable[[], None] | None = None
        self.extra: Sequence[tuple[str, str]] = ()
        self.stalled = False

    @property
    def waiting(self) -> int:
        """Bytes that the client has not taken yet."""
        return 0 if self._stage is Stage.OVER else self._connection.waiting

    def full(self, status: int, headers: Sequence[tuple[str, str]], body: bytes) -> None:
        """The whole response, in one write."""
        if not self._is(Stage.WAITING):
            return
        start = _head(status, (*headers, *self.extra), self._connection.last)
        self._stage = Stage.OVER
        if status in BODILESS:
            self._connection.write(start + b"\r\n")
        else:
            head = b"%bContent-Length: %d\r\n\r\n" % (start, len(body))
            self._connection.write(head, body if self._body else b"")
        self._connection.answered()

    def head(self, status: int, headers: Sequence[tuple[str, str]]) -> None:
        """Begin a response whose length is not known, or stands in `headers`."""
        if not self._is(Stage.WAITING):
            return
        framing = b"\r\n"
        if status in BODILESS or any(name.lower() == "content-length" for name, _ in headers):
            self._chunks = False
        elif self._chunks:
            framing = b"Transfer-Encoding: chunked\r\n\r\n"
        self._body = self._body and status not in BODILESS
        start = _head(status, (*headers, *self.extra), self._connection.last)
        self._stage = Stage.OPEN
        self._connection.write(start, framing)

    def write(self, data: bytes) -> None:
        """A part of the body."""
        if not self._is(Stage.OPEN) or not self._body or not data:
            return
        # An empty chunk would end the body, hence the last test above.
        self._connection.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunks else data)

    def end(self) -> None:
        """The response is complete."""
        if not self._is(Stage.OPEN):
            return
        self._stage = Stage.OVER
        if self._body and self._chunks:
            self._connection.write(b"0\r\n\r\n")
        self._connection.answered()

    def refuse(self, error: HttpError) -> None:
        """Answer what `error` says."""
        if self._stage is Stage.WAITING:
            self.full(error.status, (*JSON_HEADERS, *error.headers), error_body(str(error)))
        else:
            self.fail()

    def fail(self) -> None:
        """Answer 500. A response that has begun is cut, so that nobody takes it for whole."""
        if self._stage is Stage.WAITING:
            self.full(500, JSON_HEADERS, error_body("internal error; the log has the details"))
        elif self._stage is Stage.OPEN:
            self._connection.abort()

    def gone(self) -> Callable[[], None] | None:
        """The client has gone. What to call, if the response was not over."""
        over, self._stage = self._stage is Stage.OVER, Stage.OVER
        self.stalled = False
        closed, self.closed = self.closed, None
        return None if over else closed

    def _is(self, stage: Stage) -> bool:
        """Whether the response is in `stage`; False when it is over. Out of order is a bug."""
        if self._stage is stage:
            return True
        if self._stage is Stage.OVER:
            return False
        raise RuntimeError(f"{self._stage.value}: a response must be {stage.value} for this")


# ---- Connections ----


class Connection(asyncio.Protocol):
    """One client's socket: requests one after the other, each answered before the next is read."""

    __slots__ = (
        "_advancing", "_again", "_deadline", "_full", "_held", "_parser", "_paused", "_phase",
        "_reply", "_server", "_taken", "_taken_at", "_transport", "_written", "address", "last",
    )  # fmt: skip

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._parser = HttpParser(server.limits)
        self._transport: asyncio.Transport | None = None
        self._reply: HttpReply | None = None
        self._phase = Phase.HEAD
        self._deadline = server.now + server.limits.header_timeout
        self._advancing = self._again = False
        self._full = False  # the transport holds more than its high-water mark
        self._paused = False  # nothing is read: too much waits behind the request under way
        self._held = 0  # what this connection has added to server.held
        self._written = self._taken = 0  # bytes: given to the transport, taken by the kernel
        self._taken_at = server.now
        self.address = ""
        self.last = False  # the response under way is the last on this connection

    # ---- asyncio's side; nothing may escape (uvloop then closes what stands up the stack) ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        peer, sock = transport.get_extra_info("peername"), transport.get_extra_info("socket")
        if isinstance(peer, tuple):
            self.address = str(peer[0]).removeprefix("::ffff:")
            # Without it an answer in two writes waits 40 ms for an acknowledgement.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        secure = transport.get_extra_info("sslcontext") is not None
        self._parser = HttpParser(self._server.limits, self.address, secure)
        refusal = self._server.admit(self)
        if refusal is not None:
            self._refuse(refusal)

    def data_received(self, data: bytes) -> None:
        if self._phase is Phase.LINGER:
            return  # read and dropped: closing with unread bytes would reset what we answered
        self._parser.feed(data)
        if self._reply is None:
            self._advance()
        else:
            self._throttle()

    def eof_received(self) -> bool:
        # A client that half-closes looks like one that went; like nginx, and since closing cancels
        # a call (MCP 2026-07-28, Cancellation), it is taken for gone.
        self._leave()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        self._enter(Phase.GONE)
        self._transport = None
        self._server.forget(self)

    def pause_writing(self) -> None:
        self._full = True
        if self._reply is not None:
            self._reply.stalled = True

    def resume_writing(self) -> None:
        self._full = False
        if self._reply is not None:
            self._reply.stalled = False
        else:
            self._advance_soon()

    # ---- requests ----

    def _advance(self) -> None:
        """Answer what has been received, until one waits for its answer or bytes are missing."""
        self._advancing = True
        for _ in range(TURN):
            # Answers that nobody reads must not pile up behind each other.
            if self._reply is not None or self._full or self._phase is Phase.LINGER:
                break
            try:
                request = self._parser.next()
            except HttpError as error:
                self._refuse(error)
                break
            if request is None:
                break
            self._answer(request)
        else:
            self._advance_soon()
        self._advancing = False
        self._settle()

    def _advance_soon(self) -> None:
        # Not at once: the end of one answer, somewhere up the stack, must not run the next request.
        if not self._again:
            self._again = True
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        self._again = False
        if self._reply is None and self._phase not in (Phase.LINGER, Phase.GONE):
            self._advance()

    def _answer(self, request: HttpRequest) -> None:
        self._enter(Phase.ANSWER)
        self.last = self._parser.last or self._server.draining
        reply = self._reply = HttpReply(self, self._parser.chunks, request.method != "HEAD")
        try:
            self._server.handler.handle(request, reply)
        except HttpError as error:
            reply.refuse(error)
        except Exception as error:  # a bug must cost one answer, not the connection or the loop
            self._server.failed(request, error)
            reply.fail()

    def answered(self) -> None:
        """The response is over: close, or go on to the next request."""
        self._reply = None
        if self.last or self._server.draining:
            self._finish()
        elif not self._advancing:
            if self._parser.unread:
                self._advance_soon()
            self._settle()

    def _settle(self) -> None:
        """Clock, reading, and "100 Continue", as what has been parsed asks for."""
        if self._reply is not None or self._phase in (Phase.LINGER, Phase.GONE):
            return
        parser = self._parser
        phase = parser.phase
        self._enter(phase)
        if phase is Phase.BODY:
            if parser.expects and not parser.held and not parser.unread:
                self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            parser.expects = False
            self._hold(parser.held)
            if parser.more:
                self._advance_soon()
        self._throttle()

    def _throttle(self) -> None:
        """Stop reading while much waits behind a request under way; go on when it does not."""
        busy = self._reply is not None or self._full or self._again
        much = busy and self._parser.unread > PIPELINE and self._phase is not Phase.LINGER
        transport = self._transport
        if much is self._paused or transport is None or transport.is_closing():
            return
        self._paused = much
        if much:
            transport.pause_reading()
        else:
            transport.resume_reading()

    def _enter(self, phase: Phase) -> None:
        """The only writer of `_phase`; each phase starts its own clock."""
        if phase is self._phase or self._phase is Phase.GONE:
            return
        self._phase = phase
        self._deadline = self._server.now + self._server.patience[phase]
        if self._held and phase is not Phase.BODY:
            self._hold(0)

    def _hold(self, size: int) -> None:
        self._server.held += size - self._held
        self._held = size
        if self._server.held > BODIES and size:
            self._refuse(HttpError(503, "too many large requests at once", [("Retry-After", "1")]))

    # ---- the way out ----

    @property
    def waiting(self) -> int:
        """Bytes that were written and that the client has not taken."""
        transport = self._transport
        return 0 if transport is None else transport.get_write_buffer_size()

    def write(self, data: bytes, more: bytes = b"") -> None:
        """Send; harmless when the client has gone, where uvloop's transport raises."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        self._written += len(data) + len(more)
        try:
            if len(more) > COPIED:
                transport.writelines((data, more))
            else:
                transport.write(data + more)
        except (RuntimeError, OSError):
            transport.abort()

    def _refuse(self, error: HttpError) -> None:
        """Answer what is no request, and close."""
        self._server.refused(self, error)
        self.last = True
        body = error_body(str(error))
        start = _head(error.status, (*JSON_HEADERS, *error.headers), True)
        self.write(b"%bContent-Length: %d\r\n\r\n" % (start, len(body)), body)
        self._linger()

    def _linger(self) -> None:
        """Close when the client has read why, at the latest in LINGER seconds.

        Closing at once, with bytes unread, makes the kernel send a reset, which takes the answer
        out of the client's hands before it was read (RFC 9112, 9.6)."""
        transport = self._transport
        self._enter(Phase.LINGER)
        if transport is None or transport.is_closing():
            return
        if transport.can_write_eof():
            transport.write_eof()
        self._throttle()

    def _finish(self) -> None:
        """Close after the answer; what waits in the transport is still sent."""
        if self._parser.unread:
            self._linger()
        elif self._transport is not None:
            self._transport.close()

    def _leave(self) -> None:
        """The client has gone, whatever was under way."""
        reply, self._reply = self._reply, None
        closed = reply.gone() if reply is not None else None
        if closed is not None:
            try:
                closed()
            except Exception as error:  # as in _answer
                self._server.failed(None, error)

    def drain(self) -> None:
        """Close now if nothing is under way, else after the answer."""
        self.last = True
        if self._phase is Phase.IDLE or (self._phase is Phase.HEAD and not self._parser.unread):
            self._finish()

    def abort(self) -> None:
        """Cut."""
        if self._transport is not None:
            self._transport.abort()

    def wake(self, now: float) -> None:
        """End what took too long."""
        taken = self._written - self.waiting
        if taken != self._taken or taken == self._written:
            self._taken, self._taken_at = taken, now
        elif now - self._taken_at > STALLED:
            self._server.record.emit(
                "http.stalled", "debug", address=self.address,
                message=f"{self.address}: took nothing for {STALLED:g} s; cut",
            )  # fmt: skip
            self.abort()
        if now >= self._deadline:
            self._late()

    def _late(self) -> None:
        if self._phase is Phase.BODY:
            self._refuse(HttpError(408, "the body took too long (limits.body_timeout)"))
        elif self._phase is Phase.HEAD and self._parser.unread:
            self._refuse(HttpError(408, "the request head took too long (limits.header_timeout)"))
        elif self._phase is Phase.LINGER:
            self.abort()
        elif self._transport is not None:
            self._transport.close()


class HttpServer:
    """Listens, and owns every connection. `limits` may be replaced, for new connections."""

    def __init__(
        self, handler: Handler, limits: Limits, record: Record, clock: Callable[[], float]
    ) -> None:
        self.handler, self.record = handler, record
        self.now = clock()  # as of the last wake: no clock is read per request
        self.draining = False
        self.held = 0  # bytes of unfinished bodies
        self.limits = limits
        self.connections: set[Connection] = set()
        self._clock = clock
        self._addresses: dict[str, int] = {}
        self._listeners: list[asyncio.Server] = []
        self._socket_path = ""
        self._empty = asyncio.Event()
        self._woken = 0.0

    @property
    def limits(self) -> Limits:
        """How much one client may send, and how long it may take."""
        return self._limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._limits = limits
        # How long a connection may stay in each phase; the clock of an answer is the Gateway's.
        self.patience = (
            IDLE, limits.header_timeout, limits.body_timeout, math.inf, LINGER, math.inf
        )  # fmt: skip

    async def listen(self, host: str, port: int, unix_socket: str | None = None) -> list[str]:
        """Start serving; where, as URLs. Raises UsageError that says what to do."""
        loop = asyncio.get_running_loop()
        if unix_socket:
            _free_socket(unix_socket)
            try:
                listener = await loop.create_unix_server(
                    lambda: Connection(self), unix_socket, backlog=BACKLOG
                )
            except OSError as error:
                raise UsageError(f"{unix_socket}: cannot listen: {_reason(error)}") from None
            self._listeners.append(listener)
            self._socket_path = unix_socket
            return [f"unix:{unix_socket}"]
        try:
            listener = await loop.create_server(
                lambda: Connection(self), host, port, backlog=BACKLOG
            )
        except OSError as error:
            raise UsageError(_cannot_listen(host, port, error)) from None
        self._listeners.append(listener)
        return [_url(*sock.getsockname()[:2]) for sock in listener.sockets]

    def admit(self, connection: Connection) -> HttpError | None:
        """Count a new connection; why it is not served, if so."""
        self.connections.add(connection)
        self._empty.clear()
        address = connection.address
        if address:
            self._addresses[address] = self._addresses.get(address, 0) + 1
        if len(self.connections) > self.limits.connections:
            return HttpError(503, "too many connections", [("Retry-After", "1")])
        if address and self._addresses[address] > self.limits.connections_per_address:
            return HttpError(429, "too many connections of this address", [("Retry-After", "1")])
        return None

    def forget(self, connection: Connection) -> None:
        """A connection is gone."""
        if connection not in self.connections:
            return
        self.connections.discard(connection)
        address = connection.address
        if address:
            self._addresses[address] -= 1
            if not self._addresses[address]:
                del self._addresses[address]
        if not self.connections:
            self._empty.set()

    def refused(self, connection: Connection, error: HttpError) -> None:
        """Record what was no request. On debug: who floods us must not fill the log."""
        self.record.count("http_refused", status=str(error.status))
        self.record.emit(
            "http.refused", "debug", status=error.status, address=connection.address,
            message=f"{connection.address or 'a local client'}: {error}",
        )  # fmt: skip

    def failed(self, request: HttpRequest | None, error: Exception) -> None:
        """Record a bug in a handler; the client learns nothing of it."""
        import traceback

        what = f"{request.method} {request.path}" if request is not None else "a client that left"
        self.record.emit(
            "internal.error", "error", message=f"{what}: {error!r}",
            traceback="".join(traceback.format_exception(error)),
        )  # fmt: skip

    def wake(self, now: float) -> None:
        """Once a second: end connections that took too long."""
        self.now = now
        if now - self._woken < 1.0:
            return
        self._woken = now
        for connection in tuple(self.connections):
            connection.wake(now)

    def refuse(self) -> None:
        """Begin to drain: each connection ends with its answer, idle ones at once.

        New connections are still answered, once each, so that /ready can say 503."""
        self.draining = True
        for connection in tuple(self.connections):
            connection.drain()

    async def close(self, grace: float) -> None:
        """Stop listening; answers under way have `grace` seconds, then everything is cut."""
        for listener in self._listeners:
            listener.close()
        self.refuse()
        if self.connections:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), grace)
        for connection in tuple(self.connections):
            connection.abort()
        if self._socket_path:
            with contextlib.suppress(OSError):
                os.unlink(self._socket_path)
        await asyncio.sleep(0)  # the aborted ones hear of it in this turn


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)


def _cannot_listen(host: str, port: int, error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return f'host "{host}" is no address and no name that can be resolved'
    if error.errno == errno.EADDRINUSE:
        other = port + 1 if port < 65535 else 4000
        return (
            f"port {port} on {host} is in use. Stop what uses it, or choose another: --port {other}"
        )
    if error.errno == errno.EACCES:
        return f"port {port} needs rights that this user lacks. Choose another: --port 4000"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is no address of this machine. For local clients alone: --host 127.0.0.1"
    return f"cannot listen on {host} port {port}: {_reason(error)}"


def _free_socket(path: str) -> None:
    """Remove the socket that a dead process left; raises UsageError where a living one answers.

    asyncio would remove it either way, and the older Atrax would never be reached again."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise UsageError(f"{path}: there is a file of this name, and it is no socket")
    except FileNotFoundError:
        return
    probe = socket.socket(socket.AF_UNIX)
    try:
        probe.settimeout(1.0)
        probe.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot listen: {_reason(error)}") from None
    else:
        raise UsageError(f"{path} is in use. Stop what uses it, or choose another: --socket PATH")
    finally:
        probe.close()


# ==== Identity ====================================================================
# Who a request comes from, and whether it may come at all: Host, Origin, principal, CORS.
# Knows the config and HTTP headers. Must not know servers.

# A web page that you visit can make your browser send requests to 127.0.0.1. Two headers, which
# the page cannot choose, give it away. Origin names the page. Host names what the browser thinks
# it talks to: an attacker's name, if that name was pointed at 127.0.0.1 after the page was loaded
# (DNS rebinding; CVE-2025-49596 and others). So both are checked on every request, before
# anything else, whatever the way of authentication (MCP 2026-07-28, Streamable HTTP, Security).

ANONYMOUS: Final = "anonymous"
_REMEMBERED: Final = 256  # accepted spellings of Host; 127.0.0.0/8 with all ports has too many
_LOOPBACK: Final = re.compile(r"localhost|127(?:\.[0-9]{1,3}){3}|\[::1\]")
_ANY_ADDRESS: Final = ("0.0.0.0", "::", "[::]")
_DEFAULT_PORTS: Final = {"http": ":80", "https": ":443"}


class Identity:
    """Decides who may send requests. Made anew at each reload."""

    def __init__(self, config: Config) -> None:
        scheme, _, rest = (config.public_url or "").partition("://")
        public = rest.partition("/")[0]
        hosts = [*config.allowed_hosts, public]
        # 0.0.0.0 is no name that a client should use, and browsers connect it to this machine.
        if config.host not in _ANY_ADDRESS:
            hosts.append(config.host)
        self._hosts = frozenset(_bracketed(host.lower()) for host in hosts if host)
        # Direct connections come to these, so the scheme of a page there is known.
        self._own = frozenset({_bracketed(config.host.lower())}) - set(_ANY_ADDRESS)
        origins = [*config.allowed_origins, *([f"{scheme}://{public}"] if public else [])]
        self._origins = frozenset(map(_spelled, origins))
        self._accepted: set[str] = set()

    def check(self, request: HttpRequest) -> str:
        """The principal that sent `request`; raises HttpError 403 for a foreign Host or Origin.

        1. Host: else a rebound name could pass for the page's own origin in 2. 2. Origin, where
        there is one. 3. Who it is. No rung: the path, since nothing is open but what the caller
        does not bring here (/health, /ready)."""
        headers = request.headers
        host = headers.get("host", "")
        if host not in self._accepted:
            self._check_host(host)
        origin = headers.get("origin")
        if origin is not None and not self._admits(origin, request):
            raise HttpError(
                403, 'this Origin is not allowed; to allow a web page add it to "allowed_origins"'
            )
        return self._principal()

    def cors(self, request: HttpRequest) -> list[tuple[str, str]]:
        """What a response needs so that a page at an allowed origin can read it. After `check`."""
        origin = request.headers.get("origin")
        if origin is None:
            return []
        return [
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Expose-Headers", "Mcp-Session-Id, Retry-After, WWW-Authenticate"),
            ("Vary", "Origin"),
        ]

    def preflight(self, request: HttpRequest) -> list[tuple[str, str]]:
        """The headers of the answer (204) to an OPTIONS request. After `check`.

        The headers asked for are all allowed: names of `Mcp-Param-*` cannot be known beforehand,
        and the origin is one that the user listed."""
        methods = "GET, POST, DELETE, OPTIONS"
        asked = request.headers.get("access-control-request-headers", "")
        headers = [("Allow", methods)]
        if "origin" not in request.headers:
            return headers
        headers += [*self.cors(request), ("Access-Control-Allow-Methods", methods)]
        if asked:
            headers.append(("Access-Control-Allow-Headers", asked))
        if "access-control-request-private-network" in request.headers:
            headers.append(("Access-Control-Allow-Private-Network", "true"))
        return [*headers, ("Access-Control-Max-Age", "600")]

    def _check_host(self, host: str) -> None:
        known = host.lower()
        name = _without_port(known)
        if not (known in self._hosts or name in self._hosts or _LOOPBACK.fullmatch(name)):
            raise HttpError(
                403, 'this Host is not allowed; to serve under this name add it to "allowed_hosts"'
            )
        if len(self._accepted) < _REMEMBERED:
            self._accepted.add(host)

    def _admits(self, origin: str, request: HttpRequest) -> bool:
        """Whether a page at `origin` may send `request`.

        A page on another port of this machine is as foreign as any other: dev servers show
        anybody's code. Our own page is known by an origin that equals Host, and Host was checked;
        behind a proxy, which may change the scheme, it is that of `public_url`."""
        if _spelled(origin) in self._origins:
            return True
        host = request.headers.get("host", "").lower()
        name = _without_port(host)
        own = _LOOPBACK.fullmatch(name) is not None or name in self._own
        return own and origin.lower() == f"{'https' if request.secure else 'http'}://{host}"

    def _principal(self) -> str:
        """Who it is. Config admits `auth.type` none alone, so everybody is the same principal;
        tokens and OAuth will look at the Authorization header here, after Host and Origin."""
        return ANONYMOUS


def _bracketed(host: str) -> str:
    """`host` as it stands in a Host header: a bare IPv6 address gets its brackets."""
    return f"[{host}]" if host.count(":") > 1 and not host.startswith("[") else host


def _without_port(host: str) -> str:
    if host.endswith("]"):
        return host
    name, colon, _ = host.rpartition(":")
    return name if colon else host


def _spelled(origin: str) -> str:
    """`origin` in one spelling: lower case, without the default port."""
    scheme, _, host = origin.lower().partition("://")
    return f"{scheme}://{host.removesuffix(_DEFAULT_PORTS.get(scheme, ' '))}"


# ==== Clients =====================================================================
# The client edge: `ModernClient` and `LegacyClient`, request → Call, Outcome → bytes; sessions.
# Knows both eras of clients, each in its own class, and HTTP as requests and replies.
# Must not know the child's era, nor who serves a call.
#
# A request is modern if its `_meta` names a protocol version, or its header names the modern one;
# everything else is legacy (PROTOCOL, North). Never the method: `initialize` with modern `_meta` is
# an unknown method of a modern client, and the same word from a legacy one begins a session. The
# one function that knows both eras is `_is_modern`; behind it the two classes share `_Edge`, which
# is time and event streams, and no rule of either era.
#
# Both give the middle the same thing, a Call and a sink, and differ in what an answer may be:
# - modern: one request, one response, no memory. Closing the response cancels. The server asks by
#   answering `input_required`, and the client calls again (see Parking).
# - legacy: a session. Closing a response loses nothing: the answer waits and is fetched by a GET
#   with Last-Event-ID (see Resumption). The server asks by a request on the stream of the call.
#
# A response is JSON as long as nothing but the result comes: that is one write, and most calls.
# A note or an ask before it, or 5 s without anything, make it an event stream.

_SLOW: Final = 5.0  # seconds without an answer, then a response becomes an event stream
_BEAT: Final = 15.0  # seconds between comments on a stream; proxies cut what is silent for 30 to 60
_HELD: Final = 2**20  # bytes of progress and log messages that wait for a slow reader
_GATHER: Final = 0.005  # seconds in which further asks join the round (CONFORMANCE, trap 5)
_ROUNDS: Final = 10  # of `input_required` that are answered for a legacy client (PROTOCOL, Joining)
_PAUSE: Final = (0.05, 0.25)  # seconds before a call is made again that only has `requestState`
_BATCH: Final = 100  # messages in a batch; 4 MiB would hold 100,000 calls
_SUBSCRIPTIONS: Final = 1000  # URIs that one session may be subscribed to
_KEPT: Final = 4 * 2**20  # bytes that one session's resumption store holds …
_KEPT_EVENTS: Final = 1000  # … and events …
_KEPT_ALL: Final = 32 * 2**20  # … and bytes of all sessions together
_LINGER: Final = 60.0  # seconds that a finished stream may still be fetched
_RETRY_MS: Final = 1000  # milliseconds after which a client should fetch a broken stream again
_ANSWERS_KEPT: Final = 16 * 2**20  # bytes of answers that repeated retries get from memory
_ANONYMOUS: Final = "anonymous"  # the principal without auth: no list depends on who asks

_JSON: Final = (("Content-Type", "application/json"),)
_RANK: Final = {level: rank for rank, level in enumerate(LOG_LEVELS)}
_NO_HEADERS: Final[Mapping[str, str]] = {}

# Which methods a server may answer by asking, and which results a client may keep (2026-07-28,
# basic/patterns/mrtr and server/utilities/caching).
_ASKABLE: Final = frozenset({"tools/call", "prompts/get", "resources/read"})
_CACHEABLE: Final = frozenset({
    "server/discover", "tools/list", "prompts/list", "resources/list", "resources/templates/list",
    "resources/read",
})  # fmt: skip
_LIST_CHANGED: Final = {
    "toolsListChanged": True, "promptsListChanged": True, "resourcesListChanged": True,
}  # fmt: skip


# ---- What both eras need of HTTP ----


@dataclasses.dataclass(slots=True)
class _Visit:
    """One HTTP request at an MCP path: who sends it, to which endpoint, and its decoded body."""

    request: HttpRequest
    reply: Reply
    principal: str
    endpoint: str
    value: Json = None

    def refuse(self, error: RpcError | Error, status: int = 400) -> None:
        """Answer a message that is none, with its id where it has one (CONFORMANCE, trap 8)."""
        problem = error if isinstance(error, Error) else Error(error.code, str(error), error.data)
        self.reply.full(status, _JSON, write_error(_ident(self.value), problem))


def _accepts(accept: str, kind: str) -> bool:
    """Whether an Accept header allows `kind`. Quality is not weighed: there is one form of each answer."""
    family = kind.partition("/")[0] + "/*"
    for part in accept.split(","):
        name, _, parameters = part.partition(";")
        if name.strip(" \t").lower() in (kind, family, "*/*") and "q=0" not in _quality(parameters):
            return True
    return False


def _quality(parameters: str) -> list[str]:
    parts = (part.strip(" \t").lower() for part in parameters.split(";"))
    return ["q=0" if part.rstrip("0.") == "q=" and "1" not in part else part for part in parts]


def _check_post(headers: Mapping[str, str]) -> None:
    """The media types of a POST; raises HttpError 415, 406. A missing Accept allows everything."""
    kind = headers.get("content-type", "")
    if (
        kind != "application/json"
        and kind.partition(";")[0].strip(" \t").lower() != "application/json"
    ):
        raise HttpError(415, "a POST to this endpoint is JSON: send Content-Type: application/json")
    accept = headers.get("accept")
    if accept is None or accept == "application/json, text/event-stream":
        return
    if not (_accepts(accept, "application/json") and _accepts(accept, "text/event-stream")):
        raise HttpError(
            406,
            "an answer is JSON or an event stream: send Accept: application/json, text/event-stream",
        )


def _check_get(headers: Mapping[str, str]) -> None:
    """The media type of a GET; raises HttpError 406."""
    if not _accepts(headers.get("accept", "*/*"), "text/event-stream"):
        raise HttpError(406, "this is an event stream: send Accept: text/event-stream")


def _ident(value: Json) -> int | str | None:
    """The id of a message that is wrong otherwise, so that its error can carry it (trap 8)."""
    ident = value.get("id") if isinstance(value, dict) else None
    return ident if isinstance(ident, (int, str)) and not isinstance(ident, bool) else None


def _retry_after(error: Error) -> tuple[tuple[str, str], ...]:
    """The header that 429 and 503 come with (RFC 9110, section 10.2.3)."""
    detail = error.data.get("atrax") if isinstance(error.data, dict) else None
    wait = detail.get("retryAfter") if isinstance(detail, dict) else None
    return (("Retry-After", str(max(1, round(wait)))),) if isinstance(wait, (int, float)) else ()


# Method, value and protocol version → what is wrong with the value. Policy has the tables; they come
# in from section Atrax, since Policy stands further down.
_Check: TypeAlias = Callable[[str, Json, str], "Error | None"]


def _unchecked(method: str, value: Json, version: str) -> Error | None:
    """The check of who has no tables (tests of this section alone)."""
    return None


class _Edge:
    """What both clients stand on: the door, the limits, the time, the streams that must be kept alive.

    `now` is the time of the last wake, exact to 0.2 s, which is enough for all that waits here."""

    def __init__(
        self,
        door: Door,
        limits: Limits,
        record: Record,
        now: float,
        key: bytes,
        gone: Callable[[Owner], None],
        later: Callable[[float, Callable[[], None]], object],
        check_request: _Check,
        check_answer: _Check,
    ) -> None:
        self.door, self.limits, self.record, self.now = door, limits, record, now
        self.gone, self.later, self.seal = gone, later, _Seal(key)
        self.check_request, self.check_answer = check_request, check_answer
        # Dicts keep the order of insertion and time only grows, so the due ones stand in front.
        self.silent: dict[_Silent, float] = {}  # responses that have not begun → since when
        self.beats: OrderedDict[_Feed, float] = OrderedDict()  # streams → when a comment is due
        self.held: dict[_Feed, None] = {}  # streams whose reader is slow and whose notes wait
        self._owners: dict[str, Owner] = {}

    def owner(self, principal: str) -> Owner:
        """The owner of calls without a session. Made once: a frozen dataclass costs 0.4 us."""
        found = self._owners.get(principal)
        if found is None:
            if len(self._owners) >= 1000:  # with oauth anybody's subject is a principal
                self._owners.clear()
            found = self._owners[principal] = Owner(principal)
        return found

    def wake(self, now: float) -> None:
        self.now = now
        while self.silent:
            waiter, since = next(iter(self.silent.items()))
            if now - since < _SLOW:
                break
            del self.silent[waiter]
            waiter.slow()
        while self.beats:
            feed, due = next(iter(self.beats.items()))
            if due > now:
                break
            self.beats[feed] = now + _BEAT
            self.beats.move_to_end(feed)
            feed.beat()
        for feed in tuple(self.held):
            feed.flush()


class _Silent(Protocol):
    """A response that has not begun."""

    def slow(self) -> None: ...


class _Feed:
    """One event stream on the wire.

    A slow reader harms itself alone: while it stalls, progress and log messages wait here, 1 MiB at
    most, and the oldest are dropped (DESIGN, One event loop). What must arrive is always written;
    Http bounds that by cutting a reader that takes nothing for 30 s."""

    __slots__ = ("edge", "reply", "size", "waiting")

    def __init__(self, edge: _Edge, reply: Reply, headers: Sequence[tuple[str, str]] = ()) -> None:
        self.edge, self.reply = edge, reply
        self.waiting: deque[bytes] | None = None
        self.size = 0
        reply.head(200, (*SSE_HEADERS, *headers))
        edge.beats[self] = edge.now + _BEAT

    def write(self, frame: bytes) -> None:
        """Send what must arrive, after the notes that wait."""
        if self.waiting:
            self._release()
        self.reply.write(frame)

    def note(self, frame: bytes) -> None:
        """Send what may be lost when the reader is slow."""
        if not self.waiting and not self.reply.stalled:
            self.reply.write(frame)
            return
        if self.waiting is None:
            self.waiting = deque()
        self.waiting.append(frame)
        self.size += len(frame)
        while self.size > _HELD and self.waiting:
            self.size -= len(self.waiting.popleft())
            self.edge.record.count("notes_dropped")
        self.edge.held[self] = None

    def flush(self) -> None:
        if not self.reply.stalled:
            self._release()

    def _release(self) -> None:
        self.edge.held.pop(self, None)
        if self.waiting:
            self.reply.write(b"".join(self.waiting))
            self.waiting, self.size = None, 0

    def beat(self) -> None:
        if not self.reply.stalled:
            self.reply.write(sse_comment())

    def end(self) -> None:
        self._release()
        self.gone()
        self.reply.end()

    def gone(self) -> None:
        """Forget the stream: it has ended, or its client has gone."""
        self.reply.closed = None
        self.edge.beats.pop(self, None)
        self.edge.held.pop(self, None)


class _Caller:
    """A sink whose handle comes when `open` returns, while notes, asks and the end may come before."""

    __slots__ = ("early", "handle")

    def __init__(self) -> None:
        self.handle: Handle | None = None
        self.early: list[Callable[[Handle], None]] | None = None

    def enter(self, handle: Handle) -> None:
        """Take what `open` returned, and do what had to wait for it."""
        self.handle = handle
        if self.early is not None:
            early, self.early = self.early, None
            for act in early:
                act(handle)

    def act(self, act: Callable[[Handle], None]) -> None:
        """Do something with the handle, now or as soon as it is there."""
        if self.handle is not None:
            act(self.handle)
        elif self.early is None:
            self.early = [act]
        else:
            self.early.append(act)

    def cancel(self, reason: str) -> None:
        self.act(lambda handle: handle.cancel(reason))


# ---- Asks: what may be asked, and what is an answer ----


def _undeclared(method: str, params: dict[str, Json], declared: Json) -> dict[str, Json] | None:
    """The capabilities that a client would need for this ask, None if it declared them.

    Who did not declare `elicitation.url`, `sampling.tools` or `sampling.context` has not declared
    that kind (PROTOCOL, Joining); an empty `elicitation` means forms (2025-11-25, client/elicitation)."""
    if method == "elicitation/create":
        known = declared.get("elicitation")
        if params.get("mode") == "url":
            return (
                None if isinstance(known, dict) and "url" in known else {"elicitation": {"url": {}}}
            )
        if not isinstance(known, dict):
            return {"elicitation": {}}
        return {"elicitation": {"form": {}}} if "url" in known and "form" not in known else None
    if method == "sampling/createMessage":
        return _undeclared_sampling(params, declared.get("sampling"))
    if method == "roots/list":
        return None if isinstance(declared.get("roots"), dict) else {"roots": {}}
    return {}


def _undeclared_sampling(params: dict[str, Json], known: Json) -> dict[str, Json] | None:
    if not isinstance(known, dict):
        return {"sampling": {}}
    if ("tools" in params or "toolChoice" in params) and "tools" not in known:
        return {"sampling": {"tools": {}}}
    if params.get("includeContext", "none") != "none" and "context" not in known:
        return {"sampling": {"context": {}}}
    return None


def _refusal(ask: Ask, needed: dict[str, Json]) -> Outcome:
    """What a child is told whose ask the client cannot answer."""
    if not needed:
        return Outcome(error=Error(METHOD_NOT_FOUND, f"{ask.method}: no client knows this request"))
    kind, details = next(iter(needed.items()))
    name = ".".join((kind, *details))
    return Outcome(
        error=Error(METHOD_NOT_FOUND, f"{ask.method}: the client did not declare {name}")
    )


def _is_answer(method: str, value: Json) -> bool:
    """Whether `value` can be the client's result for `method`; what is none is asked for again."""
    if not isinstance(value, dict):
        return False
    if method == "elicitation/create":
        return value.get("action") in ("accept", "decline", "cancel")
    if method == "sampling/createMessage":
        return "role" in value and "content" in value
    return isinstance(value.get("roots"), list)


def _unanswered(ask: Ask) -> Outcome:
    """What a child is told when the client has not answered within `limits.park`."""
    if ask.method == "elicitation/create":
        return Outcome(result={"action": "cancel"})
    return Outcome(
        error=Error(
            INTERNAL_ERROR, f"{ask.method}: the client did not answer in time (limits.park)"
        )
    )


class _Seal:
    """Signs what clients carry for Atrax: session ids and `requestState`.

    A client can read a state but not make one. The call it belongs to (principal, endpoint, method,
    name, arguments) is no part of the text: it is mixed into the signature, so a state that is
    presented by another principal or with other arguments fails exactly as a forged one does."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def _mac(self, label: bytes, *parts: bytes) -> str:
        mac = hmac.new(self._key, label, "sha256")
        for part in parts:
            mac.update(b"%d:" % len(part))
            mac.update(part)
        return base64.urlsafe_b64encode(mac.digest()).rstrip(b"=").decode()

    def session(self, principal: str, endpoint: str) -> str:
        """A new session id: 128 random bits, and a signature that binds them to whose session it is."""
        name = secrets.token_urlsafe(16)
        mac = self._mac(b"session", name.encode(), principal.encode(), endpoint.encode())
        return f"{name}.{mac[:22]}"

    def state(self, content: list[Json], binding: bytes) -> str:
        """`content` as a `requestState` that only fits the call with this `binding`."""
        text = base64.urlsafe_b64encode(encode(content)).rstrip(b"=")
        return f"{text.decode()}.{self._mac(b'state', text, binding)}"

    def read(self, state: str, binding: bytes) -> list[Json] | None:
        """The content of a state; None if it is not ours, was altered, or belongs to another call."""
        text, _, mac = state.rpartition(".")
        if not text or not state.isascii():
            return None
        if not hmac.compare_digest(mac, self._mac(b"state", text.encode(), binding)):
            return None
        content: list[Json] = orjson.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        return content


def _binding(principal: str, endpoint: str, body: bytes) -> bytes:
    """A digest of what makes two requests the same call: all params but `_meta` and the retry's own.

    Taken from the bytes that came in, since the door may rewrite a call's params (the tool's name);
    and only where a state is made or read, so that other calls do not pay for it."""
    message = decode(body, sys.maxsize)
    params = message.get("params", {})
    salient = {
        key: params[key] for key in params if key not in ("_meta", "inputResponses", "requestState")
    }
    text = orjson.dumps(
        [principal, endpoint, message.get("method"), salient], option=orjson.OPT_SORT_KEYS
    )
    return hashlib.sha256(text).digest()


# ---- ModernClient ----

# Removed by 2026-07-28 (changelog; tasks: SEP-2663): 404 and -32601 here, though a legacy client may
# use them.
_REMOVED: Final = frozenset({
    "initialize", "ping", "logging/setLevel", "resources/subscribe", "resources/unsubscribe",
    "tasks/list", "tasks/result",
})  # fmt: skip
# What the header Mcp-Name mirrors (2026-07-28, basic/transports/streamable-http; the
# extension of tasks, PROTOCOL, Joining).
_NAMED_BY: Final = {
    "tools/call": "name", "prompts/get": "name", "resources/read": "uri",
    "tasks/get": "taskId", "tasks/update": "taskId", "tasks/cancel": "taskId",
}  # fmt: skip
_ERA_META: Final = (META_VERSION, META_CLIENT, META_CAPABILITIES, META_LOG_LEVEL, "progressToken")
_COMPLETE_HEAD: Final = b'{"resultType":"complete"'
_HTTP_STATUS: Final = {
    METHOD_NOT_FOUND: 404, HEADER_MISMATCH: 400, MISSING_CAPABILITY: 400, UNSUPPORTED_VERSION: 400,
}  # fmt: skip
_WRONG_TOKEN: Final = "params._meta.progressToken must be a string or an integer"
_WRONG_STATE: Final = "requestState was altered, has expired or belongs to another call; start the call again without it"


def _plain_header(value: str) -> str | None:
    """A header value with its base64 sentinel decoded, strictly; None if it is malformed.

    Lenient base64 would give one value many spellings, and a proxy could read another one than we."""
    if not (value.startswith("=?base64?") and value.endswith("?=") and len(value) >= 11):
        return value
    text = value[9:-2]
    try:
        data = base64.b64decode(text, validate=True)
        return data.decode() if base64.b64encode(data).decode() == text else None
    except ValueError:
        return None


def _climb(headers: Mapping[str, str], message: Request) -> dict[str, Json]:
    """The `_meta` of a modern request whose envelope is right; raises RpcError with HTTP status 400.

    1. `_meta` names a version (-32602): without it there is nothing to compare.
    2. The header names the same one (-32020): a proxy that routes by the header must not see
       another request than we do, whatever the version.
    3. It is ours (-32022).
    4. The other reserved members of `_meta` are what they must be (-32602).
    5. Mcp-Method (-32020). 6. Mcp-Name, where the body has what it mirrors (-32020).
    7. The method was not removed (-32601, 404): last, so that a client hears of its envelope first.
    Not rungs: params, which depend on the method, and Mcp-Param-*, which need the tool's schema;
    both are checked behind the door."""
    meta = message.params.get("_meta")
    version = meta.get(META_VERSION) if isinstance(meta, dict) else None
    if not isinstance(meta, dict) or not isinstance(version, str):
        raise RpcError(INVALID_PARAMS, f'params._meta["{META_VERSION}"] is missing', status=400)
    named = headers.get("mcp-protocol-version")
    if named != version:
        raise _mismatch("MCP-Protocol-Version", named, version)
    if version != MODERN:
        data = {"supported": [MODERN], "requested": version}
        raise RpcError(UNSUPPORTED_VERSION, f"Unsupported protocol version: {version}", data, 400)
    _check_meta(meta)
    if headers.get("mcp-method") != message.method:
        raise _mismatch("Mcp-Method", headers.get("mcp-method"), message.method)
    field = _NAMED_BY.get(message.method)
    if field is not None:
        _check_name(headers.get("mcp-name"), message.params.get(field))
    if message.method in _REMOVED:
        raise RpcError(METHOD_NOT_FOUND, f"Method not found: {message.method}", status=404)
    return meta


def _check_meta(meta: dict[str, Json]) -> None:
    """Rung 4 (2026-07-28, basic/index, Per-request protocol fields)."""
    if not isinstance(meta.get(META_CAPABILITIES), dict):
        raise RpcError(
            INVALID_PARAMS, f'params._meta["{META_CAPABILITIES}"] must be an object', status=400
        )
    client = meta.get(META_CLIENT, _NO_HEADERS)
    if client is not _NO_HEADERS and not (
        isinstance(client, dict)
        and isinstance(client.get("name"), str)
        and isinstance(client.get("version"), str)
    ):
        text = f'params._meta["{META_CLIENT}"] must be an object with "name" and "version"'
        raise RpcError(INVALID_PARAMS, text, status=400)
    if META_LOG_LEVEL in meta and meta[META_LOG_LEVEL] not in LOG_LEVELS:
        text = f'params._meta["{META_LOG_LEVEL}"] must be one of {", ".join(LOG_LEVELS)}'
        raise RpcError(INVALID_PARAMS, text, status=400)
    _check_token(meta)


def _check_token(meta: dict[str, Json]) -> None:
    """The progressToken of either era is a string or an integer."""
    token = meta.get("progressToken", "")
    if isinstance(token, bool) or not isinstance(token, (str, int)):
        raise RpcError(INVALID_PARAMS, _WRONG_TOKEN, status=400)


def _check_name(header: str | None, name: Json) -> None:
    """Rung 6. A body without a name fails later, in the check of its params."""
    if isinstance(name, str) and (header is None or _plain_header(header) != name):
        raise _mismatch("Mcp-Name", header, name)


def _mismatch(header: str, value: str | None, body: str) -> RpcError:
    said = "is missing" if value is None else f"says {value[:100]!r}"
    return RpcError(
        HEADER_MISMATCH, f"Header mismatch: {header} {said}, the body {body[:100]!r}", status=400
    )


def _mirrored(headers: Mapping[str, str]) -> Mapping[str, str]:
    """The Mcp-Param-* headers as they came. Most requests have none: one search instead of ten, 0.5 us."""
    if "mcp-param-" not in " ".join(headers):
        return _NO_HEADERS
    return {name: headers[name] for name in headers if name.startswith("mcp-param-")}


class ModernClient:
    """A client of 2026-07-28: every request stands alone (basic/transports/streamable-http)."""

    def __init__(self, edge: _Edge, wall: Callable[[], float]) -> None:
        self.edge, self.wall = edge, wall
        self.parking = _Parking(self)
        self.listens: dict[_ModernListen, None] = {}
        self.streaming: dict[_ModernCall, None] = {}  # calls whose response is an event stream

    def post(self, visit: _Visit) -> None:
        """One POST: a request is answered, a notification accepted, everything else refused."""
        try:
            message = read_message(visit.value)
            if isinstance(message, Response):
                text = "a modern client sends no responses: answer in `inputResponses` of a new request"
                raise RpcError(INVALID_REQUEST, text)
            if isinstance(message, Notice):
                # Ids of modern clients are not unique among them, so notifications/cancelled could
                # end somebody else's call: closing the response is how they cancel.
                visit.reply.full(202, (), b"")
                return
            self._request(visit, message)
        except RpcError as error:
            visit.refuse(error, 400 if error.status == 200 else error.status)

    def _request(self, visit: _Visit, message: Request) -> None:
        request, params, method = visit.request, message.params, message.method
        headers = request.headers
        meta = _climb(headers, message)
        token, level = meta.get("progressToken"), meta.get(META_LOG_LEVEL)
        call = Call(
            method, params, self.edge.owner(visit.principal), MODERN, visit.endpoint,
            meta[META_CAPABILITIES], meta.get(META_CLIENT), level, token is not None, "",
            _mirrored(headers), request.address,
        )  # fmt: skip
        for key in _ERA_META:
            meta.pop(key, None)
        if not meta:
            del params["_meta"]
        if method == "subscriptions/listen":
            _ModernListen(self, visit.reply, message.id).begin(call)
            return
        run = _ModernCall(self, visit, message.id, token, call)
        if method in _ASKABLE and ("requestState" in params or "inputResponses" in params):
            self.parking.retry(run, call)
        else:
            run.begin(call)

    def wake(self, now: float) -> None:
        self.parking.wake(now)

    def drop(self, principal: str) -> None:
        """End what `principal` has open: it is gone, or may do less than before."""
        for listen in [listen for listen in self.listens if listen.principal == principal]:
            listen.finish()
        for run in [run for run in self._running() if run.principal == principal]:
            run.stop("the principal may no longer use this")
        self.parking.drop(principal)

    def drain(self) -> None:
        """End the listens, each with its own result."""
        for listen in tuple(self.listens):
            listen.finish()

    def close(self) -> None:
        self.drain()
        for run in self._running():
            run.stop("Atrax is stopping")
        self.parking.close()

    def _running(self) -> list[_ModernCall]:
        """The calls whose response is open."""
        waiting = [waiter for waiter in self.edge.silent if isinstance(waiter, _ModernCall)]
        return [*waiting, *self.streaming]


class _ModernListen(_Caller):
    """A subscriptions/listen: an event stream at once, its id on every frame (basic/patterns/subscriptions)."""

    __slots__ = ("client", "feed", "ident", "over", "principal", "reply")

    def __init__(self, client: ModernClient, reply: Reply, ident: int | str) -> None:
        super().__init__()
        self.client, self.reply, self.ident = client, reply, ident
        self.principal = ""
        self.feed: _Feed | None = None
        self.over = False

    def begin(self, call: Call) -> None:
        self.principal = call.owner.principal
        self.client.listens[self] = None
        self.reply.closed = self._left
        self.enter(self.client.edge.door.open(call, self))
        if not self.over:
            self._stream()

    def _stream(self) -> _Feed:
        if self.feed is None:
            self.feed = _Feed(self.client.edge, self.reply)
        return self.feed

    def note(self, notice: Notice) -> None:
        if self.over or notice.method == "notifications/elicitation/complete":
            return
        meta = {**notice.params.get("_meta", {}), META_SUBSCRIPTION: self.ident}
        self._stream().write(
            sse_event(write_notice(Notice(notice.method, {**notice.params, "_meta": meta})))
        )

    def ask(self, ask: Ask) -> None:
        self.act(lambda handle: handle.answer(ask, _refusal(ask, {})))

    def done(self, outcome: Outcome) -> None:
        if self.over:
            return
        if outcome.error is None:
            self._end(self._result())
            return
        body = write_error(self.ident, outcome.error)
        if self.feed is None:
            self._forget()
            status = outcome.error.status
            status = _HTTP_STATUS.get(outcome.error.code, 200) if status == 200 else status
            self.reply.full(status, (*_JSON, *_retry_after(outcome.error)), body)
        else:
            self._end(body)

    def finish(self) -> None:
        """End the subscription on Atrax's own initiative, gracefully."""
        if not self.over:
            self._end(self._result())
            self.cancel("the subscription was ended by Atrax")

    def _result(self) -> bytes:
        return write_result(
            self.ident, encode({"resultType": "complete", "_meta": {META_SUBSCRIPTION: self.ident}})
        )

    def _end(self, body: bytes) -> None:
        self._forget()
        feed = self._stream()
        feed.write(sse_event(body))
        feed.end()

    def _left(self) -> None:
        self._forget()
        if self.feed is not None:
            self.feed.gone()
        self.cancel("the client closed the stream")

    def _forget(self) -> None:
        self.over = True
        self.client.listens.pop(self, None)


class _ModernCall(_Caller):
    """One call of a modern client, and the response that waits for it; retries bring new responses.

    `reply` is None while no response is open: parked, or over."""

    __slots__ = (
        "body", "client", "declared", "endpoint", "feed", "ident", "level", "method", "parked",
        "prefill", "principal", "refused", "reply", "retried", "token",
    )  # fmt: skip

    def __init__(
        self, client: ModernClient, visit: _Visit, ident: int | str, token: Json, call: Call
    ) -> None:
        self.handle = None
        self.early = None
        self.client, self.body = client, visit.request.body
        self.reply: Reply | None = visit.reply
        self.ident, self.token, self.level = ident, token, call.log_level
        self.method, self.principal, self.endpoint = call.method, visit.principal, visit.endpoint
        self.declared = call.capabilities
        self.prefill: dict[str, Json] | None = None  # `inputResponses` that came without a state
        self.retried = False
        self.refused: dict[str, Json] | None = None  # capabilities whose lack made us refuse asks
        self.parked: _Parked | None = None
        self.feed: _Feed | None = None

    def begin(self, call: Call) -> None:
        assert self.reply is not None
        self.reply.closed = self.left
        self.enter(self.client.edge.door.open(call, self))
        if self.reply is not None and self.feed is None:
            self.client.edge.silent[self] = self.client.edge.now

    def attach(self, other: _ModernCall) -> None:
        """Go on on the response of a retry; its own settings count from now on."""
        self.reply, self.ident = other.reply, other.ident
        self.token, self.level = other.token, other.level
        self.feed, self.retried = None, True
        assert self.reply is not None
        self.reply.closed = self.left
        self.client.edge.silent[self] = self.client.edge.now

    def slow(self) -> None:
        self._stream()

    def _stream(self) -> _Feed:
        if self.feed is None:
            assert self.reply is not None
            self.client.edge.silent.pop(self, None)
            self.client.streaming[self] = None
            self.feed = _Feed(self.client.edge, self.reply)
        return self.feed

    # ---- the sink ----

    def note(self, notice: Notice) -> None:
        """Notes belong to a response; what comes while the call is parked has nowhere to go."""
        method, params = notice.method, notice.params
        if method == "notifications/cancelled":
            if self.parked is not None:
                self.parked.taken_back(params.get("requestId"))
            return
        if self.reply is None or method == "notifications/elicitation/complete":
            return
        if method == "notifications/progress":
            if self.token is None:
                return
            notice = Notice(method, {**params, "progressToken": self.token})
        elif method == "notifications/message" and not _loud_enough(params, self.level):
            return
        self._stream().note(sse_event(write_notice(notice)))

    def ask(self, ask: Ask) -> None:
        """One ask of a child: refused, answered from what the client sent ahead, or parked."""
        needed = _undeclared(ask.method, ask.params, self.declared)
        if needed is not None:
            self._refuse(ask, needed)
        elif self.prefill is not None and self.fits(ask, self.prefill.get(ask.key)):
            self.answer(ask, Outcome(result=self.prefill.pop(ask.key)))
        elif self.reply is None and self.parked is None:
            text = f"{ask.method}: the client closed its response"
            self.answer(ask, Outcome(error=Error(INTERNAL_ERROR, text)))
        else:
            self.client.parking.ask(self, ask)

    def _refuse(self, ask: Ask, needed: dict[str, Json]) -> None:
        refused = self.refused = self.refused or {}
        for kind, detail in needed.items():
            refused[kind] = {**refused.get(kind, {}), **detail}
        self.answer(ask, _refusal(ask, needed))

    def fits(self, ask: Ask, value: Json) -> bool:
        """Whether `value` is an answer to `ask`; if not, it is asked for again."""
        if not _is_answer(ask.method, value):
            return False
        return self.client.edge.check_answer(ask.method, value, MODERN) is None

    def answer(self, ask: Ask, outcome: Outcome) -> None:
        self.act(lambda handle: handle.answer(ask, outcome))

    def done(self, outcome: Outcome) -> None:
        answer = self._answer(outcome)
        if self.parked is not None:
            self.parked.ended(answer)
        if self.reply is not None:
            self.give(answer)

    def give(self, answer: bytes | Error) -> None:
        """End the response by a result (its bytes) or an error."""
        if isinstance(answer, bytes):
            self._write(200, (), write_result(self.ident, answer))
            return
        status = _HTTP_STATUS.get(answer.code, 200) if answer.status == 200 else answer.status
        self._write(status, _retry_after(answer), write_error(self.ident, answer))

    def _write(self, status: int, headers: tuple[tuple[str, str], ...], body: bytes) -> None:
        reply, feed = self._detach()
        if feed is not None:
            feed.write(sse_event(body))
            feed.end()
        elif reply is not None:
            reply.full(status, (*_JSON, *headers) if headers else _JSON, body)

    def _detach(self) -> tuple[Reply | None, _Feed | None]:
        """Let go of the response, which is the caller's to end."""
        reply, feed = self.reply, self.feed
        if reply is not None:
            reply.closed = None
        self.reply, self.feed = None, None
        self.client.edge.silent.pop(self, None)
        if feed is not None:
            del self.client.streaming[self]
        return reply, feed

    # ---- outcomes, as a modern client reads them ----

    def _answer(self, outcome: Outcome) -> bytes | Error:
        error = outcome.error
        if self.refused is not None and (text := _failure(outcome)) is not None:
            # One ask was refused and the call failed: the client can mend that (CONFORMANCE, trap 1).
            return Error(MISSING_CAPABILITY, text, {"requiredCapabilities": self.refused}, 400)
        if error is not None:
            return self._error(error, outcome.place)
        if outcome.result is not None and outcome.result.get("resultType") == "input_required":
            return self._input_required(outcome.result, outcome.place)
        return self._result(outcome)

    def _error(self, error: Error, place: str) -> bytes | Error:
        code = error.code
        if code == LEGACY_URL_ELICITATION and self.method in _ASKABLE:
            requests = _url_elicitations(error.data)
            if requests:
                return self._ask_all(requests, ["urls", place])
        if code == LEGACY_RESOURCE_NOT_FOUND:
            return Error(INVALID_PARAMS, error.message, error.data, error.status)
        if code == CANCELLED or (-32099 <= code <= -32020 and code not in _HTTP_STATUS):
            # Reserved for the specification, which forbids what it does not define (Error Codes).
            return Error(INTERNAL_ERROR, error.message, error.data, error.status)
        return error

    def _input_required(self, result: dict[str, Json], place: str) -> bytes | Error:
        """A modern child's own questions, its state sealed in ours: the retry must find its process."""
        requests, state = result.get("inputRequests"), result.get("requestState")
        if self.method not in _ASKABLE:
            text = f"the server asked in answer to {self.method}, which MCP forbids"
            return Error(INTERNAL_ERROR, text)
        wrong = _wrong_question(requests, state)
        if wrong is not None:
            return wrong
        others = {
            key: result[key]
            for key in result
            if key not in ("resultType", "inputRequests", "requestState")
        }
        return self._ask_all(requests, ["child", place, state], others)

    def _ask_all(
        self,
        requests: dict[str, Json] | None,
        content: list[Json],
        others: Mapping[str, Json] = _NO_HEADERS,
    ) -> bytes | Error:
        """An `input_required` result, or -32021 if the client cannot be asked that."""
        lacking: dict[str, Json] = {}
        for item in (requests or {}).values():
            needed = _undeclared(item["method"], item.get("params", {}), self.declared)
            for kind, detail in (needed or {}).items():
                lacking[kind] = {**lacking.get(kind, {}), **detail}
        if lacking:
            text = f"the server asks for what the client did not declare: {', '.join(lacking)}"
            return Error(MISSING_CAPABILITY, text, {"requiredCapabilities": lacking}, 400)
        result = {"resultType": "input_required", **others}
        if requests is not None:
            result["inputRequests"] = requests
        result["requestState"] = self.state(content)
        return encode(result)

    def state(self, content: list[Json]) -> str:
        """`content` sealed for this call; it lives for `limits.park` seconds."""
        expiry = self.client.wall() + self.client.edge.limits.park
        return self.client.edge.seal.state(
            [round(expiry, 3), *content], _binding(self.principal, self.endpoint, self.body)
        )

    def _result(self, outcome: Outcome) -> bytes:
        """The bytes of a result, with the members that this era wants (server/utilities/caching)."""
        result, raw = outcome.result, outcome.raw
        cacheable = self.method in _CACHEABLE
        if not cacheable and raw is not None and (result is None or "resultType" not in result):
            return _spliced(_COMPLETE_HEAD, raw)
        have = result or {}
        want: dict[str, Json] = {"resultType": have.get("resultType", "complete")}
        if cacheable:
            own = outcome.ttl_ms if outcome.ttl_ms is not None else 0
            public = have.get("cacheScope", "public" if outcome.public else "private") == "public"
            # A child's `public` is meant for its own clients; ours differ in what they may see.
            public = public and (outcome.public or self.principal == _ANONYMOUS)
            want["ttlMs"] = 0 if self.retried else have.get("ttlMs", own)
            want["cacheScope"] = "public" if public else "private"
        if all(have.get(key) == value for key, value in want.items()):
            return raw if raw is not None else encode(result)
        if raw is not None and not any(key in have for key in want):
            return _spliced(encode(want)[:-1], raw)
        return encode({**have, **want})

    # ---- the end of the response ----

    def left(self) -> None:
        """The client closed the response: that cancels the call (Cancellation)."""
        self._let_go()
        self.cancel("the client closed the response")

    def stop(self, why: str) -> None:
        """End the call from our side, with a reason that the client can read."""
        if self.reply is not None:
            self.give(own_error(UNAVAILABLE, why, "stopped"))
        self._let_go()
        self.cancel(why)

    def give_way(self) -> None:
        """A repeated retry takes this response's place; the older one ends."""
        self.give(
            Error(INVALID_REQUEST, "a repeated retry took over this call; the answer goes there")
        )

    def _let_go(self) -> None:
        _, feed = self._detach()
        if feed is not None:
            feed.gone()
        if self.parked is not None:
            parked, self.parked = self.parked, None
            parked.asks.clear()
            self.client.parking.forget(parked)


def _loud_enough(params: dict[str, Json], level: str | None) -> bool:
    """Whether a log message reaches the level that was asked for; None asked for no messages."""
    return level is not None and _RANK.get(params.get("level", ""), 0) >= _RANK[level]


def _spliced(head: bytes, raw: bytes) -> bytes:
    """`raw`, one JSON object, with the members of `head` (an object's beginning) put in front."""
    if raw[0] != 0x7B:
        raw = raw.lstrip()
    rest = raw[1:] if raw[1:2] == b'"' else raw[1:].lstrip()
    return head + rest if rest == b"}" else b"%b,%b" % (head, rest)


def _failure(outcome: Outcome) -> str | None:
    """What a call that failed has to say; None if it did not fail."""
    if outcome.error is not None:
        return outcome.error.message
    result = outcome.result or {}
    if result.get("isError") is not True:
        return None
    content = result.get("content")
    texts = (
        [item.get("text") for item in content if isinstance(item, dict)]
        if isinstance(content, list)
        else []
    )
    return "\n".join(text for text in texts if isinstance(text, str)) or "the tool failed"


def _wrong_question(requests: Json, state: Json) -> Error | None:
    """What is wrong with a child's `input_required` result (InputRequiredResult)."""
    if requests is None and state is None:
        return Error(INTERNAL_ERROR, "the server sent input_required without any request or state")
    if not (requests is None or _are_requests(requests)) or not isinstance(
        state, (str, type(None))
    ):
        return Error(INTERNAL_ERROR, "the server sent an input_required result that is none")
    return None


def _are_requests(value: Json) -> bool:
    """Whether `value` is a map of asks (InputRequests)."""
    return isinstance(value, dict) and all(
        isinstance(item, dict)
        and isinstance(item.get("method"), str)
        and isinstance(item.get("params", {}), dict)
        for item in value.values()
    )


def _url_elicitations(data: Json) -> dict[str, Json]:
    """The asks of a -32042 error (2025-11-25, client/elicitation), for a modern client: without ids."""
    asked = data.get("elicitations") if isinstance(data, dict) else None
    found = [item for item in asked if isinstance(item, dict)] if isinstance(asked, list) else []
    return {
        f"elicitation-{number}": {
            "method": "elicitation/create",
            "params": _modern_ask("elicitation/create", item),
        }
        for number, item in enumerate(found, 1)
        if isinstance(item.get("url"), str)
    }


def _modern_ask(method: str, params: dict[str, Json]) -> dict[str, Json]:
    """The params of a legacy ask without what 2026-07-28 does not have."""
    params = {key: value for key, value in params.items() if key not in ("elicitationId", "task")}
    meta = params.get("_meta")
    if isinstance(meta, dict) and ("progressToken" in meta or META_TASK in meta):
        meta = {
            key: value for key, value in meta.items() if key not in ("progressToken", META_TASK)
        }
        params["_meta"] = meta
        if not meta:
            del params["_meta"]
    if method == "elicitation/create" and "url" in params:
        params.setdefault("mode", "url")
    return params


# ---- Parking ----
# A legacy child asks in the middle of a call and waits; a modern client can only be asked by ending
# its response. So the call outlives the response: it is parked, with the child's questions open.
#
#     RUNNING ──ask──► GATHERING ──5 ms──► PARKED ──retry──► RUNNING … ──done──► ENDED
#        response open                        none        the retry's response
#
# The client gets `input_required` with all questions of the round, and a `requestState` that names
# the parked call and the round. Its retry brings answers and a new response. What the retry may find:
# - PARKED, this round: its answers go to the child. What is missing (or is no answer) stays open and
#   is asked for again, in a new round, together with what the child asks meanwhile.
# - RUNNING, this round: the client repeated a retry that still runs, for want of an answer. The new
#   response takes over and the older one ends; the child has its answers already.
# - the round before: the answer was written but lost on the way. It is given again, from memory.
# - nothing: expired, cancelled by closing a response, or of another life of Atrax: -32602.
# So the child gets each answer once, however often the client calls. A round has no meaning beyond
# that, and nothing depends on the 5 ms: an ask that comes later is in the next round.
#
# Not all states name a parked call. A modern child keeps its own state with the client; it travels
# inside ours ("child"), with the process that made it. A legacy child's -32042 ends its call, so its
# retry is a new call ("urls").


class _Stage(enum.Enum):
    RUNNING = "a response is open and the child works"
    GATHERING = "a response is open and questions are being gathered"
    PARKED = "the client has the questions and no response is open"
    ENDED = "the answer is known, and is kept for repeated retries"


_MOVES: Final = {
    _Stage.RUNNING: (_Stage.GATHERING, _Stage.ENDED),
    _Stage.GATHERING: (_Stage.PARKED, _Stage.RUNNING, _Stage.ENDED),
    _Stage.PARKED: (_Stage.RUNNING, _Stage.ENDED),
    _Stage.ENDED: (),
}


class _Parked:
    """A call whose child asked; it is in the parking from its first ask until it is forgotten."""

    __slots__ = ("asks", "due", "given", "name", "parking", "round", "run", "size", "stage")

    def __init__(self, parking: _Parking, run: _ModernCall) -> None:
        self.parking, self.run = parking, run
        self.name = secrets.token_urlsafe(12)
        self.stage = _Stage.RUNNING
        self.round = 0  # the last round that the client was told of
        self.asks: dict[str, Ask] = {}  # open questions by key
        self.given: dict[
            int, bytes | Error
        ] = {}  # the last answer, by the round whose retry gets it
        self.due = 0.0
        self.size = 0

    def move(self, stage: _Stage) -> None:
        assert stage in _MOVES[self.stage], f"a parked call cannot go from {self.stage} to {stage}"
        self.stage = stage

    def add(self, ask: Ask) -> None:
        self.asks[ask.key] = ask
        if self.stage is _Stage.RUNNING:
            self._gather()

    def _gather(self) -> None:
        self.move(_Stage.GATHERING)
        self.parking.client.edge.later(_GATHER, self._gathered)

    def _gathered(self) -> None:
        """The 5 ms are over: end the response with the questions there are."""
        if self.stage is not _Stage.GATHERING:
            return
        if not self.asks:
            self.move(_Stage.RUNNING)
            return
        self.move(_Stage.PARKED)
        requests = {
            key: {"method": ask.method, "params": _modern_ask(ask.method, ask.params)}
            for key, ask in self.asks.items()
        }
        state = self.run.state(["parked", self.name, self.round + 1])
        answer = encode(
            {"resultType": "input_required", "inputRequests": requests, "requestState": state}
        )
        self.given = {self.round: answer}
        self.round += 1
        self.parking.extend(self)
        self.run.give(answer)

    def taken_back(self, key: Json) -> None:
        """The child cancelled its own ask: it leaves the round."""
        if isinstance(key, str):
            self.asks.pop(key, None)

    def retry(self, number: Json, other: _ModernCall, answers: dict[str, Json]) -> None:
        """`other` is a retry of round `number`: see the cases above."""
        if number in self.given:
            other.give(self.given[number])
        elif number != self.round:
            other.give(Error(INVALID_PARAMS, _WRONG_STATE))
        else:
            if self.stage is _Stage.PARKED:
                self.move(_Stage.RUNNING)
            else:
                self.run.give_way()
            self.run.attach(other)
            self.parking.extend(self)
            self._take(answers)

    def _take(self, answers: dict[str, Json]) -> None:
        """Pass on the answers there are; what is still open goes into a new round."""
        for key, ask in list(self.asks.items()):
            if self.run.fits(ask, answers.get(key)):
                del self.asks[key]
                self.run.answer(ask, Outcome(result=answers[key]))
        if self.asks and self.stage is _Stage.RUNNING:
            self._gather()

    def ended(self, answer: bytes | Error) -> None:
        self.move(_Stage.ENDED)
        self.asks.clear()
        self.run.body = b""  # only states need it, and no more of them are made
        self.given = {self.round: answer}
        self.parking.remember(self, len(answer) if isinstance(answer, bytes) else 1000)

    def expire(self, why: str) -> None:
        """Nobody will answer: the child hears so, then the call is cancelled (DESIGN, Parking)."""
        for ask in self.asks.values():
            self.run.answer(ask, _unanswered(ask))
        self.asks.clear()
        self.run.cancel(why)


class _Parking:
    """All parked calls of modern clients, bounded by owner, time, and bytes of remembered answers."""

    def __init__(self, client: ModernClient) -> None:
        self.client = client
        self.calls: OrderedDict[str, _Parked] = OrderedDict()  # by name; the first is due first
        self.counts: dict[str, int] = {}  # principal → its calls that have not ended
        self.remembered = 0  # bytes of answers of ended calls

    def ask(self, run: _ModernCall, ask: Ask) -> None:
        """Park `run` with one more question, or refuse the question where the owner has too many."""
        parked = run.parked
        if parked is None:
            limit, count = self.client.edge.limits.parked, self.counts.get(run.principal, 0)
            if count >= limit:
                text = f"{ask.method}: {count} calls of this client wait for answers already (limits.parked)"
                run.answer(ask, Outcome(error=Error(INTERNAL_ERROR, text)))
                return
            self.counts[run.principal] = count + 1
            parked = run.parked = _Parked(self, run)
            self.calls[parked.name] = parked
            self.extend(parked)
            self.client.edge.record.count("calls_parked")
        parked.add(ask)

    def extend(self, parked: _Parked) -> None:
        parked.due = self.client.edge.now + self.client.edge.limits.park
        self.calls.move_to_end(parked.name)

    def remember(self, parked: _Parked, size: int) -> None:
        """Keep the answer of an ended call for repeated retries; the oldest make room."""
        self._uncount(parked.run.principal)
        self.extend(parked)
        parked.size = size
        self.remembered += size
        while self.remembered > _ANSWERS_KEPT:
            oldest = next(item for item in self.calls.values() if item.stage is _Stage.ENDED)
            self.forget(oldest)

    def forget(self, parked: _Parked) -> None:
        if self.calls.pop(parked.name, None) is None:
            return
        if parked.stage is _Stage.ENDED:
            self.remembered -= parked.size
        else:
            self._uncount(parked.run.principal)

    def _uncount(self, principal: str) -> None:
        left = self.counts[principal] - 1
        if left:
            self.counts[principal] = left
        else:
            del self.counts[principal]

    def retry(self, run: _ModernCall, call: Call) -> None:
        """A request with `inputResponses`, `requestState` or both: what was asked is answered."""
        params = call.params
        answers, state = params.get("inputResponses", {}), params.get("requestState")
        if not isinstance(answers, dict):
            run.give(Error(INVALID_PARAMS, "params.inputResponses must be an object", status=400))
            return
        if "requestState" not in params:
            # No first round: a fresh call, and what the client sent ahead answers what fits (trap 4).
            run.prefill = dict(answers)
            run.begin(call)
            return
        content = self._read(run, state)
        if content is None:
            run.give(Error(INVALID_PARAMS, _WRONG_STATE))
            return
        kind = content[1]
        if kind == "parked":
            self._resume(run, content[2], content[3], answers)
        else:
            self._again(run, call, kind, content[2:], answers)

    def _read(self, run: _ModernCall, state: Json) -> list[Json] | None:
        """The content of a state that is genuine, this call's, and alive."""
        if not isinstance(state, str):
            return None
        content = self.client.edge.seal.read(state, _binding(run.principal, run.endpoint, run.body))
        return content if content is not None and content[0] >= self.client.wall() else None

    def _resume(self, run: _ModernCall, name: str, number: int, answers: dict[str, Json]) -> None:
        parked = self.calls.get(name)
        if parked is None:
            text = "this call has ended: it was cancelled, or expired (limits.park); start it again without requestState"
            run.give(Error(INVALID_PARAMS, text))
            return
        parked.retry(number, run, answers)

    def _again(
        self, run: _ModernCall, call: Call, kind: str, content: list[Json], answers: dict[str, Json]
    ) -> None:
        """A new call to the process that asked: with the child's own state, or after its URLs were visited."""
        params = call.params
        run.retried = True
        call.place = content[0]
        if kind == "child":
            params["requestState"] = content[1]
            if content[1] is None:
                del params["requestState"]
            run.begin(call)
            return
        del params["requestState"]
        params.pop("inputResponses", None)
        declined = [
            item
            for item in answers.values()
            if isinstance(item, dict) and item.get("action") != "accept"
        ]
        if declined:
            run.give(
                Error(
                    INTERNAL_ERROR, "the server needs the user to visit a URL, which was declined"
                )
            )
            return
        run.begin(call)

    def wake(self, now: float) -> None:
        while self.calls:
            parked = next(iter(self.calls.values()))
            if parked.due > now:
                break
            if parked.stage in (_Stage.RUNNING, _Stage.GATHERING):
                self.extend(parked)  # its client is here; the server's own timeouts bound it
                continue
            self._expire(parked, "the client did not answer within limits.park")

    def _expire(self, parked: _Parked, why: str) -> None:
        self.forget(parked)
        if parked.stage is _Stage.PARKED:
            self.client.edge.record.emit(
                "call.expired",
                message=f"a parked call ended: {why}",
                principal=parked.run.principal,
            )
            parked.run.parked = None
            parked.expire(why)

    def drop(self, principal: str) -> None:
        for parked in [item for item in self.calls.values() if item.run.principal == principal]:
            self._expire(parked, "its principal changed")

    def close(self) -> None:
        for parked in tuple(self.calls.values()):
            self._expire(parked, "Atrax is stopping")


# ---- A legacy client's session ----

_OWN: Final = frozenset(
    {"ping", "logging/setLevel", "resources/subscribe", "resources/unsubscribe"}
)
_STREAM_ID: Final = re.compile(r"([0-9]{1,9})-([0-9]{1,9})")
_MODERN_ONLY: Final = frozenset({"resultType", "ttlMs", "cacheScope"})
_MODERN_META: Final = frozenset({
    META_VERSION, META_CLIENT, META_CAPABILITIES, META_LOG_LEVEL, META_SERVER, META_SUBSCRIPTION,
})  # fmt: skip
# What a request of a later version is to an earlier one, by the first version that has it.
_CONTENT_SINCE: Final = {"audio": "2025-03-26", "resource_link": "2025-06-18"}


class _Session:
    """One legacy client's session. What few sessions need is made when it is needed: 20,000 may live."""

    __slots__ = (
        "asks", "calls", "capabilities", "endpoint", "ident", "info", "kept", "level",
        "listening", "number", "owner", "pipe", "size", "streams", "used", "version",
    )  # fmt: skip

    def __init__(self, ident: str, owner: Owner, endpoint: str, version: str, now: float) -> None:
        self.ident, self.owner, self.endpoint, self.version = ident, owner, endpoint, version
        self.capabilities: dict[str, Json] = {}
        self.info: dict[str, Json] | None = None
        self.level: str | None = None  # what logging/setLevel said
        self.used = now
        self.number = 0  # of the last stream or ask
        self.calls: dict[_LegacyCall, None] = {}
        self.asks: dict[str, _Asked] | None = (
            None  # our requests to the client that wait, by their id
        )
        self.streams: dict[int, _EventStream] | None = None
        self.kept: deque[tuple[_EventStream, int, bytes]] | None = (
            None  # the resumption store's part
        )
        self.size = 0  # bytes of it
        self.listening: _Listening | None = None
        self.pipe: _Pipe | None = None  # the one stream of the 2024-11-05 transport

    def next(self) -> int:
        self.number += 1
        return self.number

    def call(self, method: str, params: dict[str, Json]) -> Call:
        """A call of this session."""
        return Call(
            method, params, self.owner, self.version, self.endpoint, self.capabilities, self.info,
            self.level, any_output=False,
        )  # fmt: skip

    def listen(self, client: LegacyClient) -> _Listening:
        if self.listening is None:
            self.listening = _Listening(client, self)
        return self.listening

    def busy(self) -> bool:
        """Whether somebody waits for something: a call runs, or a stream is connected."""
        if self.calls or self.pipe is not None:
            return True
        return self.streams is not None and any(
            stream.feed is not None for stream in self.streams.values()
        )


# ---- Resumption ----
# An event stream of a session outlives its connection. Each event has an id, STREAM-EVENT, unique in
# the session, and is kept; a GET with Last-Event-ID names the stream and gets what came after, on
# that stream alone, and then whatever is still to come. Stream 0 is the GET's own, for what belongs
# to no call. A 2025-11-25 stream begins with an id and empty data, so that the client can come back
# even if nothing else arrived; earlier clients would try to parse that, and get ids with the events.
#
# What is kept is bounded in bytes and events per session and in bytes over all; the oldest go first.
# A stream whose last event is gone cannot be fetched: that is 400 and not 404, which would tell the
# client that its session is dead. A finished stream is kept until it is fetched (or the bounds take
# it), and one that was delivered a minute longer, since a write does not mean that it was read.


class _Store:
    """The events of all sessions' streams that may have to be sent again."""

    def __init__(self) -> None:
        self.size = 0
        self.sessions: OrderedDict[_Session, None] = (
            OrderedDict()
        )  # those that have events, oldest first

    def keep(self, session: _Session, stream: _EventStream, number: int, frame: bytes) -> None:
        if session.kept is None:
            session.kept = deque()
        if not session.kept:
            self.sessions[session] = None
        session.kept.append((stream, number, frame))
        session.size += len(frame)
        self.size += len(frame)
        while session.size > _KEPT or len(session.kept) > _KEPT_EVENTS:
            self._drop(session)
        while self.size > _KEPT_ALL:
            self._drop(next(iter(self.sessions)))

    def _drop(self, session: _Session) -> None:
        assert session.kept is not None
        stream, number, frame = session.kept.popleft()
        session.size -= len(frame)
        self.size -= len(frame)
        if not session.kept:
            del self.sessions[session]
        if stream.over and number == stream.last and session.streams is not None:
            session.streams.pop(stream.number, None)

    def after(self, session: _Session, stream: _EventStream, number: int) -> list[bytes]:
        return [frame for which, at, frame in session.kept or () if which is stream and at > number]

    def forget(self, session: _Session, stream: _EventStream | None = None) -> None:
        """Drop the events of a stream, or of all."""
        if not session.kept:
            return
        left = deque(item for item in session.kept if stream is not None and item[0] is not stream)
        size = sum(len(frame) for _, _, frame in left)
        self.size -= session.size - size
        session.kept, session.size = left or None, size
        if not left:
            del self.sessions[session]


class _EventStream:
    """One event stream of a legacy client: of a POST, or (number 0) the session's own.

    Without a session there is nowhere to come back to: then it has no ids and nothing is kept."""

    __slots__ = ("client", "feed", "last", "lost", "number", "over", "session")

    def __init__(self, client: LegacyClient, session: _Session | None, number: int) -> None:
        self.client, self.session, self.number = client, session, number
        self.last = 0  # the number of the last event
        self.feed: _Feed | None = None
        self.over = False
        self.lost: Callable[[], None] | None = (
            None  # called when the client goes from a stream without a session
        )
        if session is not None:
            if session.streams is None:
                session.streams = {}
            session.streams[number] = self

    def open(self, reply: Reply) -> None:
        self._connect(reply)
        if self.session is not None and self.session.version >= "2025-11-25":
            assert self.feed is not None
            self.feed.write(
                b"id: %d-%d\nretry: %d\ndata: \n\n" % (self.number, self.last, _RETRY_MS)
            )

    def resume(self, reply: Reply, number: int) -> None:
        """Send what came after event `number`, then go on here; an older connection ends."""
        assert self.session is not None
        frames = self.client.store.after(self.session, self, number)
        self._connect(reply)
        assert self.feed is not None
        if frames:
            self.feed.write(b"".join(frames))
        if self.over:
            self._finish()

    def _connect(self, reply: Reply) -> None:
        if self.feed is not None:
            self.feed.end()
        self.feed = _Feed(self.client.edge, reply)
        reply.closed = self._left

    def _frame(self, message: bytes) -> bytes:
        if self.session is None:
            return sse_event(message)
        self.last += 1
        frame = sse_event(message, f"{self.number}-{self.last}")
        self.client.store.keep(self.session, self, self.last, frame)
        return frame

    def send(self, message: bytes) -> None:
        frame = self._frame(message)
        if self.feed is not None:
            self.feed.write(frame)

    def note(self, message: bytes) -> None:
        frame = self._frame(message)
        if self.feed is not None:
            self.feed.note(frame)

    def end(self) -> None:
        """Nothing comes after this; what was not delivered waits."""
        self.over = True
        if self.feed is not None:
            self._finish()

    def _finish(self) -> None:
        assert self.feed is not None
        self.feed.end()
        self.feed = None
        if self.session is not None:
            self.client.lingering[self] = self.client.edge.now + _LINGER

    def _left(self) -> None:
        if self.feed is not None:
            self.feed.gone()
            self.feed = None
        if self.lost is not None:
            self.lost()

    def forget(self) -> None:
        """End it for good: nothing of it can be fetched any more."""
        self.over = True
        if self.feed is not None:
            self.feed.end()
            self.feed = None
        self.client.lingering.pop(self, None)
        if self.session is not None:
            self.client.store.forget(self.session, self)
            if self.session.streams is not None:
                self.session.streams.pop(self.number, None)


# ---- A legacy client's calls, and where their messages go ----


class _Outlet(Protocol):
    """The way from a call to its legacy client."""

    def reaches(self) -> bool: ...  # whether an ask could be read, now or later
    def send(self, message: bytes) -> None: ...
    def note(self, message: bytes) -> None: ...
    def answer(
        self, message: bytes | None, error: Error | None = None
    ) -> None: ...  # None: cancelled


class _Post:
    """The response of one POST: JSON if only answers come, else an event stream; an array for a batch."""

    __slots__ = ("answers", "client", "pending", "reply", "session", "stream")

    def __init__(
        self, client: LegacyClient, session: _Session | None, reply: Reply, pending: int = 1
    ) -> None:
        self.client, self.session = client, session
        self.reply: Reply | None = (
            reply  # None: the response has begun or ended, or the client has gone
        )
        self.stream: _EventStream | None = None
        self.pending = pending  # answers that have not come
        self.answers: list[bytes] | None = None  # of a batch
        reply.closed = self._left

    def reaches(self) -> bool:
        if self.stream is None:
            return self.reply is not None
        return self.session is not None or self.stream.feed is not None

    def slow(self) -> None:
        self._begin()

    def _begin(self) -> _EventStream | None:
        """The event stream, begun if it was not; None if the client left before it had an event id."""
        reply, session = self.reply, self.session
        if reply is not None:
            self.client.edge.silent.pop(self, None)
            self.reply = None
            number = session.next() if session is not None else 0
            self.stream = stream = _EventStream(self.client, session, number)
            stream.open(reply)
            stream.lost = self._abandoned if session is None else None
            for answer in self.answers or ():
                stream.send(answer)
        return self.stream

    def send(self, message: bytes) -> None:
        stream = self._begin()
        if stream is not None:
            stream.send(message)

    def note(self, message: bytes) -> None:
        stream = self._begin()
        if stream is not None:
            stream.note(message)

    def answer(self, message: bytes | None, error: Error | None = None) -> None:
        self.pending -= 1
        if self.stream is not None:
            self._answer_stream(self.stream, message)
        elif self.reply is not None:
            if self.answers is not None and message is not None:
                self.answers.append(message)
            if self.pending == 0:
                self._answer_plain(self.reply, message, error)

    def _answer_stream(self, stream: _EventStream, message: bytes | None) -> None:
        last = self.pending == 0
        if message is None and last and self.answers is None:
            stream.forget()  # cancelled: there is nothing to come back for
            return
        if message is not None:
            stream.over = last
            stream.send(message)
        if last:
            stream.end()

    def _answer_plain(self, reply: Reply, message: bytes | None, error: Error | None) -> None:
        self.reply = reply.closed = None
        self.client.edge.silent.pop(self, None)
        if self.answers:
            reply.full(200, _JSON, b"[%b]" % b",".join(self.answers))
        elif message is None:
            # Cancelled: an event stream without a response (2025-11-25, basic/utilities/cancellation).
            reply.head(200, SSE_HEADERS)
            reply.end()
        else:
            status, headers = _legacy_head(error)
            reply.full(status, headers, message)

    def _left(self) -> None:
        """The client closed a response that has not begun. No event id was sent, so the answer is lost."""
        self.client.edge.silent.pop(self, None)
        self.reply = None
        self._abandoned()

    def _abandoned(self) -> None:
        # In a session closing does not cancel (2025-11-25, transports); without one nobody could.
        for call in [call for call in self.client.lone if call.outlet is self]:
            call.drop("the client closed the response of a call without a session")


class _Pipe:
    """The stream of the 2024-11-05 transport: everything for the client goes there."""

    __slots__ = ("feed",)

    def __init__(self, feed: _Feed) -> None:
        self.feed = feed

    def reaches(self) -> bool:
        return True

    def send(self, message: bytes) -> None:
        self.feed.write(sse_event(message))

    def note(self, message: bytes) -> None:
        self.feed.note(sse_event(message))

    def answer(self, message: bytes | None, error: Error | None = None) -> None:
        if message is not None:
            self.send(message)


def _legacy_head(error: Error | None) -> tuple[int, tuple[tuple[str, str], ...]]:
    """Status and headers of a JSON response: 200 for errors too, but those that HTTP has words for."""
    if error is None or error.status not in (403, 429, 503):
        return 200, _JSON
    return error.status, (*_JSON, *_retry_after(error))


class _Asked:
    """One request of ours that a legacy client has not answered."""

    __slots__ = ("ask", "call", "ident", "session", "token")

    def __init__(
        self, session: _Session, call: _LegacyCall, ask: Ask, ident: str, token: Json
    ) -> None:
        self.session, self.call, self.ask, self.ident = session, call, ask, ident
        self.token = (
            token  # the progressToken that the child gave; the client gets our id in its place
        )


class _LegacyCall(_Caller):
    """One call of a legacy client: asks go out as requests on its stream.

    A modern child asks by ending the call with `input_required`: then its requests are asked here, and
    the call is made again with the answers, ten times at most. The first request's bytes are kept for
    that, since the door may rewrite a call's params."""

    __slots__ = (
        "answers", "body", "client", "ident", "method", "outlet", "over", "place", "rounds", "session",
        "state", "token", "version", "visit", "wanted",
    )  # fmt: skip

    def __init__(
        self,
        outlet: _Outlet,
        session: _Session | None,
        visit: _Visit,
        body: bytes,
        ident: int | str,
    ) -> None:
        self.handle = None
        self.early = None
        self.outlet, self.session, self.visit, self.body = outlet, session, visit, body
        self.ident, self.token = ident, None
        self.over = False
        self.rounds = 0
        self.wanted: set[str] | None = (
            None  # keys of inputRequests not answered yet; None: no round
        )

    def begin(self, client: LegacyClient, call: Call, token: Json) -> None:
        self.client, self.token = client, token
        self.method, self.version = call.method, call.version
        calls = client.lone if self.session is None else self.session.calls
        calls[self] = None
        self.enter(client.edge.door.open(call, self))

    # ---- the sink ----

    def note(self, notice: Notice) -> None:
        if self.over:
            return
        method, params = notice.method, notice.params
        if method == "notifications/progress":
            if self.token is None:
                return
            notice = Notice(method, {**params, "progressToken": self.token})
        elif method == "notifications/message":
            level = self.session.level if self.session is not None else None
            if not _loud_enough(params, level or "info"):
                return
        elif method == "notifications/cancelled":
            self._taken_back(params.get("requestId"))
            return
        elif method == "notifications/elicitation/complete" and self.version < "2025-11-25":
            return
        self.outlet.note(write_notice(notice))

    def ask(self, ask: Ask) -> None:
        session = self.session
        declared = session.capabilities if session is not None else {}
        needed = _undeclared(ask.method, ask.params, declared)
        if needed is not None:
            self.answered(ask, _refusal(ask, needed))
        elif session is None or self.over or not self.outlet.reaches():
            text = f"{ask.method}: the client cannot be reached any more"
            self.answered(ask, Outcome(error=Error(INTERNAL_ERROR, text)))
        else:
            self._relay(session, ask)

    def _relay(self, session: _Session, ask: Ask) -> None:
        ident = f"atrax-{session.next()}"
        params, token = _legacy_ask(ask, ident, self.version)
        asked = _Asked(session, self, ask, ident, token)
        if session.asks is None:
            session.asks = {}
        session.asks[ident] = asked
        self.client.asked[asked] = self.client.edge.now + self.client.edge.limits.park
        self.outlet.send(write_request(ident, ask.method, params))

    def answered(self, ask: Ask, outcome: Outcome) -> None:
        """The client's answer, or why there is none: on to the child, or into the next round."""
        if self.wanted is None:
            self.act(lambda handle: handle.answer(ask, outcome))
        elif ask.key in self.wanted:
            self._collect(self.wanted, ask, outcome)

    def _asked(self) -> list[_Asked]:
        asks = self.session.asks if self.session is not None else None
        return [asked for asked in asks.values() if asked.call is self] if asks else []

    def _taken_back(self, key: Json) -> None:
        """The child cancelled its own ask: so do we."""
        for asked in self._asked():
            if asked.ask.key == key:
                self.client.forget_ask(asked)
                params = {"requestId": asked.ident}
                self.outlet.send(write_notice(Notice("notifications/cancelled", params)))

    def done(self, outcome: Outcome) -> None:
        if self.over:
            return
        result, error = outcome.result, outcome.error
        if error is not None:
            self.fail(_legacy_error(error, self.method))
        elif result is not None and result.get("resultType") == "input_required":
            self._round(result, outcome.place)
        else:
            raw = _legacy_result(outcome, self.method, self.version)
            self._finish(write_result(self.ident, raw), None)

    def fail(self, error: Error) -> None:
        self._finish(write_error(self.ident, error), error)

    def _finish(self, message: bytes | None, error: Error | None) -> None:
        self.over = True
        session = self.session
        if session is None:
            self.client.lone.pop(self, None)
        else:
            session.calls.pop(self, None)
            if session.asks:
                for asked in self._asked():
                    self.client.forget_ask(asked)
        self.outlet.answer(message, error)

    def drop(self, why: str) -> None:
        """Cancelled: its POST ends without a response."""
        if not self.over:
            self._finish(None, None)
            self.cancel(why)

    def stop(self, why: str) -> None:
        """Ended by Atrax, which says so to the client."""
        if not self.over:
            self.fail(own_error(UNAVAILABLE, why, "stopped"))
            self.cancel(why)

    # ---- rounds with a modern child ----

    def _round(self, result: dict[str, Json], place: str) -> None:
        requests, state = result.get("inputRequests"), result.get("requestState")
        self.rounds += 1
        if self.rounds > _ROUNDS:
            text = f"the server asked for input in {_ROUNDS} rounds and wants more; the call is given up"
            self.fail(Error(INTERNAL_ERROR, text))
            return
        wrong = _wrong_question(requests, state)
        if wrong is not None:
            self.fail(wrong)
            return
        self.answers: dict[str, Json] = {}
        self.state, self.place = state, place
        if not requests:
            # Only a state: the server wants to be called again, and not at once by everybody.
            pause = _PAUSE[0] + (_PAUSE[1] - _PAUSE[0]) * secrets.randbelow(100) / 100
            self.client.edge.later(pause, self._again)
            return
        self.wanted = set(requests)
        for key, item in requests.items():
            if not self.over:
                self.ask(Ask(key, item["method"], item.get("params", {})))

    def _collect(self, wanted: set[str], ask: Ask, outcome: Outcome) -> None:
        """One answer of this round. `inputResponses` cannot carry an error (PROTOCOL, Joining)."""
        result = outcome.result
        if outcome.error is not None:
            if ask.method != "elicitation/create":
                self.fail(outcome.error)
                return
            result = {"action": "cancel"}
        wanted.discard(ask.key)
        self.answers[ask.key] = result
        if not wanted:
            self.wanted = None
            self._again()

    def _again(self) -> None:
        if self.over:
            return
        message = read_message(decode(self.body, sys.maxsize))
        assert isinstance(message, Request)
        call = self.client.call(message, self.session, self.version, self.visit)
        assert isinstance(call, Call)  # it was one the first time
        call.progress, call.place = self.token is not None, self.place
        if self.answers:
            call.params["inputResponses"] = self.answers
        if self.state is not None:
            call.params["requestState"] = self.state
        self.handle = None
        self.enter(self.client.edge.door.open(call, self))


class _Initialize(_Caller):
    """An `initialize` under way: a server/discover for the middle. The session is made when it succeeds."""

    __slots__ = ("client", "ident", "over", "reply", "session")

    def __init__(
        self, client: LegacyClient, reply: Reply | None, ident: int | str, session: _Session
    ) -> None:
        super().__init__()
        self.client, self.ident, self.session = client, ident, session
        self.reply = (
            reply  # None: it came over the 2024-11-05 transport, whose session is there already
        )
        self.over = False
        if reply is not None:
            reply.closed = self._left

    def _left(self) -> None:
        self.over = True
        self.cancel("the client closed the response")

    def note(self, notice: Notice) -> None:
        """Nothing belongs to an initialize that a client could read before its result."""

    def ask(self, ask: Ask) -> None:
        self.act(lambda handle: handle.answer(ask, _refusal(ask, {})))

    def done(self, outcome: Outcome) -> None:
        if self.over:
            return
        self.over = True
        error = outcome.error
        if error is None and self.reply is not None:
            error = self.client.admit(self.session)
        if error is not None:
            self._give(write_error(self.ident, error), error)
            return
        result = outcome.result if outcome.result is not None else decode(outcome.raw or b"{}")
        form = _initialize_result(result, self.session.version)
        self._give(write_result(self.ident, encode(form)), None)

    def _give(self, body: bytes, error: Error | None) -> None:
        if self.reply is not None:
            self.reply.closed = None
            status, headers = _legacy_head(error)
            if error is None:
                headers = (*headers, ("Mcp-Session-Id", self.session.ident))
            self.reply.full(status, headers, body)
        elif self.session.pipe is not None:
            self.session.pipe.send(body)


# ---- What a session listens to ----


class _SessionListen(_Caller):
    """One subscriptions/listen of a session; `batch`: the subscribes that wait for its acknowledgement."""

    __slots__ = ("batch", "due", "listening", "over")

    def __init__(self, listening: _Listening, batch: list[_Subscribe], due: float) -> None:
        super().__init__()
        self.listening, self.batch, self.due = listening, batch, due
        self.over = False

    def note(self, notice: Notice) -> None:
        if self.over:
            return
        if notice.method == "notifications/subscriptions/acknowledged":
            honoured = notice.params.get("notifications", {}).get("resourceSubscriptions", ())
            self.listening.acknowledged(self, frozenset(honoured))
        elif self is self.listening.current:
            self.listening.client.tell(self.listening.session, notice)

    def ask(self, ask: Ask) -> None:
        self.act(lambda handle: handle.answer(ask, _refusal(ask, {})))

    def done(self, outcome: Outcome) -> None:
        if not self.over:
            self.over = True
            self.listening.ended(self, outcome.error)

    def stop(self, why: str) -> None:
        if not self.over:
            self.over = True
            self.cancel(why)


# The URI, the id of the request, and where its answer goes.
_Subscribe: TypeAlias = "tuple[str, int | str, _Outlet]"


class _Listening:
    """What a session hears of: one listen behind the GET stream and all of its resource subscriptions.

    A listen's filter cannot be changed. So a subscribe opens a new listen with the whole filter, and
    the old one is cancelled when the new one is acknowledged: nothing is missed, nothing comes twice,
    since only the current one is heard. Subscribes that come meanwhile share the next one."""

    __slots__ = ("client", "current", "opening", "session", "stale", "uris", "waiting")

    def __init__(self, client: LegacyClient, session: _Session) -> None:
        self.client, self.session = client, session
        self.uris: dict[str, None] = {}
        self.current: _SessionListen | None = None
        self.opening: _SessionListen | None = None
        self.waiting: list[_Subscribe] = []
        self.stale = False  # the filter shrank while a listen was being opened

    def start(self) -> None:
        if self.current is None and self.opening is None:
            self._open()

    def subscribe(self, uri: str, ident: int | str, outlet: _Outlet) -> None:
        if len(self.uris) + len(self.waiting) >= _SUBSCRIPTIONS:
            text = f"this session has {_SUBSCRIPTIONS} subscriptions already; unsubscribe from some"
            outlet.answer(write_error(ident, Error(INTERNAL_ERROR, text)))
            return
        self.waiting.append((uri, ident, outlet))
        if self.opening is None:
            self._open()

    def unsubscribe(self, uri: str) -> None:
        if uri in self.uris:
            del self.uris[uri]
            self.stale = True
            if self.opening is None:
                self._open()

    def _open(self) -> None:
        edge, session = self.client.edge, self.session
        batch, self.waiting, self.stale = self.waiting, [], False
        wanted: dict[str, Json] = dict(_LIST_CHANGED)
        uris = list(dict.fromkeys((*self.uris, *(uri for uri, _, _ in batch))))
        if uris:
            wanted["resourceSubscriptions"] = uris
        call = session.call("subscriptions/listen", {"notifications": wanted})
        self.opening = listen = _SessionListen(self, batch, edge.now + _LINGER)
        self.client.opening[listen] = None
        listen.enter(edge.door.open(call, listen))

    def acknowledged(self, listen: _SessionListen, honoured: frozenset[str]) -> None:
        if listen is not self.opening:
            return
        self.client.opening.pop(listen, None)
        old, self.current, self.opening = self.current, listen, None
        for uri, ident, outlet in listen.batch:
            if uri in honoured:
                self.uris[uri] = None
                outlet.answer(write_result(ident, b"{}"))
            else:
                text = "no server here offers subscriptions to this resource"
                error = Error(LEGACY_RESOURCE_NOT_FOUND, text, {"uri": uri})
                outlet.answer(write_error(ident, error), error)
        if old is not None:
            old.stop("a listen with another filter took its place")
        if self.waiting or self.stale:
            self._open()

    def ended(self, listen: _SessionListen, error: Error | None) -> None:
        """A listen ended that we did not stop: its subscribes fail, what stands is opened again later."""
        self.client.opening.pop(listen, None)
        if listen is self.opening:
            self.opening = None
            failed, self.waiting = [*listen.batch, *self.waiting], []
            problem = error or own_error(UNAVAILABLE, "subscriptions have ended here", "ended")
            for _, ident, outlet in failed:
                outlet.answer(write_error(ident, problem), problem)
        elif listen is self.current:
            self.current = None
        if self.current is None and self.opening is None:
            self.client.reopen[self] = self.client.edge.now + _SLOW

    def late(self, listen: _SessionListen) -> None:
        """No acknowledgement came in time."""
        listen.stop("it was not acknowledged in time")
        text = "the subscription was not acknowledged in time"
        self.ended(listen, own_error(TIMED_OUT, text, "timeout"))

    def close(self) -> None:
        """Stop listening; subscribes that wait end as cancelled calls do."""
        self.client.reopen.pop(self, None)
        open_now = [listen for listen in (self.current, self.opening) if listen is not None]
        unanswered, self.waiting = list(self.waiting), []
        if self.opening is not None:
            unanswered += self.opening.batch
        self.current, self.opening = None, None
        for listen in open_now:
            self.client.opening.pop(listen, None)
            listen.stop("the session ended")
        for _, _, outlet in unanswered:
            outlet.answer(None)


# ---- LegacyClient ----


class LegacyClient:
    """A client of 2024-11-05 to 2025-11-25: sessions, streams that can be resumed, requests both ways.

    A request without a session id is served as the specification assumes it (2025-03-26, or the
    version its header names): stateless clients and curl work. What needs a session (responses,
    logging/setLevel, subscriptions, GET, DELETE) is 400 without one."""

    def __init__(self, edge: _Edge) -> None:
        self.edge = edge
        self.store = _Store()
        self.sessions: OrderedDict[str, _Session] = OrderedDict()  # the longest unused first
        self.lone: dict[_LegacyCall, None] = {}  # calls without a session
        self.asked: dict[
            _Asked, float
        ] = {}  # our requests → when they expire; the first is due first
        self.lingering: OrderedDict[_EventStream, float] = OrderedDict()
        self.opening: dict[_SessionListen, None] = {}
        self.reopen: dict[_Listening, float] = {}
        self._serial = 0

    # ---- HTTP ----

    def post(self, visit: _Visit) -> None:
        """One POST of the streamable transport; raises HttpError."""
        value, reply = visit.value, visit.reply
        if isinstance(value, dict) and value.get("method") == "initialize" and "id" in value:
            self._initialize(visit)
            return
        session = self._session_of(visit)
        version = self._version_of(visit.request, session)
        if isinstance(value, list):
            self._batch(visit, session, version, value)
            return
        try:
            message = read_message(value)
        except RpcError as error:
            visit.refuse(error)
            return
        if isinstance(message, Request):
            post = _Post(self, session, reply)
            self._request(message, post, session, version, visit, visit.request.body)
            if post.reply is not None:
                self.edge.silent[post] = self.edge.now
            return
        if session is None and isinstance(message, Response):
            raise HttpError(400, "a response belongs to a session: send Mcp-Session-Id")
        if session is not None:
            self._incoming(session, message)
        reply.full(202, (), b"")

    def get(self, visit: _Visit) -> None:
        """The session's own stream, or one that broke (Last-Event-ID); raises HttpError."""
        _check_get(visit.request.headers)
        session = self._needed_session(visit)
        last = visit.request.headers.get("last-event-id")
        if last:
            self._resume(session, visit.reply, last)
        else:
            # A second GET takes over: the first may be a connection that broke without a word, and a
            # 409 would lock its client out until that shows.
            standing = self._standing(session) or _EventStream(self, session, 0)
            standing.open(visit.reply)
        session.listen(self).start()

    def delete(self, visit: _Visit) -> None:
        """The end of a session; raises HttpError."""
        self.end(self._needed_session(visit), "the client ended it")
        visit.reply.full(200, (), b"")

    def sse(self, visit: _Visit) -> None:
        """The 2024-11-05 transport: this stream is the session, and ends with it; raises HttpError."""
        _check_get(visit.request.headers)
        endpoint = visit.endpoint
        session = self._new_session(visit.principal, endpoint, LEGACY[0])
        error = self.admit(session)
        if error is not None:
            raise HttpError(503, error.message, _retry_after(error))
        feed = _Feed(self.edge, visit.reply)
        session.pipe = _Pipe(feed)
        visit.reply.closed = lambda: self.end(session, "the client closed its stream")
        path = f"/servers/{endpoint}/messages" if endpoint else "/messages"
        feed.write(sse_event(f"{path}?sessionId={session.ident}".encode(), "", "endpoint"))

    def messages(self, visit: _Visit) -> None:
        """A POST of the 2024-11-05 transport: accepted; what it brings about comes on the stream."""
        pairs = (pair.partition("=") for pair in visit.request.query.split("&"))
        named = next((value for name, _, value in pairs if name == "sessionId"), "")
        session = self._find(named, visit)
        if session is None or session.pipe is None:
            raise HttpError(404, "there is no such session here: open a new stream at /sse")
        try:
            message = read_message(visit.value)
        except RpcError as error:
            visit.refuse(error)
            return
        visit.reply.full(202, (), b"")
        if not isinstance(message, Request):
            self._incoming(session, message)
        elif message.method == "initialize":
            self._discover(message, None, session, visit)
        else:
            self._request(
                message, session.pipe, session, session.version, visit, visit.request.body
            )

    # ---- sessions ----

    def _find(self, ident: str, visit: _Visit) -> _Session | None:
        """The session of that id, if it is this principal's and was made at this endpoint.

        Another principal's is as if it did not exist: its id must tell nobody anything."""
        session = self.sessions.get(ident)
        if session is None or session.endpoint != visit.endpoint:
            return None
        if session.owner.principal != visit.principal:
            return None
        session.used = self.edge.now
        self.sessions.move_to_end(ident)
        return session

    def _session_of(self, visit: _Visit) -> _Session | None:
        """The session that the request names, None if it names none; raises HttpError 404."""
        ident = visit.request.headers.get("mcp-session-id")
        if ident is None:
            return None
        session = self._find(ident, visit)
        if session is None:
            raise HttpError(
                404, "this session has ended or is not of this endpoint; initialize anew"
            )
        return session

    def _needed_session(self, visit: _Visit) -> _Session:
        session = self._session_of(visit)
        if session is None:
            raise HttpError(400, "this needs a session: initialize one, then send Mcp-Session-Id")
        self._version_of(visit.request, session)
        return session

    def _version_of(self, request: HttpRequest, session: _Session | None) -> str:
        """The version in use; raises HttpError 400 for one that the header names and nobody knows."""
        named = request.headers.get("mcp-protocol-version")
        if named is not None and named not in LEGACY:
            known = ", ".join((*LEGACY, MODERN))
            raise HttpError(400, f"unknown MCP-Protocol-Version {named[:40]!r}; known are {known}")
        if session is not None:
            return session.version
        return named or WITHOUT_SESSION

    def _new_session(self, principal: str, endpoint: str, version: str) -> _Session:
        # The owner's name of the session is a number: the id is a secret, and owners show up in logs.
        self._serial += 1
        owner = Owner(principal, str(self._serial))
        ident = self.edge.seal.session(principal, endpoint)
        return _Session(ident, owner, endpoint, version, self.edge.now)

    def admit(self, session: _Session) -> Error | None:
        """Enter `session`, the longest idle one ending where there are too many; the error if all are in use."""
        if len(self.sessions) >= self.edge.limits.sessions and not self._make_room():
            text = "too many sessions, all of them in use (limits.sessions)"
            error = own_error(OVERLOADED, text, "sessions", retryAfter=30)
            error.status = 503
            return error
        self.sessions[session.ident] = session
        return None

    def _make_room(self) -> bool:
        # 1,000 at most: what is busy moves to the end, so the next attempt looks further.
        for _ in range(min(len(self.sessions), 1000)):
            oldest = next(iter(self.sessions.values()))
            if not oldest.busy():
                self.end(oldest, "limits.sessions was reached, and it was idle for longest")
                return True
            oldest.used = self.edge.now
            self.sessions.move_to_end(oldest.ident)
        return False

    def end(self, session: _Session, why: str) -> None:
        """End a session: its calls are cancelled, its streams closed, its id is unknown from now on."""
        if self.sessions.pop(session.ident, None) is None:
            return
        principal = session.owner.principal
        self.edge.record.emit("session.ended", "debug", message=why, principal=principal)
        if session.listening is not None:
            session.listening.close()
        for call in tuple(session.calls):
            call.drop("the session ended")
        for stream in tuple((session.streams or {}).values()):
            stream.forget()
        self.store.forget(session)
        if session.pipe is not None:
            pipe, session.pipe = session.pipe, None
            pipe.feed.end()
        self.edge.gone(session.owner)

    def _initialize(self, visit: _Visit) -> None:
        try:
            message = read_message(visit.value)
        except RpcError as error:
            visit.refuse(error)
            return
        assert isinstance(message, Request)
        session = self._new_session(visit.principal, visit.endpoint, LATEST_LEGACY)
        self._discover(message, visit.reply, session, visit)

    def _discover(
        self, message: Request, reply: Reply | None, session: _Session, visit: _Visit
    ) -> None:
        """Read the params of an initialize into `session` and ask the middle what there is."""
        params, opening = message.params, _Initialize(self, reply, message.id, session)
        asked = params.get("protocolVersion")
        if asked in LEGACY:
            session.version = asked
        error = _wrong_initialize(params) or self.edge.check_request(
            "initialize", params, session.version
        )
        if error is not None:
            opening.done(Outcome(error=error))
            return
        session.capabilities = _declared(params["capabilities"], session.version)
        session.info = params["clientInfo"]
        call = session.call("server/discover", {})
        call.address = visit.request.address
        opening.enter(self.edge.door.open(call, opening))

    # ---- messages ----

    def _batch(
        self, visit: _Visit, session: _Session | None, version: str, items: list[Json]
    ) -> None:
        """A batch: 2025-03-26 alone has them (its basic/index), never with initialize."""
        problem = _wrong_batch(items, version)
        if problem is not None:
            visit.refuse(problem)
            return
        messages = [_read(item) for item in items]
        count = sum(isinstance(message, (Request, bytes)) for message in messages)
        post = _Post(self, session, visit.reply, count)
        post.answers = []
        for item, message in zip(items, messages, strict=True):
            if isinstance(message, Request):
                self._request(message, post, session, version, visit, encode(item))
            elif isinstance(message, bytes):
                post.answer(message)
            elif session is not None:
                self._incoming(session, message)
        if count == 0:
            post.reply = visit.reply.closed = None
            visit.reply.full(202, (), b"")
        elif post.reply is not None:
            self.edge.silent[post] = self.edge.now

    def _request(
        self, message: Request, outlet: _Outlet, session: _Session | None, version: str,
        visit: _Visit, body: bytes,
    ) -> None:  # fmt: skip
        """One request: answered here where it is about the session, else a call."""
        ident = message.id
        meta = message.params.get("_meta")
        token = meta.get("progressToken") if isinstance(meta, dict) else None
        call = self.call(message, session, version, visit)
        if isinstance(call, Error):
            outlet.answer(write_error(ident, call), call)
        elif message.method not in _OWN:
            _LegacyCall(outlet, session, visit, body, ident).begin(self, call, token)
        elif (error := self._own(call, ident, outlet, session)) is not None:
            outlet.answer(write_error(ident, error), error)

    def _own(
        self, call: Call, ident: int | str, outlet: _Outlet, session: _Session | None
    ) -> Error | None:
        """What concerns the session alone. ping and setLevel answer exactly {} (CONFORMANCE, trap 9)."""
        method, params = call.method, call.params
        error = self.edge.check_request(method, params, call.version)
        if error is not None:
            return error
        if session is None and method != "ping":
            return Error(INVALID_REQUEST, f"{method} needs a session: initialize one first")
        if session is None or method == "ping":
            outlet.answer(write_result(ident, b"{}"))
            return None
        if method == "logging/setLevel":
            if params.get("level") not in LOG_LEVELS:
                return Error(INVALID_PARAMS, f"params.level must be one of {', '.join(LOG_LEVELS)}")
            session.level = params["level"]
        elif not isinstance(params.get("uri"), str):
            return Error(INVALID_PARAMS, "params.uri must be a string")
        elif method == "resources/subscribe":
            session.listen(self).subscribe(params["uri"], ident, outlet)
            return None
        elif session.listening is not None:
            session.listening.unsubscribe(params["uri"])
        outlet.answer(write_result(ident, b"{}"))
        return None

    def call(
        self, message: Request, session: _Session | None, version: str, visit: _Visit
    ) -> Call | Error:
        """The canonical form of a request: its `_meta` without what belongs to an era."""
        params, progress = message.params, False
        if "_meta" in params:
            meta = params["_meta"]
            if not isinstance(meta, dict):
                return Error(INVALID_PARAMS, "params._meta must be an object")
            token = meta.get("progressToken", "")
            if isinstance(token, bool) or not isinstance(token, (str, int)):
                return Error(INVALID_PARAMS, _WRONG_TOKEN)
            progress = "progressToken" in meta
            for key in _ERA_META:
                meta.pop(key, None)
            if not meta:
                del params["_meta"]
        if session is not None:
            call = session.call(message.method, params)
        else:
            owner = self.edge.owner(visit.principal)
            call = Call(message.method, params, owner, version, visit.endpoint, any_output=False)
        call.progress, call.address = progress, visit.request.address
        return call

    def _incoming(self, session: _Session, message: Notice | Response) -> None:
        """A notification, or the answer to an ask of ours. What belongs to nothing any more is ignored."""
        if isinstance(message, Response):
            asked = session.asks.get(str(message.id)) if session.asks else None
            if asked is not None and asked.ident == message.id:
                self.forget_ask(asked)
                asked.call.answered(asked.ask, self._answer_of(session, asked.ask, message))
        elif message.method == "notifications/cancelled":
            self._cancel(session, message.params)
        elif message.method == "notifications/progress":
            self._progress(session, message.params)
        elif message.method == "notifications/roots/list_changed":
            self._pass_on(session, message)
        elif message.method == "notifications/initialized" and session.pipe is not None:
            session.listen(self).start()

    def _answer_of(self, session: _Session, ask: Ask, message: Response) -> Outcome:
        """A client's response to an ask, as the child may have it."""
        if message.error is not None:
            return Outcome(error=message.error)
        wrong = self.edge.check_answer(ask.method, message.result, session.version)
        return Outcome(result=message.result) if wrong is None else Outcome(error=wrong)

    def _cancel(self, session: _Session, params: dict[str, Json]) -> None:
        ident, reason = params.get("requestId"), params.get("reason")
        if isinstance(ident, bool) or not isinstance(ident, (int, str)):
            return
        # Few calls are in flight in one session. The newest: ids should not be used twice, but may be.
        call = next((call for call in reversed(session.calls) if call.ident == ident), None)
        if call is not None:
            call.drop(reason if isinstance(reason, str) else "the client cancelled it")

    def _progress(self, session: _Session, params: dict[str, Json]) -> None:
        """A client's progress on an ask of ours, back under the child's own token."""
        token = params.get("progressToken")
        asked = session.asks.get(token) if session.asks and isinstance(token, str) else None
        if asked is not None and asked.token is not None:
            notice = Notice("notifications/progress", {**params, "progressToken": asked.token})
            asked.call.act(lambda handle: handle.note(notice))

    def _pass_on(self, session: _Session, notice: Notice) -> None:
        """To everything of the session that may know its child."""
        ways: list[_Caller] = list(session.calls)
        if session.listening is not None and session.listening.current is not None:
            ways.append(session.listening.current)
        for way in ways:
            way.act(lambda handle: handle.note(notice))

    # ---- asks and streams ----

    def forget_ask(self, asked: _Asked) -> None:
        self.asked.pop(asked, None)
        if asked.session.asks is not None:
            asked.session.asks.pop(asked.ident, None)

    def _standing(self, session: _Session) -> _EventStream | None:
        return session.streams.get(0) if session.streams is not None else None

    def tell(self, session: _Session, notice: Notice) -> None:
        """What belongs to no call goes to the session's own stream; before the first GET there is none."""
        if notice.method == "notifications/elicitation/complete" and session.version < "2025-11-25":
            return
        stream = session.pipe or self._standing(session)
        if stream is not None:
            stream.send(write_notice(notice))

    def _resume(self, session: _Session, reply: Reply, last: str) -> None:
        match = _STREAM_ID.fullmatch(last)
        stream = (session.streams or {}).get(int(match[1])) if match is not None else None
        if match is None or stream is None or int(match[2]) > stream.last:
            raise HttpError(400, "nothing is kept of this stream any more; send the request again")
        stream.resume(reply, int(match[2]))

    # ---- time, and the end ----

    def wake(self, now: float) -> None:
        while self.asked:
            asked, due = next(iter(self.asked.items()))
            if due > now:
                break
            self._expire(asked)
        while self.lingering:
            stream, due = next(iter(self.lingering.items()))
            if due > now:
                break
            stream.forget()
        for listen in [listen for listen in self.opening if listen.due <= now]:
            listen.listening.late(listen)
        for listening in [listening for listening, due in self.reopen.items() if due <= now]:
            del self.reopen[listening]
            listening.start()
        self._end_idle(now)

    def _expire(self, asked: _Asked) -> None:
        """`limits.park` has passed: the child hears so, and the client that we wait no more."""
        self.forget_ask(asked)
        cancelled = Notice("notifications/cancelled", {"requestId": asked.ident})
        asked.call.outlet.send(write_notice(cancelled))
        asked.call.answered(asked.ask, _unanswered(asked.ask))

    def _end_idle(self, now: float) -> None:
        while self.sessions:
            session = next(iter(self.sessions.values()))
            if now - session.used < self.edge.limits.session_idle:
                break
            if session.busy():
                session.used = now
                self.sessions.move_to_end(session.ident)
            else:
                self.end(session, "it was idle for limits.session_idle")

    def drop(self, principal: str) -> None:
        """End the sessions of a principal that is gone, or may do less than before."""
        sessions = self.sessions.values()
        for session in [item for item in sessions if item.owner.principal == principal]:
            self.end(session, "its principal changed")
        for call in [call for call in self.lone if call.visit.principal == principal]:
            call.stop("the principal may no longer use this")

    def drain(self) -> None:
        """End the streams that would never end by themselves; calls in flight go on."""
        for session in self.sessions.values():
            if session.listening is not None:
                session.listening.close()
            standing = self._standing(session)
            if standing is not None:
                standing.forget()

    def close(self) -> None:
        for session in tuple(self.sessions.values()):
            for call in tuple(session.calls):
                call.stop("Atrax is stopping")
            self.end(session, "Atrax is stopping")
        for call in tuple(self.lone):
            call.stop("Atrax is stopping")


# ---- What legacy versions know ----


def _wrong_initialize(params: dict[str, Json]) -> Error | None:
    """What `initialize` cannot do without, whatever the version."""
    wanted = {"protocolVersion": str, "capabilities": dict, "clientInfo": dict}
    if all(isinstance(params.get(name), kind) for name, kind in wanted.items()):
        return None
    text = "initialize needs protocolVersion (a string), capabilities and clientInfo (objects)"
    return Error(INVALID_PARAMS, text)


def _wrong_batch(items: list[Json], version: str) -> Error | None:
    if version != "2025-03-26":
        return Error(INVALID_REQUEST, f"{version} has no batches: send one message per POST")
    if not 0 < len(items) <= _BATCH:
        return Error(INVALID_REQUEST, f"a batch holds 1 to {_BATCH} messages")
    if any(isinstance(item, dict) and item.get("method") == "initialize" for item in items):
        return Error(INVALID_REQUEST, "initialize cannot be part of a batch")
    return None


def _read(item: Json) -> Request | Notice | Response | bytes:
    """A batch's message, or the error response of one that is none."""
    try:
        return read_message(item)
    except RpcError as error:
        return write_error(_ident(item), Error(error.code, str(error), error.data))


def _declared(capabilities: dict[str, Json], version: str) -> dict[str, Json]:
    """Client capabilities in today's words: before 2025-11-25 `sampling` included context."""
    sampling = capabilities.get("sampling")
    if version < "2025-11-25" and isinstance(sampling, dict) and "context" not in sampling:
        return {**capabilities, "sampling": {**sampling, "context": {}}}
    return capabilities


def _initialize_result(discovered: dict[str, Json], version: str) -> dict[str, Json]:
    """A DiscoverResult as an InitializeResult."""
    meta = discovered.get("_meta")
    info = meta.get(META_SERVER) if isinstance(meta, dict) else None
    result = {
        "protocolVersion": version,
        "capabilities": discovered.get("capabilities", {}),
        "serverInfo": info if isinstance(info, dict) else {"name": "atrax", "version": VERSION},
    }
    if isinstance(discovered.get("instructions"), str):
        result["instructions"] = discovered["instructions"]
    return result


def _legacy_ask(ask: Ask, ident: str, version: str) -> tuple[dict[str, Json], Json]:
    """The params of an ask as this version has them, and the child's own progress token."""
    params, token = dict(ask.params), None
    meta = params.get("_meta")
    if isinstance(meta, dict) and "progressToken" in meta:
        token = meta["progressToken"]
        params["_meta"] = {**meta, "progressToken": ident}
    if ask.method == "elicitation/create":
        if params.get("mode") == "url":
            params.setdefault(
                "elicitationId", ident
            )  # a modern child has none, the version wants one
        elif version < "2025-11-25":
            params.pop("mode", None)
    return params, token


def _legacy_error(error: Error, method: str) -> Error:
    """An error as legacy versions have it: -32002 for a missing resource (2025-11-25, server/resources)."""
    if error.code == CANCELLED:
        return Error(INTERNAL_ERROR, error.message)
    missing = isinstance(error.data, dict) and "uri" in error.data
    if missing and error.code == INVALID_PARAMS and method == "resources/read":
        return Error(LEGACY_RESOURCE_NOT_FOUND, error.message, error.data, error.status)
    return error


def _legacy_result(outcome: Outcome, method: str, version: str) -> bytes:
    """The bytes of a result: the child's own where nothing has to change."""
    result = outcome.result
    if result is None:
        return outcome.raw or b"{}"
    form = _without_modern(result)
    if method in ("tools/call", "tasks/result"):
        form = _tool_result(form, version)
    elif method == "prompts/get" and version < "2025-06-18":
        form = _prompt_result(form, version)
    return outcome.raw if form is result and outcome.raw is not None else encode(form)


def _without_modern(result: dict[str, Json]) -> dict[str, Json]:
    """`result` itself, or a copy without the members that only 2026-07-28 has."""
    if not _MODERN_ONLY.isdisjoint(result):
        result = {key: value for key, value in result.items() if key not in _MODERN_ONLY}
    meta = result.get("_meta")
    if isinstance(meta, dict) and not _MODERN_META.isdisjoint(meta):
        meta = {key: value for key, value in meta.items() if key not in _MODERN_META}
        result = {**result, "_meta": meta}
        if not meta:
            del result["_meta"]
    return result


def _tool_result(result: dict[str, Json], version: str) -> dict[str, Json]:
    """Content kinds that the version lacks as text; `structuredContent` that is no object too."""
    content = result.get("content")
    if isinstance(content, list) and version < "2025-06-18":
        known = [_known_content(item, version) for item in content]
        if any(new is not old for new, old in zip(known, content, strict=True)):
            result = {**result, "content": known}
    if "structuredContent" in result and not isinstance(result["structuredContent"], dict):
        result = dict(result)
        text = encode(result.pop("structuredContent")).decode()
        content = result.get("content")
        blocks = content if isinstance(content, list) else []
        if not any(
            isinstance(item, dict) and _same_json(item.get("text"), text) for item in blocks
        ):
            blocks = [*blocks, {"type": "text", "text": text}]
        result["content"] = blocks
    return result


def _same_json(text: Json, other: str) -> bool:
    """Whether a text block already holds the JSON `other` (servers SHOULD add it themselves)."""
    try:
        return isinstance(text, str) and encode(decode(text.encode())) == other.encode()
    except (InvalidJson, ValueError):
        return False


def _prompt_result(result: dict[str, Json], version: str) -> dict[str, Json]:
    messages = result.get("messages")
    if not isinstance(messages, list):
        return result
    known = [
        {**item, "content": _known_content(item["content"], version)}
        if isinstance(item, dict) and "content" in item else item
        for item in messages
    ]  # fmt: skip
    return result if known == messages else {**result, "messages": known}


def _known_content(item: Json, version: str) -> Json:
    """A content block, or a text that says what it was."""
    kind = item.get("type") if isinstance(item, dict) else None
    since = _CONTENT_SINCE.get(kind) if isinstance(kind, str) else None
    if since is None or version >= since:
        return item
    if kind == "audio":
        text = f"[audio, {item.get('mimeType', 'of unknown type')}: this client's version of MCP has no audio]"
    else:
        text = f"[resource {item.get('name', '')}: {item.get('uri', '')}]"
    return {"type": "text", "text": text}


# ---- The era of a request ----


def _is_modern(headers: Mapping[str, str], value: Json) -> bool:
    """The era of a request: the one place that knows both. `value` is the decoded body, None without one."""
    if headers.get("mcp-protocol-version") == MODERN:
        return True
    params = value.get("params") if isinstance(value, dict) else None
    meta = params.get("_meta") if isinstance(params, dict) else None
    return isinstance(meta, dict) and META_VERSION in meta


class Clients:
    """The client edge: every HTTP request to an MCP path, to the class of its era."""

    def __init__(
        self,
        door: Door,
        limits: Limits,
        record: Record,
        clock: Callable[[], float],
        key: bytes,
        gone: Callable[[Owner], None],
        later: Callable[[float, Callable[[], None]], object],
        check_request: _Check = _unchecked,
        check_answer: _Check = _unchecked,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`key` signs session ids and states; `gone` hears of ended sessions; the checks are Policy's, for
        requests that are answered here and for answers to asks; `wall`: seconds since the epoch."""
        self._edge = _Edge(
            door, limits, record, clock(), key, gone, later, check_request, check_answer
        )
        self.modern, self.legacy = ModernClient(self._edge, wall), LegacyClient(self._edge)

    def adopt(self, door: Door, limits: Limits) -> None:
        """Go on with another door and other limits (a reload); sessions and parked calls stay."""
        self._edge.door, self._edge.limits = door, limits

    def handle(self, request: HttpRequest, reply: Reply, principal: str, endpoint: str) -> None:
        """/mcp and /servers/NAME/mcp; raises HttpError."""
        method, visit = request.method, _Visit(request, reply, principal, endpoint)
        if method == "POST":
            if self._read_body(visit):
                modern = _is_modern(request.headers, visit.value)
                (self.modern if modern else self.legacy).post(visit)
        elif method not in ("GET", "DELETE"):
            raise HttpError(
                405, f"{method} is not for this path", (("Allow", "GET, POST, DELETE"),)
            )
        elif _is_modern(request.headers, None):
            raise HttpError(405, f"{MODERN} has no {method}: send POST", (("Allow", "POST"),))
        elif method == "GET":
            self.legacy.get(visit)
        else:
            self.legacy.delete(visit)

    def sse(self, request: HttpRequest, reply: Reply, principal: str, endpoint: str) -> None:
        """GET /sse of the 2024-11-05 transport; raises HttpError."""
        if request.method != "GET":
            raise HttpError(405, "this path is an event stream: send GET", (("Allow", "GET"),))
        self.legacy.sse(_Visit(request, reply, principal, endpoint))

    def messages(self, request: HttpRequest, reply: Reply, principal: str, endpoint: str) -> None:
        """POST /messages of the 2024-11-05 transport; raises HttpError."""
        if request.method != "POST":
            raise HttpError(405, "this path takes messages: send POST", (("Allow", "POST"),))
        visit = _Visit(request, reply, principal, endpoint)
        if self._read_body(visit):
            self.legacy.messages(visit)

    def _read_body(self, visit: _Visit) -> bool:
        """Decode the body; False when it was no JSON and was answered so. Raises HttpError 415, 406."""
        _check_post(visit.request.headers)
        try:
            visit.value = decode(visit.request.body, self._edge.limits.depth)
        except InvalidJson as error:
            visit.refuse(Error(PARSE_ERROR, f"Parse error: {error}"))
            return False
        return True

    def wake(self, now: float) -> None:
        """What time alone brings about: slow responses, comments, expiry. About every 0.2 s."""
        self._edge.wake(now)
        self.modern.wake(now)
        self.legacy.wake(now)

    def counts(self) -> dict[str, int]:
        """What is open here, for /status: sessions, parked calls, listens."""
        return {
            "sessions": len(self.legacy.sessions),
            "parked": sum(self.modern.parking.counts.values()),
            "listens": len(self.modern.listens),
        }

    def drop(self, principal: str) -> None:
        """End all that a principal has here: it is gone, expired, or may do less than before."""
        self.modern.drop(principal)
        self.legacy.drop(principal)

    def drain(self) -> None:
        """End what would never end by itself: listens with their own result, sessions' own streams."""
        self.modern.drain()
        self.legacy.drain()

    def close(self) -> None:
        """End everything. Calls in flight are answered or cancelled, sessions are gone."""
        self.modern.close()
        self.legacy.close()
# ==== Catalogue ===================================================================
# What all servers offer: read from them, merged, renamed, encoded once for everybody.
# Knows names, lists and pages. Must not know processes or eras: a server is up or down, no more.
#
# A server's list is *read* whole (`_Reading`), kept as its *stock* (`_Stock`: what its own rules
# let through), and merged into a *listing* per endpoint (`_Listing`; "" is /mcp), which is what
# clients see. Each is made again whole when its input changed, never mended: that costs 3 ms for
# 500 tools, seldom, and a look-up is one get in a dict that is complete. An Entry whose definition
# did not change stays the same object, so what others cached on it stays, and "has the visible list
# changed?" is a comparison of object identities.
#
# Who does not know a name yet, waits: `_seek` holds attempts that are made again whenever something
# moved, until they settle or their time is over.

_METHODS: Final = {
    Kind.TOOLS: "tools/list",
    Kind.PROMPTS: "prompts/list",
    Kind.RESOURCES: "resources/list",
    Kind.TEMPLATES: "resources/templates/list",
}
_KIND_OF: Final = {method: kind for kind, method in _METHODS.items()}
_CAPABILITY: Final = {
    Kind.TOOLS: "tools",
    Kind.PROMPTS: "prompts",
    Kind.RESOURCES: "resources",
    Kind.TEMPLATES: "resources",
}
_KEY: Final = {
    Kind.TOOLS: "name",
    Kind.PROMPTS: "name",
    Kind.RESOURCES: "uri",
    Kind.TEMPLATES: "uriTemplate",
}
_NOUN: Final = {
    Kind.TOOLS: "tool",
    Kind.PROMPTS: "prompt",
    Kind.RESOURCES: "resource",
    Kind.TEMPLATES: "resource template",
}
_LISTED_BY_URI: Final = (Kind.RESOURCES, Kind.TEMPLATES)
_MCP: Final = ""  # the endpoint of all servers

_FIRST_WAIT: Final = 2.0  # seconds that a list on /mcp waits for servers in their first start
_FRESH_MS: Final = 60_000  # how long a list counts as fresh whose server does not say
_READ_GAP: Final = (
    0.2  # seconds between two readings: a flood of list_changed costs no more than this
)
_REFRESH_GAP: Final = 1.0  # the same for re-reading behind answers, where a server says ttlMs 0
_READ_AGAIN: Final = (0.5, 30.0)  # first and longest pause after a list that could not be read
_MOST_PAGES: Final = 1_000  # of one upstream list; past it a server invents cursors
_MOST_ITEMS: Final = 50_000  # of one upstream list
_MOST_WAITING: Final = 10_000  # look-ups and lists that wait for servers
_PAGE_ITEMS: Final = 1_000  # of a page of ours
_PAGE_BYTES: Final = 2**20
_MOST_HIDDEN: Final = 500  # of one server, as /status shows them
_LONGEST_NAME: Final = 64  # some model APIs refuse the whole list for one longer name
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_./-]+")
# Matching is linear, but URI times templates is still work that a client can ask for: 4 ms at most.
_MOST_TEMPLATES: Final = 1_000  # of one server that take part in matching
_LONGEST_URI: Final = 8_192  # that is matched against templates


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    """One item of a list as clients see it. It stays the same object for as long as `item` is."""

    kind: Kind
    server: str
    own: str  # its name, uri or uriTemplate at the server
    name: str  # on /mcp: renamed, with prefix
    local: str  # on the server's own endpoint: renamed, without prefix
    item: dict[str, Json]  # the server's definition, unchanged
    source: bytes = b""  # `item` as JSON
    description: str | None = None  # what replaces the server's own, from tools.describe
    validator: object = None  # a slot for Policy
    hidden: str = ""  # why Policy lets nobody see it
    _forms: dict[tuple[bool, bool], bytes] = dataclasses.field(default_factory=dict)

    def encoded(self, local: bool, any_output: bool) -> bytes:
        """The item as JSON for an endpoint (`local`: the server's own), made once per form."""
        form = (local, any_output)
        fragment = self._forms.get(form)
        if fragment is None:
            fragment = self._forms[form] = self._encode(
                self.local if local else self.name, any_output
            )
        return fragment

    def _encode(self, shown: str, any_output: bool) -> bytes:
        if self.kind in _LISTED_BY_URI:
            return self.source
        changes: dict[str, Json] = {}
        if shown != self.own:
            changes["name"] = shown
        if self.description is not None:
            changes["description"] = self.description
        dropped = not any_output and not _object_schema(self.item.get("outputSchema"))
        if not changes and not dropped:
            return self.source
        item = {**self.item, **changes}
        if dropped:
            # Clients built on the npm SDK 1.x refuse the whole list for one such schema.
            del item["outputSchema"]
        return encode(item)


def _object_schema(schema: Json) -> bool:
    """Whether a legacy client can take `schema` as outputSchema; none at all is fine too."""
    return schema is None or (isinstance(schema, dict) and schema.get("type") == "object")


@dataclasses.dataclass(frozen=True, slots=True)
class _Hidden:
    """An item that a server lists and nobody sees."""

    own: str
    reason: str
    wanted: bool = False  # the config says so: shown in /status, but nothing to warn of


class _Life(enum.Enum):
    """How a server does, as far as Shelf tells; the value is the state that an error names."""

    STARTING = "starting"  # in its first start
    UP = "ready"
    DOWN = "backoff"  # no process is left, or the first start failed


@dataclasses.dataclass(slots=True)
class _Stock:
    """One list of one server."""

    source: _Source = dataclasses.field(repr=False)
    kind: Kind
    entries: list[Entry] = dataclasses.field(default_factory=list)
    hidden: list[_Hidden] = dataclasses.field(default_factory=list)
    raw: list[Json] = dataclasses.field(default_factory=list)  # as read; a reload applies new rules
    read: bool = False  # it was read once, or the server does not declare it
    declared: bool = False
    silent: bool = False  # the server announces no changes of this list
    ttl_ms: int | None = None
    public: bool = False
    reading: _Reading | None = None
    began: float = float("-inf")  # when the last reading began
    taken: float = 0.0  # when the last one that succeeded ended
    due: float | None = None  # when it is to be read again
    failures: int = 0  # in a row

    @property
    def coming(self) -> bool:
        """Whether waiting helps: it was never read, and nothing has failed yet."""
        return not (self.read or self.failures or self.source.life is _Life.DOWN)

    def stale(self, now: float) -> bool:
        """Whether an answer from this list should be followed by a new reading."""
        if not (self.silent and self.read and self.declared and self.source.life is _Life.UP):
            return False
        if self.reading is not None or self.due is not None:
            return False
        fresh = _FRESH_MS if self.ttl_ms is None else self.ttl_ms
        return now - self.taken > max(fresh / 1000, _REFRESH_GAP)


@dataclasses.dataclass(slots=True)
class _Source:
    """One enabled server: its rules, its life, its lists."""

    name: str
    config: ServerConfig
    prefix: str  # with the separator
    stocks: dict[Kind, _Stock] = dataclasses.field(default_factory=dict)
    life: _Life = _Life.STARTING
    offer: Offer | None = None

    def known(self, kinds: Sequence[Kind]) -> bool:
        """Whether all of these lists were read once."""
        return all(self.stocks[kind].read for kind in kinds)

    def coming(self, kinds: Sequence[Kind]) -> bool:
        """Whether waiting helps for one of these lists."""
        return any(self.stocks[kind].coming for kind in kinds)

    @property
    def settled(self) -> bool:
        return not any(stock.coming for stock in self.stocks.values())


class _Listing:
    """One list of one endpoint: what clients see of it. Never changed once made."""

    def __init__(
        self, kind: Kind, local: bool, entries: list[Entry], table: dict[str, Entry]
    ) -> None:
        self.kind, self.local, self.entries, self.table = kind, local, entries, table
        self.templates = _templates(entries) if kind is Kind.TEMPLATES else []
        self.ui = {uri: entry for entry in reversed(entries) for uri in _ui_uris(entry)}
        self._pages: dict[bool, list[int]] = {}  # any_output → where each page begins
        self._joined: dict[tuple[bool, int], bytes] = {}
        self._index: dict[str, int] | None = None

    def fragments(self) -> list[bytes]:
        """All items as clients see them."""
        return [entry.encoded(self.local, True) for entry in self.entries]

    def page(self, cursor: Json, any_output: bool) -> bytes | None:
        """The list result from `cursor` on (None: from the beginning); None if it is not ours."""
        start = 0 if cursor is None else self._position(cursor)
        if start is None:
            return None
        joined = self._joined.get((any_output, start))
        if joined is None:
            joined = self._join(start, any_output)
            # Only where our own pages begin: made-up cursors must not fill the memory.
            if start in self._pages[any_output]:
                self._joined[any_output, start] = joined
        return joined

    def _join(self, start: int, any_output: bool) -> bytes:
        starts = self._pages.get(any_output)
        if starts is None:
            starts = self._pages[any_output] = self._starts(any_output)
        end = next((other for other in starts if other > start), len(self.entries))
        items = b",".join(
            entry.encoded(self.local, any_output) for entry in self.entries[start:end]
        )
        more = b"" if end >= len(self.entries) else b',"nextCursor":"%b"' % self._cursor(end - 1)
        return b'{"%b":[%b]%b}' % (self.kind.value.encode(), items, more)

    def _starts(self, any_output: bool) -> list[int]:
        """Where pages begin: after 1,000 items or 1 MiB, whichever comes first."""
        starts, size = [0], 0
        for number, entry in enumerate(self.entries):
            length = len(entry.encoded(self.local, any_output))
            if number > starts[-1] and (
                number - starts[-1] >= _PAGE_ITEMS or size + length > _PAGE_BYTES
            ):
                starts.append(number)
                size = 0
            size += length
        return starts

    def _cursor(self, last: int) -> bytes:
        """Names the last item that the client has: so it still fits when the list has changed."""
        token = encode([self.kind.value, last, self._shown(self.entries[last])])
        return base64.urlsafe_b64encode(token).rstrip(b"=")

    def _position(self, cursor: Json) -> int | None:
        """The item after the one that `cursor` names; where that one is gone, its old place."""
        if not isinstance(cursor, str):
            return None
        try:
            data = cursor.encode("ascii")
            token = decode(base64.b64decode(data + b"=" * (-len(data) % 4), b"-_", validate=True))
        except (ValueError, InvalidJson):
            return None
        match token:
            case [self.kind.value, int(last), str(name)] if (
                not isinstance(last, bool) and last >= 0
            ):
                if self._index is None:
                    self._index = {self._shown(entry): n for n, entry in enumerate(self.entries)}
                return min(self._index.get(name, last - 1) + 1, len(self.entries))
        return None

    def _shown(self, entry: Entry) -> str:
        return entry.local if self.local else entry.name


def _templates(entries: Iterable[Entry]) -> list[_Template]:
    """The templates that take part in matching, a bounded number of each server."""
    left: dict[str, int] = {}
    templates = []
    for entry in entries:
        left[entry.server] = left.get(entry.server, _MOST_TEMPLATES) - 1
        if left[entry.server] >= 0:
            templates.append(_Template(entry))
    return templates


def _ui_uris(entry: Entry) -> list[str]:
    """The `ui://` resources that a tool names in its `_meta` (MCP Apps, both spellings)."""
    meta = entry.item.get("_meta") if entry.kind is Kind.TOOLS else None
    if not isinstance(meta, dict):
        return []
    ui = meta.get("ui")
    named = (ui.get("resourceUri") if isinstance(ui, dict) else None, meta.get("ui/resourceUri"))
    return [uri for uri in named if isinstance(uri, str) and uri.startswith("ui://")]


class _Template:
    """An RFC 6570 template, read backwards: whether a URI can have come from it.

    More is let through than could be expanded, since the server has the last word. The pattern runs
    on pydantic_core's engine: Python's own needs time to the power of the variables for
    `{+a}-{+b}-{+c}` and a URI of dashes."""

    __slots__ = ("_matches", "entry", "literal")

    _EXPRESSION: ClassVar = re.compile(r"\{([+#./;?&]?)([^{}]*)\}")
    # What an expression of each operator may leave behind (RFC 6570, 3.2.2 to 3.2.9), {n}: how many
    # variables it has. Empty is always possible: undefined variables leave nothing.
    _PATTERNS: ClassVar = {
        "": "[^/]*",
        "+": ".*",
        "#": "(?:#.*)?",
        ".": r"(?:\.[^/]*)?",
        "/": "(?:/[^/?#]*){0,%d}",
        ";": "(?:;[^/?#]*)?",
        "?": r"(?:\?[^#]*)?",
        "&": "(?:&[^#]*)?",
    }

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.literal = entry.own.partition("{")[0]
        self._matches: Callable[[str], bool] | None = None

    def matches(self, uri: str) -> bool:
        # The literal beginning first: it costs 50 ns and answers for nearly every template.
        if not uri.startswith(self.literal):
            return False
        if self._matches is None:
            self._matches = self._compile()
        return self._matches(uri)

    def _compile(self) -> Callable[[str], bool]:
        from pydantic_core import SchemaError, SchemaValidator, core_schema

        pattern, end = "", 0
        for expression in self._EXPRESSION.finditer(self.entry.own):
            pattern += re.escape(self.entry.own[end : expression.start()])
            pattern += self._pattern(expression[1], expression[2])
            end = expression.end()
        rest = self.entry.own[end:]
        if "{" in rest or len(self.entry.own) > _LONGEST_URI:
            return _never
        whole = rf"(?s)\A{pattern}{re.escape(rest)}\z"
        try:
            schema = core_schema.str_schema(pattern=whole, regex_engine="rust-regex")
            return SchemaValidator(schema).isinstance_python
        except SchemaError:
            return _never

    def _pattern(self, operator: str, variables: str) -> str:
        pattern = self._PATTERNS[operator]
        if operator != "/":
            return pattern
        # An exploded list ({/path*}) may leave any number of segments.
        return "(?:/[^?#]*)?" if "*" in variables else pattern % min(variables.count(",") + 1, 20)


def _never(uri: str) -> bool:
    return False


def _refuse_ask(handle: Handle | None, ask: Ask) -> None:
    """Refuse what a server asks on a call of Atrax's own; before `send` has returned nobody can."""
    if handle is not None:
        text = "this call is Atrax's own: there is no client to ask"
        handle.answer(ask, Outcome(error=Error(METHOD_NOT_FOUND, text)))


class _Reading:
    """One list of one server on its way here, page by page; the sink of its own calls.

    Ends once, by `finished`. `fault`: why before the list did; what came until then counts: half a
    list helps more than none."""

    def __init__(
        self,
        server: str,
        kind: Kind,
        limit: float,
        now: float,
        finished: Callable[[_Reading], None],
    ) -> None:
        self.server, self.kind = server, kind
        self.items: list[Json] = []
        self.ttl_ms: int | None = None
        self.public = True
        self.error: Error | None = None
        self.fault = ""
        self.deadline = now + limit
        self.over = False
        self._limit, self._finished = limit, finished
        self._link: Link | None = None
        self._lease: Lease | None = None
        self._handle: Handle | None = None
        self._cursor: str | None = None
        self._seen: set[str] = set()
        self._wanted = False  # a page is to be asked for
        self._asking = False

    def start(self, pool: Pool) -> None:
        self._lease = pool.lease(self.server, None, "", self._ready)

    def wake(self, now: float) -> None:
        if now >= self.deadline and not self.over:
            self.cancel()
            self._end(
                own_error(TIMED_OUT, f"no answer within {self._limit:g} s", "timeout", self.server)
            )

    def cancel(self) -> None:
        """Stop reading. `finished` is not called by this, nor afterwards."""
        self.over = True
        if self._lease is not None:
            self._lease.cancel()
        if self._handle is not None:
            self._handle.cancel("no longer needed")

    def _ready(self, link: Link | Error) -> None:
        if self.over:
            return
        if isinstance(link, Error):
            self._end(link)
            return
        self._link, self._wanted = link, True
        self._ask()

    def _ask(self) -> None:
        # A loop and a flag: a link may answer before send() returns, a thousand pages deep.
        if self._asking or self._link is None:
            return
        self._asking = True
        while self._wanted and not self.over:
            self._wanted = False
            params = {} if self._cursor is None else {"cursor": self._cursor}
            call = Call(_METHODS[self.kind], params, Owner("atrax"), MODERN)
            self._handle = self._link.send(call, self)
        self._asking = False

    def note(self, notice: Notice) -> None:
        """Progress of a list interests nobody."""

    def ask(self, ask: Ask) -> None:
        """Nobody stands behind this call who could be asked (2026-07-28: lists never ask)."""
        _refuse_ask(self._handle, ask)

    def done(self, outcome: Outcome) -> None:
        if self.over:
            return
        if outcome.error is not None:
            self._end(outcome.error)
            return
        result = decode(outcome.raw) if outcome.result is None and outcome.raw else outcome.result
        items = result.get(self.kind.value) if isinstance(result, dict) else None
        if not isinstance(items, list):
            text = f'its answer to {_METHODS[self.kind]} has no list "{self.kind.value}"'
            self._end(Error(INTERNAL_ERROR, text))
            return
        self._page(result or {}, items)

    def _page(self, result: dict[str, Json], items: list[Json]) -> None:
        self.items += items
        self.public = self.public and result.get("cacheScope") == "public"
        ttl = result.get("ttlMs")
        if isinstance(ttl, int) and not isinstance(ttl, bool):
            self.ttl_ms = max(ttl, 0) if self.ttl_ms is None else min(max(ttl, 0), self.ttl_ms)
        cursor = result.get("nextCursor")
        self.fault = self._bound(cursor)
        if cursor is None or self.fault:
            self._end(None)
            return
        self._seen.add(cursor)
        self._cursor, self._wanted = cursor, True
        self.deadline += self._limit
        self._ask()

    def _bound(self, cursor: Json) -> str:
        """Why the list is not followed further, or ""."""
        if len(self.items) > _MOST_ITEMS:
            del self.items[_MOST_ITEMS:]
            return f"it has more than {_MOST_ITEMS:,} items"
        if cursor is not None and not isinstance(cursor, str):
            return "its nextCursor is not a string"
        if cursor in self._seen:
            return "its nextCursor is one that it gave before"
        if len(self._seen) + 1 >= _MOST_PAGES and cursor is not None:
            return f"it has more than {_MOST_PAGES:,} pages"
        return ""

    def _end(self, error: Error | None) -> None:
        self.over, self.error = True, error
        self._finished(self)


class _Search:
    """The Lease of something that waits for servers; `attempt` says whether it has settled.

    It is given the Catalogue of the moment: a reload hands who waits over to the new one."""

    __slots__ = ("_waits", "attempt", "deadline")

    def __init__(
        self,
        waits: dict[_Search, None],
        attempt: Callable[[Catalogue, bool], bool],
        deadline: float,
    ) -> None:
        self._waits, self.attempt, self.deadline = waits, attempt, deadline

    def cancel(self) -> None:
        self._waits.pop(self, None)


class _Settled:
    """The Lease of what was answered at once."""

    def cancel(self) -> None: ...


_SETTLED: Final = _Settled()
_EMPTY: Final[dict[str, Entry]] = {}


class Catalogue:
    """What all enabled servers offer. Implements the verbs `up`, `down` and `changed` of Shelf.

    `check` is Policy's verdict on a tool's definition: a reason hides the tool. `watch` holds
    callbacks (kind, endpoint) for each *visible* list that changed; endpoint "" is /mcp."""

    def __init__(
        self,
        config: Config,
        pool: Pool,
        record: Record,
        clock: Callable[[], float],
        check: Callable[[Entry], str] | None = None,
    ) -> None:
        self._pool, self._record, self._clock, self._check = pool, record, clock, check
        self.watch: list[Callable[[Kind, str], None]] = []
        self._sources = {
            name: _Source(
                name,
                server,
                server.prefix + config.separator if server.prefix else "",
            )
            for name, server in config.servers.items()
            if not server.disabled
        }
        for source in self._sources.values():
            source.stocks = {kind: _Stock(source, kind) for kind in Kind}
        self._disabled = [name for name in config.servers if name not in self._sources]
        self._waits: dict[_Search, None] = {}
        # What lost its name on /mcp to an earlier server: kind → server → items.
        self._shadowed: dict[Kind, dict[str, list[_Hidden]]] = {kind: {} for kind in Kind}
        self._listings: dict[tuple[Kind, str], _Listing] = {}
        self._tables: dict[tuple[Kind, str], dict[str, Entry]] = {}
        self._stocks: dict[tuple[Kind, str], list[_Stock]] = {}  # what a listing is made of
        for kind in Kind:
            for endpoint in (_MCP, *self._sources):
                sources = self._at(endpoint)
                self._stocks[kind, endpoint] = [source.stocks[kind] for source in sources]
                self._put(endpoint, _Listing(kind, endpoint != _MCP, [], {}))

    # ---- Shelf ----

    def up(self, server: str, offer: Offer) -> None:
        """The first process is ready (again): it may be another program now, so read all anew."""
        source = self._sources.get(server)
        if source is None:
            return
        source.life, source.offer = _Life.UP, offer
        for kind, stock in source.stocks.items():
            capability = offer.capabilities.get(_CAPABILITY[kind])
            stock.declared = capability is not None and capability is not False
            stock.silent = not (
                isinstance(capability, dict) and capability.get("listChanged") is True
            )
            stock.failures, stock.due = 0, None
            self._stop_reading(stock)
            if stock.declared:
                self._read(stock)
            else:
                self._take(stock, [])
        self._moved()

    def down(self, server: str) -> None:
        """No process is left, or the first start failed. What it listed stays listed."""
        source = self._sources.get(server)
        if source is None:
            return
        source.life = _Life.DOWN
        for stock in source.stocks.values():
            self._stop_reading(stock)
            stock.due = None
        self._moved()

    def changed(self, server: str, kind: Kind) -> None:
        """list_changed of a child. Several during a reading, or right after one, become one."""
        source = self._sources.get(server)
        if source is None or source.life is not _Life.UP:
            return
        # resources/list_changed speaks for the templates too: they have none of their own.
        for one in _LISTED_BY_URI if kind in _LISTED_BY_URI else (kind,):
            stock = source.stocks[one]
            if not stock.declared:
                continue
            stock.due = max(stock.began + _READ_GAP, self._clock())
            if stock.reading is None and stock.due <= self._clock():
                self._read(stock)

    # ---- look-up ----

    def lookup(
        self, kind: Kind, endpoint: str, name: str, then: Callable[[Entry | Error], None]
    ) -> Lease:
        """Who has `name`: `then` is called once, at once where that is known.

        Otherwise after a wait for servers that may have it, at most their `start_timeout`; with
        -32602 where nobody has it, and 1010 while one of those servers is down. For a URI that only
        a template or a tool's `_meta` covers, the entry is made up: its `own` is the URI."""
        entry = self._tables.get((kind, endpoint), _EMPTY).get(name)
        if entry is not None:
            then(entry)
            return _SETTLED

        def attempt(now: Catalogue, late: bool) -> bool:
            found = now.known(kind, endpoint, name) or now._absent(kind, endpoint, name, late)
            if found is None:
                return False
            then(found)
            return True

        limits = (source.config.start_timeout for source in self._candidates(kind, endpoint, name))
        return self._seek(attempt, max(limits, default=0.0), then)

    def known(self, kind: Kind, endpoint: str, name: str) -> Entry | None:
        """Who has `name`, as far as is known now."""
        entry = self._tables.get((kind, endpoint), _EMPTY).get(name)
        if entry is not None:
            return entry
        if kind is Kind.RESOURCES:
            return self._covered(endpoint, name)
        return self._unlisted(kind, endpoint, name)

    def _covered(self, endpoint: str, uri: str) -> Entry | None:
        """Who answers for a URI that no list names: by template, `ui://`, then its own endpoint."""
        templates = self._listings.get((Kind.TEMPLATES, endpoint))
        if templates is None:
            return None
        if len(uri) <= _LONGEST_URI:
            for template in templates.templates:
                if template.matches(uri):
                    return _made_up(Kind.RESOURCES, template.entry.server, uri, template.entry.item)
        tool = self._listings[Kind.TOOLS, endpoint].ui.get(uri)
        if tool is not None:
            return _made_up(Kind.RESOURCES, tool.server, uri, {"uri": uri})
        # On its own endpoint the server is who knows: its links name more than its lists.
        source = self._sources.get(endpoint)
        if source is not None and source.stocks[Kind.RESOURCES].declared:
            return _made_up(Kind.RESOURCES, endpoint, uri, {"uri": uri})
        return None

    def _unlisted(self, kind: Kind, endpoint: str, name: str) -> Entry | None:
        """With isolation, on its own endpoint: what may exist in an owner's child alone."""
        source = self._sources.get(endpoint)
        if source is None or source.config.isolation == "shared" or kind is Kind.TEMPLATES:
            return None
        stock = source.stocks[kind]
        if not (stock.read and stock.declared) or any(
            hidden.own == name for hidden in stock.hidden
        ):
            return None
        if any(entry.own == name for entry in stock.entries):
            return None  # it is listed, under another name
        item: dict[str, Json] = {"name": name}
        if kind is Kind.TOOLS:
            item["inputSchema"] = {"type": "object"}
        entry = _made_up(kind, endpoint, name, item)
        if kind is Kind.TOOLS and (_ruled_out(source.config.tools, name) or self._verdict(entry)):
            return None
        return entry

    def _candidates(self, kind: Kind, endpoint: str, name: str) -> list[_Source]:
        """The servers that may have `name` but whose lists were never read."""
        return [
            source
            for source in self._at(endpoint)
            if not source.known(_asked(kind))
            and (endpoint or kind in _LISTED_BY_URI or name.startswith(source.prefix))
        ]

    def _absent(self, kind: Kind, endpoint: str, name: str, late: bool) -> Error | None:
        """The error for a name that nobody has now; None: a server that may have it is coming."""
        candidates = self._candidates(kind, endpoint, name)
        if not candidates:
            if endpoint and endpoint not in self._sources:
                return _disabled(endpoint)
            return _unknown(kind, name)
        if not late and any(source.coming(_asked(kind)) for source in candidates):
            return None
        return self._unavailable(candidates[0])

    # ---- lists ----

    def listing(self, call: Call, then: Callable[[Outcome], None]) -> Lease:
        """tools/list and its three siblings; `then` is called once, at once where all was read.

        On /mcp servers in their first start are waited for, 2 s at most, then what is there is
        answered; a server's own endpoint waits as long as its start may take, then answers 1010."""
        kind, endpoint = _KIND_OF[call.method], call.endpoint

        def attempt(now: Catalogue, late: bool) -> bool:
            outcome = now._answer(kind, call, late)
            if outcome is None:
                return False
            then(outcome)
            now._refresh(kind, endpoint)
            return True

        return self._seek(
            attempt, self._patience(endpoint), lambda error: then(Outcome(error=error))
        )

    def _answer(self, kind: Kind, call: Call, late: bool) -> Outcome | None:
        listing = self._listings.get((kind, call.endpoint))
        if listing is None:
            return Outcome(error=_disabled(call.endpoint))
        stocks = self._stocks[kind, call.endpoint]
        if not late and any(stock.coming for stock in stocks):
            return None
        if call.endpoint and (error := self._unlistable(stocks[0])):
            return Outcome(error=error)
        raw = listing.page(call.params.get("cursor"), call.any_output)
        if raw is None:
            return Outcome(
                error=Error(INVALID_PARAMS, "this cursor is not known: list from the beginning")
            )
        ttl_ms, public = _freshness(stocks)
        return Outcome(raw=raw, ttl_ms=ttl_ms, public=public)

    def _unlistable(self, stock: _Stock) -> Error | None:
        """Why a server's own endpoint has no such list."""
        if not stock.read:
            return self._unavailable(stock.source)
        if stock.declared or stock.source.offer is None:
            return None
        server, capability = stock.source.name, _CAPABILITY[stock.kind]
        text = f'{_METHODS[stock.kind]}: the server "{server}" has no {capability}'
        return Error(METHOD_NOT_FOUND, text, status=404)

    def _refresh(self, kind: Kind, endpoint: str) -> None:
        """Behind an answer: read again what has grown old and would not announce a change."""
        now = self._clock()
        for stock in self._stocks.get((kind, endpoint), ()):
            if stock.stale(now):
                self._read(stock)

    # ---- discover ----

    def discover(self, call: Call, then: Callable[[Outcome], None]) -> Lease:
        """server/discover, and so initialize: on /mcp at once, else when the server has started."""
        if call.endpoint == _MCP:
            then(self._discovered())
            return _SETTLED

        def attempt(now: Catalogue, late: bool) -> bool:
            source = now._sources.get(call.endpoint)
            if source is None:
                then(Outcome(error=_disabled(call.endpoint)))
            elif source.offer is not None:
                then(_discovered_one(source.offer))
            elif late or source.life is _Life.DOWN:
                then(Outcome(error=now._unavailable(source)))
            else:
                return False
            return True

        return self._seek(
            attempt, self._patience(call.endpoint), lambda error: then(Outcome(error=error))
        )

    def _discovered(self) -> Outcome:
        offers = {name: source.offer for name, source in self._sources.items() if source.offer}
        parts = [
            f"## {name}\n{offer.instructions}"
            for name, offer in offers.items()
            if offer.instructions
        ]
        result: dict[str, Json] = {
            "supportedVersions": [MODERN],
            "capabilities": {
                "tools": {"listChanged": True},
                "prompts": {"listChanged": True},
                "resources": {"listChanged": True, "subscribe": True},
                "logging": {},
                "completions": {},
            },
            "_meta": {META_SERVER: {"name": "atrax", "version": VERSION}},
        }
        if parts:
            result["instructions"] = "\n\n".join(parts)
        # The instructions of a server that has not started yet are still missing.
        return Outcome(result=result, ttl_ms=_FRESH_MS if len(offers) == len(self._sources) else 0)

    def offer(self, server: str) -> Offer | None:
        """What `server` said of itself when it was last ready."""
        source = self._sources.get(server)
        return source.offer if source is not None else None

    # ---- time, status, reload ----

    def wake(self, now: float) -> None:
        """Readings that are due or late, waits that are over."""
        for source in self._sources.values():
            for stock in source.stocks.values():
                if stock.reading is not None:
                    stock.reading.wake(now)
                elif stock.due is not None and stock.due <= now and source.life is _Life.UP:
                    self._read(stock)
        for wait in [wait for wait in self._waits if wait.deadline <= now]:
            self._try(wait, late=True)

    @property
    def settled(self) -> bool:
        """Whether each enabled server's lists were read, or its first start has failed."""
        return all(source.settled for source in self._sources.values())

    def counts(self) -> dict[str, dict[str, Json]]:
        """Per server: how many items of each kind it shows, what is hidden and why, `settled`."""
        nothing = {kind.value: 0 for kind in Kind}
        counts: dict[str, dict[str, Json]] = {
            name: {**nothing, "hidden": [], "settled": True} for name in self._disabled
        }
        for name, source in self._sources.items():
            shown = {kind.value: len(source.stocks[kind].entries) for kind in Kind}
            counts[name] = {**shown, "hidden": self._hidden(source), "settled": source.settled}
        return counts

    def offers(self) -> dict[str, dict[str, list[str]]]:
        """Per server: the names or URIs of what it shows, by kind, as on /mcp."""
        return {
            name: {kind.value: [entry.name for entry in source.stocks[kind].entries] for kind in Kind}
            for name, source in self._sources.items()
        }

    def _hidden(self, source: _Source) -> list[Json]:
        hidden = [
            {"kind": kind.value, "name": one.own, "reason": one.reason}
            for kind, stock in source.stocks.items()
            for one in (*stock.hidden, *self._shadowed[kind].get(source.name, ()))
        ]
        more = len(hidden) - _MOST_HIDDEN
        if more > 0:
            hidden[_MOST_HIDDEN:] = [{"kind": "", "name": "", "reason": f"and {more} more"}]
        return hidden

    def inherit(self, old: Catalogue) -> None:
        """Take over from `old`, at a reload: what it had read, who waits, who watches.

        Of servers that are started the same way. The new rules apply to the old definitions, so
        nothing is empty in between."""
        # Until all is taken over nobody is told: half of it would look like a change.
        watch, self.watch = [*old.watch, *self.watch], []
        for name, source in self._sources.items():
            before = old._sources.get(name)
            if before is not None and _started_alike(before.config, source.config):
                source.life, source.offer = before.life, before.offer
                for kind, stock in source.stocks.items():
                    self._inherit(stock, before.stocks[kind])
        for source in old._sources.values():
            for stock in source.stocks.values():
                self._stop_reading(stock)
        self.watch = watch
        for (kind, endpoint), listing in self._listings.items():
            earlier = old._listings.get((kind, endpoint))
            if earlier is not None and earlier.fragments() != listing.fragments():
                self._tell(kind, endpoint)
        # The same dict, not a copy: it is what cancelling a wait takes it out of.
        self._waits, old._waits = old._waits, {}
        self._moved()

    def _inherit(self, stock: _Stock, before: _Stock) -> None:
        stock.declared, stock.silent, stock.public = before.declared, before.silent, before.public
        stock.ttl_ms, stock.taken, stock.failures = before.ttl_ms, before.taken, before.failures
        if before.read:
            self._take(stock, before.raw)
        if before.reading is not None or before.due is not None:
            stock.due = self._clock()

    # ---- reading ----

    def _read(self, stock: _Stock) -> None:
        now, source = self._clock(), stock.source
        stock.due, stock.began = None, now
        reading = _Reading(
            source.name,
            stock.kind,
            source.config.timeout,
            now,
            lambda done: self._ended(stock, done),
        )
        stock.reading = reading
        reading.start(self._pool)

    def _stop_reading(self, stock: _Stock) -> None:
        reading, stock.reading = stock.reading, None
        if reading is not None:
            reading.cancel()

    def _ended(self, stock: _Stock, reading: _Reading) -> None:
        if stock.reading is not reading:
            return
        stock.reading = None
        error = reading.error
        if error is not None and error.code != METHOD_NOT_FOUND:
            self._failed(stock, error)
        else:
            # Declared, but not implemented (-32601): common, and an empty list to every client.
            if reading.fault:
                self._say(stock, "error", f"is cut off: {reading.fault}")
            stock.failures, stock.taken = 0, self._clock()
            stock.ttl_ms, stock.public = reading.ttl_ms, reading.public and error is None
            self._take(stock, reading.items)
            if stock.due is not None and stock.due <= self._clock():
                self._read(stock)  # announced meanwhile
        self._moved()

    def _failed(self, stock: _Stock, error: Error) -> None:
        """The old items stay; once more after a pause."""
        pause = min(_READ_AGAIN[0] * 2**stock.failures, _READ_AGAIN[1])
        stock.failures = min(stock.failures + 1, 16)  # 2**16 pauses are far past the longest
        due = self._clock() + pause
        stock.due = due if stock.due is None else max(stock.due, due)
        text = f"cannot be read, again in {pause:g} s: {error.message} ({error.code})"
        self._say(stock, "warning", text)

    def _say(self, stock: _Stock, level: str, text: str) -> None:
        self._record.emit(
            "catalogue.reading",
            level,
            server=stock.source.name,
            list=stock.kind.value,
            message=f"{_METHODS[stock.kind]} {text}",
        )

    def _take(self, stock: _Stock, raw: list[Json]) -> None:
        """Make `raw` the server's list, and show it where it is visible."""
        known = {entry.own: entry for entry in stock.entries}
        before, hidden = stock.entries, set(stock.hidden)
        stock.read, stock.raw = True, raw
        stock.entries, stock.hidden = self._entries(stock, raw, known)
        server = stock.source.name
        self._say_hidden(server, stock.kind, [one for one in stock.hidden if one not in hidden])
        if stock.kind is Kind.TOOLS:
            self._say_names(server, [entry for entry in stock.entries if entry.own not in known])
        if stock.entries != before:
            self._show(stock)

    def _entries(
        self, stock: _Stock, raw: list[Json], known: Mapping[str, Entry]
    ) -> tuple[list[Entry], list[_Hidden]]:
        """What of `raw` can be shown, in the server's order, and what not, with reasons."""
        source, kind = stock.source, stock.kind
        entries: dict[str, Entry] = {}  # local name → entry: the first keeps the name
        hidden: list[_Hidden] = []
        for number, item in enumerate(raw):
            own: Json = item.get(_KEY[kind]) if isinstance(item, dict) else None
            if fault := _malformed(kind, item):
                hidden.append(_Hidden(own if isinstance(own, str) else f"#{number + 1}", fault))
                continue
            entry = self._entry(source, kind, item, known)
            wanted = _ruled_out(source.config.tools, own) if kind is Kind.TOOLS else ""
            if reason := wanted or self._reason(entry, entries.get(entry.local), known):
                hidden.append(_Hidden(own, reason, bool(wanted)))
            else:
                entries[entry.local] = entry
        return list(entries.values()), hidden

    def _reason(self, entry: Entry, first: Entry | None, known: Mapping[str, Entry]) -> str:
        """Why nobody can see `entry`, or "". `first` has its name already."""
        if first is not None:
            return _taken(entry, first)
        # What is in `known` was seen until now and is the same: checking 500 schemas again costs.
        if entry.kind is not Kind.TOOLS or known.get(entry.own) is entry:
            return ""
        entry.hidden = self._verdict(entry)
        return entry.hidden

    def _entry(
        self, source: _Source, kind: Kind, item: dict[str, Json], known: Mapping[str, Entry]
    ) -> Entry:
        own: str = item[_KEY[kind]]
        encoded = encode(item)
        old = known.get(own)
        # Bytes, not dicts: to Python {"minimum": 1} equals {"minimum": true}.
        if old is not None and old.source == encoded:
            return old
        if kind in _LISTED_BY_URI:
            return Entry(kind, source.name, own, own, own, item, encoded)
        rules = source.config.tools
        local = rules.rename.get(own, own) if kind is Kind.TOOLS else own
        entry = Entry(kind, source.name, own, source.prefix + local, local, item, encoded)
        if kind is Kind.TOOLS:
            entry.description = _description_for(rules.describe, own)
        return entry

    def _verdict(self, entry: Entry) -> str:
        """Why Policy lets nobody see a tool, or ""."""
        return self._check(entry) if self._check is not None else ""

    def _say_hidden(self, server: str, kind: Kind, hidden: list[_Hidden]) -> None:
        # One line, however many: a server decides how long its list is, not how long the log.
        told = [one for one in hidden if not one.wanted]
        if told:
            some = "; ".join(f"{one.own[:80]}: {one.reason}" for one in told[:5])
            more = f"; and {len(told) - 5} more" if len(told) > 5 else ""
            text = f"{len(told)} of its {kind.value} hidden: {some}{more}"
            self._record.emit(
                "catalogue.hidden", "warning", server=server, count=len(told), message=text
            )

    def _say_names(self, server: str, entries: list[Entry]) -> None:
        odd = [
            entry.name[:120]
            for entry in entries
            if len(entry.name) > _LONGEST_NAME or not _PLAIN_NAME.fullmatch(entry.name)
        ]
        if odd:
            text = (
                f"{len(odd)} tool names are longer than {_LONGEST_NAME} or hold other characters"
                f" than A-Z a-z 0-9 _ - . /, which some clients refuse: {', '.join(odd[:5])}"
                f"{' …' if len(odd) > 5 else ''}. tools.rename or prefix can shorten them"
            )
            self._record.emit(
                "catalogue.names", "warning", server=server, count=len(odd), message=text
            )

    # ---- showing ----

    def _show(self, stock: _Stock) -> None:
        """Make the listings of both endpoints anew, and tell where the visible one has changed."""
        kind, server = stock.kind, stock.source.name
        table = {entry.local: entry for entry in stock.entries}
        self._put(server, _Listing(kind, True, stock.entries, table))
        before = self._listings[kind, _MCP].entries
        merged, shadowed = self._merge(kind)
        entries = list(merged.values())
        if entries != before:
            self._put(_MCP, _Listing(kind, False, entries, merged))
        known, self._shadowed[kind] = self._shadowed[kind], shadowed
        for loser, hidden in shadowed.items():
            before_that = set(known.get(loser, ()))
            self._say_hidden(loser, kind, [one for one in hidden if one not in before_that])
        self._tell(kind, server)
        if entries != before:
            self._tell(kind, _MCP)

    def _merge(self, kind: Kind) -> tuple[dict[str, Entry], dict[str, list[_Hidden]]]:
        """All entries by name on /mcp, and per server what lost its name to an earlier server."""
        merged: dict[str, Entry] = {}
        shadowed: dict[str, list[_Hidden]] = {}
        for source in self._sources.values():
            for entry in source.stocks[kind].entries:
                first = merged.setdefault(entry.name, entry)
                if first is not entry:
                    reason = (
                        f'on /mcp "{entry.name[:120]}" is the {_NOUN[kind]} of "{first.server}"'
                    )
                    shadowed.setdefault(source.name, []).append(_Hidden(entry.own, reason))
        return merged, shadowed

    def _put(self, endpoint: str, listing: _Listing) -> None:
        self._listings[listing.kind, endpoint] = listing
        self._tables[listing.kind, endpoint] = listing.table

    def _tell(self, kind: Kind, endpoint: str) -> None:
        for watcher in list(self.watch):
            watcher(kind, endpoint)

    # ---- waiting ----

    def _seek(
        self,
        attempt: Callable[[Catalogue, bool], bool],
        limit: float,
        refuse: Callable[[Error], None],
    ) -> Lease:
        """Make `attempt` now, then whenever something moved; after `limit` seconds a last time."""
        if attempt(self, False):
            return _SETTLED
        if len(self._waits) >= _MOST_WAITING:
            refuse(own_error(OVERLOADED, "too many requests wait for servers to start", "waiting"))
            return _SETTLED
        wait = _Search(self._waits, attempt, self._clock() + limit)
        self._waits[wait] = None
        return wait

    def _moved(self) -> None:
        for wait in list(self._waits):
            self._try(wait, late=False)

    def _try(self, wait: _Search, late: bool) -> None:
        # Out before the attempt: what it calls may cancel waits, or come back here.
        if wait not in self._waits:
            return
        del self._waits[wait]
        if not wait.attempt(self, late):
            self._waits[wait] = None

    def _patience(self, endpoint: str) -> float:
        """How long a list or discover waits for the servers of `endpoint`, in seconds."""
        source = self._sources.get(endpoint)
        return _FIRST_WAIT if source is None else source.config.start_timeout

    def _at(self, endpoint: str) -> list[_Source]:
        if endpoint == _MCP:
            return list(self._sources.values())
        source = self._sources.get(endpoint)
        return [] if source is None else [source]

    def _unavailable(self, source: _Source) -> Error:
        """1010 for a server that nothing is known of; the Pool knows why and for how long."""
        told: list[Link | Error] = []
        self._pool.lease(source.name, None, "", told.append).cancel()
        if told and isinstance(told[0], Error):
            return told[0]
        text = f'the server "{source.name}" is not available: its lists could not be read yet'
        state = source.life.value
        return own_error(UNAVAILABLE, text, "unavailable", source.name, state=state, retryAfter=1)


def _freshness(stocks: Sequence[_Stock]) -> tuple[int, bool]:
    """(ttlMs, whether caches may share it) of a list that is made of `stocks`.

    Private unless every server said public: a legacy one cannot say, and it alone knows whether
    its lists name files or customers that a shared cache must not keep for others."""
    ttl_ms, public = _FRESH_MS, True
    said = [stock.ttl_ms for stock in stocks if stock.declared]
    for stock in stocks:
        if not stock.read:
            return 0, False
        if stock.declared:
            public = public and stock.public
    if said:
        ttl_ms = min(_FRESH_MS if ttl is None else ttl for ttl in said)
    return ttl_ms, public and bool(said)


def _started_alike(one: ServerConfig, other: ServerConfig) -> bool:
    """Whether two configs start the same program the same way: then they have the same lists."""
    return (one.command, one.args, one.env, one.cwd) == (
        other.command,
        other.args,
        other.env,
        other.cwd,
    )


def _asked(kind: Kind) -> Sequence[Kind]:
    """The lists in which a name of this kind is looked for."""
    return (Kind.RESOURCES, Kind.TEMPLATES, Kind.TOOLS) if kind in _LISTED_BY_URI else (kind,)


def _made_up(kind: Kind, server: str, own: str, item: dict[str, Json]) -> Entry:
    return Entry(kind, server, own, own, own, item)


def _ruled_out(rules: ToolRules, own: str) -> str:
    """Why the config does not want a tool, or ""."""
    if rules.allow is not None and not any(fnmatch.fnmatchcase(own, glob) for glob in rules.allow):
        return "not in tools.allow"
    denied = next((glob for glob in rules.deny if fnmatch.fnmatchcase(own, glob)), None)
    return "" if denied is None else f'denied by tools.deny "{denied}"'


def _description_for(describe: Mapping[str, str], own: str) -> str | None:
    """What tools.describe says of a tool: under its name, else under the first glob that fits."""
    if own in describe:
        return describe[own]
    return next((text for glob, text in describe.items() if fnmatch.fnmatchcase(own, glob)), None)


def _malformed(kind: Kind, item: Json) -> str:
    """What makes `item` no item of its list, or "". Strict clients refuse a whole list for one."""
    if not isinstance(item, dict):
        return "not an object"
    needed = ("name",) if _KEY[kind] == "name" else (_KEY[kind], "name")
    for key in needed:
        if not isinstance(item.get(key), str) or not item[key]:
            return f'"{key}" must be a string that is not empty'
    schema = item.get("inputSchema")
    if kind is Kind.TOOLS and not (isinstance(schema, dict) and schema.get("type") == "object"):
        return 'inputSchema must be an object with "type": "object"'
    return ""


def _taken(entry: Entry, first: Entry) -> str:
    if entry.own == first.own:
        return "listed twice; the first one counts"
    return f'its name "{entry.local[:120]}" is taken by "{first.own[:120]}" of the same server'


def _unknown(kind: Kind, name: str) -> Error:
    noun = _NOUN[kind]
    if kind in _LISTED_BY_URI:
        return Error(INVALID_PARAMS, f"{noun.capitalize()} not found", {"uri": name})
    return Error(INVALID_PARAMS, f"Unknown {noun}: {name[:200]}")


def _disabled(server: str) -> Error:
    text = f'the server "{server}" is disabled or not in the config'
    return own_error(UNAVAILABLE, text, "disabled", server, state="disabled")


def _discovered_one(offer: Offer) -> Outcome:
    """What a server's own endpoint says: its words, and the listChanged that Atrax adds."""
    capabilities = dict(offer.capabilities)
    for name in ("tools", "prompts", "resources"):
        own = capabilities.get(name)
        if own is not None and own is not False:
            # True for all: a list that announces nothing is read again from time to time.
            capabilities[name] = {**(own if isinstance(own, dict) else {}), "listChanged": True}
    result: dict[str, Json] = {
        "supportedVersions": [MODERN],
        "capabilities": capabilities,
        "_meta": {META_SERVER: offer.info},
    }
    if offer.instructions:
        result["instructions"] = offer.instructions
    return Outcome(result=result, ttl_ms=_FRESH_MS)
# ==== Subscriptions ===============================================================
# Who listens to what, and one upstream listen per server for all of them.
# Knows filters and URIs. Must not know processes or eras: a link takes a listen call, no more.
#
# A client's listen (`_Listen`) asks for list changes, which the Catalogue tells, and for resources.
# A resource is looked up, and *wanted* at its server (`_Upstream`) as long as one listen wants it.
# A filter cannot be changed (2026-07-28, basic/patterns/subscriptions), so what an upstream wants
# anew is asked for by a second stream with the whole union; once acknowledged that becomes the
# current one and the first is cancelled. Only the current stream is heard: so nothing comes twice,
# and nothing is missed, since the old one is heard until the new one is known to work.

_LIST_FLAGS: Final = {
    "toolsListChanged": (Kind.TOOLS, "tools"),
    "promptsListChanged": (Kind.PROMPTS, "prompts"),
    "resourcesListChanged": (Kind.RESOURCES, "resources"),
}
_ACK_WAIT: Final = 5.0  # seconds; what no server has accepted by then is not honoured
_OPEN_WAIT: Final = 30.0  # seconds for a server to acknowledge a listen
_REOPEN: Final = (0.2, 30.0)  # first and longest pause before a lost stream is opened again
_STEADY: Final = 10.0  # seconds after which a stream counts as good, and the pauses begin anew
_MOST_URIS: Final = 1_000  # in one listen
_MOST_URIS_IN_ALL: Final = 100_000


class _Listen:
    """One `subscriptions/listen` of a client, and its Handle.

    Its acknowledgement waits until each URI was accepted, refused, or 5 s have passed; what happens
    before goes out right behind it, since nothing may come first."""

    def __init__(self, owner: Subscriptions, call: Call, sink: Sink, now: float) -> None:
        self.owner, self.call, self.sink = owner, call, sink
        self.flags: list[str] = []
        self.kinds: set[Kind] = set()
        self.asked: list[str] = []  # URIs, in the client's order
        self.upstreams: dict[str, _Upstream] = {}  # URI → where it is wanted
        self.lookups: dict[str, Lease] = {}  # URI → the search for its server
        self.accepted: set[str] = set()
        self.early: dict[tuple[str, str], Notice] = {}  # what happened before the acknowledgement
        self.acknowledged = False
        self.over = False
        self.deadline = now + _ACK_WAIT

    # ---- Handle ----

    def answer(self, ask: Ask, outcome: Outcome) -> None:
        """A listen asks nothing."""

    def note(self, notice: Notice) -> None:
        """Nothing can be said to a listen."""

    def cancel(self, reason: str) -> None:
        self.end(Outcome(error=Error(CANCELLED, reason)))

    # ---- what happens to it ----

    def end(self, outcome: Outcome) -> None:
        if self.over:
            return
        self.over = True
        self.owner.forget(self)
        self.sink.done(outcome)

    def accept(self, uri: str) -> None:
        self.accepted.add(uri)
        self.settle()

    def refuse(self, uri: str) -> None:
        """No server sends updates for `uri` (any more): it is not honoured."""
        self.upstreams.pop(uri, None)
        self.accepted.discard(uri)
        self.settle()

    def settle(self) -> None:
        """Acknowledge, once nothing is open."""
        waiting = self.lookups or len(self.accepted) < len(self.upstreams)
        if not self.acknowledged and not self.over and not waiting:
            self.acknowledge()

    def acknowledge(self) -> None:
        self.acknowledged = True
        honoured: dict[str, Json] = dict.fromkeys(self.flags, True)
        uris = [uri for uri in self.asked if uri in self.accepted]
        if uris:
            honoured["resourceSubscriptions"] = uris
        self.sink.note(
            Notice("notifications/subscriptions/acknowledged", {"notifications": honoured})
        )
        early, self.early = self.early, {}
        for notice in early.values():
            if not self.over:
                self.sink.note(notice)

    def tell(self, notice: Notice) -> None:
        if self.acknowledged:
            self.sink.note(notice)
        else:
            # Keyed: two changes of one thing before the acknowledgement are one.
            self.early[notice.method, notice.params.get("uri", "")] = notice


def _stopped(error: Error) -> bool:
    """Whether the Pool has no process because nobody has used the server (lazy, idle_stop)."""
    detail = error.data.get("atrax") if isinstance(error.data, dict) else None
    return isinstance(detail, dict) and detail.get("state") == "stopped"


class _Stream:
    """One upstream listen with a fixed set of URIs; the sink of its own call."""

    def __init__(self, upstream: _Upstream, uris: frozenset[str], pool: Pool, now: float) -> None:
        self.upstream, self.uris, self._pool = upstream, uris, pool
        self._starter = upstream.owner
        self.accepted: frozenset[str] = frozenset()
        self.since = now
        self.acknowledged = False
        self.over = False
        self._lease: Lease | None = None
        self._handle: Handle | None = None

    def start(self) -> None:
        lease = self._pool.lease(self.upstream.server, self.upstream.owner, "", self._ready)
        if self._lease is None:
            self._lease = lease

    def cancel(self) -> None:
        """End it; nothing of it is heard afterwards."""
        self.over = True
        if self._lease is not None:
            self._lease.cancel()
        if self._handle is not None:
            self._handle.cancel("no longer needed")

    def _ready(self, link: Link | Error) -> None:
        if self.over:
            return
        if isinstance(link, Error):
            if self._starter is None and _stopped(link):
                # Atrax alone starts no lazy server (seam Pool), but a client that listens is use.
                self._starter = self.upstream.somebody()
                self._lease = self._pool.lease(self.upstream.server, self._starter, "", self._ready)
                return
            self.done(Outcome(error=link))
            return
        params: dict[str, Json] = {"notifications": {"resourceSubscriptions": sorted(self.uris)}}
        call = Call("subscriptions/listen", params, self.upstream.owner or Owner("atrax"), MODERN)
        self._handle = link.send(call, self)
        if self.over:
            self._handle.cancel("no longer needed")

    def note(self, notice: Notice) -> None:
        if self.over:
            return
        if notice.method == "notifications/subscriptions/acknowledged":
            honoured = notice.params.get("notifications")
            uris = honoured.get("resourceSubscriptions") if isinstance(honoured, dict) else None
            named = uris if isinstance(uris, list) else []
            self.accepted = self.uris & {uri for uri in named if isinstance(uri, str)}
            self.acknowledged = True
            self.upstream.acknowledged(self)
        elif notice.method == "notifications/resources/updated":
            self.upstream.updated(self, notice)

    def ask(self, ask: Ask) -> None:
        _refuse_ask(self._handle, ask)

    def done(self, outcome: Outcome) -> None:
        if not self.over:
            self.over = True
            self.upstream.ended(self, outcome)


def _parents(uri: str) -> Iterator[str]:
    """What `uri` may lie in: all that stands before one of its slashes, with and without it."""
    for slash in re.finditer("/", uri[:_LONGEST_URI]):
        yield uri[: slash.start()]
        yield uri[: slash.end()]


class _Upstream:
    """What is wanted of one server (isolated: of one owner's child), and the stream of it."""

    def __init__(self, subscriptions: Subscriptions, server: str, owner: Owner | None) -> None:
        self.server, self.owner = server, owner
        self.wanted: dict[str, dict[_Listen, None]] = {}  # URI → who wants it, in order
        self.current: _Stream | None = None
        self.opening: _Stream | None = None
        self.lost: set[str] = set()  # what a lost stream brought: changes may have been missed
        self.due: float | None = None  # when to open again
        self.failures = 0  # in a row
        self._subscriptions = subscriptions

    def want(self, uri: str, listen: _Listen) -> None:
        """Bring updates of `uri` to `listen`. `adjust` is to be called afterwards."""
        self.wanted.setdefault(uri, {})[listen] = None
        listen.upstreams[uri] = self
        if self.current is not None and uri in self.current.accepted:
            listen.accept(uri)

    def release(self, uri: str, listen: _Listen) -> None:
        """The reverse. `adjust` is to be called afterwards."""
        listeners = self.wanted.get(uri, {})
        listeners.pop(listen, None)
        if not listeners:
            self.wanted.pop(uri, None)
            self.lost.discard(uri)

    def somebody(self) -> Owner | None:
        """The owner of one of those who listen."""
        return next((listen.call.owner for one in self.wanted.values() for listen in one), None)

    def adjust(self) -> None:
        """Open what is wanted and not there; end what nobody wants."""
        wanted = frozenset(self.wanted)
        if not wanted:
            self.close()
            self._subscriptions.idle(self)
            return
        if self.opening is not None or self.due is not None:
            return  # its acknowledgement, or `wake`, comes back here
        if self.current is not None and wanted == self.current.accepted:
            return
        self.opening = _Stream(self, wanted, self._subscriptions.pool, self._subscriptions.now())
        self.opening.start()

    def close(self) -> None:
        for stream in (self.opening, self.current):
            if stream is not None:
                stream.cancel()
        self.opening = self.current = self.due = None
        self.lost.clear()

    def wake(self, now: float) -> None:
        if self.opening is not None and now - self.opening.since > _OPEN_WAIT:
            stream = self.opening
            stream.cancel()
            text = f"no acknowledgement within {_OPEN_WAIT:g} s"
            self.ended(stream, Outcome(error=Error(TIMED_OUT, text)))
        if self.due is not None and self.due <= now:
            self.due = None
            self.adjust()

    # ---- what its streams say ----

    def acknowledged(self, stream: _Stream) -> None:
        if stream is not self.opening:
            return
        stream.since = self._subscriptions.now()
        old, self.current, self.opening = self.current, stream, None
        if old is not None:
            old.cancel()
        missed, self.lost = self.lost & stream.accepted, set()
        for uri in stream.uris:
            self._settle(uri, uri in stream.accepted)
        for uri in sorted(missed):
            self._pass_on(uri, Notice("notifications/resources/updated", {"uri": uri}))
        self.adjust()

    def _settle(self, uri: str, accepted: bool) -> None:
        if accepted:
            for listen in list(self.wanted.get(uri, ())):
                listen.accept(uri)
            return
        refused = self.wanted.pop(uri, {})
        self._subscriptions.refused(self, uri, any(uri in listen.accepted for listen in refused))
        for listen in refused:
            listen.refuse(uri)

    def updated(self, stream: _Stream, notice: Notice) -> None:
        uri = notice.params.get("uri")
        if stream is self.current and isinstance(uri, str):
            self._pass_on(uri, notice)

    def _pass_on(self, uri: str, notice: Notice) -> None:
        listeners = self.wanted.get(uri)
        if listeners is None:
            # "This might be a sub-resource of the one that the client actually subscribed to"
            # (schema, ResourceUpdatedNotificationParams).
            parents = (self.wanted.get(one, ()) for one in _parents(uri))
            listeners = dict.fromkeys(itertools.chain.from_iterable(parents))
        for listen in list(listeners):
            listen.tell(notice)

    def ended(self, stream: _Stream, outcome: Outcome) -> None:
        """A stream that we did not end: once more, after a pause."""
        now = self._subscriptions.now()
        if stream is self.opening:
            self.opening = None
            error = outcome.error
            if error is not None and error.code in (METHOD_NOT_FOUND, INVALID_PARAMS):
                self._refuse_new(stream)
                self.adjust()
                return
        elif stream is self.current:
            self.current = None
            self.lost |= stream.accepted & self.wanted.keys()
            if now - stream.since > _STEADY:
                self.failures = 0
        else:
            return
        pause = min(_REOPEN[0] * 2**self.failures, _REOPEN[1])
        self.failures = min(self.failures + 1, 16)  # 2**16 pauses are far past the longest
        self.due = max(self.due or 0.0, now + pause)
        self._subscriptions.lost(self, outcome)

    def _refuse_new(self, stream: _Stream) -> None:
        """The server takes no listen, or not this one: what the current stream lacks is refused."""
        held = frozenset() if self.current is None else self.current.accepted
        for uri in stream.uris - held:
            self._settle(uri, False)

    def up(self) -> None:
        """The server is ready (again): no need to wait for the pause to end."""
        self.failures = 0
        if self.due is not None:
            self.due = None
            self.adjust()


class Subscriptions:
    """All listens: a Door for them, and `up`, `down` and `told` of Shelf."""

    def __init__(
        self,
        config: Config,
        catalogue: Catalogue,
        pool: Pool,
        record: Record,
        clock: Callable[[], float],
    ) -> None:
        self._config, self._catalogue, self.pool, self._record = config, catalogue, pool, record
        self.now = clock
        self._listens: dict[_Listen, None] = {}
        self._unacknowledged: dict[_Listen, None] = {}
        self._upstreams: dict[tuple[str, Owner | None], _Upstream] = {}
        self._uris = 0  # over all listens
        self._closed = False
        catalogue.watch.append(self.listed)

    # ---- the client's side ----

    def open(self, call: Call, sink: Sink) -> Handle:
        """A `subscriptions/listen`: acknowledged with what is honoured, open until cancelled."""
        listen = _Listen(self, call, sink, self.now())
        error = self._read_filter(listen) or self._full(listen)
        if error is not None:
            listen.over = True
            sink.done(Outcome(error=error))
            return listen
        self._listens[listen] = self._unacknowledged[listen] = None
        self._uris += len(listen.asked)
        self._find(listen)
        return listen

    def _read_filter(self, listen: _Listen) -> Error | None:
        wanted = listen.call.params.get("notifications")
        if not isinstance(wanted, dict):
            return Error(INVALID_PARAMS, "params.notifications must be an object")
        for flag, (kind, capability) in _LIST_FLAGS.items():
            asked = wanted.get(flag, False)
            if not isinstance(asked, bool):
                return Error(INVALID_PARAMS, f"params.notifications.{flag} must be a boolean")
            if asked and self._offers(listen.call.endpoint, capability):
                listen.flags.append(flag)
                listen.kinds.add(kind)
        uris = wanted.get("resourceSubscriptions", [])
        if not isinstance(uris, list) or not all(isinstance(uri, str) for uri in uris):
            text = "params.notifications.resourceSubscriptions must be an array of strings"
            return Error(INVALID_PARAMS, text)
        if len(uris) > _MOST_URIS:
            text = f"params.notifications.resourceSubscriptions: {_MOST_URIS:,} URIs at most"
            return Error(INVALID_PARAMS, text)
        listen.asked = list(dict.fromkeys(uris))
        return None

    def _offers(self, endpoint: str, capability: str) -> bool:
        """Whether that list can change there. A server that has not started yet may have any."""
        offer = self._catalogue.offer(endpoint) if endpoint else None
        return offer is None or offer.capabilities.get(capability) not in (None, False)

    def _full(self, listen: _Listen) -> Error | None:
        # A modern listen holds a connection and a legacy one a session.
        limits = self._config.limits
        if self._closed:
            return own_error(UNAVAILABLE, "Atrax is stopping", "stopping")
        if len(self._listens) >= limits.connections + limits.sessions:
            return own_error(OVERLOADED, f"{len(self._listens):,} listens are open", "listens")
        if self._uris + len(listen.asked) > _MOST_URIS_IN_ALL:
            return own_error(
                OVERLOADED, f"{self._uris:,} resources are subscribed to", "subscriptions"
            )
        return None

    def _find(self, listen: _Listen) -> None:
        """Look all URIs up; then one stream per server, not one per URI."""
        touched: dict[_Upstream, None] = {}
        gathering = True

        def found(uri: str, entry: Entry | Error) -> None:
            listen.lookups.pop(uri, None)
            if listen.over:
                return
            upstream = None if isinstance(entry, Error) else self._upstream(listen, entry.server)
            if upstream is None:
                listen.settle()
                return
            upstream.want(uri, listen)
            if gathering:
                touched[upstream] = None
            else:
                upstream.adjust()

        # A place holder keeps `settle` from acknowledging before all URIs were looked up.
        listen.lookups[""] = _SETTLED
        for uri in listen.asked:
            if uri:
                self._look_up(listen, uri, found)
        del listen.lookups[""]
        gathering = False
        for upstream in touched:
            upstream.adjust()
        listen.settle()
        self._settled(listen)

    def _look_up(
        self, listen: _Listen, uri: str, found: Callable[[str, Entry | Error], None]
    ) -> None:
        answered = False

        def then(entry: Entry | Error) -> None:
            nonlocal answered
            answered = True
            found(uri, entry)

        lease = self._catalogue.lookup(Kind.RESOURCES, listen.call.endpoint, uri, then)
        if not answered:
            listen.lookups[uri] = lease

    def _upstream(self, listen: _Listen, server: str) -> _Upstream | None:
        """Where `listen` gets updates of this server's resources; None if the server sends none."""
        offer = self._catalogue.offer(server)
        resources = offer.capabilities.get("resources") if offer is not None else None
        if not isinstance(resources, dict) or resources.get("subscribe") is not True:
            return None
        owner = self._isolated(server, listen.call.owner)
        key = (server, owner)
        if key not in self._upstreams:
            self._upstreams[key] = _Upstream(self, server, owner)
        return self._upstreams[key]

    def _isolated(self, server: str, owner: Owner) -> Owner | None:
        """Whose child it must be; None for a server that all share."""
        isolation = self._config.servers[server].isolation
        if isolation == "shared":
            return None
        return owner if isolation == "session" else Owner(owner.principal)

    def _settled(self, listen: _Listen) -> None:
        if listen.acknowledged or listen.over:
            self._unacknowledged.pop(listen, None)

    # ---- what happens ----

    def listed(self, kind: Kind, endpoint: str) -> None:
        """A visible list has changed (called by the Catalogue)."""
        if kind is Kind.TEMPLATES:
            kind = Kind.RESOURCES  # the templates' changes are told as the resources' are
        notice = Notice(f"notifications/{kind.value}/list_changed", {})
        for listen in list(self._listens):
            if kind in listen.kinds and listen.call.endpoint == endpoint and not listen.over:
                listen.tell(notice)

    def up(self, server: str, offer: Offer) -> None:
        """The server is ready (again): its lost streams are opened now."""
        for upstream in [one for one in self._upstreams.values() if one.server == server]:
            upstream.up()

    def down(self, server: str) -> None:
        """Nothing to do: the streams of dead processes have ended by themselves."""

    def told(self, server: str, place: str, notice: Notice) -> None:
        """What a child said outside any call: states of tasks, completed elicitations.

        No filter asks for these (`taskIds` is not honoured), so they are counted and go nowhere."""
        self._record.count("untold", server=server)

    def wake(self, now: float) -> None:
        """Acknowledgements that have waited long enough, streams that are due or late."""
        for listen in list(self._unacknowledged):
            if listen.deadline <= now:
                self._give_up(listen)
            self._settled(listen)
        for upstream in list(self._upstreams.values()):
            upstream.wake(now)

    def _give_up(self, listen: _Listen) -> None:
        """Acknowledge without the URIs that nobody has accepted yet."""
        lookups, listen.lookups = listen.lookups, {}
        for lease in lookups.values():
            lease.cancel()
        open_uris = [uri for uri in listen.upstreams if uri not in listen.accepted]
        self._release(listen, open_uris)
        listen.settle()

    def close(self) -> None:
        """End all listens gracefully, for shutdown: each gets its result."""
        self._closed = True
        for listen in list(self._listens):
            listen.end(Outcome(result={}))

    def renew(self, config: Config, catalogue: Catalogue) -> None:
        """After a reload: go on with the new ones. Listens at a server that is gone end gracefully.

        `catalogue` has inherited from the old one, and with it who watches."""
        self._config, self._catalogue = config, catalogue
        gone = {name for name, server in config.servers.items() if server.disabled}
        for listen in list(self._listens):
            endpoint = listen.call.endpoint
            if endpoint and (endpoint not in config.servers or endpoint in gone):
                listen.end(Outcome(result={}))
        for upstream in list(self._upstreams.values()):
            if upstream.server not in config.servers or upstream.server in gone:
                for uri in list(upstream.wanted):
                    upstream._settle(uri, False)
                upstream.adjust()

    # ---- for its parts ----

    def forget(self, listen: _Listen) -> None:
        """A listen is over: drop what only it wanted."""
        self._listens.pop(listen, None)
        self._unacknowledged.pop(listen, None)
        self._uris -= len(listen.asked)
        for lease in listen.lookups.values():
            lease.cancel()
        listen.lookups.clear()
        self._release(listen, list(listen.upstreams))

    def _release(self, listen: _Listen, uris: Iterable[str]) -> None:
        touched: dict[_Upstream, None] = {}
        for uri in uris:
            upstream = listen.upstreams.pop(uri)
            listen.accepted.discard(uri)
            upstream.release(uri, listen)
            touched[upstream] = None
        for upstream in touched:
            upstream.adjust()

    def idle(self, upstream: _Upstream) -> None:
        """Nobody wants anything of it any more."""
        key = (upstream.server, upstream.owner)
        if self._upstreams.get(key) is upstream:
            del self._upstreams[key]

    def refused(self, upstream: _Upstream, uri: str, before: bool) -> None:
        """No updates of `uri` come; `before`: they did until now, and clients count on them."""
        text = f"does not accept a subscription to {uri[:200]}"
        if before:
            text += " any more; clients that were told so before hear nothing of it now"
        self._record.emit(
            "subscription.refused",
            "warning" if before else "info",
            server=upstream.server,
            message=text,
        )

    def lost(self, upstream: _Upstream, outcome: Outcome) -> None:
        """A stream has ended by itself, or could not be opened."""
        why = "ended by the server" if outcome.error is None else outcome.error.message
        self._record.emit(
            "subscription.lost",
            "info",
            server=upstream.server,
            message=f"its subscription to {len(upstream.wanted)} resources is opened again: {why}",
        )
# ==== Policy ======================================================================
# What may pass: params and answers by version, tool definitions, arguments and their headers.
# Knows the shapes of the specification, and JSON Schema. Must not know how a call came in, or where
# it goes.

# ---- Params ----
# One table for five versions. A shape is a function from a value to what is wrong with it: "" or a
# text that begins with the path of the member (".ref.name must be a string"). Members that a shape
# does not name pass, as do methods that a version does not have: whoever routes answers those.

_Shape: TypeAlias = Callable[[Json], str]
# More than anybody sends; with 4 MiB of empty strings a shape would hold the loop for 0.1 s.
_MOST_MEMBERS: Final = 100_000


def _is(what: str, *kinds: type) -> _Shape:
    # type() and not isinstance(): true is no integer.
    return lambda value: "" if type(value) in kinds else f" must be {what}"


def _among(*words: str) -> _Shape:
    wrong = " must be one of " + ", ".join(words)
    return lambda value: "" if type(value) is str and value in words else wrong


def _list_of(inner: _Shape) -> _Shape:
    def shape(value: Json) -> str:
        if type(value) is not list:
            return " must be an array"
        if len(value) > _MOST_MEMBERS:
            return f" has more than {_MOST_MEMBERS} items"
        found = ((index, inner(item)) for index, item in enumerate(value))
        return next((f"[{index}]{wrong}" for index, wrong in found if wrong), "")

    return shape


def _map_of(inner: _Shape) -> _Shape:
    def shape(value: Json) -> str:
        if type(value) is not dict:
            return " must be an object"
        if len(value) > _MOST_MEMBERS:
            return f" has more than {_MOST_MEMBERS} members"
        found = ((name, inner(item)) for name, item in value.items())
        return next((f".{name[:60]}{wrong}" for name, wrong in found if wrong), "")

    return shape


def _record(**members: _Shape) -> _Shape:
    """An object with these members; a name that ends in `_` may be absent, `meta_` stands for `_meta`."""
    known = {
        "_meta" if name == "meta_" else name.rstrip("_"): (inner, name.endswith("_"))
        for name, inner in members.items()
    }
    required = [name for name, (_, optional) in known.items() if not optional]
    shapes = [(name, inner) for name, (inner, _) in known.items()]

    def shape(value: Json) -> str:
        if type(value) is not dict:
            return " must be an object"
        for name in required:
            if name not in value:
                return f".{name} is missing"
        for name, inner in shapes:
            if name in value and (wrong := inner(value[name])):
                return f".{name}{wrong}"
        return ""

    return shape


def _by(member: str, **shapes: _Shape) -> _Shape:
    """An object whose `member` says which shape it has; one with a word not listed here passes."""

    def shape(value: Json) -> str:
        if type(value) is not dict:
            return " must be an object"
        word = value.get(member)
        if type(word) is not str:
            return f".{member} must be a string"
        inner = shapes.get(word)
        return inner(value) if inner else ""

    return shape


def _one_or_many(inner: _Shape) -> _Shape:
    many = _list_of(inner)
    return lambda value: many(value) if type(value) is list else inner(value)


_TEXT: Final = _is("a string", str)
_FLAG: Final = _is("true or false", bool)
_NUMBER: Final = _is("a number", int, float)
_INTEGER: Final = _is("an integer", int)
_OBJECT: Final = _is("an object", dict)
_TOKEN: Final = _is("a string or an integer", str, int)
_OBJECTS: Final = _map_of(_OBJECT)
_LEVEL: Final = _among(*LOG_LEVELS)
_ROLE: Final = _among("user", "assistant")
_TITLED: Final = {"title_": _TEXT}  # BaseMetadata, since 2025-06-18
_ICONS: Final = _list_of(
    _record(src=_TEXT, mimeType_=_TEXT, sizes_=_list_of(_TEXT), theme_=_among("light", "dark"))
)
_PERSON: Final = {"name": _TEXT, "version": _TEXT}  # Implementation
_PERSON_11: Final = {
    **_PERSON,
    **_TITLED,
    "icons_": _ICONS,
    "description_": _TEXT,
    "websiteUrl_": _TEXT,
}
_CAN: Final = {"experimental_": _OBJECTS, "sampling_": _OBJECT}
_CAN_LEGACY: Final = {**_CAN, "roots_": _record(listChanged_=_FLAG)}
_CAN_ASK: Final = {
    "sampling_": _record(context_=_OBJECT, tools_=_OBJECT),
    "elicitation_": _record(form_=_OBJECT, url_=_OBJECT),
}
_CAN_TASKS: Final = _record(
    list_=_OBJECT,
    cancel_=_OBJECT,
    requests_=_record(
        sampling_=_record(createMessage_=_OBJECT), elicitation_=_record(create_=_OBJECT)
    ),
)

_META: Final = {"meta_": _record(progressToken_=_TOKEN)}
# What a modern `_meta` must hold is looked at by ModernClient, and does not come this far.
_META_NEW: Final = {"meta_": _OBJECT}
_RETRY: Final = {**_META_NEW, "inputResponses_": _OBJECT, "requestState_": _TEXT}
_URI: Final = {"uri": _TEXT}
_CALLED: Final = {"name": _TEXT, "arguments_": _OBJECT}
_PROMPT: Final = {"name": _TEXT, "arguments_": _map_of(_TEXT)}
_PAGE: Final = {"cursor_": _TEXT}
_TASK_ID: Final = {"taskId": _TEXT}
_TEMPLATE_REF: Final = {"type": _TEXT, "uri": _TEXT}
_PROMPT_REF: Final = {"type": _TEXT, "name": _TEXT}


def _ref(**more: _Shape) -> _Shape:
    shapes = {
        "ref/prompt": _record(**_PROMPT_REF, **more),
        "ref/resource": _record(**_TEMPLATE_REF),
    }
    known = _among(*shapes)

    def shape(value: Json) -> str:
        if type(value) is not dict:
            return " must be an object"
        wrong = known(value.get("type"))
        return f".type{wrong}" if wrong else shapes[value["type"]](value)

    return shape


_ARGUMENT: Final = {"argument": _record(name=_TEXT, value=_TEXT)}
_COMPLETE: Final = {"ref": _ref(), **_ARGUMENT}
_COMPLETE_06: Final = {
    "ref": _ref(**_TITLED),
    **_ARGUMENT,
    "context_": _record(arguments_=_map_of(_TEXT)),
}
_FILTER: Final = _record(
    toolsListChanged_=_FLAG,
    promptsListChanged_=_FLAG,
    resourcesListChanged_=_FLAG,
    resourceSubscriptions_=_list_of(_TEXT),
    taskIds_=_list_of(_TEXT),
)
_OLD, _MARCH, _JUNE, _NOVEMBER = LEGACY


def _initialize(capabilities: dict[str, _Shape], person: dict[str, _Shape]) -> _Shape:
    return _record(
        **_META,
        protocolVersion=_TEXT,
        capabilities=_record(**capabilities),
        clientInfo=_record(**person),
    )


_PAGED: Final = {_OLD: _record(**_META, **_PAGE), MODERN: _record(**_META_NEW, **_PAGE)}
_META_ONLY: Final = {_OLD: _record(**_META), MODERN: None}
_BY_URI: Final = {_OLD: _record(**_META, **_URI), MODERN: None}
_BY_TASK: Final = {
    _NOVEMBER: _record(**_META, **_TASK_ID),
    MODERN: _record(**_META_NEW, **_TASK_ID),
}
_STATUS: Final = _among("working", "input_required", "completed", "failed", "cancelled")
_TASK: Final = _record(
    **_TASK_ID,
    status=_STATUS,
    statusMessage_=_TEXT,
    createdAt=_TEXT,
    lastUpdatedAt=_TEXT,
    ttl=_is("an integer or null", int, type(None)),
    pollInterval_=_INTEGER,
)
_TASK_REQUEST: Final = {"task_": _record(ttl_=_INTEGER)}

# method → {the first version with that shape: shape}; None: the method ends with that version.
_REQUESTS: Final[Mapping[str, Mapping[str, _Shape | None]]] = {
    "initialize": {
        _OLD: _initialize(_CAN_LEGACY, _PERSON),
        _JUNE: _initialize({**_CAN_LEGACY, "elicitation_": _OBJECT}, {**_PERSON, **_TITLED}),
        _NOVEMBER: _initialize({**_CAN_LEGACY, **_CAN_ASK, "tasks_": _CAN_TASKS}, _PERSON_11),
        MODERN: None,
    },
    "ping": _META_ONLY,
    "logging/setLevel": {_OLD: _record(**_META, level=_LEVEL), MODERN: None},
    "resources/subscribe": _BY_URI,
    "resources/unsubscribe": _BY_URI,
    "server/discover": {MODERN: _record(**_META_NEW)},
    "subscriptions/listen": {MODERN: _record(**_META_NEW, notifications=_FILTER)},
    "tools/list": _PAGED,
    "prompts/list": _PAGED,
    "resources/list": _PAGED,
    "resources/templates/list": _PAGED,
    "tools/call": {
        _OLD: _record(**_META, **_CALLED),
        _NOVEMBER: _record(**_META, **_CALLED, **_TASK_REQUEST),
        MODERN: _record(**_RETRY, **_CALLED),
    },
    "prompts/get": {_OLD: _record(**_META, **_PROMPT), MODERN: _record(**_RETRY, **_PROMPT)},
    "resources/read": {_OLD: _record(**_META, **_URI), MODERN: _record(**_RETRY, **_URI)},
    "completion/complete": {
        _OLD: _record(**_META, **_COMPLETE),
        _JUNE: _record(**_META, **_COMPLETE_06),
        MODERN: _record(**_META_NEW, **_COMPLETE_06),
    },
    "tasks/list": {_NOVEMBER: _record(**_META, **_PAGE), MODERN: None},
    "tasks/result": {_NOVEMBER: _record(**_META, **_TASK_ID), MODERN: None},
    "tasks/get": _BY_TASK,
    "tasks/cancel": _BY_TASK,
    "tasks/update": {MODERN: _record(**_META_NEW, **_TASK_ID, inputResponses_=_OBJECT)},
}
_NOTED: Final = {"meta_": _OBJECT}
_NOTED_ONLY: Final = {_OLD: _record(**_NOTED), MODERN: None}
_PROGRESS: Final = {"progressToken": _TOKEN, "progress": _NUMBER, "total_": _NUMBER}
_NOTICES: Final[Mapping[str, Mapping[str, _Shape | None]]] = {
    "notifications/cancelled": {
        _OLD: _record(**_NOTED, requestId=_TOKEN, reason_=_TEXT),
        _NOVEMBER: _record(**_NOTED, requestId_=_TOKEN, reason_=_TEXT),
        MODERN: _record(**_NOTED, requestId=_TOKEN, reason_=_TEXT),
    },
    "notifications/progress": {
        _OLD: _record(**_NOTED, **_PROGRESS),
        _MARCH: _record(**_NOTED, **_PROGRESS, message_=_TEXT),
        MODERN: None,
    },
    "notifications/initialized": _NOTED_ONLY,
    "notifications/roots/list_changed": _NOTED_ONLY,
    "notifications/tasks/status": {_NOVEMBER: _TASK, MODERN: None},
}

_RESOURCE: Final = _record(uri=_TEXT, mimeType_=_TEXT, text_=_TEXT, blob_=_TEXT)
_MEDIA: Final = _record(data=_TEXT, mimeType=_TEXT)
_BLOCKS: Final = {"text": _record(text=_TEXT), "image": _MEDIA}
_BLOCKS_03: Final = {**_BLOCKS, "audio": _MEDIA}
_BLOCKS_11: Final = {
    **_BLOCKS_03,
    "tool_use": _record(id=_TEXT, name=_TEXT, input=_OBJECT),
    "tool_result": _record(
        toolUseId=_TEXT,
        content=_list_of(
            _by(
                "type",
                **_BLOCKS_03,
                resource=_record(resource=_RESOURCE),
                resource_link=_record(uri=_TEXT, name=_TEXT),
            )
        ),
        isError_=_FLAG,
    ),
}


def _sampled(content: _Shape) -> _Shape:
    return _record(**_NOTED, role=_ROLE, content=content, model=_TEXT, stopReason_=_TEXT)


def _elicited(*kinds: type) -> _Shape:
    def field(value: Json) -> str:
        if type(value) is list and list in kinds:
            return _list_of(_TEXT)(value)
        return "" if type(value) in kinds else " must be a string, a number, true or false"

    action = _among("accept", "decline", "cancel")
    return _record(**_NOTED, action=action, content_=_map_of(field))


_ROOTS: Final = _record(**_NOTED, roots=_list_of(_record(**_URI, name_=_TEXT)))
_ANSWERS: Final[Mapping[str, Mapping[str, _Shape | None]]] = {
    "elicitation/create": {
        _JUNE: _elicited(str, int, float, bool),
        _NOVEMBER: _elicited(str, int, float, bool, list),
    },
    "sampling/createMessage": {
        _OLD: _sampled(_by("type", **_BLOCKS)),
        _MARCH: _sampled(_by("type", **_BLOCKS_03)),
        _NOVEMBER: _sampled(_one_or_many(_by("type", **_BLOCKS_11))),
    },
    "roots/list": {_OLD: _ROOTS},
}


def _for_versions(
    table: Mapping[str, Mapping[str, _Shape | None]],
) -> Mapping[str, Mapping[str, _Shape]]:
    """The table turned round, version → method → shape: one look-up less for every call."""
    turned: dict[str, dict[str, _Shape]] = {version: {} for version in (*LEGACY, MODERN)}
    for method, shapes in table.items():
        for version, methods in turned.items():
            since = max((start for start in shapes if start <= version), default=None)
            if since is not None and (shape := shapes[since]) is not None:
                methods[method] = shape
    return turned


_REQUESTS_OF: Final = _for_versions(_REQUESTS)
_NOTICES_OF: Final = _for_versions(_NOTICES)
_ANSWERS_OF: Final = _for_versions(_ANSWERS)


def check_params(call: Call) -> Error | None:
    """What is wrong with the params of `call` for its client's version; None if nothing.

    A method that this version does not have is not checked (extensions)."""
    return check_request(call.method, call.params, call.version)


def check_request(method: str, params: dict[str, Json], version: str) -> Error | None:
    """As check_params, for a request that an edge answers itself (initialize, logging/setLevel, …)."""
    shape = _REQUESTS_OF[version].get(method)
    wrong = shape(params) if shape else ""
    return Error(INVALID_PARAMS, f"params{wrong}", status=400) if wrong else None


def check_notice(notice: Notice, version: str) -> Error | None:
    """What is wrong with a client's notification; None also for one that is not in the version."""
    shape = _NOTICES_OF[version].get(notice.method)
    wrong = shape(notice.params) if shape else ""
    return Error(INVALID_PARAMS, f"{notice.method}: params{wrong}") if wrong else None


def check_answer(method: str, result: Json, version: str) -> Error | None:
    """What is wrong with a client's result of the ask `method`; None also for unknown methods."""
    shape = _ANSWERS_OF[version].get(method)
    wrong = shape(result) if shape else ""
    return Error(INVALID_PARAMS, f"{method}: result{wrong}") if wrong else None


# ---- Patterns ----
# A schema's regular expressions are ECMA-262 and come from strangers. They run on Rust's engine: it
# is linear in the text, but also in the size of the expression: "[01]*1[01]{3000}" takes 23 us a
# character. So the size is counted (a repetition counts as often as it repeats), and text times
# size is paid for from the budget of the validation. Look-around and back-references have no linear
# engine: such a pattern is not checked, and the tool's warnings say so.

_PATTERN_SIZE: Final = 5_000  # steps and characters; compiling that takes 5 ms
# With so few steps there are at most 4,096 sets of them, which the engine keeps: 10 ns a character.
_PATTERN_SMALL: Final = 12
_PATTERN_TOKENS: Final = re.compile(
    r"\[\^?\]|\[\^?(?:\\.|[^\\\]])+\]|\(\?[a-zA-Z-]+[:)]|\(\?P?<[A-Za-z_]\w*>|\(\?:|\(\?.?.?"
    r"|\{\d+(?:,\d*)?\}"
    r"|\\(?:u\{[0-9A-Fa-f]+\}|u[0-9A-Fa-f]{4}|x[0-9A-Fa-f]{2}|[pP]\{[^}]*\}|c[A-Za-z]|.)|.",
    re.DOTALL,
)
_CLASS_TOKENS: Final = re.compile(
    r"\\(?:u\{[0-9A-Fa-f]+\}|u[0-9A-Fa-f]{4}|[pP]\{[^}]*\}|.)|.", re.DOTALL
)
_SPACES: Final = r"\t\n\x0b\x0c\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
# In ECMA-262 \d and \w are ASCII and `.` stops at four line ends; in Rust they are Unicode (a \w
# alone compiles to hundreds of steps) and \< is the begin of a word.
_ESCAPES: Final = {
    r"\d": ("[0-9]", 1),
    r"\D": ("[^0-9]", 4),
    r"\w": ("[A-Za-z0-9_]", 1),
    r"\W": ("[^A-Za-z0-9_]", 4),
    r"\s": (f"[{_SPACES}]", 4),
    r"\S": (f"[^{_SPACES}]", 4),
    r"\b": (r"(?-u:\b)", 1),
    r"\B": (r"(?-u:\B)", 1),
    r"\0": (r"\x00", 1),
    r"\<": ("<", 1),
    r"\>": (">", 1),
    ".": (r"[^\n\r\u2028\u2029]", 4),
    "[]": (r"[^\s\S]", 1),
    "[^]": (r"[\s\S]", 4),
    "]": (r"\]", 1),
    "{": (r"\{", 1),
    "}": (r"\}", 1),
}
# What Rust would read in a class as an operator on sets ("[", "&&", "--", "~~"), or in another way.
_IN_CLASS: Final = _ESCAPES | {
    r"\b": (r"\x08", 1),
    r"\B": ("B", 1),
    "[": (r"\[", 1),
    "&": (r"\&", 1),
    "~": (r"\~", 1),
    ".": (".", 1),
    "{": ("{", 1),
    "}": ("}", 1),
}


class _Pattern:
    """A compiled pattern, and what it costs to try it on a text."""

    __slots__ = ("_found", "_rate", "_reach", "size")

    def __init__(self, found: Callable[[str], bool], size: int, anchored: bool) -> None:
        self._found, self.size = found, size
        # In twentieths of a unit a character: 10 ns, else 20 ns a step and some for few steps.
        self._rate = 1 if size <= _PATTERN_SMALL else (size + 16) * 20 // 12
        # Without an open repetition an anchored pattern is done after `size` characters.
        self._reach = size + 1 if anchored else sys.maxsize

    def finds(self, text: str, run: _Run) -> bool:
        """Whether the pattern occurs in `text`."""
        length = min(len(text), self._reach)
        run.spend(4 + (length if text.isascii() else 4 * length) * self._rate // 20)
        return self._found(text)


class _Translation:
    """An ECMA-262 pattern in Rust's words, with its size; ValueError for what the engine has not."""

    def __init__(self, pattern: str) -> None:
        self.out: list[str] = []
        self.size, self._last = 0, 0  # the whole, and what a quantifier here would repeat
        self._groups: list[int] = []  # the size before each open group
        self.open_ended = False
        for token in _PATTERN_TOKENS.findall(pattern):
            self._take(token)
            if self.size > _PATTERN_SIZE:
                raise ValueError("it is too large")

    def _take(self, token: str) -> None:
        if token in ("*", "+", "|"):
            self.open_ended = True
            self.out.append(token)
        elif token in ("?", "^", "$"):
            self.out.append(token)
        elif token[0] == "(":
            self._open(token)
        elif token == ")":
            self.out.append(token)
            self._last = self.size - (self._groups.pop() if self._groups else 0)
        elif token[0] == "{" and len(token) > 1:
            self._repeat(token)
        elif token[0] == "[" and token not in _ESCAPES:
            self._class(token)
        else:
            self._atom(*_step(token, _ESCAPES))

    def _atom(self, text: str, size: int) -> None:
        self.out.append(text)
        self._last = size
        self.size += size

    def _open(self, token: str) -> None:
        if token[:3] in ("(?=", "(?!") or token[:4] in ("(?<=", "(?<!"):
            raise ValueError("it looks around")
        self.out.append(token)
        if not token.endswith(")"):
            self._groups.append(self.size)

    def _class(self, token: str) -> None:
        negated = token.startswith("[^")
        size = 4 if negated else 1
        parts: list[str] = []
        for inner in _CLASS_TOKENS.findall(token[1 + negated : -1]):
            text, weight = _step(inner, _IN_CLASS)
            parts.append(r"\-" if text == "-" and parts[-1:] == ["-"] else text)
            size += weight - 1
        self._atom(f"[{'^' * negated}{''.join(parts)}]", size)

    def _repeat(self, token: str) -> None:
        least, comma, most = token[1:-1].partition(",")
        if len(least) > 6 or len(most) > 6:
            raise ValueError("it is too large")
        endless = bool(comma) and not most
        self.open_ended |= endless
        times = max(1, int(least) + endless, int(most or 0))
        self.size += self._last * (times - 1)
        self._last *= times
        self.out.append(token)


def _step(token: str, known: Mapping[str, tuple[str, int]]) -> tuple[str, int]:
    """One step in Rust's words, and how much it compiles to."""
    if token[0] == "\\" and token[1:2] in tuple("123456789k"):
        raise ValueError("it refers back")
    if token[:2] in (r"\p", r"\P"):
        return token, 150  # \p{L} compiles to some hundred states
    ascii_only = token.isascii() and token[:2] != r"\u"
    return known.get(token, (token, 1 if ascii_only else 3))


@functools.lru_cache(maxsize=256)
def _pattern(pattern: str) -> _Pattern | str:
    """The compiled pattern, or why it cannot be checked."""
    from pydantic_core import SchemaError, SchemaValidator, core_schema

    if len(pattern) > _PATTERN_SIZE:
        return "it is too large"
    try:
        translation = _Translation(pattern)
        schema = core_schema.str_schema(
            pattern="".join(translation.out), regex_engine="rust-regex", strict=True
        )
        found = SchemaValidator(schema).isinstance_python
    except (ValueError, SchemaError) as error:
        known = not isinstance(error, SchemaError) and str(error).startswith("it ")
        return str(error) if known else "the engine cannot read it"
    anchored = pattern.startswith("^") and not translation.open_ended
    return _Pattern(found, translation.size, anchored)


# ---- Schemas ----
# Arguments against `inputSchema`, which both come from strangers, on the one loop that serves all.
# jsonschema cannot be bounded to 50 ms: it takes 5 us a node, so that an honest array of 20,000
# items takes 0.1 s; each branch that fails prints the whole instance, 4 MiB of it, for each message;
# `pattern` backtracks and `uniqueItems` is quadratic. So a schema is compiled to closures here, one
# per keyword, kept by the type of the value they look at (0.2 us a node); `referencing` resolves
# `$ref`, in memory alone, and jsonschema is the oracle of the tests.
#
# Everything is paid for. A unit is about 0.2 us: a node visited is one, what takes longer (a pattern
# on a long text, a canonical form, compiling a node, which happens when it is first met) costs more.
# A validation that has spent its units is refused. Nothing is measured by a clock, so that the same
# call has the same end on every machine.
#
# A trial (`anyOf`, `not`, `if`, …) wants a verdict alone: it stops at the first failure and writes
# no text. Otherwise a keyword that fails goes on, writes what it expected, and its parents put the
# path in front on the way back. So a valid call pays nothing for messages.

_UNITS: Final = 200_000
_REFERENCES: Final = 10_000
_VIOLATIONS: Final = 5
_SCHEMA_DEPTH: Final = 128  # of the JSON; at two frames a level far from Python's recursion limit
_SCHEMA_BYTES: Final = 1024 * 1024
_SCHEMA_NODES: Final = 5_000  # objects and arrays; looking at them all takes 30 ms
_SCHEMA_VALUES: Final = 20_000  # members and items; as one `enum` they take 10 ms to prepare
_SCHEMA_PATTERNS: Final = 10_000  # steps and characters of all patterns of a tool
_SCHEMA_NAME: Final = 1_000  # characters; longer names make the look-up of a member slow
_SCHEMA_REFERENCES: Final = 500  # different ones; resolving one takes 15 us, with dynamic ones 50
_SCHEMA_IDENTIFIERS: Final = 100
_MANY: Final = 32  # items, from which on it pays to look at their types first
_COMPILED: Final = 20_000  # nodes that one schema may come to, by its references
_SHOWN: Final = 60  # characters of a value that a message quotes
_CHOICES: Final = 20  # allowed values that a message names

_Test: TypeAlias = "Callable[[Json, _Run], bool]"
_KINDS: Final = (dict, list, str, int, float, bool, type(None))
_NUMBERS: Final = (int, float)
_TYPES: Final[Mapping[str, tuple[str, tuple[type, ...]]]] = {
    "object": ("an object", (dict,)),
    "array": ("an array", (list,)),
    "string": ("a string", (str,)),
    "number": ("a number", _NUMBERS),
    "integer": ("an integer", _NUMBERS),
    "boolean": ("true or false", (bool,)),
    "null": ("null", (type(None),)),
}
_NO_VALUE: Final = object()


class _Exhausted(Exception):
    """A validation has spent what it may."""


class _Unusable(Exception):
    """A definition that must be hidden; the text says why."""


class _Violation:
    """What was expected, and the steps to where, the last one first."""

    __slots__ = ("steps", "text")

    def __init__(self, text: str) -> None:
        self.steps: list[str | int] = []
        self.text = text

    def __str__(self) -> str:
        path = "".join(
            f"[{step}]" if isinstance(step, int) else f".{_cut(step)}"
            for step in reversed(self.steps)
        )
        if len(path) > 300:
            path = f"{path[:150]}…{path[-150:]}"
        return f"{path} {self.text}"


class _Run:
    """One validation: what it may still spend, whether it is a trial, and what it found."""

    __slots__ = ("left", "references", "trial", "found")

    def __init__(self, units: int = _UNITS) -> None:
        self.left, self.references, self.trial = units, _REFERENCES, 0
        self.found: list[_Violation] = []

    def spend(self, units: int) -> None:
        """Pay for something; raises _Exhausted."""
        if units > self.left:
            raise _Exhausted
        self.left -= units

    def fail(self, text: str, value: Json = _NO_VALUE) -> bool:
        """False; and unless this is a trial, the violation is noted."""
        if not self.trial:
            given = "" if value is _NO_VALUE else f", but is {_shown(value)}"
            self.found.append(_Violation(text + given))
        return False

    def under(self, step: str | int | None, mark: int) -> int:
        """Put `step` before the path of what was found since `mark`; the next mark, -1 if it is enough."""
        if step is not None:
            for violation in self.found[mark:]:
                violation.steps.append(step)
        return len(self.found) if len(self.found) < _VIOLATIONS else -1

    def accepts(self, node: _Node, value: Json) -> bool:
        """A trial: the verdict alone."""
        self.left -= 1
        self.trial += 1
        verdict = node.check(value, self)
        self.trial -= 1
        return verdict

    def any_accepts(self, nodes: list[_Node], value: Json) -> bool:
        """A trial of all, until one accepts."""
        self.trial += 1
        verdict = False
        for node in nodes:
            if node.check(value, self):
                verdict = True
                break
        self.trial -= 1
        return verdict

    def all_fit(self, children: Iterable[tuple[str | int | None, _Node, Json]]) -> bool:
        """Whether each value fits its node; the first member is the step to it, None for none."""
        good, mark = True, len(self.found)
        for step, node, value in children:
            if not node.check(value, self):
                good = False
                if self.trial or (mark := self.under(step, mark)) < 0:
                    return False
        return good


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _shown(value: Json) -> str:
    """`value` for a message, in few characters however large it is."""
    if isinstance(value, str):
        return json.dumps(_cut(value), ensure_ascii=False)
    if isinstance(value, dict):
        return "an object"
    return f"an array of {len(value)} items" if isinstance(value, list) else json.dumps(value)


def _quoted(value: Json) -> str:
    """A value of the schema (which is bounded) for a message: what is allowed is shown in full."""
    return _cut(orjson.dumps(value).decode()) if isinstance(value, (dict, list)) else _shown(value)


def _choices(values: Sequence[Json]) -> str:
    names = ", ".join(_quoted(value) for value in values[:_CHOICES])
    return names + (f" (and {len(values) - _CHOICES} more)" if len(values) > _CHOICES else "")


def _described(schema: Json) -> str:
    """A schema in some words, for "must be … or …"."""
    if not isinstance(schema, dict):
        return "anything" if schema else "absent"
    if "const" in schema:
        return _quoted(schema["const"])
    if "enum" in schema:
        return f"one of {_choices(schema['enum'])}"
    if "type" in schema:
        return _type_names(schema["type"])
    return "what its schema describes"


def _type_names(names: str | list[str]) -> str:
    return " or ".join(_TYPES[name][0] for name in ([names] if isinstance(names, str) else names))


@dataclasses.dataclass(frozen=True, slots=True)
class _Rule:
    """A keyword: the types of value it looks at, and what makes a test of it (None: nothing to test)."""

    kinds: tuple[type, ...]
    build: Callable[[_Node, dict[str, Json]], _Test | None]


@dataclasses.dataclass(frozen=True, slots=True)
class _Dialect:
    """One version of JSON Schema. `specification` is that of `referencing`."""

    draft: int
    specification: Any  # its types are imported when the first definition comes
    rules: Mapping[str, _Rule]


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where references start: a resolver, and a key that is equal where they lead to the same."""

    resolver: Any
    key: tuple[Json, ...]


class _Node:
    """One schema at one place, compiled when it is first met."""

    __slots__ = ("home", "schema", "place", "never", "tests")

    def __init__(self, home: _Schema, schema: Json, place: _Place) -> None:
        self.home, self.schema, self.place = home, schema, place
        self.never: _Test | None = None
        self.tests: dict[type, list[_Test]] | None = None

    def check(self, value: Json, run: _Run) -> bool:
        """Whether `value` fits."""
        run.left -= 1
        if run.left < 0:
            raise _Exhausted
        good = True
        for test in (self.tests or self.tests_in(run))[type(value)]:
            if not test(value, run):
                if run.trial:
                    return False
                good = False
        return good

    def admits(self, value: Json, run: _Run) -> bool:
        """Whether `value` has a type that may fit at all."""
        tests = self.tests_in(run)[type(value)]
        return not tests or tests[0] is not self.never

    def child(self, schema: Json) -> _Node:
        """The node of a subschema."""
        return self.home.node(schema, self.home.enter(schema, self.place))

    def target(self, keyword: str) -> _Node:
        """The node that a reference leads to."""
        return self.home.node(*self.home.target(self.place, keyword, self.schema[keyword]))

    def tests_in(self, run: _Run) -> dict[type, list[_Test]]:
        """The tests by type of value; made now if there are none."""
        if self.tests is not None:
            return self.tests
        before = self.home.size
        if isinstance(self.schema, dict):
            tests = self._compiled(self.schema)
        else:
            refused: _Test = lambda value, run: run.fail("must not be there")  # noqa: E731
            tests = {kind: [] if self.schema else [refused] for kind in _KINDS}
        self.tests = tests
        # 8 us, and 2 us for each new node; twice that where the garbage collector looks at them.
        run.spend(80 + 10 * (self.home.size - before))
        return tests

    def _compiled(self, schema: dict[str, Json]) -> dict[type, list[_Test]]:
        dialect = self.home.dialect
        if dialect.draft <= 7 and "$ref" in schema:
            schema = {"$ref": schema["$ref"]}  # draft 7, section 8.3: its siblings are ignored
        tests: dict[type, list[_Test]] = {kind: [] for kind in _KINDS}
        built = set()
        for keyword in schema:
            rule = dialect.rules.get(keyword)
            if rule is None or rule.build in built:
                continue
            built.add(rule.build)
            test = rule.build(self, schema)
            for kind in rule.kinds if test else ():
                tests[kind].append(cast(_Test, test))
        if "type" in schema:
            self._typed(schema["type"], tests)
        return tests

    def _typed(self, names: str | list[str], tests: dict[type, list[_Test]]) -> None:
        """`type`, as the tests of the types that it refuses: the others pay nothing for it."""
        names = [names] if isinstance(names, str) else names
        text = "must be " + _type_names(names)
        never: _Test = lambda value, run: run.fail(text, value)  # noqa: E731
        self.never = never
        allowed = {kind for name in names for kind in _TYPES[name][1]}
        for kind in _KINDS:
            if kind not in allowed:
                tests[kind] = [never]
        if "integer" in names and "number" not in names:
            tests[float].insert(0, lambda value, run: value.is_integer() or run.fail(text, value))

    # ---- which members has a schema looked at? (2020-12, section 11: unevaluated…) ----

    def covered(self, value: Json, run: _Run, own: bool = False) -> set[Json]:
        """The names or indexes that this schema looks at in a `value` that it accepts.

        `own`: asked by the node's own `unevaluated…`, which then does not count."""
        schema = self.schema
        if not isinstance(schema, dict):
            return set()
        run.spend(20 + 2 * len(schema) + 2 * len(value))
        for keyword in ("unevaluatedProperties", "additionalProperties"):
            if type(value) is dict and keyword in schema and not (own and keyword[0] == "u"):
                return set(value)
        if type(value) is list and self._covers_rest(schema, own):
            return set(range(len(value)))
        seen = (
            self._covered_items(value, run)
            if type(value) is list
            else self._covered_names(value, run)
        )
        for node in self._in_place(value, run):
            seen |= node.covered(value, run)
        return seen

    def _covers_rest(self, schema: dict[str, Json], own: bool) -> bool:
        if "unevaluatedItems" in schema and not own:
            return True
        if self.home.dialect.draft >= 2020:
            return "items" in schema
        listed = isinstance(schema.get("items"), list)
        return ("additionalItems" in schema) if listed else ("items" in schema)

    def _covered_names(self, value: dict[str, Json], run: _Run) -> set[Json]:
        seen: set[Json] = value.keys() & self.schema.get("properties", {}).keys()
        for pattern in self.schema.get("patternProperties", ()):
            known = self.home.pattern(pattern)
            # A pattern that cannot be checked may have matched: nothing is refused for it.
            seen |= {
                name for name in value if not isinstance(known, _Pattern) or known.finds(name, run)
            }
        return seen

    def _covered_items(self, value: list[Json], run: _Run) -> set[Json]:
        first = self.schema.get("prefixItems" if self.home.dialect.draft >= 2020 else "items", ())
        seen: set[Json] = set(range(min(len(first), len(value))))
        if "contains" in self.schema and self.home.dialect.draft >= 2020:
            node = self.child(self.schema["contains"])
            seen |= {index for index, item in enumerate(value) if run.accepts(node, item)}
        return seen

    def _in_place(self, value: Json, run: _Run) -> Iterator[_Node]:
        """The subschemas that apply to `value` itself, and accept it."""
        schema = self.schema
        for keyword in _REFERENCE_KEYWORDS:
            if keyword in schema and keyword in self.home.dialect.rules:
                yield self.target(keyword)
        for part in schema.get("allOf", ()):
            yield self.child(part)
        for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
            if run.accepts(self.child(part), value):
                yield self.child(part)
        if "if" in schema:
            chosen = "else"
            if run.accepts(self.child(schema["if"]), value):
                chosen = "then"
                yield self.child(schema["if"])
            if chosen in schema:
                yield self.child(schema[chosen])
        for name, part in schema.get("dependentSchemas", {}).items():
            if type(value) is dict and name in value:
                yield self.child(part)


# ---- Keywords: a node and its schema to a test ----


def _asserting(fits: Callable[[Json], bool], text: str) -> _Test:
    return lambda value, run: fits(value) or run.fail(text, value)


def _referring(keyword: str) -> Callable[[_Node, dict[str, Json]], _Test]:
    def build(node: _Node, schema: dict[str, Json]) -> _Test:
        target = node.target(keyword)

        def test(value: Json, run: _Run) -> bool:
            run.references -= 1
            if run.references < 0:
                raise _Exhausted
            return target.check(value, run)

        return test

    return build


def _members(node: _Node, schema: dict[str, Json]) -> _Test | None:
    """properties, patternProperties and additionalProperties."""
    known = {name: node.child(part) for name, part in schema.get("properties", {}).items()}
    patterns = [
        (node.home.pattern(pattern), node.child(part))
        for pattern, part in schema.get("patternProperties", {}).items()
    ]
    rest = node.child(schema.get("additionalProperties", True))
    if rest.schema is False:
        rest = _refusing(node, f"is not a known property; known are {_choices([*known]) or 'none'}")
    anything = node.home.anything
    if patterns:
        return _members_by_pattern(known, patterns, rest, anything)
    if rest is anything and not known:
        return None

    def test(value: Json, run: _Run) -> bool:
        run.left -= len(value)
        good, mark = True, len(run.found)
        for name, item in value.items():
            part = known.get(name, rest)
            if part is not anything and not part.check(item, run):
                good = False
                if run.trial or (mark := run.under(name, mark)) < 0:
                    return False
        return good

    return test


def _members_by_pattern(
    known: dict[str, _Node],
    patterns: list[tuple[_Pattern | str, _Node]],
    rest: _Node,
    anything: _Node,
) -> _Test:
    usable = [(pattern, part) for pattern, part in patterns if isinstance(pattern, _Pattern)]
    # A pattern that cannot be checked may have meant any name: none is refused for it.
    other = rest if len(usable) == len(patterns) else anything

    def parts(value: dict[str, Json], run: _Run) -> Iterator[tuple[str, _Node, Json]]:
        for name, item in value.items():
            matching = [part for pattern, part in usable if pattern.finds(name, run)]
            if name in known:
                matching.append(known[name])
            for part in matching or (other,):
                yield name, part, item

    return lambda value, run: run.all_fit(parts(value, run))


def _refusing(node: _Node, text: str) -> _Node:
    refusing = _Node(node.home, False, node.place)
    refused: _Test = lambda value, run: run.fail(text)  # noqa: E731
    refusing.tests = {kind: [refused] for kind in _KINDS}
    return refusing


def _elements(node: _Node, schema: dict[str, Json]) -> _Test | None:
    """prefixItems and items; before 2020-12 the two forms of items, and additionalItems."""
    items = schema.get("items", True)
    first = schema.get("prefixItems", []) if node.home.dialect.draft >= 2020 else []
    if isinstance(items, list):
        first, items = items, schema.get("additionalItems", True)
    parts = [node.child(part) for part in first]
    rest = node.child(items)
    if rest.schema is False:
        rest = _refusing(node, f"is one item too many; {len(parts)} are allowed")
    anything, count = node.home.anything, len(parts)
    if rest is anything:
        return (
            (lambda value, run: run.all_fit(zip(itertools.count(), parts, value)))
            if parts
            else None
        )

    def test(value: Json, run: _Run) -> bool:
        if len(value) > _MANY and not parts and _all_free(rest, value, run):
            return True
        good, mark = True, len(run.found)
        for index, item in enumerate(value):
            part = parts[index] if index < count else rest
            if not part.check(item, run):
                good = False
                if run.trial or (mark := run.under(index, mark)) < 0:
                    return False
        return good

    return test


def _all_free(rest: _Node, value: list[Json], run: _Run) -> bool:
    """Whether all items have types that `rest` has no tests for: 15 ns a number instead of 150."""
    run.spend(len(value) >> 3)
    tests = rest.tests_in(run)
    return not any(tests[kind] for kind in {*map(type, value)})


def _property_names(node: _Node, schema: dict[str, Json]) -> _Test:
    part = node.child(schema["propertyNames"])
    return lambda value, run: run.all_fit((f"{name} (its name)", part, name) for name in value)


def _required(node: _Node, schema: dict[str, Json]) -> _Test | None:
    names: list[str] = schema["required"]
    if not isinstance(names, list):
        return None
    cost = len(names) // 4 + sum(map(len, names)) // 1024

    def test(value: Json, run: _Run) -> bool:
        run.left -= cost
        for name in names:
            if name not in value:
                return _missing(names, value, run)
        return True

    return test


def _missing(names: list[str], value: dict[str, Json], run: _Run) -> bool:
    if run.trial:
        return False
    lacking = [name for name in names if name not in value]
    return run.fail(f"must have the required {_choices(lacking)}")


def _dependent_required(node: _Node, schema: dict[str, Json]) -> _Test:
    return _dependent(node, schema["dependentRequired"])


def _dependent_schemas(node: _Node, schema: dict[str, Json]) -> _Test:
    return _dependent(node, schema["dependentSchemas"])


def _dependencies(node: _Node, schema: dict[str, Json]) -> _Test:
    return _dependent(node, schema["dependencies"])


def _dependent(node: _Node, parts: dict[str, Json]) -> _Test:
    """name → the schema, or the names, that its presence asks for."""
    wanted = [
        (
            name,
            _required(node, {"required": part})
            if isinstance(part, list)
            else node.child(part).check,
        )
        for name, part in parts.items()
    ]

    def test(value: Json, run: _Run) -> bool:
        run.left -= len(wanted) // 4
        good = True
        for name, fits in wanted:
            if name in value and fits is not None and not fits(value, run):
                good = False
                if run.trial or len(run.found) >= _VIOLATIONS:
                    return False
        return good

    return test


def _all_of(node: _Node, schema: dict[str, Json]) -> _Test:
    parts = [node.child(part) for part in schema["allOf"]]
    return lambda value, run: run.all_fit((None, part, value) for part in parts)


def _any_of(node: _Node, schema: dict[str, Json]) -> _Test:
    parts = [node.child(part) for part in schema["anyOf"]]

    return lambda value, run: run.any_accepts(parts, value) or _none_fits(parts, value, run)


def _none_fits(parts: list[_Node], value: Json, run: _Run) -> bool:
    """No alternative fits: what the only one of the right type lacks, or what they all are."""
    if run.trial:
        return False
    run.spend(len(parts))
    likely = [part for part in parts if part.admits(value, run)]
    if len(likely) == 1:
        return likely[0].check(value, run)
    texts = dict.fromkeys(_described(part.schema) for part in parts[:_CHOICES])
    return run.fail("must be " + " or ".join([*texts][:_VIOLATIONS]), value)


def _one_of(node: _Node, schema: dict[str, Json]) -> _Test:
    parts = [node.child(part) for part in schema["oneOf"]]

    def test(value: Json, run: _Run) -> bool:
        fitting = 0
        for part in parts:
            fitting += run.accepts(part, value)
            if fitting > 1:
                text = f"must fit exactly one of {len(parts)} alternatives, but fits more than one"
                return run.fail(text)
        return fitting == 1 or _none_fits(parts, value, run)

    return test


def _not(node: _Node, schema: dict[str, Json]) -> _Test:
    part, text = node.child(schema["not"]), f"must not be {_described(schema['not'])}"
    return lambda value, run: not run.accepts(part, value) or run.fail(text, value)


def _condition(node: _Node, schema: dict[str, Json]) -> _Test:
    part = node.child(schema["if"])
    then, other = node.child(schema.get("then", True)), node.child(schema.get("else", True))

    def test(value: Json, run: _Run) -> bool:
        return (then if run.accepts(part, value) else other).check(value, run)

    return test


def _contains(node: _Node, schema: dict[str, Json]) -> _Test:
    part = node.child(schema["contains"])
    counted = node.home.dialect.draft >= 2019
    least = schema.get("minContains", 1) if counted else 1
    most = schema.get("maxContains", math.inf) if counted else math.inf
    text = f"must contain at least {least} items that are {_described(schema['contains'])}"
    too_many = f"must contain at most {most} items that are {_described(schema['contains'])}"

    def test(value: Json, run: _Run) -> bool:
        count = 0
        for item in value:
            count += run.accepts(part, item)
            if count > most:
                return run.fail(too_many)
            if count >= least and most == math.inf:
                return True
        return count >= least or run.fail(text)

    return test


def _unevaluated(keyword: str) -> Callable[[_Node, dict[str, Json]], _Test | None]:
    def build(node: _Node, schema: dict[str, Json]) -> _Test | None:
        rest = node.child(schema[keyword])
        if rest is node.home.anything:
            return None
        if rest.schema is False:
            rest = _refusing(node, "is not allowed here: nothing in the schema describes it")

        def test(value: Json, run: _Run) -> bool:
            seen = node.covered(value, run, own=True)
            items = value.items() if type(value) is dict else enumerate(value)
            return run.all_fit((step, rest, item) for step, item in items if step not in seen)

        return test

    return build


def _unique(node: _Node, schema: dict[str, Json]) -> _Test | None:
    def test(value: Json, run: _Run) -> bool:
        run.spend(len(value) >> 1)
        if {*map(type, value)} == {str} and len({*value}) == len(value):
            return True
        seen = set()
        for index, item in enumerate(value):
            key = _canonical(item, run)
            if key in seen:
                return run.fail(
                    f"must have no equal items, but item {index} repeats an earlier one"
                )
            seen.add(key)
        return True

    return test if schema["uniqueItems"] else None


# What may be a float in JSON. A text that looks like one only takes the longer way.
_FLOAT: Final = re.compile(rb"[0-9][.e]")


def _canonical(value: Json, run: _Run) -> str | bytes:
    """Equal for equal JSON (1 and 1.0; not 1 and true; in any order of keys), and for nothing else.

    Bytes and not tuples: Python's hash of a number can be chosen by whoever sends it."""
    kind = type(value)
    if kind is str:
        run.left -= len(value) >> 10
        return cast(str, value)
    run.spend(2)
    if kind is int or (kind is float and value.is_integer()):
        return b"%d" % int(value)
    if kind is not dict and kind is not list:
        return repr(value).encode()
    encoded = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    run.spend(3 + (len(encoded) >> 6))
    if b"." in encoded or b"e" in encoded:
        run.spend(len(encoded) >> 4)
        if _FLOAT.search(encoded):
            encoded = orjson.dumps(_plain(value, run), option=orjson.OPT_SORT_KEYS)
    # A copy: what orjson gives holds 1 KiB, and keeping many of those takes 3 us of page faults each.
    return bytes(memoryview(encoded))


def _plain(value: Json, run: _Run) -> Json:
    run.spend(3)
    kind = type(value)
    if kind is float and value.is_integer() and int(value) in SAFE_INTEGERS:
        return int(value)
    if kind is dict:
        return {name: _plain(item, run) for name, item in value.items()}
    return [_plain(item, run) for item in value] if kind is list else value


def _enum(node: _Node, schema: dict[str, Json]) -> _Test:
    return _equal_to_one(schema["enum"], f"must be one of {_choices(schema['enum'])}")


def _const(node: _Node, schema: dict[str, Json]) -> _Test:
    return _equal_to_one([schema["const"]], f"must be {_quoted(schema['const'])}")


def _equal_to_one(values: list[Json], text: str) -> _Test:
    free = _Run(sys.maxsize)  # the schema is bounded already
    allowed = {_canonical(value, free) for value in values}
    return lambda value, run: _canonical(value, run) in allowed or run.fail(text, value)


def _minimum(node: _Node, schema: dict[str, Json]) -> _Test:
    least = schema["minimum"]
    if schema.get("exclusiveMinimum") is True:  # draft 4
        return _asserting(lambda value: value > least, f"must be more than {least}")
    return _asserting(lambda value: value >= least, f"must be at least {least}")


def _maximum(node: _Node, schema: dict[str, Json]) -> _Test:
    most = schema["maximum"]
    if schema.get("exclusiveMaximum") is True:  # draft 4
        return _asserting(lambda value: value < most, f"must be less than {most}")
    return _asserting(lambda value: value <= most, f"must be at most {most}")


def _exclusive_minimum(node: _Node, schema: dict[str, Json]) -> _Test | None:
    least = schema["exclusiveMinimum"]
    if type(least) is bool:
        return None
    return _asserting(lambda value: value > least, f"must be more than {least}")


def _exclusive_maximum(node: _Node, schema: dict[str, Json]) -> _Test | None:
    most = schema["exclusiveMaximum"]
    if type(most) is bool:
        return None
    return _asserting(lambda value: value < most, f"must be less than {most}")


def _multiple_of(node: _Node, schema: dict[str, Json]) -> _Test:
    step = schema["multipleOf"]
    text = f"must be a multiple of {step}"

    def test(value: Json, run: _Run) -> bool:
        if type(value) is int and type(step) is int:
            return value % step == 0 or run.fail(text, value)
        # As the decimals that were written: 0.3 is a multiple of 0.1, which it is not in binary.
        # 1e308 by 1e-300 are 600 digits: 20 us, and no overflow.
        run.spend(100)
        quotient = fractions.Fraction(repr(value)) / fractions.Fraction(repr(step))
        return quotient.denominator == 1 or run.fail(text, value)

    return test


def _sized(keyword: str, many: bool, what: str) -> Callable[[_Node, dict[str, Json]], _Test]:
    def build(node: _Node, schema: dict[str, Json]) -> _Test:
        limit = schema[keyword]
        if many:
            return _asserting(
                lambda value: len(value) <= limit, f"must have at most {limit} {what}"
            )
        return _asserting(lambda value: len(value) >= limit, f"must have at least {limit} {what}")

    return build


def _matching(node: _Node, schema: dict[str, Json]) -> _Test | None:
    known = node.home.pattern(schema["pattern"])
    text = f"must match the pattern {_shown(schema['pattern'])}"
    if not isinstance(known, _Pattern):
        return None
    return lambda value, run: known.finds(value, run) or run.fail(text, value)


_REFERENCE_KEYWORDS: Final = ("$ref", "$dynamicRef", "$recursiveRef")
_ON_OBJECT, _ON_ARRAY, _ON_TEXT = (dict,), (list,), (str,)
_RULES: Final[Mapping[str, _Rule]] = {
    **{keyword: _Rule(_KINDS, _referring(keyword)) for keyword in _REFERENCE_KEYWORDS},
    "enum": _Rule(_KINDS, _enum),
    "const": _Rule(_KINDS, _const),
    "required": _Rule(_ON_OBJECT, _required),
    "properties": _Rule(_ON_OBJECT, _members),
    "patternProperties": _Rule(_ON_OBJECT, _members),
    "additionalProperties": _Rule(_ON_OBJECT, _members),
    "propertyNames": _Rule(_ON_OBJECT, _property_names),
    "minProperties": _Rule(_ON_OBJECT, _sized("minProperties", False, "properties")),
    "maxProperties": _Rule(_ON_OBJECT, _sized("maxProperties", True, "properties")),
    "dependentRequired": _Rule(_ON_OBJECT, _dependent_required),
    "dependentSchemas": _Rule(_ON_OBJECT, _dependent_schemas),
    "dependencies": _Rule(_ON_OBJECT, _dependencies),
    "prefixItems": _Rule(_ON_ARRAY, _elements),
    "items": _Rule(_ON_ARRAY, _elements),
    "additionalItems": _Rule(_ON_ARRAY, _elements),
    "contains": _Rule(_ON_ARRAY, _contains),
    "minItems": _Rule(_ON_ARRAY, _sized("minItems", False, "items")),
    "maxItems": _Rule(_ON_ARRAY, _sized("maxItems", True, "items")),
    "uniqueItems": _Rule(_ON_ARRAY, _unique),
    "minLength": _Rule(_ON_TEXT, _sized("minLength", False, "characters")),
    "maxLength": _Rule(_ON_TEXT, _sized("maxLength", True, "characters")),
    "pattern": _Rule(_ON_TEXT, _matching),
    "minimum": _Rule(_NUMBERS, _minimum),
    "maximum": _Rule(_NUMBERS, _maximum),
    "exclusiveMinimum": _Rule(_NUMBERS, _exclusive_minimum),
    "exclusiveMaximum": _Rule(_NUMBERS, _exclusive_maximum),
    "multipleOf": _Rule(_NUMBERS, _multiple_of),
    "allOf": _Rule(_KINDS, _all_of),
    "anyOf": _Rule(_KINDS, _any_of),
    "oneOf": _Rule(_KINDS, _one_of),
    "not": _Rule(_KINDS, _not),
    "if": _Rule(_KINDS, _condition),
    "unevaluatedItems": _Rule(_ON_ARRAY, _unevaluated("unevaluatedItems")),
    "unevaluatedProperties": _Rule(_ON_OBJECT, _unevaluated("unevaluatedProperties")),
}
# Keywords that not every draft has: the first and the last that do.
_LIVES: Final[Mapping[str, tuple[int, int]]] = {
    "const": (6, 2020),
    "contains": (6, 2020),
    "propertyNames": (6, 2020),
    "if": (7, 2020),
    "dependencies": (4, 7),
    "dependentRequired": (2019, 2020),
    "dependentSchemas": (2019, 2020),
    "unevaluatedItems": (2019, 2020),
    "unevaluatedProperties": (2019, 2020),
    "$recursiveRef": (2019, 2019),
    "additionalItems": (4, 2019),
    "prefixItems": (2020, 2020),
    "$dynamicRef": (2020, 2020),
}
_DIALECTS: Final = {
    "json-schema.org/draft-04/schema": 4,
    "json-schema.org/draft-06/schema": 6,
    "json-schema.org/draft-07/schema": 7,
    "json-schema.org/draft/2019-09/schema": 2019,
    "json-schema.org/draft/2020-12/schema": 2020,
}
_DEFAULT_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
# Where subschemas stand: in the value itself, in each member of it; both where it may be either.
_SUBSCHEMAS: Final = frozenset(
    "additionalProperties propertyNames unevaluatedProperties items additionalItems unevaluatedItems "
    "contains not if then else contentSchema allOf anyOf oneOf prefixItems".split()
)
_SUBSCHEMA_MAPS: Final = frozenset(
    "properties patternProperties dependentSchemas dependencies $defs definitions".split()
)


@functools.cache
def _dialect(uri: str) -> _Dialect:
    """The dialect that `$schema` names, with http or https, with or without the empty fragment."""
    from referencing.jsonschema import specification_with

    bare = uri.removeprefix("https://").removeprefix("http://").removesuffix("#")
    draft = _DIALECTS.get(bare)
    if draft is None:
        known = ", ".join(_DIALECTS)
        raise _Unusable(f'has the unknown dialect "{_cut(uri)}"; known are {known}')
    full = ("http://" if draft <= 7 else "https://") + bare
    rules = {
        keyword: rule
        for keyword, rule in _RULES.items()
        if _LIVES.get(keyword, (4, 2020))[0] <= draft <= _LIVES.get(keyword, (4, 2020))[1]
    }
    return _Dialect(draft, specification_with(full), rules)


def _meta_schemas() -> Any:
    """A registry of the meta schemas, in memory; the only thing a reference may lead out to."""
    from jsonschema_specifications import REGISTRY  # type: ignore[import-untyped]

    return REGISTRY


@functools.cache
def _meta_schema(draft: int) -> _Schema:
    """The schema of a dialect's schemas.

    Since 2019-09 it consists of vocabularies that refer to each other dynamically. Joined into one
    that refers to itself, it takes a sixth of the time."""
    bare = next(bare for bare, number in _DIALECTS.items() if number == draft)
    uri = ("http://" if draft <= 7 else "https://") + bare
    registry = _meta_schemas()
    contents = registry.contents(uri)
    if draft > 7:
        resolver = registry.resolver(uri)
        parts = [resolver.lookup(part["$ref"]).contents for part in contents["allOf"]]
        joined = {
            keyword: {
                name: value
                for part in (*parts, contents)
                for name, value in part.get(keyword, {}).items()
            }
            for keyword in ("properties", "$defs")
        }
        encoded = orjson.dumps({"type": ["object", "boolean"], **joined})
        dynamic = b'"$recursiveRef":"#"' if draft == 2019 else b'"$dynamicRef":"#meta"'
        contents = orjson.loads(encoded.replace(dynamic, b'"$ref":"#"'))
    dialect = _dialect(uri)
    resource = dialect.specification.create_resource(contents)
    return _Schema(contents, dialect, registry.with_resource("", resource).resolver())


class _Schema:
    """A schema that arguments can be checked against."""

    def __init__(
        self, contents: Json, dialect: _Dialect, resolver: Any, anchors: Iterable[str] = ()
    ) -> None:
        self.contents, self.dialect = contents, dialect
        self.size = 0  # nodes made
        self.headers: list[tuple[tuple[str, ...], str]] = []  # property path, x-mcp-header
        self.patterns: dict[str, _Pattern | str] = {}  # compiled, or why not
        self._anchors = sorted({"meta", *anchors})  # dynamic ones; meta schemas have that one
        self._known_anchors: dict[tuple[str, str], bool] = {}
        self._nodes: dict[tuple[int, tuple[Json, ...]], _Node] = {}
        self._targets: dict[tuple[Json, ...], tuple[Json, _Place]] = {}
        self._places: dict[tuple[Json, ...], _Place] = {}
        self.start = self._place(resolver)
        self.anything = _Node(self, True, self.start)
        self.root = self.node(contents, self.start)

    def check(self, value: Json, run: _Run) -> list[str]:
        """What is wrong with `value`, as lines for a reader; raises _Exhausted."""
        try:
            if self.root.check(value, run):
                return []
        except RecursionError:
            # References that lead back to where they start, or both sides nest deeply.
            raise _Exhausted from None
        return [str(violation) for violation in run.found[:_VIOLATIONS]]

    def node(self, schema: Json, place: _Place) -> _Node:
        """The node of `schema` at `place`; one and the same for equal places."""
        if schema is True or schema == {}:
            return self.anything
        key = (id(schema), place.key)
        node = self._nodes.get(key)
        if node is None:
            if self.size >= _COMPILED:
                raise _Exhausted
            self.size += 1
            node = self._nodes[key] = _Node(self, schema, place)
        return node

    def pattern(self, pattern: str) -> _Pattern | str:
        """The compiled pattern, or why it is not checked."""
        known = self.patterns.get(pattern)
        if known is None:
            known = self.patterns[pattern] = _pattern(pattern)
        return known

    def enter(self, schema: Json, place: _Place) -> _Place:
        """The place inside of `schema`, which is another one if it has an id."""
        if not isinstance(schema, dict) or ("$id" not in schema and "id" not in schema):
            return place
        inner = place.resolver.in_subresource(self.dialect.specification.create_resource(schema))
        return place if inner is place.resolver else self._place(inner)

    def target(self, place: _Place, keyword: str, reference: str) -> tuple[Json, _Place]:
        """What a reference leads to, and where; raises what `referencing` raises."""
        key = (keyword, reference, *place.key)
        found = self._targets.get(key)
        if found is None:
            if len(self._targets) >= _SCHEMA_REFERENCES:
                raise _Exhausted
            resolved = self._lookup(place.resolver, keyword, reference)
            found = self._targets[key] = (resolved.contents, self._place(resolved.resolver))
        return found

    def _lookup(self, resolver: Any, keyword: str, reference: str) -> Any:
        from referencing.jsonschema import lookup_recursive_ref

        return (
            lookup_recursive_ref(resolver)
            if keyword == "$recursiveRef"
            else resolver.lookup(reference)
        )

    def _place(self, resolver: Any) -> _Place:
        """Places are equal if they have the same base, and dynamic references find the same there."""
        scope = [*resolver.dynamic_scope()][::-1]
        outermost: list[str] = [uri for uri, _ in scope[:1]] if self.dialect.draft == 2019 else []
        outermost += [
            next((uri for uri, where in scope if self._has(where, uri, name)), "")
            for name in (self._anchors if self.dialect.draft >= 2020 else ())
        ]
        key = (id(resolver.lookup("#").contents), *outermost)
        return self._places.setdefault(key, _Place(resolver, key))

    def _has(self, registry: Any, uri: str, anchor: str) -> bool:
        from referencing.exceptions import NoSuchAnchor

        known = self._known_anchors.get((uri, anchor))
        if known is None:
            try:
                registry.anchor(uri, anchor)
                known = True
            except NoSuchAnchor:
                known = False
            self._known_anchors[uri, anchor] = known
        return known


# ---- Definitions ----

_TOKEN_CHARS: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2


# Without these words a schema is one resource, and need not be searched for others.
_IDENTIFIERS: Final = (b'"$id"', b'"id"', b'"$anchor"', b'"$dynamicAnchor"')


def _read_schema(contents: Json) -> _Schema:
    """A definition's schema, with everything looked at that may hide it; raises _Unusable."""
    if not isinstance(contents, dict):
        raise _Unusable("must be an object")
    declared = contents.get("$schema", _DEFAULT_DIALECT)
    if not isinstance(declared, str):
        raise _Unusable('has a "$schema" that is no string')
    dialect = _dialect(declared)
    anchors = _measure(contents, "$id" if dialect.draft > 4 else "id")
    encoded = _encoded(contents)
    try:
        _validate(contents, dialect)
        schema = _Schema(contents, dialect, _resolver(contents, encoded, dialect), anchors)
        _Inspection(schema).run()
    except _Unusable:
        raise
    except (_Exhausted, RecursionError):
        raise _Unusable("is too large, or its references lead to too many places") from None
    except Exception as error:
        # `referencing` meets a stranger's schema: whatever it raises, the tool is hidden and says why.
        raise _Unusable(f"has references that cannot be followed: {_cut(str(error))}") from error
    return schema


def _measure(contents: Json, identifier: str) -> set[str]:
    """The dynamic anchors; raises _Unusable for a schema that would be too slow to look at."""
    layer: list[Json] = [contents]
    nodes = values = identifiers = 0
    anchors = set()
    for _ in range(_SCHEMA_DEPTH):
        nodes += len(layer)
        values += sum(map(len, layer))
        if nodes > _SCHEMA_NODES or values > _SCHEMA_VALUES:
            raise _Unusable(f"has more than {_SCHEMA_NODES} parts or {_SCHEMA_VALUES} values")
        inner: list[Json] = []
        for node in layer:
            if isinstance(node, dict):
                if any(len(name) > _SCHEMA_NAME for name in node):
                    raise _Unusable(f"has a name of more than {_SCHEMA_NAME} characters")
                identifiers += isinstance(node.get(identifier), str)
                if isinstance(anchor := node.get("$dynamicAnchor"), str):
                    anchors.add(anchor)
                node = node.values()
            inner += [item for item in node if isinstance(item, (dict, list))]
        if identifiers > _SCHEMA_IDENTIFIERS:
            raise _Unusable(f"has more than {_SCHEMA_IDENTIFIERS} parts with an {identifier}")
        if not inner:
            return anchors
        layer = inner
    raise _Unusable(f"is more than {_SCHEMA_DEPTH} levels deep")


def _encoded(contents: Json) -> bytes:
    try:
        encoded = orjson.dumps(contents)
    except TypeError as error:
        raise _Unusable(f"cannot be written as JSON: {error}") from None
    if len(encoded) > _SCHEMA_BYTES:
        raise _Unusable(f"is larger than {_SCHEMA_BYTES} bytes")
    return encoded


def _resolver(contents: Json, encoded: bytes, dialect: _Dialect) -> Any:
    """What finds references, in the schema itself and the meta schemas: nothing is ever fetched."""
    resource = dialect.specification.create_resource(contents)
    uri = resource.id() or ""
    registry = _meta_schemas().with_resource(uri, resource)
    if any(word in encoded for word in _IDENTIFIERS):
        registry = registry.crawl()
    return registry.resolver(uri)


def _validate(contents: Json, dialect: _Dialect) -> None:
    """Raise _Unusable for what the dialect's own schema refuses."""
    wrong = _meta_schema(dialect.draft).check(contents, _Run())
    if wrong:
        raise _Unusable(f"is no valid JSON Schema: {wrong[0].strip()}")


class _Inspection:
    """A walk over all subschemas: every reference leads somewhere, annotations stand where they may."""

    def __init__(self, schema: _Schema) -> None:
        self.schema, self.rules = schema, schema.dialect.rules
        self._stack: list[tuple[Json, _Place, tuple[str, ...] | None]] = []
        self._seen: set[tuple[int, tuple[Json, ...]]] = set()
        self._left = _SCHEMA_PATTERNS

    def run(self) -> None:
        """Raises _Unusable, or what `referencing` raises."""
        targets: list[tuple[Json, _Place]] = [(self.schema.contents, self.schema.start)]
        path: tuple[str, ...] | None = ()
        while targets:
            contents, place = targets.pop()
            if (id(contents), place.key) in self._seen or contents is True or contents is False:
                continue
            if path is None:
                # A reference into a part that the dialect does not know as a schema.
                _validate(contents, self.schema.dialect)
            self._stack.append((contents, place, path))
            path = None
            while self._stack:
                targets += self._visit(*self._stack.pop())

    def _visit(
        self, schema: Json, place: _Place, path: tuple[str, ...] | None
    ) -> list[tuple[Json, _Place]]:
        """Look at one subschema, put its own on the stack; where its references lead."""
        if not isinstance(schema, dict) or (id(schema), place.key) in self._seen:
            return []
        self._seen.add((id(schema), place.key))
        if len(self._seen) > _SCHEMA_NODES:
            raise _Unusable("has references that lead to too many places")
        if "x-mcp-header" in schema:
            self._header(schema, path)
        if "$schema" in schema and _dialect(schema["$schema"]) is not self.schema.dialect:
            raise _Unusable("has a part with a dialect of its own")
        for pattern in (schema.get("pattern"), *schema.get("patternProperties", ())):
            self._pattern(pattern)
        for keyword, value in schema.items():
            if keyword in _SUBSCHEMAS:
                parts = value if isinstance(value, list) else [value]
                self._stack += [(part, self.schema.enter(part, place), None) for part in parts]
            elif keyword in _SUBSCHEMA_MAPS:
                for name, part in value.items():
                    below = (*path, name) if keyword == "properties" and path is not None else None
                    self._stack.append((part, self.schema.enter(part, place), below))
        return [
            self._follow(place, keyword, schema[keyword])
            for keyword in _REFERENCE_KEYWORDS
            if keyword in schema and keyword in self.rules
        ]

    def _follow(self, place: _Place, keyword: str, reference: str) -> tuple[Json, _Place]:
        from referencing.exceptions import Unresolvable

        try:
            return self.schema.target(place, keyword, reference)
        except Unresolvable:
            where = "leads out of it, and nothing is ever fetched"
            raise _Unusable(f'has a {keyword} "{_cut(reference)}" that {where}') from None

    def _pattern(self, pattern: str | None) -> None:
        patterns = self.schema.patterns
        if pattern is None or pattern in patterns:
            return
        self._left -= 20 + len(pattern)
        if self._left >= 0:
            known = patterns[pattern] = _pattern(pattern)
            self._left -= known.size if isinstance(known, _Pattern) else 0
        else:
            patterns[pattern] = "the patterns of this tool are too large together"

    def _header(self, schema: dict[str, Json], path: tuple[str, ...] | None) -> None:
        """2026-07-28, basic/transports/streamable-http, Schema Extension."""
        name = schema["x-mcp-header"]
        if not path:
            raise _Unusable("has an x-mcp-header where not only `properties` lead to")
        where = ".".join(map(_cut, path))
        if not isinstance(name, str) or not _TOKEN_CHARS.fullmatch(name):
            raise _Unusable(f"has an x-mcp-header at {where} that is no header name (RFC 9110)")
        if schema.get("type") not in ("string", "integer", "boolean"):
            raise _Unusable(
                f"has an x-mcp-header at {where}, which is no string, integer or boolean"
            )
        if any(known.lower() == name.lower() for _, known in self.schema.headers):
            raise _Unusable(f'has the x-mcp-header "{_cut(name)}" twice')
        self.schema.headers.append((path, name))


# ---- Mirrored headers ----

_PLAIN_HEADER: Final = re.compile(r"[\t\x20-\x7e]*")
# Short: a fraction is built from it.
_NUMERAL: Final = re.compile(r"[+-]?[0-9]{1,20}(?:\.[0-9]{1,20})?(?:[eE][+-]?[0-9]{1,2})?")


def _mirrored_wrongly(
    headers: list[tuple[tuple[str, ...], str]],
    arguments: dict[str, Json],
    mirrored: Mapping[str, str],
) -> str:
    """What is wrong with Mcp-Param-* headers (streamable-http, Server Behavior for Custom Headers)."""
    for path, name in headers:
        raw = mirrored.get(f"mcp-param-{name.lower()}")
        value = _at(arguments, path)
        if value is None and raw is None:
            continue
        where = f"Mcp-Param-{name} and arguments.{'.'.join(map(_cut, path))}"
        if raw is None:
            if isinstance(value, (dict, list)):
                continue  # no header can mirror it; the schema says what it must be
            return f"{where} differ: the header is missing"
        if value is None:
            return f"{where} differ: there is no such argument"
        text = _header_text(raw)
        if text is None:
            return f"Mcp-Param-{name} has invalid characters or invalid Base64"
        if not _mirrors(text, value):
            return f"{where} differ"
    return ""


def _at(arguments: Json, path: tuple[str, ...]) -> Json:
    """The value at exactly this path, None where there is none."""
    for name in path:
        if not isinstance(arguments, dict):
            return None
        arguments = arguments.get(name)
    return arguments


def _header_text(raw: str) -> str | None:
    """A header's value, decoded; None where it must be refused (streamable-http, Value Encoding)."""
    if not (raw.startswith("=?base64?") and raw.endswith("?=") and len(raw) >= 11):
        return raw if _PLAIN_HEADER.fullmatch(raw) else None
    body = raw[9:-2]
    try:
        data = base64.b64decode(body, validate=True)
        # Python ignores stray bits in the last digit: two texts for one value.
        return data.decode() if base64.b64encode(data).decode() == body else None
    except ValueError:
        return None


def _mirrors(text: str, value: Json) -> bool:
    if isinstance(value, str):
        return text == value
    if isinstance(value, bool):
        return text == ("true" if value else "false")
    if not isinstance(value, (int, float)) or not _NUMERAL.fullmatch(text):
        return False
    return fractions.Fraction(text) == fractions.Fraction(value)


class Policy:
    """Which definitions are shown, and which arguments reach their tool."""

    def __init__(self, limits: Limits, record: Record) -> None:
        self._limits, self._record = limits, record

    def warm(self) -> None:
        """Import what the first definition needs (40 ms), before there is one."""
        _read_schema({"type": "object"})

    def definition(self, entry: Entry) -> str:
        """Why this tool must be hidden, "" if it need not. Leaves the schema in `entry.validator`."""
        try:
            schema = _read_schema(entry.item.get("inputSchema"))
            if schema.contents.get("type") != "object":
                return 'inputSchema must have the type "object" (Tool)'
        except _Unusable as error:
            return f"inputSchema {error}"
        try:
            if "outputSchema" in entry.item:
                # Clients compile it when they list tools, and one that fails takes the list with it.
                _read_schema(entry.item["outputSchema"])
        except _Unusable as error:
            return f"outputSchema {error}"
        entry.validator = schema
        return ""

    def warnings(self, entry: Entry) -> list[str]:
        """What of this tool's arguments is not checked, and why."""
        schema = entry.validator
        if not isinstance(schema, _Schema):
            return []
        return [
            f"the pattern {_shown(pattern)} is not checked: {why}"
            for pattern, why in schema.patterns.items()
            if isinstance(why, str)
        ]

    def arguments(
        self, entry: Entry, arguments: dict[str, Json], mirrored: Mapping[str, str] | None
    ) -> Error | Outcome | None:
        """What is wrong with a tool call: an error, or a tool result that a model can correct.

        `mirrored`: the Mcp-Param-* headers of a modern client, lower-case name to raw value."""
        reason = "" if isinstance(entry.validator, _Schema) else self.definition(entry)
        schema = entry.validator
        if not isinstance(schema, _Schema):
            return Error(INVALID_PARAMS, f"this tool cannot be called: its {reason}")
        if mirrored is not None:
            wrong = _mirrored_wrongly(schema.headers, arguments, mirrored)
            if wrong:
                return Error(HEADER_MISMATCH, wrong, status=400)
        try:
            lines = schema.check(arguments, _Run())
        except _Exhausted:
            self._record.count("arguments_too_costly", server=entry.server)
            text = "the arguments are too large or too deep to be checked against the tool's inputSchema"
            return Error(INVALID_PARAMS, text)
        return _correction(lines) if lines else None


def _correction(lines: list[str]) -> Outcome:
    """An `isError` result and not a protocol error: it reaches the model (2025-11-25, server/tools)."""
    wrong = "\n".join(f"- arguments{line}" for line in lines)
    text = (
        f"The arguments do not fit the tool's inputSchema:\n{wrong}\nCorrect them and call again."
    )
    return Outcome(result={"content": [{"type": "text", "text": text}], "isError": True})
# ==== Gateway =====================================================================
# One call's way: checked, looked up, allowed, leased, sent, and repeated where that is safe.
# Knows methods and who serves them. Must not know eras of clients or children, or pipes.

PAGED: Final = {
    "tools/list": Kind.TOOLS,
    "prompts/list": Kind.PROMPTS,
    "resources/list": Kind.RESOURCES,
    "resources/templates/list": Kind.TEMPLATES,
}
# The capability that a server must have declared before a method is forwarded to it.
NEEDS: Final = {
    "tools/list": "tools",
    "tools/call": "tools",
    "prompts/list": "prompts",
    "prompts/get": "prompts",
    "resources/list": "resources",
    "resources/templates/list": "resources",
    "resources/read": "resources",
    "completion/complete": "completions",
}
TASK_METHODS: Final = ("tasks/get", "tasks/update", "tasks/result", "tasks/cancel")
TASKS: Final = 10_000  # tasks that are remembered; past it the oldest is forgotten, and so unknown


class Nothing:
    """The handle of a call that is already done, and the sink of one whose answer nobody needs."""

    def answer(self, ask: Ask, outcome: Outcome) -> None: ...
    def note(self, notice: Notice) -> None: ...
    def cancel(self, reason: str = "") -> None: ...
    def ask(self, ask: Ask) -> None: ...
    def done(self, outcome: Outcome) -> None: ...


NOTHING: Final = Nothing()


class Passage:
    """The client's handle of a Forward, which is a sink itself: both have a `note`, each its own way."""

    __slots__ = ("forward",)

    def __init__(self, forward: Forward) -> None:
        self.forward = forward

    def answer(self, ask: Ask, outcome: Outcome) -> None:
        if self.forward.handle is not None:
            self.forward.handle.answer(ask, outcome)

    def note(self, notice: Notice) -> None:
        if self.forward.handle is not None:
            self.forward.handle.note(notice)

    def cancel(self, reason: str) -> None:
        self.forward.cancel(reason)


class Forward:
    """One call under way to a server: the sink of the child's answers.

    It looks up, leases, sends, and repeats once on a successor where the call is safe to repeat
    (DESIGN, A child that dies)."""

    __slots__ = (
        "gateway",
        "call",
        "sink",
        "server",
        "safe",
        "waiting",
        "link",
        "handle",
        "touched",
        "as_task",
        "task",
        "over",
    )

    def __init__(self, gateway: Gateway, call: Call, sink: Sink) -> None:
        self.gateway, self.call, self.sink = gateway, call, sink
        self.server = call.endpoint
        self.safe = False  # may be repeated once on a successor
        self.waiting: Lease | None = None  # the look-up or the lease that has not answered yet
        self.handle: Handle | None = None
        self.link: Link | None = None  # the process that has it
        self.touched = False  # progress or an ask went out: the client has seen a part of it
        self.as_task = False  # made a task by Atrax, since the tool is none otherwise
        self.task = ""  # the id of that task, while its result is awaited
        self.over = False

    # ---- the way down ----

    def go(self, server: str, safe: bool) -> None:
        """Send the checked call to `server`, when it has a free process."""
        self.server = server
        self.safe = safe and "requestState" not in self.call.params
        self._lease()

    def _lease(self) -> None:
        self.waiting = None
        call = self.call
        lease = self.gateway.pool.lease(self.server, call.owner, call.place, self._ready)
        if self.handle is None and not self.over:
            self.waiting = lease

    def _ready(self, link: Link | Error) -> None:
        self.waiting = None
        if self.over:
            return
        if isinstance(link, Error):
            self.done(Outcome(error=link))
            return
        self.link = link
        handle = link.send(self.call, self)
        # It may be over by now, or wait for another process.
        if not self.over and self.waiting is None and self.handle is None:
            self.handle = handle

    # ---- the sink, for the child ----

    def note(self, notice: Notice) -> None:
        if not self.over:
            self.touched = True
            self.sink.note(notice)

    def ask(self, ask: Ask) -> None:
        if not self.over:
            self.touched = True
            self.sink.ask(ask)

    def done(self, outcome: Outcome) -> None:
        if self.over:
            return
        error = outcome.error
        if error is not None and error.code == CHILD_DIED and self.safe and not self.touched:
            self.safe, self.handle, self.call.place = False, None, ""
            self.gateway.repeated(self)
            self._lease()
            return
        if self.as_task and error is None and self._await_task(outcome):
            return
        self.over = True
        self.handle = None
        if not outcome.server:
            outcome.server = self.server
        self.gateway.finished(self, outcome)
        self.sink.done(outcome)

    def _await_task(self, outcome: Outcome) -> bool:
        """Go on to the result of the task that Atrax made of this call; False if there is no task.

        The tool has `execution.taskSupport: required`, and the client called it plainly (2025-11-25,
        basic/utilities/tasks, Tool-Level Negotiation)."""
        self.as_task = False
        task = _task_id(outcome.result)
        if not task:
            return False
        self.task, self.handle, self.safe = task, None, False
        self.call.method, self.call.params, self.call.place = "tasks/result", {"taskId": task}, outcome.place
        self._lease()
        return True

    def cancel(self, reason: str) -> None:
        if self.over:
            return
        if self.waiting is not None:
            self.waiting.cancel()
        self.safe = self.as_task = False
        if self.handle is not None:
            self.handle.cancel(reason)
        if self.task and self.link is not None:
            call = self.call
            cancel = Call("tasks/cancel", {"taskId": self.task}, call.owner, call.version, place=call.place)
            self.link.send(cancel, NOTHING)
        self.done(Outcome(error=Error(CANCELLED, reason)))


class Gateway:
    """The Door. A ladder for every call, the first rung that fails answers:

    1. params, for the client's protocol version (before anything is looked up in them);
    2. rate and calls in flight of the principal;
    3. the method exists, and on a server's own endpoint the server has declared it;
    4. the name or URI exists (unknown ones wait for servers that were never read);
    5. mirrored headers, then arguments, against the tool's schema.
    Which process takes it, and whether the child answers, are not rungs: those are `go` and later."""

    def __init__(
        self,
        config: Config,
        record: Record,
        catalogue: Catalogue,
        subscriptions: Subscriptions,
        policy: Policy,
        pool: Pool,
        clock: Callable[[], float],
    ) -> None:
        self.config, self.record, self.policy, self.pool = config, record, policy, pool
        self.catalogue, self.subscriptions, self.clock = catalogue, subscriptions, clock
        self.draining = False  # calls in flight may finish, new ones are refused
        self.inflight: dict[str, int] = {}  # principal → calls under way
        self._rates: dict[str, tuple[float, float]] = {}  # principal → (calls left, when that was so)
        self._tasks = Tasks()
        self._ways: dict[str, Callable[[Forward], None]] = {
            **dict.fromkeys(TASK_METHODS, self._task),
            "tasks/list": self._list_tasks,
            "tools/call": self._tool,
            "prompts/get": self._prompt,
            "resources/read": self._read,
            "completion/complete": self._complete,
        }

    def open(self, call: Call, sink: Sink) -> Handle:
        """Take `call` over; its answer comes to `sink`, at once or later."""
        error = check_params(call) or self._lacking(call)
        if error is not None:
            return _refuse(sink, error)
        if call.method == "subscriptions/listen":
            return self.subscriptions.open(call, sink)
        if call.method == "server/discover" or call.method in PAGED:
            return self._own(call, sink)
        error = _stopping() if self.draining else self._admit(call)
        if error is not None:
            return _refuse(sink, error)
        forward = Forward(self, call, sink)
        self._ways.get(call.method, self._unknown)(forward)
        return NOTHING if forward.over else Passage(forward)

    def finished(self, forward: Forward, outcome: Outcome) -> None:
        """Account for a call that is over (called once, by its Forward)."""
        principal = forward.call.owner.principal
        left = self.inflight.get(principal, 1) - 1
        if left:
            self.inflight[principal] = left
        else:
            self.inflight.pop(principal, None)
        error = outcome.error
        if outcome.result is not None:
            self._tasks.note(forward.server, outcome.place, principal, outcome.result)
        kind = "ok" if error is None else str(error.code)
        # The key is built here and not by count(): sorting keyword arguments costs 0.6 us a call.
        key: CounterKey = ("calls", ("outcome", kind), ("server", forward.server))
        counters = self.record.counters
        counters[key] = counters.get(key, 0) + 1

    def repeated(self, forward: Forward) -> None:
        self.record.emit(
            "call.repeated",
            server=forward.server,
            message=f"its process died; {forward.call.method} is safe to repeat and goes to the next one",
        )

    # ---- rungs ----

    def _lacking(self, call: Call) -> Error | None:
        """-32601 for a method that the endpoint's own server has not declared; None while it is unknown."""
        offer = self.catalogue.offer(call.endpoint) if call.endpoint else None
        need = NEEDS.get(call.method)
        if offer is None or need is None or need in offer.capabilities:
            return None
        return Error(
            METHOD_NOT_FOUND, f'{call.method}: the server "{call.endpoint}" has no {need}', status=404
        )

    def _admit(self, call: Call) -> Error | None:
        """One more call in flight for its principal, or 429 with what to do.

        A call that names its process goes on with one that was counted: rounds count once for rates."""
        limits, principal = self.config.limits, call.owner.principal
        running = self.inflight.get(principal, 0)
        if running >= limits.inflight:
            reason = f"{running} calls are in flight; limits.inflight is {limits.inflight}"
            error = own_error(OVERLOADED, f"too many calls: {reason}", "inflight", retryAfter=1)
            error.status = 429
            return error
        if limits.rate and not call.place and (wait := self._wait(principal, float(limits.rate))):
            text = f"limits.rate allows {limits.rate} calls a minute; try again in {wait} s"
            error = own_error(NOT_ALLOWED, text, "rate", retryAfter=wait)
            error.status = 429
            return error
        self.inflight[principal] = running + 1
        return None

    def _wait(self, principal: str, rate: float) -> int:
        """Seconds until `principal` may call again, 0 for now: a bucket of `rate`, filled in a minute."""
        now = self.clock()
        left, since = self._rates.get(principal, (rate, now))
        left = min(rate, left + (now - since) * rate / 60)
        if left < 1:
            self._rates[principal] = (left, now)
            return int((1 - left) * 60 / rate) + 1
        self._rates[principal] = (left - 1, now)
        return 0

    # ---- ways ----

    def _own(self, call: Call, sink: Sink) -> Handle:
        """Lists and discover are answered from memory."""
        waiting = OwnAnswer(sink)
        find = self.catalogue.listing if call.method in PAGED else self.catalogue.discover
        waiting.lease = find(call, waiting.done)
        return waiting

    def _tool(self, forward: Forward) -> None:
        call = forward.call

        def found(entry: Entry | Error) -> None:
            forward.waiting = None
            if forward.over:
                return
            if isinstance(entry, Error):
                forward.done(Outcome(error=entry))
                return
            verdict = self.policy.arguments(entry, call.params.get("arguments") or {}, call.mirrored)
            if verdict is not None:
                outcome = verdict if isinstance(verdict, Outcome) else Outcome(error=verdict)
                outcome.server = entry.server
                forward.done(outcome)
                return
            call.params = {**call.params, "name": entry.own}
            if "task" not in call.params and _only_as_task(entry.item):
                forward.as_task = True
                call.params["task"] = {}
            forward.go(entry.server, self._safe(entry))

        self._lookup(forward, Kind.TOOLS, call.params["name"], found)

    def _safe(self, entry: Entry) -> bool:
        """Whether a tool may be called twice, by its own annotations (2025-03-26, ToolAnnotations)."""
        notes = entry.item.get("annotations")
        if not isinstance(notes, dict) or not self.config.servers[entry.server].repeat:
            return False
        return notes.get("readOnlyHint") is True or notes.get("idempotentHint") is True

    def _prompt(self, forward: Forward) -> None:
        params = forward.call.params
        self._forward_to(forward, Kind.PROMPTS, params["name"], lambda own: {**params, "name": own})

    def _read(self, forward: Forward) -> None:
        params = forward.call.params
        self._forward_to(forward, Kind.RESOURCES, params["uri"], lambda own: params)

    def _complete(self, forward: Forward) -> None:
        params = forward.call.params
        ref = params["ref"]
        if ref["type"] == "ref/prompt":
            rename = lambda own: {**params, "ref": {**ref, "name": own}}  # noqa: E731
            self._forward_to(forward, Kind.PROMPTS, ref["name"], rename)
            return
        # A template by its own text; a plain resource is looked up as one.
        template = self.catalogue.known(Kind.TEMPLATES, forward.call.endpoint, ref["uri"])
        kind = Kind.TEMPLATES if template is not None else Kind.RESOURCES
        self._forward_to(forward, kind, ref["uri"], lambda own: params)

    def _forward_to(
        self, forward: Forward, kind: Kind, name: str, rewrite: Callable[[str], dict[str, Json]]
    ) -> None:
        """Forward to the server that has `name`, with params as `rewrite` gives them for its own name."""
        call = forward.call

        def found(entry: Entry | Error) -> None:
            forward.waiting = None
            if forward.over:
                return
            if isinstance(entry, Error):
                forward.done(Outcome(error=entry))
                return
            offer = self.catalogue.offer(entry.server)
            need = NEEDS[call.method]
            if offer is not None and need not in offer.capabilities:
                text = f'{call.method}: the server "{entry.server}" has no {need}'
                forward.done(Outcome(error=Error(METHOD_NOT_FOUND, text, status=404)))
                return
            call.params = rewrite(entry.own)
            forward.go(entry.server, self.config.servers[entry.server].repeat)

        self._lookup(forward, kind, name, found)

    def _lookup(
        self, forward: Forward, kind: Kind, name: str, found: Callable[[Entry | Error], None]
    ) -> None:
        wait = self.catalogue.lookup(kind, forward.call.endpoint, name, found)
        if forward.handle is None and forward.waiting is None and not forward.over:
            forward.waiting = wait

    def _task(self, forward: Forward) -> None:
        """To the process that made the task, if it was made for this principal."""
        call = forward.call
        error = self._no_tasks(call)
        if error is not None:
            forward.done(Outcome(error=error))
            return
        task = call.params.get("taskId")
        home = self._tasks.find(call.endpoint, task, call.owner.principal)
        if home is None:
            error = Error(INVALID_PARAMS, f"Unknown task: {task!s:.100}", {"taskId": task})
            forward.done(Outcome(error=error))
            return
        call.place = home.place
        forward.go(home.server, safe=False)

    def _no_tasks(self, call: Call) -> Error | None:
        """Why `call` cannot be about a task: nobody has any, or the client did not declare them."""
        extension = call.version == MODERN
        names = [call.endpoint] if call.endpoint else list(self.config.servers)
        offers = filter(None, map(self.catalogue.offer, names))
        if not any(_has_tasks(offer.capabilities, extension) for offer in offers):
            return Error(METHOD_NOT_FOUND, f"Method not found: {call.method}", status=404)
        if extension and not _has_tasks(call.capabilities, extension):
            needed: Json = {"requiredCapabilities": {"extensions": {META + "tasks": {}}}}
            return Error(MISSING_CAPABILITY, "the client did not declare tasks", needed, status=400)
        return None

    def _list_tasks(self, forward: Forward) -> None:
        """The principal's own tasks as last seen; a child would list those of all its clients."""
        call = forward.call
        error = self._no_tasks(call)
        if error is not None:
            forward.done(Outcome(error=error))
            return
        tasks = self._tasks.of(call.endpoint, call.owner.principal)
        forward.done(Outcome({"tasks": tasks}))

    def _unknown(self, forward: Forward) -> None:
        """A method that MCP does not name: an extension's, passed to who declared extensions, else refused."""
        call = forward.call
        offer = self.catalogue.offer(call.endpoint) if call.endpoint else None
        if offer is not None and ("extensions" in offer.capabilities or "experimental" in offer.capabilities):
            forward.go(call.endpoint, safe=False)
            return
        error = Error(METHOD_NOT_FOUND, f"Method not found: {call.method}", status=404)
        forward.done(Outcome(error=error))


@dataclasses.dataclass(slots=True)
class TaskHome:
    """Where a task lives, whose it is, and what was last heard of it."""

    server: str
    place: str
    principal: str
    task: dict[str, Json]


class Tasks:
    """Which process made which task, for whom (DESIGN, Terms: a task belongs to its principal).

    Ids are the children's own, so two servers may mint the same one: on /mcp it is the first's."""

    def __init__(self) -> None:
        self._homes: OrderedDict[tuple[str, str], TaskHome] = OrderedDict()
        self._first: dict[str, str] = {}  # id → the server that minted it first

    def note(self, server: str, place: str, principal: str, result: dict[str, Json]) -> None:
        """Learn from a result: CreateTaskResult, or what tasks/get and tasks/cancel say."""
        ident = _task_id(result)
        if not ident:
            return
        task = result.get("task")
        seen: dict[str, Json] = task if isinstance(task, dict) else result
        home = self._homes.get((server, ident))
        if home is not None:
            home.task = seen if home.principal == principal else home.task
            return
        self._homes[server, ident] = TaskHome(server, place, principal, seen)
        self._first.setdefault(ident, server)
        if len(self._homes) > TASKS:
            (old_server, old), _ = self._homes.popitem(last=False)
            if self._first.get(old) == old_server:
                del self._first[old]

    def find(self, endpoint: str, ident: Json, principal: str) -> TaskHome | None:
        """The task `ident` as the endpoint and the principal may see it; None is "unknown"."""
        if not isinstance(ident, str):
            return None
        home = self._homes.get((endpoint or self._first.get(ident, ""), ident))
        return home if home is not None and home.principal == principal else None

    def of(self, endpoint: str, principal: str) -> list[Json]:
        """Every task that `find` would find."""
        return [
            home.task
            for (server, ident), home in self._homes.items()
            if home.principal == principal and server == (endpoint or self._first.get(ident))
        ]


def _task_id(result: dict[str, Json] | None) -> str:
    """The id of the task that a result is about, in either shape (2025-11-25, io.modelcontextprotocol/tasks)."""
    if result is None:
        return ""
    task = result.get("task")
    ident = task.get("taskId") if isinstance(task, dict) else result.get("taskId")
    return ident if isinstance(ident, str) else ""


def _has_tasks(capabilities: dict[str, Json], extension: bool) -> bool:
    """Whether a peer declared tasks: as the extension, or as 2025-11-25 has them."""
    if not extension:
        return "tasks" in capabilities
    extensions = capabilities.get("extensions")
    return isinstance(extensions, dict) and META + "tasks" in extensions


def _only_as_task(tool: dict[str, Json]) -> bool:
    execution = tool.get("execution")
    return isinstance(execution, dict) and execution.get("taskSupport") == "required"


class OwnAnswer:
    """The handle of a call that the Catalogue answers: it can be cancelled while it waits."""

    __slots__ = ("sink", "lease", "over")

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.lease: Lease | None = None
        self.over = False

    def done(self, outcome: Outcome) -> None:
        if not self.over:
            self.over = True
            self.sink.done(outcome)

    def answer(self, ask: Ask, outcome: Outcome) -> None: ...
    def note(self, notice: Notice) -> None: ...

    def cancel(self, reason: str) -> None:
        if self.lease is not None:
            self.lease.cancel()
        self.done(Outcome(error=Error(CANCELLED, reason)))


def _stopping() -> Error:
    error = own_error(UNAVAILABLE, "Atrax is stopping; try again", "stopping", retryAfter=1)
    error.status = 503
    return error


def _refuse(sink: Sink, error: Error) -> Handle:
    sink.done(Outcome(error=error))
    return NOTHING


# ==== Servers =====================================================================
# ModernServer and LegacyServer: Call → lines, lines → Outcome; and the probe that finds the era.
# Knows one process's messages, ids and asks, sans-I/O: time is given, bytes go to `write`.
# Must not know the client's era, pipes and processes, or which other children there are.
#
# Whose ask is it? A legacy child sends a request of its own without saying which call it belongs
# to. So it belongs to the one *open* call of that process: in flight, parked (it has an ask that
# waits for its answer), or overdue (cancelled or timed out and never answered: its handler may
# still run and ask, however late). With none or several the ask is refused at once, never held
# and never guessed, since a guess would show one user's question to another. Lists, listens and
# whatever else Atrax asks for itself run no handler of a client's, so they are never open.
# A modern child does not ask: its `input_required` is an ordinary result.

SILENCE: Final = 2.0  # seconds after which a probe without an answer is joined by initialize
GRACE: Final = 0.15  # seconds that discover has left once initialize was answered: modern wins
HEALTH: Final = 30.0  # seconds of silence, with calls in flight, after which a child is pinged
OVERDUE: Final = 10_000  # ids of unanswered cancelled calls kept; past it they are only counted
ASKS_PER_CALL: Final = 100  # asks that may wait in one call; a child that loops is refused
KEY_LENGTH: Final = 128  # characters of a child's own key for its ask, longer ones are not used
REMARKS: Final = 20  # remarks on junk per WINDOW; the rest is counted
WINDOW: Final = 10.0  # seconds
REOPEN: Final = (1.0, 60.0)  # seconds until a listen that the child ended is opened again
SALVAGE: Final = 1 << 20  # bytes of a broken line that are searched for the id of its call

LINE_HEAD: Final = b'{"jsonrpc":"2.0","id":'
LINE_RESULT: Final = b',"result":'
ATRAX: Final[dict[str, Json]] = {"name": "atrax", "title": "Atrax", "version": VERSION}

# What Atrax sends for itself (DESIGN, Which process?): no handler of a client's, no open call.
OWN_METHODS: Final = frozenset(
    {
        "server/discover",
        "initialize",
        "ping",
        "tools/list",
        "prompts/list",
        "resources/list",
        "resources/templates/list",
        "resources/subscribe",
        "resources/unsubscribe",
        "logging/setLevel",
        "subscriptions/listen",
    }
)
MODERN_PARAMS: Final = ("inputResponses", "requestState")  # which no legacy child knows
LIST_CHANGED: Final = {
    "notifications/tools/list_changed": (Kind.TOOLS,),
    "notifications/prompts/list_changed": (Kind.PROMPTS,),
    # One notification for both: no era has one of its own for templates.
    "notifications/resources/list_changed": (Kind.RESOURCES, Kind.TEMPLATES),
}
OF_NO_CALL: Final = frozenset(
    {"notifications/tasks/status", "notifications/tasks", "notifications/elicitation/complete"}
)
# Method of an ask: its name in the config's `offer` and in the capabilities of initialize.
ASK_KINDS: Final = {
    "elicitation/create": "elicitation",
    "sampling/createMessage": "sampling",
    "roots/list": "roots",
}
OFFERED: Final[dict[str, Json]] = {
    "elicitation": {"form": {}, "url": {}},
    "sampling": {"tools": {}, "context": {}},
    "roots": {"listChanged": True},
}


# A child's level in Atrax's own log, which has four; what is not here is worse than an error.
OWN_LEVEL: Final = {"debug": "debug", "info": "info", "notice": "info", "warning": "warning"}


class Host(Protocol):
    """Servers → Supervisor: what a process turned out to be, and what it says unasked."""

    def ready(self, offer: Offer) -> None: ...
    def unfit(self, reason: str) -> None: ...  # another version, or nonsense: stop it
    def changed(self, kind: Kind) -> None: ...  # list_changed
    def told(self, notice: Notice) -> None: ...  # of no call: task states, elicitation/complete
    def logged(self, level: str, message: str) -> None: ...  # its messages of no call, our remarks
    def freed(self) -> None: ...  # a call ended or is parked no more


class _Remarks:
    """What is said of a child that sends junk: the first few in full, the rest as a number."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._until = 0.0
        self._left = REMARKS
        self._unsaid = 0

    def say(self, level: str, message: str, now: float) -> None:
        if now >= self._until:
            self.close(now)
        if self._left:
            self._left -= 1
            self._host.logged(level, message)
        else:
            self._unsaid += 1

    def close(self, now: float) -> None:
        """Begin a new window; what the last one kept back is said as a number."""
        if now < self._until:
            return
        unsaid, self._unsaid = self._unsaid, 0
        self._left, self._until = REMARKS, now + WINDOW
        if unsaid:
            self._host.logged("warning", f"{unsaid} more remarks of this kind were left out")


class _NoSink:
    """The sink of what Atrax asks for itself and whose answer it does not need."""

    def note(self, notice: Notice) -> None: ...
    def ask(self, ask: Ask) -> None: ...
    def done(self, outcome: Outcome) -> None: ...


class _Then:
    """A sink that hands the outcome to a function."""

    __slots__ = ("_then",)

    def __init__(self, then: Callable[[Outcome], None]) -> None:
        self._then = then

    def note(self, notice: Notice) -> None: ...
    def ask(self, ask: Ask) -> None: ...

    def done(self, outcome: Outcome) -> None:
        self._then(outcome)


NO_SINK: Final = _NoSink()
NOBODY: Final = Owner("")


class _Flight:
    """One request that was written and is not answered yet; for its sender, the handle."""

    __slots__ = (
        "peer",
        "ident",
        "call",
        "sink",
        "own",
        "due",
        "limit",
        "paused",
        "asks",
        "keys",
        "over",
    )

    def __init__(
        self, peer: _Peer, ident: int, call: Call, sink: Sink, due: float, limit: float
    ) -> None:
        self.peer, self.ident, self.call, self.sink = peer, ident, call, sink
        self.own = call.method in OWN_METHODS
        self.due = due  # when it times out; progress moves it, never past `limit`
        self.limit = limit
        self.paused: float | None = None  # since when a person is asked: the clock stands still
        self.asks: dict[str, Ask] | None = None  # by key: sent to the sink and not answered
        self.keys: dict[str, int] | None = None  # every key or method used so far, and how often
        self.over = False

    def answer(self, ask: Ask, outcome: Outcome) -> None:
        if not self.over:
            self.peer.answered(self, ask, outcome)

    def note(self, notice: Notice) -> None:
        if not self.over:
            self.peer.noted(self, notice)

    def cancel(self, reason: str) -> None:
        if not self.over:
            self.peer.abandon(self, reason, Error(CANCELLED, reason))


class _Peer:
    """One process as a JSON-RPC peer: ids, calls in flight, their clocks. An era is a subclass.

    Every message that is handed to `write` is whole and without its newline."""

    era: ClassVar[str]

    def __init__(
        self,
        server: str,
        place: str,
        config: ServerConfig,
        limits: Limits,
        host: Host,
        write: Callable[[bytes], None],
        clock: Callable[[], float],
        offer: Offer,
        first: int = 1,
    ) -> None:
        self.server, self.place, self.offer = server, place, offer
        self.open_calls = 0  # clients' calls in flight, parked ones too, overdue ones not
        self.parked = 0  # those of them that wait for the answer to an ask
        self.known_to_ask = False
        self._config, self._depth = config, limits.depth
        self._timeout, self._max_timeout = config.timeout, config.max_timeout
        self._host, self._write, self._clock = host, write, clock
        self._next = first  # never used twice while the process lives
        self._flights: dict[int, _Flight] = {}
        self._remarks = _Remarks(host)
        self._lost: str | None = None  # why the process is gone
        self._heard = 0.0  # since when it is silent although calls are in flight
        self._checked = 0.0  # when it was last pinged because of that
        self._prepare()

    # ---- what an era adds ----

    def _prepare(self) -> None:
        """Set up what only this era keeps."""

    def start(self, now: float) -> None:
        """Say what this era says once the child is ready."""

    def _params(self, ident: int, call: Call) -> dict[str, Json]:
        """The params of `call` as this era writes them; what must come before it is written here.

        `call.params` stay as they are: the call may be repeated elsewhere."""
        raise NotImplementedError

    def _listen(self, call: Call, sink: Sink) -> Handle:
        raise NotImplementedError

    def _requested(self, request: Request, now: float) -> None:
        """The child sent a request."""
        raise NotImplementedError

    def _turned_away(self, ident: int | str, reason: str) -> None:
        """The child sent a request that cannot be read."""

    def _notified(self, notice: Notice, now: float) -> None:
        """The child sent a notification that does not mean the same in both eras."""
        raise NotImplementedError

    def _failed(self, flight: _Flight, error: Error) -> Error:
        """A child's error in canonical form."""
        return error

    def _orphaned(self, flight: _Flight) -> None:
        """`flight` was given up while the child may still work on it."""

    def _dying(self, why: str) -> None:
        """The process is gone; its calls are ended after this."""

    def _health_check(self) -> str:
        """The cheapest request that any child of this era answers."""
        raise NotImplementedError

    @property
    def overdue(self) -> bool:
        """Whether it holds a cancelled, unanswered call, and so may still ask for it."""
        return False

    @property
    def listening(self) -> int:
        """Clients' listens under way: a use of the process, though no call."""
        raise NotImplementedError

    # ---- the way down ----

    def send(self, call: Call, sink: Sink) -> Handle:
        """Write `call`; its answer, and what belongs to it, comes to `sink`."""
        if self._lost is not None:
            dead = _Flight(self, 0, call, sink, 0.0, 0.0)
            dead.over = True
            self._deliver(dead, Outcome(error=self._died(self._lost)))
            return dead
        if call.method == "subscriptions/listen":
            return self._listen(call, sink)
        return self._request(call, sink)

    def _request(self, call: Call, sink: Sink) -> _Flight:
        now = self._clock()
        ident = self._next
        self._next = ident + 1
        flight = _Flight(self, ident, call, sink, now + self._timeout, now + self._max_timeout)
        try:
            line = write_request(ident, call.method, self._params(ident, call))
        except TypeError as error:  # orjson.JSONEncodeError: deeper than it can write, for one
            flight.over = True
            reason = Error(INVALID_PARAMS, f"params cannot be written as JSON: {error}", status=400)
            self._deliver(flight, Outcome(error=reason))
            return flight
        # Registered before the write: an eager child can answer within this turn of the loop.
        self._flights[ident] = flight
        if not flight.own:
            if not self.open_calls:
                self._heard = now
            self.open_calls += 1
        self._write(line)
        return flight

    def _own_call(self, method: str, params: dict[str, Json], sink: Sink) -> _Flight:
        """A request of Atrax's own: for nobody, with no capabilities to ask anybody."""
        return self._request(Call(method, params, NOBODY, self.offer.version), sink)

    # ---- the way up ----

    def receive(self, line: bytes, now: float) -> None:
        """One line of the child's, without its newline. Never raises for what the child wrote.

        The common response is recognised by its first bytes, and only its result is decoded. That
        result is exactly one JSON value, so its own bytes go on: no member behind it can name
        another id, and nothing is read twice (PROTOCOL, JSON)."""
        self._heard = now
        if line.startswith(LINE_HEAD):
            comma = line.find(b",", 22, 42)
            if comma > 0 and line.startswith(LINE_RESULT, comma):
                digits = line[22:comma]
                if digits.isdigit() and (flight := self._flights.get(int(digits))) is not None:
                    self._answered(flight, line, comma + 10)
                    return
        self._slowly(line, now)

    def _answered(self, flight: _Flight, line: bytes, begin: int) -> None:
        end = line.rfind(b"}")
        raw = line[begin:end]
        try:
            result = decode(raw, self._depth)
        except InvalidJson as error:
            self._end(flight, Outcome(error=self._nonsense(str(error))))
            return
        if not isinstance(result, dict):
            self._end(flight, Outcome(error=self._nonsense('"result" is not an object')))
            return
        if raw[0] != 0x7B or raw[-1] != 0x7D:
            raw = raw.strip()  # who splices members into it counts on the braces
        self._end(flight, Outcome(result, raw, None, self.server, self.place))

    def _slowly(self, line: bytes, now: float) -> None:
        """Any other line: decoded whole, and whatever goes on is written anew."""
        if self._lost is not None or not line.strip():
            return
        try:
            value = decode(line, self._depth + 1)
        except InvalidJson as error:
            self._salvage(line, str(error), now)
            return
        if not isinstance(value, list):
            self._message(value, now)
        elif self.offer.version == "2025-03-26":  # the one version that has batches
            for item in value:
                self._message(item, now)
        else:
            self._remark("a batch, which its protocol version does not have", now)

    def _message(self, value: Json, now: float) -> None:
        try:
            message = read_message(value)
        except RpcError as error:
            self._broken(value, str(error), now)
            return
        if isinstance(message, Response):
            self._response(message, now)
        elif isinstance(message, Request):
            self._requested(message, now)
        else:
            self._notice(message, now)

    def _salvage(self, line: bytes, reason: str, now: float) -> None:
        """A line that is not JSON as Atrax takes it: it fails the call that it was meant to answer."""
        value = None
        if len(line) <= SALVAGE:
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(line, parse_int=_short_integer)
        self._broken(line if value is None else value, reason, now)

    def _broken(self, value: Json, reason: str, now: float) -> None:
        """A message that cannot be used. Who waits for it is told, whichever side that is."""
        ident = value.get("id") if isinstance(value, dict) else None
        asks = isinstance(value, dict) and "method" in value
        flight = self._flights.get(ident) if type(ident) is int and not asks else None
        if flight is not None:
            self._end(flight, Outcome(error=self._nonsense(reason)))
            return
        self._remark(f"{reason}: {_excerpt(value)}", now)
        if asks and (type(ident) is int or isinstance(ident, str)):
            self._turned_away(ident, reason)

    def _response(self, message: Response, now: float) -> None:
        ident = message.id
        flight = self._flights.get(ident) if type(ident) is int else None
        if flight is None:
            self._stray(message, now)
        elif message.error is None:
            self._end(flight, Outcome(message.result))
        else:
            self._end(flight, Outcome(error=self._failed(flight, message.error)))

    def _stray(self, message: Response, now: float) -> None:
        """A response that nobody waits for: late (its call was cancelled), double, or foreign."""
        ident = message.id
        if type(ident) is int and 0 < ident < self._next:
            self._remarks.say("debug", f"answered request {ident} late or twice: dropped", now)
        elif message.error is not None:
            text = f"error {message.error.code} for no request: {message.error.message}"
            self._remarks.say("warning", text[:300], now)
        else:
            self._remarks.say("warning", f"answered no request of ours: {ident!r:.80}", now)

    def _notice(self, notice: Notice, now: float) -> None:
        """Notifications that mean the same in both eras; progress first, it is the frequent one."""
        method, params = notice.method, notice.params
        if method == "notifications/progress":
            self._progress(params, now)
        elif method == "notifications/message":
            self._log(notice, now)
        elif method in OF_NO_CALL:
            self._host.told(notice)
        else:
            self._notified(notice, now)

    def _progress(self, params: dict[str, Json], now: float) -> None:
        token = params.get("progressToken")
        flight = self._flights.get(token) if type(token) is int else None
        if flight is None or not flight.call.progress:
            return  # of a call that is over, or that nobody wants to hear of
        flight.due = max(flight.due, now + self._timeout)
        rest = {key: value for key, value in params.items() if key != "progressToken"}
        self._note(flight, Notice("notifications/progress", rest))

    def _log(self, notice: Notice, now: float) -> None:
        """A log message does not say which call it belongs to either: see above."""
        level = notice.params.get("level")
        flight = self._only_open()
        if flight is None:
            self._remarks.say(*_log_line(notice.params), now)
        elif _wanted(level, flight.call.log_level):
            self._note(flight, notice)

    def _only_open(self) -> _Flight | None:
        """The one open call of this process; None for no call or several."""
        if self.open_calls != 1:
            return None
        for flight in self._flights.values():
            if not flight.own:
                return flight
        return None

    # ---- the ends of a call ----

    def _end(self, flight: _Flight, outcome: Outcome) -> None:
        """The only way out of `_flights`: accounts for the call, then tells its sink."""
        del self._flights[flight.ident]
        flight.over = True
        if flight.own:
            self._deliver(flight, outcome)
            return
        self.open_calls -= 1
        if flight.paused is not None:
            self.parked -= 1
        self._deliver(flight, outcome)
        self._host.freed()

    def _deliver(self, flight: _Flight, outcome: Outcome) -> None:
        outcome.server, outcome.place = self.server, self.place
        try:
            flight.sink.done(outcome)
        except Exception as error:  # one call's sink must not cost the others their answers
            self._fault("done", error)

    def _note(self, flight: _Flight, notice: Notice) -> None:
        try:
            flight.sink.note(notice)
        except Exception as error:  # as in _deliver
            self._fault("note", error)

    def _fault(self, verb: str, error: Exception) -> None:
        self._host.logged("error", f"internal error: a call's sink raised in {verb}: {error!r}")

    def abandon(self, flight: _Flight, reason: str, error: Error) -> None:
        """Give `flight` up: the child is told, the sink hears `error` at once."""
        cancelled: dict[str, Json] = {"requestId": flight.ident}
        if reason:
            cancelled["reason"] = reason
        self._write(write_notice(Notice("notifications/cancelled", cancelled)))
        self._orphaned(flight)
        self._end(flight, Outcome(error=error))

    def answered(self, flight: _Flight, ask: Ask, outcome: Outcome) -> None:
        """The client answered `ask` (only a legacy child asks)."""

    def noted(self, flight: _Flight, notice: Notice) -> None:
        """The client sent a notification into the call; by default no child wants one."""

    # ---- time ----

    def wake(self, now: float) -> None:
        """What time alone brings about: timeouts, and a look at a child that has gone silent."""
        if self._lost is not None:
            return
        self._remarks.close(now)
        for flight in list(self._flights.values()):
            # Each may be gone by now: a sink that hears of a timeout can cancel others.
            if not flight.over and flight.paused is None and now >= min(flight.due, flight.limit):
                self._time_out(flight, now)
        if self.open_calls > self.parked and now - self._heard > HEALTH:
            self._look_after(now)

    def _time_out(self, flight: _Flight, now: float) -> None:
        setting = "max_timeout" if now >= flight.limit else "timeout"
        seconds = self._max_timeout if now >= flight.limit else self._timeout
        text = f"{self.server} did not finish {flight.call.method} within {seconds:g} s ({setting})"
        error = own_error(TIMED_OUT, text, "timeout", self.server)
        self.abandon(flight, f"no answer within {seconds:g} s", error)

    def _look_after(self, now: float) -> None:
        """Ask a silent child for a sign of life; that it gives none is said, and no more: the calls
        have their own timeouts, and a child that computes on its only thread is not ill."""
        if now - self._checked < HEALTH:
            return
        self._checked = now

        def heard(outcome: Outcome) -> None:
            if outcome.error is not None and outcome.error.code == TIMED_OUT:
                self._host.logged("warning", f"gave no sign of life for {now - self._heard:.0f} s")

        self._own_call(self._health_check(), {}, _Then(heard))

    def lost(self, why: str) -> None:
        """The process is gone: the last events of every call and listen. Nothing comes after them."""
        if self._lost is not None:
            return
        self._lost = why
        self._dying(why)
        flights = list(self._flights.values())
        for flight in flights:
            if not flight.over:
                self._end(flight, Outcome(error=self._died(why)))

    def _died(self, why: str) -> Error:
        text = f"{self.server} died before it answered: {why}"
        return own_error(CHILD_DIED, text, "died", self.server)

    def _nonsense(self, reason: str) -> Error:
        return Error(INTERNAL_ERROR, f"{self.server} sent an answer that cannot be used: {reason}")

    def _remark(self, what: str, now: float) -> None:
        self._remarks.say("warning", f"stdout: {what}", now)


class ModernServer(_Peer):
    """A modern child (MCP 2026-07-28, basic/transports/stdio): stateless requests, listens, no asks."""

    era: ClassVar[str] = "modern"

    def _prepare(self) -> None:
        self._news = _list_changes(self.offer.capabilities)
        self._reopen_at: float | None = None
        self._delay = REOPEN[0]
        self._opened = False  # whether the child's list changes were ever listened to

    @property
    def listening(self) -> int:
        return sum(
            flight.call.method == "subscriptions/listen" and flight.call.owner is not NOBODY
            for flight in self._flights.values()
        )

    def start(self, now: float) -> None:
        """Listen to the list changes that the child has declared."""
        if self._news:
            self._open_news()

    def _params(self, ident: int, call: Call) -> dict[str, Json]:
        params = call.params
        meta = params.get("_meta")
        meta = dict(meta) if isinstance(meta, dict) else {}
        meta[META_VERSION] = MODERN
        meta[META_CLIENT] = call.client or ATRAX
        meta[META_CAPABILITIES] = call.capabilities
        if call.log_level is not None:
            meta[META_LOG_LEVEL] = call.log_level
        if call.progress:
            meta["progressToken"] = ident
        return {**params, "_meta": meta}

    def _health_check(self) -> str:
        return "server/discover"

    def _requested(self, request: Request, now: float) -> None:
        # "The client MUST NOT write JSON-RPC responses" (2026-07-28, basic/transports/stdio).
        self._remark(f"a request ({request.method:.80}), which a modern server must not send", now)

    def _notified(self, notice: Notice, now: float) -> None:
        if notice.method == "notifications/cancelled":
            # How a child tears down a listen, and nothing else: as good as the listen's result.
            ended = self._listen_of(notice.params.get("requestId"))
            if ended is not None:
                self._end(ended, Outcome(result={}))
            return
        meta = notice.params.get("_meta")
        listen = self._listen_of(meta.get(META_SUBSCRIPTION)) if isinstance(meta, dict) else None
        if listen is not None:
            self._note(listen, _without_subscription(notice))
        elif notice.method in LIST_CHANGED:
            # Of no subscription we know, so it should not be sent; reading a list again is harmless.
            self.list_changed(notice.method)
        else:
            self._remarks.say("debug", f"{notice.method:.80} of no subscription: dropped", now)

    def _notice(self, notice: Notice, now: float) -> None:
        meta = notice.params.get("_meta")
        if isinstance(meta, dict) and META_SUBSCRIPTION in meta:
            self._notified(notice, now)  # task states too, when they are of a listen
        else:
            super()._notice(notice, now)

    def list_changed(self, method: str) -> None:
        """One of the child's lists has changed, or may have."""
        for kind in LIST_CHANGED[method]:
            self._host.changed(kind)

    # ---- listens ----

    def _listen(self, call: Call, sink: Sink) -> Handle:
        flight = self._request(call, sink)
        flight.due = flight.limit = math.inf  # a listen has no end of its own
        return flight

    def _listen_of(self, ident: Json) -> _Flight | None:
        """The listen under this subscription id, which is the id of its request."""
        flight = self._flights.get(ident) if type(ident) is int else None
        if flight is None or flight.call.method != "subscriptions/listen":
            return None
        return flight

    def _open_news(self) -> None:
        self._reopen_at = None
        call = Call("subscriptions/listen", {"notifications": self._news}, NOBODY, MODERN)
        self._listen(call, _News(self))

    def news_begun(self) -> None:
        """The child acknowledged the listen to its list changes."""
        if self._opened:  # what changed while nobody listened is unknown
            for method, kinds in LIST_CHANGED.items():
                if _filter_of(method) in self._news:
                    for kind in kinds:
                        self._host.changed(kind)
        self._opened = True
        self._delay = REOPEN[0]

    def news_ended(self, outcome: Outcome) -> None:
        """The listen to its list changes has ended; opened again, but not where the child has none."""
        refused = outcome.error is not None and outcome.error.code == METHOD_NOT_FOUND
        if self._lost is None and not refused:
            self._reopen_at = self._clock() + self._delay
            self._delay = min(self._delay * 2, REOPEN[1])

    def wake(self, now: float) -> None:
        super().wake(now)
        if self._reopen_at is not None and now >= self._reopen_at and self._lost is None:
            self._open_news()


class _News:
    """The sink of the listen that a ModernServer opens for itself."""

    def __init__(self, peer: ModernServer) -> None:
        self._peer = peer

    def note(self, notice: Notice) -> None:
        if notice.method == "notifications/subscriptions/acknowledged":
            self._peer.news_begun()
        elif notice.method in LIST_CHANGED:
            self._peer.list_changed(notice.method)

    def ask(self, ask: Ask) -> None: ...

    def done(self, outcome: Outcome) -> None:
        self._peer.news_ended(outcome)


class LegacyServer(_Peer):
    """A legacy child, seen as a modern server (MCP 2024-11-05 … 2025-11-25, basic/lifecycle)."""

    era: ClassVar[str] = "legacy"

    def _prepare(self) -> None:
        self._overdue: dict[int, None] = {}  # cancelled and not answered, by id
        self._forgotten = 0  # those that did not fit: they stay open for good
        self._level = len(LOG_LEVELS)  # the lowest level set so far, as an index; none yet
        self._logs = "logging" in self.offer.capabilities
        self._listens: dict[_LegacyListen, None] = {}
        self._topics: dict[str, _Topic] = {}  # by URI: what is subscribed to at the child

    def start(self, now: float) -> None:
        """The handshake's last word (2025-11-25, basic/lifecycle, Initialization)."""
        self._write(write_notice(Notice("notifications/initialized", {})))

    @property
    def overdue(self) -> bool:
        return bool(self._overdue) or self._forgotten > 0

    @property
    def listening(self) -> int:
        return len(self._listens)

    def _params(self, ident: int, call: Call) -> dict[str, Json]:
        if call.log_level is not None and self._logs:
            self._lower(call.log_level)  # written before the call itself is
        params = call.params
        if "inputResponses" in params or "requestState" in params:
            params = {key: value for key, value in params.items() if key not in MODERN_PARAMS}
        if call.progress:
            meta = params.get("_meta")
            token = {"progressToken": ident}
            params = {**params, "_meta": {**meta, **token} if isinstance(meta, dict) else token}
        return params

    def _health_check(self) -> str:
        return "ping"

    def _lower(self, level: str) -> None:
        """Legacy log levels hold for the process: it gets the lowest that any client asked for."""
        wanted = LOG_LEVELS.index(level) if level in LOG_LEVELS else len(LOG_LEVELS)
        if wanted < self._level:
            self._level = wanted
            self._own_call("logging/setLevel", {"level": level}, NO_SINK)

    def _failed(self, flight: _Flight, error: Error) -> Error:
        if error.code == LEGACY_RESOURCE_NOT_FOUND and flight.call.method == "resources/read":
            data = error.data if isinstance(error.data, dict) else {}
            uri = {"uri": flight.call.params.get("uri")}
            return Error(INVALID_PARAMS, error.message, {**data, **uri})
        return error

    # ---- open and overdue ----

    def _orphaned(self, flight: _Flight) -> None:
        """A cancelled legacy request gets no response, so only a late one shows that it is over."""
        if not flight.own:
            if len(self._overdue) < OVERDUE:
                self._overdue[flight.ident] = None
            else:
                self._forgotten += 1
        for ask in list((flight.asks or {}).values()):
            self._refuse(ask.source, "the call that this belongs to was cancelled")
        flight.asks = None

    def _stray(self, message: Response, now: float) -> None:
        if type(message.id) is int and message.id in self._overdue:
            del self._overdue[message.id]
            self._host.freed()
        else:
            super()._stray(message, now)

    def _only_open(self) -> _Flight | None:
        return None if self.overdue else super()._only_open()

    # ---- asks ----

    def _requested(self, request: Request, now: float) -> None:
        if request.method == "ping":
            self._write(write_result(request.id, b"{}"))
            return
        kind = ASK_KINDS.get(request.method)
        if kind is None:
            self._refuse(request.id, f"Method not found: {request.method:.80}")
            return
        if kind not in self._config.offer:
            self._refuse(request.id, f'"{kind}" was not offered at initialize (config: offer)')
            return
        if kind != "roots" and (self.open_calls or self.overdue):
            self.known_to_ask = True
        owner = self._whose(request)
        if isinstance(owner, str):
            self._remarks.say("warning", f"{request.method} was refused: {owner}", now)
            self._refuse(request.id, owner)
        else:
            self._ask(owner, request, now)

    def _whose(self, request: Request) -> _Flight | str:
        """The call that an ask belongs to, or why none can be named."""
        meta = request.params.get("_meta")
        task = meta.get(META_TASK) if isinstance(meta, dict) else None
        if isinstance(task, dict):
            return self._whose_task(task.get("taskId"))
        open_now = self.open_calls + len(self._overdue) + self._forgotten
        if open_now == 0:
            return "no call is open in this process, so there is nobody to ask"
        if open_now > 1:
            return (
                f"{open_now} calls are open in this process, and MCP does not say which one asks; "
                f"set mcpServers.{self.server}.concurrency to 1, and processes to as many as you need"
            )
        flight = super()._only_open()
        return flight if flight is not None else "the call that this belongs to was cancelled"

    def _whose_task(self, task: Json) -> _Flight | str:
        """A task's ask comes after the call that made it has ended; it travels on the tasks/result
        that waits for it (2025-11-25, basic/utilities/tasks, Input Required Status)."""
        for flight in self._flights.values():
            if flight.call.method == "tasks/result" and flight.call.params.get("taskId") == task:
                return flight
        return "nobody waits for the result of that task, so there is nobody to ask"

    def _ask(self, flight: _Flight, request: Request, now: float) -> None:
        if flight.asks is None:
            flight.asks, flight.keys = {}, {}
        if len(flight.asks) >= ASKS_PER_CALL:
            self._refuse(request.id, f"{ASKS_PER_CALL} asks of this call wait already")
            return
        key, params = _key(request, flight.keys if flight.keys is not None else {})
        ask = Ask(key, request.method, params, request.id)
        flight.asks[key] = ask
        if flight.paused is None:
            flight.paused = now
            self.parked += 1
        try:
            flight.sink.ask(ask)
        except Exception as error:  # as in _deliver; the child must not wait for ever
            self._fault("ask", error)
            failed = Error(INTERNAL_ERROR, "Atrax could not pass this on")
            self.answered(flight, ask, Outcome(error=failed))

    def answered(self, flight: _Flight, ask: Ask, outcome: Outcome) -> None:
        if not self._settle(flight, ask):
            return
        ident = _own_id(ask.source)
        if outcome.error is not None:
            error = outcome.error
            # 1099 says within Atrax that nobody waits; on a wire it means nothing.
            code = INTERNAL_ERROR if error.code == CANCELLED else error.code
            self._write(write_error(ident, Error(code, error.message, error.data)))
        elif outcome.result is not None:
            self._write(write_result(ident, encode(outcome.result)))
        else:
            self._write(write_result(ident, outcome.raw or b"{}"))
        if flight.paused is None:
            self._host.freed()

    def _settle(self, flight: _Flight, ask: Ask) -> bool:
        """Take `ask` off its call; the call's clock goes on after its last one. False: it is gone."""
        asks = flight.asks
        if asks is None or asks.get(ask.key) is not ask:
            return False
        del asks[ask.key]
        if not asks and flight.paused is not None:
            stood = self._clock() - flight.paused
            flight.due, flight.limit, flight.paused = flight.due + stood, flight.limit + stood, None
            self.parked -= 1
        return True

    def _turned_away(self, ident: int | str, reason: str) -> None:
        self._write(write_error(ident, Error(INVALID_REQUEST, reason)))

    def _refuse(self, ident: object, reason: str) -> None:
        self._write(write_error(_own_id(ident), Error(METHOD_NOT_FOUND, reason)))

    def _taken_back(self, ident: Json) -> None:
        """The child cancelled an ask of its own."""
        if type(ident) is not int and not isinstance(ident, str):
            return
        for flight in self._flights.values():
            for ask in (flight.asks or {}).values():
                if ask.source == ident:
                    self._settle(flight, ask)
                    self._note(flight, Notice("notifications/cancelled", {"requestId": ask.key}))
                    self._host.freed()
                    return

    def noted(self, flight: _Flight, notice: Notice) -> None:
        # Roots widen what some servers may touch: a session's never reach a child of several.
        roots = notice.method == "notifications/roots/list_changed"
        if roots and self._config.isolation == "session":
            self._write(write_notice(notice))

    def _notified(self, notice: Notice, now: float) -> None:
        if notice.method == "notifications/cancelled":
            self._taken_back(notice.params.get("requestId"))
        elif notice.method in LIST_CHANGED:
            for kind in LIST_CHANGED[notice.method]:
                self._host.changed(kind)
        elif notice.method == "notifications/resources/updated":
            self._updated(notice)
        else:
            self._remarks.say("debug", f"{notice.method:.80} is not known: dropped", now)

    # ---- listens ----

    def _listen(self, call: Call, sink: Sink) -> Handle:
        resources = self.offer.capabilities.get("resources")
        able = isinstance(resources, dict) and bool(resources.get("subscribe"))
        listen = _LegacyListen(self, sink, _uris(call.params) if able else [])
        self._listens[listen] = None
        for uri in listen.uris:
            self._subscribe(uri, listen)
        listen.settled()
        return listen

    def _subscribe(self, uri: str, listen: _LegacyListen) -> None:
        """One subscription at the child for all who listen to `uri`."""
        known = self._topics.get(uri)
        topic = known or self._topics.setdefault(uri, _Topic())
        topic.listens[listen] = None
        if topic.standing:
            listen.accepted.append(uri)
            return
        listen.waiting += 1
        if known is None:
            then = _Then(lambda outcome: self._subscribed(uri, topic, outcome))
            self._own_call("resources/subscribe", {"uri": uri}, then)

    def _subscribed(self, uri: str, topic: _Topic, outcome: Outcome) -> None:
        topic.standing = outcome.error is None
        if not topic.standing and self._topics.get(uri) is topic:
            del self._topics[uri]
        for listen in list(topic.listens):
            listen.waiting -= 1
            if topic.standing:
                listen.accepted.append(uri)
            listen.settled()

    def unsubscribe(self, listen: _LegacyListen) -> None:
        """`listen` has ended; what nobody listens to any more is unsubscribed at the child."""
        self._listens.pop(listen, None)
        for uri in listen.uris:
            topic = self._topics.get(uri)
            if topic is None or listen not in topic.listens:
                continue
            del topic.listens[listen]
            if not topic.listens:
                del self._topics[uri]
                self._own_call("resources/unsubscribe", {"uri": uri}, NO_SINK)

    def _updated(self, notice: Notice) -> None:
        uri = notice.params.get("uri")
        if not isinstance(uri, str):
            return
        hearers: dict[_LegacyListen, None] = {}
        for topic_uri, topic in self._topics.items():
            # It may be a part of what was subscribed to (2025-11-25, ResourceUpdatedNotification).
            if uri == topic_uri or (uri.startswith(topic_uri) and _part(uri, topic_uri)):
                hearers.update(topic.listens)
        for listen in hearers:
            listen.heard(notice)

    def _dying(self, why: str) -> None:
        # Before the subscribe requests end: their answers would still be acknowledged.
        listens, self._listens = self._listens, {}
        self._topics.clear()
        for listen in listens:
            listen.end(Outcome(error=self._died(why), server=self.server, place=self.place))

    def told_of(self, listen: _LegacyListen, notice: Notice) -> None:
        """Hand `notice` to the sink of `listen`."""
        try:
            listen.sink.note(notice)
        except Exception as error:  # as in _deliver
            self._fault("note", error)


class _Topic:
    """One resource that is subscribed to at a legacy child, for all who listen to it."""

    __slots__ = ("listens", "standing")

    def __init__(self) -> None:
        self.listens: dict[_LegacyListen, None] = {}
        self.standing: bool | None = None  # None: the child has not answered yet


class _LegacyListen:
    """A subscriptions/listen on a legacy child, which has resources/subscribe alone."""

    __slots__ = ("peer", "sink", "uris", "accepted", "waiting", "acknowledged", "over", "early")

    def __init__(self, peer: LegacyServer, sink: Sink, uris: list[str]) -> None:
        self.peer, self.sink, self.uris = peer, sink, uris
        self.accepted: list[str] = []
        self.waiting = 0  # subscribe requests that are not answered yet
        self.acknowledged = self.over = False
        self.early: list[Notice] = []  # nothing may come before the acknowledgement

    def settled(self) -> None:
        """Acknowledge once the child has answered for every URI."""
        if self.waiting or self.acknowledged or self.over:
            return
        self.acknowledged = True
        honoured = {"resourceSubscriptions": self.accepted} if self.accepted else {}
        acknowledgement = {"notifications": honoured}
        self.peer.told_of(self, Notice("notifications/subscriptions/acknowledged", acknowledgement))
        for notice in self.early:
            self.heard(notice)
        self.early = []

    def heard(self, notice: Notice) -> None:
        if self.over:
            return
        if self.acknowledged:
            self.peer.told_of(self, notice)
        elif len(self.early) < 100:  # an update only says "read again": more of them say no more
            self.early.append(notice)

    def end(self, outcome: Outcome) -> None:
        if self.over:
            return
        self.over = True
        try:
            self.sink.done(outcome)
        except Exception as error:  # as in _deliver
            self.peer._fault("done", error)

    def answer(self, ask: Ask, outcome: Outcome) -> None: ...
    def note(self, notice: Notice) -> None: ...

    def cancel(self, reason: str) -> None:
        if not self.over:
            self.peer.unsubscribe(self)
            self.end(Outcome(error=Error(CANCELLED, reason)))


# ---- The probe ----
# A child speaks first when it is spoken to, and only its answer shows its era. `server/discover`
# is asked first (2026-07-28, basic/transports/stdio, Backward Compatibility). Silence proves
# nothing: npx and uvx read after seconds. So after two of them `initialize` is sent too, and both
# answers are waited for. Modern evidence wins, even over an initialize that was answered first,
# which therefore waits a moment for its rival. Any error to discover is legacy, whatever its code.


class _Step(enum.Enum):
    DISCOVER = "discover"  # discover alone was sent
    BOTH = "both"  # and initialize too, since discover met silence
    ANSWERED = "answered"  # initialize was answered; discover has a moment left
    INITIALIZE = "initialize"  # only initialize can still make it fit
    LAST = "last"  # only discover can
    MODERN = "modern"
    LEGACY = "legacy"
    UNFIT = "unfit"
    LOST = "lost"


class _Sign(enum.Enum):
    MODERN = "a DiscoverResult that lists a modern version"
    LEGACY = "any other answer to discover"
    ALIEN = "-32022 with no version that Atrax speaks"
    CLAIMS = "-32022 that lists a modern version, to initialize"
    OLDER = "-32022 that lists legacy versions only, to initialize"
    AGREED = "an InitializeResult with a version that Atrax speaks"
    STRANGE = "an InitializeResult with another version"
    REFUSED = "any other error to initialize"
    SILENCE = "no answer to discover for two seconds"
    MOMENT = "the moment is over"


STEPS: Final[dict[_Step, dict[_Sign, _Step]]] = {  # step: {sign: the step after it}
    _Step.DISCOVER: {
        _Sign.MODERN: _Step.MODERN,
        _Sign.LEGACY: _Step.INITIALIZE,
        _Sign.ALIEN: _Step.UNFIT,
        _Sign.SILENCE: _Step.BOTH,
    },
    _Step.BOTH: {
        _Sign.MODERN: _Step.MODERN,
        _Sign.LEGACY: _Step.INITIALIZE,
        _Sign.ALIEN: _Step.UNFIT,
        _Sign.CLAIMS: _Step.LAST,
        _Sign.OLDER: _Step.INITIALIZE,
        _Sign.AGREED: _Step.ANSWERED,
        _Sign.STRANGE: _Step.UNFIT,
        _Sign.REFUSED: _Step.LAST,
    },
    _Step.ANSWERED: {
        _Sign.MODERN: _Step.MODERN,
        _Sign.LEGACY: _Step.LEGACY,
        _Sign.ALIEN: _Step.LEGACY,
        _Sign.MOMENT: _Step.LEGACY,
    },
    _Step.INITIALIZE: {
        _Sign.MODERN: _Step.MODERN,
        _Sign.CLAIMS: _Step.LAST,
        _Sign.OLDER: _Step.INITIALIZE,
        _Sign.ALIEN: _Step.UNFIT,
        _Sign.AGREED: _Step.LEGACY,
        _Sign.STRANGE: _Step.UNFIT,
        _Sign.REFUSED: _Step.UNFIT,
    },
    _Step.LAST: {
        _Sign.MODERN: _Step.MODERN,
        _Sign.LEGACY: _Step.UNFIT,
        _Sign.ALIEN: _Step.UNFIT,
    },
}


class Conversation:
    """All that is said with one process, from the probe to its last word; the Link to it.

    `start` once, then `receive` for each line and `wake` a few times a second; `lost` ends it. `era`
    is what was found out about this command line before ("auto": nothing)."""

    def __init__(
        self,
        server: str,
        place: str,
        config: ServerConfig,
        limits: Limits,
        host: Host,
        write: Callable[[bytes], None],
        clock: Callable[[], float],
        era: str = "auto",
    ) -> None:
        self.server, self.place = server, place
        self._config, self._limits, self._host = config, limits, host
        self._write, self._clock = write, clock
        self._forced = config.protocol != "auto"
        wanted = config.protocol if self._forced else era
        self._step = _Step.INITIALIZE if wanted == "legacy" else _Step.DISCOVER
        if self._forced and wanted == "modern":
            self._step = _Step.LAST
        self._sent: dict[int, str] = {}  # id: method, of what the probe has not heard of yet
        self._next = 1
        self._tried: set[str] = set()  # legacy versions that were offered
        self._retry = LATEST_LEGACY  # the one to offer next
        self._began = math.inf  # until `start`: the process may take a while to come up
        self._moment = 0.0  # when ANSWERED ends
        self._answer: Offer | None = None  # what initialize said
        self._found: Offer | None = None  # what discover said
        self._why = ""  # of UNFIT
        self._peer: LegacyServer | ModernServer | None = None
        self._remarks = _Remarks(host)
        self._initialized = False  # whether initialize was ever sent

    # ---- what the Supervisor asks ----

    @property
    def exited_on_probe(self) -> bool:
        """If it died now: the probe would be to blame (rmcp exits on it), and no crash be counted."""
        return not (self._peer or self._initialized or self._forced or self._step is _Step.UNFIT)

    @property
    def era(self) -> str:
        """What the child is, modern or legacy; auto while that is not known."""
        return "auto" if self._peer is None else self._peer.era

    @property
    def open_calls(self) -> int:
        """Clients' calls in flight, parked ones too, cancelled ones not."""
        return 0 if self._peer is None else self._peer.open_calls

    @property
    def parked(self) -> int:
        """Calls that wait for the answer to an ask."""
        return 0 if self._peer is None else self._peer.parked

    @property
    def known_to_ask(self) -> bool:
        """Whether an elicitation or a sampling arrived while a call was open."""
        return self._peer is not None and self._peer.known_to_ask

    @property
    def overdue(self) -> bool:
        """Whether it holds a cancelled, unanswered call, and so may still ask for it."""
        return self._peer is not None and self._peer.overdue

    @property
    def listening(self) -> int:
        """Clients' listens under way: a use of the process, though no call."""
        return 0 if self._peer is None else self._peer.listening

    # ---- the four verbs, and send ----

    def start(self, now: float) -> None:
        """Say the first word."""
        self._began = now
        if self._step is _Step.INITIALIZE:
            self._initialize()
        else:
            self._discover()

    def send(self, call: Call, sink: Sink) -> Handle:
        """As _Peer.send; before the child is ready nothing can be sent."""
        if self._peer is not None:
            return self._peer.send(call, sink)
        error = own_error(UNAVAILABLE, f"{self.server} is not ready", "starting", self.server)
        sink.done(Outcome(error=error, server=self.server, place=self.place))
        return _Refused()

    def receive(self, line: bytes, now: float) -> None:
        """One line from the child, without its newline."""
        if self._peer is not None:
            self._peer.receive(line, now)
        elif self._step not in (_Step.UNFIT, _Step.LOST):
            self._hear(line, now)

    def wake(self, now: float) -> None:
        """Time has passed."""
        if self._peer is not None:
            self._peer.wake(now)
            return
        self._remarks.close(now)
        if self._step is _Step.DISCOVER and now - self._began >= SILENCE:
            self._move(_Sign.SILENCE, now)
        elif self._step is _Step.ANSWERED and now >= self._moment:
            self._move(_Sign.MOMENT, now)

    def lost(self, why: str) -> None:
        """The process is gone."""
        if self._peer is not None:
            self._peer.lost(why)
        else:
            self._step = _Step.LOST

    # ---- the probe ----

    def _hear(self, line: bytes, now: float) -> None:
        if not line.strip():
            return
        try:
            message = read_message(decode(line, self._limits.depth + 1))
        except (InvalidJson, RpcError) as error:
            # A banner or a debug print; many servers greet on stdout before they speak.
            self._remarks.say("warning", f"stdout: {error}: {_excerpt(line)}", now)
            return
        if isinstance(message, Request):
            self._asked(message)
        elif isinstance(message, Response):
            method = self._sent.pop(message.id, None) if type(message.id) is int else None
            if method is not None:
                sign = self._read_discover if method == "server/discover" else self._read_initialize
                self._move(sign(message), now)
        elif message.method == "notifications/message":
            self._remarks.say(*_log_line(message.params), now)

    def _asked(self, request: Request) -> None:
        if request.method == "ping":
            self._write(write_result(request.id, b"{}"))
        else:
            reason = Error(METHOD_NOT_FOUND, "no call is open, so there is nobody to ask")
            self._write(write_error(request.id, reason))

    def _move(self, sign: _Sign, now: float) -> None:
        """The one gate: take the step that the table names, and do what it takes."""
        after = STEPS.get(self._step, {}).get(sign)
        if after is None:
            return  # of a request whose answer no longer matters
        if after is _Step.LAST and self._forced:
            after = _Step.UNFIT  # protocol: legacy, but it is modern
        self._step = after
        if after is _Step.MODERN and self._found is not None:
            self._adopt(ModernServer, self._found, now)
        elif after is _Step.LEGACY and self._answer is not None:
            self._adopt(LegacyServer, self._answer, now)
        elif after is _Step.UNFIT:
            self._host.unfit(self._why)
        elif after is _Step.ANSWERED:
            self._moment = now + GRACE
        elif after is _Step.LAST and "server/discover" not in self._sent.values():
            self._discover()
        elif after in (_Step.BOTH, _Step.INITIALIZE) and self._retry not in self._tried:
            self._initialize()

    def _adopt(self, era: type[LegacyServer | ModernServer], offer: Offer, now: float) -> None:
        peer = era(
            self.server,
            self.place,
            self._config,
            self._limits,
            self._host,
            self._write,
            self._clock,
            offer,
            self._next,
        )
        self._peer = peer
        peer.start(now)
        self._host.ready(offer)

    def _ask_child(self, method: str, params: dict[str, Json]) -> None:
        ident = self._next
        self._next += 1
        self._sent[ident] = method
        self._write(write_request(ident, method, params))

    def _discover(self) -> None:
        meta = {META_VERSION: MODERN, META_CLIENT: ATRAX, META_CAPABILITIES: {}}
        self._ask_child("server/discover", {"_meta": meta})

    def _initialize(self) -> None:
        self._initialized = True
        version = self._retry
        self._tried.add(version)
        capabilities = {kind: OFFERED[kind] for kind in OFFERED if kind in self._config.offer}
        params = {"protocolVersion": version, "capabilities": capabilities, "clientInfo": ATRAX}
        self._ask_child("initialize", params)

    def _read_discover(self, response: Response) -> _Sign:
        if response.error is not None:
            self._why = f"answered server/discover with {_describe(response.error)}"
            return self._read_refusal(response.error, _Sign.LEGACY, _Sign.LEGACY) or _Sign.LEGACY
        result = response.result or {}
        versions = result.get("supportedVersions")
        if not isinstance(versions, list) or MODERN not in versions:
            self._why = f"does not speak {MODERN}; it speaks {_excerpt(versions)}"
            return _Sign.LEGACY
        meta = result.get("_meta")
        info = meta.get(META_SERVER) if isinstance(meta, dict) else None
        self._found = _offer(result, info, MODERN, "modern")
        return _Sign.MODERN

    def _read_initialize(self, response: Response) -> _Sign:
        if response.error is not None:
            self._why = f"refused initialize with {_describe(response.error)}"
            return self._read_refusal(response.error, _Sign.CLAIMS, _Sign.OLDER) or _Sign.REFUSED
        result = response.result or {}
        version = result.get("protocolVersion")
        if not isinstance(version, str) or version not in LEGACY:
            known = ", ".join((*LEGACY, MODERN))
            self._why = f"answered with protocol version {_excerpt(version)}; Atrax speaks {known}"
            return _Sign.STRANGE
        self._answer = _offer(result, result.get("serverInfo"), version, "legacy")
        return _Sign.AGREED

    def _read_refusal(self, error: Error, modern: _Sign, legacy: _Sign) -> _Sign | None:
        """What -32022 says by its `supported`; None for another error, or where it says nothing."""
        supported = error.data.get("supported") if isinstance(error.data, dict) else None
        if error.code != UNSUPPORTED_VERSION or not isinstance(supported, list):
            return None
        if MODERN in supported:
            return modern
        common = [one for one in LEGACY if one in supported and one not in self._tried]
        if common:
            self._retry = common[-1]
            return legacy
        self._why = f"speaks none of Atrax's protocol versions, only {_excerpt(supported)}"
        return _Sign.ALIEN


class _Refused:
    """The handle of a call that was never written."""

    def answer(self, ask: Ask, outcome: Outcome) -> None: ...
    def note(self, notice: Notice) -> None: ...
    def cancel(self, reason: str) -> None: ...


# ---- Readings ----


def _offer(result: dict[str, Json], info: Json, version: str, era: str) -> Offer:
    capabilities, instructions = result.get("capabilities"), result.get("instructions")
    return Offer(
        capabilities if isinstance(capabilities, dict) else {},
        info if isinstance(info, dict) else {},
        instructions if isinstance(instructions, str) else "",
        version,
        era,
    )


def _describe(error: Error) -> str:
    return f"error {error.code}: {error.message:.200}"


def _excerpt(value: Json) -> str:
    """The beginning of what a child sent, for a log line."""
    if isinstance(value, bytes):
        return repr(value[:120].decode(errors="replace"))
    return f"{value!r:.120}"


def _log_line(params: dict[str, Json]) -> tuple[str, str]:
    """A child's log message as level and text of Atrax's own log. Its `data` is any JSON."""
    data, logger, level = params.get("data"), params.get("logger"), params.get("level")
    text = data if isinstance(data, str) else f"{data!r:.2000}"
    text = f"{logger}: {text}" if isinstance(logger, str) else text
    return OWN_LEVEL.get(level, "error") if level in LOG_LEVELS else "info", text[:2000]


def _wanted(level: Json, lowest: str | None) -> bool:
    """Whether a client that asked for `lowest` wants a message of `level`. Unknown levels pass."""
    if lowest not in LOG_LEVELS or level not in LOG_LEVELS:
        return True
    return LOG_LEVELS.index(level) >= LOG_LEVELS.index(lowest)


def _short_integer(digits: str) -> int | None:
    # Only the id is looked for; converting a million digits takes seconds (CVE-2020-10735).
    return int(digits) if len(digits) < 20 else None


def _own_id(source: object) -> int | str:
    """The child's id of its ask, as it was read (read_message lets through nothing else)."""
    return source if isinstance(source, (int, str)) else ""


def _key(request: Request, used: dict[str, int]) -> tuple[str, dict[str, Json]]:
    """The key of an ask, unique in its call, and its params without the child's hint.

    The hint, else the id where it is a string, else method and ordinal (DESIGN, Parking): the same
    when the call is made again, so that an answer given before still fits."""
    params = request.params
    meta = params.get("_meta")
    hint = meta.get(META_INPUT_KEY) if isinstance(meta, dict) else None
    if isinstance(meta, dict) and META_INPUT_KEY in meta:
        params = {name: value for name, value in params.items() if name != "_meta"}
        if rest := {name: value for name, value in meta.items() if name != META_INPUT_KEY}:
            params["_meta"] = rest
    wanted = hint if isinstance(hint, str) and hint else request.id
    if not isinstance(wanted, str) or not 0 < len(wanted) <= KEY_LENGTH:
        used[request.method] = used.get(request.method, 0) + 1
        wanted = f"{request.method}-{used[request.method]}"
    key = wanted
    while key in used:
        used[wanted] += 1
        key = f"{wanted}-{used[wanted]}"
    used[key] = 1
    return key, params


def _uris(params: dict[str, Json]) -> list[str]:
    """The resources that a subscriptions/listen names, each once."""
    wanted = params.get("notifications")
    uris = wanted.get("resourceSubscriptions") if isinstance(wanted, dict) else None
    return list(dict.fromkeys(uri for uri in uris or () if isinstance(uri, str)))


def _list_changes(capabilities: dict[str, Json]) -> dict[str, Json]:
    """The filter of a listen to all list changes that `capabilities` declare."""
    wanted: dict[str, Json] = {}
    for kind in ("tools", "prompts", "resources"):
        declared = capabilities.get(kind)
        if isinstance(declared, dict) and declared.get("listChanged") is True:
            wanted[f"{kind}ListChanged"] = True
    return wanted


def _without_subscription(notice: Notice) -> Notice:
    """A notification of a listen, freed of the id that the child knows the listen by."""
    meta = {key: value for key, value in notice.params["_meta"].items() if key != META_SUBSCRIPTION}
    params = {key: value for key, value in notice.params.items() if key != "_meta"}
    if meta:
        params["_meta"] = meta
    return Notice(notice.method, params)


def _filter_of(method: str) -> str:
    """notifications/tools/list_changed → toolsListChanged"""
    return method.split("/")[1] + "ListChanged"


def _part(uri: str, whole: str) -> bool:
    """Whether `uri`, which begins with `whole`, names a part of it and not a neighbour of like name."""
    return whole.endswith("/") or uri[len(whole)] in "/?#"



# ==== Containment =================================================================
# What a child may do: its environment, its privileges, its descendants; the order for Boot's stage.
# Knows the operating system. Must not know MCP.

LINUX: Final = sys.platform.startswith("linux")
# A child's environment is this and its own `env`, no more: Atrax's may hold every other server's
# tokens. No proxy variables, which carry passwords: who needs one names it in `env`.
SAFE_VARIABLES: Final = frozenset({
    "PATH", "HOME", "LANG", "LANGUAGE", "TERM", "TMPDIR", "TZ", "USER", "LOGNAME", "SHELL",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "NODE_EXTRA_CA_CERTS",
})  # fmt: skip
WINDOWS_VARIABLES: Final = frozenset({
    "APPDATA", "COMSPEC", "HOMEDRIVE", "HOMEPATH", "LOCALAPPDATA", "PATHEXT", "PROGRAMDATA",
    "PROCESSOR_ARCHITECTURE", "PROGRAMFILES", "SYSTEMDRIVE", "SYSTEMROOT", "TEMP", "TMP",
    "USERNAME", "USERPROFILE", "WINDIR",
})  # fmt: skip
MARK: Final = "ATRAX_CHILD"  # in each child's environment: its place, which tells its descendants
INSTALLED_BY: Final = {
    "uvx": "uv",
    "uv": "uv",
    "npx": "Node.js",
    "npm": "Node.js",
    "node": "Node.js",
    "bunx": "Bun",
    "bun": "Bun",
    "deno": "Deno",
    "docker": "Docker",
    "podman": "Podman",
}
PR_SET_CHILD_SUBREAPER: Final = 36
PR_GET_CHILD_SUBREAPER: Final = 37
KILL: Final = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has the latter alone


class Unstartable(AtraxError):
    """A server that cannot be started as its config stands; the text says what to do."""


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """How one process is started: the command to exec, its whole environment, its directory."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    cwd: str | None


def launch(config: ServerConfig) -> Launch:
    """The way to start `config`; raises Unstartable.

    Looked up for each process: what is missing now may be installed later."""
    environment = safe_environment(os.environ) | config.env
    cwd = os.path.expanduser(config.cwd) if config.cwd else None
    if cwd is not None and not os.path.isdir(cwd):
        raise Unstartable(f'cwd "{cwd}" is not a directory')
    program, *arguments = config.argv
    program = find_command(program, environment.get("PATH", os.defpath), cwd)
    return Launch((program, *arguments), environment, cwd)


def safe_environment(whole: Mapping[str, str]) -> dict[str, str]:
    """The part of `whole` that every child may see, without shell functions, which are code."""
    names = SAFE_VARIABLES if os.name == "posix" else SAFE_VARIABLES | WINDOWS_VARIABLES
    return {
        name: value
        for name, value in whole.items()
        if (name in names or name.startswith("LC_")) and not value.startswith("()")
    }


def find_command(command: str, path: str, cwd: str | None) -> str:
    """The file to execute; raises Unstartable, which says more than a failed exec could."""
    if os.path.dirname(command):
        file = os.path.join(cwd or os.getcwd(), os.path.expanduser(command))
        if not os.path.isfile(file):
            raise Unstartable(f'command "{command}" does not exist')
        if not os.access(file, os.X_OK):
            raise Unstartable(f'command "{command}" is not executable')
        return file
    import shutil  # 4 ms with its compressors, for one function

    found = shutil.which(command, path=path)
    if found is None:
        product = INSTALLED_BY.get(command)
        hint = f"Is {product} installed?" if product else "Is it installed?"
        raise Unstartable(f'command "{command}" not found on PATH. {hint}')
    return os.path.abspath(found)


def staged(command: Sequence[str]) -> list[str]:
    """The command line that becomes `command` by way of Boot's stage; outside Linux `command`."""
    if not LINUX:
        return list(command)
    # -I -S: nothing that a user may have installed runs before the order is carried out.
    order = orjson.dumps({"parent": os.getpid(), "limits": []}).decode()
    return [sys.executable, "-I", "-S", "-c", _stage_source(), order, *command]


@functools.cache
def _stage_source() -> str:
    """The stage as an argument: its code object, so that the child has little to compile."""
    code = marshal.dumps(become_child.__code__).hex()
    return (
        "import marshal,types,builtins;"
        f"types.FunctionType(marshal.loads(bytes.fromhex('{code}')),{{'__builtins__':builtins}})()"
    )


def signal_group(pid: int, number: int) -> None:
    """Send a signal to `pid` and to all in its process group. Only before `pid` is reaped: after
    that its number may belong to somebody else."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if os.name == "posix":
            os.killpg(pid, number)
        else:
            os.kill(pid, signal.SIGTERM)  # TerminateProcess: there is no other way to end one


def become_subreaper() -> bool:
    """Make descendants that lose their parent children of this process; whether the system can.

    Otherwise a grandchild that left its process group would go to init, out of reach for good."""
    if not LINUX:
        return False
    import ctypes  # not on Windows, where this would fail to load

    done: int = ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    return done == 0


def is_subreaper() -> bool:
    """Whether descendants that lose their parent come to this process."""
    if not LINUX:
        return False
    import ctypes

    answer = ctypes.c_int(0)
    ctypes.CDLL(None).prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(answer), 0, 0, 0)
    return answer.value == 1


def end_orphans(pids: Container[int], places: Container[str] | None) -> int:
    """Reap adopted descendants that ended and kill those whose child is gone; how many are left.

    `pids` and `places` are the children that live; `places` None: all are to go. One without a mark
    stays until then, since it may belong to a child that lives."""
    left = 0
    for pid in _adopted(pids):
        with contextlib.suppress(OSError):
            if os.waitpid(pid, os.WNOHANG)[0] == pid:
                continue
        place = None if places is None else _place_of(pid)
        if places is None or (place is not None and place not in places):
            signal_group(pid, KILL)
            with contextlib.suppress(OSError):
                os.kill(pid, KILL)  # it need not lead a group
        left += 1
    return left


def _adopted(pids: Container[int]) -> list[int]:
    """Children of this process that came to it from a child. Those in our own session never did: a
    process cannot enter another's session, and each child begins one."""
    if not is_subreaper():
        return []
    session, found = os.getsid(0), list[int]()
    for thread in _threads():
        with contextlib.suppress(OSError), open(f"/proc/self/task/{thread}/children") as file:
            found += [pid for pid in map(int, file.read().split()) if pid not in pids]
    return [pid for pid in found if _session_of(pid) != session]


def _threads() -> list[str]:
    try:
        return os.listdir("/proc/self/task")
    except OSError:
        return []


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _place_of(pid: int) -> str | None:
    """The place of the child that `pid` descends from; None if it does not say."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        for entry in file.read().split(b"\0"):
            name, _, value = entry.partition(b"=")
            if name == MARK.encode():
                return value.decode(errors="replace")
    return None


def uncontained() -> list[str]:
    """What this system cannot hold children to, one sentence each; empty where all of it can."""
    if LINUX:
        if os.path.exists("/proc/self/task"):
            return []
        return ["/proc is not mounted: descendants that leave their process group outlive Atrax"]
    return [
        f"{sys.platform}: children may gain privileges by setuid programs",
        f"{sys.platform}: if Atrax is killed by force, children see only their stdin close",
    ]

# ==== Child =======================================================================
# One process: its pipes, the lines on them, how it ended and what it said last.
# Knows one child. Must not know other children, or what a line means.

PIPE_SIZE: Final = 2**20  # of a child's stdout: 1 MiB results come 1.6 times faster than by 64 KiB
STDIN_HIGH: Final = 2**20  # bytes that a child has not read; past it the process is not free
SMALL_PART: Final = 4096  # bytes; the parts of a long line are no smaller, so they are not too many
STDERR_LINE: Final = 8192  # bytes of one line on stderr that are kept
STDERR_RATE: Final = 200  # lines a second of one child that are logged
LAST_LINE: Final = 300  # characters of its last line that a message quotes
PATIENCE: Final = 2.0  # seconds between the rungs of `Child.stop`
DRAIN: Final = 0.2  # seconds; a descendant may hold a pipe open after the child has ended
_ANSI: Final = re.compile(rb"\x1b\[[0-9;:?]*[A-Za-z]")  # colours, which a log line has no use for


class Lines:
    """Chunks to lines (MCP, stdio): newline-delimited, `\\r\\n` and empty lines tolerated.

    Once a line is longer than `limit` bytes, `overlong` is set and nothing more comes out."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[bytes] = []  # of the line that has not ended yet
        self._held = 0
        self.overlong = False

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes."""
        lines = data.split(b"\n")
        rest = lines.pop()
        if self._parts and lines:
            self._parts.append(lines[0])
            lines[0] = b"".join(self._parts)
            self._parts.clear()
            self._held = 0
        if rest:
            self._hold(rest)
        # A line can only be too long if one of these is, and the first may have been held.
        longest = max(self._held, len(data), len(lines[0]) if lines else 0)
        if longest > self._limit:
            self._cut(lines)
        return lines

    def end(self) -> list[bytes]:
        """What the last line holds, if it was not ended."""
        line = b"".join(self._parts)
        self._parts.clear()
        return [line] if line and not self.overlong else []

    def _hold(self, part: bytes) -> None:
        if self._parts and len(self._parts[-1]) < SMALL_PART:
            self._parts[-1] += part
        else:
            self._parts.append(part)
        self._held += len(part)

    def _cut(self, lines: list[bytes]) -> None:
        for at, line in enumerate(lines):
            if len(line) > self._limit:
                del lines[at:]
                self.overlong = True
        self.overlong = self.overlong or self._held > self._limit
        if self.overlong:
            self._parts.clear()


class Throttle:
    """At most `rate` lines a second, and how many were left out."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._second = 0.0
        self._passed = 0
        self.dropped = 0

    def passes(self, now: float) -> bool:
        """Whether one more line may be logged at `now`; counts it either way."""
        if now - self._second >= 1.0:
            self._second, self._passed = now, 0
        if self._passed >= self._rate:
            self.dropped += 1
            return False
        self._passed += 1
        return True

    def report(self, now: float, whole: bool = False) -> int:
        """How many were left out so far; 0 before their second is over (`whole`: now)."""
        if not self.dropped or (now - self._second < 1.0 and not whole):
            return 0
        dropped, self.dropped = self.dropped, 0
        return dropped


class Child:
    """One process of a server, from `open` to `ended`.

    Its owner sets `receive(line, now)`, which gets each line of its stdout, and `ended(why)`, which
    is called once, after the last line, if `open` succeeded. What they raise stays in here.
    `pipe_size`: of its stdout, in bytes; 0 for the system's default."""

    def __init__(
        self,
        server: str,
        place: str,
        line_limit: int,
        pipe_size: int,
        record: Record,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.server, self.place, self.pid = server, place, 0
        self.receive: Callable[[bytes, float], None] = lambda line, now: None
        self.ended: Callable[[str], None] = lambda why: None
        # Not free for another call: not open yet, its stdin full, or about to end.
        self.busy = True
        self.heard = 0.0  # when something last came from it
        self.spoke_last = False  # whether Atrax wrote after that
        self.fault = ""  # why Atrax ended it, where it did
        self.stderr = _Stderr(self, record, loop.time)
        self._stdout = _Stdout(self, Lines(line_limit), loop.time)
        self._stdin = _Stdin(self)
        self._record, self._loop, self._pipe_size = record, loop, pipe_size
        self._process: subprocess.Popen[bytes] | None = None
        self._unsent: list[bytes] = []
        self._pidfd = -1
        self._ending = ""  # how it ended, once it has
        self._over = False
        self._timer: asyncio.TimerHandle | None = None  # the next rung of `stop`, then the drain

    @property
    def alive(self) -> bool:
        """Whether the process runs, as far as is known."""
        return self._process is not None and not self._ending

    @property
    def ending(self) -> bool:
        """Whether it is on its way out, or has ended."""
        return self._timer is not None or not self.alive

    @property
    def last_line(self) -> str:
        """The last line that it wrote to stderr, cut to what a message can quote; "" if none."""
        line: str = self._record.redact(self.stderr.last)
        return line if len(line) <= LAST_LINE else line[:LAST_LINE] + "…"

    # ---- start ----

    async def open(self, way: Launch) -> None:
        """Start the process; raises OSError. Call it in a thread that lives as long as Atrax does:
        the kernel sends the parent-death signal when the *thread* that started a child ends."""
        ends = self._spawn(way)
        try:
            await self._connect(ends)
        except BaseException:
            signal_group(self.pid, KILL)
            self._reap()
            raise
        self.busy = False
        self._watch()

    def _spawn(self, way: Launch) -> tuple[int, int, int]:
        """Start it; our ends of its stdin, stdout and stderr.

        Pipes of our own: libuv's are socket pairs, which are slower and have no F_SETPIPE_SZ."""
        stdin, to_stdin = os.pipe()
        from_stdout, stdout = os.pipe()
        from_stderr, stderr = os.pipe()
        try:
            if LINUX and self._pipe_size:
                import fcntl  # there is none on Windows

                # Refused past fs.pipe-user-pages-soft: then results are slower, no more.
                with contextlib.suppress(OSError):
                    fcntl.fcntl(stdout, fcntl.F_SETPIPE_SZ, self._pipe_size)
            self._process = subprocess.Popen(
                staged(way.command),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                cwd=way.cwd,
                env={**way.environment, MARK: self.place},
                start_new_session=True,
                # The stage closes what is open; done here, it would walk through 20,000 sockets.
                close_fds=not LINUX,
            )
            self.pid = self._process.pid
        except BaseException:
            for end in (to_stdin, from_stdout, from_stderr):
                os.close(end)
            raise
        finally:
            for end in (stdin, stdout, stderr):
                os.close(end)
        return to_stdin, from_stdout, from_stderr

    async def _connect(self, ends: tuple[int, int, int]) -> None:
        # Files, so that those that are not reached are closed too.
        to_stdin, from_stdout, from_stderr = (
            os.fdopen(end, mode, 0) for end, mode in zip(ends, ("wb", "rb", "rb"), strict=True)
        )
        transport, _ = await self._loop.connect_write_pipe(lambda: self._stdin, to_stdin)
        transport.set_write_buffer_limits(high=STDIN_HIGH)
        await self._loop.connect_read_pipe(lambda: self.stderr, from_stderr)
        await self._loop.connect_read_pipe(lambda: self._stdout, from_stdout)

    def _watch(self) -> None:
        """Have `_exited` called when the process has ended, and before it is reaped."""
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # not before Linux 5.3, and not under some sandboxes
                self._pidfd = os.pidfd_open(self.pid)
                self._loop.add_reader(self._pidfd, self._exited)
                return
        # Owned by the process that it waits for: it ends when that ends.
        threading.Thread(target=self._wait, name=f"wait {self.place}", daemon=True).start()

    def _wait(self) -> None:
        if self._process is not None:
            if hasattr(os, "waitid"):
                with contextlib.suppress(ChildProcessError):
                    os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            else:
                self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            self._loop.call_soon_threadsafe(self._exited)

    # ---- traffic ----

    def write(self, data: bytes) -> None:
        """Send one message as a line. What one turn of the loop writes goes out together: 0.9 of
        the CPU at 64 clients."""
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent.append(data)

    def _flush(self) -> None:
        unsent = self._unsent
        unsent.append(b"")  # so that the last line has its newline too
        self.spoke_last = True
        self._stdin.write(b"\n".join(unsent))
        unsent.clear()

    def deliver(self, lines: list[bytes], now: float) -> None:
        """Hand `lines` on. An exception here would make uvloop close the pipe, for every client."""
        self.heard = now
        self.spoke_last = False
        for line in lines:
            line = line.strip(b" \t\r")
            if not line:
                continue
            try:
                self.receive(line, now)
            except Exception as error:
                self._fault(error)

    def _fault(self, error: Exception) -> None:
        at = traceback.extract_tb(error.__traceback__)[-1]
        message = f"a fault of Atrax at line {at.lineno} ({at.name}): {error!r}"
        self._record.emit("internal.error", "error", server=self.server, message=message)

    def wake(self, now: float) -> None:
        """What time alone brings about: the count of stderr lines that were left out."""
        self.stderr.wake(now)

    # ---- end ----

    def stop(self, patience: float = PATIENCE) -> None:
        """End it and its group: close stdin, wait, SIGTERM, wait, SIGKILL (stdio, Shutdown)."""
        self.busy = True
        if not self.alive:
            return
        if self._unsent:
            self._flush()
        self._stdin.close()
        self._after(patience, lambda: self._terminate(patience))

    def _terminate(self, patience: float) -> None:
        signal_group(self.pid, signal.SIGTERM)
        self._after(patience, self.kill)

    def kill(self) -> None:
        """End it at once."""
        self.busy = True
        if self.alive:
            signal_group(self.pid, KILL)

    def fail(self, fault: str) -> None:
        """End it at once, and say why."""
        self.fault = self.fault or fault
        self.kill()

    def _after(self, delay: float, then: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay, then)

    def mute(self) -> None:
        """One of its pipes was closed. Without stdout it can answer nothing more, and is to end."""
        if self._ending:
            self._drained()
        elif self._stdout.closed:
            self.busy = True
            if self._timer is None:
                self._after(DRAIN, self._silent)

    def _silent(self) -> None:
        self.fault = self.fault or "closed its stdout"
        self.stop(DRAIN)

    def resumed(self) -> None:
        """Its stdin has room again. No reason to give it calls if it is about to end."""
        self.busy = self.ending

    def _exited(self) -> None:
        if self._process is None or self._ending:
            return
        self.busy = True
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
        signal_group(self.pid, KILL)  # what it left behind in its group
        self._ending = _how(self._reap())
        self._after(DRAIN, self._end)
        self._drained()

    def _reap(self) -> int:
        """How it ended, as Popen.returncode. It has, or is killed: this does not wait for long."""
        return 0 if self._process is None else self._process.wait()

    def _drained(self) -> None:
        """End as soon as all that it wrote has been read."""
        if self._stdout.closed and self.stderr.closed:
            self._end()

    def _end(self) -> None:
        if self._over:
            return
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        self._stdin.abort()
        self._stdout.finish()
        self.stderr.finish()
        self._unsent.clear()
        try:
            self.ended(self.fault or self._ending)
        except Exception as error:
            self._fault(error)


class _Stdout(asyncio.Protocol):
    """A child's stdout."""

    def __init__(self, child: Child, lines: Lines, clock: Callable[[], float]) -> None:
        self._child, self._lines, self._clock = child, lines, clock
        self._transport: asyncio.ReadTransport | None = None
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.ReadTransport, transport)

    def data_received(self, data: bytes) -> None:
        lines = self._lines
        self._child.deliver(lines.feed(data), self._clock())
        if lines.overlong and self._transport is not None:
            self._transport.pause_reading()
            self._child.fail("sent a line longer than limits.line")

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._child.mute()

    def finish(self) -> None:
        """Nothing more is read; a last line that was not ended counts as one."""
        self._child.deliver(self._lines.end(), self._clock())
        if self._transport is not None:
            self._transport.close()


class _Stdin(asyncio.BaseProtocol):
    """A child's stdin. Says `busy` of the child while it does not read."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def pause_writing(self) -> None:
        self._child.busy = True

    def resume_writing(self) -> None:
        self._child.resumed()

    def write(self, data: bytes) -> None:
        # A child that has gone: uvloop raises where asyncio does not.
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Drop what it has not read. Aborting a closed pipe is an error to asyncio."""
        pipe = self._transport
        if pipe is not None and (not pipe.is_closing() or pipe.get_write_buffer_size()):
            pipe.abort()


class _Stderr(asyncio.Protocol):
    """A child's stderr: its lines go to the record, bounded in length and number."""

    def __init__(self, child: Child, record: Record, clock: Callable[[], float]) -> None:
        self._child, self._record, self._clock = child, record, clock
        self._throttle = Throttle(STDERR_RATE)
        self._transport: asyncio.BaseTransport | None = None
        self._rest = b""
        self.last = ""
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *lines, rest = data.split(b"\n")
        now = self._clock()
        for line in lines:
            self._line(self._rest + line[:STDERR_LINE], now)
            self._rest = b""
        # A line without an end keeps its beginning, and costs no more than that.
        self._rest = (self._rest + rest[:STDERR_LINE])[:STDERR_LINE]

    def _line(self, line: bytes, now: float) -> None:
        passes = self._throttle.passes(now)
        text = _ANSI.sub(b"", line[:STDERR_LINE]).decode(errors="replace").rstrip()
        if not text:
            return
        self.last = text
        if passes:
            self._record.emit("child.stderr", server=self._child.server, message=text)

    def wake(self, now: float, whole: bool = False) -> None:
        dropped = self._throttle.report(now, whole)
        if dropped:
            message = f"left out {dropped} lines of its stderr: {STDERR_RATE} a second are logged"
            server = self._child.server
            self._record.emit("child.stderr_dropped", "warning", server=server, message=message)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._child.mute()

    def finish(self) -> None:
        if self._rest:
            self._line(self._rest, self._clock())
            self._rest = b""
        self.wake(self._clock(), whole=True)
        if self._transport is not None:
            self._transport.close()


def _how(status: int) -> str:
    """The end of a process in words; `status` is as in Popen.returncode."""
    if status >= 0:
        return f"exited with {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"

# ==== Supervisor ==================================================================
# The life of each server's children, from wanted to given up, and who may use which of them.
# Knows processes and time. Must not know what a call means: a child is free or not, alive or gone.
#
# A server is a Family. Its children that serve the same clients are a Nest: the one nest of a
# shared server; or, where `isolation` says so, one for each principal or session, and one of
# Atrax's own that serves lists and no client. A Member is one child and the conversation with it.
#
# The state belongs to the nest, since that is what starts, fails and is given up as one:
#
#     stopped --wanted--> starting --answered--> ready --unused--> stopped
#                          ^    |                  |
#                       due|    |died, late, unfit |died
#                          |    v                  v
#                         backoff <----------------+     several early deaths in a short time:
#                          ^    |gave_up                 the circuit opens, and is probed again
#                       due|    v                        later and later
#                         failed
#
# `disabled` is reached from everywhere and left by hand. `Nest._move` is the one writer, and each
# move one event, `server.state`, which log, metrics, status and page show. Shelf hears of the own
# nest alone: what exists only in an owner's isolated child is not listed.

EARLY: Final = 10.0  # seconds; a death within them after ready counts as one of the start
PROBE_AGAIN: Final = 60.0  # seconds; a failed server is tried again at least so often
WAITING: Final = 10_000  # calls that may wait for a process of one server
REMEMBERED: Final = 10_000  # owners of which is known which process they used last
ISOLATED_IDLE: Final = 300.0  # seconds; idle_stop of isolated children where the config has none
LISTS_READ: Final = 2.0  # seconds of silence after which the lists of a lazy server have been read
# Past 64 pipes of 1 MiB the kernel gives a user only tiny ones (fs.pipe-user-pages-soft).
LARGE_PIPES: Final = 32
STARTS_AT_ONCE: Final = 4  # processes started in one turn of the loop; each holds it for 0.6 ms
SWEEP: Final = 1.0  # seconds between two looks for orphans
NO_LIMIT: Final = sys.maxsize
# What a reload may change of a server while its processes run on.
LIVE: Final = frozenset({
    "description", "prefix", "tools", "repeat", "restart", "idle_stop", "lazy", "start_timeout",
    "concurrency", "processes",
})  # fmt: skip


class State(enum.Enum):
    """Where a nest is in its life; the value is what status and log show."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    BACKOFF = "backoff"
    FAILED = "failed"
    DISABLED = "disabled"


class Cause(enum.Enum):
    """What moves a nest from one state to another."""

    WANTED = "wanted"  # at start, or by the first call
    ANSWERED = "answered"  # a child answered the probe
    PROBED = "probed"  # it exited on the modern probe, and is started again as a legacy one
    DIED = "died"
    LATE = "late"  # nothing within start_timeout
    UNFIT = "unfit"  # it answered what cannot be served
    UNSTARTABLE = "unstartable"  # there is no such command, or the system refused
    REPLACED = "replaced"  # the last ready one retired, its successor is on the way
    DUE = "due"  # the pause is over
    GAVE_UP = "gave_up"  # too many early deaths
    UNUSED = "unused"
    RESTARTED = "restarted"  # by an operator
    DISABLED = "disabled"
    ENABLED = "enabled"


MOVES: Final[dict[State, dict[Cause, State]]] = {
    State.STOPPED: {
        Cause.WANTED: State.STARTING,
        Cause.UNUSED: State.STOPPED,
        Cause.RESTARTED: State.STARTING,
        Cause.DISABLED: State.DISABLED,
    },
    State.STARTING: {
        Cause.ANSWERED: State.READY,
        Cause.PROBED: State.STARTING,
        Cause.DIED: State.BACKOFF,
        Cause.LATE: State.BACKOFF,
        Cause.UNFIT: State.BACKOFF,
        Cause.UNSTARTABLE: State.BACKOFF,
        Cause.UNUSED: State.STOPPED,
        Cause.RESTARTED: State.STARTING,
        Cause.DISABLED: State.DISABLED,
    },
    State.READY: {
        Cause.DIED: State.BACKOFF,
        Cause.LATE: State.BACKOFF,
        Cause.UNFIT: State.BACKOFF,
        Cause.UNSTARTABLE: State.BACKOFF,
        Cause.REPLACED: State.STARTING,
        Cause.UNUSED: State.STOPPED,
        Cause.RESTARTED: State.STARTING,
        Cause.DISABLED: State.DISABLED,
    },
    State.BACKOFF: {
        Cause.DUE: State.STARTING,
        Cause.GAVE_UP: State.FAILED,
        Cause.UNUSED: State.STOPPED,
        Cause.RESTARTED: State.STARTING,
        Cause.DISABLED: State.DISABLED,
    },
    State.FAILED: {
        Cause.DUE: State.STARTING,
        Cause.UNUSED: State.STOPPED,
        Cause.RESTARTED: State.STARTING,
        Cause.DISABLED: State.DISABLED,
    },
    State.DISABLED: {Cause.ENABLED: State.STOPPED, Cause.DISABLED: State.DISABLED},
}
# The levels of the log; how a child ended has been said there already (`child.exited`).
SHOWN_AT: Final = {State.FAILED: "error", State.READY: "info"}
# Atrax's levels are fewer than MCP's (RFC 5424).
CHILD_LEVELS: Final = {"debug": "debug", "info": "info", "notice": "info", "warning": "warning"}


class _Wait:
    """A Lease: one call that waits for a process."""

    __slots__ = ("owner", "queue", "ready", "since")

    def __init__(
        self,
        owner: Owner | None,
        ready: Callable[[Link | Error], None],
        since: float,
        queue: OrderedDict[_Wait, None],
    ) -> None:
        self.owner, self.ready, self.since, self.queue = owner, ready, since, queue
        queue[self] = None

    def cancel(self) -> None:
        self.queue.pop(self, None)


class _Granted:
    """The lease of a call that has its process, or its refusal, already."""

    def cancel(self) -> None: ...


GRANTED: Final = _Granted()


class Member:
    """One child of a nest and the conversation with it, which reports by Host."""

    def __init__(self, nest: Nest, place: str, era: str) -> None:
        family, supervisor = nest.family, nest.family.supervisor
        self.nest, self.place, self.era = nest, place, era
        self.child = Child(
            family.name,
            place,
            supervisor.config.limits.line,
            supervisor.pipe_size,
            supervisor.record,
            supervisor.loop,
        )
        self.conversation = Conversation(
            family.name,
            place,
            family.config,
            supervisor.config.limits,
            self,
            self.child.write,
            supervisor.clock,
            era,
        )
        self.child.receive, self.child.ended = self.conversation.receive, self._ended
        self.begun = False  # whether the conversation has
        self.offer: Offer | None = None  # None until it is ready
        self.began = supervisor.clock()  # when it was started, then when it became ready
        self.used = self.began  # when it was last chosen; what it is up to is in `unused_since`
        self.cause = Cause.DIED  # what its end will be to the nest
        self.changes = 0.0  # when it last spoke of a changed list
        self.wanted = True  # False: its end was asked for, and is no failure
        self.retires_at = math.inf  # when a retired one ends even if calls are in flight
        self.waiting: OrderedDict[_Wait, None] = OrderedDict()  # calls that must go to this process

    def free(self, limit: int) -> bool:
        """Whether it takes one more call (DESIGN, Which process?)."""
        talk = self.conversation
        return (
            self.offer is not None
            and not self.child.busy
            and not talk.parked
            and talk.open_calls < limit
        )

    def end(self, patience: float = PATIENCE) -> None:
        """Stop it; not a failure."""
        self.wanted = False
        self.child.stop(patience)

    def in_use(self) -> bool:
        """Whether a call is in flight or parked."""
        return bool(self.conversation.open_calls or self.waiting)

    def is_due(self, now: float) -> bool:
        """Whether a retired one is to end: it has no calls, or may not finish them. With a deadline
        it does not wait for people either."""
        talk = self.conversation
        last = self.retires_at < math.inf and talk.open_calls == talk.parked
        return last or not self.in_use() or now >= self.retires_at

    def unused_since(self) -> float | None:
        """Since when it serves nobody; None while it does, or is not ready."""
        if self.offer is None or self.in_use() or self.conversation.listening:
            return None
        return max(self.used, self.child.heard)

    # ---- the child reports ----

    def _ended(self, why: str) -> None:
        self.nest.bury(self, why)

    # ---- the conversation reports (Host) ----

    def ready(self, offer: Offer) -> None:
        self.offer = offer
        self.began = self.used = self.nest.family.supervisor.clock()
        self.nest.answered(self)

    def unfit(self, reason: str) -> None:
        self.cause = Cause.UNFIT
        self.child.fault = reason
        self.child.stop(DRAIN)

    def changed(self, kind: Kind) -> None:
        self.changes = self.nest.family.supervisor.clock()
        if self.nest.key is None:
            self.nest.family.supervisor.shelf.changed(self.nest.family.name, kind)

    def told(self, notice: Notice) -> None:
        self.nest.family.supervisor.shelf.told(self.nest.family.name, self.place, notice)

    def logged(self, level: str, message: str) -> None:
        record = self.nest.family.supervisor.record
        shown = CHILD_LEVELS.get(level, "error")
        record.emit("child.log", shown, server=self.nest.family.name, message=message)

    def freed(self) -> None:
        # Nearly always there is nothing to do, and this finds out in 0.1 us.
        if self.nest.waiting or self.waiting or self.conversation.known_to_ask:
            self.nest.freed(self)


class Nest:
    """The children of a server that serve one isolation key, and the calls that wait for them.

    `key` None is the server's own: for all clients where it is shared, else for Atrax alone."""

    def __init__(self, family: Family, key: Owner | None) -> None:
        self.family, self.key = family, key
        self.state = State.STOPPED
        self.since = time.time()  # of the state, for people
        self.members: list[Member] = []  # starting or ready, oldest first
        self.retired: deque[Member] = deque()  # take no calls any more, oldest first
        self.only: Member | None = None  # the ready one, while there is just one
        self.waiting: OrderedDict[_Wait, None] = OrderedDict()  # calls, first come first served
        self.own: OrderedDict[_Wait, None] = OrderedDict()  # what Atrax itself waits for
        self.most = family.processes(key)
        self.reason = ""  # why it is not ready, or why it last was not
        self._deaths: deque[float] = deque()  # the early ones, `restart.window` seconds back
        self._trips = 0  # how often the circuit opened since a child last lived long enough
        self._due = 0.0  # when BACKOFF or FAILED ends
        self._timer: asyncio.TimerHandle | None = None
        # Who used which last, while there are several; the longest unused goes first.
        self._last: OrderedDict[Owner, Member] = OrderedDict()
        self._serving = False

    # ---- the state ----

    def _move(self, cause: Cause, reason: str = "") -> None:
        """The one writer of `state`. A move that the table lacks is a bug, and says so."""
        before, family = self.state, self.family
        reason = family.supervisor.record.redact(reason)
        after = MOVES[before][cause]
        self.state, self.since, self.reason = after, time.time(), reason or self.reason
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        family.supervisor.record.emit(
            "server.state",
            SHOWN_AT.get(after, "debug"),
            server=family.name,
            state=after.value,
            before=before.value,
            cause=cause.value,
            owner=self.key and f"{self.key.principal} {self.key.session}".strip(),
            reason=reason,
            message=f"{after.value}: {reason}" if reason else after.value,
        )
        if self.key is None:
            family.moved(before, after)

    def want(self, cause: Cause, reason: str = "") -> None:
        """Start the first process."""
        self._move(cause, reason)
        self.spawn()

    def spawn(self) -> None:
        """Start one more process."""
        member = self.family.supervisor.start_one(self)
        self.members.append(member)
        self._count()

    def _count(self) -> None:
        ready = [member for member in self.members if member.offer is not None]
        self.only = ready[0] if len(ready) == 1 else None

    def answered(self, member: Member) -> None:
        """`member` is ready."""
        if member not in self.members:
            return  # retired before it was
        self.family.found(member)
        self._count()
        if self.state is State.STARTING:
            self._move(Cause.ANSWERED)
        while self.own:
            wait, _ = self.own.popitem(last=False)
            wait.ready(member.conversation)
        self.serve()

    # ---- the end of a child ----

    def bury(self, member: Member, why: str) -> None:
        """`member` has ended. The nest moves first, then its calls end: a call that is repeated at
        once must not find the dead one still there."""
        supervisor, family = self.family.supervisor, self.family
        supervisor.forget(member)
        early = member.offer is None
        if early and member.child.pid and not member.child.fault:
            why += " before it answered"
        said = f'; its last line: "{member.child.last_line}"' if member.child.last_line else ""
        failed = member.wanted and member.child.pid and not _probed(member)
        level = "warning" if failed else "debug"
        supervisor.record.emit(
            "child.exited", level, server=family.name, pid=member.child.pid, message=why + said
        )
        held = member in self.members
        self._remove(member)
        if held:
            # What it said before it ever answered is of nobody's call, so any client may read it.
            self._bereaved(member, why + said if early else why)
        for wait in _emptied(member.waiting):
            wait.ready(family.gone_error())
        member.conversation.lost(why)
        supervisor.sweep()
        self.serve()

    def _remove(self, member: Member) -> None:
        if member in self.members:
            self.members.remove(member)
        if member in self.retired:
            self.retired.remove(member)
        for owner in [owner for owner, last in self._last.items() if last is member]:
            del self._last[owner]
        self._count()

    def _bereaved(self, member: Member, why: str) -> None:
        """A member that was not sent away is no more."""
        now, family = self.family.supervisor.clock(), self.family
        early = member.offer is None
        if _probed(member):
            family.believe("legacy")
            if self.state is State.STARTING:
                self._move(Cause.PROBED)
            self.spawn()
            return
        if early:
            family.believe("auto")  # what was remembered is no help any more
            if any(other.offer for other in self.members):
                self._lower(why)
                return
        if early or now - member.began < EARLY:
            self._deaths.append(now)
        else:
            self._deaths.clear()
            self._trips = 0
        family.restarts += 1
        self._fall(member.cause, why, now)

    def _lower(self, why: str) -> None:
        """The system, or a lock of the server's, allows no more processes than run."""
        self.most = max(1, len(self.members))
        message = f"another process {why}: no more than {self.most} from now on"
        record, server = self.family.supervisor.record, self.family.name
        record.emit("server.processes", "warning", server=server, message=message)

    def _fall(self, cause: Cause, why: str, now: float) -> None:
        """From a death to the pause after it or the open circuit. Not while others are ready."""
        if any(member.offer for member in self.members):
            return
        if self.members:
            if self.state is State.READY:
                self._move(Cause.REPLACED, why)
            return
        self._move(cause, why)
        rules = self.family.config.restart
        while self._deaths and now - self._deaths[0] > rules.window:
            self._deaths.popleft()
        probed_in_vain = self._trips and self._deaths
        if cause is Cause.UNSTARTABLE or probed_in_vain or len(self._deaths) >= rules.failures:
            self._give_up(why, now)
            return
        shortest, longest = rules.backoff
        delay = min(longest, shortest * 2.0 ** max(0, len(self._deaths) - 1))
        # Jitter: fifty servers that died of one cause must not come back in one moment.
        self._pause(delay * random.uniform(0.5, 1.0), now)

    def _give_up(self, why: str, now: float) -> None:
        self._move(Cause.GAVE_UP, why)
        longest = self.family.config.restart.backoff[1]
        delay = min(PROBE_AGAIN, longest * 2.0 ** min(self._trips, 16))
        self._trips += 1
        self._pause(delay, now)
        self.refuse_all()

    def _pause(self, delay: float, now: float) -> None:
        self._due = now + delay
        self._timer = self.family.supervisor.loop.call_later(delay, self._again)

    def _again(self) -> None:
        """The pause is over: start again, unless nobody wants it before the next call."""
        if self.on_demand and not self.waiting:
            self._move(Cause.UNUSED)
        else:
            self.want(Cause.DUE)

    @property
    def on_demand(self) -> bool:
        """Whether it runs only while it is used."""
        return self.key is not None or (self.family.config.lazy and self.family.listed)

    def retry_after(self, now: float) -> float | None:
        """Seconds until it is started again, for `data.retryAfter`; None if that is not planned."""
        if self.state in (State.BACKOFF, State.FAILED):
            return max(0.1, round(self._due - now, 1))
        return None

    # ---- who gets which process ----

    def lease(
        self, owner: Owner | None, ready: Callable[[Link | Error], None], now: float
    ) -> Lease:
        """Any process for `owner`: at once, later, or never."""
        if owner is None:
            return self._lease_own(ready, now)
        if self.family.nest.state is State.DISABLED:
            ready(self.family.nest.unavailable(now))
            return GRANTED
        if self.state is State.FAILED:
            ready(self.unavailable(now))
            return GRANTED
        if not self.waiting and (member := self._choose(owner)) is not None:
            self._give(member, owner, ready)
            return GRANTED
        if len(self.waiting) >= WAITING:
            ready(self.family.overloaded(f"{WAITING} calls wait for a process already"))
            return GRANTED
        stopped = self.state is State.STOPPED
        if stopped and self.key is not None and not self.family.supervisor.room():
            ready(self.family.overloaded("no room for another process (limits.children)"))
            return GRANTED
        wait = _Wait(owner, ready, now, self.waiting)
        if stopped:
            self.want(Cause.WANTED)
        else:
            self._grow()
        return wait

    def _lease_own(self, ready: Callable[[Link | Error], None], now: float) -> Lease:
        # The one that spoke of changes last: another process may not have changed its lists.
        usable = [member for member in self.members if member.offer is not None]
        if usable:
            ready(max(usable, key=lambda member: member.changes).conversation)
            return GRANTED
        if self.state in (State.STARTING, State.BACKOFF):
            return _Wait(None, ready, now, self.own)
        ready(self.unavailable(now))
        return GRANTED

    def _give(self, member: Member, owner: Owner, ready: Callable[[Link | Error], None]) -> None:
        member.used = self.family.supervisor.clock()
        self.family.called = True
        if len(self.members) > 1:
            self._last[owner] = member
            self._last.move_to_end(owner)
            if len(self._last) > REMEMBERED:
                self._last.popitem(last=False)
        ready(member.conversation)

    def _choose(self, owner: Owner) -> Member | None:
        """The process for a call of `owner`; None if it has to wait (DESIGN, Which process?)."""
        if not self.family.asks and any(m.conversation.known_to_ask for m in self.members):
            self.family.learned_to_ask()
        limit = self.family.limit
        last = self._last.get(owner)
        if last is not None and last.free(limit):
            return last
        for member in self.members:
            if member.free(limit):
                return member
        if len(self.members) < self.most or self.family.config.concurrency is not None:
            return None
        # No more processes, and people who have yet to answer hold all: an ask there is refused.
        held = [m for m in self.members if 0 < m.conversation.open_calls == m.conversation.parked]
        return min(held, key=lambda member: member.conversation.parked, default=None)

    def serve(self) -> None:
        """Give what is free to who waits, in order."""
        if self._serving:
            return  # a call that ended at once: the loop below goes on with the next
        self._serving = True
        try:
            while self.waiting and self.state is State.READY:
                wait = next(iter(self.waiting))
                member = self._choose(wait.owner) if wait.owner else None
                if wait.owner is None or member is None:
                    break
                wait.cancel()
                self._give(member, wait.owner, wait.ready)
        finally:
            self._serving = False
        self._grow()

    def _grow(self) -> None:
        """Start as many processes as calls wait for, up to `most`."""
        if self.state is not State.READY:
            return
        starting = sum(member.offer is None for member in self.members)
        wanted = min(len(self.waiting) - starting, self.most - len(self.members))
        for _ in range(wanted):
            if not self.family.supervisor.room():
                return
            self.spawn()

    def freed(self, member: Member) -> None:
        """A call of `member` ended, and that may matter to somebody."""
        talk = member.conversation
        if talk.known_to_ask and not self.family.asks:
            self.family.learned_to_ask()
        if self.family.asks and talk.overdue and member in self.members:
            self.retire(member)
        while member.waiting and talk.open_calls < self.family.limit and not member.child.busy:
            wait, _ = member.waiting.popitem(last=False)
            wait.ready(talk)
        if self.waiting:
            self.serve()

    # ---- sending members away ----

    def retire(self, member: Member, deadline: float = math.inf) -> None:
        """No new calls for `member`; it is stopped when those in flight are done, or at `deadline`.

        One that holds a cancelled call may still ask for it, and would ask the next client."""
        self._remove(member)
        member.wanted, member.retires_at = False, deadline
        self.retired.append(member)
        if len(self.retired) > self.family.config.processes:
            oldest = self.retired[0]
            oldest.child.fail("was ended: too many of its kind finish their last calls")
        if not member.in_use():
            member.end()
        if self.state is State.READY and not any(other.offer for other in self.members):
            self._move(Cause.REPLACED, "its process holds a cancelled call, and is replaced")
            if not self.members:
                self.spawn()

    def restart(self, deadline: float) -> None:
        """New processes now; the old ones finish their calls until `deadline`."""
        self._deaths.clear()
        self._trips = 0
        self.most = self.family.processes(self.key)
        old = list(self.members)
        self._move(Cause.RESTARTED)
        self.spawn()
        for member in old:
            self.retire(member, deadline)

    def close(self, cause: Cause, reason: str, deadline: float, patience: float = PATIENCE) -> None:
        """No process any more, nor for who waits; calls in flight may finish until `deadline`."""
        old = list(self.members)
        self._move(cause, reason)
        for member in old:
            self._remove(member)
            member.wanted = False
            self.retired.append(member)
        for member in self.retired:
            member.retires_at = min(member.retires_at, deadline)
        now = self.family.supervisor.clock()
        for member in list(self.retired):
            if member.is_due(now):
                member.end(patience)
        self.refuse_all()

    def enable(self) -> None:
        """From DISABLED back to STOPPED."""
        self._move(Cause.ENABLED)

    def refuse_all(self) -> None:
        """Nobody gets a process for now: say so to all who wait."""
        error = self.unavailable(self.family.supervisor.clock())
        for wait in [*_emptied(self.own), *_emptied(self.waiting)]:
            wait.ready(error)

    def unavailable(self, now: float) -> Error:
        """Why there is no process, as an error for a client."""
        state, name = self.state.value, self.family.name
        text = f'the server "{name}" is not available: it is {state}'
        if self.reason and self.state is not State.STOPPED:
            text += f"; {self.reason}"
        return own_error(
            UNAVAILABLE, text, "unavailable", name, state=state, retryAfter=self.retry_after(now)
        )

    # ---- time ----

    def wake(self, now: float) -> None:
        """Late starts, calls that waited too long, and children that nobody uses."""
        for member in [*self.members, *self.retired]:
            if member.begun:
                member.conversation.wake(now)
                member.child.wake(now)
        for member in list(self.members):
            if member.offer is None and member.wanted:
                self._check_start(member, now)
        for member in list(self.retired):
            # Not twice: each tick would start its patience anew.
            if member.is_due(now) and not member.child.ending:
                member.end()
        self._expire(now)
        if self.state is State.READY:
            self._stop_unused(now)

    def _check_start(self, member: Member, now: float) -> None:
        limit = self.family.config.start_timeout
        if now - member.began >= limit and member.child.alive and not member.child.fault:
            member.cause = Cause.LATE
            member.child.fail(f"did not answer within {limit:g} s")

    def _expire(self, now: float) -> None:
        config = self.family.config
        start, call = config.start_timeout, config.timeout
        ready = self.state is State.READY
        queues = [(self.own, start), (self.waiting, call if ready else start)]
        queues += [(m.waiting, call) for m in (*self.members, *self.retired) if m.waiting]
        for queue, longest in queues:
            while queue and now - next(iter(queue)).since >= longest:
                wait, _ = queue.popitem(last=False)
                busy = self.family.overloaded(f"no process was free within {longest:g} s")
                wait.ready(busy if ready else self.unavailable(now))

    def _stop_unused(self, now: float) -> None:
        for member in list(self.members):
            since = member.unused_since()
            if since is not None and self._is_unused(member, now - since):
                member.end()
                self._remove(member)
                self.retired.append(member)
        if not self.members:
            self._move(Cause.UNUSED)

    def _is_unused(self, member: Member, quiet: float) -> bool:
        config = self.family.config
        if config.lazy and not self.family.called and self.key is None:
            # Started for its lists alone. If it owes an answer, that may be one of them.
            return quiet >= (config.timeout if member.child.spoke_last else LISTS_READ)
        longest = config.idle_stop or (None if self.key is None else ISOLATED_IDLE)
        return longest is not None and quiet >= longest

    def unused_since(self) -> float | None:
        """Since when none of its children serves anybody; None while one does, or starts."""
        since = [member.unused_since() for member in self.members]
        ended = [moment for moment in since if moment is not None]
        return max(ended) if ended and len(ended) == len(since) and not self.waiting else None

    def empty(self, now: float) -> bool:
        """Whether nothing is left to remember of it."""
        window = self.family.config.restart.window
        remembered = bool(self._deaths) and now - self._deaths[-1] < window
        living = self.members or self.retired or self.waiting
        return self.state is State.STOPPED and not remembered and not living


def _probed(member: Member) -> bool:
    """Whether it ended because it does not know the probe, which is no failure."""
    by_itself = member.cause is Cause.DIED and not member.child.fault
    return by_itself and member.offer is None and member.conversation.exited_on_probe


def _emptied(queue: OrderedDict[_Wait, None]) -> list[_Wait]:
    """All in `queue`, which is empty afterwards: a call that is refused may wait again at once."""
    waits = list(queue)
    queue.clear()
    return waits


class Family:
    """One server: its config, what is known of it, and its nests."""

    def __init__(self, supervisor: Supervisor, name: str, config: ServerConfig) -> None:
        self.supervisor, self.name, self.config = supervisor, name, config
        self.command = tuple(config.argv)
        self.asks = False  # whether a child of it asked while a call was open
        self.limit = config.concurrency or NO_LIMIT  # most calls in flight per process
        self.restarts = 0
        self.offer: Offer | None = None  # what its last ready child said
        self.settled = config.disabled  # has been ready once, or has failed its first start
        self.listed = False  # has been ready once, so that its lists are known
        self.called = False  # a client has used it
        self.nest = Nest(self, None)
        self.nests: dict[Owner, Nest] = {}  # of isolated owners
        self.shared = self.nest if config.isolation == "shared" else None

    def processes(self, key: Owner | None) -> int:
        """Most children of the nest of `key`. Lists need one."""
        return 1 if key is None and self.config.isolation != "shared" else self.config.processes

    def all(self) -> list[Nest]:
        return [self.nest, *self.nests.values()]

    def start(self) -> None:
        """Start its first process, if the config wants one."""
        if self.config.disabled:
            self.close("disabled in the config", 0.0)
        else:
            self.nest.want(Cause.WANTED)

    def close(self, reason: str, deadline: float, patience: float = PATIENCE) -> None:
        """Disable the server; calls in flight may finish until `deadline`."""
        self.nest.close(Cause.DISABLED, reason, deadline, patience)
        for nest in self.nests.values():
            nest.close(Cause.UNUSED, reason, deadline, patience)

    def nest_of(self, owner: Owner | None) -> Nest:
        """Where `owner`'s calls go."""
        if owner is None or self.shared is not None:
            return self.nest
        key = self.key_of(owner)
        nest = self.nests.get(key)
        if nest is None:
            nest = self.nests[key] = Nest(self, key)
        return nest

    def key_of(self, owner: Owner) -> Owner:
        """A modern client has no session: with `session` too its principal is its key."""
        return owner if self.config.isolation == "session" else Owner(owner.principal)

    def moved(self, before: State, after: State) -> None:
        """The server's own nest changed its state: tell who keeps its lists."""
        shelf = self.supervisor.shelf
        if after is State.READY and self.offer is not None:
            self.settled = self.listed = True
            shelf.up(self.name, self.offer)
        elif before is State.READY:
            shelf.down(self.name)
        elif not self.settled and after not in (State.STARTING, State.STOPPED):
            self.settled = True
            shelf.down(self.name)

    def renew(self, config: ServerConfig) -> None:
        """After a reload that changed nothing but what is LIVE."""
        self.config = config
        if config.concurrency is not None or not self.asks:
            self.limit = config.concurrency or NO_LIMIT
        for nest in self.all():
            nest.most = self.processes(nest.key)
            nest.serve()

    @property
    def living(self) -> bool:
        """Whether a process of it is left."""
        return any(nest.members or nest.retired for nest in self.all())

    def found(self, member: Member) -> None:
        """`member` answered: remember what it is."""
        if member.nest.key is None:
            self.offer = member.offer
        if member.offer is not None:
            self.believe(member.offer.era)

    def believe(self, era: str) -> None:
        """What to ask the next process of this command line first; "auto": anything."""
        self.supervisor.eras[self.command] = era

    def learned_to_ask(self) -> None:
        """One call at a time from now on, if the config sets nothing else: whose ask is it?"""
        self.asks = True
        if self.config.concurrency is None:
            self.limit = 1
            message = "asks its clients: one call at a time per process from now on (concurrency)"
            self.supervisor.record.emit("server.asks", server=self.name, message=message)
        for nest in self.all():
            for member in [member for member in nest.members if member.conversation.overdue]:
                nest.retire(member)

    def overloaded(self, why: str) -> Error:
        return own_error(
            OVERLOADED, f'the server "{self.name}" is overloaded: {why}', "overloaded", self.name
        )

    def gone_error(self) -> Error:
        text = f'the process of "{self.name}" that this belongs to is gone; start the call again'
        return own_error(UNAVAILABLE, text, "place_gone", self.name, state=self.nest.state.value)

    def status(self, now: float) -> dict[str, Json]:
        """What /status shows of it."""
        nests = self.all()
        members = [member for nest in nests for member in [*nest.members, *nest.retired]]
        talks = [member.conversation for member in members]
        return {
            "state": self.nest.state.value,
            "settled": self.settled,
            "era": self.offer.era if self.offer else None,
            "protocolVersion": self.offer.version if self.offer else None,
            "pids": [member.child.pid for member in members if member.child.alive],
            "processes": self.nest.most,
            "concurrency": None if self.limit == NO_LIMIT else self.limit,
            "asks": self.asks,
            "restarts": self.restarts,
            "lastError": self.nest.reason or None,
            "inFlight": sum(talk.open_calls for talk in talks),
            "waiting": sum(len(nest.waiting) for nest in nests)
            + sum(len(member.waiting) for member in members),
            "parked": sum(talk.parked for talk in talks),
            "since": round(self.nest.since, 3),
            "retryAfter": self.nest.retry_after(now),
        }


def _same_process(one: ServerConfig, other: ServerConfig) -> bool:
    """Whether the processes of `one` can go on as those of `other`."""
    live = set(LIVE)
    return one.model_dump(exclude=live) == other.model_dump(exclude=live)


class Supervisor:
    """All servers' children. Implements Pool."""

    def __init__(
        self,
        config: Config,
        record: Record,
        shelf: Shelf,
        clock: Callable[[], float],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.config, self.record, self.shelf = config, record, shelf
        self.clock, self.loop = clock, loop
        self.eras: dict[tuple[str, ...], str] = {}  # what each command line turned out to be
        servers = config.servers.items()
        self._families = {name: Family(self, name, server) for name, server in servers}
        self._leaving: list[Family] = []  # removed or changed by a reload, with calls in flight
        self._members: dict[str, Member] = {}  # by place: each child that has not been buried
        self._starts: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(STARTS_AT_ONCE)
        self._swept = 0.0

    def start(self) -> None:
        """Start all servers, side by side."""
        for family in self._families.values():
            family.start()

    async def stop(self, grace: float) -> None:
        """End every child and all that they left behind: stdin closed, SIGTERM after `grace`
        seconds, SIGKILL after as many more."""
        for family in [*self._families.values(), *self._leaving]:
            family.close("Atrax is stopping", 0.0, grace)
        deadline = self.clock() + 2 * grace + 1.0
        while self._members and self.clock() < deadline:
            await asyncio.sleep(0.01)
        for start in list(self._starts):
            start.cancel()
        deadline = self.clock() + 1.0
        # Killed ones need a moment to become children of ours, and again to be reaped.
        while end_orphans(self._pids(), None) and self.clock() < deadline:
            await asyncio.sleep(0.005)

    def wake(self, now: float) -> None:
        """Everything that time brings about."""
        self._leaving = [family for family in self._leaving if family.living]
        for family in [*self._families.values(), *self._leaving]:
            for nest in family.all():
                nest.wake(now)
            for key in [key for key, nest in family.nests.items() if nest.empty(now)]:
                del family.nests[key]
        if now - self._swept >= SWEEP:
            self.sweep()

    # ---- Pool ----

    def lease(
        self, server: str, owner: Owner | None, place: str, ready: Callable[[Link | Error], None]
    ) -> Lease:
        """A process of `server` for one call (Pool)."""
        family = self._families.get(server)
        if family is None:
            ready(own_error(UNAVAILABLE, f'there is no server "{server}"', "unknown", server))
            return GRANTED
        nest = family.shared
        if nest is not None and owner is not None and not place:
            # The usual case: one process, and nobody waits. Member.free is written out here, since
            # this is the way of every call.
            member = nest.only
            if member is not None and not nest.waiting and not member.child.busy:
                talk = member.conversation
                if not talk.parked and talk.open_calls < family.limit:
                    family.called = True
                    ready(talk)
                    return GRANTED
        now = self.clock()
        if place:
            return self._lease_place(family, owner, place, ready, now)
        return family.nest_of(owner).lease(owner, ready, now)

    def _lease_place(
        self,
        family: Family,
        owner: Owner | None,
        place: str,
        ready: Callable[[Link | Error], None],
        now: float,
    ) -> Lease:
        """That process and no other; one that is isolated for somebody else is as good as gone."""
        member = self._members.get(place)
        theirs = member is not None and member.nest is family.nest_of(owner)
        if member is None or not theirs or member.offer is None or member.child.ending:
            ready(family.gone_error())
            return GRANTED
        if owner is not None and member.conversation.open_calls >= family.limit:
            return _Wait(owner, ready, now, member.waiting)
        member.used = now
        ready(member.conversation)
        return GRANTED

    def gone(self, owner: Owner) -> None:
        """`owner` is no more: end the children that were its own (Pool)."""
        for family in self._families.values():
            nest = family.nests.get(owner)
            if nest is not None:
                nest.close(Cause.UNUSED, "its owner is gone", 0.0)

    # ---- operation ----

    def state(self, server: str) -> State:
        """The state of `server`; raises KeyError where there is no such server."""
        return self._families[server].nest.state

    def status(self) -> dict[str, dict[str, Json]]:
        """What /status shows, by server."""
        now = self.clock()
        return {name: family.status(now) for name, family in self._families.items()}

    async def restart(self, server: str) -> None:
        """New processes for `server`, also if it was given up or disabled; returns when the first
        is ready or has failed. Calls in flight have `drain` seconds on the old ones."""
        family = self._families[server]
        deadline = self.clock() + self.config.drain
        for nest in family.nests.values():
            nest.close(Cause.UNUSED, "restarted", deadline)
        if family.nest.state is State.DISABLED:
            family.nest.enable()
        family.nest.restart(deadline)
        family.restarts += 1
        while family.nest.state is State.STARTING:
            await asyncio.sleep(0.02)

    def disable(self, server: str) -> None:
        """Stop `server` until `restart`; calls in flight have `drain` seconds."""
        self._families[server].close("stopped by an operator", self.clock() + self.config.drain)

    def adopt(self, config: Config) -> None:
        """Go on with another config (a reload). Servers that stay as they are keep their processes;
        those that changed or went take no new calls, and have `drain` for the ones in flight."""
        before, self.config = self._families, config
        stay, new = {}, {}
        for name, server in config.servers.items():
            old = before.get(name)
            if old is not None and _same_process(old.config, server):
                stay[name] = old
            else:
                new[name] = Family(self, name, server)
        self._families = {name: stay.get(name) or new[name] for name in config.servers}
        self._leaving += [family for name, family in before.items() if name not in stay]
        for name, family in before.items():
            if name not in stay:
                family.close("changed by a reload", self.clock() + config.drain)
        for name, family in stay.items():
            family.renew(config.servers[name])
        for family in new.values():
            family.start()

    # ---- processes ----

    def start_one(self, nest: Nest) -> Member:
        """A new member of `nest`, whose process is on its way."""
        family = nest.family
        # Random: a place signed into a requestState must not fit a process of a later Atrax.
        place = f"{family.name}.{secrets.token_hex(6)}"
        member = Member(nest, place, self.eras.get(family.command, "auto"))
        self._members[place] = member
        # Owned here, bounded by the processes that the config allows, cancelled by `stop`.
        start = self.loop.create_task(self._open(member))
        self._starts.add(start)
        start.add_done_callback(self._starts.discard)
        return member

    async def _open(self, member: Member) -> None:
        async with self._slots:
            try:
                if member.wanted:
                    await member.child.open(launch(member.nest.family.config))
            except (Unstartable, OSError, ValueError) as error:
                member.cause = Cause.UNSTARTABLE
                member.nest.bury(member, str(error))
                return
        if not member.child.pid:
            member.nest.bury(member, "was not needed any more")
        elif not member.wanted:
            member.child.stop()
        else:
            member.begun = True
            member.conversation.start(self.clock())

    def forget(self, member: Member) -> None:
        """`member` has ended."""
        self._members.pop(member.place, None)

    def sweep(self) -> None:
        """End what children left behind when they ended."""
        self._swept = self.clock()
        end_orphans(self._pids(), self._members)

    def _pids(self) -> set[int]:
        return {member.child.pid for member in self._members.values()}

    @property
    def pipe_size(self) -> int:
        """Of the stdout of the next child."""
        return PIPE_SIZE if len(self._members) < LARGE_PIPES else 0

    def room(self) -> bool:
        """Whether one more process may be started; stops the longest idle isolated ones for it."""
        if sum(member.wanted for member in self._members.values()) < self.config.limits.children:
            return True
        isolated = [nest for family in self._families.values() for nest in family.nests.values()]
        idle = [(since, nest) for nest in isolated if (since := nest.unused_since()) is not None]
        if not idle:
            return False
        _, nest = min(idle, key=lambda pair: pair[0])
        nest.close(Cause.UNUSED, "another owner needs its place (limits.children)", 0.0)
        return True
# ==== Endpoints ===================================================================
# What operators and monitors ask: health, readiness, status, metrics.
# Knows how to show what others report. Must not know how servers or clients work.


class Endpoints:
    """GET /health, /ready, /status and /metrics. `paths` tells the wiring which requests come here."""

    OPEN: Final = frozenset({"/health", "/ready"})  # no Host check, no auth: probes of container runtimes

    def __init__(self, record: Record, servers: Callable[[], dict[str, dict[str, Json]]]) -> None:
        self._record, self._servers = record, servers
        self._started = time.time()
        self.draining = False
        self._pages: dict[str, Callable[[], tuple[int, str, bytes]]] = {
            "/health": self._health,
            "/ready": self._ready,
            "/status": self._status,
            "/metrics": self._metrics,
        }

    @property
    def paths(self) -> Iterable[str]:
        return self._pages.keys()

    def handle(self, request: HttpRequest, reply: Reply) -> None:
        """Answer one of `paths`."""
        if request.method not in ("GET", "HEAD"):
            raise HttpError(405, f"{request.path} is read with GET", [("Allow", "GET, HEAD")])
        status, content_type, body = self._pages[request.path]()
        reply.full(status, [("Content-Type", content_type), ("Cache-Control", "no-store")], body)

    def _health(self) -> tuple[int, str, bytes]:
        return 200, "application/json", encode({"status": "ok"})

    def _ready(self) -> tuple[int, str, bytes]:
        """503 until each enabled server has been ready once or has failed its first start, and while draining."""
        waiting = [name for name, server in self._servers().items() if not server["settled"]]
        if self.draining:
            return 503, "application/json", encode({"status": "draining", "waiting": waiting})
        if waiting:
            return 503, "application/json", encode({"status": "starting", "waiting": waiting})
        return 200, "application/json", encode({"status": "ready", "waiting": []})

    def _status(self) -> tuple[int, str, bytes]:
        body = {
            "version": VERSION,
            "python": ".".join(map(str, sys.version_info[:3])),
            "pid": os.getpid(),
            "uptime": round(time.time() - self._started, 1),
            "servers": self._servers(),
        }
        return 200, "application/json", encode(self._record.redact(body))

    def _metrics(self) -> tuple[int, str, bytes]:
        text = self._record.metrics() + _gauges(self._servers(), time.time() - self._started)
        return 200, "text/plain; version=0.0.4; charset=utf-8", text.encode()


def _gauges(servers: Mapping[str, Mapping[str, Json]], uptime: float) -> str:
    """What is, not what happened: one line per server and measure."""
    lines = ["# TYPE atrax_uptime_seconds gauge", f"atrax_uptime_seconds {uptime:.1f}"]
    measures: dict[str, Callable[[Mapping[str, Json]], Json]] = {
        "up": lambda server: int(server["state"] == "ready"),
        "restarts": lambda server: server["restarts"],
        "calls_in_flight": lambda server: server["inFlight"],
        "calls_waiting": lambda server: server["waiting"],
        "calls_parked": lambda server: server["parked"],
        "tools": lambda server: server["tools"],
    }
    for name, read in measures.items():
        lines.append(f"# TYPE atrax_server_{name} gauge")
        for server, values in servers.items():
            lines.append(f'atrax_server_{name}{{server="{_label(server)}"}} {read(values)}')
    return "\n".join(lines) + "\n"


# ==== Atrax =======================================================================
# The wiring, in one place: what is plugged into what, start, tick, drain, stop.
# Knows every section. Nobody above knows it.

TICK: Final = 0.2  # seconds between two `wake` of everything that has deadlines
FIRST_START: Final = 2.0  # seconds that the start-up screen waits for slow servers


class Atrax:
    """A gateway: built whole by the constructor, running between `start` and `stop`."""

    def __init__(self, config: Config, loop: asyncio.AbstractEventLoop) -> None:
        self.config, self._loop = config, loop
        self.record = Record(config.secrets)
        clock = loop.time
        key = config.key.encode() if config.key else secrets.token_bytes(32)
        self.policy = Policy(config.limits, self.record)
        self.supervisor = Supervisor(config, self.record, self, clock, loop)
        self.catalogue = Catalogue(config, self.supervisor, self.record, clock, self.policy.definition)
        self.subscriptions = Subscriptions(config, self.catalogue, self.supervisor, self.record, clock)
        self.gateway = Gateway(
            config,
            self.record,
            self.catalogue,
            self.subscriptions,
            self.policy,
            self.supervisor,
            clock,
        )
        self.clients = Clients(
            self.gateway,
            config.limits,
            self.record,
            clock,
            key,
            self.supervisor.gone,
            loop.call_later,
            check_request,
            check_answer,
        )
        self.identity = Identity(config)
        self.endpoints = Endpoints(self.record, self.status)
        self.http = HttpServer(self, config.limits, self.record, clock)
        self.urls: list[str] = []
        self._ticking: asyncio.TimerHandle | None = None

    # ---- life ----

    async def start(self) -> None:
        """Listen, then start every server side by side; raises UsageError where it can't listen.

        Listening comes first: a port in use is found before fifty processes are started for nothing."""
        config = self.config
        self.urls = await self.http.listen(config.host, config.port, config.socket)
        become_subreaper()
        _raise_descriptor_limit()
        self.supervisor.start()
        self.tick()
        self._loop.call_soon(self.policy.warm)

    async def stop(self, grace: float) -> None:
        """No new connections, `grace` seconds for calls in flight, then everything ends, in order."""
        self.endpoints.draining = self.gateway.draining = True
        self.http.refuse()
        self.subscriptions.close()
        deadline = self._loop.time() + grace
        while self.gateway.inflight and self._loop.time() < deadline:
            await asyncio.sleep(0.02)
        self.clients.close()
        await self.http.close(1.0)
        await self.supervisor.stop(2.0)
        if self._ticking is not None:
            self._ticking.cancel()

    def tick(self) -> None:
        """Tell every section with deadlines what time it is, now and from now on."""
        now = self._loop.time()
        for part in (self.supervisor, self.catalogue, self.subscriptions, self.clients, self.http):
            try:
                part.wake(now)
            except Exception as error:  # one section's fault must not stop the clock of all others
                self.record.emit("internal.error", "error", message=f"{type(part).__name__}: {error!r}")
        self._ticking = self._loop.call_later(TICK, self.tick)

    # ---- Shelf: what happened at the children goes to who keeps lists and subscriptions ----

    def up(self, server: str, offer: Offer) -> None:
        self.catalogue.up(server, offer)
        self.subscriptions.up(server, offer)

    def down(self, server: str) -> None:
        self.catalogue.down(server)
        self.subscriptions.down(server)

    def changed(self, server: str, kind: Kind) -> None:
        self.catalogue.changed(server, kind)

    def told(self, server: str, place: str, notice: Notice) -> None:
        self.subscriptions.told(server, place, notice)

    # ---- Handler: which section a request is for ----

    def handle(self, request: HttpRequest, reply: Reply) -> None:
        """Route by path. A refusal is answered here; what it says goes to the record too."""
        try:
            self._route(request, reply)
        except HttpError as error:
            self.record.emit(
                "http.refused",
                "warning" if error.status == 403 else "debug",
                status=error.status,
                address=request.address,
                message=f"{request.method} {request.path}: {error}",
            )
            headers = [("Content-Type", "application/json"), *error.headers]
            reply.full(error.status, headers, encode({"error": {"message": str(error)}}))

    def _route(self, request: HttpRequest, reply: Reply) -> None:
        path = request.path
        if path in Endpoints.OPEN:
            self.endpoints.handle(request, reply)
            return
        principal = self.identity.check(request)
        reply.extra = self.identity.cors(request)
        if request.method == "OPTIONS":
            reply.full(204, self.identity.preflight(request), b"")
            return
        if path == "/mcp":
            self.clients.handle(request, reply, principal, "")
        elif path in self.endpoints.paths:
            self.endpoints.handle(request, reply)
        else:
            self._server_path(request, reply, principal)

    def _server_path(self, request: HttpRequest, reply: Reply, principal: str) -> None:
        """/servers/NAME/mcp, and the two paths of the 2024-11-05 transport with or without a server."""
        path, endpoint = request.path, ""
        if path.startswith("/servers/"):
            endpoint, _, path = path[len("/servers/") :].partition("/")
            if endpoint not in self.config.servers or self.config.servers[endpoint].disabled:
                raise HttpError(404, f'there is no server "{endpoint}" here; /status lists those that are')
            path = "/" + path
        if path == "/mcp" and endpoint:
            self.clients.handle(request, reply, principal, endpoint)
        elif path == "/sse":
            self.clients.sse(request, reply, principal, endpoint)
        elif path == "/messages":
            self.clients.messages(request, reply, principal, endpoint)
        else:
            raise HttpError(404, "nothing is here; MCP is at /mcp and at /servers/NAME/mcp")

    # ---- what there is to see ----

    def status(self) -> dict[str, dict[str, Json]]:
        """Per server: how its processes do, and what it offers."""
        counts = self.catalogue.counts()
        return {name: {**state, **counts.get(name, {})} for name, state in self.supervisor.status().items()}


def _raise_descriptor_limit() -> None:
    """As many descriptors as the system lets us have: 1,024 is far below limits.connections."""
    try:
        import resource  # there is none on Windows

        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (ImportError, OSError, ValueError):
        return  # then Http refuses connections a little earlier


def new_loop() -> asyncio.AbstractEventLoop:
    """uvloop where it exists (0.87 of the CPU at 64 clients), else asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def run(work: Callable[[asyncio.AbstractEventLoop], Coroutine[Any, Any, int]]) -> int:
    """Run `work` on a new loop until it is done; its exit code."""
    loop = new_loop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(work(loop))
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def serve(
    config: Config,
    loop: asyncio.AbstractEventLoop,
    show: Callable[[list[str], dict[str, dict[str, Json]], Config], None],
) -> int:
    """Serve until SIGINT or SIGTERM; a second one ends the drain at once.

    `show` gets the URLs and the status once every server has settled, or FIRST_START has passed."""
    atrax = Atrax(config, loop)
    log = Log(config.log.level, config.log.format, sys.stderr)
    atrax.record.watch(log)
    stopping: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.put_nowait, number)
    try:
        await atrax.start()
        await _until(lambda: all(item["settled"] for item in atrax.status().values()), FIRST_START, stopping)
        show(atrax.urls, atrax.status(), config)
        first = await stopping.get()
        atrax.record.emit("atrax.stopping", message=f"{first.name}: stopping")
        # Ctrl-C means now; SIGTERM comes from an init system that lets calls in flight finish.
        grace = 0.0 if first is signal.SIGINT else config.drain
        ending = asyncio.ensure_future(atrax.stop(grace))  # owned here, awaited below
        again = asyncio.ensure_future(stopping.get())
        await asyncio.wait({ending, again}, return_when=asyncio.FIRST_COMPLETED)
        if not ending.done():
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)
            await atrax.stop(0.0)
        again.cancel()
    finally:
        log.close()
    return 0


async def _until(true: Callable[[], bool], limit: float, stopping: asyncio.Queue[signal.Signals]) -> None:
    """Wait until `true`, `limit` seconds at most, or until somebody wants to stop."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limit
    while not true() and stopping.empty() and loop.time() < deadline:
        await asyncio.sleep(0.02)


async def check(config: Config, loop: asyncio.AbstractEventLoop) -> tuple[dict[str, dict[str, Json]], float]:
    """Start every server without serving; the status once all have settled, and how long that took."""
    atrax = Atrax(config, loop)
    began, clock = loop.time(), time.time()
    become_subreaper()
    atrax.supervisor.start()
    atrax.tick()
    longest = max((server.start_timeout for server in config.servers.values()), default=0.0)
    await _until(
        lambda: all(item["settled"] for item in atrax.status().values()), longest + 5, asyncio.Queue()
    )
    took = loop.time() - began
    offers = atrax.catalogue.offers()
    status = {
        name: {**item, "offers": offers.get(name, {}), "took": round(item["since"] - clock, 3)}
        for name, item in atrax.status().items()
    }
    await atrax.stop(0.0)
    return status, took


# ==== Demo ========================================================================
# The embedded servers `files` and `notes`, so that one copy has something to show. Each is a
# process of its own (`atrax.py bundled NAME`), on the SDK that nothing else here imports: a third
# of a second and 40 MB stay out of the gateway. Must not know the gateway.

FILES_LISTED: Final = 1_000  # entries in one answer
LINES_READ: Final = 1_000
CHARACTERS_READ: Final = 200_000  # about what fits into a model's context
LARGEST_READ: Final = 64 * MIB  # beyond it, finding a line takes seconds
LARGEST_SEARCHED: Final = 4 * MIB
MATCHES: Final = 100
FILES_SEARCHED: Final = 20_000
NOTES_LISTED: Final = 1_000
LONGEST_NOTE: Final = 100_000


def run_embedded(name: str, args: Sequence[str]) -> int:
    """Serve the embedded server `name` on stdio until stdin ends. Raises UsageError."""
    if name not in EMBEDDED:
        raise UsageError(f'no such bundled server: "{name}". There are: {", ".join(EMBEDDED)}')
    if len(args) > 1:
        raise UsageError(f"{name} takes one argument at most, not {len(args)}")
    given = args[0] if args else ""
    asyncio.run(_files(given) if name == "files" else _notes(given))
    return 0


def _for_model(message: str) -> Exception:
    """What a tool raises so that the model reads `message`; other exceptions it never sees."""
    from mcp.server.mcpserver.exceptions import ToolError

    return ToolError(message)


def _hints(*, reads: bool = False, destroys: bool = False, repeats: bool = True) -> ToolAnnotations:
    """What a tool does to the world; Atrax repeats a call of a dead child by it."""
    from mcp_types import ToolAnnotations

    return ToolAnnotations(
        read_only_hint=reads,
        destructive_hint=destroys,
        idempotent_hint=repeats,
        open_world_hint=False,
    )


# ---- files ----


class FileEntry(BaseModel):
    """One name in a folder."""

    path: str = Field(description="relative to the served folder; ends with / for a folder")
    size: int | None = Field(description="in bytes; null for a folder")


class FileList(BaseModel):
    """What is in a folder."""

    entries: list[FileEntry]
    left_out: int = Field(description="how many more there are")


class _Folder:
    """One folder, read-only; no path leads out of it."""

    def __init__(self, root: str) -> None:
        self.root = os.path.realpath(root)
        if not os.path.isdir(self.root):
            raise UsageError(f"files: {root}: no such folder")

    def entries(
        self,
        path: Annotated[str, Field(description="a folder, relative to the served one")] = ".",
    ) -> FileList:
        """List what is in a folder: names and sizes."""
        folder = self._inside(path)
        if not os.path.isdir(folder):
            raise _for_model(f'"{path}" is a file: read it')
        names = [name for name in sorted(os.listdir(folder)) if self._holds(folder, name)]
        entries = [self._entry(os.path.join(folder, name)) for name in names[:FILES_LISTED]]
        return FileList(entries=entries, left_out=len(names) - len(entries))

    def read(
        self,
        path: Annotated[str, Field(description="a file, relative to the served folder")],
        from_line: Annotated[int, Field(ge=1, description="the first line wanted")] = 1,
    ) -> str:
        """Read a text file, up to 1,000 lines at once. The last line says how to go on."""
        with self._opened(self._inside(path), path) as file:
            size = os.fstat(file.fileno()).st_size
            if b"\0" in file.peek(8192)[:8192]:
                raise _for_model(f'"{path}" is binary ({size} bytes); only text can be read')
            if size > LARGEST_READ:
                raise _for_model(f'"{path}" is too large to read ({size} bytes); search it')
            lines, budget = [], CHARACTERS_READ
            wanted = itertools.islice(file, from_line - 1, from_line - 1 + LINES_READ)
            for line in wanted:
                lines.append(line.decode(errors="replace"))
                budget -= len(lines[-1])
                if budget < 0:
                    break
            text = "".join(lines)[:CHARACTERS_READ]
            if budget < 0 or file.peek(1):
                text += f"\n[cut here; go on with from_line={from_line + len(lines)}]"
        return text

    def search(
        self,
        text: Annotated[str, Field(min_length=1, description="what to find, in any case")],
        path: Annotated[str, Field(description="the folder to search in")] = ".",
        names: Annotated[str, Field(description="only files named like this, *.py")] = "*",
    ) -> str:
        """Find text in files: path, line number, line. Not in hidden folders, links, big files."""
        wanted, found = text.lower(), []
        for name in itertools.islice(self._walk(self._inside(path), names), FILES_SEARCHED):
            for number, line in self._lines(name):
                if wanted in line.lower():
                    where = os.path.relpath(name, self.root)
                    found.append(f"{where}:{number}: {line.strip()[:200]}")
                if len(found) == MATCHES:
                    return "\n".join([*found, f"[stopped after {MATCHES}; ask for less]"])
        return "\n".join(found) or f'"{text}" is in no file named {names} under {path}'

    def _inside(self, path: str) -> str:
        # Resolved before compared: ".." and symlinks are what leads out (CWE-22, CWE-59).
        try:
            full = os.path.realpath(os.path.join(self.root, path))
        except ValueError:
            raise _for_model("a path cannot hold a NUL character") from None
        if os.path.commonpath([self.root, full]) != self.root:
            raise _for_model(f'"{path}" lies outside the served folder; paths are relative to it')
        if not os.path.exists(full):
            raise _for_model(f'there is no "{path}"; list shows what there is')
        return full

    def _holds(self, folder: str, name: str) -> bool:
        full = os.path.realpath(os.path.join(folder, name))
        return os.path.commonpath([self.root, full]) == self.root and os.path.exists(full)

    def _entry(self, full: str) -> FileEntry:
        path = os.path.relpath(full, self.root)
        if os.path.isdir(full):
            return FileEntry(path=path + "/", size=None)
        return FileEntry(path=path, size=os.path.getsize(full))

    def _opened(self, full: str, path: str) -> io.BufferedReader:
        # O_NOFOLLOW: a link put there since it was resolved. O_NONBLOCK: a FIFO waits for ever.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            if not os.path.isfile(full):
                raise _for_model(f'"{path}" is no file')
            return os.fdopen(os.open(full, flags), "rb")
        except OSError as error:
            raise _for_model(f'"{path}" cannot be read: {error.strerror}') from None

    def _walk(self, folder: str, names: str) -> Iterator[str]:
        if os.path.isfile(folder):
            yield folder
        for base, folders, files in os.walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                full = os.path.join(base, name)
                if fnmatch.fnmatch(name, names) and not os.path.islink(full):
                    yield full

    def _lines(self, full: str) -> Iterator[tuple[int, str]]:
        """The numbered lines of a text file; nothing of any other."""
        if not os.path.isfile(full) or os.path.getsize(full) > LARGEST_SEARCHED:
            return
        try:
            with open(full, "rb") as file:
                data = file.read(LARGEST_SEARCHED)
        except OSError:
            return  # not readable for us: passed over like a binary one
        if b"\0" not in data[:8192]:
            yield from enumerate(data.decode(errors="replace").splitlines(), 1)


async def _files(root: str) -> None:
    from mcp.server.mcpserver import MCPServer

    folder = _Folder(root or ".")
    server: MCPServer[Any] = MCPServer(
        "files",
        version=VERSION,
        instructions=f"Text files under {folder.root}, read-only. Start with list or search.",
        log_level="WARNING",
    )
    reading = _hints(reads=True)
    server.add_tool(folder.entries, "list", "List a folder", annotations=reading)
    # Plain text: as structured content a file would travel twice.
    for tool, name, title in (
        (folder.read, "read", "Read a file"),
        (folder.search, "search", "Search in files"),
    ):
        server.add_tool(tool, name, title, annotations=reading, structured_output=False)
    await server.run_stdio_async()


# ---- notes ----


class Note(BaseModel):
    """One note. Its resource is `note://ID`."""

    id: int
    title: str
    text: str
    changed: str = Field(description="UTC, ISO 8601")


class NoteList(BaseModel):
    """Notes, the last changed one first."""

    notes: list[Note]
    left_out: int = Field(description="how many more match")


class Confirmation(BaseModel):
    """What the user is asked before a note is deleted."""

    delete: bool = Field(title="Delete it", description="Yes: the note is gone for good")


def _notes_path(given: str) -> str:
    """Where the notes are: as given, else in the user's data folder. Raises UsageError."""
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    path = given or os.path.join(data, "atrax", "notes.db")
    try:
        if not os.path.isabs(path) and not given:
            raise OSError("there is no home folder")
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    except OSError as error:
        why = error.strerror or error
        message = f'notes: {path}: {why}. Name a file: "args": ["/path/to/notes.db"]'
        raise UsageError(message) from None
    return os.path.abspath(path)


class _Notebook:
    """The notes, in SQLite. A connection per step: several processes may share one file."""

    def __init__(self, path: str) -> None:
        import sqlite3

        self.path = path
        self._failed = sqlite3.Error
        try:
            with contextlib.closing(self._connected()) as database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS notes (id INTEGER PRIMARY KEY AUTOINCREMENT,"
                    " title TEXT NOT NULL, text TEXT NOT NULL, changed TEXT NOT NULL)"
                )
        except sqlite3.Error as error:
            raise UsageError(f"notes: {path}: {error}") from None

    def _connected(self) -> sqlite3.Connection:
        import sqlite3

        return sqlite3.connect(self.path, timeout=5, isolation_level=None)

    def run(self, statement: str, *values: str | int) -> tuple[list[Note], int]:
        """The notes that a statement gives, and a new row's id or how many rows it changed."""
        try:
            with contextlib.closing(self._connected()) as database:
                cursor = database.execute(statement, values)
                rows = [Note(id=a, title=b, text=c, changed=d) for a, b, c, d in cursor.fetchall()]
                inserted = statement.startswith("INSERT")
                return rows, (cursor.lastrowid or 0) if inserted else cursor.rowcount
        except self._failed as error:
            raise _for_model(f"the notes cannot be used now: {error}") from None

    def one(self, ident: int) -> Note:
        rows, _ = self.run("SELECT id, title, text, changed FROM notes WHERE id = ?", ident)
        if not rows:
            raise _for_model(f"there is no note {ident}; search finds those that there are")
        return rows[0]

    def matching(self, query: str) -> list[Note]:
        """Notes that hold every word of `query`."""
        words = ["%" + re.sub("([%_^])", r"^\1", word) + "%" for word in query.split()[:20]]
        where = " AND ".join(["title || ' ' || text LIKE ? ESCAPE '^'"] * len(words)) or "1"
        rows, _ = self.run(
            "SELECT id, title, text, changed FROM notes"
            f" WHERE {where} ORDER BY changed DESC, id DESC LIMIT {NOTES_LISTED}",
            *words,
        )
        return rows


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


_NoteId: TypeAlias = Annotated[int, Field(description="the note's number")]
_NoteTitle: TypeAlias = Annotated[
    str, Field(min_length=1, max_length=200, description="one line to find it by")
]
_NoteText: TypeAlias = Annotated[str, Field(max_length=LONGEST_NOTE, description="the note itself")]


async def _notes(given: str) -> None:
    """Serve the notes on stdio, to either era."""
    from mcp.server.lowlevel import NotificationOptions
    from mcp.server.stdio import stdio_server
    from mcp_types import SubscribeRequestParams, UnsubscribeRequestParams

    notebook, tells = _Notebook(_notes_path(given)), _Tells()
    server = _notes_server(notebook, tells)
    _add_writing(server, notebook, tells)
    _add_deleting(server, notebook, tells)
    _add_reading(server, notebook)
    # The SDK keeps the subscriptions of 2025-11-25 and before below MCPServer.
    low = server._lowlevel_server
    low.add_request_handler("resources/subscribe", SubscribeRequestParams, tells.subscribe)
    low.add_request_handler("resources/unsubscribe", UnsubscribeRequestParams, tells.unsubscribe)
    options = low.create_initialization_options(NotificationOptions(resources_changed=True))
    async with stdio_server() as (reader, writer):
        await low.run(reader, writer, options)


class _Tells:
    """Tells whoever listens what changed. The SDK's bus knows modern listeners only."""

    def __init__(self) -> None:
        from mcp.server.subscriptions import InMemorySubscriptionBus

        self.bus = InMemorySubscriptionBus()
        self._legacy: ServerSession | None = None
        self._subscribed: set[str] = set()

    async def remember(
        self, ctx: ServerRequestContext[Any, Any], call_next: CallNext
    ) -> HandlerResult:
        """Middleware: on stdio there is one legacy session, that of the last request."""
        if ctx.session.protocol_version in LEGACY:
            self._legacy = ctx.session
        return await call_next(ctx)

    async def subscribe(self, _: Json, params: SubscribeRequestParams) -> EmptyResult:
        """resources/subscribe."""
        from mcp_types import EmptyResult

        self._subscribed.add(str(params.uri))
        return EmptyResult()

    async def unsubscribe(self, _: Json, params: UnsubscribeRequestParams) -> EmptyResult:
        """resources/unsubscribe."""
        from mcp_types import EmptyResult

        self._subscribed.discard(str(params.uri))
        return EmptyResult()

    async def updated(self, ident: int) -> None:
        """This note is another now, or is gone."""
        from mcp.server.subscriptions import ResourceUpdated

        uri = f"note://{ident}"
        await self.bus.publish(ResourceUpdated(uri=uri))
        if self._legacy is not None and uri in self._subscribed:
            await self._legacy.send_resource_updated(uri)

    async def list_changed(self) -> None:
        """There are other notes now, or other titles."""
        from mcp.server.subscriptions import ResourcesListChanged

        await self.bus.publish(ResourcesListChanged())
        if self._legacy is not None:
            await self._legacy.send_resource_list_changed()


def _notes_server(notebook: _Notebook, tells: _Tells) -> MCPServer[Any]:
    from mcp.server.mcpserver import MCPServer
    from mcp_types import Resource

    class Notes(MCPServer[Any]):
        """Its resources are the notes of this moment: another process may have added some."""

        async def list_resources(self) -> list[Resource]:
            return [
                Resource(
                    uri=f"note://{note.id}",
                    name=f"note-{note.id}",
                    title=note.title,
                    mime_type="text/plain",
                )
                for note in notebook.matching("")
            ]

    return Notes(
        "notes",
        version=VERSION,
        instructions="Notes that last. Search before you add; each note is also note://ID.",
        log_level="WARNING",
        subscriptions=tells.bus,
        middleware=[tells.remember],
    )


def _add_writing(server: MCPServer[Any], notebook: _Notebook, tells: _Tells) -> None:
    async def add(title: _NoteTitle, text: _NoteText = "") -> Note:
        """Keep a new note. Gives it with its number."""
        _, ident = notebook.run(
            "INSERT INTO notes (title, text, changed) VALUES (?, ?, ?)", title, text, _now()
        )
        await tells.list_changed()
        return notebook.one(ident)

    async def edit(
        id: _NoteId,
        text: _NoteText,
        title: Annotated[str, Field(max_length=200, description="empty: as it was")] = "",
    ) -> Note:
        """Replace a note's text, and its title where one is given."""
        old = notebook.one(id)
        new = title or old.title
        notebook.run(
            "UPDATE notes SET title = ?, text = ?, changed = ? WHERE id = ?", new, text, _now(), id
        )
        await tells.updated(id)
        if new != old.title:
            await tells.list_changed()
        return notebook.one(id)

    adding = _hints(repeats=False)
    editing = _hints(destroys=True)
    server.add_tool(add, title="Add a note", annotations=adding)
    server.add_tool(edit, title="Edit a note", annotations=editing)


def _add_deleting(server: MCPServer[Any], notebook: _Notebook, tells: _Tells) -> None:
    """The tool that asks the user: by input_required or by elicitation/create, as the era wants."""
    from mcp.server.mcpserver import (
        AcceptedElicitation,
        Context,
        Elicit,
        ElicitationResult,
        Resolve,
    )

    def ask(id: int, context: Json) -> Json:
        note = notebook.one(id)
        can = context.client_capabilities and context.client_capabilities.elicitation
        # `elicitation: {}` means forms (2025-11-25, client/elicitation).
        if not can or (can.form is None and can.url is not None):
            raise _for_model(
                f"Note {id} was not deleted: that needs the user's yes, and this client cannot"
                " ask (it did not declare elicitation with forms)."
            )
        return Elicit(f'Delete note {id}, "{note.title}"? It cannot be undone.', Confirmation)

    async def delete(id: _NoteId, answer: Json) -> str:
        """Delete a note for good. The user is asked first, and may say no."""
        if not isinstance(answer, AcceptedElicitation) or not answer.data.delete:
            return f"Note {id} was kept: the user did not say yes."
        _, gone = notebook.run("DELETE FROM notes WHERE id = ?", id)
        if gone:
            await tells.list_changed()
            await tells.updated(id)
        return f"Note {id} is deleted."

    # By hand: the SDK reads annotations in the module's names, and these exist only in here.
    ask.__annotations__["context"] = Context
    delete.__annotations__["answer"] = Annotated[ElicitationResult[Confirmation], Resolve(ask)]
    deleting = _hints(destroys=True)
    server.add_tool(delete, title="Delete a note", annotations=deleting, structured_output=False)


def _add_reading(server: MCPServer[Any], notebook: _Notebook) -> None:
    from mcp.server.mcpserver.exceptions import ResourceNotFoundError, ToolError

    async def search(
        query: Annotated[str, Field(description="words that must all occur; empty: all")] = "",
        limit: Annotated[int, Field(ge=1, le=100, description="how many at most")] = 20,
    ) -> NoteList:
        """Find notes by the words in title and text, the last changed one first."""
        found = notebook.matching(query)
        return NoteList(notes=found[:limit], left_out=max(0, len(found) - limit))

    async def note(id: str) -> str:
        """One note, by its number."""
        try:
            found = notebook.one(int(id))
        except (ToolError, ValueError):
            raise ResourceNotFoundError(f"there is no note://{id}") from None
        return f"{found.title}\n\n{found.text}"

    async def summarize(
        topic: Annotated[str, Field(description="what the notes are about; empty: all")] = "",
    ) -> str:
        """Ask for a summary of the notes about a topic."""
        found = notebook.matching(topic)[:50]
        about = f" about {topic}" if topic else ""
        texts = "\n\n".join(f"## {note.id}: {note.title}\n{note.text}" for note in found)
        return f"Summarize my notes{about}; name each by its number.\n\n{texts or '(none)'}"

    reading = _hints(reads=True)
    server.add_tool(search, title="Search the notes", annotations=reading)
    server.resource("note://{id}", name="note", title="A note", mime_type="text/plain")(note)
    server.prompt("summarize", "Summarize notes")(summarize)


# ==== Commands ====================================================================
# The command line: one function per command, and `main`. Knows how to talk to a person at a shell.
# Must not know how anything is done.

USAGE: Final = """\
Atrax: every MCP server you have, behind one HTTP endpoint.

usage: python atrax.pyz COMMAND

  serve [config.json]    serve all servers of the config at one URL
    --host H, --port N   listen there, whatever the config says
    --socket PATH        listen on a Unix socket
  check [config.json]    start every server once; print what each offers and how long it took
    --json               the same for programs
  schema                 print the JSON Schema of the config
  version                print version, Python, platform and native modules

For example, with this in config.json:

  {"mcpServers": {"time": {"command": "uvx", "args": ["mcp-server-time"]}}}

  python atrax.pyz serve config.json
  claude mcp add --transport http atrax http://127.0.0.1:4000/mcp
"""
CONFIG: Final = "config.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code: 0 fine, 1 the work failed, 2 wrong usage or config."""
    try:
        return _command(list(sys.argv[1:] if argv is None else argv))
    except AtraxError as error:
        print(error, file=sys.stderr)
        return error.exit
    except KeyboardInterrupt:
        return 1
    except BrokenPipeError:
        # Whoever read us has seen enough; the interpreter must not flush into nothing at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


def _command(argv: list[str]) -> int:
    if not argv:
        print(USAGE, end="", file=sys.stderr)
        return 2
    name, rest = argv[0], argv[1:]
    if name in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if name == "--version":
        name = "version"
    command = COMMANDS.get(name) or _HIDDEN_COMMANDS.get(name)
    if command is None:
        hint = _near(name, COMMANDS) or f"Commands: {', '.join(COMMANDS)}."
        raise UsageError(f'atrax: there is no command "{name}". {hint}\n{_HELP}')
    code = command(rest)
    sys.stdout.flush()
    return code


_HELP: Final = "python atrax.pyz --help shows how it is used"


class _Arguments(argparse.ArgumentParser):
    """A command's arguments; what is wrong with them is a UsageError of two lines."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"atrax {command}", add_help=False, allow_abbrev=False)
        self.add_argument("-h", "--help", action="store_true")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}\n{_HELP}")

    def read(self, argv: Sequence[str]) -> argparse.Namespace | None:
        """The arguments; None where the user asked for help, which is printed."""
        if {"-h", "--help"} & set(argv):
            print(USAGE, end="")
            return None
        return self.parse_args(argv)


def serve_command(argv: Sequence[str]) -> int:
    """The gateway."""
    parser = _Arguments("serve")
    parser.add_argument("config", nargs="?", default=CONFIG)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--socket", type=os.path.abspath)
    found = parser.read(argv)
    if found is None:
        return 0
    given = {"host": found.host, "port": found.port, "socket": found.socket}
    overrides = {key: value for key, value in given.items() if value is not None}
    if "socket" in overrides and len(overrides) > 1:
        raise UsageError(f"atrax serve: --socket is instead of --host and --port\n{_HELP}")
    config = Config.load(found.config, overrides=overrides)
    return run(lambda loop: serve(config, loop, show_startup))


def check_command(argv: Sequence[str]) -> int:
    """Validates the config and starts every server once."""
    parser = _Arguments("check")
    parser.add_argument("config", nargs="?", default=CONFIG)
    parser.add_argument("--json", action="store_true")
    found = parser.read(argv)
    if found is None:
        return 0
    config = Config.load(found.config)
    reports: list[tuple[dict[str, dict[str, Json]], float]] = []

    async def work(loop: asyncio.AbstractEventLoop) -> int:
        reports.append(await check(config, loop))
        return 0

    with _waiting(f"starting {len(config.servers)} servers …"):
        run(work)
    status, took = reports[0]
    # Still starting after its whole start_timeout is as good as failed.
    fine = not any(_troubled(server) or server["state"] == "starting" for server in status.values())
    if found.json:
        report = {"servers": status, "seconds": round(took, 3), "remarks": config.remarks}
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print(check_report(status, took, config.remarks, _paint(sys.stdout)))
    return 0 if fine else 1


def schema_command(argv: Sequence[str]) -> int:
    """The JSON Schema of the config."""
    if _Arguments("schema").read(argv) is not None:
        print(json.dumps(config_schema(), indent=2, ensure_ascii=False))
    return 0


def version_command(argv: Sequence[str]) -> int:
    """Version, Python, platform, native modules."""
    import platform

    if _Arguments("version").read(argv) is None:
        return 0
    print(f"atrax {VERSION}, from {ARCHIVE or os.path.abspath(__file__)}")
    print(f"python {platform.python_version()} ({sys.executable})")
    print(f"platform {platform.platform()}")
    for name in ("orjson", "pydantic_core", "uvloop"):
        print(f"{name} {_native(name)}")
    return 0


def bundled_command(argv: Sequence[str]) -> int:
    """An embedded server on stdio; what `"command": "bundled:NAME"` starts."""
    if not argv:
        raise UsageError(f"atrax bundled: which one? There are: {', '.join(EMBEDDED)}")
    return run_embedded(argv[0], argv[1:])


COMMANDS: Final[dict[str, Callable[[Sequence[str]], int]]] = {
    "serve": serve_command,
    "check": check_command,
    "schema": schema_command,
    "version": version_command,
}
_HIDDEN_COMMANDS: Final[dict[str, Callable[[Sequence[str]], int]]] = {"bundled": bundled_command}


def _native(name: str) -> str:
    """Version of a native module, and where it was loaded from."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return "not there: asyncio's own event loop is used" if name == "uvloop" else "missing"
    native = getattr(module, "__spec__", None)
    for part in (f"{name}.{name}", f"{name}._{name}", f"{name}.loop"):
        native = getattr(sys.modules.get(part), "__spec__", None) or native
    origin = str(getattr(native, "origin", "") or "somewhere")
    where = "memory" if origin.startswith("/proc/self/fd/") else origin
    return f"{getattr(module, '__version__', '?')} ({where})"


# ---- What a person sees ----


_Paint: TypeAlias = Callable[[str, str], str]  # text and a name of _COLOURS → text
_COLOURS: Final = {"good": "32", "bad": "31", "dim": "2", "strong": "1", "": ""}
_FAILED: Final = ("failed", "backoff")


def plain(text: str, _: str) -> str:
    """No colours."""
    return text


def _coloured(text: str, colour: str) -> str:
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if colour else text


def _paint(stream: TextIO) -> _Paint:
    # https://no-color.org: set and not empty.
    wanted = stream.isatty() and not os.environ.get("NO_COLOR")
    return _coloured if wanted and os.environ.get("TERM") != "dumb" else plain


@contextlib.contextmanager
def _waiting(text: str) -> Iterator[None]:
    """`text` on a terminal while something takes long, wiped afterwards; nothing elsewhere."""
    shown = sys.stderr.isatty()
    if shown:
        print(text, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r" + " " * len(text) + "\r", end="", file=sys.stderr, flush=True)


def show_startup(
    urls: Sequence[str], status: Mapping[str, Mapping[str, Json]], config: Config
) -> None:
    """Print the start-up screen. A stdout that is closed or full must not end the gateway."""
    known = [config.public_url] if config.public_url else urls
    with contextlib.suppress(OSError):
        screen = startup_screen(known, status, config.remarks, VERSION, _paint(sys.stdout))
        print(screen, end="\n\n", flush=True)  # the log follows below


def startup_screen(
    urls: Sequence[str],
    status: Mapping[str, Mapping[str, Json]],
    remarks: Sequence[str],
    version: str,
    paint: _Paint = plain,
) -> str:
    """Where the gateway is, how each server does, and how a client is connected."""
    places = [_endpoint(url) for url in urls]
    parts = [paint(f"Atrax {version}", "strong") + "  " + "  ".join(places), ""]
    parts += _server_lines(status, paint)
    if remarks:
        parts += ["", *(paint(_printable(remark), "dim") for remark in remarks)]
    return "\n".join([*parts, "", *_connecting(places[0] if places else "", paint)])


def check_report(
    status: Mapping[str, Mapping[str, Json]],
    took: float,
    remarks: Sequence[str],
    paint: _Paint = plain,
) -> str:
    """What each server offers, what is hidden and why, and how long it took."""
    lines = _server_lines(status, paint)
    for name, server in status.items():
        for kind, names in server.get("offers", {}).items():
            if names:
                lines.append(f"  {name} {kind}: {_printable(', '.join(names))}")
        for item in server.get("hidden", ()):
            hidden = f"{name}: {item['name']} is hidden: {item['reason']}"
            lines.append("  " + _printable(hidden))
    troubled = sum(map(_troubled, status.values()))
    outcome = paint(f"{troubled} failed", "bad") if troubled else paint("all fine", "good")
    total = f"{len(status)} servers in {took:.1f} s, {outcome}"
    return "\n".join([*map(_printable, remarks), *lines, total])


def _endpoint(url: str) -> str:
    return url if url.startswith("unix:") or url.endswith("/mcp") else url.rstrip("/") + "/mcp"


def _troubled(server: Mapping[str, Json]) -> bool:
    return server.get("state") in _FAILED


def _server_lines(status: Mapping[str, Mapping[str, Json]], paint: _Paint) -> list[str]:
    """One line per server; a reason in its place where there is nothing to count."""
    rows = [(name, str(server.get("state")), _about(server)) for name, server in status.items()]
    wide = max((len(name) for name, _, _ in rows), default=0)
    wider = max((len(state) for _, state, _ in rows), default=0)
    lines = []
    for (name, state, about), server in zip(rows, status.values(), strict=True):
        colour = "bad" if _troubled(server) else "good" if state == "ready" else "dim"
        lines.append(f"  {name:<{wide}}  {paint(f'{state:<{wider}}', colour)}  {about}".rstrip())
    return lines


def _about(server: Mapping[str, Json]) -> str:
    error = server.get("error") or server.get("lastError")
    if error and _troubled(server):
        return _printable(str(error))
    parts = [str(server["era"])] if server.get("era") else []
    for key, one in (("tools", "tool"), ("resources", "resource"), ("prompts", "prompt"),
                     ("resourceTemplates", "resource template")):  # fmt: skip
        if number := server.get(key):
            parts.append(f"{number} {one}" if number == 1 else f"{number} {one}s")
    if isinstance(seconds := server.get("took"), (int, float)):
        parts.append(f"{seconds:.2f} s")
    return ", ".join(parts)


def _connecting(place: str, paint: _Paint) -> list[str]:
    """How clients are told of `place`."""
    if not place or place.startswith("unix:"):
        return [f"Listening on {place or 'nothing'}"]
    inspector = "npx @modelcontextprotocol/inspector --cli"
    ways = [
        ("Claude Code", f"claude mcp add --transport http atrax {place}"),
        ("Inspector", f"{inspector} {place} --transport http --method tools/list"),
        ("others", json.dumps({"mcpServers": {"atrax": {"type": "http", "url": place}}})),
    ]
    return ["Connect a client:", *(f"  {paint(f'{who:<11}', 'dim')}  {how}" for who, how in ways)]


if __name__ == "__main__":
    sys.exit(main())
