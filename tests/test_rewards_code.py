"""rewards/code_tests.py, sandbox.py and sandbox_child.py: programs that pass, fail, cheat, bomb and break out, against each layer alone and all together."""

from __future__ import annotations

import ast
import os
import socket
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_models import assert_reward_contract

from flowrl.types import Prompt, SampleBatch, UserError
from rewards import sandbox, sandbox_child
from rewards.code_tests import CodeTests, find_code, split_tests
from rewards.registry import load_reward
from rewards.sandbox import probe, probe_unconfined, run_tests

CPU = torch.device("cpu")
UNCONFINED = probe_unconfined()
namespaces = pytest.mark.skipif(probe() is not None, reason=f"no namespaces here: {probe()}")


def block(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\nDone."


def batch(cases: list[tuple[Any, str]]) -> SampleBatch:
    """Of (tests, program)."""
    return SampleBatch([Prompt(f"task {i}", {"tests": tests}) for i, (tests, _) in enumerate(cases)], texts=[block(code) for _, code in cases])


def run(code: str, *tests: str, timeout_s: float = 10.0, **layers: bool) -> dict[str, Any]:
    return run_tests(code, [[test, True] for test in tests], timeout_s, 512, **layers)


@pytest.fixture(scope="module")
def reward() -> Iterator[CodeTests]:
    made = load_reward("code_tests", {"num_workers": 2, "timeout_s": 8.0, "allow_unsafe": True})
    assert isinstance(made, CodeTests)
    made.load(CPU, torch.float32)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\na = 1\n```", "a = 1\n"),
        ("```\na\n```\n```py\nb\n```\ntext", "b\n"),
        ("```python\na\n```\n```bash\nrm\n```", "a\n"),
        ("  ```Python3 title\n  a\n  ```", "  a\n"),
        ("```python\na\n```\n```python\nunfinished", "a\n"),
        ("```python\nunfinished", None),
        ("a = 1", None),
    ],
)
def test_the_program_is_the_last_closed_block_of_python(text: str, code: str | None) -> None:
    assert find_code(text) == code


def test_a_source_of_tests_is_split_at_its_top_and_a_list_is_not() -> None:
    source = '"""Tests."""\nimport math\nx = 1\ndef check(f):\n    assert f(1) == 1\nassert x == 1\ncheck(f)\nfor i in range(3):\n    assert f(i)\n'
    parts = split_tests(source)
    assert [counted for _, counted in parts] == [False, False, False, False, True, True, True]
    assert split_tests(["a = f(1)\nassert a == 1", "assert f(2)"]) == [("a = f(1)\nassert a == 1", True), ("assert f(2)", True)]


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        (3, "are neither"),
        ([], "are neither"),
        ("", "are neither"),
        (["assert 1", ""], "are neither"),
        ([1], "are neither"),
        ("assert (", "are not Python"),
        ("x = 1", "hold no test"),
    ],
)
def test_metadata_that_are_no_tests_are_refused_before_any_work(tests: object, reason: str) -> None:
    with pytest.raises(UserError, match=f"^reward code_tests: the metadata tests of the prompt 'why' {reason}"):
        CodeTests().check_prompts([Prompt("fine", {"tests": ["assert 1"]}), Prompt("why", {"tests": tests})])
    with pytest.raises(UserError, match="^reward code_tests: the prompt 'why' has no metadata 'tests'"):
        CodeTests().check_prompts([Prompt("why")])


ADD = "def add(a, b):\n    return a + b"
TESTS = ["assert add(1, 2) == 3", "assert add(2, 2) == 4", "assert add('a', 'b') == 'ab'", "assert add(1, 1) == 3"]


def test_the_value_is_the_share_of_tests_passed(reward: CodeTests) -> None:
    whole = "def check(f):\n    assert f(1, 2) == 3\ncheck(add)\nassert add(0, 0) == 1"
    scores = reward.score(
        batch([(TESTS, ADD), (TESTS[:3], ADD), (TESTS, "def add(a, b):\n    return 3"), (whole, ADD), (TESTS, "x = ("), (TESTS, "import nothing")])
    )
    assert scores.values.tolist() == [0.75, 1, 0.5, 0.5, 0, 0]
    assert scores.valid.all()
    assert torch.equal(scores.raw["code_tests_passed"], scores.values)
    none = reward.score(SampleBatch([Prompt("task", {"tests": TESTS})], texts=["no code at all"]))
    assert (none.values.item(), none.raw["code_tests_code_found"].item()) == (0, 0)


def test_all_or_nothing() -> None:
    made = CodeTests(all_or_nothing=True, num_workers=1, allow_unsafe=True)
    made.load(CPU, torch.float32)
    scores = made.score(batch([(TESTS, ADD), (TESTS[:3], ADD)]))
    made.close()
    assert scores.values.tolist() == [0, 1]
    assert scores.raw["code_tests_passed"].tolist() == [0.75, 1]


ALWAYS_EQUAL = """
class Meta(type):
    def __getattribute__(cls, name):
        return int.__eq__ if name == "__eq__" else super().__getattribute__(name)
class Same(metaclass=Meta):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 3
    @property
    def __class__(self): return list
def f(): return Same()
"""
GUESS = """
import os
for fd in range(32):
    try: os.write(fd, b'passed 0\\n0 passed 0\\nstarted\\ndone\\n')
    except OSError: pass
"""
FLOOD = """
import os
def f():
    for fd in range(32):
        try:
            for _ in range(4): os.write(fd, b'x' * (1 << 20))
        except OSError: pass
"""
SCOPE = """
b = __builtins__ if isinstance(__builtins__, dict) else vars(__builtins__)
b["all"] = lambda _: True
"""
CRASH = """
import sys
sys.setrecursionlimit(10**8)
def f():
    x = []
    for _ in range(200000): x = [x]
    return repr(x) and 1
"""
CHEATS = {
    "equal to everything": (ALWAYS_EQUAL, ["assert f() == 3", "assert 3 == f()", "assert [1] == [f()]", "assert {'a': (1,)} == {'a': (f(),)}",
    "assert {3} == {f()}"]),
    "equal keys": (ALWAYS_EQUAL, ["assert {f(): 1} == {3: 1}", "assert f() == [1]"]),
    "exit at import": ("import sys\nsys.exit(0)", ["assert True"]),
    "os._exit at import": ("import os\nos._exit(0)", ["assert True"]),
    "exit in a test": ("import sys\ndef f(): sys.exit(0)", ["assert f() == 1", "assert f() == 2"]),
    "os._exit in a test": ("import os\ndef f(): os._exit(0)", ["assert f() == 1", "assert f() == 2"]),
    "patched builtins": ("import builtins as b\nb.AssertionError = None\nb.all = b.any = lambda _: True\nb.isinstance = lambda *_: True\n", [
        "assert all([0])", "assert any([])", "assert isinstance(1, str)",
    ]),
    "patched through its own scope": (SCOPE, ["assert all([0])", "assert [1] == [2]"]),
    "patched through a builtin": ("len.__self__.sorted = lambda _: [1]\nlen.__self__.print = None", ["assert sorted([2]) == [1]"]),
    "results printed by guess": (GUESS, ["assert 0"]),
    "the frames above": ("import sys\ndef f():\n    frame = sys._getframe()\n    while frame: frame = frame.f_back\n    return 1", ["assert f() == 1"]),
    "the frame of an exception": ("def f():\n    try: 1 / 0\n    except ArithmeticError as e: return e.__traceback__.tb_frame and 1", ["assert f() == 1"]),
    "the frame of a generator": ("def f(): return (i for i in ()).gi_frame and 1", ["assert f() == 1"]),
    "objects of the collector": ("import gc\ndef f(): return len(gc.get_objects()) and 1", ["assert f() == 1"]),
    "tracing": ("import sys\ndef f(): return sys.settrace(lambda *_: None) or 1", ["assert f() == 1"]),
    "the main module": ("import __main__\ndef f(): return __main__.main and 1", ["assert f() == 1"]),
    "the tests' source": ("import sys, linecache, glob\ndef f(): return sys.stdin.read() and 1", ["assert f() == 1"]),
    "memory through ctypes": ("import ctypes\ndef f(): return 1", ["assert f() == 1"]),
    "closed pipe": ("import os\nos.closerange(0, 64)\ndef f(): return 1", ["assert f() == 1"]),
    "a deep recursion": ("def f(): return f()", ["assert f() == 1"]),
    "a crash": (CRASH, ["assert f() == 1"]),
    "a memory bomb": ("def f(): return len(bytearray(1 << 34))", ["assert f()"]),
    "a slow memory bomb": ("def f():\n    x = []\n    while True: x.append(bytearray(1 << 24))", ["assert f() == 1"]),
    "a flood of output": (FLOOD, ["assert f() == 1"]),
    "a fork bomb": ("import os\nwhile True: os.fork()", ["assert True"]),
    "a process": ("import subprocess\ndef f(): return subprocess.run(['/bin/true']).returncode + 1", ["assert f() == 1"]),
    "a process, from below": ("import _posixsubprocess\ndef f(): return _posixsubprocess.fork_exec(*[None] * 21) or 1", ["assert f() == 1"]),
    "a file of ours": (f"def f(): return len(open({str(Path(sandbox.__file__))!r}).read()) and 1", ["assert f() == 1"]),
    "a folder of ours": ("import os\ndef f(): return len(os.listdir('/')) and 1", ["assert f() == 1"]),
    "a way up": ("def f(): return len(open('../../../etc/passwd').read()) and 1", ["assert f() == 1"]),
    "a big file": ("def f():\n    with open('x', 'wb') as file: file.write(b'x' * (2 << 20))\n    return 1", ["assert f() == 1"]),
    "a socket": ("import socket\ndef f(): return socket.socket() and 1", ["assert f() == 1"]),
    "a signal": ("import os\ndef f(): return os.kill(os.getppid(), 9) or 1", ["assert f() == 1"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHEATS)
def test_what_cheats_or_bombs_passes_nothing_and_is_a_real_zero(reward: CodeTests, name: str) -> None:
    code, tests = CHEATS[name]
    scores = reward.score(batch([(tests, code), (TESTS[:1], ADD)]))
    assert scores.problems == {}
    assert scores.values.tolist() == [0, 1]


def test_endless_loops_are_killed_together_with_all_they_started() -> None:
    made = CodeTests(timeout_s=0.7, num_workers=2, allow_unsafe=True)
    made.load(CPU, torch.float32)
    start = time.monotonic()
    sleepy = "import time, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ndef add(a, b):\n    time.sleep(1000)"
    scores = made.score(batch([(TESTS, "while True: pass"), (TESTS, sleepy), (["assert 1 + 1 == 2", "while True: pass", "assert True"], "x = 1")]))
    made.close()
    assert time.monotonic() - start < 8
    assert scores.valid.all()
    torch.testing.assert_close(scores.values, torch.tensor([0, 0, 1 / 3]))  # what passed before the loop counts
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"sandbox_child" in _read(path) and _parent(path) == 1]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _parent(path: Path) -> int:
    try:
        return int(path.with_name("stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


def test_honest_programs_may_use_the_standard_library_files_of_their_own_and_equality() -> None:
    code = """
import asyncio, collections, dataclasses, datetime, decimal, enum, fractions, functools, hashlib, heapq, itertools, json, math, random, re, statistics, typing
Point = collections.namedtuple("Point", "x y")
class Color(enum.IntEnum):
    RED = 1
@dataclasses.dataclass(frozen=True)
class Data:
    x: int
class Vector:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return self.x == other.x
    def __hash__(self): return hash(self.x)
class Pair(typing.NamedTuple):
    a: int
def note():
    with open("note.txt", "w") as file: file.write("hi")
    with open("note.txt") as file: return file.read()
"""
    tests = [
        "assert Point(1, 2) == (1, 2)", "assert Color.RED == 1", "assert Data(1) == Data(1)", "assert Data(1) != Data(2)", "assert Vector(1) == Vector(1)",
        "assert {Vector(1)} == {Vector(1)}", "assert [Vector(1)] == [Vector(1)]", "assert fractions.Fraction(1, 2) == 0.5",
        "assert decimal.Decimal('1.5') == 1.5",
        "assert 1 == 1.0 == True", "assert collections.Counter('aab') == {'a': 2, 'b': 1}", "assert Pair(1) == (1,)",
        "assert note() == 'hi'", "assert hashlib.sha256(b'').hexdigest()[:4] == 'e3b0'", "assert sum(x == 1 for x in [1, 2, 1]) == 2",
        "n = float('nan')\nassert [n] == [n]", "try:\n    int('x')\nexcept ValueError:\n    pass\nelse:\n    raise AssertionError",
        "assert random.random() < 1",
    ]  # fmt: skip
    reply = run(code, *tests, confine=UNCONFINED is not None, inspect=True)
    assert reply["passed"] == [True] * len(tests), reply


@namespaces
def test_the_namespaces_alone_hide_files_network_processes_and_rights() -> None:
    tests = [
        f"assert not os.path.exists({str(Path(sandbox.__file__))!r})",
        "assert not os.path.exists('/etc/passwd') and not os.path.exists('/proc/self')",
        "assert set(os.listdir('/')) <= {'box', 'lib', 'lib64', 'usr', *os.__file__.split('/')[1:2]}",
        "assert os.listdir('.') == [] and os.getcwd() == '/box'",
        "assert not set(os.environ) - {'LC_CTYPE'}",
        "s = socket.socket()\ns.settimeout(1)\ntry:\n    s.connect(('127.0.0.1', 9))\nexcept OSError:\n    pass\nelse:\n    assert 0",
        "assert [name for _, name in socket.if_nameindex()] == ['lo']",
        "assert os.getppid() == 1 and os.getpid() == 2",
        "assert os.geteuid() != 0",
        "try:\n    open(os.__file__, 'a')\nexcept OSError:\n    pass\nelse:\n    assert 0",
        "try:\n    os.mkdir('/new')\nexcept OSError:\n    pass\nelse:\n    assert 0",
        "try:\n    os.chroot('.')\nexcept OSError:\n    pass\nelse:\n    assert 0",
        "try:\n    os.kill(1, 9)\nexcept OSError:\n    pass\nassert 1",
        "assert resource.getrlimit(resource.RLIMIT_NPROC)[1] == 16 and resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)",
        "assert resource.getrlimit(resource.RLIMIT_AS)[1] == 512 << 20 and resource.getrlimit(resource.RLIMIT_CPU)[1] == 11",
        "assert os.statvfs(os.path.dirname(os.__file__)).f_flag & os.ST_RDONLY",
    ]
    reply = run("import os, socket, resource", *tests, audit=False, inspect=True)
    assert reply["problem"] is None
    assert reply["passed"] == [True] * len(tests), reply


def test_how_a_run_ended_is_told() -> None:
    endings = {
        "flooded the output": run(FLOOD, "f()"),
        "timed out": run("while True: pass", "assert 1", timeout_s=0.5),
        "exit code 7": run("import os\nos._exit(7)", "assert 1"),
        "done": run("1 / 0", "assert 1"),
    }
    assert {ending: (reply["ended"], reply["problem"], reply["passed"]) for ending, reply in endings.items()} == {
        ending: (ending, None, [False]) for ending in endings
    }


@namespaces
def test_a_server_of_ours_cannot_be_reached_and_a_fork_bomb_dies_without_the_hook() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        reply = run("import socket", f"socket.create_connection(('127.0.0.1', {port}), 2)", audit=False)
        assert reply["passed"] == [False]
    start = time.monotonic()
    reply = run("import os\ndef f():\n    while True: os.fork()", "f()", timeout_s=3.0, audit=False)
    assert reply["passed"] == [False]
    assert time.monotonic() - start < 10
    assert run(ADD, "assert add(1, 2) == 3")["passed"] == [True]


def test_it_is_the_hook_that_refuses_before_the_namespaces_do() -> None:
    names = [
        "a file of ours",
        "a folder of ours",
        "a socket",
        "a process, from below",
        "a fork bomb",
        "a way up",
        "a signal",
        "objects of the collector",
        "tracing",
    ]
    for name in [*names, "the frames above", "the frame of an exception", "the frame of a generator", "memory through ctypes"]:
        code, tests = CHEATS[name]
        reply = run(code, *tests, confine=UNCONFINED is not None, inspect=True)
        assert (reply["problem"], reply["passed"], len(reply["errors"])) == (None, [False], 1), name
        assert "the sandbox refuses" in reply["errors"][0], name


def test_a_sandbox_that_fails_is_invalid_and_not_zero(reward: CodeTests, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sandbox, "_CHILD", tmp_path / "nowhere.py")
    reply = run(ADD, *TESTS)
    assert reply["problem"] == "the sandbox did not start: exit code 2"
    assert reply["passed"] == [False] * 4
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(sandbox, "_CHILD", tmp_path / "slow.py")
    assert run(ADD, timeout_s=0.3)["problem"] == "the sandbox did not start: timed out"
    (tmp_path / "closed.py").write_text("import os, time\nos.close(1)\ntime.sleep(60)")
    monkeypatch.setattr(sandbox, "_CHILD", tmp_path / "closed.py")
    assert run(ADD, timeout_s=0.3)["problem"] == "the sandbox did not start: timed out"
    (tmp_path / "deaf.py").write_text("import os; os.close(0); os._exit(1)")
    monkeypatch.setattr(sandbox, "_CHILD", tmp_path / "deaf.py")
    assert run("#" * (1 << 20))["problem"] == "the sandbox did not start: exit before it read its task"
    says = "import json, sys\nprint(json.load(sys.stdin)['nonce'], 'failed OSError: unshare: EPERM')"
    (tmp_path / "refused.py").write_text(says)
    monkeypatch.setattr(sandbox, "_CHILD", tmp_path / "refused.py")
    assert run(ADD)["problem"] == probe() == probe_unconfined() == "OSError: unshare: EPERM"
    (tmp_path / "open.py").write_text(
        "import json, sys\nn = json.load(sys.stdin)['nonce']\nprint(n, 'started')\nprint(n, 'passed 0')\nprint(n, 'error x')\nprint(n, 'done')"
    )
    monkeypatch.setattr(sandbox, "_CHILD", tmp_path / "open.py")
    assert probe() == "a sandboxed process does not do what it should: it sees files of this machine"
    assert run(ADD, "assert 1")["errors"] == ["x"]
    file = tmp_path / "worker.py"
    file.write_text("def run_tests(*_): return {'problem': 'no room', 'passed': [False]}")
    made = CodeTests(num_workers=1)
    made._confine, made._pool = True, type(reward._pool)(file, "run_tests", 1, 5.0)
    scores = made.score(batch([(TESTS, ADD)]))
    made.close()
    assert scores.problems == {0: "no room"}
    assert scores.values.isnan().all()


def test_where_namespaces_do_not_work_it_refuses_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: dict[str, str | None] = {"probe": "unshare: EPERM", "probe_unconfined": None}
    monkeypatch.setattr(CodeTests, "_try", lambda self, name: answers[name])
    with pytest.raises(UserError, match=r"^reward code_tests: programs cannot be confined on this machine \(unshare: EPERM\); .* set allow_unsafe: true"):
        CodeTests().load(CPU, torch.float32)
    unsafe = CodeTests(allow_unsafe=True, num_workers=1)
    unsafe.load(CPU, torch.float32)
    unsafe.close()
    assert unsafe._confine is False
    answers["probe_unconfined"] = "no Python"
    with pytest.raises(UserError, match=r"confined or not \(unshare: EPERM; no Python\)"):
        CodeTests(allow_unsafe=True).load(CPU, torch.float32)
    monkeypatch.setattr("rewards.code_tests.sys.platform", "darwin")
    with pytest.raises(UserError, match="runs programs on Linux only, and this is darwin"):
        CodeTests(allow_unsafe=True).load(CPU, torch.float32)


def test_the_hook_by_hand() -> None:
    hook = sandbox_child._make_hook("/box", ("/lib/python3",))
    for event, arguments in [
        ("open", ("note", "w", os.O_WRONLY)), ("open", (b"/box/a", "r", 0)), ("open", ("/lib/python3/re.py", "r", os.O_RDONLY)), ("open", ("/box/./a/../b",
        "r", 0)),
        ("os.listdir", ("/lib/python3",)), ("os.listdir", (None,)), ("os.scandir", (".",)), ("import", ("math", None, None)), ("exec", ()),
        ("pickle.find_class", ()),
        ("object.__getattr__", (None, "__code__")),
    ]:  # fmt: skip
        hook(event, arguments)
    for event, arguments in [
        ("open", ("/lib/python3/re.py", "w", os.O_WRONLY)), ("open", ("/box/../etc/passwd", "r", 0)), ("open", ("/boxes", "r", 0)), ("open", (3, "w", 0)),
        ("os.listdir", ("/",)), ("os.listdir", (b".",)), ("os.remove", ("note",)), ("socket.connect", ()), ("gc.get_objects", ()),
        ("object.__getattr__", (None, "tb_frame")),
    ]:  # fmt: skip
        with pytest.raises(PermissionError, match="the sandbox refuses"):
            hook(event, arguments)
    with pytest.raises(ImportError, match="refuses to import _ctypes"):
        hook("import", ("fine", "/lib/lib-dynload/_ctypes.so", None))
    with pytest.raises(ValueError, match="refuses frames"):
        hook("sys._getframe", ())


class Liar:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def test_equality_by_hand() -> None:
    same = sandbox_child._make_same((str(Path(os.__file__).parent),))
    nan, liar = float("nan"), Liar()
    for left, right in [
        (1, 1.0), ([nan], [nan]), ((1, [2]), (1, [2])), ({"a": [1]}, {"a": [1]}), ({"a": 1}, Counter("a")), (OrderedDict(a=1), {"a": 1}), ({1, 2}, {2, 1}),
        (frozenset({1}), {1}), (Fraction(1, 2), 0.5), (liar, Liar()), ([liar], [Liar()]), (None, None),
    ]:  # fmt: skip
        assert same(left, right), (left, right)
    for left, right in [
        (1, 2), (nan, nan), ([1], (1,)), ([1], [1, 2]), ((1,), (1, 2)), ({"a": 1}, {"a": 1, "b": 2}), ({"a": 1}, {"b": 1}), ({1}, {2}), (liar, 1),
        (1, liar), ([1], [liar]),
        ((1,), (liar,)), ({"a": 1}, {"a": liar}), (OrderedDict(a=1), liar),
    ]:  # fmt: skip
        assert not same(left, right), (left, right)
    tree = ast.fix_missing_locations(sandbox_child._Honest().visit(ast.parse("r = (1 == x, 1 != x, 1 < 2, 0 == 0 == x)")))
    scope: dict[str, Any] = {"x": liar, "__same__": same}
    exec(compile(tree, "<test>", "exec"), scope)
    assert scope["r"] == (False, True, True, True)


@pytest.mark.parametrize(
    ("args", "message"), [({"timeout_s": -1}, "timeout_s must be"), ({"memory_mb": 5}, "memory_mb must be"), ({"memory_mb": 1.5}, "memory_mb must be")]
)
def test_arguments_out_of_range_are_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^reward code_tests: {message}"):
        CodeTests(**args)


def test_the_reward_keeps_the_contract() -> None:
    made: list[CodeTests] = []

    def make() -> CodeTests:
        made.append(CodeTests(num_workers=2, timeout_s=20.0, allow_unsafe=True))
        return made[-1]

    assert_reward_contract(make, batch([(TESTS, ADD), (TESTS, "x = 1"), (TESTS[:2], "import os\nos._exit(0)"), (TESTS[:1], ADD)]))
    for reward in made:
        reward.close()
