"""A secret of its own in every place where one can stand, and everything done that could show it.

What every other test does with its gateways is looked through for one secret too (conftest.py, CANARY)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import asking
import jwt
import pytest
import wire
from conftest import Running, Start, child, eventually
from hostile import bodies, gateway, heads
from hostile.row import get
from installed import ARCHIVE
from promises import promise
from test_oauth import ED, jwk

import atrax as program

pytestmark = pytest.mark.needs_install()  # `quick` has no time for all of these

Json = Any
ISSUER = "https://issuer.example"


def canary(place: str) -> str:
    """What a secret may look like: long, with characters that JSON, URLs and shells write otherwise."""
    return f'canary/{place}"\\{os.urandom(6).hex()}+=é'


def plain(place: str) -> str:
    """One that may stand in a header, a token or a name of a file."""
    return f"canary-{place}-{os.urandom(8).hex()}"


class Canaries(dict[str, str]):
    """Secrets by the place where each stands."""

    def seen_in(self, text: str) -> list[str]:
        """The places whose secret `text` shows, as it is or as JSON writes it."""
        return sorted(
            place
            for place, secret in self.items()
            for form in {
                secret,
                json.dumps(secret)[1:-1],
                json.dumps(secret, ensure_ascii=False)[1:-1],
            }
            if form in text
        )


def variables(secrets: Canaries) -> dict[str, str]:
    """The environment that the config below refers to."""
    return {
        name: secrets[name] for name in ("arg", "env", "key", "token", "command", "cwd", "unused")
    }


@pytest.fixture
def secrets() -> Canaries:
    odd = ("arg", "env", "literal", "env_file", "file", "key", "unused")
    names = ("token", "command", "cwd", "wrong", "basic", "query", "cookie", "argument", "body")
    found = Canaries(
        {place: canary(place) for place in odd} | {place: plain(place) for place in names}
    )
    found["file_first_line"], found["file_last_line"] = plain("first"), plain("last")
    return found


@pytest.fixture
def config(tmp_path: Path, secrets: Canaries) -> Json:
    (tmp_path / "key.pem").write_text(
        f"-----BEGIN KEY-----\n{secrets['file_first_line']}\n{secrets['file_last_line']}\n-----END KEY-----\n"
    )
    (tmp_path / "secret.txt").write_text(secrets["file"] + "\n")
    (tmp_path / ".env").write_text(f"FROM_FILE={secrets['env_file']}\n")
    tells = child(
        "tells", "--token", "${arg}",
        env={"A": "${env}", "B": secrets["literal"], "C": "${file:secret.txt}", "D": "${file:key.pem}"},
        envFile=".env", restart={"backoff": [0.05, 0.1]},
    )  # fmt: skip
    dies = {
        **tells,
        "args": [*tells["args"], "mute"],
        "restart": {"failures": 2, "backoff": [0.05, 0.1]},
    }
    return {
        "key": "${key}",
        "auth": {"type": "token", "tokens": [{"name": "ann", "token": "${token}", "admin": True}]},
        "log": {"level": "debug", "format": "json", "audit": str(tmp_path / "audit.log")},
        "allowed_hosts": ["a"],
        "mcpServers": {
            "tells": tells,
            "dies": dies,
            "absent": {"command": "./${command}"},
            "asks": child("asks"),
            "kept": {**child("echo"), "paths": {"dirs": [str(tmp_path)]}},
        },
    }


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def said(running: Running, data: bytes) -> bytes:
    """All that is answered to `data`."""
    reader, writer = await asyncio.open_connection(
        *running.url.removeprefix("http://").rsplit(":", 1)
    )
    with contextlib.suppress(ConnectionError):
        writer.write(data + get(b"Host: a", b"Connection: close", target=b"/health"))
        return await asyncio.wait_for(reader.read(), 20)
    return b""


async def everything(running: Running, secrets: Canaries) -> list[str]:
    """Good calls, bad calls and no calls; what Atrax itself answered."""
    answers = []
    clients = [
        running.modern(headers=bearer(secrets["token"])),
        await running.legacy(headers=bearer(secrets["token"])),
    ]
    for client in clients:
        for how in ("stderr", "log", "name", "junk", "result", "error"):
            await client.call("tells__tell", {"as": how, "text": secrets["argument"]})
        died = await client.call("tells__tell", {"as": "die", "text": secrets["argument"]})
        answers.append(json.dumps(died.response))
        failed = [await client.call(tool) for tool in ("dies__tell", "absent__x", "tells__x")]
        answers += [json.dumps(one.response) for one in failed]
        # Refused: the client may read what it sent, and nobody else.
        await client.call("tells__tell", {"as": secrets["argument"]})
        await client.call("kept__echo", {"path": "/elsewhere", "text": secrets["argument"]})
        await client.request("resources/read", {"uri": "none:", "x": secrets["argument"]})
    return answers + await hostile(running, secrets)


async def hostile(running: Running, secrets: Canaries) -> list[str]:
    """Requests that are refused, with secrets in the places where clients put them."""
    answers = []
    http = wire.Http(running.url)
    for headers in (
        bearer(secrets["wrong"]), {"Authorization": secrets["basic"]},
        {"Authorization": "Basic " + secrets["basic"]}, bearer(secrets["wrong"] + " x"),
        {**bearer(secrets["token"]), "Mcp-Session-Id": secrets["wrong"]},
        {**bearer(secrets["token"]), "Cookie": secrets["cookie"], "X-Request-Id": secrets["cookie"]},
        {**bearer(secrets["token"]), "Host": "evil.example", "X-Api-Key": secrets["cookie"]},
        {**bearer(secrets["token"]), "Origin": f"https://{secrets['cookie']}"},
    ):  # fmt: skip
        for path in ("/mcp", "/status", f"/mcp?token={secrets['query']}"):
            for method, body in (("GET", b""), ("POST", secrets["body"].encode()), ("DELETE", b"")):
                exchange = await http.request(method, path, headers, body)
                if exchange.is_stream:
                    exchange.close()
                    continue
                answers.append((await exchange.body()).decode() + str(exchange.headers))
    http.close()
    line = f"Authorization: Bearer {secrets['token']}\r\nCookie: {secrets['cookie']}\r\n".encode()
    for row in (*heads.ROWS, *bodies.ROWS, *gateway.ROWS):
        if len(row.data) < 20_000:
            data = row.data.replace(b"\r\n", b"\r\n" + line, 1)
            answers.append((await said(running, data)).decode(errors="replace"))
    return answers


async def parked(running: Running, secrets: Canaries) -> list[str]:
    """What Atrax hands out and only its owner may hold: session ids, and states of calls that wait."""
    headers = bearer(secrets["token"])
    modern = running.modern(headers=headers, capabilities=asking.ALL)
    ask = {"steps": [{"ask": {"k": asking.form("the password?")}}]}
    waiting = await modern.call("asks__act", ask)
    state = waiting.result["requestState"]
    for wrong in (state[:-2] + "xx", secrets["wrong"]):
        more = {"requestState": wrong, "inputResponses": {"k": {"action": "accept"}}}
        await modern.request("tools/call", {"name": "asks__act", "arguments": ask, **more})
    filled = {"action": "accept", "content": {"name": secrets["argument"]}}
    person = asking.Person({"elicitation/create": lambda _: filled})
    await person.act(modern, "asks__act", {**ask, "more": secrets["argument"]})
    legacy = await running.legacy(headers=headers)
    assert legacy.session
    await legacy.call("tells__tell", {"as": "log"})
    return [state, legacy.session]


def looked_through(running: Running, secrets: Canaries, **shown: str) -> None:
    """Fail if a secret is in the log, or in one of `shown`, none of which may be empty."""
    assert all(shown.values()), [name for name, text in shown.items() if not text]
    leaks = {place: found for place, text in shown.items() if (found := secrets.seen_in(text))}
    # A child's stderr is its own: what it was asked and what it answers, it may write there.
    theirs = re.compile(r'"server":"(tells|asks)"|^\S+ \w+ +(tells|asks): ')
    ours = [line for line in running.log if not theirs.search(line)]
    known = Canaries({k: v for k, v in secrets.items() if k != "argument"})
    for lines, places in ((ours, secrets), (running.log, known)):
        if found := places.seen_in("\n".join(lines)):
            leaks["log"] = [*found, *[line for line in lines if places.seen_in(line)][:3]]
    assert not leaks, leaks


@promise("secrets.nowhere")
@pytest.mark.parametrize("form", ["json", "text"])
async def test_no_secret_is_seen_whatever_is_done(
    atrax: Start, tmp_path: Path, config: Json, secrets: Canaries, form: str
) -> None:
    config["log"]["format"] = form
    running = await atrax(config, env=variables(secrets), judged=False)
    await eventually(lambda: ready(running), "not ready")

    answers = await everything(running, secrets)
    secrets["state"], secrets["session"] = await parked(running, secrets)
    pages = [(await running.get(path, bearer(secrets["token"])))[1].decode() for path in PAGES]
    for text in (json.dumps({**config, "key": 7}), json.dumps(config)[:-1], json.dumps(config)):
        running.config.write_text(text)
        before = len(running.log)
        running.process.send_signal(signal.SIGHUP)
        await eventually(lambda: len(running.log) > before, "SIGHUP was not heard")  # noqa: B023
    await running.stop()

    audit = (tmp_path / "audit.log").read_text()
    looked_through(
        running, secrets, audit=audit, pages="\n".join(pages), answers="\n".join(answers)
    )
    assert "[redacted]" in "\n".join(running.log)  # they would have been there


@promise("secrets.nowhere")
async def test_no_jwt_is_seen_be_it_good_or_forged(atrax: Start, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [jwk(ED, "one")]}))
    claims = {"iss": ISSUER, "aud": "https://here.example/mcp", "sub": "ann", "exp": 4_000_000_000}
    wrong = {"other": {"iss": "https://evil.example"}, "old": {"exp": 1}, "elsewhere": {"aud": "x"}}
    tokens = {name: signed({**claims, **change}) for name, change in {"good": {}, **wrong}.items()}
    tokens["forged"] = tokens["good"][:-6] + "AAAAAA"
    tokens["unknown key"] = signed(claims, kid="two")
    auth = {"type": "oauth", "issuer": ISSUER, "audience": claims["aud"], "jwks": "keys.json"}
    log = {"level": "debug", "audit": str(tmp_path / "audit.log")}
    running = await atrax({"auth": auth, "log": log, "mcpServers": {"echo": child("echo")}})

    statuses, pages = {}, []
    for name, token in tokens.items():
        for scheme in ("Bearer", "bearer ", "Token"):
            headers = {"Authorization": f"{scheme} {token}"}
            status, page = await running.get("/status", headers)
            pages.append(page.decode())
            statuses.setdefault(name, status)
    good = {"Authorization": f"Bearer {tokens['good']}"}
    assert (await running.modern(headers=good).call("echo__echo", {"text": "x"})).text == "x"
    pages.append((await running.get("/metrics", good))[1].decode())
    await running.stop()

    assert statuses.pop("good") == 200 and set(statuses.values()) <= {401, 429}
    # Not its parts either: the signature, or what it says.
    parts = {
        f"{name} {n}": part
        for name, token in tokens.items()
        for n, part in enumerate(token.split(".")[1:])
    }
    looked_through(
        running,
        Canaries(tokens | parts),
        audit=(tmp_path / "audit.log").read_text(),
        pages="\n".join(pages),
    )


def signed(claims: Json, kid: str = "one") -> str:
    return jwt.encode(claims, ED, "EdDSA", {"kid": kid})


def run(*arguments: str, folder: Path, env: dict[str, str]) -> str:
    """All that a command prints."""
    done = subprocess.run(
        [sys.executable, str(ARCHIVE), *arguments],
        cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


@promise("secrets.nowhere")
@pytest.mark.parametrize("arguments", [("check",), ("check", "--json"), ("schema",), ("version",)])
def test_no_command_shows_a_secret(
    tmp_path: Path, config: Json, secrets: Canaries, arguments: tuple[str, ...]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    named = [str(file)] if arguments[0] == "check" else []
    printed = run(*arguments[:1], *named, *arguments[1:], folder=tmp_path, env=variables(secrets))
    assert printed and "Traceback" not in printed
    assert not secrets.seen_in(printed), printed


# What is wrong with a value is told without the value, where it came from a variable.
WRONG: dict[str, Json] = {
    "key": {"key": "${secret}"},
    "key no text": {"key": ["${secret}"]},
    "command": {"mcpServers": {"a": {"command": ["${secret}"]}}},
    "command empty": {"mcpServers": {"a": {"command": "x", "args": "${secret}"}}},
    "args": {"mcpServers": {"a": {"command": "x", "args": [{"${secret}": "${secret}"}]}}},
    "env": {"mcpServers": {"a": {"command": "x", "env": {"A": ["${secret}"]}}}},
    "env text": {"mcpServers": {"a": {"command": "x", "env": "${secret}"}}},
    "envFile": {"mcpServers": {"a": {"command": "x", "envFile": "${secret}"}}},
    "file": {"mcpServers": {"a": {"command": "x", "args": ["${file:${secret}}"]}}},
    "cwd": {"mcpServers": {"a": {"command": "x", "cwd": "${secret}", "paths": {}}}},
    "paths": {"mcpServers": {"a": {"command": "x", "paths": {"dirs": "${secret}"}}}},
    "sandbox": {"mcpServers": {"a": {"command": "x", "sandbox": {"read": "${secret}", "memory": "${secret}"}}}},
    "container": {"mcpServers": {"a": {"command": "x", "container": {"image": "-${secret}", "engine": "${secret}"}}}},
    "mount": {"mcpServers": {"a": {"container": {"image": "x", "mounts": [{"source": "${secret}", "target": "${secret}"}]}}}},
    "token": {"auth": {"type": "token", "tokens": [{"name": "a", "token": "${secret} ${secret}"}]}},
    "token twice": {"auth": {"type": "token", "tokens": [{"name": n, "token": "${secret}"} for n in "ab"]}},
    "token and hash": {"auth": {"type": "token", "tokens": [{"name": "a", "token": "${secret}", "hash": "${secret}"}]}},
    "hash": {"auth": {"type": "token", "tokens": [{"name": "a", "hash": "${secret}"}]}},
    "expires": {"auth": {"type": "token", "tokens": [{"name": "a", "expires": "${secret}"}]}},
    "issuer": {"auth": {"type": "oauth", "issuer": "${secret}", "jwks": "${secret}", "audience": "${secret}"}},
    "type": {"auth": {"type": "${secret}"}},
    "grants": {"auth": {"type": "oauth", "issuer": "http://x", "grants": {"s": {"tools": "${secret}"}}}},
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_in_the_config_is_told_without_the_secret(tmp_path: Path, name: str) -> None:
    secrets = Canaries(secret=plain("wrong"))
    text = json.dumps({"mcpServers": {}, **WRONG[name]})
    try:
        shown = str(program.Config.load(text, environ=dict(secrets)).remarks)
    except program.UsageError as error:
        shown = str(error)
    assert not secrets.seen_in(shown), shown


PAGES = ("/status", "/metrics", "/ready", "/health", "/events", "/")


async def ready(running: Running) -> bool:
    return (await running.get("/ready"))[0] == 200
