"""Plotly figures of a run, and the HTML report made of them: verdict first, then alarms, heads, coverage and cost.

The report is one file that needs no network and no server: numbers, plotly.js and the page are in it. Python makes the
text (`page`), the numbers (`numbers`) and the figures (`charts`, `page_charts`); the page's script puts the numbers of
the chosen step and head into the figures. A content security policy forbids the browser to load anything else.
"""

from attnmonitor.report.live import LiveReport
from attnmonitor.report.page import write_report

__all__ = ["LiveReport", "write_report"]
