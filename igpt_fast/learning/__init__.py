"""Learning from pixels: data, the training loop and what it saves, evaluation.

``data``, ``folders``: images as tokens in memory, by a tokenizer of ``tokenizers``. ``sources``: where pictures come
from. ``tokenize``: these as shards. ``shards``, ``lazy``: data that a run reads as it goes. ``objectives``: what is
learned. ``train``, ``schedule``, ``settings``, ``state``: the loop, its steps, its knobs, its log and checkpoint.
``run``: a whole run in a directory.
``reconstruction``: what a model of masked pixels makes of images. ``evaluate``: how good it is.
May use: pipeline, likelihood, model, image, checkpoint, and the ground; alone imports scikit-learn beside image.
"""
