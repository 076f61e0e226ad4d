"""The style sheet of the page: light and dark, wide and narrow, screen and paper."""

from __future__ import annotations

# The shades of a heat map, p0 ... p8 and n1 ... n8, are mixed from two colours that each theme sets.
_SHADES = "".join(
    f".{sign}{level}{{fill:color-mix(in oklab,var(--{colour}) {round(100 * level / 8)}%,var(--floor))}}"
    for sign, colour in (("p", "hot"), ("n", "cold"))
    for level in range(9)
)
# One colour and one kind of dash for each curve of a chart: colour alone tells nothing to some readers.
_CURVES = "".join(
    f".c{index}{{color:var(--c{index});stroke-dasharray:{dash}}}"
    for index, dash in enumerate(("none", "7 3", "2 3", "9 3 2 3", "none", "7 3", "2 3", "9 3 2 3"))
)
STYLE = (
    """
:root{--bg:#fcfbf8;--panel:#fff;--ink:#1d1f23;--muted:#5a606a;--line:#dedbd3;--soft:#f3f1ec;--accent:#175a8c;
--good:#176b45;--bad:#a5331b;--warn:#8a5300;
--hot:#0b4a80;--cold:#a03c14;--floor:#edf1f4;
--c0:#175a8c;--c1:#b4471a;--c2:#2a7650;--c3:#7a4aa0;--c4:#7d6200;--c5:#0f7278;--c6:#a5306c;--c7:#5a606a}
@media screen and (prefers-color-scheme:dark){
:root{--bg:#15171a;--panel:#1b1e22;--ink:#e8e6e1;--muted:#a4a9b1;--line:#33373d;
--soft:#22262b;--accent:#8cc2f0;--good:#7fcfa3;--bad:#f49c84;--warn:#e5b45c;
--hot:#8fd0ff;--cold:#ffab85;--floor:#252b31;
--c0:#7cb8ee;--c1:#f0936b;--c2:#72c89c;--c3:#c5a3ec;--c4:#d8b94e;--c5:#5fc7cf;--c6:#ef90be;--c7:#a4a9b1}}
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:66rem;margin:0 auto;padding:3.5rem 1.25rem 3rem}
h1,h2,h3{line-height:1.2;font-weight:600;overflow-wrap:anywhere;margin:0;text-wrap:balance}
h1{font:600 clamp(1.7rem,1.2rem + 2.4vw,2.6rem)/1.15 ui-serif,Charter,Georgia,serif;letter-spacing:-.015em}
h2{font:600 1.45rem/1.2 ui-serif,Charter,Georgia,serif;padding-top:1.1rem;margin-bottom:1.2rem;
border-top:1px solid var(--ink)}
h3{font-size:1rem;margin-bottom:.5rem}
section{margin-top:3.2rem}
article+article,figure+figure{margin-top:2.4rem}
img.samples{image-rendering:pixelated;max-width:100%;min-width:min(100%,20rem);border:1px solid var(--line)}
ol.samples{font-size:.9rem;max-width:46rem;overflow-wrap:anywhere}
.grid figure{margin:0}
figure{margin:0;min-width:0;break-inside:avoid}
a{color:var(--accent);text-underline-offset:.15em;text-decoration-thickness:1px}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
ul{list-style:none;margin:0;padding:0}
small{display:block;font-size:.78rem;font-weight:400;color:var(--muted)}
code,pre{font:.85rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.summary{margin:.6rem 0 0;color:var(--muted);font-size:1.08rem;overflow-wrap:anywhere}
.note{margin:.6rem 0 0;font-size:.85rem;color:var(--muted);overflow-wrap:anywhere;max-width:46rem}
.notes{margin-top:1.4rem;display:grid;gap:.5rem}
.notes li{border-left:3px solid var(--line);padding:.1rem 0 .1rem .8rem;overflow-wrap:anywhere;max-width:46rem}
.notes b{font-size:.78rem;letter-spacing:.04em;text-transform:uppercase;color:var(--muted);margin-right:.3rem}
.notes .warning{border-color:var(--warn)}
.notes .warning b{color:var(--warn)}
nav{margin-top:1.4rem;font-size:.9rem}
nav ul{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem}
nav a{text-decoration:none}
nav a:hover{text-decoration:underline}
.scroll{overflow-x:auto;border-block:1px solid var(--line)}
.few{width:fit-content;min-width:min(100%,26rem);max-width:100%}
.plain{border:0;padding:.3rem 0}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.5rem .9rem;text-align:left;vertical-align:top}
thead th{vertical-align:bottom;font-weight:600;line-height:1.3;border-bottom:1px solid var(--line)}
tbody tr+tr>*{border-top:1px solid var(--line)}
th:first-child{position:sticky;left:0;z-index:1;background:var(--bg);padding-left:0}
.who{display:block;width:max-content;max-width:min(17rem,38vw);min-width:4rem;overflow-wrap:anywhere}
tbody th{font-weight:600}
.results td,.results th+th{text-align:right;white-space:nowrap}
.results thead th+th{white-space:normal;min-width:7.5rem}
.base>*{background:var(--soft)}
.base th:first-child{background:var(--soft);padding-left:.5rem}
.star{color:var(--accent);margin-right:.3em;font-size:.85em}
.pm{color:var(--muted);margin-left:.4em;font-size:.85em}
small.better{color:var(--good)}
small.worse{color:var(--bad)}
.empty{color:var(--muted)}
.grid{display:grid;gap:1.6rem 2.4rem;margin-top:1.6rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr))}
.wide{grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));margin-top:0}
figcaption{font-size:.88rem;font-weight:600;margin-bottom:.3rem;overflow-wrap:anywhere}
svg{display:block}
svg text{font-size:12px;fill:var(--muted);font-variant-numeric:tabular-nums}
.rows{display:flex;gap:.7rem;align-items:flex-start}
.pane{flex:1;min-width:0;overflow-x:auto;padding-left:4px;margin-left:-4px}
.dots,.dots svg,.map{overflow:visible}
.names{flex:none;width:max-content;max-width:38%;font-size:.8rem;line-height:22px;text-align:right}
.names li{height:22px;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.plot{padding-right:6px}
.plot svg{overflow:visible}
.axis{stroke:var(--muted)}
.rule{stroke:var(--line)}
.guide{stroke:var(--muted);stroke-dasharray:2 3}
.dot line{stroke:currentColor;stroke-width:1.5}
.dot{color:var(--muted)}
.dot circle{fill:currentColor;stroke:var(--bg)}
.dot.best{color:var(--accent)}
.dot.base circle{fill:var(--bg);stroke:currentColor;stroke-width:1.8}
.curve polyline,.curve line{fill:none;stroke:currentColor;stroke-width:1.6;
stroke-linejoin:round;vector-effect:non-scaling-stroke}
.curve circle{fill:currentColor}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;font-size:.85rem;margin-bottom:.5rem}
.legend li{display:flex;align-items:center;gap:.4rem;overflow-wrap:anywhere;min-width:0}
.legend svg{flex:none}
.legend b{font-variant-numeric:tabular-nums}
.axis-name{margin:0 0 .5rem;font-size:.8rem;color:var(--muted)}
.right{text-align:right}
.scale{display:flex;flex-wrap:wrap;align-items:center;gap:.2rem .6rem;margin:0 0 .6rem;
font-size:.82rem;color:var(--muted)}
.bar{width:9rem;height:.7rem;background:linear-gradient(90deg in oklab,var(--floor),var(--hot))}
.both{background:linear-gradient(90deg in oklab,var(--cold),var(--floor),var(--hot))}
span:has(.gap){display:flex;gap:.4rem;align-items:center;margin-left:.8rem}
.map,.gap{background:repeating-linear-gradient(135deg,transparent 0 3px,var(--line) 3px 4px) no-repeat}
.gap{width:1rem;height:.8rem;border:1px solid var(--line)}
.cells{stroke:var(--bg)}
.cells *{stroke-width:1;vector-effect:non-scaling-stroke}
.graph{margin:auto}
.edge{fill:none;stroke:var(--muted)}
.edge .head{fill:var(--muted);stroke:none}
.box{text-decoration:none}
.box text{text-anchor:middle}
.box .name{font-size:13px;font-weight:600;fill:var(--ink)}
.box rect{fill:var(--panel);stroke:var(--accent);stroke-width:1.3}
.box.model rect{fill:var(--soft);stroke:var(--line)}
a.box:hover .name{text-decoration:underline}
.lineage{font-size:.86rem}
.lineage td:nth-child(2){white-space:nowrap}
.lineage td:nth-child(4){min-width:15rem}
.details{display:flex;flex-wrap:wrap;gap:.1rem 1rem}
.details li{overflow-wrap:anywhere}
.details span,dt{color:var(--muted)}
tr:target>*,tr:target th:first-child{background:var(--soft)}
details{border-top:1px solid var(--line);padding:.6rem 0}
summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;background:var(--soft);padding:1rem;margin:.8rem 0 0;border-radius:4px}
dl{display:grid;gap:.5rem 2rem;margin:.8rem 0 0;font-size:.9rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,17rem),1fr))}
dd{margin:0;overflow-wrap:anywhere}
footer{margin-top:3.5rem;font-size:.82rem;color:var(--muted);overflow-wrap:anywhere}
@media(max-width:30rem){main{padding:1.8rem 1rem 2rem}th,td{padding:.45rem .6rem}}
@media print{html{color-scheme:light;font-size:11px}body{font-size:1rem;background:#fff}
th:first-child{position:static;background:none}th,td{padding:.4rem .6rem}main{max-width:none;padding:0}nav{display:none}
svg text,.box .name{font-size:9px}.map{min-width:0!important}
.scroll,.pane,pre{overflow:visible}
.graph{max-width:100%;height:auto}
section{margin-top:1.6rem}
tr{break-inside:avoid}
pre{white-space:pre-wrap}
.cells,.scale{print-color-adjust:exact;-webkit-print-color-adjust:exact}
details::details-content{content-visibility:visible;display:block}}
"""
    + _SHADES
    + "\n"
    + _CURVES
    + "\n"
)
