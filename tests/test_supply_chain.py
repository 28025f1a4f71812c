"""What ksmdist is made of: pinned, with hashes, listed, and audited or said not to be."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cyclonedx.schema
import jsonschema  # type: ignore[import-untyped]
import pytest
from referencing import Registry, Resource

from supply import audit, sbom
from supply.audit import NoAnswerError, check_installs, check_licences, check_pins, check_vulnerabilities
from supply.pins import LOCKS, ROOT, Pin, read_pins, runtime

PINS = read_pins(ROOT / "constraints.txt")
HASH = "0" * 64


def test_what_is_here_is_pinned() -> None:
    assert check_pins() == []
    assert len(PINS) > 100
    assert all(pin.hashes for name in LOCKS for pin in read_pins(ROOT / name))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("rich==15.0.0\n", "has no hashes"),
        (f"rich>=15 --hash=sha256:{HASH}\n", "not pinned"),
        (f"rich --hash=sha256:{HASH}\n", "not pinned"),
        (f"rich==15.* --hash=sha256:{HASH}\n", "not pinned"),
        (f"rich==15.0.0,<16 --hash=sha256:{HASH}\n", "not pinned"),
        (f"rich @ file:///x --hash=sha256:{HASH}\n", "not pinned"),
        (f"-r other.txt --hash=sha256:{HASH}\n", "no requirement"),
        (f"rich==15.0.0 --hash=md5:{HASH}\n", "no requirement"),
        (f"rich==15.0.0 --hash=sha256:{HASH[1:]}\n", "no requirement"),
    ],
)
def test_a_lock_file_that_pins_nothing_is_said(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "x.txt").write_text(f"# a comment\nnumpy==2.4.6 \\\n    --hash=sha256:{HASH}\n{text}")
    with pytest.raises(ValueError, match=why):
        read_pins(tmp_path / "x.txt")


def test_pins_are_read_with_their_markers(tmp_path: Path) -> None:
    text = (
        f"Numpy==2.4.6 ; python_full_version < '3.12' \\\n    --hash=sha256:{HASH} \\\n    --hash=sha256:{'1' * 64}\n"
    )
    (tmp_path / "x.txt").write_text(text)
    assert read_pins(tmp_path / "x.txt") == [
        Pin("numpy", "2.4.6", 'python_full_version < "3.12"', (HASH, "1" * 64)),
    ]


@pytest.mark.parametrize(
    "line",
    ["uv", "atheris==3.0.0", "--require-hashes -r other.txt", "--no-deps -e .", "-r constraints.txt", "--upgrade pip"],
)
def test_an_install_without_hashes_is_said(line: str) -> None:
    assert check_installs(f"setup:\n\t$(BIN)/python -m pip install -q {line}\n")
    assert not check_installs("\t$(BIN)/python -m pip install -q --require-hashes -r constraints.txt\n")


def licence(of: dict[str, str]) -> Callable[[str], str]:
    return lambda name: of.get(name, "MIT")


def test_licences() -> None:
    found, wrong = check_licences(PINS)
    assert wrong == []
    assert found["numpy"].startswith("BSD-3-Clause")
    for text in ("GPL-3.0-or-later", "GNU General Public License v3 (GPLv3)", "AGPL-3.0-only", ""):
        assert check_licences(PINS, licence({"rich": text}))[1] == [f"rich: {text or 'says no licence'}"]
    for text in ("LGPL-2.1-only", "GNU Lesser General Public License v3 (LGPLv3)"):
        assert check_licences(PINS, licence({"rich": text}))[1] == []


KNOWN = {"id": "PYSEC-2019-217", "fix_versions": ["2.10.1"], "aliases": ["CVE-2019-10906"], "description": ""}


def service(
    known: dict[str, list[Any]], skipped: Sequence[str] = (), lost: Sequence[str] = ()
) -> Callable[[Sequence[Pin]], Any]:
    """pip-audit's answers: vulnerabilities of known packages; some it could not look up, some that are not there."""

    def ask(pins: Sequence[Pin]) -> Any:
        assert len({pin.name for pin in pins}) == len(pins)
        answers: list[dict[str, Any]] = []
        for pin in pins:
            if pin.name in skipped:
                answers.append({"name": pin.name, "skip_reason": "Dependency not found on PyPI"})
            elif pin.name not in lost:
                answers.append({"name": pin.name, "version": pin.version, "vulns": known.get(pin.name, [])})
        return {"dependencies": answers, "fixes": []}

    return ask


def test_vulnerabilities_are_named() -> None:
    bad = {"id": "PYSEC-1", "fix_versions": [], "aliases": [], "description": ""}
    asked = service({"jinja2": [KNOWN], "numpy": [bad]})
    pins = [pin for pin in PINS if pin.name != "jinja2"]
    assert check_vulnerabilities([pin for pin in pins if pin.name != "numpy"], asked) == []
    found = check_vulnerabilities(pins, asked)
    assert found == [f"numpy {pin.version}: PYSEC-1; fixed in no version" for pin in pins if pin.name == "numpy"]
    assert len(found) == 2  # the version for each Python


@pytest.mark.parametrize(
    ("ask", "why"),
    [
        (service({}), "its silence means nothing"),
        (service({}, skipped=["jinja2"]), "not found on PyPI .*asked first"),
        (service({"jinja2": [KNOWN]}, skipped=["rich"]), "1 of .* packages: Dependency not found"),
        (service({"jinja2": [KNOWN]}, lost=["rich"]), "1 of .* packages: not in its answer"),
        (lambda _: {}, "not pip-audit's JSON"),
        (lambda _: [], "not pip-audit's JSON"),
        (lambda _: {"dependencies": [{"name": "jinja2", "version": "2.10"}]}, "not pip-audit's JSON"),
    ],
)
def test_silence_is_no_answer(ask: Callable[[Sequence[Pin]], Any], why: str) -> None:
    with pytest.raises(NoAnswerError, match=why):
        check_vulnerabilities([pin for pin in PINS if pin.name != "jinja2"], ask)


def test_exit_codes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert audit.main(["--offline"]) == 0
    assert "vulnerabilities were not asked for" in capsys.readouterr().out
    known = service({"jinja2": [KNOWN]})
    assert audit.main([], lambda _, pins: known([pin for pin in pins if pin.version])) == 1  # of jinja2 as pinned, too
    assert "AGAINST: jinja2" in capsys.readouterr().out
    assert audit.main([], lambda _, pins: known(pins) if len(pins) == 1 else service({})(pins)) == 0
    assert "audited: nothing known" in capsys.readouterr().out
    assert audit.main([], lambda _, pins: service({})(pins)) == 2
    said = capsys.readouterr()
    assert "NOT AUDITED" in said.err
    assert "audited: nothing known" not in said.out
    monkeypatch.setattr(audit, "check_pins", lambda: ["x"])
    assert audit.main(["--offline"]) == 1


def test_pip_audit_that_fails_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supply.audit.sys.executable", "/bin/false")
    with pytest.raises(NoAnswerError, match="ended with 1"):
        audit._pip_audit("pypi", [Pin("jinja2", "2.10", "", ())])


def pip_needs(names: Sequence[str]) -> dict[str, list[str]]:
    """What pip itself says that packages need."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "show", *names]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    found = re.findall(r"^Name: (\S+)$.*?^Requires: ?(.*?)$", text, re.M | re.S)
    return {
        name.lower().replace("_", "-"): [one.strip().lower() for one in needs.split(",") if one.strip()]
        for name, needs in found
    }


def test_runtime_is_what_pip_says() -> None:
    found: dict[str, list[str]] = {}
    queue = ["ksmdist", "duckdb"]
    while queue:
        new = pip_needs(queue)
        found |= new
        queue = sorted({one for needs in new.values() for one in needs} - found.keys())
    wanted = runtime(PINS)
    assert {one.name for one in wanted} | {"ksmdist"} == found.keys()
    assert {one.name for one in wanted if one.optional} == {"duckdb"}
    assert {one.name for one in wanted if one.direct} == {*found["ksmdist"], "duckdb"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dist") / "ksmdist-0.1.0-py3-none-any.whl"
    path.write_bytes(b"a wheel")
    return path


def test_the_bill_lists_what_is_pinned_for_running(wheel: Path) -> None:
    found = json.loads(sbom.bill(wheel, runtime(PINS), 1_700_000_000))
    names = {one.name for one in runtime(PINS)}
    pinned = sorted((pin.name, pin.version) for pin in PINS if pin.name in names)
    assert sorted((one["name"], one["version"]) for one in found["components"]) == pinned
    by_ref = {one["bom-ref"]: one for one in found["components"]}
    for pin in PINS:
        if pin.name in names:
            one = by_ref[f"pkg:pypi/{pin.name}@{pin.version}"]
            assert sorted(h["content"] for h in one["hashes"] if h["alg"] == "SHA-256") == sorted(pin.hashes)
            assert one["licenses"]
            assert one["purl"] == one["bom-ref"]
            assert one["scope"] == ("optional" if pin.name == "duckdb" else "required")
            markers = [p["value"] for p in one.get("properties", ())]
            assert markers == ([pin.marker] if pin.marker else [])
    root = found["metadata"]["component"]
    assert (root["name"], root["version"]) == ("ksmdist", "0.1.0")
    assert root["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(b"a wheel").hexdigest()}]
    graph = {one["ref"]: one.get("dependsOn", []) for one in found["dependencies"]}
    direct = {ref.split("/")[1].split("@")[0] for ref in graph[root["bom-ref"]]}
    assert direct == {one.name for one in runtime(PINS) if one.direct}
    queue: list[str] = [root["bom-ref"]]
    reached: set[str] = set()
    while queue:
        new = set(graph[queue.pop()]) - reached
        reached |= new
        queue += new
    assert reached == by_ref.keys()


def test_the_bill_is_cyclonedx(wheel: Path) -> None:
    folder = Path(cyclonedx.schema.__file__).parent / "_res"
    registry: Registry[Any] = Registry().with_resources(
        (f"http://cyclonedx.org/schema/{path.name}", Resource.from_contents(json.loads(path.read_text())))
        for path in folder.glob("*.schema.json")
    )
    schema = json.loads((folder / "bom-1.6.SNAPSHOT.schema.json").read_text())
    validator = jsonschema.Draft7Validator(schema, registry=registry)
    found = json.loads(sbom.bill(wheel, runtime(PINS), 0))
    assert [error.message for error in validator.iter_errors(found)] == []
    assert list(validator.iter_errors(found | {"components": [{"name": "x"}]}))


def test_the_same_wheel_has_the_same_bill(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bill = sbom.bill(wheel, runtime(PINS), 1_700_000_000)
    assert sbom.bill(wheel, runtime(PINS), 1_700_000_000) == bill
    other = tmp_path / wheel.name
    other.write_bytes(b"another wheel")
    serials = {json.loads(text)["serialNumber"] for text in (bill, sbom.bill(other, runtime(PINS), 1_700_000_000))}
    assert len(serials) == 2
    assert json.loads(bill)["metadata"]["timestamp"].startswith("2023-11-14T22:13:20")

    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert sbom.main([str(wheel.parent)]) == 0
    assert (wheel.parent / "ksmdist-0.1.0.cdx.json").read_text() == bill
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    subprocess.run(command, cwd=wheel.parent, check=True, capture_output=True, timeout=60)


def test_two_wheels_of_one_tree_are_the_same(tmp_path: Path) -> None:
    made = []
    for number in range(2):
        folder = tmp_path / str(number)
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
        env = {"SOURCE_DATE_EPOCH": "1700000000", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=120, env=env)
        (wheel,) = folder.glob("*.whl")
        made.append(wheel.read_bytes())
    assert made[0] == made[1]


def test_the_lock_names_no_place_of_this_machine() -> None:
    for name in LOCKS:
        assert not re.search(r"https?:|file:|--(extra-|find|index)| @ ", (ROOT / name).read_text()), name


def test_the_threat_model_names_what_is_there() -> None:
    """Each promise of SECURITY.md names what keeps it, and that exists."""
    text = (ROOT / "SECURITY.md").read_text()
    promises = re.search(r"## What is promised\n(.*?)\n## ", text, re.S)
    assert promises is not None
    rows = [line.split(" | ") for line in promises[1].splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        assert "`" in row[1] or "](" in row[1], row
    for path in re.findall(r"`((?:ksmdist|tests|supply|fuzz|jobs)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
