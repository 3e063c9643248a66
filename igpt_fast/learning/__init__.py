"""Learning from pixels: data, the training loop and what it saves, features and what can be read off them.

``data``, ``folders``: images as tokens in memory, by a tokenizer of ``tokenizers``; ``sources``: where pictures come
from; ``tokenize``: these as shards, in the processes of ``pool``, taken as ``taking`` says; ``shards``, ``lazy``: data
that a run reads as it goes.
``objectives``: what is learned.
``train``, ``schedule``, ``settings``, ``state``: the loop, what a step is given, its knobs, its log and checkpoint.
``stepping``: a step, whether ``watch`` finds it finite; on a GPU of ``resident`` images, and captured by ``graphs``.
``distributed``, ``checkpoints``, ``throughput``: a step by several processes, what they save, how fast they are.
``run``: a whole run in a directory; ``curve``: the picture of its log.
``reconstruction``: what a model of masked pixels makes of images.
``finetune``: from a model that draws to one that classifies. ``evaluate``: how good a model is.
``extraction``: what it makes of images, as features; ``features``: that as a transformer of scikit-learn;
``feature_files``: those of ``feature_sources`` in a file.
``probe``: what can be read off them, by ``classifiers`` and the ``attentive`` one, told as a ``probe_result``.
May use: pipeline, likelihood, model, engines (captures in CUDA graphs), image, checkpoint, ops, world, and the ground;
alone imports scikit-learn beside image.
"""
