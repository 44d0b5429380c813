#!/usr/bin/env python3
"""Builds atrax.pyz, all of Atrax in one file, for this Python and platform; then runs it.

    python3 build_zipapp.py                      only builds, and says what to do next
    python3 build_zipapp.py serve config.json    builds if anything changed, then runs that command

It needs Python 3.11 or newer, pip or ensurepip, and, the first time, a package registry. Every
package is locked by hash in .lock/requirements.txt. The same inputs give the same bytes. What was
downloaded and compiled is kept in .build, so later builds need no network.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):
    sys.exit("build_zipapp.py: Atrax needs Python 3.11 or newer; this is " + sys.version.split()[0])

import fnmatch
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

HOME: Final = Path(__file__).resolve().parent
ARCHIVE: Final = HOME / "atrax.pyz"
SOURCE: Final = HOME / "atrax.py"
LOCK: Final = HOME / ".lock" / "requirements.txt"
BUILD: Final = HOME / ".build"

# ".cpython-311-x86_64-linux-gnu.so": Python, processor, system and C library, all in one word.
SUFFIX: Final = importlib.machinery.EXTENSION_SUFFIXES[0]
PYTHON: Final = (
    f"Python {sys.version_info[0]}.{sys.version_info[1]} ({SUFFIX.strip('.').split('.')[0]})"
)

MAIN: Final = b"""\
import sys

if sys.version_info < (3, 11):
    sys.exit("atrax: needs Python 3.11 or newer; this is " + sys.version.split()[0])

try:
    import atrax

    sys.exit(atrax.main())
except KeyboardInterrupt:  # while the imports run; main has its own
    sys.exit(1)
"""

# What nothing in the file imports, as globs on members. cffi and pycparser are compilers; of them
# cryptography needs _cffi_backend alone. pydantic.v1 serves those who still use its first version.
UNUSED: Final[list[str]] = (
    "*.pyi *.pyx *.pxd *.pxi *.c *.h *.typed *.pyc *_c_ast.cfg */tests/* */testing/* */benchmarks/* "
    "cffi/* pycparser/* multipart/* mcp/cli/* "
    "pydantic/v1/* pydantic/mypy.py pydantic/_hypothesis_plugin.py anyio/pytest_plugin.py "
    "anyio/_backends/_trio.py uvloop/_testbase.py jsonschema/cli.py jsonschema/__main__.py"
).split()
# What the gateway's own process imports lies uncompressed: 40 ms of 240 at start, for 5 MB of file.
# The rest (mcp, cryptography) is for the processes of embedded servers, and packed.
AT_HAND: Final[list[str]] = (
    "atrax.* __main__.* built.json annotated_types/* attr/* attrs/* jsonschema/* "
    "jsonschema_specifications/* orjson/* pydantic/* pydantic_core/* referencing/* rpds/* "
    "typing_extensions.* typing_inspection/* uvloop/*"
).split()
# What importlib.metadata reads, and the licences, which have to go where the code goes.
METADATA: Final = re.compile(r"[^/]+\.dist-info/(METADATA|entry_points\.txt|licenses/.+|LICENSE.*)")


class BuildError(Exception):
    """The build failed; the text says why and what to do."""


def main(arguments: list[str]) -> int:
    """Build if needed, then become `atrax.pyz` with `arguments`; the exit code if there are none."""
    try:
        inputs = digest_of_inputs()
        if built_from() != inputs:
            build(inputs)
        elif not arguments:
            say(f"{ARCHIVE.name} is up to date.")
    except BuildError as error:
        say(f"build_zipapp.py: {error}")
        return 1
    except OSError as error:
        say(f"build_zipapp.py: {error.filename or HOME}: {error.strerror}")
        return 1
    except KeyboardInterrupt:
        return 130
    if not arguments:
        say("Now run:  python3 atrax.pyz serve config.json")
        return 0
    return run(arguments)


def run(arguments: list[str]) -> int:
    """Run the archive in place of this process. Returns on Windows alone, where exec loses the console."""
    command = [sys.executable, str(ARCHIVE), *arguments]
    if os.name != "nt":
        sys.stdout.flush()
        os.execv(sys.executable, command)
    with subprocess.Popen(command) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue  # Ctrl-C reached the gateway too, which ends in its own time


def say(text: str) -> None:
    """A line for the person at the terminal. On stderr: stdout belongs to the command that follows."""
    print(text, file=sys.stderr, flush=True)


# ---- Is there anything to do? ----------------------------------------------------------


def digest_of_inputs() -> str:
    """One digest over all that the archive's bytes depend on."""
    digest = hashlib.sha256(f"{SUFFIX} {sys.version}".encode())
    for file in (SOURCE, LOCK, Path(__file__)):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def built_from() -> str | None:
    """The digest of the inputs that the present archive was built from."""
    try:
        with zipfile.ZipFile(ARCHIVE) as archive:
            built = json.loads(archive.read("built.json"))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None
    inputs = built.get("inputs")
    return inputs if isinstance(inputs, str) else None


def build(inputs: str) -> None:
    """Make atrax.pyz anew, whole or not at all."""
    started = time.monotonic()
    BUILD.mkdir(exist_ok=True)
    packages = compiled_packages()
    with tempfile.TemporaryDirectory(dir=BUILD) as name:
        stage = Path(name)
        (stage / "__main__.py").write_bytes(MAIN)
        shutil.copyfile(SOURCE, stage / "atrax.py")
        compile_to_bytecode(stage)
        members = {**members_of(packages), **members_of(stage)}
        built = {
            "for": PYTHON,
            "suffix": SUFFIX,
            "modules": native_modules(members),
            "inputs": inputs,
        }
        members["built.json"] = json.dumps(built, indent=1, sort_keys=True).encode()
        draft = stage / ARCHIVE.name
        write_archive(draft, members)
        os.replace(draft, ARCHIVE)
    size, seconds = ARCHIVE.stat().st_size / 1e6, time.monotonic() - started
    say(f"built {ARCHIVE.name} for {PYTHON}: {size:.1f} MB in {seconds:.0f} s")


# ---- Packages --------------------------------------------------------------------------


def compiled_packages() -> Path:
    """The folder with all packages as they go into the archive; made once per lock and Python."""
    recipe = hashlib.sha256(f"{SUFFIX} {sys.version}".encode() + LOCK.read_bytes())
    recipe.update(Path(__file__).read_bytes())
    folder = BUILD / f"packages-{recipe.hexdigest()[:16]}"
    if folder.exists():
        return folder
    wheels = downloaded_wheels()
    say(f"  compiling {len(wheels)} packages")
    with tempfile.TemporaryDirectory(dir=BUILD) as name:
        draft = Path(name) / "packages"
        draft.mkdir()
        for wheel in wheels:
            unpack(wheel, draft)
        compile_to_bytecode(draft)
        # A source beside its byte-code would be read by nobody: another Python is refused at start.
        for source in draft.rglob("*.py"):
            source.unlink()
        finish(draft, folder)
    return folder


def finish(draft: Path, folder: Path) -> None:
    """Rename, so that a folder of that name is always whole; another build may have been faster."""
    try:
        draft.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def downloaded_wheels() -> list[Path]:
    """The wheels of the lock for this Python and platform, each with a hash that the lock names."""
    name = hashlib.sha256(SUFFIX.encode() + LOCK.read_bytes()).hexdigest()[:16]
    folder = BUILD / f"wheels-{name}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=BUILD) as draft:
            download(Path(draft) / "wheels")
            finish(Path(draft) / "wheels", folder)
    wheels = sorted(folder.glob("*.whl"))
    # pip has checked them; this is for what happened to .build since.
    locked = set(re.findall(r"--hash=sha256:([0-9a-f]{64})", LOCK.read_text(encoding="utf-8")))
    for wheel in wheels:
        if hashlib.sha256(wheel.read_bytes()).hexdigest() not in locked:
            raise BuildError(
                f"{wheel} does not have the hash of the lock; remove {BUILD} and try again"
            )
    return wheels


def download(folder: Path) -> None:
    """Fetch the wheels with pip, which obeys PIP_* and pip.conf of this machine."""
    names = re.findall(r"^([A-Za-z0-9._-]+)==", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    say(f"{ARCHIVE.name}: downloading up to {len(names)} packages, locked by hash (once)")
    with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
        command = [
            *(pip(Path(scratch))),
            *("download", "--only-binary=:all:", "--no-deps", "--require-hashes"),
            *(
                "--disable-pip-version-check",
                "--progress-bar=off",
                "-r",
                str(LOCK),
                "-d",
                str(folder),
            ),
        ]
        output = follow(command)
    if not folder.exists() or not any(folder.glob("*.whl")) or output is not None:
        raise BuildError(why_not(output or ""))


def pip(scratch: Path) -> list[str]:
    """The command that is pip here; made from ensurepip, in a folder for the moment, if need be."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(scratch)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        raise BuildError(
            f"{sys.executable} has neither pip nor ensurepip, and one is needed to fetch packages.\n"
            "On Debian and Ubuntu: apt install python3-pip. Elsewhere: install pip for this Python"
        )
    inside = scratch / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    return [str(inside), "-m", "pip"]


def follow(command: list[str]) -> str | None:
    """Run pip and show what it fetches; None if it succeeded, else its output."""
    live, lines = sys.stderr.isatty(), []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            fetched = re.search(
                r"(?:Downloading|Using cached) (\S+\.whl)(?:\.metadata)? \((.+)\)", line
            )
            if fetched and ".metadata" not in line:
                name, size = fetched[1].rsplit("/", 1)[-1], fetched[2]
                text = f"  {'-'.join(name.split('-')[:2])} ({size})"
                # One line that is written over at a terminal, one line each in a log.
                print(
                    f"\r\x1b[K{text}" if live else text,
                    end="" if live else "\n",
                    file=sys.stderr,
                    flush=True,
                )
    if live:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return "".join(lines) if process.returncode else None


def why_not(output: str) -> str:
    """What stood against the download, in words for the person who wanted to start a gateway."""
    if "DO NOT MATCH THE HASHES" in output:
        return (
            "a package does not have the hash of the lock, so it was not used:\n" + output.strip()
        )
    if "No space left" in output:
        return f"no space left on the device that holds {BUILD}"
    unreachable = re.search(
        r"NewConnectionError|Max retries|Name or service|name resolution|timed out", output
    )
    errors = [line for line in output.splitlines() if line.startswith("ERROR: ")]
    last = errors[-1] if errors else output.strip()[-500:]
    if unreachable:
        return (
            "the package registry could not be reached. It is needed for the first build only; behind a\n"
            f"mirror or a proxy set PIP_INDEX_URL or HTTPS_PROXY. pip said: {last}"
        )
    if "No matching distribution" in output:
        return f"there is no wheel of a locked package for {PYTHON}. pip said: {last}"
    return f"pip failed: {last}"


# ---- From wheel to archive --------------------------------------------------------------


def unpack(wheel: Path, folder: Path) -> None:
    """Put what Atrax can import from `wheel` into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            # NAME.data/purelib and platlib belong at the root; scripts and headers nowhere.
            place = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", name)
            if not wanted(place):
                continue
            data = archive.read(name)
            if re.search(r"\.(so|pyd)$", place):
                data = without_debug_information(data)
                # Natural names say for whom: several platforms can lie side by side in one archive.
                place = re.sub(r"\.abi3\.so$", SUFFIX.replace("\\", ""), place)
            if place.endswith(".dist-info/METADATA"):
                data = data.partition(b"\n\n")[0] + b"\n"  # the headers; below them is the README
            file = folder / place
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)


def wanted(member: str) -> bool:
    """Whether a member of a wheel can be imported or read by Atrax."""
    if member.endswith("/") or ".data/" in member:
        return False
    if ".dist-info/" in member:
        return METADATA.fullmatch(member) is not None
    return not matches(member, UNUSED)


def matches(member: str, patterns: list[str]) -> bool:
    """Whether a member's name fits one of the globs."""
    return any(fnmatch.fnmatchcase(member, pattern) for pattern in patterns)


def without_debug_information(library: bytes) -> bytes:
    """An ELF library without what is never mapped: sections behind its last segment, and their table.

    uvloop's is 13.6 MB, of which 1.6 MB is mapped. Other formats stay as they are."""
    if library[:6] != b"\x7fELF\x02\x01":  # 64 bits, little-endian: x86_64 and aarch64
        return library
    table, size, count = (
        struct.unpack_from("<Q", library, 32)[0],
        *struct.unpack_from("<HH", library, 54),
    )
    end = table + size * count
    for at in range(table, end, size):
        offset, length = struct.unpack_from("<Q16xQ", library, at + 8)
        end = max(end, offset + length)
    header = bytearray(library[:64])
    struct.pack_into("<Q", header, 40, 0)  # e_shoff: no section headers
    struct.pack_into("<HHH", header, 58, 0, 0, 0)  # their size, number, and names
    return bytes(header) + library[64:end]


def compile_to_bytecode(folder: Path) -> None:
    """Put a .pyc beside every .py: zipimport would compile at every start, and halves its speed by it.

    Unchecked and hash-based, so that no date is in it. In an interpreter of its own and in sorted
    order: what else lives in a process shows in the bytes that marshal writes."""
    command = [sys.executable, "-I", "-S", "-m", "compileall", "-q", "-b", "-d", ARCHIVE.name]
    command += ["--invalidation-mode", "unchecked-hash", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"could not compile: {(done.stdout + done.stderr).strip()[-500:]}")


def members_of(folder: Path) -> dict[str, bytes]:
    """Name and bytes of every file below `folder`."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def native_modules(members: dict[str, bytes]) -> dict[str, str]:
    """The name of each native module, and the member that holds it."""
    return {
        member.removesuffix(SUFFIX).replace("/", "."): member
        for member in sorted(members)
        if member.endswith(SUFFIX)
    }


def write_archive(file: Path, members: dict[str, bytes]) -> None:
    """Write the zip: sorted names, one date, one mode, and folders as members of their own.

    (zipimport on 3.11 finds a namespace package only by its folder's member.)"""
    with file.open("wb") as stream:
        stream.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(stream, "w", compresslevel=9) as archive:
            for name in sorted({*members, *folders_of(members)}):
                info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
                info.create_system = 3  # Unix, on every system that builds
                info.external_attr = (
                    (0o40755 << 16 | 0x10) if name.endswith("/") else 0o100644 << 16
                )
                stored = name.endswith("/") or matches(name, AT_HAND)
                info.compress_type = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
                archive.writestr(info, members.get(name, b""))
    file.chmod(0o755)


def folders_of(members: dict[str, bytes]) -> Iterator[str]:
    """Every folder that a member lies in, as zip names it: with a slash at its end."""
    for name in members:
        parts = name.split("/")[:-1]
        yield from ("/".join(parts[: depth + 1]) + "/" for depth in range(len(parts)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
