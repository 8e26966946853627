"""Secure aggregation: keys, shares, masks, messages and the transcript of one round."""
