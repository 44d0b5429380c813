"""A legacy child that answers out of order, twice, and late after a cancellation: each with the nonce it got.

One tool, `nonce`, with {"n": text}. Answers leave in random order; one in ten leaves twice; a cancelled request is
answered all the same, later, with the text "late" before its nonce."""

import json
import os
import random
import select
import sys

TOOL = {
    "name": "nonce",
    "description": "Gives back its nonce",
    "inputSchema": {"type": "object", "properties": {"n": {"type": "string"}}, "required": ["n"]},
}
CHANCE = random.Random(20261124)


def immediate(message: dict) -> dict:
    """What is answered at once."""
    method = message["method"]
    if method == "initialize":
        info = {"name": "nonce", "version": "1"}
        return {"protocolVersion": "2025-11-25", "capabilities": {"tools": {}}, "serverInfo": info}
    if method == "tools/list":
        return {"tools": [TOOL]}
    return {}


def main() -> None:
    rest, waiting, late = b"", [], []
    while True:
        ready, _, _ = select.select([0], [], [], 0.002 if waiting or late else None)
        out = []
        if ready:
            chunk = os.read(0, 1 << 16)
            if not chunk:
                return
            *lines, rest = (rest + chunk).split(b"\n")
            for message in map(json.loads, lines):
                if message["method"] == "notifications/cancelled":
                    gone = message["params"]["requestId"]
                    late += [(i, "late " + n) for i, n in waiting if i == gone]
                    waiting = [item for item in waiting if item[0] != gone]
                elif message["method"] == "tools/call":
                    waiting.append((message["id"], message["params"]["arguments"]["n"]))
                elif message["method"] == "server/discover":
                    out.append(
                        {
                            "id": message["id"],
                            "error": {"code": -32601, "message": "Method not found"},
                        }
                    )
                elif "id" in message:
                    out.append({"id": message["id"], "result": immediate(message)})
        CHANCE.shuffle(waiting)
        # Some stay for a later turn, so that answers overtake each other across reads too.
        keep = len(waiting) // 4 if ready else 0
        go, waiting = waiting[keep:], waiting[:keep]
        if not ready:
            go, late = go + late, []
        for ident, text in go:
            answer = {"id": ident, "result": {"content": [{"type": "text", "text": text}]}}
            out += [answer, answer] if CHANCE.random() < 0.1 else [answer]
        data = b"".join(
            json.dumps({"jsonrpc": "2.0", **item}, separators=(",", ":")).encode() + b"\n"
            for item in out
        )
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
