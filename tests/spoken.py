"""What Atrax says, checked against the schema of the version in which it is said: every message of every test.

A Peer stands for one client or one child. `sent` tells it what that one said, `heard` what Atrax said to it, and
raises Malformed where that is not what the peer's version of MCP allows. wire.py has a Peer for each client, and
children/tap.py writes down what a child hears: conftest.py puts both in place, for each test, unasked.

The judge is `mcp_types.methods`, which is no part of Atrax. What it cannot judge is said here by name: what MCP
leaves to extensions and tasks (only the envelope is checked), and rules that its models, which ignore unknown
members and know eras rather than versions, do not hold (`_extra`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from mcp_types import methods
from mcp_types.jsonrpc import JSONRPCError, JSONRPCNotification, JSONRPCRequest, JSONRPCResponse

Json = Any
MODERN: Final = "2026-07-28"
LEGACY: Final = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
META: Final = "io.modelcontextprotocol/"

# Gaps of the judge: it has no models for tasks, in neither era, and none for methods of extensions.
TASKS: Final = frozenset({
    "tasks/get", "tasks/update", "tasks/cancel", "tasks/result", "tasks/list", "notifications/tasks",
    "notifications/tasks/status",
})  # fmt: skip
KNOWN: Final = frozenset(
    method
    for table in (
        methods.CLIENT_REQUESTS, methods.CLIENT_NOTIFICATIONS, methods.SERVER_REQUESTS,
        methods.SERVER_NOTIFICATIONS,
    )
    for method, _ in table
)  # fmt: skip
CONTENT_SINCE: Final = {"audio": "2025-03-26", "resource_link": "2025-06-18"}
MODERN_RESULT: Final = frozenset({"resultType", "ttlMs", "cacheScope"})
MODERN_META: Final = frozenset(
    META + name
    for name in ("protocolVersion", "clientInfo", "clientCapabilities", "logLevel", "serverInfo", "subscriptionId")
)  # fmt: skip
# Of the codes that are reserved for the specification (2026-07-28, basic/index, Error Codes) those that it has.
MODERN_CODES: Final = (-32020, -32021, -32022)
OWN_CODES: Final = (1099,)  # Atrax's own, which must never leave it


class Malformed(AssertionError):
    """Atrax said what it may not say."""


class Peer:
    """One client (`client`) or child (not), and what was said with it.

    `version` None: it comes with `initialize`, or, from a child, with what it answers to the probe."""

    def __init__(self, client: bool, version: str | None = None) -> None:
        self.client, self.version = client, version
        self.complaints: list[str] = []
        self._asked: dict[Json, Json] = {}  # the peer's own requests, by id
        self._ids: dict[Json, Json] = {}  # Atrax's requests, by id
        self._greeted = False  # notifications/initialized was heard

    def sent(self, message: Json) -> None:
        """The peer said this; whatever it is worth."""
        for one in message if isinstance(message, list) else [message]:
            if not isinstance(one, dict):
                continue
            if isinstance(one.get("method"), str) and "id" in one:
                self._asked[_key(one["id"])] = one
            elif "result" in one and not self.client:
                self._answered(one)

    def heard(self, message: Json) -> None:
        """Atrax said this to the peer; raises Malformed."""
        for one in message if isinstance(message, list) else [message]:
            try:
                if isinstance(message, list) and self._version != "2025-03-26":
                    raise ValueError(f"a batch, which {self._version} does not have")
                self._hear(one)
            except (ValueError, KeyError, TypeError) as error:
                who = "client" if self.client else "child"
                text = (
                    f"Atrax said to a {who} of {self._version}: {json.dumps(one)[:2000]}\n{error}"
                )
                self.complaints.append(text)
                raise Malformed(text) from None

    @property
    def _version(self) -> str:
        return self.version or "2025-03-26"  # what a request without a session speaks

    def _hear(self, message: Json) -> None:
        if not isinstance(message, dict):
            raise ValueError("not an object")
        method = message.get("method")
        if method is None:
            self._hear_response(message)
        elif "id" in message:
            JSONRPCRequest.model_validate(message, strict=True)
            self._hear_request(message["id"], method, message.get("params"))
        else:
            JSONRPCNotification.model_validate(message, strict=True)
            self._hear_notification(method, message.get("params"))

    # ---- what Atrax asks ----

    def _hear_request(self, ident: Json, method: str, params: Json) -> None:
        if _key(ident) in self._ids:
            raise ValueError("its id was used before (basic/index, Requests: MUST NOT)")
        self._ids[_key(ident)] = {"method": method, "params": params}
        version = self._version_of(method, params)
        if _unknown(method):
            return
        if self.client:
            if version == MODERN:
                raise ValueError("a request to a modern client")
            methods.parse_server_request(method, version, params)
        else:
            if version != MODERN and method not in ("initialize", "ping") and not self._greeted:
                raise ValueError("a request before notifications/initialized")
            methods.validate_client_request(method, version, params)
        _extra_meta(params, version)

    def _version_of(self, method: str, params: Json) -> str:
        if self.client or method not in ("initialize", "server/discover"):
            return self._version
        return MODERN if method == "server/discover" else str((params or {}).get("protocolVersion"))

    def _hear_notification(self, method: str, params: Json) -> None:
        self._greeted = self._greeted or method == "notifications/initialized"
        if _unknown(method):
            return
        if self.client:
            methods.parse_server_notification(method, self._version, params)
            if self._version == MODERN and method == "notifications/cancelled":
                raise ValueError(
                    "a cancellation to a modern client, which no server sends over HTTP"
                )
        else:
            methods.validate_client_notification(method, self._version, params)
        if self._version != MODERN:
            _extra_meta(params, self._version)

    # ---- what Atrax answers ----

    def _hear_response(self, message: Json) -> None:
        if "error" in message:
            JSONRPCError.model_validate(message, strict=True)
            self._hear_error(message["error"]["code"], message["error"].get("data"))
            return
        JSONRPCResponse.model_validate(message, strict=True)
        asked = self._asked.get(_key(message["id"]))
        if asked is None:
            raise ValueError("an answer to no request")
        if not self.client and self._version == MODERN:
            raise ValueError("a response to a modern child (basic/transports/stdio: MUST NOT)")
        self._hear_result(asked["method"], message["result"])

    def _hear_error(self, code: int, data: Json) -> None:
        if code in OWN_CODES:
            raise ValueError("a code that means nothing outside of Atrax")
        if self._version != MODERN:
            return
        if code == -32002 or (-32099 <= code <= -32020 and code not in MODERN_CODES):
            raise ValueError("a code that 2026-07-28 does not have")
        if code == -32021 and not isinstance((data or {}).get("requiredCapabilities"), dict):
            raise ValueError("-32021 without requiredCapabilities")
        if code == -32022 and not isinstance((data or {}).get("supported"), list):
            raise ValueError("-32022 without supported")

    def _hear_result(self, method: str, result: Json) -> None:
        if self.client and method == "initialize":
            self.version = result.get("protocolVersion")
            if self.version not in LEGACY:
                raise ValueError("a version that no client can have asked for")
        if self._version != MODERN:
            _extra_result(result, self._version)
        if _unknown(method) or _is_task(result):
            return
        if self.client:
            methods.parse_server_result(method, self._version, result)
        else:
            methods.validate_client_result(method, self._version, result)

    def _answered(self, message: Json) -> None:
        """A child's answer to the probe settles what is said with it from now on."""
        asked = self._ids.get(_key(message.get("id")))
        result = message["result"]
        if not asked or not isinstance(result, dict):
            return
        if asked["method"] == "initialize" and result.get("protocolVersion") in LEGACY:
            self.version = result["protocolVersion"]
        elif asked["method"] == "server/discover" and MODERN in (
            result.get("supportedVersions") or ()
        ):
            self.version = MODERN


def _key(ident: Json) -> Json:
    """An id as a key: 1, "1" and true are three."""
    return (type(ident).__name__, ident)


def _unknown(method: str) -> bool:
    """Whether the judge has never heard of `method`, in any version."""
    return method in TASKS or method not in KNOWN


def _is_task(result: Json) -> bool:
    """Whether a call was answered by a task, in either era's shape."""
    return result.get("resultType") == "task" or "task" in result


def _extra_result(result: Json, version: str) -> None:
    """What a legacy result must not have, though a model that ignores members lets it pass."""
    if extra := MODERN_RESULT & result.keys():
        raise ValueError(f"{', '.join(sorted(extra))}: {version} does not have that")
    _extra_meta(result, version)
    blocks = result.get("content")
    for block in blocks if isinstance(blocks, list) else ():
        kind = block.get("type") if isinstance(block, dict) else None
        if version < CONTENT_SINCE.get(str(kind), ""):
            raise ValueError(f"content of type {kind}, which {version} does not have")


def _extra_meta(holder: Json, version: str) -> None:
    meta = holder.get("_meta") if isinstance(holder, dict) else None
    if version != MODERN and isinstance(meta, dict) and (extra := MODERN_META & meta.keys()):
        raise ValueError(f"{', '.join(sorted(extra))}: {version} does not have that")


# ---- Children ------------------------------------------------------------------------------


class Taps:
    """What was said to the children whose taps (children/tap.py) write to `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self._peers: dict[Path, tuple[Peer, int]] = {}  # by log: how far it was read

    def complaints(self) -> Iterator[str]:
        """What is wrong with what they heard since the last look."""
        for log in sorted(self.folder.iterdir()):
            peer, read = self._peers.get(log, (Peer(client=False), 0))
            with log.open("rb") as file:
                file.seek(read)
                *lines, rest = file.read().split(b"\n")
                self._peers[log] = (peer, file.tell() - len(rest))
            for line in lines:
                _follow(peer, line[:1], line[1:])
            yield from peer.complaints
            peer.complaints.clear()


def _follow(peer: Peer, direction: bytes, line: bytes) -> None:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        if direction == b">":
            peer.complaints.append(
                f"Atrax wrote a line to a child that is no JSON: {line[:2000]!r}"
            )
        return
    if direction == b"<":
        peer.sent(message)
        return
    try:
        peer.heard(message)
    except Malformed:
        pass  # it is among the complaints
