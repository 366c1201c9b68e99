"""The HTML document of every report, with an inline style sheet that follows the system's light or dark scheme.

Series colours are distinguishable in both schemes and with red-green colour blindness (blue, orange, teal, violet, rose,
ochre). Text has a contrast of at least 4.5 to 1.
"""

from __future__ import annotations

from html import escape

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1d1f23; --soft: #5d6470; --rule: #e3e1dc; --grid: #eceae6;
  --mark: #e5eefb; --good: #0d6b45; --bad: #a53a1d;
  --s1: #2a62b8; --s2: #c4601a; --s3: #14836c; --s4: #7f4fae; --s5: #b83a66; --s6: #8a6d0b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --card: #1b1e23; --ink: #e7e8ea; --soft: #9ba3af; --rule: #2d3138; --grid: #272b31;
    --mark: #1f3350; --good: #62c99b; --bad: #f0937a;
    --s1: #7cacf2; --s2: #f0a063; --s3: #55c4a8; --s4: #be9be8; --s5: #ee86a8; --s6: #d3b550;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 1120px; margin: 0 auto; padding: 56px 32px 72px; }
h1 {
  font-size: 34px; line-height: 1.15; letter-spacing: -0.02em; font-weight: 650; margin: 6px 0 0;
  text-wrap: balance;
}
h2 { font-size: 20px; line-height: 1.3; letter-spacing: -0.01em; font-weight: 620; margin: 56px 0 16px; }
h3 { font-size: 15px; line-height: 1.4; font-weight: 600; margin: 0; }
p { margin: 0; max-width: 72ch; }
.eyebrow { color: var(--soft); font-size: 13px; letter-spacing: 0.02em; }
.summary { font-size: 18px; margin-top: 14px; }
.caption { color: var(--soft); font-size: 13px; line-height: 1.45; margin-top: 2px; }
.notice {
  margin-top: 14px; padding: 10px 14px; border-left: 3px solid var(--s2); background: var(--card); font-size: 14px;
  max-width: none;
}
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.facts {
  display: grid; grid-template-columns: repeat(4, 1fr); gap: 1px; margin: 32px 0 0; overflow: hidden;
  background: var(--rule);
}
.facts div { background: var(--card); padding: 14px 18px 16px; }
dt { color: var(--soft); font-size: 13px; }
dd {
  margin: 2px 0 0; font-size: 19px; line-height: 1.3; font-weight: 600; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums;
}
dd small { display: block; color: var(--soft); font-size: 13px; font-weight: 400; margin-top: 2px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 11px 18px; text-align: right; border-top: 1px solid var(--rule); }
thead th { border-top: 0; color: var(--soft); font-size: 13px; font-weight: 500; vertical-align: bottom; }
th:first-child { text-align: left; }
tbody th { font-weight: 500; }
th small, td small { display: block; color: var(--soft); font-size: 13px; font-weight: 400; }
td.best { background: var(--mark); font-weight: 650; }
td.reference { color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 20px; }
figure { margin: 0; padding: 18px 20px 12px; display: flex; flex-direction: column; }
figure svg { display: block; width: 100%; height: auto; margin-top: auto; padding-top: 10px; }
.legend {
  display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 8px 0 0; padding: 0; list-style: none; font-size: 13px;
}
.legend li { display: flex; align-items: center; gap: 7px; }
.legend i { width: 14px; height: 3px; border-radius: 2px; }
.legend b { font-weight: 600; font-variant-numeric: tabular-nums; }
svg text { font-size: 11.5px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--grid); }
svg .base { stroke: var(--rule); }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .raw { fill: none; stroke-width: 1; opacity: 0.24; stroke-linejoin: round; }
svg .area { stroke: none; opacity: 0.85; }
svg .level { stroke: var(--ink); stroke-dasharray: 5 4; opacity: 0.7; }
svg .level-label { fill: var(--ink); paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
COLOURS
.sample { padding: 18px 20px 8px; margin-top: 16px; }
.sample > p { font-size: 15px; }
.sample dl { margin: 12px 0 0; }
.sample dl div {
  display: grid; grid-template-columns: 150px 1fr 72px; gap: 4px 18px; padding: 9px 0;
  border-top: 1px solid var(--rule); align-items: baseline;
}
.sample dd { font-size: 14px; font-weight: 400; margin: 0; white-space: pre-wrap; }
.verdict { font-size: 13px; font-weight: 600; text-align: right; }
.right { color: var(--good); }
.wrong { color: var(--bad); }
details { margin-top: 16px; }
details + p { margin-top: 28px; }
summary { cursor: pointer; padding: 13px 18px; font-size: 15px; font-weight: 500; }
summary:focus-visible { outline: 2px solid var(--s1); outline-offset: 2px; border-radius: 10px; }
pre {
  margin: 0; padding: 4px 18px 18px; overflow-x: auto;
  font: 13px/1.55 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
}
footer {
  margin-top: 56px; padding-top: 16px; border-top: 1px solid var(--rule); color: var(--soft); font-size: 13px;
}
@media (max-width: 860px) {
  .facts { grid-template-columns: repeat(2, 1fr); }
}
@media (max-width: 600px) {
  main { padding: 32px 16px 48px; }
  h1 { font-size: 27px; }
  th, td { padding: 9px 11px; }
  .sample dl div { grid-template-columns: 1fr auto; }
  .sample dd { grid-row: 2; grid-column: 1 / -1; }
  svg text { font-size: 14px; }
}
@media print {
  body { background: none; }
  .card { break-inside: avoid; }
}
"""


def page(title: str, body: str, *, series: int) -> str:
    """Returns the HTML document around ``body``, which is HTML; ``title`` is plain text."""
    colours = "\n".join(
        f"svg .s{n} {{ stroke: var(--s{n}); }} svg .dot.s{n}, svg .area.s{n} {{ fill: var(--s{n}); }} "
        f"i.s{n} {{ background: var(--s{n}); }}"
        for n in range(1, series + 1)
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE.replace("COLOURS", colours)}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
