"""The command ``igpt``. ``main``: parsing, errors, exit codes. ``checks``: what all commands check.
``terminal``: what they say. ``signature``: what they take, ``help``: how it is explained. ``progress``: how far a
training is. ``commands``: one file for each of them, or a few. ``draw``: the work of those that draw.
``score_files``: what ``igpt score`` writes.

May use: everything below; heavy imports stand inside the functions, so that ``igpt --help`` is there at once.
"""
