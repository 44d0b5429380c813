"""Runs another child in its own process, and writes down what it hears and says: tap.py FOLDER SCRIPT ARGUMENTS…

The first LINES lines go to a file of this process in FOLDER: ">" and what the child read, "<" and what it wrote.
Its descriptors, process id and arguments are those that it would have without the tap; nothing is read ahead of it."""

import os
import sys
import time

FOLDER, SCRIPT = sys.argv[1:3]
LINES = 2000  # the rest of a stampede says nothing new, and would have to be judged as well
FILE = os.path.join(FOLDER, f"{time.time_ns()}-{os.getpid()}")


class Tape:
    """One direction, line by line, however it is cut."""

    def __init__(self, mark):
        self.mark, self.rest, self.left = mark, b"", LINES

    def take(self, data):
        if isinstance(data, str):
            data = data.encode(errors="replace")
        if not self.left or not data:
            return
        *lines, self.rest = (self.rest + data).split(b"\n")
        lines = lines[: self.left]
        self.left -= len(lines)
        if lines:
            # Opened for each line: an open file would be one descriptor more, and a kill would lose what is unwritten.
            with open(FILE, "ab") as file:
                file.write(b"".join(self.mark + line + b"\n" for line in lines))


class Tapped:
    """A text or binary stream whose lines are written down; everything else is as it is."""

    def __init__(self, stream, tape):
        self._stream, self._tape = stream, tape
        if hasattr(stream, "buffer"):
            self.buffer = Tapped(stream.buffer, tape)

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def __iter__(self):
        return self

    def __next__(self):
        return self._took(next(self._stream))

    def readline(self, *size):
        return self._took(self._stream.readline(*size))

    def write(self, data):
        # Before it is out: who reads it may kill us at once.
        self._tape.take(data)
        return self._stream.write(data)

    def _took(self, data):
        self._tape.take(data)
        return data


HEARD, SAID = Tape(b">"), Tape(b"<")
read, write = os.read, os.write


def tapped_read(descriptor, size):
    data = read(descriptor, size)
    if descriptor == 0:
        HEARD.take(data)
    return data


def tapped_write(descriptor, data):
    written = write(descriptor, data)
    if descriptor == 1:
        SAID.take(bytes(data[:written]))
    return written


if __name__ == "__main__":
    sys.stdin, sys.stdout = Tapped(sys.stdin, HEARD), Tapped(sys.stdout, SAID)
    os.read, os.write = tapped_read, tapped_write
    sys.argv = sys.argv[2:]
    # By hand and not by runpy, which costs each of fifty children 10 ms.
    main = sys.modules["__main__"] = type(sys)("__main__")
    main.__file__ = SCRIPT
    with open(SCRIPT, "rb") as file:
        program = compile(file.read(), SCRIPT, "exec")
    exec(program, main.__dict__)
