"""What all scripts share, and no algorithm: names, data, environments, scores, runs, the processor."""
