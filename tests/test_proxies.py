"""Trusted proxies: what X-Forwarded-* says is believed from them, and from nobody else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import wire
from conftest import Running, Start, child
from hypothesis import given
from hypothesis import strategies as st
from promises import promise
from test_http import HOST, LOOPS, NewLoop, Served, get, run

import atrax

CLIENT = "203.0.113.7"
PROXIES = ["10.0.0.0/8", "192.0.2.1", "2001:db8::/32", "unix"]


def unveiled(
    address: str, headers: dict[str, str], proxies: list[str] = PROXIES, secure: bool = False
) -> atrax.HttpRequest:
    """A request of `address` after Identity has looked at it."""
    config = atrax.Config(trusted_proxies=proxies, socket="/a.sock", mcpServers={})
    named = {"host": "localhost", **headers}
    request = atrax.HttpRequest("GET", "/", "", named, b"", address, secure, {"kept": True})
    atrax.Identity(config).unveil(request)
    return request


@promise("proxies.trusted")
@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("10.1.1.1", CLIENT, CLIENT),
        ("10.1.1.1", "", "10.1.1.1"),
        ("", CLIENT, CLIENT),  # the socket
        ("2001:db8::1", "2001:DB8:0::2,2001:db9::00FF", "2001:db9::ff"),
        ("192.0.2.1", f"{CLIENT}, 10.2.2.2", CLIENT),
        # What the client says of itself stands left of what the proxy saw.
        ("10.1.1.1", f"127.0.0.1, {CLIENT}", CLIENT),
        ("10.1.1.1", f"127.0.0.1, {CLIENT}, 10.2.2.2,\t192.0.2.1", CLIENT),
        ("10.1.1.1", "10.3.3.3, 10.2.2.2", "10.3.3.3"),  # nobody but trusted ones
        ("10.1.1.1", f"{CLIENT}:4711", CLIENT),
        ("10.1.1.1", "[2001:db9::1]:4711", "2001:db9::1"),
        ("10.1.1.1", "[2001:db9::1]", "2001:db9::1"),
        ("10.1.1.1", f"::ffff:{CLIENT}", CLIENT),
        # Malformed: the last one that is known.
        ("10.1.1.1", f"{CLIENT}, unknown, 10.2.2.2", "10.2.2.2"),
        ("10.1.1.1", "unknown", "10.1.1.1"),
        ("10.1.1.1", f"{CLIENT},", "10.1.1.1"),
        ("10.1.1.1", f"{CLIENT} 1.2.3.4", "10.1.1.1"),
        ("10.1.1.1", "fe80::1%\x1b[31m", "10.1.1.1"),
        ("10.1.1.1", "01.2.3.4", "10.1.1.1"),
        ("10.1.1.1", f'"{CLIENT}"', "10.1.1.1"),
        ("10.1.1.1", f"for={CLIENT}", "10.1.1.1"),
        # From others nothing is believed.
        (CLIENT, "1.2.3.4", CLIENT),
        ("11.0.0.1", "1.2.3.4", "11.0.0.1"),
        ("192.0.2.2", "1.2.3.4", "192.0.2.2"),
    ],
)  # fmt: skip
def test_the_client_is_the_first_stranger_from_the_right(
    peer: str, forwarded: str, client: str
) -> None:
    assert unveiled(peer, {"x-forwarded-for": forwarded}).address == client


@promise("proxies.trusted")
@given(st.text("0123456789.,: []unkow\t", max_size=60), st.sampled_from(["", ", 10.9.9.9"]))
def test_nothing_that_a_client_sends_hides_the_address_that_the_proxy_saw(
    forged: str, behind: str
) -> None:
    assert (
        unveiled("10.1.1.1", {"x-forwarded-for": f"{forged}, {CLIENT}{behind}"}).address == CLIENT
    )


@promise("proxies.trusted")
def test_scheme_and_host_are_those_that_the_nearest_proxy_wrote() -> None:
    headers = {
        "x-forwarded-proto": "http, HTTPS",
        "x-forwarded-host": "evil.example, mcp.example.com",
    }
    request = unveiled("", headers)
    assert request.secure
    assert request.headers["host"] == "mcp.example.com"
    assert not unveiled("10.1.1.1", {"x-forwarded-proto": "http"}, secure=True).secure
    assert unveiled("10.1.1.1", {"x-forwarded-proto": "wss"}, secure=True).secure


@promise("proxies.trusted")
def test_of_others_nothing_is_believed_and_forwarded_of_nobody() -> None:
    headers = {"x-forwarded-proto": "https", "x-forwarded-host": "mcp.example.com"}
    for peer, proxies in ((CLIENT, PROXIES), ("", ["10.0.0.0/8"])):
        request = unveiled(peer, headers, proxies)
        assert (request.address, request.secure, request.headers["host"]) == (
            peer,
            False,
            "localhost",
        )
    forwarded = {"forwarded": f"for={CLIENT};proto=https;host=mcp.example.com"}
    request = unveiled("10.1.1.1", forwarded)
    assert (request.address, request.secure, request.headers["host"]) == (
        "10.1.1.1",
        False,
        "localhost",
    )


def test_a_head_that_many_requests_share_is_not_changed() -> None:
    shared = {"host": "proxy", "x-forwarded-host": "mcp.example.com"}
    facts: dict[str, Any] = {}
    request = atrax.HttpRequest("GET", "/", "", shared, b"", "", False, facts)
    config = atrax.Config(trusted_proxies=["unix"], socket="/a.sock", mcpServers={})
    atrax.Identity(config).unveil(request)
    request.facts["of the proxy's"] = True
    assert (shared["host"], facts) == ("proxy", {})


def test_without_a_socket_who_has_no_address_is_a_stranger() -> None:
    headers = {"host": "localhost", "x-forwarded-for": CLIENT}
    request = atrax.HttpRequest("GET", "/", "", headers, b"", "")
    atrax.Identity(atrax.Config(trusted_proxies=["unix"], mcpServers={})).unveil(request)
    assert request.address == ""


# ---- the config ----


def test_what_is_no_address_is_refused_and_everybody_is_remarked_upon(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for wrong in ("localhost", "10.0.0.1/8", "10.0.0.0/33", "", "Unix", "*"):
        file.write_text(atrax.encode({"trusted_proxies": [wrong], "mcpServers": {}}).decode())
        with pytest.raises(
            atrax.UsageError, match=r"trusted_proxies\[0\]: .*write an address or a network"
        ):
            atrax.Config.load(str(file))
    everybody = ["unix", "::1", "0.0.0.0/0", "::/0"]
    file.write_text(atrax.encode({"trusted_proxies": everybody, "mcpServers": {}}).decode())
    remarks = [remark for remark in atrax.Config.load(str(file)).remarks if "trusted" in remark]
    assert [remark.split(": ")[1] for remark in remarks] == [
        "trusted_proxies[2]",
        "trusted_proxies[3]",
    ]


# ---- connections ----


@LOOPS
@pytest.mark.parametrize(("exempt", "statuses"), [(False, [200, 429]), (True, [200, 200])])
def test_a_proxy_may_have_more_connections_than_a_client(
    loop: NewLoop, exempt: bool, statuses: list[int]
) -> None:
    async def test() -> None:
        it = Served()
        limits = atrax.Limits(connections_per_address=1)
        it.server = atrax.HttpServer(
            it.echo, limits, it.record, lambda: it.now, None, lambda _: exempt
        )
        it.port = int((await it.server.listen("127.0.0.1", 0))[0].rpartition(":")[2])
        clients = [await it.client() for _ in range(2)]
        await it.until_connections(2)
        for client in clients:
            client.send(get(HOST))
        assert [(await client.response())[0] for client in clients] == statuses
        for client in clients:
            await client.close()
        await it.server.close(0)

    run(loop, test())


# ---- a gateway ----


async def refused(running: Running) -> str:
    """The address of the next refused Host in the log; each is given once."""
    line = await running.line(r'.*"event":\s*"host\.refused".*')
    running.log.remove(line[0])
    address: str = json.loads(line[0])["address"]
    return address


@promise("proxies.trusted")
async def test_a_refusal_is_logged_with_the_address_of_the_client(atrax: Start) -> None:
    servers = {"mcpServers": {"echo": child("echo")}}
    running = await atrax({**servers, "trusted_proxies": ["127.0.0.1"], "log": {"format": "json"}})
    through = wire.Http(running.url)  # as the proxy
    straight = wire.Http(running.url, source="127.0.0.2")
    forged = {
        "X-Forwarded-For": "198.51.100.1",
        "X-Forwarded-Host": "localhost",
        "Host": "evil.example",
    }
    host = {"X-Forwarded-For": CLIENT, "X-Forwarded-Host": "evil.example"}
    assert (await through.get("/status", host))[0] == 403
    assert (await through.get("/status", forged))[0] == 200
    assert (await straight.get("/status", forged))[0] == 403
    assert [await refused(running) for _ in range(2)] == [CLIENT, "127.0.0.2"]
    page = {"Origin": running.url.replace("http:", "https:"), "X-Forwarded-For": CLIENT}
    assert (await through.get("/status", page))[0] == 403
    assert (await through.get("/status", {**page, "X-Forwarded-Proto": "https"}))[0] == 200
    assert (await straight.get("/status", {**page, "X-Forwarded-Proto": "https"}))[0] == 403
    through.close()
    straight.close()
