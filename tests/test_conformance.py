"""The official conformance suite in all four cells, on both endpoints.

Children that know one era only; each run has a gateway of its own. What the suite says counts without
mercy: a scenario that left no report, a failure and a warning are all defects. Where the suite itself
makes a pass impossible, EXCUSED names scenario and reason."""

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
ENDPOINTS: Final = {"aggregate": None, "own": "everything"}
# Scenario → why the suite cannot be passed. Keep it empty as long as it can be.
EXCUSED: Final[dict[str, str]] = {}


def config(children: Path, era: str) -> Json:
    """One child of `era`, by its bare names.

    The set of 2026 abandons six calls that ask: each stays parked and holds its process (CONFORMANCE,
    trap 2). Roots are not offered unless named."""
    return {
        "mcpServers": {
            "everything": {
                "command": sys.executable,
                "args": [str(children / f"{era}.py")],
                "prefix": "",
                "processes": 8,
                "offer": ["elicitation", "sampling", "roots"],
                "isolation": "session",
            }
        }
    }


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


def complaints(scenario: str, checks: list[Json] | None) -> list[str]:
    """What is wrong with one scenario; without a report it threw."""
    if checks is None:
        return [f"{scenario}: no report: it threw"]
    if not any(check["status"] == "SUCCESS" for check in checks):
        checks = [*checks, {"status": "NOTHING", "id": "no check succeeded"}]
    return [
        f"{scenario}: {check['status']} {check['id']}: {check.get('errorMessage', '')}"
        for check in checks
        if check["status"] not in ("SUCCESS", "INFO", "SKIPPED")
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
    wrong = [line for name in sorted(names) for line in complaints(name, found.get(name))]
    wrong = [line for line in wrong if line.split(":")[0] not in EXCUSED]
    assert not wrong, "\n".join([*wrong, "", printed[-6000:], "", str(running)[-4000:]])
