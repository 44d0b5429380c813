"""A legacy child that does to itself what its one tool `do` is told: {"what": WHAT, …}; prints little, ends on end of file.

    echo         gives back `text`                      die       exits with `code`, without an answer
    pid          its process id                         kill      sends itself `signal`
    environment  its environment                        last      answers and exits in the same breath
    directory    its working directory                  mute      closes its stdout and lives on
    descriptors  its open descriptors                   deaf      reads no more for `seconds`
    wait         answers when a `release` comes         stderr    writes `lines` lines of `size` bytes to stderr
    release      answers all that wait                  long      writes a line of `size` bytes
    ask          elicits, answers when it was answered  fork      leaves a grandchild behind: in its group,
    until        answers when the file `path` is there            or with "escape" in a session of its own
    cancellations  how many of its requests were cancelled
    calls        how many calls it got                  line      gives back the line that asked for it
    flood        writes `line` again and again for `seconds`, and reads nothing
    say          writes `text` as it is; @ID@ in it is its own id, @OTHER@ that of a call that waits, @BAD@ no UTF-8

A call with a progressToken is reported once, before anything is done.
`die` with `unless` leaves that file behind, and where it is already, it lives on and says so.

Started with `stubborn` it ignores end of file and SIGTERM; with `once FILE` only the first process starts; with
`needs FILE` none does before FILE is there; with `safe` its tool says that it may be called twice."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

TOOL = {"name": "do", "description": "Does it", "inputSchema": {"type": "object"}}
WAITING: list[int] = []
ASKED: dict[str, int] = {}
CANCELLED: list[int] = []
CALLS: list[str] = []  # the lines that brought them


def send(message: dict) -> None:
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    sys.stdout.flush()


def answer(ident: int, text: str) -> None:
    send({"id": ident, "result": {"content": [{"type": "text", "text": text}]}})


def fork(escape: bool) -> int:
    """A process that sleeps; with `escape` the orphan of one that has ended, in a session of its own."""
    sleep = "import time; time.sleep(600)"
    if not escape:
        return subprocess.Popen([sys.executable, "-c", sleep], stdin=subprocess.DEVNULL).pid
    daemon = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {sleep!r}]).pid, flush=True)"
    helper = subprocess.Popen(
        [sys.executable, "-c", daemon], stdout=subprocess.PIPE, start_new_session=True
    )
    pid = int(helper.stdout.readline())
    helper.wait()
    return pid


def do(ident: int, what: str, order: dict) -> None:
    if what == "echo":
        answer(ident, order["text"])
    elif what == "pid":
        answer(ident, str(os.getpid()))
    elif what == "environment":
        answer(ident, json.dumps(dict(os.environ)))
    elif what == "directory":
        answer(ident, os.getcwd())
    elif what == "descriptors":
        answer(
            ident, json.dumps({fd: os.readlink(f"/proc/self/fd/{fd}") for fd in open_descriptors()})
        )
    elif what == "status":
        with open("/proc/self/status") as file:
            answer(ident, file.read())
    elif what == "wait":
        WAITING.append(ident)
    elif what == "release":
        for waiting in WAITING:
            answer(waiting, "released")
        WAITING.clear()
        answer(ident, "done")
    elif what == "until":
        while not os.path.exists(order["path"]):
            time.sleep(0.005)
        answer(ident, "it is there")
    elif what == "cancellations":
        answer(ident, str(len(CANCELLED)))
    elif what == "calls":
        answer(ident, str(len(CALLS)))
    elif what == "line":
        answer(ident, CALLS[-1])
    elif what == "say":
        text = order["text"].replace("@ID@", str(ident))
        text = text.replace("@OTHER@", str(WAITING[0] if WAITING else 0))
        sys.stdout.buffer.write(text.encode().replace(b"@BAD@", b"\xff\xfe") + b"\n")
        sys.stdout.flush()
    elif what == "ask":
        ASKED[f"ask-{ident}"] = ident
        params = {
            "message": "Who are you?",
            "requestedSchema": {"type": "object", "properties": {}},
        }
        send({"id": f"ask-{ident}", "method": "elicitation/create", "params": params})
    elif what == "die" and "unless" in order and os.path.exists(order["unless"]):
        answer(ident, "lives on")
    elif what == "die":
        if "unless" in order:
            os.close(os.open(order["unless"], os.O_CREAT))
        sys.stderr.write(order.get("words", "") + "\n")
        os._exit(order.get("code", 1))
    elif what == "kill":
        os.kill(os.getpid(), order["signal"])
    elif what == "last":
        answer(ident, order["text"])
        os._exit(0)
    elif what == "mute":
        answer(ident, "soon")
        os.close(1)
    elif what == "deaf":
        answer(ident, "from now on")
        time.sleep(order["seconds"])
    elif what == "stderr":
        sys.stderr.write(("x" * order["size"] + "\n") * order["lines"])
        sys.stderr.flush()
        answer(ident, "written")
    elif what == "flood":
        until, lines = time.monotonic() + order["seconds"], (order["line"] + "\n").encode() * 1000
        while time.monotonic() < until:
            sys.stdout.buffer.write(lines)
        answer(ident, "stopped")
    elif what == "long":
        sys.stdout.write("y" * order["size"] + "\n")
        answer(ident, "written")
    elif what == "fork":
        answer(ident, str(fork(order.get("escape", False))))


def open_descriptors() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]


def receive(line: str) -> None:
    message = json.loads(line)
    method, ident = message.get("method"), message.get("id")
    if method is None:
        answer(ASKED.pop(ident), json.dumps(message.get("result", message.get("error"))))
    elif method == "initialize":
        info = {"name": "does", "version": "1"}
        result = {
            "protocolVersion": "2025-11-25",
            "capabilities": {"tools": {}},
            "serverInfo": info,
        }
        send({"id": ident, "result": result})
    elif method == "tools/call":
        CALLS.append(line.strip())
        order = message["params"]["arguments"]
        token = message["params"].get("_meta", {}).get("progressToken")
        if token is not None:
            send(
                {
                    "method": "notifications/progress",
                    "params": {"progressToken": token, "progress": 1},
                }
            )
        do(ident, order["what"], order)
    elif method == "notifications/cancelled":
        CANCELLED.append(message["params"]["requestId"])
    elif method == "tools/list":
        send({"id": ident, "result": {"tools": [TOOL]}})
    elif method == "ping":
        send({"id": ident, "result": {}})
    elif ident is not None:
        send({"id": ident, "error": {"code": -32601, "message": "Method not found"}})


def main() -> None:
    habits = sys.argv[1:]
    if "once" in habits:
        try:
            os.close(os.open(habits[habits.index("once") + 1], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            sys.exit("another process holds the lock")
    if "needs" in habits and not os.path.exists(habits[habits.index("needs") + 1]):
        sys.exit("the file it needs is not there")
    if "safe" in habits:
        TOOL["annotations"] = {"idempotentHint": True}
    if "stubborn" in habits:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for line in sys.stdin:
        receive(line)
    while "stubborn" in habits:
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(600)


if __name__ == "__main__":
    main()
