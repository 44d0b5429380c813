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
    Running   Endpoints, Atrax, Demo, Commands
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
import datetime
import enum
import errno
import fnmatch
import fractions
import functools
import gc
import hashlib
import hmac
import importlib.machinery
import importlib.util
import ipaddress
import itertools
import json
import marshal
import math
import os
import posixpath
import random
import re
import secrets
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import threading
import time
import traceback
import unicodedata
import urllib.parse
import warnings
import zipimport
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Coroutine, Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from operator import ge, gt, le, lt
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
    TypeVar,
    cast,
)

if TYPE_CHECKING:
    from types import ModuleType

    from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
    from mcp_types import ToolAnnotations
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

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
        sys.path[:] = [
            entry for entry in sys.path if not entry.endswith(("site-packages", "dist-packages"))
        ]
    import orjson
    from pydantic import (
        AfterValidator,
        BaseModel,
        BeforeValidator,
        ConfigDict,
        Field,
        ValidationError,
        WithJsonSchema,
        field_validator,
        model_validator,
    )
    from pydantic.json_schema import SkipJsonSchema
except ImportError as error:
    # One line: it is what a person sees who copied the file to another machine.
    _HINT: Final = (
        "" if ARCHIVE else ". Build atrax.pyz with `python3 build_zipapp.py`, or `uv run atrax.py`"
    )
    sys.exit(f"atrax: {error}{_HINT}.")


# The stage: a child is first these functions, in an interpreter of its own, and then execs what was
# asked for. Not `preexec_fn`: that turns vfork off, and a spawn takes 18 ms once Atrax holds
# 500 MB. They stand here because their code objects travel alone: each names nothing of this module
# but those that travel with it, and has no defaults.


def become_child() -> None:
    """Bind this process to Atrax by the order in argv[1] (JSON), then exec argv[2:].

    The order is `{"parent": pid, "limits": [[rlimit, number], …]}`, and for a sandbox `"sandbox"`,
    as `confine` takes it, and `"channel"`, the descriptor of a socket that is told how that went;
    `"setuid": true` where programs below may gain privileges.
    The environment is the child's own, each name behind a colon: a library of LD_PRELOAD, which a child
    may have written, must not be loaded before the child is bound. No secret passes through argv. A
    failure is one line, to the channel or to stderr, and exit code 127."""
    import json
    import os
    import sys

    order, command = json.loads(sys.argv[1]), sys.argv[2:]
    channel = order.get("channel", -1)
    try:
        bind(order)
        if channel >= 0:
            import _socket  # noqa: F401  for `tell`: once confined, this may not be readable
            import struct  # noqa: F401

            os.set_inheritable(channel, False)
            open_ways, listener = confine(order["sandbox"])
            bind(order)  # what changes credentials may clear the first line of it
            tell(channel, {"open": open_ways}, listener)
        limit(order["limits"])
        # Python's own descriptors close on exec; what a shell or an init system gave us does not.
        os.closerange(3, max(3, channel))
        os.closerange(max(3, channel + 1), os.sysconf("SC_OPEN_MAX"))
        variables = os.environb.items()
        environment = {name[1:]: value for name, value in variables if name.startswith(b":")}
        os.execve(command[0], command, environment)
    except (OSError, ValueError) as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        if channel >= 0:
            tell(channel, {"failed": reason}, -1)
        else:
            os.write(2, f"atrax: cannot run {command[0]}: {reason}\n".encode(errors="replace"))
        os._exit(127)


def bind(order: Json) -> None:
    """End with Atrax, gain no privileges, and leave its signal handling behind."""
    import ctypes
    import os
    import signal

    def control(option: int, value: int) -> None:
        if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({option})")

    control(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: SIGKILL of Atrax ends this process too
    if os.getppid() != order["parent"]:
        os._exit(127)  # Atrax ended before the line above: nobody is left to read an answer
    if not order.get("setuid"):
        control(38, 1)  # PR_SET_NO_NEW_PRIVS: no setuid program below here gains anything
    # What Atrax ignores (SIGPIPE, and SIGHUP under nohup) would stay ignored over exec.
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def limit(limits: list[tuple[int, int]]) -> None:
    """Set both bounds of each rlimit, or keep what is lower already."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    for resource, most in limits:
        bounds = (ctypes.c_ulong * 2)()
        libc.getrlimit(resource, bounds)
        bounds[:] = [min(most, bounds[1])] * 2
        if libc.setrlimit(resource, bounds) != 0:
            raise OSError(ctypes.get_errno(), f"setrlimit({resource})")


def system_call(number: int, *arguments: int | bytes) -> int:
    """The result of a system call; -1, and ctypes.get_errno(), where it failed."""
    import ctypes

    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    done: int = ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *words)
    return done


def tell(channel: int, report: dict[str, Json], listener: int) -> None:
    """Send `report` to Atrax, with the descriptor `listener` unless that is -1."""
    import _socket  # not `socket`, which takes 5 ms
    import json
    import struct

    sender = _socket.socket(fileno=channel)
    rights = [(1, 1, struct.pack("i", listener))] if listener >= 0 else []  # SOL_SOCKET, SCM_RIGHTS
    sender.sendmsg([json.dumps(report).encode()], rights)
    sender.detach()


def confine(order: Json) -> tuple[list[str], int]:
    """Hold this process, and what it execs, to a sandbox; raises OSError with what this system lacks.

    `order`: `read`, `write`, `always` (paths), `network`, `processes`, `best_effort` (bools),
    `seccomp` (None, or the call's number, the program and one for where there are no namespaces, in
    hex). The result: what stays open, where `best_effort` allows that, and the descriptor that
    tells of refused calls (-1: none). Sources: landlock(7), seccomp(2), user_namespaces(7)."""
    import ctypes
    import os

    root = os.geteuid() == 0
    # Mounts, System V objects and the network; as root without a user namespace, which would take
    # nothing from root that is not dropped below.
    flags = 0x00020000 | 0x08000000 | (0 if order["network"] else 0x40000000)
    within = enter_namespaces(flags, [0, 0x10000000] if root else [0x10000000])
    sealed = within is not None and seal_mounts(order["write"])
    lacks = drop_capabilities() if root else []
    if order["processes"] and root:
        lacks.append("the limit on processes does not bind root (RLIMIT_NPROC): use another user")
    elif order["processes"] and not within:
        lacks.append("no user namespace: the limit on processes counts all of this user's")
    ctypes.CDLL(None).prctl(47, 4, 0, 0, 0)  # PR_CAP_AMBIENT_CLEAR_ALL
    lacks += restrict_files(order)
    why, listener = "it is unknown for this processor", -1
    if order["seccomp"] is not None:
        number, program, isolated = order["seccomp"]
        why, listener = filter_calls(number, program)
        # Landlock leaves chmod, chown, utimes and xattrs alone. Where read-only mounts cannot stop
        # them, nobody in there may do them at all; so with what an IPC namespace keeps apart.
        if not why and not sealed:
            why, _ = filter_calls(number, isolated)
    if why:
        lacks.append(f"no seccomp filter ({why}): Unix sockets, ptrace and the like are open")
    if lacks and not order["best_effort"]:
        raise OSError(0, "sandbox: this system lacks what it needs: " + "; ".join(lacks))
    return lacks, listener


def drop_capabilities() -> list[str]:
    """Take from root what its honest work with files does not need; what could not be taken."""
    import ctypes

    lacks, libc = [], ctypes.CDLL(None, use_errno=True)
    # Stay: chown, both DAC ones, fowner, fsetid, setgid, setuid.
    for capability in set(range(64)) - {0, 1, 2, 3, 4, 6, 7}:
        held = libc.prctl(23, capability, 0, 0, 0) == 1  # PR_CAPBSET_READ, then PR_CAPBSET_DROP
        if held and libc.prctl(24, capability, 0, 0, 0) != 0:
            lacks.append(f"capability {capability} cannot be dropped (no CAP_SETPCAP)")
    return lacks


def enter_namespaces(flags: int, users: list[int]) -> int | None:
    """Leave the namespaces of `flags`, with the first of `users` (CLONE_NEWUSER or 0) that the system
    allows, which is the result; None: with none."""
    import ctypes
    import os

    libc = ctypes.CDLL(None, use_errno=True)
    ids = {"uid_map": os.geteuid(), "gid_map": os.getegid()}
    try:  # Ubuntu 24.04: unshare succeeds, the maps are refused, and there is no way back
        with open("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "rb") as file:
            restricted = file.read().strip() == b"1"
        users = [user for user in users if not (user and restricted)]
    except OSError:
        pass  # not an Ubuntu
    for user in users:
        if libc.unshare(flags | user) != 0:
            continue
        if user:
            # Its own ids and no others: files stay whose they are.
            lines = {"setgroups": "deny"} | {name: f"{one} {one} 1" for name, one in ids.items()}
            try:
                for name, line in lines.items():
                    with open(f"/proc/self/{name}", "w") as file:
                        file.write(line)
            except OSError as error:
                why = f"sandbox: a user namespace cannot be set up ({name}: {error.strerror})"
                raise OSError(error.errno, why) from None
        return user
    return None


def seal_mounts(writable: list[str]) -> bool:
    """Make every mount of this namespace read-only but those at and below `writable`, which stay what
    they are; whether the system can."""
    import ctypes
    import os
    import struct

    here, everything, places = -100, 0x8000, list(map(os.path.realpath, writable))  # AT_RECURSIVE
    # Private, so that nothing of this shows outside; then MOUNT_ATTR_RDONLY (mount_setattr).
    private, sealed = (struct.pack("4Q", flags, 0, 1 << 18, 0) for flags in (0, 1))
    if "/" in places:
        return True
    if system_call(442, here, b"/", everything, private, 32) != 0:
        return False
    # Copies, to lie over what is sealed: to unseal it would open what was read-only before, too.
    copy = 1 | everything | os.O_CLOEXEC
    trees = [system_call(428, here, os.fsencode(path), copy) for path in places]  # open_tree
    if system_call(442, here, b"/", everything, sealed, 32) != 0:
        return False
    for path, tree in zip(places, trees, strict=True):
        if system_call(429, tree, b"", here, os.fsencode(path), 4) != 0:  # move_mount
            raise OSError(ctypes.get_errno(), f"sandbox: {path} cannot be made writable")
        os.close(tree)
    os.chdir(os.getcwd())  # through the new mounts, if it lies in one
    return True


def restrict_files(order: Json) -> list[str]:
    """Enforce the `read`, `write` and `always` of `order` by Landlock; what this kernel's lacks."""
    import ctypes
    import os
    import struct

    abi = system_call(444, 0, 0, 1)  # landlock_create_ruleset(LANDLOCK_CREATE_RULESET_VERSION)
    if abi < 1:
        return ["no Landlock (it came with Linux 5.13, and may be disabled): files are open"]
    needs = [(3, "truncating files is open"), (5, "ioctl of devices is open")]
    needs.append((6, "signals to other processes and abstract Unix sockets are open"))
    everything = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    tcp = 0 if order["network"] else 3  # bind and connect
    # A kernel refuses a structure that is longer than what it knows.
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = system_call(444, struct.pack("3Q", everything, tcp, 3)[:size], size, 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    read = 1 | 4 | 8  # execute, read a file, list a directory
    write = everything & ~(1 << 6 | 1 << 11)  # no devices are made
    rules = [(path, read, True) for path in order["read"]]
    rules += [(path, write, True) for path in order["write"]]
    rules += [(path, read, False) for path in [*order["always"], "/proc/self"]]
    devices = ("null", "zero", "full", "random", "urandom")
    rules += [(f"/dev/{name}", 2 | 4, False) for name in devices]
    for path, rights, named in rules:
        grant(ruleset, path, rights & everything, named)
    if system_call(446, ruleset, 0) != 0:
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(ruleset)
    return [f"Landlock ABI {abi} and not {least}: {what}" for least, what in needs if abi < least]


def grant(ruleset: int, path: str, rights: int, named: bool) -> None:
    """Add a rule for `path` and what lies below it. What the config has not `named` may be missing."""
    import ctypes
    import errno
    import os
    import stat
    import struct

    # What it named was followed when it was read; a child that may write above it may have put a link
    # there since, so now through none (openat2, RESOLVE_NO_SYMLINKS).
    how = struct.pack("3Q", os.O_PATH | os.O_CLOEXEC, 0, 4 * named)
    place = system_call(437, -100, os.fsencode(path), how, len(how))
    if place < 0 and named:
        error = ctypes.get_errno()
        why = (
            "has become a link since Atrax started" if error == errno.ELOOP else os.strerror(error)
        )
        raise OSError(error, f"sandbox: {path}: {why}")
    if place < 0:
        return
    if not stat.S_ISDIR(os.fstat(place).st_mode):
        rights &= 1 | 2 | 4 | 1 << 14 | 1 << 15  # those that a file can have
    if system_call(445, ruleset, 1, struct.pack("=Qi", rights, place), 0) != 0:
        raise OSError(ctypes.get_errno(), f"landlock_add_rule: {path}")
    os.close(place)


def filter_calls(number: int, text: str) -> tuple[str, int]:
    """Install a seccomp program (hex) by the system call `number`; why it could not be ("": it was),
    and the descriptor that tells of refused calls (-1: it has none)."""
    import ctypes
    import os
    import struct

    program = bytes.fromhex(text)
    told, watched, refuse, allow = (
        struct.pack("HBBI", 6, 0, 0, action)
        for action in (0x7FC00000, 0x7FC00001, 0x00050001, 0x7FFF0000)
    )
    # SECCOMP_FILTER_FLAG_NEW_LISTENER, first with WAIT_KILLABLE_RECV (Linux 5.19).
    attempts = [(program, 8 | 32), (program, 8)] if told in program else []
    # Where somebody above us listens already, there can be no second: refuse, and let pass, silently.
    attempts.append((program.replace(told, refuse).replace(watched, allow), 0))
    for code, flags in attempts:
        buffer = ctypes.create_string_buffer(code, len(code))
        whole = struct.pack("HP", len(code) // 8, ctypes.addressof(buffer))
        done = system_call(number, 1, flags, whole)  # SECCOMP_SET_MODE_FILTER
        if done >= 0:
            return "", done if flags else -1
    return os.strerror(ctypes.get_errno()), -1


# ==== Terms =======================================================================
# The words: versions, eras, header and `_meta` names, error codes, the exception family.
# Knows the specification's vocabulary. Must not know anything that runs.

VERSION: Final = "0.1.0"
MODERN: Final = "2026-07-28"
LEGACY: Final = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
LATEST_LEGACY: Final = LEGACY[-1]
WITHOUT_SESSION: Final = (
    "2025-03-26"  # what a legacy request without a session speaks (2025-11-25, transports)
)
LOG_LEVELS: Final = (
    "debug",
    "info",
    "notice",
    "warning",
    "error",
    "critical",
    "alert",
    "emergency",
)

META: Final = "io.modelcontextprotocol/"
META_VERSION: Final = META + "protocolVersion"
META_CLIENT: Final = META + "clientInfo"
META_CAPABILITIES: Final = META + "clientCapabilities"
META_LOG_LEVEL: Final = META + "logLevel"
META_SERVER: Final = META + "serverInfo"
META_SUBSCRIPTION: Final = META + "subscriptionId"
META_TASK: Final = META + "related-task"
META_INPUT_KEY: Final = (
    "atrax/inputKey"  # how a legacy child may name the key of its ask (DESIGN, Parking)
)

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
    # Members are compared by identity. Enum's own hash runs Python code: 0.05 us for each look-up.
    __hash__ = object.__hash__


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

    def __init__(
        self,
        status: int,
        message: str,
        headers: Sequence[tuple[str, str]] = (),
        event: str = "http.refused",
        **fields: Json,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        # For the record alone; a security event has a name of its own.
        self.event, self.fields = event, fields


# ==== Config ======================================================================
# What the user wrote, checked; every default, unit and help text once. Knows the JSON file, the
# environment, and what other MCP clients write. Must not know the running gateway.

MIB: Final = 2**20
EMBEDDED: Final = ("files", "notes")  # what `"command": "bundled:NAME"` may name (section Demo)

# Keys of the design that nothing in this build enforces. A protection that is accepted and then
# ignored is worse than none, so each is refused by name until its feature lands and its row leaves.
UNENFORCED: Final = frozenset({
    "replicas", "name",
})  # fmt: skip

# What desktop clients keep beside the servers in the same file, and per server. No use here.
_CLIENT_KEYS: Final = frozenset({
    "globalShortcut", "preferences", "inputs", "isUsingBuiltInNodeForMcp",
    "isDxtAutoUpdatesEnabled", "scale", "locale", "theme", "userThemeMode",
})  # fmt: skip
_CLIENT_SERVER_KEYS: Final = frozenset({
    "autoApprove", "alwaysAllow", "alwaysLoad", "trust", "headers", "dev", "gallery", "version",
    "source", "settings", "networkTimeout", "watchPaths", "start_on_launch", "inputs", "iconPath",
    "url", "serverUrl", "httpUrl",
})  # fmt: skip
_TYPE_KEYS: Final = ("type", "transport")  # how clients say that a command speaks stdio
_SWITCHES: Final = ("enabled", "isActive")  # Zed's and Cherry Studio's word for not disabled
_SERVERS_KEYS: Final = ("servers", "context_servers")  # VS Code's and Zed's word for mcpServers
_TOOL_LISTS: Final = {"disabledTools": "deny", "excludeTools": "deny",
                      "enabledTools": "allow", "includeTools": "allow"}  # fmt: skip
HIDDEN: Final = "[redacted]"
_SHORTEST_SECRET: Final = 6  # redacting "1", "true" or "debug" would make the log unreadable
_SECRET_FILE: Final = 64 * 1024  # bytes; more is no secret but a mistake, or /dev/zero
_REFERENCE: Final = re.compile(r"\$\$\{|\$\{([^}]*)(\}|\Z)")
_VARIABLE: Final = re.compile(r"(?:env:)?([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_REMOTE: Final = re.compile(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]*://", re.IGNORECASE)

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


# No program can be given a NUL.
_Text: TypeAlias = Annotated[str, Field(pattern=r"^[^\x00]*$")]
_Variable: TypeAlias = Annotated[str, Field(pattern=r"^[^=\x00]+$")]
# MCP, server/tools, Tool Names.
_ToolName: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9_./-]{1,128}$")]
_Host: TypeAlias = Annotated[str, Field(pattern=r"^[^\s/@]+$")]
_Origin: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9+.-]*://[^/\s@?#]+$")]
_Url: TypeAlias = Annotated[str, Field(pattern=r"^https?://[^/\s@?#]+(/[^\s?#]*)?$")]


def _proxy(value: str) -> str:
    if value != "unix":
        try:
            ipaddress.ip_network(value)
        except ValueError as error:
            known = '"10.1.2.3", "10.0.0.0/8", "unix"'
            raise ValueError(f"{error}; write an address or a network, as {known}") from None
    return value


class _Options(BaseModel):
    # Strict: "4000" is no port and 1 is no bool. Frozen: what was checked stays so.
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
        5_000, "open connections of one address (not of `trusted_proxies`, nor with `socket`)"
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


class ToolRules(_Options):
    """Which of a server's tools are shown, and as what; globs on the server's own names."""

    allow: list[str] | None = _option(None, "only these tools", shown="all")
    deny: list[str] = _option(list, "not these tools")
    rename: dict[str, _ToolName] = _option(dict, "own name → shown name")
    describe: dict[str, str] = _option(dict, "own name → description")


class Paths(_Options):
    """Where a server's path arguments may lead."""

    dirs: Annotated[list[_Text], Field(min_length=1)] = Field(
        description="the only directories that paths in calls may name; from `cwd` where relative"
    )
    arguments: list[str] = _option(
        list, "more arguments that are paths: globs over property paths, as `copy.from`"
    )


class Sandbox(_Options):
    """What the kernel holds the processes of a server to."""

    read: list[_Text] = _option(list, "directories that it may read, from `cwd` where relative")
    write: list[_Text] = _option(list, "directories that it may read and change")
    network: bool = _option(False, "whether it may use TCP and UDP")
    memory: _Count | None = _option(None, "address space of each process", "bytes", shown="none")
    processes: _Count | None = _option(
        None, "most processes and threads together; does not bind root", shown="none"
    )
    files: _Count | None = _option(None, "most open files of each process", shown="none")
    best_effort: bool = _option(False, "run it even where the kernel cannot do all of this")


# In a container, or mounted into it: no comma or quote, since `--mount` is a line of CSV.
_Target: TypeAlias = Annotated[str, Field(pattern=r'^/[^\x00-\x1f,:"]*$')]
_Mounted: TypeAlias = Annotated[str, Field(pattern=r'^[^\x00-\x1f,"]+$')]
# host:port/path:tag@digest (OCI distribution); never an option, never podman's `dir:/somewhere`.
_IMAGE: Final = (
    r"^([A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]+)?/)?([a-z0-9]+([._-]+[a-z0-9]+)*/)*"
    r"[a-z0-9]+([._-]+[a-z0-9]+)*(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?$"
)
# Who writes to one of these is root, or whoever runs the engine.
_ENGINE_SOCKETS: Final = (
    "/run/docker.sock", "/run/podman/podman.sock", "/run/containerd/containerd.sock",
    "/run/crio/crio.sock", "/run/user",
)  # fmt: skip
_NEVER_MOUNTED: Final = ("/proc", "/sys", "/dev")
# What the engine's client reads itself, so that a server's `env` cannot have it: the name is all
# that stands on the command line, and the value is in the client's environment.
_ENGINES_OWN: Final = re.compile(
    r"PATH|HOME|TMPDIR|(LD|DOCKER|_?CONTAINERS?|XDG)_.*|STORAGE_(DRIVER|OPTS)|GODEBUG"
    r"|REGISTRY_AUTH_FILE|DBUS_SESSION_BUS_ADDRESS|SSH_AUTH_SOCK|NOTIFY_SOCKET|LISTEN_.*"
)


class Mount(_Options):
    """One directory or file of this machine in a container."""

    source: _Mounted = Field(
        description="what is mounted, from the config's directory where relative"
    )
    target: _Target = Field(description="where it is inside, an absolute path")
    write: bool = _option(False, "the server may write there")

    @field_validator("source")
    @classmethod
    def _harmless(cls, value: str) -> str:
        real = os.path.realpath(value)
        if real == "/":
            raise ValueError("the whole file system is not mounted; name what the server needs")
        for path in map(os.path.realpath, _ENGINE_SOCKETS):
            if _lies_below(path, real) or _lies_below(real, path):
                raise ValueError(f"{value} leads to an engine's socket: who has it has the machine")
        if any(_lies_below(real, path) for path in _NEVER_MOUNTED):
            raise ValueError(f"{value} is the system's, and is not mounted")
        return value


def _lies_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


class ContainerConfig(_Options):
    """A server's process in a container: no capabilities, no privileges to gain, nothing to write."""

    image: Annotated[str, Field(max_length=512, pattern=_IMAGE)] = Field(
        description="what runs; it must be on this machine, since nothing is pulled"
    )
    engine: Literal["podman", "docker"] | None = _option(
        None, "who runs it", shown="`podman`, or `docker` where that is missing"
    )
    mounts: list[Mount] = _option(list, "what of this machine it sees: `{source, target, write}`")
    network: bool = _option(False, "true: the engine's usual network; without it, none")
    memory: Annotated[int, Field(ge=16 * MIB)] = _option(
        1024 * MIB, "most memory, swap and `/tmp` included", "bytes"
    )

    @field_validator("mounts")
    @classmethod
    def _apart(cls, value: list[Mount]) -> list[Mount]:
        targets = [posixpath.normpath(mount.target) for mount in value]
        if twice := {target for target in targets if targets.count(target) > 1}:
            raise ValueError(f"{min(twice)} is the target of two mounts")
        if hidden := {"/", "/tmp", "/proc", "/sys", "/dev"} & set(targets):
            raise ValueError(f"{min(hidden)} is the container's own, and cannot be a target")
        return value


class LogConfig(_Options):
    """What is written to stderr, and what is kept of each call."""

    level: Literal["debug", "info", "warning", "error"] = _option("info", "least level shown")
    format: Literal["text", "json"] = _option("text", "for people or for machines")
    audit: _Text | None = _option(
        None, "a file that gets one JSON line per call, reopened at SIGHUP", shown="none"
    )


def _instant(value: Json) -> float:
    """A point in time, written as ISO 8601 (UTC without a zone), in seconds since the epoch."""
    try:
        read = datetime.datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise ValueError('must be a time, as "2030-12-31" or "2030-12-31T18:00:00Z"') from None
    return (read if read.tzinfo else read.replace(tzinfo=datetime.UTC)).timestamp()


_Instant: TypeAlias = Annotated[
    float, BeforeValidator(_instant), WithJsonSchema({"type": "string"})
]


class Rights(_Options):
    """What somebody may use; without either list, everything (DESIGN, Who may what)."""

    servers: list[str] | None = _option(None, "only these servers", shown="all")
    tools: list[str] | None = _option(
        None, "only these tools: globs on names as `/mcp` shows them", shown="all"
    )


class Token(Rights):
    """A bearer token, which makes its holder the principal `name`."""

    name: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,128}$")] = Field(
        description="whose it is: the principal"
    )
    hash: str | None = _option(
        None, "its hash, as `atrax token NAME` prints it: `sha256:` and 64 hex digits", shown="none"
    )
    token: Annotated[str, Field(min_length=16)] | None = Field(
        default=None, repr=False, description="or the token itself, from `${VAR}` or `${file:PATH}`",
        json_schema_extra={"shown": "none"},
    )  # fmt: skip
    expires: _Instant | None = _option(
        None, "until when it is valid: ISO 8601, UTC without a zone", shown="never"
    )
    admin: bool = _option(False, "may restart, stop and start servers, and see all events")

    @field_validator("hash")
    @classmethod
    def _digest(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"sha256:[0-9a-fA-F]{64}", value):
            raise ValueError(
                'must be "sha256:" and 64 hex digits: python atrax.pyz token NAME prints it'
            )
        return value

    @property
    def digest(self) -> bytes:
        """SHA-256 of the token."""
        if self.hash is not None:
            return bytes.fromhex(self.hash.removeprefix("sha256:"))
        return hashlib.sha256((self.token or "").encode()).digest()


# Key: the `auth.type` that it belongs to.
_AUTH_KEYS: Final = {
    "unsafe": "none", "tokens": "token",
    "issuer": "oauth", "audience": "oauth", "jwks": "oauth", "grants": "oauth",
}  # fmt: skip
_ScopeName: TypeAlias = Annotated[str, Field(pattern=r"^[!#-\[\]-~]+$")]  # RFC 6749, 3.3


class Auth(_Options):
    """How clients prove who they are."""

    type: Literal["none", "token", "oauth"] = _option(
        "none",
        "`none`: everybody who reaches the port may call; `token`: who has one of `tokens`; "
        "`oauth`: who has a JWT of `issuer`",
    )
    unsafe: bool = _option(False, "allows `none` on a host that other machines can reach")
    tokens: list[Token] = _option(list, "with `token`: the bearer tokens")
    issuer: _Url | None = _option(
        None, "with `oauth`: the authorization server, as `iss` in its tokens", shown="none"
    )
    audience: Annotated[
        list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        WithJsonSchema({"type": ["string", "array"], "items": {"type": "string"}}),
    ] = _option(list, "with `oauth`: one of these must be in `aud` of a token; text or list")  # fmt: skip
    jwks: str | None = _option(
        None, "with `oauth`: the issuer's keys (JWK set), a URL or a file", shown="none"
    )
    grants: Annotated[dict[_ScopeName, Rights], Field(min_length=1)] | None = _option(
        None, "with `oauth`: OAuth scope → what it allows", shown="every token may use all"
    )


class Tls(_Options):
    """HTTPS, and certificates that clients must show."""

    cert: _Text = Field(description="PEM file: the certificate, then those that lead to its CA")
    key: _Text = Field(description="PEM file: its private key, not encrypted")
    client_ca: _Text | None = _option(
        None, "PEM file: CAs of clients; a certificate's subject is the principal", shown="none"
    )

    def context(self) -> ssl.SSLContext:
        """What these files say, read now. Raises ValueError with a text for the user."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # TLS 1.2 at least, no compression
        context.set_alpn_protocols(["http/1.1"])
        context.options |= ssl.OP_NO_RENEGOTIATION
        for file, what in ((self.cert, "CERTIFICATE"), (self.key, "PRIVATE KEY")):
            _pem(file, what)
        try:
            context.load_cert_chain(self.cert, self.key, password=self._encrypted)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise ValueError(f"{self.key}: is not the key of {self.cert}") from None
            # OpenSSL does not say which of the two it could not read.
            why = error.reason or "not valid PEM"
            raise ValueError(f"{self.cert}, or {self.key}: {why}") from None
        if self.client_ca:
            _pem(self.client_ca, "CERTIFICATE")
            try:
                context.load_verify_locations(self.client_ca)
            except ssl.SSLError as error:
                raise ValueError(f"{self.client_ca}: {error.reason or 'not valid PEM'}") from None
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _encrypted(self) -> str:
        # Without it OpenSSL would ask at the terminal, and a service would hang there.
        raise ValueError(
            f"{self.key}: is encrypted; decrypt it: openssl pkey -in {self.key} -out NEW"
        )


def _pem(file: str, what: str) -> None:
    """Raise unless `file` can be read and has a PEM block of the kind `what`."""
    try:
        with open(file, "rb") as stream:
            text = stream.read(MIB)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    if not re.search(rb"-----BEGIN [A-Z ]*%b-----" % what.encode(), text):
        raise ValueError(f"{file}: has no PEM block -----BEGIN {what}-----")


def _server_schema(schema: dict[str, Json]) -> None:
    """What the reader accepts beyond the model: keys of other clients, and entries it skips."""
    properties = schema["properties"]
    for key in sorted({*_CLIENT_SERVER_KEYS, *_TOOL_LISTS, *_SWITCHES, *_TYPE_KEYS, "envFile"}):
        properties[key] = {"description": "a key of other MCP clients"}
    # Copilot writes `tools` as a list of the allowed ones.
    properties["tools"] = {"anyOf": [properties["tools"], {"type": "array"}]}
    elsewhere = {"required": ["url"], "not": {"required": ["command"]}}
    started = {key: schema.pop(key) for key in ("properties", "additionalProperties")}
    started["anyOf"] = [{"required": ["command"]}, {"required": ["container"]}]
    schema["anyOf"] = [started, elsewhere]


class ServerConfig(_Options):
    """One entry of `mcpServers`."""

    model_config = ConfigDict(json_schema_extra=_server_schema)

    command: Annotated[_Text, Field(min_length=1)] | None = _option(
        None,
        "the program, or `bundled:NAME` for a server that lies in the file itself",
        shown="required, or what the image of `container` runs",
    )
    args: list[_Text] = _option(list, "its arguments")
    env: dict[_Variable, _Text] = Field(
        default_factory=dict, repr=False, description="its environment, beside a short safe list"
    )
    cwd: _Text | None = _option(None, "its working directory", shown="the config's directory")
    description: str = _option("", "a note for who reads the file; not shown")
    disabled: bool = _option(False, "true: not started, not offered")
    protocol: Literal["auto", "legacy", "modern"] = _option("auto", "`auto` probes, others force")
    prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{0,64}$")] = _option(
        "", 'before its names on `/mcp`; `""` exposes bare names', shown="NAME"
    )
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
    container: ContainerConfig | None = _option(
        None, "run `command` in a container, or what its image runs", shown="none"
    )
    paths: Paths | None = _option(
        None, "where path arguments, `file:` URIs and roots may lead", shown="anywhere"
    )
    sandbox: Sandbox | None = _option(
        None, "what the kernel lets it do; `{}`: next to nothing", shown="not sandboxed"
    )
    repeat: bool = _option(True, "repeat what a dead child left, where its annotations allow it")
    pin: bool = _option(False, "only tools whose definition is in the lock (`pin`) are exposed")
    clean: bool = _option(False, "hidden characters and HTML comments are cut from definitions")

    @field_validator("command")
    @classmethod
    def _embedded(cls, value: str | None) -> str | None:
        kind, _, name = (value or "").partition(":")
        if kind == "bundled" and name not in EMBEDDED:
            raise ValueError(f'no such bundled server: "{name}". {_near(name, EMBEDDED)}'.strip())
        return value

    @model_validator(mode="after")
    def _consistent(self) -> ServerConfig:
        # Some clients write milliseconds under this name; then every call would wait for days.
        if self.timeout > self.max_timeout:
            raise ValueError(
                f"timeout {self.timeout:g} is more than max_timeout {self.max_timeout:g};"
                " durations are in seconds"
            )
        # Servers make a client's roots their allowed directories, and all clients share this one.
        if "roots" in self.offer and self.isolation == "shared" and self.paths is None:
            raise ValueError(
                'offer: "roots" with isolation "shared" needs "paths", to which roots are cut;'
                ' or use "isolation": "session"'
            )
        if self.container is not None:
            self._fits_container()
        return self

    def _fits_container(self) -> None:
        """Raises ValueError where other keys make no sense in a container."""
        if self.sandbox is not None:
            raise ValueError("sandbox and container: a server has one of them")
        if (self.command or "").startswith("bundled:"):
            raise ValueError("a bundled server lies in this file, and is in no image: no container")
        if self.cwd is not None and re.fullmatch(r"/[^\x00-\x1f]*", self.cwd) is None:
            raise ValueError(f'cwd "{self.cwd}" must be an absolute path inside the container')
        # Else relative paths would start somewhere that only the image knows.
        if self.paths is not None and self.cwd is None:
            raise ValueError('paths with container needs "cwd", the directory inside')
        for name in self.env:
            if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name) is None:
                raise ValueError(f'env: "{name}" is no name for a variable of a container')
            if _ENGINES_OWN.fullmatch(name):
                other = f'"command": "/usr/bin/env", "args": ["{name}=…", …]'
                raise ValueError(f"env: {name} is read by the engine itself; write {other}")

    @property
    def argv(self) -> list[str]:
        """What to run; a bundled server is this file again, in a process of its own."""
        if self.command is None:
            return self.args
        kind, _, name = self.command.partition(":")
        if kind != "bundled":
            return [self.command, *self.args]
        own = ARCHIVE or os.path.abspath(__file__)
        return [sys.executable, own, "bundled", name, *self.args]


class Config(_Options):
    """The whole config. `servers` are in the order of the file, under slugged names."""

    model_config = ConfigDict(title="Atrax config")

    host: Annotated[str, Field(min_length=1)] = _option(
        "127.0.0.1", "address to listen on; others than loopback need auth"
    )
    port: Annotated[int, Field(ge=0, le=65535)] = _option(4000, "port; 0: any free one")
    socket: str | None = _option(None, "a Unix socket instead of a port", shown="none")
    tls: Tls | None = _option(None, "HTTPS, and certificates that clients must show", shown="none")
    public_url: _Url | None = _option(None, "what clients call this gateway", shown="from Host")
    auth: Auth = _option(Auth, "how clients prove who they are")
    allowed_hosts: list[_Host] = _option(
        list, "accepted Host headers", shown="loopback names and the host of `public_url`"
    )
    allowed_origins: list[_Origin] = _option(
        list, "accepted Origin headers of web pages", shown="none"
    )
    trusted_proxies: list[Annotated[str, AfterValidator(_proxy)]] = _option(
        list,
        "whose X-Forwarded-For, -Proto and -Host are believed: addresses, networks,"
        ' and `"unix"` for who comes by `socket`',
    )
    separator: Annotated[str, Field(pattern=r"^[A-Za-z0-9_./-]{1,8}$")] = _option(
        "__", "between server and tool name"
    )
    limits: Limits = _option(Limits, "what one client, child or message may take")
    drain: Annotated[float, Field(ge=0)] = _option(10.0, "for calls in flight at SIGTERM", "s")
    log: LogConfig = _option(LogConfig, "what is written to stderr, and what is kept of each call")
    key: Annotated[str, Field(min_length=16)] | None = Field(
        default=None, repr=False, description="secret that signs session ids and requestState",
        json_schema_extra={"shown": "random at start"},
    )  # fmt: skip
    servers: dict[str, ServerConfig] = Field(
        alias="mcpServers", default_factory=dict, description="the servers, each under its name"
    )

    @property
    def asks_who(self) -> bool:
        """Whether a client has to prove who it is."""
        return self.auth.type != "none" or (self.tls is not None and self.tls.client_ca is not None)

    def server_of(self, glob: str) -> str | None:
        """The one server whose tools `glob` can name, on /mcp; None: it names no server's prefix.

        That with the longest prefix and separator before the first wildcard: "git__*" must not come
        to mean the tools of another server, whatever that one calls them."""
        head = re.split(r"[*?[]", glob, maxsplit=1)[0]
        prefixes = {server.prefix: name for name, server in self.servers.items()}
        fitting = [one for one in prefixes if one and head.startswith(one + self.separator)]
        return prefixes.get(max(fitting, key=len, default=""))

    # Not written by the user: what reading found.
    remarks: SkipJsonSchema[list[str]] = Field(default_factory=list, exclude=True)
    secrets: SkipJsonSchema[set[str]] = Field(default_factory=set, exclude=True, repr=False)
    path: SkipJsonSchema[str] = Field(default="", exclude=True)  # the file; "" for JSON text

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
            return _ConfigReader("config", os.getcwd(), environ, overrides or {}).read(source)
        name = os.fspath(source)
        folder = os.path.dirname(os.path.abspath(name))
        config = _ConfigReader(name, folder, environ, overrides or {}).read(_config_text(name))
        return config.model_copy(update={"path": name})

    @property
    def lock(self) -> str:
        """Where the approved tool definitions are kept: `config.lock.json` for `config.json`."""
        return self.path.removesuffix(".json") + ".lock.json" if self.path else ""


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


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    # Parsers take the last of two equal keys, people the first.
    if twice := {key for key, _ in pairs if [name for name, _ in pairs].count(key) > 1}:
        raise ValueError(f'"{min(twice)}" is written twice')
    return dict(pairs)


def _parse(text: str, name: str) -> Json:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where, hint = f"line {error.lineno} column {error.colno}", "No comments, no comma at an end"
        raise UsageError(f"{name}: {where}: not valid JSON: {error.msg}. {hint}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name}: not valid JSON: {error}") from None


def any_of(secrets: Iterable[str]) -> re.Pattern[str] | None:
    """What finds any of `secrets` in a text; None: there are none."""
    # Longest first: a secret that contains another one is hidden whole.
    parts = sorted(secrets, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, parts))) if parts else None


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


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name that only looks local is not trusted."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


# pydantic's error type: what a reader is told, where pydantic's words are about Python
_WRONG: Final = {
    "missing": "is missing",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "tuple_type": "must be a list",
}


def _absolute(folder: str, path: Json) -> Json:
    """`path` as seen from `folder`; what is no text is refused by the models."""
    if not isinstance(path, str):
        return path
    return os.path.normpath(os.path.join(folder, os.path.expanduser(path)))


def _followed(folder: str, path: Json) -> Json:
    """`path` as seen from `folder`, links followed now: a server may put others there later."""
    path = _absolute(folder, path)
    return os.path.realpath(path) if isinstance(path, str) and "\0" not in path else path


def _inside(folder: str, path: Json) -> Json:
    """`path` as seen from `folder` in a container, of which this machine's links say nothing."""
    return posixpath.normpath(posixpath.join(folder, path)) if isinstance(path, str) else path


_SKIPPED: Final = object()  # an entry of mcpServers that is not started here


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
        config = self.validated(self.top(raw))
        if config is not None:
            self.judge(config)
        if self.errors or config is None:
            raise UsageError(self.redacted("\n".join(self.told(path) for path in self.errors)))
        remarks = [self.redacted(remark) for remark in self.remarks]
        return config.model_copy(update={"remarks": remarks, "secrets": self.secrets})

    def redacted(self, text: str) -> str:
        """`text` for people. At a reload it goes to the log, which does not know new secrets yet."""
        found = any_of(self.secrets)
        return found.sub(HIDDEN, text) if found else text

    def wrong(self, message: str, *path: str | int) -> None:
        # The first finding about a place is the cause; what follows from it would only confuse.
        self.errors.setdefault(path, message)

    def told(self, path: tuple[str | int, ...]) -> str:
        if path and path[0] in self.overrides:
            return f"--{path[0]}: {self.errors[path]}"
        return ": ".join(part for part in (self.name, _dotted(path), self.errors[path]) if part)

    def remark(self, message: str, *path: str | int) -> None:
        self.remarks.append(f"{self.name}: {_dotted(path)}: {message}")

    # ---- the file as a whole ----

    def top(self, raw: dict[str, Json]) -> dict[str, Json]:
        raw.pop("$schema", None)
        for alias in _SERVERS_KEYS:
            if alias in raw and "mcpServers" not in raw:
                raw["mcpServers"] = raw.pop(alias)
                self.remark("read as mcpServers", alias)
        for key in sorted(_CLIENT_KEYS & set(raw)):
            del raw[key]
            self.remark("a key of a desktop client, ignored", key)
        if {"host", "port"} & set(self.overrides):
            raw.pop("socket", None)  # the last word is a port
        raw.update(self.overrides)
        if "key" in raw:
            raw["key"] = self.expanded(raw["key"], "key")
            self.secret(raw["key"])
        if isinstance(auth := raw.get("auth"), dict):
            raw["auth"] = auth = self.expanded(auth, "auth")
            tokens = auth.get("tokens")
            for entry in tokens if isinstance(tokens, list) else ():
                self.secret(entry.get("token") if isinstance(entry, dict) else None)
            if isinstance(jwks := auth.get("jwks"), str) and not _REMOTE.match(jwks):
                # Read with the config, so that a reload takes over both or neither.
                path = re.sub(r"^file:(//(localhost)?(?=/))?", "", jwks)
                auth["jwks"] = self.text(path, "auth", "jwks") or " "
        if isinstance(raw.get("socket"), str):
            raw["socket"] = os.path.join(self.folder, raw["socket"])
        if isinstance(tls := raw.get("tls"), dict):
            raw["tls"] = {key: _absolute(self.folder, value) for key, value in tls.items()}
        if isinstance(log := raw.get("log"), dict) and "audit" in log:
            raw["log"] = {**log, "audit": _absolute(self.folder, log["audit"])}
        if isinstance(servers := raw.get("mcpServers"), dict):
            names = self.names(servers)
            ready = [(names[key], self.server(key, entry)) for key, entry in servers.items()]
            raw["mcpServers"] = {name: entry for name, entry in ready if entry is not _SKIPPED}
        elif servers is None:
            example = '{"NAME": {"command": …, "args": […]}}'
            self.wrong(f"is missing: the servers, {example}", "mcpServers")
        return raw

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

    def server(self, name: str, entry: Json) -> Json:
        """`entry` in our own words; _SKIPPED where it is not for us."""
        if not isinstance(entry, dict):
            return entry  # the models refuse it
        path = ("mcpServers", name)
        if "command" not in entry and {"url", "serverUrl", "httpUrl"} & set(entry):
            self.remark("skipped: it is reached by a URL, and Atrax starts commands", *path)
            return _SKIPPED
        for key in [key for key in entry if key in _CLIENT_SERVER_KEYS]:
            del entry[key]
            self.remark("a key of other clients, ignored", *path, key)
        for key in _TYPE_KEYS:
            entry.pop(key, None)
        for key in _SWITCHES:
            if not entry.pop(key, True):
                entry["disabled"] = True
                self.remark("read as disabled", *path, key)
        self.tool_lists(entry, path)
        for key in ("command", "args", "env", "cwd", "envFile", "paths", "sandbox", "container"):
            if key in entry:
                entry[key] = self.expanded(entry[key], *path, key)
        if entry.get("command") is None and entry.get("container") is None:
            self.wrong('is missing: the program to start, or "container"', *path, "command")
        self.places(entry)
        file, env = entry.pop("envFile", None), entry.setdefault("env", {})
        if isinstance(file, str) and isinstance(env, dict):
            env = entry["env"] = self.env_file(file, path) | env
        elif file is not None:
            self.wrong("must be a string", *path, "envFile")
        for value in env.values() if isinstance(env, dict) else ():
            self.secret(value)
        entry.setdefault("prefix", next((n for n, o in self.originals.items() if o == name), name))
        return entry

    def places(self, entry: dict[str, Json]) -> None:
        """Makes paths absolute: on this machine, or inside the container where there is one."""
        cwd, container = entry.get("cwd", ""), entry.get("container")
        if container is None and isinstance(cwd, str):
            entry["cwd"] = _absolute(self.folder, cwd)
        within = _absolute if container is None else _inside
        for key, part in (("paths", "dirs"), ("sandbox", "read"), ("sandbox", "write")):
            holder = entry.get(key) if isinstance(cwd, str) else None
            if isinstance(holder, dict) and isinstance(dirs := holder.get(part), list):
                follow = _followed if key == "sandbox" else within
                holder[part] = [follow(entry.get("cwd", "/"), one) for one in dirs]
        mounts = container.get("mounts") if isinstance(container, dict) else None
        for mount in mounts if isinstance(mounts, list) else ():
            if isinstance(mount, dict) and "source" in mount:
                mount["source"] = _followed(self.folder, mount["source"])

    def tool_lists(self, entry: dict[str, Json], path: tuple[str, str]) -> None:
        """Other clients' lists of tools become `tools.allow` and `tools.deny`."""
        if isinstance(entry.get("tools"), list):
            entry["includeTools"] = entry.pop("tools")
        for key in [key for key in entry if key in _TOOL_LISTS]:
            names, rules = entry.pop(key), entry.setdefault("tools", {})
            if isinstance(names, list) and isinstance(rules, dict):
                rule = _TOOL_LISTS[key]
                rules[rule] = [*(rules.get(rule) or []), *names]
                self.remark(f"read as tools.{rule}", *path, key)
            else:
                self.wrong("must be a list", *path, key)

    # ---- ${VAR}, ${VAR:-default}, ${file:PATH} ----

    def expanded(self, value: Json, *path: str | int) -> Json:
        """`value` with the references in its texts replaced."""
        if isinstance(value, list):
            return [self.expanded(item, *path, at) for at, item in enumerate(value)]
        if isinstance(value, dict):
            return {key: self.expanded(item, *path, key) for key, item in value.items()}
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
        match = _VARIABLE.fullmatch(inner)
        if inner.startswith("file:"):
            # Without an editor's line end, which is no part of the secret.
            value: str | None = self.text(inner.removeprefix("file:"), *path).removesuffix("\n")
        elif match is None:
            known = "${VAR}, ${VAR:-default} or ${file:PATH}"
            self.wrong(f'"${{{inner}}}" is not understood: write {known}', *path)
            return ""
        elif match[2] is not None:
            value = self.environ.get(match[1]) or match[2]  # as in a shell: for an empty one too
        else:
            value = self.environ.get(match[1])
        if value is None:
            other = f"${{{inner}:-default}}"
            name = inner.removeprefix("env:")
            self.wrong(f"the variable {name} is not set; set it, or write {other}", *path)
        elif match is None or value != match[2]:
            self.secret(value)
        return value or ""

    def text(self, name: str, *path: str | int) -> str:
        try:
            with open(os.path.join(self.folder, name), "rb") as file:
                data = file.read(_SECRET_FILE + 1)
            if len(data) > _SECRET_FILE:
                raise ValueError(f"more than {_SECRET_FILE} bytes")
            return data.decode()
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            self.wrong(f"cannot read {name}: {why}", *path)
            return ""

    def env_file(self, name: str, path: tuple[str, str]) -> dict[str, str]:
        """A file of NAME=VALUE lines, as VS Code reads it."""
        values = {}
        for line in self.text(name, *path, "envFile").splitlines():
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
                # As JSON has it too: a quote or a backslash would hide it in a line that a child logs.
                escaped = (json.dumps(part, ensure_ascii=ascii)[1:-1] for ascii in (True, False))
                self.secrets |= {part, *escaped}

    # ---- the models ----

    def validated(self, raw: dict[str, Json]) -> Config | None:
        for key in {"remarks", "secrets", "path"} & set(raw):
            self.unknown((key,))  # a field of the model, but no key of the file
            del raw[key]
        try:
            return Config.model_validate(raw)
        except ValidationError as error:
            for item in error.errors(include_url=False, include_input=False):
                self.refused(item)
            return None

    def refused(self, item: ErrorDetails) -> None:
        path, kind = tuple(part for part in item["loc"] if part != "[key]"), item["type"]
        if len(path) > 1 and path[0] == "mcpServers":
            path = ("mcpServers", self.originals.get(str(path[1]), path[1]), *path[2:])
        if kind == "extra_forbidden":
            self.unknown(path)
        elif kind == "value_error":
            self.wrong(str(item["ctx"]["error"]), *path)
        else:
            # pydantic's own words, which never hold the value: that may be a secret.
            message = _WRONG.get(kind) or item["msg"].replace("Input should", "must")
            self.wrong(message, *path)

    def unknown(self, path: tuple[str | int, ...]) -> None:
        key, general = str(path[-1]), ["[]" if isinstance(part, int) else part for part in path]
        if general[0] == "mcpServers" and len(general) > 1:
            general[1] = "*"
        if general[:2] == ["auth", "grants"] and len(general) > 3:
            general[2] = "SCOPE"
        if ".".join(general) in UNENFORCED:
            self.wrong(f'this build does not enforce "{key}" yet, so it refuses it', *path)
            return
        home = ".".join(general[:-1]).replace("*", "NAME").replace(".[]", "[]") or "the top level"
        hint = _near(key, _keys(_HOMES[home])) if home in _HOMES else ""
        homes = [home for home, model in _HOMES.items() if key in _keys(model)]
        if not hint and homes:
            hint = f"It belongs to {homes[0]}."
        self.wrong(f"unknown key. {hint}".strip(), *path)

    # ---- the whole ----

    def judge(self, config: Config) -> None:
        """What no model sees alone: what is refused, then what is allowed and yet seldom meant."""
        taken: dict[str, str] = {}
        for name, server in config.servers.items():
            if server.prefix in taken:
                message = f'"{server.prefix}" is the prefix of "{taken[server.prefix]}" too'
                self.wrong(message, "mcpServers", self.originals.get(name, name), "prefix")
            taken.setdefault(server.prefix, name)
        self.transport(config)
        self.judge_auth(config)
        reachable = not config.socket and not is_loopback(config.host)
        if reachable and not config.asks_who and not config.auth.unsafe:
            message = (
                f'"{config.host}" can be reached from other machines, and nothing asks who calls.'
                ' Listen on 127.0.0.1, set "auth", or say "auth": {"type": "none", "unsafe": true}'
            )
            self.wrong(message, "host")
        if reachable and not config.allowed_hosts and not config.public_url:
            message = "only loopback names are accepted as Host; set public_url or allowed_hosts"
            self.remark(message, "host")
        if not config.servers:
            self.remark("no server is left to start", "mcpServers")
        isolated = [name for name, server in config.servers.items() if server.isolation != "shared"]
        if isolated and not config.asks_who:
            names = ", ".join(isolated)
            self.remark(f"without auth all modern clients are one principal to {names}", "auth")

    def judge_auth(self, config: Config) -> None:
        """Keys of another type of auth, and what is wrong between tokens, servers and tools."""
        auth = config.auth
        for key in sorted(auth.model_fields_set & set(_AUTH_KEYS)):
            if _AUTH_KEYS[key] != auth.type:
                self.wrong(f'belongs to "type": "{_AUTH_KEYS[key]}"', "auth", key)
        if auth.type == "token" and not auth.tokens:
            message = "nobody could come in; python atrax.pyz token NAME makes a token"
            self.wrong(message, "auth", "tokens")
        if auth.type == "oauth":
            self.judge_oauth(config)
        names, digests = dict[str, int](), dict[bytes, str]()
        for at, token in enumerate(auth.tokens):
            path = ("auth", "tokens", at)
            self.judge_rights(config, token, *path)
            if (token.hash is None) == (token.token is None):
                self.wrong('needs either "hash" or "token"', *path)
                continue
            if names.setdefault(token.name, at) != at:
                self.wrong(f'"{token.name}" is the name of another token too', *path, "name")
            elif (other := digests.setdefault(token.digest, token.name)) != token.name:
                self.wrong(f'the same token as that of "{other}"', *path)
            if token.expires is not None and token.expires <= time.time():
                self.remark("has passed, so this token is refused", *path, "expires")

    def judge_oauth(self, config: Config) -> None:
        auth = config.auth
        for key in ("issuer", "audience", "jwks"):
            if not getattr(auth, key):
                what = _keys(Auth)[key].description
                self.wrong(f'is missing: "type": "oauth" needs it ({what})', "auth", key)
        for scope, rights in (auth.grants or {}).items():
            self.judge_rights(config, rights, "auth", "grants", scope)
        if auth.jwks and _REMOTE.match(auth.jwks):
            url = urllib.parse.urlsplit(auth.jwks)
            near = url.scheme == "http" and is_loopback(url.hostname or "")
            if not (url.scheme == "https" or near) or not url.hostname or "@" in url.netloc:
                # Who can change an answer on its way could sign every token.
                self.wrong("must be an https:// URL, or a file", "auth", "jwks")

    def judge_rights(self, config: Config, rights: Rights, *path: str | int) -> None:
        """Servers that are not there, and globs that can be of none: they would grant nothing."""
        for at, name in enumerate(rights.servers or ()):
            if name not in config.servers:
                slugs = (slug for slug, original in self.originals.items() if original == name)
                known = next((f'It is called "{slug}" here' for slug in slugs), "")
                hint = known or _near(name, config.servers)
                self.wrong(f'there is no server "{name}". {hint}'.strip(), *path, "servers", at)
        for at, glob in enumerate(rights.tools or ()):
            server = config.server_of(glob)
            if server is None:
                example = next((one.prefix for one in config.servers.values()), "NAME")
                message = f'"{glob}" is of no server: write "{example}{config.separator}*", or leave "tools" out for all'
                self.wrong(message, *path, "tools", at)
            elif rights.servers is not None and server not in rights.servers:
                message = f'"{glob}" allows nothing: "{server}" is not among "servers"'
                self.remark(message, *path, "tools", at)

    def transport(self, config: Config) -> None:
        """TLS and proxies."""
        if config.tls is not None:
            if config.socket:
                self.wrong("a Unix socket is for a proxy on this machine, which does TLS", "tls")
            try:
                config.tls.context()
            except ValueError as error:
                self.wrong(str(error), "tls")
        for at, proxy in enumerate(config.trusted_proxies):
            if proxy.endswith("/0"):
                message = "everybody is trusted: any client chooses the address that is shown"
                self.remark(message, "trusted_proxies", at)


# ---- What the options are, for `schema`, README and hints ----

_HOMES: Final[dict[str, type[_Options]]] = {
    "the top level": Config,
    "mcpServers.NAME": ServerConfig,
    "limits": Limits,
    "mcpServers.NAME.restart": Restart,
    "mcpServers.NAME.tools": ToolRules,
    "mcpServers.NAME.container": ContainerConfig,
    "mcpServers.NAME.container.mounts[]": Mount,
    "mcpServers.NAME.paths": Paths,
    "mcpServers.NAME.sandbox": Sandbox,
    "log": LogConfig,
    "auth": Auth,
    "auth.tokens[]": Token,
    "tls": Tls,
    "auth.grants.SCOPE": Rights,
}


def _keys(model: type[_Options]) -> dict[str, FieldInfo]:
    """The keys that a user may write, by the names in the file."""
    fields = model.model_fields.items()
    return {field.alias or name: field for name, field in fields if not field.exclude}


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
            if key != "mcpServers" and field.default_factory not in _HOMES.values():
                rows.append(f"| `{base}{key}` | {_default(field)} | {field.description} |")
    return "\n".join(rows) + "\n"


def _default(field: FieldInfo) -> str:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    if "shown" in extra:
        return str(extra["shown"])
    if field.is_required():
        return "required"
    value: Json = field.get_default(call_default_factory=True, validated_data={})
    unit = extra.get("unit", "")
    if unit == "bytes" and value % 1024 == 0:
        value, unit = (value // MIB, "MiB") if value % MIB == 0 else (value // 1024, "KiB")
    if unit:
        return f"{value:g} {unit}" if isinstance(value, float) else f"{json.dumps(value)} {unit}"
    return f"`{json.dumps(value)}`"


# ==== Record ======================================================================
# One stream of events, redacted at the source; log, metrics and status are views of it.
# Knows names and fields of events. Must not know who emits them or who looks.

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}
CounterKey: TypeAlias = tuple[str | tuple[str, str], ...]  # name, then label and value pairs
LOG_LINES: Final = 10_000  # waiting for a slow stderr; past it the oldest are dropped and counted


# What may be an attack. The names are stable: alerts and searches are built on them. Each is counted
# in `atrax_events_total`, from 0 on, so that a rate shows the first one too.
ALARMS: Final = {
    "auth.failed": "a token that is unknown, malformed or expired",
    "auth.slowed": "an address that tried too many wrong tokens waits before its next one",
    "auth.keys_failed": "the keys of the OAuth issuer could not be fetched, or none can verify",
    "auth.keys_missing": "a token could not be checked, since the issuer's keys cannot be had",
    "certificate.refused": "a TLS client without a valid certificate of `tls.client_ca`",
    "host.refused": "a Host header that is not ours: a rebound name, or a proxy that is not configured",
    "origin.refused": "a web page that is not in `allowed_origins` sent a request",
    "path.refused": "a call named a path outside of its server's `paths`",
    "rate.refused": "a principal called more often than `limits.rate`, or had `limits.inflight` calls open",
    "session.refused": "a request named a session of another principal, or of another endpoint",
    "state.refused": "a `requestState` that was forged, altered, or belongs to another call or principal",
    "sandbox.denied": "a sandboxed server asked for a socket, `ptrace`, `kill` or the like that it may not have",
    "sandbox.limit": "a sandboxed server is at a limit: `memory`, `processes` or `files`",
    "sandbox.killed": "the kernel ended a sandboxed server for what it tried, or it crashed with `memory` limited",
    "sandbox.open": "a sandbox with `best_effort` that this system cannot keep whole",
    "operation.refused": "who may not operate servers tried to approve tools",
    "pin.changed": "a server changed a tool after it was approved, or has a new one: hidden by its `pin`",
    "definition.hidden_text": "a tool, prompt, resource or its server's instructions hold hidden text",
    "audit.failed": "the audit file cannot be written; how many lines are lost so far",
    "reload.failed": "SIGHUP found a config that is wrong; nothing was changed",
}
TOLD: Final = (10, 60.0)  # alarms of one name that are told, in so many seconds; all are counted


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
        self._known: set[str] = set()
        self._secrets: re.Pattern[str] | None = None
        self._watchers: list[Callable[[Event], None]] = []
        self._told = {name: Throttle(*TOLD) for name in ALARMS}
        self.counters: dict[CounterKey, int] = {("events", ("event", name)): 0 for name in ALARMS}
        self.audited = False  # whether somebody wants to hear of each call
        self.hide(secrets)

    def hide(self, secrets: Iterable[str]) -> None:
        """From now on these are hidden too. What was a secret stays one: it may be in use elsewhere."""
        self._known.update(filter(None, secrets))
        self._secrets = any_of(self._known)

    def emit(self, event: str, level: str = "info", **fields: Json) -> None:
        """Publish `event`. `message`, where given, is a sentence for people; `server` names a server."""
        self.publish(event, level, self.redact(fields) if self._secrets else fields)

    def publish(self, event: str, level: str, fields: Mapping[str, Json]) -> None:
        """`emit`, for who has redacted what others chose of `fields`: that saves 5 us of each call."""
        key: CounterKey = ("events", ("event", event))
        self.counters[key] = self.counters.get(key, 0) + 1
        happened = Event(time.time(), event, level, fields)
        for watcher in self._watchers:
            watcher(happened)

    def alarm(self, event: str, message: str, **fields: Json) -> None:
        """Publish one of ALARMS, a few of each a minute: who raises them must not fill the log."""
        now, throttle = time.monotonic(), self._told[event]
        more = throttle.left_out(now)
        if not throttle.passes(now):
            self.count("events", event=event)
            return
        if more:
            message += f" (and {more} more like it before)"
        self.emit(event, "warning", **fields, message=message)

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

    def metrics(self, shows: Callable[[str], bool] | None = None) -> str:
        """All counters in the text format of Prometheus (exposition format 0.0.4).

        With `shows`, those alone that are of one server which it allows."""
        lines: list[str] = []
        last = ""
        for key, number in sorted(self.counters.items(), key=lambda item: str(item[0])):
            servers = [pair[1] for pair in key[1:] if pair[0] == "server"]
            if shows is not None and not any(map(shows, servers)):
                continue
            name = f"atrax_{key[0]}_total"
            if name != last:
                lines.append(f"# TYPE {name} counter")
            last = name
            labels = ",".join(f'{pair[0]}="{_label(pair[1])}"' for pair in key[1:])
            lines.append(f"{name}{{{labels}}} {number}" if labels else f"{name} {number}")
        return "\n".join(lines) + "\n"


def _label(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class Throttle:
    """At most `most` lines in `window` seconds, and how many were left out."""

    def __init__(self, most: int, window: float) -> None:
        self._most, self._window = most, window
        self._since, self._passed, self._left_out = 0.0, 0, 0

    def passes(self, now: float) -> bool:
        """Whether one more line may be logged at `now`; counts it either way."""
        if now - self._since >= self._window:
            self._since, self._passed = now, 0
        self._passed += 1
        if self._passed > self._most:
            self._left_out += 1
        return self._passed <= self._most

    def skip(self, number: int) -> None:
        """Count `number` lines that were not even looked at."""
        self._left_out += number

    def left_out(self, now: float) -> int:
        """How many were left out, told once and after their window; `now` may be infinite."""
        if now - self._since < self._window:
            return 0
        left_out, self._left_out = self._left_out, 0
        return left_out


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
        body = {
            "time": round(event.time, 3),
            "level": event.level,
            "event": event.name,
            **event.fields,
        }
        return _json_line(body).decode()

    def _as_text(self, event: Event) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(event.time))
        fields = dict(event.fields)
        server, message = fields.pop("server", ""), fields.pop("message", "")
        rest = " ".join(
            f"{key}={value}" for key, value in fields.items() if value not in (None, "")
        )
        text = " ".join(part for part in (message or event.name, "" if message else rest) if part)
        head = f"{clock} {event.level:<7} " + (f"{server}: " if server else "")
        return head + _printable(text)


AUDITED: Final = "call.ended"  # the event that the audit file is made of
AUDIT_LINES: Final = 10_000  # waiting for a slow disk; past it lines are lost, and how many is said
_AUDIT_BATCH: Final = 250  # lines in one write
_AUDIT_TOLD: Final = 60.0  # seconds between two events while the trouble is the same


class Audit:
    """The view that stays: one JSON line per call, in a file that is only ever appended to.

    Written by a thread, so that a disk that hangs stops nobody; it is woken five times a second, which
    costs a call less than a wake-up of its own. What cannot be written now is tried again later, whole
    lines, in order. What is lost is told twice: by an event, and by a line where it is missing."""

    def __init__(self, path: str, record: Record) -> None:
        """Raises UsageError where `path` cannot be opened."""
        self._path, self._record = path, record
        self._lines: deque[bytes] = deque()
        self._batch, self._at = b"", 0  # what is being written, and how much of it is
        self._lost = 0  # lines that are not told of in the file yet
        self._trouble = self._told = ""  # why nothing can be written; what was said of it …
        self._told_at = -math.inf  # … and when
        self._stale = self._closing = False
        self._work = threading.Event()
        try:
            self._file = self._open()
        except OSError as error:
            text = f"log.audit: {path} cannot be opened: {error.strerror}"
            raise UsageError(f"{text}. It must be a file that this user may append to") from None
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        if event.name != AUDITED:
            return
        if len(self._lines) >= AUDIT_LINES:
            self._lost += 1
            self._record.count("audit_lost")
            return
        if self._lost:
            gap = {"time": round(event.time, 3), "event": "audit.failed", "lost": self._lost}
            self._lines.append(_json_line(gap) + b"\n")
            self._lost = 0
        line = {"time": round(event.time, 3), **event.fields}
        self._lines.append(_json_line(line) + b"\n")

    def reopen(self) -> None:
        """Go on in the file that has the path now: the old one was renamed (logrotate)."""
        self._stale = True
        self._work.set()

    def wake(self, now: float) -> None:
        """Have written what waits, and say what is wrong with the file: once, and once a minute."""
        trouble, told = self._trouble, self._told
        if self._lines or trouble or self._stale:
            self._work.set()
        if trouble == told and (not trouble or now - self._told_at < _AUDIT_TOLD):
            return
        self._told, self._told_at = trouble, now
        if not trouble:
            self._record.emit("audit.resumed", message=f"{self._path} can be written again")
            return
        waiting, lost = len(self._lines), self._record.counters.get(("audit_lost",), 0)
        text = f"{self._path} cannot be written: {trouble}; {waiting} lines wait, {lost} are lost"
        self._record.alarm("audit.failed", text, waiting=waiting, lost=lost)

    def close(self, patience: float = 1.0) -> None:
        """Write what waits, `patience` seconds at most; then nothing more is written."""
        self._closing = True
        self._work.set()
        self._thread.join(patience)

    # ---- the thread ----

    def _open(self) -> int:
        # Without O_NONBLOCK a pipe that nobody reads would hold us here for ever.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
        return os.open(self._path, flags, 0o600)

    def _run(self) -> None:
        closing = False
        while not closing:
            self._work.wait()
            self._work.clear()
            closing = self._closing  # before the last look, or what came behind it would be lost
            try:
                self._write()
                self._trouble = ""
            except OSError as error:
                self._trouble = error.strerror or str(error)

    def _write(self) -> None:
        """All that waits; raises OSError, with nothing forgotten that was not written."""
        # A file without a name is read by nobody: somebody removed it, or its directory.
        if self._stale or not os.fstat(self._file).st_nlink:
            fresh = self._open()
            os.close(self._file)
            self._file, self._stale, self._at = fresh, False, 0
        while self._batch or self._lines:
            if not self._batch:
                count = min(len(self._lines), _AUDIT_BATCH)
                self._batch = b"".join(self._lines.popleft() for _ in range(count))
            self._at += os.write(self._file, self._batch[self._at :])
            if self._at < len(self._batch):  # what is missing is told by the next try
                # In another file the line that is cut here must stand whole.
                start = self._batch.rfind(b"\n", 0, self._at) + 1
                self._batch, self._at = self._batch[start:], self._at - start
            else:
                self._batch, self._at = b"", 0


def _json_line(body: Mapping[str, Json]) -> bytes:
    """`body` as JSON, with what drives a terminal, or turns text around in it, escaped: JSON itself
    leaves U+009B as it is, and names in it come from anybody."""
    line = orjson.dumps(body, default=str)
    if line.isascii() and b"\x7f" not in line:
        return line
    return "".join(
        char if char.isprintable() else json.dumps(char)[1:-1].replace("\x7f", "\\u007f")
        for char in line.decode()
    ).encode()


def _printable(text: str) -> str:
    """`text` on one line and without control characters: a child's stderr must not drive the terminal."""
    return "".join(
        char if char.isprintable() or char == "\t" else f"\\x{ord(char):02x}" for char in text
    )


# ==== Message =====================================================================
# Bytes to JSON-RPC and back, what crosses the middle (Call, Ask, Notice, Outcome), and the seams.
# Knows JSON-RPC 2.0 and how JSON can mislead. Must not know eras, HTTP or processes.

DEPTH: Final = 200  # default of limits.depth; orjson reads 1,024 levels but writes only 254
DIGITS: Final = bytes(0x30 if 0x30 <= byte <= 0x39 else byte for byte in range(256))
LONG_NUMBER: Final = b"0" * 19
SAFE_INTEGERS: Final = range(-(2**63), 2**64)
# Lists, objects and members of one request. 4 MiB of "[]," would hold the loop for a second.
PARTS: Final = 50_000
_LARGE: Final = 2**16  # bytes; what is read from more is made without collecting garbage


class InvalidJson(AtraxError):
    """Bytes that are not one JSON value, or one that could be read in two ways."""


def decode(data: bytes, depth: int = DEPTH, parts: int = sys.maxsize) -> Json:
    """The one JSON value in `data`; raises InvalidJson.

    Refused: BOM, NaN, lone surrogates, invalid UTF-8 (by orjson), more than `depth` levels, more
    than `parts` lists, objects and members, and integers outside 64 bits, which orjson would
    silently turn into floats (PROTOCOL, JSON)."""
    if len(data) > 2 * parts and _crowded(data, parts):
        text = f"more than {parts:,} lists, objects and members, or {5 * parts:,} values"
        raise InvalidJson(text)
    try:
        # translate() and a search cost 0.3 us for 300 bytes; a regular expression 3 us.
        value = _exactly(data) if LONG_NUMBER in data.translate(DIGITS) else _loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidJson(f"not valid JSON: {error}") from None
    # Each level takes two bytes at least, and an opener: nearly every message needs no measuring.
    long = len(data) > 2 * depth and data.count(b"[") + data.count(b"{") > depth
    if long and deeper(value, depth):
        raise InvalidJson(f"more than {depth} levels deep (limits.depth)")
    return value


def _loads(data: bytes) -> Json:
    if len(data) < _LARGE:
        return orjson.loads(data)
    # Each few hundred new containers start a collection, which finds nothing: 5 times the time.
    gc.disable()
    try:
        return orjson.loads(data)
    finally:
        gc.enable()


def _crowded(data: bytes, parts: int) -> bool:
    """Whether `data` has more than `parts` lists, objects and members, or 5 times as many values.

    By its bytes, before anything is made of them; those within strings do not count."""
    if _parts_in(data) <= parts:
        return False
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"")  # without escaped quotes
    if plain.count(b'"') > 4 * parts:
        return True
    return _parts_in(b"".join(plain.split(b'"')[::2])) > parts


def _parts_in(text: bytes) -> int:
    containers_and_members = text.count(b"[") + text.count(b"{") + text.count(b":")
    return max(containers_and_members, text.count(b",") // 5)


def _exactly(data: bytes) -> Json:
    """`data` with its long integers kept; orjson first, since json.loads accepts NaN and surrogates."""
    _loads(data)
    value: Json = json.loads(data, parse_int=_integer)
    return value


def _integer(digits: str) -> int:
    # Checked before int(): converting a million digits takes seconds (CVE-2020-10735).
    if len(digits) > 20 or int(digits) not in SAFE_INTEGERS:
        raise ValueError(f"the integer {digits[:24]}… does not fit in 64 bits")
    return int(digits)


def deeper(value: Json, levels: int) -> bool:
    """Whether `value` nests more than `levels` lists or objects. Level by level, so it cannot overflow."""
    layer = [value] if isinstance(value, (dict, list)) else []
    for _ in range(levels):
        layer = [
            child
            for node in layer
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not layer:
            return False
    return bool(layer)


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
    challenge: str = ""  # the WWW-Authenticate that goes with it (RFC 6750, 3)


def read_message(value: Json) -> Request | Notice | Response:
    """One JSON-RPC message; raises RpcError -32600. Ids are strings or integers (MCP, basic/index).

    Members beyond JSON-RPC's own are dropped here and never reach a child; `params` pass whole."""
    if not isinstance(value, dict) or value.get("jsonrpc") != "2.0":
        raise RpcError(
            INVALID_REQUEST, 'not a JSON-RPC 2.0 message: an object with "jsonrpc": "2.0" is needed'
        )
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
    ident = value["id"]
    return Request(ident if type(ident) is int else _read_id(ident), method, params)


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
    code, message = (
        (value.get("code"), value.get("message")) if isinstance(value, dict) else (None, None)
    )
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
class Grant:
    """One set of servers and tools that somebody may use; None is all, empty is none (DESIGN, Who may what).

    `tools`: pairs of a server and a glob on names as /mcp shows them. A glob belongs to one server, so
    that no other can come under it by the name of a tool."""

    servers: frozenset[str] | None = None
    tools: frozenset[tuple[str, str]] | None = None

    def names(self, server: str, name: str) -> bool:
        """Whether `tools` name that one of `server`."""
        if self.tools is None:
            return True
        globs = [glob for owner, glob in self.tools if owner == server]
        return len(name) <= _LONGEST_JUDGED and any(
            fnmatch.fnmatchcase(name, glob) for glob in globs
        )


class Scope:
    """What a principal may use: anything that one of its grants allows. Equal grants are equal scopes.

    The one view of rights: lists, calls, subscriptions, status and all else ask here and nowhere else."""

    __slots__ = ("everything", "grants", "_hash", "_tools")

    def __init__(self, grants: Iterable[Grant] = (Grant(),)) -> None:
        self.grants = frozenset(grants)
        self.everything = Grant() in self.grants
        self._hash = hash(self.grants)
        self._tools: dict[tuple[str, str], bool] = {}  # what was asked before

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scope) and self.grants == other.grants

    def __hash__(self) -> int:
        return self._hash

    def sees(self, server: str) -> bool:
        """Whether there is such a server at all for its holder."""
        return self.everything or any(
            server in grant.servers
            if grant.servers is not None
            else grant.tools is None or any(owner == server for owner, _ in grant.tools)
            for grant in self.grants
        )

    def whole(self, server: str) -> bool:
        """Whether prompts, resources and completion of `server` are its holder's too."""
        return self.everything or any(
            server in grant.servers if grant.servers is not None else grant.tools is None
            for grant in self.grants
        )

    def all_of(self, server: str) -> bool:
        """Whether nothing of `server` is kept from its holder, what it may have tomorrow included."""
        return self.everything or any(
            grant.tools is None and (grant.servers is None or server in grant.servers)
            for grant in self.grants
        )

    def tool(self, server: str, name: str) -> bool:
        """Whether its holder may use that tool; `name` as /mcp shows it."""
        if self.everything:
            return True
        if len(name) > _LONGEST_JUDGED:
            return self._judge(server, name)
        allowed = self._tools.get((server, name))
        if allowed is None:
            if len(self._tools) >= _JUDGED:
                self._tools.clear()
            allowed = self._tools[server, name] = self._judge(server, name)
        return allowed

    def covers(self, other: Scope) -> bool:
        """Whether all that `other` allows is allowed here too, as far as equal grants show it."""
        return self.everything or other.grants <= self.grants

    def _judge(self, server: str, name: str) -> bool:
        return any(
            (grant.servers is None or server in grant.servers) and grant.names(server, name)
            for grant in self.grants
        )


_JUDGED: Final = 10_000  # verdicts on tools that one scope keeps; names come from anybody
# Characters of a name that a glob can match. MCP has 128; one of 4 MB costs a glob up to 40 ms.
_LONGEST_JUDGED: Final = 1_000
EVERYTHING: Final = Scope()


@dataclasses.dataclass(frozen=True, slots=True)
class Owner:
    """Who a call belongs to: the principal, and for a legacy client its session too ("" for a modern one).

    What it may use, and until when (seconds since the epoch), comes with it but does not make it
    another one: the same principal may come with another token."""

    principal: str
    session: str = ""
    scope: Scope = dataclasses.field(default=EVERYTHING, compare=False, repr=False)
    expires: float = dataclasses.field(default=math.inf, compare=False, repr=False)
    admin: bool = dataclasses.field(default=False, compare=False, repr=False)


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
    # What the client can be asked
    capabilities: dict[str, Json] = dataclasses.field(default_factory=dict)
    client: dict[str, Json] | None = None  # clientInfo
    log_level: str | None = None  # the lowest level the client wants; None: it did not say
    progress: bool = False  # whether the client sent a progressToken
    place: str = ""  # the process that must take it (a retry, a task); "" for any
    mirrored: Mapping[str, str] | None = (
        None  # Mcp-Param-* headers, lower-case name to raw value; None: legacy
    )
    address: str = ""  # the client's address, for the record
    request: str = ""  # the id of the HTTP request that brought it, for the record
    any_output: bool = (
        True  # False: the client knows outputSchema and structuredContent of type object only
    )

    @property
    def origin(self) -> dict[str, Json]:
        """Whose it is, as events say it."""
        return {
            "request": self.request, "principal": self.owner.principal, "address": self.address
        }  # fmt: skip


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
    ttl_ms: int | None = (
        None  # how long a list or read may be cached; None: the result says it, or 0
    )
    public: bool = False  # whether caches may share it


@dataclasses.dataclass(slots=True)
class Offer:
    """What one server said of itself (DiscoverResult, InitializeResult), for Catalogue and status."""

    capabilities: dict[str, Json]
    info: dict[str, Json]
    instructions: str
    version: str  # protocol version spoken with it
    era: str  # "modern" or "legacy": shown in /status, decided upon by nobody
    warning: str = ""  # what is wrong with its instructions


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

    # Set by the handler; called once if the client goes before the end
    closed: Callable[[], None] | None
    stalled: bool  # the reader does not keep up: more than the high-water mark is waiting
    # Headers that go with whatever is answered (CORS); set by the wiring
    extra: Sequence[tuple[str, str]]
    id: str  # the request's, sent as X-Request-Id; the wiring may set another one

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
    # What a section has found out from the head *alone*: neither from address, TLS or body, nor from
    # the config or the time. The next request with the same head finds it here.
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    certificate: str = ""  # the subject of the client's certificate, where TLS asked for one
    id: str = ""  # the request id: in the record, and in the answer's X-Request-Id


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
    def at(
        self, server: str, owner: Owner, place: str
    ) -> Link | Error: ...  # that one, free or not
    def gone(self, owner: Owner) -> None: ...


class Shelf(Protocol):
    """Supervisor → Catalogue, Subscriptions: what happened at a server's children."""

    def up(self, server: str, offer: Offer) -> None: ...  # the first process is ready (again)
    def down(self, server: str) -> None: ...  # no process is left, or the first start failed
    def changed(self, server: str, kind: Kind) -> None: ...  # list_changed
    def told(
        self, server: str, place: str, notice: Notice
    ) -> None: ...  # of no call: tasks, elicitation/complete


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
CACHED: Final = 2048  # bytes of a head that is remembered: the caches hold a few MB at most
BACKLOG: Final = 2048

METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
# A second one of these has no one meaning. The others are lists, or nobody here reads them.
SINGLE: Final = frozenset({
    "host", "content-length", "transfer-encoding", "content-type", "content-encoding", "expect",
    "authorization", "origin", "last-event-id", "access-control-request-method",
})  # fmt: skip

_FIELD_TOKEN: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_FIELD_VALUE: Final = re.compile(r"[\t -~\x80-\xff]*")
_HOST: Final = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_LENGTH: Final = re.compile(r"0|[1-9][0-9]*")  # and not int(): it takes +5, 1_0 and Arabic digits
_PATH: Final = re.compile(r"/(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*")
_QUERY: Final = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*")
_ABSOLUTE: Final = re.compile(
    r"https?://([^/?#\x00-\x20\x7f-\xff]*)(/[^?#]*)?((?:\?.*)?)", re.IGNORECASE
)
_CHUNK: Final = re.compile(
    rb"([0-9A-Fa-f]{1,16})"
    rb"(?:;[A-Za-z0-9!#$%&'*+.^_`|~-]+"
    rb'(?:=(?:[A-Za-z0-9!#$%&\'*+.^_`|~-]+|"(?:[\t !#-\[\]-~]|\\[\t -~])*"))?)*\r\n'
)
# Wrong wherever the head ends: its first bytes, a control character, a CR or LF alone.
_MISPLACED: Final = re.compile(
    rb"\A(?:\r\n|[^A-Za-z0-9!#$%&'*+.^_`|~\r\n-])"
    rb"|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?=[^\n])|(?<!\r)\n"
)


class Phase(enum.IntEnum):  # an index, since hashing an Enum runs Python code
    """What a connection waits for."""

    IDLE = 0  # the next request
    HEAD = 1  # the rest of a request head
    BODY = 2  # the rest of a request body
    ANSWER = 3  # the answer to its request
    LINGER = 4  # the client to read why it was refused
    GONE = 5  # nothing any more


@dataclasses.dataclass(slots=True)
class _Head:
    """A request head without fault. It may be shared by many requests, so nobody changes it."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    last: bool  # the client wants the connection closed after the answer
    chunks: bool  # HTTP/1.1: the client understands the chunked transfer coding
    length: int | None  # of the body in bytes; None: it is chunked
    expects: bool  # the client waits for "100 Continue" before it sends the body
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # see HttpRequest.facts


class HttpParser:
    """The server's side of reading HTTP/1.1 and 1.0 (RFC 9112): bytes into `feed`, requests out of
    `next`. How the bytes were cut changes nothing.

    After `next` gave a request, `last` and `chunks` tell of it until `next` is called again."""

    def __init__(self, limits: Limits, address: str = "", certificate: str | None = None) -> None:
        self._limits, self._address = limits, address
        # None: not over TLS; "": TLS asked for none.
        self._secure, self._certificate = certificate is not None, certificate or ""
        self._data = b""  # received and not consumed from _at on
        self._at = 0
        self._clean = 0  # bytes of an unfinished head or trailer that were looked at
        self._error: HttpError | None = None
        self._request: HttpRequest | None = None  # the one whose body is being read
        self._left = 0  # bytes of the body, or of the chunk, still to come
        self._chunked = self._in_chunk = self._trailer = False
        self._extensions = 0  # bytes spent on chunk extensions in this body
        self._parts: list[bytes] = []
        self.held = 0  # bytes of the unfinished body
        self.last = False  # the client wants the connection closed after the answer
        self.chunks = True  # the client understands the chunked transfer coding
        self.expects = False  # the client waits for "100 Continue" before it sends the body
        self.more = False  # `next` gave None to let others run: call it again without new bytes

    @property
    def phase(self) -> Phase:
        """IDLE, HEAD or BODY: what the bytes so far are the beginning of."""
        if self._request is not None:
            return Phase.BODY
        return Phase.HEAD if self.unread else Phase.IDLE

    @property
    def unread(self) -> int:
        """Bytes that were fed and are not part of a body or an earlier request."""
        return len(self._data) - self._at

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
            request = self._request or self._read_head()
            if request is None:
                return None
            whole = self._at + self._left
            if not self._parts and not self._chunked and whole <= len(self._data):
                # The usual body has come in one piece, with its head.
                request.body = self._data[self._at : whole]
                self._at, self._left, self._request, self.expects = whole, 0, None, False
                return request
            if not (self._read_chunks() if self._chunked else self._read_length()):
                self._request = request
                return None
        except HttpError as error:
            self._error, self._data, self._at, self._parts = error, b"", 0, []
            raise
        request.body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._request, self._parts, self.held, self.expects = None, [], 0, False
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
        if size > self._limits.header:
            self._refuse_early(data[start : end + 4])
        # Clients repeat their heads to the byte. To find one again costs 1.4 us less than to read
        # it, even where each of its lines is known.
        read = _head_of if size <= CACHED else _head_of.__wrapped__
        try:
            head = read(data[start:end], self._limits.body)
        except _Unread as unread:
            # Had the bytes come one by one, a later fault might have been seen first.
            self._refuse_early(data[start : end + 4])
            raise unread.error from None
        self._chunked = head.length is None
        self._left = head.length or 0
        if self._chunked:
            self._in_chunk, self._trailer, self._extensions = False, False, 0
        self.last, self.chunks, self.expects = head.last, head.chunks, head.expects
        self._at = end + 4
        return HttpRequest(
            head.method, head.path, head.query, head.headers, b"", self._address, self._secure,
            head.facts, self._certificate,
        )  # fmt: skip

    def _refuse_early(self, head: bytes, clean: int = 0) -> None:
        """Raise what is wrong first in `head`, which may be a part; nothing if all may be well.

        By the first wrong byte, so that the answer does not depend on how the bytes came. The first
        `clean` bytes were looked at before: else each byte of a trickle costs half a ms."""
        limit = self._limits.header
        bound = limit + 4
        too_long = HttpError(431, f"the request head is larger than {limit} bytes (limits.header)")
        if bound >= REQUEST_LINE + 2 and head.find(b"\r\n", 0, REQUEST_LINE + 2) < 0:
            bound, too_long = REQUEST_LINE + 2, HttpError(414, "the request line is too long")
        lines = head.split(b"\r\n", FIELDS + 2)
        if len(lines) > FIELDS + 2 and lines[FIELDS + 1] and len(head) - len(lines[-1]) < bound:
            bound = len(head) - len(lines[-1])
            too_long = HttpError(431, f"more than {FIELDS} headers")
        if wrong := _MISPLACED.search(head, max(clean - 1, 0), bound):
            what = "line end" if wrong[0] in (b"\r", b"\n", b"\r\n") else "character"
            raise HttpError(400, f"a wrong {what} at byte {wrong.start()}. Is it https:// here?")
        if len(head) >= bound and head.find(b"\r\n\r\n", 0, bound) < 0:
            raise too_long

    # ---- the body ----

    def _read_length(self) -> bool:
        part = self._data[self._at : self._at + self._left]
        if part:
            self._parts.append(part)
            self.held += len(part)
            self._at += len(part)
            self._left -= len(part)
        return not self._left

    def _read_chunks(self) -> bool:
        """RFC 9112, 7.1. Whether the last chunk and the trailer have been read."""
        self.more = False
        for _ in range(CHUNKS):
            if self._trailer:
                return self._read_trailer()
            if not self._read_length() or not self._read_chunk_line():
                return False
        self.more = True
        return False

    def _read_chunk_line(self) -> bool:
        # With the line end behind the chunk before, which is checked and not skipped: else a chunk
        # longer than its size says would go unnoticed (CVE-2025-43859, h11).
        data, ending = self._data, b"\r\n" if self._in_chunk else b""
        start = self._at + len(ending)
        end = data.find(b"\n", start, start + CHUNK_LINE)
        if end < 0 and len(data) < start + CHUNK_LINE:
            return False
        line = _CHUNK.fullmatch(data, start, end + 1)
        if line is None or not data.startswith(ending, self._at):
            raise HttpError(400, "a chunk's size line, or the line end before it, is malformed")
        self._extensions += end - 1 - line.end(1)
        if self._extensions > self._limits.header:
            raise HttpError(400, "too many chunk extensions")
        self._left = int(line[1], 16)
        if self.held + self._left > self._limits.body:
            raise _too_large(self._limits.body)
        self._at, self._in_chunk, self._trailer = end + 1, True, not self._left
        return True

    def _read_trailer(self) -> bool:
        """Read and dropped: no field in a trailer has a meaning here (RFC 9110, 6.5.1).

        One that frames, routes or authorizes must not stand there, and a proxy might heed it."""
        data, at = self._data, self._at
        if data.startswith(b"\r\n", at):
            self._at, self._clean = at + 2, 0  # it may have come in two pieces
            return True
        end = data.find(b"\r\n\r\n", at)
        # A trailer is bound like a head, whose first line it lacks.
        trailer = b"-\r\n" + (data[at:] if end < 0 else data[at : end + 4])
        self._refuse_early(trailer, self._clean)
        self._clean = len(trailer) if end < 0 else 0
        if end < 0:
            return False
        fields = _fields(data[at:end].decode("latin-1").split("\r\n"), cached=False)
        if not SINGLE.isdisjoint(fields):
            raise HttpError(400, "a header that must not stand in a trailer")
        self._at = end + 4
        return True


class _Unread(Exception):
    """A head whose lines could not be read; `error` is what is wrong with the first such line."""

    def __init__(self, error: HttpError) -> None:
        super().__init__()
        self.error = error


@functools.lru_cache(512)
def _head_of(head: bytes, most: int) -> _Head:
    """A head as it stands before its empty line; `most`: bytes that a body may have.

    Raises _Unread, or HttpError for lines that are well but do not go together. Neither is kept."""
    lines = head.decode("latin-1").split("\r\n")
    try:
        if len(lines) > FIELDS + 1 or len(lines[0]) > REQUEST_LINE:
            raise HttpError(431, f"more than {FIELDS} headers")
        method, path, query, modern, authority = _request_line(lines[0])
        headers = _fields(lines[1:], cached=len(head) <= CACHED)
    except HttpError as error:
        raise _Unread(error) from None
    host = headers.get("host")
    if host is None and modern:
        raise HttpError(400, "the Host header is missing")
    # RFC 9112, 3.2.2 lets a target with a host win over the Host header; two readers could then
    # disagree about the host that was checked, so they must be equal.
    if authority is not None and (host is None or authority.lower() != host.lower()):
        raise HttpError(400, "the request target must be a path, or a URL of the same Host")
    wish = headers.get("connection", "keep-alive")
    last = not modern or (wish != "keep-alive" and "close" in re.split(r"[ \t,]+", wish.lower()))
    length = _length(method, headers, modern, most)
    expect = headers.get("expect") if modern else None  # RFC 9110, 10.1.1: ignored in HTTP/1.0
    if expect is not None and expect.lower() != "100-continue":
        raise HttpError(417, "the only Expect is 100-continue")
    return _Head(method, path, query, headers, last, modern, length, expect is not None)


def _length(method: str, headers: dict[str, str], modern: bool, most: int) -> int | None:
    """How long the body is (RFC 9112, 6.3); None: it is chunked."""
    length, coding = headers.get("content-length"), headers.get("transfer-encoding")
    if coding is not None:
        if length is not None:
            raise HttpError(400, "Content-Length and Transfer-Encoding exclude each other")
        # Exactly: a proxy that does not know "CHUNKED" or "gzip, chunked" reads another body.
        if coding != "chunked" or not modern:
            raise HttpError(400, "the only Transfer-Encoding is chunked, in HTTP/1.1")
        return None
    if length is not None:
        # By its length first: converting a million digits takes seconds (CVE-2020-10735).
        if len(length) > 18 or int(length) > most:
            raise _too_large(most)
        return int(length)
    if "content-type" in headers and method == "POST":
        # It announces a body whose end nobody knows. Without one, POST is a bare command.
        raise HttpError(411, "a body needs a Content-Length")
    return 0


def _too_large(most: int) -> HttpError:
    return HttpError(413, f"a body may have {most} bytes (limits.body)")


def _fields(lines: list[str], cached: bool) -> dict[str, str]:
    """Header lines, checked (RFC 9110, 5). A repeated field becomes one list.

    Clients repeat themselves: to look up a line that was read before costs 0.1 us, to read it 0.4."""
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
    if not colon or not _FIELD_TOKEN.fullmatch(name):
        raise HttpError(400, "a header line has no colon, a malformed name, or is folded")
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
        if re.fullmatch(r"HTTP/[0-9]\.[0-9]", version):
            raise HttpError(505, "HTTP/1.1 is spoken here")
        raise HttpError(400, "the HTTP version is malformed")
    if method not in METHODS:
        if _FIELD_TOKEN.fullmatch(method):
            raise HttpError(501, "this method is not implemented here")
        raise HttpError(400, "the method is malformed")
    modern = version == "HTTP/1.1"
    if target == "*" and method == "OPTIONS":
        return method, "*", "", modern, None
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is not None:
        target = (absolute[2] or "/") + absolute[3]
    path, _, query = target.partition("?")
    if not _PATH.fullmatch(path) or not _QUERY.fullmatch(query):
        raise HttpError(400, "the request target is malformed")
    return method, _decoded(path), query, modern, absolute and absolute[1]


def _decoded(path: str) -> str:
    """`path` decoded once. An encoded slash, backslash or control character would mean one path to
    a proxy and another to us."""
    try:
        decoded = urllib.parse.unquote(path, errors="strict")
    except UnicodeDecodeError:
        raise HttpError(400, "the path is not UTF-8") from None
    if not decoded.isprintable() or re.search("%(2f|5c)", path, re.IGNORECASE):
        raise HttpError(400, "the path holds an encoded slash or control character")
    return decoded


# ---- Responses ----

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
    ident = f"id: {event_id}\n" if event_id else ""
    line = data.replace(b"\r", b" ").replace(b"\n", b" ")
    return b"event: %b\n%bdata: %b\n\n" % (event.encode(), ident.encode(), line)


def sse_comment() -> bytes:
    """What keeps an idle stream open; clients ignore it."""
    return b":\n\n"


@functools.lru_cache(256)
def _head(status: int, headers: tuple[tuple[str, str], ...], last: bool) -> bytes:
    """Status line and headers, without what depends on the body; most answers begin alike."""
    # nosniff: a browser must not take JSON for a page. No Server, no version: nobody needs them.
    text = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nX-Content-Type-Options: nosniff\r\n"
    # A foreign page must not draw an answer into its process either, where Spectre could read it.
    text += "Cross-Origin-Resource-Policy: same-origin\r\n"
    if all(name != "Cache-Control" for name, _ in headers):
        text += "Cache-Control: no-store\r\n"  # a 404 or 405 may be kept else (RFC 9110, 15.1)
    for name, value in headers:
        # It would be a header, or a whole response, of somebody else's making.
        if "\r" in value or "\n" in value:
            raise ValueError(f"the value of {name} holds a line end")
        text += f"{name}: {value}\r\n"
    return (text + ("Connection: close\r\n" if last else "")).encode("latin-1")


class Stage(enum.Enum):
    """How far a response is."""

    WAITING = "not begun"
    OPEN = "begun"
    OVER = "over"  # ended, or the client has gone


class HttpReply:
    """One response on one connection (the `Reply` that handlers get)."""

    __slots__ = ("_body", "_chunks", "_connection", "_stage", "closed", "extra", "id", "stalled")

    def __init__(self, connection: Connection, chunks: bool, body: bool, ident: str) -> None:
        self._connection, self._chunks, self._body = connection, chunks, body
        self.id = ident
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
        # The usual stage is seen here, which saves a call for each response.
        if self._stage is not Stage.WAITING and not self._is(Stage.WAITING):
            return
        start = _head(status, (*headers, *self.extra), self._connection.last)
        self._stage = Stage.OVER
        # RFC 9110, 8.6: no Content-Length in a 204.
        length = b"" if status == 204 else b"Content-Length: %d\r\n" % len(body)
        start = b"%bX-Request-Id: %b\r\n%b\r\n" % (start, self.id.encode(), length)
        self._connection.write(start, body if self._body else b"")
        self._connection.answered()

    def head(self, status: int, headers: Sequence[tuple[str, str]]) -> None:
        """Begin a response whose length is not known."""
        if not self._is(Stage.WAITING):
            return
        framing = b"Transfer-Encoding: chunked\r\n\r\n" if self._chunks else b"\r\n"
        start = _head(status, (*headers, *self.extra), self._connection.last)
        self._stage = Stage.OPEN
        self._connection.write(b"%bX-Request-Id: %b\r\n%b" % (start, self.id.encode(), framing))

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
        """Answer what `error` says. A response that has begun is cut: nobody must take it for whole."""
        if self._stage is Stage.WAITING:
            self.full(error.status, (*JSON_HEADERS, *error.headers), _error_body(error))
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
        if self._stage in (stage, Stage.OVER):
            return self._stage is stage
        raise RuntimeError(f"{self._stage.value}: a response must be {stage.value} for this")


def _error_body(error: HttpError) -> bytes:
    return encode({"error": {"message": str(error)}})


# ---- Connections ----


class Connection(asyncio.Protocol):
    """One client's socket: requests one after the other, each answered before the next is read."""

    __slots__ = (
        "_advancing", "_again", "_deadline", "_full", "_held", "_parser", "_paused", "_phase",
        "_reply", "_server", "_taken", "_taken_at", "_transport", "_until", "_written", "address",
        "last",
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
        self._until = math.inf  # when the client's certificate expires
        self.address = ""
        self.last = False  # the response under way is the last on this connection

    # ---- asyncio's side; nothing may escape (uvloop then closes what stands up the stack) ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        peer, sock = transport.get_extra_info("peername"), transport.get_extra_info("socket")
        if isinstance(peer, tuple):
            self.address = _client_address(peer)
            # Without it an answer in two writes waits 40 ms for an acknowledgement.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if transport.get_extra_info("sslcontext") is not None:
            self._secured()
            return
        self._parser = HttpParser(self._server.limits, self.address)
        refusal = self._server.admit(self)
        if refusal is not None:
            self._refuse(refusal)

    def _secured(self) -> None:
        """TLS is agreed upon: the client's request begins now. Handshake has counted us."""
        assert self._transport is not None
        tls, certificate = self._transport.get_extra_info("ssl_object"), ""
        try:
            if tls.context.verify_mode:
                shown = tls.getpeercert() or {}
                certificate = _subject(shown)
                self._until = self._server.now + _left(shown)
        except (ValueError, OSError) as error:
            self._server.unsecured(self, error)
            self._enter(Phase.LINGER)  # what comes now is no request
            self.abort()
            return
        self._parser = HttpParser(self._server.limits, self.address, certificate)
        self._deadline = self._server.now + self._server.limits.header_timeout

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
            if not self._parser.unread:
                break
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
        # It stays so: a request that was under way at `drain` is the last one.
        self.last = self.last or self._parser.last or self._server.draining
        ident = request.id = self._server.next_id()
        reply = self._reply = HttpReply(self, self._parser.chunks, request.method != "HEAD", ident)
        try:
            self._server.handler.handle(request, reply)
        except HttpError as error:
            reply.refuse(error)
        except Exception as error:  # a bug must cost one answer, not the connection or the loop
            self._server.failed(f"{request.method} {request.path}", error, request=ident)
            reply.refuse(HttpError(500, "internal error; the log has the details"))

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
        if phase is Phase.IDLE and not self._paused:
            return  # nearly always: nothing is unread, so there is nothing to throttle
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
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

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
        ident = self._server.next_id()  # what was no request has one too: who asks why can name it
        self._server.refused(self, error, ident)
        self.last = True
        body = _error_body(error)
        headers = (*JSON_HEADERS, *error.headers, ("X-Request-Id", ident))
        start = _head.__wrapped__(error.status, headers, True)
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
                self._server.failed("a client that left", error)

    def drain(self) -> None:
        """Close now if nothing is under way, else after the answer."""
        self.last = True
        if self._phase in (Phase.IDLE, Phase.HEAD) and not self._parser.unread:
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
            message = f"{self.address}: took nothing for {STALLED:g} s; cut"
            self._server.record.emit("http.stalled", "debug", address=self.address, message=message)
            self.abort()
        if now >= self._until:
            self.abort()  # with its streams: what was proved is not true any more
        if now < self._deadline:
            return
        if self._phase is Phase.BODY:
            self._refuse(HttpError(408, "the body took too long (limits.body_timeout)"))
        elif self._phase is Phase.HEAD and self._parser.unread:
            self._refuse(HttpError(408, "the request head took too long (limits.header_timeout)"))
        elif self._phase is Phase.LINGER:
            self.abort()
        elif self._transport is not None:
            self._transport.close()


class Handshake(asyncio.Protocol):
    """A connection until client and server agree on TLS.

    asyncio's own listener for TLS tells nobody of a connection before that, so whoever connects
    and says nothing would be counted nowhere, as often as there are descriptors. Here it counts as
    a Connection from the first, and `renew` concerns the next one. So it is accepted in clear, and
    before a byte is read a copy of its socket starts anew with TLS: `start_tls` would be shorter,
    and loses with uvloop what the client has said already."""

    __slots__ = ("_context", "_server")

    def __init__(self, server: HttpServer, context: ssl.SSLContext) -> None:
        self._server, self._context = server, context

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        server, connection = self._server, Connection(self._server)
        connection.address = _client_address(transport.get_extra_info("peername") or ("",))
        refusal = server.admit(connection)
        try:
            if refusal is not None:
                # No answer: it would need the handshake, which is what makes a flood expensive.
                server.refused(connection, refusal, "")
                server.forget(connection)
                return
            copy = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
            copy.setblocking(False)
            server.shake(self._agree(connection, copy))
        except OSError as error:
            server.unsecured(connection, error)
            server.forget(connection)
        finally:
            cast(asyncio.Transport, transport).abort()

    async def _agree(self, connection: Connection, sock: socket.socket) -> None:
        """Ends when TLS is agreed upon, or the connection is gone."""
        server = self._server
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection, sock, ssl=self._context,
                ssl_handshake_timeout=server.limits.header_timeout, ssl_shutdown_timeout=LINGER,
            )  # fmt: skip
        except OSError as error:
            server.unsecured(connection, error)
            connection.connection_lost(error)


def _client_address(peer: Sequence[Any]) -> str:
    return str(peer[0]).removeprefix("::ffff:")


# OpenSSL's words for what is wrong with a client's certificate.
_UNCERTIFIED: Final = ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "CERTIFICATE_VERIFY_FAILED")
# RFC 4514, 3; names that OpenSSL writes out.
_ATTRIBUTES: Final = {
    "commonName": "CN", "localityName": "L", "stateOrProvinceName": "ST", "organizationName": "O",
    "organizationalUnitName": "OU", "countryName": "C", "streetAddress": "STREET",
    "domainComponent": "DC", "userId": "UID",
}  # fmt: skip


def _subject(certificate: Mapping[str, Any]) -> str:
    """The subject of a client's certificate as RFC 4514 writes it, as `CN=alice,O=Acme`.

    Raises ValueError for one without: that would be anybody."""
    names = ["+".join(map(_attribute, name)) for name in certificate.get("subject", ())]
    if not names:
        raise ValueError("the client's certificate has no subject")
    return ",".join(reversed(names))


def _left(certificate: Mapping[str, Any]) -> float:
    """Seconds until it expires. Raises ValueError when it has: a resumed TLS session is not
    verified again, and would outlive its certificate."""
    left = ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()
    if left <= 0:
        raise ValueError("the client's certificate has expired")
    return left


def _attribute(pair: tuple[str, str]) -> str:
    """`CN=alice`, with what would read as another attribute escaped (RFC 4514, 2.4)."""
    value = re.sub(r'[,+"\\<>;]|^[ #]| $', r"\\\g<0>", pair[1])
    # A line end in a name would be a line of its own in the log.
    shown = (c if c.isprintable() else "".join(f"\\{b:02X}" for b in c.encode()) for c in value)
    return f"{_ATTRIBUTES.get(pair[0], pair[0])}={''.join(shown)}"


class HttpServer:
    """Listens, and owns every connection."""

    def __init__(
        self,
        handler: Handler,
        limits: Limits,
        record: Record,
        clock: Callable[[], float],
        tls: ssl.SSLContext | None = None,
        exempt: Callable[[str], bool] = lambda address: not address,
    ) -> None:
        """`exempt`: whose address may have any number of connections; "" is the Unix socket."""
        self.handler, self.limits, self.record = handler, limits, record
        self._context, self._exempt = tls, exempt
        self._handshakes: set[asyncio.Task[None]] = set()
        self.now = self._woken = clock()  # as of the last wake: no clock is read per request
        # How long a connection may stay in each phase; the clock of an answer is the Gateway's.
        self.patience = (
            IDLE, limits.header_timeout, limits.body_timeout, math.inf, LINGER, math.inf
        )  # fmt: skip
        self.draining = False
        self.held = 0  # bytes of unfinished bodies
        self.connections: set[Connection] = set()
        # Of this process and no other, so that ids in the logs of several lives never meet.
        self._ids, self._count = f"{secrets.token_hex(5)}-", itertools.count(1)
        self._addresses: dict[str, int] = {}
        self._listeners: list[asyncio.Server] = []
        self._socket_path = ""

    async def listen(self, host: str, port: int, unix_socket: str | None = None) -> list[str]:
        """Start serving; where, as URLs. Raises UsageError that says what to do."""
        loop, connect = asyncio.get_running_loop(), self._connect
        try:
            if unix_socket:
                if _answers(unix_socket):
                    raise OSError(errno.EADDRINUSE, "")
                listener = await loop.create_unix_server(connect, unix_socket, backlog=BACKLOG)
            else:
                listener = await loop.create_server(connect, host, port, backlog=BACKLOG)
        except OSError as error:
            raise UsageError(_cannot_listen(unix_socket, host, port, error)) from None
        self._listeners.append(listener)
        if unix_socket:
            self._socket_path = unix_socket
            return [f"unix:{unix_socket}"]
        names = [sock.getsockname()[:2] for sock in listener.sockets]
        scheme = "https" if self._context else "http"
        return [f"{scheme}://[{a}]:{p}" if ":" in a else f"{scheme}://{a}:{p}" for a, p in names]

    def _connect(self) -> asyncio.Protocol:
        return Handshake(self, self._context) if self._context else Connection(self)

    def shake(self, handshake: Coroutine[Any, Any, None]) -> None:
        """Own a handshake: as many as there are connections, each as long as header_timeout."""
        task = asyncio.get_running_loop().create_task(handshake)
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    def renew(self, context: ssl.SSLContext) -> bool:
        """Use `context` for connections to come; whether a CA of clients is gone with the old one.

        Where clients show certificates, each connection ends with its answer: the next one is
        verified against the new CAs."""
        old, self._context = self._context, context
        for connection in tuple(self.connections) if context.verify_mode else ():
            connection.drain()
        known = set(context.get_ca_certs(binary_form=True))
        return old is not None and not known.issuperset(old.get_ca_certs(binary_form=True))

    def next_id(self) -> str:
        """The id of one more request. Cheap (0.1 us) and unique; it is no secret."""
        return f"{self._ids}{next(self._count)}"

    def admit(self, connection: Connection) -> HttpError | None:
        """Count a new connection; why it is not served, if so."""
        self.connections.add(connection)
        address = connection.address
        count = self._addresses[address] = self._addresses.get(address, 0) + 1
        if len(self.connections) > self.limits.connections:
            return HttpError(503, "too many connections", [("Retry-After", "1")])
        if count > self.limits.connections_per_address and not self._exempt(address):
            return HttpError(429, "too many connections of this address", [("Retry-After", "1")])
        return None

    def forget(self, connection: Connection) -> None:
        """A connection is gone."""
        self.connections.discard(connection)
        self._addresses[connection.address] -= 1
        if not self._addresses[connection.address]:
            del self._addresses[connection.address]

    def refused(self, connection: Connection, error: HttpError, ident: str) -> None:
        """Record what was no request. On debug: who floods us must not fill the log."""
        self.record.count("http_refused", status=str(error.status))
        self.record.emit(
            "http.refused", "debug", request=ident, status=error.status, address=connection.address,
            message=f"{connection.address or 'a local client'}: {error}",
        )  # fmt: skip

    def unsecured(self, connection: Connection, error: Exception) -> None:
        """Record a handshake that failed; on debug, as above, unless it is about a certificate."""
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        address, message = connection.address, f"{connection.address}: no TLS: {reason}"
        if reason in _UNCERTIFIED or isinstance(error, ValueError):
            self.record.alarm("certificate.refused", message, address=address)
        else:
            self.record.emit("tls.refused", "debug", address=address, message=message)

    def failed(self, what: str, error: Exception, **of: str) -> None:
        """Record a bug in a handler; the client learns nothing of it but the id of its request."""
        lines = "".join(traceback.format_exception(error))
        message = f"{what}: {error!r}"
        self.record.emit("internal.error", "error", **of, message=message, traceback=lines)

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
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace
        while self.connections and loop.time() < deadline:
            await asyncio.sleep(0.01)
        for connection in tuple(self.connections):
            connection.abort()
        for handshake in self._handshakes:
            handshake.cancel()
        await asyncio.gather(*self._handshakes, return_exceptions=True)
        if self._socket_path:
            with contextlib.suppress(OSError):
                os.unlink(self._socket_path)
        await asyncio.sleep(0)  # the aborted ones hear of it in this turn


def _answers(path: str) -> bool:
    """Whether somebody listens at the Unix socket `path`. What a dead process left does not answer.

    asyncio would remove it either way, and the older Atrax would never be reached again."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(path) == 0


def _cannot_listen(unix_socket: str | None, host: str, port: int, error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return f'host "{host}" is no address and no name that can be resolved'
    place = unix_socket or f"port {port} on {host}"
    other = "--socket PATH" if unix_socket else f"--port {port + 1 if port < 65535 else 4000}"
    hints = {
        errno.EADDRINUSE: f"is in use. Stop what uses it, or choose another: {other}",
        errno.EACCES: "needs rights that this user lacks. Choose another: --port 4000",
        errno.EADDRNOTAVAIL: "is no address of this machine. For local clients: --host 127.0.0.1",
    }
    why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
    return f"{place} {hints.get(error.errno or 0, f'cannot be listened on: {why}')}"


# ==== Identity ====================================================================
# Who a request comes from, and whether it may come at all: Host, Origin, principal, CORS.
# Knows the config and HTTP headers. Must not know servers.

# A web page that you visit can make your browser send requests to 127.0.0.1. Two headers, which
# the page cannot choose, give it away. Origin names the page. Host names what the browser thinks
# it talks to: an attacker's name, if that name was pointed at 127.0.0.1 after the page was loaded
# (DNS rebinding; CVE-2025-49596 and others). So both are checked on every request, before
# anything else, whatever the way of authentication (MCP 2026-07-28, Streamable HTTP, Security).

ANONYMOUS: Final = Owner("anonymous")
_REMEMBERED: Final = 256  # accepted spellings of Host; 127.0.0.0/8 with all ports has too many
_LOOPBACK: Final = re.compile(r"localhost|127(?:\.[0-9]{1,3}){3}|\[::1\]")
_ANY_ADDRESS: Final = ("0.0.0.0", "::", "[::]")
_DEFAULT_PORTS: Final = {"http": ":80", "https": ":443"}
_BEARER: Final = re.compile(r"bearer +([A-Za-z0-9._~+/-]+=*)", re.IGNORECASE)  # RFC 6750, 2.1
WRONG_TOKENS: Final = 10  # from one address in WRONG_WINDOW seconds; the next ones get 429
WRONG_WINDOW: Final = 60.0
_WRONG_ADDRESSES: Final = 10_000  # that are remembered, the latest ones
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{8,64}")  # as proxies make them, and no more
_PEERS: Final = 1024  # addresses that are remembered: to read one takes 5 us
_LONGEST_ENTRY: Final = 64  # characters of an address, with port and white space
_WITH_PORT: Final = re.compile(r"\[([^\]]*)\](?::[0-9]+)?|([0-9.]+):[0-9]+")


class KeysNeeded(Exception):
    """A token was signed with a key that is not known yet. The same request is to come again when
    the keys were fetched; `refuse` makes the answer if that changed nothing."""

    def __init__(self, refuse: Callable[[], HttpError]) -> None:
        super().__init__()
        self.refuse = refuse


class WrongTokens:
    """Who sent wrong tokens lately, by address; bounded. `now` is monotonic, in seconds."""

    def __init__(self) -> None:
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def add(self, address: str, now: float) -> int:
        """One more from `address`; 0, or if there were too many, in how many seconds it may try again."""
        network = _network(address)
        times = self._times.setdefault(network, deque(maxlen=WRONG_TOKENS))
        self._times.move_to_end(network)
        if len(self._times) > _WRONG_ADDRESSES:
            self._times.popitem(last=False)
        if len(times) == WRONG_TOKENS and now - times[0] < WRONG_WINDOW:
            return math.ceil(WRONG_WINDOW - (now - times[0]))
        times.append(now)
        return 0


def _network(address: str) -> str:
    """`address`, or of IPv6 its first 64 bits: whoever has one address there has all of them."""
    if ":" not in address:
        return address
    try:
        return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False))
    except ValueError:
        return address


def scope_of(config: Config, rights: Rights) -> Scope:
    """What `rights` of the config come to."""
    tools = servers = None
    if rights.servers is not None:
        servers = frozenset(rights.servers)
    if rights.tools is not None:
        pairs = ((config.server_of(glob), glob) for glob in rights.tools)
        tools = frozenset((server, glob) for server, glob in pairs if server is not None)
    return Scope([Grant(servers, tools)])


# ---- OAuth: tokens that somebody else signs ----
#
# Atrax is a resource server: it issues nothing, and checks what an authorization server has signed
# (JWT access tokens, RFC 9068). What makes such checks fail is known: the token's own header
# decides how it is checked ("none", or a public key used as an HMAC secret; CVE-2015-9235), or it
# was made for somebody else (RFC 8707). So the algorithm must be on a list and fit the key, the key
# comes from the issuer's set and from nowhere else (`jwk`, `jku`, `x5u` are not looked at), and
# issuer, audience and expiry are never optional.
#
# `owner` is asked on the loop and never waits. A key that it lacks makes it raise KeysNeeded, the
# wiring holds the request, and a thread fetches the set: at most every 10 s, whatever the tokens
# say, or everybody could make Atrax flood the issuer.

# alg: key type and curve that it needs (RFC 7518, 3.1; RFC 8037).
_ALGORITHMS: Final = {
    "RS256": ("RSA", ""), "RS384": ("RSA", ""), "RS512": ("RSA", ""),
    "PS256": ("RSA", ""), "PS384": ("RSA", ""), "PS512": ("RSA", ""),
    "ES256": ("EC", "P-256"), "ES384": ("EC", "P-384"), "ES512": ("EC", "P-521"),
    "EdDSA": ("OKP", "Ed25519"),
}  # fmt: skip
_JWT_TYPES: Final = ("", "jwt", "at+jwt", "application/at+jwt")  # no logout token, no DPoP proof
_LEEWAY: Final = 30  # s that the issuer's clock may be ahead of ours (nbf, iat)
_RSA_BITS: Final = range(2048, 8193)  # RFC 7518, 3.3; a larger key holds the loop
_KEYS: Final = 100  # of one set that are looked at
_TRIED: Final = 4  # keys for a token that does not name its own
_KEY_SET: Final = 256 * 1024  # bytes
_FETCH_TIME: Final = 10.0  # s for one fetch
_FETCH_PAUSE: Final = 10.0  # s from the start of one to the start of the next
_FETCH_AGAIN: Final = 600.0  # s; so long a key that was withdrawn may be used
_HELD_REQUESTS: Final = 1000  # requests that wait for keys …
_HELD_FOR: Final = 5.0  # … s at most
_SCOPES: Final = 10_000  # sets of scopes that tokens come with
_VERIFIED: Final = 10_000  # tokens that are remembered until they expire
_WELL_KNOWN: Final = "/.well-known/oauth-protected-resource"
_RESOURCE: Final = re.compile(r"(/servers/[A-Za-z0-9_-]{1,64})?/mcp")


@dataclasses.dataclass(frozen=True, slots=True)
class _Key:
    """A public key of the issuer."""

    kid: str | None
    kind: tuple[str, str]  # as in _ALGORITHMS
    alg: str | None  # the only algorithm it is for
    key: Any  # of `cryptography`, which is imported when there is a key


def read_keys(data: bytes) -> list[_Key]:
    """The keys of a JWK set (RFC 7517) that can verify tokens; raises ValueError where it has none."""
    try:
        document = json.loads(data)
    except RecursionError:
        raise ValueError("no JWK set: nested too deep") from None
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ValueError('no JWK set: {"keys": [ … ]} is needed')
    keys = [key for entry in entries[:_KEYS] if (key := _read_key(entry)) is not None]
    if not keys:
        raise ValueError(f"none of its {len(entries)} keys can verify tokens here")
    return keys


def _read_key(entry: Json) -> _Key | None:
    """None for what is no signature key of ours: symmetric, private, for encryption, weak, unknown."""
    import jwt

    try:
        if "d" in entry or entry.get("use", "sig") != "sig":
            return None
        kind = (entry["kty"], "" if entry["kty"] == "RSA" else entry.get("crv"))
        fitting = [name for name, needs in _ALGORITHMS.items() if needs == kind]
        alg, kid = entry.get("alg"), entry.get("kid")
        if alg not in (None, *fitting) or "verify" not in entry.get("key_ops", ["verify"]):
            return None
        key = jwt.PyJWK(entry, fitting[0]).key
    except (jwt.PyJWTError, AttributeError, LookupError, TypeError, ValueError):
        return None
    if kind[0] == "RSA" and key.key_size not in _RSA_BITS:
        return None
    return _Key(kid if isinstance(kid, str) else None, _ALGORITHMS[fitting[0]], alg, key)


def _download(url: str) -> bytes:
    """What is at `url`. Raises OSError, ValueError, HTTPException. In a thread of its own.

    No redirects, no proxy of the environment, no other scheme: the config says where the keys are."""
    import http.client

    where, until = urllib.parse.urlsplit(url), time.monotonic() + _FETCH_TIME
    kinds = {"https": http.client.HTTPSConnection, "http": http.client.HTTPConnection}
    connection = kinds[where.scheme.lower()](where.netloc, timeout=_FETCH_TIME / 2)

    def cut() -> None:
        with contextlib.suppress(OSError, AttributeError):  # it has ended, or not begun
            connection.sock.shutdown(socket.SHUT_RDWR)

    # Its timeout is for one read. A server that trickles, headers too, would hold this thread for
    # ever, and the next fetch the next one.
    end = threading.Timer(_FETCH_TIME, cut)
    end.daemon = True
    end.start()
    try:
        headers = {"Accept": "application/json", "User-Agent": f"atrax/{VERSION}"}
        target = (where.path or "/") + (f"?{where.query}" if where.query else "")
        connection.request("GET", target, headers=headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise ValueError(f"HTTP {answer.status} {answer.reason}"[:200])
        data: bytes = answer.read(_KEY_SET + 1)
    finally:
        end.cancel()
        connection.close()
        if time.monotonic() > until:
            raise ValueError(f"took more than {_FETCH_TIME:g} s")
    if len(data) > _KEY_SET:
        raise ValueError(f"more than {_KEY_SET} bytes")
    return data


class Keys:
    """The issuer's public keys: given with the config, or fetched when one is missing and now and then."""

    def __init__(self, source: str, record: Record) -> None:
        self.source, self._record = source, record
        self.remote = _REMOTE.match(source) is not None
        self.generation = 0  # another one: the keys are others
        self._keys = [] if self.remote else read_keys(source.encode())
        self._data = b""
        self._round, self._began, self._under_way = 0, -math.inf, False
        self._due: asyncio.TimerHandle | None = None
        self._waiting: dict[int, tuple[Callable[[bool], None], asyncio.TimerHandle]] = {}
        self._tickets = itertools.count()

    def __bool__(self) -> bool:
        return bool(self._keys)

    def knows(self, kid: str) -> bool:
        """Whether there is a key of that name, for whatever algorithm."""
        return any(key.kid == kid for key in self._keys)

    def fitting(self, kid: str | None, alg: str) -> list[Any]:
        """The keys that may have signed a token with this header."""
        kind = _ALGORITHMS[alg]
        return [
            key.key
            for key in self._keys
            if key.kind == kind and key.alg in (None, alg) and kid in (None, key.kid)
        ][:_TRIED]

    def wait(self, ready: Callable[[bool], None]) -> Callable[[], None] | None:
        """Fetch the keys as soon as that is allowed, then call `ready`: whether they could be had.

        What is returned takes it back. None: too many wait already."""
        if len(self._waiting) >= _HELD_REQUESTS:
            return None
        loop, ticket = asyncio.get_running_loop(), next(self._tickets)

        def leave() -> None:
            _, timer = self._waiting.pop(ticket)
            timer.cancel()

        def late() -> None:
            del self._waiting[ticket]
            ready(False)

        self._waiting[ticket] = (ready, loop.call_later(_HELD_FOR, late))
        self._fetch_soon(loop)
        return leave

    def wake(self, now: float) -> None:
        """Fetch when it is time; `now` is the loop's."""
        if self.remote and now - self._began > (_FETCH_AGAIN if self._keys else _FETCH_PAUSE):
            self._fetch_soon(asyncio.get_running_loop())

    def _fetch_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        # A fetch that hangs, in the name look-up for example, must not be the last one.
        hangs = loop.time() - self._began > 2 * _FETCH_TIME
        if self._due is None and (hangs or not self._under_way):
            pause = self._began + _FETCH_PAUSE - loop.time()
            self._due = loop.call_later(max(0.0, pause), self._fetch, loop)

    def _fetch(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due, self._under_way, self._began = None, True, loop.time()
        self._round += 1
        # A daemon, and no executor's thread: the end of Atrax would wait for it.
        load = threading.Thread(target=self._load, args=(loop, self._round), daemon=True)
        load.start()

    def _load(self, loop: asyncio.AbstractEventLoop, turn: int) -> None:
        data, keys, why = b"", list[_Key](), ""
        try:
            data = _download(self.source)
            keys = read_keys(data)
        except Exception as error:  # whatever it is, somebody waits for an answer
            why = str(error) or type(error).__name__
        try:
            loop.call_soon_threadsafe(self._loaded, loop, turn, data, keys, why)
        except RuntimeError:
            return  # the loop has ended meanwhile

    def _loaded(
        self, loop: asyncio.AbstractEventLoop, turn: int, data: bytes, keys: list[_Key], why: str
    ) -> None:
        if turn != self._round:
            return
        self._under_way = False
        if keys and data != self._data:
            self._keys, self._data = keys, data
            self.generation += 1
            names = ", ".join(key.kid or "one without kid" for key in keys)
            self._record.emit("auth.keys", message=f"{self.source}: the issuer's keys: {names}")
        elif not keys:
            then = (
                "those of before stay" if self._keys else "until they can be had, nobody comes in"
            )
            message = f"{self.source}: no keys from the issuer: {why}; {then}"
            self._record.alarm("auth.keys_failed", message)
        waiting, self._waiting = self._waiting, {}
        for ready, timer in waiting.values():
            timer.cancel()
            ready(bool(keys))


class _Refused(Exception):
    """A token that is not valid here; the text is for the log alone."""


class _UnknownKey(Exception):
    """A token that nobody can judge: the key that it names, or every key, is missing."""


class _OAuth:
    """Tokens of one issuer: what they must be, and what their scopes come to."""

    def __init__(self, config: Config, record: Record, before: _OAuth | None) -> None:
        auth = config.auth
        self.issuer, self._audience = auth.issuer or "", auth.audience
        source = auth.jwks or ""
        try:
            same = before is not None and before.keys.source == source
            self.keys: Keys = before.keys if before is not None and same else Keys(source, record)
        except ValueError as error:
            raise UsageError(f"auth.jwks: {error}") from None
        self.grants: dict[str, Scope] | None = None
        if auth.grants is not None:
            self.grants = {name: scope_of(config, rights) for name, rights in auth.grants.items()}
        self._auth = auth
        self._verified: dict[bytes, Owner] = {}
        # Handed on as long as a token means what it meant: `issued` knows a scope by it.
        kept = before is not None and before._auth == auth and before.grants == self.grants
        self._scopes: dict[frozenset[str], Scope] = before._scopes if before and kept else {}
        # Likewise the same object: tokens come in while a reload makes the next one of us.
        self._issued: set[int] = before._issued if before and kept else set()
        self._generation = self.keys.generation

    def issued(self, scope: Scope) -> bool:
        """Whether `scope` is that of a token which still means the same. Its scopes by name were not
        kept, so a change of `auth` ends what all of them opened."""
        return id(scope) in self._issued

    def owner(self, digest: bytes, request: HttpRequest) -> Owner:
        """Whose token this is, expired or not; raises _Refused or _UnknownKey."""
        if self._generation != self.keys.generation or len(self._verified) >= _VERIFIED:
            self._verified.clear()
            self._generation = self.keys.generation
        owner = self._verified.get(digest)
        if owner is None:
            match = _BEARER.fullmatch(request.headers["authorization"])
            if match is None:
                raise _Refused("malformed")
            claims = self._claims(match[1])
            owner = self._verified[digest] = self._read(claims)
        if owner.expires <= time.time():
            del self._verified[digest]
        return owner

    def _claims(self, token: str) -> dict[str, Json]:
        if not self.keys:
            raise _UnknownKey
        import jwt

        try:
            header = jwt.get_unverified_header(token)
            keys = self._keys(header)
            for at, key in enumerate(keys, 1):
                try:
                    return self._checked(token, key, header["alg"])
                except jwt.InvalidSignatureError:
                    if at == len(keys):
                        raise
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise _Refused(str(error)) from None
        raise _Refused(f"there is no key for {header['alg']}")

    def _keys(self, header: dict[str, Json]) -> list[Any]:
        """The keys that may have signed a token with `header`; nobody has checked that yet."""
        alg, kid, kind = header.get("alg"), header.get("kid"), header.get("typ") or ""
        if not isinstance(alg, str) or alg not in _ALGORITHMS:
            raise _Refused("signed with an algorithm that is not accepted")
        if "crit" in header or not isinstance(kind, str) or kind.lower() not in _JWT_TYPES:
            raise _Refused("of a type that is no access token")
        if kid is not None and self.keys.remote and not self.keys.knows(kid):
            raise _UnknownKey
        return self.keys.fitting(kid, alg)

    def _checked(self, token: str, key: Any, alg: str) -> dict[str, Json]:
        """The claims of `token`, all of them right but, maybe, its expiry; raises PyJWTError."""
        import jwt

        return jwt.decode(
            token, key, algorithms=[alg], audience=self._audience, issuer=self.issuer,
            leeway=_LEEWAY, options={"require": ["exp", "iss", "aud"], "verify_exp": False},
        )  # fmt: skip

    def _read(self, claims: Mapping[str, Json]) -> Owner:
        expires, who = claims["exp"], claims.get("sub") or claims.get("client_id")
        # NaN, which is never past, is not within.
        if not isinstance(expires, (int, float)) or not 1 < expires < 1e12:
            raise _Refused("exp is no time in seconds")
        # It will stand in logs, and as a key in tables.
        if not isinstance(who, str) or len(who) > 256 or not who.isprintable():
            raise _Refused("neither sub nor client_id names a principal")
        return Owner(who, scope=self._scope(claims), expires=expires)

    def _scope(self, claims: Mapping[str, Json]) -> Scope:
        grants = self.grants or {}
        said = claims.get("scope", claims.get("scp", ""))
        names = said.split(" ") if isinstance(said, str) else said if isinstance(said, list) else []
        given = frozenset(name for name in names if isinstance(name, str) and name in grants)
        # Made once for each set, so that what others keep by scope is found again.
        scope = self._scopes.get(given)
        if scope is None:
            if len(self._scopes) >= _SCOPES:
                self._scopes.clear()
                self._issued.clear()
                self._verified.clear()  # they come with scopes that are not issued any more
            union = frozenset[Grant]().union(*(grants[name].grants for name in given))
            scope = self._scopes[given] = Scope([Grant()] if self.grants is None else union)
            self._issued.add(id(scope))
        return scope


class Identity:
    """Decides who may send requests.

    `before`: the one that this one replaces at a reload; what it learnt of attackers goes on, and the
    issuer's keys. Raises UsageError for keys in the config that are none."""

    def __init__(
        self, config: Config, before: Identity | None = None, record: Record | None = None
    ) -> None:
        scheme, _, rest = (config.public_url or "").partition("://")
        public = rest.partition("/")[0]
        # Without its port too: proxies pass either on (nginx: $http_host, $host).
        hosts = [*config.allowed_hosts, public, _without_port(public)]
        # 0.0.0.0 is no name that a client should use, and browsers connect it to this machine.
        if config.host not in _ANY_ADDRESS:
            hosts.append(config.host)
        self._hosts = frozenset(_bracketed(host.lower()) for host in hosts if host)
        # Direct connections come to these, so the scheme of a page there is known.
        self._own = frozenset({_bracketed(config.host.lower())}) - set(_ANY_ADDRESS)
        origins = [*config.allowed_origins, *([f"{scheme}://{public}"] if public else [])]
        self._origins = frozenset(map(_spelled, origins))
        self._accepted: set[str] = set()
        self._type = config.auth.type
        # What clients call this gateway, without the path of an endpoint; else Host says it.
        self._base = (config.public_url or "").rstrip("/").removesuffix("/mcp")
        # Whoever reaches the port may call, and nobody was asked for a proof (`operate`).
        self._unproved = not config.asks_who and not config.trusted_proxies
        # Made once, so that what others keep by owner or scope is found again.
        self._tokens = {
            token.digest: Owner(
                token.name,
                scope=scope_of(config, token),
                expires=math.inf if token.expires is None else token.expires,
                admin=token.admin,
            )
            for token in config.auth.tokens
        }
        self._wrong: WrongTokens = WrongTokens() if before is None else before._wrong
        self._record: Record = record or (Record() if before is None else before._record)
        self._oauth: _OAuth | None = None
        if self._type == "oauth":
            self._oauth = _OAuth(config, self._record, before._oauth if before else None)
        proxies = [one for one in config.trusted_proxies if one != "unix"]
        self._proxies = [ipaddress.ip_network(one) for one in proxies]
        # Only where there is one: a TCP peer that has gone by the time we look has no address either.
        self._unix = config.socket is not None and "unix" in config.trusted_proxies
        self.proxied = bool(config.trusted_proxies)  # else `unveil` has nothing to do
        self.trusts = functools.lru_cache(_PEERS)(self._trusts)
        self._certified = config.tls is not None and config.tls.client_ca is not None

    def unveil(self, request: HttpRequest) -> None:
        """Make `request` what it was before trusted proxies passed it on: the client's address,
        scheme and Host, and the id that it has there. Of other peers nothing is believed, and
        `Forwarded` of nobody.

        Each proxy appends to X-Forwarded-For, so the list is true from the right, as far as who
        wrote an entry is trusted: what is left of the first stranger is the stranger's own word.
        Of the other two the last one counts, which our peer wrote."""
        if not self.trusts(request.address):
            return
        headers = request.headers
        rest = headers.get("x-forwarded-for", "")
        while rest and self.trusts(request.address):
            rest, _, entry = rest.rpartition(",")
            address = _address(entry.strip()) if len(entry) <= _LONGEST_ENTRY else ""
            if not address:
                break  # who wrote this is trusted, and the last whom we know
            request.address = address
        scheme = headers.get("x-forwarded-proto", "").rpartition(",")[2].strip().lower()
        if scheme in _DEFAULT_PORTS:
            request.secure = scheme == "https"
        if _REQUEST_ID.fullmatch(ident := headers.get("x-request-id", "")):
            request.id = ident  # one id for the logs of both
        host = headers.get("x-forwarded-host", "").rpartition(",")[2].strip()
        if host and host != headers.get("host"):
            # A copy: the next one with this head may come from somebody else (HttpRequest.facts).
            request.headers, request.facts = {**headers, "host": host}, {}

    def check(self, request: HttpRequest) -> Owner:
        """Who sent `request`, without a session; raises HttpError 403, 401 or 429.

        1. Host: else a rebound name could pass for the page's own origin in 2. 2. Origin, where
        there is one. 3. Who it is. No rung: the path, since nothing is open but what the caller
        does not bring here (/health, /ready)."""
        self.admit(request)
        return self.owner(request)

    def admit(self, request: HttpRequest) -> None:
        """The first two rungs; raises HttpError 403 for a foreign Host or Origin."""
        headers = request.headers
        host = headers.get("host", "")
        if host not in self._accepted:
            self._check_host(host)
        origin = headers.get("origin")
        if origin is not None and not self._admits(origin, request):
            message = 'this Origin is not allowed; to allow a web page add it to "allowed_origins"'
            raise HttpError(403, message, event="origin.refused")

    def owner(self, request: HttpRequest) -> Owner:
        """The last rung; raises HttpError 401, or 429 for an address that guesses.

        Only the Authorization header is looked at: a URL stands in logs, histories and Referer."""
        if self._type == "none":
            return Owner(request.certificate) if self._certified else ANONYMOUS
        # The digest follows from the head alone, so it is found once (HttpRequest.facts).
        digest = request.facts.get("bearer") or _bearer(request)
        if digest is None:
            raise self._unproven(request)
        if self._oauth is None:
            # No time tells of a secret here: a dict compares keyed hashes of digests, and only an
            # equal one to the byte. A secret that begins like another has nothing in common with it.
            owner = self._tokens.get(digest)
            if owner is None:
                raise self._wrong_token(request, "unknown")
        else:
            owner = self._verified(self._oauth, digest, request)
        # Not counted as wrong: it is no guess, and who gets 429 would not fetch a new one.
        if owner.expires <= time.time():
            raise self._unproven(request, "the token has expired", principal=owner.principal)
        if not owner.scope.grants:
            raise self._insufficient(request, owner)
        return owner

    def _verified(self, oauth: _OAuth, digest: bytes, request: HttpRequest) -> Owner:
        try:
            return oauth.owner(digest, request)
        except _UnknownKey:
            if oauth.keys:
                raise KeysNeeded(lambda: self._wrong_token(request, "an unknown key")) from None
            raise KeysNeeded(keys_missing) from None
        except _Refused as refused:
            raise self._wrong_token(request, str(refused)) from None

    def _wrong_token(self, request: HttpRequest, reason: str) -> HttpError:
        """The answer to a token that is none; `reason` is for the log."""
        if wait := self._wrong.add(request.address, time.monotonic()):
            text = f"too many wrong tokens from here; try again in {wait} s"
            return HttpError(429, text, [("Retry-After", str(wait))], "auth.slowed", reason=reason)
        return self._unproven(request, "the token is not valid here", reason=reason)

    def wait(self, ready: Callable[[bool], None]) -> Callable[[], None] | None:
        """After KeysNeeded: as `Keys.wait`."""
        return self._oauth.keys.wait(ready) if self._oauth else None

    def wake(self, now: float) -> None:
        """Fetch the issuer's keys when it is time; `now` is the loop's."""
        if self._oauth is not None:
            self._oauth.keys.wake(now)

    def metadata(self, request: HttpRequest) -> bytes | None:
        """The protected resource metadata at the path of `request` (RFC 9728, 2); None: none is there.

        For each name that a server can have, since the document needs no token."""
        path = request.path
        if self._oauth is None or not path.startswith(_WELL_KNOWN):
            return None
        base = self._called(request)
        # RFC 9728, 3.1 puts the well-known part before the path of public_url.
        own = urllib.parse.urlsplit(base).path
        resource = path.removeprefix(_WELL_KNOWN).removesuffix("/").removeprefix(own)
        if resource and not _RESOURCE.fullmatch(resource):
            return None
        document: dict[str, Json] = {
            "resource": base + resource,
            "authorization_servers": [self._oauth.issuer],
            "bearer_methods_supported": ["header"],
            "resource_name": "Atrax",
        }
        if self._oauth.grants is not None:
            document["scopes_supported"] = list(self._oauth.grants)
        return encode(document)

    def step_up(self, owner: Owner, server: str, tool: str) -> Error | None:
        """What to answer where the scope of `owner` alone keeps it from `tool` of `server` ("": from
        its prompts and all else); None: no scope of the config would help."""
        if self._oauth is None or self._oauth.grants is None:
            return None
        grants = self._oauth.grants
        helps = [
            n for n, s in grants.items() if (s.tool(server, tool) if tool else s.whole(server))
        ]
        if not tool and not owner.scope.sees(server):
            helps += [name for name, scope in grants.items() if scope.sees(server)]
        if not helps:
            return None
        more = helps[0]
        # The scopes it has too: some clients ask for what a challenge names and lose the others.
        names = [name for name, scope in grants.items() if owner.scope.covers(scope)]
        place = f"{self._base}{_WELL_KNOWN}/mcp" if self._base else ""
        text = f'this needs the scope "{more}"'
        error = own_error(NOT_ALLOWED, text, "scope", scope=more)
        error.status = 403
        error.challenge = _challenge("insufficient_scope", text, [*names, more], place)
        return error

    def stands(self, owner: Owner, now: float) -> bool:
        """Whether what `owner` opened, a stream, a session or a parked call, may go on; `now`: epoch.

        After a reload: the principal is still there and has lost nothing. And it has not expired."""
        if owner.expires <= now:
            return False
        if self._oauth is not None:
            return self._oauth.issued(owner.scope)
        if self._type == "none":
            return (owner.principal == ANONYMOUS.principal) is not self._certified
        return any(
            same.principal == owner.principal
            and same.expires > now
            and same.scope.covers(owner.scope)
            and same.admin >= owner.admin
            for same in self._tokens.values()
        )

    def _unproven(self, request: HttpRequest, wrong: str = "", **fields: Json) -> HttpError:
        """401 with its challenge (RFC 6750, 3); `wrong`: what is the matter with the token, if one was sent."""
        oauth = self._oauth
        scopes, place = list(oauth.grants or ()) if oauth else (), self._place(request)
        challenge = _challenge("invalid_token" if wrong else "", wrong, scopes, place)
        headers = [("WWW-Authenticate", challenge)]
        if wrong:
            whom = oauth.issuer if oauth else "whoever runs this gateway"
            text = f"{wrong}; ask {whom} for one"
            return HttpError(401, text, headers, "auth.failed", **fields)
        text = 'a token is needed: send the header "Authorization: Bearer TOKEN"; '
        if oauth:
            text += f"{oauth.issuer} gives one (see {place})"
        else:
            text += "whoever runs this gateway makes one with: python atrax.pyz token NAME"
        return HttpError(401, text, headers)

    def _insufficient(self, request: HttpRequest, owner: Owner) -> HttpError:
        """403 for a token whose scopes allow nothing at all, with those that would."""
        text = "the token has none of the scopes that allow something here"
        scopes = list(self._oauth.grants or ()) if self._oauth else ()
        challenge = _challenge("insufficient_scope", text, scopes, self._place(request))
        headers = [("WWW-Authenticate", challenge)]
        return HttpError(403, text, headers, principal=owner.principal)

    def _called(self, request: HttpRequest) -> str:
        """The URL of this gateway for who sent `request`, whose Host was checked."""
        scheme = "https" if request.secure else "http"
        return self._base or f"{scheme}://{request.headers.get('host', 'localhost').lower()}"

    def _place(self, request: HttpRequest) -> str:
        """The URL of the metadata for the endpoint of `request`; "" without oauth.

        Behind the path of public_url, which leads here whatever else the proxy does."""
        if self._oauth is None:
            return ""
        resource = request.path if _RESOURCE.fullmatch(request.path) else ""
        return self._called(request) + _WELL_KNOWN + resource

    def operate(self, request: HttpRequest, owner: Owner) -> None:
        """Raises HttpError 403 unless `owner` may change how servers run (DESIGN, HTTP).

        Without auth it must sit at this machine: no proxy, which would bring anybody here."""
        host = _without_port(request.headers.get("host", "").lower())
        local = is_loopback(request.address) and _LOOPBACK.fullmatch(host) is not None
        passed_on = any(
            name in ("forwarded", "via") or name.startswith("x-forwarded-")
            for name in request.headers
        )
        if owner.admin or (self._unproved and local and not passed_on):
            return
        text = "this needs a token with `admin`; without auth, a client on this machine, no proxy"
        raise HttpError(403, text, event="operation.refused", principal=owner.principal)

    def cors(self, request: HttpRequest) -> list[tuple[str, str]]:
        """What a response needs so that a page at an allowed origin can read it. After `check`."""
        origin = request.headers.get("origin")
        if origin is None:
            return []
        return [
            ("Access-Control-Allow-Origin", origin),
            (
                "Access-Control-Expose-Headers",
                "Mcp-Session-Id, Retry-After, WWW-Authenticate, X-Request-Id",
            ),
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
            message = 'this Host is not allowed; to serve under this name add it to "allowed_hosts"'
            raise HttpError(403, message, event="host.refused")
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

    def _trusts(self, address: str) -> bool:
        """Whether the peer at `address` is one of `trusted_proxies`; "" is who uses the socket."""
        if not address:
            return self._unix
        try:
            known = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(known in network for network in self._proxies)


def keys_missing() -> HttpError:
    """The answer where nobody can say yet whether a token is right."""
    text = "the issuer's keys cannot be had at the moment; try again"
    return HttpError(503, text, [("Retry-After", "5")], "auth.keys_missing")


def _challenge(error: str, description: str, scopes: Sequence[str], place: str) -> str:
    """A value of WWW-Authenticate (RFC 6750, 3; RFC 9728, 5.1)."""
    words = {
        "realm": "atrax",
        "error": error,
        # In quotes, and without any inside.
        "error_description": description.replace('"', "'"),
        "scope": " ".join(dict.fromkeys(scopes)),
        "resource_metadata": place,
    }
    return "Bearer " + ", ".join(f'{word}="{value}"' for word, value in words.items() if value)


def _bearer(request: HttpRequest) -> bytes | None:
    """SHA-256 of the token in `request`; None if there is none.

    Another scheme than Bearer is none. Two headers in one never match (RFC 9110, 5.3)."""
    value = request.headers.get("authorization")
    if value is None or not value[:7].lower().startswith("bearer"):
        return None
    match = _BEARER.fullmatch(value)
    # What is malformed gets a digest that no token can have.
    digest = hashlib.sha256(match[1].encode()).digest() if match else b"malformed"
    request.facts["bearer"] = digest
    return digest


@functools.lru_cache(_PEERS)
def _address(text: str) -> str:
    """An entry of X-Forwarded-For without its port, in one spelling; "" if it is none."""
    if match := _WITH_PORT.fullmatch(text):
        text = match[1] or match[2]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return ""  # RFC 7239, 6: "unknown", or a name that hides the client
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return ""  # any text may stand there
        address = address.ipv4_mapped or address
    return str(address)


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
# one function that knows both eras is `_is_modern`.
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
_INTRODUCTION: Final = 2**16  # bytes of an initialize: what it says is kept as long as its session
_BATCH: Final = 100  # messages in a batch; 4 MiB would hold 100,000 calls
_KEPT: Final = 4 * 2**20  # bytes that one session's resumption store holds …
_KEPT_EVENTS: Final = 1000  # … and events …
_KEPT_ALL: Final = 32 * 2**20  # … and bytes of all sessions together
_LINGER: Final = 60.0  # seconds that a finished stream may still be fetched
_RETRY_MS: Final = 1000  # milliseconds after which a client should fetch a broken stream again
_ANSWERS_KEPT: Final = 16 * 2**20  # bytes of answers that repeated retries get from memory

_JSON: Final = (("Content-Type", "application/json"),)
_RANK: Final = {level: rank for rank, level in enumerate(LOG_LEVELS)}
_NOTHING: Final[Mapping[str, Json]] = {}
_INPUT_REQUIRED: Final = {"resultType": "input_required"}
_COMPLETE_NOTICE: Final = "notifications/elicitation/complete"

# Which methods a server may answer by asking, and which results a client may keep (2026-07-28,
# basic/patterns/mrtr and server/utilities/caching).
_ASKABLE: Final = frozenset({"tools/call", "prompts/get", "resources/read"})
_CACHEABLE: Final = frozenset({
    "server/discover", "tools/list", "prompts/list", "resources/list", "resources/templates/list",
    "resources/read",
})  # fmt: skip
_ERA_META: Final = frozenset({
    META_VERSION, META_CLIENT, META_CAPABILITIES, META_LOG_LEVEL, "progressToken",
})  # fmt: skip


# ---- Whose it is, and for how long ----
# What a client opens and leaves open stands on the token that it came with: streams (listens, the
# GET of a session, HTTP+SSE), sessions, parked calls. A session takes a newer token of its principal
# as its own, and so does a parked call with its retry. When that token expires they end, with what
# they have open; calls that run may finish. When a reload takes the token away, or some of its
# rights, calls end too. Nobody looks at all of them five times a second: `Clients.expiry` is the
# first moment at which anything may have to end.

_Fallen: TypeAlias = Callable[[Owner], bool]  # whether what an owner opened has to end


def _unexpired(owner: Owner, now: float) -> bool:
    return owner.expires > now


# ---- What both eras need of HTTP ----

# RFC 8259, 8.1: in UTF-8 alone. Another charset would be another text to a filter in front.
_JSON_TYPE: Final = re.compile(
    r'application/json[ \t]*(?:;(?![ \t]*charset(?![ \t]*=[ \t]*"?utf-8"?[ \t]*(?:;|$)))[^;]*)*',
    re.IGNORECASE,
)


@dataclasses.dataclass(slots=True)
class _Visit:
    """One HTTP request at an MCP path: who sends it, to which endpoint; what of it is known by now."""

    request: HttpRequest
    reply: Reply
    owner: Owner  # with the session, once that is known
    endpoint: str
    value: Json = None  # the decoded body
    session: _Session | None = None
    version: str = ""


def _accepts(accept: str, *kinds: str) -> bool:
    """Whether an Accept header allows all `kinds`. Quality is not weighed: each answer has one form."""
    named = {part.partition(";")[0].strip(" \t").lower() for part in accept.split(",")}
    return all(named & {kind, f"{kind.partition('/')[0]}/*", "*/*"} for kind in kinds)


def _check_post(headers: Mapping[str, str]) -> None:
    """The media types of a POST; raises HttpError 415, 406. A missing Accept allows everything."""
    kind = headers.get("content-type", "")
    plain = kind == "application/json"  # most often: nothing to take apart
    if not plain and not _JSON_TYPE.fullmatch(kind):
        wanted = "application/json, which is UTF-8"
        raise HttpError(415, f"a POST to this endpoint is JSON: send Content-Type: {wanted}")
    if "content-encoding" in headers:  # who unpacks it in front of us would read another body
        wants = [("Accept-Encoding", "identity")]  # RFC 9110, 15.5.16
        raise HttpError(415, "a body is taken as it is, without Content-Encoding", wants)
    accept = headers.get("accept", "*/*")
    if accept == "application/json, text/event-stream":
        return
    if not _accepts(accept, "application/json", "text/event-stream"):
        wanted = "application/json, text/event-stream"
        raise HttpError(406, f"an answer is JSON or an event stream: send Accept: {wanted}")


def _check_get(headers: Mapping[str, str]) -> None:
    """The media type of a GET; raises HttpError 406."""
    if not _accepts(headers.get("accept", "*/*"), "text/event-stream"):
        raise HttpError(406, "this is an event stream: send Accept: text/event-stream")


def _ident(value: Json) -> int | str | None:
    """The id of a message that is wrong otherwise, so that its error can carry it (trap 8)."""
    ident = value.get("id") if isinstance(value, dict) else None
    return ident if isinstance(ident, (int, str)) and not isinstance(ident, bool) else None


def _retry_after(error: Error) -> tuple[tuple[str, str], ...]:
    """The header that 429 and 503 come with (RFC 9110, section 10.2.3), or 403 (RFC 6750, 3.1)."""
    if error.challenge:
        return (("WWW-Authenticate", error.challenge),)
    detail = error.data.get("atrax") if isinstance(error.data, dict) else None
    wait = detail.get("retryAfter") if isinstance(detail, dict) else None
    return (("Retry-After", str(max(1, round(wait)))),) if isinstance(wait, (int, float)) else ()


def _take_meta(params: dict[str, Json]) -> int | str | None:
    """Take what belongs to an era out of `_meta`; gives the progressToken. Raises RpcError."""
    if "_meta" not in params:
        return None
    meta = params["_meta"]
    if not isinstance(meta, dict):
        raise RpcError(INVALID_PARAMS, "params._meta must be an object")
    token: int | str | None = meta.get("progressToken")
    if type(token) not in (str, int) and "progressToken" in meta:  # True is an int too
        text = "params._meta.progressToken must be a string or an integer"
        raise RpcError(INVALID_PARAMS, text)
    if meta.keys() <= _ERA_META:  # nearly always
        del params["_meta"]
        return token
    for key in _ERA_META:
        meta.pop(key, None)
    return token


_Item = TypeVar("_Item")


def _due(waiting: dict[_Item, float], now: float) -> Iterator[_Item]:
    """Take out what is due. Each dict has one delay and time only grows: the first is due first."""
    early = itertools.takewhile(lambda entry: entry[1] <= now, waiting.items())
    for item, _ in list(early):
        if waiting.pop(item, None) is not None:
            yield item


class _Feed:
    """One event stream on the wire.

    A slow reader harms itself alone: while it stalls, progress and log messages wait here, 1 MiB at
    most, and the oldest are dropped (DESIGN, One event loop). What must arrive is always written;
    Http bounds that by cutting a reader that takes nothing for 30 s."""

    __slots__ = ("edge", "reply", "size", "waiting")

    def __init__(self, edge: Clients, reply: Reply) -> None:
        self.edge, self.reply, self.size = edge, reply, 0
        self.waiting: deque[bytes] | None = None
        reply.head(200, SSE_HEADERS)
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


@dataclasses.dataclass(slots=True, eq=False)
class _Caller:
    """A sink whose handle comes when `open` returns, while notes, asks and the end may come before."""

    handle: Handle | None = dataclasses.field(default=None, init=False)
    early: list[Callable[[Handle], None]] | None = dataclasses.field(default=None, init=False)

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
        else:
            self.early = [*(self.early or ()), act]

    def answer(self, ask: Ask, outcome: Outcome) -> None:
        self.act(lambda handle: handle.answer(ask, outcome))

    def cancel(self, reason: str) -> None:
        self.act(lambda handle: handle.cancel(reason))


# ---- Asks: what may be asked, and what is an answer ----

_ASKED_OF: Final = {
    "elicitation/create": "elicitation", "sampling/createMessage": "sampling", "roots/list": "roots",
}  # fmt: skip


def _undeclared(
    method: str, params: dict[str, Json], declared: dict[str, Json]
) -> dict[str, Json] | None:
    """The capabilities that a client would need for this ask, {} if there is none, None if it has them.

    Who did not declare `elicitation.url`, `sampling.tools` or `sampling.context` has not declared
    that kind (PROTOCOL, Joining); an empty `elicitation` means forms (2025-11-25, client/elicitation)."""
    kind, modes = _ASKED_OF.get(method), []
    if kind is None:
        return {}
    known = declared.get(kind)
    if kind == "elicitation":
        if params.get("mode") == "url":
            modes = ["url"]
        elif isinstance(known, dict) and "url" in known:
            modes = ["form"]
    elif kind == "sampling":
        modes = ["tools"] if "tools" in params or "toolChoice" in params else []
        modes += ["context"] if params.get("includeContext", "none") != "none" else []
    if not isinstance(known, dict):
        return {kind: {mode: {} for mode in modes}}
    lacking: dict[str, Json] = {mode: {} for mode in modes if mode not in known}
    return {kind: lacking} if lacking else None


def _add(needed: dict[str, Json], more: dict[str, Json]) -> None:
    """Add the capabilities `more` to those needed."""
    for kind, modes in more.items():
        needed[kind] = {**needed.get(kind, {}), **modes}


def _failed(text: str, code: int = INTERNAL_ERROR) -> Outcome:
    """The answer to an ask that nobody can or will answer."""
    return Outcome(error=Error(code, text))


def _refusal(ask: Ask, needed: dict[str, Json]) -> Outcome:
    """What a child is told whose ask the client cannot answer."""
    names = [".".join((kind, *modes)) for kind, modes in needed.items()]
    why = f"the client did not declare {names[0]}" if names else "no client knows this request"
    return _failed(f"{ask.method}: {why}", METHOD_NOT_FOUND)


def _unanswered(ask: Ask) -> Outcome:
    """What a child is told when the client has not answered within `limits.park`."""
    if ask.method == "elicitation/create":
        return Outcome(result={"action": "cancel"})
    return _failed(f"{ask.method}: the client did not answer in time (limits.park)")


def _wrong_question(result: dict[str, Json]) -> Error | None:
    """What is wrong with a child's `input_required` result (InputRequiredResult)."""
    requests, state = result.get("inputRequests"), result.get("requestState")
    if requests is None and isinstance(state, str):
        return None
    right = isinstance(requests, dict) and all(
        isinstance(item, dict)
        and isinstance(item.get("method"), str)
        and isinstance(item.get("params", {}), dict)
        for item in requests.values()
    )
    if right and isinstance(state, (str, type(None))):
        return None
    return Error(INTERNAL_ERROR, "the server sent an input_required result that is none")


def _note_for(token: Json, level: str | None, notice: Notice) -> bytes | None:
    """A note as the client of a call hears it, by the token and the level that it gave; None: not at all."""
    method, params = notice.method, notice.params
    if method == "notifications/progress":
        if token is None:
            return None
        notice = Notice(method, {**params, "progressToken": token})
    elif method == "notifications/message" and (
        level is None or _RANK.get(str(params.get("level", "")), 0) < _RANK[level]
    ):
        return None
    return write_notice(notice)


class _Seal:
    """Signs what clients carry for Atrax: session ids and `requestState`.

    A client can read a state but not make one. The call it belongs to (principal, endpoint, method,
    name, arguments) is no part of the text: it is mixed into the signature, so a state that is
    presented by another principal or with other arguments fails exactly as a forged one does."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def _mac(self, *parts: str) -> str:
        mac = hmac.digest(self._key, encode(parts), "sha256")
        return base64.urlsafe_b64encode(mac).rstrip(b"=").decode()

    def session(self, principal: str, endpoint: str) -> str:
        """A new session id: 128 random bits, and a signature that binds them to whose session it is."""
        name = secrets.token_urlsafe(16)
        return f"{name}.{self._mac('session', name, principal, endpoint)[:22]}"

    def state(self, content: list[Json], binding: str) -> str:
        """`content` as a `requestState` that only fits the call with this `binding`."""
        text = base64.urlsafe_b64encode(encode(content)).rstrip(b"=").decode()
        return f"{text}.{self._mac('state', text, binding)}"

    def read(self, state: str, binding: str) -> list[Json] | None:
        """The content of a state; None if it is not ours, was altered, or belongs to another call."""
        text, _, mac = state.rpartition(".")
        good = text and state.isascii()
        if not good or not hmac.compare_digest(mac, self._mac("state", text, binding)):
            return None
        content: list[Json] = orjson.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        return content


def _binding(principal: str, endpoint: str, body: bytes) -> str:
    """A digest of what makes two requests the same call: all params but `_meta` and the retry's own.

    Taken from the bytes that came in, since the door may rewrite a call's params (the tool's name);
    and only where a state is made or read, so that other calls do not pay for it."""
    message = decode(body, sys.maxsize)
    own = ("_meta", "inputResponses", "requestState")
    salient = {key: value for key, value in message["params"].items() if key not in own}
    content = [principal, endpoint, message["method"], salient]
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


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
_HTTP_STATUS: Final = {
    METHOD_NOT_FOUND: 404, HEADER_MISMATCH: 400, MISSING_CAPABILITY: 400, UNSUPPORTED_VERSION: 400,
}  # fmt: skip
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
    """The `_meta` of a modern request whose envelope is right; raises RpcError.

    1. `_meta` names a version (-32602): without it there is nothing to compare.
    2. The header names the same one (-32020): a proxy that routes by the header must not see
       another request than we do, whatever the version.
    3. It is ours (-32022).
    4. The other reserved members of `_meta` are what they must be (-32602).
    5. Mcp-Method (-32020). 6. Mcp-Name, where the body has what it mirrors (-32020).
    7. The method was not removed (-32601, 404): last, so that a client hears of its envelope first.
    Not rungs: the progressToken, which both eras have; params, which depend on the method, and
    Mcp-Param-*, which need the tool's schema: these two are checked behind the door."""
    meta = message.params.get("_meta")
    version = meta.get(META_VERSION) if isinstance(meta, dict) else None
    if not isinstance(meta, dict) or not isinstance(version, str):
        raise RpcError(INVALID_PARAMS, f'params._meta["{META_VERSION}"] is missing')
    named = headers.get("mcp-protocol-version")
    if named != version:
        raise _mismatch("MCP-Protocol-Version", named, version)
    if version != MODERN:
        data = {"supported": [MODERN], "requested": version}
        raise RpcError(UNSUPPORTED_VERSION, f"Unsupported protocol version: {version}", data)
    _check_meta(meta)
    method = message.method
    if headers.get("mcp-method") != method:
        raise _mismatch("Mcp-Method", headers.get("mcp-method"), method)
    if method in _NAMED_BY:
        header, name = headers.get("mcp-name"), message.params.get(_NAMED_BY[method])
        # A body without a name fails later, in the check of its params.
        if isinstance(name, str) and (header is None or _plain_header(header) != name):
            raise _mismatch("Mcp-Name", header, name)
    if method in _REMOVED:
        raise RpcError(METHOD_NOT_FOUND, f"Method not found: {method}", status=404)
    return meta


def _check_meta(meta: dict[str, Json]) -> None:
    """Rung 4 (2026-07-28, basic/index, Per-request protocol fields)."""
    if not isinstance(meta.get(META_CAPABILITIES), dict):
        raise RpcError(INVALID_PARAMS, f'params._meta["{META_CAPABILITIES}"] must be an object')
    if META_CLIENT in meta:
        client = meta[META_CLIENT]
        named = isinstance(client, dict) and isinstance(client.get("name"), str)
        if not named or not isinstance(client.get("version"), str):
            text = f'params._meta["{META_CLIENT}"] must be an object with "name" and "version"'
            raise RpcError(INVALID_PARAMS, text)
    if META_LOG_LEVEL in meta and meta[META_LOG_LEVEL] not in LOG_LEVELS:
        text = f'params._meta["{META_LOG_LEVEL}"] must be one of {", ".join(LOG_LEVELS)}'
        raise RpcError(INVALID_PARAMS, text)


def _mirrored(request: HttpRequest) -> Mapping[str, str]:
    """The headers that mirror arguments; looked for once for each head, which saves 0.1 us."""
    found: Mapping[str, str] | None = request.facts.get("mirrored")
    if found is None:
        headers = request.headers
        found = {key: headers[key] for key in headers if key.startswith("mcp-param-")}
        request.facts["mirrored"] = found
    return found


def _mismatch(header: str, value: str | None, body: str) -> RpcError:
    said = "is missing" if value is None else f"says {value[:100]!r}"
    text = f"Header mismatch: {header} {said}, the body {body[:100]!r}"
    return RpcError(HEADER_MISMATCH, text)


class ModernClient:
    """A client of 2026-07-28: every request stands alone (basic/transports/streamable-http)."""

    def __init__(self, edge: Clients) -> None:
        self.edge = edge
        self.parking = _Parking(edge)
        self.streaming: dict[_ModernCall, None] = {}  # calls whose response is an event stream

    def post(self, visit: _Visit) -> None:
        """A request is answered, a notification accepted, everything else refused; raises RpcError."""
        message = read_message(visit.value)
        if isinstance(message, Response):
            text = "a modern client sends no responses: answer in `inputResponses` of a new request"
            raise RpcError(INVALID_REQUEST, text)
        if isinstance(message, Notice):
            # Ids of modern clients are not unique among them, so notifications/cancelled could
            # end somebody else's call: closing the response is how they cancel.
            visit.reply.full(202, (), b"")
            return
        request, params, method = visit.request, message.params, message.method
        headers = request.headers
        meta = _climb(headers, message)
        capabilities, info = meta[META_CAPABILITIES], meta.get(META_CLIENT)
        level, token = meta.get(META_LOG_LEVEL), _take_meta(params)
        call = Call(
            method, params, visit.owner, MODERN, visit.endpoint, capabilities, info,
            level, token is not None, "", _mirrored(request), request.address, request.id,
        )  # fmt: skip
        kind = _ModernListen if method == "subscriptions/listen" else _ModernCall
        run = kind(self, visit, message.id, token, call)
        if method in _ASKABLE and ("requestState" in params or "inputResponses" in params):
            self.parking.retry(run, call)
        else:
            run.begin(call)

    def stop(self, why: str, fallen: _Fallen) -> None:
        """End all that belongs to who is `fallen`."""
        waiting = [waiter for waiter in self.edge.silent if isinstance(waiter, _ModernCall)]
        for run in (*waiting, *self.streaming):
            if fallen(run.owner):
                run.stop(why)
        for parked in tuple(self.parking.calls.values()):
            if fallen(parked.run.owner):
                self.parking.expire(parked, why)

    def expire(self, why: str, fallen: _Fallen) -> None:
        """End what only stands and waits."""
        for listen in self.listens:
            if fallen(listen.owner):
                listen.stop(why)
        for parked in self.parking.parked:
            if fallen(parked.run.owner):
                self.parking.expire(parked, why)

    @property
    def standing(self) -> Iterator[Owner]:
        """On whom depends what `expire` may have to end."""
        yield from (listen.owner for listen in self.listens)
        yield from (parked.run.owner for parked in self.parking.parked)

    @property
    def listens(self) -> list[_ModernListen]:
        return [run for run in self.streaming if isinstance(run, _ModernListen)]


class _ModernCall(_Caller):
    """One call of a modern client, and the response that waits for it; retries bring new responses.

    `reply` is None while no response is open: parked, or over."""

    __slots__ = (
        "body", "call", "client", "declared", "endpoint", "feed", "ident", "level", "method", "owner",
        "parked", "prefill", "refused", "reply", "retried", "token",
    )  # fmt: skip

    def __init__(
        self, client: ModernClient, visit: _Visit, ident: int | str, token: Json, call: Call
    ) -> None:
        self.handle = self.early = None
        self.client, self.body = client, visit.request.body
        self.reply: Reply | None = visit.reply
        self.ident, self.token, self.level = ident, token, call.log_level
        self.method, self.owner, self.endpoint = call.method, visit.owner, visit.endpoint
        self.declared, self.call = call.capabilities, call
        self.prefill: dict[str, Json] = {}  # `inputResponses` that came without a state
        self.retried = False
        self.refused: dict[str, Json] | None = None  # capabilities whose lack made us refuse asks
        self.parked: _Parked | None = None
        self.feed: _Feed | None = None

    def begin(self, call: Call) -> None:
        """Send the call on its way."""
        self.wait()
        handle = self.handle = self.client.edge.door.open(call, self)
        if self.early is not None:
            self.enter(handle)

    def wait(self) -> None:
        """The response is open and has not begun."""
        assert self.reply is not None
        self.reply.closed = self.left
        self.client.edge.silent[self] = self.client.edge.now + _SLOW

    def slow(self) -> _Feed:
        """The response as an event stream, which it becomes here if it is none yet."""
        if self.feed is None:
            assert self.reply is not None
            self.client.edge.silent.pop(self, None)
            self.client.streaming[self] = None
            self.feed = _Feed(self.client.edge, self.reply)
        return self.feed

    def note(self, notice: Notice) -> None:
        """Notes belong to a response; what comes while the call is parked has nowhere to go."""
        if notice.method == "notifications/cancelled":
            if self.parked is not None:
                self.parked.asks.pop(str(notice.params.get("requestId")), None)
        elif self.reply is not None and notice.method != _COMPLETE_NOTICE:
            body = _note_for(self.token, self.level, notice)
            if body is not None:
                self.slow().note(sse_event(body))

    def ask(self, ask: Ask) -> None:
        """One ask of a child: refused, answered from what the client sent ahead, or parked."""
        needed = _undeclared(ask.method, ask.params, self.declared)
        if needed is not None:
            self.refused = self.refused or {}
            _add(self.refused, needed)
            self.answer(ask, _refusal(ask, needed))
        elif ask.key in self.prefill and self.fits(ask, self.prefill[ask.key]):
            self.answer(ask, Outcome(result=self.prefill.pop(ask.key)))
        elif self.reply is None and self.parked is None:
            self.answer(ask, _failed(f"{ask.method}: the client closed its response"))
        else:
            self.client.parking.ask(self, ask)

    def fits(self, ask: Ask, value: Json) -> bool:
        """Whether `value` is an answer to `ask`; if not, it is asked for again."""
        return self.client.edge.check_answer(ask.method, value, MODERN) is None

    def done(self, outcome: Outcome) -> None:
        answer = self._answer(outcome)
        if self.parked is not None:
            self.parked.ended(answer)
        if self.reply is not None:
            self.give(answer)

    def give(self, answer: bytes | Error) -> None:
        """End the response by a result (its bytes) or an error."""
        headers: tuple[tuple[str, str], ...] = _JSON
        if isinstance(answer, bytes):
            status, body = 200, write_result(self.ident, answer)
        else:
            status, body = answer.status, write_error(self.ident, answer)
            status = _HTTP_STATUS.get(answer.code, 200) if status == 200 else status
            headers = (*_JSON, *_retry_after(answer))
        reply, feed = self._detach()
        if feed is not None:
            feed.write(sse_event(body))
            feed.end()
        elif reply is not None:
            reply.full(status, headers, body)

    def _detach(self) -> tuple[Reply | None, _Feed | None]:
        """Let go of the response, which is the caller's to end."""
        reply, feed = self.reply, self.feed
        if reply is not None:
            reply.closed = None
        self.reply = self.feed = None
        self.client.edge.silent.pop(self, None)
        if feed is not None:
            del self.client.streaming[self]
        return reply, feed

    def _answer(self, outcome: Outcome) -> bytes | Error:
        error, result = outcome.error, outcome.result
        if self.refused is not None and (text := _failure(outcome)) is not None:
            # One ask was refused and the call failed: the client can mend that (CONFORMANCE, trap 1).
            return Error(MISSING_CAPABILITY, text, {"requiredCapabilities": self.refused}, 400)
        if error is not None:
            return self._error(error, outcome.place)
        if result is not None and result.get("resultType") == "input_required":
            # A modern child's own questions, its state sealed in ours: the retry must find its process.
            if self.method not in _ASKABLE:
                text = f"the server asked in answer to {self.method}, which MCP forbids"
                return Error(INTERNAL_ERROR, text)
            content = ["child", outcome.place, result.get("requestState")]
            return _wrong_question(result) or self._ask_all(result, content)
        return self._result(outcome)

    def _error(self, error: Error, place: str) -> bytes | Error:
        code = error.code
        if code == LEGACY_URL_ELICITATION and self.method in _ASKABLE:
            requests = _url_elicitations(error.data)
            if requests:
                return self._ask_all(
                    {**_INPUT_REQUIRED, "inputRequests": requests}, ["urls", place]
                )
        if code == LEGACY_RESOURCE_NOT_FOUND:
            return Error(INVALID_PARAMS, error.message, error.data, error.status)
        if code == CANCELLED or (-32099 <= code <= -32020 and code not in _HTTP_STATUS):
            # Reserved for the specification, which forbids what it does not define (Error Codes).
            return Error(INTERNAL_ERROR, error.message, error.data, error.status)
        return error

    def _ask_all(self, result: dict[str, Json], content: list[Json]) -> bytes | Error:
        """An `input_required` result with our state, or -32021 if the client cannot be asked that."""
        lacking: dict[str, Json] = {}
        for item in (result.get("inputRequests") or {}).values():
            needed = _undeclared(item["method"], item.get("params", {}), self.declared)
            _add(lacking, needed or {})
        if lacking:
            text = f"the server asks for what the client did not declare: {', '.join(lacking)}"
            return Error(MISSING_CAPABILITY, text, {"requiredCapabilities": lacking}, 400)
        return encode({**result, "requestState": self.state(content)})

    def state(self, content: list[Json]) -> str:
        """`content` sealed for this call; it lives for `limits.park` seconds."""
        edge = self.client.edge
        binding = _binding(self.owner.principal, self.endpoint, self.body)
        return edge.seal.state([round(edge.wall() + edge.limits.park, 3), *content], binding)

    def _result(self, outcome: Outcome) -> bytes:
        """The bytes of a result, with the members that this era wants (server/utilities/caching)."""
        result, raw = outcome.result, outcome.raw
        cacheable = self.method in _CACHEABLE
        if not cacheable and raw is not None and (result is None or "resultType" not in result):
            return _spliced(b'{"resultType":"complete"', raw)
        have = result or {}
        if self.method == "server/discover" and "tasks" in (said := have.get("capabilities", {})):
            # As 2025-11-25 has them; here they are an extension.
            have["capabilities"] = {key: said[key] for key in said if key != "tasks"}
        want: dict[str, Json] = {"resultType": have.get("resultType", "complete")}
        if cacheable:
            public = have.get("cacheScope", "public" if outcome.public else "private") == "public"
            # A child's `public` is meant for its own clients; ours differ in what they may see.
            # Nor is whoever is called "anonymous" nobody: a token may come with that name.
            public = public and (outcome.public or self.owner is ANONYMOUS)
            want["ttlMs"] = 0 if self.retried else have.get("ttlMs", outcome.ttl_ms or 0)
            want["cacheScope"] = "public" if public else "private"
        if all(have.get(key) == value for key, value in want.items()):
            return raw if raw is not None else encode(result)
        if raw is not None and not any(key in have for key in want):
            return _spliced(encode(want)[:-1], raw)
        return encode({**have, **want})

    def left(self) -> None:
        """The client closed the response: that cancels the call (Cancellation)."""
        self._let_go()
        self.cancel("the client closed the response")

    def stop(self, why: str) -> None:
        """End the call from our side, with a reason that the client can read."""
        self.give(own_error(UNAVAILABLE, why, "stopped"))
        self._let_go()
        self.cancel(why)

    def _let_go(self) -> None:
        _, feed = self._detach()
        if feed is not None:
            feed.gone()
        if self.parked is not None:
            parked, self.parked = self.parked, None
            parked.asks.clear()
            self.client.parking.forget(parked)


class _ModernListen(_ModernCall):
    """A subscriptions/listen: an event stream at once, its id on every frame (basic/patterns/subscriptions)."""

    __slots__ = ()

    def begin(self, call: Call) -> None:
        super().begin(call)
        if self.reply is not None:
            self.client.edge.lasts(self.owner)
            self.slow()

    def note(self, notice: Notice) -> None:
        if self.reply is None or notice.method == _COMPLETE_NOTICE:
            return
        meta = {**notice.params.get("_meta", {}), META_SUBSCRIPTION: self.ident}
        notice = Notice(notice.method, {**notice.params, "_meta": meta})
        self.slow().write(sse_event(write_notice(notice)))

    def stop(self, why: str) -> None:
        """End the subscription on Atrax's own initiative, gracefully: by its own result."""
        self.give(self._result(Outcome()))
        self.cancel(why)

    def _result(self, outcome: Outcome) -> bytes:
        return encode({"resultType": "complete", "_meta": {META_SUBSCRIPTION: self.ident}})


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
    blocks = content if isinstance(content, list) else []
    texts = [item.get("text") for item in blocks if isinstance(item, dict)]
    return "\n".join(text for text in texts if isinstance(text, str)) or "the tool failed"


def _url_elicitations(data: Json) -> dict[str, Json]:
    """The asks of a -32042 error (2025-11-25, client/elicitation), for a modern client: without ids."""
    asked = data.get("elicitations") if isinstance(data, dict) else None
    return {
        f"elicitation-{number}": _modern_ask("elicitation/create", item)
        for number, item in enumerate(asked if isinstance(asked, list) else (), 1)
        if isinstance(item, dict) and isinstance(item.get("url"), str)
    }


def _modern_ask(method: str, params: dict[str, Json]) -> dict[str, Json]:
    """A legacy ask as one of `inputRequests`, without what 2026-07-28 does not have."""
    params = {key: value for key, value in params.items() if key not in ("elicitationId", "task")}
    meta = params.pop("_meta", None)
    if isinstance(meta, dict):
        gone = ("progressToken", META_TASK)
        meta = {key: value for key, value in meta.items() if key not in gone}
        params |= {"_meta": meta} if meta else {}
    if method == "elicitation/create" and "url" in params:
        params.setdefault("mode", "url")
    return {"method": method, "params": params}


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
# So the child gets each answer once, however often the client calls; an ask that comes after the
# 5 ms is in the next round. Not all states name a parked call: a modern child's own state travels
# inside ours ("child"), with the process that made it; a legacy child's -32042 ends its call, so its
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


@dataclasses.dataclass(slots=True, eq=False)
class _Parked:
    """A call whose child asked; it is in the parking from its first ask until it is forgotten."""

    parking: _Parking
    run: _ModernCall
    name: str = dataclasses.field(default_factory=lambda: secrets.token_urlsafe(12))
    stage: _Stage = _Stage.RUNNING
    round: int = 0  # the last round that the client was told of
    asks: dict[str, Ask] = dataclasses.field(default_factory=dict)  # open questions by key
    # The last answer, by the round whose retry gets it.
    given: dict[int, bytes | Error] = dataclasses.field(default_factory=dict)
    due: float = 0.0
    size: int = 0

    def move(self, stage: _Stage) -> None:
        assert stage in _MOVES[self.stage], f"a parked call cannot go from {self.stage} to {stage}"
        self.stage = stage

    def gather(self) -> None:
        """Wait for 5 ms, if there is something to ask and no wait under way."""
        if self.asks and self.stage is _Stage.RUNNING:
            self.move(_Stage.GATHERING)
            self.parking.edge.later(_GATHER, self._gathered)

    def _gathered(self) -> None:
        """The 5 ms are over: end the response with the questions there are."""
        if self.stage is not _Stage.GATHERING:
            return
        if not self.asks:
            self.move(_Stage.RUNNING)
            return
        self.move(_Stage.PARKED)
        requests = {key: _modern_ask(ask.method, ask.params) for key, ask in self.asks.items()}
        self.round += 1
        state = self.run.state(["parked", self.name, self.round])
        answer = encode({**_INPUT_REQUIRED, "inputRequests": requests, "requestState": state})
        self.given = {self.round - 1: answer}
        self.parking.extend(self)
        self.parking.edge.lasts(self.run.owner)
        self.run.give(answer)

    def retry(self, number: int, other: _ModernCall, answers: dict[str, Json]) -> None:
        """`other` is a retry of round `number`: see the cases above."""
        if number in self.given or number != self.round:
            other.give(self.given.get(number) or Error(INVALID_PARAMS, _WRONG_STATE))
            return
        if self.stage is _Stage.PARKED:
            self.move(_Stage.RUNNING)
        else:
            text = "a repeated retry took over this call; the answer goes there"
            self.run.give(Error(INVALID_REQUEST, text))
        # It goes on on the response of the retry, whose own settings count from now on.
        self.run.reply, self.run.ident, self.run.retried = other.reply, other.ident, True
        self.run.owner = other.owner  # a newer token of the same principal, with no fewer rights
        self.run.token, self.run.level = other.token, other.level
        self.run.wait()
        self.parking.extend(self)
        for key, ask in list(self.asks.items()):
            if self.run.fits(ask, answers.get(key)):
                del self.asks[key]
                self.run.answer(ask, Outcome(result=answers[key]))
        self.gather()

    def ended(self, answer: bytes | Error) -> None:
        self.move(_Stage.ENDED)
        self.asks.clear()
        self.run.body = b""  # only states need it, and no more of them are made
        self.given = {self.round: answer}
        self.size = len(answer) if isinstance(answer, bytes) else 1000
        self.parking.remember(self)


class _Parking:
    """All parked calls of modern clients, bounded by owner, time, and bytes of remembered answers."""

    def __init__(self, edge: Clients) -> None:
        self.edge = edge
        self.calls: OrderedDict[str, _Parked] = OrderedDict()  # by name; the first is due first
        self.counts: dict[str, int] = {}  # principal → its calls that have not ended
        self.remembered = 0  # bytes of answers of ended calls

    @property
    def parked(self) -> list[_Parked]:
        """Those that wait for their client."""
        return [parked for parked in self.calls.values() if parked.stage is _Stage.PARKED]

    def ask(self, run: _ModernCall, ask: Ask) -> None:
        """Park `run` with one more question, or refuse the question where the owner has too many."""
        parked = run.parked
        if parked is None:
            count = self.counts.get(run.owner.principal, 0)
            if count >= self.edge.limits.parked:
                text = f"{count} calls of this client wait for answers already (limits.parked)"
                run.answer(ask, _failed(f"{ask.method}: {text}"))
                return
            self.counts[run.owner.principal] = count + 1
            parked = run.parked = _Parked(self, run)
            self.extend(parked)
            self.edge.record.count("calls_parked")
        parked.asks[ask.key] = ask
        parked.gather()

    def extend(self, parked: _Parked) -> None:
        parked.due = self.edge.now + self.edge.limits.park
        self.calls[parked.name] = parked
        self.calls.move_to_end(parked.name)

    def remember(self, parked: _Parked) -> None:
        """Keep the answer of an ended call for repeated retries; the oldest make room."""
        self._uncount(parked.run.owner.principal)
        self.extend(parked)
        self.remembered += parked.size
        while self.remembered > _ANSWERS_KEPT:
            self.forget(next(item for item in self.calls.values() if item.stage is _Stage.ENDED))

    def forget(self, parked: _Parked) -> None:
        if self.calls.pop(parked.name, None) is None:
            return
        if parked.stage is _Stage.ENDED:
            self.remembered -= parked.size
        else:
            self._uncount(parked.run.owner.principal)

    def _uncount(self, principal: str) -> None:
        self.counts[principal] -= 1
        if not self.counts[principal]:
            del self.counts[principal]

    def retry(self, run: _ModernCall, call: Call) -> None:
        """A request with `inputResponses`, `requestState` or both: what was asked is answered.

        Raises RpcError."""
        params = call.params
        answers, state = params.get("inputResponses", {}), params.get("requestState")
        if not isinstance(answers, dict):
            raise RpcError(INVALID_PARAMS, "params.inputResponses must be an object")
        if "inputResponses" in params:
            # What cannot be an answer is asked for again, and never reaches a child (trap 4).
            answers = {key: answer for key, answer in answers.items() if isinstance(answer, dict)}
            params["inputResponses"] = answers
        if "requestState" not in params:
            # No first round: a fresh call, and what the client sent ahead answers what fits (trap 4).
            run.prefill = dict(answers)
            run.begin(call)
            return
        binding = _binding(run.owner.principal, run.endpoint, run.body)
        content = self.edge.seal.read(state, binding) if isinstance(state, str) else None
        if content is None:
            text = f"{call.method}: {_WRONG_STATE}"
            self.edge.record.alarm("state.refused", text, **call.origin)
        if content is None or content[0] < self.edge.wall():
            run.give(Error(INVALID_PARAMS, _WRONG_STATE))
        elif content[1] != "parked":
            self._again(run, call, content[1:], answers)
        elif (parked := self.calls.get(content[2])) is not None and run.owner.scope.covers(
            parked.run.owner.scope
        ):
            parked.retry(content[3], run, answers)
        else:
            text = "this call has ended: it was cancelled, or expired (limits.park); start it again without requestState"
            run.give(Error(INVALID_PARAMS, text))

    def _again(
        self, run: _ModernCall, call: Call, content: list[Json], answers: dict[str, Json]
    ) -> None:
        """A new call to the process that asked: with the child's own state, or after its URLs were visited."""
        params = call.params
        run.retried = True
        call.place = content[1]
        del params["requestState"]
        if content[0] == "child":
            if content[2] is not None:
                params["requestState"] = content[2]
        else:
            params.pop("inputResponses", None)
            actions = [item.get("action") for item in answers.values() if isinstance(item, dict)]
            if any(action != "accept" for action in actions):
                text = "the server needs the user to visit a URL, which was declined"
                run.give(Error(INTERNAL_ERROR, text))
                return
        run.begin(call)

    def wake(self, now: float) -> None:
        for parked in list(itertools.takewhile(lambda item: item.due <= now, self.calls.values())):
            if parked.stage in (_Stage.RUNNING, _Stage.GATHERING):
                self.extend(parked)  # its client is here; the server's own timeouts bound it
            else:
                self.expire(parked, "the client did not answer within limits.park")

    def expire(self, parked: _Parked, why: str) -> None:
        """Nobody will answer: the child hears so, then the call is cancelled (DESIGN, Parking)."""
        self.forget(parked)
        if parked.stage is not _Stage.PARKED:
            return
        run, text = parked.run, f"a parked call ended: {why}"
        self.edge.record.emit("call.expired", **run.call.origin, message=text)
        run.parked = None
        for ask in parked.asks.values():
            run.answer(ask, _unanswered(ask))
        parked.asks.clear()
        run.cancel(why)


# ---- A legacy client's session ----

_OWN: Final = ("ping", "logging/setLevel", "resources/subscribe", "resources/unsubscribe")


@dataclasses.dataclass(slots=True, eq=False)
class _Session:
    """One legacy client's session."""

    ident: str
    owner: Owner
    endpoint: str
    version: str
    used: float  # when
    capabilities: dict[str, Json] = dataclasses.field(default_factory=dict)
    info: dict[str, Json] | None = None
    level: str | None = None  # what logging/setLevel said
    old: bool = False  # of the 2024-11-05 transport, where stream 0 is the session
    number: int = 0  # of the last stream or ask
    calls: dict[_LegacyCall, None] = dataclasses.field(default_factory=dict)
    streams: dict[int, _Outlet] = dataclasses.field(default_factory=dict)
    size: int = 0  # bytes in the resumption store
    listening: _Listening | None = None

    def next(self) -> int:
        self.number += 1
        return self.number

    def call(self, method: str, params: dict[str, Json]) -> Call:
        """A call of this session."""
        return Call(
            method, params, self.owner, self.version, self.endpoint, self.capabilities, self.info,
            self.level, any_output=False,
        )  # fmt: skip

    def busy(self) -> bool:
        """Whether somebody waits for something: a call runs, or a stream is connected."""
        return bool(self.calls) or any(stream.feed for stream in self.streams.values())


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
#
# Stream 0 of the 2024-11-05 transport carries everything, without ids; when it goes, its session ends.


class _Store:
    """The events of all sessions' streams that may have to be sent again."""

    def __init__(self) -> None:
        self.size = 0
        # The session whose events began first stands in front.
        self.events: dict[_Session, deque[tuple[_Outlet, int, bytes]]] = {}

    def keep(self, session: _Session, stream: _Outlet, frame: bytes) -> None:
        events = self.events.setdefault(session, deque())
        events.append((stream, stream.last, frame))
        session.size += len(frame)
        self.size += len(frame)
        while session.size > _KEPT or len(events) > _KEPT_EVENTS:
            self._drop(session)
        while self.size > _KEPT_ALL:
            self._drop(next(iter(self.events)))

    def _drop(self, session: _Session) -> None:
        events = self.events[session]
        stream, number, frame = events.popleft()
        session.size -= len(frame)
        self.size -= len(frame)
        if not events:
            del self.events[session]
        if stream.over and number == stream.last:
            session.streams.pop(stream.number, None)

    def after(self, session: _Session, stream: _Outlet, number: int) -> bytes:
        """What came on `stream` after event `number`."""
        events = self.events.get(session, ())
        return b"".join(frame for which, at, frame in events if which is stream and at > number)

    def forget(self, session: _Session, stream: _Outlet | None = None) -> None:
        """Drop the events of a stream, or of all."""
        events = self.events.pop(session, ())
        left = deque(item for item in events if stream is not None and item[0] is not stream)
        size = sum(len(frame) for _, _, frame in left)
        self.size -= session.size - size
        session.size = size
        if left:
            self.events[session] = left


@dataclasses.dataclass(slots=True, eq=False)
class _Outlet:
    """One response of a legacy client: JSON if only answers come, else an event stream.

    `reply` is None once the response has begun or its client has gone, `feed` while no event stream
    is connected. Without a session there is nowhere to come back to: no ids, and nothing is kept."""

    client: LegacyClient
    session: _Session | None
    reply: Reply | None
    pending: int = 1  # answers that have not come
    answers: list[bytes] | None = None  # of a batch; None: it is none
    owner: Owner | None = None  # who opened a session's own stream
    headers: tuple[tuple[str, str], ...] = ()  # that go with a JSON response
    feed: _Feed | None = None
    number: int = -1  # its number as an event stream; -1: it is none (yet)
    last: int = 0  # the number of the last event
    over: bool = False

    def __post_init__(self) -> None:
        if self.reply is not None:
            self.reply.closed = self._left

    def lost(self) -> bool:
        """Whether the client left before it had an event id: nothing reaches it any more."""
        return self.reply is None and self.number < 0

    def slow(self) -> None:
        """The response becomes an event stream, if its client is still there."""
        if self.reply is None:
            return
        reply, self.reply = self.reply, None
        self.client.edge.silent.pop(self, None)
        self.open(reply, self.session.next() if self.session is not None else 0)
        for answer in self.answers or ():
            self.send(answer)

    def open(self, reply: Reply, number: int) -> None:
        """Be the event stream `number` on this response."""
        session, self.number = self.session, number
        feed = self._connect(reply)
        if session is not None and not session.old:
            session.streams[number] = self
            if session.version >= "2025-11-25":
                feed.write(b"id: %d-%d\nretry: %d\ndata: \n\n" % (number, self.last, _RETRY_MS))

    def resume(self, session: _Session, reply: Reply, number: int) -> None:
        """Send what came after event `number`, then go on here."""
        frames = self.client.store.after(session, self, number)
        feed = self._connect(reply)
        if frames:
            feed.write(frames)
        if self.over:
            self.end()

    def _connect(self, reply: Reply) -> _Feed:
        """Go on on this response; an older connection ends."""
        self.disconnect()
        feed = self.feed = _Feed(self.client.edge, reply)
        reply.closed = self._left
        return feed

    def _frame(self, message: bytes) -> bytes:
        self.slow()
        session = self.session
        if session is None or session.old or self.number < 0:
            return sse_event(message)
        self.last += 1
        frame = sse_event(message, f"{self.number}-{self.last}")
        self.client.store.keep(session, self, frame)
        return frame

    def send(self, message: bytes) -> None:
        """Send what must arrive, on the event stream that this begins; nobody gets it if none can begin."""
        frame = self._frame(message)
        if self.feed is not None:
            self.feed.write(frame)

    def note(self, message: bytes) -> None:
        """The same for what may be lost when the reader is slow."""
        frame = self._frame(message)
        if self.feed is not None:
            self.feed.note(frame)

    def answer(self, message: bytes | None, error: Error | None = None) -> None:
        """One of the answers that were to come; None: its call was cancelled."""
        self.pending -= 1
        last = self.pending == 0
        if self.reply is not None:
            if message is not None and self.answers is not None:
                self.answers.append(message)
            if last:
                self._answer_plain(self.reply, message, error)
            return
        if message is not None:
            self.over = last
            self.send(message)
        if last and (message is not None or self.answers is not None):
            self.end()
        elif last:
            self.forget()  # cancelled: there is nothing to come back for

    def fail(self, ident: int | str | None, error: Error) -> None:
        self.answer(write_error(ident, error), error)

    def _answer_plain(self, reply: Reply, message: bytes | None, error: Error | None) -> None:
        self.reply = reply.closed = None
        self.client.edge.silent.pop(self, None)
        if self.answers:
            reply.full(200, _JSON, b"[%b]" % b",".join(self.answers))
        elif message is None:
            # Cancelled: an event stream without a response (2025-11-25, basic/utilities/cancellation).
            reply.head(200, SSE_HEADERS)
            reply.end()
        elif error is not None and error.status in (403, 429, 503):
            reply.full(error.status, (*_JSON, *_retry_after(error)), message)
        else:  # 200 for errors too, but those that HTTP has words for
            reply.full(200, (*_JSON, *self.headers) if self.headers else _JSON, message)

    def end(self) -> None:
        """Nothing comes after this; what was not delivered waits."""
        self.over = True
        if self.feed is not None:
            self.disconnect()
            if self.session is not None:
                self.client.lingering[self] = self.client.edge.now + _LINGER

    def forget(self) -> None:
        """End it for good: nothing of it can be fetched any more."""
        self.over = True
        self.disconnect()
        self.client.lingering.pop(self, None)
        if self.session is not None:
            self.client.store.forget(self.session, self)
            self.session.streams.pop(self.number, None)

    def disconnect(self) -> None:
        """End the response; what comes now waits for the next one."""
        if self.feed is not None:
            self.feed.end()
            self.feed = None

    def _left(self) -> None:
        """The client closed the response; if no event id was sent, the answer is lost."""
        self.client.edge.silent.pop(self, None)
        self.reply = None
        if self.feed is not None:
            self.feed.gone()
            self.feed = None
        if self.session is None:
            # In a session closing does not cancel (2025-11-25, transports); here nobody else could.
            for call in [call for call in self.client.lone if call.outlet is self]:
                call.drop("the client closed the response of a call without a session")
        elif self.session.old and self.number == 0:
            self.client.end(self.session, "the client closed its stream")


# ---- A legacy client's calls ----


@dataclasses.dataclass(slots=True, eq=False)
class _Asked:
    """One request of ours that a legacy client has not answered."""

    call: _LegacyCall
    ask: Ask
    ident: str
    token: Json  # the progressToken that the child gave; the client gets our id in its place


@dataclasses.dataclass(slots=True, eq=False)
class _LegacyCall(_Caller):
    """One call of a legacy client: asks go out as requests on its stream.

    A modern child asks by ending the call with `input_required`: then its requests are asked here, and
    the call is made again with the answers, ten times at most. The first request's bytes are kept for
    that, since the door may rewrite a call's params."""

    outlet: _Outlet
    visit: _Visit
    body: bytes
    ident: int | str
    token: Json
    method: str = ""
    place: str = ""
    state: Json = None
    asks: dict[str, _Asked] = dataclasses.field(default_factory=dict)  # that wait, by our id
    over: bool = False
    rounds: int = 0
    wanted: set[str] | None = None  # keys of inputRequests not answered yet; None: no round
    answers: dict[str, Json] = dataclasses.field(init=False)  # of a round

    @property
    def _home(self) -> dict[_LegacyCall, None]:
        """Where it is registered while it runs."""
        session = self.visit.session
        return self.outlet.client.lone if session is None else session.calls

    def begin(self, call: Call) -> None:
        self.method = call.method
        self._home[self] = None
        self.enter(self.outlet.client.edge.door.open(call, self))

    def note(self, notice: Notice) -> None:
        if self.over:
            return
        method, session = notice.method, self.visit.session
        if method == "notifications/cancelled":
            for asked in list(self.asks.values()):
                if asked.ask.key == notice.params.get("requestId"):
                    self.take_back(asked)
        elif method != _COMPLETE_NOTICE or self.visit.version >= "2025-11-25":
            body = _note_for(self.token, (session and session.level) or "info", notice)
            if body is not None:
                self.outlet.note(body)

    def ask(self, ask: Ask) -> None:
        session = self.visit.session
        needed = _undeclared(ask.method, ask.params, session.capabilities if session else {})
        if needed is not None:
            self.answered(ask, _refusal(ask, needed))
        elif session is None or self.over or self.outlet.lost():
            self.answered(ask, _failed(f"{ask.method}: the client cannot be reached any more"))
        else:
            edge, ident = self.outlet.client.edge, f"atrax-{session.next()}"
            params, token = _legacy_ask(ask, ident, self.visit.version)
            asked = self.asks[ident] = _Asked(self, ask, ident, token)
            self.outlet.client.asked[asked] = edge.now + edge.limits.park
            self.outlet.send(write_request(ident, ask.method, params))

    def answered(self, ask: Ask, outcome: Outcome) -> None:
        """The client's answer, or why there is none: on to the child, or into the next round."""
        if self.wanted is None:
            self.answer(ask, outcome)
        elif ask.key in self.wanted:
            self._collect(self.wanted, ask, outcome)

    def forget(self, asked: _Asked) -> None:
        self.outlet.client.asked.pop(asked, None)
        self.asks.pop(asked.ident, None)

    def take_back(self, asked: _Asked) -> None:
        """The child cancelled its own ask, or waits no more: so do we."""
        self.forget(asked)
        notice = Notice("notifications/cancelled", {"requestId": asked.ident})
        self.outlet.send(write_notice(notice))

    def done(self, outcome: Outcome) -> None:
        if self.over:
            return
        result = outcome.result
        if outcome.error is not None:
            self.fail(_legacy_error(outcome.error, self.method))
        elif result is not None and result.get("resultType") == "input_required":
            self._round(result, outcome.place)
        else:
            raw = _legacy_result(outcome, self.method, self.visit.version)
            self.finish(write_result(self.ident, raw))

    def fail(self, error: Error) -> None:
        self.finish(write_error(self.ident, error), error)

    def finish(self, message: bytes | None, error: Error | None = None) -> None:
        """End the call by its response; None: it was cancelled, and its POST ends without one."""
        self.over = True
        self._home.pop(self, None)
        if self.asks:
            for asked in list(self.asks.values()):
                self.forget(asked)
        self.outlet.answer(message, error)

    def drop(self, why: str) -> None:
        """Cancelled by the client."""
        if not self.over:
            self.finish(None)
            self.cancel(why)

    def stop(self, why: str) -> None:
        """Ended by Atrax, which says so to the client."""
        if not self.over:
            self.fail(own_error(UNAVAILABLE, why, "stopped"))
            self.cancel(why)

    def _round(self, result: dict[str, Json], place: str) -> None:
        self.rounds += 1
        if self.rounds > _ROUNDS:
            text = f"the server asked for input in {_ROUNDS} rounds and wants more; the call is given up"
            self.fail(Error(INTERNAL_ERROR, text))
            return
        wrong = _wrong_question(result)
        if wrong is not None:
            self.fail(wrong)
            return
        requests = result.get("inputRequests")
        self.state, self.place = result.get("requestState"), place
        self.answers = {}
        if not requests:
            # Only a state: the server wants to be called again, and not at once by everybody.
            self.outlet.client.edge.later(random.uniform(0.05, 0.25), self._again)
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
        params = decode(self.body, sys.maxsize).get("params", {})
        _take_meta(params)
        if self.answers:
            params["inputResponses"] = self.answers
        if self.state is not None:
            params["requestState"] = self.state
        call = self.outlet.client.call(self.method, params, self.visit, self.token)
        call.place, self.handle = self.place, None
        self.enter(self.outlet.client.edge.door.open(call, self))


@dataclasses.dataclass(slots=True, eq=False)
class _Initialize(_LegacyCall):
    """An `initialize`: a server/discover for the middle. `made`: the session, which begins if it succeeds."""

    made: _Session = dataclasses.field(kw_only=True)

    def done(self, outcome: Outcome) -> None:
        if self.over:
            return
        error = outcome.error
        if error is None and self.visit.session is None:  # the old transport's stands already
            error = self.outlet.client.admit(self.made)
            self.outlet.headers = (("Mcp-Session-Id", self.made.ident),)
        if error is not None:
            self.fail(error)
            return
        result = outcome.result if outcome.result is not None else decode(outcome.raw or b"{}")
        form = _initialize_result(result, self.made.version)
        self.finish(write_result(self.ident, encode(form)))


# ---- What a session listens to ----


@dataclasses.dataclass(slots=True, eq=False)
class _SessionListen(_Caller):
    """One subscriptions/listen of a session, for these URIs."""

    listening: _Listening
    uris: set[str]
    over: bool = False

    def note(self, notice: Notice) -> None:
        if self.over:
            return
        if notice.method == "notifications/subscriptions/acknowledged":
            honoured = notice.params.get("notifications", {}).get("resourceSubscriptions", ())
            self.listening.acknowledged(self, set(honoured))
        elif self is self.listening.current:
            self.listening.client.tell(self.listening.session, notice)

    def ask(self, ask: Ask) -> None:
        self.answer(ask, _refusal(ask, {}))

    def done(self, outcome: Outcome) -> None:
        if not self.over:
            self.over = True
            ended = own_error(UNAVAILABLE, "subscriptions have ended here", "ended")
            self.listening.ended(self, outcome.error or ended)

    def stop(self, why: str) -> None:
        if not self.over:
            self.over = True
            self.cancel(why)


@dataclasses.dataclass(slots=True, eq=False)
class _Listening:
    """What a session hears of: one listen behind the GET stream and all of its resource subscriptions.

    A listen's filter cannot be changed. So a subscribe opens a new listen with the whole filter, and
    the old one is cancelled when the new one is acknowledged: nothing is missed, nothing comes twice,
    since only the current one is heard. Subscribes that come meanwhile share the next one."""

    client: LegacyClient
    session: _Session
    # What is subscribed to, each with the subscribes that wait: the request's id, its response.
    uris: dict[str, list[tuple[int | str, _Outlet]]] = dataclasses.field(default_factory=dict)
    current: _SessionListen | None = None
    opening: _SessionListen | None = None

    def start(self) -> None:
        """Listen, unless that goes on already or the session has ended."""
        if self.current is None and self.session.ident in self.client.sessions:
            self._open()

    def subscribe(self, uri: str, ident: int | str, outlet: _Outlet) -> None:
        self.uris.setdefault(uri, []).append((ident, outlet))
        self._open()

    def unsubscribe(self, uri: str) -> None:
        if uri in self.uris:
            for ident, outlet in self.uris.pop(uri):
                outlet.answer(write_result(ident, b"{}"))
            self._open()

    def renew(self) -> None:
        """Listen anew, with what the session may see now."""
        if self.opening is not None:
            self.opening.stop("the session has other rights")
            self.opening = None
        if self.current is not None or self.uris:
            self._open()

    def _open(self) -> None:
        if self.opening is not None:
            return
        lists = ("toolsListChanged", "promptsListChanged", "resourcesListChanged")
        wanted: dict[str, Json] = dict.fromkeys(lists, True)
        if self.uris:
            wanted["resourceSubscriptions"] = list(self.uris)
        call = self.session.call("subscriptions/listen", {"notifications": wanted})
        self.opening = listen = _SessionListen(self, set(self.uris))
        listen.enter(self.client.edge.door.open(call, listen))

    def acknowledged(self, listen: _SessionListen, honoured: set[str]) -> None:
        if listen is not self.opening:
            return
        old, self.current, self.opening = self.current, listen, None
        for uri in listen.uris & self.uris.keys():
            waiting, self.uris[uri] = self.uris[uri], []
            for ident, outlet in waiting:
                if uri in honoured:
                    outlet.answer(write_result(ident, b"{}"))
                    continue
                self.uris.pop(uri, None)
                text = "no server here offers subscriptions to this resource"
                outlet.fail(ident, Error(LEGACY_RESOURCE_NOT_FOUND, text, {"uri": uri}))
        if old is not None:
            old.stop("a listen with another filter took its place")
        if not self.uris.keys() <= listen.uris or listen.uris & honoured - self.uris.keys():
            self._open()

    def ended(self, listen: _SessionListen, error: Error) -> None:
        """A listen ended that we did not stop: its subscribes fail, what stands is opened again later."""
        if listen is self.opening:
            self.opening = None
            for uri, waiting in [item for item in self.uris.items() if item[1]]:
                del self.uris[uri]
                for ident, outlet in waiting:
                    outlet.fail(ident, error)
        elif listen is self.current:
            self.current = None
        if self.current is None and self.opening is None:
            self.client.edge.later(_SLOW, self.start)

    def close(self) -> None:
        """Stop listening; subscribes that wait end as cancelled calls do."""
        unanswered = [outlet for waiting in self.uris.values() for _, outlet in waiting]
        open_now, self.current, self.opening = (self.current, self.opening), None, None
        self.uris.clear()
        for listen in open_now:
            if listen is not None:
                listen.stop("the session ended")
        for outlet in unanswered:
            outlet.answer(None)


# ---- LegacyClient ----


class LegacyClient:
    """A client of 2024-11-05 to 2025-11-25: sessions, streams that can be resumed, requests both ways.

    A request without a session id is served as the specification assumes it (2025-03-26, or the
    version its header names): stateless clients and curl work. What needs a session (responses,
    logging/setLevel, subscriptions, GET, DELETE) is 400 without one."""

    def __init__(self, edge: Clients) -> None:
        self.edge = edge
        self.store = _Store()
        self.sessions: OrderedDict[str, _Session] = OrderedDict()  # the longest unused first
        self.lone: dict[_LegacyCall, None] = {}  # calls without a session
        self.asked: dict[_Asked, float] = {}  # our requests → when they expire
        self.lingering: dict[_Outlet, float] = {}  # delivered streams → when they are forgotten
        self._serial = 0

    # ---- HTTP ----

    def post(self, visit: _Visit) -> None:
        """One POST of the streamable transport; raises HttpError, RpcError."""
        value, reply = visit.value, visit.reply
        if isinstance(value, dict) and value.get("method") == "initialize" and "id" in value:
            message = read_message(value)
            assert isinstance(message, Request)
            self._initialize(message, _Outlet(self, None, reply), visit)
            return
        session = self._enter(visit)
        if isinstance(value, list):
            self._batch(visit, value)
            return
        message = read_message(value)
        if isinstance(message, Request):
            stream = _Outlet(self, session, reply)
            self._request(message, stream, visit, visit.request.body)
            if stream.reply is not None:
                self.edge.silent[stream] = self.edge.now + _SLOW
            return
        if session is None and isinstance(message, Response):
            raise HttpError(400, "a response belongs to a session: send Mcp-Session-Id")
        self._incoming(session, message)
        reply.full(202, (), b"")

    def get(self, visit: _Visit) -> None:
        """The session's own stream, or one that broke (Last-Event-ID); raises HttpError."""
        _check_get(visit.request.headers)
        session = self._needed_session(visit)
        last = visit.request.headers.get("last-event-id")
        if last:
            match = re.fullmatch(r"([0-9]{1,9})-([0-9]{1,9})", last)
            stream = session.streams.get(int(match[1])) if match is not None else None
            if match is None or stream is None or int(match[2]) > stream.last:
                text = "nothing is kept of this stream any more; send the request again"
                raise HttpError(400, text)
            stream.owner = visit.owner
            stream.resume(session, visit.reply, int(match[2]))
        else:
            # A second GET takes over: the first may be a connection that broke without a word, and a
            # 409 would lock its client out until that shows.
            standing = session.streams.get(0) or _Outlet(self, session, None, 0)
            standing.owner = visit.owner
            standing.open(visit.reply, 0)
        self.edge.lasts(visit.owner)
        self._listening(session).start()

    def delete(self, visit: _Visit) -> None:
        """The end of a session; raises HttpError."""
        self.end(self._needed_session(visit), "the client ended it")
        visit.reply.full(200, (), b"")

    def sse(self, visit: _Visit) -> None:
        """The 2024-11-05 transport: this stream is the session, and ends with it; raises HttpError."""
        _check_get(visit.request.headers)
        session = self._new_session(visit, LEGACY[0])
        session.old = True
        error = self.admit(session)
        if error is not None:
            raise HttpError(503, error.message, _retry_after(error))
        stream = session.streams[0] = _Outlet(self, session, None, 0, owner=visit.owner)
        stream.open(visit.reply, 0)
        path = f"/servers/{visit.endpoint}/messages" if visit.endpoint else "/messages"
        visit.reply.write(sse_event(f"{path}?sessionId={session.ident}".encode(), "", "endpoint"))

    def messages(self, visit: _Visit) -> None:
        """A POST of the 2024-11-05 transport: accepted; what it brings about comes on the stream.

        Raises HttpError, RpcError."""
        pairs = (pair.partition("=") for pair in visit.request.query.split("&"))
        named = next((value for name, _, value in pairs if name == "sessionId"), "")
        session = self._find(named, visit)
        if session is None or not session.old:
            text = "there is no such session here: open a new stream at /sse"
            raise HttpError(404, text, event=self._misused(named))
        visit.session, visit.version = session, session.version
        message = read_message(visit.value)
        visit.reply.full(202, (), b"")
        if not isinstance(message, Request):
            self._incoming(session, message)
        elif message.method == "initialize":
            self._initialize(message, session.streams[0], visit)
        else:
            self._request(message, session.streams[0], visit, visit.request.body)

    # ---- sessions ----

    def _find(self, ident: str, visit: _Visit) -> _Session | None:
        """The session of that id, if it is this principal's and was made at this endpoint.

        Another principal's is as if it did not exist: its id must tell nobody anything. So is one
        with more rights than come with this request, since its streams hold what those brought;
        with more rights than before it goes on, and has them from now on."""
        session = self.sessions.get(ident)
        if session is None or session.endpoint != visit.endpoint:
            return None
        mine, owner = session.owner, visit.owner
        if mine.principal != owner.principal or not owner.scope.covers(mine.scope):
            return None
        widened = mine.scope is not owner.scope and mine.scope != owner.scope
        if session.old and widened:
            return None  # its answers would go to a stream that was opened with fewer rights
        if widened or owner.expires > mine.expires:
            session.owner = dataclasses.replace(owner, session=mine.session)
            self.edge.lasts(session.owner)
        if widened:
            self._widen(session)
        visit.owner = session.owner
        session.used = self.edge.now
        self.sessions.move_to_end(ident)
        return session

    def _widen(self, session: _Session) -> None:
        """Let `session` hear of all that it may see now, on a stream that is opened with these rights."""
        if 0 in session.streams:
            session.streams[0].disconnect()
        if session.listening is not None:
            session.listening.renew()

    def _misused(self, ident: str) -> str:
        """What the record calls a request with this id, which is none of its sender's sessions."""
        return "session.refused" if ident in self.sessions else "http.refused"

    def _enter(self, visit: _Visit) -> _Session | None:
        """The session that the request names, None if it names none; raises HttpError 404, 400."""
        headers, session = visit.request.headers, None
        ident = headers.get("mcp-session-id")
        if ident is not None:
            session = visit.session = self._find(ident, visit)
            if session is None:
                text = "this session has ended or is not of this endpoint; initialize anew"
                raise HttpError(404, text, event=self._misused(ident))
        named = headers.get("mcp-protocol-version")
        if named is not None and named not in LEGACY:
            known = ", ".join((*LEGACY, MODERN))
            raise HttpError(400, f"unknown MCP-Protocol-Version {named[:40]!r}; known are {known}")
        visit.version = session.version if session is not None else named or WITHOUT_SESSION
        return session

    def _needed_session(self, visit: _Visit) -> _Session:
        session = self._enter(visit)
        if session is None:
            raise HttpError(400, "this needs a session: initialize one, then send Mcp-Session-Id")
        return session

    def _new_session(self, visit: _Visit, version: str) -> _Session:
        # The owner's name of the session is a number: the id is a secret, and owners show up in logs.
        self._serial += 1
        owner = dataclasses.replace(visit.owner, session=str(self._serial))
        ident = self.edge.seal.session(visit.owner.principal, visit.endpoint)
        return _Session(ident, owner, visit.endpoint, version, self.edge.now)

    def admit(self, session: _Session) -> Error | None:
        """Enter `session`, the longest idle one ending where there are too many; the error if all are in use."""
        if len(self.sessions) >= self.edge.limits.sessions:
            oldest = self._idle(math.inf)
            if oldest is None:
                text = "too many sessions, all of them in use (limits.sessions)"
                error = own_error(OVERLOADED, text, "sessions", retryAfter=30)
                error.status = 503
                return error
            self.end(oldest, "limits.sessions was reached, and it was idle for longest")
        self.sessions[session.ident] = session
        self.edge.lasts(session.owner)
        return None

    def _idle(self, since: float) -> _Session | None:
        """The session that is idle for longest, since then or before."""
        # 1,000 at most: what is busy moves to the end, so the next look goes further.
        for _ in range(min(len(self.sessions), 1000)):
            session = next(iter(self.sessions.values()))
            if session.used > since:
                break
            if not session.busy():
                return session
            session.used = self.edge.now
            self.sessions.move_to_end(session.ident)
        return None

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
        for stream in tuple(session.streams.values()):
            stream.forget()
        self.store.forget(session)
        self.edge.gone(session.owner)

    def _initialize(self, message: Request, outlet: _Outlet, visit: _Visit) -> None:
        """Read the params of an initialize into a session and ask the middle what there is."""
        params, asked = message.params, message.params.get("protocolVersion")
        session = visit.session or self._new_session(visit, LATEST_LEGACY)
        if asked in LEGACY:
            session.version = asked
        error = self.edge.check_request("initialize", params, session.version)
        if len(visit.request.body) > _INTRODUCTION:
            error = Error(INVALID_PARAMS, f"an initialize has {_INTRODUCTION:,} bytes at most")
        if error is not None:
            outlet.fail(message.id, error)
            return
        session.capabilities = _declared(params["capabilities"], session.version)
        session.info = params["clientInfo"]
        opening = _Initialize(outlet, visit, b"", message.id, None, made=session)
        call = session.call("server/discover", {})
        call.address, call.request = visit.request.address, visit.request.id
        opening.begin(call)

    # ---- messages ----

    def _batch(self, visit: _Visit, items: list[Json]) -> None:
        """A batch: 2025-03-26 alone has them (its basic/index), never with initialize. Raises RpcError."""
        if visit.version != "2025-03-26":
            text = f"{visit.version} has no batches: send one message per POST"
            raise RpcError(INVALID_REQUEST, text)
        if not 0 < len(items) <= _BATCH:
            raise RpcError(INVALID_REQUEST, f"a batch holds 1 to {_BATCH} messages")
        if any(isinstance(item, dict) and item.get("method") == "initialize" for item in items):
            raise RpcError(INVALID_REQUEST, "initialize cannot be part of a batch")
        messages = [_read(item) for item in items]
        count = sum(isinstance(message, (Request, Error)) for message in messages)
        stream = _Outlet(self, visit.session, visit.reply if count else None, count)
        stream.answers = []
        for item, message in zip(items, messages, strict=True):
            if isinstance(message, Request):
                self._request(message, stream, visit, encode(item))
            elif isinstance(message, Error):
                stream.fail(_ident(item), message)
            else:
                self._incoming(visit.session, message)
        if not count:
            visit.reply.full(202, (), b"")
        elif stream.reply is not None:
            self.edge.silent[stream] = self.edge.now + _SLOW

    def _request(self, message: Request, outlet: _Outlet, visit: _Visit, body: bytes) -> None:
        """One request: answered here where it is about the session, else a call."""
        method, params, ident = message.method, message.params, message.id
        try:
            token = _take_meta(params)
        except RpcError as problem:
            outlet.fail(ident, Error(problem.code, str(problem)))
            return
        if method not in _OWN:
            call = self.call(method, params, visit, token)
            _LegacyCall(outlet, visit, body, ident, token).begin(call)
            return
        error, session = self.edge.check_request(method, params, visit.version), visit.session
        if error is None and session is None and method != "ping":
            error = Error(INVALID_REQUEST, f"{method} needs a session: initialize one first")
        if error is not None:
            outlet.fail(ident, error)
        elif session is not None and method == "resources/subscribe":
            self._listening(session).subscribe(params["uri"], ident, outlet)
        else:
            if session is not None and method == "logging/setLevel":
                session.level = params["level"]
            elif session is not None and method == "resources/unsubscribe":
                self._listening(session).unsubscribe(params["uri"])
            outlet.answer(write_result(ident, b"{}"))  # exactly {} (CONFORMANCE, trap 9)

    def call(self, method: str, params: dict[str, Json], visit: _Visit, token: Json) -> Call:
        """The canonical form of a request."""
        if visit.session is not None:
            call = visit.session.call(method, params)
            call.owner = visit.owner  # the session's may have more rights by now
        else:
            call = Call(
                method, params, visit.owner, visit.version, visit.endpoint, any_output=False
            )
        call.progress, call.address = token is not None, visit.request.address
        call.request = visit.request.id
        return call

    def _incoming(self, session: _Session | None, message: Notice | Response) -> None:
        """A notification, or the answer to an ask of ours. What belongs to nothing any more is ignored."""
        if session is None:
            return
        if isinstance(message, Response):
            asked = self._asked_by(session, message.id)
            if asked is not None:
                asked.call.forget(asked)
                wrong = message.error or self.edge.check_answer(
                    asked.ask.method, message.result, session.version
                )
                outcome = Outcome(error=wrong) if wrong else Outcome(result=message.result)
                asked.call.answered(asked.ask, outcome)
        elif message.method == "notifications/cancelled":
            ident, why = message.params.get("requestId"), message.params.get("reason")
            # The newest: ids should not be used twice, but may be. True is no 1.
            for call in [call for call in session.calls if _ident({"id": ident}) == call.ident][
                -1:
            ]:
                call.drop(why if isinstance(why, str) else "the client cancelled it")
        elif message.method == "notifications/progress":
            # A client's progress on an ask of ours, back under the child's own token.
            asked = self._asked_by(session, message.params.get("progressToken"))
            if asked is not None and asked.token is not None:
                notice = Notice(message.method, {**message.params, "progressToken": asked.token})
                asked.call.act(lambda handle: handle.note(notice))
        elif message.method == "notifications/roots/list_changed":
            listen = session.listening.current if session.listening is not None else None
            for way in (*session.calls, *((listen,) if listen is not None else ())):
                way.act(lambda handle: handle.note(message))
        elif message.method == "notifications/initialized" and session.old:
            self._listening(session).start()

    def _asked_by(self, session: _Session, ident: Json) -> _Asked | None:
        """The request of ours with that id. Few calls are in flight in one session."""
        found = (call.asks[ident] for call in session.calls if ident in call.asks)
        return next(found, None) if isinstance(ident, str) else None

    def _listening(self, session: _Session) -> _Listening:
        if session.listening is None:
            session.listening = _Listening(self, session)
        return session.listening

    def tell(self, session: _Session, notice: Notice) -> None:
        """What belongs to no call goes to the session's own stream; before the first GET there is none."""
        stream = session.streams.get(0)
        if stream is None or (notice.method == _COMPLETE_NOTICE and session.version < "2025-11-25"):
            return
        stream.send(write_notice(notice))

    # ---- time, and the end ----

    def wake(self, now: float) -> None:
        for asked in _due(self.asked, now):
            # `limits.park` has passed: the child hears so, and the client that we wait no more.
            asked.call.take_back(asked)
            asked.call.answered(asked.ask, _unanswered(asked.ask))
        for stream in _due(self.lingering, now):
            stream.forget()
        while (session := self._idle(now - self.edge.limits.session_idle)) is not None:
            self.end(session, "it was idle for limits.session_idle")

    def stop(self, why: str, fallen: _Fallen) -> None:
        """End all that belongs to who is `fallen`."""
        for session in self.sessions.values():
            for call in tuple(session.calls) if fallen(session.owner) else ():
                call.stop(why)
        for call in tuple(self.lone):
            if fallen(call.visit.owner):
                call.stop(why)
        self.expire(why, fallen)

    def expire(self, why: str, fallen: _Fallen) -> None:
        """End what only stands and waits. A session waits for its calls: they may finish."""
        for session in tuple(self.sessions.values()):
            stream = session.streams.get(0)
            deaf = stream is not None and stream.owner is not None and fallen(stream.owner)
            if (session.old and deaf) or (fallen(session.owner) and not session.calls):
                self.end(session, why)
            elif deaf and stream is not None:
                stream.disconnect()

    @property
    def standing(self) -> Iterator[Owner]:
        """On whom depends what `expire` may have to end."""
        for session in self.sessions.values():
            yield session.owner
            stream = session.streams.get(0)
            if stream is not None and stream.feed is not None and stream.owner is not None:
                yield stream.owner


# ---- What legacy versions know ----

_MODERN_ONLY: Final = frozenset({"resultType", "ttlMs", "cacheScope"})
_MODERN_META: Final = frozenset({
    META_VERSION, META_CLIENT, META_CAPABILITIES, META_LOG_LEVEL, META_SERVER, META_SUBSCRIPTION,
})  # fmt: skip
# Kinds of content, by the first version that has them.
_CONTENT_SINCE: Final = {"audio": "2025-03-26", "resource_link": "2025-06-18"}


def _read(item: Json) -> Request | Notice | Response | Error:
    """A batch's message, or what is wrong with one that is none."""
    try:
        return read_message(item)
    except RpcError as error:
        return Error(error.code, str(error), error.data)


def _declared(capabilities: dict[str, Json], version: str) -> dict[str, Json]:
    """Client capabilities in today's words: before 2025-11-25 `sampling` included context."""
    sampling = capabilities.get("sampling")
    if version < "2025-11-25" and isinstance(sampling, dict):
        return {**capabilities, "sampling": {"context": {}, **sampling}}
    return capabilities


def _initialize_result(discovered: dict[str, Json], version: str) -> dict[str, Json]:
    """A DiscoverResult as an InitializeResult."""
    meta = discovered.get("_meta")
    info = meta.get(META_SERVER) if isinstance(meta, dict) else None
    result = {
        "protocolVersion": version,
        "capabilities": _legacy_capabilities(discovered.get("capabilities", {}), version),
        "serverInfo": info if isinstance(info, dict) else {"name": "atrax", "version": VERSION},
    }
    if isinstance(discovered.get("instructions"), str):
        result["instructions"] = discovered["instructions"]
    return result


def _legacy_capabilities(capabilities: dict[str, Json], version: str) -> dict[str, Json]:
    """What a legacy client is shown: tasks as 2025-11-25 has them, not as the extension of 2026-07-28."""
    shown = {key: value for key, value in capabilities.items() if key != "extensions"}
    if version < "2025-11-25":
        shown.pop("tasks", None)
    extensions = capabilities.get("extensions")
    if isinstance(extensions, dict) and extensions.keys() - {META + "tasks"}:
        shown["extensions"] = {key: extensions[key] for key in extensions if key != META + "tasks"}
    return shown


def _legacy_ask(ask: Ask, ident: str, version: str) -> tuple[dict[str, Json], Json]:
    """The params of an ask as this version has them, and the child's own progress token."""
    params, token, meta = dict(ask.params), None, ask.params.get("_meta")
    if isinstance(meta, dict) and "progressToken" in meta:
        token = meta["progressToken"]
        params["_meta"] = {**meta, "progressToken": ident}
    if ask.method == "elicitation/create":
        if params.get("mode") == "url":  # a modern child has no id for it, the version wants one
            params.setdefault("elicitationId", ident)
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
        if known != content:
            content, result = known, {**result, "content": known}
    structured = result.get("structuredContent", _NOTHING)
    if not isinstance(structured, dict):
        blocks = content if isinstance(content, list) else []
        if not any(_says(item, structured) for item in blocks):
            blocks = [*blocks, {"type": "text", "text": encode(structured).decode()}]
        result = {**result, "content": blocks}
        del result["structuredContent"]
    return result


def _says(block: Json, value: Json) -> bool:
    """Whether a content block already has the JSON of `value` (servers SHOULD add it themselves)."""
    try:
        return isinstance(block, dict) and bool(decode(block["text"].encode()) == value)
    except (InvalidJson, KeyError, AttributeError):
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


# Method, value and protocol version → what is wrong with the value. Policy has the tables; they come
# in from section Atrax, since Policy stands further down.
_Check: TypeAlias = Callable[[str, Json, str], "Error | None"]


@dataclasses.dataclass(eq=False, repr=False)
class Clients:
    """The client edge: every HTTP request to an MCP path, to the class of its era.

    What both stand on is here: door, limits, time, streams. `now` is the time of the last wake, exact
    to 0.2 s, which is enough for all that waits."""

    door: Door
    limits: Limits
    record: Record
    clock: Callable[[], float]
    key: bytes  # signs session ids and states
    gone: Callable[[Owner], None]  # hears of ended sessions
    later: Callable[[float, Callable[[], None]], object]
    check_request: _Check  # for requests that are answered here
    check_answer: _Check  # for answers to asks
    wall: Callable[[], float] = time.time  # seconds since the epoch
    stands: Callable[[Owner, float], bool] = _unexpired  # may what an owner opened go on at `wall`?

    def __post_init__(self) -> None:
        self.now = self.clock()
        self.expiry = math.inf  # by `wall`: before it nothing expires
        self.seal = _Seal(self.key)
        # Responses that have not begun → when they must.
        self.silent: dict[_ModernCall | _Outlet, float] = {}
        self.beats: dict[_Feed, float] = {}  # streams → when a comment is due
        self.held: dict[_Feed, None] = {}  # streams whose reader is slow and whose notes wait
        self.modern, self.legacy = ModernClient(self), LegacyClient(self)

    def handle(self, request: HttpRequest, reply: Reply, owner: Owner, endpoint: str) -> None:
        """/mcp and /servers/NAME/mcp; raises HttpError."""
        method, visit = request.method, _Visit(request, reply, owner, endpoint)
        if method == "POST":
            self._take(visit, self._post)
        elif method not in ("GET", "DELETE"):
            allow = (("Allow", "GET, POST, DELETE"),)
            raise HttpError(405, f"{method} is not for this path", allow)
        elif _is_modern(request.headers, None):
            raise HttpError(405, f"{MODERN} has no {method}: send POST", (("Allow", "POST"),))
        else:
            (self.legacy.get if method == "GET" else self.legacy.delete)(visit)

    def sse(self, request: HttpRequest, reply: Reply, owner: Owner, endpoint: str) -> None:
        """GET /sse of the 2024-11-05 transport; raises HttpError."""
        if request.method != "GET":
            raise HttpError(405, "this path is an event stream: send GET", (("Allow", "GET"),))
        self.legacy.sse(_Visit(request, reply, owner, endpoint))

    def messages(self, request: HttpRequest, reply: Reply, owner: Owner, endpoint: str) -> None:
        """POST /messages of the 2024-11-05 transport; raises HttpError."""
        if request.method != "POST":
            raise HttpError(405, "this path takes messages: send POST", (("Allow", "POST"),))
        self._take(_Visit(request, reply, owner, endpoint), self.legacy.messages)

    def _post(self, visit: _Visit) -> None:
        modern = _is_modern(visit.request.headers, visit.value)
        (self.modern if modern else self.legacy).post(visit)

    def _take(self, visit: _Visit, post: Callable[[_Visit], None]) -> None:
        """Decode a body and pass it on; what is no message is answered here. Raises HttpError."""
        facts = visit.request.facts
        if "posted" not in facts:
            _check_post(visit.request.headers)
            facts["posted"] = True
        try:
            try:
                visit.value = decode(visit.request.body, self.limits.depth, PARTS)
            except InvalidJson as error:
                raise RpcError(PARSE_ERROR, f"Parse error: {error}") from None
            post(visit)
        except RpcError as error:
            status = 400 if error.status == 200 else error.status
            body = write_error(_ident(visit.value), Error(error.code, str(error), error.data))
            visit.reply.full(status, _JSON, body)

    def wake(self, now: float) -> None:
        """What time alone brings about: slow responses, comments, expiry. About every 0.2 s."""
        self.now = now
        for waiter in _due(self.silent, now):
            waiter.slow()
        for feed in _due(self.beats, now):
            self.beats[feed] = now + _BEAT
            feed.beat()
        for feed in tuple(self.held):
            feed.flush()
        self.modern.parking.wake(now)
        self.legacy.wake(now)
        if self.expiry <= self.wall():
            self._expire()

    def lasts(self, owner: Owner) -> None:
        """Something was opened that ends when `owner` expires."""
        if owner.expires < self.expiry:
            self.expiry = owner.expires

    def _expire(self) -> None:
        fallen, why = self._fallen(), "the token that it was opened with has expired"
        self.modern.expire(why, fallen)
        self.legacy.expire(why, fallen)
        standing = (*self.modern.standing, *self.legacy.standing)
        first = min((owner.expires for owner in standing), default=math.inf)
        # What is left of the fallen waits for its calls. One look a second is enough for that, and
        # for any number of tokens that expire one after the other.
        self.expiry = max(first, self.wall() + 1.0)

    def _fallen(self) -> _Fallen:
        """Who has to end what is open, now. Each is judged once: 20,000 sessions are of few tokens."""
        now, stands = self.wall(), self.stands
        judged: dict[tuple[str, Scope, float, bool], bool] = {}

        def fallen(owner: Owner) -> bool:
            key = (owner.principal, owner.scope, owner.expires, owner.admin)
            if key not in judged:
                judged[key] = not stands(owner, now)
            return judged[key]

        return fallen

    def counts(self) -> dict[str, int]:
        """What is open here, for /status: sessions, parked calls, listens."""
        return {
            "sessions": len(self.legacy.sessions),
            "parked": sum(self.modern.parking.counts.values()),
            "listens": len(self.modern.listens),
        }

    def review(self) -> None:
        """After a reload: end all that belongs to who may not have it any more, calls in flight too."""
        self._stop("its token is not known any more, or may do less than before", self._fallen())

    def drain(self) -> None:
        """End what would never end by itself: listens, sessions' own streams, calls that wait for a retry."""
        for listen in self.modern.listens:
            listen.stop("Atrax is stopping")
        parking = self.modern.parking
        for parked in parking.parked:
            parking.expire(parked, "Atrax is stopping")
        for session in self.legacy.sessions.values():
            if session.listening is not None:
                session.listening.close()
            if 0 in session.streams and not session.old:
                session.streams[0].forget()

    def close(self, why: str = "Atrax is stopping") -> None:
        """End everything. Calls in flight are answered or cancelled, sessions are gone."""
        self._stop(why, lambda owner: True)

    def _stop(self, why: str, fallen: _Fallen) -> None:
        self.modern.stop(why, fallen)
        self.legacy.stop(why, fallen)


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
# Who sees what of it follows from the scope of who asks, and is decided in `_may` and in no other
# place: of names the first server keeps each for everybody, and then the scope says who may see it;
# of URIs the first counts among the servers whose resources the scope allows. What it does not allow
# is not there: neither listed nor found, and nobody waits for it.
#
# Who does not know a name yet, waits: `_seek` holds questions that are asked again whenever
# something moved, until there is an answer or their time is over.

_METHODS: Final = {
    Kind.TOOLS: "tools/list",
    Kind.PROMPTS: "prompts/list",
    Kind.RESOURCES: "resources/list",
    Kind.TEMPLATES: "resources/templates/list",
}
_KIND_OF: Final = {method: kind for kind, method in _METHODS.items()}
# What is listed by URI, and the member that holds it; the others have names.
_URI_MEMBERS: Final = {Kind.RESOURCES: "uri", Kind.TEMPLATES: "uriTemplate"}
_OF_THE_WHOLE: Final = ("prompts", "resources", "completions")  # capabilities; see Scope.whole
_MCP: Final = ""  # the endpoint of all servers

_FIRST_WAIT: Final = 2.0  # seconds that a list on /mcp waits for servers in their first start
_FRESH_MS: Final = 60_000  # how long a list counts as fresh whose server does not say
_SLICE: Final = 0.005  # seconds: a check costs 0.1 ms, and 500 tools must not hold the loop for 50
_READ_GAP: Final = 0.2  # seconds between two readings, for floods of list_changed and ttlMs 0
_READ_AGAIN: Final = (0.5, 30.0)  # first and longest pause after a list that could not be read
_MOST_PAGES: Final = 1_000  # of one upstream list; past it a server invents cursors
_MOST_ITEMS: Final = 50_000  # of one upstream list
_MOST_READ: Final = 64 * MIB  # bytes of all its pages together: a page alone may be limits.line
# Matching is linear, but URI times templates is still work that a client can ask for: 4 ms at most.
_MOST_TEMPLATES: Final = 1_000  # of one server
_LONGEST_URI: Final = 8_192  # that is matched against templates
_MOST_WAITING: Final = 10_000  # look-ups and lists that wait for servers; past it nobody waits
_PAGE_ITEMS: Final = 1_000  # of a page of ours
_PAGE_BYTES: Final = 2**20
_MOST_HIDDEN: Final = 500  # of one server, as /status shows them
_MOST_LINKS: Final = 1_000  # resource links of one owner that are remembered (DESIGN)
_MOST_LINKS_IN_ALL: Final = 100_000
_MOST_VIEWS: Final = 100  # scopes for which one list is kept; past it they are made again
_LONGEST_LINK: Final = 2_048  # characters
_NOTHING_ODD: Final[dict[str, Json]] = {"hidden": [], "warnings": []}  # of a disabled server


@dataclasses.dataclass(frozen=True, slots=True)
class Unapproved:
    """A tool that a pin hides: the digest of its definition, and what differs from the approved one.

    `changes`: the path of a `member`, and what it `was` and `is`, as texts that are cut where long
    and show what is hidden; either may be missing."""

    digest: str
    new: bool  # no tool of that name was approved
    changes: list[dict[str, str]]


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    """One item of a list as clients see it. It stays the same object for as long as `item` is."""

    kind: Kind
    server: str
    own: str  # its name, uri or uriTemplate at the server
    name: str  # on /mcp: renamed, with prefix
    local: str  # on the server's own endpoint: renamed, without prefix
    item: dict[str, Json]  # the server's definition; Policy may have cut hidden text from it
    source: bytes = b""  # `item` as JSON
    sent: bytes = b""  # the same before anything was cut
    description: str | None = None  # what replaces the server's own, from tools.describe
    # Slots for Policy: the schema, what is to be warned of, and why a pin hides it.
    validator: object = None
    warnings: list[str] = dataclasses.field(default_factory=list)
    unapproved: Unapproved | None = None
    alike: str = ""  # another server, to whose prefix its name would belong
    _forms: dict[tuple[bool, bool], bytes] = dataclasses.field(default_factory=dict)
    _matches: Callable[[str], bool] | None = None

    def encoded(self, local: bool, any_output: bool) -> bytes:
        """The item as JSON for an endpoint (`local`: the server's own), made once per form."""
        fragment = self._forms.get((local, any_output))
        if fragment is None:
            fragment = self._encode(self.local if local else self.name, any_output)
            self._forms[local, any_output] = fragment
        return fragment

    def _encode(self, shown: str, any_output: bool) -> bytes:
        item = self.item
        if shown != self.own:
            item = {**item, "name": shown}
        if self.description is not None:
            item = {**item, "description": self.description}
        schema = item.get("outputSchema") if self.kind is Kind.TOOLS else None
        is_object = isinstance(schema, dict) and schema.get("type") == "object"
        if not (any_output or schema is None or is_object):
            # Clients built on the npm SDK 1.x refuse the whole list for one such schema.
            item = {key: value for key, value in item.items() if key != "outputSchema"}
        return self.source if item is self.item else encode(item)

    def looks_like(self, other: Entry) -> bool:
        """Whether clients see the same of both."""
        # Bytes, not dicts: to Python {"minimum": 1} equals {"minimum": true}.
        same = self.sent == other.sent and self.description == other.description
        return same and (self.name, self.local) == (other.name, other.local)

    def matches(self, uri: str) -> bool:
        """Whether `uri` can have come from this template."""
        # The literal beginning first: it costs 150 ns and answers for nearly every template.
        if not uri.startswith(self.own.partition("{")[0]):
            return False
        if self._matches is None:
            self._matches = _matcher(self.own)
        return self._matches(uri)


_EXPRESSION: Final = re.compile(r"\{([+#./;?&]?)[^{}]*\}")


def _matcher(template: str) -> Callable[[str], bool]:
    """An RFC 6570 template, read backwards.

    More is let through than could be expanded, since the server has the last word. The pattern runs
    on pydantic_core's engine: Python's own needs time to the power of the variables for
    `{+a}-{+b}-{+c}` and a URI of dashes."""
    from pydantic_core import SchemaError, SchemaValidator, core_schema

    parts = _EXPRESSION.split(template)  # literal, operator, literal, operator, … literal
    literals, operators = parts[::2], parts[1::2]
    pattern = re.escape(literals[0])
    for operator, literal in zip(operators, literals[1:], strict=True):
        # What it leaves behind begins with the operator (3.2.4 to 3.2.9), or is nothing at all.
        some = {"": "[^/]*", "+": ".*"}.get(operator, rf"(?:{re.escape(operator)}.*)?")
        pattern += some + re.escape(literal)
    try:
        if "{" in "".join(literals) or len(template) > _LONGEST_URI:
            return lambda uri: False
        schema = core_schema.str_schema(pattern=rf"(?s)\A{pattern}\z", regex_engine="rust-regex")
        return SchemaValidator(schema).isinstance_python
    except SchemaError:
        return lambda uri: False


@dataclasses.dataclass(frozen=True, slots=True)
class _Hidden:
    """An item that a server lists and nobody sees."""

    own: str
    reason: str
    wanted: bool = False  # the config says so: shown in /status, but nothing to warn of
    digest: str = ""  # where a pin hides it
    entry: Entry | None = dataclasses.field(default=None, compare=False, repr=False)  # there too

    def shown(self, kind: Kind) -> dict[str, Json]:
        """As /status has it."""
        shown: dict[str, Json] = {"kind": kind.value, "name": self.own, "reason": self.reason}
        if self.entry is not None and self.entry.unapproved is not None:
            shown |= {"digest": self.digest, "changes": self.entry.unapproved.changes}
        return shown


@dataclasses.dataclass(slots=True)
class _Source:
    """One enabled server, as far as Shelf tells: its rules, its lists, how it does."""

    name: str
    config: ServerConfig
    prefix: str  # with the separator
    others: tuple[tuple[str, str], ...] = ()  # prefix and name of servers whose names may look ours
    stocks: dict[Kind, _Stock] = dataclasses.field(default_factory=dict)
    offer: Offer | None = None  # None until it was ready once
    down: bool = False  # no process is left, or the first start failed


@dataclasses.dataclass(slots=True)
class _Stock:
    """One list of one server."""

    source: _Source = dataclasses.field(repr=False)
    kind: Kind
    entries: dict[str, Entry] = dataclasses.field(default_factory=dict)  # by local name
    hidden: list[_Hidden] = dataclasses.field(default_factory=list)
    # By a pin; by local name
    withheld: dict[str, _Hidden] = dataclasses.field(default_factory=dict)
    raw: list[Json] = dataclasses.field(default_factory=list)  # as its server sent it
    told: frozenset[_Hidden] = frozenset()  # what the log has already
    told_alike: frozenset[tuple[str, str]] = frozenset()  # likewise
    read: bool = False  # it was read once, or the server does not declare it
    declared: bool = False
    silent: bool = False  # the server announces no changes of this list
    ttl_ms: int = _FRESH_MS
    reading: _Reading | None = None
    began: float = float("-inf")  # when the last reading began
    due: float | None = None  # when it is to be read (again)
    pause: float = 0.0  # the one after the last failure
    error: str = ""  # that failure

    @property
    def capability(self) -> str:
        return "resources" if self.kind in _URI_MEMBERS else self.kind.value

    @property
    def coming(self) -> bool:
        """Whether waiting helps: it was never read, and nothing has failed yet."""
        return not (self.read or self.pause or self.source.down)

    def stale(self, now: float) -> bool:
        """Whether it has grown old, and a change would not be announced."""
        if not self.silent or not self.declared or self.reading is not None or self.due is not None:
            return False
        return now - self.began > max(self.ttl_ms / 1000, _READ_GAP)

    def stop(self) -> None:
        """Read no more, and not again."""
        reading, self.reading, self.due = self.reading, None, None
        if reading is not None:
            reading.cancel()


def _may(scope: Scope, kind: Kind, server: str, name: str) -> bool:
    """Whether `scope` allows what `server` offers as `name` (on /mcp, whatever the endpoint)."""
    return scope.tool(server, name) if kind is Kind.TOOLS else scope.whole(server)


class _Listing:
    """One list of one endpoint: what clients see of it. Never changed once made.

    `offered`: all that its servers offer, in order; of equal names the first is in `table`."""

    def __init__(self, kind: Kind, local: bool, offered: Iterable[Entry]) -> None:
        self.kind, self.local, self.offered = kind, local, list(offered)
        self.table: dict[str, Entry] = {}
        for entry in self.offered:
            self.table.setdefault(entry.local if local else entry.name, entry)
        self.entries = list(self.table.values())
        self.ui = _ui_resources(self.entries)
        self._first: dict[bool, bytes] = {}  # any_output → the first page, for most lists all
        self._views: dict[Scope, _Listing] = {}

    def seen_by(self, scope: Scope) -> _Listing:
        """The part that `scope` allows."""
        if scope.everything:
            return self
        view = self._views.get(scope)
        if view is None:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            view = self._views[scope] = self._view(scope)
        return view

    def _view(self, scope: Scope) -> _Listing:
        kind = self.kind
        some = self.offered if kind in _URI_MEMBERS else self.entries
        allowed = [one for one in some if _may(scope, kind, one.server, one.name)]
        view = _Listing(kind, self.local, allowed)
        # They are resources: whoever may have a server's may have these, with the tool or without.
        view.ui = _ui_resources([one for one in self.entries if scope.whole(one.server)])
        return view

    def find(self, name: str, scope: Scope) -> Entry | None:
        """Who has `name` for whom `scope` is."""
        entry = self.table.get(name)
        if entry is None or scope.everything:
            return entry
        if _may(scope, self.kind, entry.server, entry.name):
            return entry
        return self.seen_by(scope).table.get(name) if self.kind in _URI_MEMBERS else None

    def page(self, cursor: Json, any_output: bool) -> bytes | None:
        """The list result from `cursor` on (None: from the beginning); None if it is not ours.

        A page ends after 1,000 items or before the one that would make it more than 1 MiB."""
        if cursor is None and any_output in self._first:
            return self._first[any_output]
        start = 0 if cursor is None else self._start(cursor)
        if start is None:
            return None
        fragments: list[bytes] = []
        size = 0
        for entry in self.entries[start : start + _PAGE_ITEMS]:
            fragment = entry.encoded(self.local, any_output)
            size += len(fragment)
            if fragments and size > _PAGE_BYTES:
                break
            fragments.append(fragment)
        end = start + len(fragments)
        more = b"" if end >= len(self.entries) else self._next(self.entries[end - 1])
        page = b'{"%b":[%b]%b}' % (self.kind.value.encode(), b",".join(fragments), more)
        if cursor is None:
            self._first[any_output] = page
        return page

    def _next(self, last: Entry) -> bytes:
        # The last item that the client has, and not a number: it still fits when the list changed.
        token = encode([self.kind.value, last.local if self.local else last.name])
        return b',"nextCursor":"%b"' % base64.urlsafe_b64encode(token)

    def _start(self, cursor: Json) -> int | None:
        """The place after the item that `cursor` names; None if it is gone or the cursor not ours."""
        try:
            kind, name = decode(base64.urlsafe_b64decode(cursor))
        except (ValueError, TypeError, InvalidJson):
            return None
        entry = self.table.get(name) if isinstance(name, str) and kind == self.kind.value else None
        return None if entry is None else self.entries.index(entry) + 1


def _ui_resources(entries: list[Entry]) -> dict[str, Entry]:
    """Which tool names which `ui://` resource: backwards, so that the first to name it has it."""
    return {uri: entry for entry in entries[::-1] for uri in _ui_uris(entry)}


def _ui_uris(entry: Entry) -> list[str]:
    """The `ui://` resources that a tool names in its `_meta` (MCP Apps, both spellings)."""
    meta = entry.item.get("_meta") if entry.kind is Kind.TOOLS else None
    if not isinstance(meta, dict):
        return []
    ui = meta.get("ui")
    named = (ui.get("resourceUri") if isinstance(ui, dict) else None, meta.get("ui/resourceUri"))
    return [uri for uri in named if isinstance(uri, str) and uri.startswith("ui://")]


class _OwnCall:
    """A call that Atrax makes for itself: the sink of its answers, from the lease to the end.

    `over`: it ended, or nobody wants it any more; nothing of it is heard afterwards."""

    def __init__(self) -> None:
        self.over = False
        self._lease: Lease | None = None
        self._handle: Handle | None = None

    def send(self, link: Link, call: Call) -> None:
        self._handle = link.send(call, self)
        if self.over:
            self.cancel()  # by what the answer led to, before there was a handle

    def cancel(self) -> None:
        """End it, quietly: neither `done` nor anything else is heard."""
        self.over = True
        if self._lease is not None:
            self._lease.cancel()
        if self._handle is not None:
            self._handle.cancel("no longer needed")

    def note(self, notice: Notice) -> None: ...

    def ask(self, ask: Ask) -> None:
        """Never comes: Servers give a call of Atrax's own no ask (DESIGN, Whose ask is it?)."""

    def done(self, outcome: Outcome) -> None: ...


class _Reading(_OwnCall):
    """One list of one server on its way here, page by page. Ends once, by `finished`.

    `fault`: why before the list did; what came until then counts: half a list helps more than
    none. A page that does not come is an error of the Servers, which know the timeout."""

    def __init__(self, stock: _Stock, finished: Callable[[_Reading], None]) -> None:
        super().__init__()
        self.stock = stock
        self.items: list[Json] = []
        self.ttl_ms: int | None = None
        self.error: Error | None = None
        self.fault = ""
        self._finished = finished
        self._link: Link  # from _ready on
        self._seen: set[str] = set()  # cursors
        self._read = 0  # bytes

    def start(self, pool: Pool) -> None:
        self._lease = pool.lease(self.stock.source.name, None, "", self._ready)

    def _ready(self, link: Link | Error) -> None:
        if isinstance(link, Error):
            self._end(link)
            return
        self._link = link
        self._ask({})

    def _ask(self, params: dict[str, Json]) -> None:
        method = _METHODS[self.stock.kind]
        self.send(self._link, Call(method, params, Owner("atrax"), MODERN))

    def done(self, outcome: Outcome) -> None:
        if self.over:
            return
        if outcome.error is not None:
            self._end(outcome.error)
            return
        result = outcome.result or {}
        items = result.get(self.stock.kind.value)
        if not isinstance(items, list):
            self._end(Error(INTERNAL_ERROR, f'its answer has no list "{self.stock.kind.value}"'))
            return
        self._read += len(outcome.raw or orjson.dumps(result))
        if self._read > _MOST_READ:
            self.fault = f"it has more than {_MOST_READ:,} bytes"
            self._end(None)
            return
        self.items += items
        ttl_ms = result.get("ttlMs")
        if type(ttl_ms) is int:
            least = ttl_ms if self.ttl_ms is None else min(ttl_ms, self.ttl_ms)
            self.ttl_ms = max(least, 0)
        self._go_on(result.get("nextCursor"))

    def _go_on(self, cursor: Json) -> None:
        most = _MOST_TEMPLATES if self.stock.kind is Kind.TEMPLATES else _MOST_ITEMS
        if len(self.items) > most or (cursor is not None and len(self._seen) + 1 >= _MOST_PAGES):
            del self.items[most:]
            self.fault = f"it has more than {most:,} items or {_MOST_PAGES:,} pages"
        elif cursor is not None and (not isinstance(cursor, str) or cursor in self._seen):
            self.fault = "its nextCursor is not a string, or one that it gave before"
        if cursor is None or self.fault:
            self._end(None)
            return
        self._seen.add(cursor)
        self._ask({"cursor": cursor})

    def _end(self, error: Error | None) -> None:
        self.over, self.error = True, error
        self._finished(self)


@dataclasses.dataclass(slots=True, eq=False)
class _Question:
    """The Lease of somebody who waits for servers; `find` gives what `then` is to be told.

    `find` is told whether it is too late to wait: then it must find something, an error at least.
    Any: an Entry, an Error or an Outcome, the same in both."""

    find: Callable[[bool], Any]
    then: Callable[[Any], None]
    deadline: float
    over: bool = False

    def cancel(self) -> None:
        self.over = True


# The Lease of what was answered at once: there is nothing to cancel.
_SETTLED: Final = _OwnCall()


class Catalogue:
    """What all enabled servers offer. Implements the verbs `up`, `down` and `changed` of Shelf.

    `check` is Policy's verdict on a definition: a reason hides the item. `later` puts off
    what would take too long in one turn of the loop. `watch` holds callbacks (kind, endpoint,
    changed) for each list that changed; endpoint "" is /mcp, and `changed` tells of a scope whether
    it sees anything of that."""

    def __init__(
        self,
        config: Config,
        pool: Pool,
        record: Record,
        clock: Callable[[], float],
        check: Callable[[Entry], str],
        later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        self._pool, self._record, self._clock = pool, record, clock
        self._check, self._later = check, later
        self.watch: list[Callable[[Kind, str, Callable[[Scope], bool]], None]] = []
        self._waits: list[_Question] = []
        # Resource links: owner → URI → the server that handed it out, both oldest first.
        self._links: OrderedDict[Owner | None, OrderedDict[str, str]] = OrderedDict()
        self._linked = 0
        self._disabled = [name for name, server in config.servers.items() if server.disabled]
        self._sources: dict[str, _Source] = {}
        for name, server in config.servers.items():
            if not server.disabled:
                prefix = server.prefix + config.separator if server.prefix else ""
                source = self._sources[name] = _Source(name, server, prefix)
                source.stocks = {kind: _Stock(source, kind) for kind in Kind}
        for source in self._sources.values():
            # A name belongs to the longest prefix that it begins with (Scope says so too).
            longer = (one for one in self._sources.values() if len(one.prefix) > len(source.prefix))
            source.others = tuple((one.prefix, one.name) for one in longer)
        # By name on /mcp: what was approved, has changed, and is hidden until it is approved again.
        self._reserved: dict[Kind, dict[str, Entry]] = {kind: {} for kind in Kind}
        # What an endpoint is made of, and shows.
        self._at = {name: [source] for name, source in self._sources.items()}
        self._at[_MCP] = list(self._sources.values())
        self._listings = {
            endpoint: {kind: _Listing(kind, endpoint != _MCP, ()) for kind in Kind}
            for endpoint in self._at
        }

    # ---- Shelf ----

    def up(self, server: str, offer: Offer) -> None:
        """The first process is ready (again): it may be another program now, so read all anew."""
        source = self._sources.get(server)
        if source is None:
            return
        source.down, source.offer = False, offer
        for stock in source.stocks.values():
            said = offer.capabilities.get(stock.capability)
            stock.declared = said is not None and said is not False
            stock.silent = not (isinstance(said, dict) and said.get("listChanged") is True)
            stock.stop()
            stock.pause, stock.error = 0.0, ""
            if stock.declared:
                self._read(stock)
            else:
                list(self._sort(stock, []))
        self._moved()

    def down(self, server: str) -> None:
        """No process is left, or the first start failed. What it listed stays listed."""
        source = self._sources.get(server)
        if source is None:
            return
        source.down = True
        for stock in source.stocks.values():
            stock.stop()
        self._moved()

    def changed(self, server: str, kind: Kind) -> None:
        """list_changed of a child. Several during a reading, or right after one, become one."""
        source = self._sources.get(server)
        if source is None or source.down:
            return
        now = self._clock()
        # resources/list_changed speaks for the templates too: they have none of their own.
        for one in _URI_MEMBERS if kind in _URI_MEMBERS else (kind,):
            stock = source.stocks[one]
            if stock.declared:
                stock.due = max(stock.began + _READ_GAP, now)
                if stock.reading is None and stock.due <= now:
                    self._read(stock)

    # ---- look-up ----

    def lookup(
        self,
        kind: Kind,
        endpoint: str,
        name: str,
        then: Callable[[Entry | Error], None],
        owner: Owner,
    ) -> Lease:
        """Who has `name` for `owner`: `then` is called once, at once where that is known.

        Otherwise after a wait for servers that may have it, at most their `start_timeout`; with
        -32602 where nobody has it, and 1010 while one of those servers is down. For a URI that no
        list names the entry is made up: its `own` is the URI."""
        listings = self._listings.get(endpoint)
        entry = listings[kind].find(name, owner.scope) if listings is not None else None
        if entry is not None:
            then(entry)
            return _SETTLED
        unread = self._unread(kind, endpoint, name, owner.scope)
        limit = max((stock.source.config.start_timeout for stock in unread), default=0.0)
        return self._seek(lambda late: self._find(kind, endpoint, name, owner, late), then, limit)

    def _find(
        self, kind: Kind, endpoint: str, name: str, owner: Owner, late: bool
    ) -> Entry | Error | None:
        """Who has `name`, or why nobody; None while a server that may have it is coming."""
        entry = self.known(kind, endpoint, name, owner)
        if entry is not None:
            return entry
        if kind is Kind.TOOLS and (held := self._withheld(endpoint, name, owner.scope)) is not None:
            return _unapproved(held)
        unread = self._unread(kind, endpoint, name, owner.scope)
        if not unread:
            there = endpoint == _MCP or self._seen(endpoint, owner.scope)
            return _unknown(kind, name) if there else _disabled(endpoint)
        if not late and any(stock.coming for stock in unread):
            return None
        return self._unavailable(unread[0].source)

    def _seen(self, endpoint: str, scope: Scope) -> list[_Source]:
        """What `endpoint` is made of for whom `scope` is; nothing where it does not exist."""
        return [source for source in self._at.get(endpoint, ()) if scope.sees(source.name)]

    def _unread(self, kind: Kind, endpoint: str, name: str, scope: Scope) -> list[_Stock]:
        """The lists that may hold `name`, if `scope` allows it, but were never read."""
        by_uri = kind in _URI_MEMBERS
        kinds = (*_URI_MEMBERS, Kind.TOOLS) if by_uri else (kind,)
        return [
            source.stocks[one]
            for source in self._at.get(endpoint, ())
            if endpoint or by_uri or name.startswith(source.prefix)
            for one in kinds
            if not source.stocks[one].read
            and _may(scope, kind, source.name, source.prefix + name if endpoint else name)
        ]

    def known(self, kind: Kind, endpoint: str, name: str, owner: Owner) -> Entry | None:
        """Who has `name` for `owner`, as far as is known now."""
        listings = self._listings.get(endpoint)
        if listings is None:
            return None
        entry = listings[kind].find(name, owner.scope)
        if entry is None and kind is Kind.RESOURCES:
            return self._covered(endpoint, name, owner)
        return entry or self._unlisted(kind, endpoint, name, owner.scope)

    def _withheld(self, endpoint: str, name: str, scope: Scope) -> Entry | None:
        """The tool of that name which a pin hides, if `scope` allows it."""
        for source in self._at.get(endpoint, ()):
            if endpoint or name.startswith(source.prefix):
                local = name if endpoint else name[len(source.prefix) :]
                held = source.stocks[Kind.TOOLS].withheld.get(local)
                if held and held.entry and scope.tool(source.name, held.entry.name):
                    return held.entry
        return None

    def _covered(self, endpoint: str, uri: str, owner: Owner) -> Entry | None:
        """Who answers for a URI that no list names: in the order of DESIGN, Resource URIs."""
        kind, listings, scope = Kind.RESOURCES, self._listings[endpoint], owner.scope
        if len(uri) <= _LONGEST_URI:
            for template in listings[Kind.TEMPLATES].seen_by(scope).entries:
                if template.matches(uri):
                    return Entry(kind, template.server, uri, uri, uri, template.item)
        tool = listings[Kind.TOOLS].seen_by(scope).ui.get(uri)
        # On its own endpoint the server is who knows: its links name more than its lists.
        linked = self._links[owner].get(uri, "") if owner in self._links else ""
        source = self._sources.get(tool.server if tool else endpoint or linked)
        if source is None or not (tool or source.stocks[Kind.RESOURCES].declared):
            return None
        if not scope.whole(source.name):
            return None
        return Entry(kind, source.name, uri, uri, uri, {"uri": uri})

    def _unlisted(self, kind: Kind, endpoint: str, name: str, scope: Scope) -> Entry | None:
        """With isolation, on its own endpoint: what may exist in an owner's child alone."""
        source = self._sources.get(endpoint)
        if source is None or source.config.isolation == "shared" or kind is Kind.TEMPLATES:
            return None
        stock, rules, exposed = source.stocks[kind], source.config.tools, source.prefix + name
        rename = rules.rename if kind is Kind.TOOLS else {}
        own = next((one for one, shown in rename.items() if shown == name), name)
        # What is listed under another name, or hidden, does exist and must not be had by this.
        listed = {one.own for one in stock.entries.values()} | {one.own for one in stock.hidden}
        if not (stock.read and stock.declared) or own in listed or rename.get(own, own) != name:
            return None
        if not _may(scope, kind, endpoint, exposed):
            return None
        entry = Entry(kind, endpoint, own, exposed, name, {"name": own})
        if kind is Kind.TOOLS:
            entry.item["inputSchema"] = {"type": "object"}
            if _ruled_out(rules, own) or self._check(entry):
                return None
        return entry

    def remember(self, owner: Owner, server: str, result: dict[str, Json]) -> None:
        """Note the resource links in the result of a call: `owner` has their URIs from `server`."""
        blocks, messages = result.get("content"), result.get("messages")
        if isinstance(messages, list):  # of a prompt, with one block each
            blocks = [message.get("content") for message in messages if isinstance(message, dict)]
        for block in blocks if isinstance(blocks, list) else ():
            if isinstance(block, dict) and block.get("type") == "resource_link":
                uri = block.get("uri")
                if isinstance(uri, str) and len(uri) <= _LONGEST_LINK:
                    self._remember(owner, server, uri)

    def _remember(self, owner: Owner, server: str, uri: str) -> None:
        links = self._links.setdefault(owner, OrderedDict())
        self._links.move_to_end(owner)
        self._linked -= len(links)
        links[uri] = server
        links.move_to_end(uri)
        if len(links) > _MOST_LINKS:
            links.popitem(last=False)
        self._linked += len(links)
        while self._linked > _MOST_LINKS_IN_ALL:
            self._linked -= len(self._links.popitem(last=False)[1])

    # ---- lists ----

    def listing(self, call: Call, then: Callable[[Outcome], None]) -> Lease:
        """tools/list and its three siblings; `then` is called once, at once where all was read.

        On /mcp servers in their first start are waited for, 2 s at most, then what is there is
        answered; a server's own endpoint waits as long as its start may take, then answers 1010."""
        limit = self._patience(call.endpoint)
        return self._seek(lambda late: self._listed(call, late), then, limit)

    def _listed(self, call: Call, late: bool) -> Outcome | None:
        kind, endpoint, scope = _KIND_OF[call.method], call.endpoint, call.owner.scope
        seen = self._seen(endpoint, scope)
        if endpoint and not seen:
            return Outcome(error=_disabled(endpoint))
        may = scope.sees if kind is Kind.TOOLS else scope.whole
        stocks = [source.stocks[kind] for source in seen if may(source.name)]
        if not late and any(stock.coming for stock in stocks):
            return None
        if endpoint and stocks and not stocks[0].read:
            return Outcome(error=self._unavailable(stocks[0].source))
        if endpoint and not (stocks and stocks[0].declared):
            text = (
                f'{call.method}: the server "{endpoint}" has no {seen[0].stocks[kind].capability}'
            )
            return Outcome(error=Error(METHOD_NOT_FOUND, text, status=404))
        listing = self._listings[endpoint][kind].seen_by(scope)
        raw = listing.page(call.params.get("cursor"), call.any_output)
        if raw is None:
            text = "this cursor is not known: list from the beginning"
            return Outcome(error=Error(INVALID_PARAMS, text))
        now = self._clock()
        for stock in stocks:
            if stock.stale(now):
                stock.due = now  # read by `wake`, behind this answer
        ttl_ms = min((stock.ttl_ms for stock in stocks if stock.declared), default=_FRESH_MS)
        # Private: a server's lists may name files or customers, and a legacy one cannot say.
        return Outcome(raw=raw, ttl_ms=ttl_ms if all(stock.read for stock in stocks) else 0)

    # ---- discover ----

    def discover(self, call: Call, then: Callable[[Outcome], None]) -> Lease:
        """server/discover, and so initialize: on /mcp at once, else when the server has started."""
        limit = self._patience(call.endpoint)
        scope = call.owner.scope
        return self._seek(lambda late: self._discovered(call.endpoint, scope, late), then, limit)

    def _discovered(self, endpoint: str, scope: Scope, late: bool) -> Outcome | None:
        seen = self._seen(endpoint, scope)
        if endpoint == _MCP:
            # The instructions of a server that has not started yet are still missing.
            whole = all(source.offer for source in seen)
            return _discovery(self._offer_of_all(seen), _FRESH_MS if whole else 0)
        if not seen:
            return Outcome(error=_disabled(endpoint))
        offer = self.offer(endpoint, scope)
        if offer is not None:
            return _discovery(offer, _FRESH_MS)
        if late or seen[0].down:
            return Outcome(error=self._unavailable(seen[0]))
        return None

    def _offer_of_all(self, seen: list[_Source]) -> Offer:
        capabilities: dict[str, Json] = {"logging": {}, "completions": {}}
        capabilities |= {"tools": {}, "prompts": {}, "resources": {"subscribe": True}}
        for name in ("extensions", "tasks"):  # what only some may have: the union, first come
            said = [one.offer.capabilities.get(name) for one in seen if one.offer]
            if some := [one for one in said if isinstance(one, dict)]:
                capabilities[name] = dict(itertools.chain(*(one.items() for one in some[::-1])))
        info = {"name": "atrax", "version": VERSION}
        instructions = "\n\n".join(
            f"## {source.name}\n{source.offer.instructions}"
            for source in seen
            if source.offer and source.offer.instructions
        )
        return Offer(capabilities, info, instructions, MODERN, "modern")

    def offer(self, server: str, scope: Scope) -> Offer | None:
        """What `server` said of itself when it was last ready, without what `scope` keeps away."""
        source = self._sources.get(server)
        offer = source.offer if source is not None and scope.sees(server) else None
        if offer is None or scope.whole(server):
            return offer
        said = offer.capabilities.items()
        part = {key: value for key, value in said if key not in _OF_THE_WHOLE}
        return dataclasses.replace(offer, capabilities=part)

    # ---- time, status ----

    def wake(self, now: float) -> None:
        """Readings that are due, waits that are over."""
        for source in self._sources.values():
            for stock in source.stocks.values():
                if stock.due is not None and stock.due <= now and stock.reading is None:
                    self._read(stock)
        for question in list(self._waits):
            if question.deadline <= now:
                self._settle(question, late=True)
        self._waits = [question for question in self._waits if not question.over]

    def counts(self, scope: Scope = EVERYTHING) -> dict[str, dict[str, Json]]:
        """Per server that `scope` sees: how many items of each kind it shows, and `settled`: its lists
        were read, or its first start has failed. Where nothing of it is kept away, also what is
        hidden and why, and `error`: why a list cannot be read."""
        nothing = {kind.value: 0 for kind in Kind}
        counts: dict[str, dict[str, Json]] = {
            name: {**nothing, "settled": True, **(_NOTHING_ODD if scope.all_of(name) else {})}
            for name in self._disabled
            if scope.sees(name)
        }
        for source in self._seen(_MCP, scope):
            stocks, name = source.stocks.values(), source.name
            shown = {kind: self._listings[name][kind].seen_by(scope).entries for kind in Kind}
            counts[name] = {
                **{kind.value: len(entries) for kind, entries in shown.items()},
                "settled": not any(stock.coming for stock in stocks),
            }
            if scope.all_of(name):
                hidden = ((one.kind, item) for one in stocks for item in self._hidden(one, scope))
                some = itertools.islice(hidden, _MOST_HIDDEN)
                counts[name] |= {
                    "hidden": [item.shown(kind) for kind, item in some],
                    "warnings": self._warnings(source, scope)[:_MOST_HIDDEN],
                    "error": next((stock.error for stock in stocks if stock.error), None),
                }
        return counts

    def offers(self) -> dict[str, dict[str, list[str]]]:
        """Per server: the names or URIs of what it shows, by kind, as on /mcp."""
        return {
            name: {
                kind.value: [entry.name for entry in stock.entries.values()]
                for kind, stock in source.stocks.items()
            }
            for name, source in self._sources.items()
        }

    # ---- pins ----

    def definitions(self, server: str) -> dict[str, dict[str, Json]] | None:
        """What a pinned server lists of tools that its rules let through, hidden ones too, as it sent
        them; None while its list could not be read."""
        stock = self._sources[server].stocks[Kind.TOOLS]
        if not stock.read or stock.error or stock.source.down:
            return None
        sent = {item["name"]: item for item in reversed(stock.raw) if _has_name(item)}
        rules = stock.source.config.tools
        return {own: item for own, item in sent.items() if not _ruled_out(rules, own)}

    def unapproved(self, server: str) -> dict[str, Entry]:
        """The tools of `server` that a pin hides, by its own names."""
        held = self._sources[server].stocks[Kind.TOOLS].withheld.values()
        return {one.own: one.entry for one in held if one.entry is not None}

    def review(self, server: str) -> None:
        """Judge the tools of `server` again, as it last listed them: what is approved has changed."""
        stock = self._sources[server].stocks[Kind.TOOLS]
        if stock.reading is not None:  # it may have judged some of them already
            stock.stop()
            stock.due = self._clock()
        if stock.read and stock.declared:
            again = _Reading(stock, self._ended)
            again.items, again.ttl_ms, stock.reading = stock.raw, stock.ttl_ms, again
            self._work(again, self._sort(stock, again.items, anew=True))

    # ---- reading ----

    def _read(self, stock: _Stock) -> None:
        stock.due, stock.began = None, self._clock()
        stock.reading = _Reading(stock, self._ended)
        stock.reading.start(self._pool)

    def _ended(self, reading: _Reading) -> None:
        stock, error = reading.stock, reading.error
        if error is not None and error.code != METHOD_NOT_FOUND:
            # The old items stay; once more after a pause.
            stock.reading, (first, longest) = None, _READ_AGAIN
            stock.pause = min(stock.pause * 2 or first, longest)
            stock.due = self._clock() + stock.pause
            stock.error = f"{_METHODS[stock.kind]} cannot be read: {error.message} ({error.code})"
            self._say(stock, "warning", f"{stock.error}; again in {stock.pause:g} s")
            self._moved()
            return
        # Declared, but not implemented (-32601): common, and an empty list to every client.
        if reading.fault:
            self._say(stock, "error", f"{_METHODS[stock.kind]} is cut off: {reading.fault}")
        self._work(reading, self._sort(stock, reading.items))

    def _work(self, reading: _Reading, sorting: Iterator[None]) -> None:
        """Sort what was read, 5 ms in one turn of the loop, the rest in the next."""
        stock, end = reading.stock, time.perf_counter() + _SLICE
        if stock.reading is not reading:
            return  # stopped between two turns
        for _ in sorting:
            if time.perf_counter() > end:
                self._later(0.0, lambda: self._work(reading, sorting))
                return
        stock.reading, stock.pause, stock.error = None, 0.0, ""
        stock.ttl_ms = _FRESH_MS if reading.ttl_ms is None else reading.ttl_ms
        self._moved()

    def _sort(self, stock: _Stock, raw: list[Json], anew: bool = False) -> Iterator[None]:
        """Make `raw` the server's list, and show it where it is visible; yields after each item.

        `anew`: what looks as it did is judged again too."""
        known: dict[str, Entry | _Hidden] = {one.own: one for one in stock.withheld.values()}
        known |= {entry.own: entry for entry in stock.entries.values()}
        entries: dict[str, Entry] = {}  # the first keeps the name
        hidden: list[_Hidden] = []
        withheld: dict[str, _Hidden] = {}
        for item in raw:
            one = self._judge(stock, item, entries, known, anew)
            if isinstance(one, Entry):
                entries[one.local] = one
            else:
                hidden.append(one)
                if one.entry is not None:
                    withheld.setdefault(one.entry.local, one)
            yield
        stock.read, stock.entries, stock.hidden, stock.withheld = True, entries, hidden, withheld
        stock.raw = raw if stock.source.config.pin else []
        self._show(stock)

    def _judge(
        self,
        stock: _Stock,
        item: Json,
        taken: Mapping[str, Entry],
        known: Mapping[str, Entry | _Hidden],
        anew: bool,
    ) -> Entry | _Hidden:
        """`item` as it is shown, or why nobody can see it. `known`: what was seen until now."""
        source, key = stock.source, _URI_MEMBERS.get(stock.kind, "name")
        for member in dict.fromkeys((key, "name")):
            # Strict clients refuse a whole list for one such item.
            value = item.get(member) if isinstance(item, dict) else None
            if not (isinstance(value, str) and value):
                return _Hidden(encode(item)[:80].decode(errors="replace"), f'it has no "{member}"')
        own: str = item[key]
        if stock.kind is Kind.TOOLS and (rule := _ruled_out(source.config.tools, own)):
            return _Hidden(own, rule, wanted=True)
        entry = self._entry(stock, own, item)
        if first := taken.get(entry.local):
            taken_by = f'its name "{entry.local[:120]}" is taken by "{first.own[:120]}"'
            twice = "listed twice; the first one counts"
            return _Hidden(own, twice if first.own == own else taken_by)
        before = known.get(own)
        seen = before.entry if isinstance(before, _Hidden) else before
        same = seen is not None and seen.looks_like(entry)
        if before is not None and same and not anew:
            return before
        reason = self._check(entry)
        if entry.unapproved is not None:
            return _Hidden(own, reason, digest=entry.unapproved.digest, entry=entry)
        if reason:
            return _Hidden(own, reason)
        return before if same and isinstance(before, Entry) else entry

    def _entry(self, stock: _Stock, own: str, item: dict[str, Json]) -> Entry:
        source, kind = stock.source, stock.kind
        source_text = encode(item)
        entry = Entry(kind, source.name, own, own, own, item, source_text, source_text)
        if kind in _URI_MEMBERS:
            return entry
        if kind is Kind.TOOLS:
            rules = source.config.tools
            entry.local = rules.rename.get(own, own)
            globs = (
                rules.describe[glob] for glob in rules.describe if fnmatch.fnmatchcase(own, glob)
            )
            entry.description = rules.describe.get(own, next(globs, None))
        entry.name = source.prefix + entry.local
        if source.others and entry.name.startswith(tuple(prefix for prefix, _ in source.others)):
            belongs = max(one for one in source.others if entry.name.startswith(one[0]))
            entry.alike = belongs[1]
        return entry

    def _say(self, stock: _Stock, level: str, text: str) -> None:
        self._record.emit("catalogue.reading", level, server=stock.source.name, message=text)

    def _say_hidden(self, stock: _Stock) -> None:
        # One line, however many: a server decides how long its list is, not how long the log.
        hidden = self._hidden(stock)
        new = [one for one in hidden if not one.wanted and one not in stock.told]
        # A change that a pin hides is told once, even if its server takes it back and does it again.
        pinned = [one for one in stock.told if one.digest][:_MOST_HIDDEN]
        stock.told = frozenset((*hidden, *pinned))
        name, hide = stock.source.name, f"its {stock.kind.value} hide "
        if some := [(one.own, one.reason) for one in new if not one.digest]:
            self._record.emit(
                "catalogue.hidden", "warning", server=name, message=hide + _some(some)
            )
        if some := [(one.own, one.reason) for one in new if one.digest]:
            self._record.alarm("pin.changed", hide + _some(some), server=name)

    def _say_alike(self, stock: _Stock) -> None:
        alike, name = self._alike(stock), stock.source.name
        if new := [pair for pair in alike if pair not in stock.told_alike]:
            stock.told_alike = frozenset(alike)
            self._record.emit("catalogue.lookalike", "warning", server=name, message=_some(new))

    # ---- showing ----

    def _show(self, stock: _Stock) -> None:
        """Make the listings of both endpoints anew, and tell where the visible one has changed."""
        kind, changed = stock.kind, []
        same = self._listings[stock.source.name][kind].entries == list(stock.entries.values())
        if same and not stock.source.config.pin:  # a pin may reserve names, or free them
            self._say_hidden(stock)
            return
        stocks = [source.stocks[kind] for source in self._sources.values()]
        # Who changes an approved tool must not thereby hand its name to another server.
        reserved: dict[str, tuple[int, Entry]] = {}
        for place, one in enumerate(stocks):
            for held in one.withheld.values():
                if held.entry and held.entry.unapproved and not held.entry.unapproved.new:
                    reserved.setdefault(held.entry.name, (place, held.entry))
        self._reserved[kind] = {name: entry for name, (_, entry) in reserved.items()}
        merged = [
            entry
            for place, one in enumerate(stocks)
            for entry in one.entries.values()
            if not (reserved and place > reserved.get(entry.name, (place, entry))[0])
        ]
        for endpoint, offered in ((stock.source.name, stock.entries.values()), (_MCP, merged)):
            old, listing = self._listings[endpoint][kind], _Listing(kind, bool(endpoint), offered)
            if listing.offered != old.offered:
                self._listings[endpoint][kind] = listing
                changed.append((endpoint, old, listing))
        for one in stocks:
            self._say_hidden(one)
            self._say_alike(one)
        for endpoint, old, listing in changed:
            self._tell(kind, endpoint, old, listing)

    def _hidden(self, stock: _Stock, scope: Scope = EVERYTHING) -> list[_Hidden]:
        """What of a list nobody sees, and what lost its name on /mcp to an earlier server."""
        return [*stock.hidden, *self._lost(stock, scope)]

    def _lost(self, stock: _Stock, scope: Scope) -> list[_Hidden]:
        """What has its name on /mcp no more. Who must not see the server that has it is not told."""
        merged, reserved = self._listings[_MCP][stock.kind].table, self._reserved[stock.kind]
        return [
            _Hidden(entry.own, f'on /mcp "{entry.name[:120]}" is of {_whose(first, scope)}')
            for entry in stock.entries.values()
            if (first := merged.get(entry.name) or reserved.get(entry.name, entry)) is not entry
        ]

    def _alike(self, stock: _Stock, scope: Scope = EVERYTHING) -> list[tuple[str, str]]:
        """Tools that a model or a person can take for another server's, by own name, and why."""
        if stock.kind is not Kind.TOOLS:
            return []
        alike = [
            (entry.own, f'"{entry.name[:120]}" looks like a tool of "{entry.alike}"')
            for entry in stock.entries.values()
            if entry.alike and scope.sees(entry.alike)
        ]
        if stock.source.prefix:
            return alike
        # Bare names can be anything.
        table, own = self._listings[_MCP][Kind.TOOLS].table, stock.source.name
        shown = {_folded(name): one for name, one in table.items() if one.server != own}
        for entry in stock.entries.values():
            other = shown.get(_folded(entry.name), entry)
            if other.name != entry.name and not entry.alike and scope.sees(other.server):
                text = f'"{entry.name[:120]}" looks like "{other.name[:120]}" of "{other.server}"'
                alike.append((entry.own, text))
        return alike

    def _warnings(self, source: _Source, scope: Scope) -> list[dict[str, Json]]:
        """What is shown and yet suspicious, or taken by another server."""
        found: list[tuple[str, str, str]] = []
        if source.offer is not None and source.offer.warning:
            found.append(("instructions", "", source.offer.warning))
        for kind, stock in source.stocks.items():
            pairs = [(one.own, text) for one in stock.entries.values() for text in one.warnings]
            pairs += self._alike(stock, scope)
            pairs += [(one.own, one.reason) for one in self._lost(stock, scope)]
            found += [(kind.value, own, text) for own, text in pairs]
        return [{"kind": kind, "name": own, "warning": text} for kind, own, text in found]

    def _tell(self, kind: Kind, endpoint: str, old: _Listing, new: _Listing) -> None:
        # Kept for this once: thousands may listen, with few scopes among them.
        @functools.cache
        def changed(scope: Scope) -> bool:
            return old.seen_by(scope).entries != new.seen_by(scope).entries

        for watcher in list(self.watch):
            watcher(kind, endpoint, changed)

    # ---- waiting ----

    def _seek(
        self, find: Callable[[bool], Any], then: Callable[[Any], None], limit: float
    ) -> Lease:
        """Tell `then` what `find` gives, now or when something has moved, at last after `limit`."""
        question = _Question(find, then, self._clock() + limit)
        self._settle(question, late=len(self._waits) >= _MOST_WAITING)
        if not question.over:
            self._waits.append(question)
        return question

    def _moved(self) -> None:
        for question in list(self._waits):
            self._settle(question, late=False)

    def _settle(self, question: _Question, late: bool) -> None:
        found = None if question.over else question.find(late)
        if found is not None:
            question.over = True  # first: what `then` leads to may come back here
            question.then(found)

    def _patience(self, endpoint: str) -> float:
        """How long a list or discover waits for the servers of `endpoint`, in seconds."""
        source = self._sources.get(endpoint)
        return _FIRST_WAIT if source is None else source.config.start_timeout

    def _unavailable(self, source: _Source) -> Error:
        """1010 for a server that nothing is known of; the Pool knows why and for how long."""
        told: list[Link | Error] = []
        self._pool.lease(source.name, None, "", told.append).cancel()
        if told and isinstance(told[0], Error):
            return told[0]
        text = f'the server "{source.name}" is not available: its lists could not be read yet'
        state = "backoff" if source.down else "ready" if source.offer else "starting"
        return own_error(UNAVAILABLE, text, "unavailable", source.name, state=state, retryAfter=1)


def _ruled_out(rules: ToolRules, own: str) -> str:
    """Why the config does not want a tool, or ""."""
    if rules.allow is not None and not any(fnmatch.fnmatchcase(own, glob) for glob in rules.allow):
        return "not in tools.allow"
    denied = next((glob for glob in rules.deny if fnmatch.fnmatchcase(own, glob)), None)
    return "" if denied is None else f'denied by tools.deny "{denied}"'


def _some(found: list[tuple[str, str]]) -> str:
    """The first of `found`, names and reasons, and how many more there are."""
    more = f", and {len(found) - 1} more; /status lists them" if len(found) > 1 else ""
    return f"{found[0][0][:80]}: {found[0][1]}{more}"


def _has_name(item: Json) -> bool:
    return isinstance(item, dict) and isinstance(item.get("name"), str) and item["name"] != ""


@functools.lru_cache(maxsize=10_000)
def _folded(name: str) -> str:
    """`name` without what the eye passes over: case, punctuation, full-width and the like."""
    return re.sub(r"[\W_]", "", unicodedata.normalize("NFKC", name).casefold())


def _whose(entry: Entry, scope: Scope) -> str:
    return f'"{entry.server}"' if scope.sees(entry.server) else "another server"


def _unapproved(entry: Entry) -> Error:
    """1012, to who could call the tool if it were approved."""
    how = "is new" if entry.unapproved and entry.unapproved.new else "was changed"
    text = f'the tool "{entry.own[:120]}" {how} since the tools of "{entry.server}" were approved'
    return own_error(NOT_ALLOWED, f"{text}; it is hidden until it is too", "pin", entry.server)


def _unknown(kind: Kind, name: str) -> Error:
    if kind in _URI_MEMBERS:
        return Error(INVALID_PARAMS, "Resource not found", {"uri": name})
    return Error(INVALID_PARAMS, f"Unknown {kind.value[:-1]}: {name[:200]}")


def _disabled(server: str) -> Error:
    text = f'the server "{server}" is disabled or not in the config'
    return own_error(UNAVAILABLE, text, "disabled", server, state="disabled")


def _discovery(offer: Offer, ttl_ms: int) -> Outcome:
    """A DiscoverResult (2026-07-28, server/discover), with the listChanged that Atrax adds.

    For every list: one whose server announces nothing is read again from time to time."""
    capabilities = dict(offer.capabilities)
    for name in ("tools", "prompts", "resources"):
        said = capabilities.get(name)
        if said is not None and said is not False:
            capabilities[name] = {**(said if isinstance(said, dict) else {}), "listChanged": True}
    result: dict[str, Json] = {
        "supportedVersions": [MODERN],
        "capabilities": capabilities,
    }
    if offer.info:  # a modern server need not name itself, but an empty name is malformed
        result["_meta"] = {META_SERVER: offer.info}
    if offer.instructions:
        result["instructions"] = offer.instructions
    return Outcome(result=result, ttl_ms=ttl_ms)


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
    "toolsListChanged": Kind.TOOLS,
    "promptsListChanged": Kind.PROMPTS,
    "resourcesListChanged": Kind.RESOURCES,
}
_ACKNOWLEDGED: Final = "notifications/subscriptions/acknowledged"
_UPDATED: Final = "notifications/resources/updated"
_TASK_STATE: Final = "notifications/tasks"
_ACK_WAIT: Final = 5.0  # seconds; what no server has accepted by then is not honoured
_OPEN_WAIT: Final = 30.0  # seconds for a server to acknowledge a listen
_REOPEN: Final = (0.2, 30.0)  # first and longest pause before a lost stream is opened again
_STEADY: Final = 10.0  # seconds after which a stream counts as good, and the pauses begin anew
_MOST_URIS: Final = 1_000  # in one listen; and as many tasks
_MOST_URIS_IN_ALL: Final = 100_000
_MOST_SENT: Final = 1_000  # elicitations by URL whose end may still be told


class _Listen:
    """One `subscriptions/listen` of a client, and its Handle.

    Its acknowledgement waits until each URI was accepted, refused, or 5 s have passed; what happens
    before goes out right behind it, since nothing may come first."""

    def __init__(self, door: Subscriptions, call: Call, sink: Sink, now: float) -> None:
        self.door, self.call, self.sink = door, call, sink
        self.kinds: dict[Kind, str] = {}  # lists whose changes are told: their flags
        self.asked: list[str] = []  # URIs, in the client's order
        self.lookups: dict[str, Lease] = {}  # URI → the search for its server
        self.upstreams: dict[str, _Upstream] = {}  # URI → where it is wanted
        self.accepted: set[str] = set()
        self.tasks: dict[tuple[str, str], _TaskStream] = {}  # server, place
        self.early: dict[tuple[str, str], Notice] = {}  # what happened before the acknowledgement
        self.acknowledged = False
        self.over = False
        self.deadline = now + _ACK_WAIT

    def answer(self, ask: Ask, outcome: Outcome) -> None: ...
    def note(self, notice: Notice) -> None: ...

    def cancel(self, reason: str) -> None:
        self.end(Outcome(error=Error(CANCELLED, reason)))

    def end(self, outcome: Outcome) -> None:
        if not self.over:
            self.over = True
            self.door.forget(self)
            self.sink.done(outcome)

    def settle(self) -> None:
        """Acknowledge, once nothing is open."""
        waiting = self.lookups or len(self.accepted) < len(self.upstreams)
        waiting = waiting or any(stream.accepted is None for stream in self.tasks.values())
        if waiting or self.acknowledged or self.over:
            return
        self.acknowledged = True
        honoured: dict[str, Json] = dict.fromkeys(self.kinds.values(), True)
        uris = [uri for uri in self.asked if uri in self.accepted]
        if uris:
            honoured["resourceSubscriptions"] = uris
        if tasks := [task for stream in self.tasks.values() for task in stream.accepted or ()]:
            honoured["taskIds"] = tasks
        self.sink.note(Notice(_ACKNOWLEDGED, {"notifications": honoured}))
        for notice in self.early.values():
            self.tell(notice)

    def tell(self, notice: Notice) -> None:
        if self.over:
            return
        if self.acknowledged:
            self.sink.note(notice)
        else:
            # Keyed: two changes of one thing before the acknowledgement are one.
            params = notice.params
            about = params.get("uri") or params.get("taskId") or params.get("elicitationId", "")
            self.early[notice.method, about] = notice


class _Stream(_OwnCall):
    """One upstream listen with a fixed set of URIs."""

    def __init__(self, upstream: _Upstream, uris: frozenset[str], since: float) -> None:
        super().__init__()
        self.upstream, self.uris, self.since = upstream, uris, since
        self.accepted: frozenset[str] = frozenset()
        self._starter = upstream.owner

    def open(self) -> None:
        pool, server = self.upstream.door.pool, self.upstream.server
        lease = pool.lease(server, self._starter, "", self._ready)
        self._lease = self._lease or lease

    def _ready(self, link: Link | Error) -> None:
        if self.over:
            return
        if not isinstance(link, Error):
            owner = self.upstream.owner or Owner("atrax")
            wanted: dict[str, Json] = {"resourceSubscriptions": sorted(self.uris)}
            call = Call("subscriptions/listen", {"notifications": wanted}, owner, MODERN)
            self.send(link, call)
        elif self._starter is None and (somebody := self.upstream.somebody()) is not None:
            # Atrax alone starts no stopped server (seam Pool), but a client that listens is use.
            self._lease, self._starter = None, somebody
            self.open()
        else:
            self.done(Outcome(error=link))

    def note(self, notice: Notice) -> None:
        if self.over:
            return
        if notice.method == _ACKNOWLEDGED:
            self.accepted = self.uris.intersection(_honoured(notice, "resourceSubscriptions"))
            self.upstream.acknowledged(self)
        elif notice.method == _UPDATED and self is self.upstream.current:
            self.upstream.updated(notice)

    def done(self, outcome: Outcome) -> None:
        if not self.over:
            self.over = True
            self.upstream.ended(self, outcome.error)


class _TaskStream(_OwnCall):
    """What one process tells of tasks that one client listens for.

    Neither shared nor opened again, unlike that of resources: a task ends with its process."""

    def __init__(self, listen: _Listen, tasks: list[str]) -> None:
        super().__init__()
        self.listen, self.tasks = listen, tasks
        self.accepted: list[str] | None = None  # None until acknowledged

    def open(self, server: str, owner: Owner | None, place: str) -> None:
        self._lease = self.listen.door.pool.lease(server, owner, place, self._ready)

    def _ready(self, link: Link | Error) -> None:
        if isinstance(link, Error):
            self.done(Outcome(error=link))
        elif not self.over:
            params: dict[str, Json] = {"notifications": {"taskIds": self.tasks}}
            self.send(link, dataclasses.replace(self.listen.call, params=params))

    def note(self, notice: Notice) -> None:
        if self.over:
            return
        if notice.method == _ACKNOWLEDGED:
            self._settle(_honoured(notice, "taskIds"))
        elif notice.method == _TASK_STATE and notice.params.get("taskId") in self.tasks:
            self.listen.tell(notice)

    def done(self, outcome: Outcome) -> None:
        if not self.over:
            self.over = True
            self._settle([])

    def give_up(self) -> None:
        """Wait no longer for an acknowledgement."""
        if self.accepted is None:
            self.cancel()
            self.accepted = []

    def _settle(self, accepted: list[str]) -> None:
        if self.accepted is None:
            self.accepted = [task for task in self.tasks if task in accepted]
            self.listen.settle()


class _Upstream:
    """What is wanted of one server (isolated: of one owner's child), and the stream of it."""

    def __init__(self, door: Subscriptions, server: str, owner: Owner | None) -> None:
        self.door, self.server, self.owner = door, server, owner
        self.wanted: dict[str, dict[_Listen, None]] = {}  # URI → who wants it, in order
        self.current: _Stream | None = None
        self.opening: _Stream | None = None
        self.lost: frozenset[str] = frozenset()  # of a lost stream: changes may have been missed
        self.due: float | None = None  # when to open again
        self.pause = 0.0  # the last one

    # ---- what listens want; `adjust` is to be called afterwards ----

    def want(self, uri: str, listen: _Listen) -> None:
        """Bring updates of `uri` to `listen`."""
        self.wanted.setdefault(uri, {})[listen] = None
        listen.upstreams[uri] = self
        if self.current is not None and uri in self.current.accepted:
            listen.accepted.add(uri)

    def release(self, uri: str, listen: _Listen) -> None:
        """The reverse."""
        del listen.upstreams[uri]
        listen.accepted.discard(uri)
        self.wanted[uri].pop(listen)
        if not self.wanted[uri]:
            del self.wanted[uri]
            self.lost -= {uri}

    def refuse(self, uri: str) -> None:
        """The server sends no updates of `uri` (any more)."""
        listens = list(self.wanted.get(uri, ()))
        if any(uri in listen.accepted for listen in listens):
            text = (
                f"sends no updates of {uri[:200]} any more, though clients were told that it does"
            )
            self.door.record.emit(
                "subscription.refused", "warning", server=self.server, message=text
            )
        for listen in listens:
            self.release(uri, listen)
            listen.settle()

    def somebody(self) -> Owner | None:
        """The owner of one of those who listen."""
        return next((listen.call.owner for one in self.wanted.values() for listen in one), None)

    def adjust(self) -> None:
        """Open what is wanted and not there; end what nobody wants."""
        wanted = frozenset(self.wanted)
        if not wanted:
            for stream in (self.opening, self.current):
                if stream is not None:
                    stream.cancel()
            self.opening = self.current = self.due = None
            return
        if self.opening is not None or self.due is not None:
            return  # its acknowledgement, or `wake`, comes back here
        if self.current is None or wanted != self.current.accepted:
            self.opening = _Stream(self, wanted, self.door.now())
            self.opening.open()

    def wake(self, now: float) -> None:
        if self.opening is not None and now - self.opening.since > _OPEN_WAIT:
            self.opening.cancel()
            text = f"no acknowledgement within {_OPEN_WAIT:g} s"
            self.ended(self.opening, Error(TIMED_OUT, text))
        if self.due is not None and self.due <= now:
            self.due = None
            self.adjust()

    # ---- what its streams say ----

    def acknowledged(self, stream: _Stream) -> None:
        if stream is not self.opening:
            return
        stream.since = self.door.now()
        old, self.current, self.opening = self.current, stream, None
        if old is not None:
            old.cancel()
        missed, self.lost = self.lost & stream.accepted, frozenset()
        for uri in sorted(stream.accepted):
            for listen in list(self.wanted.get(uri, ())):
                listen.accepted.add(uri)
                listen.settle()
        for uri in sorted(missed):
            self.updated(Notice(_UPDATED, {"uri": uri}))
        for uri in stream.uris - stream.accepted:
            self.refuse(uri)
        self.adjust()

    def updated(self, notice: Notice) -> None:
        uri = notice.params.get("uri")
        if not isinstance(uri, str):
            return
        listens = self.wanted.get(uri)
        if listens is None:
            # "This might be a sub-resource of the one that the client actually subscribed to"
            # (schema, ResourceUpdatedNotificationParams).
            parents = (self.wanted.get(parent, ()) for parent in _parents(uri))
            listens = dict.fromkeys(itertools.chain.from_iterable(parents))
        for listen in list(listens):
            listen.tell(notice)

    def ended(self, stream: _Stream, error: Error | None) -> None:
        """A stream that we did not end: once more, after a pause."""
        now = self.door.now()
        if stream is self.current:
            self.current, self.lost = None, self.lost | stream.accepted
            if now - stream.since > _STEADY:
                self.pause = 0.0
        else:
            self.opening = None
            if error is not None and error.code in (METHOD_NOT_FOUND, INVALID_PARAMS):
                # The server takes no listen, or not this one.
                held = frozenset() if self.current is None else self.current.accepted
                for uri in stream.uris - held:
                    self.refuse(uri)
                self.adjust()
                return
        self.pause = min(self.pause * 2 or _REOPEN[0], _REOPEN[1])
        self.due = max(self.due or 0.0, now + self.pause)
        why = "ended by the server" if error is None else error.message
        text = f"its subscription to {len(self.wanted)} resources is opened again: {why}"
        self.door.record.emit("subscription.lost", server=self.server, message=text)


def _honoured(acknowledgement: Notice, member: str) -> list[str]:
    """What a server's acknowledgement names as `member` of the filter."""
    return _named(acknowledgement.params.get("notifications"), member)


def _named(filter_: Json, member: str) -> list[str]:
    """The strings in a list of a filter, each once; whatever else is there comes from nobody who
    would need an error."""
    names = filter_.get(member) if isinstance(filter_, dict) else None
    found = names if isinstance(names, list) else ()
    return list(dict.fromkeys(name for name in found if isinstance(name, str)))


def _parents(uri: str) -> Iterator[str]:
    """What `uri` may lie in: all that stands before one of its slashes, with and without it."""
    for slash in re.finditer("/", uri[:_LONGEST_URI]):
        yield uri[: slash.start()]
        yield uri[: slash.end()]


class Subscriptions:
    """All listens: a Door for them, and `up`, `down` and `told` of Shelf."""

    def __init__(
        self,
        config: Config,
        catalogue: Catalogue,
        pool: Pool,
        record: Record,
        clock: Callable[[], float],
        home: Callable[[Call, Json], tuple[str, str] | None],
    ) -> None:
        self._config, self._catalogue = config, catalogue
        self._home = home  # server and place of a task, as the maker of a call may see it
        self.pool, self.record, self.now = pool, record, clock
        self._listens: dict[_Listen, None] = {}
        self._unsettled: deque[_Listen] = deque()  # oldest first, each for 5 s
        self._upstreams: dict[tuple[str, Owner | None], _Upstream] = {}
        self._uris = 0  # over all listens
        self._sent: OrderedDict[tuple[str, str], Owner] = OrderedDict()  # server, elicitationId
        self._closed = False
        catalogue.watch.append(self.listed)

    # ---- the client's side ----

    def open(self, call: Call, sink: Sink) -> Handle:
        """A `subscriptions/listen`: acknowledged with what is honoured, open until cancelled."""
        listen = _Listen(self, call, sink, self.now())
        self._read_filter(listen)
        error = self._full(listen.asked)
        if error is not None:
            listen.over = True
            sink.done(Outcome(error=error))
            return listen
        self._listens[listen] = None
        self._unsettled.append(listen)
        self._uris += len(listen.asked)
        self._find(listen)
        return listen

    def _read_filter(self, listen: _Listen) -> None:
        call = listen.call
        wanted = call.params.get("notifications")
        wanted = wanted if isinstance(wanted, dict) else {}
        # On its own endpoint cut to what can change there; a server not yet started may have any.
        offer = self._catalogue.offer(call.endpoint, call.owner.scope) if call.endpoint else None
        for flag, kind in _LIST_FLAGS.items():
            there = offer is None or offer.capabilities.get(kind.value) not in (None, False)
            if there and wanted.get(flag) is True:
                listen.kinds[kind] = flag
        listen.asked = _named(wanted, "resourceSubscriptions")
        homes: dict[tuple[str, str], list[str]] = {}
        for task in _named(wanted, "taskIds")[:_MOST_URIS]:
            if (home := self._home(call, task)) is not None:
                homes.setdefault(home, []).append(task)
        listen.tasks = {home: _TaskStream(listen, tasks) for home, tasks in homes.items()}

    def _full(self, uris: list[str]) -> Error | None:
        # Listens themselves are bounded: each holds a connection or a session.
        if self._closed:
            return own_error(UNAVAILABLE, "Atrax is stopping", "stopping")
        if len(uris) > _MOST_URIS:
            text = f"params.notifications.resourceSubscriptions: {_MOST_URIS:,} URIs at most"
            return Error(INVALID_PARAMS, text)
        if self._uris + len(uris) > _MOST_URIS_IN_ALL:
            text = f"{self._uris:,} resources are subscribed to"
            return own_error(OVERLOADED, text, "subscriptions")
        return None

    def _find(self, listen: _Listen) -> None:
        """Look all URIs up; then one stream per server, not one per URI."""
        gathering = True

        def found(uri: str, entry: Entry | Error) -> None:
            del listen.lookups[uri]
            upstream = None if isinstance(entry, Error) else self._upstream(listen, entry.server)
            if upstream is not None:
                upstream.want(uri, listen)
            if not gathering:
                self._adjust([upstream] if upstream is not None else [])
                listen.settle()

        listen.lookups = dict.fromkeys(listen.asked, _SETTLED)
        for uri in listen.asked:
            then = functools.partial(found, uri)
            endpoint, owner = listen.call.endpoint, listen.call.owner
            lease = self._catalogue.lookup(Kind.RESOURCES, endpoint, uri, then, owner)
            if uri in listen.lookups:
                listen.lookups[uri] = lease
        gathering = False
        self._adjust(listen.upstreams.values())
        for (server, place), stream in listen.tasks.items():
            stream.open(server, self._whose(listen, server), place)
        listen.settle()

    def _adjust(self, upstreams: Iterable[_Upstream]) -> None:
        for upstream in dict.fromkeys(upstreams):
            upstream.adjust()

    def _upstream(self, listen: _Listen, server: str) -> _Upstream | None:
        """Where `listen` gets updates of this server's resources; None if the server sends none."""
        offer = self._catalogue.offer(server, listen.call.owner.scope)
        resources = offer.capabilities.get("resources") if offer is not None else None
        if not isinstance(resources, dict) or resources.get("subscribe") is not True:
            return None
        whose = self._whose(listen, server)
        key = (server, whose)
        if key not in self._upstreams:
            self._upstreams[key] = _Upstream(self, server, whose)
        return self._upstreams[key]

    def _whose(self, listen: _Listen, server: str) -> Owner | None:
        """Whose child of `server` the listen is for; None for the shared one."""
        owner, isolation = listen.call.owner, self._config.servers[server].isolation
        return {"shared": None, "principal": Owner(owner.principal)}.get(isolation, owner)

    # ---- what happens ----

    def listed(self, kind: Kind, endpoint: str, changed: Callable[[Scope], bool]) -> None:
        """A list has changed for those with a scope that `changed` says (called by the Catalogue)."""
        if kind is Kind.TEMPLATES:
            kind = Kind.RESOURCES  # the templates' changes are told as the resources' are
        notice = Notice(f"notifications/{kind.value}/list_changed", {})
        for listen in list(self._listens):
            call = listen.call
            if kind in listen.kinds and call.endpoint == endpoint and changed(call.owner.scope):
                listen.tell(notice)

    def up(self, server: str, offer: Offer) -> None:
        """The server is ready (again): its lost streams are opened now."""
        for upstream in list(self._upstreams.values()):
            if upstream.server == server and upstream.due is not None:
                upstream.pause, upstream.due = 0.0, self.now()
                upstream.wake(upstream.due)

    def down(self, server: str) -> None:
        """Nothing to do: the streams of dead processes have ended by themselves."""

    def sent(self, owner: Owner, server: str, elicitations: Json) -> None:
        """Remember which session a server has sent to a URL: that one alone hears of the end."""
        for one in elicitations if isinstance(elicitations, list) and owner.session else ():
            ident = one.get("elicitationId") if isinstance(one, dict) else None
            if isinstance(ident, str):
                self._sent[server, ident] = owner
        while len(self._sent) > _MOST_SENT:
            self._sent.popitem(last=False)

    def told(self, server: str, place: str, notice: Notice) -> None:
        """What a child said outside any call, to the sessions that it is for: they have no filter for it.

        The state of a task goes to whom it was made for (2025-11-25, basic/utilities/tasks), the end of
        an elicitation by URL to who was sent there (client/elicitation); all else nowhere."""
        self.record.count("untold", server=server)
        if notice.method == "notifications/elicitation/complete":
            owner = self._sent.get((server, str(notice.params.get("elicitationId"))))
            # Not looked for where nobody was sent: there may be 20,000, and a child that floods.
            for listen in [one for one in self._listens if owner and one.call.owner == owner]:
                if listen.call.owner.scope.sees(server):
                    listen.tell(notice)
        if notice.method != "notifications/tasks/status":
            return
        for listen in list(self._listens):
            call = listen.call
            task = notice.params.get("taskId")
            if call.owner.session and self._home(call, task) == (server, place):
                listen.tell(notice)

    def wake(self, now: float) -> None:
        """Acknowledgements that have waited long enough, streams that are due or late."""
        while self._unsettled and self._unsettled[0].deadline <= now:
            listen = self._unsettled.popleft()
            if not listen.acknowledged:
                self._give_up(listen, set(listen.upstreams) - listen.accepted)
                for stream in listen.tasks.values():
                    stream.give_up()
                listen.settle()
        for upstream in list(self._upstreams.values()):
            upstream.wake(now)
        self._upstreams = {key: one for key, one in self._upstreams.items() if one.wanted}

    def close(self) -> None:
        """End all listens gracefully, for shutdown: each gets its result."""
        self._closed = True
        for listen in list(self._listens):
            listen.end(Outcome(result={}))

    # ---- for its parts ----

    def forget(self, listen: _Listen) -> None:
        """A listen is over: drop what only it wanted."""
        del self._listens[listen]
        self._uris -= len(listen.asked)
        self._give_up(listen, set(listen.upstreams))
        for stream in listen.tasks.values():
            stream.cancel()

    def _give_up(self, listen: _Listen, uris: Iterable[str]) -> None:
        """No longer search for anything for `listen`, nor want `uris`."""
        for lease in listen.lookups.values():
            lease.cancel()
        listen.lookups.clear()
        upstreams = [listen.upstreams[uri] for uri in uris]
        for uri in uris:
            listen.upstreams[uri].release(uri, listen)
        self._adjust(upstreams)


# ==== Policy ======================================================================
# What may pass: params and answers by version, tool definitions, arguments and their headers.
# Knows the shapes of the specification, and JSON Schema. Must not know how a call came in, or where
# it goes.

# ---- Patterns ----
# A schema's regular expressions are ECMA-262 and come from strangers. They run on Rust's engine: it
# is linear in the text, but also in the size of the expression: "[01]*1[01]{3000}" takes 23 us a
# character. So the size is counted (a repetition counts as often as it repeats), and text times
# size is paid for from the budget of the validation. Python's own parser reads them: what it takes
# means the same in ECMA-262, but for \d, \w, \s, `.` and `$`, which are written as they are meant.
# Look-around and back-references have no linear engine: such a pattern is not checked, nor is one
# that only one of the two languages has (\p{L}), and an event says so.

_PATTERN_SIZE: Final = 5_000  # steps and characters; compiling that takes 5 ms
# With so few steps there are at most 4,096 sets of them, which the engine keeps: 10 ns a character.
_PATTERN_SMALL: Final = 12
_PARSER: Final[Any] = re._parser  # type: ignore[attr-defined]  # a module since 3.11
_SPACES: Final = r"\t\n\x0b\x0c\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
# What has a name for Python's parser: as Rust has it, and how many steps that compiles to.
_NAMED: Final = {
    "AT_BEGINNING": ("^", 1),
    "AT_END": ("$", 1),
    "AT_BOUNDARY": (r"(?-u:\b)", 1),
    "AT_NON_BOUNDARY": (r"(?-u:\B)", 1),
    "CATEGORY_DIGIT": ("0-9", 1),
    "CATEGORY_NOT_DIGIT": ("[^0-9]", 4),
    "CATEGORY_WORD": ("A-Za-z0-9_", 1),
    "CATEGORY_NOT_WORD": ("[^A-Za-z0-9_]", 4),
    "CATEGORY_SPACE": (_SPACES, 4),
    "CATEGORY_NOT_SPACE": (f"[^{_SPACES}]", 4),
}


# Whether the pattern occurs in a text; or why it cannot be checked.
_Pattern: TypeAlias = "Callable[[str, _Run], bool] | str"


@functools.lru_cache(maxsize=256)
def _pattern(pattern: str) -> tuple[_Pattern, int]:
    """The compiled pattern, and its size."""
    from pydantic_core import SchemaError, SchemaValidator, core_schema

    if len(pattern) > _PATTERN_SIZE:
        return "it is too large", 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about "[[", which means what it says
            parsed = _PARSER.parse(pattern)
        if parsed.state.flags != re.UNICODE:  # (?i) and the like
            return "it cannot be read", 0
        text, size = _rust(parsed)
        schema = core_schema.str_schema(pattern=text, regex_engine="rust-regex", strict=True)
        found = SchemaValidator(schema).isinstance_python
    except (re.error, SchemaError, OverflowError, RecursionError):
        return "it cannot be read", len(pattern)
    except ValueError as error:
        return str(error), len(pattern)
    # In twentieths of a unit a character: 10 ns, else 20 ns a step and some for few steps.
    rate = 1 if size <= _PATTERN_SMALL else (size + 16) * 20 // 12
    # Without an open repetition an anchored pattern is done after `size` characters.
    bounded = pattern.startswith("^") and not re.search(r"[*+|]|,\}", pattern)
    reach = size + 1 if bounded else sys.maxsize

    def finds(text: str, run: _Run) -> bool:
        length = min(len(text), reach)
        run.spend(4 + (length if text.isascii() else 4 * length) * rate // 20)
        return found(text)

    return finds, size


def _rust(parsed: Iterable[tuple[Any, Any]]) -> tuple[str, int]:
    """A parsed pattern in Rust's words, and how many steps that is; ValueError says what it has not."""
    texts, size = [], 0
    for kind, value in parsed:
        text, steps = _rust_part(kind.name, value)
        texts.append(text)
        size += steps
        if size > _PATTERN_SIZE:
            raise ValueError("it is too large")
    return "".join(texts), size


def _rust_part(kind: str, value: Any) -> tuple[str, int]:
    match kind:
        case "LITERAL":
            # What is no letter or digit may be an operator: "&&" and "~~" in Rust's brackets.
            text = chr(value)
            plain = text.isascii() and text.isalnum()
            return text if plain else f"\\x{{{value:x}}}", 1 if value < 128 else 3
        case "NOT_LITERAL":
            return _rust_part("IN", [(_PARSER.NEGATE, None), (_PARSER.LITERAL, value)])
        case "ANY":
            return r"[^\n\r\u2028\u2029]", 4
        case "AT" | "CATEGORY" if value.name in _NAMED:
            return _NAMED[value.name]
        case "NEGATE":
            return "^", 4
        case "RANGE":
            (first, _), (last, size) = (_rust_part("LITERAL", end) for end in value)
            return f"{first}-{last}", size
        case "IN":
            text, size = _rust(value)
            return f"[{text}]", size - len(value) + 1
        case "SUBPATTERN" if not value[1] and not value[2]:  # flags set and cleared
            text, size = _rust(value[3])
            return f"(?:{text})", size
        case "BRANCH":
            ways = [_rust(way) for way in value[1]]
            return f"(?:{'|'.join(text for text, _ in ways)})", sum(size + 1 for _, size in ways)
        case "MAX_REPEAT" | "MIN_REPEAT":
            least, most, inner = value
            text, size = _rust(inner)
            endless = most == _PARSER.MAXREPEAT
            times = max(1, least + 1 if endless else most)
            return f"(?:{text}){{{least},{'' if endless else most}}}", max(1, size) * times
        case "ASSERT" | "ASSERT_NOT":
            raise ValueError("it looks around")
        case "GROUPREF":
            raise ValueError("it refers back")
    raise ValueError("it cannot be read")


# ---- Schemas ----
# Arguments against `inputSchema`, which both come from strangers, on the one loop that serves all.
# jsonschema cannot be bounded to 50 ms: it takes 5 us a node, so that an honest array of 20,000
# items takes 0.1 s; each branch that fails prints the whole instance, 4 MiB of it, for each message;
# `pattern` backtracks and `uniqueItems` is quadratic. So a schema is compiled to closures here, one
# per keyword, kept by the type of the value they look at (0.2 us a node); its references are followed
# when the definition is read, and jsonschema is the oracle of the tests.
#
# Everything is paid for. A unit is about 0.2 us: a node visited is one, what takes longer (a pattern
# on a long text, a canonical form, compiling a node, which happens when it is first met) costs more.
# A validation that has spent its units is refused. Nothing is measured by a clock, so that the same
# call has the same end on every machine.
#
# A keyword that fails ends the validation, or that alternative of it. It leaves what it expected, and
# on the way back each parent adds the step to it: a valid call pays nothing for messages.

_UNITS: Final = 200_000
_REFERENCES: Final = 10_000
_VIOLATIONS: Final = 5  # in one message
_SCHEMA_BYTES: Final = 1024 * 1024
_SCHEMA_PARTS: Final = 12_000  # commas and brackets; looking at so many objects takes 30 ms
_SCHEMA_COST: Final = 10_000  # steps of all its patterns, 20 for each identifier: 1 us each
_SHOWN: Final = 60  # characters of a value that a message quotes
_CHOICES: Final = 20  # allowed values that a message names

_Test: TypeAlias = "Callable[[Json, _Run], bool]"
# A node and one of its keywords to a test; None where there is nothing to test.
_Builder: TypeAlias = "Callable[[_Node, str], _Test | None]"
_MAPS, _LISTS, _TEXTS, _NUMBERS = (dict,), (list,), (str,), (int, float)
_TYPES: Final[Mapping[str, tuple[str, tuple[type, ...]]]] = {
    "object": ("an object", _MAPS),
    "array": ("an array", _LISTS),
    "string": ("a string", _TEXTS),
    "number": ("a number", _NUMBERS),
    "integer": ("an integer", _NUMBERS),
    "boolean": ("true or false", (bool,)),
    "null": ("null", (type(None),)),
}
_ALL: Final = (dict, list, str, int, float, bool, type(None))
_NO_VALUE: Final = object()
_NO_RULE: Final[tuple[tuple[type, ...], _Builder]] = ((), lambda node, keyword: None)


class _Exhausted(Exception):
    """A validation has spent what it may."""


class _Unusable(Exception):
    """A definition that must be hidden; the text says why."""


class _Run:
    """One validation: what it may still spend, and what failed last."""

    __slots__ = ("left", "references", "failure")

    def __init__(self, units: int = _UNITS) -> None:
        self.left, self.references = units, _REFERENCES
        # What was expected, the value found, and the steps to it, the last one first.
        self.failure: tuple[str, Json, list[str | int]]

    def spend(self, units: int) -> None:
        """Pay for something; raises _Exhausted."""
        if units > self.left:
            raise _Exhausted
        self.left -= units

    def fail(self, text: str, value: Json = _NO_VALUE) -> bool:
        """False; `text` says what was expected instead of `value`."""
        self.left -= 2
        self.failure = (text, value, [])
        return False

    def under(self, step: str | int) -> bool:
        """False; what failed lies under `step`."""
        self.failure[2].append(step)
        return False

    def line(self) -> str:
        """What failed last, for a reader."""
        text, value, steps = self.failure
        names = (f"[{step}]" if isinstance(step, int) else f".{_cut(step)}" for step in steps[::-1])
        path = "".join(names)
        if len(path) > 300:
            path = f"{path[:150]}…{path[-150:]}"
        return f"{path} {text}" + ("" if value is _NO_VALUE else f", but is {_shown(value)}")


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _shown(value: Json) -> str:
    """`value` for a message, in few characters however large it is."""
    if isinstance(value, str):
        return json.dumps(_cut(value), ensure_ascii=False)
    if isinstance(value, dict):
        return "an object"
    return f"an array of {len(value)} items" if isinstance(value, list) else json.dumps(value)


def _choices(values: Sequence[Json]) -> str:
    return ", ".join(map(_shown, values[:_CHOICES])) + ", …" * (len(values) > _CHOICES)


def _described(schema: Json) -> str:
    """A schema in some words, for "must be … or …"."""
    if not isinstance(schema, dict) or not schema.keys() & {"const", "enum", "type"}:
        return "what its schema describes"
    if "const" in schema or "enum" in schema:
        return _choices(schema["enum"] if "enum" in schema else [schema["const"]])
    names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    return " or ".join(_TYPES[name][0] for name in names)


class _Node:
    """One schema, compiled to tests by the type of the value when it is first met."""

    __slots__ = ("home", "origin", "schema", "refusal", "tests")

    def __init__(self, home: _Schema, origin: Json, refusal: str = "must not be there") -> None:
        self.home, self.origin = home, origin
        self.schema: dict[str, Json] = home.plain(origin) if isinstance(origin, dict) else {}
        self.refusal = refusal  # the text where no value of that type would do
        self.tests: dict[type, list[_Test]] | None = None

    def check(self, value: Json, run: _Run) -> bool:
        """Whether `value` fits; if not, `run.failure` says why."""
        run.left -= 1
        if run.left < 0:
            raise _Exhausted
        for test in (self.tests or self._compiled(run))[type(value)]:  # noqa: SIM110  # faster than all()
            if not test(value, run):
                return False
        return True

    def part(self, keyword: str, refusal: str = "") -> _Node:
        """The node of a subschema; `refusal` is what is wrong if that is false."""
        schema = self.schema.get(keyword, True)
        if schema is False and refusal:
            return _Node(self.home, False, refusal)
        return self.home.node(schema)

    def children(self, keyword: str) -> list[_Node]:
        """The nodes of all subschemas in an array."""
        return [self.home.node(part) for part in self.schema.get(keyword, ())]

    def target(self) -> _Node:
        """The node that `$ref` leads to."""
        home, schema = self.home.targets[id(self.origin)]
        return home.node(schema)

    def _compiled(self, run: _Run) -> dict[type, list[_Test]]:
        before = len(self.home.nodes)
        tests: dict[type, list[_Test]] = {kind: [] for kind in _ALL}
        for keyword in self.schema:
            kinds, build = self.home.rules.get(keyword, _NO_RULE)
            if test := build(self, keyword):
                for kind in kinds:
                    tests[kind].append(test)
        if "type" in self.schema or self.origin is False:
            self._limit(tests)
        self.tests = tests
        # 8 us, and 2 us for each new node; twice that where the garbage collector looks at them.
        run.spend(80 + 10 * (len(self.home.nodes) - before))
        return tests

    def _limit(self, tests: dict[type, list[_Test]]) -> None:
        """`type`, as the tests of the types that it refuses: the others pay nothing for it."""
        names = self.schema.get("type", [])
        if names:
            self.refusal = "must be " + _described({"type": names})
        text, names = self.refusal, [names] if isinstance(names, str) else names
        never: _Test = lambda value, run: run.fail(text, value if names else _NO_VALUE)  # noqa: E731
        allowed = {kind for name in names for kind in _TYPES[name][1]}
        tests.update({kind: [never] for kind in _ALL if kind not in allowed})
        if "integer" in names and "number" not in names:
            tests[float].insert(0, lambda value, run: value.is_integer() or run.fail(text, value))

    def covered(self, value: Json, run: _Run, own: bool = False) -> set[Json]:
        """The names or indexes that this schema looks at in a `value` that it accepts.

        2020-12, section 11. `own`: asked by the node's own `unevaluated…`, which then does not count."""
        schema, seen = self.schema, set[Json]()
        run.spend(20 + 2 * len(schema) + 2 * len(value))
        if type(value) is dict:
            rest = ["additionalProperties", "unevaluatedProperties"]
            seen |= value.keys() & schema.get("properties", {}).keys()
            for text in schema.get("patternProperties", ()):
                known = self.home.patterns[text]
                # A pattern that cannot be checked may have matched: nothing is refused for it.
                seen |= {name for name in value if isinstance(known, str) or known(name, run)}
        else:
            rest = ["items", "unevaluatedItems"]
            seen |= set(range(min(len(schema.get("prefixItems", ())), len(value))))
            if "contains" in schema and self.home.draft >= 2020:
                part = self.part("contains")
                seen |= {index for index, item in enumerate(value) if part.check(item, run)}
        if any(keyword in schema for keyword in rest[: 1 if own else 2]):
            return set(value if type(value) is dict else range(len(value)))
        for node in self._in_place(value, run):
            if node.check(value, run):
                seen |= node.covered(value, run)
        return seen

    def _in_place(self, value: Json, run: _Run) -> Iterator[_Node]:
        """The subschemas that apply to `value` itself; those count that accept it."""
        if "$ref" in self.schema:
            yield self.target()
        for keyword in ("allOf", "anyOf", "oneOf"):
            yield from self.children(keyword)
        if "if" in self.schema:
            condition = self.part("if")
            chosen = "then" if condition.check(value, run) else "else"
            yield condition
            yield self.part(chosen)
        for name, part in self.schema.get("dependentSchemas", {}).items():
            if type(value) is dict and name in value:
                yield self.home.node(part)


# ---- Keywords ----


def _reference(node: _Node, keyword: str) -> _Test:
    target, weight = node.target(), node.home.weight

    def test(value: Json, run: _Run) -> bool:
        run.references -= 1
        run.left -= weight
        if run.references < 0:
            raise _Exhausted
        return target.check(value, run)

    return test


def _members(node: _Node, keyword: str) -> _Test | None:
    """properties, patternProperties and additionalProperties: one test, made for the first of them."""
    if keyword != next(filter(_MEMBERS.__contains__, node.schema)):
        return None
    known = {name: node.home.node(part) for name, part in node.schema.get("properties", {}).items()}
    names, anything = _choices([*known]) or "none", node.home.anything
    rest = node.part("additionalProperties", f"is not a known property; known are {names}")
    by_pattern = []
    for text, part in node.schema.get("patternProperties", {}).items():
        if isinstance(finds := node.home.patterns[text], str):
            rest = anything  # it cannot be checked and may have meant any name: none is refused
        else:
            by_pattern.append((finds, node.home.node(part)))
    if rest is anything and not known and not by_pattern:
        return None

    def test(value: Json, run: _Run) -> bool:
        run.left -= len(value)
        for name, item in value.items():
            part = known.get(name, rest)
            if by_pattern:
                found = [node for finds, node in by_pattern if finds(name, run)]
                if not all(node.check(item, run) for node in found):
                    return run.under(name)
                if found and name not in known:
                    continue
            # Most need only be of their type: without the call 60 ns instead of 200.
            if (part.tests is None or part.tests[type(item)]) and not part.check(item, run):
                return run.under(name)
        return True

    return test


def _elements(node: _Node, keyword: str) -> _Test | None:
    """prefixItems and items, as one test."""
    if keyword == "items" and "prefixItems" in node.schema:
        return None
    parts = node.children("prefixItems")
    count = len(parts)
    rest = node.part("items", f"is one item too many; {count} are allowed")
    looked_at = count if rest is node.home.anything else None
    if looked_at == 0:
        return None

    def test(value: Json, run: _Run) -> bool:
        run.spend(len(value) >> 2)
        for index, item in enumerate(itertools.islice(value, looked_at)):
            part = parts[index] if index < count else rest
            if (part.tests is None or part.tests[type(item)]) and not part.check(item, run):
                return run.under(index)
        return True

    return test


def _property_names(node: _Node, keyword: str) -> _Test:
    part = node.part(keyword)

    def test(value: Json, run: _Run) -> bool:
        for name in value:
            if not part.check(name, run):
                return run.under(f"{name[:_SHOWN]} (its name)")
        return True

    return test


def _required(node: _Node, keyword: str) -> _Test | None:
    return _requiring(node.schema[keyword]) if node.schema[keyword] else None


def _requiring(names: list[str]) -> _Test:
    cost = len(names) // 4

    def test(value: Json, run: _Run) -> bool:
        run.left -= cost
        for name in names:
            if name not in value:
                run.spend(20 + cost)
                lacking = [name for name in names if name not in value]
                return run.fail(f"must have the required {_choices(lacking)}")
        return True

    return test


def _dependent(node: _Node, keyword: str) -> _Test:
    """name → the schema, or the names, that its presence asks for."""
    wanted = [
        (name, _requiring(part) if isinstance(part, list) else node.home.node(part).check)
        for name, part in node.schema[keyword].items()
    ]

    def test(value: Json, run: _Run) -> bool:
        run.left -= len(wanted) // 4
        return all(fits(value, run) for name, fits in wanted if name in value)

    return test


def _all_of(node: _Node, keyword: str) -> _Test:
    parts = node.children(keyword)
    return lambda value, run: all(part.check(value, run) for part in parts)


def _alternatives(node: _Node, keyword: str) -> _Test:
    """anyOf, and oneOf, which must look at all to see that no second one fits."""
    parts = node.children(keyword)
    shown = dict.fromkeys(map(_described, node.schema[keyword][:_VIOLATIONS]))
    text = "must be " + " or ".join(shown)

    def test(value: Json, run: _Run) -> bool:
        fits, likely = False, []
        for part in parts:
            if part.check(value, run):
                if fits:
                    return run.fail(f"must fit exactly one of {len(parts)} alternatives")
                fits = True
                if keyword == "anyOf":
                    break
            elif run.failure[0] is not part.refusal:
                likely.append(run.failure)
        if not fits:
            run.fail(text, value)
            if len(likely) == 1:
                # All others are of another type: what this one lacks says more.
                run.failure = likely[0]
        return fits

    return test


def _not(node: _Node, keyword: str) -> _Test:
    part = node.part(keyword)
    text = f"must not be {_described(node.schema[keyword])}"
    return lambda value, run: not part.check(value, run) or run.fail(text, value)


def _condition(node: _Node, keyword: str) -> _Test:
    part, then, other = map(node.part, ("if", "then", "else"))
    return lambda value, run: (then if part.check(value, run) else other).check(value, run)


def _contains(node: _Node, keyword: str) -> _Test:
    part, counted = node.part(keyword), node.home.draft >= 2019
    least = node.schema.get("minContains", 1) if counted else 1
    most = node.schema.get("maxContains", math.inf) if counted else math.inf
    text = f"must contain {least} to {most} items that are {_described(node.schema[keyword])}"

    def test(value: Json, run: _Run) -> bool:
        count = 0
        for item in value:
            run.left -= 1
            count += part.check(item, run)
            if count > most or (count >= least and most == math.inf):
                break
        return least <= count <= most or run.fail(text)

    return test


def _unevaluated(node: _Node, keyword: str) -> _Test:
    rest = node.part(keyword, "is not allowed here: nothing in the schema describes it")

    def test(value: Json, run: _Run) -> bool:
        seen = node.covered(value, run, own=True)
        for step, item in value.items() if type(value) is dict else enumerate(value):
            if step not in seen and not rest.check(item, run):
                return run.under(step)
        return True

    return test


def _unique(node: _Node, keyword: str) -> _Test | None:
    def test(value: Json, run: _Run) -> bool:
        run.spend(len(value) >> 1)
        if {*map(type, value)} == {str} and len({*value}) == len(value):
            return True
        seen = set()
        for index, item in enumerate(value):
            key = _canonical(item, run)
            if key in seen:
                return run.fail(f"must have no equal items, but item {index} is there before")
            seen.add(key)
        return True

    return test if node.schema[keyword] else None


def _canonical(value: Json, run: _Run) -> str | bytes:
    """Equal for equal JSON (1 and 1.0; not 1 and true; in any order of keys), and for nothing else.

    Bytes and not tuples: Python's hash of a number can be chosen by whoever sends it."""
    if isinstance(value, str):
        run.left -= len(value) >> 10
        return value
    run.spend(2)
    encoded = orjson.dumps(_plain(value, run), option=orjson.OPT_SORT_KEYS)
    run.spend(len(encoded) >> 6)
    # A copy: what orjson gives holds 1 KiB, and keeping many of those takes 3 us of page faults each.
    return bytes(memoryview(encoded))


def _plain(value: Json, run: _Run) -> Json:
    """`value` with whole numbers as integers."""
    run.spend(3)
    if isinstance(value, float) and value.is_integer() and int(value) in SAFE_INTEGERS:
        return int(value)
    if isinstance(value, dict):
        return {name: _plain(item, run) for name, item in value.items()}
    return [_plain(item, run) for item in value] if isinstance(value, list) else value


def _equal(node: _Node, keyword: str) -> _Test:
    """enum and const."""
    values = node.schema[keyword] if keyword == "enum" else [node.schema[keyword]]
    free = _Run(sys.maxsize)  # the schema is bounded already
    allowed = {_canonical(value, free) for value in values}
    text = f"must be {'one of ' * (len(values) > 1)}{_choices(values)}"
    return lambda value, run: _canonical(value, run) in allowed or run.fail(text, value)


def _compared(node: _Node, keyword: str) -> _Test:
    limit, (fits, words) = node.schema[keyword], _COMPARED[keyword]
    text = f"must {words.format(limit)}"
    if words.startswith("have"):
        return lambda value, run: fits(len(value), limit) or run.fail(text, value)
    return lambda value, run: fits(value, limit) or run.fail(text, value)


def _multiple_of(node: _Node, keyword: str) -> _Test:
    step = node.schema[keyword]
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


def _matching(node: _Node, keyword: str) -> _Test | None:
    finds = node.home.patterns[node.schema[keyword]]
    if isinstance(finds, str):
        return None
    text = f"must match the pattern {_shown(node.schema[keyword])}"
    return lambda value, run: finds(value, run) or run.fail(text, value)


_MEMBERS: Final = ("properties", "patternProperties", "additionalProperties")
_COMPARED: Final[Mapping[str, tuple[Callable[[Any, Any], bool], str]]] = {
    "minProperties": (ge, "have at least {} properties"),
    "maxProperties": (le, "have at most {} properties"),
    "minItems": (ge, "have at least {} items"),
    "maxItems": (le, "have at most {} items"),
    "minLength": (ge, "have at least {} characters"),
    "maxLength": (le, "have at most {} characters"),
    "minimum": (ge, "be at least {}"),
    "maximum": (le, "be at most {}"),
    "exclusiveMinimum": (gt, "be more than {}"),
    "exclusiveMaximum": (lt, "be less than {}"),
}
# In the order of the drafts that have them: the first, the last.
_RULES: Final[Sequence[tuple[int, int, tuple[type, ...], _Builder, str]]] = (
    (4, 2020, _ALL, _reference, "$ref"),
    (4, 2020, _ALL, _equal, "enum"),
    (4, 2020, _ALL, _all_of, "allOf"),
    (4, 2020, _ALL, _alternatives, "anyOf oneOf"),
    (4, 2020, _ALL, _not, "not"),
    (4, 2020, _MAPS, _required, "required"),
    (4, 2020, _MAPS, _members, " ".join(_MEMBERS)),
    (4, 2020, _MAPS, _compared, "minProperties maxProperties"),
    (4, 2020, _LISTS, _elements, "prefixItems items"),
    (4, 2020, _LISTS, _compared, "minItems maxItems"),
    (4, 2020, _LISTS, _unique, "uniqueItems"),
    (4, 2020, _TEXTS, _compared, "minLength maxLength"),
    (4, 2020, _TEXTS, _matching, "pattern"),
    (4, 2020, _NUMBERS, _compared, "minimum maximum exclusiveMinimum exclusiveMaximum"),
    (4, 2020, _NUMBERS, _multiple_of, "multipleOf"),
    (4, 7, _MAPS, _dependent, "dependencies"),
    (6, 2020, _ALL, _equal, "const"),
    (6, 2020, _MAPS, _property_names, "propertyNames"),
    (6, 2020, _LISTS, _contains, "contains"),
    (7, 2020, _ALL, _condition, "if"),
    (2019, 2020, _MAPS, _dependent, "dependentRequired dependentSchemas"),
    (2019, 2020, _MAPS, _unevaluated, "unevaluatedProperties"),
    (2019, 2020, _LISTS, _unevaluated, "unevaluatedItems"),
)
_DIALECTS: Final = {
    "json-schema.org/draft-04/schema": 4,
    "json-schema.org/draft-06/schema": 6,
    "json-schema.org/draft-07/schema": 7,
    "json-schema.org/draft/2019-09/schema": 2019,
    "json-schema.org/draft/2020-12/schema": 2020,
}
_DEFAULT_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"  # 2026-07-28, server/tools
_RULES_OF: Final = {
    draft: {
        keyword: (kinds, build)
        for since, until, kinds, build, keywords in _RULES
        if since <= draft <= until
        for keyword in keywords.split()
    }
    for draft in _DIALECTS.values()
}
# Where subschemas stand: in the value itself, in each member of it; both where it may be either.
_SUBSCHEMAS: Final = frozenset(
    "additionalProperties propertyNames unevaluatedProperties items additionalItems unevaluatedItems "
    "contains not if then else contentSchema allOf anyOf oneOf prefixItems".split()
)
_SUBSCHEMA_MAPS: Final = frozenset(
    "properties patternProperties dependentSchemas dependencies $defs definitions".split()
)
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
_Path: TypeAlias = "tuple[str, ...] | None"  # the properties that lead to a place, if only those do


class _Schema:
    """A schema that values can be checked against.

    Its references lead somewhere, its annotations stand where they may: else the constructor raises
    _Unusable. Nothing is ever fetched."""

    def __init__(self, contents: Json, draft: int = 2020, size: int = 0) -> None:
        self.contents, self.draft, self.rules = contents, draft, _RULES_OF[draft]
        # What following a reference costs: a name in the schema is once more compared with what was
        # sent. 64 units, 13 us, for 1 MiB; none for honest schemas.
        self.weight = size >> 14
        self.nodes: dict[int, _Node] = {}
        # Id of the part with a $ref → its target
        self.targets: dict[int, tuple[_Schema, Json]] = {}
        self.patterns: dict[str, _Pattern] = {}  # compiled, or why not
        self.headers: list[tuple[tuple[str, ...], str]] = []  # property path, x-mcp-header
        self._left = _SCHEMA_COST
        self._seen: set[int] = set()
        self._places: dict[str, Json] = {"#": contents}  # URI#anchor → part
        self._references: list[tuple[dict[str, Json], str]] = []  # part, base URI
        self.anything, self.root = _Node(self, True), self.node(contents)
        self._survey(contents, "", ())
        while self._references:
            self._follow(*self._references.pop())

    def check(self, value: Json, run: _Run) -> list[str]:
        """What is wrong with `value`, as lines for a reader; raises _Exhausted."""
        try:
            if self.root.check(value, run):
                return []
            lines = [run.line()]
            # So that a model need not call once for each argument that is wrong.
            for name, part in self.contents.get("properties", {}).items():
                if name in value and not self.node(part).check(value[name], run):
                    run.under(name)
                    lines.append(run.line())
        except RecursionError:
            # References that lead back to where they start, or both sides nest deeply.
            raise _Exhausted from None
        return [*dict.fromkeys(lines)][:_VIOLATIONS]

    def node(self, schema: Json) -> _Node:
        """The node of `schema`; one and the same, so that a recursive schema is finite."""
        if schema is True or schema == {}:
            return self.anything
        node = self.nodes.get(id(schema))
        if node is None:
            node = self.nodes[id(schema)] = _Node(self, schema)
        return node

    def plain(self, schema: dict[str, Json]) -> dict[str, Json]:
        """`schema` in the words of 2020-12, where older drafts have others for the same."""
        if self.draft >= 2020:
            return schema
        if self.draft <= 7 and "$ref" in schema:
            return {"$ref": schema["$ref"]}  # draft 7, section 8.3: its siblings are ignored
        plain = {name: value for name, value in schema.items() if name != "prefixItems"}
        if isinstance(schema.get("items"), list):
            plain["prefixItems"] = plain.pop("items")
            if "additionalItems" in plain:
                plain["items"] = plain.pop("additionalItems")
        if self.draft == 4:
            for limit, strict in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
                if plain.pop(strict, False):
                    plain[strict] = plain[limit]
        return plain

    def _survey(self, contents: Json, base: str, path: _Path) -> None:
        """Look at all subschemas: what can be referred to, what refers, what hides the tool."""
        stack: list[tuple[Json, str, _Path]] = [(contents, base, path)]
        while stack:
            schema, base, path = stack.pop()
            if not isinstance(schema, dict) or id(schema) in self._seen:
                continue
            self._seen.add(id(schema))
            base = self._name(schema, base)
            if "$schema" in schema and _draft(schema["$schema"]) != self.draft:
                raise _Unusable("has a part with a dialect of its own")
            if "x-mcp-header" in schema:
                self._header(schema, path)
            own = [schema["pattern"]] if "pattern" in schema else []
            for pattern in {*own, *schema.get("patternProperties", ())} - self.patterns.keys():
                self.patterns[pattern], cost = _pattern(pattern)
                self._spend(20 + cost)
            for keyword, value in schema.items():
                if keyword == "$ref":
                    self._references.append((schema, base))
                elif (keyword, self.draft) in (("$recursiveRef", 2019), ("$dynamicRef", 2020)):
                    # Where it leads depends on the way there, which nobody here keeps.
                    raise _Unusable(f"has a {keyword}, which is not supported")
                elif keyword in _SUBSCHEMAS:
                    parts = value if isinstance(value, list) else [value]
                    stack += [(part, base, None) for part in parts]
                elif keyword in _SUBSCHEMA_MAPS and isinstance(value, dict):
                    way = path if keyword == "properties" else None
                    for name, part in value.items():
                        stack.append((part, base, None if way is None else (*way, name)))

    def _name(self, schema: dict[str, Json], base: str) -> str:
        """Note how this part can be referred to; the base of the references in it."""
        identifier = schema.get("$id" if self.draft > 4 else "id")
        if isinstance(identifier, str) and not (self.draft <= 7 and "$ref" in schema):
            base, anchor = self._joined(base, identifier)
            self._places[f"{base}#{anchor}"] = schema
        for keyword in ("$anchor", "$dynamicAnchor"):
            if isinstance(schema.get(keyword), str):
                self._places[f"{base}#{schema[keyword]}"] = schema
        return base

    def _follow(self, schema: dict[str, Json], base: str) -> None:
        """Find what a reference leads to, and look at it if that was not known as a schema."""
        reference = schema["$ref"]
        where = f"has a $ref {_shown(reference)} that"
        if not isinstance(reference, str):
            raise _Unusable(f"{where} is no string")
        uri, fragment = self._joined(base, reference)
        meta = uri + "#" not in self._places and _draft(uri) == self.draft
        home = _meta_schema(self.draft) if meta else self
        try:
            found = home._find("" if meta else uri, fragment)
        except (LookupError, TypeError, ValueError):
            raise _Unusable(f"{where} leads out of it, and nothing is ever fetched") from None
        if home is self and id(found) not in self._seen:
            _check_schema(found, self.draft)
            self._survey(found, uri, None)
        self.targets[id(schema)] = home, found

    def _find(self, uri: str, fragment: str) -> Json:
        """What stands at an anchor or a JSON pointer (RFC 6901); LookupError if nothing does."""
        if not fragment.startswith("/"):
            return self._places[f"{uri}#{fragment}"]
        part = self._places[uri + "#"]
        for step in fragment[1:].split("/"):
            step = step.replace("~1", "/").replace("~0", "~")
            part = part[int(step) if isinstance(part, list) else step]
        return part

    def _joined(self, base: str, reference: str) -> tuple[str, str]:
        """URI and fragment of a reference."""
        if reference.startswith("#"):  # urljoin() knows nothing of urn: and the like
            return base, urllib.parse.unquote(reference[1:])
        self._spend(20)
        try:
            uri, _, fragment = urllib.parse.urljoin(base, reference).partition("#")
        except ValueError:
            raise _Unusable(f"has the reference {_shown(reference)}, which is no URI") from None
        return uri, urllib.parse.unquote(fragment)

    def _spend(self, cost: int) -> None:
        self._left -= cost
        if self._left < 0:
            raise _Unusable("has too many patterns or identifiers")

    def _header(self, schema: dict[str, Json], path: _Path) -> None:
        """2026-07-28, basic/transports/streamable-http, Schema Extension."""
        name = schema["x-mcp-header"]
        if not path:
            raise _Unusable("has an x-mcp-header where not only `properties` lead to")
        where = f"has an x-mcp-header {_shown(name)} at {'.'.join(map(_cut, path))} that"
        if not isinstance(name, str) or not _TOKEN.fullmatch(name):
            raise _Unusable(f"{where} is no header name (RFC 9110)")
        if schema.get("type") not in ("string", "integer", "boolean"):
            raise _Unusable(f"{where} stands at what is no string, integer or boolean")
        if any(known.lower() == name.lower() for _, known in self.headers):
            raise _Unusable(f"{where} is there twice")
        self.headers.append((path, name))


def _draft(uri: Json) -> int | None:
    """Which draft `$schema` names, with http or https, with or without the empty fragment."""
    bare = uri.partition("://")[2].removesuffix("#") if isinstance(uri, str) else ""
    return _DIALECTS.get(bare)


def _read_schema(contents: Json) -> _Schema:
    """A definition's schema; raises _Unusable with the reason why its tool must be hidden."""
    if not isinstance(contents, dict):
        raise _Unusable("must be an object")
    declared = contents.get("$schema", _DEFAULT_DIALECT)
    draft = _draft(declared)
    if draft is None:
        known = ", ".join(_DIALECTS)
        raise _Unusable(f"has the unknown dialect {_shown(declared)}; known are {known}")
    try:
        encoded = orjson.dumps(contents)
        parts = sum(map(encoded.count, (b",", b"{", b"[")))
        if len(encoded) > _SCHEMA_BYTES or parts > _SCHEMA_PARTS:
            raise _Unusable(f"is larger than {_SCHEMA_BYTES} bytes or {_SCHEMA_PARTS} parts")
        _check_schema(contents, draft)
        return _Schema(contents, draft, len(encoded))
    except TypeError as error:  # orjson: an integer beyond 64 bits, or 255 levels
        raise _Unusable(f"cannot be written as JSON: {error}") from None
    except (_Exhausted, RecursionError):
        raise _Unusable("is too large, or has too many levels") from None


def _check_schema(contents: Json, draft: int) -> None:
    """Raises _Unusable for what the dialect's own schema refuses."""
    if wrong := _meta_schema(draft).check(contents, _Run()):
        raise _Unusable(f"is no valid JSON Schema: {wrong[0].strip()}")


@functools.cache
def _meta_schema(draft: int) -> _Schema:
    """The schema of a dialect's schemas.

    Since 2019-09 it consists of vocabularies that refer to each other dynamically. Joined into one
    that refers to itself, it takes a sixth of the time."""
    from jsonschema_specifications import REGISTRY

    bare = next(bare for bare, number in _DIALECTS.items() if number == draft)
    uri = ("http://" if draft <= 7 else "https://") + bare
    contents = REGISTRY.contents(uri)
    if draft > 7:
        resolver = REGISTRY.resolver(uri)
        parts = [resolver.lookup(part["$ref"]).contents for part in contents["allOf"]]
        joined: dict[str, Json] = {"type": ["object", "boolean"], "properties": {}, "$defs": {}}
        for part in (*parts, contents):
            joined["properties"] |= part.get("properties", {})
            joined["$defs"] |= part.get("$defs", {})
        encoded = re.sub(rb'"meta/\w+#/', b'"#/', orjson.dumps(joined))
        dynamic = rb'"\$recursiveRef":"#"|"\$dynamicRef":"#meta"'
        contents = orjson.loads(re.sub(dynamic, b'"$ref":"#"', encoded))
    return _Schema(contents, draft)


# ---- Params ----
# One table for five versions, in JSON Schema too. Members that a shape does not name pass, as do
# methods that a version does not have: whoever routes answers those.


def _record(**members: Json) -> dict[str, Json]:
    """An object with these members; a name that ends in `_` may be absent, `meta_` stands for `_meta`."""
    names = {name: "_meta" if name == "meta_" else name.rstrip("_") for name in members}
    return {
        "type": "object",
        "properties": {names[name]: shape for name, shape in members.items()},
        "required": [names[name] for name in members if not name.endswith("_")],
    }


def _all(names: str, shape: Json) -> dict[str, Json]:
    return dict.fromkeys(names.split(), shape)


_TEXT: Final = {"type": "string"}
_FLAG: Final = {"type": "boolean"}
_OBJECT: Final = {"type": "object"}
_TEXT_LIST: Final = {"type": "array", "items": _TEXT}
_TEXT_MAP: Final = {"type": "object", "additionalProperties": _TEXT}
_OBJECT_MAP: Final = {"type": "object", "additionalProperties": _OBJECT}
_INITIALIZE: Final = {
    "protocolVersion": _TEXT,
    "capabilities": _record(
        experimental_=_OBJECT_MAP,
        roots_=_record(listChanged_=_FLAG),
        sampling_=_record(context_=_OBJECT, tools_=_OBJECT),
        elicitation_=_record(form_=_OBJECT, url_=_OBJECT),
        tasks_=_record(list_=_OBJECT, cancel_=_OBJECT, requests_=_OBJECT),
    ),
    "clientInfo": _record(
        **_all("name version title_ description_ websiteUrl_", _TEXT),
        icons_={"type": "array", "items": _record(**_all("src mimeType_", _TEXT))},
    ),
}
_FILTER: Final = _record(
    **_all("toolsListChanged_ promptsListChanged_ resourcesListChanged_", _FLAG),
    **_all("resourceSubscriptions_ taskIds_", _TEXT_LIST),
)
_COMPLETE: Final = {
    "ref": {
        **_record(type={"enum": ["ref/prompt", "ref/resource"]}),
        "if": {"properties": {"type": {"const": "ref/prompt"}}},
        "then": _record(name=_TEXT, title_=_TEXT),
        "else": _record(uri=_TEXT),
    },
    "argument": _record(name=_TEXT, value=_TEXT),
    "context_": _record(arguments_=_TEXT_MAP),
}
_CALL: Final = {"name": _TEXT, "arguments_": _OBJECT}
_PROMPT: Final = {"name": _TEXT, "arguments_": _TEXT_MAP}
_RETRY: Final = {"inputResponses_": _OBJECT_MAP, "requestState_": _TEXT}
_PAGED: Final = _all(
    "tools/list prompts/list resources/list resources/templates/list", {"cursor_": _TEXT}
)
# method → the members of its params. A member that came later is looked at in the older versions too:
# none of them gives it another meaning.
_LEGACY_REQUESTS: Final[Mapping[str, Mapping[str, Json]]] = {
    **_PAGED,
    **_all("resources/read resources/subscribe resources/unsubscribe", {"uri": _TEXT}),
    "initialize": _INITIALIZE,
    "ping": {},
    "logging/setLevel": {"level": {"enum": [*LOG_LEVELS]}},
    "tools/call": {**_CALL, "task_": _record(ttl_={"type": "integer"})},
    "prompts/get": _PROMPT,
    "completion/complete": _COMPLETE,
}
_TASK_REQUESTS: Final = {
    "tasks/list": {"cursor_": _TEXT},
    **_all("tasks/result tasks/get tasks/cancel", {"taskId": _TEXT}),
}
_MODERN_REQUESTS: Final[Mapping[str, Mapping[str, Json]]] = {
    **_PAGED,
    **_all("tasks/get tasks/cancel", {"taskId": _TEXT}),
    "tasks/update": {"taskId": _TEXT, "inputResponses_": _OBJECT_MAP},
    "server/discover": {},
    "subscriptions/listen": {"notifications": _FILTER},
    "tools/call": _CALL | _RETRY,
    "prompts/get": _PROMPT | _RETRY,
    "resources/read": {"uri": _TEXT, **_RETRY},
    "completion/complete": _COMPLETE,
}


def _requests(version: str) -> Mapping[str, _Schema]:
    if version == MODERN:
        # What its `_meta` must hold is looked at by ModernClient, and does not come this far.
        methods, meta = _MODERN_REQUESTS, _OBJECT
    else:
        methods = {**_LEGACY_REQUESTS, **(_TASK_REQUESTS if version == LATEST_LEGACY else {})}
        meta = _record(progressToken_={"type": ["string", "integer"]})
    return {name: _Schema(_record(meta_=meta, **members)) for name, members in methods.items()}


_BLOCKS: Final = {
    "text": "text",
    "image": "data mimeType",
    "audio": "data mimeType",
    "tool_use": "id name input",
    "tool_result": "toolUseId content",
}


def _ask_results(version: str) -> Mapping[str, _Schema]:
    """The results of asks; since 2025-11-25 one may hold several choices or blocks."""
    several = ["array"] if version >= LATEST_LEGACY else []
    field = {"type": ["string", "number", "boolean", *several], "items": _TEXT}
    block = _record(type=_TEXT, **_all("text_ data_ mimeType_ id_ name_ toolUseId_", _TEXT))
    block["allOf"] = [
        {"if": {"properties": {"type": {"const": name}}}, "then": {"required": needed.split()}}
        for name, needed in _BLOCKS.items()
    ]
    root = _record(uri=_TEXT, name_=_TEXT)
    shapes = {
        "elicitation/create": _record(
            action={"enum": ["accept", "decline", "cancel"]},
            content_={"type": "object", "additionalProperties": field},
        ),
        "sampling/createMessage": _record(
            role={"enum": ["user", "assistant"]},
            content={**block, "type": ["object", *several], "items": block},
            **_all("model stopReason_", _TEXT),
        ),
        "roots/list": _record(roots={"type": "array", "items": root}),
    }
    return {method: _Schema(shape) for method, shape in shapes.items()}


_REQUESTS: Final = {version: _requests(version) for version in (*LEGACY, MODERN)}
_ANSWERS: Final = {version: _ask_results(version) for version in (*LEGACY, MODERN)}
_PLAIN_CALL: Final = frozenset({"name", "arguments"})


def check_params(call: Call) -> Error | None:
    """What is wrong with the params of `call` for its client's version; None if nothing.

    A method that this version does not have is not checked (extensions)."""
    params = call.params
    # Most calls are tool calls like this, in every version: 0.1 us in place of 0.6.
    if call.method == "tools/call" and params.keys() == _PLAIN_CALL:  # noqa: SIM102
        if type(params["name"]) is str and type(params["arguments"]) is dict:
            return None
    return check_request(call.method, params, call.version)


def check_request(method: str, params: dict[str, Json], version: str) -> Error | None:
    """As check_params, for a request that an edge answers itself (initialize, logging/setLevel, …)."""
    schema = _REQUESTS[version].get(method)
    wrong = _misshapen(schema, params) if schema else ""
    return Error(INVALID_PARAMS, f"params{wrong}", status=400) if wrong else None


def check_answer(method: str, result: Json, version: str) -> Error | None:
    """What is wrong with a client's result of the ask `method`; None also for unknown methods."""
    schema = _ANSWERS[version].get(method)
    wrong = _misshapen(schema, result) if schema else ""
    return Error(INVALID_PARAMS, f"{method}: result{wrong}") if wrong else None


def _misshapen(schema: _Schema, value: Json) -> str:
    run = _Run()
    try:
        return "" if schema.root.check(value, run) else run.line()
    except _Exhausted:
        return " is too large to be checked"


# ---- Mirrored headers ----

_PLAIN_HEADER: Final = re.compile(r"[\t\x20-\x7e]*")
# Short: a fraction is built from it.
_NUMERAL: Final = re.compile(r"[+-]?[0-9]{1,20}(?:\.[0-9]{1,20})?(?:[eE][+-]?[0-9]{1,2})?")


def _mirrored_wrongly(schema: _Schema, arguments: Json, mirrored: Mapping[str, str]) -> str:
    """What is wrong with Mcp-Param-* headers (streamable-http, Server Behavior for Custom Headers)."""
    for path, name in schema.headers:
        raw, value = mirrored.get(f"mcp-param-{name.lower()}"), arguments
        for step in path:
            value = value.get(step) if isinstance(value, dict) else None
        if raw is None and (value is None or isinstance(value, (dict, list))):
            continue  # no header can mirror an array or object; the schema says what it must be
        text = None if raw is None else _header_text(raw)
        if text is None or not _mirrors(text, value):
            where = f"Mcp-Param-{name} and arguments.{'.'.join(map(_cut, path))}"
            return f"{where} differ, or the header has invalid characters or Base64"
    return ""


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


# ---- Hidden text ----
# What a model reads in a definition and a person who looks at it does not see. What is cut leaves
# nothing behind but a space for a comment, so that no new one can form from what stood around it.
# A joiner stays behind a letter of the scripts that are misspelt without it (Persian, Hindi, …;
# RFC 5892, A.1 and A.2) and between emoji, a selector behind what it selects a form of: those
# change what a person sees. Tags go from flags too: the black one that remains is no great loss.

_LARGEST: Final = 512 * 1024  # bytes of a definition that is looked through: 20 ms
_MOST_NODES: Final = 20_000  # values in it: 15 ms
_MOST_SPOTS: Final = 2_000  # hidden spots in it: 5 ms
_MOST_WARNINGS: Final = 5  # of one definition
_INVISIBLE: Final = (
    r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f"
    r"\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001d173-\U0001d17a"
    r"\U000e0000-\U000e0fff"
)
# One class of characters: two thirds of what the kinds below would cost on text that has none.
_MAYBE_HIDDEN: Final = re.compile(f"[{_INVISIBLE}\r]|<!--")
_JOINED: Final = (  # Arabic and its neighbours, the scripts of India, Tibet, Myanmar, Cambodia, Mongolia
    r"\u0600-\u061b\u061d-\u0fff\u1000-\u109f\u1780-\u17b3\u17b6-\u180d\u180f-\u18af\ua980-\ua9df"
    r"\ua9e0-\ua9ff\uaa60-\uaa7f\uabc0-\uabff\ufb50-\ufdff\ufe70-\ufefc"
)
_EMOJI: Final = r"\u2190-\u21ff\u2600-\u27bf\u2b00-\u2bff\ufe0f\U0001f000-\U0001faff"
_SELECTED: Final = r"#*0-9\xa9\xae\u203c-\u3299\U0001f000-\U0001faff"
_IDEOGRAPH: Final = r"\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_HIDDEN_KINDS: Final = {  # group → how it is called
    "ansi": "ANSI escape",
    "tag": "tag characters",
    "bidi": "bidirectional control",
    "joiner": "zero-width joiner",
    "selector": "variation selector",
    "control": "control character",
    "zero": "zero-width character",
}
_HIDDEN_TEXT: Final = re.compile(
    r"(?P<ansi>(?:\x1b\[|\x9b)[0-?]*+[ -/]*+[@-~]|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])"
    r"[^\x07\x1b\x9c]*+(?:\x07|\x1b\\|\x9c)|\x1b[ -/]*+[0-~]?)"
    r"|(?P<tag>[\U000e0000-\U000e007f]+)"
    r"|(?P<bidi>[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]+)"
    rf"|(?P<joiner>(?!(?<=[{_JOINED}])[\u200c\u200d](?![\u200c\u200d]))"
    rf"(?!(?<=[{_EMOJI}])\u200d[{_EMOJI}])[\u200c\u200d])"
    rf"|(?P<selector>(?!(?<=[{_SELECTED}])[\ufe0e\ufe0f])"
    rf"(?!(?<=[{_IDEOGRAPH}])[\ufe00-\ufe02\U000e0100-\U000e01ef])[\ufe00-\ufe0f\U000e0100-\U000e01ef])"
    r"|(?P<control>[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n))"
    r"|(?P<zero>(?![\r\ufe00-\ufe0f\U000e0100-\U000e01ef\u200c\u200d])"
    rf"[{_INVISIBLE}])"
)
_COMMENT_END: Final = re.compile(r"--!?>")
# Members whose texts are names: cut, they would name something else, so their item is hidden.
_NAMING: Final = frozenset({"name", "uri", "uriTemplate", "enum", "const", "pattern", "required"})
_QUOTED: Final = 120  # characters of a text that a warning shows


def visible(text: str) -> str:
    """`text` with what is hidden in it spelt out: `\\u200b`, a newline as `\\n`."""
    return re.sub(rf"[{_INVISIBLE}\n\r]", _spelt, text)


def _spelt(match: re.Match[str]) -> str:
    char = match[0]
    known = {"\n": "\\n", "\r": "\\r"}.get(char)
    return known or (f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}")


class _Look:
    """One look through a definition: `found` says what is hidden where, `whole` gives it without.

    `named`: where a name holds hidden text, "" if none does."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.named = ""
        self._nodes, self._spots = _MOST_NODES, _MOST_SPOTS

    def whole(self, value: Json, source: bytes) -> Json:
        """`value`, whose JSON is `source`, without hidden text; None, and that found, if it is too much."""
        try:
            if len(source) <= _LARGEST:
                return self.value(value)
        except _Exhausted:
            pass
        text = "it is too large, or hides too much, to be looked through for hidden text"
        self.found.append(text)
        return None

    def value(self, value: Json, path: tuple[Json, ...] = (), name: bool = False) -> Json:
        """`value` without hidden text; raises _Exhausted where it is too much.

        `path`: the way back to the root, as pairs; `name`: it names something."""
        self._nodes -= 1
        if self._nodes < 0:
            raise _Exhausted
        if isinstance(value, str):
            return self.text(value, path, name)
        if isinstance(value, list):
            return [self.value(one, (path, index), name) for index, one in enumerate(value)]
        if isinstance(value, dict):
            return {
                self.text(key, (path, key), True): self.value(
                    one,
                    (path, key),
                    (key in _NAMING or key[:1] == "$") and not isinstance(one, dict),
                )
                for key, one in value.items()
            }
        return value

    def text(self, text: str, path: tuple[Json, ...], name: bool) -> str:
        """The same for one text, or the key at the end of `path`."""
        maybe = _MAYBE_HIDDEN.search(text)
        if maybe is None:
            return text
        kept = self._without_characters(text, maybe.start(), path)
        if "<!--" in kept:
            kept = self._without_comments(kept, path)
        if name and kept != text:
            self.named = self.named or _member(path)
        return kept

    def _without_characters(self, text: str, at: int, path: tuple[Json, ...]) -> str:
        parts: list[str] = []
        end = 0
        for maybe in _MAYBE_HIDDEN.finditer(text, at):
            match = _HIDDEN_TEXT.match(text, maybe.start()) if maybe.start() >= end else None
            if match is not None:
                self._spot(_HIDDEN_KINDS[match.lastgroup or ""], match[0], path)
                parts.append(text[end : match.start()])
                end = match.end()
        return "".join((*parts, text[end:]))

    def _without_comments(self, text: str, path: tuple[Json, ...]) -> str:
        parts: list[str] = []
        end = 0
        while (start := text.find("<!--", end)) >= 0:
            # An end right behind the beginning counts: "<!-->" (HTML, 13.2.5.43).
            close = _COMMENT_END.search(text, start + 2)
            if close is None:  # nothing is hidden once it does not begin
                self._spot("HTML comment without an end", text[start:], path)
                return "".join((*parts, text[end:].replace("<!--", " ")))
            self._spot("HTML comment", text[start : close.end()], path)
            parts += (text[end:start], " ")
            end = close.end()
        return "".join((*parts, text[end:]))

    def _spot(self, kind: str, hidden: str, path: tuple[Json, ...]) -> None:
        self._spots -= 1
        if self._spots < 0:
            raise _Exhausted
        if len(self.found) < _MOST_WARNINGS:
            shown = visible(hidden[:_QUOTED]) + "…" * (len(hidden) > _QUOTED)
            if kind == _HIDDEN_KINDS["tag"]:  # a whole alphabet, shifted
                shown = "".join(chr(ord(char) - 0xE0000) for char in hidden[:_QUOTED])
                shown, kind = visible(shown), "tag characters that spell"
            self.found.append(f"{_member(path)} hides text ({kind}: {shown})")


def _member(path: tuple[Json, ...]) -> str:
    parts: list[str | int] = []
    while path:
        path, part = path
        parts.append(visible(part)[:80] if isinstance(part, str) else part)
    return _dotted(reversed(parts))


def _plain_json(data: bytes) -> bool:
    """Whether JSON text, as orjson writes it, surely hides nothing: 0.5 us, and nearly always so."""
    return data.isascii() and not any(mark in data for mark in _UNPLAIN)


_UNPLAIN: Final = (b"\\u", b"\\b", b"\\f", b"\\r", b"\x7f", b"<!--")


# ---- Pins ----
# What was approved. The lock holds the digest of each definition, which decides, and the definition,
# which shows what has changed; where it is large or holds a secret of the config, the digest alone.

LOCK_SIZE: Final = 16 * MIB  # bytes; reading more would hold the loop
_PIN_KEPT: Final = 64 * 1024  # bytes of a definition that the lock keeps
_KEPT_IN_ALL: Final = 4 * MIB
_LOCK_DEPTH: Final = 250  # a definition of limits.depth, and what stands around it
_MOST_CHANGES: Final = 20  # that are shown
_MOST_COMPARED: Final = 5_000  # values
_SHOWN_CHANGE: Final = 400  # characters of a text
_NOT_THERE: Final = object()


@dataclasses.dataclass(frozen=True, slots=True)
class Pin:
    """One approved definition; None where only its digest was kept."""

    digest: str
    definition: Json = None


Pinned: TypeAlias = "dict[str, dict[str, Pin]]"  # server → tool's own name → what was approved


def digest_of(definition: Json) -> str:
    """`sha256:…` of the JSON with sorted keys and without white space: what is the same, is equal."""
    data = orjson.dumps(definition, option=orjson.OPT_SORT_KEYS)
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def read_lock(path: str) -> Pinned | None:
    """The lock file `path`, None if there is none. Raises UsageError for one that cannot be believed."""
    try:
        with open(path, "rb") as file:
            data = file.read(LOCK_SIZE + 1)
        if len(data) > LOCK_SIZE:
            raise UsageError(f"{path}: is larger than {LOCK_SIZE // MIB} MiB, so it is no lock")
        servers = decode(data, _LOCK_DEPTH)["servers"]
        return {
            server: {own: _read_pin(path, server, own, pin) for own, pin in tools.items()}
            for server, tools in servers.items()
        }
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except InvalidJson as error:
        why = str(error)
    except (KeyError, TypeError, AttributeError):
        why = 'it has not the shape {"servers": {NAME: {TOOL: {"digest": …}}}}'
    raise UsageError(f"{path}: {why}. Restore it, or remove it and run `pin` again")


def _read_pin(path: str, server: str, own: str, pin: Json) -> Pin:
    digest, definition = pin["digest"], pin.get("definition")
    if not isinstance(digest, str):
        raise TypeError
    # Else somebody could show one text for approval and have another one approved.
    if definition is not None and digest_of(definition) != digest:
        raise UsageError(
            f"{path}: servers.{server}.{visible(own)}: the digest is not that of the definition."
            " Restore the file, or remove the entry and approve the tool again"
        )
    return Pin(digest, definition)


def write_lock(path: str, pinned: Pinned) -> None:
    """Replace the lock at once or not at all, sorted; mode and owner stay. Raises AtraxError."""
    left = _KEPT_IN_ALL
    servers: dict[str, dict[str, Json]] = {}
    for server, tools in sorted(pinned.items()):
        for own, pin in sorted(tools.items()):
            entry: dict[str, Json] = {"digest": pin.digest}
            size = 0 if pin.definition is None else len(encode(pin.definition))
            if 0 < size <= min(left, _PIN_KEPT):
                entry["definition"], left = pin.definition, left - size
            servers.setdefault(server, {})[own] = entry
    text = orjson.dumps({"servers": servers}, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
    # Whoever reads the lock, or a diff of it, is to see what is hidden.
    shown = re.sub(rf"[{_INVISIBLE}]", lambda match: json.dumps(match[0])[1:-1], text.decode())
    data = shown.replace("\x7f", "\\u007f").encode() + b"\n"
    if len(data) > LOCK_SIZE:
        raise AtraxError(f"{path}: would be larger than {LOCK_SIZE // MIB} MiB: too many tools")
    path = os.path.realpath(path)  # a link stays one
    part = f"{path}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with open(file, "wb") as out, contextlib.suppress(FileNotFoundError):
                out.write(data)
                old = os.stat(path)
                os.chmod(part, stat.S_IMODE(old.st_mode))
                with contextlib.suppress(PermissionError):
                    os.chown(part, old.st_uid, old.st_gid)
            os.replace(part, path)
        except OSError:
            os.unlink(part)
            raise
    except OSError as error:
        raise AtraxError(f"{path}: cannot be written: {error.strerror}") from None


def changes(was: Json, now: Json, redact: Callable[[Json], Json]) -> list[dict[str, str]]:
    """What differs between two definitions, as Unapproved has it; `was` None: all of `now` but its name."""
    found: list[dict[str, str]] = []
    was = {"name": now["name"]} if was is None else was
    work: list[tuple[tuple[Json, ...], Json, Json]] = [((), was, now)]
    for _ in range(_MOST_COMPARED):
        if not work or len(found) >= _MOST_CHANGES:
            break
        path, old, new = work.pop()
        if (isinstance(old, dict) and isinstance(new, dict)) or (
            isinstance(old, list) and isinstance(new, list)
        ):
            before, after = _parts(old), _parts(new)
            keys = [*after, *(key for key in before if key not in after)][:_MOST_COMPARED]
            work += [
                ((path, key), before.get(key, _NOT_THERE), after.get(key, _NOT_THERE))
                for key in reversed(keys)
            ]
        elif type(old) is not type(new) or old != new:
            found.append({"member": _member(path), **_old_and_new(old, new, redact)})
    if work:
        found.append({"member": "…", "is": "and more"})
    return found


def _parts(value: Json) -> dict[Json, Json]:
    return value if isinstance(value, dict) else dict(enumerate(value))


def _old_and_new(old: Json, new: Json, redact: Callable[[Json], Json]) -> dict[str, str]:
    """Both as texts: the part that differs, with a little around it."""
    texts = {
        key: redact(one if isinstance(one, str) else encode(one).decode())
        for key, one in (("was", old), ("is", new))
        if one is not _NOT_THERE
    }
    pairs = enumerate(zip(*texts.values(), strict=False)) if len(texts) == 2 else ()
    same = next((at for at, (one, other) in pairs if one != other), 0)
    start = max(0, same - 40)
    return {
        key: "…" * (start > 0)
        + visible(text[start : start + _SHOWN_CHANGE])
        + (f"… ({len(text):,} characters)" if len(text) > start + _SHOWN_CHANGE else "")
        for key, text in texts.items()
    }


class Pins:
    """The approved definitions of the servers that have `pin`. Raises UsageError for a bad lock."""

    def __init__(self, config: Config) -> None:
        self.path = config.lock
        self.servers = [
            name for name, one in config.servers.items() if one.pin and not one.disabled
        ]
        if self.servers and not self.path:
            raise UsageError('config: "pin" needs a config in a file: the lock lies beside it')
        self.hint = f"run: python atrax.pyz pin {config.path}"
        self._pinned = read_lock(self.path) if self.servers else None

    def read(self) -> Pinned | None:
        """The lock as it is now; for a thread."""
        return read_lock(self.path)

    def adopt(self, pinned: Pinned | None) -> bool:
        """From now on this is what is approved; whether anything else was so before."""
        before, self._pinned = self._pinned, pinned
        return before != pinned

    def approve(self, server: str, tools: Mapping[str, Pin]) -> Pinned:
        """Write the lock with these in it too, and give all of it; for a thread. Raises AtraxError.

        The file is read again: `pin` may have written it since."""
        pinned = self.read() or {}
        pinned[server] = {**pinned.get(server, {}), **tools}
        write_lock(self.path, pinned)
        return pinned

    def judge(self, entry: Entry, redact: Callable[[Json], Json]) -> str:
        """Why a pin hides this tool, "" if none does. Leaves the rest in `entry.unapproved`."""
        entry.unapproved = None
        if entry.server not in self.servers:
            return ""
        pin = (self._pinned or {}).get(entry.server, {}).get(entry.own)
        if len(entry.source) > _LARGEST:  # sorting the keys of 5 MB takes 50 ms
            entry.unapproved = Unapproved("too large", pin is None, [])
            return f"a pin takes no definition of more than {_LARGEST // 1024} KiB"
        digest = digest_of(entry.item)
        if pin is not None and pin.digest == digest:
            return ""
        found = changes(pin and pin.definition, entry.item, redact)
        entry.unapproved = Unapproved(digest, pin is None, found)
        if self._pinned is None:
            return f"not approved: there is no {self.path}; {self.hint}"
        if pin is None:
            return f"not approved: it is new; {self.hint}"
        if pin.definition is None:
            return f"changed since it was approved; {self.hint}"
        names = ", ".join(change["member"][:80] for change in found[:5])
        return f"changed since it was approved ({names}); {self.hint}"


# ---- Tools ----

_WARNED: Final = 20  # tools of a server: it decides how many it has, not how long the log is


class Policy:
    """Which definitions are shown, and which arguments reach their tool."""

    def __init__(self, record: Record, config: Config | None = None) -> None:
        config = Config() if config is None else config
        self._record = record
        self._warned: dict[str, set[str]] = {}  # server → tools
        self._told: dict[str, set[str]] = {}  # server → what is hidden where
        self._clean = frozenset(name for name, one in config.servers.items() if one.clean)
        self.pins = Pins(config)

    def warm(self) -> None:
        """Import what the first definition needs (40 ms), before there is one."""
        _read_schema({"type": "object"})

    def definition(self, entry: Entry) -> str:
        """Why this item must be hidden, "" if it need not. Leaves its findings in the entry's slots.

        1. its pin, on what the server sent; 2. hidden text, which `clean` cuts; 3. a tool's schemas,
        as clients will see them."""
        if entry.kind is Kind.TOOLS and (reason := self.pins.judge(entry, self._record.redact)):
            return reason
        reason = self._look_through(entry)
        return reason or (self._schemas(entry) if entry.kind is Kind.TOOLS else "")

    def pin_of(self, definition: Json) -> Pin:
        """What the lock keeps of an approved definition: no secret of the config, and nothing large."""
        text = encode(definition).decode()
        kept = len(text) <= _PIN_KEPT and self._record.redact(text) == text
        return Pin(digest_of(definition), definition if kept else None)

    def changes(self, pin: Pin | None, now: Json) -> list[dict[str, str]]:
        """What differs between what was approved (None: nothing) and a definition."""
        return changes(pin and pin.definition, now, self._record.redact)

    def introduced(self, server: str, offer: Offer) -> Offer:
        """What `server` says of itself, its hidden text warned of, and cut with `clean`."""
        said: Json = {"instructions": offer.instructions, "serverInfo": offer.info}
        text, look = encode(said), _Look()
        if _plain_json(text):
            return offer
        clean, plain = server in self._clean, look.whole(said, text)
        if plain is None:
            plain = {"instructions": "", "serverInfo": {}}
        if look.found:
            self._warn(server, "", look.found, clean)
        if not clean:
            return dataclasses.replace(offer, warning="; ".join(look.found))
        instructions, info = plain["instructions"], plain["serverInfo"]
        return dataclasses.replace(offer, instructions=instructions, info=info)

    def _look_through(self, entry: Entry) -> str:
        """Why `entry` must be hidden for what is hidden in it; else that is warned of, or cut."""
        if _plain_json(entry.source):
            return ""
        clean, look = entry.server in self._clean, _Look()
        item = look.whole(entry.item, entry.source)
        if look.found:
            self._warn(entry.server, f"{entry.kind.value[:-1]} {entry.own}", look.found, clean)
        if not clean:
            entry.warnings = look.found
        elif item is None:
            return look.found[-1]
        elif look.named:
            return f"clean cannot cut hidden text from a name: {look.named}"
        elif look.found:
            entry.item, entry.source = item, encode(item)
        return ""

    def _warn(self, server: str, what: str, found: list[str], cut: bool) -> None:
        """One event for what was found in a definition, the first time."""
        self._record.count("hidden_texts", server=server)
        told = self._told.setdefault(server, set())
        name = visible(f"{what[:120]}: ") if what else ""
        text = name + "; ".join(found[:3]) + (" (`clean` is on)" if cut else "")
        if text in told or len(told) >= _WARNED:
            return
        told.add(text)
        self._record.alarm("definition.hidden_text", text, server=server)

    def _schemas(self, entry: Entry) -> str:
        """Why a tool's schemas hide it. Leaves the one of its arguments in `entry.validator`."""
        member = "inputSchema"
        try:
            schema = _read_schema(entry.item.get(member))
            if schema.contents.get("type") != "object":
                return 'inputSchema must have the type "object" (Tool)'
            member = "outputSchema"
            if member in entry.item:
                # Clients compile it when they list tools, and one that fails takes the list with it.
                _read_schema(entry.item[member])
        except _Unusable as error:
            return f"{member} {error}"
        entry.validator = schema
        warned = self._warned.setdefault(entry.server, set())
        unchecked = [
            f"the pattern {_shown(pattern)} is not checked: {why}"
            for pattern, why in schema.patterns.items()
            if isinstance(why, str)
        ]
        if unchecked and entry.own not in warned and len(warned) < _WARNED:
            warned.add(entry.own)
            text = f"{entry.own}: {'; '.join(unchecked[:3])}"
            self._record.emit("schema.warning", "warning", server=entry.server, message=text)
        return ""

    def arguments(
        self, entry: Entry, arguments: dict[str, Json], mirrored: Mapping[str, str] | None
    ) -> Error | Outcome | None:
        """What is wrong with a tool call: an error, or a tool result that a model can correct.

        `mirrored`: the Mcp-Param-* headers of a modern client, lower-case name to raw value."""
        reason = "" if isinstance(entry.validator, _Schema) else self._schemas(entry)
        schema = entry.validator
        if not isinstance(schema, _Schema):
            return Error(INVALID_PARAMS, f"this tool cannot be called: its {reason}")
        if mirrored is not None and schema.headers:
            wrong = _mirrored_wrongly(schema, arguments, mirrored)
            if wrong:
                return Error(HEADER_MISMATCH, wrong, status=400)
        try:
            lines = schema.check(arguments, _Run())
        except _Exhausted:
            self._record.count("arguments_too_costly", server=entry.server)
            text = "the arguments are too large or too deep to be checked against the tool's inputSchema"
            return Error(INVALID_PARAMS, text)
        if not lines:
            return None
        # An `isError` result and not a protocol error: it reaches the model (2025-11-25, server/tools).
        wrong = "\n".join(f"- arguments{line}" for line in lines)
        text = f"The arguments do not fit the tool's inputSchema:\n{wrong}\nCorrect them and call again."
        return Outcome(result={"content": [{"type": "text", "text": text}], "isError": True})


# ---- Paths ----
# Which values of a call name a path, and whether it stays in `paths.dirs`. One value has several
# readings: servers decode it, trim it, take a backslash for a slash, cut a URI at "#". Each reading
# has to stay inside; nobody has to guess which one the server takes. What lies behind a directory
# that the config names is read anew, that name itself is not: "/srv/50%25" can be named as it is.
# This is a door. Who can change links between this look and the server's is stopped by `sandbox`.

_NAMES_PATH: Final = re.compile(  # alone, or the last word of a name in snake_case or camelCase
    r"(?:\A|[\W_]|(?<=[a-z\d])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z]))"
    r"(?i:paths?|file|filename|dir|directory|folder|root|uri)\Z"
)
_LONGEST_NAME: Final = 16  # characters at a name's end that decide; the longest word has nine
# What trimming and URL parsers (WHATWG URL, 4.4) drop must not hide a path or a scheme.
_BLANKS: Final = (*range(33), *range(0x7F, 0xA1), 0x1680, *range(0x2000, 0x200C), 0x2028, 0x2029)
_BLANK: Final = "".join(map(chr, (*_BLANKS, 0x202F, 0x205F, 0x3000, 0xFEFF))) + "\"'"
_MAYBE_FILE: Final = re.compile(
    rf"[{re.escape(_BLANK)}]*f[\t\n\r]*i[\t\n\r]*l[\t\n\r]*e[\t\n\r]*(?::|%(?:25)*3a)",
    re.IGNORECASE,
)
_FILE_URI: Final = re.compile(r"file:(//[^/]*+)?+(?=/)", re.IGNORECASE)
# "File: main.py" begins a text; a URI has no space there, but lax parsers would climb from it.
_PROSE: Final = re.compile(r"file: (?:[^/\\%]*\Z|.{12288})", re.IGNORECASE | re.DOTALL)
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z\d+.-]+:")  # one letter is a drive, which is a path
# Without these, whichever way they are written, a URI of another scheme cannot be read as a path.
_CLIMBS: Final = re.compile(r"\.\.|[\0．‥]|%(?:25)*(?:00|2e|c0)", re.IGNORECASE)
# Links that lead each process somewhere else: what they are to Atrax says nothing about the child.
_MAGIC: Final = re.compile(r"/(?:proc/(?:self|thread-self|\d+)|dev/(?:fd|std\w+))(?:/|\Z)")
# The last two are over-long UTF-8, which lax decoders take for "." and "/" (RFC 3629, section 10).
_ALIKE: Final = (
    *(("\\", "/"), ("／", "/"), ("＼", "/"), ("∕", "/"), ("⁄", "/"), ("．", "."), ("‥", "..")),
    *(("\udcc0\udcae", "."), ("\udcc0\udcaf", "/")),
)
_LONGEST: Final = 4096  # bytes of a path: PATH_MAX of Linux, past it a look says nothing
_MOST_VALUES: Final = 20_000  # values and properties that are looked at: some 40 ms
_MOST_STEPS: Final = 6_000  # parts of paths that are resolved in a call: some 40 ms, 500 paths


class _TooMuch(Exception):
    """The call names more than can be checked without holding the loop."""


def _tidy(text: str) -> str:
    return re.sub(r"[\t\n\r]", "", text).strip(_BLANK)


def _climbs(text: str) -> bool:
    # The five searches cost 1 ms for a megabyte, the expression alone 20.
    return any(mark in text for mark in ("..", "%", "\0", "．", "‥")) and bool(_CLIMBS.search(text))


def _unquoted(text: str) -> str:
    return urllib.parse.unquote(text, errors="surrogateescape")


def _alike(text: str) -> str:
    for written, meant in _ALIKE:
        text = text.replace(written, meant)
    return text


def _before_query(text: str) -> str:
    return re.split(r"[?#]", text, maxsplit=1)[0]


# Ways to read a path otherwise than it is written; each on top of those before it.
# Tidied first too: a URL parser drops the tab of "%\t2e" before it decodes it.
_READINGS: Final = (_tidy, _unquoted, _unquoted, _alike, _tidy, _before_query)


def _uri_path(uri: str) -> str | None:
    """The path of a `file:` URI, decoded once; None if it has none, or a host (RFC 8089)."""
    uri = uri.replace("\\", "/")
    match = _FILE_URI.match(uri)
    if match is None or (match[1] or "//").lower() not in ("//", "//localhost"):
        return None
    return _unquoted(uri[match.end() :])


class _Bounds:
    """The directories that one server's paths may lie in, as they are at this moment."""

    def __init__(self, config: ServerConfig, dirs: list[str]) -> None:
        self._cwd, self._dirs = config.cwd or os.getcwd(), dirs
        # This machine's links say nothing about a path inside a container.
        self._real = os.path.realpath if config.container is None else os.path.normpath
        self._roots = [self._real(one).rstrip("/") for one in dirs]
        self._steps = _MOST_STEPS

    def breach(self, text: str) -> str:
        """What is wrong with `text` as a path or URI, "" if nothing is."""
        scheme = _SCHEME.match(text)
        if scheme and scheme[0].lower() != "file:" and not _climbs(text):
            return ""  # at once: a data: URI can be long
        if len(text) > 3 * _LONGEST:  # each byte may be written as %XX
            return "is longer than a path can be"
        self._spend(1 + len(text) // 16)
        tidy = _tidy(text)
        if tidy.lower().startswith("file:"):
            path = _uri_path(tidy)
            if path is None:
                return "is no file: URI of an absolute path on this machine"
            if wrong := self._strays(_uri_path(_before_query(tidy)) or ""):
                return wrong
            text = path
        base = next((one for one in self._dirs if _lies_in(text, one.rstrip("/"))), "")
        readings = {text[len(base) :]}
        for step in _READINGS:
            readings |= set(map(step, readings))
        found = (self._strays(base + reading if base else reading) for reading in sorted(readings))
        return next(filter(None, found), "")

    def _spend(self, steps: int) -> None:
        self._steps -= steps
        if self._steps < 0:
            raise _TooMuch

    def _strays(self, reading: str) -> str:
        if "\0" in reading:
            return "holds a NUL"
        if reading.startswith("~"):
            return 'begins with "~", which servers expand'
        if reading.lower().startswith("file:"):
            reading = _uri_path(reading) or "/"
        scheme = _SCHEME.match(reading)
        if scheme and os.path.normpath(reading).startswith(scheme[0]):
            return ""  # another scheme, and no ".." that makes a path of it
        path = re.sub("/+", "/", os.path.join(self._cwd, reading))
        if len(path.encode(errors="surrogateescape")) > _LONGEST:
            return "is longer than a path can be"
        # Some resolve ".." behind a link as text, some as the kernel does: where it differs, both.
        if all(map(self._holds, {path, os.path.normpath(path)})):
            return ""
        return "lies outside the allowed directories"

    def _holds(self, path: str) -> bool:
        if "" in self._roots:
            return True  # "/" itself is allowed
        self._spend(path.count("/"))
        if _MAGIC.match(path):
            return False
        try:
            real = self._real(path)
        except ValueError:
            return False  # no name in the encoding of this machine's file system
        return any(_lies_in(real, root) for root in self._roots)


def _lies_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def _path_values(value: Json, where: str, globs: list[str]) -> Iterator[tuple[str, str]]:
    """Every text in `value` that names a path, after where it stands. Raises _TooMuch."""
    # Where it stands, its property path, whether that names a path, and the value itself.
    work: list[tuple[str, str, bool, Json]] = [(where, "", False, value)]
    left = _MOST_VALUES
    while work:
        where, path, named, value = work.pop()
        if isinstance(value, str):
            if named or (_MAYBE_FILE.match(value) and not _PROSE.match(_tidy(value))):
                yield where, value
        elif isinstance(value, list):
            left -= len(value) // 16  # numbers are passed over quickly
            texts = enumerate(value if left > 0 else ())
            inner = [(at, item) for at, item in texts if isinstance(item, (str, list, dict))]
            left -= len(inner)
            if left < 0:
                raise _TooMuch
            work += [(f"{where}[{at}]"[-300:], path, named, item) for at, item in reversed(inner)]
        elif isinstance(value, dict):
            for name, item in value.items():
                below = f"{path}.{name}" if path else name
                left -= 1 + (len(below) // 8 if globs else 0)
                if left < 0:
                    raise _TooMuch
                listed = any(fnmatch.fnmatchcase(below, glob) for glob in globs)
                named = listed or _NAMES_PATH.search(name[-_LONGEST_NAME:]) is not None
                work.append(
                    (f"{where}.{name:.60}"[-300:].lstrip("."), below if globs else "", named, item)
                )


def _path_subject(method: str, params: dict[str, Json]) -> tuple[str, Json]:
    """What of `params` can name a path, after its name."""
    if method in ("tools/call", "prompts/get"):
        return "arguments", params.get("arguments")
    if method == "resources/read":
        return "", {"uri": params.get("uri")}
    if method != "completion/complete":
        return "", {name: value for name, value in params.items() if name != "_meta"}
    argument, context, uri = params["argument"], params.get("context"), params["ref"].get("uri")
    given: dict[str, Json] = {**((context or {}).get("arguments") or {})}
    if argument["value"]:  # nothing typed yet names nothing
        given[argument["name"]] = argument["value"]
    # A template ("file:///{path}") is the server's own text, and names no file. No variable of one
    # has a space in its name.
    return "", given if uri is None or "{" in uri else {**given, "ref uri": uri}


def path_error(
    record: Record, server: str, config: ServerConfig, call: Call
) -> Error | Outcome | None:
    """What is wrong with the paths of a call to `server`: for a tool a result that a model can correct."""
    if config.paths is None:
        return None
    method, params = call.method, call.params
    dirs = config.paths.dirs
    bounds, (where, subject) = _Bounds(config, dirs), _path_subject(method, params)
    named = _path_values(subject, where, config.paths.arguments)
    try:
        found = (
            f"{at}: {_shown(text)} {why}" for at, text in named if (why := bounds.breach(text))
        )
        wrong = next(found, "")
    except _TooMuch:
        wrong = "the arguments name too many paths, or are too large, to be checked"
    if not wrong:
        return None
    record.alarm("path.refused", f"{method}: {wrong}", **call.origin, server=server, method=method)
    allowed = ", ".join(json.dumps(one, ensure_ascii=False) for one in dirs)
    advice = f"{wrong}. Allowed is what lies in {allowed}"
    if method != "tools/call":
        return Error(INVALID_PARAMS, advice)
    text = f"{advice}. Name an absolute path there and call again."
    return Outcome(result={"content": [{"type": "text", "text": text}], "isError": True})


def _within_paths(config: ServerConfig, uris: list[Json]) -> list[bool]:
    """For each of `uris`, whether it may reach the server."""
    bounds = _Bounds(config, config.paths.dirs if config.paths else ["/"])
    try:
        return [isinstance(uri, str) and not bounds.breach(uri) for uri in uris]
    except _TooMuch:
        return [False] * len(uris)


def cut_roots(config: ServerConfig, answer: Json) -> Json:
    """A client's `answer` to an ask without the roots that lie outside of `paths`; others stay whole.

    Servers make a client's roots their allowed directories, some of them what is no `file:` URI too
    (PROTOCOL, Roots widen)."""
    roots = answer.get("roots") if isinstance(answer, dict) else None
    if config.paths is None or not isinstance(roots, list):
        return answer
    uris = [root.get("uri") if isinstance(root, dict) else None for root in roots]
    files = [
        uri if isinstance(uri, str) and uri.lower().startswith("file:") else None for uri in uris
    ]
    return {**answer, "roots": list(itertools.compress(roots, _within_paths(config, files)))}


def cut_params(config: ServerConfig, params: dict[str, Json]) -> dict[str, Json]:
    """`params` of a call without what `paths` forbids in answers and in a listen."""
    if config.paths is None:
        return params
    answers, wanted = params.get("inputResponses"), params.get("notifications")
    if isinstance(answers, dict):
        kept = {key: cut_roots(config, answer) for key, answer in answers.items()}
        params = {**params, "inputResponses": kept}
    uris = wanted.get("resourceSubscriptions") if isinstance(wanted, dict) else None
    if isinstance(wanted, dict) and isinstance(uris, list):
        passing = list(itertools.compress(uris, _within_paths(config, uris)))
        params = {**params, "notifications": {**wanted, "resourceSubscriptions": passing}}
    return params


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
UNHEARD: Final = 3600.0  # seconds that a task without a ttl counts as running
NAME_SHOWN: Final = 1000  # characters of a name, URI or method in the record
ROUNDS: Final = 10  # further rounds that limits.rate allows for each call
# Bytes of arguments whose keys are sorted for their digest. Larger ones are taken in the order in
# which they came: to sort 400,000 keys holds the loop for 0.3 s.
SORTED: Final = 64 * 1024
TASKS: Final = 10_000  # tasks that are remembered; past it the oldest is forgotten, and so unknown


class Nothing:
    """The handle of a call that is already done, and the sink of one whose answer nobody needs."""

    def answer(self, ask: Ask, outcome: Outcome) -> None: ...
    def note(self, notice: Notice) -> None: ...
    def cancel(self, reason: str = "") -> None: ...
    def ask(self, ask: Ask) -> None: ...
    def done(self, outcome: Outcome) -> None: ...


NOTHING: Final = Nothing()


@dataclasses.dataclass(slots=True)
class Account:
    """What the audit says of a call, as it came in: the ladder rewrites a call's params."""

    began: float
    method: str
    name: str  # of its tool or prompt, as /mcp shows it, its URI or its task
    digest: str  # of its arguments
    again: bool  # a further round of a call that has its line for the first one

    @classmethod
    def of(cls, call: Call, now: float) -> Account:
        params = call.params
        if call.method in ("tools/call", "prompts/get"):
            content = params.get("arguments") or {}
        else:
            content = {key: value for key, value in params.items() if key != "_meta"}
        data = orjson.dumps(content)
        if len(data) <= SORTED:
            data = orjson.dumps(content, option=orjson.OPT_SORT_KEYS)
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        return cls(now, call.method[:NAME_SHOWN], _target(params), digest, bool(call.place))


def _target(params: dict[str, Json]) -> str:
    """What a call is about: the name, URI or task in its params."""
    ref = params.get("ref")
    about = ref if isinstance(ref, dict) else params
    found = (about.get(key) for key in ("name", "uri", "taskId"))
    return next((item[:NAME_SHOWN] for item in found if isinstance(item, str)), "")


def _ending(outcome: Outcome) -> str:
    """How a call ended, in a word."""
    result = outcome.result or {}
    if outcome.error is not None:
        return "cancelled" if outcome.error.code == CANCELLED else "error"
    if result.get("resultType") == "input_required":
        return "input_required"
    return "isError" if result.get("isError") is True else "ok"


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
        "gateway", "call", "sink", "server", "safe", "waiting", "link", "handle", "touched",
        "as_task", "task", "over", "account",
    )  # fmt: skip

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
        # What the audit will say, where there is one.
        self.account = Account.of(call, gateway.clock()) if gateway.record.audited else None

    # ---- the way down ----

    def found(self, entry: Entry) -> None:
        """What the call is about. Whatever becomes of it now, that is the server it was meant for."""
        self.server = entry.server
        if self.account is not None:
            self.account.name = entry.name

    def go(self, server: str, safe: bool) -> None:
        """Send the checked call to `server`, when it has a free process."""
        self.server = server
        self.safe = safe and "requestState" not in self.call.params
        self._lease()

    def _lease(self) -> None:
        self.waiting = None
        call = self.call
        if call.method in TASK_METHODS:  # of no open call, so it needs no free process
            self._ready(self.gateway.pool.at(self.server, call.owner, call.place))
            return
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
            self.gateway.subscriptions.sent(self.call.owner, self.server, [ask.params])
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
        self.call.method, self.call.params, self.call.place = (
            "tasks/result",
            {"taskId": task},
            outcome.place,
        )
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
            cancel = Call(
                "tasks/cancel", {"taskId": self.task}, call.owner, call.version, place=call.place
            )
            self.link.send(cancel, NOTHING)
        self.done(Outcome(error=Error(CANCELLED, reason)))


class Gateway:
    """The Door. A ladder for every call, the first rung that fails answers:

    1. params, for the client's protocol version (before anything is looked up in them);
    2. rate and calls in flight of the principal;
    3. the method exists, and on a server's own endpoint the server has declared it;
    4. the name or URI exists (unknown ones wait for servers that were never read);
    5. mirrored headers, then arguments, against the tool's schema;
    6. paths that the call names, against the server's `paths` (they cost a look at the disk).
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
        tasks: Tasks,
    ) -> None:
        self.config, self.record, self.policy, self.pool = config, record, policy, pool
        self.catalogue, self.subscriptions, self.clock = catalogue, subscriptions, clock
        self.draining = False  # calls in flight may finish, new ones are refused
        self.inflight: dict[str, int] = {}  # principal → calls under way
        # Principal, and whether of further rounds → (calls left, when that was so); the latest last.
        self._rates: OrderedDict[tuple[str, bool], tuple[float, float]] = OrderedDict()
        self._tasks = tasks
        # Says what to tell an owner (for OAuth: which scope it needs) whose rights alone are in the
        # way of a server, and of the tool that /mcp shows by this name ("": of more than one tool).
        self.step_up: Callable[[Owner, str, str], Error | None] | None = None
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
        error = check_params(call) or (self._lacking(call) if call.endpoint else None)
        if error is not None:
            return _refuse(sink, error)
        if call.method == "subscriptions/listen":
            if call.params["notifications"].get("taskIds") and (error := _undeclared_tasks(call)):
                return _refuse(sink, error)
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
        result = outcome.result
        if result is not None:
            if "task" in result or "taskId" in result:
                self._tasks.note(forward.server, outcome.place, principal, result)
            self.catalogue.remember(forward.call.owner, forward.server, result)
        if (
            error is not None
            and error.code == LEGACY_URL_ELICITATION
            and isinstance(error.data, dict)
        ):
            asked = error.data.get("elicitations")
            self.subscriptions.sent(forward.call.owner, forward.server, asked)
        kind = "ok" if error is None else str(error.code)
        # The key is built here and not by count(): sorting keyword arguments costs 0.6 us a call.
        key: CounterKey = ("calls", ("outcome", kind), ("server", forward.server))
        counters = self.record.counters
        counters[key] = counters.get(key, 0) + 1
        if forward.account is not None:
            self._tell(forward, forward.account, outcome)

    def _tell(self, forward: Forward, account: Account, outcome: Outcome) -> None:
        """The event of a call that is over. Rounds count once: a modern child that asks ends the call,
        and the client calls again; told are the first of these calls, so that what it did cannot hide
        behind a client that never comes back, and the one that ends otherwise."""
        call, error, ending = forward.call, outcome.error, _ending(outcome)
        if account.again and ending == "input_required":
            return
        raw = outcome.raw
        if raw is None and outcome.result is not None:
            raw = encode(outcome.result)
        redact = self.record.redact
        fields = {
            "request": call.request,
            "principal": redact(call.owner.principal),
            "address": call.address,
            "era": "modern" if call.version == MODERN else "legacy",
            "server": forward.server,
            "method": redact(account.method),
            "name": redact(account.name),
            "digest": account.digest,
            "outcome": ending,
            "code": None if error is None or ending == "cancelled" else error.code,
            "ms": round((self.clock() - account.began) * 1000, 1),
            "bytes": len(raw or b""),
        }
        self.record.publish(AUDITED, "debug", fields)

    def repeated(self, forward: Forward) -> None:
        self.record.emit(
            "call.repeated",
            **forward.call.origin,
            server=forward.server,
            message=f"its process died; {forward.call.method} is safe to repeat and goes to the next one",
        )

    # ---- rungs ----

    def _lacking(self, call: Call) -> Error | None:
        """-32601 for a method that the endpoint's own server has not declared; None while it is unknown."""
        need = NEEDS.get(call.method)
        if need is None:
            return None
        offer = self.catalogue.offer(call.endpoint, call.owner.scope)
        if offer is None or need in offer.capabilities:
            return None
        text = f'{call.method}: the server "{call.endpoint}" has no {need}'
        error = Error(METHOD_NOT_FOUND, text, status=404)
        whole = self.catalogue.offer(call.endpoint, EVERYTHING)
        if whole is None or need not in whole.capabilities:
            return error
        return self.withheld(call.owner, call.endpoint, "", error)

    def withheld(self, owner: Owner, server: str, tool: str, unknown: Error) -> Error:
        """The answer where the rights of `owner` alone are in the way: `unknown`, as if there were
        nothing, unless `step_up` says how to get more.

        Every name, URI and server that a scope keeps away is refused through here."""
        return (self.step_up(owner, server, tool) if self.step_up is not None else None) or unknown

    def _not_found(self, call: Call, kind: Kind, name: str, error: Error) -> Error:
        """The answer to a call of a name or URI whose look-up gave `error`."""
        owner = call.owner
        if error.code != INVALID_PARAMS or owner.scope.everything:
            return error
        anybody = dataclasses.replace(owner, scope=EVERYTHING)
        entry = self.catalogue.known(kind, call.endpoint, name, anybody)
        if entry is None:
            return error
        tool = entry.name if kind is Kind.TOOLS else ""
        return self.withheld(owner, entry.server, tool, error)

    def _admit(self, call: Call) -> Error | None:
        """One more call in flight for its principal, or 429 with what to do.

        A call that names its process goes on with one that was counted: rounds count once for rates."""
        limits, principal = self.config.limits, call.owner.principal
        running = self.inflight.get(principal, 0)
        if running >= limits.inflight:
            reason = f"{running} calls are in flight; limits.inflight is {limits.inflight}"
            error = own_error(OVERLOADED, f"too many calls: {reason}", "inflight", retryAfter=1)
        elif limits.rate and (wait := self._wait(principal, float(limits.rate), bool(call.place))):
            text = f"limits.rate allows {limits.rate} calls a minute; try again in {wait} s"
            error = own_error(NOT_ALLOWED, text, "rate", retryAfter=wait)
        else:
            self.inflight[principal] = running + 1
            return None
        error.status = 429
        method = call.method[:NAME_SHOWN]
        self.record.alarm("rate.refused", error.message, **call.origin, method=method)
        return error

    def _wait(self, principal: str, rate: float, again: bool) -> int:
        """Seconds until `principal` may call again, 0 for now: a bucket of `rate`, filled in a minute.

        Further rounds of a call (`again`) have one of their own: they are no calls, but the state
        that makes one can be sent any number of times."""
        now, rates, key = self.clock(), self._rates, (principal, again)
        rate *= ROUNDS if again else 1
        left, since = rates.pop(key, (rate, now))
        left = min(rate, left + (now - since) * rate / 60)
        rates[key] = (left if left < 1 else left - 1, now)
        # A bucket that has stood for a minute is full, as one that was never used.
        while now - next(iter(rates.values()))[1] >= 60:
            rates.popitem(last=False)
        return int((1 - left) * 60 / rate) + 1 if left < 1 else 0

    def _astray(self, server: str, call: Call) -> Outcome | None:
        """The answer to a call that names a path outside of the server's `paths`; None if none does."""
        config = self.config.servers[server]
        if config.paths is None:
            return None
        wrong = path_error(self.record, server, config, call)
        return Outcome(error=wrong) if isinstance(wrong, Error) else wrong

    # ---- ways ----

    def _own(self, call: Call, sink: Sink) -> Handle:
        """Lists and discover are answered from memory."""
        waiting = OwnAnswer(sink)
        find = self.catalogue.listing if call.method in PAGED else self.catalogue.discover
        waiting.lease = find(call, waiting.done)
        return waiting

    def _tool(self, forward: Forward) -> None:
        call = forward.call
        name = call.params["name"]
        entry = self.catalogue.known(Kind.TOOLS, call.endpoint, name, call.owner)
        if entry is not None:  # nearly always; then no wait has to be made
            self._call_tool(forward, entry)
            return
        found = functools.partial(self._call_tool, forward)
        self._lookup(forward, Kind.TOOLS, name, found)

    def _call_tool(self, forward: Forward, entry: Entry | Error) -> None:
        """What `_tool` looked up: checked, renamed and sent."""
        forward.waiting = None
        if forward.over:
            return
        call = forward.call
        if isinstance(entry, Error):
            error = self._not_found(call, Kind.TOOLS, call.params["name"], entry)
            forward.done(Outcome(error=error))
            return
        server = entry.server
        forward.found(entry)
        verdict = self.policy.arguments(entry, call.params.get("arguments") or {}, call.mirrored)
        verdict = verdict or self._astray(server, call)
        if verdict is not None:
            forward.done(verdict if isinstance(verdict, Outcome) else Outcome(error=verdict))
            return
        call.params = {**call.params, "name": entry.own}
        if "task" not in call.params and _only_as_task(entry.item):
            forward.as_task = True
            call.params["task"] = {}
        forward.go(server, self._safe(entry))

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
        call = forward.call
        template = self.catalogue.known(Kind.TEMPLATES, call.endpoint, ref["uri"], call.owner)
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
                error = self._not_found(call, kind, name, entry)
                forward.done(Outcome(error=error))
                return
            forward.found(entry)
            offer = self.catalogue.offer(entry.server, call.owner.scope)
            need = NEEDS[call.method]
            if offer is not None and need not in offer.capabilities:
                text = f'{call.method}: the server "{entry.server}" has no {need}'
                forward.done(Outcome(error=Error(METHOD_NOT_FOUND, text, status=404)))
                return
            if (astray := self._astray(entry.server, call)) is not None:
                forward.done(astray)
                return
            call.params = rewrite(entry.own)
            forward.go(entry.server, self.config.servers[entry.server].repeat)

        self._lookup(forward, kind, name, found)

    def _lookup(
        self, forward: Forward, kind: Kind, name: str, found: Callable[[Entry | Error], None]
    ) -> None:
        call = forward.call
        wait = self.catalogue.lookup(kind, call.endpoint, name, found, call.owner)
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
        home = self._tasks.find(call, task)
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
        offers = filter(None, (self.catalogue.offer(one, call.owner.scope) for one in names))
        if not any(_has_tasks(offer.capabilities, extension) for offer in offers):
            return Error(METHOD_NOT_FOUND, f"Method not found: {call.method}", status=404)
        return _undeclared_tasks(call) if extension else None

    def _list_tasks(self, forward: Forward) -> None:
        """The principal's own tasks as last seen; a child would list those of all its clients."""
        call = forward.call
        error = self._no_tasks(call)
        if error is not None:
            forward.done(Outcome(error=error))
            return
        tasks = self._tasks.of(call.endpoint, call.owner)
        forward.done(Outcome({"tasks": tasks}))

    def _unknown(self, forward: Forward) -> None:
        """A method that MCP does not name: an extension's, passed to who declared extensions, else refused.

        Nobody knows what it reaches, so it is for those alone from whom nothing there is kept; and
        nothing is stepped up to, since no scope is known to be enough."""
        call, server, scope = forward.call, forward.call.endpoint, forward.call.owner.scope
        offer = self.catalogue.offer(server, scope) if server and scope.all_of(server) else None
        if offer is not None and (
            "extensions" in offer.capabilities or "experimental" in offer.capabilities
        ):
            astray = self._astray(server, call)
            forward.go(server, safe=False) if astray is None else forward.done(astray)
            return
        error = Error(METHOD_NOT_FOUND, f"Method not found: {call.method}", status=404)
        forward.done(Outcome(error=error))


@dataclasses.dataclass(slots=True)
class TaskHome:
    """Where a task lives, whose it is, and what was last heard of it (and when, monotonic)."""

    server: str
    place: str
    principal: str
    task: dict[str, Json]
    heard: float

    def belongs_to(self, owner: Owner) -> bool:
        """Whether it was made for the principal of `owner`, which must still see the server."""
        return self.principal == owner.principal and owner.scope.sees(self.server)

    def runs(self, now: float) -> bool:
        """Whether it may still be at work: not known to be over, and younger than its `ttl`."""
        if self.task.get("status") not in ("working", "input_required"):
            return False
        ttl = self.task.get("ttl", self.task.get("ttlMs"))
        return now - self.heard < (ttl / 1000 if isinstance(ttl, (int, float)) else UNHEARD)


class Tasks:
    """Which process made which task, for whom (DESIGN, Terms: a task belongs to its principal).

    Ids are the children's own, so two servers may mint the same one: on /mcp it is the first's."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
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
            if home.principal == principal:
                home.task, home.heard = seen, self._clock()
            return
        self._homes[server, ident] = TaskHome(server, place, principal, seen, self._clock())
        self._first.setdefault(ident, server)
        if len(self._homes) > TASKS:
            (old_server, old), _ = self._homes.popitem(last=False)
            if self._first.get(old) == old_server:
                del self._first[old]

    def find(self, call: Call, ident: Json) -> TaskHome | None:
        """The task `ident` as endpoint and owner of `call` may see it; None is "unknown"."""
        if not isinstance(ident, str):
            return None
        home = self._homes.get((call.endpoint or self._first.get(ident, ""), ident))
        return home if home is not None and home.belongs_to(call.owner) else None

    def home(self, call: Call, ident: Json) -> tuple[str, str] | None:
        """Server and place of what `find` finds, for Subscriptions."""
        home = self.find(call, ident)
        return None if home is None else (home.server, home.place)

    def run_at(self, place: str) -> bool:
        """Whether a task may still be at work in that process: then it is in use."""
        now = self._clock()
        return any(home.place == place and home.runs(now) for home in self._homes.values())

    def of(self, endpoint: str, owner: Owner) -> list[Json]:
        """Every task that `find` would find."""
        return [
            home.task
            for (server, ident), home in self._homes.items()
            if home.belongs_to(owner) and server == (endpoint or self._first.get(ident))
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


def _undeclared_tasks(call: Call) -> Error | None:
    """-32021 for a client that did not declare the extension (SEP-2663, Error Handling)."""
    if _has_tasks(call.capabilities, extension=True):
        return None
    needed: Json = {"requiredCapabilities": {"extensions": {META + "tasks": {}}}}
    return Error(MISSING_CAPABILITY, "the client did not declare tasks", needed, status=400)


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
OVERDUE: Final = 10_000  # cancelled, unanswered calls of a child that are told apart
ASKS_PER_CALL: Final = 100  # asks that may wait in one call; a child that loops is refused
KEY_LENGTH: Final = 128  # characters of a child's own key for its ask, longer ones are not used
REMARKS: Final = 20  # remarks on junk per WINDOW; the rest is counted
WINDOW: Final = 10.0  # seconds
REOPEN: Final = (1.0, 60.0)  # seconds until a listen that the child ended is opened again
SALVAGE: Final = 1 << 20  # bytes of a broken line that are searched for the id of its call

LINE_HEAD: Final = b'{"jsonrpc":"2.0","id":'
LINE_RESULT: Final = b',"result":'
SPOKEN: Final = (*LEGACY, MODERN)
ATRAX: Final[dict[str, Json]] = {"name": "atrax", "title": "Atrax", "version": VERSION}

# What Atrax sends for itself (DESIGN, Which process?): no handler of a client's, no open call.
OWN_METHODS: Final = frozenset({
    "server/discover", "initialize", "ping", "logging/setLevel", "tools/list", "prompts/list",
    "resources/list", "resources/templates/list", "resources/subscribe", "resources/unsubscribe",
    "subscriptions/listen",
    # A client's, but of no open call: what a task asks names the task.
    "tasks/get", "tasks/update", "tasks/result", "tasks/cancel",
})  # fmt: skip
LIST_CHANGED: Final = {
    "notifications/tools/list_changed": (Kind.TOOLS,),
    "notifications/prompts/list_changed": (Kind.PROMPTS,),
    # One notification for both: no era has one of its own for templates.
    "notifications/resources/list_changed": (Kind.RESOURCES, Kind.TEMPLATES),
}
ROOTS_CHANGED: Final = "notifications/roots/list_changed"
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
NOBODY: Final = Owner("")


class Host(Protocol):
    """Servers → Supervisor: where a peer stands, and whom it tells what the process is and says."""

    server: str
    place: str
    config: ServerConfig
    limits: Limits

    def write(self, line: bytes) -> None: ...  # one whole message, without its newline
    def clock(self) -> float: ...
    def ready(self, peer: Peer) -> None: ...  # its era is known: `peer` takes over from the Probe
    def unfit(self, reason: str) -> None: ...  # another version, or nonsense: stop it
    def changed(self, kind: Kind) -> None: ...  # list_changed
    def told(self, notice: Notice) -> None: ...  # of no call: task states, elicitation/complete
    def logged(self, level: str, message: str) -> None: ...  # its messages of no call, our remarks
    def freed(self) -> None: ...  # a call ended or is parked no more


class _Then:
    """The sink of what Atrax asks for itself: the outcome goes to one function, notices to another."""

    __slots__ = ("_heard", "_then")

    def __init__(
        self,
        then: Callable[[Outcome], None] = lambda outcome: None,
        heard: Callable[[Notice], None] = lambda notice: None,
    ) -> None:
        self._then, self._heard = then, heard

    def note(self, notice: Notice) -> None:
        self._heard(notice)

    def ask(self, ask: Ask) -> None: ...

    def done(self, outcome: Outcome) -> None:
        self._then(outcome)


@dataclasses.dataclass(slots=True, eq=False)
class _Flight:
    """One request that was written and is not answered yet; for its sender, the handle."""

    peer: Peer
    ident: int
    call: Call
    sink: Sink
    own: bool  # one of Atrax itself, see OWN_METHODS
    due: float = math.inf  # when it times out; progress moves it, never past `limit`
    limit: float = math.inf
    paused: float | None = None  # since when a person is asked: the clock stands still
    asks: dict[str, Ask] | None = None  # by key: sent to the sink and not answered
    keys: dict[str, int] | None = None  # every key or method used so far, and how often
    over: bool = False

    def answer(self, ask: Ask, outcome: Outcome) -> None:
        if not self.over:
            self.peer.answered(self, ask, outcome)

    def note(self, notice: Notice) -> None:
        if not self.over:
            self.peer.noted(self, notice)

    def cancel(self, reason: str) -> None:
        if not self.over:
            self.peer.abandon(self, reason, Error(CANCELLED, reason))


class Peer:
    """One process as a JSON-RPC peer: ids, calls in flight, their clocks; the Link to it.

    What an era adds is a subclass. `start` once, then `receive` for each line and `wake` a few
    times a second; `lost` ends it."""

    era: ClassVar[str]
    health: ClassVar[str]  # the cheapest request that any child of this era answers

    def __init__(self, host: Host, offer: Offer, first: int = 1) -> None:
        self.server, self.place, self.offer = host.server, host.place, offer
        self.open_calls = 0  # clients' calls in flight, parked ones too, overdue ones not
        self.parked = 0  # those of them that wait for the answer to an ask
        self.known_to_ask = False  # an elicitation or a sampling arrived while a call was open
        self.overdue: set[int | None] = set()  # cancelled and unanswered: it may still ask for them
        self.listens: dict[_Flight, None] = {}  # of clients: a use of the process, though no call
        self._config, self._depth = host.config, host.limits.depth
        self._timeout, self._max_timeout = host.config.timeout, host.config.max_timeout
        self._host, self._write, self._clock = host, host.write, host.clock
        self._next = first  # never used twice while the process lives
        self._flights: dict[int, _Flight] = {}
        self._remarks = Throttle(REMARKS, WINDOW)
        self._lost: str | None = None  # why the process is gone
        self._heard = 0.0  # since when it is silent although calls are in flight
        self._checked = 0.0  # when it was last pinged because of that

    # ---- the way down ----

    def send(self, call: Call, sink: Sink) -> Handle:
        """Write `call`; its answer, and what belongs to it, comes to `sink`."""
        if self._lost is not None:
            return self._refused(call, sink, self._died(self._lost))
        if self._config.paths is not None:
            call = dataclasses.replace(call, params=cut_params(self._config, call.params))
        if call.method == "subscriptions/listen":
            return self._listen(call, sink)
        return self._request(call, sink)

    def _refused(self, call: Call, sink: Sink, error: Error) -> _Flight:
        flight = _Flight(self, 0, call, sink, own=True, over=True)
        self._tell(flight, Outcome(error=error, server=self.server, place=self.place))
        return flight

    def _request(self, call: Call, sink: Sink) -> _Flight:
        now = self._clock()
        ident = self._next
        self._next = ident + 1
        try:
            line = write_request(ident, call.method, self._params(ident, call))
        except TypeError as error:  # orjson.JSONEncodeError: deeper than it can write, for one
            text = f"params cannot be written as JSON: {error}"
            return self._refused(call, sink, Error(INVALID_PARAMS, text, status=400))
        own = call.method in OWN_METHODS
        due, limit = now + self._timeout, now + self._max_timeout
        flight = _Flight(self, ident, call, sink, own, due, limit)
        # Registered before the write: an eager child can answer within this turn of the loop.
        self._flights[ident] = flight
        if not own:
            if not self.open_calls:
                self._heard = now
            self.open_calls += 1
        self._write(line)
        return flight

    def _params(self, ident: int, call: Call) -> dict[str, Json]:
        """The params of `call` as this era writes them; what must come before it is written here.

        `call.params` stay as they are: the call may be repeated elsewhere."""
        return call.params

    def _listen(self, call: Call, sink: Sink) -> Handle:
        raise NotImplementedError

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
                    self._answered(flight, line[comma + 10 : line.rfind(b"}")])
                    return
        self._slowly(line, now)

    def _answered(self, flight: _Flight, raw: bytes) -> None:
        try:
            result = decode(raw, self._depth)
        except InvalidJson as error:
            self._end(flight, self._nonsense(str(error)))
            return
        if not isinstance(result, dict):
            self._end(flight, self._nonsense('"result" is not an object'))
            return
        if raw[0] != 0x7B or raw[-1] != 0x7D:
            raw = raw.strip()  # who splices members into it counts on the braces
        self._end(flight, Outcome(result, raw))

    def _slowly(self, line: bytes, now: float) -> None:
        """Any other line: decoded whole, and whatever goes on is written anew."""
        if self._lost is not None or not line.strip():
            return
        try:
            value = decode(line, self._depth + 1)
        except InvalidJson as error:
            self._broken(_salvaged(line), str(error), now)
            return
        if not isinstance(value, list):
            self._message(value, now)
        elif self.offer.version == "2025-03-26":  # the one version that has batches
            for item in value:
                self._message(item, now)
        else:
            self._remark("warning", "a batch, which its protocol version does not have", now)

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

    def _broken(self, value: Json, reason: str, now: float) -> None:
        """A message that cannot be used. Who waits for it is told, whichever side that is."""
        ident = value.get("id") if isinstance(value, dict) else None
        asks = isinstance(value, dict) and "method" in value
        flight = self._flights.get(ident) if type(ident) is int and not asks else None
        if flight is not None:
            self._end(flight, self._nonsense(reason))
            return
        self._remark("warning", f"stdout: {reason}: {_excerpt(value)}", now)
        if asks and (type(ident) is int or isinstance(ident, str)):
            self._refuse(ident, reason, INVALID_REQUEST)

    def _response(self, message: Response, now: float) -> None:
        ident = message.id
        flight = self._flights.get(ident) if type(ident) is int else None
        if flight is None:
            self._stray(message, now)
        elif message.error is None:
            self._end(flight, Outcome(message.result))
        else:
            self._end(flight, Outcome(error=self._failed(flight, message.error)))

    def _failed(self, flight: _Flight, error: Error) -> Error:
        """A child's error in canonical form."""
        return error

    def _stray(self, message: Response, now: float) -> None:
        """A response that nobody waits for: late (its call was cancelled), double, or foreign."""
        ident = message.id
        if type(ident) is int and 0 < ident < self._next:
            self._remark("debug", f"answered request {ident} late or twice: dropped", now)
        elif message.error is not None:
            self._remark("warning", f"for no request: {_describe(message.error)}", now)
        else:
            self._remark("warning", f"answered no request of ours: {ident!r:.80}", now)

    def _requested(self, request: Request, now: float) -> None:
        """The child sent a request."""
        if request.method == "ping":
            self._write(write_result(request.id, b"{}"))
        else:
            self._refuse(request.id, f"Method not found: {request.method:.80}")

    def _refuse(self, ident: object, reason: str, code: int = METHOD_NOT_FOUND) -> None:
        """Answer a request of the child's by an error."""
        self._write(write_error(cast("int | str", ident), Error(code, reason)))

    def _notice(self, notice: Notice, now: float) -> None:
        """Notifications that mean the same in both eras; progress first, it is the frequent one."""
        method, params = notice.method, notice.params
        if method == "notifications/progress":
            self._progress(params, now)
        elif method == "notifications/message":
            self._log(notice, now)
        elif method in LIST_CHANGED:
            self._list_changed(method)
        elif method in OF_NO_CALL:
            self._host.told(notice)
        else:
            self._remark("debug", f"{method:.80} means nothing here: dropped", now)

    def _progress(self, params: dict[str, Json], now: float) -> None:
        token = params.get("progressToken")
        flight = self._flights.get(token) if type(token) is int else None
        if flight is None or not flight.call.progress:
            return  # of a call that is over, or that nobody wants to hear of
        flight.due = max(flight.due, now + self._timeout)
        rest = {key: value for key, value in params.items() if key != "progressToken"}
        self._tell(flight, Notice("notifications/progress", rest))

    def _log(self, notice: Notice, now: float) -> None:
        """A log message does not say which call it belongs to either: see above."""
        flight = None if self.overdue else self._only_open()
        if flight is None:
            self._remark(*_log_line(notice.params), now)
        elif _wanted(notice.params.get("level"), flight.call.log_level):
            self._tell(flight, notice)

    def _only_open(self) -> _Flight | None:
        """The one call of a client in flight; None for no call or several."""
        if self.open_calls != 1:
            return None
        return next((flight for flight in self._flights.values() if not flight.own), None)

    def _list_changed(self, method: str) -> None:
        for kind in LIST_CHANGED[method]:
            self._host.changed(kind)

    # ---- the ends of a call ----

    def _end(self, flight: _Flight, outcome: Outcome) -> None:
        """The only way out of `_flights`: accounts for the call, then tells its sink."""
        del self._flights[flight.ident]
        flight.over = True
        outcome.server, outcome.place = self.server, self.place
        if flight.own:
            self.listens.pop(flight, None)
            self._tell(flight, outcome)
            return
        self.open_calls -= 1
        if flight.paused is not None:
            self.parked -= 1
        self._tell(flight, outcome)
        self._host.freed()

    def _tell(self, flight: _Flight, said: Outcome | Notice | Ask) -> bool:
        """Hand `said` to the sink; whether it took it. One sink's fault must not cost the other
        calls their answers."""
        try:
            if isinstance(said, Outcome):
                flight.sink.done(said)
            elif isinstance(said, Notice):
                flight.sink.note(said)
            else:
                flight.sink.ask(said)
        except Exception as error:
            self._host.logged("error", f"internal error: a call's sink raised {error!r}")
            return False
        return True

    def abandon(self, flight: _Flight, reason: str, error: Error) -> None:
        """Give `flight` up: the child is told, the sink hears `error` at once."""
        cancelled: dict[str, Json] = {"requestId": flight.ident}
        if reason:
            cancelled["reason"] = reason
        self._write(write_notice(Notice("notifications/cancelled", cancelled)))
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
        if left_out := self._remarks.left_out(now):
            self._host.logged("warning", f"{left_out} more remarks of this kind were left out")
        for flight in list(self._flights.values()):
            # Each may be gone by now: a sink that hears of a timeout can cancel others.
            if not flight.over and flight.paused is None and now >= min(flight.due, flight.limit):
                self._time_out(flight, now)
        silent = self.open_calls > self.parked and now - self._heard > HEALTH
        if silent and now - self._checked >= HEALTH:
            self._checked = now
            self._own_call(self.health, {}, _Then(self._looked_after))

    def _time_out(self, flight: _Flight, now: float) -> None:
        setting = "max_timeout" if now >= flight.limit else "timeout"
        seconds = self._max_timeout if now >= flight.limit else self._timeout
        text = f"{self.server} did not finish {flight.call.method} within {seconds:g} s ({setting})"
        error = own_error(TIMED_OUT, text, "timeout", self.server)
        self.abandon(flight, f"no answer within {seconds:g} s", error)

    def _looked_after(self, outcome: Outcome) -> None:
        """That a silent child gives no sign of life is said, and no more: the calls have their own
        timeouts, and a child that computes on its only thread is not ill."""
        if outcome.error is not None and outcome.error.code == TIMED_OUT:
            silence = self._clock() - self._heard
            self._host.logged("warning", f"gave no sign of life for {silence:.0f} s")

    def lost(self, why: str) -> None:
        """The process is gone: the last events of every call and listen. Nothing comes after them."""
        if self._lost is not None:
            return
        self._lost = why
        for flight in list(self._flights.values()):
            if not flight.over:
                self._end(flight, Outcome(error=self._died(why)))

    def _died(self, why: str) -> Error:
        text = f"{self.server} died before it answered: {why}"
        return own_error(CHILD_DIED, text, "died", self.server)

    def _nonsense(self, reason: str) -> Outcome:
        text = f"{self.server} sent an answer that cannot be used: {reason}"
        return Outcome(error=Error(INTERNAL_ERROR, text))

    def _remark(self, level: str, message: str, now: float) -> None:
        """Say something of what the child sends: the first few in full, the rest as a number."""
        if self._remarks.passes(now):
            self._host.logged(level, message)


class ModernServer(Peer):
    """A modern child (MCP 2026-07-28, basic/transports/stdio): stateless requests, listens, no asks."""

    era: ClassVar[str] = "modern"
    health: ClassVar[str] = "server/discover"

    def __init__(self, host: Host, offer: Offer, first: int = 1) -> None:
        super().__init__(host, offer, first)
        self._news = _list_changes(offer.capabilities)
        self._reopen_at = math.inf  # when its list changes are listened to again
        self._delay = REOPEN[0]
        self._opened = False  # whether they were ever listened to

    def start(self) -> None:
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

    def _requested(self, request: Request, now: float) -> None:
        what = f"stdout: a request ({request.method:.80}), which a modern server must not send"
        self._remark("warning", what, now)

    def _refuse(self, ident: object, reason: str, code: int = METHOD_NOT_FOUND) -> None:
        """ "The client MUST NOT write JSON-RPC responses" (2026-07-28, basic/transports/stdio)."""

    def _notice(self, notice: Notice, now: float) -> None:
        meta = notice.params.get("_meta")
        listen = self._listen_of(meta.get(META_SUBSCRIPTION)) if isinstance(meta, dict) else None
        if listen is not None:
            self._tell(listen, _without_subscription(notice))
        elif notice.method != "notifications/cancelled":
            super()._notice(notice, now)
        elif (ended := self._listen_of(notice.params.get("requestId"))) is not None:
            # How a child tears down a listen, and nothing else: as good as the listen's result.
            self._end(ended, Outcome(result={}))

    # ---- listens ----

    def _listen(self, call: Call, sink: Sink) -> Handle:
        flight = self._request(call, sink)
        flight.due = flight.limit = math.inf  # a listen has no end of its own
        if call.owner is not NOBODY and not flight.over:
            self.listens[flight] = None
        return flight

    def _listen_of(self, ident: Json) -> _Flight | None:
        """The listen under this subscription id, which is the id of its request."""
        flight = self._flights.get(ident) if type(ident) is int else None
        if flight is None or flight.call.method != "subscriptions/listen":
            return None
        return flight

    def _open_news(self) -> None:
        self._reopen_at = math.inf
        params: dict[str, Json] = {"notifications": dict.fromkeys(self._news, True)}
        call = Call("subscriptions/listen", params, NOBODY, MODERN)
        self._listen(call, _Then(self._news_ended, self._news_heard))

    def _news_heard(self, notice: Notice) -> None:
        if notice.method in LIST_CHANGED:
            self._list_changed(notice.method)
        elif notice.method == "notifications/subscriptions/acknowledged":
            if self._opened:  # what changed while nobody listened is unknown
                for method in self._news.values():
                    self._list_changed(method)
            self._opened, self._delay = True, REOPEN[0]

    def _news_ended(self, outcome: Outcome) -> None:
        """Opened again, but not where the child has no listens."""
        refused = outcome.error is not None and outcome.error.code == METHOD_NOT_FOUND
        if not refused:
            self._reopen_at = self._clock() + self._delay
            self._delay = min(self._delay * 2, REOPEN[1])

    def wake(self, now: float) -> None:
        super().wake(now)
        if now >= self._reopen_at and self._lost is None:
            self._open_news()


class LegacyServer(Peer):
    """A legacy child, seen as a modern server (MCP 2024-11-05 … 2025-11-25, basic/lifecycle)."""

    era: ClassVar[str] = "legacy"
    health: ClassVar[str] = "ping"

    def __init__(self, host: Host, offer: Offer, first: int = 1) -> None:
        super().__init__(host, offer, first)
        self._level = len(LOG_LEVELS)  # the lowest level set so far, as an index; none yet
        self._topics: dict[str, bool] = {}  # URIs subscribed to at the child: has it accepted?

    def start(self) -> None:
        """The handshake's last word (2025-11-25, basic/lifecycle, Initialization)."""
        self._write(write_notice(Notice("notifications/initialized", {})))

    def _params(self, ident: int, call: Call) -> dict[str, Json]:
        if call.log_level is not None and "logging" in self.offer.capabilities:
            self._lower(call.log_level)  # written before the call itself is
        params = call.params
        if "inputResponses" in params or "requestState" in params:  # which no legacy child knows
            params = {**params}
            params.pop("inputResponses", None)
            params.pop("requestState", None)
        if call.progress:
            meta = params.get("_meta")
            token = {"progressToken": ident}
            params = {**params, "_meta": {**meta, **token} if isinstance(meta, dict) else token}
        return params

    def _lower(self, level: str) -> None:
        """Legacy log levels hold for the process: it gets the lowest that any client asked for."""
        wanted = LOG_LEVELS.index(level) if level in LOG_LEVELS else len(LOG_LEVELS)
        if wanted < self._level:
            self._level = wanted
            self._own_call("logging/setLevel", {"level": level}, _Then())

    def _failed(self, flight: _Flight, error: Error) -> Error:
        if error.code == LEGACY_RESOURCE_NOT_FOUND and flight.call.method == "resources/read":
            data = error.data if isinstance(error.data, dict) else {}
            uri = {"uri": flight.call.params.get("uri")}
            return Error(INVALID_PARAMS, error.message, {**data, **uri})
        return error

    # ---- open and overdue ----

    def abandon(self, flight: _Flight, reason: str, error: Error) -> None:
        if isinstance(flight, _LegacyListen):
            self._unlisten(flight, error)
            return
        # A cancelled legacy request gets no response, so only a late one shows that it is over.
        # Past OVERDUE they share an entry that no answer removes: then no ask is delivered again.
        if not flight.own:
            self.overdue.add(flight.ident if len(self.overdue) < OVERDUE else None)
        asks, flight.asks = flight.asks or {}, None
        super().abandon(flight, reason, error)
        for ask in asks.values():
            self._refuse(ask.source, "the call that this belongs to was cancelled")

    def _stray(self, message: Response, now: float) -> None:
        if type(message.id) is int and message.id in self.overdue:
            self.overdue.discard(message.id)
            self._host.freed()
        else:
            super()._stray(message, now)

    # ---- asks ----

    def _requested(self, request: Request, now: float) -> None:
        kind = ASK_KINDS.get(request.method)
        if kind is None:
            super()._requested(request, now)
            return
        if kind not in self._config.offer:
            self._refuse(request.id, f'"{kind}" was not offered at initialize (config: offer)')
            return
        if kind != "roots" and (self.open_calls or self.overdue):
            self.known_to_ask = True
        owner = self._whose(request)
        if isinstance(owner, str):
            self._remark("warning", f"{request.method} was refused: {owner}", now)
            self._refuse(request.id, owner)
            self._host.freed()  # known to ask, it takes no new calls while it owes an answer
        else:
            self._ask(owner, request, now)

    def _whose(self, request: Request) -> _Flight | str:
        """The call that an ask belongs to, or why none can be named."""
        meta = request.params.get("_meta")
        task = meta.get(META_TASK) if isinstance(meta, dict) else None
        if isinstance(task, dict):
            return self._whose_task(task.get("taskId"))
        open_now = self.open_calls + len(self.overdue)
        if open_now == 0:
            return "no call is open in this process, so there is nobody to ask"
        if open_now > 1:
            return (
                f"{open_now} calls are open in this process, and MCP does not say which one asks; "
                f"set mcpServers.{self.server}.concurrency to 1, and processes to as many as you need"
            )
        return self._only_open() or "the call that this belongs to was cancelled"

    def _whose_task(self, task: Json) -> _Flight | str:
        """A task's ask comes after the call that made it has ended; it travels on the tasks/result
        that waits for it (2025-11-25, basic/utilities/tasks, Input Required Status)."""
        for flight in self._flights.values():
            if flight.call.method == "tasks/result" and flight.call.params.get("taskId") == task:
                return flight
        return "nobody waits for the result of that task, so there is nobody to ask"

    def _ask(self, flight: _Flight, request: Request, now: float) -> None:
        if flight.asks is None or flight.keys is None:
            flight.asks, flight.keys = {}, {}
        if len(flight.asks) >= ASKS_PER_CALL:
            self._refuse(request.id, f"{ASKS_PER_CALL} asks of this call wait already")
            return
        key, params = _key(request, flight.keys)
        ask = flight.asks[key] = Ask(key, request.method, params, request.id)
        if flight.paused is None:
            flight.paused = now
            self.parked += 1
        if not self._tell(flight, ask):  # the child must not wait for ever
            failed = Error(INTERNAL_ERROR, "Atrax could not pass this on")
            self.answered(flight, ask, Outcome(error=failed))

    def answered(self, flight: _Flight, ask: Ask, outcome: Outcome) -> None:
        if not self._settle(flight, ask):
            return
        error = outcome.error
        if error is None:
            raw = outcome.raw or b"{}" if outcome.result is None else encode(outcome.result)
            if ask.method == "roots/list":
                raw = encode(cut_roots(self._config, decode(raw)))
            self._write(write_result(cast("int | str", ask.source), raw))
        else:
            # 1099 says within Atrax that nobody waits; on a wire it means nothing.
            code = INTERNAL_ERROR if error.code == CANCELLED else error.code
            shown = Error(code, error.message, error.data)
            self._write(write_error(cast("int | str", ask.source), shown))
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

    def _taken_back(self, ident: Json) -> None:
        """The child cancelled an ask of its own."""
        for flight in self._flights.values():
            for ask in (flight.asks or {}).values():
                if ask.source == ident and type(ask.source) is type(ident):
                    self._settle(flight, ask)
                    self._tell(flight, Notice("notifications/cancelled", {"requestId": ask.key}))
                    self._host.freed()
                    return

    def noted(self, flight: _Flight, notice: Notice) -> None:
        # Roots widen what some servers may touch: a session's never reach a child of several.
        own_roots = self._config.isolation == "session" and notice.method == ROOTS_CHANGED
        if own_roots or notice.method == "notifications/progress":  # on an ask, under its own token
            self._write(write_notice(notice))

    def _notice(self, notice: Notice, now: float) -> None:
        if notice.method == "notifications/cancelled":
            self._taken_back(notice.params.get("requestId"))
        elif notice.method == "notifications/resources/updated":
            # To all of them, whatever they named: who listens knows what lies in what.
            for listen in list(self.listens):
                cast(_LegacyListen, listen).heard(notice)
        else:
            super()._notice(notice, now)

    # ---- listens ----

    def _listen(self, call: Call, sink: Sink) -> Handle:
        resources = self.offer.capabilities.get("resources")
        able = isinstance(resources, dict) and bool(resources.get("subscribe"))
        listen = _LegacyListen(self, 0, call, sink, own=True)
        listen.uris = dict.fromkeys(_uris(call.params) if able else ())
        self.listens[listen] = None
        for uri in listen.uris:
            if uri not in self._topics:  # one subscription at the child for all who listen
                self._topics[uri] = False
                subscribed = functools.partial(self._subscribed, uri)
                self._own_call("resources/subscribe", {"uri": uri}, _Then(subscribed))
        listen.acknowledge(self._topics)
        return listen

    def _subscribed(self, uri: str, outcome: Outcome) -> None:
        if outcome.error is not None:
            self._topics.pop(uri, None)
        elif uri in self._topics:
            self._topics[uri] = True
        for listen in list(self.listens):
            cast(_LegacyListen, listen).acknowledge(self._topics)

    def _unlisten(self, listen: _LegacyListen, error: Error) -> None:
        """`listen` has ended; what nobody listens to any more is unsubscribed at the child."""
        del self.listens[listen]
        others = [cast(_LegacyListen, other).uris for other in self.listens]
        for uri in listen.uris:
            if uri in self._topics and not any(uri in uris for uris in others):
                del self._topics[uri]
                self._own_call("resources/unsubscribe", {"uri": uri}, _Then())
        listen.end(error)

    def lost(self, why: str) -> None:
        # Before the subscribe requests end: their answers would still be acknowledged.
        listens, self.listens = self.listens, {}
        for listen in listens:
            cast(_LegacyListen, listen).end(self._died(why))
        super().lost(why)


@dataclasses.dataclass(slots=True, eq=False)
class _LegacyListen(_Flight):
    """A subscriptions/listen on a legacy child, which has resources/subscribe alone."""

    uris: dict[str, None] = dataclasses.field(default_factory=dict)
    acknowledged: bool = False
    early: list[Notice] = dataclasses.field(default_factory=list)

    def acknowledge(self, topics: Mapping[str, bool]) -> None:
        """Once the child has answered for every URI; nothing may come before it."""
        if self.acknowledged or self.over or any(topics.get(uri) is False for uri in self.uris):
            return
        self.acknowledged = True
        accepted = [uri for uri in self.uris if uri in topics]
        honoured = {"resourceSubscriptions": accepted} if accepted else {}
        acknowledgement = {"notifications": honoured}
        self.heard(Notice("notifications/subscriptions/acknowledged", acknowledgement))
        for notice in self.early:
            self.heard(notice)
        self.early.clear()

    def heard(self, notice: Notice) -> None:
        if self.over:
            return
        if self.acknowledged:
            self.peer._tell(self, notice)
        elif len(self.early) < 100:  # an update only says "read again": more of them say no more
            self.early.append(notice)

    def end(self, error: Error) -> None:
        self.over = True
        here = self.peer
        here._tell(self, Outcome(error=error, server=here.server, place=here.place))


# ---- The probe ----
# A child speaks first when it is spoken to, and only its answer shows its era. `server/discover`
# is asked first (2026-07-28, basic/transports/stdio, Backward Compatibility). Silence proves
# nothing: npx and uvx read after seconds. So after two of them `initialize` is sent too, and both
# answers are waited for. Modern evidence wins, even over an initialize that was answered first,
# which therefore waits a moment for its rival. Any error to discover is legacy, whatever its code;
# but -32022 that lists a modern version, also as the answer to initialize, is modern.
# What was sent, and what is still in the air, is all the state there is.


class Probe(Peer):
    """A child whose era is not known yet. It ends by `Host.ready` or `Host.unfit`."""

    era: ClassVar[str] = "auto"

    def __init__(self, host: Host, era: str = "auto") -> None:
        """`era`: what was found out about this command line before ("auto": nothing)."""
        super().__init__(host, Offer({}, {}, "", "", "auto"))
        self._forced = host.config.protocol != "auto"
        self._wanted = host.config.protocol if self._forced else era
        self._tried: list[str] = []  # legacy versions that were offered
        self._agreed: Offer | None = None  # what initialize was answered, while discover has time
        self._until = math.inf  # when silence has lasted long enough, or that time is over

    @property
    def exited_on_probe(self) -> bool:
        """If it died now: the probe would be to blame (rmcp exits on it), and no crash be counted."""
        return not (self._tried or self._forced or self._lost)

    def start(self, now: float) -> None:
        """Say the first word."""
        if self._wanted == "legacy":
            self._initialize(LATEST_LEGACY)
            return
        self._discover()
        if not self._forced:
            self._until = now + SILENCE

    def send(self, call: Call, sink: Sink) -> Handle:
        """Before the child is ready nothing can be sent."""
        text = f"{self.server} is not ready"
        return self._refused(call, sink, own_error(UNAVAILABLE, text, "starting", self.server))

    def wake(self, now: float) -> None:
        super().wake(now)
        if now < self._until or self._lost is not None:
            return
        if self._agreed is not None:
            self._adopt(LegacyServer(self._host, self._agreed, self._next))
        elif not self._tried:
            self._initialize(LATEST_LEGACY)

    def _adopt(self, peer: LegacyServer | ModernServer) -> None:
        self._until = math.inf
        peer.start()
        self._host.ready(peer)

    def _unfit(self, reason: str) -> None:
        self.lost(reason)  # nothing that it says counts any more
        self._host.unfit(f"{reason}; Atrax speaks {', '.join(SPOKEN)}")

    def _say(self, method: str, params: dict[str, Json], then: Callable[[Outcome], None]) -> None:
        flight = self._own_call(method, params, _Then(then))
        flight.due = flight.limit = math.inf  # start_timeout is the Supervisor's

    def _in_the_air(self, method: str) -> bool:
        return any(flight.call.method == method for flight in self._flights.values())

    def _discover(self) -> None:
        meta = {META_VERSION: MODERN, META_CLIENT: ATRAX, META_CAPABILITIES: {}}
        self._say("server/discover", {"_meta": meta}, self._discovered)

    def _initialize(self, version: str) -> None:
        self._tried.append(version)
        capabilities = {kind: OFFERED[kind] for kind in OFFERED if kind in self._config.offer}
        params = {"protocolVersion": version, "capabilities": capabilities, "clientInfo": ATRAX}
        self._say("initialize", params, self._initialized)

    def _discovered(self, outcome: Outcome) -> None:
        if self._lost is not None:
            return
        result, left = outcome.result or {}, self._left_to_try(outcome.error)
        versions = result.get("supportedVersions")
        if isinstance(versions, list) and MODERN in versions:
            meta = result.get("_meta")
            info = meta.get(META_SERVER) if isinstance(meta, dict) else None
            offer = _offer(result, info, MODERN, "modern")
            self._adopt(ModernServer(self._host, offer, self._next))
        elif self._agreed is not None:
            self._adopt(LegacyServer(self._host, self._agreed, self._next))
        elif self._in_the_air("initialize"):
            return  # which decides alone now
        elif self._forced or self._tried or left == []:
            said = _describe(outcome.error) if outcome.error else f"versions {_excerpt(versions)}"
            self._unfit(f"answered server/discover with {said}")
        else:
            legacy = [version for version in left or () if version != MODERN]
            self._initialize(legacy[-1] if legacy else LATEST_LEGACY)

    def _initialized(self, outcome: Outcome) -> None:
        if self._lost is not None:
            return
        if outcome.error is not None:
            self._refused_initialize(outcome.error)
            return
        result = outcome.result or {}
        version = result.get("protocolVersion")
        if not isinstance(version, str) or version not in LEGACY:
            self._unfit(f"answered with protocol version {_excerpt(version)}")
            return
        self._agreed = _offer(result, result.get("serverInfo"), version, "legacy")
        if self._in_the_air("server/discover"):
            self._until = self._clock() + GRACE
        else:
            self._adopt(LegacyServer(self._host, self._agreed, self._next))

    def _refused_initialize(self, error: Error) -> None:
        left, waiting = self._left_to_try(error) or (), self._in_the_air("server/discover")
        if MODERN in left and not self._forced:
            if not waiting:
                self._discover()
        elif left and left[-1] != MODERN:
            self._initialize(left[-1])
        elif not waiting:
            self._unfit(f"refused initialize with {_describe(error)}")

    def _left_to_try(self, error: Error | None) -> list[str] | None:
        """The versions in a -32022 that were not offered yet, oldest first; None for another error."""
        data = error.data if error is not None and error.code == UNSUPPORTED_VERSION else None
        supported = data.get("supported") if isinstance(data, dict) else None
        if not isinstance(supported, list):
            return None
        return [one for one in SPOKEN if one in supported and one not in self._tried]


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


def _salvaged(line: bytes) -> Json:
    """What can be read of a line that is not JSON as Atrax takes it, to find the call it answers."""
    if len(line) <= SALVAGE:
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(line)
    return line


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


def _list_changes(capabilities: dict[str, Json]) -> dict[str, str]:
    """The list changes that `capabilities` declare: a listen's name for each, and its notification."""
    changes: dict[str, str] = {}
    for kind in ("tools", "prompts", "resources"):
        declared = capabilities.get(kind)
        if isinstance(declared, dict) and declared.get("listChanged") is True:
            changes[f"{kind}ListChanged"] = f"notifications/{kind}/list_changed"
    return changes


def _without_subscription(notice: Notice) -> Notice:
    """A notification of a listen, freed of the id that the child knows the listen by."""
    meta = {key: value for key, value in notice.params["_meta"].items() if key != META_SUBSCRIPTION}
    params = {key: value for key, value in notice.params.items() if key != "_meta"}
    if meta:
        params["_meta"] = meta
    return Notice(notice.method, params)


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
# What the client of a container engine needs to find its engine. Its container gets none of it.
ENGINE_VARIABLES: Final = frozenset({
    "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "DBUS_SESSION_BUS_ADDRESS",
    "DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG", "DOCKER_CERT_PATH", "DOCKER_TLS_VERIFY",
    "DOCKER_API_VERSION", "CONTAINER_HOST", "CONTAINER_SSHKEY", "CONTAINER_CONNECTION",
    "CONTAINERS_CONF", "CONTAINERS_CONF_OVERRIDE", "CONTAINERS_STORAGE_CONF",
    "STORAGE_DRIVER", "STORAGE_OPTS", "SSH_AUTH_SOCK",
})  # fmt: skip
CONTAINER_PROCESSES: Final = 256  # with their threads: node takes a dozen
CONTAINER_TMP: Final = 64 * MIB  # bytes of its /tmp, which count as its memory
NOBODY_ID: Final = 65534
MARK: Final = "ATRAX_CHILD"  # in each child's environment: its place, which tells its descendants
INSTALLED_BY: Final = {
    "uvx": "uv", "uv": "uv", "npx": "Node.js", "npm": "Node.js", "node": "Node.js",
    "bunx": "Bun", "bun": "Bun", "deno": "Deno", "docker": "Docker", "podman": "Podman",
}  # fmt: skip
ENVIRONMENT: Final = 2**18  # bytes of a descendant's environment in which its mark is looked for
PR_SET_CHILD_SUBREAPER: Final = 36
KILL: Final = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has the latter alone


class Unstartable(AtraxError):
    """A server that cannot be started as its config stands; the text says what to do."""


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """How one process is started: the command to exec, its whole environment, its directory."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    cwd: str | None
    # As `confine` takes it; None: not sandboxed.
    sandbox: Mapping[str, Json] | None = None
    # (resource, most); by default no core dumps (RLIMIT_CORE), which would hold secrets.
    limits: tuple[tuple[int, int], ...] = ((4, 0),)
    # Of a container alone: what ends it once its client (`command`) has ended, and what it means
    # if the client exits with 125.
    removal: tuple[str, ...] = ()
    refused: str = ""


def launch(config: ServerConfig, place: str = "") -> Launch:
    """The way to start `config`; raises Unstartable. `place` names its container, if it has one.

    Looked up for each process: what is missing now may be installed later."""
    names = SAFE_VARIABLES if os.name == "posix" else SAFE_VARIABLES | WINDOWS_VARIABLES
    names |= frozenset() if config.container is None else ENGINE_VARIABLES
    environment = {
        name: value
        for name, value in os.environ.items()
        # A value that begins with () is a shell function, which is code.
        if (name in names or name.startswith("LC_")) and not value.startswith("()")
    } | config.env
    if config.container is not None:
        return _in_container(config, config.container, place, environment)
    cwd = os.path.expanduser(config.cwd) if config.cwd else None
    if cwd is not None and not os.path.isdir(cwd):
        raise Unstartable(f'cwd "{cwd}" is not a directory')
    program, *arguments = config.argv
    search = environment.get("PATH", os.defpath)
    program = find_command(program, search, cwd)
    sandbox = config.sandbox
    if sandbox is None or not LINUX:
        if sandbox and not sandbox.best_effort:
            raise Unstartable(f"sandbox: {NO_SANDBOX}")
        return Launch((program, *arguments), environment, cwd)
    bounds = {RLIMIT_CORE: 0, RLIMIT_AS: sandbox.memory, RLIMIT_NPROC: sandbox.processes}
    bounds[RLIMIT_NOFILE] = sandbox.files
    limits = [(limit, most) for limit, most in bounds.items() if most is not None]
    own = ARCHIVE or os.path.abspath(__file__)
    bundled = [own, *sys.path] if (config.command or "").startswith("bundled:") else []
    needs = installation(program, search, sandbox.write)
    order = _sandbox_order(sandbox, [*needs, *bundled])
    return Launch((program, *arguments), environment, cwd, order, tuple(limits))


def _in_container(
    config: ServerConfig, box: ContainerConfig, place: str, environment: Mapping[str, str]
) -> Launch:
    """The engine's client, whose stdin and stdout are the server's. Each option is one argument, so
    that no value can become another option; what they are for stands in SECURITY."""
    engine, kind = _find_engine(box.engine)
    for mount in box.mounts:
        if not os.path.exists(mount.source):
            raise Unstartable(f'container.mounts: "{mount.source}" does not exist')
        if os.path.realpath(mount.source) != mount.source:  # by a server that may write above it
            raise Unstartable(f'container.mounts: "{mount.source}" has become a link')
    name, memory = f"atrax-{place or secrets.token_hex(8)}", box.memory
    options = [
        *("--rm", "--interactive", f"--name={name}", "--pull=never", "--log-driver=none"),
        *("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--ipc=private"),
        # As much with swap as without: none.
        *(f"--pids-limit={CONTAINER_PROCESSES}", f"--memory={memory}", f"--memory-swap={memory}"),
        f"--tmpfs=/tmp:rw,noexec,nosuid,nodev,mode=1777,size={CONTAINER_TMP}",
        # Else /run and others can be written to.
        *(["--read-only-tmpfs=false"] if kind == "podman" else []),
        *([] if box.network else ["--network=none"]),
        *_container_user(kind),
        # The one place that can be written to, where the user has no home in the image.
        "--env=HOME=/tmp",
        *(f"--env={variable}" for variable in config.env),
        *(
            f"--mount=type=bind,source={mount.source},target={mount.target}"
            + ("" if mount.write else ",readonly")
            for mount in box.mounts
        ),
        *([f"--workdir={config.cwd}"] if config.cwd else []),
        *([f"--entrypoint={config.command}"] if config.command else []),
    ]
    # podman waits 10 s for a container before it kills it; docker does not, and lacks the option.
    now = ["--time=0"] if kind == "podman" else []
    return Launch(
        (engine, "run", *options, box.image, *config.args),
        environment,
        None,
        limits=((RLIMIT_CORE, 0),),
        removal=(engine, "rm", "--force", *now, name),
        refused=f"{kind} could not start the container. "
        f"Is the image here? `{kind} pull {box.image}`",
    )


def _find_engine(wanted: str | None) -> tuple[str, str]:
    """Path and kind of the engine; raises Unstartable."""
    import shutil

    for kind in (wanted,) if wanted else ("podman", "docker"):
        if found := shutil.which(kind):
            return os.path.abspath(found), kind
    missing = f"{wanted} is not there" if wanted else "neither podman nor docker is there"
    raise Unstartable(f"container: {missing}; install one, or put it on the PATH of Atrax")


def _container_user(kind: str) -> list[str]:
    """Nobody where Atrax is root; else Atrax's own user, so that mounts are to it what they are to
    Atrax. Without keep-id rootless podman would make it another one outside."""
    uid, gid = (os.getuid(), os.getgid()) if hasattr(os, "getuid") else (0, 0)
    if uid == 0:
        return [f"--user={NOBODY_ID}:{NOBODY_ID}"]
    return [f"--user={uid}:{gid}", *(["--userns=keep-id"] if kind == "podman" else [])]


def find_command(command: str, path: str, cwd: str | None) -> str:
    """The file to execute; raises Unstartable, which says more than a failed exec could."""
    if os.path.dirname(command):
        file = os.path.join(cwd or os.getcwd(), os.path.expanduser(command))
        if os.path.isdir(file):
            raise Unstartable(f'command "{command}" is a directory')
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
        if " " in command:
            hint = 'What follows the program belongs in "args"'
        raise Unstartable(f'command "{command}" not found on PATH. {hint}')
    return os.path.abspath(found)


def staged(way: Launch, channel: int = -1) -> list[str]:
    """The command line that becomes `way.command` by way of Boot's stage; outside Linux the command.

    `channel`: the descriptor of the socket that a sandboxed child's stage reports to."""
    if not LINUX:
        return list(way.command)
    order: dict[str, Json] = {"parent": os.getpid(), "limits": way.limits}
    if way.sandbox is not None:
        order |= {"sandbox": way.sandbox, "channel": channel}
    if way.removal:
        # The engine sets no_new_privs inside; podman without root needs newuidmap, which is setuid.
        order["setuid"] = True
    text, source = orjson.dumps(order).decode(), _stage_source(way.sandbox is not None)
    # -I -S: nothing that a user may have installed runs before the order is carried out.
    return [sys.executable, "-I", "-S", "-c", source, text, *way.command]


@functools.cache
def _stage_source(sandboxed: bool) -> str:
    """The stage as an argument: its code objects, so that the child has little to compile."""
    parts: list[Callable[..., Json]] = [become_child, bind, limit]
    if sandboxed:
        parts += [tell, confine, drop_capabilities, enter_namespaces, seal_mounts, restrict_files]
        parts += [grant, filter_calls, system_call]
    code = marshal.dumps({part.__name__: part.__code__ for part in parts}).hex()
    return (
        "import marshal,types,builtins;g={'__builtins__':builtins};"
        f"g.update((n,types.FunctionType(c,g))for n,c in marshal.loads(bytes.fromhex('{code}')).items());"
        "g['become_child']()"
    )


# ---- What the kernel holds a sandboxed child to ----
#
# Landlock keeps files, seccomp calls, namespaces the network and System V objects, rlimits the rest.
# What one leaves open another closes: Landlock knows nothing of chmod and chown, so all mounts but
# `write` are read-only in there; a namespace does not hide the path of a Unix socket (docker.sock,
# Atrax's own), so there are none; a socket pair of datagrams can be sent anywhere by name, so there
# is none either; prlimit and the scheduler's calls reach every process of the same user.
#
# A refused call is answered by Atrax's own loop (SECCOMP_RET_USER_NOTIF), which makes it an event;
# kill is watched alone, since what it may reach is Landlock's to say. What no honest program does
# ends the process (SIGSYS).

RLIMIT_CORE, RLIMIT_NPROC, RLIMIT_NOFILE, RLIMIT_AS = 4, 6, 7, 9  # Linux, but for Alpha and MIPS
LOOKED_AT: Final = 64  # processes of a child in one look for limits; each costs 50 us
NO_SANDBOX: Final = f"{sys.platform} has none of what it needs (Landlock, seccomp: Linux 6.12)"
# What programs need to run at all: programs, libraries, and what libraries look up.
ALWAYS: Final = (
    *("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store"),
    *(f"/etc/{name}" for name in (
        "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "ld.so.preload", "localtime", "timezone",
        "nsswitch.conf", "passwd", "group", "hosts", "host.conf", "resolv.conf", "gai.conf",
        "services", "protocols", "mime.types", "os-release", "ssl/certs", "ssl/openssl.cnf",
        "ca-certificates", "pki/tls", "pki/ca-trust",
        *(f"python3.{minor}" for minor in range(9, 20)),
    )),
    *(f"/proc/{name}" for name in (
        "cpuinfo", "filesystems", "loadavg", "meminfo", "stat", "uptime", "version", "sys/kernel",
        "sys/vm",
    )),
    *("/sys/fs/cgroup", "/sys/devices/system"),
)  # fmt: skip
ALWAYS_SHOWN: Final = (
    "/usr, /bin, /sbin, /lib*, /nix/store, the parts of /etc that libraries look up, its own "
    "directory in /proc and a few files of the system there and in /sys, /dev/null, zero, full, "
    "random and urandom, and the bin and lib directories that its program and interpreter lie in"
)

_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000  # what seccomp does with a call
_TELL, _WATCH = 0x7FC00000, 0x7FC00001  # ask Atrax, which refuses; or which lets pass
_LOAD, _AND, _EQUAL, _ANY_BIT = 0x20, 0x54, 0x15, 0x45  # classic BPF
_AT_LEAST, _RETURN = 0x35, 0x06
_NEW_SPACES: Final = 0x7E020000  # every CLONE_NEW* that clone knows
_INET, _INET6, _NETLINK = 2, 10, 16

# Per processor: the machine, its number to seccomp (linux/audit.h), the call `seccomp`.
_PROCESSORS: Final = {"x86_64": (0, 0xC000003E, 317), "aarch64": (1, 0xC00000B7, 277)}
# By call: its number on x86_64 and on aarch64; -1: there is none.
_Numbers: TypeAlias = dict[str, tuple[int, int]]
_REFUSED: Final[_Numbers] = {  # what only an attack, a debugger or another sandbox asks for
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "kcmp": (312, 272), "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "open_tree_attr": (467, 467),
    "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "syslog": (103, 116), "quotactl": (179, 60), "quotactl_fd": (443, 443), "acct": (163, 89),
    "lookup_dcookie": (212, 18), "nfsservctl": (180, 42), "vhangup": (153, 58),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162),
}  # fmt: skip
_NEWEST: Final = 469  # of the calls that were looked at (Linux 6.18); later ones are as if absent
_DEADLY: Final[_Numbers] = {  # to try them is to attack the system
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "iopl": (172, -1), "ioperm": (173, -1),
}  # fmt: skip
# As if the kernel had none: libraries try them and go on without. The arguments of clone3 lie in
# memory, which a filter cannot read; io_uring opens files and sockets past every filter.
_ABSENT: Final[_Numbers] = {
    "clone3": (435, 435), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
}  # fmt: skip
# Refused where this argument names another than who calls: they reach all processes of the user.
_OWN_ONLY: Final[dict[str, tuple[int, int, int]]] = {
    "setpriority": (141, 140, 1), "sched_setaffinity": (203, 122, 0),
    "sched_setscheduler": (144, 119, 0), "sched_setparam": (142, 118, 0),
    "sched_setattr": (314, 274, 0), "ioprio_set": (251, 30, 1), "move_pages": (279, 239, 0),
    "migrate_pages": (256, 238, 0),
}  # fmt: skip
# The first argument by which these name a user's processes; then 0 is all of the caller's own user.
_OF_USERS: Final = {"setpriority": 2, "ioprio_set": 3}
_SPECIAL: Final[_Numbers] = {
    "socket": (41, 198), "socketpair": (53, 199), "clone": (56, 220), "prlimit64": (302, 261),
    "kill": (62, 129),
}  # fmt: skip
_ISOLATED: Final[_Numbers] = {  # refused where there are no namespaces to keep them apart
    "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, -1), "fchown": (93, 55), "lchown": (94, -1), "fchownat": (260, 54),
    "utime": (132, -1), "utimes": (235, -1), "futimesat": (261, -1), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "setxattrat": (463, 463),
    "removexattrat": (466, 466), "file_setattr": (469, 469),
    # Objects of System V and message queues have ids and names that all of a user's processes share.
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190),
    "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192), "msgget": (68, 186),
    "msgsnd": (69, 189), "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180),
    "mq_unlink": (241, 181),
}  # fmt: skip
_Instruction: TypeAlias = tuple[int, int, int, int]  # code, jump if true, jump if false, operand
_PASS: Final[_Instruction] = (_RETURN, 0, 0, _ALLOW)
_REFUSE: Final[_Instruction] = (_RETURN, 0, 0, _ERRNO | errno.EPERM)


def _sandbox_order(sandbox: Sandbox, program: Iterable[str]) -> dict[str, Json]:
    """What `confine` is to do; raises Unstartable where a directory is not there."""
    for key, paths in (("read", sandbox.read), ("write", sandbox.write)):
        for path in paths:
            if not os.path.exists(path):
                raise Unstartable(f'sandbox.{key}: "{path}" does not exist')
    return {
        "read": [os.path.abspath(path) for path in sandbox.read],
        "write": [os.path.abspath(path) for path in sandbox.write],
        "always": [*ALWAYS, *program],
        "network": sandbox.network,
        "processes": sandbox.processes is not None,
        "best_effort": sandbox.best_effort,
        "seccomp": _programs(sandbox.network),
    }


@functools.cache
def _programs(network: bool) -> tuple[int, str, str] | None:
    """The number of the call `seccomp`, the main program and `_ISOLATED`'s; None: an unknown processor."""
    processor = _PROCESSORS.get(os.uname().machine) if sys.maxsize > 2**32 else None
    if processor is None:
        return None
    column, machine, number = processor
    main, isolated = _main_filter(column, network), _isolated_filter(column)
    return number, _assembled(machine, main).hex(), _assembled(machine, isolated).hex()


def installation(program: str, search: str, write: Sequence[str] = ()) -> list[str]:
    """What the file `program` needs of the directories that it and its interpreter are installed in.

    `search` is PATH, for `#!/usr/bin/env`. Nothing in `write` says what is needed: an earlier process
    may have put a link there, or the first line of a script, that names what it may not read."""
    found: list[str] = []
    hop = program
    for _ in range(16):  # each link on the way: a virtual environment is found by its own path
        folder = os.path.dirname(hop)
        if any(_lies_below(os.path.realpath(folder), one) for one in write):
            return found
        found.append(hop)
        if os.path.basename(folder) in ("bin", "sbin", "Scripts"):
            prefix = os.path.dirname(folder)
            found += [os.path.join(prefix, part) for part in ("bin", "lib", "lib64", "libexec")]
            found.append(os.path.join(prefix, "pyvenv.cfg"))
        above, packages, _ = hop.rpartition("/node_modules/")
        found += [above + packages] if packages else []
        if not os.path.islink(hop):
            break
        hop = os.path.normpath(os.path.join(folder, os.readlink(hop)))
    found.append(os.path.realpath(program))
    interpreter = _interpreter(program, search)
    return found + (installation(interpreter, search, write) if interpreter else [])


def _interpreter(program: str, search: str) -> str | None:
    """The program that the first line of the script `program` names."""
    with contextlib.suppress(OSError), open(program, "rb") as file:
        line = file.readline(256)
        if line.startswith(b"#!"):
            words = [word for word in os.fsdecode(line[2:]).split() if not word.startswith("-")]
            if words and os.path.basename(words[0]) == "env" and len(words) > 1:
                import shutil

                return shutil.which(words[1], path=search)
            return words[0] if words and words[0] != program else None
    return None


def _list(calls: _Numbers, column: int, action: int) -> list[_Instruction]:
    """`action` for each of `calls`."""
    numbers = [numbers[column] for numbers in calls.values() if numbers[column] >= 0]
    return [line for one in numbers for line in _case(one, [(_RETURN, 0, 0, action)])]


def _case(number: int, body: list[_Instruction]) -> list[_Instruction]:
    """`body`, which must return, if the call is `number`."""
    return [(_EQUAL, 0, len(body), number), *body]


def _argument(index: int, high: bool = False) -> _Instruction:
    """Load the lower (or the `high`er) half of an argument: struct seccomp_data, little-endian."""
    return (_LOAD, 0, 0, 16 + 8 * index + 4 * high)


def _main_filter(column: int, network: bool) -> list[_Instruction]:
    refuse, allow = (_RETURN, 0, 0, _TELL), _PASS
    families: list[_Instruction] = []
    if network:
        families = [(_EQUAL, 0, 1, _INET), allow, (_EQUAL, 0, 1, _INET6), allow]
        # NETLINK_ROUTE alone, which getaddrinfo asks for addresses.
        families += [(_EQUAL, 0, 3, _NETLINK), _argument(2), (_EQUAL, 0, 1, 0), allow]
    special = {
        "socket": [_argument(0), *families, refuse],
        # The ends of a stream (1, 5) are connected for good; a datagram can be sent to any name, and
        # what Unix calls raw (3) is one.
        "socketpair": [
            *(_argument(0), (_EQUAL, 0, 5, 1)),
            *(_argument(1), (_AND, 0, 0, 15), (_EQUAL, 1, 0, 1), (_EQUAL, 0, 1, 5), allow, refuse),
        ],
        "clone": [_argument(0), (_ANY_BIT, 0, 1, _NEW_SPACES), refuse, allow],
        "prlimit64": [
            *(_argument(0), (_EQUAL, 4, 0, 0)),
            *(_argument(2), (_ANY_BIT, 3, 0, 0xFFFFFFFF), _argument(2, high=True)),
            *((_ANY_BIT, 1, 0, 0xFFFFFFFF), allow, refuse),
        ],
        "kill": [(_RETURN, 0, 0, _WATCH)],
    }
    lines = [line for name, body in special.items() for line in _case(_SPECIAL[name][column], body)]
    for name, row in _OWN_ONLY.items():
        users = [_argument(0), (_EQUAL, 0, 1, _OF_USERS.get(name, 0)), _REFUSE] if row[2] else []
        body = [*users, _argument(row[2]), (_EQUAL, 0, 1, 0), _PASS, _REFUSE]
        lines += _case(row[column], body)
    lines += _list(_REFUSED, column, _TELL) + _list(_DEADLY, column, _KILL)
    absent: _Instruction = (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)
    lines += [(_AT_LEAST, 0, 1, _NEWEST + 1), absent]
    return lines + _list(_ABSENT, column, absent[3])


def _isolated_filter(column: int) -> list[_Instruction]:
    """What takes the place of read-only mounts and of an IPC namespace."""
    # Flags, versions, keys, subvolumes of a file that may only be read: by the letter of the request.
    flags = [_argument(1), (_AND, 0, 0, 0xFF00)]
    for letter in b"fvX\x94":
        flags += [(_EQUAL, 0, 1, letter << 8), _REFUSE]
    return _case((16, 29)[column], [*flags, _PASS]) + _list(_ISOLATED, column, _REFUSE[3])


def _assembled(machine: int, body: list[_Instruction]) -> bytes:
    """A whole program: calls of another architecture end the process, what `body` does not return
    for is allowed."""
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, machine), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    # x86_64 has a second set of numbers (x32), by this bit.
    program += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    program += [*body, _PASS]
    return b"".join(struct.pack("HBBI", *line) for line in program)


class Guard:
    """What Atrax hears of one sandboxed child: how its stage went, then each call that was refused.

    `report` is called at most twice: with `{"open": […]}`, what the sandbox leaves open, and with
    `{"failed": why}`. `denied(act, pid)` is called once for each kind of act of the child."""

    RATE: Final = 50  # calls a second that are answered; a child that asks for more waits

    def __init__(
        self,
        place: str,
        loop: asyncio.AbstractEventLoop,
        report: Callable[[dict[str, Json]], None],
        denied: Callable[[str, int], None],
    ) -> None:
        self._place, self._loop, self._report, self._denied = place, loop, report, denied
        self.pid = 0
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._theirs: socket.socket | None = theirs
        self.channel = theirs.fileno()
        self._listener = -1
        self._throttle = Throttle(self.RATE, 1.0)
        self._acts: set[str] = set()
        self._ours.setblocking(False)
        theirs.set_inheritable(True)
        loop.add_reader(self._ours, self.read)

    def started(self, pid: int) -> None:
        """The child has its end of the channel, or (`pid` 0) will never have it."""
        self.pid = pid
        if self._theirs is not None:
            self._theirs.close()
            self._theirs = None

    def read(self) -> None:
        """Take what the stage has said so far."""
        while self._ours.fileno() >= 0:
            try:
                data, listeners, _, _ = socket.recv_fds(self._ours, 65536, 1)
            except BlockingIOError:
                return
            except OSError:
                data, listeners = b"", []
            for listener in listeners:
                os.set_inheritable(listener, False)
                self._listener = listener
                self._loop.add_reader(listener, self._notified)
            if not data:
                self._loop.remove_reader(self._ours)
                self._ours.close()
                return
            self._report(json.loads(data))

    def close(self) -> None:
        """The child has ended."""
        self.read()
        self.started(0)
        if self._ours.fileno() >= 0:
            self._loop.remove_reader(self._ours)
            self._ours.close()
        if self._listener >= 0:
            self._loop.remove_reader(self._listener)
            os.close(self._listener)
            self._listener = -1

    def _notified(self) -> None:
        """Answer one call that waits for it (seccomp_unotify(2))."""
        import fcntl
        import select

        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        state = poll.poll(0)
        # Without a call that waits the request below would wait for one, and with it the loop.
        if not state or not state[0][1] & select.POLLIN:
            if state:
                self._loop.remove_reader(self._listener)  # all that it watched have ended
            return
        notice = bytearray(80)  # struct seccomp_notif
        with contextlib.suppress(OSError):  # it ended meanwhile
            fcntl.ioctl(self._listener, 0xC0502100, notice)
            ident, pid, _, number, _, _, *arguments = struct.unpack("QIIiIQ6Q", notice)
            passes = self._judged(number, pid, arguments)
            # struct seccomp_notif_resp: go on as if nothing was, or EPERM
            answer = (0, 1) if passes else (-errno.EPERM, 0)
            response = bytearray(struct.pack("QqiI", ident, 0, *answer))
            fcntl.ioctl(self._listener, 0xC0182101, response)
        if not self._throttle.passes(self._loop.time()):
            self._throttle.left_out(math.inf)
            self._loop.remove_reader(self._listener)
            self._loop.call_later(1.0, self._resume)

    def _resume(self) -> None:
        if self._listener >= 0:
            self._loop.add_reader(self._listener, self._notified)

    def _judged(self, number: int, pid: int, arguments: list[int]) -> bool:
        """Whether the call may go on; one that may not is an act to report."""
        column = _PROCESSORS[os.uname().machine][0]
        calls = {numbers[column]: name for name, numbers in (_REFUSED | _SPECIAL).items()}
        name = calls.get(number, f"call {number}")
        if name == "kill" and self._is_own(arguments[0], arguments[1]):
            return True
        act = _socket_of(*arguments[:2]) if name == "socket" else _ACTS.get(name, name)
        if act not in self._acts:
            self._acts.add(act)
            self._denied(act, pid)
        return name == "kill"

    def _is_own(self, target: int, number: int) -> bool:
        """Whether the child sends that signal to a process of its own."""
        target = (target & 0xFFFFFFFF ^ 0x80000000) - 0x80000000  # an int
        # 0 only asks whether there is one: so do lock files of whoever made them last.
        asks = number & 0xFFFFFFFF == 0
        return asks or target == 0 or _belongs(abs(target), self.pid, self._place)


_ACTS: Final = {  # what a refused call is to people
    "kill": "kill of a process that is not its own", "socketpair": "pair of datagram sockets",
    "prlimit64": "limits of another process", "clone": "namespaces of its own",
}  # fmt: skip


def _socket_of(family: int, kind: int) -> str:
    """A refused socket in words; these are few, so that its child cannot fill the log with them."""
    named = {1: "TCP", 2: "UDP"}.get(kind & 15, "raw")
    words = {1: "Unix socket", _INET: f"{named} socket", _INET6: f"{named} socket (IPv6)"}
    family = min(family & 0xFFFFFFFF, 99)
    return words.get(family, f"socket of family {family}")


def _belongs(pid: int, child: int, place: str) -> bool:
    """Whether `pid` is `child` or descends from it."""
    if _place_of(pid) == place:
        return True
    for _ in range(64):
        if pid == child:
            return True
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                pid = int(file.read().rpartition(b")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return False
    return False


def at_limits(pid: int, sandbox: Sandbox) -> list[str]:
    """Which limits of its sandbox the process `pid`, or one that descends from it, is at.

    A look, as it is at this moment: of a refused fork, file or page the kernel tells nobody else."""
    if sandbox.memory is sandbox.files is sandbox.processes is None:
        return []
    pids, tasks = _family(pid, sandbox.processes or LOOKED_AT)
    found = ["processes"] if sandbox.processes is not None and tasks >= sandbox.processes else []
    if sandbox.files is not None and any(_open_files(one) >= sandbox.files for one in pids):
        found.append("files")
    # What was refused is not counted, so the last whole step may lie below.
    if sandbox.memory is not None and any(_peak(one) > 0.95 * sandbox.memory for one in pids):
        found.append("memory")
    return found


def _family(pid: int, most: int) -> tuple[list[int], int]:
    """`pid` with its descendants, and how many threads these have; looks at `most` threads."""
    pids, tasks = [pid], 0
    for one in pids:  # grows as it is walked
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{one}/task"):
                tasks += 1
                with open(f"/proc/{one}/task/{thread}/children") as file:
                    pids += map(int, file.read().split())
        if tasks >= most:
            break
    return pids[:LOOKED_AT], tasks


def _open_files(pid: int) -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


def _peak(pid: int) -> int:
    """The largest address space that `pid` has had, in bytes."""
    # Bytes: the name of a process is its own choice, and need not be UTF-8.
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb") as file:
        for line in file:
            if line.startswith(b"VmPeak"):
                return int(line.split()[1]) * 1024
    return 0


def allowed(config: ServerConfig) -> list[str]:
    """What a process of this server may do: phrases that follow "it may"; names, never values."""
    own = sorted(config.env)
    if config.container is not None:
        return _allowed_in_container(config, config.container, own)
    try:
        environment = launch(config).environment
    except Unstartable:
        environment = config.env
    names = [*sorted(set(environment) - set(own)), *own]
    start = [f"see the variables {', '.join(names) or 'of nobody'}"]
    sandbox = config.sandbox
    if sandbox is None:
        return [f"do what user {user_name()} can: it is not sandboxed", *start]
    network = "use TCP and UDP, but no Unix sockets" if sandbox.network else "use no network"
    limits = {"bytes of memory": sandbox.memory, "processes and threads": sandbox.processes}
    limits["open files"] = sandbox.files
    shown = [f"{most} {what}" for what, most in limits.items() if most is not None]
    return [
        f"read {', '.join(['what programs need to run', *sandbox.read, *sandbox.write])}",
        f"change {', '.join(sandbox.write) or 'nothing'}",
        network,
        *([f"take up to {', '.join(shown)}"] if shown else []),
        *start,
    ]


def _allowed_in_container(
    config: ServerConfig, box: ContainerConfig, own: Sequence[str]
) -> list[str]:
    mounts = {write: [one for one in box.mounts if one.write == write] for write in (False, True)}
    reads, writes = (
        ", ".join(f"{one.target} ({one.source})" for one in mounts[write])
        for write in (False, True)
    )
    return [
        f"run in a container of {box.image} by {box.engine or 'podman or docker'}, without capabilities",
        f"read {', '.join(filter(None, ['its image', reads, writes]))}",
        f"change {', '.join(filter(None, ['/tmp', writes]))}",
        f"use {'the network that the engine gives it' if box.network else 'no network'}",
        f"take up to {box.memory} bytes of memory, {CONTAINER_PROCESSES} processes and threads",
        f"see the variables {', '.join(['HOME', *own])} and what the image sets",
    ]


def user_name() -> str:
    """Who runs this process, as people write it."""
    try:
        import pwd

        return pwd.getpwuid(os.geteuid()).pw_name
    except (ImportError, KeyError):
        return str(_user())


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
    adopted: list[int] = []
    # The kernel gives orphans to the first thread.
    with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:
        for pid in map(int, file.read().split()):
            with contextlib.suppress(OSError):
                if pid not in pids and os.getsid(pid) != os.getsid(0):
                    adopted.append(pid)
    return adopted


def _place_of(pid: int) -> str | None:
    """The place of the child that `pid` descends from; None if it does not say."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        # Bounded: a process may call any memory of its own its environment (PR_SET_MM_MAP).
        for entry in file.read(ENVIRONMENT).split(b"\0"):
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
STDIN_MOST: Final = 2**24  # bytes written on top of that (answers, notes); past it the process ends
AT_ONCE: Final = 32  # lines between two looks at the clock
SPELL: Final = 0.005  # seconds that one pipe of a child may hold the loop, then others do
REST: Final = 0.1  # seconds that a pause takes at most
SMALL_PART: Final = 4096  # bytes; the parts of a long line are no smaller, so they are not too many
STDERR_LINE: Final = 8192  # bytes of one line on stderr that are kept
STDERR_RATE: Final = 200  # lines a second of one child that are logged
LAST_LINES: Final = 4  # at the end of a flood, of which one is its last that says something
LAST_LINE: Final = 300  # characters of its last line that a message quotes
PATIENCE: Final = 2.0  # seconds between the rungs of `Child.stop`
REMOVAL: Final = 10.0  # seconds that an engine may take to remove a container
ENGINE_FAILED: Final = 125  # what podman and docker exit with where they ran nothing
DRAIN: Final = 0.2  # seconds; a descendant may hold a pipe open after the child has ended
# What docker says below the line that says why.
_NO_REASON: Final = re.compile(r"(Run|See) 'docker run --help'")
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
        # What its sandbox leaves open
        self.confined: Callable[[list[str]], None] = lambda ways: None
        # What the kernel refused it
        self.denied: Callable[[str, int], None] = lambda act, pid: None
        # Not free for another call: not open yet, its stdin full, or about to end.
        self.busy = True
        self.heard = 0.0  # when something last came from it
        self.spoke_last = False  # whether Atrax wrote after that
        self.fault = ""  # why Atrax ended it, where it did
        self.unstartable = False  # whether its stage could not do what was ordered
        self.signal = 0  # what killed it
        self.stderr = Stderr(server, record, loop.time)
        self._lines = Lines(line_limit)
        self._backlog: deque[bytes] = deque()  # lines that were read and wait for their turn
        self._stdin = _PipeEnd(self, lambda data: None)
        self._stdout, self._stderr = _PipeEnd(self, self._read), _PipeEnd(self, self.stderr.feed)
        self._record, self._loop, self._pipe_size = record, loop, pipe_size
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: Guard | None = None
        self._unsent: list[bytes] = []
        self._pidfd = -1
        self._way: Launch | None = None
        self._removing = False  # its container may still be there
        self._ending = ""  # how it ended, once it has
        self._late = False  # only `_removing` or `_backlog` stands against the end
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
        # Pipes of our own: libuv's are socket pairs, which are slower and have no F_SETPIPE_SZ.
        (stdin, to_stdin), (from_stdout, stdout), (from_stderr, stderr) = (
            os.pipe() for _ in range(3)
        )
        # As files: those that are not taken over are closed with them.
        ends = ((to_stdin, "wb"), (from_stdout, "rb"), (from_stderr, "rb"))
        ours = [os.fdopen(end, mode, 0) for end, mode in ends]
        try:
            self._process = process = self._spawn(way, stdin, stdout, stderr)
        finally:
            for end in (stdin, stdout, stderr):
                os.close(end)
        self.pid = process.pid
        try:
            transport, _ = await self._loop.connect_write_pipe(lambda: self._stdin, ours[0])
            transport.set_write_buffer_limits(high=STDIN_HIGH)
            await self._loop.connect_read_pipe(lambda: self._stderr, ours[2])
            await self._loop.connect_read_pipe(lambda: self._stdout, ours[1])
        except BaseException:
            signal_group(self.pid, KILL)
            process.wait()
            self._remove_container()
            if self._guard is not None:
                self._guard.close()
            raise
        self.busy = False
        self._watch()

    def _spawn(self, way: Launch, stdin: int, stdout: int, stderr: int) -> subprocess.Popen[bytes]:
        if LINUX and self._pipe_size:
            import fcntl  # there is none on Windows

            # Refused past fs.pipe-user-pages-soft: then results are slower, no more.
            with contextlib.suppress(OSError):
                fcntl.fcntl(stdout, fcntl.F_SETPIPE_SZ, self._pipe_size)
        self._way, channel = way, -1
        # What an engine's client starts is the engine's to end, and bears no mark of ours.
        mark = {} if way.removal else {MARK: self.place}
        before = ":" if LINUX else ""  # the stage takes it away
        if way.sandbox is not None:
            self._guard = Guard(self.place, self._loop, self._reported, self.denied)
            channel = self._guard.channel
        try:
            process = subprocess.Popen(
                staged(way, channel),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                cwd=way.cwd,
                env={before + name: value for name, value in {**mark, **way.environment}.items()},
                start_new_session=True,
                # The stage closes what is open; done here, it would walk through 20,000 sockets.
                close_fds=not LINUX,
            )
        except BaseException:
            if self._guard is not None:
                self._guard.close()
            raise
        if self._guard is not None:
            self._guard.started(process.pid)
        return process

    def _reported(self, report: dict[str, Json]) -> None:
        """What the stage says of the sandbox that it was to set up."""
        if "failed" in report:
            self.fault, self.unstartable = report["failed"], True
        elif report["open"]:
            self.confined(report["open"])

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
        if hasattr(os, "waitid"):
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        elif self._process is not None:
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
        if self._stdin.unread > STDIN_MOST:
            self.fail("does not read what it is sent")

    def _read(self, data: bytes) -> None:
        self._deliver(self._lines.feed(data))
        if self._lines.overlong:
            self._stdout.close()
            self.fail("sent a line longer than limits.line")

    def _deliver(self, lines: list[bytes]) -> None:
        """Hand `lines` on, for one spell; the rest in the next turns, before anything more is read.
        256 KiB that are read at once can be 100,000 lines, and hold the loop for 0.3 s."""
        if self._backlog:
            self._backlog.extend(lines)
        elif len(lines) <= AT_ONCE:
            self._hand_on(lines)
        else:
            self._backlog.extend(lines)
            self._work_off()

    def _work_off(self) -> None:
        """Hand on what is left, for one spell."""
        backlog, until = self._backlog, time.monotonic() + SPELL
        while backlog and time.monotonic() < until:
            self._hand_on([backlog.popleft() for _ in range(min(AT_ONCE, len(backlog)))])
        self._stdout.hold(bool(backlog))
        if backlog:
            self._loop.call_soon(self._work_off)
        elif self._late:
            self._end()

    def _hand_on(self, lines: list[bytes]) -> None:
        """An exception here would make uvloop close the pipe, for every client."""
        now = self.heard = self._loop.time()
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

    def later(self, delay: float, then: Callable[[], None]) -> None:
        """Have `then` called after `delay` seconds, whatever becomes of the process."""
        self._loop.call_later(delay, then)

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

    def _exited(self) -> None:
        if self._process is None or self._ending:
            return
        self.busy = True
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
        signal_group(self.pid, KILL)  # what it left behind in its group
        if self._guard is not None:
            self._guard.close()
        status = self._process.wait()
        self._ending, self.signal = _how(status), max(0, -status)
        if self._way is not None and self._way.refused and status == ENGINE_FAILED:
            self._ending = self._way.refused
        self._remove_container()
        self._stdout.resume()
        self._stderr.resume()
        self._after(DRAIN, self._end)
        self._drained()

    def _remove_container(self) -> None:
        """Its client has ended, and whether the container has is known to the engine alone."""
        if self._way is None or not self._way.removal:
            return
        self._removing = True
        # Owned by the engine's command that it waits for, which has its time.
        threading.Thread(target=self._removal, args=(self._way,), daemon=True).start()

    def _removal(self, way: Launch) -> None:
        null, fault = subprocess.DEVNULL, ""
        try:
            subprocess.call(
                way.removal,
                stdin=null,
                stdout=null,
                stderr=null,
                env=way.environment,
                close_fds=not LINUX,
                timeout=REMOVAL,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            fault = str(error)
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            self._loop.call_soon_threadsafe(self._removed, fault)

    def _removed(self, fault: str) -> None:
        self._removing = False
        if fault and self._way is not None:
            message = f"its container {self._way.removal[-1]} may still run: {fault}"
            self._record.emit("container.left", "error", server=self.server, message=message)
        if self._late:
            self._end()

    def _drained(self) -> None:
        """End as soon as all that it wrote has been read."""
        if self._stdout.closed and self._stderr.closed:
            self._end()

    def _end(self) -> None:
        if self._over:
            return
        if self._removing or self._backlog:
            self._late = True  # who hears of the end takes it that nothing of it is left
            self._stdout.close()
            return
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        self._stdin.abort()
        self._deliver(self._lines.end())  # a last line that was not ended counts as one
        self.stderr.end()
        self._stdout.close()
        self._stderr.close()
        self._unsent.clear()
        try:
            self.ended(self.fault or self._ending)
        except Exception as error:
            self._fault(error)


class _PipeEnd(asyncio.Protocol):
    """Our end of a pipe to a child: what comes goes to `take`."""

    def __init__(self, child: Child, take: Callable[[bytes], None]) -> None:
        self._child, self._take = child, take
        self._transport: asyncio.Transport | None = None
        self._full = False
        self._held = False  # what was read is not worked off yet
        self._spent, self._left = 0.0, 0.0  # seconds that the loop was held, and when that ended
        self.unread = 0  # bytes that were written while the pipe was full
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Take `data`; who writes without end pauses until the others had a turn, since uvloop reads
        up to 8 MiB from one pipe before it looks at another, and longer if one chunk took long."""
        since = time.monotonic()
        self._take(data)
        self._left, before = time.monotonic(), self._left
        self._spent = max(0.0, self._spent - (since - before)) + self._left - since
        pipe = self._transport
        if pipe is None or pipe.is_closing() or self._child.ending or self._held:
            return
        if self._spent > SPELL:
            pipe.pause_reading()
            self._child.later(min(max(0.0, self._spent - 10 * SPELL), REST), self.resume)
            self._spent = 0.0

    def hold(self, held: bool) -> None:
        """Read nothing more until that is taken back."""
        self._held, pipe = held, self._transport
        if not held:
            self.resume()
        elif pipe is not None and not pipe.is_closing() and pipe.is_reading():
            pipe.pause_reading()

    def resume(self) -> None:
        """Read on, after a pause."""
        pipe = self._transport
        if pipe is None or pipe.is_closing() or self._held or pipe.is_reading():
            return
        pipe.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport, self.closed = None, True
        self._child.mute()

    def pause_writing(self) -> None:
        self._full, self._child.busy = True, True

    def resume_writing(self) -> None:
        self._full, self.unread = False, 0
        self._child.busy = self._child.ending  # no reason for calls if it is about to end

    def write(self, data: bytes) -> None:
        # A child that has gone: uvloop raises where asyncio does not.
        if self._transport is not None and not self._transport.is_closing():
            if self._full:
                self.unread += len(data)
            self._transport.write(data)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Drop what the child has not read. Aborting a closed pipe is an error to asyncio."""
        pipe = self._transport
        if pipe is not None and (not pipe.is_closing() or pipe.get_write_buffer_size()):
            pipe.abort()


class Stderr:
    """What a child says on stderr: its lines go to the record, bounded in length and number."""

    def __init__(self, server: str, record: Record, clock: Callable[[], float]) -> None:
        self._server, self._record, self._clock = server, record, clock
        self._throttle = Throttle(STDERR_RATE, 1.0)
        self._rest = b""
        self.last = ""

    def feed(self, data: bytes) -> None:
        """Bytes as they come."""
        *lines, rest = data.split(b"\n")
        # No more than these could be logged: 64 KiB of empty lines would hold the loop for 90 ms.
        skipped = lines[STDERR_RATE:-LAST_LINES]
        del lines[STDERR_RATE:-LAST_LINES]
        self._throttle.skip(len(skipped) - skipped.count(b""))
        for line in lines:
            self._line(self._rest + line[:STDERR_LINE])
            self._rest = b""
        # A line without an end keeps its beginning, and costs no more than that.
        self._rest = (self._rest + rest[:STDERR_LINE])[:STDERR_LINE]

    def _line(self, line: bytes) -> None:
        text = _ANSI.sub(b"", line[:STDERR_LINE]).decode(errors="replace").rstrip()
        if not text:
            return
        passes = self._throttle.passes(self._clock())
        if not _NO_REASON.match(text):
            self.last = text
        if passes:
            self._record.emit("child.stderr", server=self._server, message=text)

    def wake(self, now: float) -> None:
        """What time alone brings about: the count of lines that were left out."""
        if dropped := self._throttle.left_out(now):
            message = f"left out {dropped} lines of its stderr: {STDERR_RATE} a second are logged"
            server = self._server
            self._record.emit("child.stderr_dropped", "warning", server=server, message=message)

    def end(self) -> None:
        """Nothing more comes; a last line that was not ended counts as one."""
        if self._rest:
            self._line(self._rest)
        self._rest = b""
        self.wake(math.inf)


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
# `disabled` is reached from everywhere and never left. `Nest._move` is the one writer, and each
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
    DISABLED = "disabled"


_ANY: Final = {  # from any state but DISABLED
    Cause.UNUSED: State.STOPPED,
    Cause.DISABLED: State.DISABLED,
}
_FALLS: Final = dict.fromkeys(
    (Cause.DIED, Cause.LATE, Cause.UNFIT, Cause.UNSTARTABLE), State.BACKOFF
)
MOVES: Final[dict[State, dict[Cause, State]]] = {  # state: {what happened: the state after it}
    State.STOPPED: {Cause.WANTED: State.STARTING, **_ANY},
    State.STARTING: {Cause.ANSWERED: State.READY, Cause.PROBED: State.STARTING, **_FALLS, **_ANY},
    State.READY: {Cause.REPLACED: State.STARTING, **_FALLS, **_ANY},
    State.BACKOFF: {Cause.DUE: State.STARTING, Cause.GAVE_UP: State.FAILED, **_ANY},
    State.FAILED: {Cause.DUE: State.STARTING, **_ANY},
    State.DISABLED: {Cause.DISABLED: State.DISABLED},
}
# The levels of the log; how a child ended has been said there already (`child.exited`).
SHOWN_AT: Final = {State.FAILED: "error", State.READY: "info"}
Ready: TypeAlias = Callable[[Link | Error], None]  # who asked for a process gets it, or a refusal


@dataclasses.dataclass(slots=True, eq=False)
class _Wait:
    """A Lease: one call that waits in `queue` for a process."""

    owner: Owner
    ready: Ready
    since: float
    queue: OrderedDict[_Wait, None]

    def __post_init__(self) -> None:
        self.queue[self] = None

    def cancel(self) -> None:
        self.queue.pop(self, None)


class _Granted:
    """The lease of a call that has its process, or its refusal, already."""

    def cancel(self) -> None: ...


GRANTED: Final = _Granted()


def _at_once(ready: Ready, got: Link | Error) -> Lease:
    ready(got)
    return GRANTED


class Member:
    """One child of a nest and the conversation with it; the Host of its peers."""

    def __init__(self, nest: Nest, place: str, era: str) -> None:
        supervisor = nest.supervisor
        self.nest, self.server, self.place = nest, nest.family.name, place
        self.config, self.limits = nest.family.config, supervisor.config.limits
        self.clock, self._shelf, self._record = nest.clock, supervisor.shelf, supervisor.record
        size, loop = supervisor.pipe_size, supervisor.loop
        self.child = Child(self.server, place, self.limits.line, size, self._record, loop)
        self.write = self.child.write
        self.probe = Probe(self, era)
        self.talk: Peer = self.probe  # replaced once its era is known
        self.child.receive = self.talk.receive
        self.child.ended = functools.partial(nest.bury, self)
        self.child.confined, self.child.denied = nest.family.open_ways, self._denied
        self.at_limits: set[str] = set()  # of its sandbox, when last looked at
        self.offer: Offer | None = None  # None until it is ready
        self.began = self.clock()  # when it was started, then when it became ready
        self.used = self.began  # when it was last chosen; what it is up to is in `unused_since`
        self.cause = Cause.DIED  # what its end will be to the nest
        self.remark = ""  # the last that was said of what it sends
        self.changes = 0.0  # when it last spoke of a changed list
        self.wanted = True  # False: its end was asked for, and is no failure
        self.waiting: OrderedDict[_Wait, None] = OrderedDict()  # calls that must go to this process

    def free(self, limit: int) -> bool:
        """Whether it takes one more call (DESIGN, Which process?)."""
        talk, able = self.talk, self.offer is not None and not self.child.busy
        return able and not talk.parked and talk.open_calls < limit

    def end(self, patience: float = PATIENCE) -> None:
        """Stop it; not a failure."""
        self.wanted = False
        self.child.stop(patience)

    def in_use(self) -> bool:
        """Whether a call is in flight or parked, or a task runs."""
        busy = bool(self.talk.open_calls or self.waiting)
        return busy or self.nest.supervisor.works_on(self.place)

    def unused_since(self) -> float | None:
        """Since when it serves nobody; None while it does, or is not ready."""
        if self.offer is None or self.in_use() or self.talk.listens:
            return None
        return max(self.used, self.child.heard)

    @property
    def probed(self) -> bool:
        """Whether it ended because it does not know the probe, which is no failure."""
        by_itself = self.cause is Cause.DIED and not self.child.fault
        return by_itself and self.offer is None and self.probe.exited_on_probe

    # ---- what the kernel holds it to ----

    def _denied(self, act: str, pid: int) -> None:
        text = f"was refused by its sandbox: {act}"
        self._record.alarm("sandbox.denied", text, server=self.server, pid=pid, act=act)

    def look_at_limits(self) -> None:
        """Report which limits of its sandbox it has reached."""
        sandbox = self.config.sandbox
        if sandbox is None or not self.child.alive:
            return
        before, self.at_limits = self.at_limits, set(at_limits(self.child.pid, sandbox))
        for limit in sorted(self.at_limits - before):
            text = f"is at the limit of its sandbox: {limit} {getattr(sandbox, limit)}"
            fields = {"server": self.server, "pid": self.child.pid, "limit": limit}
            self._record.alarm("sandbox.limit", text, **fields)

    def killed(self) -> str:
        """Why the kernel killed it, where that was for what it tried; else ""."""
        sandbox, child = self.config.sandbox, self.child
        if sandbox is None or not child.signal or child.fault or not self.wanted:
            return ""
        if child.signal == signal.SIGSYS:
            return "was killed by the kernel for a system call that its sandbox forbids"
        crashes = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGTRAP)
        if sandbox.memory and child.signal in crashes:
            return f"{_how(-child.signal)}; its sandbox limits memory to {sandbox.memory} bytes"
        return ""

    # ---- what its peer reports (Host) ----

    def ready(self, peer: Peer) -> None:
        self.talk, self.offer, self.child.receive = peer, peer.offer, peer.receive
        self.began = self.used = self.clock()
        self.nest.answered(self, peer.offer)

    def unfit(self, reason: str) -> None:
        self.cause = Cause.UNFIT
        self.child.fault = reason
        self.child.stop(DRAIN)

    def changed(self, kind: Kind) -> None:
        self.changes = self.clock()
        if self.nest.key is None:
            self._shelf.changed(self.server, kind)

    def told(self, notice: Notice) -> None:
        self._shelf.told(self.server, self.place, notice)

    def logged(self, level: str, message: str) -> None:
        if level == "warning":
            self.remark = message
        self._record.emit("child.log", level, server=self.server, message=message)

    def freed(self) -> None:
        # Nearly always there is nothing to do, and this finds out in 0.1 us.
        if self.nest.waiting or self.waiting or self.talk.known_to_ask:
            self.nest.freed(self)


class Nest:
    """The children of a server that serve one isolation key, and the calls that wait for them.

    `key` None is the server's own: for all clients where it is shared, else for Atrax alone."""

    def __init__(self, family: Family, key: Owner | None) -> None:
        self.family, self.supervisor, self.key = family, family.supervisor, key
        self.clock = family.supervisor.clock
        self.state = State.STOPPED
        self.since = time.time()  # of the state, for people
        self.members: list[Member] = []  # starting or ready, oldest first
        self.retired: list[Member] = []  # take no calls any more, oldest first
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
        before, after = self.state, MOVES[self.state][cause]
        reason = self.supervisor.record.redact(reason)
        self.state, self.since, self.reason = after, time.time(), reason or self.reason
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._say(
            "server.state",
            SHOWN_AT.get(after, "debug"),
            state=after.value,
            before=before.value,
            cause=cause.value,
            owner=self.key and f"{self.key.principal} {self.key.session}".strip(),
            reason=reason,
            message=f"{after.value}: {reason}" if reason else after.value,
        )
        if self.key is None:
            self.family.moved(before, after)

    def _say(self, event: str, level: str, **fields: Json) -> None:
        self.supervisor.record.emit(event, level, server=self.family.name, **fields)

    def want(self, cause: Cause) -> None:
        """Start the first process."""
        self._move(cause)
        self.spawn()

    def spawn(self) -> None:
        """Start one more process."""
        self.members.append(self.supervisor.start_one(self))
        self._count()

    def _ready(self) -> list[Member]:
        return [member for member in self.members if member.offer is not None]

    def _count(self) -> None:
        ready = self._ready()
        self.only = ready[0] if len(ready) == 1 else None

    def answered(self, member: Member, offer: Offer) -> None:
        """`member` is ready."""
        if member not in self.members:
            return  # retired before it was
        if self.key is None:
            self.family.offer = offer
        self.family.believe(offer.era)
        self._count()
        if self.state is State.STARTING:
            self._move(Cause.ANSWERED)
        for wait in _emptied(self.own):
            wait.ready(member.talk)
        self.serve()

    # ---- the end of a child ----

    def bury(self, member: Member, why: str) -> None:
        """`member` has ended. The nest moves first, then its calls end: a call that is repeated at
        once must not find the dead one still there."""
        child, early = member.child, member.offer is None
        if child.unstartable:
            member.cause = Cause.UNSTARTABLE
        if early and child.pid and not child.fault:
            why += " before it answered"
        said = f'; its last line: "{child.last_line}"' if child.last_line else ""
        failed = member.wanted and child.pid and not member.probed
        level = "warning" if failed else "debug"
        self._say("child.exited", level, pid=child.pid, message=why + said)
        if killed := member.killed():
            record = self.supervisor.record
            record.alarm("sandbox.killed", killed, server=member.server, pid=child.pid)
        self.supervisor.sweep(member)
        held = member in self.members
        self._remove(member)
        if held:
            # What it said before it ever answered is of nobody's call, so any client may read it.
            self._bereaved(member, why + said if early else why)
        for wait in _emptied(member.waiting):
            wait.ready(self.family.gone_error())
        member.talk.lost(why)
        self.serve()

    def _remove(self, member: Member) -> None:
        for group in (self.members, self.retired):
            if member in group:
                group.remove(member)
        for owner in [owner for owner, last in self._last.items() if last is member]:
            del self._last[owner]
        self._count()

    def _bereaved(self, member: Member, why: str) -> None:
        """A member that was not sent away is no more."""
        now, family = self.clock(), self.family
        early = member.offer is None
        if member.probed:
            family.believe("legacy")
            if self.state is State.STARTING:
                self._move(Cause.PROBED)
            self.spawn()
            return
        if early:
            family.believe("auto")  # what was remembered is no help any more
            if self._ready():
                # The system, or a lock of the server's, allows no more processes than run.
                self.most = len(self.members)
                text = f"another process {why}: no more than {self.most} from now on"
                self._say("server.processes", "warning", message=text)
                return
        if early or now - member.began < EARLY:
            self._deaths.append(now)
        else:
            self._deaths.clear()
            self._trips = 0
        family.restarts += 1
        self._fall(member.cause, why, now)

    def _fall(self, cause: Cause, why: str, now: float) -> None:
        """From a death to the pause after it or the open circuit. Not while others are ready."""
        if self._ready():
            return
        if self.members:
            if self.state is State.READY:
                self._move(Cause.REPLACED, why)
            return
        self._move(cause, why)
        rules = self.family.config.restart
        while self._deaths and now - self._deaths[0] > rules.window:
            self._deaths.popleft()
        shortest, longest = rules.backoff
        probed_in_vain = self._trips and self._deaths
        if cause is Cause.UNSTARTABLE or probed_in_vain or len(self._deaths) >= rules.failures:
            self._move(Cause.GAVE_UP, why)
            self._pause(min(PROBE_AGAIN, longest * 2.0 ** min(self._trips, 16)), now)
            self._trips += 1
            self.refuse_all()
            return
        delay = min(longest, shortest * 2.0 ** max(0, len(self._deaths) - 1))
        # Jitter: fifty servers that died of one cause must not come back in one moment.
        self._pause(delay * random.uniform(0.5, 1.0), now)

    def _pause(self, delay: float, now: float) -> None:
        self._due = now + delay
        self._timer = self.supervisor.loop.call_later(delay, self._again)

    def _again(self) -> None:
        """The pause is over: start again, unless it runs only while it is used, and is not."""
        family = self.family
        on_demand = self.key is not None or (family.config.lazy and family.listed)
        if on_demand and not self.waiting:
            self._move(Cause.UNUSED)
        else:
            self.want(Cause.DUE)

    def retry_after(self, now: float) -> float | None:
        """Seconds until it is started again, for `data.retryAfter`; None if that is not planned."""
        if self.state in (State.BACKOFF, State.FAILED):
            return max(0.1, round(self._due - now, 1))
        return None

    # ---- who gets which process ----

    def lease(self, owner: Owner | None, ready: Ready, now: float) -> Lease:
        """Any process for `owner`: at once, later, or never."""
        if owner is None:
            return self._lease_own(ready, now)
        family, stopped = self.family, self.state is State.STOPPED
        down = family.nest if family.nest.state is State.DISABLED else self
        if down.state in (State.DISABLED, State.FAILED):
            return _at_once(ready, down.unavailable(now))
        if not self.waiting and (member := self._choose(owner)) is not None:
            self._give(member, owner, ready)
            return GRANTED
        if len(self.waiting) >= WAITING:
            many = f"{WAITING} calls wait for a process already"
            return _at_once(ready, family.overloaded(many))
        if stopped and self.key is not None and not self.supervisor.room():
            full = "no room for another process (limits.children)"
            return _at_once(ready, family.overloaded(full))
        wait = _Wait(owner, ready, now, self.waiting)
        if stopped:
            self.want(Cause.WANTED)
        else:
            self._grow()
        return wait

    def _lease_own(self, ready: Ready, now: float) -> Lease:
        if usable := self._ready():
            # The one that spoke of changes last: another may not have changed its lists.
            return _at_once(ready, max(usable, key=lambda member: member.changes).talk)
        if self.state in (State.STARTING, State.BACKOFF):
            return _Wait(NOBODY, ready, now, self.own)
        return _at_once(ready, self.unavailable(now))

    def _give(self, member: Member, owner: Owner, ready: Ready) -> None:
        member.used = self.clock()
        self.family.called = True
        if len(self.members) > 1:
            self._last[owner] = member
            self._last.move_to_end(owner)
            if len(self._last) > REMEMBERED:
                self._last.popitem(last=False)
        ready(member.talk)

    def _choose(self, owner: Owner) -> Member | None:
        """The process for a call of `owner`; None if it has to wait (DESIGN, Which process?)."""
        if not self.family.asks and any(member.talk.known_to_ask for member in self.members):
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
        held = [m for m in self.members if 0 < m.talk.open_calls == m.talk.parked]
        return min(held, key=lambda member: member.talk.parked, default=None)

    def serve(self) -> None:
        """Give what is free to who waits, in order."""
        if self._serving:
            return  # a call that ended at once: the loop below goes on with the next
        self._serving = True
        try:
            while self.waiting and self.state is State.READY:
                wait = next(iter(self.waiting))
                member = self._choose(wait.owner)
                if member is None:
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
        starting = len(self.members) - len(self._ready())
        wanted = min(len(self.waiting) - starting, self.most - len(self.members))
        for _ in range(wanted):
            if not self.supervisor.room():
                return
            self.spawn()

    def freed(self, member: Member) -> None:
        """A call of `member` ended, and that may matter to somebody."""
        talk, family = member.talk, self.family
        if talk.known_to_ask and not family.asks:
            family.learned_to_ask()
        if family.asks and talk.overdue and member in self.members:
            self.retire(member)
        while member.waiting and talk.open_calls < family.limit and not member.child.busy:
            wait, _ = member.waiting.popitem(last=False)
            wait.ready(talk)
        if self.waiting:
            self.serve()

    # ---- sending members away ----

    def _dismiss(self, member: Member) -> None:
        """No new calls for `member`."""
        self._remove(member)
        member.wanted = False
        self.retired.append(member)

    def retire(self, member: Member) -> None:
        """No new calls for `member`; it is stopped when those in flight are done.

        One that holds a cancelled call may still ask for it, and would ask the next client."""
        self._dismiss(member)
        if len(self.retired) > self.family.config.processes:
            self.retired[0].child.fail("was ended: too many of its kind finish their last calls")
        if not member.in_use():
            member.end()
        if self.state is State.READY and not self._ready():
            self._move(Cause.REPLACED, "its process holds a cancelled call, and is replaced")
            if not self.members:
                self.spawn()

    def close(self, cause: Cause, reason: str, patience: float = PATIENCE) -> None:
        """No process any more, for calls in flight and those that wait neither."""
        old = list(self.members)
        self._move(cause, reason)
        for member in old:
            self._dismiss(member)
        for member in list(self.retired):
            member.end(patience)
        self.refuse_all()

    def refuse_all(self) -> None:
        """Nobody gets a process for now: say so to all who wait."""
        error = self.unavailable(self.clock())
        for wait in [*_emptied(self.own), *_emptied(self.waiting)]:
            wait.ready(error)

    def unavailable(self, now: float) -> Error:
        """Why there is no process, as an error for a client."""
        state, name, wait = self.state.value, self.family.name, self.retry_after(now)
        text = f'the server "{name}" is not available: it is {state}'
        if self.reason and self.state is not State.STOPPED:
            text += f"; {self.reason}"
        return own_error(UNAVAILABLE, text, "unavailable", name, state=state, retryAfter=wait)

    # ---- time ----

    def wake(self, now: float) -> None:
        """Late starts, calls that waited too long, and children that nobody uses."""
        start = self.family.config.start_timeout
        for member in [*self.members, *self.retired]:
            child = member.child
            member.talk.wake(now)
            child.stderr.wake(now)
            if member.offer is None and member.wanted and now - member.began >= start:
                if child.alive and not child.fault:
                    member.cause = Cause.LATE
                    also = f"; {member.remark}" if member.remark else ""
                    child.fail(f"did not answer within {start:g} s{also}")
            elif member in self.retired and not member.in_use() and not child.ending:
                member.end()  # not twice: each tick would start its patience anew
        self._expire(now)
        if self.state is State.READY:
            self._stop_unused(now)

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
                self._dismiss(member)
                member.end()
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


def _emptied(queue: OrderedDict[_Wait, None]) -> list[_Wait]:
    """All in `queue`, which is empty afterwards: a call that is refused may wait again at once."""
    waits = list(queue)
    queue.clear()
    return waits


class Family:
    """One server: its config, what is known of it, and its nests."""

    def __init__(self, supervisor: Supervisor, name: str, config: ServerConfig) -> None:
        self.supervisor, self.name, self.config = supervisor, name, config
        box = config.container
        self.command = (box.image if box else "", *config.argv)
        self.asks = False  # whether a child of it asked while a call was open
        self.limit = config.concurrency or NO_LIMIT  # most calls in flight per process
        self.restarts = 0
        self.offer: Offer | None = None  # what its last ready child said
        # What a sandbox with `best_effort` leaves open here.
        self.open: list[str] = []
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
            self.close("disabled in the config")
        else:
            self.nest.want(Cause.WANTED)

    def open_ways(self, ways: list[str]) -> None:
        """What this system cannot do of its sandbox, which `best_effort` allows."""
        if ways != self.open:
            self.open = ways
            text = f"its sandbox is not whole (best_effort): {'; '.join(ways)}"
            self.supervisor.record.alarm("sandbox.open", text, server=self.name)

    def close(self, reason: str, patience: float = PATIENCE) -> None:
        """Disable the server, whatever it does."""
        self.nest.close(Cause.DISABLED, reason, patience)
        for nest in self.nests.values():
            nest.close(Cause.UNUSED, reason, patience)

    def nest_of(self, owner: Owner | None) -> Nest:
        """Where `owner`'s calls go."""
        if owner is None or self.shared is not None:
            return self.nest
        # A modern client has no session: with `session` too its principal is its key.
        key = owner if self.config.isolation == "session" else Owner(owner.principal)
        if key not in self.nests:
            self.nests[key] = Nest(self, key)
        return self.nests[key]

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
            for member in [member for member in nest.members if member.talk.overdue]:
                nest.retire(member)

    def overloaded(self, why: str) -> Error:
        text = f'the server "{self.name}" is overloaded: {why}'
        return own_error(OVERLOADED, text, "overloaded", self.name)

    def gone_error(self) -> Error:
        text = f'the process of "{self.name}" that this belongs to is gone; start the call again'
        return own_error(UNAVAILABLE, text, "place_gone", self.name, state=self.nest.state.value)

    def status(self, now: float) -> dict[str, Json]:
        """What /status shows of it."""
        nests = self.all()
        members = [member for nest in nests for member in [*nest.members, *nest.retired]]
        return {
            "state": self.nest.state.value,
            "settled": self.settled,
            "era": self.offer.era if self.offer else None,
            "protocolVersion": self.offer.version if self.offer else None,
            "pids": [member.child.pid for member in members if member.child.alive],
            "processes": self.nest.most,
            "concurrency": None if self.limit == NO_LIMIT else self.limit,
            "asks": self.asks,
            "open": self.open,
            "restarts": self.restarts,
            "lastError": self.nest.reason or None,
            "inFlight": sum(member.talk.open_calls for member in members),
            "waiting": sum(len(nest.waiting) for nest in nests)
            + sum(len(member.waiting) for member in members),
            "parked": sum(member.talk.parked for member in members),
            "since": round(self.nest.since, 3),
            "retryAfter": self.nest.retry_after(now),
        }


class Supervisor:
    """All servers' children. Implements Pool."""

    def __init__(
        self,
        config: Config,
        record: Record,
        shelf: Shelf,
        clock: Callable[[], float],
        loop: asyncio.AbstractEventLoop,
        works_on: Callable[[str], bool] = lambda place: False,
    ) -> None:
        """`works_on` tells whether a process is in use beyond its calls (a task runs there)."""
        self.config, self.record, self.shelf = config, record, shelf
        self.clock, self.loop, self.works_on = clock, loop, works_on
        self.eras: dict[tuple[str, ...], str] = {}  # what each command line turned out to be
        self._families = {name: Family(self, name, one) for name, one in config.servers.items()}
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
        for family in self._families.values():
            family.close("Atrax is stopping", grace)
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
        for family in self._families.values():
            for nest in family.all():
                nest.wake(now)
            for key in [key for key, nest in family.nests.items() if nest.empty(now)]:
                del family.nests[key]
        if now - self._swept >= SWEEP:
            self.sweep()
            for member in self._members.values():
                member.look_at_limits()

    # ---- Pool ----

    def lease(self, server: str, owner: Owner | None, place: str, ready: Ready) -> Lease:
        """A process of `server` for one call (Pool)."""
        family = self._families.get(server)
        if family is None:
            text = f'there is no server "{server}"'
            return _at_once(ready, own_error(UNAVAILABLE, text, "unknown", server))
        nest = family.shared
        if nest is not None and owner is not None and not place:
            # The usual case: one process, and nobody waits. Member.free is written out here, since
            # this is the way of every call.
            member = nest.only
            if member is not None and not nest.waiting and not member.child.busy:
                talk = member.talk
                if not talk.parked and talk.open_calls < family.limit:
                    family.called = True
                    ready(talk)
                    return GRANTED
        now, nest = self.clock(), family.nest_of(owner)
        if not place:
            return nest.lease(owner, ready, now)
        # That process and no other; one that is isolated for somebody else is as good as gone.
        member = self._members.get(place)
        if member is None or member.nest is not nest or member.offer is None or member.child.ending:
            return _at_once(ready, family.gone_error())
        if owner is not None and member.talk.open_calls >= family.limit:
            return _Wait(owner, ready, now, member.waiting)
        member.used = now
        return _at_once(ready, member.talk)

    def at(self, server: str, owner: Owner, place: str) -> Link | Error:
        """The process at `place`, whether it is free or not (Pool)."""
        family = self._families[server]
        member = self._members.get(place)
        if member is None or member.nest is not family.nest_of(owner) or member.offer is None:
            return family.gone_error()
        return member.talk

    def gone(self, owner: Owner) -> None:
        """`owner` is no more: end the children that were its own (Pool)."""
        for family in self._families.values():
            nest = family.nests.get(owner)
            if nest is not None:
                nest.close(Cause.UNUSED, "its owner is gone")

    # ---- operation ----

    def state(self, server: str) -> State:
        """The state of `server`; raises KeyError where there is no such server."""
        return self._families[server].nest.state

    def status(self) -> dict[str, dict[str, Json]]:
        """What /status shows, by server."""
        now = self.clock()
        return {name: family.status(now) for name, family in self._families.items()}

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
                config = member.config
                if config.sandbox and not LINUX:
                    member.nest.family.open_ways([NO_SANDBOX])
                if member.wanted:
                    await member.child.open(launch(config, member.place))
            except (Unstartable, OSError, ValueError) as error:
                member.cause = Cause.UNSTARTABLE
                member.nest.bury(member, str(error))
                return
        if not member.child.pid:
            member.nest.bury(member, "was not needed any more")
        elif not member.wanted:
            member.child.stop()
        else:
            member.probe.start(self.clock())

    def sweep(self, ended: Member | None = None) -> None:
        """End what children left behind when they ended."""
        self._swept = self.clock()
        if ended is not None:
            self._members.pop(ended.place, None)
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
        idle = {since: nest for nest in isolated if (since := nest.unused_since()) is not None}
        if idle:
            reason = "another owner needs its place (limits.children)"
            idle[min(idle)].close(Cause.UNUSED, reason)
        return bool(idle)


# ==== Endpoints ===================================================================
# What operators and monitors ask: health, readiness, status, metrics.
# Knows how to show what others report. Must not know how servers or clients work.


class Endpoints:
    """GET /health, /ready, /status and /metrics. `paths` tells the wiring which requests come here."""

    OPEN: Final = ("/health", "/ready")  # no Host check, no auth: probes of container runtimes

    def __init__(
        self, record: Record, servers: Callable[[Scope], dict[str, dict[str, Json]]]
    ) -> None:
        self._record, self._servers = record, servers
        self._started = time.time()
        self.draining = False
        self._pages: dict[str, Callable[[Scope], tuple[int, str, bytes]]] = {
            "/health": self._health,
            "/ready": self._ready,
            "/status": self._status,
            "/metrics": self._metrics,
        }

    @property
    def paths(self) -> Iterable[str]:
        return self._pages.keys()

    def handle(self, request: HttpRequest, reply: Reply, owner: Owner | None) -> None:
        """Answer one of `paths` with what `owner` may see; None: nobody knows who asks, so with no
        text that names servers."""
        if request.method not in ("GET", "HEAD"):
            raise HttpError(405, f"{request.path} is read with GET", [("Allow", "GET, HEAD")])
        scope = Scope(()) if owner is None else owner.scope
        status, content_type, body = self._pages[request.path](scope)
        if owner is None:
            body = encode({"status": json.loads(body)["status"]})
        reply.full(status, [("Content-Type", content_type)], body)

    def _health(self, scope: Scope) -> tuple[int, str, bytes]:
        return 200, "application/json", encode({"status": "ok"})

    def _ready(self, scope: Scope) -> tuple[int, str, bytes]:
        """503 until each enabled server has been ready once or has failed its first start, and while draining.

        That is about all of them, whoever asks; the names are of those that the scope sees."""
        servers = self._servers(EVERYTHING)
        waiting = [name for name, server in servers.items() if not server["settled"]]
        status = "draining" if self.draining else "starting" if waiting else "ready"
        body = encode({"status": status, "waiting": [name for name in waiting if scope.sees(name)]})
        return 200 if status == "ready" else 503, "application/json", body

    def _status(self, scope: Scope) -> tuple[int, str, bytes]:
        body = {
            "version": VERSION,
            "python": ".".join(map(str, sys.version_info[:3])),
            "pid": os.getpid() if scope.everything else None,
            "uptime": round(time.time() - self._started, 1),
            "servers": self._servers(scope),
        }
        return 200, "application/json", encode(self._record.redact(body))

    def _metrics(self, scope: Scope) -> tuple[int, str, bytes]:
        # What is not counted by server (events, refused requests) tells of everybody's doings, so it
        # is for those alone from whom nothing is kept; calls are counted by server.
        counters = self._record.metrics(None if scope.everything else scope.sees)
        text = counters + _gauges(self._servers(scope), time.time() - self._started)
        return 200, "text/plain; version=0.0.4; charset=utf-8", text.encode()


def read_approval(request: HttpRequest) -> dict[str, str]:
    """What POST /servers/NAME/pin approves: tools by their own names, with the digests that were seen.

    Raises HttpError 405, 415 or 400."""
    if request.method != "POST":
        raise HttpError(405, "tools are approved with POST", [("Allow", "POST")])
    # Not one of the types that a web page can send without a preflight (Fetch, CORS-safelisted).
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HttpError(415, "the body must be application/json")
    try:
        body = decode(request.body)
    except InvalidJson as error:
        raise HttpError(400, str(error)) from None
    tools = body.get("tools") if isinstance(body, dict) and set(body) == {"tools"} else None
    if (
        not isinstance(tools, dict)
        or not tools
        or not all(isinstance(d, str) and d.startswith("sha256:") for d in tools.values())
    ):
        text = 'say what you have seen: {"tools": {"NAME": "sha256:…"}}, with digests from /status'
        raise HttpError(400, text)
    return tools


def _gauges(servers: Mapping[str, Mapping[str, Json]], uptime: float) -> str:
    """What is, not what happened: one line per server and measure that is shown of it."""
    lines = ["# TYPE atrax_uptime_seconds gauge", f"atrax_uptime_seconds {uptime:.1f}"]
    measures: dict[str, Callable[[Mapping[str, Json]], Json]] = {
        "up": lambda server: int(server["state"] == "ready"),
        "restarts": lambda server: server.get("restarts"),
        "calls_in_flight": lambda server: server.get("inFlight"),
        "calls_waiting": lambda server: server.get("waiting"),
        "calls_parked": lambda server: server.get("parked"),
        "tools": lambda server: server["tools"],
    }
    for name, read in measures.items():
        lines.append(f"# TYPE atrax_server_{name} gauge")
        for server, values in servers.items():
            if (value := read(values)) is not None:
                lines.append(f'atrax_server_{name}{{server="{_label(server)}"}} {value}')
    return "\n".join(lines) + "\n"


# ==== Atrax =======================================================================
# The wiring, in one place: what is plugged into what, start, tick, drain, stop.
# Knows every section. Nobody above knows it.

TICK: Final = 0.2  # seconds between two `wake` of everything that has deadlines
HELD_BODIES: Final = 64 * MIB  # of requests that wait for the issuer's keys
FIRST_START: Final = 2.0  # seconds that the start-up screen waits for slow servers
# Of a server's status, what everybody is shown who may use anything of it.
OUTSIDE: Final = ("state", "settled", "era", "protocolVersion", "since", "retryAfter")


class Atrax:
    """A gateway: built whole by the constructor, running between `start` and `stop`."""

    def __init__(self, config: Config, loop: asyncio.AbstractEventLoop) -> None:
        self.config, self._loop = config, loop
        self.record = Record(config.secrets)
        clock = loop.time
        key = config.key.encode() if config.key else secrets.token_bytes(32)
        self.policy = Policy(self.record, config)
        tasks = Tasks(clock)
        self.supervisor = Supervisor(config, self.record, self, clock, loop, tasks.run_at)
        self.catalogue = Catalogue(
            config, self.supervisor, self.record, clock, self.policy.definition, loop.call_later
        )
        self.subscriptions = Subscriptions(
            config, self.catalogue, self.supervisor, self.record, clock, tasks.home
        )
        self.gateway = Gateway(
            config, self.record, self.catalogue, self.subscriptions, self.policy, self.supervisor,
            clock, tasks,
        )  # fmt: skip
        self.clients = Clients(
            self.gateway, config.limits, self.record, clock, key, self.supervisor.gone,
            loop.call_later, check_request, check_answer,
            stands=lambda owner, now: self.identity.stands(owner, now),  # the one of that moment
        )  # fmt: skip
        self.identity = Identity(config, record=self.record)
        self.gateway.step_up = lambda *refused: self.identity.step_up(*refused)
        self.endpoints = Endpoints(self.record, self.status)
        tls = config.tls.context() if config.tls else None
        self.http = HttpServer(self, config.limits, self.record, clock, tls, self._is_exempt)
        self.urls: list[str] = []
        self.audit: Audit | None = None
        self._locking = asyncio.Lock()  # who reads or writes the lock of the pins
        self._approvals: set[asyncio.Task[None]] = set()
        self._held = 0  # bytes of bodies that wait for the issuer's keys
        self._ticking: asyncio.TimerHandle | None = None

    # ---- life ----

    async def start(self) -> None:
        """Listen, then start every server side by side; raises UsageError where it can't listen, or
        keep an audit.

        Listening comes first: a port in use is found before fifty processes are started for nothing."""
        config = self.config
        if config.log.audit is not None:
            self.audit = Audit(config.log.audit, self.record)
            self.record.watch(self.audit)
        self.record.audited = self.audit is not None or config.log.level == "debug"
        self.urls = await self.http.listen(config.host, config.port, config.socket)
        become_subreaper()
        _raise_descriptor_limit()
        for sentence in uncontained():
            self.record.emit("atrax.uncontained", "warning", message=sentence)
        self.supervisor.start()
        self.tick()
        self._loop.call_soon(self.policy.warm)

    async def stop(self, grace: float) -> None:
        """No new calls, `grace` seconds for those in flight, then everything ends, in order."""
        self.endpoints.draining = self.gateway.draining = True
        self._step(self.http.refuse)
        self._step(self.subscriptions.close)
        self._step(self.clients.drain)
        deadline = self._loop.time() + grace
        while self.gateway.inflight and self._loop.time() < deadline:
            await asyncio.sleep(0.02)
        self._step(self.clients.close)
        for task in self._approvals:
            task.cancel()
        await self.http.close(1.0)
        await self.supervisor.stop(2.0)
        if self._ticking is not None:
            self._ticking.cancel()
        if self.audit is not None:
            self.audit.close()

    def _step(self, step: Callable[[], None]) -> None:
        """Do `step`; one section's fault must not keep the next one from its turn."""
        try:
            step()
        except Exception as error:
            self.record.emit("internal.error", "error", message=f"{step}: {error!r}")

    async def reload(self, load: Callable[[], Config]) -> None:
        """Take over what may change at SIGHUP: who may come in (`auth`), what is approved (the lock),
        the files of `tls` and of the audit.

        The whole file is read and checked, in a thread, since a disk may hang. What is new is made
        complete before anything is swapped, so a mistake changes nothing; after that nothing waits
        until those who may have less have less. All other keys need a restart, and the log says so.
        Nobody approves anything meanwhile."""
        async with self._locking:
            await self._reload(load)

    async def _reload(self, load: Callable[[], Config]) -> None:
        if self.audit is not None:  # whatever the config says: the file may have been rotated
            self.audit.reopen()
        try:
            new = await asyncio.to_thread(load)
            self.record.hide(new.secrets)
            if new.auth.type != self.config.auth.type:
                raise UsageError('"auth.type" needs a restart: it decides where Atrax may listen')
            config = self.config.model_copy(update={"auth": new.auth})
            identity = Identity(config, self.identity)
            context = await asyncio.to_thread(config.tls.context) if config.tls else None
            pins = self.policy.pins
            pinned = await asyncio.to_thread(pins.read) if pins.servers else None
        except (AtraxError, ValueError) as error:
            why = "; ".join(str(error).splitlines())
            self.record.alarm("reload.failed", f"nothing was changed: {why}")
            return
        changed = ["auth"] if config.auth != self.config.auth else []
        self.config, self.identity = config, identity
        self._step(self.clients.review)
        if context is not None:
            if self.http.renew(context):  # streams have no end, and nobody knows whose CA it was
                self._step(lambda: self.clients.close("a CA of clients is not trusted any more"))
            changed.append("tls")
        if self._adopt(pinned):
            changed.append("the lock")
        later = _differing(config, new)
        message = f"took over {', '.join(changed) or 'nothing new'} from the config"
        if later:
            message += f"; these need a restart: {', '.join(later)}"
        self.record.emit("reload.done", changed=changed, restart=later, message=message)

    def tick(self) -> None:
        """Tell every section with deadlines what time it is, now and from now on."""
        now = self._loop.time()
        for wake in (
            self.supervisor.wake, self.catalogue.wake, self.subscriptions.wake, self.clients.wake,
            self.http.wake, self.identity.wake, *([self.audit.wake] if self.audit else ()),
        ):  # fmt: skip
            self._step(functools.partial(wake, now))
        self._ticking = self._loop.call_later(TICK, self.tick)

    # ---- Shelf: what happened at the children goes to who keeps lists and subscriptions ----

    def up(self, server: str, offer: Offer) -> None:
        offer = self.policy.introduced(server, offer)
        self.catalogue.up(server, offer)
        self.subscriptions.up(server, offer)

    def down(self, server: str) -> None:
        self.catalogue.down(server)
        self.subscriptions.down(server)

    def changed(self, server: str, kind: Kind) -> None:
        self.catalogue.changed(server, kind)

    def told(self, server: str, place: str, notice: Notice) -> None:
        self.subscriptions.told(server, place, notice)

    def _is_exempt(self, address: str) -> bool:
        """Whether `address` stands for many clients: a proxy, or the socket."""
        return not address or self.identity.trusts(address)

    # ---- Handler: which section a request is for ----

    def handle(self, request: HttpRequest, reply: Reply, fetched: bool | None = None) -> None:
        """Route by path. A refusal is answered here; what it says goes to the record too.

        `fetched`: the request was held for the issuer's keys, and whether they could be had."""
        if self.identity.proxied and fetched is None:
            self.identity.unveil(request)
            reply.id = request.id
        try:
            self._route(request, reply)
        except HttpError as error:
            self._refuse(request, reply, error)
        except KeysNeeded as needed:
            if fetched is not None or not self._hold(request, reply):
                self._refuse(request, reply, needed.refuse() if fetched else keys_missing())

    def _hold(self, request: HttpRequest, reply: Reply) -> bool:
        """Handle `request` again when the issuer's keys were fetched; False if too many wait for that.

        Nobody knows yet who they are, so their bodies are bounded too, all together."""
        size = len(request.body)
        if self._held + size > HELD_BODIES:
            return False

        def again(fetched: bool) -> None:
            self._held -= size
            reply.closed = None
            try:
                self.handle(request, reply, fetched)
            except Exception as error:  # Http is not up the stack any more
                self.http.failed(f"{request.method} {request.path}", error)
                self._refuse(request, reply, HttpError(500, "internal error"))

        def gone() -> None:
            self._held -= size
            leave()

        waits = self.identity.wait(again)
        if waits is None:
            return False
        leave = waits
        self._held += size
        reply.closed = gone
        return True

    def _refuse(self, request: HttpRequest, reply: Reply, error: HttpError) -> None:
        self._refused(request, error)
        body = encode({"error": {"message": str(error)}})
        reply.full(error.status, (*JSON_HEADERS, *error.headers), body)

    def _refused(self, request: HttpRequest, error: HttpError) -> None:
        """Record a refusal; what may be an attack aloud."""
        why = error.fields.get("reason", error.fields.get("principal"))
        message = f"{request.method} {request.path}: {error}" + (f" ({why})" if why else "")
        more: dict[str, Json] = {
            "request": request.id, "status": error.status, "address": request.address, **error.fields
        }  # fmt: skip
        if error.event in ALARMS:
            self.record.alarm(error.event, message, **more)
        else:
            self.record.emit(error.event, "debug", **more, message=message)

    def _route(self, request: HttpRequest, reply: Reply) -> None:
        path = request.path
        if path in Endpoints.OPEN:
            self.endpoints.handle(request, reply, self._known_owner(request))
            return
        self.identity.admit(request)
        if "origin" in request.headers:
            reply.extra = self.identity.cors(request)  # a page must be able to read a refusal too
            # A browser cannot send a token with its preflight (Fetch, CORS-preflight fetch).
            if request.method == "OPTIONS" and "access-control-request-method" in request.headers:
                reply.full(204, self.identity.preflight(request), b"")
                return
        document = self.identity.metadata(request)
        if document is not None:
            if request.method not in ("GET", "HEAD"):
                raise HttpError(405, "read it with GET", [("Allow", "GET, HEAD, OPTIONS")])
            reply.full(200, JSON_HEADERS, document)
            return
        owner = self.identity.owner(request)
        if request.method == "OPTIONS":
            reply.full(204, self.identity.preflight(request), b"")
            return
        if path == "/mcp":
            self.clients.handle(request, reply, owner, "")
        elif path in self.endpoints.paths:
            self.endpoints.handle(request, reply, owner)
        else:
            self._server_path(request, reply, owner)

    def _known_owner(self, request: HttpRequest) -> Owner | None:
        """Who sent `request`, if they may see /status too: a rebound web page may not."""
        try:
            return self.identity.check(request)
        except HttpError as error:
            if error.event in ("auth.failed", "auth.slowed"):  # a guess, wherever it is made
                self._refused(request, error)
            return None
        except KeysNeeded:
            return None

    def _server_path(self, request: HttpRequest, reply: Reply, owner: Owner) -> None:
        """/servers/NAME/mcp, and the two paths of the 2024-11-05 transport with or without a server."""
        path, endpoint = request.path, ""
        if path.startswith("/servers/"):
            endpoint, _, path = path[len("/servers/") :].partition("/")
            self._check_server(endpoint, owner)
            path = "/" + path
        if path == "/mcp" and endpoint:
            self.clients.handle(request, reply, owner, endpoint)
        elif path == "/sse":
            self.clients.sse(request, reply, owner, endpoint)
        elif path == "/messages":
            self.clients.messages(request, reply, owner, endpoint)
        elif path == "/pin" and endpoint:
            self._approve(request, reply, owner, endpoint)
        else:
            raise HttpError(404, "nothing is here; MCP is at /mcp and at /servers/NAME/mcp")

    def _approve(self, request: HttpRequest, reply: Reply, owner: Owner, server: str) -> None:
        """Approve the tools that the body names, if a pin hides them and they are still what was seen."""
        self.identity.operate(request, owner)
        wanted = read_approval(request)
        if server not in self.policy.pins.servers:
            raise HttpError(409, f'"pin" is not set for the server "{server}": nothing waits')
        held = self.catalogue.unapproved(server)
        for own, digest in wanted.items():
            found = held[own].unapproved if own in held else None
            if found is None or found.digest != digest:
                now = f"is {found.digest} now" if found else "does not wait for approval"
                raise HttpError(409, f"nothing was approved: {visible(own)[:120]} {now}")
        pins = {own: self.policy.pin_of(held[own].item) for own in wanted}
        # Owned here, cancelled by `stop`; each ends when the file is written.
        task = self._loop.create_task(self._pin(request, reply, owner, server, pins))
        self._approvals.add(task)
        task.add_done_callback(self._approvals.discard)

    async def _pin(
        self, request: HttpRequest, reply: Reply, owner: Owner, server: str, pins: dict[str, Pin]
    ) -> None:
        """Write the lock, show what is approved, answer."""
        try:
            async with self._locking:
                approve = functools.partial(self.policy.pins.approve, server, pins)
                self._adopt(await asyncio.to_thread(approve))
        except AtraxError as error:
            self.record.emit("pin.failed", "error", server=server, message=str(error))
            text = "the lock could not be written; the log says why"
            self._refuse(request, reply, HttpError(500, text))
            return
        names = ", ".join(visible(own)[:80] for own in pins)
        self.record.emit(
            "pin.approved", server=server, principal=owner.principal, address=request.address,
            request=request.id, message=f"{owner.principal} approved {names[:1000]}",
        )  # fmt: skip
        approved = {own: pin.digest for own, pin in pins.items()}
        reply.full(200, JSON_HEADERS, encode({"approved": approved}))

    def _adopt(self, pinned: Pinned | None) -> bool:
        """What is approved from now on; whether that is something else."""
        changed = self.policy.pins.adopt(pinned)
        for server in self.policy.pins.servers if changed else ():
            self.catalogue.review(server)
        return changed

    def _check_server(self, name: str, owner: Owner) -> None:
        """Raises HttpError 404 where there is no such server for `owner`."""
        server = self.config.servers.get(name)
        there = server is not None and not server.disabled
        if there and owner.scope.sees(name):
            return
        text = f'there is no server "{name}" here; /status lists those that are'
        error = Error(INVALID_PARAMS, text, status=404)
        if there:
            error = self.gateway.withheld(owner, name, "", error)
        challenge = [("WWW-Authenticate", error.challenge)] if error.challenge else ()
        raise HttpError(error.status, error.message, challenge)

    # ---- what there is to see ----

    def status(self, scope: Scope = EVERYTHING) -> dict[str, dict[str, Json]]:
        """Per server that `scope` sees: how its processes do, and what it offers.

        How they do in detail (pids, last words, what runs) where nothing of it is kept away."""
        counts = self.catalogue.counts(scope)
        return {
            name: {
                **(state if scope.all_of(name) else {key: state[key] for key in OUTSIDE}),
                **counts.get(name, {}),
            }
            for name, state in self.supervisor.status().items()
            if scope.sees(name)
        }


def _differing(old: Config, new: Config) -> list[str]:
    """The keys in which two configs differ; servers by name."""
    keys = [key for key in _keys(Config) if key != "mcpServers"]
    names = [*old.servers, *(name for name in new.servers if name not in old.servers)]
    return [
        *(key for key in keys if getattr(old, key) != getattr(new, key)),
        *(f"mcpServers.{one}" for one in names if old.servers.get(one) != new.servers.get(one)),
    ]


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
    load: Callable[[], Config],
    loop: asyncio.AbstractEventLoop,
    show: Callable[[list[str], dict[str, dict[str, Json]], Config], None],
) -> int:
    """Serve what `load` gives until SIGINT or SIGTERM; a second one ends the drain at once.

    SIGHUP loads it again. `show` gets the URLs and the status once every server has settled, or FIRST_START has passed."""
    config = load()
    atrax = Atrax(config, loop)
    log = Log(config.log.level, config.log.format, sys.stderr)
    atrax.record.watch(log)
    stopping: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.put_nowait, number)
    hangups = asyncio.Event()  # and no queue: two at once are one
    terminal = sys.stderr.isatty()

    def hang_up() -> None:
        # A terminal that was closed sends it too; then it is gone, and we go as we would have.
        if terminal and not sys.stderr.isatty():
            stopping.put_nowait(signal.SIGHUP)
        hangups.set()

    if hasattr(signal, "SIGHUP"):  # not on Windows
        loop.add_signal_handler(signal.SIGHUP, hang_up)
    reloading: asyncio.Task[None] | None = None
    try:
        await atrax.start()
        await _until(
            lambda: all(item["settled"] for item in atrax.status().values()), FIRST_START, stopping
        )
        show(atrax.urls, atrax.status(), config)
        # Owned here, cancelled below: a reload that hangs must not hold up the end.
        reloading = loop.create_task(_reload_at(hangups, atrax, load))
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
        if reloading is not None:
            reloading.cancel()
        log.close()
    return 0


async def _reload_at(hangups: asyncio.Event, atrax: Atrax, load: Callable[[], Config]) -> None:
    """Reload at each SIGHUP, one after the other."""
    while await hangups.wait():
        hangups.clear()
        try:
            await atrax.reload(load)
        except Exception as error:  # a bug must not cost the reloads to come
            atrax.record.emit("internal.error", "error", message=f"reload: {error!r}")


async def _until(
    true: Callable[[], bool], limit: float, stopping: asyncio.Queue[signal.Signals]
) -> None:
    """Wait until `true`, `limit` seconds at most, or until somebody wants to stop."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limit
    while not true() and stopping.empty() and loop.time() < deadline:
        await asyncio.sleep(0.02)


async def _settled(config: Config, loop: asyncio.AbstractEventLoop) -> Atrax:
    """Every server of `config`, started without serving, once each is ready or has failed."""
    atrax = Atrax(config, loop)
    become_subreaper()
    atrax.supervisor.start()
    atrax.tick()
    longest = max((server.start_timeout for server in config.servers.values()), default=0.0)
    await _until(
        lambda: all(item["settled"] for item in atrax.status().values()),
        longest + 5,
        asyncio.Queue(),
    )
    return atrax


async def check(
    config: Config, loop: asyncio.AbstractEventLoop
) -> tuple[dict[str, dict[str, Json]], float]:
    """Start every server without serving; the status once all have settled, and how long that took."""
    began, clock = loop.time(), time.time()
    atrax = await _settled(config, loop)
    took = loop.time() - began
    offers = atrax.catalogue.offers()
    status = {
        name: {
            **item,
            "offers": offers.get(name, {}),
            "took": round(item["since"] - clock, 3),
            "allowed": allowed(config.servers[name]),
        }
        for name, item in atrax.status().items()
    }
    await atrax.stop(0.0)
    return status, took


@dataclasses.dataclass(slots=True)
class Approval:
    """What `pin` found at one server: tools by own names, with what is new or has changed in them.

    `error`: why it could not be read; then what was approved stays approved."""

    tools: int = 0
    new: dict[str, list[dict[str, str]]] = dataclasses.field(default_factory=dict)
    changed: dict[str, list[dict[str, str]]] = dataclasses.field(default_factory=dict)
    gone: list[str] = dataclasses.field(default_factory=list)
    error: str = ""


async def approve_all(
    config: Config, loop: asyncio.AbstractEventLoop
) -> tuple[dict[str, Approval], list[str], bool]:
    """Read the tools of every server with `pin`, and write the lock with all of them.

    What was found, the servers whose approvals went since the config names them no more, and
    whether the lock has changed. Raises AtraxError where it cannot be read or written."""
    only = {name: one for name, one in config.servers.items() if one.pin and not one.disabled}
    atrax = await _settled(config.model_copy(update={"servers": only}), loop)
    old = atrax.policy.pins.read()
    was: Pinned = old or {}
    pinned = {name: tools for name, tools in was.items() if name in config.servers}
    found: dict[str, Approval] = {}
    for name, state in atrax.status().items():
        definitions = atrax.catalogue.definitions(name)
        if definitions is None:
            why = state.get("error") or state.get("lastError") or state["state"]
            found[name] = Approval(error=str(why))
            continue
        before = was.get(name, {})
        pinned[name] = {own: atrax.policy.pin_of(item) for own, item in definitions.items()}
        one = found[name] = Approval(len(definitions))
        one.gone = sorted(set(before) - set(definitions))
        for own, pin in sorted(pinned[name].items()):
            if own not in before:
                one.new[own] = atrax.policy.changes(None, definitions[own])
            elif before[own].digest != pin.digest:
                one.changed[own] = atrax.policy.changes(before[own], definitions[own])
    await atrax.stop(0.0)
    if old != pinned:
        write_lock(config.lock, pinned)
    return found, sorted(set(was) - set(pinned)), old != pinned


# ==== Demo ========================================================================
# The embedded servers `files` and `notes`, so that one copy has something to show. Each is a
# process of its own (`atrax.py bundled NAME`), on the SDK that nothing else here imports: a third
# of a second and 40 MB stay out of the gateway. Must not know the gateway.

LISTED: Final = 1_000  # files or notes in one list
SEARCHED: Final = 20_000  # files that one search looks into
FOUND: Final = 100  # lines, or notes, that one search gives
LARGEST_FILE: Final = 4 * MIB
CHARACTERS: Final = 100_000  # in one note, and of a file in one answer: what a model can take


def run_embedded(args: Sequence[str]) -> int:
    """Serve the embedded server args[0] on stdio until stdin ends. Raises UsageError."""
    if not args or len(args) > 2 or args[0] not in EMBEDDED:
        names = " or ".join(EMBEDDED)
        raise UsageError(f"atrax bundled: give {names}, and one argument at most")
    serve_embedded = _serve_files if args[0] == "files" else _serve_notes
    asyncio.run(serve_embedded(args[1] if len(args) > 1 else ""))
    return 0


def _for_model(message: str) -> Exception:
    """What a tool raises so that the model reads `message`; other exceptions it never sees."""
    from mcp.server.mcpserver.exceptions import ToolError

    return ToolError(message)


def _hints(*true: str) -> ToolAnnotations:
    """What a tool does to the world; Atrax repeats a call of a dead child by it."""
    from mcp_types import ToolAnnotations

    names = ("readOnlyHint", "destructiveHint", "idempotentHint", "openWorldHint")
    return ToolAnnotations.model_validate({name: name in true for name in names})


class _Folder:
    """One folder, read-only; no path leads out of it."""

    def __init__(self, root: str) -> None:
        self.root = os.path.realpath(root)
        if not os.path.isdir(self.root):
            raise UsageError(f"files: {root}: no such folder")

    def entries(self, path: Annotated[str, Field(description="a folder in it")] = ".") -> str:
        """List what is in a folder: a file with its size in bytes, a folder with /; no links."""
        folder = self._resolved(path)
        if not os.path.isdir(folder):
            raise _for_model(f'"{path}" is a file: read it')
        with os.scandir(folder) as entries:
            found = sorted((e.name, e) for e in entries if not e.is_symlink())
        lines = [f"{n}/" if e.is_dir() else f"{n}  {e.stat().st_size}" for n, e in found[:LISTED]]
        return "\n".join(lines) + (f"\n[{len(found) - LISTED} more]" if len(found) > LISTED else "")

    def read(
        self,
        path: Annotated[str, Field(description="a file, relative to the served folder")],
        from_line: Annotated[int, Field(ge=1, description="the first line wanted")] = 1,
    ) -> str:
        """Read a text file. Where it was cut, the last line says how to go on."""
        text = self._text(self._resolved(path))
        if text is None:
            raise _for_model(f'"{path}" is no readable text file of at most {LARGEST_FILE} bytes')
        lines, end, left = text.splitlines(keepends=True), from_line - 1, CHARACTERS
        while end < len(lines) and left > 0:
            left -= len(lines[end])
            end += 1
        more = f"\n[cut here; go on with from_line={end + 1}]" if end < len(lines) else ""
        return "".join(lines[from_line - 1 : end])[:CHARACTERS] + more

    def search(
        self,
        text: Annotated[str, Field(min_length=1, description="what to find, in any case")],
        path: Annotated[str, Field(description="the folder to search in")] = ".",
        names: Annotated[str, Field(description="only files named like this, *.py")] = "*",
    ) -> str:
        """Find text in files: path, line number, line. Not in hidden folders, links, big files."""
        found: list[str] = []
        for full in itertools.islice(self._walk(self._resolved(path), names), SEARCHED):
            for number, line in enumerate((self._text(full) or "").splitlines(), 1):
                if text.lower() in line.lower():
                    name = os.path.relpath(full, self.root)
                    found.append(f"{name}:{number}: {line.strip()[:200]}")
            if len(found) > FOUND:
                return "\n".join([*found[:FOUND], f"[stopped after {FOUND}; ask for less]"])
        return "\n".join(found) or f'"{text}" is in no file named {names} under {path}'

    def _walk(self, top: str, names: str) -> Iterator[str]:
        for base, folders, files in os.walk(top):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield from (os.path.join(base, name) for name in sorted(fnmatch.filter(files, names)))

    def _resolved(self, path: str) -> str:
        # Resolved before compared: ".." and symlinks are what leads out (CWE-22, CWE-59).
        full = os.path.realpath(os.path.join(self.root, path.replace("\0", "?")))
        if os.path.commonpath([self.root, full]) != self.root or not os.path.exists(full):
            raise _for_model(f'there is no "{path}" in the served folder; list shows what there is')
        return full

    def _text(self, full: str) -> str | None:
        # O_NOFOLLOW: a link put there since it was resolved. O_NONBLOCK: a FIFO waits for ever.
        flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            with open(full, "rb", opener=lambda name, how: os.open(name, how | flags)) as file:
                regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
                data = file.read(LARGEST_FILE + 1) if regular else b"\0"
        except OSError:
            return None
        return None if len(data) > LARGEST_FILE or b"\0" in data else data.decode(errors="replace")


async def _serve_files(root: str) -> None:
    from mcp.server.mcpserver import MCPServer

    folder = _Folder(root or ".")
    about = f"Text files under {folder.root}, read-only. Start with list or search."
    server: MCPServer[Any] = MCPServer(
        "files", version=VERSION, instructions=about, log_level="WARNING"
    )
    reads = _hints("readOnlyHint", "idempotentHint")
    for name, tool in (("list", folder.entries), ("read", folder.read), ("search", folder.search)):
        # Plain text: as structured content a file would travel twice.
        title = f"{name.capitalize()} files"
        server.add_tool(tool, name, title, annotations=reads, structured_output=False)
    await server.run_stdio_async()


class Note(BaseModel):
    """One note. Its resource is `note://ID`."""

    id: int
    title: str
    text: str
    changed: str = Field(description="in UTC")


class Confirmation(BaseModel):
    """What the user is asked before a note is deleted."""

    delete: bool = Field(title="Delete it", description="Yes: the note is gone for good")


_NoteId: TypeAlias = Annotated[int, Field(description="the note's number")]
_NoteTitle: TypeAlias = Annotated[str, Field(max_length=200, description="one line to find it by")]
_NoteText: TypeAlias = Annotated[str, Field(max_length=CHARACTERS, description="the note itself")]
_Words: TypeAlias = Annotated[str, Field(description="words that must all occur; empty: all")]


class _Notes:
    """The notes, in SQLite, and who listens for their changes (modern clients: the SDK's bus)."""

    def __init__(self, given: str) -> None:
        import sqlite3

        from mcp.server.subscriptions import InMemorySubscriptionBus

        path = given or os.path.expanduser("~/.local/share/atrax/notes.db")
        try:
            if path.startswith("~"):
                raise OSError("there is no home folder")
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            self._database = sqlite3.connect(path, timeout=5, isolation_level=None)
            self._database.row_factory = sqlite3.Row
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS notes (id INTEGER PRIMARY KEY AUTOINCREMENT,"
                " title TEXT NOT NULL, text TEXT NOT NULL, changed TEXT NOT NULL)"
            )
        except (OSError, sqlite3.Error) as error:
            hint = 'Name a file: "args": ["/path/to/notes.db"]'
            raise UsageError(f"notes: {path}: {error}. {hint}") from None
        self.bus = InMemorySubscriptionBus()

    async def add(self, title: _NoteTitle, text: _NoteText = "") -> Note:
        """Keep a new note. Gives it with its number."""
        statement = "INSERT INTO notes (title, text, changed) VALUES (?, ?, datetime())"
        ident = self._database.execute(statement, (title, text)).lastrowid or 0
        await self._changed(ident)
        return self._one(ident)

    async def edit(self, id: _NoteId, text: _NoteText, title: _NoteTitle = "") -> Note:
        """Replace a note's text, and its title where one is given."""
        title = title or self._one(id).title
        statement = "UPDATE notes SET title = ?, text = ?, changed = datetime() WHERE id = ?"
        self._database.execute(statement, (title, text, id))
        await self._changed(id)
        return self._one(id)

    async def ask(self, id: int) -> Json:
        """What the user is asked before `delete`: by input_required or elicitation/create."""
        from mcp.server.mcpserver import Elicit

        return Elicit(f'Delete note {id}, "{self._one(id).title}"? For good.', Confirmation)

    async def delete(self, id: _NoteId, answer: Json) -> str:
        """Delete a note for good. The user is asked first, and may say no."""
        if answer.action != "accept" or not answer.data.delete:
            return f"Note {id} was kept: the user did not say yes."
        self._database.execute("DELETE FROM notes WHERE id = ?", (id,))
        await self._changed(id)
        return f"Note {id} is deleted."

    async def search(self, query: _Words = "") -> list[Note]:
        """Find notes by the words in title and text, the last changed one first."""
        words = ["%" + re.sub("([%_^])", r"^\1", word) + "%" for word in query.split()[:20]]
        holds = ["title || ' ' || text LIKE ? ESCAPE '^'"] * len(words)
        return self.found(" AND ".join(holds) or "1", *words)[:FOUND]

    async def read(self, id: str) -> str:
        """One note, by its number."""
        from mcp.server.mcpserver.exceptions import ResourceNotFoundError

        if notes := self.found("id = ?", id):
            return f"{notes[0].title}\n\n{notes[0].text}"
        raise ResourceNotFoundError(f"there is no note://{id}")

    async def summarize(self, topic: _Words = "") -> str:
        """Ask for a summary of the notes about a topic."""
        notes = [f"## {note.id}: {note.title}\n{note.text}" for note in await self.search(topic)]
        return "\n\n".join(["Summarize these notes; name each by its number.", *notes])

    def found(self, where: str, *values: str | int) -> list[Note]:
        """The notes that a condition of SQL holds for."""
        order = f"ORDER BY changed DESC, id DESC LIMIT {LISTED}"
        rows = self._database.execute(f"SELECT * FROM notes WHERE {where} {order}", values)
        return [Note(**row) for row in rows]

    def _one(self, ident: int) -> Note:
        if notes := self.found("id = ?", ident):
            return notes[0]
        raise _for_model(f"there is no note {ident}; search finds those that there are")

    async def _changed(self, ident: int) -> None:
        from mcp.server.subscriptions import ResourcesListChanged, ResourceUpdated

        await self.bus.publish(ResourcesListChanged())
        await self.bus.publish(ResourceUpdated(uri=f"note://{ident}"))


async def _tell_why(ctx: ServerRequestContext, call_next: CallNext) -> HandlerResult:
    """A question that could not be asked ends in a result: the model never reads an error."""
    from mcp import MCPError
    from mcp_types import CallToolResult, TextContent

    try:
        return await call_next(ctx)
    except MCPError as error:
        if ctx.method != "tools/call":
            raise
        why = f"The note was not deleted: the user cannot be asked by elicitation ({error})"
        return CallToolResult(content=[TextContent(text=why)], is_error=True)


async def _serve_notes(given: str) -> None:
    from mcp.server.mcpserver import ElicitationResult, MCPServer, Resolve
    from mcp_types import Resource

    notes = _Notes(given)

    class Server(MCPServer[Any]):
        async def list_resources(self) -> list[Resource]:
            # Those of this moment, and not what was registered: they come and go.
            found = [(f"note://{note.id}", note.title) for note in notes.found("1")]
            return [Resource(uri=uri, name=uri, title=title) for uri, title in found]

    about = "Notes that last. Search before you add; each note is also note://ID."
    server = Server(
        "notes", version=VERSION, instructions=about, log_level="WARNING",
        subscriptions=notes.bus, middleware=[_tell_why],
    )  # fmt: skip
    # By hand: the SDK reads annotations in the module's names, and these exist only in here.
    answer = Annotated[ElicitationResult[Confirmation], Resolve(notes.ask)]
    _Notes.delete.__annotations__["answer"] = answer
    changes = _hints("destructiveHint", "idempotentHint")
    server.add_tool(notes.add, title="Add a note", annotations=_hints())
    server.add_tool(notes.edit, title="Edit a note", annotations=changes)
    server.add_tool(notes.delete, title="Delete a note", annotations=changes)
    reads = _hints("readOnlyHint", "idempotentHint")
    server.add_tool(notes.search, title="Search the notes", annotations=reads)
    server.resource("note://{id}", name="note", mime_type="text/plain")(notes.read)
    server.prompt("summarize", "Summarize notes")(notes.summarize)
    await server.run_stdio_async()


# ==== Commands ====================================================================
# The command line: one function per command, and `main`. Knows how to talk to a person at a shell.
# Must not know how anything is done.

USAGE: Final = """\
Atrax: every MCP server you have, behind one HTTP endpoint.

usage: python atrax.pyz COMMAND

  serve [config.json]    serve all servers of the config at one URL
    --host H, --port N   listen there, whatever the config says
    --socket PATH        listen on a Unix socket
  check [config.json]    start every server once; print what each offers and may do
    --json               the same for programs
  pin [config.json]      approve the tools that the servers with "pin" have now
  token NAME             make a bearer token for NAME; print it once, and its entry for auth.tokens
  schema                 print the JSON Schema of the config
  version                print version, Python, platform and native modules

For example, with this in config.json:

  {"mcpServers": {"time": {"command": "uvx", "args": ["mcp-server-time"]}}}

  python atrax.pyz serve config.json
  claude mcp add --transport http atrax http://127.0.0.1:4000/mcp
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code: 0 fine, 1 the work failed, 2 wrong usage or config."""
    # A stream that was closed before we came (`>&-`) is None here, and has no isatty or flush.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    try:
        return _command(list(sys.argv[1:] if argv is None else argv))
    except AtraxError as error:
        print(error, file=sys.stderr)
        return error.exit
    except KeyboardInterrupt:
        return 1
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # Whoever read us has seen enough; the interpreter must not flush into nothing at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if error.errno == errno.ENOSPC:
            print(f"atrax: stdout cannot be written: {error.strerror}", file=sys.stderr)
        return 1


def _command(argv: list[str]) -> int:
    if not argv:
        print(USAGE, end="", file=sys.stderr)
        return 2
    name, rest = argv[0].removeprefix("--"), argv[1:]
    if name == "bundled":  # what `"command": "bundled:NAME"` starts; not for people
        return run_embedded(rest)
    if name == "help" or {"-h", "--help"} & set(argv):
        print(USAGE, end="")
        return 0
    if name not in COMMANDS:
        hint = _near(name, COMMANDS) or f"Commands: {', '.join(COMMANDS)}."
        raise UsageError(f'atrax: there is no command "{name}". {hint}\n{_HELP}')
    code = COMMANDS[name](rest)
    sys.stdout.flush()
    return code


_HELP: Final = "python atrax.pyz --help shows how it is used"


class _Arguments(argparse.ArgumentParser):
    """A command's arguments; what is wrong with them is a UsageError of two lines."""

    def __init__(self, command: str, config: bool = False) -> None:
        super().__init__(prog=f"atrax {command}", add_help=False, allow_abbrev=False)
        if config:
            self.add_argument("config", nargs="?", default="config.json")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}\n{_HELP}")


def serve_command(argv: Sequence[str]) -> int:
    """The gateway."""
    parser = _Arguments("serve", config=True)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--socket", type=os.path.abspath)
    given = vars(parser.parse_args(argv))
    path = given.pop("config")
    overrides = {key: value for key, value in given.items() if value is not None}
    if "socket" in overrides and len(overrides) > 1:
        parser.error("--socket is instead of --host and --port")
    load = functools.partial(Config.load, path, overrides=overrides)
    return run(lambda loop: serve(load, loop, show_startup))


def check_command(argv: Sequence[str]) -> int:
    """Validates the config and starts every server once."""
    parser = _Arguments("check", config=True)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(argv)
    config = Config.load(given.config)
    reports: list[tuple[dict[str, dict[str, Json]], float]] = []

    async def work(loop: asyncio.AbstractEventLoop) -> int:
        reports.append(await check(config, loop))
        return 0

    with _waiting("starting the servers …"):
        run(work)
    status, took = reports[0]
    if given.json:
        report = {"servers": status, "seconds": round(took, 3), "remarks": config.remarks}
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print(check_report(status, took, config.remarks, _paint(sys.stdout)))
    # Still starting after its whole start_timeout is as good as failed.
    return int(any(server["state"] in (*_FAILED, "starting") for server in status.values()))


def pin_command(argv: Sequence[str]) -> int:
    """Approves the tools that the servers with `pin` have now."""
    config = Config.load(_Arguments("pin", config=True).parse_args(argv).config)
    if not any(one.pin and not one.disabled for one in config.servers.values()):
        where = f"{config.path}: no server has " if config.path else "no server has "
        raise UsageError(f'{where}"pin": true. Set it for those whose tools you want to approve')
    reports: list[tuple[dict[str, Approval], list[str], bool]] = []

    async def work(loop: asyncio.AbstractEventLoop) -> int:
        reports.append(await approve_all(config, loop))
        return 0

    with _waiting("reading the tools …"):
        run(work)
    found, dropped, written = reports[0]
    paint = _paint(sys.stdout)
    lines = [line for name, one in found.items() for line in _approval_lines(name, one, paint)]
    lines += [f"{name}: not in the config any more; its approvals are dropped" for name in dropped]
    does = "is written; a gateway that runs reads it at SIGHUP" if written else "is unchanged"
    print("\n".join([*lines, f"{config.lock} {does}"]))
    return int(any(one.error for one in found.values()))


def _approval_lines(name: str, found: Approval, paint: _Paint) -> Iterator[str]:
    if found.error:
        why = f"cannot be read, so its approvals stay as they were: {found.error}"
        yield f"{name}: " + paint(_printable(why), "bad")
        return
    said = {"new": len(found.new), "changed": len(found.changed), "gone": len(found.gone)}
    counts = ", ".join(f"{number} {word}" for word, number in said.items() if number)
    tools = f"{found.tools} tool{'s' * (found.tools != 1)}"
    yield f"{name}: {tools} approved" + (f" ({counts})" if counts else ", none new or changed")
    for word, tools_of in (("new", found.new), ("changed", found.changed)):
        for own, changed in tools_of.items():
            yield f"  {word} {paint(_printable(own), 'strong')}"
            yield from _change_lines(changed)
    for own in found.gone:
        yield f"  gone {_printable(own)}: no alarm, nobody can call it; its approval is dropped"


def _change_lines(changes: Iterable[Mapping[str, str]]) -> Iterator[str]:
    """A diff for people: what a member was, and is."""
    for change in changes:
        was, now = (change.get(key) for key in ("was", "is"))
        yield "    " + _printable(change["member"])
        yield from (f"      {sign} {_printable(one)}" for sign, one in (("-", was), ("+", now))
                    if one is not None)  # fmt: skip


def token_command(argv: Sequence[str]) -> int:
    """A new bearer token and its entry for the config; nothing is kept."""
    parser = _Arguments("token")
    parser.add_argument("name", metavar="NAME")
    name = parser.parse_args(argv).name
    token = "atrax_" + secrets.token_urlsafe(32)
    digest = hashlib.sha256(token.encode()).hexdigest()
    entry = {"name": name, "hash": f"sha256:{digest}"}
    try:
        Token.model_validate(entry)
    except ValidationError:
        parser.error("NAME must have 1 to 128 characters and no control characters")
    # The words to stderr, so that a script reads nothing but the token and its entry.
    print("The token, shown this once; give it to its holder and to nobody else:", file=sys.stderr)
    print(token, flush=True)
    place = '"auth": {"type": "token", "tokens": [ … ]}'
    print(f"Its entry for {place} in the config:", file=sys.stderr)
    print(json.dumps(entry, ensure_ascii=False))
    return 0


def schema_command(argv: Sequence[str]) -> int:
    """The JSON Schema of the config."""
    _Arguments("schema").parse_args(argv)
    print(json.dumps(config_schema(), indent=2, ensure_ascii=False))
    return 0


def version_command(argv: Sequence[str]) -> int:
    """Version, Python, platform, native modules."""
    import platform

    _Arguments("version").parse_args(argv)
    print(f"atrax {VERSION}, from {ARCHIVE or os.path.abspath(__file__)}")
    print(f"python {platform.python_version()} ({sys.executable})")
    print(f"platform {platform.platform()}")
    for name, native in NATIVE.items():
        print(f"{name} {_native(name, native)}")
    return 0


COMMANDS: Final[dict[str, Callable[[Sequence[str]], int]]] = {
    "serve": serve_command,
    "check": check_command,
    "pin": pin_command,
    "token": token_command,
    "schema": schema_command,
    "version": version_command,
}
NATIVE: Final = {"orjson": "orjson.orjson", "pydantic_core": "pydantic_core._pydantic_core",
                 "uvloop": "uvloop.loop"}  # fmt: skip


def _native(name: str, native: str) -> str:
    """Version of a native module, and where it was loaded from."""
    try:
        module, spec = importlib.import_module(name), importlib.import_module(native).__spec__
    except ImportError:
        return "not there: asyncio's own event loop is used" if name == "uvloop" else "missing"
    origin = (spec and spec.origin) or "somewhere"
    where = "memory" if origin.startswith("/proc/self/fd/") else origin
    return f"{getattr(module, '__version__', '?')} ({where})"


# ---- What a person sees ----


_Paint: TypeAlias = Callable[[str, str], str]  # text and a key of _COLOURS to text
_COLOURS: Final = {"good": "32", "bad": "31", "dim": "2", "strong": "1"}
_FAILED: Final = ("failed", "backoff")


def plain(text: str, _: str) -> str:
    """No colours."""
    return text


def _paint(stream: TextIO) -> _Paint:
    # https://no-color.org: set and not empty.
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return plain
    return lambda text, colour: f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


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
    if notes := _notes(status):
        parts += ["", *(paint(note, "bad") for note in notes)]
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
        for sentence in server.get("allowed", ()):
            lines.append(f"  {name} may {_printable(sentence)}")
        for item in server.get("hidden", ()):
            hidden = f"{name}: {item['name']} is hidden: {item['reason']}"
            lines.append("  " + _printable(hidden))
            lines += _change_lines(item.get("changes", ()))
        for item in server.get("warnings", ()):
            warning = f"{name}: {item['name'] or item['kind']}: {item['warning']}"
            lines.append("  " + paint(_printable(warning), "bad"))
    if any("what programs need" in line for line in lines):
        lines.append(f"  what programs need to run: {ALWAYS_SHOWN}")
    troubled = sum(server.get("state") in _FAILED for server in status.values())
    outcome = paint(f"{troubled} failed", "bad") if troubled else paint("all fine", "good")
    total = f"{len(status)} server{'s' * (len(status) != 1)} in {took:.1f} s, {outcome}"
    return "\n".join([*map(_printable, remarks), *lines, total])


def _endpoint(url: str) -> str:
    return url if url.startswith("unix:") or url.endswith("/mcp") else url.rstrip("/") + "/mcp"


def _server_lines(status: Mapping[str, Mapping[str, Json]], paint: _Paint) -> list[str]:
    """One line per server; a reason in its place where there is nothing to count."""
    wide = max((len(name) for name in status), default=0)
    wider = max((len(server["state"]) for server in status.values()), default=0)
    lines = []
    for name, server in status.items():
        state = server["state"]
        colour = "bad" if state in _FAILED else "good" if state == "ready" else "dim"
        shown = paint(f"{state:<{wider}}", colour)
        lines.append(f"  {name:<{wide}}  {shown}  {_about(server)}".rstrip())
        ways = (paint(_printable(way), "bad") for way in server.get("open", ()))
        lines += [f"  {name:<{wide}}  {way}" for way in ways]
    return lines


def _notes(status: Mapping[str, Mapping[str, Json]]) -> list[str]:
    """What nobody should overlook: tools that wait for approval, hidden text, taken names."""
    notes = []
    for name, server in status.items():
        waiting = [
            f"{one['name']} is hidden: {one['reason']}"
            for one in server.get("hidden", ())
            if "digest" in one
        ]
        warned = [
            f"{one['name'] or one['kind']}: {one['warning']}" for one in server.get("warnings", ())
        ]
        for texts in (waiting, warned):
            notes += [f"{name}: {_printable(text)}" for text in texts[:3]]
            if len(texts) > 3:
                notes.append(f"{name}: and {len(texts) - 3} more; /status lists them")
    return notes


def _about(server: Mapping[str, Json]) -> str:
    down = server["state"] in (*_FAILED, "starting")  # a start that follows a failure
    wrong = server.get("lastError") if down else server.get("error")
    if wrong:
        return _printable(wrong)
    parts = [server["era"]] if server.get("era") else []
    for key, one in (("tools", "tool"), ("resources", "resource"), ("prompts", "prompt"),
                     ("resourceTemplates", "resource template")):  # fmt: skip
        if number := server.get(key):
            parts.append(f"{number} {one}" if number == 1 else f"{number} {one}s")
    if "took" in server:
        parts.append(f"{server['took']:.2f} s")
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
