"""What the conformance suite's scenarios call, said once and without an era.

`legacy.py` and `modern.py` offer it, each in its own era. A tool or prompt is a generator of steps;
it gets an ask's answers as the value of its `yield` and ends by returning its result. A legacy
server carries the steps out as they come; a modern one runs the generator again on each retry.
"""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

Json = Any


@dataclass
class Log:
    """A log message."""

    level: str
    text: str


@dataclass
class Progress:
    """How far a call is."""

    done: float
    total: float


@dataclass
class Sleep:
    """Work that takes a while."""

    seconds: float


@dataclass
class Changed:
    """A list (`tools`, `prompts`) or a resource (its URI) has changed."""

    what: str


@dataclass
class Asks:
    """Requests to the client, by key: (method, params). The answer of each, None where refused.

    With `optional`, what the client did not declare is left out."""

    requests: dict[str, tuple[str, Json]]
    optional: bool = False
    declared: str = ""


@dataclass
class Background:
    """What follows belongs to a task, where the client knows tasks."""


class Failure(Exception):
    """A JSON-RPC error."""

    def __init__(self, code: int, message: str, data: Json = None) -> None:
        super().__init__(message)
        self.code, self.message, self.data = code, message, data


Steps = Generator[Any, Any, Json]


@dataclass
class World:
    """What this server offers at the moment."""

    extra_tool: bool = False
    extra_prompt: bool = False
    subscribed: set[str] = field(default_factory=set)
    updates: int = 0


def _png() -> str:
    """One red pixel."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    head = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\x00\xff\x00\x00")
    image = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    return base64.b64encode(image).decode()


def _wav() -> str:
    """Eight samples of silence."""
    samples = b"\x80" * 8
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, 8000, 8000, 1, 8)
    data = struct.pack("<4sI", b"data", len(samples)) + samples
    return base64.b64encode(
        struct.pack("<4sI4s", b"RIFF", 4 + len(fmt) + len(data), b"WAVE") + fmt + data
    ).decode()


PNG, WAV = _png(), _wav()
IMAGE = {"type": "image", "data": PNG, "mimeType": "image/png"}


def text(words: str, **more: Json) -> Json:
    """A tool result of one text block."""
    return {"content": [{"type": "text", "text": words}], **more}


def embedded(uri: str, mime: str, words: str) -> Json:
    """A content block that embeds a resource."""
    return {"type": "resource", "resource": {"uri": uri, "mimeType": mime, "text": words}}


def form(message: str, required: list[str] | None = None, **properties: Json) -> tuple[str, Json]:
    """An elicitation by form."""
    names = list(properties) if required is None else required
    schema = {"type": "object", "properties": properties, "required": names}
    return "elicitation/create", {"message": message, "requestedSchema": schema}


def sample(prompt: str, tokens: int) -> tuple[str, Json]:
    """A sampling request."""
    message = {"role": "user", "content": {"type": "text", "text": prompt}}
    return "sampling/createMessage", {"messages": [message], "maxTokens": tokens}


ROOTS: tuple[str, Json] = ("roots/list", {})
STRING = {"type": "string"}
BOOLEAN = {"type": "boolean"}


def one(key: str, request: tuple[str, Json]) -> Generator[Any, Any, Json]:
    """The answer to one ask; the call fails where it is refused."""
    answers = yield Asks({key: request})
    if answers[key] is None:
        raise ValueError(f"the client refused {request[0]}")
    return answers[key]


def content_of(answer: Json, name: str) -> str:
    """One field of an elicitation's answer."""
    return str((answer.get("content") or {}).get(name, ""))


def sampled(answer: Json) -> str:
    """The text of a sampling answer."""
    content = answer.get("content")
    return content.get("text", "") if isinstance(content, dict) else json.dumps(content)


# ---- Tools ----


def simple_text(world: World, arguments: Json) -> Steps:
    yield from ()
    return text("This is a simple text response for testing.")


def image_content(world: World, arguments: Json) -> Steps:
    yield from ()
    return {"content": [IMAGE]}


def audio_content(world: World, arguments: Json) -> Steps:
    yield from ()
    return {"content": [{"type": "audio", "data": WAV, "mimeType": "audio/wav"}]}


def embedded_resource(world: World, arguments: Json) -> Steps:
    yield from ()
    words = "This is an embedded resource content."
    return {"content": [embedded("test://embedded-resource", "text/plain", words)]}


def multiple_content_types(world: World, arguments: Json) -> Steps:
    yield from ()
    words = {"type": "text", "text": "Multiple content types test:"}
    data = '{"test":"data","value":123}'
    block = embedded("test://mixed-content-resource", "application/json", data)
    return {"content": [words, IMAGE, block]}


def tool_with_logging(world: World, arguments: Json) -> Steps:
    yield Log("info", "Tool execution started")
    yield Sleep(0.05)
    yield Log("info", "Tool processing data")
    yield Sleep(0.05)
    yield Log("info", "Tool execution completed")
    return text("Tool with logging executed successfully")


def logging_tool(world: World, arguments: Json) -> Steps:
    for number in range(3):
        yield Log("info", f"log message {number + 1}")
    return text("Logged")


def tool_with_progress(world: World, arguments: Json) -> Steps:
    for done in (0, 50, 100):
        yield Progress(done, 100)
        yield Sleep(0.05)
    return text("Tool with progress executed successfully")


def error_handling(world: World, arguments: Json) -> Steps:
    yield from ()
    return text("This tool intentionally returns an error for testing", isError=True)


def reconnection(world: World, arguments: Json) -> Steps:
    # Something before the answer: so it becomes an event stream, which is what the scenario looks at.
    yield Log("info", "begun")
    yield Sleep(0.1)
    return text("Reconnection test completed")


def sampling(world: World, arguments: Json) -> Steps:
    answer = yield from one("sampling", sample(str(arguments.get("prompt", "")), 100))
    return text(f"LLM response: {sampled(answer)}")


def elicitation(world: World, arguments: Json) -> Steps:
    answer = yield from one(
        "user_response",
        form(
            str(arguments.get("message", "")),
            username={"type": "string", "description": "User's response"},
            email={"type": "string", "description": "User's email address"},
        ),
    )
    return text(f"User response: {json.dumps(answer)}")


def completed(answer: Json) -> Json:
    """The result that the elicitation scenarios want."""
    words = json.dumps(answer.get("content") or {})
    return text(f"Elicitation completed: action={answer.get('action')}, content={words}")


def elicitation_defaults(world: World, arguments: Json) -> Steps:
    answer = yield from one(
        "profile",
        form(
            "Please review and update the form fields with defaults",
            [],
            name={"type": "string", "description": "User name", "default": "John Doe"},
            age={"type": "integer", "description": "User age", "default": 30},
            score={"type": "number", "description": "User score", "default": 95.5},
            status={
                "type": "string",
                "enum": ["active", "inactive", "pending"],
                "default": "active",
            },
            verified={"type": "boolean", "description": "Verified", "default": True},
        ),
    )
    return completed(answer)


def titled(*pairs: tuple[str, str]) -> list[Json]:
    """Choices with titles (SEP-1330)."""
    return [{"const": value, "title": title} for value, title in pairs]


def elicitation_enums(world: World, arguments: Json) -> Steps:
    options = ["option1", "option2", "option3"]
    one_of = titled(
        ("value1", "First Option"), ("value2", "Second Option"), ("value3", "Third Option")
    )
    any_of = titled(
        ("value1", "First Choice"), ("value2", "Second Choice"), ("value3", "Third Choice")
    )
    answer = yield from one(
        "choices",
        form(
            "Please select options from the enum fields",
            [],
            untitledSingle={"type": "string", "enum": options},
            titledSingle={"type": "string", "oneOf": one_of},
            legacyEnum={
                "type": "string",
                "enum": ["opt1", "opt2", "opt3"],
                "enumNames": ["Option One", "Option Two", "Option Three"],
            },
            untitledMulti={"type": "array", "items": {"type": "string", "enum": options}},
            titledMulti={"type": "array", "items": {"anyOf": any_of}},
        ),
    )
    return completed(answer)


def missing_capability(world: World, arguments: Json) -> Steps:
    answer = yield from one("sampling", sample("Anything", 10))
    return text(f"LLM response: {sampled(answer)}")


def streaming_elicitation(world: World, arguments: Json) -> Steps:
    yield Progress(1, 2)
    answer = yield from one("confirm", form("Go on?", ok=BOOLEAN))
    return completed(answer)


def ask_name(world: World, arguments: Json) -> Steps:
    answer = yield from one("user_name", form("What is your name?", name=STRING))
    return text(f"Hello, {content_of(answer, 'name')}!")


def ask_capital(world: World, arguments: Json) -> Steps:
    answer = yield from one("capital_question", sample("What is the capital of France?", 100))
    return text(sampled(answer))


def ask_roots(world: World, arguments: Json) -> Steps:
    answer = yield from one("client_roots", ROOTS)
    return text(f"Roots: {json.dumps(answer.get('roots', []))}")


def ask_with_state(world: World, arguments: Json) -> Steps:
    yield from one("confirm", form("Please confirm", ok=BOOLEAN))
    return text("state-ok")


def ask_three(world: World, arguments: Json) -> Steps:
    requests = {
        "user_name": form("What is your name?", name=STRING),
        "greeting": sample("Generate a greeting", 50),
        "client_roots": ROOTS,
    }
    answers = yield Asks(requests)
    if None in answers.values():
        raise ValueError("the client refused one of three")
    return text(f"Got {', '.join(sorted(answers))}")


def ask_twice(world: World, arguments: Json) -> Steps:
    name = yield from one("step1", form("Step 1: What is your name?", name=STRING))
    color = yield from one("step2", form("Step 2: What is your favorite color?", color=STRING))
    return text(f"{content_of(name, 'name')} likes {content_of(color, 'color')}")


def ask_what_is_declared(world: World, arguments: Json) -> Steps:
    requests = {
        "user_name": form("What is your name?", name=STRING),
        "greeting": sample("Greet", 50),
    }
    answers = yield Asks(requests, optional=True)
    given = sorted(key for key, answer in answers.items() if answer is not None)
    return text(f"Answered: {', '.join(given) or 'nothing'}")


def trigger_tool_change(world: World, arguments: Json) -> Steps:
    world.extra_tool = not world.extra_tool
    yield Changed("tools")
    return text("The list of tools has changed")


def trigger_prompt_change(world: World, arguments: Json) -> Steps:
    world.extra_prompt = not world.extra_prompt
    yield Changed("prompts")
    return text("The list of prompts has changed")


def trigger_resource_update(world: World, arguments: Json) -> Steps:
    world.updates += 1
    yield Changed(WATCHED)
    return text("The watched resource has changed")


def header_mirror(world: World, arguments: Json) -> Steps:
    yield from ()
    return text(f"region={arguments.get('region')}")


def echo_arguments(world: World, arguments: Json) -> Steps:
    yield from ()
    return text(json.dumps(arguments))


# ---- Tools that may become tasks (extension io.modelcontextprotocol/tasks) ----


def greet(world: World, arguments: Json) -> Steps:
    yield from ()
    return text(f"Hello, {arguments.get('name', 'World')}!")


def slow_compute(world: World, arguments: Json) -> Steps:
    yield Background()
    yield Sleep(float(arguments.get("seconds", 1)))
    return text(f"Computed {arguments.get('label', '')}")


def failing_job(world: World, arguments: Json) -> Steps:
    yield Background()
    yield Sleep(0.5)
    return text("The job has failed", isError=True)


def protocol_error_job(world: World, arguments: Json) -> Steps:
    yield Background()
    yield Sleep(0.1)
    raise Failure(-32603, "The job has crashed")


def confirm_delete(world: World, arguments: Json) -> Steps:
    yield Background()
    name = arguments.get("filename")
    answer = yield from one("confirm", form(f"Delete {name}?", confirm=BOOLEAN))
    return text(f"{name}: {answer.get('action')}")


def multi_input(world: World, arguments: Json) -> Steps:
    yield Background()
    answers = yield Asks(
        {"first": form("First?", name=STRING), "second": form("Second?", name=STRING)}
    )
    return text(f"Got {json.dumps(answers)}")


def tool_with_task(world: World, arguments: Json) -> Steps:
    answer = yield from one("user_name", form("What is your name?", name=STRING))
    yield Background()
    yield Sleep(0.2)
    return text(f"Done for {content_of(answer, 'name')}")


@dataclass
class Tool:
    """A tool: its definition and what it does."""

    name: str
    description: str
    run: Callable[[World, Json], Steps]
    schema: Json = field(default_factory=lambda: {"type": "object", "properties": {}})
    task: str = ""  # "", "optional" or "required"
    annotations: Json = None

    def definition(self) -> Json:
        """The tool as tools/list says it."""
        body = {"name": self.name, "description": self.description, "inputSchema": self.schema}
        if self.annotations:
            body["annotations"] = self.annotations
        return body


def takes(**properties: Json) -> Json:
    """An input schema that needs all of its properties."""
    return {"type": "object", "properties": properties, "required": list(properties)}


SCHEMA_2020_12 = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "$defs": {
        "address": {
            "$anchor": "addressDef",
            "type": "object",
            "properties": {"street": STRING, "city": STRING},
        }
    },
    "properties": {
        "name": STRING,
        "address": {"$ref": "#/$defs/address"},
        "contactMethod": {"type": "string", "enum": ["phone", "email"]},
        "phone": STRING,
        "email": STRING,
    },
    "allOf": [{"anyOf": [{"required": ["phone"]}, {"required": ["email"]}]}],
    "if": {"properties": {"contactMethod": {"const": "phone"}}, "required": ["contactMethod"]},
    "then": {"required": ["phone"]},
    "else": {"required": ["email"]},
    "additionalProperties": False,
}
READ_ONLY = {"readOnlyHint": True}
WATCHED = "test://watched-resource"

TOOLS = [
    Tool("test_simple_text", "Returns a simple text", simple_text, annotations=READ_ONLY),
    Tool("test_image_content", "Returns an image", image_content, annotations=READ_ONLY),
    Tool("test_audio_content", "Returns a sound", audio_content, annotations=READ_ONLY),
    Tool("test_embedded_resource", "Returns an embedded resource", embedded_resource),
    Tool("test_multiple_content_types", "Returns several kinds of content", multiple_content_types),
    Tool("test_tool_with_logging", "Logs while it runs", tool_with_logging),
    Tool("test_logging_tool", "Logs at once", logging_tool),
    Tool("test_tool_with_progress", "Reports progress", tool_with_progress),
    Tool("test_error_handling", "Always fails", error_handling),
    Tool("test_reconnection", "Takes a moment", reconnection),
    Tool("test_sampling", "Asks the client's model", sampling, takes(prompt=STRING)),
    Tool("test_elicitation", "Asks the user", elicitation, takes(message=STRING)),
    Tool("test_elicitation_sep1034_defaults", "Asks with defaults", elicitation_defaults),
    Tool("test_elicitation_sep1330_enums", "Asks with choices", elicitation_enums),
    Tool("test_missing_capability", "Cannot do without sampling", missing_capability),
    Tool("test_streaming_elicitation", "Reports progress, then asks", streaming_elicitation),
    Tool("test_input_required_result_elicitation", "Asks for a name", ask_name),
    Tool("test_input_required_result_sampling", "Asks the model", ask_capital),
    Tool("test_input_required_result_list_roots", "Asks for the roots", ask_roots),
    Tool("test_input_required_result_request_state", "Keeps state", ask_with_state),
    Tool("test_input_required_result_multiple_inputs", "Asks for three things at once", ask_three),
    Tool("test_input_required_result_multi_round", "Asks twice", ask_twice),
    Tool("test_input_required_result_tampered_state", "Signs its state", ask_with_state),
    Tool("test_input_required_result_capabilities", "Asks what it may", ask_what_is_declared),
    Tool("test_trigger_tool_change", "Changes the list of tools", trigger_tool_change),
    Tool("test_trigger_prompt_change", "Changes the list of prompts", trigger_prompt_change),
    Tool("test_trigger_resource_update", "Changes the watched resource", trigger_resource_update),
    Tool(
        "test_header_mirror",
        "Has an argument that is mirrored into a header",
        header_mirror,
        takes(region={"type": "string", "x-mcp-header": "Region"}),
    ),
    Tool(
        "json_schema_2020_12_tool",
        "Tool with JSON Schema 2020-12 features",
        echo_arguments,
        SCHEMA_2020_12,
    ),
    Tool("greet", "Greets", greet, takes(name=STRING), annotations=READ_ONLY),
]
EXTRA_TOOL = Tool("test_extra_tool", "Comes and goes", simple_text)
# Offered by the modern server alone: the extension is not of the legacy era.
TASK_TOOLS = [
    Tool(
        "slow_compute",
        "Computes for a while",
        slow_compute,
        {"type": "object", "properties": {"seconds": {"type": "number"}, "label": STRING}},
        task="optional",
    ),
    Tool("failing_job", "Fails after a while", failing_job, task="required"),
    Tool("protocol_error_job", "Crashes", protocol_error_job, task="optional"),
    Tool(
        "confirm_delete",
        "Asks before it deletes",
        confirm_delete,
        takes(filename=STRING),
        "optional",
    ),
    Tool("multi_input", "Asks for two things", multi_input, task="optional"),
    Tool("test_tool_with_task", "Asks, then works on", tool_with_task, task="required"),
]


def tools(world: World, tasks: bool) -> list[Tool]:
    """All tools of the moment."""
    return TOOLS + (TASK_TOOLS if tasks else []) + ([EXTRA_TOOL] if world.extra_tool else [])


# ---- Prompts ----


def message(content: Json) -> Json:
    """A prompt message of the user."""
    return {"role": "user", "content": content}


def simple_prompt(world: World, arguments: Json) -> Steps:
    yield from ()
    return {"messages": [message({"type": "text", "text": "This is a simple prompt for testing."})]}


def prompt_with_arguments(world: World, arguments: Json) -> Steps:
    yield from ()
    one_, two = arguments.get("arg1", ""), arguments.get("arg2", "")
    return {
        "messages": [
            message({"type": "text", "text": f"Prompt with arguments: arg1='{one_}', arg2='{two}'"})
        ]
    }


def prompt_with_resource(world: World, arguments: Json) -> Steps:
    yield from ()
    uri = arguments.get("resourceUri", "test://example-resource")
    block = embedded(uri, "text/plain", "Embedded resource content for testing.")
    words = {"type": "text", "text": "Please process the embedded resource above."}
    return {"messages": [message(block), message(words)]}


def prompt_with_image(world: World, arguments: Json) -> Steps:
    yield from ()
    words = {"type": "text", "text": "Please analyze the image above."}
    return {"messages": [message(IMAGE), message(words)]}


def prompt_that_asks(world: World, arguments: Json) -> Steps:
    ask = form("What context should the prompt use?", context=STRING)
    answer = yield from one("user_context", ask)
    return {
        "messages": [message({"type": "text", "text": f"Context: {content_of(answer, 'context')}"})]
    }


@dataclass
class Prompt:
    """A prompt: its definition and how it is made."""

    name: str
    description: str
    run: Callable[[World, Json], Steps]
    arguments: tuple[str, ...] = ()

    def definition(self) -> Json:
        """The prompt as prompts/list says it."""
        body: Json = {"name": self.name, "description": self.description}
        if self.arguments:
            body["arguments"] = [
                {"name": name, "description": f"The argument {name}", "required": True}
                for name in self.arguments
            ]
        return body


PROMPTS = [
    Prompt("test_simple_prompt", "A simple prompt", simple_prompt),
    Prompt(
        "test_prompt_with_arguments",
        "A prompt with arguments",
        prompt_with_arguments,
        ("arg1", "arg2"),
    ),
    Prompt(
        "test_prompt_with_embedded_resource",
        "Embeds a resource",
        prompt_with_resource,
        ("resourceUri",),
    ),
    Prompt("test_prompt_with_image", "A prompt with an image", prompt_with_image),
    Prompt("test_input_required_result_prompt", "A prompt that asks", prompt_that_asks),
]
EXTRA_PROMPT = Prompt("test_extra_prompt", "Comes and goes", simple_prompt)


def prompts(world: World) -> list[Prompt]:
    """All prompts of the moment."""
    return PROMPTS + ([EXTRA_PROMPT] if world.extra_prompt else [])


# ---- Resources and completion ----

RESOURCES: list[Json] = [
    {
        "uri": "test://static-text",
        "name": "static-text",
        "description": "A static text",
        "mimeType": "text/plain",
    },
    {
        "uri": "test://static-binary",
        "name": "static-binary",
        "description": "A static image",
        "mimeType": "image/png",
    },
    {
        "uri": WATCHED,
        "name": "watched-resource",
        "description": "A text that changes",
        "mimeType": "text/plain",
    },
]
TEMPLATES: list[Json] = [
    {
        "uriTemplate": "test://template/{id}/data",
        "name": "template",
        "description": "Data by id",
        "mimeType": "application/json",
    }
]


def read(world: World, uri: str) -> Json:
    """The contents of `uri`, None where there is none."""
    if uri == "test://static-text":
        words = "This is the content of the static text resource."
        return {"uri": uri, "mimeType": "text/plain", "text": words}
    if uri == "test://static-binary":
        return {"uri": uri, "mimeType": "image/png", "blob": PNG}
    if uri == WATCHED:
        return {"uri": uri, "mimeType": "text/plain", "text": f"Updated {world.updates} times."}
    if match := re.fullmatch(r"test://template/([^/]+)/data", uri):
        ident = match[1]
        body = {"id": ident, "templateTest": True, "data": f"Data for ID: {ident}"}
        return {"uri": uri, "mimeType": "application/json", "text": json.dumps(body)}
    return None


def complete(params: Json) -> Json:
    """Values for an argument."""
    value = str((params.get("argument") or {}).get("value", ""))
    values = [word for word in ("paris", "park", "party", "testing") if word.startswith(value)]
    return {"completion": {"values": values, "total": len(values), "hasMore": False}}


# What both eras declare and answer alike.
SERVER = {"version": "1.0.0"}
CAPABILITIES: Json = {
    "tools": {"listChanged": True},
    "prompts": {"listChanged": True},
    "resources": {"subscribe": True, "listChanged": True},
    "completions": {},
    "logging": {},
}
INSTRUCTIONS = "Everything that the conformance suite asks for."


def plain(world: World, method: str, params: Json, tasks: bool) -> Json:
    """The result of a request that takes no time and asks nothing; None where it is not one."""
    if method == "tools/list":
        return {"tools": [tool.definition() for tool in tools(world, tasks)]}
    if method == "prompts/list":
        return {"prompts": [prompt.definition() for prompt in prompts(world)]}
    if method == "resources/list":
        return {"resources": RESOURCES}
    if method == "resources/templates/list":
        return {"resourceTemplates": TEMPLATES}
    if method == "completion/complete":
        return complete(params)
    return None
