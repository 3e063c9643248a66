"""The CUDA kernels' decoder (``decoder``) and the step that it captures in CUDA graphs (``step``).

May use: engines.network, engines.decoder and engines.cache, ops, backend, and the ground.
"""
