"""The demo: five newsrooms on one machine."""
