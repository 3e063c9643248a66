"""From logits to images, in an order of their own: ``rules`` (how a token is drawn), ``decoding`` (token after token),
``speculation`` (several of them in a step, of an image that is drawn alone),
``batches`` (how many at a time), ``inpainting`` (masks, candidates), ``request`` (what is asked for),
``streaming`` (row by row), ``results``.

May use: the decoder protocol of engines, never an engine by name; image, ops, and the ground.
"""
