"""A child that changes what it offers: all of it stands in the JSON file that its one argument names, as the members
tools, prompts, resources, resourceTemplates and instructions. When the file changes it sends list_changed."""

import json
import sys
import threading
import time
from pathlib import Path

FILE = Path(sys.argv[1])
KINDS = {
    "tools/list": "tools",
    "prompts/list": "prompts",
    "resources/list": "resources",
    "resources/templates/list": "resourceTemplates",
}
WRITING = threading.Lock()


def say(message: dict) -> None:
    with WRITING:
        print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)


def watch(before: bytes) -> None:
    """Tell of every change of the file, for as long as we live."""
    while True:
        time.sleep(0.02)
        now = FILE.read_bytes()
        if now != before:
            before = now
            for kind in ("tools", "prompts", "resources"):
                say({"method": f"notifications/{kind}/list_changed"})


def answer(method: str, params: dict) -> dict:
    """The result of a request; KeyError for one that it does not know."""
    offered = json.loads(FILE.read_bytes())
    if method == "initialize":
        capabilities = {kind: {"listChanged": True} for kind in ("tools", "prompts", "resources")}
        return {
            "protocolVersion": "2025-11-25",
            "capabilities": capabilities,
            "serverInfo": {"name": "fickle", "version": "1"},
            "instructions": offered.get("instructions", ""),
        }
    if method == "tools/call":
        return {"content": [{"type": "text", "text": f"did {params['name']}"}]}
    return {} if method == "ping" else {KINDS[method]: offered.get(KINDS[method], [])}


def main() -> None:
    threading.Thread(target=watch, args=(FILE.read_bytes(),), daemon=True).start()
    for line in sys.stdin:
        message = json.loads(line)
        if "id" not in message:
            continue
        try:
            result = answer(message["method"], message.get("params", {}))
            say({"id": message["id"], "result": result})
        except KeyError:
            say({"id": message["id"], "error": {"code": -32601, "message": "Method not found"}})


if __name__ == "__main__":
    main()
