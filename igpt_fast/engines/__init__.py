"""What runs a network fast, token by token or as a whole; it knows networks, never the model's classes.

``network``: what an engine asks of a network. ``decoder``: the protocol of all decoders. ``reference``, ``cpu``,
``cuda``: the decoders, with the native forward pass in ``cpu``. ``cache``: keys and values; ``encoder_cache``: those
of an encoder beside. ``memory``: how much it takes. ``choice``: which one serves, and keeps what the next images can
use.
May use: ops, backend, and the ground. Never: model, sampling.
"""
