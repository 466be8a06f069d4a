"""One self-contained page about one run: what was gained, what it cost in privacy, bytes and seconds.

page.py      the page, top to bottom; `python -m simulations.report.page RUN_DIR`
sections.py  one function per section
plots.py     inline SVG
tables.py    markup that escapes by default
words.py     figures into words; an epsilon never leaves it without its statement
record.py    a run directory as values; what is absent stays absent
style.py     the stylesheet
"""
