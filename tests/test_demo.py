"""The embedded servers do what they say, as children of either era, and never more."""

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import mcp_types as types
import pytest
from installed import ARCHIVE
from mcp import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.subscriptions import ResourcesListChanged, ResourceUpdated

ERAS = ["auto", "legacy"]
FILE = str(ARCHIVE)
pytestmark = [
    pytest.mark.parametrize("era", ERAS),
    pytest.mark.needs_install(),  # `quick` has no time for all of these
]

Work = Callable[[Client], Coroutine[Any, Any, None]]


def talk(era: str, name: str, argument: object, work: Work, **callbacks: Any) -> None:
    """Run `work` with a client of the embedded server `name`."""

    async def run() -> None:
        command = StdioServerParameters(
            command=sys.executable, args=[FILE, "bundled", name, str(argument)]
        )
        async with Client(stdio_client(command), mode=era, **callbacks) as client:
            modern = client.protocol_version == "2026-07-28"
            assert modern == (era == "auto")
            await asyncio.wait_for(work(client), 20)

    asyncio.run(run())


async def text_of(client: Client, tool: str, **arguments: Any) -> str:
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    return result.content[0].text  # type: ignore[union-attr]


async def refusal_of(client: Client, tool: str, **arguments: Any) -> str:
    result = await client.call_tool(tool, arguments)
    assert result.is_error
    return result.content[0].text  # type: ignore[union-attr]


# ---- files ----


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """served/ with some files, beside a secret outside of it."""
    served = tmp_path / "served"
    (served / "sub").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("outside")
    (tmp_path / "served-too").mkdir()
    (tmp_path / "served-too" / "secret.txt").write_text("outside")
    (served / "a.txt").write_text("first\nSecond line\nthird\n")
    (served / "sub" / "b.py").write_text("x = 'second'\n")
    (served / "binary").write_bytes(b"\0\1second\2")
    (served / "out").symlink_to(tmp_path / "secret.txt")
    (served / "outdir").symlink_to(tmp_path)
    (served / "in").symlink_to("a.txt")
    (served / "loop").symlink_to("loop")
    return served


def test_files_lists_reads_and_searches(era: str, folder: Path) -> None:
    async def work(client: Client) -> None:
        listed = (await text_of(client, "list")).splitlines()
        assert listed == ["a.txt  24", "binary  9", "sub/"]  # no links

        assert await text_of(client, "read", path="a.txt") == "first\nSecond line\nthird\n"
        assert await text_of(client, "read", path="in", from_line=3) == "third\n"
        assert await text_of(client, "read", path=str(folder / "sub" / "b.py")) == "x = 'second'\n"
        found = await text_of(client, "search", text="SECOND")
        assert found.splitlines() == ["a.txt:2: Second line", "sub/b.py:1: x = 'second'"]
        assert await text_of(client, "search", text="second", names="*.py") == found.splitlines()[1]
        assert "is in no file" in await text_of(client, "search", text="nowhere")

    talk(era, "files", folder, work)


def test_files_gives_nothing_outside_its_folder(era: str, folder: Path) -> None:
    ways = [
        "../secret.txt", "sub/../../secret.txt", "/etc/passwd", str(folder.parent / "secret.txt"),
        "out", "outdir/secret.txt", "../served-too/secret.txt", "outdir", "..", "/",
    ]  # fmt: skip

    async def work(client: Client) -> None:
        for way in ways:
            for tool, argument in (("read", {}), ("list", {}), ("search", {"text": "outside"})):
                told = await refusal_of(client, tool, path=way, **argument)
                assert "in the served folder" in told, (tool, way)
        assert "is in no file" in await text_of(client, "search", text="outside")

    talk(era, "files", folder, work)


def test_files_refuses_what_is_no_text_and_says_why(era: str, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with open(folder / "huge", "wb") as file:
        file.write(b"text\n" * 3000)
        file.truncate(100 * 2**20)

    async def work(client: Client) -> None:
        for path, told in (
            ("binary", "is no readable text file"),
            ("huge", "is no readable text file"),
            ("pipe", "is no readable text file"),
            ("sub", "is no readable text file"),
            ("loop", "there is no"),
            ("nothing", "list shows what there is"),
            ("a\0b", "list shows what there is"),
        ):
            assert told in await refusal_of(client, "read", path=path), path

    talk(era, "files", folder, work)


def test_files_bounds_its_answers(era: str, folder: Path) -> None:
    (folder / "long.txt").write_text("".join(f"line {n:05}\n" for n in range(1, 12_501)))
    (folder / "wide.txt").write_text("x" * 1_000_000)

    async def work(client: Client) -> None:
        first = await text_of(client, "read", path="long.txt")
        assert first.endswith("cut here; go on with from_line=9092]")
        last = await text_of(client, "read", path="long.txt", from_line=9092)
        assert last.startswith("line 09092\n")
        assert last.endswith("line 12500\n")
        assert len(await text_of(client, "read", path="wide.txt")) < 101_000
        assert "stopped after 100" in await text_of(client, "search", text="line")

    talk(era, "files", folder, work)


# ---- notes ----


def answering(action: str, **content: Any) -> dict[str, Any]:
    """A client that can be asked and answers so; what it was asked is in `asked`."""
    asked: list[str] = []

    async def answer(_: Any, params: Any) -> types.ElicitResult:
        asked.append(params.message)
        return types.ElicitResult(action=action, content=content or None)  # type: ignore[arg-type]

    return {"elicitation_callback": answer, "asked": asked}


def test_notes_are_kept_found_and_changed(era: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        await text_of(client, "add", title="Milk", text="100% of it")
        await text_of(client, "add", title="Bread", text="rye")
        edited = await client.call_tool("edit", {"id": 2, "text": "wheat"})
        assert edited.structured_content is not None
        assert (edited.structured_content["title"], edited.structured_content["text"]) == (
            "Bread",
            "wheat",
        )

        for query, ids in (
            ("", {1, 2}),
            ("wheat bread", {2}),
            ("0% it", {1}),
            ("%", {1}),
            ("_", set()),
        ):
            found = await client.call_tool("search", {"query": query})
            assert found.structured_content is not None
            assert {note["id"] for note in found.structured_content["result"]} == ids, query
        assert "there is no note 9" in await refusal_of(client, "edit", id=9, text="")
        prompt = await client.get_prompt("summarize", {"topic": "bread"})
        assert "## 2: Bread\nwheat" in prompt.messages[0].content.text  # type: ignore[union-attr]

    talk(era, "notes", tmp_path / "deep" / "notes.db", work)

    async def later(client: Client) -> None:
        assert "Milk" in await text_of(client, "search", query="milk")

    talk(era, "notes", tmp_path / "deep" / "notes.db", later)


def test_notes_are_resources(era: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        await text_of(client, "add", title="Milk", text="two")

        listed = await client.list_resources()
        assert [(item.uri, item.title) for item in listed.resources] == [("note://1", "Milk")]
        templates = await client.list_resource_templates()
        assert [item.uri_template for item in templates.resource_templates] == ["note://{id}"]
        read = await client.read_resource("note://1")
        assert read.contents[0].text == "Milk\n\ntwo"  # type: ignore[union-attr]
        for missing in ("note://7", "note://x"):
            with pytest.raises(Exception, match="there is no note"):
                await client.read_resource(missing)

    talk(era, "notes", tmp_path / "notes.db", work)


def test_a_modern_listener_hears_of_changes(era: str, tmp_path: Path) -> None:
    if era == "legacy":
        return  # through Atrax a legacy client hears of them too (test_subscriptions.py)

    async def work(client: Client) -> None:
        await text_of(client, "add", title="one")
        await text_of(client, "add", title="two")
        heard: set[str] = set()
        async with client.listen(
            resources_list_changed=True, resource_subscriptions=["note://1"]
        ) as events:
            await text_of(client, "edit", id=2, text="nobody listens to this one")
            await text_of(client, "edit", id=1, text="other")
            async for event in events:
                assert isinstance(event, ResourcesListChanged | ResourceUpdated)
                heard.add(event.uri if isinstance(event, ResourceUpdated) else "list")
                if heard >= {"list", "note://1"}:
                    break
        assert "note://2" not in heard

    talk(era, "notes", tmp_path / "notes.db", work)


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (answering("accept", delete=True), False),
        (answering("accept", delete=False), True),
        (answering("decline"), True),
        (answering("cancel"), True),
    ],
    ids=["yes", "unticked", "declined", "cancelled"],
)
def test_a_note_is_deleted_only_when_the_user_says_yes(
    era: str, tmp_path: Path, answer: dict[str, Any], kept: bool
) -> None:
    asked: list[str] = answer["asked"]
    asked.clear()

    async def work(client: Client) -> None:
        await text_of(client, "add", title="Milk")
        told = await text_of(client, "delete", id=1)
        assert ("was kept" in told) == kept
        assert len(asked) == 1
        assert '"Milk"' in asked[0]
        assert len((await client.list_resources()).resources) == kept

    callback = answer["elicitation_callback"]
    talk(era, "notes", tmp_path / "notes.db", work, elicitation_callback=callback)


def test_a_client_that_cannot_be_asked_deletes_nothing(era: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        await text_of(client, "add", title="Milk")
        told = await refusal_of(client, "delete", id=1)
        assert "was not deleted" in told
        assert "elicitation" in told
        assert len((await client.list_resources()).resources) == 1

    talk(era, "notes", tmp_path / "notes.db", work)


def test_the_reason_why_nobody_was_asked_is_in_the_result(era: str, tmp_path: Path) -> None:
    async def refuse(_: Any, params: Any) -> types.ErrorData:
        return types.ErrorData(code=-32601, message="several calls are open: set concurrency")

    async def work(client: Client) -> None:
        await text_of(client, "add", title="Milk")
        if era == "auto":
            return  # a modern client answers by result or not at all
        assert "set concurrency" in await refusal_of(client, "delete", id=1)

    talk(era, "notes", tmp_path / "notes.db", work, elicitation_callback=refuse)


# ---- both ----


@pytest.mark.parametrize("name", ["files", "notes"])
def test_each_tool_says_what_it_does_to_the_world(era: str, name: str, tmp_path: Path) -> None:
    async def work(client: Client) -> None:
        for tool in (await client.list_tools()).tools:
            assert tool.title
            assert tool.description
            assert tool.annotations is not None
            reads = tool.name in ("list", "read", "search")
            assert tool.annotations.read_only_hint == reads
            assert tool.annotations.destructive_hint == (tool.name in ("edit", "delete"))
            for argument in tool.input_schema["properties"].values():
                assert argument["description"]

    talk(era, name, tmp_path if name == "files" else tmp_path / "notes.db", work)
