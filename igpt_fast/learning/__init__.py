"""Learning from pixels: data, the training loop and what it saves, evaluation.

``data``, ``folders``: images as tokens. ``objectives``: what is learned. ``train``, ``schedule``, ``settings``,
``state``: the loop, its steps, its knobs, its log and checkpoint. ``run``: a whole run in a directory.
``finetune``: from a model that draws to one that classifies. ``evaluate``: how good it is.
May use: pipeline, likelihood, model, image, checkpoint, ops, and the ground; alone imports scikit-learn beside image.
"""
