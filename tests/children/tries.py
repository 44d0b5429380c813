"""A legacy child that tries what a sandbox is to stop: each tool is one act, and answers "done …" or the errno's name.

read, write, append, truncate, make, remove, rename, link, symlink, run, list, chmod, chown, touch, label   files
connect     to a `port` by `kind` (tcp, udp, tcp6), or to a Unix socket by `path` (abstract where it begins with @)
dgram       sends to the Unix socket `path` by one end of a pair of datagram sockets
io_uring    sets up a ring
fork, fill, open   without end, until the kernel says no; they hold what they got
ptrace, peek, limit, nice   at the process `pid`
kill        the process `pid` with `signal`
setns, unshare, mount, keyring, clone3   leaves its namespaces, mounts, …
foreign     makes a system call of the 32-bit numbers; reboot tries just that (an invalid one)
memory      its limits; spawn runs a helper and gives back what it printed; pid its own"""

import ctypes
import errno
import json
import os
import platform
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

LIBC = ctypes.CDLL(None, use_errno=True)
ARM = platform.machine() == "aarch64"
HELD: list = []  # what must not be let go


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def call(x86: int, arm: int, *arguments: object) -> int:
    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return checked(LIBC.syscall(ctypes.c_long(arm if ARM else x86), *words))


def read(path: str) -> str:
    with open(path, "rb") as file:
        return file.read(100).decode(errors="replace")


def write(path: str, text: str = "written", mode: str = "w") -> None:
    with open(path, mode) as file:
        file.write(text)


def connect(kind: str = "", port: int = 0, path: str = "") -> None:
    if path:
        with socket.socket(socket.AF_UNIX) as unix:
            unix.connect("\0" + path[1:] if path.startswith("@") else path)
        return
    family = socket.AF_INET6 if kind == "tcp6" else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM) as one:
        one.settimeout(5)
        one.connect(("::1" if kind == "tcp6" else "127.0.0.1", port))
        one.send(b"hello")


def dgram(path: str, kind: int = socket.SOCK_DGRAM) -> None:
    one, other = socket.socketpair(socket.AF_UNIX, kind)
    with one, other:
        one.sendto(b"hello", path)


def pair() -> None:
    one, other = socket.socketpair()
    one.close()
    other.close()


def fork() -> str:
    """Sleepers until no more can be made; in threads too they would count."""
    for number in range(10_000):
        try:
            pid = os.fork()
        except OSError as error:
            return f"{errno.errorcode[error.errno]} after {number}"
        if pid == 0:
            time.sleep(600)
            os._exit(0)
        HELD.append(pid)
    return "done"


def fill() -> str:
    LIBC.prctl(
        15, b"\xff\xfe"
    )  # PR_SET_NAME: who looks at its limits must not stumble over the name
    for number in range(10_000):
        try:
            HELD.append(bytearray(2**20))
        except MemoryError:
            return f"ENOMEM after {number}"
    return "done"


def fill_and_crash() -> None:
    fill()
    os.abort()


def open_files() -> str:
    for number in range(100_000):
        try:
            HELD.append(os.open("/dev/null", os.O_RDONLY))
        except OSError as error:
            return f"{errno.errorcode[error.errno]} after {number}"
    return "done"


def peek(pid: int) -> None:
    """Read memory of another process."""
    into = ctypes.create_string_buffer(8)
    here = (ctypes.c_void_p * 2)(ctypes.addressof(into), 8)
    there = (ctypes.c_void_p * 2)(0x400000, 8)
    call(310, 270, pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)


def limit(pid: int) -> None:
    call(302, 261, pid, 0, ctypes.byref((ctypes.c_ulong * 2)(1, 1)), 0)


def setns(path: str) -> None:
    checked(LIBC.setns(os.open(path, os.O_RDONLY), 0))


def nice(pid: int = 0, which: int = os.PRIO_PROCESS) -> None:
    """As nice as it is: to have asked changes nothing."""
    os.setpriority(which, pid, os.getpriority(which, pid))


def rename_itself() -> None:
    """A name that is no text in any encoding."""
    checked(LIBC.prctl(15, b"\xff\xfe)"))


def flag(path: str) -> None:
    """Set the file's inode flags to what they are (FS_IOC_SETFLAGS), by a descriptor that only reads."""
    import fcntl

    with open(path, "rb") as file:
        flags = fcntl.ioctl(file, 0x80086601, bytes(8))
        fcntl.ioctl(file, 0x40086602, flags)


def huge_environment() -> str:
    """A grandchild in a session of its own, orphaned, that calls 1 GiB its environment (PR_SET_MM_MAP); its pid."""
    import mmap

    # Its own are its parent's: the sandbox lets nobody read /proc/self but that.
    with open("/proc/self/stat", "rb") as file:
        stat = [0, *map(int, file.read().rpartition(b")")[2].split()[1:])]  # from field 3 on
    reader, writer = os.pipe()
    if os.fork() == 0:
        if os.fork():
            os._exit(0)
        os.setsid()
        large, flags = 2**30, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        LIBC.mmap.restype = LIBC.sbrk.restype = ctypes.c_void_p
        at = LIBC.mmap(None, ctypes.c_size_t(large), mmap.PROT_READ, flags, -1, ctypes.c_long(0))
        code, data, args = stat[23:25], stat[42:44], stat[45:47]
        fields = [*code, *data, stat[44], LIBC.sbrk(0), stat[25], *args, at, at + large]
        words = struct.pack("11QQIi", *fields, 0, 0, -1)
        done = LIBC.prctl(35, 14, words, ctypes.c_ulong(len(words)), 0)
        said = str(os.getpid()) if done == 0 else errno.errorcode[ctypes.get_errno()]
        os.write(writer, said.encode())
        time.sleep(600)
        os._exit(0)
    os.close(writer)
    os.wait()
    return os.read(reader, 100).decode()


def foreign() -> None:
    """getpid by the 32-bit entry of x86-64."""
    import mmap

    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # mov eax, 20; int 0x80; ret
    ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()


def spawn(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return f"{done.returncode} {done.stdout}{done.stderr}"


def helper() -> str:
    """A helper of its own, which it may end."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    os.kill(process.pid, signal.SIGTERM)
    return str(process.wait())


def thread() -> None:
    one = threading.Thread(target=lambda: None)
    one.start()
    one.join()


def daemon() -> str:
    """A grandchild that forgets whose it is, in a session of its own; its pid."""
    sleep = "import time; time.sleep(600)"
    code = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-S', '-c', {sleep!r}]).pid, flush=True)"
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout
    pid = process.stdout.readline().decode().strip()
    process.wait()
    return pid


ACTS = {
    "read": read,
    "write": write,
    "append": lambda path: write(path, mode="a"),
    "truncate": lambda path: os.truncate(path, 0),
    "make": os.mkdir,
    "remove": os.remove,
    "rename": os.rename,
    "link": os.link,
    "symlink": os.symlink,
    "run": lambda path: spawn([path]),
    "list": os.listdir,
    "chmod": lambda path: os.chmod(path, 0o777),
    "chown": lambda path: os.chown(path, os.getuid(), os.getgid()),
    "touch": lambda path: os.utime(path, (1, 1)),
    "label": lambda path: os.setxattr(path, "user.atrax", b"was here"),
    "connect": connect,
    "dgram": dgram,
    "pair": pair,
    "io_uring": lambda: call(425, 425, 1, ctypes.create_string_buffer(256)),
    "fork": fork,
    "fill": fill,
    "fill_and_crash": fill_and_crash,
    "open": open_files,
    "ptrace": lambda pid: call(101, 117, 16, pid, 0, 0),  # PTRACE_ATTACH
    "peek": peek,
    "limit": limit,
    "nice": nice,
    "nice_io": lambda: call(251, 30, 3, 0, 2 << 13),  # IOPRIO_WHO_USER
    "rename_itself": rename_itself,
    "flag": flag,
    "huge_environment": huge_environment,
    "kill": lambda pid, signal=9: os.kill(pid, signal),
    "thread_kill": lambda pid: call(234, 131, pid, pid, 9),  # tgkill
    "setns": setns,
    "unshare": lambda: checked(LIBC.unshare(0x10000000)),
    "clone": lambda: call(56, 220, 0x10000000 | 17, 0, 0, 0, 0),
    "mount": lambda path: checked(LIBC.mount(b"none", path.encode(), b"tmpfs", 0, None)),
    "keyring": lambda: call(250, 219, 0, -3, 1),
    "foreign": foreign,
    "reboot": lambda: call(169, 142, 0, 0, 0, 0),
    "helper": helper,
    "thread": thread,
    "daemon": daemon,
    "spawn": spawn,
    "pid": os.getpid,
    "cwd": os.getcwd,
    "status": lambda: read_all("/proc/self/status"),
    "limits": lambda: read_all("/proc/self/limits"),
}


def read_all(path: str) -> str:
    with open(path) as file:
        return file.read()


def answer(ident: object, result: object) -> None:
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", "id": ident, "result": result}) + "\n")
    sys.stdout.flush()


def attempt(act: str, arguments: dict) -> str:
    try:
        got = ACTS[act](**arguments)
        shown = json.dumps(got) if isinstance(got, list) else "" if got is None else str(got)
        return f"done {shown}".strip()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))


for line in sys.stdin:
    message = json.loads(line)
    method, ident, params = message.get("method"), message.get("id"), message.get("params", {})
    if method == "initialize":
        answer(
            ident,
            {
                "protocolVersion": params["protocolVersion"],
                "capabilities": {"tools": {}},
                "serverInfo": {"name": "tries", "version": "1"},
            },
        )
    elif method == "tools/list":
        schema = {"type": "object"}
        answer(ident, {"tools": [{"name": name, "inputSchema": schema} for name in ACTS]})
    elif method == "tools/call":
        text = attempt(params["name"], params.get("arguments", {}))
        answer(ident, {"content": [{"type": "text", "text": text}]})
    elif ident is not None:
        error = {"code": -32601, "message": "no such method"}
        sys.stdout.write(json.dumps({"jsonrpc": "2.0", "id": ident, "error": error}) + "\n")
        sys.stdout.flush()
