"""Models as their users write them, for one draw: speed against a hand-vectorised form, and errors against a reference."""
