"""Connections to a teacher's ranks, one file per medium."""
