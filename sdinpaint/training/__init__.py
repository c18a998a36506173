"""Train and evaluate the included demo checkpoint: procedural scenes, a judge of results, and training loops."""
