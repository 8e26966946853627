"""The status pages: readers over plain HTTP for every test, and a browser for ``make test-web``."""
