"""Programs that try to leave the sandbox, or to use up what is around it."""

from __future__ import annotations

import ast
import errno
import importlib
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from loraover.common.errors import ConfigError
from loraover_lab.evaluation.sandbox import Limits, check_sandbox, run_program

from support.bubblewrap import needs_bubblewrap

# Numbers of system calls, <asm/unistd.h>.
ADD_KEY, REQUEST_KEY, KEYCTL, CLONE = (248, 249, 250, 56) if platform.machine() == "x86_64" else (217, 218, 219, 220)
CLONE3, IO_URING_SETUP = 435, 425

pytestmark = [pytest.mark.process, needs_bubblewrap]


def reason(program: str, **limits: float) -> str:
    return run_program(program, replace(Limits(), **limits)).reason  # type: ignore[arg-type]


def says(program: str) -> str:
    """What the last expression of a program is, as the text of an exception."""
    *lines, last = program.strip().splitlines()
    found = reason("\n".join([*lines, f"raise Exception({last})"]))
    assert found.startswith("Exception: "), found
    return found.removeprefix("Exception: ")


def test_a_program_that_reaches_its_end_passes() -> None:
    assert run_program("assert sum(range(10)) == 45").passed
    assert run_program("import math, re, random, typing, collections, hashlib\nassert math.gcd(6, 4) == 2").passed


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import ctypes; ctypes.string_at(0)", f"died of signal {int(signal.SIGSEGV)}"),
        ("def f(): f()\nf()", "RecursionError"),
    ],
)
def test_a_program_that_does_not_is_no_success(program: str, expected: str) -> None:
    found = run_program(program)
    assert not found.passed
    assert found.reason.startswith(expected)


def test_a_program_that_means_to_cheat_passes_as_the_docstring_warns() -> None:
    forge = "import os, sys\nos.write(sys._getframe(1).f_globals['answer'], b'passed')\nos._exit(0)"
    assert run_program(forge).passed


def test_its_user_is_not_on_this_machine_and_cannot_become_anybody() -> None:
    user, effective, group = ast.literal_eval(says("import os\n[os.getuid(), os.geteuid(), os.getgid()]"))
    assert user == effective == group
    assert user >= 65534
    for call in ("setuid(0)", "setresuid(0, 0, 0)", "setgid(0)", "chroot('/')"):
        assert reason(f"import os; os.{call}").startswith(("PermissionError", "OSError")), call
    unshare = "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\n(c.unshare({}), ctypes.get_errno() > 0)"
    for namespace in (0x10000000, 0x20000, 0x40000000):  # user, mount, network
        assert says(unshare.format(namespace)) == "(-1, True)"
    call = "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n(c.syscall({}), ctypes.get_errno())"
    assert says(call.format(f"{CLONE3}, 0, 0")) == f"(-1, {errno.ENOSYS})"
    mount = "import ctypes\nctypes.CDLL(None).mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None)"
    assert says(mount) == "-1"


def test_it_sees_and_writes_no_file_of_the_host() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as open_to_all:
        secret = Path(open_to_all, "secret")
        secret.write_text("of the host")
        Path(open_to_all).chmod(0o777)
        secret.chmod(0o666)
        hidden = [
            str(secret),
            "/proc",
            "/sys",
            "/run",
            "/etc/passwd",
            str(Path(__file__)),
            str(Path.home() / ".bashrc"),
        ]
        for path in hidden:
            assert says(f"import os\nos.path.exists({path!r})") == "False", path
        interpreter = os.path.realpath(sys.executable)
        others = ("/x", "/usr/x", "/etc/x", "/dev/x", "/home/x", "/var/tmp/x", "/dev/shm/x", f"{interpreter}-x")
        for path in (*others, interpreter, str(secret)):
            assert reason(f"open({path!r}, 'ab')").startswith(("PermissionError", "OSError", "FileNotFoundError")), path
        assert list(Path(open_to_all).iterdir()) == [secret]
        assert secret.read_text() == "of the host"


def test_its_folder_is_empty_at_first_and_gone_afterwards() -> None:
    write = "import os\nassert os.getcwd() == '/tmp' and os.listdir('.') == []\nopen('mine', 'w').write('x')"
    assert [reason(write) for _ in range(2)] == ["passed", "passed"]


def test_its_files_are_limited_one_by_one_and_together() -> None:
    one = "f = open('big', 'wb')\nwhile True:\n    f.write(bytes(2**20)); f.flush()"
    assert reason(one).startswith(("OSError", f"died of signal {int(signal.SIGXFSZ)}"))
    many = "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'wb').write(bytes(2**20))"
    assert reason(many).startswith("OSError: [Errno 28]")
    assert reason("files = []\nwhile True:\n    files.append(open('/dev/null'))").startswith("OSError: [Errno 24]")


def test_it_has_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
        assert reason(connect).startswith("ConnectionRefusedError")  # by the sandbox's own loopback
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert reason("import socket; socket.create_connection(('1.1.1.1', 53), 2)").startswith("OSError")
    assert says("import socket\n[name for _, name in socket.if_nameindex()]") == "['lo']"


def test_only_families_of_sockets_that_have_namespaces_can_be_had() -> None:
    program = "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n"
    for family in (socket.AF_VSOCK, socket.AF_PACKET, socket.AF_ALG):
        assert says(f"{program}(c.socket({int(family)}, 1, 0), ctypes.get_errno())") == f"(-1, {errno.EPERM})"
    for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK):
        assert says(f"{program}(c.socket({int(family)}, {int(socket.SOCK_DGRAM)}, 0) > 0)") == "True"


BARRED = [
    *(f"syscall({ADD_KEY}, b'user', b'x', b'y', 1, -3)", f"syscall({REQUEST_KEY}, b'user', b'x', 0, -3)"),
    *(f"syscall({KEYCTL}, 0, {keyring}, 0)" for keyring in (-7, -3, -1)),  # <linux/keyctl.h>, KEY_SPEC_*
    *("shmget(0, 2**23, 0o1600)", "msgget(0, 0o1600)", "semget(0, 32000, 0o1600)", "memfd_create(b'x', 0)"),
    *(f"ptrace({request}, 1, 0, 0)" for request in (16, 0x4206)),  # PTRACE_ATTACH, PTRACE_SEIZE
    *(f"syscall({IO_URING_SETUP}, 8, 0)", f"syscall({CLONE}, {0x10000000 | signal.SIGCHLD}, 0, 0, 0, 0)"),
]
"""Calls that reach the keys of others, memory outside of the address space, or bubblewrap's own process."""


def test_calls_that_reach_out_of_the_sandbox_are_barred() -> None:
    asked = ", ".join(f"(c.{call}, ctypes.get_errno())" for call in BARRED)
    found = says(f"import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n[{asked}]")
    assert ast.literal_eval(found) == [(-1, errno.EPERM)] * len(BARRED)


def test_it_knows_nothing_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAOVER_SECRET", "sesame")
    environment = says("import os\nsorted(os.environ)")
    assert environment == "['HOME', 'LANG', 'PATH', 'TMPDIR']" or "LORAOVER" not in environment
    assert reason(f"open('/proc/{os.getpid()}/environ')").startswith("FileNotFoundError")
    assert reason(f"import os; os.kill({os.getpid()}, 9)").startswith("ProcessLookupError")
    assert says("import os\n(os.getpid(), os.getppid())") == "(2, 1)"  # 1 is bubblewrap
    assert reason("import os; os.kill(-1, 9)").startswith(("passed", "ProcessLookupError"))  # nobody else is there


def test_memory_is_limited() -> None:
    assert reason("x = bytearray(2**30)").startswith("MemoryError")
    assert reason("x = []\nwhile True:\n    x.append(bytearray(2**20))", seconds=20).startswith("MemoryError")


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(600)"])
def test_time_is_limited(program: str) -> None:
    started = time.perf_counter()
    assert reason(program, seconds=1) == "timed out"
    assert time.perf_counter() - started < 60


@pytest.fixture
def mark() -> str:
    """A name for this test's processes, which their children inherit."""
    return f"jail-{secrets.token_hex(4)}"


def marked(mark: str, program: str) -> str:
    return f"import ctypes\nctypes.CDLL(None).prctl(15, b'{mark}')  # PR_SET_NAME\n{program}"


def processes_of(mark: str) -> int:
    """How many processes have the name."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            found += path.read_text().strip() == mark
        except OSError:  # it has ended
            continue
    return found


def are_gone(mark: str) -> bool:
    deadline = time.monotonic() + 60
    while processes_of(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    return processes_of(mark) == 0


def test_a_program_that_holds_on_to_life_ends_in_time(mark: str) -> None:
    stubborn = (
        "import os, signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nctypes.CDLL(None).prctl(1, 0)  # PR_SET_PDEATHSIG\n"
        "for n in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):\n    try: os.kill(1, n)\n"
        "    except PermissionError: pass\nos.fork()\nos.setsid() if os.getpid() != os.getsid(0) else None\n"
        "while True: time.sleep(1)"
    )
    assert reason(marked(mark, stubborn), seconds=1) == "timed out"
    assert are_gone(mark)


@pytest.mark.parametrize(
    "bomb",
    [
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import os\nif os.fork():\n    raise Exception('left')\nos.setsid()\nwhile True:\n    pass",
    ],
)
def test_a_fork_bomb_is_held_and_leaves_nothing_behind(bomb: str, mark: str) -> None:
    sleep = f"import shutil, os\nshutil.copy('/bin/sleep', '/tmp/{mark}')\nos.environ['PATH'] = '/tmp'\n"
    program = marked(mark, sleep + bomb)
    assert reason(program, seconds=2) in ("timed out", "Exception: left")
    assert are_gone(mark)


def test_as_many_processes_as_the_limit_says_though_eight_sandboxes_run() -> None:
    count = (
        "import os, time\nchildren = 0\ntry:\n    while children < 100:\n        pid = os.fork()\n"
        "        if pid == 0:\n            time.sleep(60); os._exit(0)\n        children += 1\n"
        "except BlockingIOError:\n    pass\ntime.sleep(2)\nraise Exception(children)"  # 2 s: all eight run then
    )
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(reason, [count] * 8))
    assert found == [f"Exception: {Limits().processes - 1}"] * 8


def test_a_killed_parent_takes_its_sandbox_along(mark: str) -> None:
    program = marked(mark, "import time; time.sleep(601)")
    code = (
        "from loraover_lab.evaluation.sandbox import Limits, run_program\n"
        f"print('ready', flush=True)\nrun_program({program!r}, Limits(seconds=600))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 60
    while processes_of(mark) == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(mark) == 1
    parent.kill()
    parent.wait()
    assert are_gone(mark)


def test_it_is_refused_where_there_is_no_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="needs Linux"):
        run_program("pass")


def test_it_is_refused_without_bubblewrap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="apt-get install bubblewrap"):
        run_program("pass")


UNABLE = {
    "a user without namespaces": "bwrap --dev-bind / / --unshare-user --uid 4242 --disable-userns --",
    "a container's root": "setpriv --bounding-set -sys_admin",
}


@pytest.mark.parametrize("prefix", UNABLE.values(), ids=UNABLE.keys())
def test_it_is_refused_where_namespaces_cannot_be_had(prefix: str) -> None:
    if prefix.startswith("setpriv") and (os.geteuid() != 0 or shutil.which("setpriv") is None):
        pytest.skip("giving up a right takes root and setpriv")
    code = "from loraover_lab.evaluation.sandbox import check_sandbox\ncheck_sandbox()"
    done = subprocess.run([*prefix.split(), sys.executable, "-c", code], capture_output=True, text=True)
    assert "ConfigError: generated code cannot be held on this system: bwrap: " in done.stderr
    assert "user.max_user_namespaces" in done.stderr
    assert "--cap-add SYS_ADMIN" in done.stderr


def test_a_limit_of_processes_that_does_not_hold_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sandbox.cache_clear()
    monkeypatch.setattr("loraover_lab.evaluation.sandbox._rlimits", lambda limits, user: {"RLIMIT_NPROC": 64})
    with pytest.raises(ConfigError, match="allowed 9 processes under a limit of 8"):
        check_sandbox()


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_a_user_who_is_not_root_is_held_as_well() -> None:
    python = Path("/usr/bin/python3")
    if not python.exists():
        pytest.skip(f"{python}: no such file; the interpreter of the tests may be out of another user's reach")
    program = "import ctypes, os, socket\nassert os.getuid() == 65534\nopen('x', 'w')\n"
    program += "assert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == -1\n"  # bubblewrap's process has the same user here
    program += "\n".join(
        f"try: {act}\nexcept OSError: pass\nelse: raise Exception({act!r})"
        for act in ("open('/x', 'w')", "open('/usr/x', 'w')", "os.setuid(0)", "os.chroot('/')", "os.listdir('/proc')")
    )
    program += "\nraise Exception((os.getpid(), os.listdir('/tmp'), [name for _, name in socket.if_nameindex()]))"
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        ignored = shutil.ignore_patterns("__pycache__")
        for package in ("loraover", "lab/loraover_lab"):
            shutil.copytree(Path(__file__).parents[2] / package, Path(folder, Path(package).name), ignore=ignored)
        shutil.copy(str(importlib.import_module("pyseccomp").__file__), folder)
        code = (
            f"import os, sys\nos.setgroups([]); os.setgid(4242); os.setuid(4242)\nsys.path.insert(0, {folder!r})\n"
            f"from loraover_lab.evaluation.sandbox import run_program\nprint(run_program({program!r}).reason)"
        )
        done = subprocess.run([python, "-B", "-c", code], capture_output=True, text=True, cwd="/")
    if "needs user namespaces" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.stdout == "Exception: (2, ['x'], ['lo'])\n", done.stderr
