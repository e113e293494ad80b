"""What all scripts share, and no algorithm: names, data, environments, scores, runs, the processor."""

FORMAT = 3  # of checkpoint.pt, best.pt and results.json; the files of another format are refused
