"""Run one program where it can reach nothing: `python jail.py LIMITS`, with the program on standard input.

Started by `loraover.evaluation.sandbox` as a process of its own, without the parent's environment; imports nothing
but the standard library. Linux only.

    this process          new namespaces; waits, and kills at the deadline or when told to
    └── PID 1 inside      builds a root of system folders, drops to nobody, becomes a fresh interpreter

Everything in a PID namespace dies with its PID 1, so a program that forks faster than it can be killed dies too.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

NOBODY = 65534
TIMED_OUT = 124
SYSTEM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000  # one number on every architecture; Linux 5.12
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38

# By machine, <linux/audit.h>'s number, socket's, and those of calls that are refused. What msgget, semget, shmget,
# memfd_create and memfd_secret make holds memory that no process has in its address space, unseen by RLIMIT_AS;
# io_uring_setup opens a way around this filter.
CALLS = {
    "x86_64": (0xC000003E, 41, (68, 64, 29, 319, 447, 425)),
    "aarch64": (0xC00000B7, 198, (186, 190, 194, 279, 447, 425)),
}
NAMESPACED_FAMILIES = (1, 2, 10, 16)  # AF_UNIX, AF_INET, AF_INET6, AF_NETLINK; AF_VSOCK would reach the host
# <linux/bpf_common.h>, <linux/seccomp.h>
LOAD, IF_EQUAL, IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
SECCOMP_MODE_FILTER, ALLOW, REFUSE = 2, 0x7FFF0000, 0x50000 | errno.EPERM
NUMBER_AT, ARCHITECTURE_AT, FIRST_ARGUMENT_AT, X32_CALLS = 0, 4, 16, 0x40000000

# In the jail: reads the program, keeps a way to answer that the program does not know, and answers with the token
# that only a program which ran to its end reaches.
RUNNER = """
import json, os, sys
request = json.load(sys.stdin)
answer = os.dup(1)
silence = os.open("/dev/null", os.O_RDWR)
for descriptor in (0, 1, 2):
    os.dup2(silence, descriptor)
try:
    exec(compile(request["program"], "<program>", "exec"), {"__name__": "program"})
except BaseException as error:
    os.write(answer, f"{type(error).__name__}: {error}"[:500].encode(errors="replace"))
    os._exit(1)
os.write(answer, request["token"].encode())
os._exit(0)
"""

_libc = ctypes.CDLL(None, use_errno=True)


def main(limits: dict[str, Any]) -> int:
    """Run the program on standard input; returns its exit code, 128 + n if signal n ended it, or TIMED_OUT."""
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    _enter_namespaces()
    child = os.fork()
    if child == 0:
        try:
            _become_program(limits)
        except BaseException as error:
            os.write(2, f"{error}\n".encode(errors="replace"))
        finally:
            os._exit(1)
    is_late = False

    def kill(number: int, frame: FrameType | None) -> None:
        nonlocal is_late
        is_late = is_late or number == signal.SIGALRM
        os.kill(child, signal.SIGKILL)

    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, kill)
    signal.setitimer(signal.ITIMER_REAL, limits["seconds"])
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return TIMED_OUT if is_late else code if code >= 0 else 128 - code


def _enter_namespaces() -> None:
    """No network, processes, mounts or System V objects of the host's; children are born into the PID namespace."""
    flags = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        _call("unshare", flags)
        return
    _call("unshare", flags | CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{NOBODY} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{NOBODY} {group} 1")


def _become_program(limits: dict[str, Any]) -> NoReturn:
    python = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]
    _build_root(limits["folder"], python, limits["folder_bytes"])
    _become_nobody()
    _limit(limits)
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # until the waiting process listens
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _refuse_calls()
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
    os.execve(python, [python, "-I", "-S", "-B", "-c", RUNNER], environment)


def _build_root(folder: str, python: str, folder_bytes: int) -> None:
    """A root with the interpreter, system folders that are read-only, and an empty /tmp of limited size."""
    _call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    _mount_tmpfs(folder, "size=1m,mode=755")
    jail = Path(folder, "jail")
    jail.mkdir()
    for path in _needed(python):
        target = jail / path[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        if Path(path).is_symlink():
            target.symlink_to(Path(path).readlink())
        else:
            _bind(path, target)
    (jail / "tmp").mkdir()
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    _call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, folder.encode(), AT_RECURSIVE, ctypes.byref(attributes), size)
    _mount_tmpfs(str(jail / "tmp"), f"size={folder_bytes},nr_inodes=1024,mode=1777")
    os.chdir(folder)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", MNT_DETACH)
    os.chroot("jail")  # a process in a chroot may not make user namespaces, where it would be root again
    os.chdir("/tmp")


def _needed(python: str) -> list[str]:
    """What to show in the jail; nothing twice."""
    wanted = [*SYSTEM_FOLDERS, *DEVICES, os.path.realpath(sys.base_prefix), str(Path(python).parent)]
    found: list[str] = []
    for path in wanted:
        if os.path.lexists(path) and not any(Path(path).is_relative_to(other) for other in found):
            found.append(path)
    return found


def _bind(path: str, target: Path) -> None:
    if Path(path).is_dir():
        target.mkdir()
    else:
        target.touch()
    _call("mount", path.encode(), str(target).encode(), None, MS_BIND | MS_REC, None)


def _mount_tmpfs(path: str, options: str) -> None:
    _call("mount", b"tmpfs", path.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options.encode())


def _become_nobody() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def _limit(limits: dict[str, Any]) -> None:
    """After becoming nobody: root is not held to a number of processes."""
    seconds = int(limits["seconds"]) + 1
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_NPROC, limits["others"] + limits["processes"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["folder_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def _refuse_calls() -> None:
    """EPERM of those calls, of sockets of other families, and of all calls under another architecture's numbers.

    It holds here and in what is started.
    """
    if platform.machine() not in CALLS:
        raise OSError(errno.ENOSYS, f"calls on {platform.machine()} are not known, only {', '.join(CALLS)}")
    architecture, socket, calls = CALLS[platform.machine()]
    families = len(NAMESPACED_FAMILIES)
    refuse = len(calls) + families + 2  # instructions from the first comparison of a number to that which refuses
    steps = [
        (LOAD, 0, 0, ARCHITECTURE_AT),
        (IF_EQUAL, 0, refuse + 2, architecture),
        (LOAD, 0, 0, NUMBER_AT),
        (IF_AT_LEAST, refuse, 0, X32_CALLS),
        *((IF_EQUAL, refuse - 1 - i, 0, call) for i, call in enumerate(calls)),
        (IF_EQUAL, 0, families + 2, socket),
        (LOAD, 0, 0, FIRST_ARGUMENT_AT),
        *((IF_EQUAL, families - i, 0, family) for i, family in enumerate(NAMESPACED_FAMILIES)),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    _call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)


def _call(name: str, *arguments: Any) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


if __name__ == "__main__":
    try:
        sys.exit(main(json.loads(sys.argv[1])))
    except (OSError, AttributeError) as failure:
        sys.exit(f"{failure}")
