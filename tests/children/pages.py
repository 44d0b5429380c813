"""A child with long lists, which it gives page by page, each page for a cursor that only it understands.

Its one argument is JSON: `count` items of each kind, or as `names` says, `page` at a time, each with a description
of `size` characters; `modern` if it is of that era, and then not `named` if it does not say who it is; `name` is in its URIs, and what its tools answer."""

import json
import sys

HABITS = {"count": 10, "page": 3, "size": 20, "name": "pages", "modern": False, "named": True}
HABITS |= json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
NAME, PAGE = HABITS["name"], HABITS["page"]
ITEMS = HABITS.get("names") or [f"item{number}" for number in range(HABITS["count"])]
WORDS = "x" * HABITS["size"]
KINDS = {
    "tools/list": ("tools", lambda item: {"name": item, "inputSchema": {"type": "object"}}),
    "prompts/list": ("prompts", lambda item: {"name": item}),
    "resources/list": ("resources", lambda item: {"name": item, "uri": f"pages://{NAME}/{item}"}),
    "resources/templates/list": (
        "resourceTemplates",
        lambda item: {"name": item, "uriTemplate": f"pages://{NAME}/{item}/{{part}}"},
    ),
}
CAPABILITIES = {"tools": {}, "prompts": {}, "resources": {}}
INFO = {"name": NAME, "version": "1"}


def page(method: str, cursor: str | None) -> dict:
    """One page; KeyError for a cursor that this child has not given."""
    member, make = KINDS[method]
    begins = {f"{member} from {number}": number for number in range(0, len(ITEMS), PAGE)}
    begin = 0 if cursor is None else begins[cursor]
    result = {
        member: [{**make(item), "description": WORDS} for item in ITEMS[begin : begin + PAGE]]
    }
    if begin + PAGE < len(ITEMS):
        result["nextCursor"] = f"{member} from {begin + PAGE}"
    return result


def answer(method: str, params: dict) -> dict:
    """The result of a request; KeyError for one that it does not know."""
    if HABITS["modern"] and method == "server/discover":
        discovered = {"supportedVersions": ["2026-07-28"], "capabilities": CAPABILITIES}
        meta = {"io.modelcontextprotocol/serverInfo": INFO}
        return discovered | ({"_meta": meta} if HABITS["named"] else {})
    if not HABITS["modern"] and method == "initialize":
        return {"protocolVersion": "2025-11-25", "capabilities": CAPABILITIES, "serverInfo": INFO}
    if method == "tools/call":
        return {"content": [{"type": "text", "text": NAME}]}
    return page(method, params.get("cursor"))


def main() -> None:
    for line in sys.stdin:
        message = json.loads(line)
        if "id" not in message:
            continue
        body: dict = {"jsonrpc": "2.0", "id": message["id"]}
        try:
            result = answer(message["method"], message.get("params", {}))
            era = {"resultType": "complete", "ttlMs": 60000, "cacheScope": "public"}
            body["result"] = {**result, **(era if HABITS["modern"] else {})}
        except KeyError as error:
            known = message["method"] in KINDS
            body["error"] = {"code": -32602 if known else -32601, "message": f"unknown: {error}"}
        print(json.dumps(body), flush=True)


if __name__ == "__main__":
    main()
