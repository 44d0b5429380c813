"""One file: how it is built, what lies in it, and where it runs. (Without a network: wheels come from .build.)"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import wire
from conftest import Start
from installed import HOME
from promises import promise

import build_zipapp

pytestmark = pytest.mark.needs_install()  # `quick` has no time for all of these

CLONED = ("atrax.py", "build_zipapp.py", "config.json", ".lock")
ORIGINS = """
import sys
{before}
sys.path.insert(0, {archive!r})
import atrax, orjson, pydantic, pydantic_core
print(orjson.orjson.__file__, pydantic_core._pydantic_core.__file__, pydantic.__file__, *sys.path, sep="\\n")
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What `git clone` gives of the files that the build reads, in a new folder."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in CLONED:
        copy = shutil.copytree if (HOME / name).is_dir() else shutil.copy
        copy(HOME / name, folder / name)
    return folder


@pytest.fixture
def offline(tmp_path: Path) -> dict[str, str]:
    """An environment with an empty HOME, and pip told to use the wheels that were downloaded before."""
    (tmp_path / "home").mkdir()
    wheels = build_zipapp.downloaded_wheels()[0].parent
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path / "home"),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
    }


def python(*arguments: str | Path, **more: object) -> subprocess.CompletedProcess[str]:
    """Run this Python; its output as text."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload,no-any-return]


def origins(archive: Path, before: str = "", **more: object) -> subprocess.CompletedProcess[str]:
    """Where modules come from when atrax is imported out of `archive`; `before` is run first."""
    return python("-I", "-c", ORIGINS.format(archive=str(archive), before=before), **more)


@promise("file.builds_from_locks", "file.same_bytes")
def test_a_fresh_clone_with_an_empty_home_gives_the_same_bytes(
    clone: Path, offline: dict[str, str], archive: Path
) -> None:
    built = python(clone / "build_zipapp.py", "version", env={**offline, "PYTHONHASHSEED": "7"})
    assert built.returncode == 0, built.stderr
    assert "orjson 3.13.0 (memory)" in built.stdout
    assert (clone / "atrax.pyz").read_bytes() == archive.read_bytes()


@promise("file.runs_without_network")
def test_an_edit_of_atrax_is_built_without_pip(clone: Path, offline: dict[str, str]) -> None:
    packages = build_zipapp.compiled_packages()
    shutil.copytree(packages, clone / ".build" / packages.name)
    with (clone / "atrax.py").open("a") as source:
        source.write("\n# edited\n")
    nowhere = {**offline, "PIP_FIND_LINKS": "/nowhere"}
    assert "built atrax.pyz" in python(clone / "build_zipapp.py", env=nowhere).stderr
    again = python(clone / "build_zipapp.py", env=nowhere).stderr
    assert "up to date" in again
    assert "built" not in again


@promise("file.builds_from_locks")
def test_a_python_without_pip_takes_it_from_ensurepip(tmp_path: Path) -> None:
    code = "import pathlib, build_zipapp; print(*build_zipapp.pip(pathlib.Path('made')))"
    # -S: no site-packages, so no pip.
    found = python("-S", "-c", code, cwd=tmp_path, env={"PYTHONPATH": str(HOME)})
    command = found.stdout.split()
    assert command[0].startswith("made/"), found.stderr
    assert subprocess.run([*command, "--version"], cwd=tmp_path, check=False).returncode == 0


@promise("file.clear_errors")
def test_a_registry_that_cannot_be_reached_is_named_as_the_reason(
    clone: Path, offline: dict[str, str]
) -> None:
    closed = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
    env = {"PATH": offline["PATH"], "HOME": offline["HOME"], **closed}
    failed = python(clone / "build_zipapp.py", "serve", env=env)
    assert failed.returncode == 1
    assert "registry could not be reached" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (clone / "atrax.pyz").exists()


@promise("file.clear_errors", "file.builds_from_locks")
def test_a_package_with_another_hash_is_not_used(clone: Path, offline: dict[str, str]) -> None:
    lock = clone / ".lock" / "requirements.txt"
    others, version, _ = re.split(r"(?m)^orjson==(\S+)", lock.read_text())
    lock.write_text(f"{others}orjson=={version} --hash=sha256:{'0' * 64}\n")
    failed = python(clone / "build_zipapp.py", env=offline)
    assert failed.returncode == 1
    assert "does not have the hash of the lock" in failed.stderr
    assert "Traceback" not in failed.stderr


@promise("file.from_memory")
def test_native_modules_load_from_memory_and_nothing_is_written(
    archive: Path, tmp_path: Path
) -> None:
    nowhere = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), "/nowhere")
    names = origins(archive, cwd=tmp_path, env=nowhere).stdout.splitlines()
    assert [name.rpartition("/")[0] for name in names[:2]] == ["/proc/self/fd"] * 2
    assert names[2].startswith(str(archive))
    assert list(tmp_path.iterdir()) == []


@promise("file.alone")
def test_packages_of_the_machine_are_never_imported(archive: Path) -> None:
    # This very Python has all of them in its site-packages.
    *_, package = origins(archive).stdout.splitlines()[:3]
    assert package.startswith(str(archive))
    assert "-packages" not in "".join(origins(archive).stdout.splitlines()[3:])


@promise("file.from_cache")
def test_without_memfd_they_load_from_a_cache_keyed_by_content(
    archive: Path, tmp_path: Path
) -> None:
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    without = "import os; del os.memfd_create"
    first = origins(archive, without, env=env).stdout.splitlines()[0]
    assert first.startswith(str(tmp_path / "atrax"))
    # A file that was tampered with does not have its name's hash any more.
    whole = Path(first).read_bytes()
    Path(first).write_bytes(b"tampered")
    assert origins(archive, without, env=env).stdout.splitlines()[0] == first
    assert Path(first).read_bytes() == whole


@promise("file.from_cache")
def test_a_cache_that_others_can_write_is_not_used(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "atrax").mkdir()
    (tmp_path / "atrax").chmod(0o777)
    env = {"XDG_CACHE_HOME": str(tmp_path), "HOME": "/nowhere", "TMPDIR": str(tmp_path / "own")}
    (tmp_path / "own").mkdir()
    first = origins(archive, "import os; del os.memfd_create", env=env).stdout.splitlines()[0]
    assert first.startswith(str(tmp_path / "own"))
    assert list((tmp_path / "atrax").iterdir()) == []


@promise("file.other_python")
def test_another_python_is_told_so_in_one_line(archive: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pyz"
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(other, "w") as copy:
        for name in ("__main__.py", "atrax.py"):
            copy.writestr(name, source.read(name))
        built = json.loads(source.read("built.json"))
        built |= {"for": "Python 3.99 (cpython-399-vax)", "suffix": ".cpython-399-vax.so"}
        copy.writestr("built.json", json.dumps(built))
    failed = python(other, "version")
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    assert "was built for Python 3.99 (cpython-399-vax)" in failed.stderr


def test_no_test_no_stub_and_no_source_of_another_language_lies_in_the_file(archive: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        names = file.namelist()
    assert names == sorted(names)
    assert [name for name in names if name.endswith((".pyi", ".pyx", ".c", ".h", "RECORD"))] == []
    assert [
        name for name in names if "/tests/" in name or name.startswith(("cffi/", "pycparser/"))
    ] == []
    assert sorted(name for name in names if name.endswith(".py")) == ["__main__.py", "atrax.py"]


def test_every_module_in_the_file_finds_what_it_imports_at_its_head(archive: Path) -> None:
    """What was left out of the file is missed by nothing that mcp, jsonschema or PyJWT need."""
    needed = (
        "mcp.server.mcpserver, mcp.client.streamable_http, mcp.client.stdio, mcp.client.sse, "
        "jsonschema.validators, referencing.jsonschema, jwt.algorithms, jwt.jwks_client, uvloop, "
        "cryptography.hazmat.primitives.asymmetric.ec, cryptography.x509"
    )
    code = f"import sys; sys.path.insert(0, {str(archive)!r}); import atrax\nimport {needed}"
    code += "\nimport importlib.metadata as m; print(m.version('mcp'), len(jsonschema.FormatChecker.checkers) > 0)"
    imported = python("-I", "-c", code)
    assert imported.returncode == 0, imported.stderr
    assert imported.stdout.startswith("2.3.0")


async def test_the_file_alone_serves_the_demo_to_every_kind_of_client(
    atrax: Start, archive: Path, clone: Path, tmp_path: Path
) -> None:
    alone = Path(shutil.copy(archive, tmp_path / "atrax.pyz"))
    config = json.loads((clone / "config.json").read_text())
    running = await atrax(config, program=alone, env={"HOME": str(tmp_path)})
    await running.ready()
    modern = await running.modern().list("tools")
    legacy = await (await running.legacy()).list("tools")
    old = await wire.OldSse.start(f"{running.url}/sse")
    oldest = (await old.request("tools/list"))["result"]["tools"]
    old.close()
    names = [tool["name"] for tool in modern]
    assert {name.partition("__")[0] for name in names} == {"files", "notes"}
    assert names == [tool["name"] for tool in legacy] == [tool["name"] for tool in oldest]
    assert await running.stop() == 0


async def test_ctrl_c_ends_it_in_order(atrax: Start, archive: Path, tmp_path: Path) -> None:
    config = {"mcpServers": {"notes": {"command": "bundled:notes"}}}
    running = await atrax(config, program=archive, env={"HOME": str(tmp_path)})
    assert await running.stop(signal.SIGINT) in (0, 130)
