"""The key `paths`: what a call may name on the disk, in every spelling, and what roots may widen.

The spellings are data. They are tried on Atrax alone, then on a real server, whose own check they never reach.
In them CAGE is the one allowed directory, which is the server's `cwd` too, and OUT a directory beside it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from asking import ALL, ROOTS, Person, heard
from conftest import Running, Start, child, eventually
from installed import node_server
from promises import promise

import atrax

Json = Any
SECRET = "what nobody may read"
eras = pytest.mark.parametrize("era", ["legacy", "modern"])

REFUSED = {
    "climbing": [
        "..", "../", "../out/secret.txt", "./../out/secret.txt", "sub/../../out/secret.txt",
        "CAGE/..", "CAGE/../out/secret.txt", "CAGE/sub/.././../out/secret.txt",
        "missing/../../out/secret.txt", "CAGE/note.txt/../../out/secret.txt",
        "CAGE/" + "x" * 300 + "/../../out/secret.txt",
    ],
    "absolute": [
        "/", "/etc/passwd", "//etc/passwd", "///etc//passwd", "/./etc/passwd", "OUT/secret.txt", "OUT",
        "CAGE-evil/secret.txt", "CAGE/../cage-evil/secret.txt", "CAGE.bak",
    ],
    "links": [
        "away", "away/secret.txt", "CAGE/away/secret.txt", "CAGE/away/new.txt", "secret", "chain/secret.txt",
        "top/etc/passwd", "away/../out/secret.txt", "sub/up/../out/secret.txt", "away/../cage/note.txt/../../out",
    ],
    "of a process": [
        "/proc/self/root/etc/passwd", "/proc/self/cwd/note.txt", "/proc/thread-self/root/etc/passwd",
        "/proc/1/root/etc/passwd", "/dev/fd/0", "/dev/stdin", "process/etc/passwd", "//proc/self/./root/etc/passwd",
    ],
    "encoded": [
        "%2e%2e/out/secret.txt", "%2E%2E%2Fout%2Fsecret.txt", "..%2fout/secret.txt", "..%5cout%5csecret.txt",
        ".%2e/out/secret.txt", "%\t2e%\t2e/out/secret.txt", "sub/%2e%2e/%2e%2e/out/secret.txt", "CAGE%2f..%2fout/secret.txt",
        "%2fetc%2fpasswd", "CAGE/%2e%2e%2fout%2fsecret.txt",
    ],
    "encoded twice": [
        "%252e%252e/out/secret.txt", "%252e%252e%252fout%252fsecret.txt", "..%252fout/secret.txt",
        "..%255cout%255csecret.txt", "%252fetc%252fpasswd", "CAGE/%252e%252e/out/secret.txt",
    ],
    "over-long": [
        "%c0%ae%c0%ae/out/secret.txt", "%c0%ae%c0%ae%c0%afout/secret.txt", "..%c0%afout/secret.txt",
        "x" * 5000, "sub/../" * 700 + "note.txt", "a/" * 9000 + "b",
    ],
    "NUL": [
        "\0", "note.txt\0", "note.txt\0.png", "\0/etc/passwd", "note.txt%00", "note.txt%2500.png", "../out/secret.txt\0",
    ],
    "slashes": [
        "..\\out\\secret.txt", "..\\/out/secret.txt", "\\etc\\passwd", "sub\\..\\..\\out", "CAGE\\..\\out\\secret.txt",
        "CAGE/..\\out", "C:\\..\\..\\out", "C:/../../out/secret.txt", "..／out／secret.txt", "．．/out/secret.txt",
    ],
    "home": ["~", "~/", "~/.ssh/id_rsa", "~root/.profile", "~+", "%7e/.ssh", " ~/.ssh", '"~/.ssh"'],
    "padded": [
        " /etc/passwd", "\t/etc/passwd", "\n/etc/passwd", '"/etc/passwd"', "'/etc/passwd'", "\u00a0/etc/passwd", "\ufeff\u00a0 \u3000/etc/passwd", "\u200b/etc/passwd",
        "\ufeff/etc/passwd", "%20/etc/passwd", ".\t./out/secret.txt", " ../out/secret.txt",
    ],
    "other schemes": [
        "x1:/../../out/secret.txt", "http://../../../out/secret.txt", "data:../../../out/secret.txt",
        "http:%2f..%2f..%2fout", "https://host/../../../../etc/passwd",
    ],
    "file": [
        "file:///etc/passwd", "FILE:///etc/passwd", "file:/etc/passwd", "file:etc/passwd", "file:////etc/passwd",
        "file://localhost/etc/passwd", "file://", "file:", "file:///", "file://etc", "file:~/x", "file://~/x",
        "file://127.0.0.1CAGE/note.txt", "file://evil.exampleCAGE/note.txt", "file://localhost:80CAGE/note.txt",
        "file://CAGE/../out/secret.txt", "file://CAGE/%2e%2e/out/secret.txt", "file://CAGE/%252e%252e/out/secret.txt",
        "file://CAGE/..%5cout", "file://CAGE/away/secret.txt", "file://CAGE-evil/secret.txt", "file:///CAGE/%00",
        "file:///etc/passwd#/../..CAGE/note.txt", "file:///etc/passwd?/../..CAGE/note.txt",
        "file:///etc/passwd%23/../..CAGE/note.txt", "file:\\\\\\etc\\passwd", "file:/\\etc/passwd",
        " file:///etc/passwd", "fi\tle:///etc/passwd", "file:\n///etc/passwd", '"file:///etc/passwd"',
        "file%3A///etc/passwd", "file%253a%252f%252f%252fetc%252fpasswd", "file:///proc/self/root/etc/passwd",
    ],
}  # fmt: skip
SPELLINGS = [(kind, spelling) for kind, rows in REFUSED.items() for spelling in rows]

# Each is tried as it is, below the allowed directory, and as a URI.
NAMES = [
    "note.txt", "with space.txt", " leading.txt", "trailing.txt ", "100%.txt", "50%25.txt", "a%20b.txt", "%2e.txt",
    "#hash#.txt", "what?.txt", "naïve café.txt", "nai\u0308ve.txt", "日本語（１）.txt", "🕸️.txt", "-rf", "--help", ".hidden",
    "...", "..two", "a..b", "dots...txt", "tab\there", "new\nline", "it's", 'quo"te', "back\\slash", "co:lon", "C:drive.txt",
    "til~de", "semi;colon", "$HOME", "*", "[x]", "{a,b}", "pipe|", "a&amp;b", "con.txt", "x" * 250, "sub/deep/new.txt",
    "file.txt", "sub/../note.txt", "sub//./note.txt", "inner/note.txt",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Place:
    """A cage with links in and out of it, and what lies around."""

    folder: Path

    @property
    def cage(self) -> Path:
        return self.folder / "cage"

    def spelled(self, text: str) -> str:
        return text.replace("CAGE", str(self.cage)).replace("OUT", str(self.folder / "out"))

    def server(self, **more: Json) -> Json:
        """The keys of a server that may touch the cage alone."""
        return {"cwd": str(self.cage), "paths": {"dirs": [str(self.cage)]}, **more}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place((tmp_path / "place").resolve())
    for folder in ("cage/sub/deep", "out", "cage-evil", "cage.bak"):
        (place.folder / folder).mkdir(parents=True)
        (place.folder / folder / "secret.txt").write_text(SECRET)
    (place.cage / "note.txt").write_text("a note")
    links = {
        "away": "../out",
        "secret": "../out/secret.txt",
        "chain": "away",
        "top": "/",
        "inner": "sub/..",
    }
    for name, target in {**links, "process": "/proc/self/root", "sub/up": "../.."}.items():
        (place.cage / name).symlink_to(target)
    return place


def call(method: str, params: Json) -> atrax.Call:
    return atrax.Call(method, params, atrax.ANONYMOUS, atrax.MODERN)


def verdict(place: Place, arguments: Json, *globs: str, method: str = "tools/call") -> Json:
    """What Atrax answers to a call with these arguments; None if it may pass."""
    record = atrax.Record()
    paths = {"dirs": [str(place.cage)], "arguments": list(globs)}
    config = atrax.ServerConfig(command="x", cwd=str(place.cage), paths=paths)
    params = arguments if method not in ("tools/call", "prompts/get") else {"arguments": arguments}
    answer = atrax.path_error(record, "s", config, call(method, params))
    assert record.counters["events", ("event", "path.refused")] or answer is None
    return answer


# ---- spellings ----------------------------------------------------------------------------


@promise("paths.inside")
@pytest.mark.parametrize(("kind", "spelling"), SPELLINGS)
def test_a_spelling_that_leaves_the_directories_is_refused(
    place: Place, kind: str, spelling: str
) -> None:
    answer = verdict(place, {"path": place.spelled(spelling)})

    assert isinstance(answer, atrax.Outcome), spelling
    assert answer.result and answer.result["isError"]
    text = answer.result["content"][0]["text"]
    assert text.startswith("arguments.path: ") and str(place.cage) in text


@promise("paths.inside")
@pytest.mark.parametrize("name", NAMES)
def test_an_odd_but_honest_name_passes(place: Place, name: str) -> None:
    path = f"{place.cage}/{name}"

    assert verdict(place, {"path": path}) is None
    assert verdict(place, {"path": name}) is None
    assert verdict(place, {"path": "file://" + quote(path)}) is None
    assert (
        verdict(place, {"path": "file://localhost" + quote(path, safe="")[3:].join(("/", ""))})
        is None
    )


@promise("paths.inside")
@pytest.mark.parametrize(
    "odd", ["a b", "50%25", "#1", "what?", "日本語（１）", "nai\u0308ve", "back\\slash", " '", "~"]
)
def test_a_directory_with_an_odd_name_can_be_allowed(tmp_path: Path, odd: str) -> None:
    place = Place(tmp_path / odd)
    place.cage.mkdir(parents=True)

    for path in (
        f"{place.cage}/note.txt",
        f"file://{quote(str(place.cage))}/note.txt",
        str(place.cage),
        ".",
    ):
        assert verdict(place, {"path": path}) is None, path
    for path in (
        f"{place.cage}/../x",
        f"file://{quote(str(place.cage))}/%2e%2e/x",
        str(tmp_path),
        "..",
    ):
        assert verdict(place, {"path": path}) is not None, path


def test_there_are_as_many_spellings_as_was_promised() -> None:
    assert len(set(SPELLINGS)) >= 60 and len(set(NAMES)) >= 20


# ---- which values name a path -------------------------------------------------------------

PLACES = {
    "alone": lambda x: {"path": x},
    "in a list": lambda x: {"paths": ["note.txt", x]},
    "in lists of lists": lambda x: {"paths": [[["note.txt"], [x]]]},
    "in an object of a list": lambda x: {"edits": [{"text": "y"}, {"file": x}]},
    "deep": lambda x: {"a": {"b": [{"c": {"d": {"filename": x}}}]}},
    "snake_case": lambda x: {"source_path": x},
    "camelCase": lambda x: {"outputDir": x},
    "after an acronym": lambda x: {"HTTPPath": x},
    "as an acronym": lambda x: {"rootURI": x},
    "kebab-case": lambda x: {"base-directory": x},
    "in capitals": lambda x: {"TARGET_FOLDER": x},
    "two words in one": lambda x: {"fileName": x},
    "named by a glob": lambda x: {"copy": [{"from": x}]},
    "under a name nobody foresaw": lambda x: {"any": {"thing": {"source": x}}},
}


@promise("paths.inside")
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("method", ["tools/call", "prompts/get"])
def test_a_path_is_found_wherever_it_stands(place: Place, where: str, method: str) -> None:
    def check(value: str) -> Json:
        return verdict(place, PLACES[where](value), "copy.from", "*.source", method=method)

    assert check("note.txt") is None
    answer = check("../out")
    error = answer.error if method == "tools/call" else answer
    assert method == "tools/call" or error.code == atrax.INVALID_PARAMS


@promise("paths.inside")
@pytest.mark.parametrize(
    "arguments",
    [
        {"content": "../out", "profile": "../x", "xpath": "//a/../b", "pathology": "/etc", "directories": "/"},
        {"text": "File: main.py\nand more", "note": "see file:///etc/passwd", "path": 7, "dir": None, "file": True},
        {"path": "https://example.com/a/../b", "uri": "note://1", "root": "git+ssh://host/x", "folder": "urn:x:y"},
        {"uri": "data:image/png;base64," + "aB+/" * 500_000, "paths": ["data:x;base64,aB/+" * 500] * 100},
        {"file": {"content": "../../x", "size": 7}, "numbers": [0.5] * 50_000, "big": "/" * 100_000},
    ],
)  # fmt: skip
def test_what_names_no_path_passes(place: Place, arguments: Json) -> None:
    assert verdict(place, arguments) is None


@promise("paths.inside")
@pytest.mark.parametrize(
    "value",
    [
        "file:///etc/passwd",
        "FILE:/etc",
        " file:\\etc",
        "fi\nle:///x",
        "file%3a///x",
        "file: /../etc",
    ],
)
def test_a_file_uri_is_one_whatever_its_property_is_called(place: Place, value: str) -> None:
    assert verdict(place, {"anything": [{"at": value}]}) is not None
    assert verdict(place, {"anything": f"file://{place.cage}/note.txt"}) is None


@promise("paths.inside")
def test_reads_completions_and_methods_of_extensions_are_held_to_it_too(place: Place) -> None:
    def code(method: str, params: Json) -> int | None:
        answer = verdict(place, params, method=method)
        return answer and answer.code

    wrong = atrax.INVALID_PARAMS
    prompt = {"type": "ref/prompt", "name": "p"}
    assert code("resources/read", {"uri": "file:///etc/passwd"}) == wrong
    assert code("resources/read", {"uri": "../out"}) == wrong
    assert code("resources/read", {"uri": f"file://{place.cage}/note.txt"}) is None
    assert code("resources/read", {"uri": "note://../1"}) is None
    for value, expected in (("/et", wrong), ("no", None), ("", None)):
        argument = {"name": "path", "value": value}
        assert code("completion/complete", {"ref": prompt, "argument": argument}) == expected
    argument = {"name": "id", "value": "1"}
    for uri, expected in (("file:///etc/passwd", wrong), ("file:///{path}", None)):
        ref = {"type": "ref/resource", "uri": uri}
        assert code("completion/complete", {"ref": ref, "argument": argument}) == expected
    context = {"arguments": {"base_dir": "/etc"}}
    assert (
        code("completion/complete", {"ref": prompt, "argument": argument, "context": context})
        == wrong
    )
    assert code("vendor/open", {"what": {"file": "../x"}}) == wrong
    assert code("vendor/open", {"what": {"file": "x"}, "_meta": {"file": "../x"}}) is None


@promise("paths.inside")
@pytest.mark.parametrize(
    "arguments",
    [
        {"paths": ["a"] * 1_000_000},
        {"paths": ["%2525" * 600] * 400},
        {"paths": ["a/" * 1_500] * 1_000},
        {"paths": ["ht:" + "a/.././" * 500] * 1_000},
        {"x": {f"k{at}": "a" for at in range(300_000)}},
        {"x" * 1_000_000: {f"k{at}": "a" for at in range(10_000)}},
    ],
)
def test_what_would_take_too_long_is_refused(place: Place, arguments: Json) -> None:
    answer = verdict(place, arguments, "*.source")
    assert "too many paths, or are too large" in answer.result["content"][0]["text"]


def test_five_hundred_paths_in_one_call_are_not_too_many(place: Place) -> None:
    assert verdict(place, {"paths": [f"sub/deep/file {at}.txt" for at in range(500)]}) is None


def test_with_the_root_directory_everything_is_allowed_that_is_a_path() -> None:
    config = atrax.ServerConfig(command="x", cwd="/", paths={"dirs": ["/"]})

    def check(path: str) -> Json:
        return atrax.path_error(atrax.Record(), "s", config, call("resources/read", {"uri": path}))

    assert [check(path) for path in ("/etc/passwd", "../x", "file:///proc/self/root")] == [None] * 3
    assert all(check(path) for path in ("~/x", "a\0", "file://host/x"))


# ---- the config ---------------------------------------------------------------------------


def load(**server: Json) -> atrax.ServerConfig:
    text = atrax.encode({"mcpServers": {"s": {"command": "x", **server}}}).decode()
    return atrax.Config.load(text, {"DATA": "/data"}).servers["s"]


def test_directories_are_seen_from_the_servers_own() -> None:
    server = load(cwd="/srv/s", paths={"dirs": [".", "sub/../x", "../y", "/z/", "${DATA}/w"]})
    assert server.paths and server.paths.dirs == ["/srv/s", "/srv/s/x", "/srv/y", "/z", "/data/w"]


@pytest.mark.parametrize(
    ("server", "error"),
    [
        ({"paths": {}}, "mcpServers.s.paths.dirs: is missing"),
        ({"paths": {"dirs": []}}, "mcpServers.s.paths.dirs: "),
        ({"paths": {"dirs": [7]}}, "mcpServers.s.paths.dirs[0]: "),
        ({"paths": {"dir": ["/x"]}}, 'unknown key. Did you mean "dirs"?'),
        ({"paths": ["/x"]}, "mcpServers.s.paths: must be an object"),
        ({"offer": ["roots"]}, 'offer: "roots" with isolation "shared" needs "paths"'),
    ],
)
def test_a_config_that_would_protect_nothing_is_refused(server: Json, error: str) -> None:
    with pytest.raises(atrax.UsageError, match=re.escape(error)):
        load(**server)


# ---- on servers ---------------------------------------------------------------------------


def filesystem(place: Place, **more: Json) -> Json:
    return {
        "mcpServers": {"fs": {**node_server("filesystem", str(place.cage)), **place.server(**more)}}
    }


async def refusals(running: Running) -> int:
    text = (await running.get("/metrics"))[1].decode()
    found = re.search(r'atrax_events_total\{event="path.refused"\} (\d+)', text)
    return int(found[1]) if found else 0


@promise("paths.inside")
@pytest.mark.needs_install("node")
async def test_no_spelling_reaches_a_real_server(atrax: Start, place: Place) -> None:
    running = await (await atrax(filesystem(place))).ready()
    clients = [running.modern(), await running.legacy("fs")]

    for number, (_, spelling) in enumerate(SPELLINGS, 1):
        client, tool = (
            (clients[0], "fs__read_text_file") if number % 2 else (clients[1], "read_text_file")
        )
        answer = await client.call(tool, {"path": place.spelled(spelling)})

        assert answer.result["isError"], spelling
        assert "Allowed is what lies in" in answer.text, (
            spelling,
            answer.text,
        )  # Atrax says so, not the server
    assert await refusals(running) == len(SPELLINGS)


@promise("paths.inside")
@pytest.mark.needs_install("node")
async def test_odd_but_honest_files_are_written_and_read_on_a_real_server(
    atrax: Start, place: Place
) -> None:
    running = await (await atrax(filesystem(place))).ready()
    client = running.modern("fs")

    for name in NAMES:
        path = f"{place.cage}/{name}"
        written = await client.call("write_file", {"path": path, "content": f"in {name}"})
        assert not written.result.get("isError"), (name, written.text)
        assert Path(path).read_text() == f"in {name}"
        assert (await client.call("read_text_file", {"path": path})).text == f"in {name}"
    assert await refusals(running) == 0


@promise("paths.inside")
async def test_prompts_completions_and_reads_are_refused_before_the_child_hears_of_them(
    atrax: Start, place: Place, tmp_path: Path
) -> None:
    server = child("legacy", **place.server())
    server["paths"] |= {"arguments": ["arg1"]}
    running = await (await atrax({"mcpServers": {"s": server}})).ready()
    client = running.modern("s")

    prompt = {"type": "ref/prompt", "name": "test_prompt_with_arguments"}
    calls = {
        "prompts/get": {"name": prompt["name"], "arguments": {"arg1": "../x", "arg2": "y"}},
        "completion/complete": {"ref": prompt, "argument": {"name": "arg1", "value": "../x"}},
        "resources/read": {"uri": "test://template/..%2f..%2f..%2f..%2fx/data"},
    }
    for method, params in calls.items():
        answer = await client.request(method, params)
        assert answer.code == -32602 and str(place.cage) in answer.error["message"], method
        assert heard(tmp_path, method) == []
    good = {**calls["prompts/get"], "arguments": {"arg1": "x", "arg2": "y"}}
    assert (await client.request("prompts/get", good)).result["messages"]


# ---- roots --------------------------------------------------------------------------------

ROOTED = {"offer": ["elicitation", "sampling", "roots"]}


def roots(*uris: str) -> Json:
    return {"roots": [{"uri": uri, "name": uri} for uri in uris]}


@promise("roots.never_widen")
@eras
@pytest.mark.parametrize("to", ["legacy", "modern"])
async def test_roots_are_cut_to_the_directories_in_every_cell(
    atrax: Start, place: Place, era: str, to: str
) -> None:
    server = child({"legacy": "asks", "modern": "rounds"}[to], **place.server(**ROOTED))
    running = await (await atrax({"drain": 0.1, "mcpServers": {"s": server}})).ready()
    client = (
        running.modern(capabilities=ALL)
        if era == "modern"
        else await running.legacy(capabilities=ALL)
    )
    inside = [f"file://{place.cage}", f"file://{place.cage}/sub"]
    outside = [
        "file:///",
        "file:///etc",
        f"file://{place.cage}/../out",
        f"file://{place.cage}/away",
        "/",
        "https://x/",
    ]
    person = Person({"roots/list": lambda params: roots(*outside[:3], *inside, *outside[3:])})

    asks = {"r": ROOTS}
    script = {"rounds": [asks]} if to == "modern" else {"steps": [{"ask": asks}]}
    done = await person.act(client, "s__act", script)

    assert [method for method, _ in done.asks] == ["roots/list"]
    assert done.value["answers"] == {"r": roots(*inside)}


@promise("roots.never_widen")
@pytest.mark.needs_install("node")
@eras
async def test_a_client_whose_roots_are_everything_does_not_widen_a_shared_server(
    atrax: Start, place: Place, era: str
) -> None:
    running = await (await atrax(filesystem(place, **ROOTED))).ready()
    client = (
        running.modern(capabilities=ALL)
        if era == "modern"
        else await running.legacy(capabilities=ALL)
    )
    person = Person({"roots/list": lambda params: roots("file:///")})
    # It asks for roots at once, outside of any call: there is nobody to ask.
    await running.line("roots/list was refused")
    if era == "legacy":
        client.answers = person.answers
        await client.notify("notifications/roots/list_changed")

    done = await person.act(client, "fs__list_allowed_directories", {})

    assert done.asks == []
    assert done.answer.text.splitlines()[1:] == [str(place.cage)]
    assert (await client.call("fs__read_text_file", {"path": "/etc/passwd"})).result["isError"]


@promise("roots.never_widen")
async def test_changed_roots_reach_only_a_child_of_one_session(
    atrax: Start, place: Place, tmp_path: Path
) -> None:
    servers = {
        "all": child("asks", **place.server(**ROOTED)),
        "own": child("asks", **ROOTED, isolation="session"),
    }
    running = await (await atrax({"drain": 0.1, "mcpServers": servers})).ready()
    changed = "notifications/roots/list_changed"

    for name, reaches in (("all", 0), ("own", 1)):
        client = await running.legacy(name, capabilities=ALL)
        asking = await client.open(
            "tools/call", {"name": "act", "arguments": {"steps": [{"ask": {"r": ROOTS}}]}}
        )
        messages = asking.messages()
        asked = await anext(messages)
        await client.notify(changed)
        await client.respond(asked["id"], roots())
        assert "result" in await anext(messages)
        await eventually(lambda reaches=reaches: len(heard(tmp_path, changed)) == reaches, name)


@promise("roots.never_widen")
def test_what_is_cut_and_what_is_not(place: Place) -> None:
    """Answers in a retry and subscriptions in a listen; without `paths` everything passes as it is."""
    caged = atrax.ServerConfig(command="x", **place.server())
    free = atrax.ServerConfig(command="x")
    inside, answer = f"file://{place.cage}/note.txt", {"action": "accept", "content": {"path": "/"}}
    params = {
        "inputResponses": {"a": answer, "b": roots("file:///", inside), "c": roots("file:///")},
        "notifications": {
            "toolsListChanged": True,
            "resourceSubscriptions": ["file:///x", inside, "note://1"],
        },
        "roots": ["of an extension"],
    }

    cut = atrax.cut_params(caged, params)

    assert cut["inputResponses"] == {"a": answer, "b": roots(inside), "c": roots()}
    assert cut["notifications"] == {
        "toolsListChanged": True,
        "resourceSubscriptions": [inside, "note://1"],
    }
    assert cut["roots"] == params["roots"]
    assert atrax.cut_params(free, params) is params
    junk = {"roots": [7, {"name": "x"}, {"uri": None}, {"uri": "file:\0"}, {"uri": inside}]}
    assert atrax.cut_roots(caged, junk) == roots(inside) | {"roots": [{"uri": inside}]}
    assert atrax.cut_roots(free, junk) is junk
