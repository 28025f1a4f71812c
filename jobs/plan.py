"""Entry point of a Ray job: `ksmdist plan`, for the cluster the job was submitted to. No page is read."""

import os
import sys

from ksmdist.cli import main

if __name__ == "__main__":
    # Ray sets RAY_ADDRESS for a job's driver, so that `--engine auto` takes this cluster.
    os.environ.setdefault("RAY_ADDRESS", "auto")
    sys.argv[1:1] = ["plan"]
    main()
