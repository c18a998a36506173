"""The suite's rows, and the tables, plots and pages that are made of them."""
