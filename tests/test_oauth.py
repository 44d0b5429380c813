"""OAuth: tokens of an authorization server, which is here a thread that serves its keys on loopback."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import http.server
import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import jwt
import pytest
import wire
from conftest import Start, child, eventually
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from promises import promise

import atrax as program

pytestmark = pytest.mark.needs_install()  # `quick` has no time for all of these

AUDIENCE = "https://mcp.example.com/mcp"
RSA = rsa.generate_private_key(65537, 2048)
OTHER_RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
PAGE = "https://app.example.com"


def jwk(key: Any, kid: str | None = None, **more: Any) -> dict[str, Any]:
    """The public half of `key` as a member of a JWK set."""
    makers: dict[type, Any] = {
        rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
        ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
        ed25519.Ed25519PrivateKey: jwt.algorithms.OKPAlgorithm,
    }
    maker = next(maker for kind, maker in makers.items() if isinstance(key, kind))
    named = {} if kid is None else {"kid": kid}
    return {**json.loads(maker.to_jwk(key.public_key())), **named, **more}


@dataclasses.dataclass
class Issuer:
    """An authorization server: what it serves can be changed, `fetched` are the times at which it was asked."""

    url: str
    keys: list[dict[str, Any]]
    body: bytes | None = None
    status: int = 200
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    asked: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # the last token request
    fetched: list[float] = dataclasses.field(default_factory=list)
    open: threading.Event = dataclasses.field(default_factory=threading.Event)

    @property
    def jwks(self) -> str:
        return f"{self.url}/keys"

    def token(self, key: Any = RSA, kid: str | None = "one", alg: str = "RS256", headers: Any = None, **claims: Any) -> str:  # fmt: skip
        """A good token, but for what is named; a claim that is None is left out."""
        good = {"iss": self.url, "aud": AUDIENCE, "sub": "alice", "exp": int(time.time()) + 600, **claims}  # fmt: skip
        named = {} if kid is None else {"kid": kid}
        payload = {name: value for name, value in good.items() if value is not None}
        # Not jwt.encode, which has an opinion on what is in it.
        sign = jwt.PyJWS().encode
        return sign(json.dumps(payload).encode(), key, alg, {**named, **(headers or {})})

    def auth(self, **more: Any) -> dict[str, Any]:
        return {"type": "oauth", "issuer": self.url, "audience": AUDIENCE, "jwks": self.jwks, **more}  # fmt: skip


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    class Serve(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            """The token endpoint: whoever asks gets what they ask for."""
            it.asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            token = it.token(sub=None, client_id="robot", scope=" ".join(it.asked.get("scope", ())))
            self.send(200, json.dumps({"access_token": token, "token_type": "Bearer"}).encode())

        def do_GET(self) -> None:
            if self.path == "/.well-known/oauth-authorization-server":
                ends = {f"{end}_endpoint": f"{it.url}/{end}" for end in ("authorization", "token")}
                self.send(200, json.dumps({"issuer": it.url, "response_types_supported": ["code"], **ends}).encode())  # fmt: skip
                return
            it.fetched.append(time.monotonic())
            it.open.wait(20)
            body = it.body if it.body is not None else json.dumps({"keys": it.keys}).encode()
            self.send(it.status, body)

        def send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            for name, value in it.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Serve)
    it = Issuer(f"http://127.0.0.1:{server.server_port}", [jwk(RSA, "one")])
    it.open.set()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield it
    it.open.set()
    server.shutdown()
    thread.join()
    server.server_close()


def config(auth: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"auth": auth, "mcpServers": {"echo": child("echo"), "far": child("echo")}, **more}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def status(gateway: Any, token: str) -> int:
    answer: int = (await gateway.get("/status", bearer(token)))[0]
    return answer


# ---- which tokens are right ----


@promise("oauth.tokens")
async def test_a_token_of_the_issuer_lets_both_eras_in(atrax: Start, issuer: Issuer) -> None:
    gateway = await (await atrax(config(issuer.auth()))).ready()

    modern = gateway.modern(headers=bearer(issuer.token()))
    legacy = await gateway.legacy(headers=bearer(issuer.token(sub=None, client_id="robot")))

    for client in (modern, legacy):
        assert (await client.call("echo__echo", {"text": "here"})).text == "here"
    assert len(issuer.fetched) == 1


@promise("oauth.tokens")
async def test_every_algorithm_of_the_list_works_with_a_key_that_fits(
    atrax: Start, issuer: Issuer
) -> None:
    p384, p521 = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP521R1())
    keys = {"rsa": RSA, "ec": EC, "ec3": p384, "ec5": p521, "ed": ED}
    issuer.keys = [jwk(key, kid) for kid, key in keys.items()]
    gateway = await atrax({**config(issuer.auth()), "mcpServers": {}})
    pairs = [("rsa", alg) for alg in "RS256 RS384 RS512 PS256 PS384 PS512".split()]
    pairs += [("ec", "ES256"), ("ec3", "ES384"), ("ec5", "ES512"), ("ed", "EdDSA")]

    for kid, alg in pairs:
        assert await status(gateway, issuer.token(keys[kid], kid, alg)) == 200, alg
        assert await status(gateway, issuer.token(keys[kid], None, alg)) == 200, alg


@promise("oauth.tokens")
async def test_what_the_standards_allow_is_let_in(atrax: Start, issuer: Issuer) -> None:
    gateway = await atrax({**config(issuer.auth()), "mcpServers": {}})
    soon = int(time.time()) + 15  # the issuer's clock may be ahead

    for claims in (
        {"aud": ["https://else.example", AUDIENCE]},
        {"nbf": soon, "iat": soon},
        {"headers": {"typ": "at+jwt"}},
        {"headers": {"typ": "application/AT+JWT"}},
        {"exp": time.time() + 600.5},
    ):
        assert await status(gateway, issuer.token(**claims)) == 200, claims


def forged(issuer: Issuer, header: dict[str, Any], signature: bytes = b"") -> str:
    """A token with any header at all, and no good signature."""
    claims = {"iss": issuer.url, "aud": AUDIENCE, "sub": "alice", "exp": int(time.time()) + 600}
    parts = [json.dumps(header).encode(), json.dumps(claims).encode(), signature]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def as_hmac(issuer: Issuer) -> str:
    """The public key, which everybody has, as the secret of an HMAC."""
    import hashlib
    import hmac

    unsigned = forged(issuer, {"alg": "HS256", "kid": "one", "typ": "JWT"}).rpartition(".")[0]
    secret = json.dumps(jwk(RSA, "one")).encode()
    digest = hmac.new(secret, unsigned.encode(), hashlib.sha256).digest()
    return f"{unsigned}.{base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"


NOW = int(time.time())
WRONG: dict[str, Callable[[Issuer], str]] = {
    "none": lambda it: forged(it, {"alg": "none", "kid": "one"}),
    "None": lambda it: forged(it, {"alg": "None", "kid": "one"}),
    "no alg": lambda it: forged(it, {"kid": "one"}),
    "alg is a list": lambda it: forged(it, {"alg": ["RS256"], "kid": "one"}),
    "kid is an object": lambda it: forged(it, {"alg": "RS256", "kid": {}}, b"x"),
    "public key as hmac secret": as_hmac,
    "no signature": lambda it: it.token().rpartition(".")[0] + ".",
    "cut signature": lambda it: it.token()[:-4],
    "other key": lambda it: it.token(OTHER_RSA),
    "other key without kid": lambda it: it.token(OTHER_RSA, None),
    "other type of key": lambda it: it.token(EC, "one", "ES256"),
    "its own key": lambda it: it.token(OTHER_RSA, "one", headers={"jwk": jwk(OTHER_RSA)}),
    "key from elsewhere": lambda it: it.token(OTHER_RSA, "one", headers={"jku": "http://127.0.0.1:1/", "x5u": "http://127.0.0.1:1/"}),
    "critical extension": lambda it: it.token(headers={"crit": ["b64"], "b64": True}),
    "logout token": lambda it: it.token(headers={"typ": "logout+jwt"}),
    "issuer": lambda it: it.token(iss="https://evil.example"),
    "issuer with a slash": lambda it: it.token(iss=it.url + "/"),
    "no issuer": lambda it: it.token(iss=None),
    "issuer is a list": lambda it: it.token(iss=[it.url]),
    "audience": lambda it: it.token(aud="https://else.example"),
    "audience begins alike": lambda it: it.token(aud=AUDIENCE + "/x"),
    "audiences": lambda it: it.token(aud=["https://else.example", "x"]),
    "no audience": lambda it: it.token(aud=None),
    "empty audience": lambda it: it.token(aud=[]),
    "no expiry": lambda it: it.token(exp=None),
    "expiry as text": lambda it: it.token(exp="2099-01-01"),
    "expiry in milliseconds": lambda it: it.token(exp=(NOW + 600) * 1000),
    "expiry NaN": lambda it: it.token(exp=float("nan")),
    "expiry infinite": lambda it: it.token(exp=float("inf")),
    "not yet": lambda it: it.token(nbf=int(time.time()) + 120),
    "from the future": lambda it: it.token(iat=int(time.time()) + 120),
    "nobody": lambda it: it.token(sub=None),
    "nobody's name": lambda it: it.token(sub=""),
    "a line end in the name": lambda it: it.token(sub="a\nb"),
    "a long name": lambda it: it.token(sub="a" * 300),
    "a name that is a number": lambda it: it.token(sub=7),
    "no jwt": lambda it: "a.b.c",
    "two parts": lambda it: "a.b",
    "deep": lambda it: base64.urlsafe_b64encode(b"[" * 6000).decode().rstrip("=") + ".e30.x",
    "unicode": lambda it: base64.urlsafe_b64encode(b"\xff\xfe").decode().rstrip("=") + ".e30.x",
}  # fmt: skip


@promise("oauth.refused")
async def test_every_token_that_is_not_right_gets_the_same_answer(
    atrax: Start, issuer: Issuer
) -> None:
    written = config(issuer.auth(), trusted_proxies=["127.0.0.1"])
    gateway = await atrax({**written, "mcpServers": {}})
    assert await status(gateway, issuer.token()) == 200
    http, answers = wire.Http(gateway.url), {}

    for n, (name, make) in enumerate(WRONG.items()):
        # Each from an address of its own, else the later ones would be slowed down.
        headers = {**bearer(make(issuer)), "X-Forwarded-For": f"192.0.2.{n}"}
        refused = await http.request("GET", "/mcp", headers)
        challenge = refused.headers["www-authenticate"].replace(gateway.url, "")
        answers[name] = (refused.status, challenge, await refused.body())
    http.close()

    assert len(set(answers.values())) == 1, answers
    code, challenge, _ = answers["none"]
    assert code == 401
    assert challenge == (
        'Bearer realm="atrax", error="invalid_token", error_description="the token is not valid here",'
        ' resource_metadata="/.well-known/oauth-protected-resource/mcp"'
    )
    assert await status(gateway, issuer.token()) == 200
    # The reason is for who runs the gateway.
    await gateway.line(r"the token is not valid here; .* \(signed with an algorithm that is not")
    assert len(issuer.fetched) == 1


@promise("oauth.refused")
async def test_an_expired_token_is_told_so_without_being_a_guess(
    atrax: Start, issuer: Issuer
) -> None:
    gateway = await atrax({**config(issuer.auth()), "mcpServers": {}})
    http = wire.Http(gateway.url)
    expired = issuer.token(exp=int(time.time()) - 1)

    for _ in range(15):
        refused = await http.request("GET", "/mcp", bearer(expired))
        assert refused.status == 401
        assert 'error_description="the token has expired"' in refused.headers["www-authenticate"]
        await refused.body()
    http.close()


@promise("oauth.refused")
@pytest.mark.parametrize(
    "key",
    [
        jwk(RSA, "one", use="enc"),
        jwk(RSA, "one", alg="RSA-OAEP"),
        jwk(RSA, "one", key_ops=["encrypt"]),
        jwk(RSA, "one", key_ops=5),
        {"kty": "oct", "kid": "one", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LTMy"},
        jwk(rsa.generate_private_key(65537, 1024), "one"),
        {**jwk(RSA, "one"), "d": "AQAB"},
        {**jwk(EC, "one"), "x": "AAAA"},
        {"kty": ["RSA"], "kid": "one"},
        {"kty": "RSA", "kid": "one"},
        "one",
    ],
)
def test_a_key_that_is_not_for_this_signature_is_not_used(key: Any) -> None:
    keys = program.Keys(json.dumps({"keys": [key, jwk(EC, "two")]}), program.Record())

    assert len(keys.fitting("two", "ES256")) == 1
    assert keys.fitting("one", "RS256") == keys.fitting(None, "RS256") == []
    assert keys.fitting("two", "RS256") == keys.fitting("two", "ES384") == []
    with pytest.raises(ValueError, match="none of its 1 keys"):
        program.read_keys(json.dumps({"keys": [key]}).encode())


def test_a_key_for_one_algorithm_verifies_no_other() -> None:
    keys = program.Keys(json.dumps({"keys": [jwk(RSA, "one", alg="PS512")]}), program.Record())

    assert len(keys.fitting("one", "PS512")) == 1
    assert keys.fitting("one", "RS512") == keys.fitting("one", "PS256") == []


# ---- the issuer's keys ----


@promise("oauth.rotation")
async def test_a_new_key_is_fetched_while_its_request_waits(atrax: Start, issuer: Issuer) -> None:
    gateway = await (await atrax(config(issuer.auth()))).ready()
    assert await status(gateway, issuer.token()) == 200
    issuer.keys = [jwk(RSA, "one"), jwk(EC, "two")]
    new = issuer.token(EC, "two", "ES256")

    async def answered() -> int:
        while (code := await status(gateway, new)) == 503:  # held for 5 s; a fetch is due in 10
            pass
        return code

    assert await answered() == 200
    assert issuer.fetched[1] - issuer.fetched[0] > 8  # as seen from the other side
    assert await status(gateway, issuer.token()) == 200


@promise("oauth.rotation")
async def test_requests_that_come_before_the_first_keys_wait_for_them(
    atrax: Start, issuer: Issuer
) -> None:
    issuer.open.clear()
    gateway = await atrax(config(issuer.auth()))
    waiting = [asyncio.create_task(status(gateway, issuer.token(jti=str(n)))) for n in range(20)]
    assert (await gateway.get("/health"))[0] == 200
    assert (await gateway.get("/ready", bearer(issuer.token())))[0] in (200, 503)
    # One of them gives up; nobody answers it, and nobody minds.
    gone = await wire.Connection.to(gateway.url)
    await gone.send("GET", "/status", {"Host": "localhost", **bearer(issuer.token())}, b"")
    gone.abort()

    issuer.open.set()

    assert await asyncio.gather(*waiting) == [200] * 20
    assert len(issuer.fetched) == 1


@promise("oauth.rotation")
async def test_what_waits_for_keys_is_bounded_in_bytes(atrax: Start, issuer: Issuer) -> None:
    issuer.open.clear()
    gateway = await atrax({**config(issuer.auth()), "mcpServers": {}})
    size, http = 4 * 2**20, wire.Http(gateway.url)  # 16 of them are 64 MiB

    async def post() -> int:
        headers = {**bearer(issuer.token()), "Content-Type": "application/json"}
        return (await http.request("POST", "/mcp", headers, b" " * size)).status

    posts = [asyncio.create_task(post()) for _ in range(20)]
    await eventually(lambda: sum(post.done() for post in posts) >= 4, "all of them are held")
    assert {post.result() for post in posts if post.done()} == {503}
    assert (await gateway.get("/health"))[0] == 200

    issuer.open.set()
    await asyncio.gather(*posts)
    assert await status(gateway, issuer.token()) == 200
    http.close()


@promise("oauth.rotation")
async def test_unknown_keys_make_one_fetch_in_ten_seconds_and_leave_others_alone(
    atrax: Start, issuer: Issuer
) -> None:
    gateway = await atrax({**config(issuer.auth()), "mcpServers": {}})
    good = issuer.token()
    assert await status(gateway, good) == 200

    async def flood(n: int) -> int:
        return await status(gateway, issuer.token(OTHER_RSA, f"made-up-{n}"))

    floods = [asyncio.create_task(flood(n)) for n in range(60)]
    assert await status(gateway, good) == 200
    codes = set(await asyncio.gather(*floods))

    assert codes <= {401, 429, 503}
    assert len(issuer.fetched) <= 2
    assert all(b - a > 8 for a, b in zip(issuer.fetched, issuer.fetched[1:], strict=False))


@promise("oauth.keys_missing")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"status": 500}, "HTTP 500"),
        ({"status": 302, "headers": {"Location": "file:///etc/passwd"}}, "HTTP 302"),
        ({"body": b"<html>"}, "Expecting value"),
        ({"body": b'{"keys": []}'}, "none of its 0 keys"),
        ({"body": b"[" * 100_000}, "nested too deep"),
        ({"body": b" " * 300_000}, "more than 262144 bytes"),
        ({"body": b'{"keys": [' + b'{"kty": "oct"},' * 5 + b"1]}"}, "none of its 6 keys"),
    ],
)
async def test_without_keys_the_answer_is_503_and_the_log_says_why(
    atrax: Start, issuer: Issuer, change: dict[str, Any], said: str
) -> None:
    for name, value in change.items():
        setattr(issuer, name, value)
    gateway = await atrax({**config(issuer.auth()), "mcpServers": {}})
    http = wire.Http(gateway.url)

    refused = await http.request("GET", "/mcp", bearer(issuer.token()))

    assert (refused.status, refused.headers["retry-after"]) == (503, "5")
    await gateway.line(f"no keys from the issuer: .*{said}.*nobody comes in")
    assert (await http.get("/mcp"))[0] == 401  # no token: that needs no keys
    assert len(issuer.fetched) == 1
    http.close()


@promise("oauth.keys_missing")
async def test_an_issuer_that_is_not_there_is_503(atrax: Start, issuer: Issuer) -> None:
    auth = issuer.auth(jwks="http://127.0.0.1:9/keys")
    gateway = await atrax({**config(auth), "mcpServers": {}}, env={"http_proxy": issuer.url})

    assert await status(gateway, issuer.token()) == 503
    await gateway.line("no keys from the issuer: .*refused")
    assert issuer.fetched == []  # a proxy of the environment is not asked


def test_a_failed_fetch_keeps_the_keys_of_before(issuer: Issuer) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        record = program.Record()
        events: list[program.Event] = []
        record.watch(events.append)
        keys = program.Keys(issuer.jwks, record)

        async def fetched() -> bool:
            came: asyncio.Future[bool] = loop.create_future()
            keys._began = float("-inf")  # ten seconds have passed
            assert keys.wait(came.set_result) is not None
            return await came

        assert not keys
        assert await fetched()
        assert [keys.generation, keys.knows("one")] == [1, True]
        assert await fetched()
        assert keys.generation == 1  # the same ones: what was verified stays so
        issuer.status = 500
        assert not await fetched()
        assert keys.knows("one")
        issuer.status, issuer.keys = 200, [jwk(EC, "two")]
        assert await fetched()
        assert [keys.generation, keys.knows("one"), keys.knows("two")] == [2, False, True]
        assert [event.name for event in events] == ["auth.keys", "auth.keys_failed", "auth.keys"]

    asyncio.run(work())


@promise("oauth.keys_missing")
def test_a_key_server_that_trickles_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte in time, and never an end: the thread would be held, and with each fetch one more."""
    monkeypatch.setattr(program, "_FETCH_TIME", 0.5)
    gone = threading.Event()

    class Trickle(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            with contextlib.suppress(OSError):
                while True:
                    self.request.sendall(b"a")
                    time.sleep(0.05)
            gone.set()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Trickle) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        try:
            with pytest.raises(ValueError, match=r"took more than 0\.5 s"):
                program._download(f"http://127.0.0.1:{server.server_address[1]}/keys")
            assert gone.wait(30)
        finally:
            server.shutdown()


def test_who_waits_for_keys_is_bounded_and_may_leave(issuer: Issuer) -> None:
    async def work() -> None:
        issuer.open.clear()
        keys = program.Keys(issuer.jwks, program.Record())
        answers: list[bool] = []
        leave = [keys.wait(answers.append) for _ in range(1000)]
        assert keys.wait(answers.append) is None
        assert leave[0] is not None
        leave[0]()
        assert keys.wait(answers.append) is not None
        issuer.open.set()
        while not answers:
            await asyncio.sleep(0.01)
        assert answers == [True] * 1000

    asyncio.run(work())


@promise("oauth.air_gapped")
@pytest.mark.parametrize("spelled", ["keys.json", "file:keys.json", "file://{folder}/keys.json", "{folder}/keys.json"])  # fmt: skip
async def test_keys_may_come_from_a_file(
    atrax: Start, issuer: Issuer, tmp_path: Path, spelled: str
) -> None:
    (tmp_path / "keys.json").write_text(json.dumps({"keys": issuer.keys}))
    auth = issuer.auth(jwks=spelled.format(folder=tmp_path))

    gateway = await atrax({**config(auth), "mcpServers": {}})

    assert await status(gateway, issuer.token()) == 200
    assert (
        await status(gateway, issuer.token(OTHER_RSA, "two")) == 401
    )  # at once: nothing is fetched
    assert issuer.fetched == []


@promise("oauth.air_gapped")
async def test_a_reload_reads_the_file_again_and_a_broken_one_changes_nothing(
    atrax: Start, issuer: Issuer, tmp_path: Path
) -> None:
    import signal

    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"keys": issuer.keys}))
    gateway = await atrax({**config(issuer.auth(jwks="keys.json")), "mcpServers": {}})

    file.write_text("{}")
    gateway.process.send_signal(signal.SIGHUP)
    await gateway.line("nothing was changed: auth.jwks: no JWK set")
    assert await status(gateway, issuer.token()) == 200

    file.write_text(json.dumps({"keys": [jwk(EC, "two")]}))
    gateway.process.send_signal(signal.SIGHUP)
    await gateway.line("took over auth")
    assert await status(gateway, issuer.token()) == 401
    assert await status(gateway, issuer.token(EC, "two", "ES256")) == 200


def identity(
    issuer: Issuer, before: program.Identity | None = None, /, **auth: Any
) -> program.Identity:
    keys = json.dumps({"keys": issuer.keys})
    servers = {"git": program.ServerConfig(command="x", prefix="git")}
    made = program.Auth(**{**issuer.auth(jwks=keys), **auth})
    return program.Identity(program.Config(auth=made, mcpServers=servers), before)


def who(identity: program.Identity, token: str) -> program.Owner:
    headers = {"host": "localhost", "authorization": f"Bearer {token}"}
    return identity.check(program.HttpRequest("GET", "/mcp", "", headers, b"", "192.0.2.1"))


def test_a_verified_token_is_remembered_until_it_expires(issuer: Issuer) -> None:
    it = identity(issuer)
    token = issuer.token()

    assert who(it, token) is who(it, token)
    assert it._oauth is not None
    for n in range(15_000):
        it._oauth._verified[n.to_bytes(4)] = program.ANONYMOUS
    who(it, issuer.token(jti="2"))
    assert len(it._oauth._verified) == 1


GRANTS = {
    "read": {"tools": ["git__read*"]},
    "git": {"servers": ["git"]},
}


def rights(**grants: dict[str, Any]) -> dict[str, Any]:
    return {"grants": {name: program.Rights(**one) for name, one in grants.items()}}


@pytest.mark.parametrize(
    ("claims", "tools", "whole"),
    [
        ({"scope": "read"}, {"git__read"}, False),
        ({"scope": "openid read git"}, {"git__read", "git__rm"}, True),
        ({"scp": ["git"]}, {"git__read", "git__rm"}, True),
        ({"scp": "read offline_access"}, {"git__read"}, False),
        ({"scope": "read", "scp": ["git"]}, {"git__read"}, False),
    ],
)
def test_what_a_token_allows_is_the_union_of_its_grants(
    issuer: Issuer, claims: dict[str, Any], tools: set[str], whole: bool
) -> None:
    scope = who(identity(issuer, **rights(**GRANTS)), issuer.token(**claims)).scope

    assert {name for name in ("git__read", "git__rm") if scope.tool("git", name)} == tools
    assert scope.whole("git") is whole
    assert not scope.tool("time", "git__read")


@pytest.mark.parametrize(
    "claims", [{}, {"scope": "openid"}, {"scope": 5}, {"scp": [5]}, {"scope": None, "scp": {}}]
)
def test_a_token_without_a_scope_that_helps_is_403(issuer: Issuer, claims: dict[str, Any]) -> None:
    with pytest.raises(program.HttpError) as refused:
        who(identity(issuer, **rights(**GRANTS)), issuer.token(**claims))

    assert refused.value.status == 403
    challenge = dict(refused.value.headers)["WWW-Authenticate"]
    assert 'error="insufficient_scope"' in challenge
    assert 'scope="read git"' in challenge


def test_what_was_opened_stands_while_tokens_mean_the_same(issuer: Issuer) -> None:
    old = identity(issuer, **rights(**GRANTS))
    alice = who(old, issuer.token(scope="read"))
    now = time.time()

    same = identity(issuer, old, **rights(**GRANTS))
    assert same.stands(alice, now)
    assert not same.stands(alice, now + 3600)
    for change in (rights(read=GRANTS["git"]), {"issuer": "https://b.example", **rights(**GRANTS)}):
        new = identity(issuer, same, **change)
        assert not new.stands(alice, now)
    other = identity(issuer, same, **rights(read=GRANTS["git"]))
    assert other.stands(who(other, issuer.token(scope="read")), now)


def test_what_is_opened_while_a_reload_is_under_way_stands_after_it(issuer: Issuer) -> None:
    """The next Identity is made, then the lock and certificates are read, then it takes over."""
    old = identity(issuer, **rights(**GRANTS))
    coming = identity(issuer, old, **rights(**GRANTS))
    meanwhile = who(old, issuer.token(scope="read"))

    assert coming.stands(meanwhile, time.time())
    assert coming.stands(who(coming, issuer.token(scope="read", jti="2")), time.time())


def test_more_sets_of_scopes_than_are_kept_end_nothing_for_good(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "_SCOPES", 1)
    it = identity(issuer, **rights(**GRANTS))
    alice = issuer.token(scope="read")
    who(it, alice)
    who(it, issuer.token(scope="git"))  # forgets the first set

    assert it.stands(who(it, alice), time.time())


# ---- the document, and step-up ----


@promise("oauth.metadata")
async def test_each_endpoint_has_its_document_and_refusals_lead_there(
    atrax: Start, issuer: Issuer
) -> None:
    auth = issuer.auth(grants={"read": {"tools": ["echo__*"]}, "all": {}})
    gateway = await atrax(config(auth, allowed_origins=[PAGE]))
    http = wire.Http(gateway.url)
    known = "/.well-known/oauth-protected-resource"

    # "nobody" is no server: whoever has no token must not learn which ones there are.
    for endpoint in ("", "/mcp", "/servers/echo/mcp", "/servers/nobody/mcp"):
        code, body = await http.get(known + endpoint)
        assert code == 200
        assert json.loads(body) == {
            "resource": gateway.url + endpoint,
            "authorization_servers": [issuer.url],
            "scopes_supported": ["read", "all"],
            "bearer_methods_supported": ["header"],
            "resource_name": "Atrax",
        }
        if endpoint:
            refused = await http.request("POST", endpoint)
            assert refused.headers["www-authenticate"] == (
                f'Bearer realm="atrax", scope="read all", resource_metadata="{gateway.url}{known}{endpoint}"'
            )
            assert issuer.url in json.loads(await refused.body())["error"]["message"]
    for missing in ("/x", "/servers/echo", "/servers/a%20b/mcp", "/servers//mcp", "x"):
        assert (await http.get(known + missing))[0] == 401
    assert (await http.request("POST", known)).headers["allow"] == "GET, HEAD, OPTIONS"
    page = await http.request("GET", known, {"Origin": PAGE})
    assert page.headers["access-control-allow-origin"] == PAGE
    assert (await http.get(known, {"Origin": "https://evil.example"}))[0] == 403
    assert (await http.get(known, {"Host": "evil.example"}))[0] == 403
    http.close()


@promise("oauth.metadata")
async def test_public_url_is_what_the_document_says(
    atrax: Start, issuer: Issuer, tmp_path: Path
) -> None:
    place = {"public_url": "https://mcp.example.com/gw/", "socket": str(tmp_path / "atrax")}
    gateway = await atrax(config(issuer.auth(), **place))
    known, base = "/.well-known/oauth-protected-resource", "https://mcp.example.com/gw"
    http = wire.Http(gateway.url)

    for path in ("/mcp", "/gw/mcp"):  # with and without what the proxy takes away
        assert json.loads((await http.get(known + path))[1])["resource"] == f"{base}/mcp"
    assert json.loads((await http.get(known))[1])["resource"] == base
    refused = await http.request("GET", "/mcp")
    assert f'resource_metadata="{base}{known}/mcp"' in refused.headers["www-authenticate"]
    http.close()


async def test_without_oauth_there_is_no_document(atrax: Start) -> None:
    gateway = await atrax({"mcpServers": {}})

    assert (await gateway.get("/.well-known/oauth-protected-resource"))[0] == 404


@promise("oauth.step_up")
async def test_a_scope_that_would_help_is_named_to_both_eras(
    atrax: Start, issuer: Issuer, tmp_path: Path
) -> None:
    grants = {"low": {"tools": ["far__*"]}, "mid": {"tools": ["echo__ec*"]}, "high": {"servers": ["echo"]}}  # fmt: skip
    auth = issuer.auth(grants=grants)
    place = {"public_url": "https://mcp.example.com", "socket": str(tmp_path / "atrax")}
    gateway = await (await atrax(config(auth, **place))).ready()
    low = bearer(issuer.token(scope="low"))
    document = "https://mcp.example.com/.well-known/oauth-protected-resource/mcp"

    http = wire.Http(gateway.url)
    url = "http://localhost/mcp"
    modern = wire.Modern(url, headers=low, http=http)
    legacy = await wire.Legacy.start(url, headers=low, http=http)

    for client in (modern, legacy):
        refused = await client.call("echo__echo", {"text": "x"})
        assert refused.status == 403
        assert 'error="insufficient_scope"' in refused.headers["www-authenticate"]
        assert 'scope="low mid"' in refused.headers["www-authenticate"]
        assert f'resource_metadata="{document}"' in refused.headers["www-authenticate"]
        assert refused.error["data"]["atrax"] == {"reason": "scope", "scope": "mid"}
        # What no scope helps with, and what is not there, is unknown.
        unknown = await client.call("nowhere__echo", {})
        assert (unknown.code, unknown.status) == (-32602, 200 if client is legacy else unknown.status)  # fmt: skip
        assert "www-authenticate" not in unknown.headers
    door = await http.request("POST", "/servers/echo/mcp", {**low, "Content-Type": "application/json"}, b"{}")  # fmt: skip
    assert door.status == 403
    assert 'scope="low high"' in door.headers["www-authenticate"]
    await door.body()
    high = wire.Modern(url, headers=bearer(issuer.token(scope="low mid")), http=http)
    assert (await high.call("echo__echo", {"text": "x"})).text == "x"
    http.close()


@promise("oauth.metadata")
async def test_the_official_client_finds_its_way_from_a_401_to_a_call(
    atrax: Start, issuer: Issuer
) -> None:
    from mcp import Client
    from mcp.client.auth.extensions.client_credentials import ClientCredentialsOAuthProvider
    from mcp.client.streamable_http import create_mcp_http_client, streamable_http_client

    class Memory:
        tokens: Any = None

        async def get_tokens(self) -> Any:
            return self.tokens

        async def set_tokens(self, tokens: Any) -> None:
            self.tokens = tokens

        async def get_client_info(self) -> Any: ...
        async def set_client_info(self, client_info: Any) -> None: ...

    gateway = await (await atrax(config(issuer.auth(grants={"use": {}})))).ready()
    for endpoint, tool in (("/mcp", "echo__echo"), ("/servers/echo/mcp", "echo")):
        url = gateway.url + endpoint
        provider = ClientCredentialsOAuthProvider(url, Memory(), "robot", "secret", issuer=issuer.url)  # fmt: skip
        async with (
            create_mcp_http_client(auth=provider) as http,
            Client(streamable_http_client(url, http_client=http)) as client,
        ):
            answer = await client.call_tool(tool, {"text": "from far"})

        assert answer.content[0].text == "from far"
        # It asked for what our answer and document named.
        assert issuer.asked == {
            "grant_type": ["client_credentials"], "resource": [url], "scope": ["use"]
        }  # fmt: skip


# ---- the config ----


def errors(**auth: Any) -> str:
    text = json.dumps({"auth": {"type": "oauth", **auth}, "mcpServers": {"git": {"command": "x"}}})
    with pytest.raises(program.UsageError) as caught:
        program.Config.load(text, {})
    return str(caught.value)


GOOD = {"issuer": "https://a.example", "audience": "x", "jwks": "https://a.example/keys"}


@pytest.mark.parametrize(
    ("auth", "told"),
    [
        ({}, 'auth.issuer: is missing: "type": "oauth" needs it'),
        ({}, "auth.audience: is missing"),
        ({}, "auth.jwks: is missing"),
        ({**GOOD, "issuer": "a.example"}, "auth.issuer: String should match"),
        ({**GOOD, "audience": 5}, "auth.audience: "),
        ({**GOOD, "jwks": "http://a.example/keys"}, "auth.jwks: must be an https:// URL, or a file"),
        ({**GOOD, "jwks": "ftp://a.example/keys"}, "auth.jwks: must be an https:// URL, or a file"),
        ({**GOOD, "jwks": "https://u:p@a.example/"}, "auth.jwks: must be an https:// URL, or a file"),
        ({**GOOD, "jwks": "nope.json"}, "auth.jwks: cannot read nope.json"),
        ({**GOOD, "grants": {}}, "auth.grants: "),
        ({**GOOD, "grants": {"a b": {}}}, "auth.grants"),
        ({**GOOD, "grants": {"a": {"sever": []}}}, 'auth.grants.a.sever: unknown key. Did you mean "servers"?'),
        ({**GOOD, "grants": {"a": {"servers": ["gti"]}}}, 'auth.grants.a.servers[0]: there is no server "gti"'),
        ({**GOOD, "grants": {"a": {"tools": ["*"]}}}, 'auth.grants.a.tools[0]: "*" is of no server'),
        ({**GOOD, "tokens": [{"name": "a", "token": "x" * 16}]}, 'auth.tokens: belongs to "type": "token"'),
        ({**GOOD, "unsafe": True}, 'auth.unsafe: belongs to "type": "none"'),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_path(auth: dict[str, Any], told: str) -> None:
    assert told in errors(**auth)


def test_http_on_this_machine_and_several_audiences_are_fine() -> None:
    auth = {**GOOD, "type": "oauth", "jwks": "http://[::1]:1/keys", "audience": ["x", "y"]}
    text = json.dumps({"auth": auth, "mcpServers": {"git": {"command": "x"}}})

    assert program.Config.load(text, {}).auth.audience == ["x", "y"]
