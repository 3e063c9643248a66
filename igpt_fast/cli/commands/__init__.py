"""The commands: ``sample`` (with complete), ``score``, ``colours`` (quantize, clusters), ``train``, ``convert``,
``env``. A function's arguments are the command's options, and its docstring the help.

May use: cli.checks, cli.draw, and everything below.
"""
