"""The ledger as one HTML page with pictures: no network, light and dark, several runs side by side."""
