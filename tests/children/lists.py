"""A legacy child whose list of resources has no end: each page is large, and names a next one."""

import json
import sys

PAGE = [{"uri": f"test://{n}", "name": "n" * 10_000} for n in range(800)]  # 8 MB


def result(message: dict) -> dict | None:
    method = message["method"]
    if method == "initialize":
        info = {"name": "lists", "version": "1"}
        return {
            "protocolVersion": "2025-11-25",
            "capabilities": {"resources": {}},
            "serverInfo": info,
        }
    if method == "resources/list":
        page = int(message.get("params", {}).get("cursor", "0"))
        return {"resources": PAGE, "nextCursor": str(page + 1)}
    if method == "resources/templates/list":
        return {"resourceTemplates": []}
    return {} if method == "ping" else None


def main() -> None:
    for line in sys.stdin:
        message = json.loads(line)
        if "id" in message:
            answer = result(message)
            said = {"error": {"code": -32601, "message": "Method not found"}}
            said = {"result": answer} if answer is not None else said
            print(json.dumps({"jsonrpc": "2.0", "id": message["id"], **said}), flush=True)


if __name__ == "__main__":
    main()
