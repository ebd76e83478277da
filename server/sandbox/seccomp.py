"""Seccomp filter, namespaces and resource limits of the process that decodes untrusted pictures.

The seccomp filter and the namespaces are optional, because some kernels and containers refuse them.
The limits of memory, files and processes hold everywhere. None of this can be undone, so it binds
an attacker's code too.
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
"""System calls that Python and Pillow need to decode, with their numbers on x86-64."""

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
    """Restrict this process to its open files, `memory_bytes` more than now, and CPU time in all.

    Returns whether a seccomp filter is installed.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # Without a user namespace only root may create a network namespace.
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
    """Set the soft and the hard limit, so that the process cannot raise it again."""
    resource.setrlimit(kind, (value, value))


def address_space_bytes() -> int:
    """Mapped memory of this process, used or not."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def install_filter(libc: ctypes.CDLL) -> bool:
    """Answer every system call but the allowed ones with EPERM.

    False where the kernel has no seccomp, or is emulated.
    """
    code = filter_code()
    program = FilterProgram(len(code) // 8, code)
    failed: int = libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)
    return not failed


def filter_code() -> bytes:
    """The filter in classic BPF: eight bytes an instruction, jumps counted in instructions."""
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
    """One `struct sock_filter`. After a false comparison the next instruction runs."""
    return struct.pack("=HBBI", code, if_equal, 0, operand)
