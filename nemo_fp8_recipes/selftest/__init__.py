"""Transformer Engine's kernels against `numerics/`, bit for bit: what `nemo-fp8 selftest` does on a GPU node.

cases.py     the quantisers, their options, and inputs of every nasty kind
native.py    what the device's kernels make of a case
expected.py  what numerics/ makes of it
stochastic.py  where stochastic rounding may go, and how often
vectors.py   both kept in a file, to be checked elsewhere
"""
