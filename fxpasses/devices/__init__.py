"""What things cost on a device: profiles, as measured there."""
