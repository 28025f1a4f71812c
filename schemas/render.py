"""Write schemas/*.json, docs/tables/*.md and the end of docs/publish.md from ksmdist.tables; tests check that."""

import json
from pathlib import Path

from ksmdist.schema import render, render_index, render_markdown
from ksmdist.tables import TABLES
from ksmdist.tables.published import render_decisions

schemas = Path(__file__).parent
pages = schemas.parent / "docs" / "tables"
pages.mkdir(exist_ok=True)
for old in (*schemas.glob("*.json"), *pages.glob("*.md")):
    old.unlink()
for table in TABLES.values():
    (schemas / f"{table.name}.v{table.version}.json").write_text(json.dumps(render(table), indent=1) + "\n")
    (pages / f"{table.name}.md").write_text(render_markdown(table))
(pages / "README.md").write_text(render_index(TABLES.values()))
publish = schemas.parent / "docs" / "publish.md"
kept, marker, _ = publish.read_text().partition("edit it there. -->\n\n")
publish.write_text(kept + marker + render_decisions())
