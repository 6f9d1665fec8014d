"""What training costs, and how it scales.

Here: FLOPs of a step, of the decoder (`flops`) and of the image encoder (`encoder_flops`), and how evenly images are
divided (`image_balance`): arithmetic on shapes and counts. Packages: `dry_run` and `planning` (before a run), `sweeps`
(the runs of a study), `registry` (what they leave), `studies` (what follows from them).
"""
