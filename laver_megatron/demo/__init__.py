"""Everything a first run needs, made on the spot: a tiny Qwen2.5 checkpoint, a tiny SigLIP encoder, shards of
real photographs with questions and answers. No download, and the same bytes every time.
"""
