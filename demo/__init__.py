"""The demo model: a small text-to-image model of SD1.x's shape, how it was trained, and what it is measured with."""
