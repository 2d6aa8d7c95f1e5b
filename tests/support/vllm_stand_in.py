"""A stand-in for vLLM that starts at once, fails in ways that the real one does, and leaves children behind."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LAUNCHER = """#!{python}
import sys
sys.path.insert(0, {tests!r})
from support.vllm_stand_in import main
main({mode!r}, {folder!r}, {after})
"""
HANG_S = 600
PATIENCE_S = 10
VERSION = "0.32.0+cpu"


def stand_in(folder: Path, mode: str, *, after: int = 0) -> str:
    """The path of a command that can be started in place of `vllm`."""
    path = folder / "vllm"
    tests = str(Path(__file__).parents[1])
    path.write_text(LAUNCHER.format(python=sys.executable, tests=tests, mode=mode, folder=str(folder), after=after))
    path.chmod(0o755)
    return str(path)


def assert_stopped(folder: Path) -> None:
    """Wait until every process of a stand-in has ended, or fail; those that were just killed may take a moment."""
    deadline = time.monotonic() + PATIENCE_S
    for pid in map(int, (folder / "pids").read_text().split()):
        while is_running(pid):
            assert time.monotonic() < deadline, f"{pid} still runs"
            time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def main(mode: str, folder: str, after: int) -> None:
    if sys.argv[1] == "--version":
        print("unheard of" if mode == "hides its version" else VERSION)
        return
    pids = Path(folder) / "pids"
    started_before = pids.exists()
    note(pids, os.getpid())
    print("words:", json.dumps(sys.argv[1:]), flush=True)
    if sys.argv[1] == "bench":
        sys.exit("no such dataset")
    if mode == "ends" or (mode == "starts once" and started_before):
        sys.exit("no memory for the cache")
    if mode == "raises":
        print("WARNING such a limit can cause fd limit errors like `OSError: [Errno 24] Too many open files`")
        print("ValueError: not enough memory")
        print("a line" + "\n" * 40 + "RuntimeError: see above", flush=True)
        sys.exit(1)
    child = subprocess.Popen(["sleep", str(HANG_S)])
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note(pids, child.pid)
    if mode == "silent":
        time.sleep(HANG_S)
    host, port = (sys.argv[sys.argv.index(option) + 1] for option in ("--host", "--port"))
    Server(host, int(port), mode, Path(folder), after).serve_forever()


def note(pids: Path, pid: int) -> None:
    with pids.open("a") as file:
        print(pid, file=file)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, mode: str, folder: Path, after: int) -> None:
        super().__init__((host, port), Handler)
        self.mode, self.folder, self.after = mode, folder, after
        self.completions = itertools.count(1)
        self.seen = False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        """Answer for models, version and health; the first answer for health is always good."""
        if not self.may_pass():
            return
        mode, seen = self.server.mode, self.server.seen
        if mode == "hangs up" and self.path == "/version":
            self.close_connection = True
            return
        self.server.seen = True
        if mode == "busy" and seen:
            time.sleep(2)
        if mode == "stammers" and not seen:
            self.wfile.write(b"INFO: starting\r\n\r\n")
            self.close_connection = True
            return
        well = mode != "unwell" or not seen
        found = {"data": [{"id": "base"}], "version": "0.0 of a stand-in", "reloads": mode == "reloads"}
        self.reply(200 if well else 503, found)

    def may_pass(self) -> bool:
        """Whether a request below /v1 has the key that vLLM would ask for; if not, refuse it."""
        key = os.environ.get("VLLM_API_KEY")
        if not key or not self.path.startswith("/v1") or self.headers["Authorization"] == f"Bearer {key}":
            return True
        self.reply(401, {"error": "Unauthorized"})
        return False

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.may_pass():
            return
        mode = self.server.mode
        if mode == "fails late" or (mode == "fails on b" and body["model"] == "b"):
            self.reply(500, {"error": "head_dim 8 is not supported"})
        else:
            self.complete(body, mode if next(self.server.completions) > self.server.after else "answers")

    def complete(self, body: dict[str, Any], mode: str) -> None:
        if mode not in ("answers", "reloads"):
            (self.server.folder / "failing").touch()
        if mode == "dies":
            os._exit(1)
        elif mode == "answers 500":
            self.reply(500, {"error": {"message": "EngineCore encountered an issue.", "code": 500}})
        elif body.get("stream"):
            self.stream(body, mode)
        elif mode == "hangs":
            time.sleep(HANG_S)
        else:
            several = isinstance(body["prompt"][0], list)
            prompts = len(body["prompt"]) if several else 1
            choices = [choice(body["max_tokens"], logprob(body, mode), index=i) for i in range(prompts)]
            self.reply(200, {"model": speaker(body, mode), "choices": choices})

    def stream(self, body: dict[str, Any], mode: str) -> None:
        """Server-sent events, one a token, in chunks; the first repeats the prompt."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        tokens = body["max_tokens"]
        size = tokens if mode == "comes in one piece" else 1
        first = choice(size, logprob(body, mode), body["prompt"])
        if mode == "leaves out":
            del first["token_ids"]
        if mode == "hides logprobs":
            del first["logprobs"]["token_logprobs"]
        self.piece(body, mode, first)
        if mode == "hangs":
            time.sleep(HANG_S)
        if mode != "stops early":
            for _ in range(size, tokens):
                self.piece(body, mode, choice(1, logprob(body, mode)))
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def piece(self, body: dict[str, Any], mode: str, found: dict[str, Any]) -> None:
        model = speaker(body, mode)
        self.event(json.dumps({"object": "text_completion", "model": model, "choices": [found], "usage": None}))

    def event(self, text: str) -> None:
        data = f"data: {text}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def reply(self, code: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


def speaker(body: dict[str, Any], mode: str) -> str:
    return "another" if mode == "answers as another" else str(body["model"])


def logprob(body: dict[str, Any], mode: str) -> float:
    """Logprob of every token; two copies of an adapter have the same."""
    by_model = {} if mode == "ignores adapters" else {"vanilla": -0.6, "control": -0.6, "folded": -0.7}
    return by_model.get(body["model"], -0.5)


def choice(tokens: int, logprob: float, prompt: list[int] | None = None, index: int = 0) -> dict[str, Any]:
    return {
        "index": index,
        "text": "x" * tokens,
        "logprobs": {"tokens": ["x"] * tokens, "token_logprobs": [logprob] * tokens},
        "finish_reason": None,
        "prompt_token_ids": prompt,
        "token_ids": [7] * tokens,
    }
