"""The stylesheet: one column of calm type, colours as variables, dark by preference, ink on paper when printed.

Contrast of text on its ground is at least 4.5 : 1 in both schemes, of the parts of plots at least 3 : 1, save for
the grounds that only carry other marks (`--still`, `--rule`). No fonts are fetched.
"""

LIGHT = """
--page:#fbfaf7; --card:#ffffff; --ink:#1c1f22; --soft:#585d63; --rule:#dcd8ce; --still:#e6e2d8;
--hero:#0f6259; --hero-soft:#4f958b; --other:#6b7178; --lost:#b4532a; --over:#a3232b;
--warn-page:#fcefd2; --warn-ink:#5f3c00; --warn-rule:#d9a441; --bad-page:#fbe4e1; --bad-ink:#7d1a1a;
--p-setup:#7b8087; --p-broadcast:#4b5563; --p-train:#22577a; --p-aggregate:#8b5e34; --p-synthesise:#2b8a78;
--p-filter:#b07d14; --p-distil:#8a4f7d; --p-tune:#c2573a; --p-exam:#5d62b0; --p-more:#8a8f98;
"""

DARK = """
--page:#131618; --card:#1a1e21; --ink:#e9e7e2; --soft:#a9afb6; --rule:#30363b; --still:#2b3136;
--hero:#5fc9ba; --hero-soft:#3c8f84; --other:#959ca4; --lost:#e5895f; --over:#f0787d;
--warn-page:#33270d; --warn-ink:#f6d795; --warn-rule:#8a6a22; --bad-page:#3a1a1a; --bad-ink:#f7b5b0;
--p-setup:#8d939b; --p-broadcast:#b9c0c9; --p-train:#5fa3d0; --p-aggregate:#c29a6b; --p-synthesise:#4fbfa9;
--p-filter:#dcae4e; --p-distil:#c58ab8; --p-tune:#ea8a6d; --p-exam:#9a9ee6; --p-more:#777d86;
"""

LAYOUT = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue","Liberation Sans",Arial,sans-serif;font-variant-numeric:tabular-nums}
.wrap{max-width:66rem;margin:0 auto;padding:0 1.5rem}
h1,h2,.figure-big{font-family:"Iowan Old Style","Palatino Linotype",Palatino,Charter,Georgia,"Liberation Serif",serif;
font-weight:500;letter-spacing:-.005em}
h1{font-size:clamp(1.6rem,1.1rem + 2.1vw,2.5rem);line-height:1.2;margin:.4rem 0 1rem;max-width:26em;text-wrap:balance}
h2{font-size:1.5rem;line-height:1.25;margin:0 0 .4rem}
h3{font-size:1rem;margin:1.6rem 0 .5rem}
p{margin:.4rem 0 .8rem;max-width:52rem;text-wrap:pretty}
a{color:var(--hero)}
header{padding:2.6rem 0 1.4rem}
.kicker{color:var(--soft);font-size:.875rem;letter-spacing:.02em;margin:0}
.lead{font-size:1.125rem}
.soft,figcaption,.note{color:var(--soft)}
.stamp{background:var(--warn-page);color:var(--warn-ink);border-bottom:1px solid var(--warn-rule);padding:.6rem 0}
.stamp p{margin:0;max-width:none;font-size:.9375rem}
.failed{background:var(--bad-page);color:var(--bad-ink);border-radius:.4rem;padding:.7rem 1rem;max-width:none}
nav{border-top:1px solid var(--rule);border-bottom:1px solid var(--rule);padding:.55rem 0;margin:1.6rem 0 0;
font-size:.875rem;display:flex;flex-wrap:wrap;gap:.2rem 1.25rem}
nav a{color:var(--soft);text-decoration:none;padding:.1rem 0}
nav a:hover,nav a:focus-visible{color:var(--ink);text-decoration:underline}
section{padding:2.4rem 0 1.6rem;border-bottom:1px solid var(--rule)}
section:last-of-type{border-bottom:0}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:1px;background:var(--rule);
border:1px solid var(--rule);border-radius:.5rem;overflow:hidden;margin:1.6rem 0 0}
.tile{background:var(--card);padding:.95rem 1.1rem}
.tile dt{font-size:.8125rem;color:var(--soft)}
.tile dd{margin:0}
.tile dd.figure-big{font-size:1.75rem;line-height:1.25}
.tile dd.note{font-size:.8125rem;line-height:1.4}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,19.5rem),1fr));gap:1.5rem 2rem;
margin:1.2rem 0}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1rem 2.6rem;align-items:start}
.pair>*{min-width:0}
figure{margin:1rem 0;min-width:0}
figure h3{margin:0 0 .1rem}
.plots figure{margin:0;max-width:27rem}
figcaption{font-size:.8125rem;line-height:1.45;margin:.25rem 0 .9rem}
svg{display:block;overflow:visible}
svg text{font-size:12px;fill:var(--ink)}
svg .tick{font-size:11px;fill:var(--soft)}
svg .value{font-size:11.5px}
.bars text{font-size:13px}.bars .value{font-size:13px}
svg .label{fill:var(--soft)}
.hero .label,.hero .value{fill:var(--ink);font-weight:650}
.grid{stroke:var(--rule);stroke-width:1}
.chance{stroke:var(--lost);stroke-width:1.4;stroke-dasharray:4 3}
.whisker{stroke-width:2;stroke:var(--other)}
.dot{fill:var(--card);stroke:var(--other);stroke-width:2}
.target .whisker{stroke:var(--hero-soft)}.target .dot{fill:var(--hero-soft);stroke:var(--hero-soft)}
.hero .whisker{stroke:var(--hero);stroke-width:3}.hero .dot{fill:var(--hero);stroke:var(--hero)}
rect.hero,rect.turn0{fill:var(--hero)}rect.turn1{fill:var(--hero-soft)}rect.turn2{fill:var(--hero)}
rect.turn3{fill:var(--hero-soft)}rect.flow{fill:var(--other)}rect.still{fill:var(--still)}rect.lost{fill:var(--lost)}
rect.over{fill:var(--over)}
.bars rect{stroke:var(--page);stroke-width:1}
.budget{stroke:var(--ink);stroke-width:2.5}
.rdp{fill:var(--page);stroke:var(--lost);stroke-width:2}
.meter{min-width:4rem;max-width:12rem;margin-top:.35rem}
.key{display:flex;flex-wrap:wrap;gap:.15rem 1.1rem;list-style:none;padding:0;margin:.3rem 0;
font-size:.8125rem;color:var(--soft)}
.key li{display:flex;align-items:center;gap:.4rem}
.key svg{flex:none}
.scroll{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;width:100%;font-size:.875rem;line-height:1.4}
caption{text-align:left;color:var(--soft);font-size:.8125rem;padding-bottom:.4rem;caption-side:top}
th,td{padding:.45rem .9rem .45rem 0;vertical-align:top;border-bottom:1px solid var(--rule)}
thead th{font-weight:500;color:var(--soft);font-size:.8125rem;vertical-align:bottom;border-bottom-color:var(--other)}
tbody th{font-weight:600;white-space:nowrap}
.wide{min-width:50rem}
.wide code{overflow-wrap:break-word}
.txt{text-align:left}.num{text-align:right;white-space:nowrap}
th:last-child,td:last-child{padding-right:0}
code,pre{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace;font-size:.8125rem}
code{overflow-wrap:anywhere}
code[title]{white-space:nowrap}
pre{overflow-x:auto;background:var(--card);border:1px solid var(--rule);border-radius:.4rem;
padding:.9rem 1rem;line-height:1.5}
.missing{color:var(--soft);font-style:italic}
.alert{color:var(--over);font-weight:600}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr));gap:1rem;margin:.8rem 0}
article{background:var(--card);border:1px solid var(--rule);border-radius:.5rem;padding:.9rem 1.1rem;min-width:0}
article h4{margin:0 0 .5rem;font-size:.8125rem;font-weight:500;color:var(--soft)}
article p{margin:0 0 .6rem;overflow-wrap:anywhere;white-space:pre-line;unicode-bidi:isolate;
font-size:.9375rem;line-height:1.5}
article p.question{font-weight:600}
article p:last-child{margin-bottom:0}
article .reason{color:var(--lost);font-weight:600}
details{margin:.8rem 0}
summary{cursor:pointer;font-weight:500;padding:.25rem 0}
:focus-visible{outline:2px solid var(--hero);outline-offset:2px}
footer{color:var(--soft);font-size:.8125rem;padding:0 0 3rem}
@media screen and (max-width:56rem){.tiles{grid-template-columns:1fr 1fr}}
@media screen and (max-width:40rem){.wrap{padding:0 1rem}header{padding-top:1.5rem}section{padding:1.7rem 0 1.1rem}
.tile{padding:.75rem .85rem}.tile dd.figure-big{font-size:1.4rem}}
@media print{@page{margin:16mm}body{font-size:10pt;background:#fff}.wrap{max-width:none;padding:0}nav{display:none}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
section{padding:1.2rem 0 .8rem;break-inside:auto}h2,h3{break-after:avoid}figure,article,tr,.tile{break-inside:avoid}
.scroll{overflow:visible}pre{white-space:pre-wrap}details::details-content{content-visibility:visible;height:auto}}
"""

PHASE_NAMES = ("setup", "broadcast", "train", "aggregate", "synthesise", "filter", "distil", "tune", "exam", "more")


def stylesheet() -> str:
    """Return the whole stylesheet; print keeps the light colours."""
    phases = "".join(f".ph-{name}{{fill:var(--p-{name})}}" for name in PHASE_NAMES)
    return (
        f":root{{color-scheme:light dark;{LIGHT}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{DARK}}}}}"
        f"{LAYOUT}{phases}"
    )
