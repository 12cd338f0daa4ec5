"""Report a run as one HTML file that opens offline: what it learned, and the evidence."""

from nearfar.app.report.compare import RunComparison, compare_runs
from nearfar.app.report.page import page_at, reporting, write_comparison, write_report

__all__ = [
    "RunComparison",
    "compare_runs",
    "page_at",
    "reporting",
    "write_comparison",
    "write_report",
]
