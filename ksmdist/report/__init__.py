"""Results for people: pure rendering, from tables and summaries to a text stream."""

from __future__ import annotations

from ksmdist.report.bar import Bar, Log
from ksmdist.report.plan import render_plan
from ksmdist.report.predictions import render_explain, render_prediction, render_unmerge, render_whatif
from ksmdist.report.terminal import format_bytes, headline, render

__all__ = [
    "Bar",
    "Log",
    "format_bytes",
    "headline",
    "render",
    "render_explain",
    "render_plan",
    "render_prediction",
    "render_unmerge",
    "render_whatif",
]
