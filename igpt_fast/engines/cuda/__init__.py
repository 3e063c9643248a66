"""The CUDA kernels' decoder (``decoder``), the step that it takes (``step``), how that is captured in CUDA graphs
(``capture``), and the switches of both (``options``).

May use: engines.network, engines.decoder and engines.cache, ops, backend, and the ground.
"""
