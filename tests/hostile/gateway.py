"""Requests that are HTTP without fault, and that the gateway must refuse all the same.

For a gateway with the server `smuggled` (children/does.py), `allowed_hosts` ["a"] and `allowed_origins`
["https://app.example"], without auth. Answered as what they are, none reaches a child."""

from __future__ import annotations

from hostile.row import TARGET, Row, body, call, get

REBIND = "DNS rebinding; MCP 2026-07-28, Streamable HTTP, Security"
CSRF = "Fetch: a simple request, sent without a preflight"
PATHS = "RFC 3986, 6.2.2; CWE-22"
JSON = "RFC 8259; PROTOCOL, JSON"
MIRROR = "MCP 2026-07-28: headers say what the body says"

LEGACY = b'{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"do"}}'


def at(target: bytes, status: int = 404) -> Row:
    """A call at `target`, which is nearly an endpoint."""
    name = target.decode("ascii", "backslashreplace")
    return Row(f"path {name}", call(target=target), (status,), PATHS)


def json_row(name: str, message: bytes, status: int = 400, source: str = JSON) -> Row:
    return Row(f"json {name}", call(message), (status,), source)


def host(value: bytes, **more: bytes) -> Row:
    return Row(f"host {value.decode()}", call(Host=value, **more), (403,), REBIND)


def origin(value: bytes, status: int = 403) -> Row:
    return Row(f"origin {value.decode()}", call(Origin=value), (status,), REBIND)


# fmt: off
ROWS = [
    # ---- Host: a name that an attacker made point at us ----
    host(b"evil.example"), host(b"evil.example:4000"), host(b"localhost.evil.example"), host(b"127.0.0.1.nip.io"),
    host(b"0.0.0.0"), host(b"[::]"), host(b"[::ffff:127.0.0.1]"), host(b"2130706433"), host(b"0x7f000001"),
    host(b"127.1"), host(b"017700000001"), host(b"a.evil.example"), host(b"aa"), host(b"a.local"), host(b"169.254.169.254"),
    host(b"metadata.google.internal"), host(b"localhost."),
    Row("host forwarded", call(Host=b"evil.example", X_Forwarded_Host=b"a", Forwarded=b"host=a", X_Host=b"a"), (403,),
        "Host header attacks, PortSwigger"),
    Row("host absolute", b"GET http://evil.example/status HTTP/1.1\r\nHost: evil.example\r\n\r\n", (403,), REBIND),
    Row("host status", get(b"Host: evil.example", target=b"/status"), (403,), REBIND),
    Row("host metrics", get(b"Host: evil.example", target=b"/metrics"), (403,), REBIND),
    Row("host sse", get(b"Host: evil.example", target=b"/sse"), (403,), REBIND),
    # ---- Origin ----
    origin(b"null"), origin(b"http://evil.example"), origin(b"http://a.evil.example"), origin(b"http://app.example"),
    origin(b"https://app.example.evil.example"), origin(b"https://app.example:444"), origin(b"https://app.example/"),
    origin(b"https://evil.example#https://app.example"), origin(b"https://app.example@evil.example"),
    origin(b"https://app.example, https://evil.example"), origin(b"https://xapp.example"), origin(b"file://"),
    origin(b"https://127.0.0.1"), origin(b"http://a:1"), origin(b"*"), origin(b"a"), origin(b"https://app.example "
        b"https://evil.example"),
    Row("origin preflight", call(b"", method=b"OPTIONS", Origin=b"https://evil.example",
        Access_Control_Request_Method=b"POST", Access_Control_Request_Headers=b"content-type"), (403,), REBIND),
    Row("origin on status", get(b"Host: a", b"Origin: https://evil.example", target=b"/status"), (403,), REBIND),
    # ---- what a page may send without asking first ----
    Row("type text", call(Content_Type=b"text/plain"), (415,), CSRF),
    Row("type form", call(Content_Type=b"application/x-www-form-urlencoded"), (415,), CSRF),
    Row("type multipart", call(Content_Type=b"multipart/form-data; boundary=x"), (415,), CSRF),
    Row("type none", call(Content_Type=None), (415,), CSRF),
    Row("type two in one", call(Content_Type=b"text/plain, application/json"), (415,), "CORS bypass by a list"),
    Row("type in a parameter", call(Content_Type=b"text/plain; application/json"), (415,), "CORS bypass by a parameter"),
    Row("type utf-16", call(Content_Type=b"application/json; charset=utf-16"), (415,), "RFC 8259, 8.1"),
    Row("type utf-7", call(Content_Type=b"application/json; charset=utf-7"), (415,), "RFC 8259, 8.1"),
    Row("type other json", call(Content_Type=b"application/jsonx"), (415,), CSRF),
    Row("encoding gzip", call(Content_Encoding=b"gzip"), (415,), "RFC 9110, 15.5.16; a bomb, were it unpacked"),
    Row("encoding twice", call(Content_Encoding=b"gzip, gzip"), (415,), "RFC 9110, 15.5.16; a bomb, were it unpacked"),
    Row("accept nothing of ours", call(Accept=b"text/html"), (406,), "RFC 9110, 15.5.7"),
    # ---- methods ----
    Row("method put", call(method=b"PUT"), (405,), "RFC 9110, 15.5.6"),
    Row("method patch", call(method=b"PATCH"), (405,), "RFC 9110, 15.5.6"),
    Row("method in a header", call(method=b"PUT", X_HTTP_Method_Override=b"POST", X_HTTP_Method=b"POST"), (405,),
        "method override"),
    Row("method in the query", call(method=b"PUT", target=TARGET + b"?_method=POST"), (405,), "method override"),
    # ---- paths that a proxy may have let pass as something else ----
    at(b"/servers/smuggled/mcp/"), at(b"//servers/smuggled/mcp"), at(b"/servers//smuggled/mcp"),
    at(b"/servers/smuggled//mcp"), at(b"/servers/smuggled/./mcp"), at(b"/servers/x/../smuggled/mcp"),
    at(b"/./servers/smuggled/mcp"), at(b"/servers/smuggled/mcp;a=b"), at(b"/servers/smuggled;x/mcp"),
    at(b"/mcp/..;/servers/smuggled/mcp"), at(b"/..;/servers/smuggled/mcp"), at(b"/servers/smuggled/mcp%20"),
    at(b"/servers/smuggled/mcp%3F"), at(b"/servers/smuggled/mcp%23x"), at(b"/SERVERS/smuggled/mcp"),
    at(b"/servers/Smuggled/mcp"), at(b"/servers/smuggled/MCP"), at(b"/servers/smuggled%2Fmcp", 400),
    at(b"/servers/smuggled%5Cmcp", 400), at(b"/servers/smuggled/mcp%00", 400), at(b"/servers/%252e%252e/mcp"),
    at(b"/servers/%2e%2e/mcp"), at(b"/servers/x%2f..%2fsmuggled/mcp", 400), at(b"/servers/*/mcp"),
    at(b"/servers/mcp"), at(b"/servers/smuggled"), at(b"/servers/smuggled/mcp.json"), at(b"/servers/smuggl%C3%A9d/mcp"),
    at(b"/servers/\xef\xbd\x93muggled/mcp", 400), at(b"/servers/%EF%BD%93muggled/mcp"), at(b"/servers/smuggled/mcp/x"),
    at(b"/servers/" + b"a" * 4000 + b"/mcp"), at(b"/servers/__proto__/mcp"), at(b"/servers/constructor/mcp"),
    # ---- who may operate: without auth only who is here, and came by no proxy (403 when these paths exist) ----
    *(Row(f"operate {name}", call(b"", target=b"/servers/smuggled/" + what, Content_Length=b"0", **more),
        (403 if "Origin" in more else 404,), "DESIGN, HTTP") for name, what, more in (
        ("not as localhost", b"stop", {}),
        ("forwarded", b"restart", {"Host": b"localhost", "X_Forwarded_For": b"127.0.0.1"}),
        ("forwarded by the standard", b"stop", {"Host": b"localhost", "Forwarded": b"for=127.0.0.1"}),
        ("via", b"restart", {"Host": b"localhost", "Via": b"1.1 x"}),
        ("from a page", b"stop", {"Host": b"localhost", "Origin": b"http://evil.example"}))),
    # ---- headers that do not say what the body says ----
    Row("mirror other name", call(Mcp_Name=b"echo"), (400,), MIRROR),
    Row("mirror other method", call(Mcp_Method=b"tools/list"), (400,), MIRROR),
    Row("mirror no name", call(Mcp_Name=None), (400,), MIRROR),
    Row("mirror no method", call(Mcp_Method=None), (400,), MIRROR),
    Row("mirror underscore", call(Mcp_Name=None) .replace(b"\r\nMcp-Method", b"\r\nMcp_Name: do\r\nMcp-Method"), (400,),
        "CGI makes _ and - one"),
    Row("mirror case", call(Mcp_Name=b"DO"), (400,), MIRROR),
    Row("mirror base64", call(Mcp_Name=b"=?base64?ZWNobw==?="), (400,), MIRROR),
    Row("mirror bad base64", call(Mcp_Name=b"=?base64?!!!?="), (400,), MIRROR),
    Row("mirror other version", call(MCP_Protocol_Version=b"2025-11-25"), (400,), MIRROR),
    Row("mirror no version known", call(MCP_Protocol_Version=b"1999-01-01"), (400,), MIRROR),
    Row("session of nobody", call(LEGACY, MCP_Protocol_Version=b"2025-11-25", Mcp_Session_Id=b"x"), (404,), "MCP 2025-11-25"),
    Row("session too long", call(LEGACY, MCP_Protocol_Version=b"2025-11-25", Mcp_Session_Id=b"x" * 8000), (404,), "MCP 2025-11-25"),
    Row("session delete", call(b"", method=b"DELETE", MCP_Protocol_Version=b"2025-11-25", Mcp_Session_Id=b"../x"), (404,),
        "MCP 2025-11-25"),
    # ---- JSON ----
    json_row("empty", b""), json_row("blank", b"  "), json_row("nul", b"\0"), json_row("null", b"null"),
    json_row("number", b"7"), json_row("text", b'"x"'), json_row("object", b"{}"), json_row("cut", body()[:-1]),
    json_row("two", body() + body()), json_row("batch", b"[" + body() + b"]", source="MCP 2025-06-18: no batches"),
    json_row("batch empty", b"[]", source="MCP 2025-06-18: no batches"),
    json_row("bom", b"\xef\xbb\xbf" + body()), json_row("utf-16", body().decode().encode("utf-16")),
    json_row("not utf-8", body(b'{"what":"\xff"}')), json_row("overlong", body(b'{"what":"\xc0\xaf"}')),
    json_row("surrogate bytes", body(b'{"what":"\xed\xa0\x80"}')), json_row("lone surrogate", body(rb'{"what":"\ud800"}')),
    json_row("lone surrogate as key", body(rb'{"\udc00":1}')), json_row("nan", body(b'{"what":NaN}')),
    json_row("infinity", body(b'{"what":-Infinity}')), json_row("too large a float", body(b'{"n":1e400}')),
    json_row("hex", body(b'{"n":0x10}')), json_row("octal", body(b'{"n":010}')), json_row("plus", body(b'{"n":+1}')),
    json_row("comment", body(b'{/**/"n":1}')), json_row("trailing comma", body(b'{"n":1,}')),
    json_row("single quotes", body(b"{'n':1}")), json_row("control in a text", body(b'{"what":"\x01"}')),
    json_row("deep", body(b"[" * 100_000 + b"]" * 100_000)), json_row("deep objects", body(b'{"a":' * 5000 + b"1" + b"}" * 5000)),
    json_row("just too deep", body(b'{"a":' + b"[" * 300 + b"]" * 300 + b"}")),
    json_row("deep and open", body(b"[" * 100_000)), json_row("padded", body() + b"\0"),
    json_row("too large", b" " * (4 << 20) + b"{}", 413, "RFC 9110, 15.5.14"),
    json_row("other version of json-rpc", body().replace(b'"2.0"', b'"1.0"')),
    json_row("id a list", body().replace(b'"id":7', b'"id":[7]')),
    json_row("id null", body().replace(b'"id":7', b'"id":null')),
    json_row("id a fraction", body().replace(b'"id":7', b'"id":7.5')),
    json_row("method a number", body().replace(b'"tools/call"', b"7")),
    json_row("params a list", b'{"jsonrpc":"2.0","id":7,"method":"tools/call","params":["do"]}'),
    json_row("meta no object", b'{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"do","_meta":7}}'),
    json_row("key twice, the last another tool", body()[:-2] + b',"name":"echo"}}', source="one reading: the last is checked"),
    json_row("key twice, the last another method", body()[:-1] + b',"method":"tools/list"}', source=MIRROR),
    json_row("a result", b'{"jsonrpc":"2.0","id":1,"result":{"content":[]}}', source="an answer to nobody's question"),
    # ---- what looks hostile, and is answered ----
    Row("answered: origin allowed", get(b"Host: a", b"Origin: https://app.example", target=b"/status"), (200,), REBIND),
    Row("answered: host local", get(b"Host: localhost:1", target=b"/status"), (200,), REBIND),
    Row("answered: health from anywhere", get(b"Host: evil.example", target=b"/health"), (200,), "DESIGN, HTTP"),
]
ALLOWED = {"allowed_hosts": ["a"], "allowed_origins": ["https://app.example"]}
