"""What a process that reads strangers' bytes gives up before the first one: Linux's own means.

Whatever the kernel or the container does not grant is done without; the limits of memory, files and
processes hold everywhere. Nothing can be taken back, not even by code that an attacker runs.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys

PR_SET_PDEATHSIG = 1
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWNET = 0x4000_0000

ALLOWED_CALLS = {
    "read": 0,
    "write": 1,
    "close": 3,
    "fstat": 5,
    "lseek": 8,
    "mmap": 9,
    "mprotect": 10,
    "munmap": 11,
    "brk": 12,
    "rt_sigaction": 13,
    "rt_sigprocmask": 14,
    "rt_sigreturn": 15,
    "readv": 19,
    "writev": 20,
    "sched_yield": 24,
    "mremap": 25,
    "madvise": 28,
    "getpid": 39,
    "exit": 60,
    "gettimeofday": 96,
    "futex": 202,
    "restart_syscall": 219,
    "clock_gettime": 228,
    "exit_group": 231,
    "getrandom": 318,
}
"""System calls with which Python and Pillow turn bytes into pixels, as x86-64 numbers them."""

AUDIT_ARCH_X86_64 = 0xC000_003E
KILL_PROCESS = 0x8000_0000
ALLOW = 0x7FFF_0000
ERRNO = 0x0005_0000
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
NUMBER_AT, ARCHITECTURE_AT = 0, 4
"""Offsets in the kernel's `struct seccomp_data`."""


class FilterProgram(ctypes.Structure):
    """The kernel's `struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def confine(memory_bytes: int, cpu_s: int) -> bool:
    """Keep from here on to the open files, to so many bytes more than are used now, and to so much
    processor time in all.

    False where system calls cannot be filtered.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # A user of its own first: without that only root may leave the network.
        libc.unshare(CLONE_NEWUSER | CLONE_NEWNET)
        limit(resource.RLIMIT_AS, address_space_bytes() + memory_bytes)
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
        limit(kind, 0)
    limit(resource.RLIMIT_NOFILE, 3)
    limit(resource.RLIMIT_CPU, cpu_s)
    if sys.platform != "linux":
        return False
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return platform.machine() == "x86_64" and install_filter(libc)


def limit(kind: int, value: int) -> None:
    """For good: the hard limit too."""
    resource.setrlimit(kind, (value, value))


def address_space_bytes() -> int:
    """What the process has mapped, used or not."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def install_filter(libc: ctypes.CDLL) -> bool:
    """Refuse every system call but the allowed ones, as if permission were missing.

    False where the kernel does not: it was built without, or is only imitated.
    """
    code = filter_code()
    program = FilterProgram(len(code) // 8, code)
    failed: int = libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)
    return not failed


def filter_code() -> bytes:
    """Classic BPF: eight bytes an instruction, jumps counted in instructions."""
    numbers = sorted(ALLOWED_CALLS.values())
    checks = [
        instruction(JUMP_IF_EQUAL, number, if_equal=len(numbers) - index)
        for index, number in enumerate(numbers)
    ]
    return b"".join(
        [
            instruction(LOAD, ARCHITECTURE_AT),
            instruction(JUMP_IF_EQUAL, AUDIT_ARCH_X86_64, if_equal=1),
            instruction(RETURN, KILL_PROCESS),
            instruction(LOAD, NUMBER_AT),
            *checks,
            instruction(RETURN, ERRNO | 1),  # EPERM
            instruction(RETURN, ALLOW),
        ]
    )


def instruction(code: int, operand: int, if_equal: int = 0) -> bytes:
    """One `struct sock_filter`; a comparison that fails goes on with the next."""
    return struct.pack("=HBBI", code, if_equal, 0, operand)
