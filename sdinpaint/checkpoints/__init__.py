"""Find, inspect, convert and merge checkpoint files; tensors are read only after all names and shapes are checked."""
