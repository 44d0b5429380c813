"""A child that is broken in the way that its first argument names; any other word makes a good one.

Good ones are legacy, with one tool `hello` that gives back the child's second argument."""

import json
import os
import sys
import time

HOW = sys.argv[1] if len(sys.argv) > 1 else "good"
NAME = sys.argv[2] if len(sys.argv) > 2 else "good"


def send(value: object) -> None:
    print(json.dumps(value), flush=True)


def result(message: dict) -> dict | None:
    """The result of one request; None for a method that it does not know."""
    method = message["method"]
    if method == "initialize":
        version = "1999-01-01" if HOW == "wrong-version" else "2025-11-25"
        return {
            "protocolVersion": version,
            "capabilities": {"tools": {}},
            "serverInfo": {"name": NAME, "version": "1"},
        }
    if method == "tools/list":
        if HOW == "bad-list":
            return {"tools": "none"}
        return {
            "tools": [
                {
                    "name": "hello",
                    "description": "Says who it is",
                    "inputSchema": {"type": "object"},
                }
            ]
        }
    if method == "tools/call":
        return {"content": [{"type": "text", "text": NAME}]}
    return {} if method == "ping" else None


def serve() -> None:
    for line in sys.stdin:
        message = json.loads(line)
        if "id" not in message:
            continue
        if HOW == "discover-exits" and message["method"] == "server/discover":
            sys.exit(3)
        if HOW == "hangs":
            continue
        if HOW == "wrong-json":
            print(f'{{"jsonrpc": "2.0", "id": {message["id"]}, "result": {{"pro', flush=True)
            continue
        if HOW == "wrong-id":
            send({"jsonrpc": "2.0", "id": "not-yours", "result": result(message) or {}})
            continue
        if HOW == "junk":
            print(
                "Starting up... listening on stdio!\n\x00\x1b[31m{not json}\n[]\n42\nnull",
                flush=True,
            )
        answer = result(message)
        if answer is None:
            send(
                {
                    "jsonrpc": "2.0",
                    "id": message["id"],
                    "error": {"code": -32601, "message": "Method not found"},
                }
            )
        else:
            send({"jsonrpc": "2.0", "id": message["id"], "result": answer})
        if HOW == "dies-after" and message["method"] == "initialize":
            sys.exit("it was all too much")


def main() -> None:
    if HOW == "exits":
        sys.exit("cannot open the database: no such file")
    if HOW == "closes-stdout":
        os.close(1)  # sys.stdout.close() leaves the descriptor open
        time.sleep(3600)
    if HOW == "slow":
        time.sleep(8)  # like npx and uvx, which install before they read
        while len(sys.argv) > 3 and not os.path.exists(sys.argv[3]):
            time.sleep(0.05)  # and longer, until a test has seen that it is slow
    if HOW == "endless-line":
        while True:
            sys.stdout.write("x" * 65536)
    if HOW == "stderr-flood":
        for number in range(200_000):
            print("noise", number, file=sys.stderr)
    serve()


if __name__ == "__main__":
    main()
