"""Stands in for podman or docker: a real process that runs the entrypoint on this machine, in no container.

Each call leaves its arguments and environment as a line of JSON in the file `calls` beside it. `run` becomes the
server; `rm` ends nothing but leaves its line. A file `refuses` beside it holds what `run` says on stderr before it
exits with 125. A server has what `--env` names and what the value of it is here, as with the real ones."""

import json
import os
import sys

FOLDER = os.path.dirname(os.path.abspath(sys.argv[0]))


def main() -> None:
    verb, *rest = sys.argv[1:]
    record = {"argv": sys.argv[1:], "environment": dict(os.environ), "pid": os.getpid()}
    with open("/proc/self/status") as file:
        record["status"] = file.read()
    with open(os.path.join(FOLDER, "calls"), "a") as file:
        file.write(json.dumps(record) + "\n")
    if verb != "run":
        return
    refuses = os.path.join(FOLDER, "refuses")
    if os.path.exists(refuses):
        with open(refuses) as file:
            sys.stderr.write(file.read())
        sys.exit(125)
    image = next(at for at, argument in enumerate(rest) if not argument.startswith("--"))
    options = [option.partition("=") for option in rest[:image]]
    given = [value for name, _, value in options if name == "--env"]
    environment = dict(one.split("=", 1) if "=" in one else (one, os.environ[one]) for one in given)
    entrypoint = next(value for name, _, value in options if name == "--entrypoint")
    os.execve(entrypoint, [entrypoint, *rest[image + 1 :]], environment)


if __name__ == "__main__":
    main()
