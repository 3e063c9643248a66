"""The work of the commands that draw: ``options`` and what they mean, the ``job``, ``exports`` of its images,
``preview`` in the terminal.

May use: cli.checks, pipeline, and everything below.
"""
