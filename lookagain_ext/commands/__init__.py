"""What stands behind each subcommand of `lookagain`; loaded when it is called."""
