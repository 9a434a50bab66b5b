"""What differs between the families of hosts, and what their samplers call."""
