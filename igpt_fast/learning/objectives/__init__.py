"""What is learned: one file an objective. ``next_pixel``: the paper's autoregressive one.

May use: model, ops, and the ground. Never: the loop that trains.
"""
