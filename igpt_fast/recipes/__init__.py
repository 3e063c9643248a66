"""Whole reproductions, one readable script each.

``emoji``: the bundled data set. ``fashion``: what is learned without labels, on pictures that a package of Debian has.
``cifar10``, ``imagenet``: the paper's probes of a checkpoint; ``protocol`` is what these two share.

May use: learning, pipeline, model, image, and the ground.
"""
