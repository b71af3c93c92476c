"""Untrusted Python, run with tests in a process of its own that is confined, limited and killed. Standard library only: it runs in a worker process.

**This is no security boundary against a determined attacker.** It stops what a language model under training writes by accident or for reward: loops, bombs,
exits, files, sockets, processes, tampering with the tests. Whoever means harm may still find a way through the interpreter or the kernel: run it on a machine,
or in a container or virtual machine, that holds nothing of value.

Layers, from the outside:

1. A process of its own: ``python -I -S``, an empty environment, no standard input, output to nowhere, its own session, killed with its process group at the
   time limit.
2. Linux namespaces (``confine``): no network but a loopback that is down, no other processes, no System V objects, and a file tree of the interpreter's
   standard library and the system's libraries, read-only, beside an empty folder in memory. The process has no capabilities; where we are root it becomes a
   user that owns nothing.
3. Limits: CPU time, address space, size of files, open files, processes.
4. An audit hook (``audit``) installed before the candidate: files outside of its folder, sockets, processes, ctypes, tracing, frames and the garbage collector
   are refused.

Results come through a pipe, each line behind a random word that the candidate never sees. The candidate and its tests share an interpreter, so this makes
forgery hard, not impossible. See `rewards/sandbox_child.py` for what happens inside.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

__all__ = ["probe", "probe_unconfined", "run_tests"]

_CHILD = Path(__file__).with_name("sandbox_child.py")
_OUTPUT = 1 << 20  # bytes that we read of what should be some lines; more is an attack


def run_tests(
    code: str, tests: list[list[Any]], timeout_s: float, memory_mb: int, confine: bool = True, audit: bool = True, inspect: bool = False
) -> dict[str, Any]:
    """Run a candidate and then its tests, in order, in one interpreter.

    Args:
        code: the candidate, a module.
        tests: [source, counted] pairs; a source that is not counted is set-up. A test passes when it raises nothing.
        timeout_s: of wall time, from the start of the interpreter. memory_mb: of address space.
        confine: with namespaces. audit: with the audit hook. Both are on but for tests of the layers and hosts without namespaces.
        inspect: do not hide the exceptions: the reply has them under "errors", for tests of the layers.
    Returns:
        "passed": list of bool, one per counted test; a test that never ran has not passed. "problem": None, or why the sandbox itself failed, and then nothing
        may be concluded about the candidate. "ended": "done", or how it ended before the last test: "timed out", "flooded the output" or "exit code N".
        "refused": whether the audit hook refused it a file, the network, a process or the like.
    """
    nonce = secrets.token_hex(16)
    layers = {"confine": confine, "audit": audit, "inspect": inspect}
    spec = {"code": code, "tests": tests, "nonce": nonce, "cpu_s": int(timeout_s) + 1, "memory_mb": memory_mb, **layers}
    folder = tempfile.mkdtemp(prefix="flowrl-candidate-")
    try:
        output, ended = _run(folder, json.dumps(spec).encode(), timeout_s)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _reply(output, nonce, sum(bool(counted) for _, counted in tests), ended)


def probe() -> str | None:
    """None if programs run here and are confined by namespaces, else the reason why they are not."""
    return _probe(f"import os\nassert not os.path.exists({str(_CHILD)!r})", confine=True)


def probe_unconfined() -> str | None:
    """None if programs run here with limits and the audit hook alone, else the reason why they do not."""
    return _probe("assert True", confine=False)


def _probe(hidden: str, confine: bool) -> str | None:
    program, test = "def double(x):\n    return 2 * x", "assert double(2) == 4"
    reply = run_tests(program, [[test, True], [hidden, True]], 20.0, 512, confine=confine, audit=not confine)
    if reply["problem"] is None and reply["passed"] != [True, True]:
        return "a sandboxed process does not do what it should: " + ("it sees files of this machine" if reply["passed"][0] else "it runs no tests")
    problem: str | None = reply["problem"]
    return problem


def _run(folder: str, spec: bytes, timeout_s: float) -> tuple[bytes, str]:
    command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_CHILD)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder, env={}, start_new_session=True)
    assert process.stdin is not None and process.stdout is not None, "they were opened as pipes"
    try:
        deadline = time.monotonic() + timeout_s
        try:
            process.stdin.write(spec)
            process.stdin.close()
        except BrokenPipeError:
            return b"", "exit before it read its task"
        output, ended = _read(process.stdout.fileno(), deadline)
        if ended == "":
            ended = f"exit code {process.wait(max(0.1, deadline - time.monotonic()))}"
        return output, ended
    except subprocess.TimeoutExpired:
        return output, "timed out"
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone already, or only a zombie of another user
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def _read(descriptor: int, deadline: float) -> tuple[bytes, str]:
    output = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while len(output) <= _OUTPUT:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return bytes(output), "timed out"
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                return bytes(output), ""
            output += chunk
    return bytes(output), "flooded the output"


def _reply(output: bytes, nonce: str, num_tests: int, ended: str) -> dict[str, Any]:
    """What the lines that carry the nonce say; all others are the candidate's."""
    passed, errors, started, refused, problem = [False] * num_tests, [], False, False, None
    for line in output.decode("utf-8", "replace").splitlines():
        word, _, rest = line.partition(" ")
        if word != nonce:
            continue
        kind, _, value = rest.partition(" ")
        if kind == "started":
            started = True
        elif kind == "passed":
            passed[int(value)] = True
        elif kind == "refused":
            refused = True
        elif kind == "error":
            errors.append(value)
        elif kind == "done":
            ended = "done"
        else:  # "failed"
            problem = value
    if not started and problem is None:
        problem = f"the sandbox did not start: {ended}"
    return {"passed": passed, "problem": problem, "ended": ended, "errors": errors, "refused": refused}
