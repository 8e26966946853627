"""A bounded model of the round, for spin."""
