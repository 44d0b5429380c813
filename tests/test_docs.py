"""What README and SECURITY say exists in the code, and what the code has stands in them."""

from __future__ import annotations

import re

from installed import HOME
from promises import promise

import atrax

README = (HOME / "README.md").read_text()
SECURITY = (HOME / "SECURITY.md").read_text()


@promise("docs.keys")
def test_the_table_of_keys_is_the_one_that_the_code_declares() -> None:
    shown = README.split("<!-- keys -->\n")[1].split("<!-- /keys -->")[0]
    assert shown.strip() == atrax.config_table().strip()


@promise("docs.commands")
def test_every_command_is_documented_and_every_documented_command_exists() -> None:
    documented = set(
        re.findall(
            r"^\| `(\w+)[^|]*` \|",
            README.split("| command | does |")[1].split("\n\n")[0],
            re.MULTILINE,
        )
    )
    usage = set(re.findall(r"^  (\w+)(?: \[config.json\]| NAME|  +)", atrax.USAGE, re.MULTILINE))
    assert documented == usage == set(atrax.COMMANDS)


def test_every_error_code_of_atrax_is_documented() -> None:
    codes = {
        str(code)
        for code in (
            atrax.CHILD_DIED,
            atrax.TIMED_OUT,
            atrax.UNAVAILABLE,
            atrax.OVERLOADED,
            atrax.NOT_ALLOWED,
        )
    }
    assert codes <= set(re.findall(r"\b1\d{3}\b", README))


def test_every_endpoint_is_documented() -> None:
    record = atrax.Record()
    for path in atrax.Endpoints(record, dict).paths:
        assert f"{path}`" in README, path


@promise("docs.tests")
def test_every_test_that_security_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+\.py|hostile/)`", SECURITY))
    assert named
    assert [name for name in named if not (HOME / "tests" / name).exists()] == []


def test_the_first_screen_of_readme_shows_a_session_that_works() -> None:
    first = README.splitlines()[:15]
    assert any("build_zipapp.py serve config.json" in line for line in first)
    assert any("ready" in line for line in first)
