"""Models of what a training run costs: pure arithmetic on shapes and counts, no tensors allocated."""
