"""Identity: which Host and which Origin may send requests, and what a page at an allowed one is told."""

from __future__ import annotations

from typing import Any

import pytest

import atrax


def request(method: str = "POST", secure: bool = False, **headers: str) -> atrax.HttpRequest:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return atrax.HttpRequest(method, "/mcp", "", named, b"", "127.0.0.1", secure)


def identity(**config: Any) -> atrax.Identity:
    return atrax.Identity(atrax.Config(**config))


PUBLIC = {
    "public_url": "https://mcp.example.com/gw",
    "allowed_hosts": ["box:8080", "Inner.Example"],
}


@pytest.mark.parametrize(
    ("config", "host"),
    [
        ({}, "localhost"),
        ({}, "LOCALHOST:4000"),
        ({}, "127.0.0.1:4000"),
        ({}, "127.1.2.3:1"),
        ({}, "[::1]"),
        ({}, "[::1]:4000"),
        ({"host": "192.168.1.5"}, "192.168.1.5:4000"),
        ({"host": "fd00::5"}, "[fd00::5]:4000"),
        ({"host": "::1"}, "[::1]:4000"),
        (PUBLIC, "mcp.example.com"),
        (PUBLIC, "MCP.example.com:443"),
        (PUBLIC, "box:8080"),
        (PUBLIC, "inner.example:9"),
        (PUBLIC, "localhost:4000"),
    ],
)
def test_a_host_that_names_this_gateway_is_served(config: dict[str, Any], host: str) -> None:
    assert identity(**config).check(request(host=host)) == atrax.ANONYMOUS


@pytest.mark.parametrize(
    ("config", "host"),
    [
        ({}, "evil.example.com"),
        ({}, "evil.example.com:4000"),
        ({}, "localhost.evil.example"),
        ({}, "127.0.0.1.evil.example"),
        ({}, "xlocalhost"),
        ({}, "127.0.0.1x"),
        ({}, "1127.0.0.1"),
        ({}, "127.1"),
        ({}, "2130706433"),
        ({}, "0.0.0.0:4000"),
        ({}, "[::]:4000"),
        ({}, "[::2]"),
        ({}, "[::ffff:127.0.0.1]"),
        ({}, "192.168.1.5"),
        ({}, ""),
        ({"host": "0.0.0.0"}, "0.0.0.0:4000"),
        ({"host": "::"}, "[::]:4000"),
        (PUBLIC, "example.com"),
        (PUBLIC, "mcp.example.com.evil.example"),
        (PUBLIC, "box:8081"),
        (PUBLIC, "box"),
    ],
)
def test_a_host_of_another_name_is_refused_with_the_key_that_allows_it(
    config: dict[str, Any], host: str
) -> None:
    who = identity(**config)
    for _ in range(2):  # what was refused is not remembered as accepted
        with pytest.raises(atrax.HttpError, match="allowed_hosts") as error:
            who.check(request(host=host))
        assert error.value.status == 403


def test_a_request_without_host_is_refused() -> None:
    with pytest.raises(atrax.HttpError) as error:
        identity().check(request())
    assert error.value.status == 403


ORIGINS = {
    "allowed_origins": [
        "https://app.example.com",
        "http://localhost:6274",
        "chrome-extension://abc",
    ]
}


@pytest.mark.parametrize(
    ("config", "host", "origin", "secure"),
    [
        ({}, "127.0.0.1:4000", "http://127.0.0.1:4000", False),
        ({}, "localhost:4000", "http://localhost:4000", False),
        ({}, "[::1]:4000", "http://[::1]:4000", False),
        ({}, "localhost:4000", "https://localhost:4000", True),
        ({"host": "192.168.1.5"}, "192.168.1.5:4000", "http://192.168.1.5:4000", False),
        (PUBLIC, "mcp.example.com", "https://mcp.example.com", False),
        (PUBLIC, "mcp.example.com", "https://MCP.example.com:443", False),
        (ORIGINS, "127.0.0.1:4000", "https://app.example.com", False),
        (ORIGINS, "127.0.0.1:4000", "https://app.example.com:443", False),
        (ORIGINS, "127.0.0.1:4000", "http://localhost:6274", False),
        (ORIGINS, "127.0.0.1:4000", "chrome-extension://abc", False),
    ],
)
def test_our_own_page_and_listed_origins_may_send(
    config: dict[str, Any], host: str, origin: str, secure: bool
) -> None:
    who = identity(**config)
    asked = request(host=host, origin=origin, secure=secure)
    assert who.check(asked) == atrax.ANONYMOUS
    assert ("Access-Control-Allow-Origin", origin) in who.cors(asked)


@pytest.mark.parametrize(
    ("config", "host", "origin"),
    [
        ({}, "127.0.0.1:4000", "http://evil.example.com"),
        ({}, "127.0.0.1:4000", "https://127.0.0.1:4000"),
        ({}, "127.0.0.1:4000", "http://127.0.0.1:3000"),
        ({}, "127.0.0.1:4000", "http://127.0.0.1"),
        ({}, "127.0.0.1:4000", "http://localhost:4000"),
        ({}, "127.0.0.1:4000", "http://127.0.0.1:4000/"),
        ({}, "127.0.0.1:4000", "http://127.0.0.1:4000.evil.example"),
        ({}, "127.0.0.1:4000", "null"),
        ({}, "127.0.0.1:4000", ""),
        ({}, "127.0.0.1:4000", "://"),
        ({}, "127.0.0.1:4000", "file://"),
        ({}, "127.0.0.1:4000", "127.0.0.1:4000"),
        ({"host": "0.0.0.0"}, "localhost:4000", "http://0.0.0.0:4000"),
        (PUBLIC, "mcp.example.com", "http://mcp.example.com"),
        (PUBLIC, "mcp.example.com", "https://mcp.example.com:444"),
        (PUBLIC, "box:8080", "http://box:8080"),
        (ORIGINS, "127.0.0.1:4000", "http://app.example.com"),
        (ORIGINS, "127.0.0.1:4000", "https://app.example.com.evil.example"),
        (ORIGINS, "127.0.0.1:4000", "https://app.example.com, https://evil.example"),
        (ORIGINS, "127.0.0.1:4000", "https://app.example.com/evil"),
    ],
)
def test_a_foreign_origin_is_refused_with_the_key_that_allows_it(
    config: dict[str, Any], host: str, origin: str
) -> None:
    with pytest.raises(atrax.HttpError, match="allowed_origins") as error:
        identity(**config).check(request(host=host, origin=origin))
    assert error.value.status == 403


def test_without_an_origin_nothing_of_cors_is_sent() -> None:
    who = identity(**ORIGINS)
    assert who.check(request(host="localhost")) == atrax.ANONYMOUS
    assert who.cors(request(host="localhost")) == []
    assert who.preflight(request("OPTIONS", host="localhost")) == [
        ("Allow", "GET, POST, DELETE, OPTIONS")
    ]


def test_a_preflight_allows_what_it_asks_for() -> None:
    who = identity(**ORIGINS)
    asked = request(
        "OPTIONS", host="localhost:4000", origin="https://app.example.com",
        access_control_request_method="POST",
        access_control_request_headers="content-type,mcp-param-region",
        access_control_request_private_network="true",
    )  # fmt: skip
    who.check(asked)
    headers = dict(who.preflight(asked))
    assert headers["Access-Control-Allow-Origin"] == "https://app.example.com"
    assert headers["Access-Control-Allow-Headers"] == "content-type,mcp-param-region"
    assert "DELETE" in headers["Access-Control-Allow-Methods"]
    assert headers["Access-Control-Allow-Private-Network"] == "true"
    assert headers["Vary"] == "Origin"
    assert "Mcp-Session-Id" in headers["Access-Control-Expose-Headers"]


def test_what_is_remembered_of_hosts_is_bounded() -> None:
    who = identity()
    for port in range(1, 2000):
        who.check(request(host=f"127.0.0.1:{port}"))
    assert len(who._accepted) <= 256
    assert who.check(request(host="127.0.0.1:65000")) == atrax.ANONYMOUS
