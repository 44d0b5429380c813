"""A legacy child that tells everybody all that it was given: its environment, its arguments and what it is asked.

Its one tool `tell` does so as {"as": HOW}: `result`, `error` (of JSON-RPC), `name` (a method that nobody knows),
`log` (a notification), `stderr` (line by line, and as JSON), `junk` (a line that is no JSON), `die` (last words).
Started with `mute` it says all of it on stderr and ends."""

import json
import os
import sys

ALL = {**os.environ, "arguments": " ".join(sys.argv[1:])}


def send(message: dict) -> None:
    print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)


def aloud(asked: str) -> None:
    for name, value in ALL.items():
        print(f"{name}={value}", file=sys.stderr)
    print(json.dumps(ALL), file=sys.stderr)
    print(json.dumps(ALL, ensure_ascii=False), asked, file=sys.stderr, flush=True)


def tell(ident: int, how: str, asked: str) -> None:
    everything = json.dumps(ALL)
    if how in ("stderr", "die"):
        aloud(asked)
    if how == "die":
        print("fatal:", *ALL.values(), file=sys.stderr, flush=True)
        os._exit(3)
    if how == "junk":
        print("!", everything, flush=True)
    if how == "log":
        send({"method": "notifications/message", "params": {"level": "error", "data": everything}})
    if how == "name":
        send({"method": "notifications/" + everything})
        send({"id": everything, "method": everything, "params": {}})
    if how == "error":
        send({"id": ident, "error": {"code": -32000, "message": everything, "data": everything}})
    else:
        text = everything if how == "result" else "told"
        send({"id": ident, "result": {"content": [{"type": "text", "text": text}]}})


def main() -> None:
    if "mute" in sys.argv:
        aloud("")
        sys.exit("fatal: " + json.dumps(ALL))
    for line in sys.stdin:
        message = json.loads(line)
        ident, method = message.get("id"), message.get("method")
        if method == "initialize":
            version = message["params"]["protocolVersion"]
            info = {"name": "tells", "version": "1"}
            offer = {"tools": {}, "logging": {}}
            send({"id": ident, "result": {"protocolVersion": version, "capabilities": offer, "serverInfo": info}})  # fmt: skip
        elif method == "tools/list":
            schema = {"type": "object", "properties": {"as": {"enum": HOW}}, "required": ["as"]}
            send({"id": ident, "result": {"tools": [{"name": "tell", "inputSchema": schema}]}})
        elif method == "tools/call":
            asked = message["params"]["arguments"]
            tell(ident, asked["as"], json.dumps(asked))
        elif ident is not None and method is not None:
            send({"id": ident, "error": {"code": -32601, "message": "Method not found"}})


HOW = ["result", "error", "name", "log", "stderr", "junk", "die"]

if __name__ == "__main__":
    main()
