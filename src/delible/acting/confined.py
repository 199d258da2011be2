"""The inside of the sandbox: run as a script, it gives up what it may do and then runs a program.

    limits -> namespaces, where allowed -> Landlock -> seccomp -> a byte to who waits -> program

It imports the standard library alone, since it runs without anything else. Each step is the
kernel's own interface (Linux 6.2 or newer), none can be taken back, and if one fails the program
is never read. What remains is one process, its threads, its three pipes, and reading the standard
library; a list says which system calls there are, so a call that nobody thought of is refused.

Called as ``confined.py PROGRAM FD SECONDS BYTES``.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType

#: Exit codes of a program that was refused something, or had too little memory.
FORBIDDEN, MEMORY = 77, 78
#: The first Landlock that also holds `truncate` back.
LANDLOCK = 3
#: What one thread's stack, and the first thread's, may be.
STACK_BYTES = 64 * 2**20
OPEN_FILES = 32

_NO_NEW_PRIVILEGES, _SECCOMP, _PARENT_DEATH = 38, 22, 1
_CREATE, _ADD, _RESTRICT = 444, 445, 446  # of Landlock, alike on every processor
_USER, _NETWORK, _IPC = 0x10000000, 0x40000000, 0x08000000
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_ALLOW, _REFUSE, _UNKNOWN, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
_THREAD, _NAMESPACES = 0x00010000, 0x7E020080

#: Number of the architecture, and of each system call, on (x86-64, 64-bit ARM); 0: there is none.
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
CALLS: dict[str, tuple[int, int]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66),
    "pread64": (17, 67), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "madvise": (28, 233), "mremap": (25, 216), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "dup": (32, 23), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "uname": (63, 160), "getcwd": (79, 17), "exit": (60, 93), "exit_group": (231, 94),
    "futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293),
    "set_tid_address": (218, 96), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "gettimeofday": (96, 169),
    "times": (100, 153), "getrusage": (98, 165), "getrandom": (318, 278), "openat": (257, 56),
    "newfstatat": (262, 79), "statx": (332, 291), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlinkat": (267, 78), "getdents64": (217, 61), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "restart_syscall": (219, 128), "membarrier": (324, 283),
    "ppoll": (271, 73), "pselect6": (270, 72), "open": (2, 0), "stat": (4, 0), "lstat": (6, 0),
    "access": (21, 0), "readlink": (89, 0), "poll": (7, 0), "select": (23, 0), "time": (201, 0),
    "getdents": (78, 0),
}  # fmt: skip
#: Allowed with some arguments: which one, and its values.
PARTLY: dict[str, tuple[tuple[int, int], int, tuple[int, ...]]] = {
    # no F_SETOWN and F_SETSIG, by which a signal could be sent to another process
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 4, 1030)),
    "ioctl": ((16, 29), 1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
    "prlimit64": ((302, 261), 2, (0,)),  # a limit may be read
}
_CLONE, _CLONE3 = (56, 220), (435, 435)


class _Beneath(ctypes.Structure):
    """A rule of Landlock."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


class _Program(ctypes.Structure):
    """A filter's program."""

    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def _kernel() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _must(done: int, what: str) -> int:
    if done < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return done


def _call(number: int, *arguments: object) -> int:
    plain = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return int(_kernel().syscall(ctypes.c_long(number), *plain))


def bound(seconds: int, memory_bytes: int) -> None:
    """Limits that the kernel counts; memory besides what this process takes already."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    memory_bytes += pages * resource.getpagesize()
    for what, most, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),  # first told, then killed
        (resource.RLIMIT_AS, memory_bytes, memory_bytes),
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES),
        (resource.RLIMIT_STACK, min(STACK_BYTES, memory_bytes), memory_bytes),
    ):
        ceiling = resource.getrlimit(what)[1]
        if ceiling != resource.RLIM_INFINITY:
            most, hard = min(most, ceiling), min(hard, ceiling)
        resource.setrlimit(what, (most, hard))


def alone() -> bool:
    """Dies with who waits; namespaces without a network, where that is allowed (a second wall)."""
    kernel = _kernel()
    _must(kernel.prctl(_PARENT_DEATH, 9, 0, 0, 0), "the signal of the parent's death")
    return kernel.unshare(_USER | _NETWORK | _IPC) == 0


def readable() -> list[Path]:
    """The standard library, entry by entry, without what is installed beside it."""
    found = []
    for folder in {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}:
        if folder is not None:
            found += [one for one in Path(folder).iterdir() if not one.name.endswith("-packages")]
    return sorted(found)


def only_reading(paths: list[Path]) -> None:
    """No file of the machine but these, and these only to be read.

    Raises:
        OSError: This kernel has no Landlock, or one that is too old.
    """
    version = _must(_call(_CREATE, 0, 0, 1), "Landlock")
    if version < LANDLOCK:
        raise OSError(f"Landlock {version}, and {LANDLOCK} is needed (Linux 6.2)")
    files = (1 << (16 if version >= 5 else 15)) - 1
    fields = [files, 3, 3][: 1 + (version >= 4) + (version >= 6)]
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    rules = _must(_call(_CREATE, ctypes.c_char_p(attributes), len(attributes), 0), "Landlock")
    for path in paths:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = _Beneath(_READ_FILE | (_READ_DIR if path.is_dir() else 0), place)
        _must(_call(_ADD, rules, 1, ctypes.byref(rule), 0), f"Landlock, {path.name}")
        os.close(place)
    _must(_kernel().prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no new privileges")
    _must(_call(_RESTRICT, rules, 0), "Landlock")
    os.close(rules)


def filter_of(machine: str) -> bytes:
    """The program of the filter: what it lists is allowed, all else refused.

    Raises:
        OSError: The numbers of this processor's system calls are not known here.
    """
    if machine not in MACHINES:
        raise OSError(f"the system calls of {machine} are not known here")
    architecture, column = MACHINES[machine]
    code: list[bytes] = []

    def put(operation: int, value: int, yes: int = 0, no: int = 0) -> None:
        code.append(struct.pack("=HBBI", operation, yes, no, value))

    load, equal, at_least, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06
    put(load, 4)
    put(equal, architecture, 1, 0)
    put(end, _KILL)
    put(load, 0)
    put(at_least, 0x40000000, 0, 1)  # x32
    put(end, _KILL)
    for numbers in CALLS.values():
        if numbers[column] or numbers is CALLS["read"]:
            put(equal, numbers[column], 0, 1)
            put(end, _ALLOW)
    put(equal, _CLONE3[column], 0, 1)
    put(end, _UNKNOWN)  # its flags cannot be read, and who is told so takes clone
    put(equal, _CLONE[column], 0, 6)
    put(load, 16)
    put(any_bit, _NAMESPACES, 0, 1)
    put(end, _REFUSE)
    put(any_bit, _THREAD, 0, 1)
    put(end, _ALLOW)
    put(end, _REFUSE)
    for numbers, argument, values in PARTLY.values():
        place = 16 + 8 * argument
        checks = len(values)
        put(equal, numbers[column], 0, 2 * checks + 4)
        put(load, place + 4)  # the upper half
        put(equal, 0, 0, 2 * checks + 1)
        put(load, place)
        for value in values:
            put(equal, value, 0, 1)
            put(end, _ALLOW)
        put(end, _REFUSE)
    put(end, _REFUSE)
    return b"".join(code)


def only_these_calls() -> None:
    """From here on there are only the system calls of the list."""
    code = filter_of(platform.machine())
    program = _Program(len(code) // 8, code)
    _must(_kernel().prctl(_SECCOMP, 2, ctypes.byref(program), 0, 0), "seccomp")


def run(source: str, name: str) -> int:
    """Runs a program as the main module; its exit code."""
    main = ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    main.__dict__.update(exit=sys.exit, quit=sys.exit)
    sys.modules["__main__"], sys.argv = main, [name]
    try:
        exec(compile(source, name, "exec"), main.__dict__)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return 0 if end.code is None else end.code if isinstance(end.code, int) else 1
    except MemoryError:
        return MEMORY
    except BaseException as error:
        frames = error.__traceback__.tb_next if error.__traceback__ else None  # without this one
        traceback.print_exception(type(error), error, frames, limit=-4)
        return FORBIDDEN if isinstance(error, PermissionError) else 1
    return 0


def main(program: str, told: str, seconds: str, memory_bytes: str) -> int:
    """Confines this process, says so on a pipe, and runs the program."""
    # read now what could not be read later: modules of the library that need other libraries
    for name in ("hashlib", "decimal", "zlib", "random", "threading", "heapq"):
        try:
            __import__(name)
        except ImportError:
            continue
    waits = int(told)
    try:
        path = Path(program)
        source = path.read_text(encoding="utf-8")
        readings = [*readable(), path.parent]
        bound(int(seconds), int(memory_bytes))
        alone()
        only_reading(readings)
        only_these_calls()
    except Exception as error:
        os.write(waits, f"{error}".encode())
        return 1
    os.write(waits, b"\0")
    os.close(waits)
    return run(source, path.name)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:5]))
