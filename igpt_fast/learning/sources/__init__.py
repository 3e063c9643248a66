"""Where pictures come from: of every kind a list of them that says how many, can be cut into parts, and reads a part.

``protocol``: what all have. ``opening``: which kind a path is. ``folder``, ``archives`` (zip, tar), ``tables``
(parquet, Arrow), ``arrays`` (.npy, .npz): the kinds. Nothing is extracted to disk, unpickled, or believed about its
size.
May use: image and the ground, nothing of learning.
"""
