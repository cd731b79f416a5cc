"""The live page shows each new sample, keeps what the reader chose, and is served to this machine only."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from record_writer import RUN, SAMPLES, WriterProcess

from attnmonitor.cli import main
from attnmonitor.record import RecordWriter

pytest.importorskip("plotly")

from attnmonitor.report import LiveReport


@contextmanager
def served(path: Path) -> Iterator[LiveReport]:
    with LiveReport(path, port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server: LiveReport, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer.status, content, {name.lower(): value for name, value in answer.getheaders()}


def test_page_and_parts_follow_the_record(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    with served(path) as server:
        status, page, _ = ask(server)
        assert status == 200
        assert f"unknown: {path} is not there yet: waiting for the run" in page
        with RecordWriter(path, run=RUN.config) as record:
            versions = [json.loads(ask(server, "/newest")[1])["version"]]
            for sample in SAMPLES[:3]:
                record.append(sample)
                deadline = time.monotonic() + 10
                while (newest := json.loads(ask(server, "/newest")[1]))["version"] == versions[-1]:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)  # the server rests between two pages
                parts = json.loads(ask(server, "/parts")[1])
                assert parts["numbers"]["runs"][0]["steps"][-1] == sample.global_step
                assert newest["progress"].startswith(f"step {sample.global_step}, written ")
                versions.append(parts["version"])
        assert len(set(versions)) == 4
        assert "8 heads in 2 layers watched over 3 samples" in ask(server)[1]
        (tmp_path / "run.sqlite").write_bytes(b"no record any more " * 500)
        assert ask(server)[0] == 200, "what was read stays"


def test_only_this_machine_is_answered_and_only_with_the_page(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    with served(tmp_path / "run.sqlite") as server:
        assert server.server_address[0] == "127.0.0.1"
        for host in ("127.0.0.1", "localhost", "LOCALHOST:99", f"127.0.0.1:{server.server_port}"):
            assert ask(server, Host=host)[0] == 200, host
        for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil:80", "[::1", "", "evil@localhost.com"):
            status, content, _ = ask(server, Host=host)
            assert (status, "waiting" in content) == (403, False), host
        for other in (
            "/secret.txt",
            "/../secret.txt",
            "//secret.txt",
            "/run.sqlite",
            "/index.html",
            "/%2e%2e/secret.txt",
        ):
            assert ask(server, other)[0] == 404, other
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(server, method=method)[0] == 501, method
        status, content, headers = ask(server, method="HEAD")
        assert (status, content) == (200, "")
        assert "access-control-allow-origin" not in headers
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cache-control"] == "no-store"


def test_port_that_is_taken_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["report", str(tmp_path / "run.sqlite"), "--live", "--port", str(port)]) == 2
    assert f"port {port} cannot be used (Address already in use)" in capsys.readouterr().err
    (tmp_path / "notes.sqlite").write_text("no database " * 100)
    for arguments, message in {
        ("notes.sqlite", "--live"): "notes.sqlite",
        ("run.sqlite", "--live", "--port", "70000"): "port=70000 is no port",
        ("run.sqlite", "--live", "--out", "page.html"): "leave out --out",
        ("run.sqlite", "--port", "80"): "--port 80 is for --live",
    }.items():
        assert main(["report", str(tmp_path / arguments[0]), *arguments[1:]]) == 2
        assert message in capsys.readouterr().err


def test_browser_shows_new_samples_and_keeps_the_choice(tmp_path: Path, browser: Any) -> None:
    def until(condition: str, *arguments: Any) -> None:
        from selenium.common.exceptions import TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        try:
            WebDriverWait(browser, 60, 0.05).until(lambda b: b.execute_script(f"return {condition}", *arguments))
        except TimeoutException:
            note = browser.execute_script("return document.getElementById('live')?.textContent")
            pytest.fail(f"{condition} {arguments}: {note}; {browser.get_log('browser')}")

    path = tmp_path / "run.sqlite"
    last_step = "page.runs[0]?.steps.at(-1) === arguments[0]"
    with served(path) as server:
        browser.get(server.url)
        until("document.querySelector('h1').textContent.includes('waiting for the run')")
        writer = WriterProcess(path)
        delays = []
        for index in range(3):
            writer.sample(index)
            written = time.monotonic()
            until(last_step, 50 * index)
            delays.append(time.monotonic() - written)
        assert min(delays) <= 3.0, "on a machine that has nothing else to do, all of them"
        browser.execute_script("location.hash = '#layer=model.layers.1.self_attn&head=3&metric=energy_rms'")
        until("document.getElementById('chosen').textContent === 'layers.1 head 3'")
        browser.execute_script("scrollTo(0, 600)")
        writer.kill()
        writer = WriterProcess(path)
        writer.sample(3)
        until(last_step, 150)
        texts = "['chosen', 'step-shown'].map(id => document.getElementById(id).textContent)"
        shown = f"return [...{texts}, document.getElementById('metric').value, scrollY]"
        assert browser.execute_script(shown) == ["layers.1 head 3", "150", "energy_rms", 600]
        writer.end()
        until("document.getElementById('live').textContent.includes('the run has ended')")
    until("document.getElementById('live').classList.contains('stopped')")
    browser.get("about:blank")
    browser.get_log("browser")  # connections that were refused after the end
