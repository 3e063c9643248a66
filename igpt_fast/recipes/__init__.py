"""Whole reproductions, one readable script each. ``emoji``: the bundled data set and model.

May use: learning, image.
"""
