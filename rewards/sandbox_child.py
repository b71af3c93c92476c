"""The inside of the sandbox: run as a script by `rewards/sandbox.py`, never imported by it. Confines itself, installs the audit hook, runs the candidate and
its tests.

Letters of Linux: the numbers below are those of mount(2), unshare(2), prctl(2) and capset(2).
"""
# What confines the process or installs the hook runs only in that process, where no coverage is measured; tests/test_rewards_code.py tests it from outside.

from __future__ import annotations

import ast
import ctypes
import errno
import json
import os
import resource
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

globals()["__builtins__"] = dict(vars(sys.modules["builtins"]))  # our own copy: functions below do not see it when the candidate changes the module's

_NOBODY, _FIRST_USER = 65534, 1 << 30
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE, _DETACH = 1, 2, 4, 32, 4096, 16384, 1 << 18, 2
_KEPT_FLAGS = 1 | 2 | 4 | 8 | 1024 | 2048  # of a mount that we bind: without them an unprivileged remount is refused
_PDEATHSIG, _NO_NEW_PRIVS, _SIGKILL = 1, 38, 9
_MAX_PROCESSES, _MAX_FILES, _MAX_FILE_BYTES = 16, 32, 1 << 20


# ---- namespaces ----------------------------------------------------------------------------------------------------------------------------------------------


def _call(function: Any, what: str, *arguments: Any) -> None:  # pragma: no cover
    if function(*arguments) != 0:
        raise OSError(f"{what}: {errno.errorcode.get(ctypes.get_errno(), 'unknown error')}")


def _mount(libc: Any, source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:  # pragma: no cover
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    _call(libc.mount, f"mount {target}", *texts, ctypes.c_ulong(flags), None if data is None else data.encode())


def _bind(libc: Any, root: str, source: str) -> None:  # pragma: no cover
    target = root + source
    Path(target).mkdir(parents=True, exist_ok=True)
    _mount(libc, source, target, None, _BIND)
    kept = os.statvfs(target).f_flag & _KEPT_FLAGS
    _mount(libc, None, target, None, kept | _BIND | _REMOUNT | _RDONLY | _NOSUID | _NODEV)


def _enter(libc: Any, is_root: bool) -> None:  # pragma: no cover
    """Leave the machine's network, processes and files; ends in the only process of a new tree, in an empty folder."""
    uid, gid = os.geteuid(), os.getegid()
    flags = _NEWNS | _NEWNET | _NEWPID | _NEWIPC | _NEWUTS
    _call(libc.unshare, "unshare", flags if is_root else flags | _NEWUSER)
    if not is_root:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    root = str(Path.cwd())
    _mount(libc, None, "/", None, _REC | _PRIVATE)
    _mount(libc, "tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=16m,nr_inodes=1000,mode=755")
    os.chdir(root)  # the folder that the mount has covered was another one
    paths = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), "/lib", "/lib64", "/usr/lib", "/usr/lib64"}
    real = sorted({os.path.realpath(path) for path in paths if Path(path).is_dir()})
    for path in real:
        if not any(path.startswith(other + "/") for other in real):
            _bind(libc, root, path)
    for path in sorted(paths):
        if Path(path).is_symlink():
            Path(root + path).parent.mkdir(parents=True, exist_ok=True)
            Path(root + path).symlink_to(os.path.realpath(path))
    Path(root + "/box").mkdir()
    Path(root + "/box").chmod(0o777)
    _call(libc.pivot_root, "pivot_root", b".", b".")
    _call(libc.umount2, "umount", b".", _DETACH)
    os.chdir("/box")


def _fork_and_wait(libc: Any) -> None:  # pragma: no cover
    """Go on in a child; this process only waits for it and ends as it does."""
    child = os.fork()
    if child == 0:
        _call(libc.prctl, "prctl", _PDEATHSIG, _SIGKILL, 0, 0, 0)
        return
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _drop_rights(libc: Any, is_root: bool, own: int) -> None:  # pragma: no cover
    if is_root:
        os.setgroups([])
        user = _FIRST_USER + own  # a user of its own, so that the limit of processes counts only its own
        try:
            os.chown(".", user, user)
            os.setgid(user)
            os.setuid(user)
        except OSError:  # a container that maps few users
            os.chown(".", _NOBODY, _NOBODY)
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)
    _call(libc.prctl, "prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    _call(libc.capset, "capset", header, nothing)
    _call(libc.prctl, "prctl", _PDEATHSIG, _SIGKILL, 0, 0, 0)  # changing the user has cleared it


def _limit(cpu_s: int, memory_mb: int) -> None:  # pragma: no cover
    memory = memory_mb << 20
    for limit, value in [
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, _MAX_FILE_BYTES),
        (resource.RLIMIT_NOFILE, _MAX_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, _MAX_PROCESSES),
    ]:
        resource.setrlimit(limit, (value, value))


# ---- the audit hook ------------------------------------------------------------------------------------------------------------------------------------------

_REFUSED = (
    *("socket.", "subprocess.", "ctypes.", "gc.", "pty.", "fcntl.", "mmap.", "resource.", "syslog.", "shutil.", "sqlite3.", "signal.", "winreg.", "msvcrt."),
    *("ftplib.", "http.", "imaplib.", "nntplib.", "poplib.", "smtplib.", "telnetlib.", "urllib.", "webbrowser.", "ensurepip.", "glob.", "cpython.run_"),
    *("sys.settrace", "sys.setprofile", "sys._current", "sys.monitoring", "sys.addaudithook", "sys.remote_exec", "threading.", "builtins.breakpoint"),
)


def _make_hook(folder: str, libraries: tuple[str, ...], refused: Callable[[], None] = lambda: None) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook. It keeps everything that it uses in its own scope, out of reach of what the candidate can rename.

    Args:
        refused: called whenever a file, the network, a process or the like is refused; frames and modules that honest libraries try first do not count.
    """
    string, denied, listing = str, PermissionError, ("os.listdir", "os.scandir")
    hidden = ("ctypes", "_ctypes", "_posixsubprocess", "_xxsubinterpreters", "_interpreters", "_testcapi", "_testinternalcapi")
    written = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def is_below(path: str, tops: tuple[str, ...]) -> bool:
        parts: list[str] = []
        for part in (path if path[:1] == "/" else folder + "/" + path).split("/"):  # by hand: the candidate could rename what os.path uses
            if part == "..":
                parts = parts[:-1]
            elif part and part != ".":
                parts = [*parts, part]
        place = "/" + "/".join(parts)
        return any(place == top or place[: len(top) + 1] == top + "/" for top in tops)

    def judge(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("exec", "compile", "marshal.loads", "builtins.id"):
            return
        if event == "import":
            for name in hidden:
                if arguments[0] == name or (arguments[1] and f"/{name}." in arguments[1]):
                    raise ImportError(f"the sandbox refuses to import {name}")
            return
        if event == "sys._getframe":
            raise ValueError("the sandbox refuses frames")  # what namedtuple and typing expect where there are none
        if event == "open":
            path, _, flags = arguments
            if type(path) is bytes:
                path = path.decode("utf-8", "surrogateescape")
            if type(path) is not string:
                raise PermissionError("the sandbox refuses to open descriptors")
            if is_below(path, (folder,)) or (is_below(path, libraries) and not flags & written):
                return
            raise PermissionError("the sandbox refuses files outside of its folder")
        if event in listing:
            path = arguments[0]
            if (path is None or type(path) is string) and is_below(path or ".", (folder, *libraries)):
                return
            raise PermissionError("the sandbox refuses folders outside of its own")
        if event[:3] == "os.":
            raise PermissionError(f"the sandbox refuses {event}")
        if event == "object.__getattr__" and arguments[1][-6:] == "_frame":
            raise PermissionError("the sandbox refuses frames")
        for prefix in _REFUSED:
            if event[: len(prefix)] == prefix:
                raise PermissionError(f"the sandbox refuses {event}")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        try:
            judge(event, arguments)
        except denied:
            refused()
            raise

    return hook


# ---- the tests -----------------------------------------------------------------------------------------------------------------------------------------------


class _Honest(ast.NodeTransformer):
    """Makes ``left == right`` in a test ask `_same`, so that an object which calls itself equal to everything equals nothing."""

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if len(node.ops) != 1 or not isinstance(node.ops[0], ast.Eq | ast.NotEq):
            return node
        call: ast.expr = ast.Call(ast.Name("__same__", ast.Load()), [node.left, node.comparators[0]], [])
        return call if isinstance(node.ops[0], ast.Eq) else ast.UnaryOp(ast.Not(), call)


def _make_same(libraries: tuple[str, ...]) -> Callable[[Any, Any], bool]:
    """Equality that does not trust a class of the candidate to compare itself with data of Python's own types."""
    slot, function = type(int.__eq__), type(_make_hook)
    mro, members = type.__dict__["__mro__"].__get__, type.__dict__["__dict__"].__get__

    def is_trusted(value: Any) -> bool:
        if isinstance(value, tuple):
            return all(is_trusted(item) for item in tuple.__iter__(value))
        if isinstance(value, set | frozenset):
            return all(is_trusted(item) for item in frozenset(value))
        method = next(members(owner)["__eq__"] for owner in mro(type(value)) if "__eq__" in members(owner))  # not what a metaclass says
        if type(method) is slot:
            return True
        return type(method) is function and method.__code__.co_filename.startswith((*libraries, "<frozen "))

    def pairwise(ours: Iterator[Any], theirs: Iterator[Any]) -> bool:
        return all(a is b or same(a, b) for a, b in zip(ours, theirs, strict=True))

    def same(left: Any, right: Any) -> bool:
        if isinstance(left, list) and isinstance(right, list):
            return list.__len__(left) == list.__len__(right) and pairwise(list.__iter__(left), list.__iter__(right))
        if isinstance(left, tuple) and isinstance(right, tuple):
            return tuple.__len__(left) == tuple.__len__(right) and pairwise(tuple.__iter__(left), tuple.__iter__(right))
        if (type(left) is dict and isinstance(right, dict)) or (type(right) is dict and isinstance(left, dict)):
            ours, theirs = dict(dict.items(left)), dict(dict.items(right))
            if len(ours) != len(theirs) or is_trusted(frozenset(ours)) != is_trusted(frozenset(theirs)):
                return False
            return all(key in ours and same(ours[key], theirs[key]) for key in theirs)
        if is_trusted(left) != is_trusted(right):
            return False
        return bool(left == right)

    return same


def _run(spec: dict[str, Any], report: Callable[[str], None], libraries: tuple[str, ...]) -> None:  # pragma: no cover
    same, private, inspect = _make_same(libraries), dict(globals()["__builtins__"]), spec["inspect"]
    tests = [(compile(ast.fix_missing_locations(_Honest().visit(ast.parse(source))), "<test>", "exec"), counted) for source, counted in spec["tests"]]
    source = spec["code"]
    module = types.ModuleType("candidate")
    module.__dict__["__builtins__"] = sys.modules["builtins"]  # else exec would hand it ours
    sys.modules["candidate"] = sys.modules["__main__"] = module
    told: list[bool] = []

    def refused() -> None:
        if not told:
            told.append(True)
            report("refused")

    if spec["audit"]:
        sys.addaudithook(_make_hook(str(Path.cwd()), libraries, refused))
    report("started")
    try:
        exec(compile(source, "<candidate>", "exec"), module.__dict__)
    except BaseException as error:  # noqa: BLE001  - whatever it raises, it has failed
        if inspect:
            report(f"error {type(error).__name__}: {error}")
        return report("done")
    scope = {**module.__dict__, "__builtins__": private, "__same__": same}
    index = 0
    for test, counted in tests:
        try:
            exec(test, scope)
        except BaseException as error:  # noqa: BLE001  - as above: also SystemExit and KeyboardInterrupt
            if inspect:
                report(f"error {type(error).__name__}: {error}")
        else:
            if counted:
                report(f"passed {index}")
        index += bool(counted)
    report("done")


def _refuse_processes(*_: Any) -> None:  # pragma: no cover
    raise PermissionError("the sandbox refuses processes")


def main() -> None:  # pragma: no cover
    os.umask(0o022)
    spec = json.loads(sys.stdin.buffer.read())
    nonce = spec["nonce"]

    def report(line: str, write: Callable[[int, bytes], int] = os.write, channel: int = os.dup(1)) -> None:
        write(channel, f"{nonce} {' '.join(line.split())}\n".encode())

    try:
        paths = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
        libraries = tuple(sorted({*paths, *(os.path.realpath(path) for path in paths)}))
        null = os.open("/dev/null", os.O_RDWR)
        is_root, own = os.geteuid() == 0, os.getpid()
        libc = ctypes.CDLL(None, use_errno=True)
        _call(libc.prctl, "prctl", _PDEATHSIG, _SIGKILL, 0, 0, 0)
        if spec["confine"]:
            _enter(libc, is_root)
            _fork_and_wait(libc)  # into the new tree of processes, as its first
            _fork_and_wait(libc)  # the first of a tree ignores signals, also those of its limits: so the candidate is the second
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.close(null)
        _drop_rights(libc, is_root, own)
        if not os.access(ast.__file__, os.R_OK):
            raise OSError(f"the user that it runs as cannot read Python's library, {ast.__file__}")
        _limit(spec["cpu_s"], spec["memory_mb"])
    except (OSError, AttributeError, ValueError) as error:
        report(f"failed {type(error).__name__}: {error}")
        return
    del libc
    for name in [name for name in sys.modules if name.partition(".")[0] in ("ctypes", "_ctypes")]:
        del sys.modules[name]
    stub = types.ModuleType("_posixsubprocess")  # asyncio and others import it and need only the name
    stub.fork_exec = _refuse_processes  # type: ignore[attr-defined]
    sys.modules["_posixsubprocess"] = stub
    _run(spec, report, libraries)
    os._exit(0)


if __name__ == "__main__":  # pragma: no cover
    main()
