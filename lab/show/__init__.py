"""Showing it: on a terminal, as figures and as pages of HTML.

explain.py   one question explained; `python atman.py` runs it
heat.py      a trace and its saliency: sentences, equations, the scale, JSON
terminal.py  a trace and its saliency on a terminal
tables.py    the text tables
figures.py   the PNGs: differences, Figures 1 to 5 and the learning curves
report.py    results.json -> report.html
page.py      pages by jinja2: page.html is the frame, report.html and trace.html extend it,
             macros.html has what both use, style.css their looks
text.py      text of others made safe to show
"""
