"""What training stands on: the device, Megatron-Core's ranks, the optimizer, files."""
