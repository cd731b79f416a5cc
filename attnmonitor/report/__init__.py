"""One HTML file that shows a run to whoever has a browser: verdict first, then what, where and when.

The file needs no network and no server: the numbers, plotly.js and the page are in it. Python decides what is said and
which numbers travel (`page`, `numbers`), the page's script only draws them; the browser is told to load nothing else.
"""

from attnmonitor.report.page import write_report

__all__ = ["write_report"]
