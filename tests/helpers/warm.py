"""Python processes that start at once: a server imports torch and transformers, and forks for each process asked for.

A test that needs a process of its own calls :func:`python`, which does what ``python WORDS`` does. The server lives as
long as the test session and imports only the libraries, at the first call: every process imports hf_pdecay anew. The
processes have the hash seed of the server in common. :mod:`tests.helpers.launching` asks the server too, so ranks that
``accelerate launch`` or torchrun starts need not import for themselves. Without a server all are started as usual.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn


ROOT = Path(__file__).parents[2]
# Where the environment names the server's socket.
ADDRESS = "HF_PDECAY_TESTS_WARM"
LIBRARIES = (
    "datasets",
    "matplotlib.pyplot",
    "safetensors.torch",
    "sklearn.metrics",
    "torch",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
)
# What a process of the tests gets unless it asks for something else.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}


def python(
    *words: object, cwd: Path = ROOT, timeout: float = 600.0, cold: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Do what ``python WORDS`` does, for a script, ``-m`` or ``-c``; if ``cold``, it and its ranks start from nothing.

    Raises:
        subprocess.TimeoutExpired: If the process has not ended after ``timeout`` seconds.
    """
    whole = {**os.environ, **ENVIRONMENT, **environment}
    if cold:
        whole.pop(ADDRESS, None)
    return run([*map(str, words)], cwd, whole, timeout)


def run(
    words: list[str], cwd: Path, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """As :func:`python`, with the whole environment."""
    command = [sys.executable, *words]
    if ADDRESS not in environment:
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull) as nothing:
        streams = [nothing.fileno(), out.fileno(), err.fileno()]
        with _ask(words, cwd, environment, streams) as connection:
            connection.settimeout(timeout)
            try:
                status = _answer(connection)
            except TimeoutError:
                raise subprocess.TimeoutExpired(command, timeout) from None
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(command, status, out.read().decode(), err.read().decode())


def become(words: list[str]) -> None:
    """Have the server do what this process was started for, and end as that does."""
    with _ask(words, Path.cwd(), os.environ, [0, 1, 2]) as connection:
        status = _answer(connection)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


def _ask(words: Sequence[str], cwd: Path, environment: Mapping[str, str], streams: list[int]) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ[ADDRESS])
    request = json.dumps({"words": words, "cwd": str(cwd), "environment": dict(environment)}).encode()
    socket.send_fds(connection, [len(request).to_bytes(8, "big")], streams)
    connection.sendall(request)
    return connection


def _answer(connection: socket.socket) -> int:
    answer = connection.recv(16)
    if not answer:
        raise RuntimeError("The server of warm processes has ended.")
    return int(answer)


class Server:
    """Starts the server, which listens at ``address`` until :meth:`close`."""

    def __init__(self) -> None:
        # Short, as addresses of sockets must be.
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        address = str(Path(self._folder.name) / "socket")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.warm", address],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # where libraries say what they miss
            start_new_session=True,
        )
        while not os.path.exists(address):
            if self._process.poll() is not None:
                raise RuntimeError("The server of warm processes did not start.")
            time.sleep(0.005)
        os.environ[ADDRESS] = address

    def close(self) -> None:
        del os.environ[ADDRESS]
        self._process.communicate()  # the end of its input ends it
        self._folder.cleanup()


# --- in the server


def _serve(address: str) -> list[str] | None:
    """Serve requests; returns None when the session has ended, and in each process that was asked for its words."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.new")
        listener.listen(64)
        os.rename(f"{address}.new", address)
        warm, children = False, 0
        while True:
            ready = select.select([listener, sys.stdin], [], [])[0]
            while children and os.waitpid(-1, os.WNOHANG)[0]:
                children -= 1
            if sys.stdin in ready:
                while children:
                    os.wait()
                    children -= 1
                return None
            connection, _ = listener.accept()
            if not warm:
                for name in LIBRARIES:
                    importlib.import_module(name)
                assert "hf_pdecay" not in sys.modules
                gc.collect()
                gc.freeze()
                warm = True
            if os.fork() == 0:
                listener.close()
                return _supervise(connection)
            children += 1
            connection.close()


def _supervise(connection: socket.socket) -> list[str]:
    """Fork a process and tell how it ended, or end it when the other side hangs up; returns in that process only."""
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    size = int.from_bytes(head, "big")
    text = b""
    while len(text) < size:
        text += connection.recv(size - len(text))
    child = os.fork()
    if child == 0:
        connection.close()
        return _prepare(json.loads(text), streams)
    for number in streams:
        os.close(number)
    waited = False
    while True:
        hung_up = bool(select.select([connection], [], [], 0.02)[0])
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if not hung_up:
                connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
            os._exit(0)
        if hung_up:  # a launcher ends what it has launched, if it has the time
            os.killpg(child, signal.SIGKILL if waited else signal.SIGTERM)
            waited = True
            time.sleep(3)


def _prepare(request: dict[str, object], streams: list[int]) -> list[str]:
    """Make this process what it would be, had it been started for the request."""
    import multiprocessing.process
    import random

    import numpy

    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    rest = [entry for entry in sys.path[1:] if entry not in before]
    os.environ.clear()
    os.environ.update(request["environment"])  # type: ignore[arg-type]
    os.chdir(request["cwd"])  # type: ignore[arg-type]
    multiprocessing.process.ORIGINAL_DIR = os.getcwd()  # type: ignore[attr-defined]
    after = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = ["", *after, *rest]
    sys.orig_argv[:] = [sys.executable, *request["words"]]  # type: ignore[misc]
    random.seed()
    numpy.random.seed()
    return request["words"]  # type: ignore[return-value]


def _end(words: list[str]) -> NoReturn:
    """Run as Python does and end as it does, but for taking all modules apart."""
    status = 0
    try:
        _run_as_python(words)
    except SystemExit as ended:
        if ended.code is not None and not isinstance(ended.code, int):
            sys.stderr.write(f"{ended.code}\n")
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:
        traceback = error.__traceback__
        while traceback is not None and traceback.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>"):
            traceback = traceback.tb_next
        sys.excepthook(type(error), error.with_traceback(traceback), traceback)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run_as_python(words: list[str]) -> None:
    """Run a script, ``-m`` and a module, or ``-c`` and code in a new ``__main__``."""
    first, *rest = words
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    if first == "-m":
        sys.argv[:] = ["-m", *rest[1:]]
        sys.path[0] = os.getcwd()
        runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
    elif first == "-c":
        sys.argv[:] = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv[:] = words
        sys.path[0] = str(Path(first).resolve().parent)
        path = os.path.abspath(first)
        main.__dict__.update(__file__=path, __spec__=None, __cached__=None, __package__=None)
        exec(compile(Path(path).read_bytes(), path, "exec"), main.__dict__)


if __name__ == "__main__":
    asked = _serve(sys.argv[1])
    if asked is not None:
        _end(asked)
    os._exit(0)
