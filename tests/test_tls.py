"""TLS: HTTPS of Atrax's own, certificates of clients as principals, and handshakes that never end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import signal
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import wire
from certificates import Authority, subject
from conftest import Running, Start, child, eventually
from cryptography import x509
from cryptography.x509.oid import NameOID
from installed import NODE
from promises import promise
from test_http import HOST, LIMIT, LOOPS, NewLoop, Served, fill, get, run, statuses

import atrax

pytestmark = pytest.mark.needs_install()  # `quick` has no time for all of these

SERVERS = {"mcpServers": {"echo": child("echo")}}
MODERN = "2026-07-28"


@pytest.fixture(scope="module")
def ca() -> Authority:
    return Authority("the test's CA")


def config(folder: Path, ca: Authority, clients: Authority | None = None) -> dict[str, Any]:
    """A `tls` object with a certificate for this machine; `clients`: whose certificates are asked for."""
    cert, key = ca.issue(folder, "server")
    more = {"client_ca": str(clients.write(folder, "clients"))} if clients else {}
    return {"tls": {"cert": str(cert), "key": str(key), **more}}


# ---- what the config says ----


def reading(folder: Path, tls: dict[str, str], **more: Any) -> str:
    """What a config with `tls` is refused for."""
    file = folder / "config.json"
    file.write_text(json.dumps({"tls": tls, "mcpServers": {}, **more}))
    with pytest.raises(atrax.UsageError) as caught:
        atrax.Config.load(str(file))
    return str(caught.value)


def test_what_is_wrong_with_a_file_is_said_by_its_name(tmp_path: Path, ca: Authority) -> None:
    ca.issue(tmp_path, "server")
    ca.issue(tmp_path, "other")
    ca.issue(tmp_path, "sealed", password=b"secret")
    (tmp_path / "text.pem").write_text("no certificate")
    (tmp_path / "torn.pem").write_text((tmp_path / "server.pem").read_text()[:300])
    good = {"cert": "server.pem", "key": "server.key"}
    for wrong, told in [
        ({**good, "cert": "none.pem"}, "tls: {}/none.pem: No such file or directory"),
        ({**good, "key": "none.key"}, "tls: {}/none.key: No such file or directory"),
        ({**good, "cert": "text.pem"}, "tls: {}/text.pem: has no PEM block -----BEGIN CERT"),
        ({**good, "cert": "torn.pem"}, "tls: {}/torn.pem, or {}/server.key: not valid PEM"),
        ({**good, "key": "server.pem"}, "tls: {}/server.pem: has no PEM block -----BEGIN PRIVATE"),
        ({**good, "key": "other.key"}, "tls: {}/other.key: is not the key of {}/server.pem"),
        ({**good, "key": "sealed.key"}, "tls: {}/sealed.key: is encrypted; decrypt it: openssl"),
        ({**good, "client_ca": "text.pem"}, "tls: {}/text.pem: has no PEM block -----BEGIN CERT"),
        ({**good, "client_ca": "torn.pem"}, "tls: {}/torn.pem: "),
        ({"cert": "server.pem"}, "tls.key: is missing"),
    ]:
        assert told.replace("{}", str(tmp_path)) in reading(tmp_path, wrong), wrong
    assert "tls: a Unix socket is for a proxy" in reading(tmp_path, good, socket="a.sock")


def test_other_machines_are_let_in_where_clients_show_certificates(
    tmp_path: Path, ca: Authority
) -> None:
    file = tmp_path / "config.json"
    tls = config(tmp_path, ca)
    file.write_text(json.dumps({**tls, "host": "0.0.0.0", "mcpServers": {}}))
    with pytest.raises(atrax.UsageError, match="nothing asks who calls"):
        atrax.Config.load(str(file))
    tls = config(tmp_path, ca, ca)
    file.write_text(json.dumps({**tls, "host": "0.0.0.0", "mcpServers": {}}))
    assert atrax.Config.load(str(file)).tls is not None


# ---- HTTPS ----


@promise("tls.https")
async def test_clients_of_both_eras_call_over_https(
    atrax: Start, tmp_path: Path, ca: Authority
) -> None:
    running = await atrax({**config(tmp_path, ca), **SERVERS}, tls=ca.context())
    assert running.url.startswith("https://127.0.0.1:")
    modern, legacy = running.modern(), await running.legacy()
    assert (await modern.call("echo__echo", {"text": "a"})).text == "a"
    assert (await legacy.call("echo__echo", {"text": "b" * 300_000})).text == "b" * 300_000
    await running.line(r"claude mcp add --transport http atrax https://")


@promise("tls.https")
async def test_curl_and_node_trust_the_certificate(
    atrax: Start, tmp_path: Path, ca: Authority
) -> None:
    running = await atrax({**config(tmp_path, ca), **SERVERS}, tls=ca.context())
    bundle = str(ca.write(tmp_path))
    curl = await said(
        "curl", "-sS", "--cacert", bundle, "-w", " %{http_version}", running.url + "/health"
    )
    assert curl == '{"status":"ok"} 1.1'
    script = f"fetch('{running.url}/health').then(r => r.text()).then(t => console.log(t))"
    node = str(NODE) if NODE.exists() else "node"
    assert (
        await said(node, "-e", script, env={"NODE_EXTRA_CA_CERTS": bundle}) == '{"status":"ok"}\n'
    )


async def said(*command: str, env: dict[str, str] | None = None) -> str:
    """What a program writes to stdout; it must end well."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output
    return output.decode()


@promise("tls.https")
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
async def test_what_is_no_tls_ends_and_harms_nobody(
    atrax: Start, tmp_path: Path, ca: Authority
) -> None:
    running = await atrax({**config(tmp_path, ca), **SERVERS}, tls=ca.context())
    port = running.url.rpartition(":")[2]
    for words in (
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x00",
        b"\0" * 99,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
        writer.write(words)
        writer.write_eof()
        with contextlib.suppress(ConnectionError):
            assert b"HTTP/1.1 200" not in await asyncio.wait_for(reader.read(), LIMIT)
        writer.close()
    old = ca.context()
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection("127.0.0.1", int(port), ssl=old)
    assert (await running.modern().call("echo__echo", {"text": "a"})).text == "a"


# ---- the handshake, on both loops ----


@contextlib.asynccontextmanager
async def secured(
    folder: Path, ca: Authority, clients: Authority | None = None, **limits: Any
) -> AsyncIterator[Served]:
    """An HttpServer that speaks TLS, in this process."""
    it = Served(**limits)
    it.tls = atrax.Tls(**config(folder, ca, clients)["tls"])
    it.server = atrax.HttpServer(
        it.echo, atrax.Limits(**limits), it.record, lambda: it.now, it.tls.context()
    )
    it.port = int((await it.server.listen("127.0.0.1", 0))[0].rpartition(":")[2])
    try:
        yield it
    finally:
        await it.server.close(0)


@LOOPS
def test_a_request_that_comes_with_the_last_word_of_the_handshake_is_answered(
    loop: NewLoop, tmp_path: Path, ca: Authority
) -> None:
    async def test() -> None:
        async with secured(tmp_path, ca) as it:
            # One write, so that Finished and request lie in one segment; and bytes by bytes.
            for size in (1 << 16, 7):
                reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
                incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
                tls = ca.context().wrap_bio(incoming, outgoing, server_hostname="localhost")
                while True:
                    try:
                        tls.do_handshake()
                        break
                    except ssl.SSLWantReadError:
                        writer.write(outgoing.read())
                        incoming.write(await asyncio.wait_for(reader.read(1 << 16), LIMIT))
                tls.write(get(HOST, target=b"/early"))
                data = outgoing.read()
                for at in range(0, len(data), size):
                    writer.write(data[at : at + size])
                    await asyncio.sleep(0)
                answer = b""
                while b"/early" not in answer:
                    incoming.write(await asyncio.wait_for(reader.read(1 << 16), LIMIT))
                    with contextlib.suppress(ssl.SSLWantReadError):
                        answer += tls.read(1 << 16)
                writer.close()
            assert [(r.path, r.secure, r.certificate) for r in it.echo.seen] == [
                ("/early", True, "")
            ] * 2
            assert not [event for event in it.events if event.level == "error"]

    run(loop, test())


@LOOPS
def test_what_came_in_clear_never_passes_for_tls(
    loop: NewLoop, tmp_path: Path, ca: Authority
) -> None:
    async def test() -> None:
        async with secured(tmp_path, ca) as it:
            reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
            writer.write(get(HOST, target=b"/clear"))
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), LIMIT)
            writer.close()
            await it.until_connections(0)
            assert not it.echo.seen
            assert [event.name for event in it.events] == ["tls.refused"]

    run(loop, test())


@LOOPS
def test_handshakes_that_do_not_end_are_counted_and_cut(
    loop: NewLoop, tmp_path: Path, ca: Authority
) -> None:
    async def test() -> None:
        async with secured(tmp_path, ca, connections_per_address=3, header_timeout=0.5) as it:
            slow = [await asyncio.open_connection("127.0.0.1", it.port) for _ in range(3)]
            slow[0][1].write(b"\x16\x03\x01\x02\x00\x01")  # a ClientHello that begins
            await it.until_connections(3)
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.open_connection("127.0.0.1", it.port, ssl=ca.context())
            for reader, writer in slow:
                with contextlib.suppress(ConnectionError):
                    await asyncio.wait_for(reader.read(), LIMIT)
                writer.close()
            await it.until_connections(0)
            reader, writer = await asyncio.open_connection("127.0.0.1", it.port, ssl=ca.context())
            writer.write(get(HOST))
            assert b"200" in await asyncio.wait_for(reader.readline(), LIMIT)
            writer.close()

    run(loop, test())


@LOOPS
def test_a_stop_ends_handshakes_too(loop: NewLoop, tmp_path: Path, ca: Authority) -> None:
    async def test() -> None:
        async with secured(tmp_path, ca) as it:
            reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
            await it.until_connections(1)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), LIMIT) == b""
        writer.close()

    run(loop, test())


@LOOPS
def test_a_reader_that_takes_nothing_is_stalled_then_cut(
    loop: NewLoop, tmp_path: Path, ca: Authority
) -> None:
    async def test() -> None:
        async with secured(tmp_path, ca) as it:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", it.port, ssl=ca.context(), limit=1000
            )
            writer.write(get(HOST, target=b"/wait"))
            await it.echo.until(lambda: len(it.echo.kept) == 1)
            it.echo.kept[0].head(200, atrax.SSE_HEADERS)
            await fill(it.echo.kept[0])
            assert it.echo.kept[0].stalled
            it.pass_time(32)
            await it.echo.until(lambda: it.echo.left == [0])
            assert "http.stalled" in [event.name for event in it.events]
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                while await asyncio.wait_for(reader.read(1 << 16), LIMIT):
                    pass
            writer.close()
            await it.until_connections(0)

    run(loop, test())


@LOOPS
def test_large_answers_pipelines_and_refusals_arrive_whole(
    loop: NewLoop, tmp_path: Path, ca: Authority
) -> None:
    async def test() -> None:
        async with secured(tmp_path, ca) as it:
            reader, writer = await asyncio.open_connection("127.0.0.1", it.port, ssl=ca.context())
            writer.write(get(HOST, target=b"/wait"))
            await it.echo.until(lambda: len(it.echo.kept) == 1)
            body = bytes(range(256)) * 40_000
            it.echo.kept[0].full(200, (), body)
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), LIMIT)
            assert await asyncio.wait_for(reader.readexactly(len(body)), LIMIT) == body
            # Forty in a row, and then what is no request: each is answered, and the end is one.
            writer.write(get(HOST) * 40 + b"GET / HTTP/1.1\r\nHost : a\r\n\r\n" + b"x" * 9000)
            answers = b""
            while answers.count(b"HTTP/1.1") < 41:
                answers += await asyncio.wait_for(reader.read(1 << 16), LIMIT)
            it.pass_time(3)  # for who reads on; TLS has no half-closed connection
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                answers += await asyncio.wait_for(reader.read(), LIMIT)
            assert statuses(answers) == (*[200] * 40, 400)
            writer.close()
            await it.until_connections(0)

    run(loop, test())


@LOOPS
@pytest.mark.parametrize("most", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_the_subject_of_the_certificate_is_in_each_request(
    loop: NewLoop, most: ssl.TLSVersion, tmp_path: Path, ca: Authority
) -> None:
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.COUNTRY_NAME, "DE"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Acme, CN=admin"),
            x509.NameAttribute(NameOID.COMMON_NAME, " #é\n"),
            x509.NameAttribute(NameOID.EMAIL_ADDRESS, "a+b@c"),
        ]
    )
    told = r"emailAddress=a\+b@c,CN=\ #é\0A,O=Acme\, CN=admin,C=DE"

    async def test() -> None:
        async with secured(tmp_path, ca, ca) as it:
            context = ca.context(*ca.issue(tmp_path, "client", name))
            context.maximum_version = most
            for _ in range(2):
                reader, writer = await asyncio.open_connection("127.0.0.1", it.port, ssl=context)
                for _ in range(2):
                    writer.write(get(HOST))
                    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), LIMIT)
                    assert head.startswith(b"HTTP/1.1 200"), head
                    await reader.readuntil(b"}")
                writer.close()
            assert [request.certificate for request in it.echo.seen] == [told] * 4

    run(loop, test())


@LOOPS
def test_no_certificate_and_a_wrong_one_reach_nobody(
    loop: NewLoop, tmp_path: Path, ca: Authority
) -> None:
    clients, foreign = Authority("clients"), Authority("clients")  # of the same name

    async def refused(it: Served, context: ssl.SSLContext) -> None:
        # In TLS 1.3 the client is done before the server has looked: it hears of it when it reads.
        with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
            reader, writer = await asyncio.open_connection("127.0.0.1", it.port, ssl=context)
            writer.write(get(HOST))
            await asyncio.wait_for(reader.readexactly(1), LIMIT)

    async def test() -> None:
        async with secured(tmp_path, ca, clients) as it:
            await refused(it, ca.context())
            await refused(it, ca.context(*foreign.issue(tmp_path, "foreign")))
            await refused(it, ca.context(*ca.issue(tmp_path, "servers")))
            await refused(it, ca.context(*clients.issue(tmp_path, "old", expired=True)))
            await refused(it, ca.context(*clients.issue(tmp_path, "nobody", x509.Name([]))))
            await it.until_connections(0)
            assert not it.echo.seen
            assert [event.name for event in it.events] == ["certificate.refused"] * 5
            assert not [event for event in it.events if event.level == "error"]

    run(loop, test())


def resumed(port: int, context: ssl.SSLContext, session: Any = None) -> tuple[bool, Any]:
    """One request; whether its TLS session was `session` gone on with, and the session."""
    with (
        socket.create_connection(("127.0.0.1", port)) as raw,
        context.wrap_socket(raw, server_hostname="localhost", session=session) as tls,
    ):
        tls.settimeout(LIMIT)
        tls.sendall(get(HOST))
        assert tls.recv(1 << 16).startswith(b"HTTP/1.1 200")
        return bool(tls.session_reused), tls.session


@LOOPS
@pytest.mark.parametrize("most", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_resumed_session_is_the_same_principal_and_none_outlives_a_renewal(
    loop: NewLoop, most: ssl.TLSVersion, tmp_path: Path, ca: Authority
) -> None:
    async def test() -> None:
        async with secured(tmp_path, ca, ca) as it:
            context = ca.context(*ca.issue(tmp_path, "client"))
            context.maximum_version = most
            _, session = await asyncio.to_thread(resumed, it.port, context)
            again, session = await asyncio.to_thread(resumed, it.port, context, session)
            assert again
            assert [request.certificate for request in it.echo.seen] == ["CN=client"] * 2
            it.server.renew(it.tls.context())
            again, _ = await asyncio.to_thread(resumed, it.port, context, session)
            assert not again

    run(loop, test())


def test_a_certificate_that_has_expired_since_is_refused() -> None:
    assert atrax._left({"notAfter": "Nov 24 00:00:00 2126 GMT"}) > 0
    with pytest.raises(ValueError, match="has expired"):
        atrax._left({"notAfter": "Nov 24 00:00:00 2024 GMT"})


# ---- a certificate is a principal ----


@promise("tls.certificates")
async def test_sessions_of_one_certificate_are_unknown_to_another(
    atrax: Start, tmp_path: Path, ca: Authority
) -> None:
    alice = ca.context(*ca.issue(tmp_path, "alice", subject("alice", "Acme")))
    bob = ca.context(*ca.issue(tmp_path, "bob", subject("bob", "Acme")))
    running = await atrax({**config(tmp_path, ca, ca), **SERVERS}, tls=alice)
    hers = await running.legacy()
    assert (await hers.call("echo__echo", {"text": "a"})).text == "a"
    his = wire.Legacy(running.endpoint(), hers.version, None, wire.Http(running.url, bob))
    his.session, his.initialized = hers.session, hers.initialized
    assert (await his.open("tools/list")).status == 404
    assert (await hers.call("echo__echo", {"text": "b"})).text == "b"
    his.close()


@promise("tls.certificates")
async def test_with_tokens_both_are_needed_and_the_token_is_the_principal(
    atrax: Start, tmp_path: Path, ca: Authority
) -> None:
    alice = ca.context(*ca.issue(tmp_path, "alice"))
    token = {"name": "ci", "hash": "sha256:" + hashlib.sha256(b"a-token-for-ci-0").hexdigest()}
    auth = {"auth": {"type": "token", "tokens": [token]}, "log": {"audit": str(tmp_path / "audit")}}
    running = await atrax({**config(tmp_path, ca, ca), **SERVERS, **auth}, tls=alice)
    assert (await running.get("/status"))[0] == 401
    client = running.modern(headers={"Authorization": "Bearer a-token-for-ci-0"})
    assert (await client.call("echo__echo", {"text": "a"})).text == "a"
    running.tls = ca.context()
    with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
        await running.get("/status", {"Authorization": "Bearer a-token-for-ci-0"})
    await eventually((tmp_path / "audit").exists, "no audit")
    await eventually(lambda: bool((tmp_path / "audit").read_text()), "nothing in the audit")
    assert json.loads((tmp_path / "audit").read_text())["principal"] == "ci"


# ---- renewal ----


async def fingerprint(running: Running) -> bytes:
    """Of the certificate that a new connection is shown."""
    url = running.url
    _reader, writer = await asyncio.open_connection(
        "127.0.0.1", int(url.rpartition(":")[2]), ssl=running.tls
    )
    found: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return found


@LOOPS
def test_renewal_reads_the_files_anew_for_connections_to_come(
    loop: NewLoop, tmp_path: Path, ca: Authority
) -> None:
    async def test() -> None:
        clients, others = Authority("clients"), Authority("others")
        async with secured(tmp_path, ca, clients) as it:
            context = ca.context(*clients.issue(tmp_path, "client"))
            reader, writer = await asyncio.open_connection("127.0.0.1", it.port, ssl=context)
            writer.write(get(HOST))
            await asyncio.wait_for(reader.readuntil(b"}"), LIMIT)
            others.write(tmp_path, "clients")
            it.server.renew(it.tls.context())
            # Who was let in by the old CA has to come again, and is not let in.
            assert await asyncio.wait_for(reader.read(), LIMIT) == b""
            writer.close()
            with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
                reader, writer = await asyncio.open_connection("127.0.0.1", it.port, ssl=context)
                await asyncio.wait_for(reader.readexactly(1), LIMIT)
            # What cannot be used changes nothing.
            (tmp_path / "server.key").write_text("")
            with pytest.raises(ValueError, match=r"server\.key: has no PEM block"):
                it.server.renew(it.tls.context())
            context = ca.context(*others.issue(tmp_path, "client"))
            reader, writer = await asyncio.open_connection("127.0.0.1", it.port, ssl=context)
            writer.write(get(HOST))
            assert b"200" in await asyncio.wait_for(reader.readline(), LIMIT)
            writer.close()

    run(loop, test())


@promise("tls.certificates")
@LOOPS
@pytest.mark.parametrize("cut", [9, -1], ids=["head", "body"])
def test_a_request_under_way_at_a_renewal_is_the_last_of_its_connection(
    loop: NewLoop, cut: int, tmp_path: Path, ca: Authority
) -> None:
    """Else whoever keeps one half sent would be let in by the old CA for ever."""

    async def test() -> None:
        async with secured(tmp_path, ca, ca) as it:
            context = ca.context(*ca.issue(tmp_path, "client"))
            reader, writer = await asyncio.open_connection("127.0.0.1", it.port, ssl=context)
            request = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
            writer.write(get(HOST))
            await asyncio.wait_for(reader.readuntil(b"}"), LIMIT)
            writer.write(request[:cut])
            async with asyncio.timeout(LIMIT):
                while not any(one._parser.phase for one in it.server.connections):
                    await asyncio.sleep(0)
            it.server.renew(it.tls.context())
            writer.write(request[cut:])
            answer = await asyncio.wait_for(reader.read(), LIMIT)
            assert answer.count(b"HTTP/1.1 200") == 1
            assert b"Connection: close" in answer
            writer.close()

    run(loop, test())


@promise("tls.certificates")
async def test_what_is_open_ends_when_a_ca_of_clients_is_taken_away(
    atrax: Start, tmp_path: Path, ca: Authority
) -> None:
    """A stream has no end of its own, so the connection would be let in by the old CA for ever."""
    alice = ca.context(*ca.issue(tmp_path, "alice"))
    running = await atrax({**config(tmp_path, ca, ca), **SERVERS}, tls=alice)
    stream = await (await running.legacy()).listen()
    running.process.send_signal(signal.SIGHUP)
    await running.line(r"took over tls")
    listening = asyncio.ensure_future(stream.body())
    assert not (await asyncio.wait([listening], timeout=0))[0]  # the same CA: it goes on

    Authority("others").write(tmp_path, "clients")
    running.process.send_signal(signal.SIGHUP)

    async with asyncio.timeout(LIMIT):
        await listening
    with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
        await running.get("/health")


@promise("tls.https")
async def test_sighup_shows_the_new_certificate_and_keeps_what_is_open(
    atrax: Start, tmp_path: Path, ca: Authority
) -> None:
    running = await atrax({**config(tmp_path, ca), **SERVERS}, tls=ca.context())
    client, old = running.modern(), await fingerprint(running)
    assert (await client.call("echo__echo", {"text": "a"})).text == "a"
    # What cannot be used changes nothing, and is said.
    (tmp_path / "server.key").write_text("no key")
    running.process.send_signal(signal.SIGHUP)
    await running.line(r"nothing was changed: .*server\.key: has no PEM block")
    assert await fingerprint(running) == old
    ca.issue(tmp_path, "server")
    running.process.send_signal(signal.SIGHUP)
    await running.line(r"took over tls")
    assert await fingerprint(running) != old
    assert (await client.call("echo__echo", {"text": "b"})).text == "b"


@promise("tls.certificates")
@LOOPS
def test_a_connection_ends_when_its_certificate_expires(
    loop: NewLoop, tmp_path: Path, ca: Authority
) -> None:
    async def test() -> None:
        async with secured(tmp_path, ca, ca) as it:
            context = ca.context(*ca.issue(tmp_path, "client"))
            reader, writer = await asyncio.open_connection("127.0.0.1", it.port, ssl=context)
            writer.write(get(HOST, target=b"/wait"))
            await it.echo.until(lambda: bool(it.echo.kept))
            it.now += 23 * 3600  # of 24
            it.server.wake(it.now)
            assert not it.echo.left
            it.now += 2 * 3600
            it.server.wake(it.now)
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), LIMIT) == b""
            await it.echo.until(lambda: bool(it.echo.left))
            writer.close()

    run(loop, test())
