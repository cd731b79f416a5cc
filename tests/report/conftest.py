"""Opening the report's page in the browser, whose console stays empty."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def show(browser: Any) -> Iterator[Callable[[Path], Any]]:
    def open_page(page: Path) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        browser.get(page.as_uri())
        WebDriverWait(browser, 60).until(lambda b: b.execute_script("return document.body.dataset.ready === 'yes'"))
        return browser

    yield open_page
    messages = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert messages == [], "the console stays empty"
