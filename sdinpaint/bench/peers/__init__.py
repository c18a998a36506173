"""The systems that the suite compares behind one interface: sdinpaint, diffusers, OpenVINO and commands."""
