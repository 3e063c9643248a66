"""Learning from pixels: data, the training loop and what it saves, evaluation.

``data``, ``folders``: images as tokens. ``objectives``: what is learned. ``train``, ``schedule``, ``settings``,
``state``: the loop, its steps, its knobs, its log and checkpoint. ``run``: a whole run in a directory.
``reconstruction``: what a model of masked pixels makes of images. ``evaluate``: how good it is. ``extraction``: what it
makes of images, as features. ``probe``: what can be read off these, by ``classifiers`` and the ``attentive`` one, told
as a ``probe_result``.
May use: pipeline, likelihood, model, image, ops, checkpoint, and the ground; alone imports scikit-learn beside image.
"""
