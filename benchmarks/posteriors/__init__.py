"""Real posteriors as a benchmark: Pyro models, reference draws, and how close the guides come to them."""
