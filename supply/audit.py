"""Audit what is pinned: hashes, build tools, licences, known vulnerabilities.

    python -m supply.audit             exit code 0: audited, nothing is known against it; 1: something is; 2: the
                                       vulnerability service did not answer, so that nothing is known of vulnerabilities
    python -m supply.audit --offline   all but vulnerabilities: 0 or 1

pip-audit calls a package that its service does not know, or a service that has no data at all, no vulnerability and
ends with 0. So the service is first asked for a version with a vulnerability known for years, and each pin must be in
its answer.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from supply.pins import LOCKS, ROOT, Pin, project, read_pins, runtime

__all__ = ["check_licences", "check_pins", "check_vulnerabilities", "licence_of", "main"]

_CANARY = Pin("jinja2", "2.10", "", ())  # CVE-2019-10906
_SECONDS = 900
_COPYLEFT = re.compile(r"\b(A?GPL)|(?<!lesser )general public license|affero", re.I)
_INSTALLS = re.compile(r"pip install(.*)$", re.M)
_OF_HASHES = re.compile(r" --require-hashes -r (\S+)$")
_OF_PROJECT = " --no-deps --no-build-isolation -e ."


class NoAnswerError(Exception):
    """The vulnerability service did not say what it had to."""


def check_pins() -> list[str]:
    """What is wrong with pins: of lock files, the build's requirements, the Makefile's installs, this environment."""
    wrong: list[str] = []
    locks: dict[str, list[Pin]] = {}
    for name in LOCKS:
        try:
            locks[name] = read_pins(ROOT / name)
        except (OSError, ValueError) as error:
            wrong.append(str(error))
    pinned: dict[str, set[str]] = {}
    for pin in locks.get("constraints.txt", ()):
        pinned.setdefault(pin.name, set()).add(pin.version)
    found: Mapping[str, Any] = project()
    for text in found["build-system"]["requires"]:
        need = Requirement(text)
        name, versions = canonicalize_name(need.name), {one.version for one in need.specifier if one.operator == "=="}
        if not versions or versions != pinned.get(name):
            wrong.append(f"pyproject.toml: the build requires {text}, constraints.txt pins {pinned.get(name)}")
    for text in found["project"]["dependencies"]:
        need = Requirement(text)
        here = pinned.get(canonicalize_name(need.name), set())
        if not here or not all(need.specifier.contains(version, prereleases=True) for version in here):
            wrong.append(f"pyproject.toml: {text} is not what constraints.txt pins: {here or 'nothing'}")
    wrong += check_installs((ROOT / "Makefile").read_text())
    every = pinned | {pin.name: {pin.version} for name, pins in locks.items() for pin in pins if name != LOCKS[0]}
    for dist in metadata.distributions():
        name = canonicalize_name(dist.metadata["Name"])
        if name in every and dist.version not in every[name]:
            wrong.append(f"installed is {name} {dist.version}, pinned {', '.join(sorted(every[name]))}: make setup")
    return wrong


def check_installs(makefile: str) -> list[str]:
    """What a Makefile installs without hashes, but for the project itself."""
    wrong = []
    for line in (
        found[1].replace(" -q", "").replace(" --disable-pip-version-check", "").rstrip()
        for found in _INSTALLS.finditer(makefile)
    ):
        of = _OF_HASHES.fullmatch(line)
        if line != _OF_PROJECT and (of is None or of[1] not in LOCKS):
            wrong.append(f"Makefile: pip install{line}: no file of hashes that is checked here")
    return wrong


def unpinned() -> list[str]:
    """What is installed here and pinned nowhere, but the project: Python's venv brings setuptools, for one."""
    names = {pin.name for lock in LOCKS for pin in read_pins(ROOT / lock)} | {"ksmdist"}
    found = {canonicalize_name(dist.metadata["Name"]): dist.version for dist in metadata.distributions()}
    return [f"{name} {version}" for name, version in sorted(found.items()) if name not in names]


def licence_of(name: str) -> str:
    """A package's licence as it says itself: an SPDX expression, classifiers, or a line of text; "" if it says none."""
    try:
        said = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return ""
    (expression,) = said.get_all("License-Expression") or ("",)
    if expression:
        return str(expression)
    trove = [text for text in said.get_all("Classifier") or () if text.startswith("License :: ")]
    names = [text.split(" :: ")[-1] for text in trove if text.split(" :: ")[-1] != "OSI Approved"]
    text = str((said.get_all("License") or ("",))[0]).strip().splitlines()
    return "; ".join(names) or (text[0] if text else "")


def check_licences(pins: Sequence[Pin], licence: Callable[[str], str] = licence_of) -> tuple[dict[str, str], list[str]]:
    """Licences of what the program needs to run, by name; and those that cannot go with it, or say nothing."""
    found = {one.name: licence(one.name) for one in runtime(pins)}
    wrong = [f"{name}: says no licence" for name, text in found.items() if not text]
    return found, wrong + [f"{name}: {text}" for name, text in found.items() if _COPYLEFT.search(text)]


def check_vulnerabilities(pins: Sequence[Pin], ask: Callable[[Sequence[Pin]], Any]) -> list[str]:
    """Known vulnerabilities of pins, as lines. ask: pip-audit's JSON for pins of different packages.

    Raises NoAnswerError where the service is not one that knows vulnerabilities, or does not answer for every pin.
    """
    try:
        answer = _answers(ask([_CANARY]), [_CANARY])
    except NoAnswerError as error:
        raise NoAnswerError(f"{error} (asked first for a version with a vulnerability known since 2019)") from None
    if not answer:
        raise NoAnswerError(f"it knows nothing against {_CANARY.name} {_CANARY.version}, so its silence means nothing")
    found: list[str] = []
    rest = list({(pin.name, pin.version): pin for pin in pins}.values())
    while rest:  # one version of each package at a time
        some = list({pin.name: pin for pin in reversed(rest)}.values())
        found += _answers(ask(some), some)
        rest = [pin for pin in rest if pin not in some]
    return found


def _answers(said: Any, pins: Sequence[Pin]) -> list[str]:
    """Lines of an answer that has to have every pin, and nothing skipped."""
    try:
        by_pin = {
            (str(canonicalize_name(one["name"])), str(one["version"])): one["vulns"]
            for one in said["dependencies"]
            if "skip_reason" not in one
        }
        skipped = [one["skip_reason"] for one in said["dependencies"] if "skip_reason" in one]
        missing = [pin for pin in pins if (pin.name, pin.version) not in by_pin]
        if missing:
            why = str(skipped[0]) if skipped else "not in its answer"
            raise NoAnswerError(f"nothing is known of {len(missing)} of {len(pins)} packages: {why}")
        return [
            f"{pin.name} {pin.version}: {one['id']}; fixed in {', '.join(one['fix_versions']) or 'no version'}"
            for pin in pins
            for one in by_pin[pin.name, pin.version]
        ]
    except (KeyError, TypeError):
        raise NoAnswerError("its answer is not pip-audit's JSON") from None


def _pip_audit(service: str, pins: Sequence[Pin]) -> Any:
    """pip-audit's answer for pins; raises NoAnswerError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "pins.txt"
        wanted.write_text("".join(f"{pin.name}=={pin.version}\n" for pin in pins))
        command = [sys.executable, "-m", "pip_audit", "-r", str(wanted), "--no-deps", "--disable-pip", "-f", "json"]
        command += ["--progress-spinner", "off", "--vulnerability-service", service]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
            return json.loads(done.stdout)
        except subprocess.TimeoutExpired:
            raise NoAnswerError(f"no answer in {_SECONDS} s") from None
        except ValueError:
            said = done.stderr.strip().splitlines()
            raise NoAnswerError(said[-1] if said else f"pip-audit ended with {done.returncode}") from None


def main(arguments: Sequence[str] | None = None, ask: Callable[[str, Sequence[Pin]], Any] = _pip_audit) -> int:
    """Audit, print what was found, return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m supply.audit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--offline", action="store_true", help="all but known vulnerabilities")
    parser.add_argument("--service", default="pypi", help="vulnerability service of pip-audit: pypi or osv")
    options = parser.parse_args(arguments)
    wrong = check_pins()
    if not wrong:
        pins = read_pins(ROOT / LOCKS[0])
        licences, against = check_licences(pins)
        wrong += against
        for name, text in licences.items():
            print(f"licence: {name}: {text}")
        for text in unpinned():
            print(f"note: installed and not pinned: {text}")
        print(f"pins: {len(pins)} requirements of {LOCKS[0]} have one version and hashes; {len(licences)} to run")
    unknown = ""
    if not options.offline and not wrong:
        try:
            every = [pin for lock in LOCKS for pin in read_pins(ROOT / lock)]
            wrong += check_vulnerabilities(every, lambda some: ask(options.service, some))
        except NoAnswerError as error:
            unknown = str(error)
    for text in wrong:
        print(f"AGAINST: {text}")
    if unknown:
        print(f"NOT AUDITED for vulnerabilities: service {options.service}: {unknown}", file=sys.stderr)
        return 2
    if wrong:
        print(f"{len(wrong)} found", file=sys.stderr)
        return 1
    print("audited offline: vulnerabilities were not asked for" if options.offline else "audited: nothing known")
    return 0


if __name__ == "__main__":
    sys.exit(main())
