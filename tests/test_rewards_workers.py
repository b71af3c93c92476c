"""rewards/workers.py: order, time limits kept by killing, crashes, reuse, a light start, and the end of the processes."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rewards import workers
from rewards.workers import Outcome, WorkerError, WorkerPool, serve

FUNCTIONS = """
    import os, signal, sys, time

    def act(kind, value=None):
        if kind == "sleep":
            time.sleep(value)
        elif kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "exit":
            sys.exit("enough")
        elif kind == "raise":
            raise ValueError(value)
        elif kind == "print":
            print('{"value": "forged", "problem": null}', flush=True)
        elif kind == "pid":
            return os.getpid()
        elif kind == "modules":
            return sorted({name.partition(".")[0] for name in sys.modules})
        elif kind == "object":
            return object()
        return value
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "functions.py"
    file.write_text(textwrap.dedent(FUNCTIONS))
    return file


@pytest.fixture
def pool(path: Path) -> Iterator[WorkerPool]:
    with contextlib.closing(WorkerPool(path, "act", 2, 1.0)) as made:
        yield made


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_outcomes_keep_the_order_of_the_tasks_whatever_ends_first(pool: WorkerPool) -> None:
    tasks = [("sleep", 0.2), *[("echo", i) for i in range(20)], ("sleep", 0.1), ("echo", [{"a": None}])]
    assert [outcome.value for outcome in pool.map(tasks)] == [0.2, *range(20), 0.1, [{"a": None}]]
    assert pool.map([]) == []


def test_a_task_beyond_the_limit_is_killed_and_the_others_are_not_touched(pool: WorkerPool) -> None:
    pool.start()
    start = time.monotonic()
    outcomes = pool.map([("echo", 1), ("sleep", 60), ("echo", 2), ("die",), ("raise", "no\n luck"), ("exit",), ("object",), ("echo", 3)])
    assert time.monotonic() - start < 10
    assert outcomes[1] == Outcome(problem="timed out after 1 s")
    assert outcomes[3] == Outcome(problem="the worker process ended with code -9")
    assert outcomes[4] == Outcome(problem="ValueError: no luck")
    assert outcomes[5] == Outcome(problem="SystemExit: enough")
    assert outcomes[6].problem is not None
    assert outcomes[6].problem.startswith("TypeError")
    assert [outcomes[i].value for i in (0, 2, 7)] == [1, 2, 3]


def test_workers_are_reused_and_one_that_died_while_idle_is_replaced(pool: WorkerPool) -> None:
    first = {outcome.value for outcome in pool.map([("pid",)] * 6)}
    assert {outcome.value for outcome in pool.map([("pid",)] * 6)} <= first
    for worker in pool._workers:
        worker.process.kill()
        worker.process.wait()
    assert [outcome.value for outcome in pool.map([("echo", 1), ("echo", 2)])] == [1, 2]


def test_a_worker_imports_neither_torch_nor_this_package(pool: WorkerPool) -> None:
    modules = set(pool.map([("modules",)])[0].value)
    assert "selectors" in modules
    assert not modules & {"torch", "numpy", "rewards", "flowrl"}


def test_what_a_function_prints_is_no_answer(pool: WorkerPool) -> None:
    assert [outcome.value for outcome in pool.map([("print", 5), ("echo", 6)])] == [5, 6]


def test_threads_may_share_a_pool(pool: WorkerPool) -> None:
    results: dict[int, list[Any]] = {}
    threads = [
        threading.Thread(target=lambda k=k: results.update({k: [o.value for o in pool.map([("echo", 10 * k + i) for i in range(5)])]})) for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {k: [10 * k + i for i in range(5)] for k in range(4)}


@pytest.mark.parametrize(
    ("source", "reason"), [("import nothing_of_that_name", "ModuleNotFoundError"), ("x = 1", "AttributeError"), ("import os; os._exit(3)", "code 3")]
)
def test_a_file_that_does_not_load_is_one_error(tmp_path: Path, source: str, reason: str) -> None:
    (tmp_path / "bad.py").write_text(source)
    pool = WorkerPool(tmp_path / "bad.py", "act", 1, 1.0)
    with pytest.raises(WorkerError, match=f"a worker process could not start: .*{reason}"):
        pool.start()
    assert pool._workers == []


def test_a_file_that_hangs_at_import_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_START_S", 0.3)
    (tmp_path / "slow.py").write_text("import time; time.sleep(60)")
    with pytest.raises(WorkerError, match=r"not ready after 0\.3 s"):
        WorkerPool(tmp_path / "slow.py", "act", 1, 1.0).start()


def test_the_processes_end_at_close_and_with_the_pool(path: Path) -> None:
    pool = WorkerPool(path, "act", 2, 5.0)
    pool.start()
    pids = [worker.process.pid for worker in pool._workers]
    assert len(pids) == 2
    pool.close()
    assert not any(map(is_alive, pids))
    pid = pool.map([("pid",)])[0].value
    assert is_alive(pid)
    del pool
    gc.collect()
    assert not is_alive(pid)


@pytest.mark.parametrize("ending", ["", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
def test_the_processes_end_with_the_interpreter(path: Path, ending: str) -> None:
    lines = f"from pathlib import Path\nfrom workers import WorkerPool\npool = WorkerPool(Path({str(path)!r}), 'act', 1, 5.0)\n"
    lines += "print(pool.map([('pid',)])[0].value, flush=True)\n"
    folder = str(Path(workers.__file__).parent)
    result = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r})\n{lines}{ending}"], capture_output=True, text=True, check=False)
    assert result.returncode == (-9 if ending else 0), result.stderr
    deadline = time.monotonic() + 5
    while is_alive(int(result.stdout)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(int(result.stdout))


def test_after_an_interrupt_no_answer_goes_to_the_wrong_task(pool: WorkerPool) -> None:
    pool.start()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            pool.map([("sleep", 0.4), ("sleep", 0.4)])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert [outcome.value for outcome in pool.map([("sleep", 0.5), ("sleep", 0.6)])] == [0.5, 0.6]


def test_a_worker_serves_until_its_source_ends(path: Path) -> None:
    head = {"path": str(path), "function": "act", "sys_path": sys.path}
    source, answers = io.BytesIO("\n".join(map(json.dumps, (head, ["echo", 1], ["raise", "x" * 500], ["object"]))).encode()), io.BytesIO()
    serve(source, answers)
    ready, first, second, third = (json.loads(line) for line in answers.getvalue().splitlines())
    assert ready == {"value": None, "problem": None}
    assert first == {"value": 1, "problem": None}
    assert len(second["problem"]) == 200
    assert third["problem"].startswith("TypeError")
    answers = io.BytesIO()
    serve(io.BytesIO(json.dumps({**head, "function": "none"}).encode()), answers)
    assert "AttributeError" in json.loads(answers.getvalue())["problem"]
