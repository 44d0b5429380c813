"""What may pass: params by version, tool definitions, arguments and headers; and that nothing stops the loop.

Oracles are mcp_types for messages and jsonschema for schemas. Time is never asserted: what bounds a
validation is the count of what it may spend."""

from __future__ import annotations

import copy
import dataclasses
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp_types import methods as oracle
from pydantic import ValidationError

import atrax
from atrax import (
    LEGACY,
    MODERN,
    Call,
    Entry,
    Error,
    Kind,
    Outcome,
    Owner,
    Policy,
    Record,
)

JUNE, NOVEMBER = "2025-06-18", "2025-11-25"
VERSIONS = (*LEGACY, MODERN)

# ---- params ----

PERSON = {
    "name": "n",
    "version": "1",
    "title": "t",
    "icons": [{"src": "s", "sizes": ["1"], "theme": "dark", "mimeType": "m"}],
    "websiteUrl": "w",
    "description": "d",
}
CAPABILITIES = {
    "experimental": {"a": {}},
    "roots": {"listChanged": True},
    "sampling": {"context": {}, "tools": {}},
    "elicitation": {"form": {}, "url": {}},
    "tasks": {
        "list": {},
        "cancel": {},
        "requests": {"sampling": {"createMessage": {}}, "elicitation": {"create": {}}},
    },
}
LEGACY_META = {"_meta": {"progressToken": "t"}}
MODERN_META = {
    "_meta": {
        "io.modelcontextprotocol/protocolVersion": MODERN,
        "io.modelcontextprotocol/clientCapabilities": {},
    }
}
RETRY = {"inputResponses": {"k": {"action": "accept", "content": {"a": "b"}}}, "requestState": "s"}
REQUESTS: dict[str, list[dict[str, Any]]] = {
    "initialize": [
        {"protocolVersion": "x", "capabilities": CAPABILITIES, "clientInfo": PERSON},
    ],
    "ping": [{}],
    "logging/setLevel": [{"level": "error"}],
    "resources/subscribe": [{"uri": "file:///a"}],
    "resources/unsubscribe": [{"uri": "file:///a"}],
    "server/discover": [{}],
    "subscriptions/listen": [
        {
            "notifications": {
                "toolsListChanged": True,
                "promptsListChanged": False,
                "resourcesListChanged": True,
                "resourceSubscriptions": ["u"],
            }
        }
    ],
    "tools/list": [{"cursor": "c"}],
    "prompts/list": [{"cursor": "c"}],
    "resources/list": [{"cursor": "c"}],
    "resources/templates/list": [{"cursor": "c"}],
    "tools/call": [{"name": "n", "arguments": {"a": 1}, "task": {"ttl": 1}, **RETRY}],
    "prompts/get": [{"name": "n", "arguments": {"a": "1"}, **RETRY}],
    "resources/read": [{"uri": "file:///a", **RETRY}],
    "completion/complete": [
        {
            "ref": {"type": "ref/prompt", "name": "n", "title": "t"},
            "argument": {"name": "a", "value": "v"},
            "context": {"arguments": {"a": "b"}},
        },
        {"ref": {"type": "ref/resource", "uri": "u"}, "argument": {"name": "a", "value": "v"}},
    ],
}
TEXT = {"type": "text", "text": "t"}
IMAGE = {"type": "image", "data": "AA==", "mimeType": "m"}
AUDIO = {"type": "audio", "data": "AA==", "mimeType": "m"}
TOOL_USE = {"type": "tool_use", "id": "i", "name": "n", "input": {"a": 1}}
TOOL_RESULT = {"type": "tool_result", "toolUseId": "i", "content": [TEXT], "isError": True}
SAMPLED = {"role": "user", "model": "m", "stopReason": "s"}
ANSWERS: dict[str, list[dict[str, Any]]] = {
    "elicitation/create": [
        {"action": "accept", "content": {"s": "x", "n": 1, "b": True, "l": ["x"]}}
    ],
    "sampling/createMessage": [
        {**SAMPLED, "content": TEXT},
        {**SAMPLED, "content": IMAGE},
        {**SAMPLED, "content": AUDIO},
        {**SAMPLED, "content": [TEXT, TOOL_USE, TOOL_RESULT]},
    ],
    "roots/list": [{"roots": [{"uri": "file:///x", "name": "z"}]}],
}
SCALARS = [None, True, False, 0, 1, -1, 1.0, 1.5, "", "x", "1", 2**60]
JUNK = [*SCALARS, [], ["a"], [1], {}, {"a": 1}, {"a": "b"}, {"a": None}]
GONE = object()

Path = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """A message that was changed in one place, and what the oracle says of it."""

    kind: str
    method: str
    version: str
    path: Path
    value: Any
    accepted: bool


def _began(*path: str, since: str) -> Any:
    return lambda case: case.path[: len(path)] == path and case.version < since


# Where the table and the oracle may differ, and why.
DIFFERENCES = {
    "null is no value of an optional member (TypeScript schema; the suite wants -32602 for one)": (
        lambda case: case.accepted and case.value is None
    ),
    "pydantic makes booleans of 0, 1 and '1', and integers of true and 1.0": (
        lambda case: (
            case.accepted
            and isinstance(case.value, (bool, int, float, str))
            and case.path[-1:]
            and case.path[-1]
            in {
                "listChanged",
                "toolsListChanged",
                "promptsListChanged",
                "resourcesListChanged",
                "progressToken",
                "requestId",
                "progress",
                "total",
                "ttl",
                "isError",
            }
        )
    ),
    "the oracle has the shapes of 2025-11-25 for all legacy versions: a newer member is unknown, and passes": (
        lambda case: (
            not case.accepted
            and any(
                began(case)
                for began in (
                    _began("ref", "title", since=JUNE),
                    _began("context", since=JUNE),
                    _began("clientInfo", "title", since=JUNE),
                    _began("clientInfo", "icons", since=NOVEMBER),
                    _began("clientInfo", "websiteUrl", since=NOVEMBER),
                    _began("clientInfo", "description", since=NOVEMBER),
                    _began("capabilities", "elicitation", since=JUNE),
                    _began("capabilities", "elicitation", "form", since=NOVEMBER),
                    _began("capabilities", "elicitation", "url", since=NOVEMBER),
                    _began("capabilities", "sampling", "context", since=NOVEMBER),
                    _began("capabilities", "sampling", "tools", since=NOVEMBER),
                    _began("capabilities", "tasks", since=NOVEMBER),
                    _began("task", since=NOVEMBER),
                    _began("message", since="2025-03-26"),
                )
            )
        )
    ),
    "an answer of the wrong shape is asked for again, not refused (CONFORMANCE, trap 4)": (
        lambda case: (
            case.path[:1] == ("inputResponses",) and not case.accepted and len(case.path) > 1
        )
    ),
    "inputResponses of wrong answers pass for the same reason": (
        lambda case: (
            case.path == ("inputResponses",) and not case.accepted and type(case.value) is dict
        )
    ),
    "pydantic takes null in the content of an elicitation": (
        lambda case: case.path == ("content",) and case.value == {"a": None} and case.accepted
    ),
    "multi-select lists came to elicitation with 2025-11-25": (
        lambda case: (
            case.method == "elicitation/create" and case.version < NOVEMBER and case.accepted
        )
    ),
    "content kinds that this table does not know pass, as unknown members do": (
        lambda case: (
            not case.accepted and case.path[-1:] == ("type",) and isinstance(case.value, str)
        )
    ),
    "content kinds that a version lacks are unknown to it": (
        lambda case: case.method == "sampling/createMessage" and case.version < NOVEMBER
    ),
    "what stands inside of blocks with tools is the affair of who asked": (
        lambda case: (
            case.method == "sampling/createMessage"
            and "content" in case.path[:1]
            and (len(case.path) > 3 or case.path[-1] in ("input", "content", "isError"))
        )
    ),
    "how an icon looks nobody asks here": (
        lambda case: case.path[-1:] == ("theme",) or "sizes" in case.path
    ),
    "what kinds of task a client can run nobody asks here": (
        lambda case: case.path[:3] == ("capabilities", "tasks", "requests") and not case.accepted
    ),
    "a number is a number: elicitation takes 1.5 where the oracle's schema says integer": (
        lambda case: case.method == "elicitation/create" and isinstance(case.value, float)
    ),
}


def bases(kind: str, version: str) -> Iterator[tuple[str, dict[str, Any]]]:
    known = {
        "request": (oracle.CLIENT_REQUESTS, REQUESTS),
        "answer": (oracle.CLIENT_RESULTS, ANSWERS),
    }[kind]
    for method, its_version in known[0]:
        if its_version == version:
            for base in known[1].get(method, []):
                if kind == "request":
                    base = base | (MODERN_META if version == MODERN else LEGACY_META)
                yield method, base


def places(value: Any, path: Path = ()) -> Iterator[Path]:
    if path[:1] != ("_meta",) or path == ("_meta", "progressToken"):
        yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for step, inner in items:
        yield from places(inner, (*path, step))


def changed(base: dict[str, Any], path: Path, value: Any) -> dict[str, Any]:
    whole = copy.deepcopy(base)
    part: Any = whole
    for step in path[:-1]:
        part = part[step]
    if value is GONE:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return whole


def oracle_accepts(kind: str, method: str, version: str, body: dict[str, Any]) -> bool:
    validate: Any = {
        "request": oracle.validate_client_request,
        "answer": oracle.validate_client_result,
    }[kind]
    try:
        validate(method, version, body)
    except ValidationError:
        return False
    return True


def ours(kind: str, method: str, version: str, body: dict[str, Any]) -> Error | None:
    if kind == "request":
        return atrax.check_request(method, body, version)
    return atrax.check_answer(method, body, version)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ["request", "answer"])
def test_every_valid_message_passes_and_every_change_of_one_member_has_the_verdict_of_the_oracle(
    kind: str, version: str
) -> None:
    surprises = []
    for method, base in bases(kind, version):
        if oracle_accepts(kind, method, version, base) and not (
            method in ("elicitation/create", "sampling/createMessage") and version < NOVEMBER
        ):
            assert ours(kind, method, version, base) is None
        for path in places(base):
            for value in [*JUNK, GONE] if path else []:
                body = changed(base, path, value)
                accepted = oracle_accepts(kind, method, version, body)
                case = Case(kind, method, version, path, value, accepted)
                error = ours(kind, method, version, body)
                same = (error is None) == accepted
                if not same and not any(why(case) for why in DIFFERENCES.values()):
                    surprises.append((case, error))
    assert surprises == []


@given(st.data())
def test_several_changes_at_once_have_the_verdict_of_the_oracle(data: st.DataObject) -> None:
    kind = "request"
    version = data.draw(st.sampled_from(VERSIONS))
    method, base = data.draw(st.sampled_from(list(bases(kind, version))))
    body, cases = base, []
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(places(body))))
        value = data.draw(st.sampled_from([*JUNK, GONE]))
        if not path:
            continue
        body = changed(body, path, value)
        cases += [Case(kind, method, version, path, value, accepted) for accepted in (True, False)]
    if any(why(case) for case in cases for why in DIFFERENCES.values()):
        return
    accepted = oracle_accepts(kind, method, version, body)
    assert (ours(kind, method, version, body) is None) == accepted, (method, version, body)


@pytest.mark.parametrize(
    ("method", "version", "params", "message"),
    [
        ("tools/call", MODERN, {}, 'params must have the required "name"'),
        ("tools/call", MODERN, {"name": 1}, "params.name must be a string"),
        ("tools/call", JUNE, {"name": "n", "arguments": []}, "params.arguments must be an object"),
        ("tools/call", NOVEMBER, {"name": "n", "task": 1}, "params.task must be an object"),
        ("tools/call", JUNE, {"name": "n", "task": 1}, "params.task must be an object"),
        ("tools/call", MODERN, {"name": "n", "inputResponses": None}, "params.inputResponses must be an object"),
        ("prompts/get", JUNE, {"name": "n", "arguments": {"a": 1}}, "params.arguments.a must be a string"),
        (
            "completion/complete",
            MODERN,
            {"ref": {"type": "ref/x"}, "argument": {"name": "a", "value": ""}},
            'params.ref.type must be one of "ref/prompt", "ref/resource", but is "ref/x"',
        ),
        ("logging/setLevel", JUNE, {"level": "loud"}, 'params.level must be one of "debug", "info", '),
        ("tasks/get", NOVEMBER, {}, 'params must have the required "taskId"'),
        ("tasks/get", JUNE, {}, None),
        ("subscriptions/listen", MODERN, {"notifications": {"taskIds": "t"}}, "params.notifications.taskIds must be an array"),
        ("subscriptions/listen", JUNE, {}, None),
        ("made/up", MODERN, {"whatever": None}, None),
    ],
)  # fmt: skip
def test_an_error_names_the_member(
    method: str, version: str, params: dict[str, Any], message: str | None
) -> None:
    error = atrax.check_params(Call(method, params, Owner("p"), version))

    assert (error is None) == (message is None)
    if error is not None:
        assert error.code == atrax.INVALID_PARAMS
        assert error.message.startswith(message or "")


def test_an_array_of_absurd_length_is_refused_before_it_is_read() -> None:
    listen = {"notifications": {"resourceSubscriptions": [""] * 1_000_000}}

    assert atrax.check_request("subscriptions/listen", listen, MODERN) is not None


# ---- definitions ----

POLICY = Policy(Record())
DRAFTS = {
    "http://json-schema.org/draft-04/schema#": jsonschema.Draft4Validator,
    "http://json-schema.org/draft-06/schema#": jsonschema.Draft6Validator,
    "http://json-schema.org/draft-07/schema#": jsonschema.Draft7Validator,
    "https://json-schema.org/draft/2019-09/schema": jsonschema.Draft201909Validator,
    "https://json-schema.org/draft/2020-12/schema": jsonschema.Draft202012Validator,
}


def tool(schema: Any, **more: Any) -> Entry:
    if isinstance(schema, dict):
        schema = {"type": "object", **schema}
    item = {"name": "t", "inputSchema": schema, **more}
    return Entry(Kind.TOOLS, "server", "t", "server__t", "t", item)


def shown(schema: Any, **more: Any) -> Entry:
    entry = tool(schema, **more)
    assert POLICY.definition(entry) == ""
    return entry


def hidden(schema: Any, **more: Any) -> str:
    reason = POLICY.definition(tool(schema, **more))
    assert reason != ""
    return reason


def complaint(entry: Entry, arguments: Any) -> str:
    """The text of the violation; "" if there is none."""
    verdict = POLICY.arguments(entry, arguments, None)
    if verdict is None:
        return ""
    assert isinstance(verdict, Outcome)
    assert verdict.result is not None
    assert verdict.result["isError"] is True
    text: str = verdict.result["content"][0]["text"]
    assert len(text) < 8_000
    return text


def refused(entry: Entry, arguments: Any) -> bool:
    """Whether the call is refused since checking it would take too long."""
    verdict = POLICY.arguments(entry, arguments, None)
    return isinstance(verdict, Error) and "too large or too deep" in verdict.message


def warned(*entries: Entry) -> list[str]:
    """What the log says when these definitions are read."""
    record, texts = Record(), []
    record.watch(lambda event: texts.append(event.fields["message"]))
    policy = Policy(record)
    for entry in entries:
        assert policy.definition(entry) == ""
    return texts


def spent(entry: Entry, arguments: Any) -> int:
    """The units that a validation takes; never more than there are, give or take one last step."""
    run = atrax._Run()
    assert isinstance(entry.validator, atrax._Schema)
    try:
        entry.validator.check(arguments, run)
    except atrax._Exhausted:
        pass
    assert run.left > -300_000
    return atrax._UNITS - run.left


@pytest.mark.parametrize("uri", DRAFTS)
def test_every_spelling_of_a_known_dialect_is_that_dialect(uri: str) -> None:
    bare = uri.removesuffix("#")
    for spelling in (
        bare,
        bare + "#",
        bare.replace("http://", "https://"),
        bare.replace("https", "http"),
    ):
        entry = shown({"$schema": spelling, "properties": {"a": {"type": "string"}}})
        assert complaint(entry, {"a": 1}) != ""


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (None, "must be an object"),
        ([], "must be an object"),
        (True, "must be an object"),
        ({"type": "array"}, "must have the type"),
        ({"type": None}, "no valid JSON Schema"),
        ({"type": "text"}, "no valid JSON Schema"),
        ({"properties": {"a": 1}}, "no valid JSON Schema"),
        ({"properties": {"a": {"minLength": -1}}}, "no valid JSON Schema"),
        ({"required": "a"}, "no valid JSON Schema"),
        ({"$schema": "https://example.com/mine"}, "unknown dialect"),
        ({"$schema": "http://json-schema.org/draft-03/schema#"}, "unknown dialect"),
        ({"$schema": 7}, "unknown dialect"),
        ({"$ref": "#/$defs/none"}, "leads out of it"),
        ({"$ref": "other.json"}, "leads out of it"),
        ({"properties": {"a": {"$ref": "#nowhere"}}}, "leads out of it"),
        ({"allOf": [{"$dynamicRef": "#nowhere"}]}, "not supported"),
        ({"$ref": "#/allOf/9", "allOf": [{}]}, "leads out of it"),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "$ref": 1}, "no string"),
        ({"allOf": [{"pattern": f"a{number}" + "b" * 1_000} for number in range(20)]}, "patterns"),
        ({"$defs": {str(number): {"$id": f"https://e.com/{number}"} for number in range(2_000)}}, "identifiers"),
        ({"$id": "http://e.com/", "$ref": "http://[/"}, "no URI"),
        ({"$ref": "#/x", "x": {"properties": 1}}, "no valid JSON Schema"),
        ({"properties": {"a": {"$schema": "http://json-schema.org/draft-07/schema#"}}}, "dialect"),
        ({"enum": list(range(30_000))}, "parts"),
        ({"allOf": [{}] * 6_000}, "parts"),
        ({"description": "d" * 2_000_000}, "larger"),
        ({"const": 2**70}, "written as JSON"),
    ],
    ids=str,
)  # fmt: skip
def test_a_tool_with_an_unusable_schema_is_hidden_and_the_reason_says_why(
    schema: Any, reason: str
) -> None:
    assert reason in hidden(schema)


def test_an_unusable_output_schema_hides_the_tool_too() -> None:
    assert "outputSchema" in hidden({}, outputSchema={"$ref": "https://example.com/x"})
    shown({}, outputSchema={"type": "array", "items": {"type": "string"}})


def test_a_reference_to_a_url_hides_the_tool_and_nobody_is_asked() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        asked = threading.Event()

        def accept() -> None:
            try:
                listener.accept()
                asked.set()
            except OSError:
                pass

        waiting = threading.Thread(target=accept, daemon=True)
        waiting.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/schema.json"
        for schema in (
            {"$ref": url},
            {"properties": {"a": {"$ref": url + "#/x"}}},
            {"$id": url, "$ref": "other.json"},
            {"$defs": {"a": {"$dynamicRef": url}}},
            {"$schema": url},
            {
                "$schema": "http://json-schema.org/draft-07/schema#",
                "definitions": {"a": {"$ref": url}},
            },
        ):
            assert hidden(schema) != ""
        assert not asked.is_set()
        # The socket works: the thread was waiting all the time.
        with socket.create_connection(listener.getsockname()):
            assert asked.wait(10)


def test_references_into_the_schema_itself_and_into_the_meta_schemas_are_followed() -> None:
    entry = shown(
        {
            "$id": "https://example.com/tool",
            "properties": {
                "pointer": {"$ref": "#/$defs/number"},
                "anchor": {"$ref": "#named"},
                "id": {"$ref": "part"},
                "schema": {"$ref": "https://json-schema.org/draft/2020-12/schema"},
            },
            "$defs": {
                "number": {"type": "number"},
                "x": {"$anchor": "named", "type": "string"},
                "y": {
                    "$id": "part",
                    "properties": {"z": {"$ref": "#/$defs/w"}},
                    "$defs": {"w": False},
                },
            },
        }
    )

    assert (
        complaint(entry, {"pointer": 1, "anchor": "", "id": {}, "schema": {"type": "object"}}) == ""
    )
    for wrong in ({"pointer": ""}, {"anchor": 1}, {"id": {"z": 1}}, {"schema": {"type": 1}}):
        assert complaint(entry, wrong) != ""


@pytest.mark.parametrize("levels", [260, 1_000, 5_000])
@pytest.mark.parametrize("keyword", ["not", "allOf", "properties", "items", "const", "x-unknown"])
def test_a_schema_of_very_many_levels_is_hidden_and_never_a_recursion_error(
    keyword: str, levels: int
) -> None:
    inner: Any = {}
    for _ in range(levels):
        inner = {
            keyword: [inner]
            if keyword == "allOf"
            else {"a": inner}
            if keyword == "properties"
            else inner
        }

    reason = hidden({"properties": {"a": inner}})
    assert "levels" in reason or "Recursion limit" in reason


# ---- arguments ----


def test_a_violation_tells_a_model_what_to_correct() -> None:
    entry = shown(
        {
            "properties": {
                "city": {"type": "string"},
                "unit": {"enum": ["C", "F"]},
                "days": {"type": "array", "items": {"type": "integer", "minimum": 1}},
            },
            "required": ["city"],
            "additionalProperties": False,
        }
    )

    assert 'arguments must have the required "city"' in complaint(entry, {})
    assert "arguments.city must be a string, but is 3" in complaint(entry, {"city": 3})
    assert 'arguments.unit must be one of "C", "F", but is "K"' in complaint(
        entry, {"city": "", "unit": "K"}
    )
    text = complaint(entry, {"city": 3, "days": [1, 0, "x"], "unit": "C"})
    assert "arguments.city must be a string, but is 3" in text
    assert "arguments.days[1] must be at least 1, but is 0" in text
    text = complaint(entry, {"city": "", "town": 1})
    assert 'arguments.town is not a known property; known are "city", "unit", "days"' in text


def test_of_alternatives_the_one_of_the_right_type_says_what_is_wrong() -> None:
    entry = shown(
        {"properties": {"at": {"anyOf": [{"type": "null"}, {"type": "object", "required": ["x"]}]}}}
    )

    assert 'arguments.at must have the required "x"' in complaint(entry, {"at": {}})
    assert "arguments.at must be null or an object, but is 3" in complaint(entry, {"at": 3})


def test_a_message_is_short_however_much_is_wrong() -> None:
    names = [f"{'k' * 10_000}{number}" for number in range(40)]
    wide = shown({"properties": {name: {"enum": ["x" * 10_000, *range(100)]} for name in names}})
    many = complaint(wide, dict.fromkeys(names, "v" * 100000))
    assert 1 <= many.count("\n- ") <= 5
    deep = shown({"properties": {"a": {"$ref": "#"}}, "additionalProperties": False})
    nested: Any = {"wrong": [0] * 100_000}
    for _ in range(150):
        nested = {"a": nested}
    assert "is not a known property" in complaint(deep, nested)
    one_of = shown({"oneOf": [{"required": [str(number)]} for number in range(500)]})
    assert complaint(one_of, {}) != ""


@pytest.mark.parametrize(
    ("equal", "different"),
    [
        ([1, 1.0], [1, True]),
        ([0, -0.0], [0, False]),
        ([{"a": 1, "b": 2.0}, {"b": 2, "a": 1.0}], [{"a": 1}, {"a": True}]),
        ([[1.0, "x"], [1, "x"]], [[1, 2], [2, 1]]),
        ([None, None], [None, "null"]),
        (["1", "1"], ["1", 1]),
        ([1e300, 1e300], ["[1]", [1]]),
        ([2**53, float(2**53)], [2**53, 2**53 + 1]),
    ],
)
def test_equal_means_equal_as_json(equal: list[Any], different: list[Any]) -> None:
    entry = shown({"properties": {"a": {"uniqueItems": True}}})
    assert complaint(entry, {"a": equal}) != ""
    assert complaint(entry, {"a": different}) == ""
    const = shown({"properties": {"a": {"const": equal[0]}, "b": {"enum": [different[0]]}}})
    assert complaint(const, {"a": equal[1]}) == ""
    assert complaint(const, {"b": different[1]}) != ""


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("^(a+)+$", "a" * 5_000, "a" * 5_000 + "!"),
        (r"^\d{4}-\d{2}$", "2024-01", "२०२४-01"),
        (r"^\w+$", "az_09", "é"),
        (r"^\s$", "\ufeff", "\x85"),
        (r"^.$", "\x85", "\u2028"),
        (r"^[a[b]+$", "a[b", "]"),
        (r"^[a&&b]+$", "&", "c"),
        (r"^[+--]+$", "+,-", "."),
        (r"^\/a\-b$", "/a-b", "ab"),
        (r"^\<a\>$", "<a>", "a"),
        (r"^a{$", "a{", "a"),
        (r"\bcat\b", "a cat", "concat"),
        ("^\\u00e9$", "é", "e"),
        (r"^[\w-]+$", "a-b", "a b"),
        (r"^(?:a|b){2,3}$", "aba", "a"),
        (r"a$", "ba", "a\n"),
    ],
)
def test_a_pattern_means_what_it_means_in_ecma_262(pattern: str, matching: str, other: str) -> None:
    entry = shown({"properties": {"a": {"pattern": pattern}}})

    assert warned(entry) == []
    assert complaint(entry, {"a": matching}) == ""
    assert "must match the pattern" in complaint(entry, {"a": other})


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("^(?!a)", "it looks around"),
        ("(?<=a)b", "it looks around"),
        (r"(a)\1", "it refers back"),
        (r"(?P<n>a)(?P=n)", "it refers back"),
        (r"(?i)a", "it cannot be read"),
        ("(a{1000}){1000}", "it is too large"),
        (r"\p{L}", "it cannot be read"),
        ("x" * 6_000, "it is too large"),
        ("(", "it cannot be read"),
        ("a{3,1}", "it cannot be read"),
    ],
    ids=lambda value: value[:20],
)
def test_a_pattern_without_a_linear_engine_is_not_checked_and_a_warning_says_so(
    pattern: str, why: str
) -> None:
    by_name = {"patternProperties": {pattern: False}, "additionalProperties": False}
    entry = shown(
        {"properties": {"a": {"pattern": pattern}, "b": by_name if len(pattern) < 1_000 else {}}}
    )

    assert complaint(entry, {"a": "anything", "b": {"maybe it would match": 1}}) == ""
    assert [why in warning for warning in warned(entry)] == [True]


def test_a_tool_is_warned_about_once_and_a_server_has_few_lines() -> None:
    entry = tool({"properties": {"a": {"pattern": "(?!a)"}}})
    others = [dataclasses.replace(entry, own=f"t{number}") for number in range(1_000)]

    assert len(warned(entry, entry)) == 1
    assert len(warned(*others)) == 20


def test_format_and_content_are_notes_and_not_asserted() -> None:
    note = {"format": "email", "contentMediaType": "application/json", "contentEncoding": "base64"}
    assert complaint(shown({"properties": {"a": note}}), {"a": "{"}) == ""


def test_numbers_are_what_was_written() -> None:
    entry = shown(
        {
            "properties": {
                "a": {"multipleOf": 0.1},
                "b": {"multipleOf": 1e-300},
                "c": {"type": "integer"},
                "d": {"maximum": 2**63 - 1},
            }
        }
    )

    assert complaint(entry, {"a": 0.3, "b": 1e308, "c": 1.0, "d": 2**63 - 1}) == ""
    for wrong in ({"a": 0.35}, {"b": 5e-324}, {"c": 1.5}, {"d": 2**63}):
        assert complaint(entry, wrong) != ""


# ---- nothing holds the loop ----


def chain(keyword: str, length: int, last: Any) -> dict[str, Any]:
    """Definitions, each of which refers to the next one twice: 2**length ways."""
    steps = {
        f"d{number}": {keyword: [{"$ref": f"#/$defs/d{number + 1}"}] * 2}
        for number in range(length)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**steps, f"d{length}": last}}


def nested_unevaluated(levels: int) -> dict[str, Any]:
    if not levels:
        return {"properties": {"z": True}}
    inner = nested_unevaluated(levels - 1)
    return {"unevaluatedProperties": {"type": "integer"}, "anyOf": [inner, inner]}


def array(**items: Any) -> dict[str, Any]:
    return {"properties": {"a": {"type": "array", "items": items}}}


def of(keyword: str, parts: list[Any]) -> dict[str, Any]:
    return {"properties": {"a": {keyword: parts}}}


HOSTILE: dict[str, tuple[dict[str, Any], Any]] = {
    "16 chained definitions": (chain("allOf", 16, {"type": "object"}), {}),
    "40 chained definitions": (chain("allOf", 40, {}), {}),
    "40 chained alternatives that fail": (chain("anyOf", 40, {"type": "string"}), {}),
    "40 chained exclusive alternatives": (chain("oneOf", 40, {"type": "string"}), {}),
    "a reference to itself": ({"$ref": "#"}, {}),
    "two references to itself": ({"allOf": [{"$ref": "#"}, {"$ref": "#"}]}, {}),
    "alternatives that are itself": ({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}, {}),
    "a negation of itself": ({"not": {"$ref": "#"}}, {}),
    "items that fail": (array(type="string"), {"a": [0] * 300_000}),
    "items that fail every alternative": (
        array(anyOf=[{"const": number} for number in range(300)]),
        {"a": [-1] * 100_000},
    ),
    "items that fit the last alternative": (
        array(oneOf=[{"const": number} for number in range(300)]),
        {"a": [299] * 100_000},
    ),
    "unevaluated in unevaluated": (
        nested_unevaluated(9),
        {str(number): 1 for number in range(1_000)},
    ),
    "patterns for every name": (
        {"patternProperties": {f"a{number}$": {} for number in range(200)}},
        {f"k{number}": 1 for number in range(50_000)},
    ),
    "a pattern of many steps on a long text": (
        {"properties": {"a": {"pattern": "[01]*1[01]{3000}2"}}},
        {"a": "0110100110010110" * 10_000},
    ),
    "a pattern with a large automaton": (
        {"properties": {"a": {"pattern": "[01]*1[01]{15}2"}}},
        {"a": "0110100110010110" * 200_000},
    ),
    "names that fail": (
        {"propertyNames": {"pattern": "^[a-z]+$"}},
        {f"{number}": 1 for number in range(200_000)},
    ),
    "contains what is not there": (
        {"properties": {"a": {"contains": {"type": "string", "const": "x"}}}},
        {"a": [1, "y"] * 100_000},
    ),
    "the same required names, 2,000 times": (
        {
            "allOf": [{"$ref": "#/$defs/r"}] * 2_000,
            "$defs": {"r": {"required": [str(number) for number in range(2_000)]}},
        },
        {str(number): 1 for number in range(1_999)},
    ),
    "uniqueItems, 2,000 times": (
        of("allOf", [{"uniqueItems": True}] * 2_000),
        {"a": ["x" * 1_000 + str(number) for number in range(4_000)]},
    ),
    "a huge item in uniqueItems": (
        of("allOf", [{"uniqueItems": True}] * 2_000),
        {"a": [["x.e" * 1_300_000], 1]},
    ),
    "a huge text against many constants": (
        of("allOf", [{"not": {"const": "x" * 900 + str(number)}} for number in range(1_000)]),
        {"a": "x" * 4_000_000},
    ),
    "multiples of almost nothing": (
        array(multipleOf=5e-324),
        {"a": [1.7976931348623157e308] * 50_000},
    ),
    "dependencies of everything on everything": (
        {"dependentRequired": {str(n): [str(m) for m in range(4)] for n in range(2_000)}},
        {str(number): 1 for number in range(2_000)},
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_takes_more_than_its_units_and_all_of_it_ends_in_a_verdict(name: str) -> None:
    schema, arguments = HOSTILE[name]
    entry = shown(schema)

    assert spent(entry, arguments) > 0
    verdict = POLICY.arguments(entry, arguments, None)
    assert verdict is None or isinstance(verdict, (Error, Outcome))


@pytest.mark.parametrize(
    "name",
    [
        "16 chained definitions",
        "40 chained definitions",
        "a reference to itself",
        "two references to itself",
        "a negation of itself",
        "a pattern of many steps on a long text",
        "uniqueItems, 2,000 times",
    ],
)
def test_what_is_too_costly_is_refused_and_not_let_through(name: str) -> None:
    schema, arguments = HOSTILE[name]

    assert refused(shown(schema), arguments)


def test_at_most_10_000_references_are_followed() -> None:
    entry = shown(
        {"properties": {"a": {"items": {"$ref": "#/$defs/n"}}}, "$defs": {"n": {"type": "number"}}}
    )

    assert complaint(entry, {"a": [1] * 9_999}) == ""
    assert refused(entry, {"a": [1] * 10_001})


def test_honest_large_arguments_pass() -> None:
    numbers = shown(array(type="number"))
    assert complaint(numbers, {"a": [0.5] * 400_000}) == ""
    texts = shown({"properties": {"a": {"uniqueItems": True, "items": {"type": "string"}}}})
    assert complaint(texts, {"a": [f"item number {number}" for number in range(50_000)]}) == ""
    rows = shown(
        array(type="object", properties={"x": {"type": "integer"}, "y": {"type": "string"}})
    )
    assert complaint(rows, {"a": [{"x": number, "y": "text"} for number in range(20_000)]}) == ""
    base64 = shown({"properties": {"a": {"pattern": "^([A-Za-z0-9+/]{4})*(..==|...=)?$"}}})
    assert refused(base64, {"a": "AAAA" * 1_000_000}) or complaint(base64, {"a": "AAAA"}) == ""
    plain = shown({"properties": {"a": {"pattern": "^[A-Za-z0-9+/=]*$"}}})
    assert complaint(plain, {"a": "A" * 3_000_000}) == ""


def test_unique_items_of_43_kb_cost_about_one_unit_each_and_not_their_square() -> None:
    entry = shown({"properties": {"a": {"uniqueItems": True}}})
    items = [{"id": number, "name": f"name {number}"} for number in range(1_400)]
    assert len(json.dumps(items)) > 43_000

    assert complaint(entry, {"a": items}) == ""
    assert spent(entry, {"a": items}) < 20 * len(items)
    assert complaint(entry, {"a": [*items, {"name": "name 7", "id": 7.0}]}) != ""


def test_a_tree_may_be_as_deep_as_a_message() -> None:
    entry = shown({"properties": {"a": {"$ref": "#"}}, "additionalProperties": False})
    tree: Any = {}
    for _ in range(190):
        tree = {"a": tree}

    assert complaint(entry, tree) == ""


# ---- the evaluator against jsonschema ----

NAMES = st.sampled_from(["a", "b", "ab", "c"])
SCALAR = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([0.5, 1.0, -0.5]), st.sampled_from(["", "a", "ab", "b"])
)  # fmt: skip
INSTANCES = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
SMALL = st.integers(0, 3)
TYPE = st.sampled_from(["object", "array", "string", "number", "integer", "boolean", "null"])


def schemas(draft: int) -> st.SearchStrategy[Any]:
    def deeper(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        some = st.lists(inner, min_size=1, max_size=3)
        by_name = st.dictionaries(NAMES, inner, max_size=3)
        plain = {
            "type": TYPE | st.lists(TYPE, min_size=1, max_size=3, unique=True),
            # Unique, as drafts 4 and 6 want it: by their text, which knows true from 1.
            "enum": st.lists(
                INSTANCES.filter(lambda value: "." not in json.dumps(value)),
                min_size=1,
                max_size=3,
                unique_by=json.dumps,
            ),
            "properties": by_name,
            "patternProperties": st.dictionaries(st.sampled_from(["^a", "b$"]), inner, max_size=2),
            "additionalProperties": inner | st.booleans(),
            "required": st.lists(NAMES, min_size=1, max_size=2, unique=True),
            "minProperties": SMALL,
            "maxProperties": SMALL,
            "items": inner,
            "minItems": SMALL,
            "maxItems": SMALL,
            "uniqueItems": st.booleans(),
            "minLength": SMALL,
            "maxLength": SMALL,
            "pattern": st.sampled_from(["^a", "b$", "^$"]),
            "minimum": SMALL,
            "maximum": SMALL,
            "multipleOf": st.sampled_from([1, 2, 0.5]),
            "allOf": some,
            "anyOf": some,
            "oneOf": some,
            "not": inner,
        }
        since_6 = {
            "const": INSTANCES,
            "contains": inner,
            "propertyNames": inner,
            "exclusiveMinimum": SMALL,
            "exclusiveMaximum": SMALL,
        }
        since_7 = {"if": inner, "then": inner, "else": inner}
        to_7 = {
            "dependencies": st.dictionaries(
                NAMES, inner | st.lists(NAMES, min_size=1, unique=True), max_size=2
            )
        }
        since_2019 = {
            "dependentSchemas": by_name,
            "dependentRequired": st.dictionaries(NAMES, st.lists(NAMES, unique=True), max_size=2),
            "minContains": SMALL,
            "maxContains": SMALL,
            "unevaluatedProperties": inner | st.booleans(),
            "unevaluatedItems": inner | st.booleans(),
        }
        of_draft = {
            **plain,
            **(since_6 if draft >= 6 else {}),
            **(since_7 if draft >= 7 else {}),
            **(to_7 if draft <= 7 else since_2019),
            **({"prefixItems": some} if draft >= 2020 else {}),
        }  # fmt: skip
        return st.fixed_dictionaries({}, optional=of_draft).flatmap(
            lambda schema: (
                st.just(schema) if len(schema) < 6 else st.just(dict([*schema.items()][:5]))
            )
        )

    return st.recursive(
        st.just({}) if draft == 4 else st.sampled_from([{}, True, False]), deeper, max_leaves=6
    )


@pytest.mark.parametrize("uri", DRAFTS)
@given(st.data())
def test_the_verdict_is_that_of_jsonschema(uri: str, data: st.DataObject) -> None:
    draft = next(number for bare, number in atrax._DIALECTS.items() if bare in uri)
    schema = {"$schema": uri, "type": "object", "properties": {"x": data.draw(schemas(draft))}}
    entry = shown(schema)
    theirs = DRAFTS[uri](schema)
    for instance in data.draw(st.lists(INSTANCES, min_size=3, max_size=3)):
        # Draft 4 may say that 1.0 is no integer; a model that writes 1.0 means 1.
        if draft == 4 and "1.0" in json.dumps(instance):
            continue
        try:
            expected = theirs.is_valid({"x": instance})
        except TypeError:  # jsonschema 4.26 trips over a boolean "items" beside unevaluatedItems
            continue
        assert (complaint(entry, {"x": instance}) == "") == expected, (schema, instance)


WORDS = [*(word for draft in atrax._RULES_OF.values() for word in draft), "type", "$id", "id", "$anchor", "$defs", "definitions", "then", "else", "minContains", "additionalItems", "$dynamicRef", "$schema", "x-mcp-header"]  # fmt: skip
JUNK_SCHEMAS = st.recursive(
    st.sampled_from([*SCALARS, "#", "#/$defs/a", "#a", "a", "http://[/", "(", "\\p{L}", [], {}]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted({*WORDS, "a"})), inner, max_size=4)
    ),
    max_leaves=12,
)  # fmt: skip


@pytest.mark.parametrize("uri", DRAFTS)
@given(schema=st.dictionaries(st.sampled_from(sorted(WORDS)), JUNK_SCHEMAS), value=INSTANCES)
def test_no_schema_raises_anything(uri: str, schema: dict[str, Any], value: Any) -> None:
    entry = tool({**schema, "$schema": uri})
    if POLICY.definition(entry) == "":
        POLICY.arguments(entry, {"a": value, "b": value}, {})


# ---- mirrored headers ----

MIRRORED = {
    "properties": {
        "region": {"type": "string", "x-mcp-header": "Region"},
        "count": {"type": "integer", "x-mcp-header": "Count"},
        "deep": {
            "type": "object",
            "properties": {"flag": {"type": "boolean", "x-mcp-header": "Flag"}},
        },
    }
}


@pytest.mark.parametrize(
    ("arguments", "headers"),
    [
        ({}, {}),
        ({"region": None}, {}),
        ({"region": "eu"}, {"region": "eu"}),
        ({"region": ""}, {"region": ""}),
        ({"region": "Hello, 世界"}, {"region": "=?base64?SGVsbG8sIOS4lueVjA==?="}),
        ({"region": " padded "}, {"region": "=?base64?IHBhZGRlZCA=?="}),
        ({"region": "=?base64?literal?="}, {"region": "=?base64?PT9iYXNlNjQ/bGl0ZXJhbD89?="}),
        ({"count": 42}, {"count": "42"}),
        ({"count": 42}, {"count": "42.0"}),
        ({"count": 42.0}, {"count": "42"}),
        ({"count": -7}, {"count": "-7"}),
        ({"deep": {"flag": True}}, {"flag": "true"}),
        ({"deep": {}}, {"unknown": "x"}),
        ({"flag": True}, {}),
    ],
)
def test_headers_that_mirror_the_arguments_pass(arguments: Any, headers: dict[str, str]) -> None:
    mirrored = {f"mcp-param-{name}": value for name, value in headers.items()}

    assert not isinstance(POLICY.arguments(shown(MIRRORED), arguments, mirrored), Error)


@pytest.mark.parametrize(
    ("arguments", "headers"),
    [
        ({"region": "eu"}, {}),
        ({}, {"region": "eu"}),
        ({"region": None}, {"region": "null"}),
        ({"region": "eu"}, {"region": "us"}),
        ({"region": "eu"}, {"region": "EU"}),
        ({"region": "é"}, {"region": "é"}),
        ({"region": "a\x00"}, {"region": "a\x00"}),
        ({"region": "=?base64?"}, {"region": "=?base64??="}),
        ({"region": "Hello"}, {"region": "=?base64?SGVsbG8?="}),
        ({"region": "Hello"}, {"region": "=?base64?SGVs bG8=?="}),
        ({"region": "Hello"}, {"region": "=?base64?SGVsbG9=?="}),
        ({"region": "\ufffd"}, {"region": "=?base64?/w==?="}),
        ({"region": "Hello"}, {"region": "=?BASE64?SGVsbG8=?="}),
        ({"count": 42}, {"count": "43"}),
        ({"count": 42}, {"count": "0x2a"}),
        ({"count": 2**63}, {"count": str(2**63 + 1)}),
        ({"count": 1}, {"count": "9" * 100_000}),
        ({"deep": {"flag": True}}, {"flag": "True"}),
        ({"deep": {"flag": True}}, {"flag": "1"}),
        ({"deep": {"flag": True}}, {}),
        ({"flag": True}, {"flag": "true"}),
    ],
)
def test_headers_that_do_not_are_refused_with_400(arguments: Any, headers: dict[str, str]) -> None:
    mirrored = {f"mcp-param-{name}": value for name, value in headers.items()}

    verdict = POLICY.arguments(shown(MIRRORED), arguments, mirrored)

    assert isinstance(verdict, Error)
    assert (verdict.code, verdict.status) == (atrax.HEADER_MISMATCH, 400)


def test_a_legacy_client_mirrors_nothing() -> None:
    assert POLICY.arguments(shown(MIRRORED), {"region": "eu"}, None) is None


@pytest.mark.parametrize(
    "schema",
    [
        {"x-mcp-header": "Root"},
        {"properties": {"a": {"type": "string", "x-mcp-header": ""}}},
        {"properties": {"a": {"type": "string", "x-mcp-header": "a b"}}},
        {"properties": {"a": {"type": "string", "x-mcp-header": "a\r\n"}}},
        {"properties": {"a": {"type": "string", "x-mcp-header": "é"}}},
        {"properties": {"a": {"type": "string", "x-mcp-header": 1}}},
        {"properties": {"a": {"type": "number", "x-mcp-header": "A"}}},
        {"properties": {"a": {"type": "object", "x-mcp-header": "A"}}},
        {"properties": {"a": {"x-mcp-header": "A"}}},
        {"properties": {"a": {"type": ["string", "null"], "x-mcp-header": "A"}}},
        {"properties": {name: {"type": "string", "x-mcp-header": name} for name in ("a", "A")}},
        {"properties": {"a": {"items": {"type": "string", "x-mcp-header": "A"}}}},
        {"anyOf": [{"properties": {"a": {"type": "string", "x-mcp-header": "A"}}}]},
        {"if": {"properties": {"a": {"type": "string", "x-mcp-header": "A"}}}},
        {"$defs": {"a": {"type": "string", "x-mcp-header": "A"}}},
        {"$ref": "#/x", "x": {"type": "string", "x-mcp-header": "A"}},
    ],
    ids=str,
)  # fmt: skip
def test_an_invalid_annotation_hides_the_tool(schema: Any) -> None:
    assert "x-mcp-header" in hidden(schema)


def test_a_property_that_is_called_like_the_annotation_is_only_a_property() -> None:
    shown({"properties": {"x-mcp-header": {"type": "string"}}, "default": {"x-mcp-header": 1}})
