"""The official conformance suite in all four cells, on both endpoints.

Children that know one era only; each run has a gateway of its own. What the suite says counts without
mercy: a scenario that left no report, one that checked nothing, a failure and a warning are all defects.
Where the suite itself makes that impossible, EMPTY names scenario and reason, and a test shows the same."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import pytest
from conftest import Start
from installed import CONFORMANCE, NODE
from promises import promise

Json = Any
pytestmark = pytest.mark.needs_install("node")

LEGACY, MODERN = "2025-11-25", "2026-07-28"
ERAS: Final = ("legacy", "modern")
TASKS: Final = "io.modelcontextprotocol/tasks"
ENDPOINTS: Final = {"aggregate": None, "own": "everything"}
# Scenarios that check nothing here, and why; a test below shows the same. None may fail or warn.
# By era of the child and name.
EMPTY: Final = {
    (
        "modern",
        "tasks-status-notifications",
    ): "It skips itself: it used to look for notifications/tasks"
    " on the stream of the call, where the extension does not send them any more.",
    (
        "modern",
        "server-sse-polling",
    ): "It looks at event streams alone. A client that has set no level"
    " gets no log from a modern child, so nothing comes before the answer, which is JSON.",
}


def config(children: Path, era: str) -> Json:
    """One child of `era`, by its bare names.

    The set of 2026 abandons six calls that ask: each stays parked and holds its process, and nobody
    waits for them at the end (CONFORMANCE, trap 2). A legacy child asks for roots if they are offered."""
    child = {
        "command": sys.executable,
        "args": [str(children / f"{era}.py")],
        "prefix": "",
        "processes": 8,
    }
    if era == "legacy":
        child |= {"offer": ["elicitation", "sampling", "roots"], "paths": {"dirs": ["/"]}}
    return {"drain": 1, "mcpServers": {"everything": child}}


def wanted(requirements: str, tasks: bool) -> set[str]:
    """The server scenarios of a requirement set, unscored ones too; those of tasks only with `tasks`.

    The file is YAML of two shapes of lines, read here without a parser of it."""
    text = (CONFORMANCE / "requirements" / f"{requirements}.yaml").read_text()
    scored = re.search(r"^server:\n((?:  - \S+\n)+)", text, re.MULTILINE)
    assert scored, "the suite's requirement file looks different now"
    names = set(re.findall(r"- (\S+)", scored[1]))
    unscored = re.findall(r"- scenario: (\S+)\n    leg: server\n", text)
    return names | {name for name in unscored if tasks or not name.startswith("tasks-")}


async def suite(url: str, requirements: str, output: Path) -> str:
    """Run a requirement set against `url`; what it printed. Its exit code says less than its reports."""
    process = await asyncio.create_subprocess_exec(
        *(str(NODE), str(CONFORMANCE / "dist" / "index.js"), "server"),
        *("--requirements", requirements, "--url", url, "--output-dir", str(output)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        printed, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return printed.decode(errors="replace")


def reports(output: Path) -> dict[str, list[Json]]:
    """The checks of each scenario that left a report."""
    found: dict[str, list[Json]] = defaultdict(list)
    for file in output.glob("server-*/checks.json"):
        name = re.sub(r"^server-(.+)-\d{4}-\d\d-\d\dT.*$", r"\1", file.parent.name)
        found[name] += json.loads(file.read_text())
    return found


def complaints(era: str, scenario: str, checks: list[Json] | None) -> list[str]:
    """What is wrong with one scenario; without a report it threw."""
    if checks is None:
        return [f"{scenario}: no report: it threw"]
    if (era, scenario) in EMPTY:
        checks = [check for check in checks if check["status"] != "SKIPPED"]
    elif not any(check["status"] == "SUCCESS" for check in checks):
        checks = [*checks, {"status": "NOTHING", "id": "no check succeeded"}]
    return [
        f"{scenario}: {check['status']} {check['id']}: {check.get('errorMessage', '')}"
        for check in checks
        if check["status"] not in ("SUCCESS", "INFO")
    ]


@promise("cells.conformance")
@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("requirements", [LEGACY, MODERN])
async def test_the_suite_has_nothing_to_complain_of(
    atrax: Start, children: Path, tmp_path: Path, requirements: str, era: str, endpoint: str
) -> None:
    running = await (await atrax(config(children, era))).ready()
    url, output = running.endpoint(ENDPOINTS[endpoint]), tmp_path / "reports"

    printed = await suite(url, requirements, output)

    names = wanted(requirements, tasks=(requirements, era) == (MODERN, "modern"))
    found = reports(output)
    wrong = [line for name in sorted(names) for line in complaints(era, name, found.get(name))]
    assert not wrong, "\n".join([*wrong, "", printed[-6000:], "", str(running)[-4000:]])


# ---- what EMPTY leaves open ---------------------------------------------------------------


@promise("cells.conformance")
@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_the_states_of_a_task_reach_who_listens_for_them(
    atrax: Start, children: Path, endpoint: str
) -> None:
    running = await (await atrax(config(children, "modern"))).ready()
    client = running.modern(ENDPOINTS[endpoint], capabilities={"extensions": {TASKS: {}}})
    created = await client.call("slow_compute", {"seconds": 0.5, "label": "all of it"})
    task = created.result["taskId"]

    listen = await client.open("subscriptions/listen", {"notifications": {"taskIds": [task]}})
    messages = listen.messages()
    acknowledged = await anext(messages)
    assert acknowledged["method"] == "notifications/subscriptions/acknowledged"
    assert acknowledged["params"]["notifications"].get("taskIds") == [task]
    states = [await anext(messages)]
    while states[-1]["params"]["status"] != "completed":
        states.append(await anext(messages))
    listen.close()

    assert {state["method"] for state in states} == {"notifications/tasks"}
    assert {state["params"]["taskId"] for state in states} == {task}
    assert states[-1]["params"]["result"]["content"][0]["text"] == "Computed all of it"


@promise("cells.conformance")
@pytest.mark.parametrize("era", ERAS)
async def test_an_event_stream_of_a_session_is_primed_and_can_be_resumed(
    atrax: Start, children: Path, era: str
) -> None:
    running = await (await atrax(config(children, era))).ready()
    client = await running.legacy("everything")
    await client.request("logging/setLevel", {"level": "info"})

    posted = await client.open("tools/call", {"name": "test_reconnection", "arguments": {}})
    primer = await anext(posted.events())
    posted.close()  # cut before anything came

    assert primer.id and primer.data == "" and primer.retry
    resumed = await client.listen(primer.id)
    async for message in resumed.messages():
        if "method" not in message:
            break
    resumed.close()
    assert message["result"]["content"][0]["text"] == "Reconnection test completed"
