"""Commands that look whether memory images are safe here: doctor."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ksmdist import options, report
from ksmdist.errors import EngineError

__all__ = ["doctor_command"]


def doctor_command(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN...", help="Run directories to look at, too.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", help="A Ray cluster. [default: RAY_ADDRESS; without it, a Ray started here]"),
    ] = None,
    cluster: Annotated[bool, typer.Option("--cluster/--no-cluster", help="Look at Ray, or at this host alone.")] = True,
    as_json: options.Json = False,
) -> None:
    """Look what is unsafe for memory images on this host and its cluster; nothing is changed.

    Exit code 0 where all is well, 1 where something is unsafe, 3 where nothing is but something could not be found out.
    """
    from ksmdist import clusters, doctor, hosts

    findings = doctor.of_host(hosts.look(), [hosts.look_at_run(str(run)) for run in runs or []])
    address = address or os.environ.get("RAY_ADDRESS") or None
    if cluster:
        if not as_json:
            print(f"looking at {address or 'a Ray started here'} ...", file=sys.stderr)
        try:
            findings += doctor.of_cluster(clusters.look(address))
        except EngineError as error:
            findings.append(doctor.Finding("cluster", "unknown", f"{error.where}: {error.what}", error.hint, "Ray"))
    counts = doctor.summary(findings)
    if as_json:
        print(json.dumps({"findings": [one.as_dict() for one in findings], "summary": counts}))
    else:
        for where, some in itertools.groupby(findings, lambda one: one.where):
            print(report.printable(where or "this host"))
            for one in some:
                state = one.state if one.state in ("ok", "note") else one.state.upper()
                print(report.printable(f"  {state:8}{one.name}: {one.found}"))
                if one.advice and one.state != "ok":
                    print(report.printable(f"          -> {one.advice}"))
        print(", ".join(f"{count} {state}" for state, count in counts.items()))
    raise typer.Exit(doctor.exit_code(findings))
