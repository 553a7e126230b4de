"""Running it: everything around the method that a training run or an evaluation needs.

sampling.py    completions of prompts, with a cache
suffix.py      the mask's loss at less cost, and the masks of many rollouts
checkpoint.py  a Llama's directory in Hugging Face's form, read and written
hub.py         the name of a checkpoint -> its directory on this machine
flags.py       a dataclass of settings as a command line
command.py     train.py's command line: presets, --resume, --override, --dry-run
plan.py        what a run would take, by arithmetic
cost.py        the bytes and products behind plan.py, by arithmetic on a model's shape
ranks.py       several processes as one, requests to stop, progress bars
policy.py      the weights, AdamW and the sampler's copy on one of several ranks
session.py     a run around its loop: when it evaluates, logs, saves and ends
runs.py        a run's folder and the way back to its checkpoints
metrics.py     what is logged of an update
causes.py      why samples have no answer, and what helps
"""
