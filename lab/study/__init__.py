"""Experiments with train.py and eval.py; nothing imports this folder.

__main__.py     the study: which reward makes a model use its reasoning?
arms.py         its runs of train.py, which differ in their reward alone
selection.py    what each candidate reward would pay for, before any training
maps.py         which token map finds what the answer rests on
kept.py         what the study keeps of its runs, in docs/study/
measures.py     measures of arms over seeds and questions, and their intervals
report.py       docs/study.md, from what is kept
warm_start.py   a checkpoint that has learned a data set's solutions in train.py's format
make_micro.py   the checkpoints data/micro/, made from nothing, and data/micro2/
"""
