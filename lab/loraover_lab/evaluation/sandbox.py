"""Run generated code where it can do no harm to this machine.

    this process       stops the sandbox at the deadline
    └── bubblewrap     gives new namespaces, a read-only root and a filter of system calls
        └── RUNNER     takes on the limits, then runs the program

When the program ends or bubblewrap (the command bwrap) is killed, the kernel kills everything in the sandbox.
bubblewrap sets no limits, so RUNNER does. The filter refuses calls that would get around the limits and namespaces.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from loraover.common.errors import ConfigError
from loraover.common.extras import install

NOBODY = 65534
SYSTEM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}

REFUSED_CALLS = (
    *("msgget", "semget", "shmget", "memfd_create", "memfd_secret"),  # memory that RLIMIT_AS does not count
    *("add_key", "keyctl", "request_key"),  # keys of the session, which namespaces do not hide
    *("ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd"),  # bubblewrap's process in the sandbox
    *("unshare", "setns"),  # a namespace in which the program is root and may mount memory
    "io_uring_setup",  # a way around this filter
)
CLONE_NEWUSER = 0x10000000  # <linux/sched.h>
NAMESPACED_FAMILIES = (1, 2, 10, 16)  # AF_UNIX, AF_INET, AF_INET6, AF_NETLINK; AF_VSOCK would reach the host

# Reads the program, keeps a descriptor for the answer, and gives up what it does not need.
RUNNER = """
import json, os, resource, sys
request = json.load(sys.stdin)
answer = os.dup(1)
silence = os.open("/dev/null", os.O_RDWR)
if request["user"] is not None:
    os.setgroups([])
    os.setresgid(*[request["user"]] * 3)
    os.setresuid(*[request["user"]] * 3)
for name, most in request["limits"].items():
    resource.setrlimit(getattr(resource, name), (most, most))
for descriptor in (0, 1, 2):
    os.dup2(silence, descriptor)
try:
    exec(compile(request["program"], "<program>", "exec"), {"__name__": "program"})
except BaseException as error:
    os.write(answer, f"{type(error).__name__}: {error}"[:500].encode(errors="replace"))
    os._exit(1)
os.write(answer, b"passed")
os._exit(0)
"""

# Passes if it can have as many processes as its limit says, and no more.
PROBE = """
import os, signal
found = 1
try:
    while found <= {processes} and os.fork():
        found += 1
    if found <= {processes}:
        signal.pause()
except BlockingIOError:
    pass
assert found == {processes}, f"the kernel allowed {{found}} processes under a limit of {processes}"
"""


@dataclass(frozen=True)
class Limits:
    """Limits of a program.

    Args:
        seconds: Time from the start of its sandbox to its end.
        processes: Number of processes at the same time, threads included.
        memory_bytes: Address space of each process.
        folder_bytes: Size of all files in its folder, and of each.
        open_files: Number of descriptors of each process.
    """

    seconds: float = 10.0
    processes: int = 8
    memory_bytes: int = 512 * 2**20
    folder_bytes: int = 16 * 2**20
    open_files: int = 64


@dataclass(frozen=True)
class ProgramOutcome:
    """Whether a program ran to its last line, and the reason: "passed", "timed out" or its exception."""

    passed: bool
    reason: str


def run_program(program: str, limits: Limits = Limits()) -> ProgramOutcome:
    """Run a Python program in a sandbox.

    It sees the interpreter, its standard library and the system's folders, read-only, and an empty /tmp that is removed
    afterwards. It passes if it reaches its end; if it exits earlier, it fails, whatever its exit code.

    The verdict is right for code with errors, but not for code that was written to cheat. As in HumanEval's own
    harness, the code shares an interpreter with its tests, so it can change them, or write the answer itself. The
    sandbox holds such code too.
    """
    bubblewrap = _bubblewrap()
    python = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]
    user = _unused_user()
    request = json.dumps({"program": program, "user": user, "limits": _rlimits(limits, user)}).encode()
    with (
        tempfile.TemporaryFile() as calls,
        tempfile.TemporaryFile() as answer,
        tempfile.TemporaryFile() as complaint,
    ):
        calls.write(_filter())
        calls.seek(0)
        process = subprocess.Popen(
            [bubblewrap, *_sandbox(python, user, limits, calls.fileno()), python, "-I", "-S", "-B", "-c", RUNNER],
            stdin=subprocess.PIPE,
            stdout=answer,
            stderr=complaint,
            pass_fds=[calls.fileno()],
            env=ENVIRONMENT,
            start_new_session=True,
        )
        try:
            process.communicate(request, timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return ProgramOutcome(False, "timed out")
        finally:
            process.kill()
            process.wait()
        answer.seek(0)
        complaint.seek(0)
        text = answer.read(1000).decode(errors="replace")
        failure = complaint.read(1000).decode(errors="replace").strip()
    if failure:
        raise _cannot_be_held(failure)
    if not text:
        code = process.returncode
        text = f"died of signal {code - 128}" if code > 128 else f"left early with exit code {code}"
    return ProgramOutcome(text == "passed", text)


@cache
def check_sandbox() -> None:
    """Raise ConfigError, which says what to do, unless programs can be held here. A success is remembered."""
    limits = Limits()
    found = run_program(PROBE.format(processes=limits.processes), limits)
    if not found.passed:
        raise _cannot_be_held(found.reason)


def _cannot_be_held(reason: str) -> ConfigError:
    return ConfigError(
        f"generated code cannot be held on this system: {reason}. Without root, bubblewrap needs user namespaces "
        "(sysctl user.max_user_namespaces above 0; on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0). In a "
        "container, the container's seccomp and AppArmor profiles have to allow unshare and mount; for Docker: "
        "--cap-add SYS_ADMIN --cap-add NET_ADMIN --security-opt seccomp=unconfined --security-opt apparmor=unconfined."
    )


def _bubblewrap() -> str:
    if sys.platform != "linux":
        raise ConfigError(f"running generated code needs Linux, whose namespaces hold it; this is {sys.platform}.")
    found = shutil.which("bwrap")
    if found is None:
        raise ConfigError("running generated code needs bubblewrap (the command bwrap): apt-get install bubblewrap")
    return found


def _sandbox(python: str, user: int | None, limits: Limits, calls: int) -> list[str]:
    """bubblewrap's arguments that run the command after them without the host's network, processes and files."""
    words = ["--die-with-parent", "--seccomp", str(calls)]
    words += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    if user is None:
        words += ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    else:
        words += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]  # RUNNER loses them by becoming this user
    words += ["--perms", "1777", "--size", str(limits.folder_bytes), "--tmpfs", "/tmp"]
    folders = [*SYSTEM_FOLDERS, os.path.realpath(sys.base_prefix), str(Path(python).parent)]
    for path in (*folders, *DEVICES):
        for parent in reversed(Path(path).parents):
            words += ["--dir", str(parent)]  # readable by everyone, which bubblewrap's own are not
        words += ["--dev-bind" if path in DEVICES else "--ro-bind-try", path, path]
    return [*words, "--remount-ro", "/", "--chdir", "/tmp", "--"]


def _unused_user() -> int | None:
    """A user id for one program, so that other programs do not use up its limit of processes; None if not root.

    Root in a user namespace is an ordinary user to Linux, which then counts by bubblewrap's own namespace.
    """
    everyone = ["0", "0", str(2**32 - 1)]
    if os.geteuid() != 0 or Path("/proc/self/uid_map").read_text().split() != everyone:
        return None
    return 2**30 + secrets.randbelow(2**30)


def _rlimits(limits: Limits, user: int | None) -> dict[str, int]:
    return {
        "RLIMIT_CPU": int(limits.seconds) + 1,
        "RLIMIT_NPROC": limits.processes + (user is None),  # without root, bubblewrap's own process counts too
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_FSIZE": limits.folder_bytes,
        "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_CORE": 0,
    }


@cache
def _filter() -> bytes:
    """Classic BPF for seccomp, made by libseccomp: EPERM for what is refused; another architecture's calls kill."""
    try:
        import pyseccomp as seccomp
    except (ImportError, RuntimeError) as error:  # the package, and the library that it calls
        raise ConfigError(
            f"running generated code needs libseccomp ({error}): {install('eval')}; apt-get install libseccomp2"
        ) from error
    refuse = seccomp.ERRNO(errno.EPERM)
    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    for call in REFUSED_CALLS:
        rules.add_rule(refuse, call)
    rules.add_rule(refuse, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, CLONE_NEWUSER, CLONE_NEWUSER))
    rules.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")  # its flags lie in memory; the C library falls back to clone
    most = max(NAMESPACED_FAMILIES)
    for family in set(range(most)).difference(NAMESPACED_FAMILIES):
        rules.add_rule(refuse, "socket", seccomp.Arg(0, seccomp.EQ, family))
    rules.add_rule(refuse, "socket", seccomp.Arg(0, seccomp.GT, most))
    with tempfile.TemporaryFile() as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()
