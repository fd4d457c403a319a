"""Inputs, whatever their format, as chunks of lines and texts."""
