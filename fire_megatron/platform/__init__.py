"""The device seam: CUDA + NCCL or CPU + gloo, process start-up, detection of fused kernels, files written whole."""
