"""Inner and linear solvers, and the solutions that they return."""
