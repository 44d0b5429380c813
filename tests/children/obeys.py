"""A legacy child that does anything: its one tool `run` executes the Python in `code` and answers what that prints.

What `code` raises is answered as a tool error. Started with `stubborn` it ignores end of file and SIGTERM."""

import contextlib
import io
import json
import signal
import sys
import time

CODE = {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}


def run(code: str) -> dict:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, {})
    except Exception as error:
        return {"content": [{"type": "text", "text": repr(error)}], "isError": True}
    return {"content": [{"type": "text", "text": printed.getvalue().strip()}]}


def result(message: dict) -> dict | None:
    method = message["method"]
    if method == "initialize":
        info = {"name": "obeys", "version": "1"}
        return {"protocolVersion": "2025-11-25", "capabilities": {"tools": {}}, "serverInfo": info}
    if method == "tools/list":
        return {"tools": [{"name": "run", "description": "Runs code", "inputSchema": CODE}]}
    if method == "tools/call":
        return run(message["params"]["arguments"]["code"])
    return {} if method == "ping" else None


def main() -> None:
    if "stubborn" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for line in sys.stdin:
        message = json.loads(line)
        if "id" in message:
            answer = result(message)
            said = {"error": {"code": -32601, "message": "Method not found"}}
            said = {"result": answer} if answer is not None else said
            print(json.dumps({"jsonrpc": "2.0", "id": message["id"], **said}), flush=True)
    while "stubborn" in sys.argv:
        time.sleep(600)


if __name__ == "__main__":
    main()
