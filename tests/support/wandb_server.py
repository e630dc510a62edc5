"""A stand-in for W&B's server: it answers what a run needs to begin, and can then be made to hang.

python wandb_server.py      prints its port; a line on standard input makes it hang
"""

from __future__ import annotations

import http.server
import json
import sys
import threading
import time
from typing import Any

HANGS = threading.Event()
_RUN = {
    "id": "run",
    "name": "run",
    "displayName": "run",
    "config": "{}",
    "project": {"id": "project", "name": "project", "entity": {"id": "entity", "name": "entity"}},
    "historyLineCount": 0,
}
ANSWERS: dict[str, Any] = {
    "UpsertBucket": {"upsertBucket": {"bucket": _RUN, "inserted": True}},
    "CreateRunFiles": {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": []}},
    "RunResumeStatus": {"model": {"id": "project", "name": "project", "entity": {"id": "entity", "name": "entity"}, "bucket": None}},
}
"""GraphQL answers, by a word of the query."""


class Server(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")
        if HANGS.is_set():
            time.sleep(1000)
        data = next((answer for word, answer in ANSWERS.items() if word in asked), {})
        content = json.dumps({"limits": {}} if self.path.endswith("file_stream") else {"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.readline()
    HANGS.set()
    sys.stdin.readline()
