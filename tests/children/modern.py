"""An MCP server of the modern era alone (2026-07-28) on stdio.

Its habits: every request needs its `_meta`; `initialize` is refused by -32022; it asks by
`input_required`, with a requestState that is sealed by a key of this process, bound to the request
and short-lived; it logs only what a request's logLevel asks for; changes travel on
subscriptions/listen; tools become tasks where the client declares io.modelcontextprotocol/tasks.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import json
import secrets
import sys
import threading
import time
from typing import Any

import everything
from everything import Asks, Background, Changed, Failure, Log, Progress, Sleep

Json = Any
VERSION = "2026-07-28"
META = "io.modelcontextprotocol/"
TASKS = META + "tasks"
LEVELS = ("debug", "info", "notice", "warning", "error", "critical", "alert", "emergency")
KINDS = {
    "elicitation/create": "elicitation",
    "sampling/createMessage": "sampling",
    "roots/list": "roots",
}
CACHEABLE = (
    "server/discover",
    "tools/list",
    "prompts/list",
    "resources/list",
    "resources/templates/list",
    "resources/read",
)
FILTERS = {
    "tools": "toolsListChanged",
    "prompts": "promptsListChanged",
    "resources": "resourcesListChanged",
}
STATE_LIFE = 600  # seconds
KEY = secrets.token_bytes(32)
OUTPUT = threading.Lock()


def write(message: Json) -> None:
    """One line on stdout."""
    with OUTPUT:
        sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}, separators=(",", ":")) + "\n")
        sys.stdout.flush()


def notify(method: str, params: Json) -> None:
    """A notification."""
    write({"method": f"notifications/{method}", "params": params})


def seal(answers: Json, request: str) -> str:
    """A requestState: what was answered so far, for this request alone."""
    body = json.dumps({"answers": answers, "request": request, "until": time.time() + STATE_LIFE})
    text = base64.urlsafe_b64encode(body.encode())
    return f"{text.decode()}.{hmac.new(KEY, text, hashlib.sha256).hexdigest()}"


def unseal(state: Json, request: str) -> Json:
    """What `seal` was given; raises -32602 for anything else."""
    text, _, mark = state.rpartition(".") if isinstance(state, str) else ("", "", "")
    right = hmac.new(KEY, text.encode(), hashlib.sha256).hexdigest()
    if not hmac.compare_digest(right.encode(), mark.encode()):
        raise Failure(-32602, "requestState is not one of ours")
    body = json.loads(base64.urlsafe_b64decode(text))
    if body["request"] != request or body["until"] < time.time():
        raise Failure(-32602, "requestState has expired or belongs to another request")
    return body["answers"]


def missing(capabilities: Json) -> Failure:
    """What the client would have had to declare (-32021)."""
    return Failure(
        -32021, "Missing required client capability", {"requiredCapabilities": capabilities}
    )


class InputRequired(Exception):
    """The call cannot go on without these answers."""

    def __init__(self, requests: Json) -> None:
        super().__init__("input required")
        self.requests = requests


class Cancelled(Exception):
    """Nobody waits for the answer."""


class Run:
    """One request: its envelope, and the steps of the tool or prompt that it calls."""

    def __init__(self, server: Server, ident: Json, method: str, params: Json) -> None:
        meta = params["_meta"]
        self.server, self.ident, self.method, self.params = server, ident, method, params
        self.capabilities: Json = meta[META + "clientCapabilities"]
        self.level = LEVELS.index(meta[META + "logLevel"]) if META + "logLevel" in meta else None
        self.token: Json = meta.get("progressToken")
        self.cancelled = threading.Event()
        self.answers: Json = {}
        self.task: Task | None = None

    @property
    def with_tasks(self) -> bool:
        return TASKS in (self.capabilities.get("extensions") or {})

    def __call__(self) -> None:
        """Carry out the steps, then answer."""
        try:
            result = self.result()
        except Cancelled:
            return
        except Failure as failure:
            self.server.fail(self.ident, failure)
            return
        finally:
            self.server.running.pop(self.ident, None)
        if self.task is None and not self.cancelled.is_set():
            self.server.reply(self.ident, self.method, result)

    def result(self) -> Json:
        found = self.find()
        if getattr(found, "task", "") == "required" and not self.with_tasks:
            raise missing({"extensions": {TASKS: {}}})
        arguments = self.params.get("arguments") or {}
        request = hashlib.sha256(
            json.dumps([self.method, found.name, arguments]).encode()
        ).hexdigest()
        if "requestState" in self.params:
            self.answers = unseal(self.params["requestState"], request)
        if "inputResponses" in self.params:
            given = self.params["inputResponses"]
            if not isinstance(given, dict):
                raise Failure(-32602, "inputResponses must be an object")
            self.answers |= {key: value for key, value in given.items() if isinstance(value, dict)}
        try:
            return self.steps(found.run(self.server.world, arguments))
        except InputRequired as required:
            return {
                "resultType": "input_required",
                "inputRequests": required.requests,
                "requestState": seal(self.answers, request),
            }
        except ValueError as error:
            if self.method == "tools/call":
                return everything.text(str(error), isError=True)
            raise Failure(-32603, str(error)) from error

    def find(self) -> Any:
        world = self.server.world
        known: Json = (
            everything.tools(world, tasks=True)
            if self.method == "tools/call"
            else everything.prompts(world)
        )
        for one in known:
            if one.name == self.params.get("name"):
                return one
        raise Failure(-32602, f"Unknown name: {self.params.get('name')}")

    def steps(self, run: everything.Steps) -> Json:
        answer: Json = None
        while True:
            if self.cancelled.is_set():
                raise Cancelled
            try:
                step = run.send(answer)
            except StopIteration as end:
                return end.value
            if isinstance(step, Background) and self.with_tasks and self.task is None:
                self.task = Task(self)
                threading.Thread(target=self.task, args=(run,), daemon=True).start()
                return None
            answer = self.step(step)

    def step(self, step: Any) -> Json:
        if isinstance(step, Sleep):
            self.cancelled.wait(step.seconds)
        elif isinstance(step, Log) and self.level is not None:
            if LEVELS.index(step.level) >= self.level:
                notify("message", {"level": step.level, "logger": "everything", "data": step.text})
        elif isinstance(step, Progress) and self.token is not None:
            progress = {"progress": step.done, "total": step.total}
            notify("progress", {"progressToken": self.token, **progress})
        elif isinstance(step, Changed):
            self.server.changed(step.what)
        elif isinstance(step, Asks):
            return self.ask(step)
        return None

    def ask(self, step: Asks) -> Json:
        """The answers, where all are there; else the call ends and is made again with them."""
        wanted: Json = {}
        for key, (method, params) in step.requests.items():
            if KINDS[method] in self.capabilities:
                wanted[key] = {"method": method, "params": params}
            elif not step.optional:
                raise missing({KINDS[method]: {}})
        if self.task is not None:
            self.task.ask(wanted)
        elif open_now := {
            key: request for key, request in wanted.items() if key not in self.answers
        }:
            raise InputRequired(open_now)
        return {key: self.answers.get(key) for key in step.requests}


class Task:
    """A call that goes on after it was answered (extension io.modelcontextprotocol/tasks)."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.ident = secrets.token_hex(16)
        self.created = self.updated = self.now()
        self.status = "working"
        self.end: Json = {}
        self.requests: Json = {}
        self.answered = threading.Event()
        self.changing = threading.RLock()
        run.server.reply(run.ident, run.method, {"resultType": "task", **self.body()}, self)

    @staticmethod
    def now() -> str:
        return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")

    def body(self) -> Json:
        """The Task."""
        return {
            "taskId": self.ident,
            "status": self.status,
            "createdAt": self.created,
            "lastUpdatedAt": self.updated,
            "ttlMs": 600_000,
            "pollIntervalMs": 100,
        }

    def detail(self) -> Json:
        """The DetailedTask."""
        with self.changing:
            waiting = {"inputRequests": self.requests} if self.requests else {}
            return {**self.body(), **waiting, **self.end}

    def move(self, status: str, **end: Json) -> None:
        """Change the state, but never out of a final one."""
        with self.changing:
            if self.status not in ("working", "input_required"):
                return
            self.status, self.end, self.updated = status, end, self.now()
        self.run.server.task_changed(self)

    def __call__(self, run: everything.Steps) -> None:
        try:
            self.move("completed", result=self.run.steps(run))
        except Failure as failure:
            self.move("failed", error={"code": failure.code, "message": failure.message})
        except ValueError as error:
            self.move("completed", result=everything.text(str(error), isError=True))
        except Cancelled:
            self.cancel()

    def ask(self, requests: Json) -> None:
        """Wait until every request was answered by tasks/update."""
        with self.changing:
            self.requests = dict(requests)
        self.move("input_required")
        while self.requests and not self.run.cancelled.is_set():
            self.answered.wait(0.2)
            self.answered.clear()
        if self.run.cancelled.is_set():
            raise Cancelled
        self.move("working")

    def update(self, responses: Json) -> None:
        with self.changing:
            for key, answer in responses.items():
                if key in self.requests and isinstance(answer, dict):
                    del self.requests[key]
                    self.run.answers[key] = answer
        self.answered.set()

    def cancel(self) -> None:
        with self.changing:
            self.requests = {}
        self.move("cancelled")
        self.run.cancelled.set()


class Server:
    """All that this process serves."""

    def __init__(self) -> None:
        self.world = everything.World()
        self.running: dict[Json, Run] = {}
        self.tasks: dict[str, Task] = {}
        self.listens: dict[Json, Json] = {}  # the id of a subscriptions/listen: its filter

    def receive(self, message: Json) -> None:
        """One message of the client."""
        method, ident = message.get("method"), message.get("id")
        params = message.get("params") or {}
        if method is None:
            return
        if ident is None:
            if method == "notifications/cancelled":
                self.cancel(params.get("requestId"))
            return
        try:
            self.request(ident, method, params)
        except Failure as failure:
            self.fail(ident, failure)

    def cancel(self, ident: Json) -> None:
        self.listens.pop(ident, None)
        run = self.running.get(ident)
        if run is not None and run.task is None:
            run.cancelled.set()

    def request(self, ident: Json, method: str, params: Json) -> None:
        if method == "initialize":
            requested = params.get("protocolVersion")
            raise Failure(
                -32022,
                f"Unsupported protocol version: this server speaks {VERSION} alone",
                {"supported": [VERSION], "requested": requested},
            )
        self.check(params)
        if method in ("tools/call", "prompts/get"):
            run = self.running[ident] = Run(self, ident, method, params)
            threading.Thread(target=run, daemon=True).start()
        elif method == "subscriptions/listen":
            self.listen(ident, params.get("notifications") or {})
        else:
            self.reply(ident, method, self.answer(method, params))

    def check(self, params: Json) -> None:
        """The envelope of a modern request (2026-07-28, basic/index, _meta)."""
        meta = params.get("_meta")
        if not isinstance(meta, dict) or META + "protocolVersion" not in meta:
            raise Failure(-32602, f"_meta must name {META}protocolVersion")
        version = meta[META + "protocolVersion"]
        if version != VERSION:
            supported = {"supported": [VERSION], "requested": version}
            raise Failure(-32022, "Unsupported protocol version", supported)
        if not isinstance(meta.get(META + "clientCapabilities"), dict):
            raise Failure(-32602, f"_meta must name {META}clientCapabilities")
        if meta.get(META + "logLevel", LEVELS[0]) not in LEVELS:
            raise Failure(-32602, "unknown logLevel")

    def answer(self, method: str, params: Json) -> Json:
        """The result of a request that takes no time."""
        if method == "server/discover":
            return self.discover()
        if method == "resources/read":
            contents = everything.read(self.world, params["uri"])
            if contents is None:
                raise Failure(-32602, "Resource not found", {"uri": params["uri"]})
            return {"contents": [contents]}
        if method in ("tasks/get", "tasks/update", "tasks/cancel"):
            return self.on_task(method, params)
        result = everything.plain(self.world, method, params, tasks=True)
        if result is None:
            raise Failure(-32601, f"Method not found: {method}")
        return result

    def discover(self) -> Json:
        capabilities = {**everything.CAPABILITIES, "extensions": {TASKS: {}}}
        return {
            "supportedVersions": [VERSION],
            "capabilities": capabilities,
            "instructions": everything.INSTRUCTIONS,
        }

    def on_task(self, method: str, params: Json) -> Json:
        declared = params["_meta"][META + "clientCapabilities"].get("extensions") or {}
        if TASKS not in declared:
            raise missing({"extensions": {TASKS: {}}})
        task = self.tasks.get(str(params.get("taskId")))
        if task is None:
            raise Failure(-32602, "Unknown task")
        if method == "tasks/get":
            return task.detail()
        if method == "tasks/update":
            task.update(params.get("inputResponses") or {})
        else:
            task.cancel()
        return {}

    # ---- subscriptions ----

    def listen(self, ident: Json, wanted: Json) -> None:
        """Open a stream: the acknowledgement names what is honoured."""
        honoured: Json = {name: True for name in FILTERS.values() if wanted.get(name) is True}
        if uris := [
            uri for uri in wanted.get("resourceSubscriptions") or [] if isinstance(uri, str)
        ]:
            honoured["resourceSubscriptions"] = uris
        if ids := [one for one in wanted.get("taskIds") or [] if one in self.tasks]:
            honoured["taskIds"] = ids
        self.listens[ident] = honoured
        self.tell(ident, "subscriptions/acknowledged", {"notifications": honoured})

    def tell(self, ident: Json, method: str, params: Json) -> None:
        notify(method, {"_meta": {META + "subscriptionId": ident}, **params})

    def changed(self, what: str) -> None:
        for ident, wanted in list(self.listens.items()):
            if wanted.get(FILTERS.get(what, "")):
                self.tell(ident, f"{what}/list_changed", {})
            elif what in wanted.get("resourceSubscriptions", ()):
                self.tell(ident, "resources/updated", {"uri": what})

    def task_changed(self, task: Task) -> None:
        for ident, wanted in list(self.listens.items()):
            if task.ident in wanted.get("taskIds", ()):
                self.tell(ident, "tasks", task.detail())

    # ---- answers ----

    def reply(self, ident: Json, method: str, result: Json, task: Task | None = None) -> None:
        if task is not None:  # durable before it is told: tasks/get may follow at once
            self.tasks[task.ident] = task
        info = {META + "serverInfo": {"name": "modern-everything", **everything.SERVER}}
        body = {
            "resultType": "complete",
            **result,
            "_meta": {**(result.get("_meta") or {}), **info},
        }
        if method in CACHEABLE:
            body |= {"ttlMs": 60_000, "cacheScope": "public"}
        write({"id": ident, "result": body})

    def fail(self, ident: Json, failure: Failure) -> None:
        error = {"code": failure.code, "message": failure.message}
        if failure.data is not None:
            error["data"] = failure.data
        write({"id": ident, "error": error})


def main() -> None:
    """Serve until stdin closes, then end every listen by its result."""
    server = Server()
    for line in sys.stdin.buffer:
        try:
            message = json.loads(line)
        except ValueError:
            write({"id": None, "error": {"code": -32700, "message": "Parse error"}})
            continue
        if isinstance(message, dict):
            server.receive(message)
    for ident in server.listens:
        meta = {META + "subscriptionId": ident}
        write({"id": ident, "result": {"resultType": "complete", "_meta": meta}})


if __name__ == "__main__":
    main()
