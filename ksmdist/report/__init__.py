"""Results for people: pure rendering, from tables and summaries to a text stream."""

from __future__ import annotations

from ksmdist.report.bar import Bar, Log
from ksmdist.report.diff import diff_summary, render_diff
from ksmdist.report.info import render_info
from ksmdist.report.plan import render_plan
from ksmdist.report.predictions import render_explain, render_prediction, render_unmerge, render_whatif
from ksmdist.report.rows import render_rows
from ksmdist.report.screen import render_summary
from ksmdist.report.terminal import format_bytes, headline, printable, render, render_filtered

__all__ = [
    "Bar",
    "Log",
    "diff_summary",
    "format_bytes",
    "headline",
    "printable",
    "render",
    "render_diff",
    "render_explain",
    "render_filtered",
    "render_info",
    "render_plan",
    "render_prediction",
    "render_rows",
    "render_summary",
    "render_unmerge",
    "render_whatif",
]
