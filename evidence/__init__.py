"""The papers' claims, measured on the demo model."""
