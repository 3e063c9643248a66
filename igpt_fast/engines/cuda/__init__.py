"""The CUDA kernels' decoder (``decoder``) and the step that it captures in CUDA graphs (``step``);
``idle``: steps that nobody uses.

May use: engines.network, engines.decoder and engines.cache, ops, backend, and the ground.
"""
