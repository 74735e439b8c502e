"""Labelled rows: `read` them from wherever they are, `check` and repair them, `split` off what is held out.

Nothing in this package imports torch, transformers or a model.
"""
