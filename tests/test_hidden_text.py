"""Definitions that hide text from people: found, named, cut with `clean`; and tools that look like another server's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from promises import promise
from recorded import Middle, config, prompt, resource, template, tool

import atrax
from atrax import Entry, Kind, Offer, Policy, Record

# text with something hidden → kind of it, and what is left
HIDDEN = {
    "zero-width space": ("a\u200bb", "zero-width character: \\u200b", "ab"),
    "word joiner": ("a\u2060b", "zero-width character", "ab"),
    "invisible plus": ("a\u2064b", "zero-width character", "ab"),
    "byte order mark": ("\ufeffa", "zero-width character", "a"),
    "soft hyphen": ("a\u00adb", "zero-width character", "ab"),
    "hangul filler": ("a\u3164b", "zero-width character", "ab"),
    "unassigned and ignorable": ("a\U000e0fffb", "zero-width character: \\U000e0fff", "ab"),
    "tags": ("a\U000e0048\U000e0069", "tag characters that spell: Hi", "a"),
    "tags of a flag": ("\U0001f3f4\U000e0067\U000e007f", "tag characters that spell", "\U0001f3f4"),
    "override": ("\u202eab\u202c", "bidirectional control: \\u202e", "ab"),
    "isolate": ("\u2067ab\u2069", "bidirectional control", "ab"),
    "mark": ("a\u200eb", "bidirectional control", "ab"),
    "colour": ("\x1b[8mhidden\x1b[0m", "ANSI escape: \\u001b[8m", "hidden"),
    "one-byte colour": ("\x9b8mhidden", "ANSI escape", "hidden"),
    "link": (
        "\x1b]8;;http://evil\x1b\\ok\x1b]8;;\x07",
        "ANSI escape: \\u001b]8;;http://evil",
        "ok",
    ),
    "title without an end": ("\x1b]0;title", "ANSI escape: \\u001b]", "0;title"),
    "escape alone": ("a\x1b", "ANSI escape", "a"),
    "backspaces": ("good\b\b\b\bevil", "control character: \\u0008", "goodevil"),
    "NUL": ("a\0b", "control character", "ab"),
    "delete": ("a\x7fb", "control character", "ab"),
    "carriage return": ("seen\rover", "control character: \\r", "seenover"),
    "C1": ("a\x85b", "control character: \\u0085", "ab"),
    "comment": ("a<!-- do evil -->b", "HTML comment: <!-- do evil -->", "a b"),
    "comment of two lines": ("a<!--\n-->b", "HTML comment: <!--\\n-->", "a b"),
    "closed at once": ("a<!-->b-->", "HTML comment: <!-->", "a b-->"),
    "closed as browsers do": ("a<!--x--!>b", "HTML comment", "a b"),
    "without an end": ("a<!-- do <!-- evil", "HTML comment without an end", "a  do   evil"),
    "made by the cut": ("a<!\u200b-- x -->b", "zero-width character", "a b"),
    "comment around comments": ("<!<!-- x -->-- y -->", "HTML comment", "<! -- y -->"),
    "joiner between letters": ("ig\u200dnore", "zero-width joiner", "ignore"),
    "joiners in a row": ("ن\u200c\u200cن", "zero-width joiner", "نن"),
    "selectors that spell": ("a\ufe01\U000e0151", "variation selector", "a"),
    "selectors behind an emoji": ("😀\ufe0f\U000e0151\U000e0152", "variation selector", "😀\ufe0f"),
}
# What people write, and see.
HONEST = (
    "Plain text, with\ttabs,\nlines and\r\nWindows lines.",
    "Größe, naïve, Ελλάδα, Москва, 日本語, 한국어, ไทย",
    "می\u200cخواهم",  # Persian: a joiner between letters
    "क्\u200dष, ක්\u200dය, ക്\u200d ",  # Hindi, Sinhala, Malayalam: behind a virama
    "👩\u200d💻 👨🏽\u200d⚕\ufe0f ❤\ufe0f\u200d🔥 🏳\ufe0f\u200d🌈 🐦\u200d⬛ 🙂\u200d↔\ufe0f",
    "1\ufe0f⃣ ©\ufe0f ™\ufe0e ☎\ufe0e",
    "葛\U000e0100城",  # a form of an ideograph, as Japanese names have it
    "a < b -- c --> d <! x",
    r"a \u200b that is spelt out, and \x1b[31m",
    "שלום עולם, مرحبا",
)


def judged(item: dict[str, Any], kind: Kind = Kind.TOOLS, clean: bool = True) -> tuple[str, Entry]:
    """Policy's verdict on one definition, and its entry."""
    settings = config({"s": {"clean": clean}})
    source = atrax.encode(item)
    key = {Kind.RESOURCES: "uri", Kind.TEMPLATES: "uriTemplate"}.get(kind, "name")
    own = item[key]
    entry = Entry(kind, "s", own, own, own, item, source, source)
    return Policy(Record(), settings).definition(entry), entry


@promise("clean.cuts")
@pytest.mark.parametrize("text, kind, left", HIDDEN.values(), ids=HIDDEN)
def test_hidden_text_is_cut_with_clean_and_warned_of_without(
    text: str, kind: str, left: str
) -> None:
    reason, entry = judged(tool("t", description=text))
    assert (reason, entry.item["description"]) == ("", left)
    assert entry.warnings == []
    assert entry.encoded(local=False, any_output=True) == atrax.encode(entry.item)

    reason, entry = judged(tool("t", description=text), clean=False)
    assert (reason, entry.item["description"]) == ("", text)
    assert entry.warnings[0].startswith("description hides text (")
    assert any(kind in warning for warning in entry.warnings)
    # What is shown to a person shows what is hidden, and hides nothing itself.
    assert all(atrax.visible(warning) == warning for warning in entry.warnings)


@promise("clean.cuts")
@pytest.mark.parametrize("text", HONEST)
def test_what_people_can_see_or_need_stays(text: str) -> None:
    item = tool("t", description=text)
    reason, entry = judged(item)
    assert (reason, entry.item is item, entry.warnings) == ("", True, [])


ODD = st.text(alphabet="a<!->\u200b\u200d\u200c\x1b[;m]\x07\ufe0f\U000e0041\U000e0101ن😀\r\n\x9b")


@given(ODD)
def test_what_was_cut_once_hides_nothing_more(text: str) -> None:
    _, entry = judged(tool("t", description=text))
    left = entry.item["description"]
    look = atrax._Look()
    assert look.value(left) == left
    assert look.found == []


@promise("clean.cuts")
def test_every_text_of_every_kind_of_definition_is_cleaned() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"description": "x\u200b", "default": "y\u200b"}},
    }
    item = tool("t", inputSchema=schema, annotations={"title": "T\u200b"}, _meta={"k": ["m\u200b"]})
    _, entry = judged(item)
    assert "\u200b" not in entry.source.decode()
    assert entry.item["inputSchema"]["properties"]["a"]["default"] == "y"
    assert "\u200b" in entry.sent.decode()  # what a pin judges
    for kind, item in (
        (Kind.PROMPTS, prompt("p", arguments=[{"name": "a", "description": "x\u200b"}])),
        (Kind.RESOURCES, resource("a://x", title="x\u200b")),
        (Kind.TEMPLATES, template("a://{x}", description="x\u200b")),
    ):
        reason, entry = judged(item, kind)
        assert (reason, "\u200b" in entry.source.decode()) == ("", False)


NAMES: dict[str, tuple[Kind, dict[str, Any], str]] = {
    "tool": (Kind.TOOLS, tool("t\u200b"), "name"),
    "prompt": (Kind.PROMPTS, prompt("p\u200b"), "name"),
    "argument": (Kind.PROMPTS, prompt("p", arguments=[{"name": "a\u200b"}]), "arguments[0].name"),
    "uri": (Kind.RESOURCES, resource("a://x\u200b", name="x"), "uri"),
    "template": (Kind.TEMPLATES, template("a://\u200b{x}", name="x"), "uriTemplate"),
    "property": (
        Kind.TOOLS,
        tool("t", inputSchema={"type": "object", "properties": {"a\u200b": {}}}),
        'inputSchema.properties["a\\\\u200b"]',
    ),
    "enum": (
        Kind.TOOLS,
        tool("t", inputSchema={"type": "object", "properties": {"a": {"enum": ["x", "y\u200b"]}}}),
        "inputSchema.properties.a.enum[1]",
    ),
    "required": (
        Kind.TOOLS,
        tool("t", inputSchema={"type": "object", "required": ["a\u200b"]}),
        "inputSchema.required[0]",
    ),
    "pattern": (
        Kind.TOOLS,
        tool("t", inputSchema={"type": "object", "properties": {"a": {"pattern": "<!-- -->"}}}),
        "inputSchema.properties.a.pattern",
    ),
}


@promise("clean.names")
@pytest.mark.parametrize("kind, item, member", NAMES.values(), ids=NAMES)
def test_an_item_whose_names_hold_hidden_text_is_hidden_by_clean(
    kind: Kind, item: dict[str, Any], member: str
) -> None:
    reason, _ = judged(item, kind)
    assert reason == f"clean cannot cut hidden text from a name: {member}"
    reason, entry = judged(item, kind, clean=False)
    assert (reason, len(entry.warnings)) == ("", 1)


def test_a_property_that_is_called_like_a_keyword_is_no_name() -> None:
    properties = {"name": {"description": "x\u200b"}, "enum": {"description": "x\u200b"}}
    reason, entry = judged(tool("t", inputSchema={"type": "object", "properties": properties}))
    assert (reason, "\u200b" in entry.source.decode()) == ("", False)


LARGE: dict[str, dict[str, Any]] = {
    "long text": tool("t", description="é" * 2_000_000),
    "only hidden": tool("t", description="\u200b" * 150_000),
    "every second one": tool("t", description="a\u200b" * 100_000),
    "comments": tool("t", description="<!---->" * 60_000),
    "comments without an end": tool("t", description="<!--" * 100_000 + "é"),
    "escapes without an end": tool("t", description="\x1b]" * 60_000 + "é"),
    "parameters without an end": tool("t", description="\x1b[" + "0;" * 200_000 + "é"),
    "many values": tool("t", _meta={"é": [0] * 200_000}),
    "many members": tool("t", _meta={f"é{number}": 0 for number in range(40_000)}),
}


@promise("clean.bounded")
@pytest.mark.parametrize("item", LARGE.values(), ids=LARGE)
def test_a_large_definition_is_cleaned_or_hidden_and_never_half_cleaned(
    item: dict[str, Any],
) -> None:
    reason, entry = judged(item)
    look = atrax._Look()
    assert reason or (look.value(entry.item) == entry.item and not look.found)
    reason, entry = judged(item, clean=False)
    assert reason == ""
    assert entry.warnings


@promise("clean.bounded")
def test_the_deepest_definition_that_a_message_can_hold_is_cleaned() -> None:
    deep: Any = "x\u200b"
    for _ in range(115):
        deep = {"a": [deep]}
    reason, entry = judged(tool("t", _meta=deep))
    assert (reason, "\u200b" in entry.source.decode()) == ("", False)


@promise("clean.warns")
def test_hidden_text_is_one_event_however_often_it_is_listed() -> None:
    middle = Middle({"a": {}})
    process = middle.start("a", tools=[tool("t", description="x\u200b"), tool("fine")])
    assert middle.said("definition.hidden_text") == [
        "tool t: description hides text (zero-width character: \\u200b)"
    ]
    process.pages["tools/list"] = [tool("t", description="x\u200b"), tool("more")]
    middle.wait(1)
    middle.catalogue.changed("a", Kind.TOOLS)
    assert len(middle.said("definition.hidden_text")) == 1
    assert middle.catalogue.counts()["a"]["warnings"] == [
        {
            "kind": "tools",
            "name": "t",
            "warning": "description hides text (zero-width character: \\u200b)",
        }
    ]


@promise("clean.cuts", "clean.warns")
def test_instructions_are_cleaned_or_warned_of() -> None:
    offer = Offer({}, {"name": "s\u200b"}, "Use\u200b me", "2025-11-25", "legacy")
    cleaned = Policy(Record(), config({"s": {"clean": True}})).introduced("s", offer)
    assert (cleaned.instructions, cleaned.info, cleaned.warning) == ("Use me", {"name": "s"}, "")
    warned = Policy(Record(), config({"s": {}})).introduced("s", offer)
    assert warned.instructions == "Use\u200b me"
    assert "instructions hides text (zero-width character: \\u200b)" in warned.warning
    large = Offer({}, {}, "\u200b" * 1_000_000, "2025-11-25", "legacy")
    assert (
        Policy(Record(), config({"s": {"clean": True}})).introduced("s", large).instructions == ""
    )


# ---- names ----


@promise("names.lookalike")
def test_a_tool_that_takes_or_imitates_another_servers_name_is_warned_of() -> None:
    middle = Middle({"bare": {"prefix": ""}, "git": {}})
    middle.start("git", tools=[tool("push"), tool("pull"), tool("log")])
    assert middle.said("catalogue.lookalike") == []
    middle.start(
        "bare", tools=[tool("git__push"), tool("git__fetch"), tool("Git-pull"), tool("ok")]
    )

    counts = middle.catalogue.counts()
    warned = {one["name"]: one["warning"] for one in counts["bare"]["warnings"]}
    assert warned == {
        "git__push": '"git__push" looks like a tool of "git"',
        "git__fetch": '"git__fetch" looks like a tool of "git"',
        "Git-pull": '"Git-pull" looks like "git__pull" of "git"',
    }
    lost = [one["warning"] for one in counts["git"]["warnings"]]
    assert lost == ['on /mcp "git__push" is of "bare"']
    assert (
        '"git__push" looks like a tool of "git", and 2 more'
        in middle.said("catalogue.lookalike")[0]
    )
    assert len(middle.said("catalogue.lookalike")) == 1


@promise("names.lookalike")
def test_a_server_whose_prefix_begins_with_anothers_is_no_lookalike() -> None:
    middle = Middle({"a": {}, "a__b": {}})
    middle.start("a__b", tools=[tool("x")])
    middle.start("a", tools=[tool("c")])
    counts = middle.catalogue.counts()
    assert [counts[name]["warnings"] for name in ("a", "a__b")] == [[], []]
    middle.start("a", tools=[tool("b__y")])
    (warning,) = middle.catalogue.counts()["a"]["warnings"]
    assert warning["warning"] == '"a__b__y" looks like a tool of "a__b"'
