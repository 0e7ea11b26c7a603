"""What a rig computer needs around the daemon: its configuration, its services, and a check of all of it."""
