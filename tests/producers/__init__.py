"""Real producers of images: what they need, and how they are driven."""
