"""Tokens: who may come in, what a refusal says, and what it does not."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import wire
from conftest import Start, child, eventually
from installed import ARCHIVE
from promises import promise

import atrax as program

pytestmark = pytest.mark.needs_install()  # `quick` has no time for all of these

SECRET = "atrax_a-token-of-the-test-suite"
OTHER = "atrax_another-token-of-the-suite"
PAGE = "https://app.example.com"


def hashed(token: str) -> str:
    return "sha256:" + hashlib.sha256(token.encode()).hexdigest()


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def config(**alice: Any) -> dict[str, Any]:
    """One server, and one token with nothing but its hash."""
    token = {"name": "alice", "hash": hashed(SECRET), **alice}
    return {
        "auth": {"type": "token", "tokens": [token]},
        "mcpServers": {"echo": child("echo"), "far": child("echo")},
    }


@promise("auth.token")
async def test_everything_but_probes_needs_a_token(atrax: Start) -> None:
    gateway = await (await atrax(config())).ready()
    http = wire.Http(gateway.url)
    paths = ("/mcp", "/servers/echo/mcp", "/sse", "/messages", "/status", "/metrics", "/nothing")

    for method in ("GET", "POST", "DELETE", "OPTIONS"):
        for path in paths:
            refused = await http.request(method, path)
            assert (refused.status, refused.headers["www-authenticate"]) == (
                401,
                'Bearer realm="atrax"',
            ), (method, path)
            assert "Authorization: Bearer TOKEN" in json.loads(await refused.body())["error"]["message"]  # fmt: skip
    # Probes need none, and are told no names without one.
    assert (await http.get("/health"))[0] == 200
    assert json.loads((await http.get("/ready"))[1]) == {"status": "ready"}
    assert "waiting" in json.loads((await http.get("/ready", bearer(SECRET)))[1])
    assert (await http.get("/status", bearer(SECRET)))[0] == 200
    http.close()


@promise("auth.token")
async def test_a_guess_at_a_probe_is_as_loud_as_any(atrax: Start) -> None:
    """/ready tells who has a right token more than others, so it can be asked whether one is right."""
    gateway = await (await atrax(config())).ready()

    for _ in range(12):
        assert (await gateway.get("/ready", bearer("wrong-token-0815")))[0] == 200

    metrics = (await gateway.get("/metrics", bearer(SECRET)))[1].decode()
    assert 'atrax_events_total{event="auth.failed"} 10' in metrics
    assert 'atrax_events_total{event="auth.slowed"} 2' in metrics


@promise("auth.token")
async def test_both_eras_work_with_a_token(atrax: Start) -> None:
    gateway = await (await atrax(config())).ready()

    modern = gateway.modern(headers=bearer(SECRET))
    legacy = await gateway.legacy(headers={"authorization": f"bEARER   {SECRET}"})

    for client in (modern, legacy):
        assert (await client.call("echo__echo", {"text": "here"})).text == "here"


@promise("auth.token")
async def test_what_is_no_token_is_refused(atrax: Start) -> None:
    gateway = await atrax({**config(), "trusted_proxies": ["127.0.0.1"], "mcpServers": {}})
    http = wire.Http(gateway.url)
    attempts: list[tuple[dict[str, str], bool]] = [
        ({}, False),
        ({"Authorization": f"Basic {SECRET}"}, False),
        ({"Authorization": "Bearer"}, True),
        ({"Authorization": "Bearer " + OTHER}, True),
        ({"Authorization": f"Bearer {SECRET} "[:-2]}, True),
        ({"Authorization": f"Bearer {SECRET}x"}, True),
        ({"Authorization": f"Bearer {SECRET.upper()}"}, True),
        ({"Authorization": f"Bearer {SECRET}, Bearer {SECRET}"}, True),
        ({"Authorization": f"Bearer {SECRET} {SECRET}"}, True),
        ({"Authorization": f"Bearer\t{SECRET}"}, True),
        ({"Authorization": f'Bearer "{SECRET}"'}, True),
        ({"Authorization": f"Bearer {hashed(SECRET)}"}, True),
        ({"Authorization": "Bearer " + "a" * 20_000}, True),
    ]

    for n, (sent, wrong) in enumerate(attempts):
        # Each from an address of its own, else the later ones would be slowed down.
        refused = await http.request("GET", "/status", {**sent, "X-Forwarded-For": f"192.0.2.{n}"})
        challenge = 'Bearer realm="atrax"' + (', error="invalid_token"' if wrong else "")
        assert refused.status == 401, sent
        assert refused.headers["www-authenticate"].startswith(challenge)
        assert ("error=" in refused.headers["www-authenticate"]) is wrong
        await refused.body()
    http.close()


@promise("auth.token")
async def test_a_token_in_a_url_or_twice_is_none(atrax: Start) -> None:
    gateway = await atrax({**config(), "mcpServers": {}})

    for query in (f"?access_token={SECRET}", f"?token={SECRET}", f"?authorization=Bearer+{SECRET}"):
        assert (await gateway.get("/status" + query))[0] == 401
    connection = await wire.Connection.to(gateway.url)
    line = f"Authorization: Bearer {SECRET}\r\n"
    connection.writer.write(f"GET /status HTTP/1.1\r\nHost: localhost\r\n{line}{line}\r\n".encode())
    assert b" 400 " in await connection.reader.readline()
    connection.close()
    assert not any(SECRET in shown for shown in gateway.log)


@promise("auth.expiry")
async def test_a_token_is_refused_from_the_moment_it_expires(atrax: Start) -> None:
    until = time.time() + 4
    gateway = await atrax(config(expires=datetime.fromtimestamp(until, UTC).isoformat()))
    http = wire.Http(gateway.url)
    first = (await http.get("/status", bearer(SECRET)))[0]
    assert first == 200 or time.time() > until  # a start may take long on a busy machine

    async def refused() -> bool:
        return (await http.get("/status", bearer(SECRET)))[0] == 401

    await eventually(refused, "the token is still good")
    answer = await http.request("GET", "/status", bearer(SECRET))
    assert 'error_description="the token has expired"' in answer.headers["www-authenticate"]
    await answer.body()
    # Whose it was stands in the log, not in the answer; and to come with it is not to guess.
    for _ in range(15):
        assert (await http.get("/status", bearer(SECRET)))[0] == 401
    assert not any("too many wrong tokens" in line for line in gateway.log)
    http.close()


@promise("auth.one_answer")
async def test_wrong_tokens_get_one_answer(atrax: Start) -> None:
    gateway = await atrax({**config(), "mcpServers": {}})
    http = wire.Http(gateway.url)
    answers = set()
    for token in (OTHER, SECRET[:-1], SECRET + "x", "x", "=", "a" * 5000, "not/base64+="):
        refused = await http.request("GET", "/status", bearer(token))
        headers = {name: value for name, value in refused.headers.items() if name != "x-request-id"}
        answers.add((refused.status, str(headers), await refused.body()))
    http.close()

    assert len(answers) == 1


@promise("auth.slowed")
@promise("auth.events")
async def test_an_address_that_guesses_is_slowed_down_and_a_right_token_still_passes(
    atrax: Start,
) -> None:
    gateway = await (await atrax(config())).ready()
    http = wire.Http(gateway.url)
    for _ in range(30):  # a missing token is no guess
        assert (await http.get("/status"))[0] == 401

    statuses = [(await http.get("/mcp", bearer(f"guess-{n}")))[0] for n in range(40)]

    assert statuses == [401] * 10 + [429] * 30
    slowed = await http.request("POST", "/mcp", bearer("guess"))
    assert 1 <= int(slowed.headers["retry-after"]) <= 60
    assert "too many wrong tokens" in json.loads(await slowed.body())["error"]["message"]
    assert (await gateway.modern(headers=bearer(SECRET)).call("echo__echo", {"text": "x"})).text == "x"  # fmt: skip
    assert (await http.get("/mcp"))[0] == 401
    # All are counted, ten lines of each are told.
    metrics = (await http.get("/metrics", bearer(SECRET)))[1].decode()
    assert 'atrax_events_total{event="auth.failed"} 10' in metrics
    assert 'atrax_events_total{event="auth.slowed"} 31' in metrics
    await gateway.line(r"the token is not valid here; .* \(unknown\)")
    assert sum("too many wrong tokens" in line for line in gateway.log) == 10
    assert not any("guess-" in line for line in gateway.log)
    http.close()


@promise("auth.events")
async def test_a_foreign_host_or_origin_is_an_event(atrax: Start) -> None:
    gateway = await atrax({**config(), "mcpServers": {}, "log": {"format": "json"}})
    for _ in range(25):
        assert (await gateway.get("/status", {"Host": "evil.example", **bearer(SECRET)}))[0] == 403
    origin = {"Origin": "https://evil.example", **bearer(SECRET)}
    assert (await gateway.get("/status", origin))[0] == 403

    await gateway.line('"event":"origin.refused"')
    assert sum('"event":"host.refused"' in line for line in gateway.log) == 10
    metrics = (await gateway.get("/metrics", bearer(SECRET)))[1].decode()
    assert 'atrax_events_total{event="host.refused"} 25' in metrics
    assert 'atrax_events_total{event="origin.refused"} 1' in metrics


@promise("auth.browsers")
async def test_a_page_at_an_allowed_origin_can_read_that_it_needs_a_token(atrax: Start) -> None:
    gateway = await atrax({**config(), "allowed_origins": [PAGE]})
    http = wire.Http(gateway.url)
    asks = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    asks["Access-Control-Request-Headers"] = "authorization,content-type"

    preflight = await http.request("OPTIONS", "/mcp", asks)
    assert preflight.status == 204
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    for headers in ({}, bearer(OTHER)):
        refused = await http.request("POST", "/mcp", {"Origin": PAGE, **headers})
        assert refused.status == 401
        assert refused.headers["access-control-allow-origin"] == PAGE
        assert "WWW-Authenticate" in refused.headers["access-control-expose-headers"]
        await refused.body()
    foreign = await http.request("OPTIONS", "/mcp", {**asks, "Origin": "https://evil.example"})
    assert foreign.status == 403
    http.close()


@promise("auth.hashes")
async def test_a_token_that_was_printed_is_let_in_by_its_entry(atrax: Start) -> None:
    made = subprocess.run(
        [sys.executable, str(ARCHIVE), "token", "alice"], capture_output=True, text=True, check=True
    )
    token, entry = made.stdout.splitlines()
    assert token.startswith("atrax_")
    assert token not in made.stderr + entry
    assert set(json.loads(entry)) == {"name", "hash"}

    auth = {"type": "token", "tokens": [json.loads(entry)]}
    gateway = await (await atrax({**config(), "auth": auth})).ready()

    assert len(await gateway.modern(headers=bearer(token)).list("tools")) > 0
    assert token not in gateway.config.read_text()


@promise("auth.hashes")
@pytest.mark.parametrize(("arguments", "said"), [
    ([], "required: NAME"), (["a", "b"], "unrecognized"), (["\n"], "NAME must have"), ([""], "NAME must"),
])  # fmt: skip
def test_a_token_needs_one_good_name(arguments: list[str], said: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ARCHIVE), "token", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


async def test_a_token_may_come_from_the_environment_and_is_never_shown(atrax: Start) -> None:
    tokens = [{"name": "ci", "token": "${CI_TOKEN}"}]
    written = {**config(), "auth": {"type": "token", "tokens": tokens}, "log": {"level": "debug"}}
    gateway = await (await atrax(written, env={"CI_TOKEN": SECRET})).ready()

    assert (await gateway.get("/status", bearer(SECRET)))[0] == 200
    await gateway.get("/" + SECRET, bearer(SECRET))
    assert not any(SECRET in line for line in gateway.log)


# ---- the parts that time or addresses drive ----


def test_the_slow_down_ends_after_a_minute_and_holds_one_address_alone() -> None:
    wrong = program.WrongTokens()
    assert [wrong.add("192.0.2.1", float(n)) for n in range(10)] == [0] * 10

    assert wrong.add("192.0.2.1", 10.0) == 50
    assert wrong.add("192.0.2.2", 10.0) == 0
    assert wrong.add("192.0.2.1", 60.0) == 0  # the first is a minute ago
    assert wrong.add("192.0.2.1", 60.5) == 1  # the second is not


def test_whoever_has_one_ipv6_address_has_the_whole_64_bits() -> None:
    wrong = program.WrongTokens()
    for n in range(10):
        assert wrong.add(f"2001:db8:0:1::{n:x}", 0.0) == 0

    assert wrong.add("2001:db8:0:1:ffff::1", 0.0) == 60
    assert wrong.add("2001:db8:0:2::1", 0.0) == 0
    assert wrong.add("fe80::1%eth0", 0.0) == 0
    assert wrong.add("", 0.0) == 0  # a Unix socket has no address


def test_what_is_remembered_of_addresses_is_bounded() -> None:
    wrong = program.WrongTokens()
    for n in range(20_000):
        wrong.add(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", float(n))

    assert len(wrong._times) <= 10_000


def identity(before: program.Identity | None = None, **auth: Any) -> program.Identity:
    servers = {"git": {"command": "x"}, "time": {"command": "x"}}
    text = json.dumps({"auth": auth, "mcpServers": servers} if auth else {"mcpServers": servers})
    return program.Identity(program.Config.load(text, {}), before)


def who(identity: program.Identity, token: str) -> program.Owner:
    headers = {"host": "localhost", "authorization": f"Bearer {token}"}
    return identity.check(program.HttpRequest("GET", "/", "", headers, b"", "192.0.2.1"))


def tokens(**alice: Any) -> dict[str, Any]:
    entries = [{"name": "alice", "token": SECRET, **alice}, {"name": "bob", "token": OTHER}]
    return {"type": "token", "tokens": entries}


def test_a_token_brings_its_scope_expiry_and_rights() -> None:
    given = identity(**tokens(servers=["git", "time"], tools=["git__a*"], expires="2099-01-01", admin=True))  # fmt: skip

    alice, bob = who(given, SECRET), who(given, OTHER)

    assert (alice.principal, alice.session, alice.admin, alice.expires) == ("alice", "", True, 4070908800.0)  # fmt: skip
    assert alice.scope.tool("git", "git__add")
    assert not alice.scope.tool("git", "git__rm")
    assert not alice.scope.tool("time", "time__a")
    assert bob.scope == program.EVERYTHING
    assert who(given, SECRET).scope is alice.scope


STILL = [
    ({}, {}, True),
    ({}, {"token": "atrax_a-new-token-for-alice"}, True),  # rotated
    ({}, {"name": "alicia"}, False),  # gone
    ({"servers": ["git"]}, {}, True),  # may more
    ({}, {"servers": ["git"]}, False),  # may less
    ({"tools": ["git__a"]}, {"tools": ["git__a"]}, True),
    ({"admin": True}, {}, False),
    ({}, {"admin": True}, True),
    ({}, {"expires": "2020-01-01"}, False),
    ({"expires": "2099-01-01"}, {"expires": "2098-01-01"}, True),
]


@pytest.mark.parametrize(("before", "after", "stands"), STILL)
def test_what_was_opened_stands_while_its_principal_has_lost_nothing(
    before: dict[str, Any], after: dict[str, Any], stands: bool
) -> None:
    old = identity(**tokens(**before))
    alice = who(old, SECRET)
    new = identity(old, **tokens(**after))

    assert new.stands(alice, time.time()) is stands
    assert not new.stands(alice, 4102444801.0) or alice.expires == float("inf")


def test_what_was_opened_without_auth_ends_when_auth_comes_and_the_other_way_round() -> None:
    alice = who(identity(**tokens()), SECRET)

    assert identity().stands(program.ANONYMOUS, time.time())
    assert not identity(**tokens()).stands(program.ANONYMOUS, time.time())
    assert not identity().stands(alice, time.time())


def test_a_reload_forgets_no_guesses() -> None:
    old = identity(**tokens())
    for _ in range(10):
        with pytest.raises(program.HttpError):
            who(old, "guess")

    with pytest.raises(program.HttpError) as slowed:
        who(identity(old, **tokens()), "guess")

    assert slowed.value.status == 429


async def test_many_clients_with_tokens_at_once_are_each_themselves(atrax: Start) -> None:
    written = config()
    written["auth"]["tokens"].append({"name": "bob", "hash": hashed(OTHER), "servers": ["far"]})
    gateway = await (await atrax(written)).ready()
    clients = [gateway.modern(headers=bearer(SECRET)) for _ in range(10)]

    answers = await asyncio.gather(*(one.call("echo__echo", {"text": str(n)}) for n, one in enumerate(clients)))  # fmt: skip

    assert [answer.text for answer in answers] == [str(n) for n in range(10)]
