"""ksmdist: what Linux KSM would merge in memory images, and what that would save.

import ksmdist
run = ksmdist.run(["guest.elf"], "out")
run.summary["counters"]["pages_sharing"]
"""

from __future__ import annotations

from ksmdist.errors import KsmdistError
from ksmdist.pipeline import run
from ksmdist.runs import Run, load, whatif
from ksmdist.settings import Settings
from ksmdist.version import __version__

__all__ = ["KsmdistError", "Run", "Settings", "__version__", "load", "run", "whatif"]
