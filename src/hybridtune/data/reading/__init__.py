"""Rows in, wherever they are and however they are written: `read` is the door."""
