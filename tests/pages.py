"""What tests do on the report's page in a browser: click, look through a narrow screen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CELL_CENTER = """
    const div = document.getElementById(arguments[0]), axes = div._fullLayout;
    const plot = div.querySelector('.nsewdrag').getBoundingClientRect();
    return [plot.left + axes.xaxis.d2p(arguments[1]), plot.top + axes.yaxis.d2p(arguments[2])];
"""


def click_cell(browser: Any, chart: str, head: int, row: int) -> None:
    from selenium.webdriver import ActionChains

    browser.execute_script("document.getElementById(arguments[0]).scrollIntoView({block: 'center'})", chart)
    x, y = browser.execute_script(CELL_CENTER, chart, head, row)
    pointer = ActionChains(browser, duration=50)
    pointer.w3c_actions.pointer_action.move_to_location(int(x), int(y))
    pointer.pause(0.2).click().pause(0.5).perform()


@contextmanager
def narrow_screen(browser: Any) -> Iterator[None]:
    """The screen of a phone, 390 pixels wide."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        yield
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def open_at(browser: Any, page: Path, address: str = "") -> None:
    """Load the page anew, at an address from ``#`` on."""
    browser.get("about:blank")
    browser.get(page.as_uri() + address)
    wait_for(browser, lambda: browser.execute_script("return document.body.dataset.ready === 'yes'"))


def wait_for(browser: Any, condition: Callable[[], Any]) -> None:
    """Return once the condition is true; a minute without it is a failure."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60).until(lambda _: condition())


def text_of(browser: Any, element: str) -> str:
    """Text of the element with this id."""
    return str(browser.find_element("id", element).text)


def choice(browser: Any) -> tuple[str, str, str]:
    """The chosen head, metric and step, as the page shows them."""
    metric = browser.execute_script("return document.getElementById('metric').value")
    return text_of(browser, "chosen"), metric, text_of(browser, "step-shown")


OVERLAPS = """
    const boxes = [];
    for (const text of document.querySelectorAll(".js-plotly-plot svg text")) {
        const box = text.getBoundingClientRect();
        if (text.textContent.trim() && box.width) boxes.push([text.textContent, box]);
    }
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), range = document.createRange();
    while (walker.nextNode()) {
        const node = walker.currentNode, parent = node.parentElement;
        if (!node.textContent.trim() || parent.closest("script, style, svg, select, datalist, .scroll, pre")) continue;
        if (!parent.checkVisibility()) continue;
        range.selectNodeContents(node);
        for (const box of range.getClientRects()) boxes.push([node.textContent.trim(), box]);
    }
    const found = [];
    boxes.forEach(([text, a], at) => boxes.slice(at + 1).forEach(([other, b]) => {
        const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (width > 2 && height > 4) found.push(`${text} | ${other}`);
    }));
    return found;
"""


def overlapping_texts(browser: Any) -> list[str]:
    """Pairs of texts whose boxes overlap, in figures and around them."""
    browser.execute_script("document.querySelector('nav').style.position = 'static'")
    return list(browser.execute_script(OVERLAPS))
