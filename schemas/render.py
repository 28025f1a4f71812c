"""Write schemas/*.json and docs/tables/*.md from ksmdist.tables; tests/test_tables.py checks that they are equal."""

import json
from pathlib import Path

from ksmdist.schema import render, render_index, render_markdown
from ksmdist.tables import TABLES

schemas = Path(__file__).parent
pages = schemas.parent / "docs" / "tables"
pages.mkdir(exist_ok=True)
for old in (*schemas.glob("*.json"), *pages.glob("*.md")):
    old.unlink()
for table in TABLES.values():
    (schemas / f"{table.name}.v{table.version}.json").write_text(json.dumps(render(table), indent=1) + "\n")
    (pages / f"{table.name}.md").write_text(render_markdown(table))
(pages / "README.md").write_text(render_index(TABLES.values()))
