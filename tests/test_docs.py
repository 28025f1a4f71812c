"""What the documents say exists does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    path
    for folder in (".", "docs", "docs/tables", "examples", "schemas", "jobs", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.md"))
]
COMMANDS = (
    "run",
    "plan",
    "info",
    "import",
    "export",
    "demo",
    "schema",
    "whatif",
    "explain",
    "unmerge",
    "capture",
    "verify-kernel",
    "report",
    "diff",
    "query",
    "publish",
    "doctor",
)


def help_of(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ksmdist", *command, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env={"COLUMNS": "200", "TERM": "dumb"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def options() -> dict[str, set[str]]:
    return {command: set(re.findall(r"--[a-z][a-z-]+", help_of(command))) for command in COMMANDS}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_options_links_and_targets_exist(document: Path, options: dict[str, set[str]]) -> None:
    text = document.read_text()
    for command, rest in re.findall(
        r"\bksmdist ([a-z]+(?:-[a-z]+)?)\b([^`\n#]*)", " ".join(re.findall(r"`[^`]+`|^    .*$", text, re.M))
    ):
        assert command in COMMANDS, command
        assert set(re.findall(r"--[a-z][a-z-]+", rest)) <= options[command], (command, rest)
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (document.parent / link).exists(), link
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z]+)`|^    make ([a-z]+)", text, re.M)) <= {
        pair for target in targets for pair in ((target, ""), ("", target))
    }


def test_readme_names_every_command_and_exit_code() -> None:
    readme = (ROOT / "README.md").read_text()
    for command in COMMANDS:
        assert f"ksmdist {command}" in readme or f"make {command}" in readme, command
    codes = re.search(r"Exit codes: (.*?)\.\n", readme, re.S)
    assert codes is not None
    said = " ".join(help_of().replace("│", " ").split())
    for code in re.findall(r"\b(\d+) ", codes[1]):
        assert re.search(rf"\b{code} ", said[said.index("Exit codes") :]), code
