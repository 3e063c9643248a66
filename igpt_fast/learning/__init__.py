"""Learning from pixels: data, the training loop and what it saves, evaluation.

``data``, ``folders``: images as tokens. ``objectives``: what is learned. ``train``, ``schedule``, ``settings``,
``state``: the loop, its steps, its knobs, its log and checkpoint. ``distributed``, ``checkpoints``, ``throughput``: a
step by several processes, what they save, how fast they are. ``run``: a whole run in a directory.
``finetune``: from a model that draws to one that classifies. ``reconstruction``: what a model of masked pixels makes of
images. ``evaluate``: how good it is. ``extraction``: what it makes of images, as features. ``probe``: what can be read
off these, by ``classifiers`` and the ``attentive`` one, told as a ``probe_result``.
May use: pipeline, likelihood, model, image, checkpoint, world, ops, and the ground; alone imports scikit-learn beside
image.
"""
