"""The status page of both daemons: what serves, guards and renders it; what it shows is each side's own."""
