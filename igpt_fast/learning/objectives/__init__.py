"""What is learned: one file an objective. ``protocol``: what the loop asks of one, and what both ask of the data.
``next_pixel``: the paper's autoregressive one. ``masked``: its BERT's. ``classification``: classes,
beside the next pixel. ``starting``: what a run begins with in place of new weights.

May use: likelihood, model, ops, and the ground. Never: the loop that trains.
"""
