"""What ksmdist never does with what it reads, whatever that is: seen in its own source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ksmdist

SOURCE = Path(ksmdist.__file__).parent
BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
BANNED_METHODS = {
    ("yaml", "load"),
    ("yaml", "load_all"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("np", "load"),
    ("pa", "deserialize"),
    ("pa", "read_serialized"),
    ("os", "system"),
    ("os", "popen"),
}


def offences(code: str) -> Iterator[str]:
    """What a source does that nothing read may lead to."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"import {name}" for name in names if name.split(".")[0] in BANNED_MODULES)
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in BANNED_CALLS:
                yield called.id
            whose = called.value if isinstance(called, ast.Attribute) else None
            name = (whose.id if isinstance(whose, ast.Name) else "", getattr(called, "attr", ""))
            if name in BANNED_METHODS:
                yield ".".join(name)
            for keyword in node.keywords:
                value = keyword.value
                if keyword.arg in ("shell", "allow_pickle") and not (
                    isinstance(value, ast.Constant) and value.value is False
                ):
                    yield f"{keyword.arg}="


def test_nothing_read_is_unpickled_evaluated_or_given_to_a_shell() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 100
    found = {str(path.relative_to(SOURCE)): list(offences(path.read_text())) for path in files}
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from cloudpickle import loads",
        "eval(x)",
        "import yaml; yaml.load(x)",
        "np.load(x, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
    ],
)
def test_the_search_finds_each(code: str) -> None:
    assert list(offences(code))
