"""A stand-in for vLLM that starts at once, fails in ways that the real one does, and leaves children behind."""

from __future__ import annotations

import sys
from pathlib import Path

STAND_IN = '''#!{python}
"""Answers as vLLM does; {mode}."""
import json, os, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

MODE, FOLDER = "{mode}", "{folder}"
print("words:", json.dumps(sys.argv[1:]), flush=True)
if MODE == "ends":
    sys.exit("no memory for the cache")
if MODE == "raises":
    print("ValueError: not enough memory")
    print("a line" + "\\n" * 40 + "RuntimeError: see above", flush=True)
    sys.exit(1)
if MODE == "silent":
    time.sleep(600)
child = subprocess.Popen(["sleep", "600"])
if MODE == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(FOLDER + "/pids", "w") as file:
    print(os.getpid(), child.pid, file=file)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(200, {{"data": [{{"id": "base"}}]}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if MODE == "fails late" or (MODE == "fails on b" and body["model"] == "b"):
            return self.reply(500, {{"error": "head_dim 8 is not supported"}})
        if MODE == "hangs up" and self.path == "/v1/load_lora_adapter":
            return
        choice = {{"index": 0, "text": "x", "token_ids": [7], "logprobs": {{"token_logprobs": [-0.5]}}}}
        self.reply(200, {{"choices": [choice]}})

    def reply(self, code, content):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *args):
        pass


HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
'''


def stand_in(folder: Path, mode: str) -> str:
    path = folder / "vllm"
    path.write_text(STAND_IN.format(python=sys.executable, mode=mode, folder=folder))
    path.chmod(0o755)
    return str(path)


def assert_stopped(folder: Path) -> None:
    for pid in map(int, (folder / "pids").read_text().split()):
        status = Path(f"/proc/{pid}/status")
        assert not status.exists() or "State:\tZ" in status.read_text(), f"{pid} still runs"
