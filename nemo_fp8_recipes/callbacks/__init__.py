"""Injection and telemetry wired into training loops."""
