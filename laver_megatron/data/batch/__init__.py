"""From packs to the batch of a step on every rank."""
