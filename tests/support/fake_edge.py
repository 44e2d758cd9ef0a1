"""An edge agent's HTTP face without anything behind it: the double for the command line's tests.

Run as a program it takes the edge daemon's flags, and reports itself ready after a moment.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PIECES = ("The sky ", "is ", "blue — ", "mostly.")
USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 8,
    "speculation": {
        "mode": "coupled",
        "drafted_tokens": 10,
        "accepted_tokens": 5,
        "verdicts": 4,
        "forwards": 4,
        "rollbacks": 2,
        "bytes_up": 800,
        "bytes_down": 400,
    },
}
HEALTHY = {"status": "ok", "cloud": {"reachable": True, "model": "fake"}}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/health":
            ready = time.monotonic() > self.server.ready_at_s  # type: ignore[attr-defined]
            body = HEALTHY if ready else {"status": "unavailable", "problem": "not yet"}
            self._json(200 if ready else 503, body)
        else:
            self._json(200, {"data": [{"id": "fake"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)  # type: ignore[attr-defined]
        words = asked["messages"][-1]["content"]
        if words == "refuse":
            self._json(400, {"error": {"message": "temperature is out of range"}})
            return
        self.send_response(200)
        self.end_headers()
        for piece in PIECES:
            self._event({"choices": [{"delta": {"content": piece}, "finish_reason": None}]})
            if words == "break":
                return
            if words == "fail":
                self._event({"error": {"message": "the cloud went away"}})
                return
        self._event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        self._event({"choices": [], "usage": USAGE})
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *values: Any) -> None:
        pass

    def _event(self, body: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(body).encode() + b"\n\n")

    def _json(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def make_server(port: int = 0, ready_after_s: float = 0.0) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    server.asked = []  # type: ignore[attr-defined]
    server.ready_at_s = time.monotonic() + ready_after_s  # type: ignore[attr-defined]
    return server


@contextmanager
def running() -> Iterator[ThreadingHTTPServer]:
    server = make_server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    flags = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    make_server(int(flags["--server.port"]), ready_after_s=0.3).serve_forever()
