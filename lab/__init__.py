"""Where the method of model.py, atman.py and grpo.py is run, measured, shown and studied.

    run/       what a run needs: weights, sampling, several processes, checkpoints, a command line
    measure/   what a checkpoint does: accuracy, and whether its answers rest on its reasoning
    show/      what people look at: tables, figures, heat maps and reports
    study/     experiments with train.py and eval.py, and the checkpoint of the embedded task

A folder imports only those above it, the three files, and data/. train.py and eval.py import all
but study/, which alone imports the two commands.
"""
