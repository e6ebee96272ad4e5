"""Processes of their own for tests, without the seconds that importing torch, transformers and TRL takes in each.

They are forked from one that has imported those and done nothing else. `peft_dynamic` is not among them: a forked
process that never imports it never saw it. Tests of importing itself, and of the command, start python anew.
"""

from __future__ import annotations

import gc
import io
import json
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOSTS = ["torch", "transformers", "datasets", "bitsandbytes", "peft", "trl.trainer.sft_trainer"]


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _context() -> multiprocessing.context.BaseContext:
    known = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in known else "spawn")
    context.set_forkserver_preload(HOSTS)
    return context


def prepare() -> None:
    """Start the process that others are forked from; it imports while tests run."""
    if _context().get_start_method() == "forkserver":
        multiprocessing.forkserver.ensure_running()


def _child(code: str, words: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    """Become `python code words...`, where code is a script's path or, after -c, its text."""
    gc.freeze()  # what the hosts made on import is not looked through by each collection
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), "utf-8", write_through=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), "utf-8", "backslashreplace", write_through=True)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    status = 0
    try:
        if code == "-c":
            sys.argv = ["-c", *words[1:]]
            sys.path.insert(0, "")
            exec(compile(words[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = [code, *words]
            sys.path.insert(0, str(Path(code).parent))
            runpy.run_path(code, run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if status and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.exit(status)  # to multiprocessing, which ends it without what an interpreter does for the first one's imports


class Started:
    """A process that runs `python code words...`; its output goes to files."""

    def __init__(self, code: object, words: tuple[object, ...], cwd: Path, env: Mapping[str, str]) -> None:
        self.args = [str(code), *map(str, words)]
        self.folder = tempfile.TemporaryDirectory()
        self.files = [os.path.join(self.folder.name, name) for name in ("out", "err")]
        for file in self.files:
            Path(file).touch()
        given = (self.args[0], self.args[1:], str(cwd), dict(env), *self.files)
        self.process = _context().Process(target=_child, args=given)
        self.process.start()

    def lines(self, timeout: float) -> Iterator[str]:
        """What it prints, line by line, until it ends or the time is up."""
        end = time.monotonic() + timeout
        with open(self.files[0], encoding="utf-8") as file:
            part = ""
            while ((alive := self.process.is_alive()) and time.monotonic() < end) or part != "":
                part += file.readline()
                if part.endswith("\n"):
                    yield part
                    part = ""
                elif not alive:
                    return
                else:
                    time.sleep(0.01)

    def ended(self, timeout: float) -> subprocess.CompletedProcess:
        """What came of it.

        Raises:
            subprocess.TimeoutExpired: it was still running, and has been killed.
        """
        self.process.join(timeout)
        late = self.process.is_alive()
        if late:
            self.process.kill()
            self.process.join()
        with self.folder:
            out, err = (Path(file).read_text(encoding="utf-8") for file in self.files)
        if late:
            raise subprocess.TimeoutExpired(self.args, timeout, out, err)
        return subprocess.CompletedProcess(self.args, self.process.exitcode, out, err)


def python(
    code: object, *words: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout: float = 280
) -> str:
    """What `python code words...` printed: a script's path, or "-c" and its text, in a process of its own."""
    done = Started(code, words, cwd, os.environ if env is None else env).ended(timeout)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def together(script: Path, *words: object, processes: int = 2, timeout: float = 280) -> None:
    """Run a script as torchrun would, so many times at once, with the ranks and the address in the environment."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    shared |= {"LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    started = [Started(script, words, ROOT, os.environ | shared | rank) for rank in ranks]
    ended = [each.ended(timeout) for each in started]
    assert not any(each.returncode for each in ended), "\n".join(each.stderr[-3000:] for each in ended)


CLIENT = """#!{python} -IS
import json, os, socket, sys
code = {code!r}
words = sys.argv[1:]
if words[:1] == ["-"]:
    code, words = sys.stdin.read(), words[1:]
with socket.create_connection({address!r}) as server, server.makefile("rw", encoding="utf-8") as file:
    file.write(json.dumps([code, words, os.getcwd(), dict(os.environ)]) + chr(10))
    file.flush()
    status, *texts = json.loads(file.readline())
for stream, text in zip((sys.stdout, sys.stderr), texts):
    stream.write(text)
sys.exit(status)
"""


class _Served(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        code, words, cwd, env = json.loads(self.rfile.readline())
        done = Started("-c", (code, *words), Path(cwd), env).ended(timeout=280)
        self.wfile.write(json.dumps([done.returncode, done.stdout, done.stderr]).encode() + b"\n")


@contextmanager
def programs(folder: Path, **codes: str) -> Iterator[None]:
    """Programs that a shell script finds in a folder, and that run in forked processes.

    Args:
        folder: for the script's PATH.
        codes: name -> the text that is run, _ in a name for -; with `-` as its first word a program runs its input.
    """
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Served) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        folder.mkdir(exist_ok=True)
        for name, code in codes.items():
            path = folder / name.replace("_", "-")
            path.write_text(CLIENT.format(python=sys.executable, code=code, address=server.server_address))
            path.chmod(0o755)
        try:
            yield
        finally:
            server.shutdown()
