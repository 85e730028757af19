"""Helpers that several parts' tests share."""
