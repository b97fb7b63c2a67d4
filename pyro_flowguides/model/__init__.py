"""What a Pyro model is to everything else: sites, plates, the flat vector of its latents, its log-density."""
