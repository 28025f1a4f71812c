"""Write schemas/*.json from ksmdist.tables; tests/test_tables.py checks that they are equal."""

import json
from pathlib import Path

from ksmdist.schema import render
from ksmdist.tables import TABLES

here = Path(__file__).parent
for old in here.glob("*.json"):
    old.unlink()
for table in TABLES.values():
    (here / f"{table.name}.v{table.version}.json").write_text(json.dumps(render(table), indent=1) + "\n")
