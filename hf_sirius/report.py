"""A door: the page that shows what became of each token."""

from .study.report import report, write_report


__all__ = ["report", "write_report"]
