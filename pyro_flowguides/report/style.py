"""The style of a report: system fonts, light and dark, nothing wider than a telephone but what scrolls in its own box."""

STYLE = """
.fg-report { --paper: #ffffff; --ink: #1d2430; --muted: #5c6675; --line: #dfe3e9; --card: #f5f7fa; --area: #d3d9e2;
  --series-1: #2f6fdb; --series-2: #d9690d; --series-3: #2b8a57; --series-4: #9a4fd0;
  --good: #1f8a4c; --warn: #b86e00; --bad: #c8322b; --unknown: #5c6675;
  color: var(--ink); background: var(--paper); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; font-size: 16px; }
@media (prefers-color-scheme: dark) { .fg-report { --paper: #14181f; --ink: #e7eaf0; --muted: #9ba6b6; --line: #303846;
  --card: #1c222c; --area: #3c4657; --series-1: #7fb0ff; --series-2: #ffab66; --series-3: #6fd39b; --series-4: #cf9bff;
  --good: #58c884; --warn: #f0b04a; --bad: #ff7d74; --unknown: #9ba6b6; } }
.fg-report * { box-sizing: border-box; }
.fg-report main { max-width: 60rem; margin: 0 auto; padding: 1.2rem 1rem 3rem; }
.fg-report h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 0.8rem; overflow-wrap: anywhere; }
.fg-report h1 span { color: var(--muted); font-weight: 400; }
.fg-report h2 { font-size: 1.15rem; margin: 2.4rem 0 0.3rem; }
.fg-report p { margin: 0.3rem 0 0.7rem; max-width: 46rem; overflow-wrap: anywhere; }
.fg-report .how, .fg-report .none, .fg-report figcaption { color: var(--muted); }
.fg-report .none { border-left: 3px solid var(--line); padding-left: 0.7rem; }
.fg-verdict { border-left: 6px solid var(--tone); background: var(--card); border-radius: 6px; padding: 0.8rem 1rem; }
.fg-verdict strong { display: block; font-size: 1.2rem; line-height: 1.35; color: var(--tone); margin-bottom: 0.25rem; }
.fg-verdict p { margin: 0.3rem 0; font-size: 0.95rem; max-width: none; }
.fg-report .good { --tone: var(--good); } .fg-report .warn { --tone: var(--warn); }
.fg-report .bad { --tone: var(--bad); } .fg-report .unknown { --tone: var(--unknown); }
.fg-figures { display: flex; flex-wrap: wrap; gap: 0.4rem 2rem; margin: 0.9rem 0 0; padding: 0; }
.fg-figures div { display: flex; flex-direction: column-reverse; }
.fg-figures dt { color: var(--muted); font-size: 0.82rem; }
.fg-figures dd { margin: 0; font-size: 1.1rem; font-variant-numeric: tabular-nums; }
.fg-scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; margin: 0.5rem 0; }
.fg-report table { border-collapse: collapse; width: 100%; font-size: 0.88rem; font-variant-numeric: tabular-nums;
  background: transparent; color: inherit; margin: 0; }
.fg-report th, .fg-report td { padding: 0.3rem 0.7rem; text-align: right; white-space: nowrap; border: 0;
  border-top: 1px solid var(--line); background: transparent; }
.fg-report thead th { border-top: 0; color: var(--muted); font-weight: 600; }
.fg-report tbody th { text-align: left; font-weight: 500; }
.fg-report th.text { text-align: left; }
.fg-report td.text { text-align: left; white-space: normal; min-width: 14rem; }
.fg-report td.off { color: var(--bad); font-weight: 700; }
.fg-grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); gap: 1rem 1.2rem; }
.fg-grid figure.wide { grid-column: 1 / -1; max-width: 40rem; }
.fg-report figure { margin: 0; min-width: 0; }
.fg-report figcaption { font-size: 0.85rem; overflow-wrap: anywhere; }
.fg-report svg { display: block; width: 100%; height: auto; overflow: visible; }
.fg-report svg text { font-family: inherit; }
.fg-legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; margin: 0 0 0.6rem; font-size: 0.88rem; }
.fg-legend span::before { content: ""; display: inline-block; width: 1.1rem; height: 0.3rem; border-radius: 2px;
  margin-right: 0.4rem; vertical-align: middle; background: var(--mark); }
.fg-report dl.facts { display: grid; grid-template-columns: minmax(8rem, 14rem) 1fr; gap: 0.25rem 1rem; margin: 0.5rem 0; }
.fg-report dl.facts dt { color: var(--muted); } .fg-report dl.facts dd { margin: 0; overflow-wrap: anywhere; }
.fg-report pre { overflow-x: auto; background: var(--card); border-radius: 6px; padding: 0.7rem 0.9rem; font-size: 0.85rem;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.fg-report details summary { cursor: pointer; color: var(--muted); }
@media (max-width: 30rem) { .fg-report dl.facts { grid-template-columns: 1fr; gap: 0; }
  .fg-report dl.facts dd { margin-bottom: 0.5rem; } }
@media print { .fg-report section { break-inside: avoid; } }
"""
