"""A modern child that asks as it is told, by `input_required`, and keeps what it knows in its requestState.

Its tool `act` takes `rounds`, a list of {KEY: [METHOD, PARAMS]}: each round asks that, one without keys is a
requestState alone. A state that another process made is refused, as one with another call's arguments. The result is
JSON: the process, the answers by key, and the capabilities that the client of the last round declared. `exit`, the
number of a round: in that one the process ends instead of answering. `hold` answers when the file `until` is there,
and reads nothing meanwhile."""

import base64
import json
import os
import sys
import time

VERSION = "2026-07-28"
META = "io.modelcontextprotocol/"
CACHED = ("server/discover", "tools/list")


def write(**message: object) -> None:
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    sys.stdout.flush()


def seal(state: dict) -> str:
    return base64.urlsafe_b64encode(json.dumps(state).encode()).decode()


def text(value: object) -> dict:
    return {"content": [{"type": "text", "text": json.dumps(value)}]}


def act(params: dict) -> dict:
    """The result of one round, or a ValueError."""
    arguments = params["arguments"]
    state = {"round": 0, "answers": {}, "pid": os.getpid(), "arguments": arguments}
    if "requestState" in params:
        state = json.loads(base64.urlsafe_b64decode(params["requestState"]))
        if state["pid"] != os.getpid() or state["arguments"] != arguments:
            raise ValueError("this state was not made here, or not for this call")
        state["answers"] |= params.get("inputResponses", {})
    if arguments.get("exit") == state["round"]:
        os._exit(4)
    rounds = arguments.get("rounds", [])
    if state["round"] == len(rounds):
        declared = params["_meta"][META + "clientCapabilities"]
        return text({"pid": os.getpid(), "answers": state["answers"], "declared": declared})
    wanted = rounds[state["round"]]
    state["round"] += 1
    asked: dict = {"resultType": "input_required", "requestState": seal(state)}
    if wanted:
        asked["inputRequests"] = {
            key: {"method": method, "params": ask} for key, (method, ask) in wanted.items()
        }
    return asked


def answer(method: str, params: dict) -> dict | None:
    """The result of a request; None where it is not known."""
    if method == "server/discover":
        return {"supportedVersions": [VERSION], "capabilities": {"tools": {}}}
    if method == "tools/list":
        schema = {"type": "object"}
        names = ("act", "hold")
        return {
            "tools": [
                {"name": name, "description": "Asks", "inputSchema": schema} for name in names
            ]
        }
    if method == "tools/call":
        if params["name"] == "act":
            return act(params)
        while not os.path.exists(params["arguments"]["until"]):
            time.sleep(0.005)
        return text({"pid": os.getpid()})
    return None


def main() -> None:
    for line in sys.stdin:
        message = json.loads(line)
        if "id" not in message:
            continue
        ident, method, params = message["id"], message["method"], message.get("params", {})
        try:
            result = answer(method, params)
        except ValueError as error:
            write(id=ident, error={"code": -32602, "message": str(error)})
            continue
        if result is None:
            write(id=ident, error={"code": -32601, "message": "Method not found"})
            continue
        info = {META + "serverInfo": {"name": "rounds", "version": "1"}}
        more = {"ttlMs": 60_000, "cacheScope": "public"} if method in CACHED else {}
        write(id=ident, result={"resultType": "complete", **result, **more, "_meta": info})


if __name__ == "__main__":
    main()
