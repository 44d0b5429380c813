"""A legacy child that asks as it is told. Its tool `act` carries out its `steps`, one after the other:

    {"ask": {KEY: [METHOD, PARAMS]}}  asks all of them at once and waits for every answer; each names its key in _meta,
                                      or with "keys": "ids" uses it as the request's id, or with "keys": "none" neither
    {"take_back": [KEY]}              cancels asks of its own; "wait" of an ask may name the keys that it waits for
    {"hold": PATH}                    until that file is there, or this call is cancelled; then it goes on, cancelled or not
    {"awaited": true}                 until tasks/result asks for this task
    {"say": MESSAGE}                  writes a message as it is; "@ID@" in it is the call's id
    {"error": ERROR}                  ends the call by an error
    {"fail": TEXT}                    ends it by a tool's error
    {"exit": CODE}                    ends the process
    {"later": {KEY: [METHOD, PARAMS]}}  asks when the call is over: right behind its answer, or once the file "at" is there

The result is JSON: its process, the answers by key, and the progress that the client reported on asks. Every answer is
told on stderr too, with the key, for those that came when the call was over. A cancelled call gets no answer, unless
its `late` is true. `job` is `act` that may become a task, `must` one that has to (with `tasks` on the command line).
Each tool has an app, ui://asks/app, that is not in the list of resources."""

import base64
import json
import os
import select
import sys

TASKS = "tasks" in sys.argv[1:]
RELATED = "io.modelcontextprotocol/related-task"
CALLS: dict[object, "Call"] = {}  # all there ever were
ASKED: dict[object, tuple["Call", str]] = {}  # ids of requests that were not answered
RUNNING: dict[str, "Call"] = {}  # tasks by id
NEXT = iter(range(1000, 1_000_000))


def write(**message: object) -> None:
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    sys.stdout.flush()


class Call:
    """One call, and how far it is."""

    def __init__(self, ident: object, arguments: dict, task: str = "") -> None:
        self.ident, self.task = ident, task
        self.steps = list(arguments.get("steps", ()))
        self.late = arguments.get("late", False)
        self.answers: dict[str, object] = {}
        self.progress: list[object] = []
        self.open: dict[object, str] = {}  # its asks, id → key
        self.later: dict = {}  # the step of that name
        self.path = ""  # what it holds for
        self.wanted: list[str] = []  # keys that the step waits for
        self.waiting = self.holding = self.cancelled = self.over = False
        self.end: dict = {}  # of a task
        self.collectors: list[object] = []  # the ids of tasks/result that wait

    def go(self) -> None:
        """Carry out steps until one has to wait."""
        self.waiting = self.holding = False
        while self.steps and not self.over:
            step = self.steps.pop(0)
            if self.do(step):
                return
        if not self.over:
            self.done({"result": result({"answers": self.answers, "progress": self.progress})})

    def do(self, step: dict) -> bool:
        """Whether the call has to wait now."""
        if "ask" in step:
            self.ask(step["ask"], step.get("keys", "hint"))
            self.wanted = step.get("wait", list(step["ask"]))
            self.waiting = bool(self.wanted)
        elif "take_back" in step:
            for ident in [ident for ident, key in self.open.items() if key in step["take_back"]]:
                del self.open[ident], ASKED[ident]
                write(method="notifications/cancelled", params={"requestId": ident})
        elif "hold" in step:
            self.path = step["hold"]
            self.holding = not self.cancelled and not os.path.exists(self.path)
        elif "awaited" in step:
            self.wanted, self.waiting = [], not self.collectors
        elif "say" in step:
            text = json.dumps(step["say"]).replace('"@ID@"', json.dumps(self.ident))
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
        elif "error" in step:
            self.done({"error": step["error"]})
        elif "fail" in step:
            self.done(
                {"result": {"content": [{"type": "text", "text": step["fail"]}], "isError": True}}
            )
        elif "exit" in step:
            os._exit(step["exit"])
        elif "later" in step:
            self.later = step
        return self.waiting or self.holding

    def ask(self, asks: dict, keys: str) -> None:
        for key, (method, params) in asks.items():
            ident: object = key if keys == "ids" else next(NEXT)
            meta = dict(params.get("_meta", {}))
            if keys == "hint":
                meta["atrax/inputKey"] = key
            if self.task:
                meta[RELATED] = {"taskId": self.task}
            self.open[ident] = key
            ASKED[ident] = (self, key)
            write(id=ident, method=method, params={**params, **({"_meta": meta} if meta else {})})

    def done(self, end: dict) -> None:
        """Answer, or keep the answer of a task for who asks for it."""
        self.over = True
        if self.task:
            self.end = end
            for ident in self.collectors:
                write(id=ident, **end)
        else:
            if not self.cancelled or self.late:
                write(id=self.ident, **end)
        if self.later and "at" not in self.later:
            self.ask(self.later["later"], "hint")
            self.later = {}

    def look(self) -> bool:
        """See whether the file is there that it waits for; whether it waits for one."""
        if self.holding and os.path.exists(self.path):
            self.go()
        elif self.over and self.later and os.path.exists(self.later["at"]):
            self.ask(self.later["later"], "hint")
            self.later = {}
        return self.holding or bool(self.over and self.later)

    def answered(self, ident: object, key: str, answer: object) -> None:
        self.open.pop(ident, None)
        self.answers[key] = answer
        if self.waiting and self.wanted and all(key in self.answers for key in self.wanted):
            self.go()


def result(values: dict) -> dict:
    return {"content": [{"type": "text", "text": json.dumps({"pid": os.getpid(), **values})}]}


def tool(name: str, support: str) -> dict:
    item: dict = {
        "name": name,
        "description": "Asks as it is told",
        "inputSchema": {"type": "object"},
        "_meta": {"ui": {"resourceUri": "ui://asks/app"}},
    }
    if support:
        item["execution"] = {"taskSupport": support}
    return item


TOOLS = [tool("act", "")]
TOOLS += [tool("job", "optional"), tool("must", "required")] if TASKS else []


def state(task: str) -> dict:
    """A Task of 2025-11-25."""
    call, moment = RUNNING[task], "2025-11-25T00:00:00Z"
    status = "working"
    if call.cancelled:
        status = "cancelled"
    elif call.over:
        status = "completed"
    elif call.open:
        status = "input_required"
    return {
        "taskId": task,
        "status": status,
        "createdAt": moment,
        "lastUpdatedAt": moment,
        "ttl": None,
    }


def call_tool(ident: object, params: dict) -> None:
    name, arguments = params["name"], params.get("arguments", {})
    if "task" in params:
        task = base64.b16encode(os.urandom(8)).decode()
        call = RUNNING[task] = Call(ident, arguments, task)
        write(id=ident, result={"task": state(task)})
        call.go()
    elif name == "must":
        write(id=ident, error={"code": -32601, "message": "this tool has to be called as a task"})
    else:
        call = CALLS[ident] = Call(ident, arguments)
        call.go()


def on_task(ident: object, method: str, params: dict) -> None:
    task = params.get("taskId", "")
    if method == "tasks/list":
        write(id=ident, result={"tasks": [state(task) for task in RUNNING]})
    elif task not in RUNNING:
        write(id=ident, error={"code": -32602, "message": "unknown task"})
    elif method == "tasks/result":
        call = RUNNING[task]
        call.collectors.append(ident)
        if call.over:
            write(id=ident, **call.end)
        elif call.waiting and not call.wanted:
            call.go()
    else:
        if method == "tasks/cancel":
            RUNNING[task].cancelled = True
            if RUNNING[task].holding:
                RUNNING[task].go()
        write(id=ident, result=state(task))


def request(ident: object, method: str, params: dict) -> None:
    if method == "initialize":
        capabilities: dict = {"tools": {}, "resources": {}}
        if TASKS:
            capabilities["tasks"] = {"requests": {"tools": {"call": {}}}, "list": {}, "cancel": {}}
        info = {"name": "asks", "version": "1"}
        answer = {"protocolVersion": "2025-11-25", "capabilities": capabilities, "serverInfo": info}
        write(id=ident, result=answer)
    elif method == "tools/list":
        write(id=ident, result={"tools": TOOLS})
    elif method == "resources/list":
        write(id=ident, result={"resources": []})
    elif method == "resources/read" and params["uri"] == "ui://asks/app":
        page = {"uri": params["uri"], "mimeType": "text/html;profile=mcp-app", "text": "<p>app</p>"}
        write(id=ident, result={"contents": [page]})
    elif method == "resources/read":
        data = {"uri": params["uri"]}
        write(id=ident, error={"code": -32002, "message": "Resource not found", "data": data})
    elif method == "tools/call":
        call_tool(ident, params)
    elif method.startswith("tasks/") and TASKS:
        on_task(ident, method, params)
    elif method == "ping":
        write(id=ident, result={})
    else:
        write(id=ident, error={"code": -32601, "message": "Method not found"})


def response(message: dict) -> None:
    call, key = ASKED.pop(message["id"], (None, ""))
    if call is None:
        sys.stderr.write(f"an answer to nothing: {json.dumps(message)}\n")
        return
    answer = message["result"] if "result" in message else {"error": message["error"]}
    sys.stderr.write(f"{key} got {json.dumps(answer)}\n")
    sys.stderr.flush()
    call.answered(message["id"], key, answer)


def notice(method: str, params: dict) -> None:
    if method == "notifications/cancelled":
        call = CALLS.get(params["requestId"])
        if call is not None:
            call.cancelled = True
            if call.holding:
                call.go()
    elif method == "notifications/progress":
        for call in [*CALLS.values(), *RUNNING.values()]:
            call.progress.append(params)


def receive(message: dict) -> None:
    if "method" not in message:
        response(message)
    elif "id" in message:
        request(message["id"], message["method"], message.get("params", {}))
    else:
        notice(message["method"], message.get("params", {}))


def main() -> None:
    rest, looking = b"", False
    while True:
        if select.select([0], [], [], 0.01 if looking else None)[0]:
            chunk = os.read(0, 1 << 16)
            if not chunk:
                return
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                receive(json.loads(line))
        looks = [call.look() for call in [*CALLS.values(), *RUNNING.values()]]
        looking = any(looks)


if __name__ == "__main__":
    main()
