"""Self-contained HTML pages, for wide and narrow screens, light and dark."""

from __future__ import annotations

import html
from collections.abc import Collection, Sequence


def page(title: str, parts: Sequence[str]) -> str:
    """Return a page with its title as heading. parts: HTML."""
    return _PAGE.format(title=html.escape(title), parts="\n".join(parts))


def verbatim(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def table(lines: Sequence[Sequence[str]], best: Collection[int] = (), prose: Collection[int] = ()) -> str:
    """Return a table. lines: its cells as text, headings first. best: rows to mark. prose: columns whose lines wrap."""

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = (f'{tag} class="prose"' if number in prose else tag for number in range(len(cells)))
        return "".join(f"<{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    head, *rows = lines
    body = (
        ('<tr class="best">' if number in best else "<tr>") + line("td", row) + "</tr>"
        for number, row in enumerate(rows)
    )
    text = "\n".join(body)
    return (
        f'<div class="table"><table><thead><tr>{line("th", head)}</tr></thead><tbody>\n{text}\n</tbody></table></div>'
    )


# Greys and greens are translucent, to suit both a light and a dark background.
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.4 system-ui, sans-serif; margin: min(2em, 4vw); overflow-wrap: anywhere }}
pre {{ background: #8882; padding: 1em; white-space: pre-wrap }}
.table {{ overflow-x: auto; margin-bottom: 1em }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal }}
th, td {{ text-align: left; vertical-align: top; padding: .25em .7em; border-bottom: 1px solid #8885 }}
th, td {{ white-space: nowrap }}
th:first-child:not(.prose), td:first-child:not(.prose) {{ position: sticky; left: 0; background: Canvas }}
.prose {{ white-space: normal; min-width: min(16em, 45vw); max-width: 24em; overflow-wrap: anywhere }}
.best {{ background: #2a23; font-weight: 600 }}
.best td:first-child:not(.prose) {{ background: linear-gradient(#2a23, #2a23) Canvas }}
</style>
<h1>{title}</h1>
{parts}
</html>
"""
