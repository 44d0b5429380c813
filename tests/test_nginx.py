"""SECURITY's recipe "Behind nginx with TLS", taken from its text: real nginx in front, on a Unix socket and on
loopback. What is changed in it is where things lie on this machine, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import wire
from certificates import Authority
from conftest import Running, child, eventually, starting
from installed import HOME
from promises import promise

pytestmark = [
    pytest.mark.needs_install("nginx"),
    pytest.mark.asyncio(loop_scope="module"),
]

RECIPE = (HOME / "SECURITY.md").read_text().split("### Behind nginx with TLS")[1].split("\n### ")[0]
NAME = "mcp.example.com"
TOKEN = "the-token-of-the-recipe"
# Where clients come from: other loopback addresses than that of nginx, which is trusted in one of the two ways.
CLIENT, OTHER = "127.0.0.2", "127.0.0.3"
AROUND = """
daemon off; pid nginx.pid; error_log stderr warn; worker_processes 1; {user}
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    {recipe}
}}
"""


@dataclasses.dataclass(frozen=True)
class Site:
    """Atrax behind nginx: `url` is nginx's, `atrax` the gateway with an address of its own."""

    url: str
    tls: ssl.SSLContext
    atrax: Running
    folder: Path

    def http(self, source: str = CLIENT) -> wire.Http:
        return wire.Http(self.url, self.tls, source)

    def headers(self, **more: str) -> dict[str, str]:
        named = {name.replace("_", "-"): value for name, value in more.items()}
        return {"Host": NAME, "Authorization": f"Bearer {TOKEN}", **named}

    def modern(self, **more: str) -> wire.Modern:
        return wire.Modern(f"{self.url}/mcp", headers=self.headers(**more), http=self.http())

    async def legacy(self, capabilities: Any = None) -> wire.Legacy:
        headers, http = self.headers(), self.http()
        return await wire.Legacy.start(
            f"{self.url}/mcp", capabilities=capabilities, headers=headers, http=http
        )

    async def addresses(self, event: str, count: int) -> list[str]:
        """The client's address in each of the next `count` events of a name; each is given once."""
        found = []
        for _ in range(count):
            line = await self.atrax.line(rf'.*"event":\s*"{re.escape(event)}".*')
            self.atrax.log.remove(line[0])
            found.append(json.loads(line[0])["address"])
        return found


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    """`text` with each old part, which must be there, made new."""
    for old, new in pairs:
        assert old in text, f"SECURITY's recipe has no {old}"
        text = text.replace(old, new)
    return text


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fenced(language: str) -> str:
    [block] = re.findall(rf"```{language}\n(.*?)```", RECIPE, re.DOTALL)
    return str(block)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["socket", "loopback"])
async def site(request: pytest.FixtureRequest) -> AsyncIterator[Site]:
    # A short name: that of a Unix socket may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="atrax-"))
    place, port = str(folder / "atrax.sock"), free_port()
    config = replaced(
        fenced("json"), ("sha256:…", f"sha256:{hashlib.sha256(TOKEN.encode()).hexdigest()}")
    )
    config = json.loads(replaced(config, ("/run/atrax/atrax.sock", place)))
    nginx = replaced(
        fenced("nginx"),
        ("443 ssl", f"127.0.0.1:{port} ssl"),
        ("/etc/ssl/mcp.pem", str(folder / "mcp.pem")),
        ("/etc/ssl/mcp.key", str(folder / "mcp.key")),
    )
    if request.param == "loopback":
        # As the text below the recipe says.
        for said in (
            "server 127.0.0.1:4000;`",
            '`"port": 4000`',
            '`"trusted_proxies": ["127.0.0.1"]`',
        ):
            assert said in RECIPE
        del config["socket"]
        config |= {"port": free_port(), "trusted_proxies": ["127.0.0.1"]}
        place = f"127.0.0.1:{config['port']}"
        nginx = replaced(nginx, ("unix:/run/atrax/atrax.sock", place))
    else:
        nginx = replaced(nginx, ("/run/atrax/atrax.sock", place))
    config |= {"mcpServers": {"does": child("does"), "asks": child("asks"), "echo": child("echo")}}
    config |= {"log": {"format": "json", "level": "debug", "audit": str(folder / "audit")}}
    ca = Authority("site")
    ca.issue(folder, "mcp", names=[NAME, "127.0.0.1"])
    user = "user root;" if os.getuid() == 0 else ""  # else its workers could not open our files
    (folder / "nginx.conf").write_text(AROUND.format(user=user, recipe=nginx))
    async with starting(folder) as start:
        atrax = await listening(start, config)
        async with running(folder, port):
            yield Site(f"https://127.0.0.1:{port}", ca.context(), atrax, folder)
    shutil.rmtree(folder, ignore_errors=True)


async def listening(start: Any, config: dict[str, Any]) -> Running:
    """A gateway whose screen shows the public URL, so that where it listens is not read from it."""
    gateway: Running = await start(config)
    if "socket" not in config:
        gateway.url = f"http://127.0.0.1:{config['port']}"
    return gateway


@contextlib.asynccontextmanager
async def running(folder: Path, port: int) -> AsyncIterator[None]:
    """nginx, from nginx.conf in `folder`, until the end of the block."""
    process = await asyncio.create_subprocess_exec(
        *(shutil.which("nginx") or "nginx", "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"),
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    words = asyncio.create_task(process.stderr.read())  # owned here, awaited below

    def answers() -> bool:
        assert process.returncode is None, "nginx ended"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        await eventually(answers, "nginx does not listen")
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
        said = (await words).decode()
    assert "[emerg]" not in said and "[alert]" not in said, said


def order(what: str, **more: Any) -> dict[str, Any]:
    """A call of children/does.py with progress, so that its answer is an event stream."""
    return {"name": "does__do", "arguments": {"what": what, **more}, "_meta": {"progressToken": 1}}


# ---- calls ----


@promise("deploy.nginx")
async def test_clients_of_both_eras_call_over_https(site: Site) -> None:
    modern, legacy = site.modern(), await site.legacy()
    assert (await modern.call("echo__echo", {"text": "a"})).text == "a"
    assert (await legacy.call("echo__echo", {"text": "b"})).text == "b"
    # Without the token nobody comes in, and nginx passes on how one would.
    http = site.http()
    exchange = await http.request("GET", "/status", {"Host": NAME})
    assert exchange.status == 401 and "Bearer" in exchange.headers["www-authenticate"]
    for client in (modern.http, legacy.http, http):
        client.close()


@promise("deploy.nginx")
async def test_an_event_arrives_while_its_call_still_runs(site: Site) -> None:
    waiting, releasing = site.modern(), site.modern()
    exchange = await waiting.open("tools/call", order("wait"))
    messages = exchange.messages()
    first = await anext(messages)
    assert first["method"] == "notifications/progress"
    # Only now is the child told to answer: nothing was held back.
    assert (await releasing.call("does__do", {"what": "release"})).text == "done"
    rest = [message async for message in messages]
    assert rest[-1]["result"]["content"][0]["text"] == "released"
    waiting.close()
    releasing.close()


@promise("deploy.nginx")
async def test_who_hangs_up_cancels_its_call_at_the_child(site: Site) -> None:
    client, watching = site.modern(), site.modern()

    async def cancelled() -> int:
        return int((await watching.call("does__do", {"what": "cancellations"})).text)

    before = await cancelled()
    exchange = await client.open("tools/call", order("wait"))
    await anext(exchange.messages())
    # One that says goodbye in TLS first, and leaves TCP open, is noticed at the next heartbeat.
    exchange.connection.abort()

    async def one_more() -> bool:
        return await cancelled() == before + 1

    await eventually(one_more, "nginx did not pass on that the client has gone")
    watching.close()


@promise("deploy.nginx")
async def test_connections_are_kept_open_on_both_sides(site: Site) -> None:
    client = site.modern()
    for number in range(20):
        assert (await client.call("echo__echo", {"text": str(number)})).text == str(number)
    opened = len(client.http._idle)
    assert opened == 1
    [before] = {connections(site)}
    for _ in range(20):
        await client.call("echo__echo", {"text": "again"})
    assert connections(site) <= before
    client.close()


def connections(site: Site) -> int:
    """Open sockets of the gateway's process."""
    folder = Path(f"/proc/{site.atrax.pid}/fd")
    links = [os.readlink(one) for one in folder.iterdir() if one.is_symlink()]
    return sum(link.startswith("socket:") for link in links)


@promise("deploy.nginx")
async def test_a_big_body_passes_and_one_too_big_is_413(site: Site) -> None:
    client = site.modern()
    text = "x" * 3_900_000  # of 4 MiB
    assert (await client.call("echo__echo", {"text": text})).text == text
    http = site.http()
    exchange = await http.request("POST", "/mcp", site.headers(), b"x" * (4 * 2**20 + 1))
    assert exchange.status == 413
    client.close()
    http.close()


# ---- asks and resumption of a legacy client ----


@promise("deploy.nginx")
async def test_a_question_reaches_the_client_and_its_answer_the_server(site: Site) -> None:
    client = await site.legacy({"elicitation": {}})
    question = {"message": "Sure?", "requestedSchema": {"type": "object", "properties": {}}}
    client.answers["elicitation/create"] = lambda params: {"action": "accept", "content": {}}
    steps = [{"ask": {"sure": ["elicitation/create", question]}}]
    answer = await client.call("asks__act", {"steps": steps})
    assert json.loads(answer.text)["answers"]["sure"]["action"] == "accept"
    assert answer.asks[0]["params"]["message"] == "Sure?"
    client.close()


@promise("deploy.nginx")
async def test_a_stream_that_was_cut_is_fetched_again(site: Site) -> None:
    client, releasing = await site.legacy(), site.modern()
    exchange = await client.open("tools/call", order("wait"), id="cut")
    last = None
    async for event in exchange.events():
        last = event.id
        if "notifications/progress" in event.data:
            break
    exchange.connection.abort()
    assert (await releasing.call("does__do", {"what": "release"})).text == "done"
    [answer] = [message async for message in (await client.listen(last)).messages()]
    assert answer["id"] == "cut" and answer["result"]["content"][0]["text"] == "released"
    client.close()
    releasing.close()


# ---- who it was ----

FORGED = {
    "X_Forwarded_For": "198.51.100.1",
    "X_Forwarded_Proto": "http",
    "Forwarded": "for=198.51.100.2",
}


@promise("deploy.nginx", "proxies.trusted")
async def test_the_address_in_the_log_is_the_clients_whatever_it_says(site: Site) -> None:
    for source in (CLIENT, OTHER):
        http = site.http(source)
        for forged in (
            {},
            FORGED,
            {"X_Forwarded_For": "127.0.0.1"},
            {"X_Forwarded_For": "127.0.0.1, 127.0.0.1"},
        ):
            wrong = site.headers(**{**forged, "Authorization": "Bearer wrong-token-wrong-token"})
            assert (await http.get("/status", wrong))[0] in (401, 429)
        http.close()
        seen = await site.addresses("auth.failed", 4)
        assert seen == [source] * 4


@promise("deploy.nginx", "proxies.trusted")
async def test_the_audit_has_the_clients_address_and_nginxs_request_id(site: Site) -> None:
    client = site.modern(**FORGED, X_Request_Id="chosen-by-the-client")
    exchange = await client.open("tools/call", {"name": "echo__echo", "arguments": {"text": "a"}})
    [answer] = [message async for message in exchange.messages()]
    assert answer["result"]["content"][0]["text"] == "a"
    ident = exchange.headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", ident)
    client.close()

    def line() -> str:
        lines = (site.folder / "audit").read_text().splitlines()
        return next((one for one in lines if ident in one), "")

    await eventually(lambda: bool(line()), "the audit has no such request")
    audited = json.loads(line())
    assert (audited["address"], audited["principal"]) == (CLIENT, "alice")


@promise("deploy.nginx", "proxies.trusted")
async def test_a_forged_host_is_not_believed(site: Site) -> None:
    http = site.http()
    foreign = {**site.headers(X_Forwarded_Host=NAME), "Host": "evil.example"}
    assert (await http.get("/status", foreign))[0] == 403
    assert await site.addresses("host.refused", 1) == [CLIENT]
    assert (await http.get("/status", site.headers(X_Forwarded_Host="evil.example")))[0] == 200
    # A page of the site itself is known by scheme and name.
    assert (await http.get("/status", site.headers(Origin=f"https://{NAME}")))[0] == 200
    assert (await http.get("/status", site.headers(Origin="https://evil.example")))[0] == 403
    http.close()


@promise("proxies.trusted")
async def test_who_comes_past_nginx_is_believed_on_the_socket_alone(site: Site) -> None:
    socket = site.atrax.url.startswith("unix:")  # its rights keep others away (SECURITY)
    http = wire.Http(site.atrax.url, source=None if socket else CLIENT)
    wrong = {**site.headers(**FORGED), "Authorization": "Bearer wrong-token-wrong-token"}
    assert (await http.get("/status", wrong))[0] in (401, 429)
    foreign = {**site.headers(X_Forwarded_Host=NAME), "Host": "evil.example"}
    assert (await http.get("/status", foreign))[0] == (200 if socket else 403)
    forged = site.headers(X_Forwarded_Host="evil.example", X_Forwarded_For="198.51.100.1")
    assert (await http.get("/status", forged))[0] == (403 if socket else 200)
    assert await site.addresses("host.refused", 1) == ["198.51.100.1" if socket else CLIENT]
    http.close()
