"""Clients of the `mcp` SDK 2 that are asked, all at once: asked_new.py URL TOOL MODE COUNT ARGUMENTS.

Each calls TOOL with ARGUMENTS, where NONCE is its own name, and answers what it is asked with its name and the words of
the question. Prints the text of each result by name."""

import asyncio
import json
import os
import sys

import mcp_types as types
from mcp import Client

URL, TOOL, MODE, COUNT, ARGUMENTS = sys.argv[1:]


async def call(name: str) -> str:
    """One client's call."""

    async def elicit(context, params) -> types.ElicitResult:
        return types.ElicitResult(action="accept", content={"name": f"{name}: {params.message}"})

    async def sample(context, params) -> types.CreateMessageResult:
        text = f"{name}: {params.messages[0].content.text}"
        content = types.TextContent(type="text", text=text)
        return types.CreateMessageResult(
            role="assistant", content=content, model="m", stop_reason="endTurn"
        )

    async def roots(context) -> types.ListRootsResult:
        return types.ListRootsResult(roots=[types.Root(uri=f"file:///{name}")])

    asked = {
        "elicitation_callback": elicit,
        "sampling_callback": sample,
        "list_roots_callback": roots,
    }
    async with Client(URL, mode=MODE, **asked) as client:
        result = await client.call_tool(TOOL, json.loads(ARGUMENTS.replace("NONCE", name)))
        return result.content[0].text


async def main() -> None:
    names = [f"python-{os.getpid()}-{number}" for number in range(int(COUNT))]
    texts = await asyncio.gather(*map(call, names))
    print(json.dumps(dict(zip(names, texts, strict=True))))


asyncio.run(main())
