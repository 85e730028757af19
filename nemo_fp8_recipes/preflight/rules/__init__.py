"""The rules, one subject a file. Every module here is imported by `preflight.registry.all_rules`."""
