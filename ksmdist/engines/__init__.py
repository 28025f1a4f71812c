"""Engines: who runs the flow. `inline` is the reference; `ray` is for large inputs and clusters."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ksmdist.engines.base import Engine, Machines, Stage, any_node, figures_of_nothing
from ksmdist.engines.inline import InlineEngine
from ksmdist.errors import SettingsError

__all__ = ["Choice", "Engine", "Machines", "Stage", "any_node", "choose", "figures_of_nothing", "start"]

RAY_START_S = 4.4
"""Seconds that starting Ray, its workers and stopping it cost, with its import (benchmarks/rates.py, Ray 2.60)."""

INLINE_S_PER_GIB = 0.25
"""Seconds one CPU takes to scan and merge a GiB of cached pages, as a Ray worker nearly does (benchmarks/rates.py)."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An engine's name, the cluster's address if any, and why this one."""

    name: str
    address: str | None
    why: str


def choose(engine: str, address: str | None, nbytes: int, cpus: int | None = None, unpack_s: float = 0.0) -> Choice:
    """Which engine to use for `nbytes` of pages; `auto` weighs Ray's start against what it wins.

    unpack_s: seconds that one CPU needs more for pages that lie compressed.
    address None: RAY_ADDRESS is honoured, as Ray does. Raises SettingsError for an unknown engine.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    if engine not in ("auto", "inline", "ray"):
        raise SettingsError(f"{engine!r} is unknown", "engine", "use auto, inline or ray")
    if engine != "auto":
        return Choice(engine, address if engine == "ray" else None, "asked for")
    if address:
        return Choice("ray", address, f"the cluster at {address} was named")
    cpus = cpus or len(os.sched_getaffinity(0))
    gib = nbytes / (1 << 30)
    won = (gib * INLINE_S_PER_GIB + unpack_s) * (1 - 1 / cpus)
    if won > RAY_START_S:
        return Choice("ray", None, f"{gib:.1f} GiB on {cpus} CPUs: Ray wins about {won:.0f} s, more than its start")
    return Choice(
        "inline", None, f"{gib:.1f} GiB on {cpus} CPUs: Ray would win {won:.1f} s, its start costs {RAY_START_S:.0f} s"
    )


def start(choice: Choice) -> Engine:
    """Start the chosen engine; close() it after use. Raises EngineError."""
    if choice.name == "inline":
        return InlineEngine()
    # Ray reads its mode when it is imported; up to 2.60 a driver does not take the token that
    # `ray start` has made and asks for, unless told to. For a cluster that was started without tokens, which
    # `ray start` does only if RAY_AUTH_MODE=disabled tells it, the same must be set here.
    if choice.address and _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ksmdist.engines.ray import RayEngine  # half a second of imports that inline need not pay

    return RayEngine(choice.address)


def _has_token() -> bool:
    """Whether Ray finds a token in one of its three places (docs.ray.io, ray-security/token-auth)."""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or os.path.isfile(os.path.expanduser("~/.ray/auth_token"))
