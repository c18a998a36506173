"""The systems that the suite compares, each behind one interface: sdinpaint, diffusers, OpenVINO and commands."""
