"""Real posteriors as a benchmark: Pyro models, reference draws, and the distances of fitted guides from them."""
