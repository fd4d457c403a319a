"""Wikipedia's dumps: from the compressed XML to plain text."""
