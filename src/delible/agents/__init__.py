"""Agents: one file per idea."""
