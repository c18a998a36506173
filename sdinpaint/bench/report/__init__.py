"""Rows of the suite, and the tables, plots and pages that are made of them."""
