"""Programs that try to leave the sandbox, or to use up what is around it."""

from __future__ import annotations

import errno
import os
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

from loraover.errors import ConfigError
from loraover.evaluation.jail import RUNNER
from loraover.evaluation.sandbox import Limits, check_sandbox, run_program

MIB = 2**20


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    try:
        check_sandbox()
    except ConfigError as error:
        pytest.skip(str(error))


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
        ("import os; os._exit(0)", "left early with exit code 0"),
        ("import os; print('passed'); os.write(1, b'passed'); os._exit(0)", "left early with exit code 0"),
        ("import ctypes; ctypes.string_at(0)", f"died of signal {int(signal.SIGSEGV)}"),
        ("def f(): f()\nf()", "RecursionError"),
    ],
)
def test_a_program_that_does_not_is_no_success(program: str, expected: str) -> None:
    found = run_program(program)
    assert not found.passed
    assert found.reason.startswith(expected)


def test_it_is_nobody_who_cannot_become_anybody() -> None:
    assert says("import os\n(os.getuid(), os.geteuid(), os.getgid(), os.getgroups())").startswith(
        "(65534, 65534, 65534"
    )
    for call in ("setuid(0)", "setresuid(0, 0, 0)", "setgid(0)", "chroot('/')"):
        assert reason(f"import os; os.{call}").startswith(("PermissionError", "OSError")), call
    unshare = "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\n(c.unshare({}), ctypes.get_errno() > 0)"
    for namespace in (0x10000000, 0x20000, 0x40000000):  # user, mount, network
        assert says(unshare.format(namespace)) == "(-1, True)"


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
    before = set(Path(tempfile.gettempdir()).glob("loraover-jail-*"))
    write = "import os\nassert os.getcwd() == '/tmp' and os.listdir('.') == []\nopen('mine', 'w').write('x')"
    assert [reason(write) for _ in range(2)] == ["passed", "passed"]
    assert set(Path(tempfile.gettempdir()).glob("loraover-jail-*")) == before


def test_its_files_are_limited_one_by_one_and_together() -> None:
    one = "f = open('big', 'wb')\nwhile True:\n    f.write(bytes(2**20)); f.flush()"
    assert reason(one).startswith(("OSError", f"died of signal {int(signal.SIGXFSZ)}"))
    many = "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'wb').write(bytes(2**20))"
    assert reason(many).startswith("OSError: [Errno 28]")
    assert reason("files = []\nwhile True:\n    files.append(open('/dev/null'))").startswith("OSError: [Errno 24]")


def test_it_has_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert reason(f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)").startswith("OSError")
    assert reason("import socket; socket.create_connection(('1.1.1.1', 53), 2)").startswith("OSError")
    assert says("import socket\n[name for _, name in socket.if_nameindex()]") == "['lo']"


def test_only_families_of_sockets_that_have_namespaces_can_be_had() -> None:
    program = "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n"
    for family in (socket.AF_VSOCK, socket.AF_PACKET, socket.AF_ALG):
        assert says(f"{program}(c.socket({int(family)}, 1, 0), ctypes.get_errno())") == f"(-1, {errno.EPERM})"
    for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK):
        assert says(f"{program}(c.socket({int(family)}, {int(socket.SOCK_DGRAM)}, 0) > 0)") == "True"
    assert says(f"{program}(c.syscall(425, 8, 0), ctypes.get_errno())") == f"(-1, {errno.EPERM})"  # io_uring_setup


def test_it_knows_nothing_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAOVER_SECRET", "sesame")
    environment = says("import os\nsorted(os.environ)")
    assert environment == "['HOME', 'LANG', 'PATH', 'TMPDIR']" or "LORAOVER" not in environment
    assert reason(f"open('/proc/{os.getpid()}/environ')").startswith("FileNotFoundError")
    assert reason(f"import os; os.kill({os.getpid()}, 9)").startswith("ProcessLookupError")
    assert says("import os\n(os.getpid(), os.getppid())") == "(1, 0)"
    assert reason("import os; os.kill(-1, 9)").startswith(("passed", "ProcessLookupError"))  # nobody else is there


def test_memory_is_limited() -> None:
    assert reason("x = bytearray(2**30)").startswith("MemoryError")
    assert reason("x = []\nwhile True:\n    x.append(bytearray(2**20))", seconds=20).startswith("MemoryError")


@pytest.mark.parametrize(
    "call",
    ["shmget(0, 2**23, 0o1600)", "msgget(0, 0o1600)", "semget(0, 32000, 0o1600)", "memfd_create(b'x', 0)"],
)
def test_memory_outside_of_its_address_space_cannot_be_had(call: str) -> None:
    program = f"import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n(c.{call}, ctypes.get_errno())"
    assert says(program) == f"(-1, {errno.EPERM})"


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time; time.sleep(600)", "import signal\nsignal.pause()"]
)
def test_time_is_limited(program: str) -> None:
    started = time.perf_counter()
    assert reason(program, seconds=1) == "timed out"
    assert time.perf_counter() - started < 5


def test_a_program_that_holds_on_to_life_ends_in_time() -> None:
    stubborn = "import os, signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
    stubborn += "    except (OSError, ValueError): pass\nos.setsid() if os.getpid() != os.getsid(0) else None\n"
    assert reason(stubborn + "while True: time.sleep(1)", seconds=1) == "timed out"


def processes_with(words: str) -> int:
    """How many processes of this machine have these words in their command."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += words in path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.parametrize(
    "bomb",
    [
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import os\nif os.fork():\n    raise Exception('left')\nos.setsid()\nwhile True:\n    pass",
        "import subprocess\nwhile True:\n    try: subprocess.Popen(['/bin/sh', '-c', 'sleep 86399 & sleep 86399'])\n"
        "    except OSError: pass",
    ],
)
def test_a_fork_bomb_is_held_and_leaves_nothing_behind(bomb: str) -> None:
    assert reason(bomb, seconds=2) in ("timed out", "Exception: left")
    assert processes_with(RUNNER) == 0
    assert processes_with("sleep 86399") == 0


def test_processes_are_limited_though_several_sandboxes_run() -> None:
    count = (
        "import os, time\nchildren = 0\ntry:\n    while children < 100:\n        pid = os.fork()\n"
        "        if pid == 0:\n            time.sleep(60); os._exit(0)\n        children += 1\n"
        "except BlockingIOError:\n    pass\nraise Exception(children)"
    )
    with ThreadPoolExecutor(2) as pool:
        found = [int(said.removeprefix("Exception: ")) for said in pool.map(reason, [count] * 2)]
    assert max(found) >= 1  # of root's sandboxes, one may use up what both may have
    assert max(found) < 32


def test_a_killed_parent_takes_its_sandbox_along() -> None:
    code = (
        "from loraover.evaluation.sandbox import Limits, run_program\n"
        "print('ready', flush=True)\nrun_program('import time; time.sleep(601)', Limits(seconds=600))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 20
    while processes_with(RUNNER) == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(RUNNER) == 1
    parent.kill()
    parent.wait()
    while processes_with(RUNNER) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(RUNNER) == 0


def test_the_host_keeps_its_limits_and_mounts() -> None:
    before = Path("/proc/self/mounts").read_text()
    assert reason("pass") == "passed"
    assert Path("/proc/self/mounts").read_text() == before


def test_it_is_refused_where_there_is_no_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="needs Linux"):
        run_program("pass")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="giving up a right takes root")
def test_it_is_refused_where_namespaces_cannot_be_had() -> None:
    """As in a container whose root may not make them."""
    code = "from loraover.evaluation.sandbox import run_program\nrun_program('pass')"
    command = ["setpriv", "--bounding-set", "-sys_admin", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "ConfigError: generated code cannot be held on this system: [Errno 1] unshare" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_a_user_who_is_not_root_is_held_as_well() -> None:
    python = Path("/usr/bin/python3")
    if not python.exists():
        pytest.skip(f"{python}: no such file; the interpreter of the tests may be out of another user's reach")
    program = "import os, socket\nassert os.getuid() == 65534\nopen('x', 'w')\n" + "\n".join(
        f"try: {act}\nexcept OSError: pass\nelse: raise Exception({act!r})"
        for act in ("open('/x', 'w')", "open('/usr/x', 'w')", "os.setuid(0)", "os.chroot('/')", "os.listdir('/proc')")
    )
    program += "\nraise Exception((os.getpid(), os.listdir('/tmp'), [name for _, name in socket.if_nameindex()]))"
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(__file__).parents[2] / "loraover", Path(folder, "loraover"), ignore=ignored)
        code = (
            f"import os, sys\nos.setgroups([]); os.setgid(4242); os.setuid(4242)\nsys.path.insert(0, {folder!r})\n"
            f"from loraover.evaluation.sandbox import run_program\nprint(run_program({program!r}).reason)"
        )
        done = subprocess.run([python, "-B", "-c", code], capture_output=True, text=True, cwd="/")
    if "namespaces for everyone" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.stdout == "Exception: (1, ['x'], ['lo'])\n", done.stderr
