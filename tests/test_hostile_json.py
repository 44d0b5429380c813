"""JSON that is made to break a gateway, from clients and from children: an error, no request, no stall, no exception."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import wire
from conftest import Running, Start, child, eventually
from promises import promise

CONFIG: dict[str, Any] = {
    "mcpServers": {"a": child("does"), "b": child("does")},
    "limits": {"line": 1 << 20, "body": 1 << 20},
    "log": {"format": "json"},
}
DEEP, DEEPER = (b"[" * levels + b"]" * levels for levels in (300, 100_000))
LIMIT = 20.0  # seconds for what takes some thousandths; a stall would take forever


async def post(client: wire.Modern | wire.Legacy, body: bytes) -> tuple[int, Any]:
    """Send `body` as a tools/call of a__do; status and response."""
    if isinstance(client, wire.Legacy):
        headers = client.due_headers()
    else:
        headers = {
            "Content-Type": "application/json",
            "Accept": wire.BOTH,
            "MCP-Protocol-Version": wire.MODERN,
            "Mcp-Method": "tools/call",
            "Mcp-Name": "a__do",
        }
    exchange = await client.http.request("POST", client.path, headers, body)
    [message] = [message async for message in exchange.messages()]
    return exchange.status, message


def call(client: wire.Modern | wire.Legacy, arguments: bytes, envelope: bytes = b"") -> bytes:
    """A tools/call of a__do; `envelope` are members before the others."""
    meta = json.dumps(client.meta() if isinstance(client, wire.Modern) else {}).encode()
    params = b'{"name":"a__do","arguments":%b,"_meta":%b}' % (arguments, meta)
    return b'{%b"jsonrpc":"2.0","id":7,"method":"tools/call","params":%b}' % (envelope, params)


async def calls(gateway: Running) -> int:
    """How many calls the child has got, this one not counted."""
    return int((await gateway.modern().call("a__do", {"what": "calls"})).text) - 1


def check_log(gateway: Running) -> None:
    """No exception: none is written, and none was caught where only bugs are."""
    for line in gateway.log:
        assert "Traceback" not in line and '"internal.error"' not in line, line


# ---- From clients ----

# What no JSON reader should take, or what two would read differently: -32700.
NO_JSON = {
    "300 levels": b'{"what":"echo","text":%b}' % DEEP,
    "100,000 levels": b'{"what":"echo","text":%b}' % DEEPER,
    "NaN": b'{"what":"echo","text":NaN}',
    "Infinity": b'{"what":"echo","text":-Infinity}',
    "a lone surrogate": rb'{"what":"echo","text":"\ud800"}',
    "a lone surrogate in a key": rb'{"what":"echo","\udfff":1}',
    "no UTF-8": b'{"what":"echo","text":"\xff\xfe"}',
    "a NUL": b'{"what":"echo","text":"\x00"}',
    "a comment": b'{"what":"echo" /* , "x": 1 */}',
    "a comma too many": b'{"what":"echo",}',
    "a leading zero": b'{"what":"echo","n":007}',
    # Valid, but made of so many parts that to read it would stall everybody.
    "lists": b'{"what":"echo","x":[%b[]]}' % (b"[]," * 60_000),
    "objects that name nothing": b'{"what":"echo","x":[%b[]]}' % (b"{}," * 60_000),
    "members": b'{"what":"echo",%b}' % b",".join(b'"%05x" :1' % n for n in range(60_000)),
    "values": b'{"what":"echo","x":[%b1]}' % (b"1," * 300_000),
    "strings": b'{"what":"echo","x":[%b1]}' % (b'"[",' * 120_000),
}
# Valid, but no 64-bit number: it would be another number at the child.
TOO_LARGE = {
    "65 bits": b"36893488147419103232",
    "65 bits, negative": b"-9223372036854775809",
    "10,000 digits": b"9" * 10_000,
    "beyond double": b"1e400",
}


@promise("json.refused", "json.exact")
async def test_what_cannot_be_read_in_one_way_is_refused_and_not_forwarded(atrax: Start) -> None:
    gateway = await (await atrax(CONFIG)).ready()

    for client in (gateway.modern(), await gateway.legacy()):
        for name, arguments in NO_JSON.items():
            status, answer = await post(client, call(client, arguments))
            assert (status, answer["error"]["code"]) == (400, -32700), (name, answer)
        for name, number in TOO_LARGE.items():
            _, answer = await post(client, call(client, b'{"what":"echo","n":%b}' % number))
            assert answer["error"]["code"] in (-32700, -32602), (name, answer)
        bom, whole = b"\xef\xbb\xbf", call(client, b'{"what":"calls"}')
        for body in (bom + whole, whole + whole, whole[:-1], whole.replace(b'"', b"'"), b"nul"):
            assert (await post(client, body))[0] == 400, body
        for body in (b"null", b"42", b'"x"', b"{}", b'{"jsonrpc":"2.0"}'):
            status, answer = await post(client, body)
            assert (status, answer["error"]["code"]) == (400, -32600), body

    assert await calls(gateway) == 0
    check_log(gateway)


@promise("json.refused")
async def test_what_stands_in_a_string_is_one_part_whatever_it_looks_like(atrax: Start) -> None:
    gateway = await atrax(CONFIG)
    text = '{"a\\": [{}, "b:c"]}\n' * 30_000
    for client in (gateway.modern(), await gateway.legacy()):
        arguments = json.dumps({"what": "echo", "text": text}).encode()
        _, answer = await post(client, call(client, arguments))
        assert answer["result"]["content"][0]["text"] == text


@promise("json.exact")
async def test_64_bit_numbers_reach_the_child_as_they_are(atrax: Start) -> None:
    gateway = await (await atrax(CONFIG)).ready()
    numbers = [2**63, 2**64 - 1, -(2**63), 2**53 + 1, 10**18]

    for client in (gateway.modern(), await gateway.legacy()):
        answer = await client.call("a__do", {"what": "line", "numbers": numbers})
        assert json.loads(answer.text)["params"]["arguments"]["numbers"] == numbers


@promise("json.one_reading")
async def test_of_equal_keys_the_child_sees_the_one_that_was_checked(atrax: Start) -> None:
    gateway = await (await atrax(CONFIG)).ready()

    for client in (gateway.modern(), await gateway.legacy()):
        body = call(client, b'{"what":"die","x":1,"what":"line","x":2}')
        _, answer = await post(client, body)
        line = answer["result"]["content"][0]["text"]
        assert json.loads(line)["params"]["arguments"] == {"what": "line", "x": 2}
        assert "die" not in line and line.count('"x"') == 1
        # Of the envelope too: what is checked, looked up and answered is the last, and only that.
        first = b'"id":6,"method":"ping","params":{"name":"b__do","arguments":{"what":"die"}},'
        status, answer = await post(client, call(client, b'{"what":"line"}', first))
        assert (status, answer["id"]) == (200, 7)
        line = answer["result"]["content"][0]["text"]
        assert "b__do" not in line and line.count('"method"') == 1
    check_log(gateway)


@promise("json.one_reading")
async def test_members_that_json_rpc_does_not_know_never_reach_a_child(atrax: Start) -> None:
    gateway = await (await atrax(CONFIG)).ready()

    for client in (gateway.modern(), await gateway.legacy()):
        envelope = b'"result":{},"error":null,"extra":1,'
        _, answer = await post(client, call(client, b'{"what":"line"}', envelope))
        line = json.loads(answer["result"]["content"][0]["text"])
        assert set(line) == {"jsonrpc", "id", "method", "params"}


async def test_a_body_or_line_beyond_its_limit_harms_nobody_else(atrax: Start) -> None:
    gateway = await (await atrax(CONFIG)).ready()
    client = gateway.modern()
    other = asyncio.create_task(gateway.modern().call("b__do", {"what": "wait"}))
    same = asyncio.create_task(gateway.modern().call("a__do", {"what": "wait"}))
    await eventually(lambda: in_flight(gateway, "a"), "not in flight")

    exchange = await client.http.request(
        "POST", client.path, {"Content-Type": "application/json"}, b" " * (1 << 20) + b"{}"
    )
    assert exchange.status == 413
    # Bodies below the limit, and lines: one of the child's ends the child, and nothing but it.
    long = await gateway.modern().call("a__do", {"what": "echo", "text": "x" * 900_000})
    assert len(long.text) == 900_000
    assert (await gateway.modern().call("a__do", {"what": "long", "size": 2 << 20})).code == 1000
    assert (await same).code == 1000
    assert not other.done()
    assert (await gateway.modern().call("b__do", {"what": "release"})).text == "done"
    assert (await other).text == "released"
    assert (await gateway.modern().call("a__do", {"what": "echo", "text": "anew"})).text == "anew"
    check_log(gateway)


async def in_flight(gateway: Running, server: str) -> bool:
    return bool((await gateway.status())["servers"][server]["inFlight"])


# ---- From children ----

HEAD = '{"jsonrpc":"2.0","id":@ID@,'
RIGHT = '"result":{"content":[]}'
FAILS_ITS_CALL = {
    "300 levels": HEAD + '"result":{"x":' + DEEP.decode() + "}}",
    "100,000 levels": HEAD + '"result":{"x":' + DEEPER.decode() + "}}",
    "300 levels in an error": HEAD
    + '"error":{"code":1,"message":"","data":'
    + DEEP.decode()
    + "}}",
    "65 bits": HEAD + '"result":{"content":[],"n":36893488147419103232}}',
    "NaN": HEAD + '"result":{"content":[],"n":NaN}}',
    "a lone surrogate": HEAD + r'"result":{"content":[],"s":"\ud800"}}',
    "no UTF-8": HEAD + '"result":{"content":[],"s":"@BAD@"}}',
    "a foreign id behind the result": HEAD + RIGHT + ',"id":@OTHER@}',
    "two results": HEAD + RIGHT + "," + RIGHT + "}",
    "an error behind the result": HEAD + RIGHT + ',"error":{"code":1,"message":""}}',
    "a second message": HEAD + RIGHT + "}" + HEAD.replace("@ID@", "@OTHER@") + RIGHT + "}",
    "a list as result": HEAD + '"result":[]}',
    "null as result": HEAD + '"result":null}',
    "a text as error": HEAD + '"error":"no"}',
    "half a line": HEAD + '"result":{"content":[',
}
IGNORED = {  # answers nobody; the call is answered by what follows
    "its id as a text": '{"jsonrpc":"2.0","id":"@ID@",' + RIGHT + "}",
    "its id as a fraction": '{"jsonrpc":"2.0","id":@ID@.5,' + RIGHT + "}",
    "null as id": '{"jsonrpc":"2.0","id":null,' + RIGHT + "}",
    "an id of the future": '{"jsonrpc":"2.0","id":99999999,' + RIGHT + "}",
    "an id of 10,000 digits": '{"jsonrpc":"2.0","id":' + "9" * 10_000 + "," + RIGHT + "}",
    "a huge token": '{"jsonrpc":"2.0","method":"notifications/progress","params":'
    '{"progressToken":' + "9" * 30 + ',"progress":1}}',
    "nothing of ours": '{"jsonrpc":"1.0","method":42,"params":[[]]}\n\x00\n{}\n[]\n[[]]\n""',
    "no list changed": '{"jsonrpc":"2.0","method":"notifications/tools/list_changed","params":7}',
}


@promise("json.child_lies")
async def test_a_child_that_writes_nonsense_fails_that_call_alone(atrax: Start) -> None:
    gateway = await (await atrax(CONFIG)).ready()
    client, session = gateway.modern(), await gateway.legacy()
    # On the same child: its id is what hostile members name.
    other = asyncio.create_task(gateway.modern().call("a__do", {"what": "wait"}))
    await eventually(lambda: in_flight(gateway, "a"), "not in flight")

    for one in (client, session):
        for name, text in FAILS_ITS_CALL.items():
            answer = await one.call("a__do", {"what": "say", "text": text})
            assert answer.code == -32603, (name, answer.response)
            assert not other.done(), name
        for name, text in IGNORED.items():
            order = {"what": "say", "text": text + "\n" + HEAD + RIGHT + "}"}
            answer = await one.call("a__do", order)
            assert answer.result["content"] == [], name
            assert not other.done(), name

    assert (await client.call("a__do", {"what": "release"})).text == "done"
    assert (await other).text == "released"
    assert (await gateway.status())["servers"]["a"]["restarts"] == 0
    check_log(gateway)


# ---- Schemas ----


def deep_schema(levels: int) -> str:
    """A schema as text: json itself fails at a thousand levels."""
    return '{"type":"object","properties":{"x":' * levels + "{}" + "}}" * levels


def bomb(links: int) -> dict[str, Any]:
    """Each definition names the next one twice: 2^links references to follow."""
    chain = {
        f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}, {"$ref": f"#/$defs/d{n + 1}"}]}
        for n in range(links)
    }
    return {"type": "object", "$ref": "#/$defs/d0", "$defs": {**chain, f"d{links}": {}}}


@promise("schema.never_fetched")
async def test_a_remote_reference_is_never_asked_and_hides_its_tool(atrax: Start) -> None:
    asked: list[str] = []

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(str(writer.get_extra_info("peername")))
        writer.close()

    async with await asyncio.start_server(connected, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        remote = {"type": "object", "properties": {"x": {"$ref": f"{url}/schema.json"}}}
        hostile = {
            "plain": remote,
            "whole": {"type": "object", "$ref": f"{url}/x#/y"},
            "relative": {**remote, "$id": f"{url}/base/", "properties": {"x": {"$ref": "other"}}},
            "dynamic": {"type": "object", "properties": {"x": {"$dynamicRef": f"{url}/d#n"}}},
            "dialect": {"type": "object", "$schema": f"{url}/dialect"},
            "in-defs": {"type": "object", "$defs": {"x": remote}, "properties": {"x": {"$ref": "#/$defs/x"}}},
            "file": {"type": "object", "properties": {"x": {"$ref": "file:///etc/passwd"}}},
        }  # fmt: skip
        tools = {**hostile, "good": {"type": "object"}}
        gateway = await (
            await atrax({**CONFIG, "mcpServers": {"s": child("schemas", json.dumps(tools))}})
        ).ready()

        for client in (gateway.modern(), await gateway.legacy()):
            names = [tool["name"] for tool in await client.list("tools")]
            refused = [await client.call(f"s__{name}", {"x": 1}) for name in hostile]
            assert names == ["s__good"]
            assert [answer.code for answer in refused] == [-32602] * len(hostile)
            assert (await client.call("s__good", {"x": 1})).text == '{"x": 1}'

    hidden = (await gateway.status())["servers"]["s"]["hidden"]
    assert {item["name"] for item in hidden} == set(hostile)
    assert all(item["reason"] for item in hidden)
    assert asked == []
    check_log(gateway)


@promise("schema.never_stalls")
async def test_no_schema_and_no_argument_stalls_the_others(atrax: Start) -> None:
    text = {"type": "string"}
    tools = {
        "pattern": {"type": "object", "properties": {"x": {"type": "string", "pattern": "^(a+)+$"}}},
        "names": {"type": "object", "patternProperties": {"^(a+)+$": text}},
        "strict": {"type": "object", "patternProperties": {"^(a|aa)+$": text}, "additionalProperties": False},
        "bomb": bomb(60),
        "unique": {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}},
        "loop": {"type": "object", "$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        "deep": json.loads(deep_schema(60)),
        "deeper": json.loads(deep_schema(95)),
    }  # fmt: skip
    bad = "a" * 60 + "!"
    nested: dict[str, Any] = {}
    for _ in range(55):
        nested = {"x": nested}
    arguments = {
        "pattern": {"x": bad},
        "names": {bad: "y"},
        "strict": {bad: "y"},
        "bomb": {"x": 1},
        "unique": {"x": [[number, {"n": number}] for number in range(5_000)]},
        "loop": {"x": 1},
        "deep": nested,
        "deeper": nested,
    }
    servers = {
        "s": child("schemas", json.dumps(tools)),
        "toodeep": child("schemas", f'{{"t": {deep_schema(300)}}}'),
        "a": child("does"),
    }
    gateway = await (await atrax({**CONFIG, "mcpServers": servers})).ready()
    over = asyncio.Event()

    async def meanwhile() -> int:
        client, answered = gateway.modern(), 0
        while not over.is_set() or not answered:
            assert (await client.call("a__do", {"what": "echo", "text": "x"})).text == "x"
            answered += 1
        return answered

    async with asyncio.timeout(LIMIT):
        others = asyncio.create_task(meanwhile())
        answers = {}
        for name, given in arguments.items():
            for client in (gateway.modern(), await gateway.legacy()):
                answers[name] = await client.call(f"s__{name}", given)
        over.set()
        assert await others > 0

    # Refused with a reason: as a result that a model can correct, or as an error.
    for name in ("pattern", "strict"):
        assert answers[name].result["isError"] is True, name
    for name in ("bomb", "loop"):
        assert answers[name].code == -32602, name
    # ("deeper" may be answered or refused as too deep: it only must not harm the others.)
    # What is honest passes: a name that no pattern knows, unique items, many levels.
    for name in ("names", "unique", "deep"):
        assert json.loads(answers[name].text) == arguments[name], name
    assert (await gateway.modern().call("s__pattern", {"x": "aaa"})).text == '{"x": "aaa"}'
    # 300 levels are more than a message may have: no such tool, and the others have theirs.
    assert (await gateway.modern().call("toodeep__t")).code in (-32602, 1010)
    check_log(gateway)
