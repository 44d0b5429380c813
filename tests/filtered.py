"""Runs atrax.pyz under a filter of system calls as systemd makes one: those that FILTER names are allowed, all
others get EPERM (SystemCallFilter, SystemCallErrorNumber). ATRAX is the archive. Needs libseccomp, as systemd does."""

import ctypes
import errno
import os
import sys

ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM

library = ctypes.CDLL("libseccomp.so.2")
library.seccomp_init.restype = ctypes.c_void_p
rules = ctypes.c_void_p(library.seccomp_init(REFUSE))
for name in os.environ["FILTER"].split():
    number = library.seccomp_syscall_resolve_name(name.encode())
    if number >= 0:  # else it is of another processor, or newer than the library
        library.seccomp_rule_add(rules, ALLOW, number, 0)
if library.seccomp_load(rules) != 0:
    sys.exit("filtered: the filter cannot be loaded")
os.execv(sys.executable, [sys.executable, os.environ["ATRAX"], *sys.argv[1:]])
