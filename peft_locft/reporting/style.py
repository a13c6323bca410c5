"""The style sheet of a report's page: light and dark, wide and narrow, on paper."""

from __future__ import annotations

from collections.abc import Mapping

RULES = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif;
  -webkit-text-size-adjust: 100%; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 3rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0; }
p { margin: .5rem 0; max-width: 44rem; }
code { font: .85em ui-monospace, monospace; overflow-wrap: anywhere; }
a { color: var(--after); }
.muted, .small, small { color: var(--muted); }
.small, small { font-size: .8125rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; margin: 1rem 0; font-size: .9375rem; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1rem; margin: 1.75rem 0; }
.card { background: var(--panel); border: 1px solid var(--grid); border-radius: .6rem; padding: 1rem 1.15rem; }
.card p { margin: .2rem 0 0; font-size: .9375rem; line-height: 1.4; }
.card .small { font-size: .8125rem; margin-top: .5rem; }
.card .figure { font-size: 2rem; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums; }
.box { overflow-x: auto; margin: 1rem 0;
  background: var(--panel); border: 1px solid var(--grid); border-radius: .6rem; }
.box:focus-visible, summary:focus-visible { outline: 2px solid var(--after); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; line-height: 1.45; }
th, td { padding: .55rem .8rem; text-align: start; vertical-align: top; }
thead th { color: var(--muted); font-weight: 500; border-bottom: 1px solid var(--grid); white-space: nowrap; }
tbody tr + tr > *, tbody + tbody tr > * { border-top: 1px solid var(--grid); }
tbody th { font-weight: 500; }
tbody th.group { background: var(--page); padding-top: .8rem; }
th.group b { font-weight: 650; margin-right: .5rem; }
.metrics { min-width: 46rem; }
.metrics tbody th { width: 50%; }
.metrics th p { margin: 0; font-weight: 400; }
.number { text-align: end; white-space: nowrap; font-variant-numeric: tabular-nums; }
.number small { display: block; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.failures { min-width: 58rem; table-layout: fixed; }
.failures td { overflow-wrap: anywhere; white-space: pre-wrap; }
.failures td:nth-child(2) { overflow-wrap: normal; }
.failures th:nth-child(1) { width: 15%; }
.failures th:nth-child(2) { width: 12%; }
.failures th:nth-child(3) { width: 26%; }
.failures small { display: block; }
.pictures { columns: 26rem; column-gap: 2.5rem; margin: 1.25rem 0; }
.pictures figure { break-inside: avoid; padding-bottom: 1.5rem; }
figure { margin: 0; max-width: 36rem; }
figcaption { margin-bottom: .6rem; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: inherit !important; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; font-size: .875rem; }
.legend span::before { content: ""; display: inline-block; width: 1.4rem; height: .7rem; margin-right: .5rem;
  background: var(--swatch); print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.legend .before { --swatch: var(--before); }
.legend .after { --swatch: var(--after); }
.note { border-left: 3px solid var(--after); padding: .1rem 0 .1rem 1rem; }
ul { padding-left: 1.2rem; max-width: 46rem; }
summary { cursor: pointer; }
details { margin: 1rem 0; }
@media (max-width: 40rem) {
  main { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.4rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
  /* a metric's figures go below its words */
  .metrics { min-width: 0; }
  .metrics thead { display: none; }
  .metrics, .metrics tbody { display: block; }
  .metrics tr { display: grid; grid-template-columns: repeat(3, 1fr); padding: .6rem .8rem; }
  .metrics tbody tr > * { border: 0; padding: 0; grid-column: 1 / -1; width: auto; }
  .metrics tbody tr { border-top: 1px solid var(--grid); }
  .metrics tr > .number { grid-column: auto; text-align: start; margin-top: .4rem; }
  .metrics tr > .number::before { content: attr(data-label); display: block; font-size: .75rem; color: var(--muted); }
  .metrics tr > .count { grid-column: 1 / -1; margin-top: 0; color: var(--muted); font-size: .8125rem; }
  .metrics tr > .count::before, .metrics .count small { display: inline; font-size: inherit; }
  .metrics tr:has(.group) { background: var(--page); }
}
@media print {
  html { font-size: 9.5pt; }
  main { max-width: none; padding: 0; }
  h2 { margin-top: 1.75rem; }
  .box { overflow: visible; border: 0; }
  .metrics, .failures { min-width: 0; }
  .cards { grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); }
  .pictures { columns: 2; column-gap: 1.5rem; }
  tr, figure, .card { break-inside: avoid; }
  h2, h2 + p, figcaption, .legend, th.group { break-after: avoid; }
}
"""
# on a light page, on a dark one
PAGE = {
    "page": ("#f7f8fa", "#14191f"),
    "panel": ("#ffffff", "#1c232b"),
    "good": ("#1c7a54", "#55c797"),
    "bad": ("#b3432b", "#f08a70"),
}


def style_sheet(colours: Mapping[str, tuple[str, str]]) -> str:
    """Return the style sheet.

    Args:
        colours: of the pictures: by name, the one on a light page and the one on a dark page.
    """
    pairs = {name.replace("_", "-"): pair for name, pair in {**PAGE, **colours}.items()}
    light = " ".join(f"--{name}: {pair[0]};" for name, pair in pairs.items())
    dark = " ".join(f"--{name}: {pair[1]};" for name, pair in pairs.items())
    # on paper the light ones, whatever the screen has
    return (
        f":root {{ color-scheme: light dark; {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
        f"@media print {{ :root {{ --page: #fff; }} }}{RULES}"
    )
