"""Every parser of what others can write, as a function of bytes that either returns or refuses in words."""
