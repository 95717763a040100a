"""Models, each a short readable file whose slots are constructor arguments."""
