"""Experiments with train.py and eval.py; nothing imports this folder.

__main__.py     the study: which reward makes a model use its reasoning?
arms.py         its runs of train.py, which differ in their reward alone
selection.py    what each candidate reward would pay for, before any training
kept.py         what the study keeps of its runs, in docs/study/
measures.py     measures of arms over seeds and questions, and their intervals
report.py       docs/study.md, from what is kept
make_micro.py   the checkpoint data/micro/, made from nothing
bench.py        what masks and sampling cost, beside the plain way and transformers
scaling.py      what several processes change (nothing), and how much faster they are
"""
