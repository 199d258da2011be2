"""The sandbox, attacked: everything but computing fails, and is told apart."""

import ctypes
import os
import platform
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from delible.acting import confined, sandbox
from delible.acting.sandbox import Limits, run
from delible.errors import RunError

REASON = sandbox.why_not()
confines = pytest.mark.skipif(
    REASON is not None, reason=f"programs are not confined here: {REASON}"
)


@confines
def test_what_only_computes_runs_with_its_input():
    found = run(
        "import heapq, hashlib, decimal\nprint(input()[::-1], heapq.nsmallest(1, [2, 1]))", "ab\n"
    )
    assert (found.ended, found.output, found.errors) == ("finished", "ba [1]\n", "")
    assert 0 < found.seconds < 5


@confines
def test_long_input_and_an_unread_one():
    assert run("import sys\nprint(len(sys.stdin.read()))", "x" * 3_000_000).output == "3000000\n"
    assert run("print(1)", "x" * 3_000_000).output == "1\n"


FILES = {
    "a file of the machine": "open('/etc/passwd').read()",
    "a folder": "import os; os.listdir('/')",
    "a file above the folder": "open('../x', 'w')",
    "its own program": "open(__import__('sys').argv[0], 'a')",
    "a new file beside it": "open('new', 'w')",
    "a new folder": "import os; os.mkdir('new')",
    "a temporary file": "open('/tmp/delible-sandbox-attack', 'w')",
    "shared memory": "open('/dev/shm/delible-sandbox-attack', 'w')",
    "a link out": "import os; os.symlink('/etc', 'out')",
    "a removal": "import os; os.remove(os.path.abspath('program.py'))",
    "other permissions": "import os; os.chmod(os.path.abspath('program.py'), 0o777)",
    "other times": "import os; os.utime(os.path.abspath('program.py'))",
    "a cut": "import os; os.truncate(os.path.abspath('program.py'), 0)",
    "the environment of the parent": "import os; open(f'/proc/{os.getppid()}/environ').read()",
    "the memory of the parent": "import os; open(f'/proc/{os.getppid()}/mem', 'rb')",
    "open files of the parent": "import os; os.listdir(f'/proc/{os.getppid()}/fd')",
    "another root": "import os; os.chroot('/')",
}
SOCKETS = {
    "a socket": "import socket; socket.create_connection(('127.0.0.1', 80), 1)",
    "a datagram": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "a local socket": "import socket; socket.socket(socket.AF_UNIX)",
    "a raw socket": "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "a pair": "import socket; socket.socketpair()",
}
PROCESSES = {
    "a fork": "import os; os.fork()",
    "a fork bomb": "import os\nwhile True: os.fork()",
    "a shell": "import os; os.execv('/bin/sh', ['sh'])",
    "a command": "import subprocess; subprocess.run(['true'])",
    "another process": "import multiprocessing as m; m.get_context('fork').Process().start()",
    "killing the parent": "import os; os.kill(os.getppid(), 9)",
    "killing everybody": "import os; os.kill(-1, 9)",
    "killing the group": "import os; os.killpg(0, 9)",
    "a limit of the parent": "import os, resource; resource.prlimit(os.getppid(), 0, (1, 1))",
    "a signal by a file": "import fcntl, os; fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    "another priority": "import os; os.nice(-5)",
}  # fmt: skip


@confines
@pytest.mark.parametrize("attack", [*FILES, *SOCKETS, *PROCESSES])
def test_what_is_not_computing_is_forbidden(attack):
    found = run(({**FILES, **SOCKETS, **PROCESSES})[attack] + "\nprint('got out')")
    assert "got out" not in found.output
    assert found.ended == "forbidden", found
    assert "PermissionError" in found.errors


RAW = """
import ctypes, os
kernel = ctypes.CDLL(None, use_errno=True)
def call(*given):
    found = kernel.syscall(*map(ctypes.c_long, given))
    print(found, ctypes.get_errno())
"""


@confines
@pytest.mark.parametrize(
    ("what", "given"),
    [
        ("ptrace", "101, 16, os.getppid(), 0, 0"),
        ("process_vm_readv", "310, os.getppid(), 0, 0, 0, 0, 0"),
        ("unshare", "272, 0x10000000"), ("mount", "165, 0, 0, 0, 0, 0"), ("bpf", "321, 0, 0, 0"),
        ("io_uring_setup", "425, 1, 0"), ("memfd_create", "319, 0, 0"), ("keyctl", "250, 0, 0"),
        ("pidfd_open", "434, os.getppid(), 0"), ("tgkill", "234, os.getppid(), os.getppid(), 9"),
        ("vfork", "58"), ("a clone that is no thread", "56, 17, 0, 0, 0, 0"),
        ("perf_event_open", "298, 0, 0, -1, -1, 0"), ("landlock_add_rule", "445, 0, 0, 0, 0"),
        ("a call of the future", "999"),
    ],
)  # fmt: skip
@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86-64")
def test_the_kernel_refuses_raw_calls_too(what, given):
    assert run(f"{RAW}call({given})").output == "-1 1\n"  # EPERM


@confines
def test_whom_it_runs_for_lives_on_and_nothing_is_left(tmp_path):
    run("import os; os.kill(os.getppid(), 9)")
    assert os.getpid() > 0
    before = {one.name for one in Path("/tmp").glob("delible-sandbox-*")}
    run("while True: pass", limits=Limits(seconds=1))
    assert {one.name for one in Path("/tmp").glob("delible-sandbox-*")} <= before


@confines
def test_an_interruption_leaves_nothing_running(monkeypatch):
    started = []
    real = subprocess.Popen

    def start(*given, **options):
        started.append(real(*given, **options))
        return started[-1]

    def interrupted(process):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(os, "pidfd_open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("import time; time.sleep(60)")
    assert [one.poll() for one in started] == [-9]


def test_both_sides_mean_the_same_by_exit_codes():
    assert (sandbox.FORBIDDEN, sandbox.MEMORY) == (confined.FORBIDDEN, confined.MEMORY)
    assert Path(confined.__file__) == sandbox.CONFINED


@confines
def test_endings_are_told_apart():
    small = Limits(seconds=1, output_bytes=10_000, megabytes=64)
    assert run("while True: pass", limits=small).ended == "time"
    deaf = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run(deaf, limits=small).ended == "time"
    assert run("x = bytearray(10**10)", limits=small).ended == "memory"
    assert run("x = []\nwhile True: x.append(bytearray(10**6))", limits=small).ended == "memory"
    loud = run("while True: print('x' * 1000)", limits=small)
    assert loud.ended == "output"
    assert len(loud.output) <= 10_000
    assert (
        run("import sys\nwhile True: sys.stderr.write('x' * 1000)", limits=small).ended == "output"
    )
    assert run("1 / 0", limits=small).ended == "raised"
    assert run("exit(3)", limits=small).ended == "raised"
    assert run("def", limits=small).ended == "raised"
    assert run("import ctypes; ctypes.string_at(0)", limits=small).ended == "crashed"
    assert run("exit()", limits=small).ended == "finished"


@confines
def test_limits_cannot_be_raised():
    for what in ("AS", "CPU", "FSIZE", "NOFILE", "STACK"):
        raised = run(f"import resource as r; r.setrlimit(r.RLIMIT_{what}, (-1, -1))")
        assert (raised.ended, "not allowed" in raised.errors) == ("raised", True), what


@confines
def test_one_that_sleeps_is_ended_by_the_clock(monkeypatch):
    monkeypatch.setattr(sandbox, "GRACE_SECONDS", 0.5)
    found = run(
        "import time, os\nos.close(1)\nos.close(2)\ntime.sleep(60)", limits=Limits(seconds=0.1)
    )
    assert found.ended == "time"


@confines
def test_threads_are_few_and_work():
    few = "import threading\nthreading.Thread(target=lambda: print('in')).start()"
    assert run(few).output == "in\n"
    many = (
        "import threading, time\nwhile True: threading.Thread(None, time.sleep, None, (1,)).start()"
    )
    assert run(many).ended == "raised"


@confines
def test_nothing_of_ours_is_handed_down(monkeypatch):
    monkeypatch.setenv("DELIBLE_TEST_SECRET", "7f3a")
    read, write = os.pipe()
    os.set_inheritable(read, True)
    found = run(
        "import os, sys\nopen_ = []\nfor one in range(64):\n"
        "    try: os.fstat(one)\n    except OSError: continue\n    open_.append(one)\n"
        "print(sorted(os.environ), open_, 'delible' in sys.modules, 'torch' in sys.modules)\n"
        "import importlib.util as u; print(u.find_spec('delible'), u.find_spec('pydantic'))"
    )
    os.close(read), os.close(write)
    first, second = found.output.splitlines()
    assert "[0, 1, 2] False False" in first
    assert "DELIBLE_TEST_SECRET" not in first
    assert "PATH" not in first
    assert second == "None None"


@confines
def test_installed_packages_are_not_among_what_is_read():
    names = {one.name for one in confined.readable()}
    assert "heapq.py" in names
    assert not any(name.endswith("-packages") for name in names)
    site = Path(pytest.__file__).resolve()
    assert run(f"open({str(site)!r})").ended == "forbidden"


@confines
def test_runs_do_not_depend_on_hashes_or_on_who_runs_beside():
    program = "print(list({'a', 'b', 'c', 'dd', 'ee'}))"
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(run(program).output)) for _ in range(3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(found) == 3
    assert len(set(found)) == 1


@confines
def test_a_program_cannot_pass_for_one_that_was_not_confined():
    found = run(
        "import os, sys\nfor one in range(3, 32):\n    try: os.write(one, b'x')\n"
        "    except OSError: pass\nsys.exit(1)"
    )
    assert found.ended == "raised"


# ---- where it cannot be held


def test_nothing_runs_where_a_program_cannot_be_confined(monkeypatch):
    monkeypatch.setattr(sandbox, "why_not", lambda: "this kernel has no Landlock")
    monkeypatch.setattr(sandbox, "_run", lambda *given: pytest.fail("it was run"))
    with pytest.raises(RunError, match="no Landlock"):
        run("print(1)")


def test_another_system_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    sandbox.why_not.cache_clear()
    try:
        assert "darwin" in (sandbox.why_not() or "")
    finally:
        sandbox.why_not.cache_clear()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux")
def test_a_kernel_that_can_confine_does():
    """Else every attack above would be skipped, whatever is broken."""
    kernel = ctypes.CDLL(None, use_errno=True)
    landlock = kernel.syscall(444, None, 0, 1)
    filters = Path("/proc/sys/kernel/seccomp/actions_avail")
    if landlock < 3 or not filters.exists() or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("this kernel has no Landlock or no filters")
    assert sandbox.why_not() is None


@pytest.mark.parametrize("step", ["only_reading", "only_these_calls", "bound", "alone"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux")
def test_a_step_that_fails_ends_it_before_the_program_is_run(step, tmp_path):
    program = tmp_path / "program.py"
    program.write_text("print('ran')")
    code = (
        "import os, sys, runpy\n"
        f"import importlib.util as u; s = u.spec_from_file_location('c', {confined.__file__!r})\n"
        "c = u.module_from_spec(s); s.loader.exec_module(c)\n"
        f"def fails(*given): raise OSError('not here')\nc.{step} = fails\n"
        "told, tells = os.pipe()\n"
        f"code = c.main({str(program)!r}, str(tells), '5', str(2**29))\n"
        "sys.stdout.write(f'{code} {os.read(told, 99)}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "1 b'not here'", done


@confines
def test_a_confinement_that_does_not_hold_is_noticed(monkeypatch):
    real = sandbox._run
    leaky = "print('read')\nprint('confined')"
    monkeypatch.setattr(sandbox, "_run", lambda program, given, limits: real(leaky, given, limits))
    sandbox.why_not.cache_clear()
    try:
        assert "got out" in (sandbox.why_not() or "")
    finally:
        sandbox.why_not.cache_clear()


# ---- the filter, by a second interpreter of its instructions

#: System calls that may be made with any arguments, by their numbers on the two architectures.
HARMLESS = {
    "x86_64": {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 19, 20, 21, 23, 24, 25, 28,
               32, 35, 39, 60, 63, 78, 79, 89, 96, 98, 100, 102, 104, 107, 108, 110, 131, 186, 201,
               202, 204, 217, 218, 219, 228, 229, 230, 231, 257, 262, 267, 269, 270, 271, 273, 318,
               324, 332, 334, 439},
    "aarch64": {17, 48, 56, 57, 61, 62, 63, 64, 65, 66, 67, 72, 73, 78, 79, 80, 93, 94, 96, 98, 99,
                101, 113, 114, 115, 123, 124, 128, 132, 134, 135, 139, 153, 160, 165, 169, 172, 173,
                174, 175, 176, 177, 178, 214, 215, 216, 222, 226, 233, 278, 283, 291, 293, 439, 23},
}  # fmt: skip
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOWED, EPERM, ENOSYS, KILLED = 0x7FFF0000, 0x50001, 0x50026, 0x80000000


def judged(code: bytes, architecture: int, number: int, arguments=(0,) * 6) -> int:
    data = struct.pack("=IIQ6Q", number, architecture, 0, *arguments)
    rows = list(struct.iter_unpack("=HBBI", code))
    place, held = 0, 0
    while True:
        operation, yes, no, value = rows[place]
        place += 1
        if operation == 0x20:
            held = struct.unpack_from("=I", data, value)[0]
        elif operation == 0x06:
            return value
        else:
            true = {0x15: held == value, 0x35: held >= value, 0x45: bool(held & value)}[operation]
            place += yes if true else no


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_allows_what_is_listed_and_nothing_else(machine):
    code, which = confined.filter_of(machine), ARCHITECTURE[machine]
    anything = {
        number for number in range(1200) if judged(code, which, number, (2**64 - 1,) * 6) == ALLOWED
    }
    assert anything == HARMLESS[machine]
    assert judged(code, 0x40000003, 0) == KILLED  # 32-bit numbers mean other calls
    assert judged(code, which, 0x40000000) == KILLED


@pytest.mark.parametrize(
    ("machine", "clone", "clone3", "fcntl", "ioctl", "prlimit"),
    [("x86_64", 56, 435, 72, 16, 302), ("aarch64", 220, 435, 25, 29, 261)],
)
def test_calls_that_are_allowed_in_part(machine, clone, clone3, fcntl, ioctl, prlimit):
    code, which = confined.filter_of(machine), ARCHITECTURE[machine]

    def says(number, *arguments):
        return judged(code, which, number, (*arguments, *(0,) * (6 - len(arguments))))

    assert says(clone, 0x3D0F00) == ALLOWED  # a thread of pthread_create
    assert says(clone, 17) == EPERM  # a fork
    assert says(clone, 0x4111) == EPERM  # vfork
    assert says(clone, 0x3D0F00 | 0x10000000) == EPERM  # in another namespace
    assert says(clone3) == ENOSYS
    assert [says(fcntl, 0, one) == ALLOWED for one in (1, 3, 1030)] == [True] * 3
    assert [says(fcntl, 0, one) for one in (8, 10, 1024, 1026, 1 << 32)] == [EPERM] * 5
    assert says(ioctl, 0, 0x5401) == ALLOWED
    assert says(ioctl, 0, 0x5412) == EPERM
    assert says(prlimit, 0, 3, 0) == ALLOWED
    assert says(prlimit, 0, 3, 4096) == EPERM
    assert says(prlimit, 0, 3, 1 << 32) == EPERM


def test_an_unknown_processor_is_refused():
    with pytest.raises(OSError, match="sparc"):
        confined.filter_of("sparc")
