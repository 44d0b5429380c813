"""A child made with the `mcp` SDK, whose requestState is sealed with a key of its own process.

`act` asks one thing and gives its process; `hold` answers when the file `until` is there, and reads nothing meanwhile."""

import os
import time
from typing import Annotated

from mcp.server.mcpserver import Elicit, ElicitationResult, MCPServer, Resolve
from pydantic import BaseModel

server = MCPServer("sealed", log_level="WARNING")


class Name(BaseModel):
    name: str


async def ask() -> Elicit[Name]:
    return Elicit("a", Name)


@server.tool()
async def act(answer: Annotated[ElicitationResult[Name], Resolve(ask)]) -> str:
    return f"{os.getpid()} {answer.action}"


@server.tool()
async def hold(until: str) -> str:
    while not os.path.exists(until):
        time.sleep(0.01)
    return "held"


if __name__ == "__main__":
    server.run()
