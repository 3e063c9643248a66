"""How likely a model finds images. ``nats``: of each pixel, the one definition. ``masked``: of those that were masked.

May use: model, ops, and the ground.
"""
