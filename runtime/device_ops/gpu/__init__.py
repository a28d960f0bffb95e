"""What steps compute on GPUs, by the launches of runtime/device_ops/triton."""
