"""The inner problems: parameters, losses, the proximal term, and products with curvature."""
