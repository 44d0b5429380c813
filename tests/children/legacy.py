"""An MCP server of the legacy era alone (2024-11-05 … 2025-11-25) on stdio.

Its habits: `server/discover` is an unknown method; it asks by requests of its own, several at once
where it wants several, names their keys in `_meta["atrax/inputKey"]`, and asks nothing that was not
declared at initialize; it logs from `info` until it is told; a missing resource is -32002; a
cancelled call gets no answer.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

import everything
from everything import Asks, Background, Changed, Failure, Log, Progress, Sleep

Json = Any
VERSIONS = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
LEVELS = ("debug", "info", "notice", "warning", "error", "critical", "alert", "emergency")
KINDS = {
    "elicitation/create": "elicitation",
    "sampling/createMessage": "sampling",
    "roots/list": "roots",
}
OUTPUT = threading.Lock()


def write(message: Json) -> None:
    """One line on stdout."""
    with OUTPUT:
        sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}, separators=(",", ":")) + "\n")
        sys.stdout.flush()


def notify(method: str, **params: Json) -> None:
    """A notification."""
    write({"method": f"notifications/{method}", **({"params": params} if params else {})})


class Ask:
    """A request of ours that waits for the client."""

    def __init__(self) -> None:
        self.answered = threading.Event()
        self.result: Json = None  # None: refused


class Server:
    """The one conversation with the client."""

    def __init__(self) -> None:
        self.world = everything.World()
        self.capabilities: Json = {}
        self.level = LEVELS.index("info")
        self.asks: dict[int, Ask] = {}
        self.next_ask = 1
        self.cancelled: dict[Json, threading.Event] = {}  # by the id of a call that runs

    def receive(self, message: Json) -> None:
        """One message of the client."""
        method, ident = message.get("method"), message.get("id")
        if method is None:
            ask = self.asks.pop(ident, None) if isinstance(ident, int) else None
            if ask is not None:
                ask.result = message.get("result")
                ask.answered.set()
        elif ident is not None:
            self.request(ident, method, message.get("params") or {})
        elif method == "notifications/cancelled":
            event = self.cancelled.get((message.get("params") or {}).get("requestId"))
            if event is not None:
                event.set()

    def request(self, ident: Json, method: str, params: Json) -> None:
        """Answer at once, or from a thread of its own what may take time."""
        if method in ("tools/call", "prompts/get"):
            event = self.cancelled[ident] = threading.Event()
            run = threading.Thread(
                target=self.run, args=(ident, method, params, event), daemon=True
            )
            run.start()
            return
        try:
            write({"id": ident, "result": self.answer(method, params)})
        except Failure as failure:
            self.fail(ident, failure)

    def answer(self, method: str, params: Json) -> Json:
        """The result of a request that takes no time."""
        if method == "initialize":
            return self.initialize(params)
        if method == "ping":
            return {}
        if method == "logging/setLevel":
            if params.get("level") not in LEVELS:
                raise Failure(-32602, "unknown level")
            self.level = LEVELS.index(params["level"])
            return {}
        if method == "resources/subscribe":
            self.world.subscribed.add(params["uri"])
            return {}
        if method == "resources/unsubscribe":
            self.world.subscribed.discard(params["uri"])
            return {}
        if method == "resources/read":
            contents = everything.read(self.world, params["uri"])
            if contents is None:
                raise Failure(-32002, "Resource not found", {"uri": params["uri"]})
            return {"contents": [contents]}
        result = everything.plain(self.world, method, params, tasks=False)
        if result is None:
            raise Failure(-32601, f"Method not found: {method}")
        return result

    def initialize(self, params: Json) -> Json:
        """Take the client's capabilities, settle the version."""
        self.capabilities = params.get("capabilities") or {}
        wanted = params.get("protocolVersion")
        return {
            "protocolVersion": wanted if wanted in VERSIONS else VERSIONS[-1],
            "capabilities": everything.CAPABILITIES,
            "serverInfo": {"name": "legacy-everything", **everything.SERVER},
            "instructions": everything.INSTRUCTIONS,
        }

    def fail(self, ident: Json, failure: Failure) -> None:
        error = {"code": failure.code, "message": failure.message}
        if failure.data is not None:
            error["data"] = failure.data
        write({"id": ident, "error": error})

    # ---- calls ----

    def run(self, ident: Json, method: str, params: Json, cancelled: threading.Event) -> None:
        """Carry out the steps of a tool or prompt, then answer; a cancelled call gets no answer."""
        try:
            result = self.steps(method, params, cancelled)
            if not cancelled.is_set():
                write({"id": ident, "result": result})
        except Failure as failure:
            self.fail(ident, failure)
        except Exception as error:
            if cancelled.is_set():
                return
            if method == "tools/call":
                write({"id": ident, "result": everything.text(str(error), isError=True)})
            else:
                self.fail(ident, Failure(-32603, str(error)))
        finally:
            self.cancelled.pop(ident, None)

    def steps(self, method: str, params: Json, cancelled: threading.Event) -> Json:
        known: Json = (
            everything.tools(self.world, tasks=False)
            if method == "tools/call"
            else everything.prompts(self.world)
        )
        found = [one for one in known if one.name == params.get("name")]
        if not found:
            raise Failure(-32602, f"Unknown name: {params.get('name')}")
        run = found[0].run(self.world, params.get("arguments") or {})
        token = (params.get("_meta") or {}).get("progressToken")
        answer: Json = None
        while not cancelled.is_set():
            try:
                step = run.send(answer)
            except StopIteration as end:
                return end.value
            answer = self.step(step, token, cancelled)
        return None

    def step(self, step: Any, token: Json, cancelled: threading.Event) -> Json:
        if isinstance(step, Sleep):
            cancelled.wait(step.seconds)
        elif isinstance(step, Log) and LEVELS.index(step.level) >= self.level:
            notify("message", level=step.level, logger="everything", data=step.text)
        elif isinstance(step, Progress) and token is not None:
            notify("progress", progressToken=token, progress=step.done, total=step.total)
        elif isinstance(step, Changed):
            self.changed(step.what)
        elif isinstance(step, Asks):
            return self.ask(step, cancelled)
        elif isinstance(step, Background):
            pass
        return None

    def changed(self, what: str) -> None:
        if what in ("tools", "prompts"):
            notify(f"{what}/list_changed")
        elif what in self.world.subscribed:
            notify("resources/updated", uri=what)

    def ask(self, step: Asks, cancelled: threading.Event) -> Json:
        """Send all requests at once, wait for all answers."""
        waiting: dict[str, Ask] = {}
        for key, (method, params) in step.requests.items():
            if KINDS[method] in self.capabilities:
                ident, self.next_ask = self.next_ask, self.next_ask + 1
                waiting[key] = self.asks[ident] = Ask()
                hint = {"_meta": {"atrax/inputKey": key}}
                write({"id": ident, "method": method, "params": {**params, **hint}})
            elif not step.optional:
                raise ValueError(f"the client has not declared {KINDS[method]}")
        for ask in waiting.values():
            while not ask.answered.wait(0.2) and not cancelled.is_set():
                time.sleep(0)
        answers: Json = dict.fromkeys(step.requests)
        answers.update({key: ask.result for key, ask in waiting.items()})
        return answers


def main() -> None:
    """Serve until stdin closes."""
    server = Server()
    for line in sys.stdin.buffer:
        try:
            message = json.loads(line)
        except ValueError:
            write({"id": None, "error": {"code": -32700, "message": "Parse error"}})
            continue
        if isinstance(message, dict):
            server.receive(message)


if __name__ == "__main__":
    main()
