"""Labelled rows: `reading` them from wherever they are, `checking` and repairing them, `doubts` about them, and the
`split` of what is held out.

Nothing in this package imports torch, transformers or a model.
"""
