"""A run as one HTML file that opens from disk: what was learned, and how it is known."""

from nearfar.app.report.compare import Contest, contest_of
from nearfar.app.report.page import page_at, reporting, write_comparison, write_report

__all__ = ["Contest", "contest_of", "page_at", "reporting", "write_comparison", "write_report"]
