"""Resumable runs: what is made durable, when, and how it is found again."""
