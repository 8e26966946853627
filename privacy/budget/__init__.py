"""The privacy ledger of a site."""
