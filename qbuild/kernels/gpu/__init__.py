"""The quantizers as Triton kernels: the bytes of ``qbuild.kernels``, made on a CUDA device.

Only a worker that was given a device imports these modules; they need torch and triton.
"""
