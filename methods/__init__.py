"""The papers' rules in this pack's terms: one file for each paper."""
