"""Files that are not trusted, to a network's tensors and back.

``names``: what tensors are called and how they are shaped. ``tensors``: files with bounds. ``pickles``: PyTorch's own
format, scanned. ``pretrained``: ``from_pretrained`` and ``save_pretrained``.
May use: config, files, checks.
"""
