"""What a cluster is like, for doctor.py to judge: joined as a driver would, knocked at as a stranger would.

A small task on each node says what that host is like (hosts.py). Nothing is changed, and no page is read.
"""

from __future__ import annotations

import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ksmdist import engines, hosts
from ksmdist.doctor import Cluster, Dashboard, Host, Node

if TYPE_CHECKING:
    from ksmdist.engines.ray import Answer

__all__ = ["look"]

_REFUSALS = (401, 403)
_PATIENCE_S = 5.0
_JOBS = "/api/jobs/"  # what takes jobs asks for the token, if anything does


def look(address: str | None) -> Cluster:
    """Join the cluster at `address`, or one started here as a run would, and look at it.

    Raises EngineError where it cannot be joined.
    """
    runner = engines.start(engines.Choice("ray", address, "asked for"))
    from ksmdist.engines.ray import RayEngine, knock

    assert isinstance(runner, RayEngine)
    try:
        refuses, said = knock(runner.address)
        looked = runner.ask(hosts.look)
        clocks = runner.ask(_clock)
        return Cluster(
            address=runner.address,
            refuses=refuses,
            said=said,
            mode=os.environ.get("RAY_AUTH_MODE", ""),
            tls=os.environ.get("RAY_USE_TLS", "0") == "1",
            dashboard=_dashboard(runner.dashboard),
            nodes=_nodes(looked, clocks),
        )
    finally:
        runner.close()


def _clock(_: str) -> float:
    return time.time()


def _nodes(looked: Sequence[Answer], clocks: Sequence[Answer]) -> tuple[Node, ...]:
    skews = {
        (answer.name, answer.address): (answer.result - answer.answered, answer.result - answer.asked)
        for answer in clocks
        if answer.result is not None
    }
    return tuple(
        Node(
            answer.name,
            answer.address,
            answer.result if isinstance(answer.result, Host) else None,
            answer.why,
            skews.get((answer.name, answer.address)),
            answer.head,
        )
        for answer in looked
    )


def _dashboard(where: str) -> Dashboard:
    """Ask the dashboard for its jobs, without a token, past any proxy."""
    if not where:
        return Dashboard("", None)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    url = f"http://{where}"
    try:
        with opener.open(url + _JOBS, timeout=_PATIENCE_S) as answer:
            return Dashboard(url, False, f"HTTP {answer.status}")
    except urllib.error.HTTPError as error:
        # Without Ray's job extra there is no such page (404), but the rest of it answers.
        return Dashboard(url, error.code in _REFUSALS, f"HTTP {error.code}")
    except OSError as error:
        return Dashboard(url, None, str(getattr(error, "reason", error)))
