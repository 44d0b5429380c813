"""Clients of both eras that are asked: one way to make a call, whatever the client, and to see what it was asked.

    person = asking.Person(answers)                  # answers: method → (params → result)
    done = await person.act(client, "asks__act", {"steps": […]})
    done.value["answers"]; done.asks                 # what the child got; what the client was asked

A modern client answers `input_required` by retries, a legacy one the requests on its stream."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import wire
from wire import Answers

Json = Any
Client = wire.Modern | wire.Legacy

# Whatever a client can be asked.
ALL = {
    "elicitation": {"form": {}, "url": {}},
    "sampling": {"tools": {}, "context": {}},
    "roots": {"listChanged": True},
}
STRING = {"type": "string"}
ACCEPT = {"action": "accept", "content": {}}


def form(message: str, **properties: Json) -> Json:
    """An elicitation, as [method, params]."""
    schema = {"type": "object", "properties": properties or {"name": STRING}}
    return ["elicitation/create", {"message": message, "requestedSchema": schema}]


def sample(prompt: str, **more: Json) -> Json:
    message = {"role": "user", "content": {"type": "text", "text": prompt}}
    return ["sampling/createMessage", {"messages": [message], "maxTokens": 10, **more}]


ROOTS: Json = ["roots/list", {}]


def said(words: str) -> Json:
    """A model's answer."""
    content = {"type": "text", "text": words}
    return {"role": "assistant", "content": content, "model": "m", "stopReason": "endTurn"}


@dataclasses.dataclass
class Done:
    """How a call ended, and what the client was asked on the way: (method, params) in order."""

    answer: wire.Answer
    asks: list[tuple[str, Json]]
    rounds: int = 0

    @property
    def value(self) -> Json:
        """What the test server says of itself in the result."""
        return json.loads(self.answer.text)


class Person:
    """Who answers what a client is asked."""

    def __init__(self, answers: Answers) -> None:
        self.answers = answers

    async def act(self, client: Client, tool: str, arguments: Json, **more: Json) -> Done:
        """Call `tool` and answer whatever is asked until it ends."""
        params = {"name": tool, "arguments": arguments, **more}
        if isinstance(client, wire.Legacy):
            client.answers = self.answers
            answer = await client.request("tools/call", params)
            return Done(answer, [(ask["method"], ask.get("params", {})) for ask in answer.asks])
        done = Done(await client.request("tools/call", params), [])
        while wants(done.answer):
            requests = done.answer.result.get("inputRequests", {})
            done.asks += [(ask["method"], ask.get("params", {})) for ask in requests.values()]
            done.rounds += 1
            assert done.rounds < 20, "it never ends"
            answers = {
                key: self.answers[ask["method"]](ask.get("params", {}))
                for key, ask in requests.items()
            }
            done.answer = await client.retry("tools/call", params, done.answer, answers)
        return done


def wants(answer: wire.Answer) -> bool:
    """Whether a modern client is asked something."""
    response = answer.response or {}
    return bool(response.get("result", {}).get("resultType") == "input_required")


def heard(folder: Path, method: str = "", answers: bool = False) -> list[Json]:
    """What the tapped children under a test's `tmp_path` heard so far: of one method, or all responses."""
    lines = [
        json.loads(line[1:])
        for log in sorted((folder / "said").iterdir())
        for line in log.read_bytes().splitlines()
        if line.startswith(b">")
    ]
    if answers:
        return [line for line in lines if "method" not in line]
    return [line for line in lines if line.get("method") == method]
