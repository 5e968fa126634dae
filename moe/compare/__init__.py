"""Runs side by side: what their folders say, the statistics of seeds, the table and the page."""
