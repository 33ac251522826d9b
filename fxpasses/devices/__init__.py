"""What things cost on a device: profiles as measured there, the keys of their rows, and where they lie."""
