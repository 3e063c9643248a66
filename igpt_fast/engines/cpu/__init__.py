"""The compiled module's engines on the CPU, on packed copies of the weights: ``decoder``, ``forward``, ``weights``.

May use: engines.network and engines.decoder, ops, backend, and the ground.
"""
