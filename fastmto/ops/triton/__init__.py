"""The Triton kernels: the backend of the passes on GPUs."""
