"""The command line helps: it says what is wrong and what to do, in a line or two, with the right code."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import atrax

pytestmark = pytest.mark.needs_install()  # `quick` has no time for all of these

FILE = atrax.__file__
FAILING = {"command": sys.executable, "args": ["-c", "import sys; sys.exit('no luck today')"]}


def run(
    *arguments: str, cwd: Path | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, FILE, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env={**os.environ, **environ},
        stdin=subprocess.DEVNULL,
    )


def config_file(folder: Path, **servers: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({"port": 0, "mcpServers": servers}))
    return path


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["serv"], 'there is no command "serv". Did you mean "serve"?'),
        (["frobnicate"], "Commands: serve, check"),
        (["serve", "--prt", "1"], "unrecognized arguments: --prt"),
        (["serve", "--port", "high"], "argument --port: invalid int value"),
        (["serve", "a", "b"], "unrecognized arguments: b"),
        (["serve", "--socket", "x", "--port", "1"], "--socket is instead of --host and --port"),
        (["serve", "nothing.json"], "nothing.json: no such file"),
        (["check"], "config.json: no such file"),
        (["schema", "x"], "unrecognized arguments: x"),
        (["bundled"], "give files or notes"),
        (["bundled", "files", "/nope"], "files: /nope: no such folder"),
        (["bundled", "files", "a", "b"], "one argument at most"),
        (["bundled", "fils"], "give files or notes"),
        (["bundled", "notes", "/proc/nope/notes.db"], 'Name a file: "args"'),
        (["bundled", "notes", "/"], "notes: /: unable to open database file"),
    ],
)
def test_a_mistake_is_told_in_two_lines_and_exits_2(
    arguments: list[str], told: str, tmp_path: Path
) -> None:
    done = run(*arguments, cwd=tmp_path)

    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_a_wrong_config_is_told_with_all_its_mistakes(tmp_path: Path) -> None:
    config_file(tmp_path, git={"comand": "x", "command": "y", "args": ["${NOPE_NOPE}"]})

    done = run("serve", cwd=tmp_path)

    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert first.startswith(
        "config.json: mcpServers.git.args[0]: the variable NOPE_NOPE is not set"
    )
    assert second == 'config.json: mcpServers.git.comand: unknown key. Did you mean "command"?'


def test_help_shows_every_command_and_option() -> None:
    asked, bare, of_one = run("--help"), run(), run("serve", "--help")

    assert (asked.returncode, asked.stdout, asked.stderr) == (0, atrax.USAGE, "")
    assert (bare.returncode, bare.stdout, bare.stderr) == (2, "", atrax.USAGE)
    assert (of_one.returncode, of_one.stdout) == (0, atrax.USAGE)
    for word in (*atrax.COMMANDS, "--host", "--port", "--socket", "--json"):
        assert word in atrax.USAGE


def test_the_config_in_the_usage_text_is_one() -> None:
    (example,) = re.findall(r"^  (\{.*\})$", atrax.USAGE, re.MULTILINE)

    assert list(atrax.Config.load(example).servers) == ["time"]


def test_version_names_the_native_modules_and_their_place() -> None:
    done = run("version")

    assert done.returncode == 0
    assert done.stdout.startswith(f"atrax {atrax.VERSION}, from {FILE}\n")
    for name in ("orjson", "pydantic_core", "uvloop"):
        assert re.search(rf"^{name} \d\S* \(.*\.so\)$", done.stdout, re.MULTILINE), done.stdout


def test_schema_prints_a_json_schema() -> None:
    schema = json.loads(run("schema").stdout)

    jsonschema.Draft202012Validator.check_schema(schema)
    assert "mcpServers" in schema["properties"]


def test_a_reader_that_leaves_early_sees_no_traceback() -> None:
    command = f"'{sys.executable}' '{FILE}' schema | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)

    assert (done.stdout, done.stderr) == ("{\n", "")


@pytest.mark.parametrize(
    ("to", "exit_code", "told"),
    [
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
        (">/dev/full", 1, "atrax: stdout cannot be written: No space left on device\n"),
    ],
)
@pytest.mark.parametrize("command", ["version", "schema", "check"])
def test_a_stdout_that_takes_nothing_causes_no_traceback(
    command: str, to: str, exit_code: int, told: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"mcpServers": {}}')
    line = f"'{sys.executable}' '{FILE}' {command} {to}"
    done = subprocess.run(
        line, shell=True, capture_output=True, text=True, timeout=60, cwd=tmp_path
    )

    assert (done.returncode, done.stderr) == (exit_code, told)


# ---- the screen ----


STATUS: dict[str, dict[str, Any]] = {
    "files": {"state": "ready", "era": "modern", "tools": 3, "prompts": 0, "resources": 0},
    "notes": {"state": "ready", "era": "legacy", "tools": 4, "prompts": 1, "resources": 2},
    "git": {
        "state": "failed",
        "era": None,
        "lastError": "exited with 127: \x1b[31mevil",
        "tools": 0,
    },
    "off": {"state": "disabled", "tools": 0},
}


def test_the_screen_shows_the_url_each_server_and_how_to_connect() -> None:
    remark = "config.json: mcpServers.far: skipped"
    lines = atrax.startup_screen(["http://127.0.0.1:4000"], STATUS, [remark], "1.2").splitlines()

    assert lines[0] == "Atrax 1.2  http://127.0.0.1:4000/mcp"
    assert lines[2:6] == [
        "  files  ready     modern, 3 tools",
        "  notes  ready     legacy, 4 tools, 2 resources, 1 prompt",
        r"  git    failed    exited with 127: \x1b[31mevil",
        "  off    disabled",
    ]
    assert remark in lines
    assert any(
        "claude mcp add --transport http atrax http://127.0.0.1:4000/mcp" in x for x in lines
    )
    entry = json.loads(lines[-1].partition("others")[2])
    assert entry["mcpServers"]["atrax"]["url"] == "http://127.0.0.1:4000/mcp"


def test_the_screen_names_a_socket() -> None:
    screen = atrax.startup_screen(["unix:/run/atrax"], {}, [], "1.2")

    assert screen.splitlines()[-1] == "Listening on unix:/run/atrax"


def test_the_report_counts_and_says_what_is_hidden() -> None:
    hidden = {"kind": "tools", "name": "rm", "reason": "its schema\x07 is broken"}
    more = {"hidden": [hidden], "took": 0.5, "offers": {"tools": ["add", "edit"], "prompts": []}}
    status = {"notes": {**STATUS["notes"], **more}, "git": STATUS["git"]}

    report = atrax.check_report(status, 1.25, [])

    assert "legacy, 4 tools, 2 resources, 1 prompt, 0.50 s" in report
    assert "  notes tools: add, edit" in report.splitlines()
    assert r"  notes: rm is hidden: its schema\x07 is broken" in report.splitlines()
    assert report.endswith("2 servers in 1.2 s, 1 failed")


# ---- the real thing ----


def test_check_starts_every_server_and_counts_what_it_offers(tmp_path: Path) -> None:
    config_file(
        tmp_path,
        files={"command": "bundled:files"},
        notes={"command": "bundled:notes", "args": ["notes.db"], "protocol": "legacy"},
    )

    done = run("check", cwd=tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"files +ready +modern, 3 tools", done.stdout)
    assert re.search(r"notes +ready +legacy, 4 tools, 1 prompt, 1 resource template", done.stdout)
    assert re.search(r"2 servers in \d+\.\d s, all fine", done.stdout)


def test_check_exits_1_when_a_server_fails_and_shows_the_others(tmp_path: Path) -> None:
    config_file(tmp_path, files={"command": "bundled:files"}, bad=FAILING)

    done = run("check", "--json", cwd=tmp_path)

    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert report["servers"]["files"]["state"] == "ready"
    assert report["servers"]["files"]["tools"] == 3
    assert "no luck today" in report["servers"]["bad"]["lastError"]


@contextmanager
def serving(*arguments: str, cwd: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A gateway that has shown its screen, and the screen."""
    gateway = subprocess.Popen(
        [sys.executable, FILE, "serve", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
    )  # fmt: skip
    try:
        assert gateway.stdout is not None
        screen = ""
        while "others" not in screen and (line := gateway.stdout.readline()):
            screen += line
        yield gateway, screen
    finally:
        gateway.kill()
        gateway.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_shows_where_it_is_and_ends_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    config_file(tmp_path, files={"command": "bundled:files"})

    with serving(cwd=tmp_path) as (gateway, screen):
        assert re.match(r"Atrax \S+  http://127\.0\.0\.1:\d+/mcp\n", screen)
        gateway.send_signal(number)
        _, err = gateway.communicate(timeout=30)

    assert gateway.returncode == 0
    assert re.search(r"files +(ready +modern, 3 tools|starting)", screen)
    assert "Traceback" not in err


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    config_file(tmp_path, files={"command": "bundled:files"})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", "--port", str(port), cwd=tmp_path)

    assert done.returncode == 2
    assert str(port) in done.stderr
    assert len(done.stderr.splitlines()) <= 2


@pytest.mark.parametrize(("environ", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_are_for_terminals_that_want_them(
    tmp_path: Path, environ: dict[str, str], coloured: bool
) -> None:
    config_file(tmp_path, files={"command": "bundled:files", "disabled": True})
    clean = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    leader, follower = pty.openpty()
    with os.fdopen(leader, "rb", buffering=0) as screen:
        done = subprocess.run(
            [sys.executable, FILE, "check"],
            stdout=follower, stderr=subprocess.DEVNULL, cwd=tmp_path, timeout=60,
            env={**clean, "TERM": "xterm", **environ},
        )  # fmt: skip
        shown = screen.read(65536)
        os.close(follower)

    assert done.returncode == 0
    assert (b"\x1b[" in shown) == coloured


def test_without_a_terminal_nothing_is_coloured(tmp_path: Path) -> None:
    config_file(tmp_path, bad=FAILING)

    assert "\x1b" not in run("check", cwd=tmp_path, TERM="xterm").stdout
