"""How likely a model finds images. ``nats``: of each pixel, the one definition. ``masked``: of those that were masked.
``scoring``: of many images, batch after batch. ``scores``: the result, its figures and files. ``maps``: pictures of it.
``transfer``: between host and GPU without waiting.

May use: model, sampling (batches and errors), engines.network, image, ops, and the ground.
"""
