"""The cheapest legacy child: one tool `echo`, answered with as little work as Python allows. For bench.py."""

import os
import re

ID = re.compile(rb'"id":\s*("[^"]*"|\d+)')
TEXT = re.compile(rb'"text":\s*("(?:[^"\\]|\\.)*")')
SIZE = re.compile(rb'"size":\s*(\d+)')
TOOL = b'{"name":"%s","description":"Gives back its text","inputSchema":{"type":"object","properties":{"text":{"type":"string"},"size":{"type":"integer"}}}}'
MANY = int(os.environ.get("TOOLS", "1"))
TOOLS = b",".join([TOOL % b"echo"] + [TOOL % (b"tool%d" % n) for n in range(MANY - 1)])
INIT = b'{"protocolVersion":"2025-11-25","capabilities":{"tools":{}},"serverInfo":{"name":"echo","version":"1"}}'


def answer(line: bytes) -> bytes:
    """The response to one request; empty for a notification."""
    found = ID.search(line)
    if found is None or b'"notifications/' in line:
        return b""
    head = b'{"jsonrpc":"2.0","id":%b,' % found[1]
    if b'"tools/call"' in line:
        size = SIZE.search(line)
        text = b'"%b"' % (b"x" * int(size[1])) if size else TEXT.search(line)[1]
        return head + b'"result":{"content":[{"type":"text","text":%b}]}}\n' % text
    if b'"initialize"' in line:
        return head + b'"result":' + INIT + b"}\n"
    if b'"tools/list"' in line:
        return head + b'"result":{"tools":[' + TOOLS + b"]}}\n"
    if b'"ping"' in line:
        return head + b'"result":{}}\n'
    return head + b'"error":{"code":-32601,"message":"Method not found"}}\n'


def main() -> None:
    rest = b""
    while chunk := os.read(0, 1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        out = b"".join(map(answer, lines))
        while out:
            out = out[os.write(1, out) :]


if __name__ == "__main__":
    main()
