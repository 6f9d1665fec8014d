"""Model FLOPs of a step, of the decoder and of the image encoder."""
