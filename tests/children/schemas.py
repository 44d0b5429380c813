"""A child whose tools are those of its argument, JSON: name → inputSchema. Each gives back its arguments."""

import json
import sys

sys.setrecursionlimit(10_000)  # for what is as deep as its schemas
TOOLS = [
    {"name": name, "description": "Echoes", "inputSchema": schema}
    for name, schema in json.loads(sys.argv[1]).items()
]


def answer(method: str, params: dict) -> dict | None:
    """The result of a request, None for one that it does not know."""
    if method == "initialize":
        info = {"name": "schemas", "version": "1"}
        return {"protocolVersion": "2025-11-25", "capabilities": {"tools": {}}, "serverInfo": info}
    if method == "tools/list":
        return {"tools": TOOLS}
    if method == "tools/call":
        return {"content": [{"type": "text", "text": json.dumps(params["arguments"])}]}
    return None


def main() -> None:
    for line in sys.stdin:
        message = json.loads(line)
        if "id" not in message:
            continue
        result = answer(message["method"], message.get("params", {}))
        body = (
            {"error": {"code": -32601, "message": "unknown"}}
            if result is None
            else {"result": result}
        )
        print(json.dumps({"jsonrpc": "2.0", "id": message["id"], **body}), flush=True)


if __name__ == "__main__":
    main()
