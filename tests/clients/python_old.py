"""A tour with the `mcp` SDK 1 (sessions only): python_old.py URL PREFIX [sse]. Prints what it saw as JSON."""

import asyncio
import json
import sys

from mcp import ClientSession, McpError
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client


async def tour(url: str, prefix: str, transport: str = "http") -> dict:
    connect = sse_client(url) if transport == "sse" else streamable_http_client(url)
    async with connect as streams, ClientSession(streams[0], streams[1]) as client:
        version = (await client.initialize()).protocolVersion
        names = [tool.name for tool in (await client.list_tools()).tools]
        echo = await client.call_tool(prefix + "echo", {"message": "from Python"})
        read = await client.read_resource("demo://resource/dynamic/text/1")
        try:
            wrong = await client.call_tool(prefix + "no-such-tool", {})
            error = f"isError {wrong.isError}"
        except McpError as failure:
            error = failure.error.code
    return {
        "version": version,
        "names": names,
        "echo": echo.content[0].text,
        "read": read.contents[0].text,
        "error": error,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(tour(*sys.argv[1:]))))
