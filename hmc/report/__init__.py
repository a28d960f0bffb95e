"""One self-contained HTML page about a plan, and what it is made of.

page.py         the page: facts, charts and tables put into templates/
heatmap.py      where every routed expert is
ledger.py       memory by device and kind
timeline.py     who works when in a decode step and in a prefill
roofline.py     what kernels reach, and what memory and arithmetic allow
words.py        numbers as people read them, and what the plan is of
"""
