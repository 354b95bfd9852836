"""Tests of the Triton kernels and their engine: on a GPU where there is one, in Triton's interpreter elsewhere."""
