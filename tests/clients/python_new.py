"""A tour with the `mcp` SDK 2: python_new.py URL PREFIX MODE. Prints what it saw as JSON.

MODE is what mcp.Client takes (legacy, auto, 2026-07-28), or `stdio:COMMAND` for a bridge that it starts."""

import asyncio
import json
import os
import shlex
import sys

from mcp import Client, MCPError, StdioServerParameters


async def tour(url: str, prefix: str, mode: str) -> dict:
    target: object = url
    if mode.startswith("stdio:"):
        command, *args = shlex.split(mode.removeprefix("stdio:"))
        # With our environment: by itself the SDK hands over half a dozen variables.
        target = StdioServerParameters(command=command, args=args, env=dict(os.environ))
        mode = "legacy"
    async with Client(target, mode=mode) as client:
        names, cursor = [], None
        while True:
            page = await client.list_tools(cursor=cursor)
            names += [tool.name for tool in page.tools]
            cursor = page.next_cursor
            if cursor is None:
                break
        echo = await client.call_tool(prefix + "echo", {"message": "from Python"})
        read = await client.read_resource("demo://resource/dynamic/text/1")
        try:
            wrong = await client.call_tool(prefix + "no-such-tool", {})
            error = f"isError {wrong.is_error}"
        except MCPError as failure:
            error = failure.error.code
        version = client.protocol_version
    return {
        "version": version,
        "names": names,
        "echo": echo.content[0].text,
        "read": read.contents[0].text,
        "error": error,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(tour(*sys.argv[1:4]))))
