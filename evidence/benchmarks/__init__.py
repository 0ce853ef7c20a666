"""What the methods cost, as ratios to plain sampling in the same run: python dev.py benchmark NAME. Prints only."""
