"""A run as one HTML file that opens from disk: what was learned, and how it is known."""

from nearfar.report.compare import Contest, contest_of
from nearfar.report.page import write_comparison, write_report

__all__ = ["Contest", "contest_of", "write_comparison", "write_report"]
