"""The process in which one program runs (started by sandbox.py, which see). Standard library only; imports no package.

On standard input a JSON object; on the file descriptor of argv[1] the token of a program that ran to its end, the
exception of one that did not, or why the sandbox could not be closed. Limits are set before the program is compiled.

The filter is classic BPF as in Linux's Documentation/userspace-api/seccomp_filter.rst; system call numbers are those of
arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h of Linux 6.18.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

# Refused whatever their arguments: (x86-64, aarch64); None where the architecture has no such call.
REFUSED: dict[str, tuple[int | None, int | None]] = {
    **{"socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201)},
    **{"io_uring_setup": (425, 425), "execve": (59, 221), "execveat": (322, 281), "fork": (57, None)},
    **{"vfork": (58, None), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "ptrace": (101, 117)},
    **{"pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "rt_sigqueueinfo": (129, 138)},
    **{"process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "unshare": (272, 97), "setns": (308, 268)},
    **{"mount": (165, 40), "umount2": (166, 39), "chroot": (161, 51), "pivot_root": (155, 41), "bpf": (321, 280)},
    **{"unlink": (87, None), "unlinkat": (263, 35), "rmdir": (84, None), "rename": (82, None)},
    **{"renameat": (264, 38), "renameat2": (316, 276), "mkdir": (83, None), "mkdirat": (258, 34)},
    **{"link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36)},
    **{"truncate": (76, 45), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452)},
    **{"chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "creat": (85, None)},
    **{"mknod": (133, None), "mknodat": (259, 33), "utimensat": (280, 88), "reboot": (169, 142)},
    **{"openat2": (437, 437), "setuid": (105, 146), "setgid": (106, 144), "prlimit64": (302, 261)},
    **{
        "shmget": (29, 194),
        "msgget": (68, 186),
        "semget": (64, 190),
        "keyctl": (250, 219),
        "perf_event_open": (298, 241),
    },
}
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of REFUSED, AUDIT_ARCH
OPEN, OPENAT, CLONE, CLONE3 = (2, None), (257, 56), (56, 220), (435, 435)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CLONE_THREAD = 0x10000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF_LD|W|ABS, JMP|JEQ, JGE, JSET, RET
ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026
X32 = 0x40000000  # the other numbering of x86-64


def program_of(machine: str) -> bytes:
    """The filter: everything is allowed that is not refused here."""
    column, audit = ARCHITECTURES[machine]
    rules: list[tuple[int, int, int, int]] = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, audit), (RETURN, 0, 0, EPERM)]
    rules += [(LOAD, 0, 0, 0), (AT_LEAST, 0, 1, X32), (RETURN, 0, 0, EPERM)]
    for numbers in REFUSED.values():
        if numbers[column] is not None:
            rules += [(EQUAL, 0, 1, numbers[column] or 0), (RETURN, 0, 0, EPERM)]
    rules += [(EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, ENOSYS)]  # its flags are out of sight; clone is used then
    for number, argument, mask, when_set, when_clear in (
        (OPEN[column], 1, WRITING, EPERM, ALLOW),
        (OPENAT[column], 2, WRITING, EPERM, ALLOW),
        (CLONE[column], 0, CLONE_THREAD, ALLOW, EPERM),
    ):
        if number is not None:
            rules += [(EQUAL, 0, 4, number), (LOAD, 0, 0, 16 + 8 * argument), (ANY_BIT, 0, 1, mask)]
            rules += [(RETURN, 0, 0, when_set), (RETURN, 0, 0, when_clear)]
    rules.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *rule) for rule in rules)


def close_the_sandbox() -> str:
    """Install the filter. Returns why it could not be installed, or an empty text."""
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        return f"there is none for {sys.platform} on {platform.machine()}"
    code = program_of(platform.machine())
    held = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(held)))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_seccomp, filter_mode, header, 0, 0):
        return os.strerror(ctypes.get_errno())
    return ""


def set_limits(seconds: float, memory_mib: int) -> None:
    """SIGALRM and SIGXCPU end the process; one that handles them is killed a CPU second or START_SECONDS later."""
    memory = memory_mib * 2**20
    whole = max(1, -int(-seconds // 1))
    for kind, limit in (
        (resource.RLIMIT_AS, (memory, memory)),
        (resource.RLIMIT_CPU, (whole, whole + 1)),
        (resource.RLIMIT_FSIZE, (0, 0)),
        (resource.RLIMIT_CORE, (0, 0)),
    ):
        resource.setrlimit(kind, limit)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def main() -> None:
    answers = int(sys.argv[1])
    task = json.loads(sys.stdin.buffer.read())
    token, program = task["token"], task["program"]
    set_limits(task["seconds"], task["memory_mib"])  # the filter refuses the call that it makes
    reason = close_the_sandbox()
    if reason and not task["allow_network"]:
        os.write(answers, f"no filter: {reason}".encode())
        return
    try:
        exec(compile(program, "answer", "exec"), {"__name__": "__main__"})
        said = token
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"[:300]
    os.write(answers, said.encode("utf-8", "replace"))
    os._exit(0)


if __name__ == "__main__":
    main()
