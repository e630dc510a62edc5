"""The newest numbers of a run for Prometheus: `http://HOST:PORT/metrics`, in its text format (version 0.0.4).

One process of a run serves the page. It accepts connections only from this machine unless `monitor.prometheus_host` is set, and serves a
single path. The page contains numbers and the names of the run and its sources, but no configuration and no paths.
"""

from __future__ import annotations

import http.server
import logging
import math
import re
import threading
import time
from typing import Any

from megatron_mm.reporting.sinks import Sink

logger = logging.getLogger(__name__)

_PREFIX = "megatron_mm_"
_COUNTERS = ("total_tokens", "total_images", "skipped_steps")
"""Numbers that only grow; in Prometheus their names end with `_total`."""
_BY_LABEL = {"loss": "source", "bad_samples": "source", "source_tokens": "source", "phases": "phase", "grad_norms": "part"} | {
    "param_norms": "part",
    "update_ratios": "part",
}
"""Groups whose members are one metric with a label; `train/loss/pairs` is `megatron_mm_source_loss{source="pairs"}`."""


class PrometheusPage(Sink):
    """A server in a thread of its own."""

    name = "Prometheus"

    def __init__(self, run_name: str, *, host: str, port: int) -> None:
        super().__init__()
        self.run_name = run_name
        self.port = port
        self._lock = threading.Lock()
        self._values: dict[str, float] = {}
        self._events: dict[str, int] = {}
        self._server: http.server.ThreadingHTTPServer | None = None

        def start() -> None:
            self._server = _server(self, host, port)
            self.port = self._server.server_address[1]
            threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True).start()
            logger.info("Prometheus: http://%s:%d/metrics", host, self.port)

        self.attempt("start", start)

    def log(self, step: int, values: dict[str, Any]) -> None:
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        with self._lock:
            self._values.update(numbers)
            self._values["train/step"] = float(step)
            self._values["train/last_step_timestamp_seconds"] = time.time()

    def event(self, step: int, kind: str, text: str, is_alert: bool) -> None:
        with self._lock:
            self._events[kind] = self._events.get(kind, 0) + 1

    def text(self) -> str:
        """The text of the page."""
        with self._lock:
            values, events = dict(self._values), dict(self._events)
        metrics: dict[str, list[str]] = {}
        for name, value in sorted(values.items()):
            metric, labels = self._metric(name)
            metrics.setdefault(metric, []).append(f"{metric}{labels} {_number(value)}")
        for kind, count in sorted(events.items()):
            metrics.setdefault(f"{_PREFIX}events_total", []).append(f"{_PREFIX}events_total{self._labels(kind=kind)} {count}")
        lines = []
        for metric, samples in metrics.items():
            lines += [f"# TYPE {metric} {'counter' if metric.endswith('_total') else 'gauge'}", *samples]
        return "\n".join(lines) + "\n"

    def _metric(self, name: str) -> tuple[str, str]:
        room, *parts = name.split("/")
        parts = parts if room == "train" else [room, *parts]
        labels = self._labels()
        for place, part in enumerate(parts[:-1]):
            if part in _BY_LABEL:
                label, member = _BY_LABEL[part], "/".join(parts[place + 1 :])
                singular = part.removesuffix("s") if part in ("phases", "grad_norms", "param_norms", "update_ratios") else part
                parts = [*parts[:place], f"{label}_{singular}" if label == "source" and singular == "loss" else singular]
                labels = self._labels(**{label: member})
                break
        metric = _PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", "_".join(parts))
        counted = metric.removeprefix(_PREFIX) in _COUNTERS
        return (f"{metric.replace('_total_', '_')}_total" if counted else metric), labels

    def _labels(self, **more: str) -> str:
        pairs = {"run": self.run_name, **more}
        return "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in pairs.items()) + "}"

    def finish(self, exit_code: int) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return repr(value) if math.isfinite(value) else ("+Inf" if value > 0 else "-Inf")


def _server(page: PrometheusPage, host: str, port: int) -> http.server.ThreadingHTTPServer:
    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 5  # seconds that a client may take to send a request

        def do_GET(self) -> None:
            if self.path != "/metrics":
                self.send_error(404)
                return
            body = page.text().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Keep requests out of the run's log."""

    return http.server.ThreadingHTTPServer((host, port), Handler)
