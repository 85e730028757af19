"""Run directories and the state they are in, read without torch and without changing anything."""
