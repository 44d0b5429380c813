"""Makes the environment of the tests and runs them.

    python3 tests                   everything
    python3 tests quick             without what comes from npm, apt or environments of its own
    python3 tests install [quick]   only makes the environment, in .build
    python3 tests -k crash -x       further arguments are pytest's

Needs Python 3.11 or newer with venv, and a package registry the first time; later runs need none.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

if sys.version_info < (3, 11):
    sys.exit("tests: Atrax needs Python 3.11 or newer; this is " + sys.version.split()[0])

from installed import BUILD, DEBIAN, HOME, NODE

LOCK = HOME / ".lock"
PYTHON = BUILD / "tests" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def main(arguments: list[str]) -> int:
    """Install what is missing, then run pytest; its exit code."""
    only_install = arguments[:1] == ["install"]
    arguments = arguments[only_install:]
    quick = arguments[:1] == ["quick"]
    arguments = arguments[quick:]
    install("tests")
    if subprocess.run([sys.executable, str(HOME / "build_zipapp.py")], check=False).returncode:
        return 1
    if not quick:
        install_the_rest()
    if only_install:
        return 0
    return pytest(arguments, quick)


def pytest(arguments: list[str], quick: bool) -> int:
    command = [str(PYTHON), "-m", "pytest", *arguments]
    if quick:
        command += ["-m", "not needs_install"]
    if not {"-n", "--pdb", "-s", "--collect-only"}.intersection(arguments):
        # Most tests wait for processes. By file, so that what a module starts is started once.
        command += ["-n", "2", "--dist", "loadfile"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(command, cwd=HOME, env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # pytest got it as well, and has to stop what its tests started


def say(text: str) -> None:
    print(f"tests: {text}", file=sys.stderr, flush=True)


def install(name: str) -> None:
    """The environment `.build/NAME` from `.lock/NAME.txt`, made anew when the lock or Python changed."""
    folder, lock = BUILD / name, LOCK / f"{name}.txt"
    if is_made_from(folder, lock.read_bytes(), sys.version.encode()):
        return
    say(f"installing .lock/{lock.name} into .build/{name}, once")
    run(
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        "On Debian: apt install python3-venv",
    )
    python = folder / PYTHON.relative_to(BUILD / "tests")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--only-binary=:all:", "--require-hashes", "-r", str(lock)]
    run(pip, "A package registry is needed the first time (PIP_INDEX_URL, HTTPS_PROXY are obeyed)")
    mark(folder, lock.read_bytes(), sys.version.encode())


def install_the_rest() -> None:
    """What the full part needs. What can't be had is said, and its tests are skipped (in CI they fail)."""
    wanted = [command for command in ("npm", *DEBIAN) if not shutil.which(command)]
    steps = [lambda: debian(wanted)] if wanted else []
    steps += [lambda: install("servers"), lambda: install("sdk1"), node]
    for step in steps:
        try:
            step()
        except Missing as error:
            say(str(error))


def debian(commands: list[str]) -> None:
    """Debian packages for `commands`, if this machine is a Debian and we may."""
    packages = [DEBIAN.get(command, command) for command in commands]
    if not shutil.which("apt-get") or os.name == "nt" or os.getuid() != 0:
        raise Missing(
            f"please install {', '.join(packages)}: not done here without apt-get and root"
        )
    say(f"installing the Debian packages {', '.join(packages)}, once")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    policy = Path("/usr/sbin/policy-rc.d")
    made = not policy.exists()
    if made:  # a package's daemon is not to be started: tests start their own
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        run(["apt-get", "-qq", "update"], "apt-get update failed", environment)
        install = ["apt-get", "-qq", "install", "-y", "--no-install-recommends", *packages]
        run(install, "apt-get could not install it", environment)
    finally:
        if made:
            policy.unlink()


def node() -> None:
    """The npm packages of .lock/package-lock.json, and Node 22 among them."""
    folder = BUILD / "node"
    files = [LOCK / "package.json", LOCK / "package-lock.json"]
    contents = [file.read_bytes() for file in files]
    link = HOME / "tests" / "node_modules"  # where `import` in tests/clients/*.mjs looks
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(folder / "node_modules", link.parent))
    if is_made_from(folder, *contents):
        return
    npm = shutil.which("npm")
    if npm is None:
        raise Missing("npm is missing: install Node 20 or newer with npm")
    say("installing .lock/package-lock.json into .build/node, once")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in files:
        shutil.copy(file, folder)
    # No scripts: nothing here needs one, and a script is code that the lock does not show.
    run(
        [npm, "ci", "--silent", "--ignore-scripts", "--no-audit", "--prefix", str(folder)],
        "npm failed",
    )
    if not NODE.exists():
        raise Missing(f"there is no Node from npm for this platform ({NODE.name})")
    mark(folder, *contents)


class Missing(Exception):
    """Something that the full part needs could not be had."""


def run(command: list[str], hint: str, environment: dict[str, str] | None = None) -> None:
    """Run `command`; raises Missing with the last lines that it said and a hint."""
    output = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if output.returncode:
        last = "\n".join((output.stdout + output.stderr).strip().splitlines()[-4:])
        raise Missing(f"{' '.join(command[:3])} … failed:\n{last}\n{hint}")


def is_made_from(folder: Path, *inputs: bytes) -> bool:
    stamp = folder / ".made-from"
    return stamp.exists() and stamp.read_text() == digest(inputs)


def mark(folder: Path, *inputs: bytes) -> None:
    (folder / ".made-from").write_text(digest(inputs))


def digest(inputs: tuple[bytes, ...]) -> str:
    return hashlib.sha256(b"\0".join(inputs)).hexdigest()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Missing as error:
        sys.exit(f"tests: {error}")
