"""Triton backends `tensorrt` and `tensorrt_rtx` as one Python-based backend, for a server without NVIDIA's native ones.

This package is copied into the server's backend directory under both names and runs inside Triton's stub process, so it
imports nothing of matteserve. It reads the `config.pbtxt` that NVIDIA's native `tensorrt` backend reads; plans of
TensorRT for RTX have no native one.

::

    config.py    what config.pbtxt says, checked                         needs no GPU
    fit.py       whether a plan fits a TensorRT and a GPU                needs no GPU
    batching.py  requests into one buffer, answers out of it             needs no GPU
    tensors.py   Triton's tensors as numpy arrays and back               needs no GPU
    plan.py      a plan on a GPU: runtime, context, profile, CUDA graphs
    cuda.py      the few CUDA calls that this takes
    model.py     the class that Triton calls
"""
