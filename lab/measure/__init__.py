"""Measuring it: what a checkpoint's samples say, apart from what is trained.

arms.py          the checkpoints of one evaluation, opened one after another
table1.py        accuracy, pass@k, and what the reasoning is made of
faithfulness.py  whether the answer rests on the reasoning, and whether the map is right
compare.py       arms side by side: paired differences, and at matched length
bootstrap.py     95% intervals over questions
folder.py        an evaluation's folder, from which it goes on after an interruption
"""
