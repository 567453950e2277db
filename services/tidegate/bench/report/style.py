"""The page's style: one column a run, colours for light and for dark, nothing from the network."""

from typing import Final

STYLE: Final = """
:root { color-scheme: light dark;
  --page: #f7f8fa; --card: #fff; --ink: #1b2430; --soft: #5c6878; --rule: #e3e7ec; --muted: #98a3b1;
  --good: #1f9e77; --late: #e0b23c; --wrong: #b5379a; --refused: #6f9bd8; --missed: #e8743b; --failed: #cf2e3c;
  --left: #b9c1cb; --c1: #2f6fd0; --c2: #1f9e77; --c3: #a3adb9; --c4: #e0922f; --c5: #cf3f4f; --c6: #8a5bd1;
  --c7: #3aa9c9; --c8: #b5894a; --c9: #d06aa8; --c10: #7d8794; }
@media (prefers-color-scheme: dark) { :root {
  --page: #12161c; --card: #1a2029; --ink: #e4e9f0; --soft: #9aa6b5; --rule: #2b333f; --muted: #718096;
  --good: #35c496; --late: #e8c35c; --wrong: #d868c0; --refused: #7aa7e8; --missed: #f08a55; --failed: #f0606c;
  --left: #566170; --c1: #6ea3f5; --c2: #35c496; --c3: #7a8696; --c4: #f0ab52; --c5: #f0606c; --c6: #a984ea;
  --c7: #5cc4e2; --c8: #cfa66c; --c9: #e58cc2; --c10: #98a3b1; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 34px 0 2px; }
p { margin: 0 0 10px; color: var(--soft); max-width: 90ch; }
section p { margin-bottom: 8px; font-size: 14px; }
.grid { stroke: var(--rule); stroke-width: 1; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(500px, 100%), 1fr)); gap: 0 16px; }
.runs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); gap: 16px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 12px 14px; }
figcaption { font-weight: 600; font-size: 13px; margin-bottom: 6px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .level { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 2 3; }
svg .level-name { fill: var(--ink); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 6px 0 0; padding: 0;
  font-size: 12px; color: var(--soft); }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 5px; }
.nothing { padding: 30px 0; text-align: center; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 7px 14px; text-align: right; border-top: 1px solid var(--rule); white-space: nowrap; }
tr:first-child > * { border-top: 0; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; }
.warning { color: var(--ink); border-left: 3px solid var(--missed); padding: 4px 10px; margin: 6px 0; font-size: 14px; }
.big { display: flex; flex-wrap: wrap; gap: 16px; margin: 18px 0; }
.big div { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 12px 18px; flex: 1; }
.big b { display: block; font-size: 26px; } .big span { color: var(--soft); font-size: 13px; }
.no { color: var(--failed); font-weight: 600; }
footer { margin-top: 40px; color: var(--soft); font-size: 13px; }
"""
