"""How likely a model finds images. ``nats``: of each pixel, the one definition.

May use: model, ops, and the ground.
"""
