"""The page of a run that still trains: made again when its record has grown, served to this machine only.

The server has the page, its newer parts, and the version of the record. It makes the parts when a browser asks for
them, so it costs nothing while nobody looks. The page's script asks for the version twice a second, and puts in the
newer parts where it is another one; what the reader has chosen stays.

No page of the web may read the report through the reader's browser. Only requests to ``127.0.0.1`` or ``localhost`` are
answered, not those to a name that its owner has pointed at this machine, and no other origin may read an answer.
"""

from __future__ import annotations

import json
import os
import socketserver
import sys
import threading
import time
from html import escape
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from attnmonitor.messages import error_text
from attnmonitor.record.follow import FollowedRecord
from attnmonitor.report.page import PageParts, check_plotly, live_page, page_parts

__all__ = ["LiveReport"]

_HOSTS = ("127.0.0.1", "localhost")  # on any port: a tunnel from another machine may have one of its own
_USUAL_PORT = 8421  # where none is asked for; if it is taken, any that is free
_REST = 4.0  # times the computing that making the parts took, before the next: training keeps its cores
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class LiveReport(socketserver.ThreadingMixIn, HTTPServer):
    """Serves the page of a run on the loopback interface, and nothing else.

    Args:
        record_path: The run's record; or a folder, for its newest record. It need not be there yet.
        port: The port; by default 8421, or any free one where that is taken; 0 for any free one.

    Attributes:
        url: Address of the page.

    Raises:
        RecordError: There is a file, and it is not a record.
        ValueError: ``port`` is no port.
        OSError: The port is taken, or the file cannot be read.
        ModuleNotFoundError: plotly is not installed.
    """

    daemon_threads = True
    allow_reuse_address = os.name != "nt"  # there it means that two programs may have the same port

    def __init__(self, record_path: str | Path, port: int | None = None) -> None:
        if port is not None and not 0 <= port < 2**16:
            raise ValueError(f"port={port} is no port: 1 to 65535, or 0 for any that is free")
        check_plotly("LiveReport")
        self._followed = FollowedRecord(record_path)
        self._lock = threading.Lock()
        self._parts: dict[str, Any] = {"version": ""}
        self._rests_until = 0.0
        try:
            super().__init__((_HOSTS[0], _USUAL_PORT if port is None else port), _Handler)
        except OSError as error:
            if port is not None:
                raise OSError(
                    f"port {port} cannot be used ({error.strerror}); leave it out, or name another"
                ) from error
            super().__init__((_HOSTS[0], 0), _Handler)
        self.url = f"http://{_HOSTS[0]}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        """Bind without asking a name server for this machine's name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = _HOSTS[0], self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that went away; print anything else."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def newest(self) -> dict[str, str]:
        """Return the version of the parts that can be had now, and how far the run is."""
        with self._lock:
            rests = time.monotonic() < self._rests_until
            version = self._parts["version"] if rests else self._followed.version
            return {"version": version, "progress": self._followed.progress}

    def parts(self) -> dict[str, Any]:
        """Return what of the page changes: ``main``, ``numbers``, ``title``, and their ``version``."""
        with self._lock:
            version, started = self._followed.version, time.thread_time()
            if version != self._parts["version"] and time.monotonic() >= self._rests_until:
                made = self._made()
                title = f"{self._followed.path.stem} · attnmonitor"
                self._parts = {"version": version, "title": title, "main": made.main, "numbers": made.numbers}
                self._rests_until = time.monotonic() + _REST * (time.thread_time() - started)
            return self._parts

    def _made(self) -> PageParts:
        try:
            record = self._followed.read()
            if record is not None:
                return page_parts([record])
            reason = self._followed.obstacle
        except Exception as error:  # what a record that no monitor has written may cause
            reason = error_text(error)
        heading = f"<h1 class='unknown' data-state='unknown'>unknown: {escape(reason)}</h1>"
        return PageParts(heading, {"runs": [], "grid": None, "compared": None, "dark": {}})


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD of the page, its parts and the version; refuses everything else."""

    server: LiveReport
    server_version, sys_version = "attnmonitor", ""
    timeout = 30  # seconds, of a browser that asks and does not read

    def do_GET(self) -> None:
        """Answer one request."""
        try:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        except ValueError:
            host = None
        path = urlsplit(self.path).path
        if host not in _HOSTS:
            self._answer(403, "text/plain", f"only {' and '.join(_HOSTS)} are answered")
        elif path == "/":
            self._answer(200, "text/html", live_page(self.server.parts()))
        elif path == "/newest":
            self._answer(200, "application/json", json.dumps(self.server.newest()))
        elif path == "/parts":
            self._answer(200, "application/json", json.dumps(self.server.parts(), allow_nan=False))
        else:
            self._answer(404, "text/plain", "there is only the page, at /")

    def do_HEAD(self) -> None:
        """Answer one request without the content."""
        self.do_GET()

    def _answer(self, status: int, kind: str, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        headers = {**_HEADERS, "Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(content))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Log no requests: there are two a second."""
