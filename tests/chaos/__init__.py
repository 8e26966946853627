"""Real processes under a driver that kills, stalls, cuts, fills, repeats and reorders: ``make chaos``."""
