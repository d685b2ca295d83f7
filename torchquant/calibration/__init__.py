"""All batches through a graph: calibration, the stream that solvers see, what they keep, sums over processes."""
