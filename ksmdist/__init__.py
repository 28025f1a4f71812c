"""ksmdist: what Linux KSM would merge in memory images, and what that would save.

import ksmdist
run = ksmdist.run(["guest.elf"], "out")
run.summary["counters"]["pages_sharing"]
"""

from __future__ import annotations

from ksmdist.errors import KsmdistError
from ksmdist.pipeline import Run, run
from ksmdist.settings import Settings
from ksmdist.version import __version__

__all__ = ["KsmdistError", "Run", "Settings", "__version__", "run"]
