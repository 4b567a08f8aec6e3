"""Style sheet of the report page: light and dark, from a phone to a wall."""

_ROOMS = {".w4": "18rem", ".w6": "30rem", ".w9": "46rem", ".w99": "999rem"}
"""By the class of a table, which tells how many columns it has at most: the room that these need."""
_FOLDED = """@container (max-width: ROOM) {
TABLE th, TABLE td:empty { display: none }
TABLE tr, TABLE td { display: block; text-align: left; border: 0; padding: 0 }
TABLE tr { border-bottom: 1px solid var(--rule); padding: .25rem 0 }
TABLE td + td::before { content: attr(data-of) ": "; color: var(--soft) } }
"""

STYLE = (
    """
:root { color-scheme: light dark; --back: #fbfbfa; --card: #fff; --ink: #1d2126; --soft: #5d6670; --rule: #dfe2e6;
  --bad: #c0272d; --badback: #fdeeee; --news: #1f6f54; --newsback: #e9f5f0;
  --c0: #1f5fbf; --c1: #d1600a; --c2: #16825d; --c3: #a8327d; --c4: #8a6d00; --c5: #0e7f96; --c6: #6b4fc4;
  --c7: #6d6d6d }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --card: #1c2024; --ink: #e8eaed; --soft: #a3abb4;
  --rule: #353b42; --bad: #ff7a76; --badback: #3a2022; --news: #6fcfa8; --newsback: #19302a;
  --c0: #79aef7; --c1: #ff9d4d; --c2: #52c79a; --c3: #ee86c6; --c4: #dcbd4a; --c5: #5cc6dc; --c6: #b09cff;
  --c7: #b5b5b5 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1360px; padding: 1rem clamp(.8rem, 3vw, 2.5rem) 4rem; background: var(--back);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .6rem 0 .2rem } h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem;
  border-bottom: 1px solid var(--rule); padding-bottom: .3rem } h3 { font-size: 1.02rem; margin: 1.2rem 0 .3rem }
p { margin: .3rem 0; max-width: 46rem } .soft, figcaption, summary { color: var(--soft); font-size: .86rem }
a { color: var(--c0) } nav a { display: inline-block; padding: .35rem .9rem .35rem 0 }
code, .name { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .9em }
.grid { display: grid; gap: .9rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)) }
.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); margin-bottom: .9rem }
.grid > *, figure { min-width: 0; margin: 0 }
.cell, .card { background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; padding: .7rem .8rem } figure > b, h3 { font-size: .95rem }
.card { margin: 0 0 .9rem } .card > .grid { margin-top: .7rem } .card h3 { margin-top: 0 }
.cell figure + figure { margin-top: .5rem }
.bad { border-left: 4px solid var(--bad) } .news { border-left: 4px solid var(--news) }
.badge { display: inline-block; border-radius: 999px; padding: .05rem .6rem; font-size: .82rem;
  margin: .1rem .3rem .1rem 0;
  color: var(--bad); background: var(--badback) } .badge.good { color: var(--news); background: var(--newsback) }
dl { display: flex; flex-wrap: wrap; gap: .2rem 1.6rem; margin: .5rem 0 } dt { color: var(--soft); font-size: .78rem }
dd { margin: 0 } dl div { min-width: 0 }
svg { display: block; width: 100%; height: auto; margin: .3rem 0 }
.beside { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem } .beside > div { flex: 1 1 15rem; min-width: 0 }
.beside > .grid { flex: 2 1 33rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)) }
.card p { max-width: none } .when > div { min-width: 0 }
.track { position: relative; height: 16px; margin: 0 6px .3rem; border-bottom: 1px solid var(--rule) }
.track i { position: absolute; top: 4px; height: 8px; min-width: 3px; border-radius: 2px }
.track i.bad { background: var(--bad); border: 0 } .track i.news { background: var(--news); border: 0 }
.track b { position: absolute; top: 3px; width: 10px; height: 10px; margin-left: -5px; border-radius: 50%;
  background: var(--card); border: 2px solid var(--ink) }
.ends { display: flex; justify-content: space-between; color: var(--soft); font-size: .8rem }
svg text { fill: var(--soft);
  font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif } svg .y { text-anchor: end }
svg path { fill: none } svg image { image-rendering: pixelated } path.rule { stroke: var(--rule) }
path.line { stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round } path.lost { stroke-width: 1.5 }
path.mark { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 4 3 }
path.null { stroke: var(--soft); stroke-dasharray: 2 4 }
.keys { display: flex; flex-wrap: wrap; gap: 0 .9rem; list-style: none; margin: 0; padding: 0; font-size: .8rem }
.keys i { display: inline-block; width: 1.1em; height: 0; border-top: 3px solid; vertical-align: middle;
  margin-right: .35em }
.keys .null i { border-top-style: dotted; color: var(--soft) }
.keys .mark i { border-top-style: dashed; color: var(--bad) } .bar { width: 6rem; height: .6rem;
  vertical-align: middle }
.fits { container-type: inline-size } table { border-collapse: collapse; font-size: .84rem; margin: .4rem 0;
  width: 100%; table-layout: fixed }
th, td { padding: .2rem .7rem .2rem 0; text-align: right; border-bottom: 1px solid var(--rule);
  font-variant-numeric: tabular-nums; vertical-align: top }
th { font-weight: 600; vertical-align: bottom } th:first-child { width: 22% }
th:first-child, td:first-child, .words td, .words th { text-align: left } summary { cursor: pointer; padding: .3rem 0 }
"""
    + "".join(_FOLDED.replace("ROOM", room).replace("TABLE", table) for table, room in _ROOMS.items())
    + "".join(f".c{i} {{ stroke: var(--c{i}) }} .keys .c{i} i {{ color: var(--c{i}) }}\n" for i in range(8))
)
"""Colors of lines differ in lightness and hue, 4.5 to 1 or more against their card."""
