"""Reads mutated files of every kind that the commands read: `python -m tests.fuzz --minutes N [--seed S]`.

`samples` are whole files, made once; `mutations` makes an input of a seed and a number; `readers` are the functions
that the commands read with, and what they may raise; `worker` is the process that reads; `run` watches over several.
"""
