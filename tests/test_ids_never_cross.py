"""Every client's ids are its own, whatever the others call theirs and whatever a child does with them.

All clients of the stampede use the same ids. The children (children/nonce.py) answer out of order, twice, and late
after a cancellation, always with a nonce from the request that they really got."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import HOME, SOURCE, Running, Start, child
from promises import promise

CONFIG = {"mcpServers": {"n": child("nonce"), "m": child("nonce")}}
QUICK = 10_000
# Without arguments the mark asks for nothing to be installed: it only leaves this one out of `quick`.
ALL = pytest.param(200_000, marks=pytest.mark.needs_install())
RIGHT = "ident = self._next\n        self._next = ident + 1\n"
BROKEN = "ident = self._next % 8 + 1\n        self._next += 1\n"


async def stampede(gateway: Running, calls: int, patience: int = 20) -> Any:
    """What stampede.py reports."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(HOME / "tests" / "stampede.py"), gateway.endpoint()),
        *(str(calls), "64", str(patience), "n__nonce", "m__nonce"),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, str(gateway)
    return json.loads(out)


@promise("ids.never_cross")
@pytest.mark.timeout(400)  # a minute for 200,000 calls; more where two cores do other things too
@pytest.mark.parametrize("calls", [QUICK, ALL])
async def test_no_answer_is_misdelivered_among_clients_with_equal_ids(
    atrax: Start, calls: int
) -> None:
    # To judge 200,000 messages more would cost more than the calls, and find nothing new.
    gateway = await (await atrax(CONFIG, judged=calls == QUICK)).ready()

    found = await stampede(gateway, calls)

    assert found["misdelivered"] == []
    assert found["failed"] == found["flying"] == 0
    assert found["calls"] == calls == found["answered"] + found["cancelled"]
    assert found["overlap"] > 20
    assert found["cancelled"] > calls / 200
    # And nothing is left behind of all the calls that were cancelled, answered late or twice.
    servers = (await gateway.status())["servers"]
    assert [servers[name]["inFlight"] for name in "nm"] == [0, 0]


async def test_the_stampede_finds_an_id_map_that_is_broken(atrax: Start, tmp_path: Path) -> None:
    """Ids are used again while their calls are under way: were Atrax so, the test above would fail."""
    source = SOURCE.read_text()
    assert source.count(RIGHT) == 1, "the lines that this test breaks have changed"
    broken = tmp_path / "atrax.py"
    broken.write_text(source.replace(RIGHT, BROKEN))
    gateway = await (await atrax(CONFIG, program=broken, judged=False)).ready()

    found = await stampede(gateway, 500, patience=1)
    gateway.kill()  # it cannot stop in order: calls were lost, and it holds that for a bug

    assert len(found["misdelivered"]) > 10
