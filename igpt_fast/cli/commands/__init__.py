"""The commands: ``sample`` (with complete), ``demo``; ``tokenize``, ``train``, ``finetune``, ``score``, ``features``,
``probe``; ``colours`` (quantize, clusters); ``convert``, ``env``. A function's arguments are the command's options, and
its docstring the help.

May use: cli.checks, cli.draw, and everything below.
"""
